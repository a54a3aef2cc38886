//! What a container with a user namespace is given, gathered where its root cannot take the flags off.
//!
//! Flags that are set inside the user namespace its root may clear again. But when a mount namespace is copied for a
//! less privileged user namespace, the kernel locks the flags that its mounts have. So the process between, which still
//! has the host's identity, puts clones of all that is to be given, with their flags, into a mount namespace of its own;
//! the container's is a copy of that one, and the init takes its binds from there. It also opens what the mapped root
//! could not reach by path.
//!
//! They lie on a tmpfs at the place of the root, which the root itself then covers. The way in is the working directory,
//! which the clone carries over into its copy.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_kernel::mount::{self, Depth};
use coracle_kernel::mount_attr::{self, Attr, Change, Propagation};
use coracle_kernel::namespace::{self, Kinds};
use coracle_kernel::path::{self, Kind, OFlags};
use coracle_spec::{Bind, Config, Mount};

use super::error::{Doing, Result};
use super::{Context, Source, attach_lent, open_place, show};

/// The name of the root; the others are numbers.
const ROOT: &str = "root";

/// Puts everything that the container is given into a new mount namespace of ours, and stands there.
pub(crate) fn gather(config: &Config, context: &mut Context<'_>) -> Result<()> {
    namespace::unshare(Kinds::MOUNT).doing("make a mount namespace for", || "the sources of binds".into())?;
    let host = path::open_dir("/").doing("open the root of the host", || "/".into())?;
    mount_attr::set_propagation(&host, Propagation::Slave, true)
        .doing("set the propagation of", || "/".into())?;
    attach_lent(&std::mem::take(&mut context.lent), true)?;
    let place = open_place(context.root, "open the root")?;
    let root = match std::mem::replace(&mut context.source, Source::Staged) {
        Source::Detached(mount) => mount,
        Source::Path | Source::Staged => {
            mount::clone_tree(&place, Depth::Recursive).doing("bind the root", || show(context.root))?
        }
    };
    let flags = Attr::NOSUID | Attr::NODEV | Attr::NOEXEC;
    let stage =
        mount::make("tmpfs", &[("mode", c"755")], flags).doing("make a tmpfs for", || "sources".into())?;
    mount::attach(&stage, &place).doing("attach a tmpfs for", || "sources".into())?;
    put(&stage, ROOT, &root)?;
    for (index, mount) in config.mounts.iter().enumerate() {
        if let Some(source) = source(mount, context.bundle).filter(|source| !source.starts_with(context.root))
        {
            let doing = || show(&source);
            let place = path::open(&source, OFlags::PATH).doing("open the source of a bind mount", doing)?;
            let tree = mount::clone_tree(&place, depth(mount)).doing("bind", doing)?;
            let options = &mount.options;
            set(&tree, options.attrs.set, false).doing("set the flags of the bind of", doing)?;
            set(&tree, options.recursive_attrs.set, true).doing("set the flags of the bind of", doing)?;
            put(&stage, &index.to_string(), &tree)?;
        }
    }
    path::change_dir(&stage).doing("go to", || "the sources of binds".into())
}

/// The place where the clone of a process that has gathered them stands.
pub(super) fn open() -> Result<OwnedFd> {
    path::open_dir(".").doing("open", || "the sources of binds".into())
}

/// The root.
pub(super) fn root(stage: &OwnedFd) -> Result<OwnedFd> {
    let place =
        path::open_at(stage, ROOT, OFlags::PATH).doing("open the root in", || "the sources".into())?;
    mount::clone_tree(&place, Depth::Recursive).doing("bind", || "the root".into())
}

/// The source of a bind; none where it was left to be found by path.
pub(super) fn bind(stage: &OwnedFd, index: usize) -> Option<OwnedFd> {
    path::open_at(stage, index.to_string(), OFlags::PATH).ok()
}

/// Which of the configuration's mounts it is.
pub(super) fn index(config: &Config, mount: &Mount) -> Option<usize> {
    config.mounts.iter().position(|one| std::ptr::eq(one, mount))
}

/// The absolute source of a bind mount.
pub(super) fn source(mount: &Mount, bundle: &Path) -> Option<PathBuf> {
    if mount.options.bind == Bind::No || mount.options.remount {
        return None;
    }
    Some(bundle.join(mount.source.as_deref().unwrap_or(Path::new(""))))
}

pub(super) fn depth(mount: &Mount) -> Depth {
    match mount.options.bind {
        Bind::Recursive => Depth::Recursive,
        _ => Depth::Single,
    }
}

/// Adds flags. Clearing is for the init, who may clear only what the host does not insist on.
fn set(tree: &OwnedFd, flags: u64, recursive: bool) -> coracle_kernel::Result<()> {
    if flags == 0 {
        return Ok(());
    }
    let set = Attr::from_bits_retain(flags);
    // The kernel wants one way of keeping access times to go where another comes.
    let clear = if set.intersects(Attr::ATIME) {
        Attr::ATIME
    } else {
        Attr::empty()
    };
    mount_attr::set(
        tree,
        &Change {
            set,
            clear,
            recursive,
            ..Change::default()
        },
    )
}

/// Attaches a mount under a name.
fn put(stage: &OwnedFd, name: &str, mount: impl AsFd) -> Result<()> {
    let doing = || name.to_owned();
    let seen = path::stat(&mount).doing("look at source", doing)?;
    match seen.kind {
        Kind::Directory => path::make_dir(stage, name, 0o755),
        _ => path::create_file_at(stage, name, 0o644).map(drop),
    }
    .doing("make a place for source", doing)?;
    let place = path::open_at(stage, name, OFlags::PATH).doing("open the place of source", doing)?;
    mount::attach(&mount, &place).doing("attach source", doing)
}
