//! Id maps of user namespaces: written for a child, or held by a namespace that no process is in.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::namespace::{Kind, Kinds};
use crate::procfs::Procfs;
use crate::{Errno, Error, Result};

/// Most lines that the kernel takes in one map.
pub const MAX_LINES: usize = 340;

/// One line of a map: `count` ids from `inside` on are `outside` and following in the parent namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Line {
    /// First id in the namespace.
    pub inside: u32,
    /// First id in the parent namespace.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// Writes `/proc/<pid>/uid_map`, once.
pub fn write_uid_map(proc: &Procfs, pid: i32, lines: &[Line]) -> Result<()> {
    proc.write(format!("{pid}/uid_map"), text_of(lines)?.as_bytes())
}

/// Writes `/proc/<pid>/gid_map`, once. Without privilege setgroups(2) must be denied before.
pub fn write_gid_map(proc: &Procfs, pid: i32, lines: &[Line]) -> Result<()> {
    proc.write(format!("{pid}/gid_map"), text_of(lines)?.as_bytes())
}

/// Forbids setgroups(2) in the user namespace of a process, before its gid map is written.
pub fn deny_setgroups(proc: &Procfs, pid: i32) -> Result<()> {
    proc.write(format!("{pid}/setgroups"), b"deny")
}

/// Whether setgroups(2) is forbidden in our user namespace.
pub fn setgroups_denied(proc: &Procfs) -> Result<bool> {
    Ok(proc.read("self/setgroups", 64)?.starts_with(b"deny"))
}

/// The map of a process as the kernel shows it to us: `uid_map` or `gid_map`.
pub fn read_map(proc: &Procfs, pid: i32, file: &str) -> Result<Vec<Line>> {
    let text = proc.read(format!("{pid}/{file}"), 64 * 1024)?;
    let malformed = || Error::new("read", format!("proc, {pid}/{file}"), Errno::EINVAL);
    let text = String::from_utf8(text).map_err(|_| malformed())?;
    text.lines()
        .map(|line| {
            let mut fields = line.split_ascii_whitespace().map(str::parse);
            match (fields.next(), fields.next(), fields.next()) {
                (Some(Ok(inside)), Some(Ok(outside)), Some(Ok(count))) => Ok(Line {
                    inside,
                    outside,
                    count,
                }),
                _ => Err(malformed()),
            }
        })
        .collect()
}

/// A user namespace with these maps and nobody in it, for idmapped mounts.
///
/// A child is cloned into a new user namespace, mapped from here, and killed once its namespace is open.
pub fn user_namespace(uids: &[Line], gids: &[Line]) -> Result<OwnedFd> {
    let holder = Holder::start(Kinds::USER)?;
    let proc = Procfs::visible()?;
    write_uid_map(&proc, holder.pid, uids)?;
    write_gid_map(&proc, holder.pid, gids)?;
    crate::namespace::open_of(holder.pid, Kind::User)
}

/// A child that does nothing but exist, in namespaces of its own if so asked; killed and reaped when dropped.
pub(crate) struct Holder {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
}

impl Holder {
    pub(crate) fn start(namespaces: Kinds) -> Result<Holder> {
        let mut pidfd: libc::c_int = -1;
        // `struct clone_args` up to `tls`: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls.
        // No exit signal: nobody's SIGCHLD handler should see this child, and the wait below is by `__WALL`.
        let mut args: [u64; 8] = [0; 8];
        args[0] = namespaces.bits() | libc::CLONE_PIDFD as u64;
        args[1] = (&raw mut pidfd).addr() as u64;
        let parent = std::process::id();
        // SAFETY: without CLONE_VM the child has its own copy of memory, and it only makes the system calls of
        // `wait_for_death`, which take no lock and allocate nothing; the kernel writes the one int that the pointer
        // names, alive here.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, args.as_mut_ptr(), size_of_val(&args)) };
        if pid < 0 {
            return Err(Error::last("clone3", format!("{namespaces:?} | PIDFD")));
        }
        if pid == 0 {
            wait_for_death(parent);
        }
        // SAFETY: clone3 has just made this descriptor (close-on-exec) for us, and nobody else knows it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        let pid = i32::try_from(pid).map_err(|_| Error::new("clone3", "pid", Errno::EOVERFLOW))?;
        Ok(Holder { pid, pidfd })
    }

    /// Kills and reaps the child; a second time does nothing.
    pub(crate) fn end(&self) {
        let raw = self.pidfd.as_raw_fd();
        let none = std::ptr::null::<u8>();
        // SAFETY: takes numbers and a null siginfo.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, raw, libc::SIGKILL, none, 0) };
        // SAFETY: takes numbers and null results. The child was killed, so this does not wait for long.
        unsafe {
            libc::syscall(
                libc::SYS_waitid,
                libc::P_PIDFD,
                raw,
                none,
                libc::WEXITED | libc::__WALL,
                none,
            )
        };
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the holder does until it is killed, by us or by the death of its parent.
fn wait_for_death(parent: u32) -> ! {
    // SAFETY: takes numbers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // SAFETY: takes nothing.
    let now = unsafe { libc::getppid() };
    // A parent in another pid namespace reads as 0; a different one means that ours died before the call above.
    if now != 0 && now.unsigned_abs() != parent {
        // SAFETY: ends this process without handlers.
        unsafe { libc::_exit(0) };
    }
    loop {
        // SAFETY: takes nothing; returns only if a handler ran.
        unsafe { libc::pause() };
    }
}

/// The lines as the kernel reads them.
fn text_of(lines: &[Line]) -> Result<String> {
    if lines.is_empty() || lines.len() > MAX_LINES {
        return Err(Error::new(
            "write id map",
            format!("{} lines", lines.len()),
            Errno::EINVAL,
        ));
    }
    let mut text = String::with_capacity(lines.len() * 32);
    for line in lines {
        text.push_str(&format!("{} {} {}\n", line.inside, line.outside, line.count));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_without_lines_or_with_too_many_is_refused() {
        let line = Line {
            inside: 0,
            outside: 1000,
            count: 1,
        };
        text_of(&[]).unwrap_err();
        text_of(&[line; MAX_LINES + 1]).unwrap_err();
        assert_eq!(text_of(&[line]).unwrap(), "0 1000 1\n");
    }

    #[test]
    fn a_namespace_of_its_own_leaves_no_child_behind() {
        let lines = [Line {
            inside: 0,
            outside: 100_000,
            count: 65_536,
        }];
        let namespace = user_namespace(&lines, &lines).unwrap();
        let identity = crate::namespace::identity(&namespace).unwrap();
        assert_ne!(identity, crate::namespace::own_identity(Kind::User).unwrap());
    }
}
