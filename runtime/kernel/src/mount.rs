//! The mount interface by descriptors: fsopen, fsconfig, fsmount, open_tree, move_mount, and umount2.
//!
//! A filesystem is configured, made and mounted without a name; the mount that comes out is attached nowhere and goes
//! away with its last descriptor, until [`attach`] gives it a place.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use crate::fd::show;
use crate::mount_attr::Attr;
use crate::{Errno, Error, Result};

/// The longest value that one `fsconfig` string may have (the kernel's buffer is 256 bytes with the NUL).
pub const MAX_OPTION_BYTES: usize = 255;
/// Messages of the kernel that are read from a filesystem context for an error text.
const MAX_MESSAGES: usize = 8;

/// A filesystem under construction (fsopen) or being reconfigured (fspick).
#[derive(Debug)]
pub struct Filesystem {
    context: OwnedFd,
    /// Name of the type, or where it was picked: for messages.
    label: String,
}

/// What a clone of a tree takes along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// The one mount.
    Single,
    /// The mount and all below.
    Recursive,
}

impl Filesystem {
    /// A new filesystem of this type.
    pub fn open(name: &str) -> Result<Filesystem> {
        match rustix::mount::fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(context) => Ok(Filesystem {
                context,
                label: name.to_owned(),
            }),
            Err(errno) => Err(Error::new("fsopen", format!("{name:?}"), errno.into())),
        }
    }

    /// The filesystem of an existing mount, to be reconfigured.
    pub fn pick(mount: impl AsFd) -> Result<Filesystem> {
        match rustix::mount::fspick(
            &mount,
            "",
            FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH,
        ) {
            Ok(context) => Ok(Filesystem {
                context,
                label: format!("pick {}", show(&mount)),
            }),
            Err(errno) => Err(Error::new("fspick", show(&mount), errno.into())),
        }
    }

    /// Sets an option that has no value.
    pub fn flag(&self, key: &str) -> Result<()> {
        rustix::mount::fsconfig_set_flag(&self.context, key).map_err(|errno| self.failed(key, errno))
    }

    /// Sets an option to a text of at most [`MAX_OPTION_BYTES`].
    pub fn string(&self, key: &str, value: impl AsRef<OsStr>) -> Result<()> {
        let value = value.as_ref();
        rustix::mount::fsconfig_set_string(&self.context, key, value.as_bytes())
            .map_err(|errno| self.failed(format_args!("{key}={}", value.display()), errno))
    }

    /// Sets an option to an open file, such as an overlay layer where the kernel takes those.
    pub fn fd(&self, key: &str, value: impl AsFd) -> Result<()> {
        rustix::mount::fsconfig_set_fd(&self.context, key, &value)
            .map_err(|errno| self.failed(format_args!("{key}={}", show(&value)), errno))
    }

    /// Sets one option given as text, `key` or `key=value`.
    pub fn option(&self, option: &str) -> Result<()> {
        match option.split_once('=') {
            Some((key, value)) => self.string(key, value),
            None => self.flag(option),
        }
    }

    /// Makes the filesystem (or takes one that exists already for the same source).
    pub fn create(&self) -> Result<()> {
        rustix::mount::fsconfig_create(&self.context).map_err(|errno| self.failed("create", errno))
    }

    /// Applies the options to a picked filesystem.
    pub fn reconfigure(&self) -> Result<()> {
        rustix::mount::fsconfig_reconfigure(&self.context).map_err(|errno| self.failed("reconfigure", errno))
    }

    /// A detached mount of the filesystem made, with these flags.
    pub fn mount(self, flags: Attr) -> Result<OwnedFd> {
        let raw = u32::try_from(flags.bits()).unwrap_or(u32::MAX);
        let flags = MountAttrFlags::from_bits_retain(raw);
        rustix::mount::fsmount(&self.context, FsMountFlags::FSMOUNT_CLOEXEC, flags).map_err(|errno| {
            Error::new(
                "fsmount",
                format!("{}{}", self.label, self.messages()),
                errno.into(),
            )
        })
    }

    /// What the kernel wrote about this context, as `; message; message`.
    fn messages(&self) -> String {
        let mut text = String::new();
        let mut buffer = [0; 1024];
        for _ in 0..MAX_MESSAGES {
            match rustix::io::read(&self.context, &mut buffer[..]) {
                Ok(length) if length > 0 => {
                    let message = String::from_utf8_lossy(&buffer[..length]);
                    // "e overlay: No lowerdir": the first letter is the level.
                    let message = message.get(2..).unwrap_or_default().trim_end();
                    text.push_str("; ");
                    text.push_str(message);
                }
                _ => break,
            }
        }
        text
    }

    fn failed(&self, what: impl std::fmt::Display, errno: rustix::io::Errno) -> Error {
        Error::new(
            "fsconfig",
            format!("{}, {what}{}", self.label, self.messages()),
            errno.into(),
        )
    }
}

