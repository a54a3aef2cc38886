//! What this host has: the unified hierarchy, v1 hierarchies, or none.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::sync::{Arc, OnceLock};

use coracle_kernel::Errno;
use coracle_kernel::path as kernel_path;

use crate::dir::Dir;
use crate::location::{Location, clean};
use crate::{Error, Manager, Options, Result, none, v2};

/// Where every distribution mounts cgroups.
const MOUNT: &str = "/sys/fs/cgroup";

/// `CGROUP2_SUPER_MAGIC`.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// What one read of such a file of /proc brings on most hosts.
const PROC_FILE_BYTES: usize = 8 << 10;

/// Which hierarchies hold the limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// cgroup v2 alone.
    Unified,
    /// Controllers on v1 mounts; a cgroup2 mount beside them (hybrid) is not used.
    V1,
    /// No cgroup file system is mounted.
    None,
}

/// The host's hierarchies, detected once and then shared.
#[derive(Clone, Debug)]
pub struct Host {
    tree: Tree,
    own: Arc<OnceLock<OwnGroups>>,
}

#[derive(Clone, Debug)]
pub(crate) enum Tree {
    Unified(Arc<Dir>),
    V1(Arc<Vec<Hierarchy>>),
    None,
}

/// One mounted v1 hierarchy.
#[derive(Debug)]
pub(crate) struct Hierarchy {
    /// `cpu` and `cpuacct` where they are mounted together; `name=systemd` for a named one.
    pub(crate) controllers: Vec<String>,
    /// Its root, or what of it is mounted here.
    pub(crate) root: Dir,
    /// What of the hierarchy is mounted: `/`, or a group where a container was given its own alone.
    pub(crate) mounted: String,
}

/// The caller's own groups, as `/proc/self/cgroup` tells: controller to path; the unified one under "".
type OwnGroups = BTreeMap<String, String>;

impl Host {
    /// Looks at `/sys/fs/cgroup`: one open and one fstatfs on a unified host.
    pub fn detect() -> Result<Host> {
        let root = match kernel_path::open_dir(MOUNT) {
            Ok(root) => root,
            Err(error) if error.errno() == Errno::ENOENT => return Ok(Host::of(Tree::None)),
            Err(source) => {
                return Err(Error::Step {
                    step: "open",
                    path: MOUNT.to_owned(),
                    source,
                });
            }
        };
        let magic = kernel_path::filesystem_magic(&root).map_err(|source| Error::Step {
            step: "look at",
            path: MOUNT.to_owned(),
            source,
        })?;
        if magic == CGROUP2_MAGIC {
            return Ok(Host::of(Tree::Unified(Arc::new(Dir::new(root, String::new())))));
        }
        let hierarchies = v1_hierarchies(&proc_file("/proc/self/mountinfo")?)?;
        Ok(Host::of(if hierarchies.is_empty() {
            Tree::None
        } else {
            Tree::V1(Arc::new(hierarchies))
        }))
    }

    /// A unified hierarchy at a place of its own: a directory of fixtures, or the cgroup2 mount of a hybrid host.
    #[cfg(test)]
    pub(crate) fn unified_at(path: &std::path::Path) -> Host {
        let root = kernel_path::open_dir(path).expect("the directory is there");
        Host::of(Tree::Unified(Arc::new(Dir::new(root, String::new()))))
    }

    fn of(tree: Tree) -> Host {
        Host {
            tree,
            own: Arc::default(),
        }
    }

