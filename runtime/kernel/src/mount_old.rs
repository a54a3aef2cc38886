//! mount(2): what the descriptor interface cannot do, or not on every kernel.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::path::Path;

use crate::fd::{proc_path, show};
use crate::mount::c_path;
use crate::mount_attr::Propagation;
use crate::{Error, Result};

bitflags::bitflags! {
    /// `MS_*` flags of mount(2).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Flags: u64 {
        /// Read-only.
        const RDONLY = 1;
        /// No set-id.
        const NOSUID = 1 << 1;
        /// No devices.
        const NODEV = 1 << 2;
        /// No execution.
        const NOEXEC = 1 << 3;
        /// Every write is synchronous.
        const SYNCHRONOUS = 1 << 4;
        /// Change an existing mount.
        const REMOUNT = 1 << 5;
        /// Mandatory locks (gone since 5.15).
        const MANDLOCK = 1 << 6;
        /// Directory changes are synchronous.
        const DIRSYNC = 1 << 7;
        /// Symlinks are not followed.
        const NOSYMFOLLOW = 1 << 8;
        /// No access times.
        const NOATIME = 1 << 10;
        /// No access times of directories.
        const NODIRATIME = 1 << 11;
        /// Another place for an existing tree.
        const BIND = 1 << 12;
        /// Move a mount.
        const MOVE = 1 << 13;
        /// All mounts below too.
        const REC = 1 << 14;
        /// Quiet.
        const SILENT = 1 << 15;
        /// Access times relative to changes.
        const RELATIME = 1 << 21;
        /// Count changes of inodes.
        const I_VERSION = 1 << 23;
        /// Access times always.
        const STRICTATIME = 1 << 24;
        /// Times in memory first.
        const LAZYTIME = 1 << 25;
    }
}

/// mount(2) onto what a descriptor refers to. `data` is the filesystem's option text.
pub fn mount(source: &CStr, target: impl AsFd, kind: &CStr, flags: Flags, data: &CStr) -> Result<()> {
    let path = proc_path(&target);
    raw(source, &path, kind, flags, data).map_err(|errno| {
        failed(
            &format!("{source:?}, {}, {kind:?}, {flags:?}, {data:?}", show(&target)),
            errno,
        )
    })
}

/// mount(2) of a source path (relative to the current directory, if so) onto a target path.
pub fn mount_at(source: &CStr, target: &Path, kind: &CStr, flags: Flags, data: &CStr) -> Result<()> {
    let path = c_path(target, "mount")?;
    raw(source, &path, kind, flags, data).map_err(|errno| {
        failed(
            &format!("{source:?}, {target:?}, {kind:?}, {flags:?}, {data:?}"),
            errno,
        )
    })
}

/// Binds what one descriptor refers to onto what another does.
pub fn bind(source: impl AsFd, target: impl AsFd, recursive: bool) -> Result<()> {
    let flags = if recursive {
        Flags::BIND | Flags::REC
    } else {
        Flags::BIND
    };
    raw(&proc_path(&source), &proc_path(&target), c"", flags, c"")
        .map_err(|errno| failed(&format!("{}, {}, {flags:?}", show(&source), show(&target)), errno))
}

/// Moves the mount at the current directory onto `/`: what is left where pivot_root(2) is impossible.
pub fn move_here_to_root() -> Result<()> {
    raw(c".", c"/", c"", Flags::MOVE, c"").map_err(|errno| failed("\".\", \"/\", MOVE", errno))
}

/// Sets the propagation of the mount at a path.
pub fn set_propagation(path: &Path, propagation: Propagation, recursive: bool) -> Result<()> {
    let target = c_path(path, "mount")?;
    let mut flags = Flags::from_bits_retain(u64::from(propagation.bits()));
    flags.set(Flags::REC, recursive);
    raw(c"", &target, c"", flags, c"").map_err(|errno| failed(&format!("{path:?}, {propagation:?}"), errno))
}

fn raw(source: &CStr, target: &CStr, kind: &CStr, flags: Flags, data: &CStr) -> rustix::io::Result<()> {
    // SAFETY: four C strings that live across the call; the kernel copies them.
    let done = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            // All flags lie below bit 32, so this holds where c_ulong has 32 bits too.
            flags.bits() as libc::c_ulong,
            data.as_ptr().cast(),
        )
    };
    if done < 0 {
        return Err(rustix::io::Errno::from_io_error(&std::io::Error::last_os_error())
            .unwrap_or(rustix::io::Errno::IO));
    }
    Ok(())
}

fn failed(args: &str, errno: rustix::io::Errno) -> Error {
    Error::new("mount", args.to_owned(), errno.into())
}
