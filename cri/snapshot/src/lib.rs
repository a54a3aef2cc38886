//! Layers to mount plans: overlay root filesystems as detached mounts.
//!
//! On disk, below the data root: `layers/<integer>/fs` are the read-only layers (the image store makes them; number 0
//! is empty and ours), `containers/<id>/{fs,work}` what a container writes. A [`Plan`] names the layers of one
//! container; [`Snapshotter::mount`] turns it into a mount that is attached nowhere and travels as a descriptor.
//!
//! - `overlay`: the three ways to build that mount, tried from the newest kernel interface to the oldest
//! - `tree`: removal and measuring of hostile directory trees

mod overlay;
pub mod tree;

use std::ffi::OsStr;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use coracle_kernel::path::{self, OFlags};
use coracle_kernel::{Errno, Error as KernelError, file};

pub use overlay::{MountApi, Way};
pub use tree::Usage;

/// The most layers that overlayfs stacks.
pub const MAX_LAYERS: usize = 500;
/// The folder of the read-only layers below the data root.
pub const LAYERS: &str = "layers";
/// The folder of the writable layers below the data root.
pub const CONTAINERS: &str = "containers";
/// The longest id of a container.
const MAX_ID_BYTES: usize = 128;
/// Prefix of a container's folder while it is being removed: no id begins with a dot.
const REMOVED: &str = ".removed-";
/// Entries of `containers/` that are looked at in one sweep.
const MAX_CONTAINERS: usize = 1 << 20;

/// A read-only layer: `layers/<number>/fs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerDir {
    /// Its folder.
    pub number: u64,
    /// The layer says what mode and owner `/` has; otherwise the ones below do.
    pub sets_root: bool,
}

/// What a container's root is made of. It stays valid until the container is removed, across restarts of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The container's id.
    pub container_id: String,
    /// Layers, lowest first.
    pub layers: Vec<LayerDir>,
    /// What `fsync` means in the container.
    pub durability: Durability,
}

/// What `fsync` means in a container's writable layer.
///
/// The kubelet never starts a container a second time: after a power cut each gets a new, empty writable layer, so
/// nobody ever reads what an `fsync` would have saved. What it costs otherwise is not small: without `volatile`
/// overlayfs writes back the *whole* disk file system whenever a container's root is unmounted, in the exit path of
/// its last process. Volumes are other mounts and keep their meaning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// `fsync` does nothing (mount option `volatile`); a write error is still reported by it.
    #[default]
    Volatile,
    /// `fsync` reaches the disk.
    Synced,
}

/// Why a root could not be made, mounted or removed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The id cannot name a folder.
    #[error("malformed container id {0:?}")]
    Id(String),
    /// The kernel refused a step.
    #[error("{step} of container {container_id}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// For which container.
        container_id: String,
        /// The call that failed.
        #[source]
        source: KernelError,
    },
    /// The folders could not be made.
    #[error("snapshot folders below {root:?}")]
    Folders {
        /// The data root.
        root: PathBuf,
        /// The call that failed.
        #[source]
        source: KernelError,
    },
    /// More layers than one mount can have.
    #[error("{count} layers: {limit}")]
    TooManyLayers {
        /// How many were asked for.
        count: usize,
        /// What limits them.
        limit: &'static str,
    },
    /// The kernel mounted it, but read-only.
    #[error(
        "root of container {0} came out read-only: its writable layer lies on a read-only or unsuitable file system"
    )]
    ReadOnly(String),
}

/// Makes, mounts and removes the root filesystems of containers.
///
/// All calls are synchronous and may wait for the disk.
#[derive(Debug)]
pub struct Snapshotter {
    root: PathBuf,
    /// `layers/`.
    layers: OwnedFd,
    /// `containers/`.
    containers: OwnedFd,
    overlay: overlay::Overlay,
}

impl Snapshotter {
    /// Opens the folders below the data root, making what is missing (0700: image files may be set-uid).
    pub fn open(root: &Path, api: MountApi) -> Result<Snapshotter, SnapshotError> {
        let folders = |source| SnapshotError::Folders {
            root: root.to_owned(),
            source,
        };
        let top = path::open(root, OFlags::RDONLY | OFlags::DIRECTORY).map_err(folders)?;
        let folder = |dir: &OwnedFd, name: &str, mode| {
            match path::make_dir(dir, name, mode) {
                Err(error) if error.errno() == Errno::EEXIST => {}
                other => other?,
            }
            open_dir(dir, name)
        };
        let layers = folder(&top, LAYERS, 0o700).map_err(folders)?;
        let containers = folder(&top, CONTAINERS, 0o700).map_err(folders)?;
        // Overlayfs wants at least one lower layer; an image without any gets this empty one.
        let empty = folder(&layers, "0", 0o700).map_err(folders)?;
        folder(&empty, "fs", 0o755).map_err(folders)?;
        Ok(Snapshotter {
            root: root.to_owned(),
            layers,
            containers,
            overlay: overlay::Overlay::new(api),
        })
    }

