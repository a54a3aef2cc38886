//! OCI seccomp profile in, classic BPF program out.
//!
//! [`compile`] goes through four steps, one file each: [`lower`] turns names into numbers and rules into what each
//! number of each architecture does; [`tree`] makes a binary search of that; [`args`] compares 64-bit arguments in
//! 32-bit pieces; [`graph`] shares what is equal and lays the instructions out. [`eval`] runs a program as the kernel
//! would; the tests compare it with a plain reading of the profile.

mod arch;
mod args;
mod default_profile;
pub mod eval;
mod graph;
mod lower;
mod tree;

use coracle_spec::oci::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag};
use thiserror::Error;

pub use arch::{Abi, syscall_number};
pub use default_profile::default_profile;

/// The kernel's limit on the length of a filter.
pub const MAX_INSTRUCTIONS: usize = 4096;

/// `SECCOMP_RET_*` values, without their data.
pub mod ret {
    /// The process is killed.
    pub const KILL_PROCESS: u32 = 0x8000_0000;
    /// The thread is killed.
    pub const KILL_THREAD: u32 = 0;
    /// The thread gets SIGSYS.
    pub const TRAP: u32 = 0x0003_0000;
    /// The call fails with the number in the low 16 bits.
    pub const ERRNO: u32 = 0x0005_0000;
    /// The call waits for the listener.
    pub const NOTIFY: u32 = 0x7fc0_0000;
    /// The tracer is told, with the number in the low 16 bits.
    pub const TRACE: u32 = 0x7ff0_0000;
    /// The call is logged and carried out.
    pub const LOG: u32 = 0x7ffc_0000;
    /// The call is carried out.
    pub const ALLOW: u32 = 0x7fff_0000;
    /// The bits that tell actions apart.
    pub const ACTION: u32 = 0xffff_0000;
}

/// One instruction, field for field the kernel's `sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip where a comparison holds.
    pub jt: u8,
    /// Instructions to skip where it does not.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// A compiled profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The program.
    pub program: Vec<Instruction>,
    /// `SECCOMP_FILTER_FLAG_*` bits to load it with. A listener is not among them, see `needs_listener`.
    pub flags: u32,
    /// Some call may be handed to a listener.
    pub needs_listener: bool,
}

/// Why a profile was refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum CompileError {
    /// The program would be longer than the kernel takes.
    #[error("seccomp profile needs more than the {MAX_INSTRUCTIONS} instructions that the kernel takes")]
    TooLong,
    /// An argument that system calls do not have.
    #[error("seccomp rule compares argument {0}, system calls have 0 to 5")]
    ArgumentIndex(usize),
}

/// Compiles a profile for a machine whose own ABI is `native`.
///
/// What a profile means:
/// - the native ABI always counts; others as far as this kind of machine can run them. A call through any other ABI
///   kills the process; x32 calls where x32 is not listed fail with ENOSYS, as on a kernel without it.
/// - a call's rules are tried in the profile's order, the first that fits decides; but a rule without arguments
///   beats those with. Rules whose action is the default one are left out first. A rule that names one argument twice
///   stands for several rules with one comparison each.
/// - on 32-bit ABIs the low halves of arguments are compared; x86's `socketcall` and `ipc` follow the rules of the
///   calls that they stand for: those without arguments, and where the default lets calls pass those that refuse.
/// - names that no ABI knows are skipped. Where the default refuses, calls newer than the newest one that the profile
///   names fail with ENOSYS, so that programs fall back to older ones.
///
/// # Errors
/// The profile is too large, or compares an argument that does not exist.
pub fn compile(profile: &LinuxSeccomp, native: Abi) -> Result<Filter, CompileError> {
    let spaces = lower::lower(profile, native)?;
    let mut graph = graph::Graph::default();
    let entry = tree::program(&spaces, &mut graph)?;
    let program = graph.emit(entry)?;
    let needs_listener = uses(profile, LinuxSeccompAction::ScmpActNotify);
    Ok(Filter {
        program,
        flags: flags(profile, needs_listener),
        needs_listener,
    })
}

fn uses(profile: &LinuxSeccomp, action: LinuxSeccompAction) -> bool {
    profile.default_action() == action
        || profile
            .syscalls()
            .iter()
            .flatten()
            .any(|rule| rule.action() == action)
}

/// Absent flags mean SPEC_ALLOW, an empty list means none. TSYNC has nothing to do in a process of one thread.
fn flags(profile: &LinuxSeccomp, needs_listener: bool) -> u32 {
    const LOG: u32 = 1 << 1;
    const SPEC_ALLOW: u32 = 1 << 2;
    const WAIT_KILLABLE_RECV: u32 = 1 << 5;
    let Some(words) = profile.flags() else {
        return SPEC_ALLOW;
    };
    words.iter().fold(0, |bits, word| {
        bits | match word {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => SPEC_ALLOW,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if needs_listener => WAIT_KILLABLE_RECV,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv
            | LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
        }
    })
}

