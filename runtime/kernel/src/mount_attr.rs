//! mount_setattr(2): the flags, propagation and id mapping of a mount, by descriptor.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::fd::show;
use crate::{Errno, Error, Result};

bitflags::bitflags! {
    /// Flags of one mount (`MOUNT_ATTR_*`). The access time is a field of values and not bits: [`Attr::ATIME`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Attr: u64 {
        /// Read-only.
        const RDONLY = 0x1;
        /// Set-id bits and file capabilities have no effect.
        const NOSUID = 0x2;
        /// Device nodes cannot be opened.
        const NODEV = 0x4;
        /// Nothing can be executed.
        const NOEXEC = 0x8;
        /// Access times are never written.
        const NOATIME = 0x10;
        /// Access times are always written.
        const STRICTATIME = 0x20;
        /// Access times of directories are never written.
        const NODIRATIME = 0x80;
        /// Ids are mapped; together with [`Change::idmap`].
        const IDMAP = 0x0010_0000;
        /// Symlinks are not followed.
        const NOSYMFOLLOW = 0x0020_0000;
    }
}

impl Attr {
    /// The whole access-time field; to be cleared whenever a value of it is set. `relatime` is the value 0.
    pub const ATIME: Attr = Attr::from_bits_retain(0x70);
    /// Everything that a mount can have and a bind remount replaces.
    pub const ALL: Attr = Attr::from_bits_retain(0x0020_008f);
}

/// How mounts and unmounts pass between copies of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// Not at all.
    Private,
    /// From the original to this copy only.
    Slave,
    /// Both ways.
    Shared,
    /// Not at all, and it cannot be bound.
    Unbindable,
}

/// What [`set`] changes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change<'fd> {
    /// Flags to set.
    pub set: Attr,
    /// Flags to clear; applied before `set`.
    pub clear: Attr,
    /// The new propagation, if any.
    pub propagation: Option<Propagation>,
    /// A user namespace whose mapping the mount gets; only a detached mount takes one, and only once.
    pub idmap: Option<BorrowedFd<'fd>>,
    /// All mounts below too, either all of them or none.
    pub recursive: bool,
}

/// `struct mount_attr` of the kernel.
#[repr(C)]
struct RawMountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

impl Propagation {
    /// The `MS_*` bit.
    pub(crate) const fn bits(self) -> u32 {
        match self {
            Propagation::Unbindable => 1 << 17,
            Propagation::Private => 1 << 18,
            Propagation::Slave => 1 << 19,
            Propagation::Shared => 1 << 20,
        }
    }
}

/// Changes the mount whose root `mount` is.
pub fn set(mount: impl AsFd, change: &Change<'_>) -> Result<()> {
    let mut attr = RawMountAttr {
        attr_set: change.set.bits(),
        attr_clr: change.clear.bits(),
        propagation: change.propagation.map_or(0, |p| u64::from(p.bits())),
        userns_fd: 0,
    };
    if let Some(userns) = change.idmap {
        attr.attr_set |= Attr::IDMAP.bits();
        // An open descriptor is never negative.
        attr.userns_fd = u64::from(userns.as_raw_fd().unsigned_abs());
    }
    let flags = libc::AT_EMPTY_PATH | if change.recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C literal and `attr` is the kernel's struct of exactly the size given, both alive here.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<RawMountAttr>(),
        )
    };
    if done < 0 {
        let errno = Errno::last();
        let recursive = if change.recursive { ", recursive" } else { "" };
        let args = format!(
            "{}, set {:?}, clear {:?}, {:?}{recursive}",
            show(&mount),
            change.set,
            change.clear,
            change.propagation
        );
        return Err(Error::new("mount_setattr", args, errno));
    }
    Ok(())
}

/// Sets flags on one mount and touches nothing else.
pub fn add(mount: impl AsFd, flags: Attr) -> Result<()> {
    set(
        mount,
        &Change {
            set: flags,
            ..Change::default()
        },
    )
}

/// Sets the propagation of one mount, or of the whole tree.
pub fn set_propagation(mount: impl AsFd, propagation: Propagation, recursive: bool) -> Result<()> {
    set(
        mount,
        &Change {
            propagation: Some(propagation),
            recursive,
            ..Change::default()
        },
    )
}