    /// Makes the writable layer of a container; one that was left by an earlier attempt is removed first.
    pub fn prepare(
        &self,
        container_id: &str,
        layers: &[LayerDir],
        durability: Durability,
    ) -> Result<Plan, SnapshotError> {
        let name = checked(container_id)?;
        if layers.len() > MAX_LAYERS {
            return Err(SnapshotError::TooManyLayers {
                count: layers.len(),
                limit: "overlayfs stacks 500",
            });
        }
        let plan = Plan {
            container_id: container_id.to_owned(),
            layers: layers.to_vec(),
            durability,
        };
        self.remove(container_id)?;
        let make = || {
            path::make_dir(&self.containers, name, 0o700)?;
            let dir = open_dir(&self.containers, name)?;
            path::make_dir(&dir, "work", 0o700)?;
            path::make_dir(&dir, "fs", 0o755)?;
            // The root's own mode and owner are those of the upper directory, so they are copied from the image.
            let fs = open_dir(&dir, "fs")?;
            let (mode, uid, gid) = match plan.layers.iter().rev().find(|layer| layer.sets_root) {
                Some(layer) => {
                    let stat = path::stat(self.open_layer(*layer)?)?;
                    (stat.mode, stat.uid, stat.gid)
                }
                None => (0o755, 0, 0),
            };
            path::chown(&fs, uid, gid)?;
            path::chmod(&fs, mode)
        };
        make().map_err(step("preparing the root", container_id))?;
        Ok(plan)
    }

    /// Mounts a prepared root; the mount lives as long as its descriptor, or the places it is attached to.
    pub fn mount(&self, plan: &Plan) -> Result<OwnedFd, SnapshotError> {
        let name = checked(&plan.container_id)?;
        let fail = step("mounting the root", &plan.container_id);
        let container = open_dir(&self.containers, name).map_err(&fail)?;
        if plan.durability == Durability::Volatile {
            // Left by an earlier mount of the same layer; overlayfs refuses while it is there, so that nobody takes a
            // volatile layer for a durable one after a crash. Nobody does: see `Durability`.
            clear_volatile_mark(&container).map_err(&fail)?;
        }
        let mount = self.overlay.mount(&self.request(plan, &container))?;
        if file::space(&mount).map_err(&fail)?.read_only {
            return Err(SnapshotError::ReadOnly(plan.container_id.clone()));
        }
        Ok(mount)
    }

    /// Removes a container's writable layer; what is not there is removed already.
    ///
    /// A mount that still uses it keeps its own hold on the files; their space is free when it ends.
    pub fn remove(&self, container_id: &str) -> Result<(), SnapshotError> {
        let name = checked(container_id)?;
        let remove = || {
            // The id is free at once, and what a crash leaves half-removed is recognised.
            let removed = format!("{REMOVED}{container_id}");
            tree::remove(&self.containers, OsStr::new(&removed))?;
            match path::rename(&self.containers, name, &self.containers, &removed) {
                Err(error) if error.errno() == Errno::ENOENT => return Ok(()),
                // No space for the longer name: removed in place.
                Err(error) if error.errno() == Errno::ENOSPC => {
                    return tree::remove(&self.containers, OsStr::new(name));
                }
                other => other?,
            }
            tree::remove(&self.containers, OsStr::new(&removed))
        };
        remove().map_err(step("removing the root", container_id))
    }

    /// Removes every writable layer that `keep` does not want, and half-removed ones; returns how many.
    pub fn sweep(&self, keep: impl Fn(&str) -> bool) -> Result<usize, SnapshotError> {
        let fail = step("sweeping the roots", "*");
        let entries = path::list_dir(&self.containers, MAX_CONTAINERS).map_err(&fail)?;
        let mut swept = 0;
        for (name, _) in entries {
            if name.to_str().is_some_and(|id| checked(id).is_ok() && keep(id)) {
                continue;
            }
            tree::remove(&self.containers, &name).map_err(&fail)?;
            swept += 1;
        }
        Ok(swept)
    }

    /// What a container's writable layer takes on the disk: walks it, so never within an RPC.
    pub fn usage(&self, container_id: &str) -> Result<Usage, SnapshotError> {
        let name = checked(container_id)?;
        let measure = || tree::usage(open_dir(&open_dir(&self.containers, name)?, "fs")?);
        measure().map_err(step("measuring the root", container_id))
    }

    /// The way that the last mount was made; `None` before the first.
    #[must_use]
    pub fn way(&self) -> Option<Way> {
        self.overlay.way()
    }

