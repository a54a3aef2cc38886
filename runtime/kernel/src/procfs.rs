//! A handle of procfs that nothing can be mounted over, and writes of sysctls and process files through it.
//!
//! A path below `/proc` can be covered by a bind or tmpfs of the container, and a write meant for a label or sysctl then
//! lands elsewhere. So we write through a procfs of our own that is attached nowhere; where the kernel refuses one
//! (user namespaces that see `/proc` only in part), through the visible `/proc` without crossing any mount.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::ResolveFlags;

use crate::fd::show;
use crate::mount::Filesystem;
use crate::mount_attr::Attr;
use crate::path::{self, OFlags};
use crate::{Errno, Error, Result};

/// `PROC_SUPER_MAGIC`.
pub const PROC_MAGIC: u64 = 0x9fa0;
/// The inode number of the root of every procfs.
pub const PROC_ROOT_INODE: u64 = 1;

/// A procfs of which every path leads to a true procfs file.
#[derive(Debug)]
pub struct Procfs {
    root: OwnedFd,
}

impl Procfs {
    /// A procfs of this process's pid namespace that is mounted nowhere.
    pub fn private() -> Result<Procfs> {
        let filesystem = Filesystem::open("proc")?;
        filesystem.create()?;
        Ok(Procfs {
            root: filesystem.mount(Attr::NOSUID | Attr::NODEV | Attr::NOEXEC)?,
        })
    }

    /// The procfs at `/proc`, after a look that it is the root of one. Files of it that something is mounted over are
    /// refused (`EXDEV`), never followed.
    pub fn visible() -> Result<Procfs> {
        let root = path::open("/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW)?;
        Procfs::from_root(root)
    }

    /// [`Procfs::private`], or [`Procfs::visible`] where the kernel refuses that.
    pub fn open() -> Result<Procfs> {
        Procfs::private().or_else(|_| Procfs::visible())
    }

    /// Takes a descriptor that must be the root directory of a procfs.
    pub fn from_root(root: OwnedFd) -> Result<Procfs> {
        if path::filesystem_magic(&root)? != PROC_MAGIC || path::stat(&root)?.ino != PROC_ROOT_INODE {
            return Err(Error::new("open procfs", show(&root), Errno::EXDEV));
        }
        Ok(Procfs { root })
    }

    /// Opens a file below, `self/attr/exec` or `sys/net/…`, without crossing a mount or following a magic link.
    pub fn open_file(&self, name: impl AsRef<Path>, flags: OFlags) -> Result<OwnedFd> {
        let name = name.as_ref();
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
        let fd = path::open_how(self.root.as_fd(), name, flags, 0, resolve)?;
        if path::filesystem_magic(&fd)? != PROC_MAGIC {
            return Err(Error::new("open procfs", format!("{name:?}"), Errno::EXDEV));
        }
        Ok(fd)
    }

    /// Reads a file whole, at most `limit` bytes.
    pub fn read(&self, name: impl AsRef<Path>, limit: usize) -> Result<Vec<u8>> {
        let name = name.as_ref();
        let fd = self.open_file(name, OFlags::RDONLY)?;
        path::read_limited(fd, limit).map_err(|errno| Error::new("read", format!("proc, {name:?}"), errno))
    }

    /// Writes a file in one write(2), as procfs wants it.
    pub fn write(&self, name: impl AsRef<Path>, value: &[u8]) -> Result<()> {
        let name = name.as_ref();
        let fd = self.open_file(name, OFlags::WRONLY)?;
        let args = || format!("proc, {name:?}, {:?}", String::from_utf8_lossy(value));
        match crate::fd::write(&fd, value) {
            Ok(written) if written == value.len() => Ok(()),
            Ok(_) => Err(Error::new("write", args(), Errno::EIO)),
            Err(errno) => Err(Error::new("write", args(), errno)),
        }
    }

    /// Sets a sysctl, named `net.ipv4.ip_forward` or `net/ipv4/ip_forward`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.write(sysctl_path(name)?, value.as_bytes())
    }