#[cfg(test)]
mod tests {
    use coracle_spec::oci::{
        LinuxSeccompArgBuilder, LinuxSeccompBuilder, LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
    };

    use super::*;

    fn profile(rules: Vec<LinuxSyscall>) -> LinuxSeccomp {
        let builder = LinuxSeccompBuilder::default().default_action(LinuxSeccompAction::ScmpActErrno);
        builder.syscalls(rules).build().unwrap()
    }

    fn rule(names: &[&str], indices: impl Iterator<Item = usize>) -> LinuxSyscall {
        let args = indices.zip(0u64..).map(|(index, value)| {
            let builder = LinuxSeccompArgBuilder::default().index(index).value(value * 7);
            builder.op(LinuxSeccompOperator::ScmpCmpEq).build().unwrap()
        });
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let builder = LinuxSyscallBuilder::default()
            .names(names)
            .action(LinuxSeccompAction::ScmpActAllow);
        builder.args(args.collect::<Vec<_>>()).build().unwrap()
    }

    #[test]
    fn a_program_that_the_kernel_would_not_take_is_refused() {
        // Each repeat of an argument is a rule of its own, two comparisons and a load or two long.
        let fits = profile(vec![rule(&["read"], std::iter::repeat_n(0, 1000))]);
        assert!(compile(&fits, Abi::X86_64).unwrap().program.len() <= MAX_INSTRUCTIONS);
        let long = profile(vec![rule(&["read"], std::iter::repeat_n(0, 3000))]);
        assert_eq!(compile(&long, Abi::X86_64), Err(CompileError::TooLong));
        // Many names times many rules: refused before the product is made.
        let names: Vec<_> = arch::names().collect();
        let huge = profile(vec![rule(&names, std::iter::repeat_n(0, 60_000)); 4]);
        assert_eq!(compile(&huge, Abi::X86_64), Err(CompileError::TooLong));
    }

    #[test]
    fn an_argument_that_does_not_exist_is_refused() {
        let profile = profile(vec![rule(&["read"], [6].into_iter())]);
        assert_eq!(
            compile(&profile, Abi::X86_64),
            Err(CompileError::ArgumentIndex(6))
        );
    }

    #[test]
    fn flags_that_are_absent_are_not_an_empty_list() {
        let mut profile = profile(Vec::new());
        assert_eq!(flags(&profile, false), 4);
        profile.set_flags(Some(Vec::new()));
        assert_eq!(flags(&profile, false), 0);
        profile.set_flags(Some(vec![
            LinuxSeccompFilterFlag::SeccompFilterFlagLog,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv,
        ]));
        assert_eq!(flags(&profile, false), 2);
        assert_eq!(flags(&profile, true), 2 | 32);
    }

    #[test]
    fn an_empty_profile_is_its_default_action() {
        let filter = compile(&profile(Vec::new()), Abi::X86_64).unwrap();
        let call = |nr| eval::Data {
            nr,
            arch: Abi::X86_64.audit_arch(),
            ..eval::Data::default()
        };
        assert_eq!(eval::evaluate(&filter.program, &call(0)), Ok(ret::ERRNO | 1));
        assert_eq!(eval::evaluate(&filter.program, &call(9999)), Ok(ret::ERRNO | 1));
        assert_eq!(
            eval::evaluate(&filter.program, &call(0x4000_0000)),
            Ok(ret::ERRNO | 38)
        );
        let foreign = eval::Data {
            arch: Abi::Aarch64.audit_arch(),
            ..eval::Data::default()
        };
        assert_eq!(eval::evaluate(&filter.program, &foreign), Ok(ret::KILL_PROCESS));
    }
    #[test]
    fn only_what_is_newer_than_the_newest_named_call_seems_missing() {
        // Calls 0 and 1 are named, the second to be refused as everything else is.
        let mut refused = rule(&["write"], std::iter::empty());
        refused
            .set_action(LinuxSeccompAction::ScmpActErrno)
            .set_args(None);
        let profile = profile(vec![rule(&["read"], std::iter::empty()), refused]);
        let filter = compile(&profile, Abi::X86_64).unwrap();
        let answer = |nr| {
            let data = eval::Data {
                nr,
                arch: Abi::X86_64.audit_arch(),
                ..eval::Data::default()
            };
            eval::evaluate(&filter.program, &data).unwrap()
        };
        assert_eq!(
            [answer(0), answer(1), answer(2)],
            [ret::ALLOW, ret::ERRNO | 1, ret::ERRNO | 38]
        );
    }
}
