//! Identity of the calling thread: ids, groups, securebits, and the per-process switches of prctl.
//!
//! Raw system calls throughout: the C library's versions signal every thread to follow, which a freshly cloned
//! child must not do.

use crate::{Errno, Error, Result};

bitflags::bitflags! {
    /// The `SECBIT_*` flags.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Securebits: u32 {
        /// Uid 0 gets no capabilities from `execve`.
        const NOROOT = 1 << 0;
        /// Switching to and from uid 0 changes no capability.
        const NO_SETUID_FIXUP = 1 << 2;
        /// Capabilities survive a switch away from uid 0; cleared by `execve`.
        const KEEP_CAPS = 1 << 4;
        /// Nothing may be raised into the ambient set.
        const NO_CAP_AMBIENT_RAISE = 1 << 6;
    }
}

/// The real uid.
#[must_use]
pub fn uid() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::getuid() }
}

/// The effective uid.
#[must_use]
pub fn effective_uid() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

/// The real gid.
#[must_use]
pub fn gid() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::getgid() }
}

/// The effective gid.
#[must_use]
pub fn effective_gid() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::getegid() }
}

/// Sets real, effective and saved uid of the calling thread.
pub fn set_uid(uid: u32) -> Result<()> {
    // SAFETY: takes numbers alone.
    let ret = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) };
    if ret == 0 {
        Ok(())
    } else {
        Err(Error::last("setresuid", uid.to_string()))
    }
}

/// Sets real, effective and saved gid of the calling thread.
pub fn set_gid(gid: u32) -> Result<()> {
    // SAFETY: takes numbers alone.
    let ret = unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) };
    if ret == 0 {
        Ok(())
    } else {
        Err(Error::last("setresgid", gid.to_string()))
    }
}

/// Sets the supplementary groups of the calling thread.
pub fn set_groups(gids: &[u32]) -> Result<()> {
    // SAFETY: the kernel reads `len` gids from the slice.
    let ret = unsafe { libc::syscall(libc::SYS_setgroups, gids.len(), gids.as_ptr()) };
    if ret == 0 {
        Ok(())
    } else {
        Err(Error::last("setgroups", format!("{gids:?}")))
    }
}

/// The supplementary groups of the calling thread.
pub fn groups() -> Result<Vec<u32>> {
    // SAFETY: size 0 asks for the count; nothing is written.
    let count = unsafe { libc::getgroups(0, std::ptr::null_mut()) };
    let mut gids = vec![0u32; usize::try_from(count).map_err(|_| Error::last("getgroups", "0"))?];
    // SAFETY: the kernel writes at most `count` gids, which the vector holds.
    let count = unsafe { libc::getgroups(count, gids.as_mut_ptr()) };
    gids.truncate(usize::try_from(count).map_err(|_| Error::last("getgroups", "count"))?);
    Ok(gids)
}

/// Sets the file mode creation mask and returns the old one.
pub fn set_umask(mask: u32) -> u32 {
    // SAFETY: takes a number and cannot fail.
    unsafe { libc::umask(mask) }
}

/// Capabilities survive the next switch away from uid 0 (until `execve`).
pub fn set_keep_caps(keep: bool) -> Result<()> {
    prctl("PR_SET_KEEPCAPS", libc::PR_SET_KEEPCAPS, u64::from(keep))
}

/// Sets the securebits of the calling thread.
pub fn set_securebits(bits: Securebits) -> Result<()> {
    prctl(
        "PR_SET_SECUREBITS",
        libc::PR_SET_SECUREBITS,
        u64::from(bits.bits()),
    )
}

/// No `execve` from here on gives new privileges. Cannot be undone.
pub fn set_no_new_privs() -> Result<()> {
    prctl("PR_SET_NO_NEW_PRIVS", libc::PR_SET_NO_NEW_PRIVS, 1)
}

/// Whether others with the same uid may trace this process, open its /proc files and read its core.
///
/// `execve` of a readable file sets it again.
pub fn set_dumpable(dumpable: bool) -> Result<()> {
    prctl("PR_SET_DUMPABLE", libc::PR_SET_DUMPABLE, u64::from(dumpable))
}

/// Orphans among the descendants become children of this process.
pub fn set_child_subreaper(on: bool) -> Result<()> {
    prctl(
        "PR_SET_CHILD_SUBREAPER",
        libc::PR_SET_CHILD_SUBREAPER,
        u64::from(on),
    )
}

/// The signal that the kernel sends to this process when its parent thread ends; 0 for none.
pub fn set_parent_death_signal(signal: u8) -> Result<()> {
    prctl("PR_SET_PDEATHSIG", libc::PR_SET_PDEATHSIG, u64::from(signal))
}

/// The slack of the calling thread's timers in nanoseconds; 0 for the default of the process.
pub fn set_timer_slack_ns(nanoseconds: u64) -> Result<()> {
    prctl("PR_SET_TIMERSLACK", libc::PR_SET_TIMERSLACK, nanoseconds)
}

/// The name of the calling thread as `ps` shows it, cut at 15 bytes.
pub fn set_name(name: &str) -> Result<()> {
    let mut bytes = [0u8; 16];
    for (to, from) in bytes[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: the kernel reads at most 16 bytes, and the array ends in NUL.
    let ret = unsafe { libc::prctl(libc::PR_SET_NAME, bytes.as_ptr(), 0u64, 0u64, 0u64) };
    if ret == 0 {
        Ok(())
    } else {
        Err(Error::last("prctl", format!("PR_SET_NAME, {name:?}")))
    }
}

fn prctl(name: &'static str, option: i32, value: u64) -> Result<()> {
    // SAFETY: the options that this file passes take a number, no pointer.
    let ret = unsafe { libc::prctl(option, value, 0u64, 0u64, 0u64) };
    if ret >= 0 {
        return Ok(());
    }
    let errno = Errno::last();
    Err(Error::new("prctl", format!("{name}, {value}"), errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switching_ids_touches_the_calling_thread_alone() {
        if effective_uid() != 0 {
            eprintln!("SKIPPED: needs root");
            return;
        }
        std::thread::spawn(|| {
            set_groups(&[7, 8]).unwrap();
            set_gid(1234).unwrap();
            set_uid(1234).unwrap();
            assert_eq!(
                (effective_uid(), effective_gid(), groups().unwrap()),
                (1234, 1234, vec![7, 8])
            );
            assert_eq!(set_uid(0).unwrap_err().errno(), Errno::EPERM);
        })
        .join()
        .unwrap();
        assert_eq!(effective_uid(), 0);
    }
}
