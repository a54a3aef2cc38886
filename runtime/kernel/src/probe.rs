//! The version of the running kernel, and whether the calls that are taken for granted are there.
//!
//! For the one check at start alone. Version numbers lie (distributions carry features back, outer containers deny
//! calls), so whoever has a newer call and an older way tries the newer one and takes the other where it fails:
//! `docs/fallbacks.md` lists them all.

use crate::{Errno, Error, Result};

/// Version of the running kernel, major and minor.
pub fn kernel_version() -> Result<(u32, u32)> {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy();
    parse(&release).ok_or_else(|| Error::new("uname", release.into_owned(), Errno::EINVAL))
}

/// A call that is taken for granted and that this kernel, or a filter around this process, answers with ENOSYS.
pub fn missing_call() -> Option<&'static str> {
    TAKEN_FOR_GRANTED
        .iter()
        .find(|(_, number)| is_missing(*number))
        .map(|(name, _)| *name)
}

/// Each refuses arguments that are all ones, before it does anything.
const TAKEN_FOR_GRANTED: &[(&str, libc::c_long)] = &[
    ("openat2", libc::SYS_openat2),
    ("clone3", libc::SYS_clone3),
    ("close_range", libc::SYS_close_range),
    ("pidfd_open", libc::SYS_pidfd_open),
    ("pidfd_send_signal", libc::SYS_pidfd_send_signal),
    ("fsopen", libc::SYS_fsopen),
    ("fsconfig", libc::SYS_fsconfig),
    ("fsmount", libc::SYS_fsmount),
    ("open_tree", libc::SYS_open_tree),
    ("move_mount", libc::SYS_move_mount),
    ("mount_setattr", libc::SYS_mount_setattr),
];

fn is_missing(number: libc::c_long) -> bool {
    // SAFETY: none of the calls takes these arguments: the pointers are not in user space, and the flags, sizes and
    // descriptors are none that exist. Nothing is read, written or changed.
    let ret = unsafe { libc::syscall(number, -1_i64, -1_i64, -1_i64, -1_i64, -1_i64, -1_i64) };
    ret == -1 && Errno::last() == Errno::ENOSYS
}

fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_is_not_there_is_named() {
        assert_eq!(missing_call(), None);
        let lacking = std::thread::spawn(|| {
            let program = crate::seccomp::lacking_program(crate::syscall::FSMOUNT, None, Errno::ENOSYS);
            crate::creds::set_no_new_privs().unwrap();
            crate::seccomp::load(&program, crate::seccomp::FilterFlags::empty()).unwrap();
            missing_call()
        });
        assert_eq!(lacking.join().unwrap(), Some("fsmount"));
    }

    #[test]
    fn releases_are_read() {
        for (release, version) in [
            ("6.1.0-44-cloud-amd64", Some((6, 1))),
            ("5.14.0-427.el9.x86_64", Some((5, 14))),
            ("7.3", Some((7, 3))),
            ("10", None),
            ("", None),
        ] {
            assert_eq!(parse(release), version, "{release:?}");
        }
        assert!(kernel_version().unwrap() >= (5, 14));
    }
}
