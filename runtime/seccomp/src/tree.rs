//! The search for what a call does: by audit architecture, then by number.

use crate::args::{self, ARCH_OFFSET, NR_OFFSET};
use crate::graph::{Graph, Node, NodeId, Test};
use crate::lower::{Body, Space};
use crate::{CompileError, ret};

/// The entry node of the whole program.
pub(crate) fn program(spaces: &[Space], graph: &mut Graph) -> Result<NodeId, CompileError> {
    let mut node = graph.add(Node::Ret(ret::KILL_PROCESS))?;
    // The first space is the native one: it is added last, so it is asked for first and lies nearest.
    for space in spaces.iter().rev() {
        let search = search(&space.bodies, graph)?;
        let section = graph.add(Node::Load {
            offset: NR_OFFSET,
            next: search,
        })?;
        node = graph.add(Node::Jump {
            test: Test::Equal,
            k: space.audit_arch,
            yes: section,
            no: node,
        })?;
    }
    graph.add(Node::Load {
        offset: ARCH_OFFSET,
        next: node,
    })
}

/// A binary search. Its depth is the logarithm of the length, so the recursion is shallow.
fn search(bodies: &[(u32, Body)], graph: &mut Graph) -> Result<NodeId, CompileError> {
    match bodies {
        [] => graph.add(Node::Ret(ret::KILL_PROCESS)),
        [(_, Body::Ret(value))] => graph.add(Node::Ret(*value)),
        [
            (
                _,
                Body::Rules {
                    rules,
                    otherwise,
                    wide,
                },
            ),
        ] => args::rules(rules, *otherwise, *wide, graph),
        _ => {
            let (below, above) = bodies.split_at(bodies.len() / 2);
            let no = search(below, graph)?;
            let yes = search(above, graph)?;
            graph.add(Node::Jump {
                test: Test::GreaterOrEqual,
                k: above[0].0,
                yes,
                no,
            })
        }
    }
}
