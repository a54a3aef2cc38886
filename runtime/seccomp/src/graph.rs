//! Programs as graphs of nodes, equal ones shared, and their layout as instructions.

use std::collections::BTreeMap;

use crate::{CompileError, Instruction, MAX_INSTRUCTIONS};

/// Handle of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NodeId(usize);

/// How a jump compares the accumulator with its constant; all unsigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Test {
    Equal,
    Greater,
    GreaterOrEqual,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Node {
    /// Ends with this answer.
    Ret(u32),
    /// Loads a word of `seccomp_data` into the accumulator.
    Load { offset: u32, next: NodeId },
    /// Masks the accumulator.
    And { mask: u32, next: NodeId },
    /// Goes on at one of two places.
    Jump {
        test: Test,
        k: u32,
        yes: NodeId,
        no: NodeId,
    },
}

/// The nodes so far. A node is added after those that it leads to, so every edge goes to a smaller handle.
#[derive(Default)]
pub(crate) struct Graph {
    nodes: Vec<Node>,
    ids: BTreeMap<Node, NodeId>,
}

impl Graph {
    /// Adds a node, or finds an equal one: what a node does depends on nothing but itself and the accumulator.
    pub(crate) fn add(&mut self, node: Node) -> Result<NodeId, CompileError> {
        if let Node::Jump { yes, no, .. } = node
            && yes == no
        {
            return Ok(yes);
        }
        if let Some(id) = self.ids.get(&node) {
            return Ok(*id);
        }
        // Each node that is kept becomes an instruction at least; a few may be unreachable in the end.
        if self.nodes.len() >= 4 * MAX_INSTRUCTIONS {
            return Err(CompileError::TooLong);
        }
        let id = NodeId(self.nodes.len());
        self.nodes.push(node);
        self.ids.insert(node, id);
        Ok(id)
    }

    /// Lays out what can be reached from `entry`.
    pub(crate) fn emit(&self, entry: NodeId) -> Result<Vec<Instruction>, CompileError> {
        let reachable = self.reachable(entry);
        let mut layout = Layout {
            graph: self,
            reversed: Vec::new(),
            at: vec![0; self.nodes.len()],
        };
        for (index, _) in reachable.iter().enumerate().filter(|(_, reachable)| **reachable) {
            layout.node(NodeId(index));
            if layout.reversed.len() > MAX_INSTRUCTIONS {
                return Err(CompileError::TooLong);
            }
        }
        layout.reversed.reverse();
        Ok(layout.reversed)
    }

    fn reachable(&self, entry: NodeId) -> Vec<bool> {
        let mut reachable = vec![false; entry.0 + 1];
        reachable[entry.0] = true;
        for index in (0..=entry.0).rev() {
            if !reachable[index] {
                continue;
            }
            match self.nodes[index] {
                Node::Ret(_) => {}
                Node::Load { next, .. } | Node::And { next, .. } => reachable[next.0] = true,
                Node::Jump { yes, no, .. } => {
                    reachable[yes.0] = true;
                    reachable[no.0] = true;
                }
            }
        }
        reachable
    }
}

/// Instructions are laid out from the end of the program to its start: jumps go forward only, so each target has its
/// place when it is jumped to.
struct Layout<'a> {
    graph: &'a Graph,
    reversed: Vec<Instruction>,
    /// The place of each node in `reversed`; of answers, their nearest copy.
    at: Vec<usize>,
}

