//! Process descriptors: a process that cannot be mistaken for another.

use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use crate::error::{Errno, Error, Result};
use crate::fd::number;
use crate::signal::Signal;
use crate::wait::Status;

/// `PIDFD_GET_INFO` for the 64 bytes of the first version (Linux 6.13).
const PIDFD_GET_INFO: u32 = 0xc040_ff0b;
/// `PIDFD_INFO_CGROUPID`.
const INFO_CGROUP: u64 = 1 << 2;
/// `PIDFD_INFO_EXIT` (Linux 6.15).
const INFO_EXIT: u64 = 1 << 3;

/// What the kernel tells of a process by its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Process id in our pid namespace; 0 once it has been reaped.
    pub pid: i32,
    /// Its parent's process id; 0 once it has been reaped.
    pub parent_pid: i32,
    /// How it ended: only after it was reaped, and from Linux 6.15 on.
    pub exit: Option<Status>,
}

/// `struct pidfd_info`, first version.
#[repr(C)]
#[derive(Default)]
struct RawInfo {
    mask: u64,
    cgroup_id: u64,
    pid: u32,
    tgid: u32,
    ppid: u32,
    ids: [u32; 8],
    exit_code: i32,
}

/// A descriptor of the process with this id. Certain only for a child of ours that is not reaped; of others check
/// afterwards what the id was known by.
pub fn open(pid: i32) -> Result<OwnedFd> {
    let raw = rustix::process::Pid::from_raw(pid)
        .ok_or_else(|| Error::new("pidfd_open", pid.to_string(), Errno::ESRCH))?;
    rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty())
        .map_err(|e| Error::new("pidfd_open", pid.to_string(), e.into()))
}

/// Sends a signal; `ESRCH` once the process is reaped.
pub fn send_signal(pidfd: impl AsFd, signal: Signal) -> Result<()> {
    let pidfd = pidfd.as_fd();
    // SAFETY: takes numbers and a null siginfo, for which the kernel fills in what kill(2) would.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal.number(),
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if done < 0 {
        return Err(Error::last(
            "pidfd_send_signal",
            format!("{}, {signal}", number(pidfd)),
        ));
    }
    Ok(())
}

/// Takes a copy of another process's descriptor (`pidfd_getfd`; needs the right to ptrace it).
pub fn get_fd(pidfd: impl AsFd, target: i32) -> Result<OwnedFd> {
    let pidfd = pidfd.as_fd();
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), target, 0) };
    if fd < 0 {
        return Err(Error::last("pidfd_getfd", format!("{}, {target}", number(pidfd))));
    }
    // SAFETY: the kernel has just installed this descriptor (close-on-exec) for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether the process has ended (reaped or not): its descriptor is readable then.
pub fn has_ended(pidfd: impl AsFd) -> Result<bool> {
    let ready = crate::epoll::wait_one(
        pidfd,
        crate::epoll::Interest::READ,
        Some(std::time::Duration::ZERO),
    )?;
    Ok(!ready.is_empty())
}

/// The process id behind a descriptor in our pid namespace; `ESRCH` once it is reaped, or where it is not visible to us.
pub fn pid(pidfd: impl AsFd) -> Result<i32> {
    let name = format!("/proc/self/fdinfo/{}", number(&pidfd));
    let text = std::fs::read_to_string(&name).map_err(|e| Error::from_io("read", name.clone(), &e))?;
    let field = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    field
        .and_then(|pid| pid.trim().parse().ok())
        .filter(|pid| *pid > 0)
        .ok_or_else(|| Error::new("read", name, Errno::ESRCH))
}

/// `PIDFD_GET_INFO` (Linux 6.13; `ENOTTY` before, or `EINVAL`).
pub fn info(pidfd: impl AsFd) -> Result<Info> {
    let pidfd = pidfd.as_fd();
    let mut info = RawInfo {
        mask: INFO_CGROUP | INFO_EXIT,
        ..RawInfo::default()
    };
    // SAFETY: `info` is live and of the size encoded in the request; the kernel writes at most that much.
    let done = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO as libc::Ioctl, &raw mut info) };
    if done < 0 {
        return Err(Error::last("ioctl", format!("{}, PIDFD_GET_INFO", number(pidfd))));
    }
    let exit = (info.mask & INFO_EXIT != 0).then(|| Status::from_raw(info.exit_code));
    Ok(Info {
        pid: info.tgid.cast_signed(),
        parent_pid: info.ppid.cast_signed(),
        exit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clone::Clone3;
    use crate::wait::{Id, wait};

    #[test]
    fn the_exit_status_outlives_the_reaping_where_the_kernel_keeps_it() {
        let child = Clone3::default().spawn(|| 42).unwrap();
        wait(Id::Process(child.pid)).unwrap();
        assert!(has_ended(&child.pidfd).unwrap());
        assert_eq!(
            send_signal(&child.pidfd, Signal::KILL).unwrap_err().errno(),
            Errno::ESRCH
        );
        match info(&child.pidfd) {
            Ok(info) => assert!(info.exit.is_none_or(|exit| exit == Status::Exited(42))),
            Err(error) => assert!(
                matches!(error.errno(), Errno::ENOTTY | Errno::EINVAL | Errno::ESRCH),
                "{error}"
            ),
        }
    }

    #[test]
    fn a_signal_reaches_the_process_behind_the_descriptor() {
        let child = Clone3::default()
            .spawn(|| {
                loop {
                    // SAFETY: no preconditions.
                    unsafe { libc::pause() };
                }
            })
            .unwrap();
        assert!(!has_ended(&child.pidfd).unwrap());
        send_signal(&child.pidfd, Signal::KILL).unwrap();
        assert_eq!(wait(Id::Process(child.pid)).unwrap().status, Status::Signaled(9));
    }
}