    /// Reads a sysctl, at most a page, without the final newline.
    pub fn read_sysctl(&self, name: &str) -> Result<String> {
        let value = self.read(sysctl_path(name)?, 4096)?;
        Ok(String::from_utf8_lossy(&value).trim_end().to_owned())
    }
}

impl AsFd for Procfs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// The file of a sysctl below procfs. As in sysctl(8), the first separator decides: after a first `.`, dots separate and
/// a `/` stands for a dot in a name (`net.ipv4.conf.eth0/100.forwarding`); after a first `/`, dots are plain.
fn sysctl_path(name: &str) -> Result<PathBuf> {
    let invalid = || Error::new("sysctl", format!("{name:?}"), Errno::EINVAL);
    let dotted = name
        .find(['.', '/'])
        .is_some_and(|at| name.as_bytes()[at] == b'.');
    let separator = if dotted { '.' } else { '/' };
    let mut file = PathBuf::from("sys");
    for part in name.split(separator) {
        let part = if dotted {
            part.replace('/', ".")
        } else {
            part.to_owned()
        };
        if part.is_empty() || part == "." || part == ".." || part.contains('\0') {
            return Err(invalid());
        }
        file.push(OsStr::new(&part));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{seccomp, syscall};

    #[test]
    fn sysctl_names_become_paths() {
        let path = |name| sysctl_path(name).map(|p| p.display().to_string());
        assert_eq!(path("net.ipv4.ip_forward").unwrap(), "sys/net/ipv4/ip_forward");
        assert_eq!(path("net/ipv4/ip_forward").unwrap(), "sys/net/ipv4/ip_forward");
        assert_eq!(
            path("net.ipv4.conf.eth0/100.forwarding").unwrap(),
            "sys/net/ipv4/conf/eth0.100/forwarding"
        );
        assert_eq!(
            path("net/ipv4/conf/eth0.100/forwarding").unwrap(),
            "sys/net/ipv4/conf/eth0.100/forwarding"
        );
        for hostile in [
            "",
            ".",
            "/",
            "net..ipv4",
            "net/../../1/mem",
            "../sysrq-trigger",
            "a//b",
            "a\0b",
            "/kernel",
        ] {
            assert_eq!(path(hostile).unwrap_err().errno(), Errno::EINVAL, "{hostile:?}");
        }
    }

    #[test]
    fn both_handles_read_and_refuse_to_leave() {
        for proc in [Procfs::private().unwrap(), Procfs::visible().unwrap()] {
            assert_eq!(proc.read_sysctl("kernel.ostype").unwrap(), "Linux");
            assert!(!proc.read("self/status", 1 << 16).unwrap().is_empty());
            assert_eq!(proc.read("self/status", 4).unwrap_err().errno(), Errno::EFBIG);
            assert_eq!(
                proc.open_file("self/root/etc", OFlags::PATH).unwrap_err().errno(),
                Errno::ELOOP
            );
            assert_eq!(
                proc.open_file("../etc", OFlags::PATH).unwrap_err().errno(),
                Errno::EXDEV
            );
        }
    }

    #[test]
    fn only_the_root_of_a_procfs_is_taken() {
        let below = path::open("/proc/sys", OFlags::PATH).unwrap();
        Procfs::from_root(below).unwrap_err();
        let other = path::open("/", OFlags::PATH).unwrap();
        Procfs::from_root(other).unwrap_err();
    }

    #[test]
    fn where_a_private_one_is_refused_the_visible_one_serves() {
        let thread = std::thread::spawn(|| {
            let program = seccomp::lacking_program(syscall::FSOPEN, None, Errno::EPERM);
            crate::creds::set_no_new_privs().unwrap();
            seccomp::load(&program, seccomp::FilterFlags::empty()).unwrap();
            assert_eq!(Procfs::private().unwrap_err().errno(), Errno::EPERM);
            let name = Procfs::open().unwrap().read("thread-self/comm", 64).unwrap();
            assert!(!name.is_empty());
        });
        thread.join().unwrap();
    }
}