impl AsFd for Filesystem {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.context.as_fd()
    }
}

/// A detached copy of the mount (tree) that `source` lies on, with `source` as its root.
///
/// Before Linux 6.15 the source must not be detached itself (`EINVAL`).
pub fn clone_tree(source: impl AsFd, depth: Depth) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | match depth {
            Depth::Single => OpenTreeFlags::empty(),
            Depth::Recursive => OpenTreeFlags::AT_RECURSIVE,
        };
    rustix::mount::open_tree(&source, "", flags).map_err(|errno| {
        Error::new(
            "open_tree",
            format!("{}, clone {depth:?}", show(&source)),
            errno.into(),
        )
    })
}

/// Gives a detached mount (or moves an attached one) its place at what `target` refers to.
///
/// `target` is an `O_PATH` descriptor of a directory or, for a mount of a file, of a file: what was checked there is
/// what is covered, whatever the name means by now.
pub fn attach(mount: impl AsFd, target: impl AsFd) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(&mount, "", &target, "", flags).map_err(|errno| {
        Error::new(
            "move_mount",
            format!("{}, {}", show(&mount), show(&target)),
            errno.into(),
        )
    })
}

/// Detaches the topmost mount at a path; what still uses it keeps it until it closes. Symlinks are not followed.
pub fn detach(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        .map_err(|errno| Error::new("umount2", format!("{path:?}, MNT_DETACH"), errno.into()))
}

/// Detaches the mount whose root a descriptor is, through `/proc/self/fd`.
pub fn detach_fd(mount: impl AsFd) -> Result<()> {
    rustix::mount::unmount(crate::fd::proc_path(&mount), UnmountFlags::DETACH)
        .map_err(|errno| Error::new("umount2", format!("{}, MNT_DETACH", show(&mount)), errno.into()))
}

/// Unmounts the topmost mount at a path, `EBUSY` where it is in use. Symlinks are not followed.
pub fn unmount(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    rustix::mount::unmount(path, UnmountFlags::NOFOLLOW)
        .map_err(|errno| Error::new("umount2", format!("{path:?}"), errno.into()))
}

/// A path as C string; `EINVAL` where it holds a NUL.
pub(crate) fn c_path(path: &Path, call: &'static str) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::new(call, format!("{path:?}"), Errno::EINVAL))
}

/// The flags of the mount below a descriptor that can be locked in a user namespace, from statfs.
pub fn flags_of(fd: impl AsFd) -> Result<Attr> {
    let raw = rustix::fs::fstatvfs(&fd).map_err(|e| Error::new("fstatfs", show(&fd), e.into()))?;
    let bits = raw.f_flag.bits();
    let mut attr = Attr::empty();
    // ST_* of statfs: read-only, nosuid, nodev, noexec, then the access time (noatime, nodiratime, relatime).
    for (bit, flag) in [
        (0x1, Attr::RDONLY),
        (0x2, Attr::NOSUID),
        (0x4, Attr::NODEV),
        (0x8, Attr::NOEXEC),
        (0x400, Attr::NOATIME),
        (0x800, Attr::NODIRATIME),
        (0x2000, Attr::NOSYMFOLLOW),
    ] {
        attr.set(flag, bits & bit != 0);
    }
    // Neither noatime nor relatime: strict.
    attr.set(Attr::STRICTATIME, bits & 0x1400 == 0);
    Ok(attr)
}

