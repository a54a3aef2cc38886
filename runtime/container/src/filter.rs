//! The system-call filter of a process, compiled before the clone and inherited as bytes.

use coracle_kernel::seccomp::{FilterFlags, Instruction};
use coracle_seccomp::{Abi, CompileError};
use coracle_spec::oci::LinuxSeccomp;

use crate::init::Filter;

/// Compiles a profile for this machine. Flags that this kernel does not know are left out where leaving them out is no
/// weaker.
pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Filter, CompileError> {
    let compiled = coracle_seccomp::compile(profile, Abi::NATIVE)?;
    let instruction = |one: &coracle_seccomp::Instruction| Instruction {
        code: one.code,
        jt: one.jt,
        jf: one.jf,
        k: one.k,
    };
    Ok(Filter {
        program: compiled.program.iter().map(instruction).collect(),
        flags: FilterFlags::from_bits_truncate(compiled.flags),
    })
}

/// The architectures whose system calls filters know, by the specification's words.
pub const SECCOMP_ARCHS: [&str; 6] = {
    let mut names = [""; 6];
    let mut i = 0;
    while i < names.len() {
        names[i] = Abi::ALL[i].name();
        i += 1;
    }
    names
};