    /// Which hierarchies hold the limits.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match &self.tree {
            Tree::Unified(_) => Kind::Unified,
            Tree::V1(_) => Kind::V1,
            Tree::None => Kind::None,
        }
    }

    /// Controllers that can hold limits here.
    pub fn controllers(&self) -> Result<Vec<String>> {
        match &self.tree {
            Tree::Unified(root) => Ok(root
                .read("cgroup.controllers")?
                .split_whitespace()
                .map(str::to_owned)
                .collect()),
            Tree::V1(hierarchies) => {
                let names = hierarchies.iter().flat_map(|hierarchy| &hierarchy.controllers);
                Ok(names.filter(|name| !name.starts_with("name=")).cloned().collect())
            }
            Tree::None => Ok(Vec::new()),
        }
    }

    /// Resolves a `cgroupsPath` of a container called `id`.
    ///
    /// An absolute one lies below the hierarchy's root. A relative one, and the id where none was given, lies beside
    /// the caller's own group on v2 (which holds processes and so can have no child with limits) and below it on v1.
    pub fn locate(&self, cgroups_path: Option<&str>, id: &str) -> Result<Location> {
        let path = match cgroups_path {
            None | Some("") => id,
            Some(path) if path.starts_with('/') => return Location::absolute(path),
            Some(path) => path,
        };
        let path = clean(path)?;
        let below = |own: &str| {
            if own.is_empty() {
                path.clone()
            } else {
                format!("{own}/{path}")
            }
        };
        match &self.tree {
            Tree::Unified(_) => {
                let own = self.own("")?.unwrap_or_default();
                Location::absolute(&below(own.rsplit_once('/').map_or("", |(parent, _)| parent)))
            }
            Tree::V1(hierarchies) => {
                let mut location = Location::absolute(&path)?;
                for hierarchy in hierarchies.iter() {
                    let own = self.own_in(hierarchy)?;
                    if !own.is_empty() {
                        location
                            .differing
                            .insert(hierarchy.name().to_owned(), clean(&below(&own))?);
                    }
                }
                Ok(location)
            }
            Tree::None => Location::absolute(&path),
        }
    }

    /// The manager of the group at `location`, which need not be there yet.
    pub fn manager(&self, location: &Location, options: Options) -> Result<Box<dyn Manager>> {
        Ok(match &self.tree {
            Tree::Unified(root) => Box::new(v2::Group::new(Arc::clone(root), location.clone(), options)?),
            #[cfg(feature = "cgroup-v1")]
            Tree::V1(_) => Box::new(crate::v1::Group::new(self.clone(), location.clone(), options)?),
            #[cfg(not(feature = "cgroup-v1"))]
            Tree::V1(_) => return Err(Error::NoV1),
            Tree::None => Box::new(none::NoGroup::new(
                location.clone(),
                options,
                "no cgroup file system is mounted",
            )),
        })
    }

    /// Removes the directory at `path` from every hierarchy in which nothing is in it.
    pub(crate) fn remove_if_empty(&self, path: &str) {
        // What refuses to go is in use.
        match &self.tree {
            Tree::Unified(root) => drop(root.remove(path)),
            Tree::V1(hierarchies) => hierarchies
                .iter()
                .for_each(|hierarchy| drop(hierarchy.root.remove(path))),
            Tree::None => {}
        }
    }

    #[cfg(feature = "cgroup-v1")]
    pub(crate) fn v1(&self) -> &[Hierarchy] {
        match &self.tree {
            Tree::V1(hierarchies) => hierarchies,
            _ => &[],
        }
    }

    /// The caller's own group in `hierarchy`, below what is mounted of it; empty for its root.
    pub(crate) fn own_in(&self, hierarchy: &Hierarchy) -> Result<String> {
        let own = self.own(hierarchy.name())?.unwrap_or_default();
        let mounted = hierarchy.mounted.trim_start_matches('/');
        // Not below what is mounted: the mount's root is the nearest there is.
        let below = if mounted.is_empty() {
            Some(own.as_str())
        } else {
            own.strip_prefix(mounted)
        };
        Ok(below.unwrap_or("").trim_start_matches('/').to_owned())
    }

    /// The caller's own group in the hierarchy of `controller`, without leading `/`.
    fn own(&self, controller: &str) -> Result<Option<String>> {
        if self.own.get().is_none() {
            let groups = own_groups(&proc_file("/proc/self/cgroup")?);
            // Another thread may have been faster, with the same answer.
            let _ = self.own.set(groups);
        }
        let own = self.own.get().and_then(|groups| groups.get(controller));
        // Seen from another cgroup namespace the path climbs ("/../.."), and there is no such place here.
        Ok(own
            .filter(|path| !path.split('/').any(|part| part == ".."))
            .cloned())
    }
}

impl Hierarchy {
    /// The name it goes by: its first controller.
    pub(crate) fn name(&self) -> &str {
        self.controllers.first().map_or("", String::as_str)
    }

    /// Whether `controller` is on it.
    #[cfg(feature = "cgroup-v1")]
    pub(crate) fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }
}

