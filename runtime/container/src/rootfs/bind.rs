//! Bind mounts: a tree of the host, cloned in the container's own mount namespace.
//!
//! Cloned there and not handed over from outside: in a user namespace the copy keeps the flags locked that the host's
//! mount had, so that the container cannot clear them.

use std::path::Path;

use coracle_kernel::mount;
use coracle_kernel::path::{self, Kind, Leaf, OFlags};
use coracle_kernel::procfs::{PROC_MAGIC, PROC_ROOT_INODE};
use coracle_spec::Mount;

use super::error::{Doing, Result};
use super::mounts::{self, Covering};
use super::{Rootfs, show, stage};

/// Makes a bind mount.
pub(super) fn make(rootfs: &Rootfs<'_>, mount: &Mount) -> Result<()> {
    let named = rootfs
        .bundle
        .join(mount.source.as_deref().unwrap_or(Path::new("")));
    let named = named.as_path();
    let gathered = rootfs
        .stage
        .as_ref()
        .and_then(|stage| stage::bind(stage, rootfs.config, mount));
    let source = match gathered {
        Some(source) => source,
        // The operator's path, and so followed as it stands: the host's tree is still there.
        None => path::open(named, OFlags::PATH).doing("open the source of a bind mount", || show(named))?,
    };
    let stat = path::stat(&source).doing("look at the source of a bind mount", || show(named))?;
    let leaf = if stat.kind == Kind::Directory {
        Leaf::Directory(0o755)
    } else {
        Leaf::File(0o644)
    };
    let is_procfs =
        stat.ino == PROC_ROOT_INODE && path::filesystem_magic(&source).is_ok_and(|magic| magic == PROC_MAGIC);
    let covering = if is_procfs {
        Covering::Procfs
    } else {
        Covering::Other
    };
    let target = mounts::target(rootfs, mount, leaf, covering)?;
    let doing = || format!("{} to {}", show(named), show(&mount.destination));
    let tree = mount::clone_tree(&source, stage::depth(mount)).doing("bind", doing)?;
    mounts::replace_flags(&tree, mount.options.attrs).doing("set the flags of the bind of", doing)?;
    mount::attach(&tree, &target).doing("bind", doing)?;
    mounts::settle(&tree, mount)
}
