//! Loading of seccomp filters into the calling thread.

use std::os::fd::{FromRawFd, OwnedFd};

use crate::{Errno, Error, Result};

/// One instruction of classic BPF, laid out as the kernel's `sock_filter`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Jump where a comparison holds.
    pub jt: u8,
    /// Jump where it does not.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

bitflags::bitflags! {
    /// The `SECCOMP_FILTER_FLAG_*` flags.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct FilterFlags: u32 {
        /// Every thread of the process gets the filter.
        const TSYNC = 1 << 0;
        /// Every action but ALLOW is logged.
        const LOG = 1 << 1;
        /// Leaves the mitigation of speculative store bypass off.
        const SPEC_ALLOW = 1 << 2;
        /// A descriptor for the NOTIFY action comes back.
        const NEW_LISTENER = 1 << 3;
        /// A notified thread that has been received waits for its answer; only a fatal signal interrupts it.
        const WAIT_KILLABLE_RECV = 1 << 5;
    }
}

/// Loads a filter; the listener where `NEW_LISTENER` was asked for.
///
/// Needs no_new_privs or CAP_SYS_ADMIN. The program is checked by the kernel.
pub fn load(program: &[Instruction], flags: FilterFlags) -> Result<Option<OwnedFd>> {
    let args = |program: &[Instruction]| {
        format!(
            "SECCOMP_SET_MODE_FILTER, {flags:?}, {} instructions",
            program.len()
        )
    };
    let Ok(len) = u16::try_from(program.len()) else {
        return Err(Error::new("seccomp", args(program), Errno::EINVAL));
    };
    let fprog = Fprog {
        len,
        filter: program.as_ptr(),
    };
    // SAFETY: `fprog` names `len` instructions of a live slice; the kernel copies them.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags.bits(),
            &raw const fprog,
        )
    };
    match i32::try_from(ret) {
        Ok(fd) if fd > 0 && flags.contains(FilterFlags::NEW_LISTENER) => {
            // SAFETY: with NEW_LISTENER a positive answer is a new descriptor that nothing else owns; the kernel makes it close-on-exec.
            Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
        }
        Ok(0) => Ok(None),
        _ => Err(Error::last("seccomp", args(program))),
    }
}

/// A program that allows waiting for children and signals, and ending, and answers everything else with `EPERM`: all
/// that the init of a pid namespace needs to reap.
#[must_use]
pub fn reaper_program() -> Vec<Instruction> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const CALLS: [libc::c_long; 6] = [
        libc::SYS_waitid,
        libc::SYS_rt_sigtimedwait,
        libc::SYS_rt_sigreturn,
        libc::SYS_restart_syscall,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ];
    let step = |code, jt, jf, k| Instruction { code, jt, jf, k };
    // `struct seccomp_data`: the number, then the architecture.
    let mut program = vec![
        step(LOAD, 0, 0, 4),
        step(EQUAL, 1, 0, NATIVE_ARCH),
        step(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        step(LOAD, 0, 0, 0),
    ];
    for (index, call) in CALLS.into_iter().enumerate() {
        let to_allow = u8::try_from(CALLS.len() - index).unwrap_or(0);
        program.push(step(EQUAL, to_allow, 0, u32::try_from(call).unwrap_or(u32::MAX)));
    }
    program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32));
    program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    program
}

/// `AUDIT_ARCH_*` of this machine.
#[cfg(target_arch = "x86_64")]
const NATIVE_ARCH: u32 = 0xc000_003e;
/// `AUDIT_ARCH_*` of this machine.
#[cfg(target_arch = "aarch64")]
const NATIVE_ARCH: u32 = 0xc000_00b7;

/// A program that answers one call with `errno`, as if this kernel did not have it or did not permit it: how tests take
/// the way that runs then. With `argument` only calls whose argument of that index (its lower half) has that value.
#[must_use]
pub fn lacking_program(call: u32, argument: Option<(u32, u32)>, errno: Errno) -> Vec<Instruction> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jf, k| Instruction { code, jt: 0, jf, k };
    let mut program = vec![
        step(LOAD, 0, 0),
        step(EQUAL, if argument.is_some() { 3 } else { 1 }, call),
    ];
    if let Some((index, value)) = argument {
        program.push(step(LOAD, 0, 16 + 8 * index));
        program.push(step(EQUAL, 1, value));
    }
    let answer = libc::SECCOMP_RET_ERRNO | errno.raw().unsigned_abs();
    program.push(step(RETURN, 0, answer));
    program.push(step(RETURN, 0, libc::SECCOMP_RET_ALLOW));
    program
}

#[repr(C)]
struct Fprog {
    len: u16,
    filter: *const Instruction,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_acts_on_its_thread() {
        let priority = |what: libc::c_long| {
            // SAFETY: takes numbers alone.
            let ret = unsafe { libc::syscall(libc::SYS_getpriority, what, 0) };
            (ret, Errno::last().raw())
        };
        let call = u32::try_from(libc::SYS_getpriority).unwrap();
        let errno = Errno::from_raw(77);
        let all = lacking_program(call, None, errno);
        let of_groups = lacking_program(call, Some((0, 1)), errno);
        let in_thread = move |program: Vec<Instruction>| {
            let thread = std::thread::spawn(move || {
                crate::creds::set_no_new_privs().unwrap();
                assert!(load(&program, FilterFlags::empty()).unwrap().is_none());
                (priority(0), priority(1))
            });
            thread.join().unwrap()
        };
        assert_eq!(in_thread(all), ((-1, 77), (-1, 77)));
        let (of_process, of_group) = in_thread(of_groups);
        assert_ne!(of_process.0, -1);
        assert_eq!(of_group, (-1, 77));
        assert_ne!(priority(0).0, -1);
    }

    #[test]
    fn a_bad_program_is_refused_with_its_size() {
        let text = load(&[], FilterFlags::empty()).unwrap_err().to_string();
        assert!(text.contains("0 instructions"), "{text}");
    }
}
