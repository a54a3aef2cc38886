//! Paths that are hidden, and paths that are made read-only.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use coracle_kernel::mount::{self, Depth};
use coracle_kernel::mount_attr::{self, Attr, Change};
use coracle_kernel::path::{self, Kind, OFlags};

use super::error::{Doing, Result};
use super::{Rootfs, devices};

/// Covers each masked path: a directory with an empty read-only tmpfs, anything else with the null device.
///
/// One tmpfs serves all directories: Kubernetes masks one path a CPU, and a filesystem for each was measured in seconds.
pub(super) fn hide(rootfs: &Rootfs<'_>) -> Result<()> {
    let paths = &rootfs.config.masked_paths;
    let mut seen = BTreeSet::new();
    let (mut for_directories, mut for_files) = (None, None);
    for masked in paths.iter().filter(|path| seen.insert(path.as_str())) {
        let Some(target) = find(rootfs, masked)? else {
            continue;
        };
        let kind = path::stat(&target)
            .doing("look at the masked path", || format!("{masked:?}"))?
            .kind;
        let cover = if kind == Kind::Directory {
            &mut for_directories
        } else {
            &mut for_files
        };
        let mount = match cover {
            // Cloned from the one already attached: a detached mount cannot be before Linux 6.15.
            Some(first) => mount::clone_tree(first, Depth::Single).doing("mask", || format!("{masked:?}"))?,
            None if kind == Kind::Directory => empty_directory(rootfs, masked)?,
            None => null(rootfs, masked)?,
        };
        mount::attach(&mount, &target).doing("mask", || format!("{masked:?}"))?;
        cover.get_or_insert(mount);
    }
    Ok(())
}

/// Makes each path read-only, with all that is mounted below, by a bind of it onto itself that keeps its other flags.
pub(super) fn make_read_only(rootfs: &Rootfs<'_>) -> Result<()> {
    for read_only in &rootfs.config.readonly_paths {
        let Some(target) = find(rootfs, read_only)? else {
            continue;
        };
        let doing = || format!("{read_only:?}");
        let copy = mount::clone_tree(&target, Depth::Recursive).doing("make read-only", doing)?;
        let change = Change {
            set: Attr::RDONLY,
            recursive: true,
            ..Change::default()
        };
        mount_attr::set(&copy, &change).doing("make read-only", doing)?;
        mount::attach(&copy, &target).doing("make read-only", doing)?;
    }
    Ok(())
}

/// Opens a path that the kernel or the image may not have at all.
fn find(rootfs: &Rootfs<'_>, name: &str) -> Result<Option<OwnedFd>> {
    rootfs
        .root()
        .find(name, OFlags::PATH)
        .doing("open", || format!("{name:?}"))
}

fn empty_directory(rootfs: &Rootfs<'_>, masked: &str) -> Result<OwnedFd> {
    let label = rootfs
        .config
        .mount_label
        .as_deref()
        .map(|label| ("context", label));
    let mut options = vec![("nr_blocks", "1"), ("nr_inodes", "1")];
    options.extend(label);
    let make = || {
        let filesystem = mount::Filesystem::open("tmpfs")?;
        options
            .iter()
            .try_for_each(|(key, value)| filesystem.string(key, value))?;
        filesystem.create()?;
        filesystem.mount(Attr::RDONLY)
    };
    make().doing("make the empty directory for", || format!("{masked:?}"))
}

/// The null device, read-only as a mount: writing to it still works, changing the node's owner or mode does not.
fn null(rootfs: &Rootfs<'_>, masked: &str) -> Result<OwnedFd> {
    let node = devices::null_device(rootfs)?;
    let make = || {
        let mount = mount::clone_tree(&node, Depth::Single)?;
        mount_attr::add(&mount, Attr::RDONLY)?;
        Ok(mount)
    };
    make().doing("bind the null device for", || format!("{masked:?}"))
}
