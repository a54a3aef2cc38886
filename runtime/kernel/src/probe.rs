//! What this kernel can do, each asked once and by really doing it.
//!
//! Version numbers lie: distributions carry features back, outer containers deny calls, and some kernels accept an option
//! only to fail when the filesystem is made. Nothing made here is attached anywhere or outlives its function.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::OnceLock;

use crate::idmap::{self, Holder, Line};
use crate::mount::{self, Depth, Filesystem};
use crate::mount_attr::{self, Attr, Change};
use crate::namespace::Kinds;
use crate::path::{self, OFlags, Root};
use crate::{Error, Result};

/// Ways to give overlayfs its layers, as far as they work on a given filesystem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OverlayLayers {
    /// `lowerdir+` takes a descriptor (6.13).
    pub by_descriptor: bool,
    /// `lowerdir+` takes a path (6.5).
    pub by_path: bool,
    /// `lowerdir` takes a list of paths: every kernel with overlayfs.
    pub by_list: bool,
}

/// `STATX_MNT_ID_UNIQUE`.
const STATX_MNT_ID_UNIQUE: u32 = 0x4000;
/// `STATMOUNT_MNT_BASIC`.
const STATMOUNT_MNT_BASIC: u64 = 2;
/// The number of statmount(2), the same on all architectures.
const SYS_STATMOUNT: libc::c_long = 457;
/// `_IOWR(0xff, 11, 64 bytes)`: PIDFD_GET_INFO with the first version of its struct.
const PIDFD_GET_INFO: libc::c_ulong = 0xc040_ff0b;
/// `PIDFD_INFO_EXIT`.
const PIDFD_INFO_EXIT: u64 = 1 << 3;

/// `struct mnt_id_req`, first version.
#[repr(C)]
struct MountIdRequest {
    size: u32,
    spare: u32,
    mount_id: u64,
    param: u64,
}

/// Version of the running kernel, major and minor. For the one check at start; features are asked below.
pub fn kernel_version() -> Result<(u32, u32)> {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => Err(Error::new("uname", release.into_owned(), crate::Errno::EINVAL)),
    }
}

/// mount_setattr(2) works (5.12, unless an outer container denies it).
pub fn mount_setattr() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        tmpfs()
            .and_then(|mount| mount_attr::add(mount, Attr::RDONLY))
            .is_ok()
    })
}

/// statmount(2) works (6.8).
pub fn statmount() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| path::open("/", OFlags::PATH).is_ok_and(|root| try_statmount(&root)))
}

/// A pidfd tells the exit code of its process even after that was reaped (6.15).
pub fn pidfd_exit_info() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let Ok(child) = Holder::start(Kinds::empty()) else {
            return false;
        };
        child.end();
        let mut info = [0u64; 8];
        info[0] = PIDFD_INFO_EXIT;
        // SAFETY: the buffer has the 64 bytes that the request's number names, alive and writable here.
        let done = unsafe { libc::ioctl(child.pidfd.as_raw_fd(), PIDFD_GET_INFO as _, info.as_mut_ptr()) };
        done == 0 && info[0] & PIDFD_INFO_EXIT != 0
    })
}

/// A detached mount can be cloned (6.15).
pub fn clone_of_detached() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        tmpfs()
            .and_then(|mount| mount::clone_tree(mount, Depth::Single))
            .is_ok()
    })
}

/// A mount can be attached below a detached one (6.15).
pub fn attach_below_detached() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let attempt = || {
            let base = tmpfs()?;
            let place = Root::new(&base).mkdir_all("below", 0o755)?;
            mount::attach(tmpfs()?, place)
        };
        attempt().is_ok()
    })
}

/// A tmpfs can be mounted with mapped ids (6.3).
pub fn idmapped_tmpfs() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| tmpfs().and_then(idmap_mount).is_ok())
}

/// The filesystem below a directory can be mounted with mapped ids. Not remembered: it depends on the filesystem.
pub fn idmapped(directory: impl AsFd) -> bool {
    mount::clone_tree(directory, Depth::Single)
        .and_then(idmap_mount)
        .is_ok()
}