impl Layout<'_> {
    fn node(&mut self, id: NodeId) {
        match self.graph.nodes[id.0] {
            Node::Ret(value) => self.push(RET, value),
            Node::Load { offset, next } => {
                self.fall_through(next);
                self.push(LOAD, offset);
            }
            Node::And { mask, next } => {
                self.fall_through(next);
                self.push(AND, mask);
            }
            Node::Jump { test, k, yes, no } => {
                let (jt, jf) = self.reach(yes, no);
                let code = match test {
                    Test::Equal => JUMP_EQUAL,
                    Test::Greater => JUMP_GREATER,
                    Test::GreaterOrEqual => JUMP_GREATER_OR_EQUAL,
                };
                self.reversed.push(Instruction { code, jt, jf, k });
            }
        }
        self.at[id.0] = self.reversed.len() - 1;
    }

    fn push(&mut self, code: u16, k: u32) {
        self.reversed.push(Instruction {
            code,
            jt: 0,
            jf: 0,
            k,
        });
    }

    /// Instructions between the next one and `place`.
    fn distance(&self, place: usize) -> usize {
        self.reversed.len() - place - 1
    }

    /// Makes `next` what follows the next instruction.
    fn fall_through(&mut self, next: NodeId) {
        if self.distance(self.at[next.0]) != 0 {
            self.stepping_stone(next);
        }
    }

    /// Places an instruction that leads to `target`: a copy of an answer, else a long jump.
    fn stepping_stone(&mut self, target: NodeId) -> usize {
        if let Node::Ret(value) = self.graph.nodes[target.0] {
            self.push(RET, value);
            self.at[target.0] = self.reversed.len() - 1;
        } else {
            let distance = self.distance(self.at[target.0]);
            // Programs are far shorter than 2^32.
            self.push(JUMP_ALWAYS, u32::try_from(distance).unwrap_or(u32::MAX));
        }
        self.reversed.len() - 1
    }

    /// The offsets of two targets. A conditional jump reaches 255 instructions; beyond, a stepping stone is placed,
    /// which moves the other target away by one.
    fn reach(&mut self, yes: NodeId, no: NodeId) -> (u8, u8) {
        let (mut yes_at, mut no_at) = (self.at[yes.0], self.at[no.0]);
        loop {
            match (
                u8::try_from(self.distance(yes_at)),
                u8::try_from(self.distance(no_at)),
            ) {
                (Ok(jt), Ok(jf)) => return (jt, jf),
                (Err(_), _) => yes_at = self.stepping_stone(yes),
                (_, Err(_)) => no_at = self.stepping_stone(no),
            }
        }
    }
}

pub(crate) const LOAD: u16 = 0x20;
pub(crate) const AND: u16 = 0x54;
pub(crate) const RET: u16 = 0x06;
pub(crate) const JUMP_ALWAYS: u16 = 0x05;
pub(crate) const JUMP_EQUAL: u16 = 0x15;
pub(crate) const JUMP_GREATER: u16 = 0x25;
pub(crate) const JUMP_GREATER_OR_EQUAL: u16 = 0x35;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{Data, evaluate};

    #[test]
    fn far_targets_are_reached() {
        let mut graph = Graph::default();
        let rare = graph.add(Node::Ret(7)).unwrap();
        let far = graph
            .add(Node::Load {
                offset: 16,
                next: rare,
            })
            .unwrap();
        let mut node = graph.add(Node::Ret(0)).unwrap();
        for k in 1..=600 {
            node = graph
                .add(Node::Jump {
                    test: Test::Equal,
                    k,
                    yes: if k % 2 == 0 { far } else { rare },
                    no: node,
                })
                .unwrap();
        }
        let entry = graph
            .add(Node::Load {
                offset: 0,
                next: node,
            })
            .unwrap();
        let program = graph.emit(entry).unwrap();
        assert!(program.iter().any(|instruction| instruction.code == JUMP_ALWAYS));
        for nr in 0..=601 {
            let data = Data {
                nr,
                ..Data::default()
            };
            let expected = if (1..=600).contains(&nr) { 7 } else { 0 };
            assert_eq!(evaluate(&program, &data), Ok(expected), "{nr}");
        }
    }

    #[test]
    fn equal_nodes_are_one_and_jumps_to_one_place_are_none() {
        let mut graph = Graph::default();
        let a = graph.add(Node::Ret(1)).unwrap();
        assert_eq!(graph.add(Node::Ret(1)).unwrap(), a);
        assert_eq!(
            graph
                .add(Node::Jump {
                    test: Test::Equal,
                    k: 3,
                    yes: a,
                    no: a
                })
                .unwrap(),
            a
        );
    }
}