/// Makes a filesystem in one go: type, options, create, mount.
pub fn make(name: &str, options: &[(&str, &CStr)], flags: Attr) -> Result<OwnedFd> {
    let filesystem = Filesystem::open(name)?;
    for (key, value) in options {
        filesystem.string(key, OsStr::from_bytes(value.to_bytes()))?;
    }
    filesystem.create()?;
    filesystem.mount(flags)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount_attr::{self, Change};
    use crate::mount_old;
    use crate::namespace::{self, Kinds};
    use crate::path::{self, OFlags, Root};

    /// Runs in a thread with a mount namespace of its own, which ends with the thread and takes all mounts along.
    fn in_namespace(body: impl FnOnce() + Send + 'static) {
        let run = || {
            namespace::unshare(Kinds::MOUNT).unwrap();
            let root = path::open_dir("/").unwrap();
            mount_attr::set_propagation(root, mount_attr::Propagation::Private, true).unwrap();
            body();
        };
        std::thread::spawn(run).join().unwrap();
    }

    #[test]
    fn a_filesystem_is_made_attached_changed_and_detached() {
        in_namespace(|| {
            let target = path::open_dir(std::env::temp_dir()).unwrap();
            let before = path::mount_place(&target).unwrap();
            let mount = make("tmpfs", &[("size", c"64k"), ("mode", c"700")], Attr::NOSUID).unwrap();
            attach(&mount, &target).unwrap();
            let top = path::open_dir(std::env::temp_dir()).unwrap();
            let place = path::mount_place(&top).unwrap();
            assert!(place.is_root && place.mount_id != before.mount_id);
            assert_eq!(path::stat(&top).unwrap().mode, 0o700);
            mount_attr::add(&mount, Attr::RDONLY).unwrap();
            assert_eq!(flags_of(&mount).unwrap(), Attr::NOSUID | Attr::RDONLY);
            assert_eq!(
                path::make_dir(&mount, "x", 0o755).unwrap_err().errno(),
                Errno::EROFS
            );
            let change = Change {
                clear: Attr::RDONLY,
                ..Change::default()
            };
            mount_attr::set(&mount, &change).unwrap();
            path::make_dir(&mount, "x", 0o755).unwrap();
            let copy = clone_tree(Root::new(&mount).open_path("x").unwrap(), Depth::Single).unwrap();
            assert!(path::mount_place(&copy).unwrap().is_root);
            detach_fd(&mount).unwrap();
            let again = path::open_dir(std::env::temp_dir()).unwrap();
            assert_eq!(path::mount_place(&again).unwrap(), before);
        });
    }

    #[test]
    fn what_the_kernel_says_of_a_bad_option_is_in_the_error() {
        let filesystem = Filesystem::open("tmpfs").unwrap();
        let error = filesystem.string("size", "much").unwrap_err();
        assert_eq!(error.errno(), Errno::EINVAL);
        assert!(error.to_string().contains("Bad value for 'size'"), "{error}");
        let long = "x".repeat(MAX_OPTION_BYTES + 1);
        assert_eq!(
            filesystem.string("mode", long).unwrap_err().errno(),
            Errno::EINVAL
        );
    }

    #[test]
    fn a_single_clone_leaves_mounts_below_behind() {
        in_namespace(|| {
            let outer = make("tmpfs", &[], Attr::empty()).unwrap();
            attach(&outer, path::open_dir(std::env::temp_dir()).unwrap()).unwrap();
            let below = Root::new(&outer).mkdir_all("below", 0o755).unwrap();
            mount_old::mount(c"none", &below, c"tmpfs", mount_old::Flags::empty(), c"mode=711").unwrap();
            for (depth, mode) in [(Depth::Single, 0o755), (Depth::Recursive, 0o711)] {
                let copy = clone_tree(&outer, depth).unwrap();
                let seen = Root::new(&copy).open("below", OFlags::PATH).unwrap();
                assert_eq!(path::stat(&seen).unwrap().mode, mode, "{depth:?}");
            }
        });
    }

    #[test]
    fn binds_and_propagation_of_the_old_interface_work_on_descriptors() {
        in_namespace(|| {
            let target = path::open_dir(std::env::temp_dir()).unwrap();
            mount_old::bind(path::open_dir("/proc").unwrap(), &target, false).unwrap();
            assert!(std::env::temp_dir().join("self").exists());
            let shared = mount_attr::Propagation::Shared;
            mount_old::set_propagation(&std::env::temp_dir(), shared, false).unwrap();
            detach(std::env::temp_dir()).unwrap();
            assert_eq!(
                unmount(std::env::temp_dir().join("none")).unwrap_err().errno(),
                Errno::ENOENT
            );
        });
    }
}
