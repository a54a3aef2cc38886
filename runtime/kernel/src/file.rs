//! What an archive can say of a file beyond [`crate::path`]: links, owners and times of symlinks, attributes, durability.
//!
//! Names are one component and never followed, so the directory's descriptor alone decides where a call acts. Nothing
//! here needs `/proc`, which an unpack worker does not have.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, RawDir, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};

use crate::fd::show;
use crate::path::Kind;
use crate::{Errno, Error, Result};

/// A point in time as file systems store it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds, below one thousand million.
    pub nanoseconds: u32,
}

/// Room on a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that can still be written by an unprivileged process.
    pub available_bytes: u64,
    /// Bytes altogether.
    pub total_bytes: u64,
    /// Files that can still be made.
    pub available_inodes: u64,
    /// Files altogether.
    pub total_inodes: u64,
    /// The mount or the file system is read-only.
    pub read_only: bool,
}

/// Opens the directory `path` below `root`, which may have several components: no symlink, no `..` above, no mount.
pub fn open_dir_beneath(root: impl AsFd, path: &OsStr) -> Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve)
        .map_err(|errno| failed("openat2", path, errno))
}

/// Gives the inode `old_name` in `old_dir` the further name `name` in `dir`; a symlink itself, not its target.
pub fn link(old_dir: impl AsFd, old_name: &OsStr, dir: impl AsFd, name: &OsStr) -> Result<()> {
    one_component("linkat", old_name)?;
    one_component("linkat", name)?;
    rustix::fs::linkat(old_dir, old_name, dir, name, AtFlags::empty())
        .map_err(|errno| failed("linkat", name, errno))
}

/// Sets owner and group of `name` in `dir`, of a symlink itself.
pub fn set_owner_at(dir: impl AsFd, name: &OsStr, uid: u32, gid: u32) -> Result<()> {
    one_component("fchownat", name)?;
    let (uid, gid) = owner(uid, gid)?;
    rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|errno| failed("fchownat", name, errno))
}

/// At most `limit` entries of a directory, from its beginning; `true` where there are more.
pub fn some_entries(dir: impl AsFd, limit: usize) -> Result<(Vec<(OsString, Kind)>, bool)> {
    let mut names = Vec::new();
    let all = each_entry(dir, |name, kind| {
        let wanted = names.len() < limit;
        if wanted {
            names.push((name.to_owned(), kind));
        }
        wanted
    })?;
    Ok((names, !all))
}

/// Calls `visit` with each entry of a directory, from its beginning, until it answers `false`; whether it never did.
pub fn each_entry(dir: impl AsFd, mut visit: impl FnMut(&OsStr, Kind) -> bool) -> Result<bool> {
    let fd = open_dir_beneath(&dir, OsStr::new("."))?;
    let mut buffer = Vec::with_capacity(32 * 1024);
    let mut entries = RawDir::new(&fd, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(|errno| Error::new("getdents64", show(&dir), errno.into()))?;
        let name = entry.file_name().to_bytes();
        let is_real = name != b"." && name != b"..";
        if is_real && !visit(OsStr::from_bytes(name), crate::path::kind_of(entry.file_type())) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Sets access and modification time of what is open.
pub fn set_times(fd: impl AsFd, time: Time) -> Result<()> {
    rustix::fs::futimens(&fd, &timestamps(time))
        .map_err(|errno| Error::new("futimens", show(&fd), errno.into()))
}

/// Sets access and modification time of `name` in `dir`, of a symlink itself.
pub fn set_times_at(dir: impl AsFd, name: &OsStr, time: Time) -> Result<()> {
    one_component("utimensat", name)?;
    rustix::fs::utimensat(dir, name, &timestamps(time), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|errno| failed("utimensat", name, errno))
}

/// The modification time of what is open.
pub fn modified(fd: impl AsFd) -> Result<Time> {
    let stat = rustix::fs::fstat(&fd).map_err(|errno| Error::new("fstat", show(&fd), errno.into()))?;
    Ok(mtime(&stat))
}

/// The modification time of `name` in `dir`, of a symlink itself.
pub fn modified_at(dir: impl AsFd, name: &OsStr) -> Result<Time> {
    one_component("fstatat", name)?;
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|errno| failed("fstatat", name, errno))?;
    Ok(mtime(&stat))
}

/// Bytes on disk of what is open (blocks, not length).
pub fn allocated_bytes(fd: impl AsFd) -> Result<u64> {
    let stat = rustix::fs::fstat(&fd).map_err(|errno| Error::new("fstat", show(&fd), errno.into()))?;
    Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
}

/// Bytes on disk of `name` in `dir`, of a symlink itself.
pub fn allocated_bytes_at(dir: impl AsFd, name: &OsStr) -> Result<u64> {
    one_component("fstatat", name)?;
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|errno| failed("fstatat", name, errno))?;
    Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
}

/// Sets an extended attribute of what is open (not `O_PATH`).
pub fn set_xattr(fd: impl AsFd, name: &OsStr, value: &[u8]) -> Result<()> {
    rustix::fs::fsetxattr(&fd, name, value, XattrFlags::empty())
        .map_err(|errno| failed("fsetxattr", name, errno))
}

/// Reads an extended attribute of what is open; `None` where it is not there.
pub fn get_xattr(fd: impl AsFd, name: &OsStr) -> Result<Option<Vec<u8>>> {
    let mut value = vec![0; crate::xattr::MAX_VALUE_BYTES];
    match rustix::fs::fgetxattr(&fd, name, &mut value[..]) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(failed("fgetxattr", name, errno)),
    }
}

