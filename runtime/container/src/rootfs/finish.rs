//! Entering the root, and what is done last.

use coracle_kernel::Errno;
use coracle_kernel::mount;
use coracle_kernel::mount_attr::{self, Attr, Propagation};
use coracle_kernel::mount_old;
use coracle_kernel::mountinfo;
use coracle_kernel::path::{self, OFlags};
use coracle_kernel::pivot::pivot_root;
use coracle_kernel::procfs::Procfs;
use coracle_spec::PropagationKind;

use super::error::{Doing, Result};
use super::{Entry, Rootfs, convert, mask, show};

/// Makes the root this process's `/`.
pub(super) fn enter(rootfs: &Rootfs<'_>) -> Result<()> {
    let wanted = rootfs.config.rootfs_propagation;
    match rootfs.entry {
        Entry::Pivot => pivot_root(&rootfs.root, &rootfs.old_root, !rootfs.is_cut_off)
            .doing("make the root", || "the container's own".into())?,
        Entry::Move => {
            hide_host_filesystems(rootfs)?;
            path::change_dir(&rootfs.root)
                .and_then(|()| mount_old::move_here_to_root())
                .and_then(|()| path::change_root(&rootfs.root))
                .doing("move the root to", || "/".into())?;
        }
    }
    // The other kinds hold already: the mount was made under them.
    match wanted {
        Some(wanted) if matches!(wanted.kind, PropagationKind::Shared | PropagationKind::Unbindable) => {
            mount_attr::set_propagation(&rootfs.root, convert(wanted.kind), wanted.recursive)
                .doing("set the propagation of", || "the root".into())
        }
        _ => Ok(()),
    }
}

/// Makes read-only what shall be, masks what shall be hidden, and last of all closes the root.
pub(super) fn seal(rootfs: &Rootfs<'_>) -> Result<()> {
    for mount in &rootfs.read_only_later {
        mount_attr::add(mount, Attr::RDONLY)
            .doing("make a mount read-only:", || coracle_kernel::fd::show(mount))?;
    }
    // Before masking: a path that is both must stay hidden.
    mask::make_read_only(rootfs)?;
    mask::hide(rootfs)?;
    if rootfs.config.root_readonly {
        mount_attr::add(&rootfs.root, Attr::RDONLY).doing("make read-only", || "the root".into())?;
    }
    Ok(())
}

/// Takes every whole procfs and sysfs of the host away before the root is moved over them.
///
/// After MS_MOVE the old tree still exists below the new one, and a container that can open a mount namespace's file or
/// unmount its root would find an unmasked `/proc` there.
fn hide_host_filesystems(rootfs: &Rootfs<'_>) -> Result<()> {
    let proc = Procfs::visible().doing("open", || "/proc".into())?;
    let mounts = mountinfo::read_own(&proc).doing("read", || "the mounts of the host".into())?;
    drop(proc);
    let own = path::mount_place(&rootfs.root)
        .doing("look at", || "the root".into())?
        .mount_id;
    let own = mounts
        .iter()
        .find(|mount| mount.id == own)
        .map(|mount| mount.mount_point.clone());
    let whole = |mount: &&mountinfo::Mount| {
        matches!(mount.kind.as_str(), "proc" | "sysfs")
            && mount.root == std::path::Path::new("/")
            && own.as_ref().is_none_or(|own| !mount.mount_point.starts_with(own))
    };
    // The last mounted first: it may lie on top of another.
    for mount in mounts.iter().filter(whole).rev() {
        let point = &mount.mount_point;
        let Ok(top) = path::open(point, OFlags::PATH | OFlags::NOFOLLOW) else {
            continue;
        };
        let detached = mount_attr::set_propagation(&top, Propagation::Private, false)
            .and_then(|()| mount::detach(point));
        match detached {
            Err(error) if matches!(error.errno(), Errno::EINVAL | Errno::EPERM) => {
                // Locked by the user namespace that made it: it cannot be taken away, but covered.
                mount::make("tmpfs", &[], Attr::RDONLY)
                    .and_then(|cover| mount::attach(cover, &top))
                    .doing("cover", || show(point))?;
            }
            other => other.doing("unmount", || show(point))?,
        }
    }
    Ok(())
}
