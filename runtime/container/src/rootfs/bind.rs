//! Bind mounts: a tree of the host, cloned in the container's own mount namespace.
//!
//! Cloned there and not handed over from outside: in a user namespace the copy keeps the flags locked that the host's
//! mount had, so that the container cannot clear them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use coracle_kernel::mount;
use coracle_kernel::path::{self, Kind, Leaf, OFlags};
use coracle_kernel::procfs::{PROC_MAGIC, PROC_ROOT_INODE};
use coracle_spec::{Config, Mount, PropagationKind};

use super::error::{Doing, Result};
use super::mounts::{self, Covering};
use super::{Context, Rootfs, show, stage};

/// Takes the binds that follow the host's mounts, or tell it of theirs, by their index in the configuration.
///
/// It is done while the tree is the host's still. A clone of what lies on the mount that the root is attached to would
/// else come too late: that mount becomes a private one, or the host would see what is attached there.
pub(super) fn take(config: &Config, context: &Context<'_>) -> Result<BTreeMap<usize, OwnedFd>> {
    let mut taken = BTreeMap::new();
    for (index, mount) in config.mounts.iter().enumerate() {
        let follows = mount
            .options
            .propagation
            .iter()
            .any(|one| matches!(one.kind, PropagationKind::Shared | PropagationKind::Slave));
        // What lies in the root is there when the mounts before it are made.
        let source = stage::source(mount, context.bundle).filter(|source| !source.starts_with(context.root));
        if let (true, Some(source)) = (follows, source) {
            let tree = mount::clone_tree(open(&source)?, stage::depth(mount));
            taken.insert(index, tree.doing("bind", || show(&source))?);
        }
    }
    Ok(taken)
}

/// Makes a bind mount.
pub(super) fn make(rootfs: &Rootfs<'_>, mount: &Mount) -> Result<()> {
    let named = rootfs
        .bundle
        .join(mount.source.as_deref().unwrap_or(Path::new("")));
    let named = named.as_path();
    let index = stage::index(rootfs.config, mount);
    let taken = index.and_then(|index| rootfs.taken.get(&index));
    let found;
    let source = match taken {
        Some(tree) => tree.as_fd(),
        None => {
            let gathered = rootfs
                .stage
                .as_ref()
                .zip(index)
                .and_then(|(stage, index)| stage::bind(stage, index));
            found = match gathered {
                Some(source) => source,
                None => open(named)?,
            };
            found.as_fd()
        }
    };
    let stat = path::stat(source).doing("look at the source of a bind mount", || show(named))?;
    let leaf = if stat.kind == Kind::Directory {
        Leaf::Directory(0o755)
    } else {
        Leaf::File(0o644)
    };
    let is_procfs =
        stat.ino == PROC_ROOT_INODE && path::filesystem_magic(source).is_ok_and(|magic| magic == PROC_MAGIC);
    let covering = if is_procfs {
        Covering::Procfs
    } else {
        Covering::Other
    };
    let target = mounts::target(rootfs, mount, leaf, covering)?;
    let doing = || format!("{} to {}", show(named), show(&mount.destination));
    let cloned;
    let tree = match taken {
        Some(tree) => tree,
        None => {
            cloned = mount::clone_tree(source, stage::depth(mount)).doing("bind", doing)?;
            &cloned
        }
    };
    mounts::replace_flags(tree, mount.options.attrs).doing("set the flags of the bind of", doing)?;
    mount::attach(tree, &target).doing("bind", doing)?;
    mounts::settle(tree, mount)
}

/// The operator's path, and so followed as it stands: the host's tree is still there.
fn open(source: &Path) -> Result<OwnedFd> {
    path::open(source, OFlags::PATH).doing("open the source of a bind mount", || show(source))
}
