//! One mount of the configuration: which kind it is, where it goes, and what may not be covered.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use coracle_kernel::Errno;
use coracle_kernel::mount::Filesystem;
use coracle_kernel::mount_attr::{self, Attr, Change};
use coracle_kernel::path::{self, Leaf, OFlags, Stat};
use coracle_kernel::procfs::{PROC_MAGIC, PROC_ROOT_INODE};
use coracle_spec::{Attrs, Bind, Mount, MountOptions};

use super::error::{Doing, Error, Result};
use super::{Rootfs, bind, cgroupfs, convert, show, special};

/// Files below `/proc` that may be covered, as lxcfs and debuggers do; whatever else is there must stay the kernel's.
const COVERABLE_IN_PROC: [&str; 11] = [
    "cpuinfo",
    "diskstats",
    "loadavg",
    "meminfo",
    "net/dev",
    "slabinfo",
    "stat",
    "swaps",
    "sys/crypto/fips_enabled",
    "sys/kernel/ns_last_pid",
    "uptime",
];

/// What is about to be mounted, as far as it matters for what it may cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Covering {
    /// A procfs, from its root.
    Procfs,
    /// Anything else.
    Other,
}

/// Makes one mount.
pub(super) fn make(rootfs: &mut Rootfs<'_>, mount: &Mount) -> Result<()> {
    let options = &mount.options;
    if options.remount || (options.bind == Bind::No && mount.fstype.is_empty()) {
        return change(rootfs, mount);
    }
    if options.bind != Bind::No {
        return bind::make(rootfs, mount);
    }
    match mount.fstype.as_str() {
        "proc" | "sysfs" => special::proc_or_sysfs(rootfs, mount),
        "tmpfs" => special::tmpfs(rootfs, mount),
        "cgroup" | "cgroup2" => cgroupfs::make(rootfs, mount),
        _ => special::other(rootfs, mount),
    }
}

/// Opens the place of a mount, made where missing, after a look that it may be covered.
pub(super) fn target(rootfs: &Rootfs<'_>, mount: &Mount, leaf: Leaf, covering: Covering) -> Result<OwnedFd> {
    let destination = &mount.destination;
    let target = rootfs
        .root()
        .ensure(destination, leaf)
        .doing("make the mount point", || show(destination))?;
    check(rootfs, destination, &target, covering)?;
    Ok(target)
}

/// Refuses to cover the root itself, `/proc` by anything but a procfs, and what lies in `/proc`.
///
/// Labels, sysctls and the process's own view of itself are read there by programs that trust it.
pub(super) fn check(
    rootfs: &Rootfs<'_>,
    destination: &Path,
    target: &OwnedFd,
    covering: Covering,
) -> Result<Stat> {
    let stat = path::stat(target).doing("look at the mount point", || show(destination))?;
    if (stat.dev, stat.ino) == (rootfs.root_stat.dev, rootfs.root_stat.ino) {
        return Err(Error::refused(
            show(destination),
            "cannot be mounted because it is the root itself",
        ));
    }
    let named = clean(destination);
    let below_proc = named.strip_prefix("/proc").ok();
    let magic = path::filesystem_magic(target).doing("look at the mount point", || show(destination))?;
    let on_proc = magic == PROC_MAGIC;
    let is_proc = below_proc == Some(Path::new("")) || (on_proc && stat.ino == PROC_ROOT_INODE);
    if is_proc {
        return match covering {
            Covering::Procfs => Ok(stat),
            Covering::Other => Err(Error::refused(
                show(destination),
                "cannot be mounted because it is not of type proc",
            )),
        };
    }
    let coverable =
        below_proc.is_some_and(|name| COVERABLE_IN_PROC.iter().any(|known| name == Path::new(known)));
    if (on_proc || below_proc.is_some()) && !coverable {
        return Err(Error::refused(
            show(destination),
            "cannot be mounted because it is inside /proc",
        ));
    }
    Ok(stat)
}

/// Opens a directory, made where missing, of which no part may be a symlink: the image must not choose where it is.
pub(super) fn real_directory(rootfs: &Rootfs<'_>, directory: &Path, purpose: &str) -> Result<OwnedFd> {
    let open = || {
        rootfs
            .root()
            .open_real(directory, OFlags::PATH | OFlags::DIRECTORY)
    };
    let opened = match open() {
        Err(error) if error.errno() == Errno::ENOENT => {
            let made = rootfs.root().mkdir_all(directory, 0o755);
            made.and_then(|_| open())
        }
        other => other,
    };
    match opened {
        Err(error) if matches!(error.errno(), Errno::ELOOP | Errno::ENOTDIR) => Err(Error::refused(
            format!("{purpose} at {}", show(directory)),
            "must be mounted on ordinary directory",
        )),
        other => other.doing("open the directory", || show(directory)),
    }
}