    fn open_layer(&self, layer: LayerDir) -> Result<OwnedFd, KernelError> {
        let dir = open_dir(&self.layers, &layer.number.to_string())?;
        open_dir(&dir, "fs")
    }

    fn request<'a>(&'a self, plan: &'a Plan, container: &'a OwnedFd) -> overlay::Request<'a> {
        overlay::Request {
            container_id: &plan.container_id,
            root: &self.root,
            layers_dir: &self.layers,
            container,
            // Overlayfs wants the highest first.
            layers: match plan.layers.as_slice() {
                [] => vec![0],
                layers => layers.iter().rev().map(|layer| layer.number).collect(),
            },
            volatile: plan.durability == Durability::Volatile,
        }
    }
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Durability::Volatile => "volatile",
            Durability::Synced => "synced",
        })
    }
}

fn open_dir(dir: &OwnedFd, name: &str) -> Result<OwnedFd, KernelError> {
    path::open_at(dir, name, OFlags::RDONLY | OFlags::DIRECTORY)
}

/// Removes `work/work/incompat/volatile`.
fn clear_volatile_mark(container: &OwnedFd) -> Result<(), KernelError> {
    let mark = file::open_dir_beneath(container, OsStr::new("work/work/incompat"));
    match mark {
        Err(error) if error.errno() == Errno::ENOENT => Ok(()),
        Err(error) => Err(error),
        Ok(dir) => tree::remove(dir, OsStr::new("volatile")),
    }
}

/// An id that names one folder and cannot be mistaken for anything of ours.
fn checked(id: &str) -> Result<&str, SnapshotError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if id.is_empty() || id.len() > MAX_ID_BYTES || id.starts_with('.') || !id.bytes().all(plain) {
        return Err(SnapshotError::Id(id.to_owned()));
    }
    Ok(id)
}

fn step(step: &'static str, container_id: &str) -> impl Fn(KernelError) -> SnapshotError {
    let container_id = container_id.to_owned();
    move |source| SnapshotError::Step {
        step,
        container_id: container_id.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    #[test]
    fn the_root_of_a_container_is_that_of_its_image() {
        let root = tempfile::tempdir().unwrap();
        let snapshotter = Snapshotter::open(root.path(), MountApi::Auto).unwrap();
        let mut layers = Vec::new();
        for (number, mode, sets_root) in [(1, 0o711, true), (2, 0o1777, true), (3, 0o700, false)] {
            let fs = root.path().join("layers").join(number.to_string()).join("fs");
            fs::create_dir_all(&fs).unwrap();
            fs::set_permissions(&fs, fs::Permissions::from_mode(mode)).unwrap();
            layers.push(LayerDir { number, sets_root });
        }
        snapshotter.prepare("c", &layers, Durability::Volatile).unwrap();
        let mode = |path: &str| fs::metadata(root.path().join(path)).unwrap().mode() & 0o7777;
        assert_eq!(mode("containers/c/fs"), 0o1777);
        assert_eq!(
            [mode("layers"), mode("containers"), mode("containers/c")],
            [0o700; 3]
        );
        snapshotter.prepare("c", &[], Durability::Volatile).unwrap();
        assert_eq!(mode("containers/c/fs"), 0o755);
    }

    #[test]
    fn removal_is_idempotent_and_a_sweep_finishes_it() {
        let root = tempfile::tempdir().unwrap();
        let snapshotter = Snapshotter::open(root.path(), MountApi::Auto).unwrap();
        for id in ["a", "b"] {
            snapshotter.prepare(id, &[], Durability::Volatile).unwrap();
            fs::create_dir_all(root.path().join("containers").join(id).join("fs/x/y")).unwrap();
        }
        assert_eq!(snapshotter.usage("a").unwrap().inodes, 3);
        snapshotter.remove("a").unwrap();
        snapshotter.remove("a").unwrap();
        fs::create_dir_all(root.path().join("containers/.removed-z/fs")).unwrap();
        fs::create_dir_all(root.path().join("containers/c/fs")).unwrap();
        assert_eq!(snapshotter.sweep(|id| id == "b").unwrap(), 2);
        let left: Vec<_> = fs::read_dir(root.path().join("containers"))
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["b"]);
    }

    #[test]
    fn an_id_names_one_folder() {
        let root = tempfile::tempdir().unwrap();
        let snapshotter = Snapshotter::open(root.path(), MountApi::Auto).unwrap();
        for id in [
            "",
            ".",
            "..",
            ".removed-x",
            "a/b",
            "a:b",
            "a,b",
            "a\0",
            &"x".repeat(129),
        ] {
            assert!(
                matches!(snapshotter.remove(id), Err(SnapshotError::Id(_))),
                "{id:?} was taken"
            );
        }
    }
}
