//! Comparisons of 64-bit arguments with a machine of 32 bits.

use crate::CompileError;
use crate::graph::{Graph, Node, NodeId, Test};
use crate::lower::{Compare, Op, Rule};

/// Where `seccomp_data` keeps its fields; the machines that we know are little-endian.
pub(crate) const NR_OFFSET: u32 = 0;
pub(crate) const ARCH_OFFSET: u32 = 4;
const ARGS_OFFSET: u32 = 16;

/// The node that goes through rules in order: the first that fits returns its value, else `otherwise` is returned.
pub(crate) fn rules(
    rules: &[Rule],
    otherwise: u32,
    wide: bool,
    graph: &mut Graph,
) -> Result<NodeId, CompileError> {
    let mut next = graph.add(Node::Ret(otherwise))?;
    for rule in rules.iter().rev() {
        let mut node = graph.add(Node::Ret(rule.ret))?;
        for compare in rule.compares.iter().rev() {
            node = comparison(compare, wide, node, next, graph)?;
        }
        next = node;
    }
    Ok(next)
}

/// The node that goes on at `yes` where the comparison holds, else at `no`.
fn comparison(
    compare: &Compare,
    wide: bool,
    yes: NodeId,
    no: NodeId,
    graph: &mut Graph,
) -> Result<NodeId, CompileError> {
    let arg = Argument {
        arg: compare.arg,
        value: compare.value,
        wide,
    };
    match compare.op {
        Op::Eq => arg.equal(yes, no, graph),
        Op::Ne => arg.equal(no, yes, graph),
        Op::Gt => arg.above(Test::Greater, yes, no, graph),
        Op::Ge => arg.above(Test::GreaterOrEqual, yes, no, graph),
        Op::Le => arg.above(Test::Greater, no, yes, graph),
        Op::Lt => arg.above(Test::GreaterOrEqual, no, yes, graph),
        Op::MaskedEq => arg.masked(compare.two, yes, no, graph),
    }
}

/// One argument and what it is compared with.
struct Argument {
    arg: u8,
    value: u64,
    /// All 64 bits count, not the low 32 alone.
    wide: bool,
}

impl Argument {
    fn equal(&self, yes: NodeId, no: NodeId, graph: &mut Graph) -> Result<NodeId, CompileError> {
        let low = graph.add(Node::Jump {
            test: Test::Equal,
            k: low(self.value),
            yes,
            no,
        })?;
        let low = self.load_low(low, graph)?;
        if !self.wide {
            return Ok(low);
        }
        let high = graph.add(Node::Jump {
            test: Test::Equal,
            k: high(self.value),
            yes: low,
            no,
        })?;
        self.load_high(high, graph)
    }

    /// `test` decides between the low halves where the high ones are equal.
    fn above(&self, test: Test, yes: NodeId, no: NodeId, graph: &mut Graph) -> Result<NodeId, CompileError> {
        let low = graph.add(Node::Jump {
            test,
            k: low(self.value),
            yes,
            no,
        })?;
        let low = self.load_low(low, graph)?;
        if !self.wide {
            return Ok(low);
        }
        let equal = graph.add(Node::Jump {
            test: Test::Equal,
            k: high(self.value),
            yes: low,
            no,
        })?;
        let high = graph.add(Node::Jump {
            test: Test::Greater,
            k: high(self.value),
            yes,
            no: equal,
        })?;
        self.load_high(high, graph)
    }

    /// Here the value is the mask. Bits of `wanted` outside the mask do not count.
    fn masked(
        &self,
        wanted: u64,
        yes: NodeId,
        no: NodeId,
        graph: &mut Graph,
    ) -> Result<NodeId, CompileError> {
        let wanted = wanted & self.value;
        let mut node = yes;
        if low(self.value) != 0 {
            node = masked_half(low(self.value), low(wanted), node, no, graph)?;
            node = self.load_low(node, graph)?;
        }
        if self.wide && high(self.value) != 0 {
            node = masked_half(high(self.value), high(wanted), node, no, graph)?;
            node = self.load_high(node, graph)?;
        }
        Ok(node)
    }

    fn load_low(&self, next: NodeId, graph: &mut Graph) -> Result<NodeId, CompileError> {
        graph.add(Node::Load {
            offset: ARGS_OFFSET + 8 * u32::from(self.arg),
            next,
        })
    }

    fn load_high(&self, next: NodeId, graph: &mut Graph) -> Result<NodeId, CompileError> {
        graph.add(Node::Load {
            offset: ARGS_OFFSET + 8 * u32::from(self.arg) + 4,
            next,
        })
    }
}

fn masked_half(
    mask: u32,
    wanted: u32,
    yes: NodeId,
    no: NodeId,
    graph: &mut Graph,
) -> Result<NodeId, CompileError> {
    let equal = graph.add(Node::Jump {
        test: Test::Equal,
        k: wanted,
        yes,
        no,
    })?;
    if mask == u32::MAX {
        Ok(equal)
    } else {
        graph.add(Node::And { mask, next: equal })
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the low half is what is asked for"
)]
const fn low(value: u64) -> u32 {
    value as u32
}

const fn high(value: u64) -> u32 {
    low(value >> 32)
}