fn proc_file(path: &'static str) -> Result<String> {
    // The kernel tells no size: without room to begin with it would be read by very small pieces.
    let mut text = String::with_capacity(PROC_FILE_BYTES);
    let read = std::fs::File::open(path).and_then(|mut file| file.read_to_string(&mut text));
    read.map(|_| text).map_err(|error| Error::Step {
        step: "find the hierarchies of",
        path: path.to_owned(),
        source: coracle_kernel::Error::from_io("read", path, &error),
    })
}

/// Mounted v1 hierarchies; of one mounted twice the first.
fn v1_hierarchies(mountinfo: &str) -> Result<Vec<Hierarchy>> {
    let mut hierarchies: Vec<Hierarchy> = Vec::new();
    for (controllers, mounted, mount_point) in v1_mounts(mountinfo) {
        if hierarchies.iter().any(|known| known.controllers == controllers) {
            continue;
        }
        match kernel_path::open_dir(&mount_point) {
            Ok(fd) => {
                let root = Dir::new(fd, String::new());
                hierarchies.push(Hierarchy {
                    controllers,
                    root,
                    mounted,
                });
            }
            // Mounted over, or out of this user's reach.
            Err(error) if matches!(error.errno(), Errno::ENOENT | Errno::EACCES) => {}
            Err(source) => {
                return Err(Error::Step {
                    step: "open",
                    path: mount_point,
                    source,
                });
            }
        }
    }
    // Who enters them in this order is throttled by a container that has used up its time only when all is done.
    hierarchies.sort_by_key(|hierarchy| hierarchy.has("cpu"));
    Ok(hierarchies)
}

/// Controllers, mounted part and mount point of each v1 mount.
fn v1_mounts(mountinfo: &str) -> impl Iterator<Item = (Vec<String>, String, String)> + '_ {
    mountinfo.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - cgroup ")?;
        let mut fields = before.split(' ').skip(3);
        let (mounted, mount_point) = (fields.next()?, fields.next()?);
        let options = after.rsplit(' ').next()?;
        // Flags of the super block stand before the controllers' names.
        let controllers: Vec<String> = options
            .split(',')
            .filter(|word| {
                !matches!(
                    *word,
                    "rw" | "ro" | "xattr" | "noprefix" | "clone_children" | "none"
                )
            })
            .filter(|word| !word.contains('=') || word.starts_with("name="))
            .map(str::to_owned)
            .collect();
        (!controllers.is_empty()).then(|| (controllers, mounted.to_owned(), mount_point.to_owned()))
    })
}

fn own_groups(text: &str) -> OwnGroups {
    let mut groups = OwnGroups::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        if let (Some(controllers), Some(path)) = (fields.next(), fields.next()) {
            for controller in controllers.split(',') {
                groups.insert(controller.to_owned(), path.trim_start_matches('/').to_owned());
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v1_mounts_are_read_from_mountinfo() {
        let text = "\
24 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
25 24 0:23 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
26 24 0:24 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory
27 24 0:25 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
28 24 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
        let mounts: Vec<_> = v1_mounts(text).collect();
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0].0, ["cpu", "cpuacct"]);
        assert_eq!(
            (mounts[1].1.as_str(), mounts[1].2.as_str()),
            ("/docker/abc", "/sys/fs/cgroup/memory")
        );
        assert_eq!(mounts[2].0, ["name=systemd"]);
    }

    #[test]
    fn own_groups_are_read_by_controller() {
        let groups = own_groups("9:name=systemd:/\n4:cpu,cpuacct:/a:b\n0::/user.slice/x\n");
        assert_eq!(groups["cpuacct"], "a:b");
        assert_eq!(groups["name=systemd"], "");
        assert_eq!(groups[""], "user.slice/x");
    }

    #[test]
    fn this_host_is_detected_and_places_a_container() {
        let host = Host::detect().unwrap();
        if host.kind() == Kind::None {
            return;
        }
        assert_eq!(host.locate(Some("/a//b"), "x").unwrap().path(), "/a/b");
        host.locate(Some("../b"), "x").unwrap_err();
        let relative = host.locate(None, "x").unwrap();
        assert!(
            relative.to_map().values().all(|path| path.ends_with("/x")),
            "{relative:?}"
        );
    }
}