/// The names of all extended attributes of what is open.
pub fn list_xattrs(fd: impl AsFd) -> Result<Vec<Vec<u8>>> {
    let mut names = vec![0; crate::xattr::MAX_VALUE_BYTES];
    match rustix::fs::flistxattr(&fd, &mut names[..]) {
        Ok(length) => names.truncate(length),
        Err(rustix::io::Errno::OPNOTSUPP) => names.clear(),
        Err(errno) => return Err(Error::new("flistxattr", show(&fd), errno.into())),
    }
    Ok(names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(<[u8]>::to_vec)
        .collect())
}

/// Writes the file's bytes and length to the disk.
pub fn sync(fd: impl AsFd) -> Result<()> {
    rustix::fs::fsync(&fd).map_err(|errno| Error::new("fsync", show(&fd), errno.into()))
}

/// Writes everything of the file system that `fd` lies on to the disk; reports write errors since it was opened.
pub fn sync_filesystem(fd: impl AsFd) -> Result<()> {
    rustix::fs::syncfs(&fd).map_err(|errno| Error::new("syncfs", show(&fd), errno.into()))
}

/// Takes an exclusive lock of the file that ends with its last descriptor; `EAGAIN` where someone else has it.
pub fn try_lock(fd: impl AsFd) -> Result<()> {
    rustix::fs::flock(&fd, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .map_err(|errno| Error::new("flock", show(&fd), errno.into()))
}

/// Waits for an exclusive lock of the file or directory; it ends with the last copy of this very descriptor.
pub fn lock(fd: impl AsFd) -> Result<()> {
    rustix::io::retry_on_intr(|| rustix::fs::flock(&fd, rustix::fs::FlockOperation::LockExclusive))
        .map_err(|errno| Error::new("flock", show(&fd), errno.into()))
}

/// Room on the file system that `fd` lies on.
pub fn space(fd: impl AsFd) -> Result<Space> {
    let stat = rustix::fs::fstatvfs(&fd).map_err(|errno| Error::new("fstatfs", show(&fd), errno.into()))?;
    Ok(Space {
        available_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        available_inodes: stat.f_favail,
        total_inodes: stat.f_files,
        read_only: stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY),
    })
}

fn one_component(call: &'static str, name: &OsStr) -> Result<()> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(Error::new(
            call,
            format!("{name:?}, not one component"),
            Errno::EINVAL,
        ));
    }
    Ok(())
}

/// `u32::MAX` means "leave it" to the kernel, so it is refused.
fn owner(uid: u32, gid: u32) -> Result<(Uid, Gid)> {
    if uid == u32::MAX || gid == u32::MAX {
        return Err(Error::new("fchown", format!("{uid}, {gid}"), Errno::EINVAL));
    }
    Ok((Uid::from_raw(uid), Gid::from_raw(gid)))
}

fn timestamps(time: Time) -> Timestamps {
    let stamp = Timespec {
        tv_sec: time.seconds,
        tv_nsec: i64::from(time.nanoseconds) as _,
    };
    Timestamps {
        last_access: stamp,
        last_modification: stamp,
    }
}

fn mtime(stat: &rustix::fs::Stat) -> Time {
    // The field types differ between targets, the range of values does not.
    #[allow(clippy::unnecessary_cast)]
    Time {
        seconds: stat.st_mtime as i64,
        nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
    }
}

fn failed(call: &'static str, name: &OsStr, errno: rustix::io::Errno) -> Error {
    Error::new(call, format!("{name:?}"), errno.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path;

    #[test]
    fn names_are_one_component_and_never_followed() {
        let root = std::env::temp_dir().join(format!("coracle-file-{}", std::process::id()));
        std::fs::create_dir_all(&root).unwrap();
        let dir = path::open_dir(&root).unwrap();
        drop(path::create_file_at(&dir, "a", 0o600).unwrap());
        path::make_symlink("/etc", &dir, "s").unwrap();
        for bad in ["", ".", "..", "a/b", "/a"] {
            let bad = OsStr::new(bad);
            assert_eq!(
                link(&dir, OsStr::new("a"), &dir, bad).unwrap_err().errno(),
                Errno::EINVAL,
                "{bad:?}"
            );
        }
        assert_eq!(
            open_dir_beneath(&dir, OsStr::new("s/x")).unwrap_err().errno(),
            Errno::ELOOP
        );
        assert_eq!(
            open_dir_beneath(&dir, OsStr::new("..")).unwrap_err().errno(),
            Errno::EXDEV
        );
        let time = Time {
            seconds: -5,
            nanoseconds: 7,
        };
        set_times_at(&dir, OsStr::new("s"), time).unwrap();
        assert_eq!(modified_at(&dir, OsStr::new("s")).unwrap(), time);
        link(&dir, OsStr::new("s"), &dir, OsStr::new("t")).unwrap();
        assert_eq!(path::read_link_at(&dir, "t").unwrap(), "/etc");
        assert_eq!(some_entries(&dir, 2).unwrap().0.len(), 2);
        assert!(some_entries(&dir, 2).unwrap().1 && !some_entries(&dir, 3).unwrap().1);
        std::fs::remove_dir_all(&root).unwrap();
    }
}
