//! waitid(2), always with `__WALL`: a child of any exit signal is seen.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use crate::error::{Errno, Error, Result};

/// Whom to wait for.
#[derive(Clone, Copy, Debug)]
pub enum Id<'fd> {
    /// Any child.
    Any,
    /// The child with this process id.
    Process(i32),
    /// The child behind this process descriptor.
    Pidfd(BorrowedFd<'fd>),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// With this exit status.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
}

/// An ended child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its process id (free for others from now on, if it was reaped).
    pub pid: i32,
    /// How it ended.
    pub status: Status,
}

impl Status {
    /// The shell's code: the exit status, or 128 + the signal.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Status::Exited(status) => status,
            Status::Signaled(signal) => 128 + signal,
        }
    }

    /// From the status word of wait4(2), as `PIDFD_GET_INFO` gives it.
    #[must_use]
    pub fn from_raw(status: i32) -> Status {
        match status & 0x7f {
            0 => Status::Exited((status >> 8) & 0xff),
            signal => Status::Signaled(signal),
        }
    }
}

/// Waits for an end and reaps it.
pub fn wait(id: Id<'_>) -> Result<Exit> {
    loop {
        match waitid(id, 0) {
            Ok(Some(exit)) => return Ok(exit),
            // Without WNOHANG the kernel always names a child.
            Ok(None) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(error(id, errno)),
        }
    }
}

/// Reaps one that has ended; `None` if none has.
pub fn try_wait(id: Id<'_>) -> Result<Option<Exit>> {
    waitid(id, libc::WNOHANG).map_err(|errno| error(id, errno))
}

/// Reaps any child that has ended; whether there was one. Neither fails nor allocates.
#[must_use]
pub fn reap_any() -> bool {
    matches!(waitid(Id::Any, libc::WNOHANG), Ok(Some(_)))
}

/// Looks at one that has ended and leaves it a zombie, so that its pid stays its own; `None` if none has.
pub fn peek(id: Id<'_>) -> Result<Option<Exit>> {
    waitid(id, libc::WNOHANG | libc::WNOWAIT).map_err(|errno| error(id, errno))
}

fn waitid(id: Id<'_>, options: libc::c_int) -> Result<Option<Exit>, Errno> {
    let (kind, number) = match id {
        Id::Any => (libc::P_ALL, 0),
        Id::Process(pid) => (libc::P_PID, pid.cast_unsigned()),
        Id::Pidfd(fd) => (libc::P_PIDFD, fd.as_raw_fd().cast_unsigned()),
    };
    // SAFETY: siginfo_t is plain data for which zeroes are a valid value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is a live siginfo_t that the kernel fills; the rest are numbers.
    let done = unsafe {
        libc::waitid(
            kind,
            number,
            &raw mut info,
            libc::WEXITED | libc::__WALL | options,
        )
    };
    if done < 0 {
        return Err(Errno::last());
    }
    // SAFETY: the kernel fills the SIGCHLD member, or leaves our zeroes if nobody has ended.
    let pid = unsafe { info.si_pid() };
    if pid == 0 {
        return Ok(None);
    }
    // SAFETY: as above.
    let status = unsafe { info.si_status() };
    let status = match info.si_code {
        libc::CLD_EXITED => Status::Exited(status),
        _ => Status::Signaled(status),
    };
    Ok(Some(Exit { pid, status }))
}

fn error(id: Id<'_>, errno: Errno) -> Error {
    Error::new("waitid", format!("{id:?}"), errno)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clone::Clone3;
    use std::os::fd::AsFd as _;

    #[test]
    fn a_signal_and_a_peek_are_seen() {
        let child = Clone3::default().spawn(|| crate::clone::exit(3)).unwrap();
        crate::epoll::wait_one(&child.pidfd, crate::epoll::Interest::READ, None).unwrap();
        let id = Id::Pidfd(child.pidfd.as_fd());
        let seen = Exit {
            pid: child.pid,
            status: Status::Exited(3),
        };
        assert_eq!(peek(id).unwrap(), Some(seen));
        assert_eq!(try_wait(id).unwrap(), Some(seen));
        assert_eq!(try_wait(id).unwrap_err().errno(), Errno::ECHILD);
    }

    #[test]
    fn status_words_are_read_as_the_shell_does() {
        assert_eq!(Status::from_raw(42 << 8).code(), 42);
        assert_eq!(Status::from_raw(9), Status::Signaled(9));
        assert_eq!(Status::from_raw(11 | 0x80).code(), 139);
    }
}