/// A detached mount of a new filesystem with these options. `label` is the SELinux context, if any.
pub(super) fn make_filesystem(
    fstype: &str,
    source: Option<&Path>,
    options: &MountOptions,
    extra: &[(&str, &str)],
    flags: Attr,
) -> coracle_kernel::Result<OwnedFd> {
    let filesystem = Filesystem::open(fstype)?;
    if let Some(source) = source {
        filesystem.string("source", source)?;
    }
    for (key, value) in extra {
        filesystem.string(key, value)?;
    }
    options.data.iter().try_for_each(|word| filesystem.option(word))?;
    // `silent` is for the kernel's log and has no name here.
    options
        .fs_flag_names()
        .filter(|name| *name != "silent")
        .try_for_each(|name| filesystem.flag(name))?;
    filesystem.create()?;
    filesystem.mount(flags)
}

/// The flags of a mount that is made afresh: nothing to clear.
pub(super) fn fresh_flags(options: &MountOptions) -> Attr {
    Attr::from_bits_retain(options.attrs.set)
}

/// Sets the flags that were asked for on a bind.
///
/// As with mount(8), naming one flag replaces all: those of the source go. In a user namespace the source's flags may be
/// locked; then they stay, unless one that is locked was to be cleared by name, which is an error.
pub(super) fn replace_flags(mount: impl AsFd, attrs: Attrs) -> coracle_kernel::Result<()> {
    if attrs.is_empty() {
        return Ok(());
    }
    let replaced = Attr::RDONLY | Attr::NOSUID | Attr::NODEV | Attr::NOEXEC | Attr::NOSYMFOLLOW;
    let set = Attr::from_bits_retain(attrs.set);
    let clear = Attr::from_bits_retain(attrs.clear);
    let change = Change {
        set,
        clear: clear | replaced.difference(set),
        ..Change::default()
    };
    match mount_attr::set(&mount, &change) {
        Err(error) if error.errno() == Errno::EPERM => mount_attr::set(&mount, &Change { clear, ..change }),
        other => other,
    }
}

/// What comes after a mount sits in its place: recursive flags, then the propagation words in order.
pub(super) fn settle(fd: impl AsFd, mount: &Mount) -> Result<()> {
    let recursive = mount.options.recursive_attrs;
    if !recursive.is_empty() {
        let change = Change {
            set: Attr::from_bits_retain(recursive.set),
            clear: Attr::from_bits_retain(recursive.clear),
            recursive: true,
            ..Change::default()
        };
        mount_attr::set(&fd, &change).doing("set the recursive flags of the mount", || {
            show(&mount.destination)
        })?;
    }
    for propagation in &mount.options.propagation {
        mount_attr::set_propagation(&fd, convert(propagation.kind), propagation.recursive)
            .doing("set the propagation of the mount", || show(&mount.destination))?;
    }
    Ok(())
}

/// The path with `.` and `..` taken away by their letters, absolute.
pub(super) fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::ParentDir => {
                clean.pop();
            }
            Component::Normal(name) => clean.push(name),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// Changes an existing mount: `remount`, or propagation words alone.
fn change(rootfs: &Rootfs<'_>, mount: &Mount) -> Result<()> {
    let destination = &mount.destination;
    let target = rootfs
        .root()
        .open_path(destination)
        .doing("open the mount", || show(destination))?;
    if mount.options.remount {
        replace_flags(&target, mount.options.attrs).doing("remount", || show(destination))?;
        // Without bind, mount(8) means the filesystem and not this mount alone.
        let filesystem_words = !mount.options.data.is_empty() || mount.options.fs_flags != 0;
        if filesystem_words && mount.options.bind == Bind::No {
            reconfigure(&target, &mount.options).doing("remount", || show(destination))?;
        }
    }
    settle(&target, mount)
}

fn reconfigure(target: &OwnedFd, options: &MountOptions) -> coracle_kernel::Result<()> {
    let filesystem = Filesystem::pick(target)?;
    options.data.iter().try_for_each(|word| filesystem.option(word))?;
    options
        .fs_flag_names()
        .filter(|name| *name != "silent")
        .try_for_each(|name| filesystem.flag(name))?;
    filesystem.reconfigure()
}
