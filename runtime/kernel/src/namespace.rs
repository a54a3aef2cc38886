//! Namespaces: open, enter, leave, compare.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::ResolveFlags;

use crate::fd::show;
use crate::path::{self, OFlags};
use crate::{Errno, Error, Result};

/// `NSFS_MAGIC`: the filesystem of namespace files.
const NSFS_MAGIC: u64 = 0x6e73_6673;
/// `_IO(0xb7, 0x1)`.
const NS_GET_USERNS: libc::c_ulong = 0xb701;
/// `_IO(0xb7, 0x3)`.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// A kind of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Mount points.
    Mount,
    /// Host and domain name.
    Uts,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Users, groups and capabilities.
    User,
    /// Process ids.
    Pid,
    /// Network devices, addresses, ports.
    Network,
    /// The root of the cgroup view.
    Cgroup,
    /// Offsets of the monotonic and boot clocks.
    Time,
}

bitflags::bitflags! {
    /// A set of kinds, as the `CLONE_NEW*` flags.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Kinds: u64 {
        /// Time.
        const TIME = 0x80;
        /// Mount.
        const MOUNT = 0x0002_0000;
        /// Cgroup.
        const CGROUP = 0x0200_0000;
        /// UTS.
        const UTS = 0x0400_0000;
        /// IPC.
        const IPC = 0x0800_0000;
        /// User.
        const USER = 0x1000_0000;
        /// Pid.
        const PID = 0x2000_0000;
        /// Network.
        const NETWORK = 0x4000_0000;
    }
}

/// What makes a namespace that one and no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Device of the namespace filesystem.
    pub dev: u64,
    /// Inode there.
    pub ino: u64,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 8] = [
        Kind::Mount,
        Kind::Uts,
        Kind::Ipc,
        Kind::User,
        Kind::Pid,
        Kind::Network,
        Kind::Cgroup,
        Kind::Time,
    ];

    /// The set of this kind alone.
    #[must_use]
    pub const fn flag(self) -> Kinds {
        match self {
            Kind::Mount => Kinds::MOUNT,
            Kind::Uts => Kinds::UTS,
            Kind::Ipc => Kinds::IPC,
            Kind::User => Kinds::USER,
            Kind::Pid => Kinds::PID,
            Kind::Network => Kinds::NETWORK,
            Kind::Cgroup => Kinds::CGROUP,
            Kind::Time => Kinds::TIME,
        }
    }

    /// The file's name below `/proc/<pid>/ns`.
    #[must_use]
    pub const fn file_name(self) -> &'static str {
        match self {
            Kind::Mount => "mnt",
            Kind::Uts => "uts",
            Kind::Ipc => "ipc",
            Kind::User => "user",
            Kind::Pid => "pid",
            Kind::Network => "net",
            Kind::Cgroup => "cgroup",
            Kind::Time => "time",
        }
    }
}

/// Opens a namespace file (`/proc/<pid>/ns/net`, `/run/netns/x`) and makes sure that it is one of that kind.
///
/// `EINVAL` where it is something else.
pub fn open(path: impl AsRef<Path>, kind: Kind) -> Result<OwnedFd> {
    let path = path.as_ref();
    let args = || format!("{path:?}, {kind:?}");
    // O_PATH first: the path may be a FIFO or a device, and opening those has effects.
    let place = path::open(path, OFlags::PATH)?;
    if path::filesystem_magic(&place)? != NSFS_MAGIC {
        return Err(Error::new("open namespace", args(), Errno::EINVAL));
    }
    let fd = path::reopen(&place, OFlags::RDONLY)?;
    if kind_flag(&fd)? != kind.flag().bits() {
        return Err(Error::new("open namespace", args(), Errno::EINVAL));
    }
    Ok(fd)
}

/// Opens a namespace of this process.
pub fn open_own(kind: Kind) -> Result<OwnedFd> {
    let name = format!("/proc/thread-self/ns/{}", kind.file_name());
    path::open_how(
        rustix::fs::CWD,
        Path::new(&name),
        OFlags::RDONLY,
        0,
        ResolveFlags::empty(),
    )
}

