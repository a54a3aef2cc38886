//! pivot_root(2).

use std::os::fd::AsFd;

use rustix::mount::UnmountFlags;

use crate::fd::show;
use crate::mount_attr::{self, Propagation};
use crate::{Error, Result};

/// Makes the mount whose root `new_root` is the root of this mount namespace, and lets go of the old one.
///
/// No directory for the old root is needed: both lie at `/` for a moment, the old one on top. Where mounts of the old
/// tree are shared it is made a slave first, so that unmounting it here unmounts nothing anywhere else. The current
/// directory is `/` afterwards.
///
/// `EINVAL` where the old root is an initramfs, or the parent of `new_root` is shared.
pub fn pivot_root(new_root: impl AsFd, old_root: impl AsFd, old_is_shared: bool) -> Result<()> {
    let fail = |call: &'static str, errno: rustix::io::Errno| Error::new(call, show(&new_root), errno.into());
    rustix::process::fchdir(&new_root).map_err(|errno| fail("fchdir", errno))?;
    rustix::process::pivot_root(".", ".").map_err(|errno| fail("pivot_root", errno))?;
    // The current directory is still the new root; the old one is reached by the descriptor taken before.
    rustix::process::fchdir(&old_root).map_err(|errno| fail("fchdir", errno))?;
    if old_is_shared {
        mount_attr::set_propagation(&old_root, Propagation::Slave, true)?;
    }
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(|errno| fail("umount2", errno))?;
    rustix::process::chdir("/").map_err(|errno| fail("chdir", errno))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount_attr::Attr;
    use crate::namespace::{self, Kinds};
    use crate::path::{self, OFlags, Root};

    /// In a thread with a mount namespace of its own, which ends with it.
    #[test]
    fn the_old_root_is_gone_after_a_pivot() {
        std::thread::spawn(|| {
            namespace::unshare(Kinds::MOUNT).unwrap();
            let old_root = path::open_dir("/").unwrap();
            mount_attr::set_propagation(&old_root, Propagation::Private, true).unwrap();
            let new_root = crate::mount::make("tmpfs", &[], Attr::empty()).unwrap();
            crate::mount::attach(&new_root, path::open_dir(std::env::temp_dir()).unwrap()).unwrap();
            path::make_dir(&new_root, "only", 0o755).unwrap();
            pivot_root(&new_root, &old_root, true).unwrap();
            let root = path::open_dir("/").unwrap();
            assert_eq!(path::stat(&root).unwrap(), path::stat(&new_root).unwrap());
            assert_eq!(path::list_dir(&root, 10).unwrap().len(), 1);
            Root::new(&root).open("../../etc", OFlags::PATH).unwrap_err();
        })
        .join()
        .unwrap();
    }
}
