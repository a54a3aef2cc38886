//! An interpreter of the instructions that filters are made of.

use thiserror::Error;

use crate::Instruction;
use crate::graph::{AND, JUMP_ALWAYS, JUMP_EQUAL, JUMP_GREATER, JUMP_GREATER_OR_EQUAL, LOAD, RET};

/// What a filter sees of a call, as the kernel's `seccomp_data`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Data {
    /// Number of the call.
    pub nr: u32,
    /// Audit architecture.
    pub arch: u32,
    /// Address of the instruction that made the call.
    pub instruction_pointer: u64,
    /// Arguments.
    pub args: [u64; 6],
}

impl Data {
    /// The 32-bit word at a byte offset, in little-endian layout.
    fn word(&self, offset: u32) -> Option<u32> {
        let half = |value: u64, high: bool| if high { value >> 32 } else { value & 0xffff_ffff };
        let word = match offset {
            0 => return Some(self.nr),
            4 => return Some(self.arch),
            8 | 12 => half(self.instruction_pointer, offset == 12),
            16..64 if offset.is_multiple_of(4) => half(
                *self.args.get(usize::try_from(offset - 16).ok()? / 8)?,
                offset % 8 == 4,
            ),
            _ => return None,
        };
        u32::try_from(word).ok()
    }
}

/// Why a program cannot be run; the kernel would have refused to load it.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum EvalError {
    /// Control leaves the program.
    #[error("control leaves the program at {0}")]
    OutOfProgram(usize),
    /// An instruction that filters are not made of.
    #[error("instruction {0} is unknown")]
    UnknownInstruction(usize),
    /// A load of something that is not there.
    #[error("instruction {0} loads from a bad offset")]
    BadOffset(usize),
}

/// Runs a program over the data of one call and gives its answer. Jumps go forward only, so it ends.
///
/// # Errors
/// The program is malformed on the way that was taken.
pub fn evaluate(program: &[Instruction], data: &Data) -> Result<u32, EvalError> {
    let mut accumulator = 0u32;
    let mut at = 0usize;
    loop {
        let Instruction { code, jt, jf, k } = *program.get(at).ok_or(EvalError::OutOfProgram(at))?;
        let branch = |holds: bool| usize::from(if holds { jt } else { jf });
        let skip = match code {
            RET => return Ok(k),
            LOAD => {
                accumulator = data.word(k).ok_or(EvalError::BadOffset(at))?;
                0
            }
            AND => {
                accumulator &= k;
                0
            }
            JUMP_ALWAYS => usize::try_from(k).map_err(|_| EvalError::OutOfProgram(at))?,
            JUMP_EQUAL => branch(accumulator == k),
            JUMP_GREATER => branch(accumulator > k),
            JUMP_GREATER_OR_EQUAL => branch(accumulator >= k),
            _ => return Err(EvalError::UnknownInstruction(at)),
        };
        at = at.checked_add(skip + 1).ok_or(EvalError::OutOfProgram(at))?;
    }
}