/// Opens a namespace of a process. The caller keeps the pid from being reused (a pidfd, an unreaped child).
pub fn open_of(pid: i32, kind: Kind) -> Result<OwnedFd> {
    let name = format!("/proc/{pid}/ns/{}", kind.file_name());
    path::open_how(
        rustix::fs::CWD,
        Path::new(&name),
        OFlags::RDONLY,
        0,
        ResolveFlags::empty(),
    )
}

/// Enters a namespace (for a pid namespace: the next child does), checking that it is of the kind.
pub fn enter(namespace: impl AsFd, kind: Kind) -> Result<()> {
    setns(namespace, kind.flag())
}

/// Enters several namespaces of the process behind a pidfd at once.
pub fn enter_process(pidfd: impl AsFd, kinds: Kinds) -> Result<()> {
    setns(pidfd, kinds)
}

/// Leaves the present namespaces of these kinds for new ones.
///
/// Only of namespaces, so no descriptor table or memory is unshared; a threaded process cannot unshare user namespaces
/// and should not unshare others, since threads would then differ.
pub fn unshare(kinds: Kinds) -> Result<()> {
    // SAFETY: the flags of `Kinds` are namespaces alone: nothing of memory or descriptors changes under Rust's feet.
    let done = unsafe { libc::syscall(libc::SYS_unshare, kinds.bits()) };
    if done < 0 {
        return Err(Error::last("unshare", format!("{kinds:?}")));
    }
    Ok(())
}

/// The identity of a namespace, from a descriptor of its file.
pub fn identity(namespace: impl AsFd) -> Result<Identity> {
    let stat = path::stat(namespace)?;
    Ok(Identity {
        dev: stat.dev,
        ino: stat.ino,
    })
}

/// The identity of this process's own namespace of a kind.
pub fn own_identity(kind: Kind) -> Result<Identity> {
    identity(open_own(kind)?)
}

/// The user namespace that owns a namespace.
pub fn owner(namespace: impl AsFd) -> Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: the request takes no argument and returns a new descriptor or an error.
    let raw = unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), NS_GET_USERNS as _) };
    if raw < 0 {
        return Err(Error::last(
            "ioctl",
            format!("{}, NS_GET_USERNS", show(&namespace)),
        ));
    }
    // SAFETY: the kernel has just made this descriptor (close-on-exec) for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn setns(fd: impl AsFd, kinds: Kinds) -> Result<()> {
    // SAFETY: takes numbers only.
    let done = unsafe { libc::syscall(libc::SYS_setns, fd.as_fd().as_raw_fd(), kinds.bits()) };
    if done < 0 {
        let errno = Errno::last();
        return Err(Error::new("setns", format!("{}, {kinds:?}", show(&fd)), errno));
    }
    Ok(())
}

fn kind_flag(fd: &OwnedFd) -> Result<u64> {
    // SAFETY: the request takes no argument and returns the CLONE_NEW* flag or an error.
    let raw = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE as _) };
    u64::try_from(raw).map_err(|_| Error::last("ioctl", format!("{}, NS_GET_NSTYPE", show(fd))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_another_kind_or_none_is_refused() {
        drop(open("/proc/self/ns/net", Kind::Network).unwrap());
        assert_eq!(
            open("/proc/self/ns/net", Kind::Uts).unwrap_err().errno(),
            Errno::EINVAL
        );
        assert_eq!(
            open("/dev/null", Kind::Network).unwrap_err().errno(),
            Errno::EINVAL
        );
        assert_eq!(
            open("/proc/self/ns/none", Kind::Network).unwrap_err().errno(),
            Errno::ENOENT
        );
    }

    #[test]
    fn a_thread_leaves_and_enters_a_namespace() {
        let host = own_identity(Kind::Uts).unwrap();
        std::thread::spawn(move || {
            let old = open_own(Kind::Uts).unwrap();
            unshare(Kinds::UTS).unwrap();
            let new = own_identity(Kind::Uts).unwrap();
            assert_ne!(new, host);
            assert_eq!(
                identity(owner(&old).unwrap()).unwrap(),
                own_identity(Kind::User).unwrap()
            );
            assert_eq!(enter(&old, Kind::Network).unwrap_err().errno(), Errno::EINVAL);
            enter(&old, Kind::Uts).unwrap();
            assert_eq!(own_identity(Kind::Uts).unwrap(), host);
        })
        .join()
        .unwrap();
        assert_eq!(own_identity(Kind::Uts).unwrap(), host);
    }
}
