//! What an inode is and where it lies; a part of [`crate::path`].

use std::ffi::OsStr;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FileType, StatxAttributes, StatxFlags};

use crate::Result;
use crate::path::{at, on, plain_name};

/// What an inode is, from `fstat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The kind of the inode.
    pub kind: Kind,
    /// The device that it lives on.
    pub dev: u64,
    /// Its number there.
    pub ino: u64,
    /// Permission bits with set-id and sticky bits, without the kind.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Major and minor number, of a device node.
    pub rdev: (u32, u32),
    /// Bytes.
    pub size: u64,
    /// Names of it.
    pub nlink: u64,
}

/// Kinds of inodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// Anything that the kernel may add.
    Unknown,
}

/// Where a descriptor lies: its mount, and whether it is the root of that mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MountPlace {
    /// The mount's id, as in mountinfo.
    pub mount_id: u64,
    /// The descriptor is the top directory (or file) of the mount.
    pub is_root: bool,
}

/// What a descriptor refers to.
pub fn stat(fd: impl AsFd) -> Result<Stat> {
    match rustix::fs::fstat(&fd) {
        Ok(raw) => Ok(convert(&raw)),
        Err(errno) => Err(on("fstat", &fd, errno)),
    }
}

/// What a name in a directory is, symlinks not followed.
pub fn stat_at(dir: impl AsFd, name: impl AsRef<OsStr>) -> Result<Stat> {
    let name = plain_name(&dir, name.as_ref())?;
    match rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(raw) => Ok(convert(&raw)),
        Err(errno) => Err(at("fstatat", &dir, name, errno)),
    }
}

/// The magic number of the filesystem that a descriptor lies on.
pub fn filesystem_magic(fd: impl AsFd) -> Result<u64> {
    match rustix::fs::fstatfs(&fd) {
        // The field is signed on some architectures; magics are 32 bits wide.
        Ok(raw) => Ok(u64::from(raw.f_type as u32)),
        Err(errno) => Err(on("fstatfs", &fd, errno)),
    }
}

/// The mount that a descriptor lies on.
pub fn mount_place(fd: impl AsFd) -> Result<MountPlace> {
    match rustix::fs::statx(&fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID) {
        Ok(raw) => Ok(MountPlace {
            mount_id: raw.stx_mnt_id,
            is_root: raw.stx_attributes.contains(StatxAttributes::MOUNT_ROOT),
        }),
        Err(errno) => Err(on("statx", &fd, errno)),
    }
}

#[allow(clippy::useless_conversion, reason = "the link count is narrower on aarch64")]
fn convert(raw: &rustix::fs::Stat) -> Stat {
    Stat {
        kind: kind_of(FileType::from_raw_mode(raw.st_mode)),
        dev: raw.st_dev,
        ino: raw.st_ino,
        mode: raw.st_mode & 0o7777,
        uid: raw.st_uid,
        gid: raw.st_gid,
        rdev: (rustix::fs::major(raw.st_rdev), rustix::fs::minor(raw.st_rdev)),
        // Never negative: the kernel's loff_t of a size.
        size: u64::try_from(raw.st_size).unwrap_or(0),
        nlink: u64::from(raw.st_nlink),
    }
}

pub(crate) fn kind_of(raw: FileType) -> Kind {
    match raw {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::CharacterDevice => Kind::CharDevice,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::Unknown => Kind::Unknown,
    }
}