/// How overlayfs takes layers that lie below `scratch`, a directory on the filesystem of the layers; two directories are
/// made in it for the time of the call. Not remembered: it depends on the filesystem.
pub fn overlay_layers(scratch: impl AsFd) -> Result<OverlayLayers> {
    let names = [
        format!(".probe-{}-a", std::process::id()),
        format!(".probe-{}-b", std::process::id()),
    ];
    let root = Root::new(&scratch);
    let mut layers = Vec::with_capacity(2);
    for name in &names {
        layers.push(root.mkdir_all(name, 0o700)?);
    }
    let by_descriptor = || {
        let overlay = Filesystem::open("overlay")?;
        layers
            .iter()
            .try_for_each(|layer| overlay.fd("lowerdir+", layer))?;
        finish(overlay)
    };
    let paths: Vec<String> = layers
        .iter()
        .map(|layer| format!("/proc/self/fd/{}", layer.as_raw_fd()))
        .collect();
    let by_path = || {
        let overlay = Filesystem::open("overlay")?;
        paths
            .iter()
            .try_for_each(|path| overlay.string("lowerdir+", path))?;
        finish(overlay)
    };
    let by_list = || {
        let overlay = Filesystem::open("overlay")?;
        overlay.string("lowerdir", paths.join(":"))?;
        finish(overlay)
    };
    let found = OverlayLayers {
        by_descriptor: by_descriptor().is_ok(),
        by_path: by_path().is_ok(),
        by_list: by_list().is_ok(),
    };
    for name in &names {
        path::remove_dir(&scratch, name)?;
    }
    Ok(found)
}

/// Makes and mounts the overlay: 6.1 accepts the option and fails only here.
fn finish(overlay: Filesystem) -> Result<OwnedFd> {
    overlay.create()?;
    overlay.mount(Attr::empty())
}

fn tmpfs() -> Result<OwnedFd> {
    mount::make("tmpfs", &[], Attr::empty())
}

fn idmap_mount(mount: OwnedFd) -> Result<()> {
    let lines = [Line {
        inside: 0,
        outside: 1,
        count: 1,
    }];
    let namespace = idmap::user_namespace(&lines, &lines)?;
    mount_attr::set(
        mount,
        &Change {
            idmap: Some(namespace.as_fd()),
            ..Change::default()
        },
    )
}

fn try_statmount(root: &OwnedFd) -> bool {
    // SAFETY: an all-zero statx is a valid value of plain numbers.
    let mut statx: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: a C literal and a writable struct of the kernel's layout, alive here.
    let done = unsafe {
        libc::statx(
            root.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            STATX_MNT_ID_UNIQUE,
            &raw mut statx,
        )
    };
    if done < 0 || statx.stx_mask & STATX_MNT_ID_UNIQUE == 0 {
        return false;
    }
    let request = MountIdRequest {
        // 24 bytes: cannot truncate.
        size: size_of::<MountIdRequest>() as u32,
        spare: 0,
        mount_id: statx.stx_mnt_id,
        param: STATMOUNT_MNT_BASIC,
    };
    let mut buffer = [0u64; 128];
    // SAFETY: the request and the writable buffer have the sizes given, alive here.
    let done = unsafe {
        libc::syscall(
            SYS_STATMOUNT,
            &raw const request,
            buffer.as_mut_ptr(),
            size_of_val(&buffer),
            0,
        )
    };
    done == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of features that came with a version, a newer mainline kernel must report them (the reverse may be a backport).
    #[test]
    fn answers_fit_the_kernel_version() {
        let version = kernel_version().unwrap();
        for (since, name, found) in [
            ((5, 12), "mount_setattr", mount_setattr()),
            ((6, 3), "idmapped_tmpfs", idmapped_tmpfs()),
            ((6, 8), "statmount", statmount()),
            ((6, 15), "pidfd_exit_info", pidfd_exit_info()),
            ((6, 15), "clone_of_detached", clone_of_detached()),
            ((6, 15), "attach_below_detached", attach_below_detached()),
        ] {
            assert!(found || version < since, "{name} is missing on {version:?}");
        }
    }

    #[test]
    fn overlay_layers_are_tried_and_leave_nothing_behind() {
        let dir = std::env::temp_dir().join(format!("coracle-probe-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let found = overlay_layers(path::open_dir(&dir).unwrap());
        std::fs::remove_dir(&dir).unwrap();
        let found = found.unwrap();
        assert!(found.by_list);
        let version = kernel_version().unwrap();
        assert!(found.by_path || version < (6, 5));
        assert!(found.by_descriptor || version < (6, 13));
    }
}
