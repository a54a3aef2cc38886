//! The overlay mount itself, in the three ways that kernels from 5.14 on offer.
//!
//! 1. Layers by descriptor (`lowerdir+` with FSCONFIG_SET_FD, Linux 6.13): no path, no limit but overlayfs's own.
//! 2. `lowerdir+` by path (Linux 6.7; on older ones the option is taken and refused only when the mount is made).
//! 3. mount(2) in a mount namespace of its own, with names relative to the layers folder: the option text must fit a
//!    page. The finished mount is cloned out of the namespace, which then goes.
//!
//! Which one a kernel has is found out by mounting; what worked is tried first the next time.

use std::ffi::{CString, OsStr};
use std::fmt;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};

use coracle_kernel::mount::{self, Depth, Filesystem, MAX_OPTION_BYTES};
use coracle_kernel::mount_attr::{Attr, Propagation};
use coracle_kernel::namespace::{self, Kinds};
use coracle_kernel::path::{self, OFlags};
use coracle_kernel::{Error as KernelError, fd, mount_old};

use crate::{CONTAINERS, LAYERS, SnapshotError, open_dir, step};

/// The longest option text of mount(2): a page with the final NUL.
const MAX_MOUNT_DATA_BYTES: usize = 4095;

/// Which kernel interface is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MountApi {
    /// The newest that works.
    #[default]
    Auto,
    /// mount(2) alone, as if the kernel had nothing else.
    Legacy,
}

/// A way to build an overlay mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Layers by descriptor.
    Descriptors,
    /// Layers by path, one option each.
    Paths,
    /// One option text for mount(2).
    Legacy,
}

/// What to mount.
pub(crate) struct Request<'a> {
    pub(crate) container_id: &'a str,
    /// The data root.
    pub(crate) root: &'a Path,
    pub(crate) layers_dir: &'a OwnedFd,
    /// `containers/<id>`.
    pub(crate) container: &'a OwnedFd,
    /// Folder numbers, highest layer first; never empty.
    pub(crate) layers: Vec<u64>,
    pub(crate) volatile: bool,
}

/// The ways that are left to try, and the one that worked last.
#[derive(Debug)]
pub(crate) struct Overlay {
    api: MountApi,
    /// 0 is none yet, else the way's position in [`WAYS`] plus one.
    worked: AtomicU8,
}

const WAYS: [Way; 3] = [Way::Descriptors, Way::Paths, Way::Legacy];

impl Overlay {
    pub(crate) fn new(api: MountApi) -> Overlay {
        Overlay {
            api,
            worked: AtomicU8::new(0),
        }
    }

    pub(crate) fn way(&self) -> Option<Way> {
        WAYS.get(usize::from(self.worked.load(Ordering::Relaxed)).checked_sub(1)?)
            .copied()
    }

    /// Mounts in the first way that the kernel takes.
    pub(crate) fn mount(&self, request: &Request<'_>) -> Result<OwnedFd, SnapshotError> {
        let first = match self.api {
            MountApi::Auto => self.way().unwrap_or(Way::Descriptors),
            MountApi::Legacy => Way::Legacy,
        };
        let mut result = mount_in(first, request);
        let mut way = first;
        // A way that the kernel lacks fails as an unsupported call or a bad argument, and so does a bad request: the
        // last way's error is the one that tells.
        while let Err(Failure::Kernel(error)) = &result
            && error.errno().is_unsupported()
            && let Some(next) = WAYS.into_iter().skip_while(|other| *other != way).nth(1)
        {
            way = next;
            result = mount_in(way, request);
        }
        match result {
            Ok(mount) => {
                let position = WAYS.into_iter().position(|other| other == way).unwrap_or(0);
                self.worked
                    .store(u8::try_from(position + 1).unwrap_or(0), Ordering::Relaxed);
                Ok(mount)
            }
            Err(Failure::Kernel(error)) => Err(step("mounting the root", request.container_id)(error)),
            Err(Failure::DoesNotFit(count)) => Err(SnapshotError::TooManyLayers {
                count,
                limit: "this kernel takes their names in one page (Linux 6.7 has no such limit)",
            }),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Descriptors => "layers by descriptor",
            Way::Paths => "layers by path",
            Way::Legacy => "mount(2)",
        })
    }
}

/// Mounts in exactly this way.
pub(crate) fn mount_in(way: Way, request: &Request<'_>) -> Result<OwnedFd, Failure> {
    match way {
        Way::Descriptors => by_descriptors(request).map_err(Failure::Kernel),
        Way::Paths => by_paths(request).map_err(Failure::Kernel),
        Way::Legacy => legacy(request),
    }
}

#[derive(Debug)]
pub(crate) enum Failure {
    Kernel(KernelError),
    /// So many layers do not fit the option text.
    DoesNotFit(usize),
}

fn by_descriptors(request: &Request<'_>) -> Result<OwnedFd, KernelError> {
    let filesystem = Filesystem::open("overlay")?;
    for number in &request.layers {
        let layer = open_dir(request.layers_dir, &number.to_string())?;
        filesystem.fd(
            "lowerdir+",
            path::open_at(layer, "fs", OFlags::PATH | OFlags::DIRECTORY)?,
        )?;
    }
    filesystem.fd(
        "upperdir",
        path::open_at(request.container, "fs", OFlags::PATH | OFlags::DIRECTORY)?,
    )?;
    filesystem.fd(
        "workdir",
        path::open_at(request.container, "work", OFlags::PATH | OFlags::DIRECTORY)?,
    )?;
    finish(filesystem, request)
}

fn by_paths(request: &Request<'_>) -> Result<OwnedFd, KernelError> {
    let filesystem = Filesystem::open("overlay")?;
    // Held until the mount is made: a path may go through /proc/self/fd.
    let mut held = Vec::new();
    for number in &request.layers {
        let path = request.root.join(LAYERS).join(number.to_string()).join("fs");
        add_path(&filesystem, "lowerdir+", &path, &mut held)?;
    }
    let container = request.root.join(CONTAINERS).join(request.container_id);
    add_path(&filesystem, "upperdir", &container.join("fs"), &mut held)?;
    add_path(&filesystem, "workdir", &container.join("work"), &mut held)?;
    finish(filesystem, request)
}

/// Sets an option to a path, by way of a descriptor where it is longer than one option may be.
fn add_path(
    filesystem: &Filesystem,
    key: &str,
    path: &Path,
    held: &mut Vec<OwnedFd>,
) -> Result<(), KernelError> {
    if path.as_os_str().len() <= MAX_OPTION_BYTES {
        return filesystem.string(key, path.as_os_str());
    }
    let place = path::open(path, OFlags::PATH | OFlags::DIRECTORY)?;
    filesystem.string(key, OsStr::from_bytes(fd::proc_path(&place).as_bytes()))?;
    held.push(place);
    Ok(())
}

/// The options that do not depend on layers, and the mount.
fn finish(filesystem: Filesystem, request: &Request<'_>) -> Result<OwnedFd, KernelError> {
    // Distributions differ in the default; an index would refuse an upper directory that is mounted a second time.
    filesystem.string("index", "off")?;
    if request.volatile {
        filesystem.flag("volatile")?;
    }
    filesystem.string("source", "overlay")?;
    filesystem.create()?;
    filesystem.mount(Attr::empty())
}

fn legacy(request: &Request<'_>) -> Result<OwnedFd, Failure> {
    let mut data = b"lowerdir=".to_vec();
    for (position, number) in request.layers.iter().enumerate() {
        if position > 0 {
            data.push(b':');
        }
        data.extend_from_slice(format!("{number}/fs").as_bytes());
    }
    let container = format!("../{CONTAINERS}/{}", request.container_id);
    data.extend_from_slice(format!(",upperdir={container}/fs,workdir={container}/work,index=off").as_bytes());
    if request.volatile {
        data.extend_from_slice(b",volatile");
    }
    if data.len() > MAX_MOUNT_DATA_BYTES {
        return Err(Failure::DoesNotFit(request.layers.len()));
    }
    let data = CString::new(data).unwrap_or_default();
    // A thread of its own: namespace and current directory are changed, and both end with it.
    let made = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("overlay".into());
        match thread.spawn_scoped(scope, || {
            mount_in_own_namespace(request, &data, &PathBuf::from(&container))
        }) {
            Ok(handle) => handle.join().unwrap_or_else(|_| Err(lost_thread())),
            Err(error) => Err(KernelError::from_io("clone", "thread for mount(2)", &error)),
        }
    });
    made.map_err(Failure::Kernel)
}

fn mount_in_own_namespace(
    request: &Request<'_>,
    data: &CString,
    target: &Path,
) -> Result<OwnedFd, KernelError> {
    // Also gives the thread a current directory of its own.
    namespace::unshare(Kinds::MOUNT)?;
    mount_old::set_propagation(Path::new("/"), Propagation::Private, true)?;
    // By path: a descriptor from outside lies on a mount of the other namespace, which overlayfs cannot use here.
    path::change_dir(path::open_dir(request.root.join(LAYERS))?)?;
    // It covers the container's folder, in this namespace alone; overlayfs holds the directories below by itself.
    mount_old::mount_at(c"overlay", target, c"overlay", mount_old::Flags::empty(), data)?;
    let mounted = path::open(target, OFlags::PATH | OFlags::DIRECTORY)?;
    mount::clone_tree(mounted.as_fd(), Depth::Single)
}

fn lost_thread() -> KernelError {
    KernelError::new(
        "mount",
        "overlay: its thread panicked",
        coracle_kernel::Errno::EIO,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Durability, LayerDir, Snapshotter};
    use std::fs;

    /// Overlay mounts need root; a skipped test says so.
    fn is_root() -> bool {
        let root = coracle_kernel::creds::effective_uid() == 0;
        if !root {
            eprintln!("skipped: overlay mounts need root");
        }
        root
    }

    /// The ways that this kernel has: a version is enough to know what has to work.
    fn ways() -> Vec<Way> {
        let version = coracle_kernel::probe::kernel_version().unwrap();
        let has = |way: &Way| match way {
            Way::Descriptors => version >= (6, 13),
            Way::Paths => version >= (6, 7),
            Way::Legacy => true,
        };
        WAYS.into_iter().filter(has).collect()
    }

    /// Layers 1 to `count`; each has a file of its own and changes `top`.
    fn layers(root: &Path, count: u64) -> Vec<LayerDir> {
        (1..=count)
            .map(|number| {
                let fs = root.join(LAYERS).join(number.to_string()).join("fs");
                fs::create_dir_all(&fs).unwrap();
                fs::write(fs.join(format!("file-{number}")), b"").unwrap();
                fs::write(fs.join("top"), number.to_string()).unwrap();
                LayerDir {
                    number,
                    sets_root: false,
                }
            })
            .collect()
    }

    /// Mounts `plan` in exactly one way and returns a path to look through.
    fn mount_one(
        snapshotter: &Snapshotter,
        plan: &crate::Plan,
        way: Way,
    ) -> Result<(OwnedFd, PathBuf), Failure> {
        let container = open_dir(&snapshotter.containers, &plan.container_id).map_err(Failure::Kernel)?;
        crate::clear_volatile_mark(&container).map_err(Failure::Kernel)?;
        let mount = mount_in(way, &snapshotter.request(plan, &container))?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", fd::number(&mount)));
        Ok((mount, path))
    }

    #[test]
    fn each_way_gives_the_same_root() {
        if !is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let layers = layers(root.path(), 3);
        let snapshotter = Snapshotter::open(root.path(), MountApi::Auto).unwrap();
        for way in ways() {
            let plan = snapshotter.prepare("c1", &layers, Durability::Volatile).unwrap();
            let (mount, path) =
                mount_one(&snapshotter, &plan, way).unwrap_or_else(|error| panic!("{way}: {error:?}"));
            assert_eq!(fs::read_to_string(path.join("top")).unwrap(), "3", "{way}");
            assert!(
                (1..=3).all(|number| path.join(format!("file-{number}")).exists()),
                "{way}"
            );
            fs::write(path.join("written"), b"x").unwrap();
            fs::remove_file(path.join("file-1")).unwrap();
            drop(mount);
            let upper = root.path().join("containers/c1/fs");
            assert!(upper.join("written").exists(), "{way}");
            // A second mount of the same layer, after a restart of the daemon, sees what was written.
            let (_mount, path) = mount_one(&snapshotter, &plan, way).unwrap();
            assert!(
                path.join("written").exists() && !path.join("file-1").exists(),
                "{way}"
            );
        }
        assert!(
            !fs::read_to_string("/proc/self/mountinfo")
                .unwrap()
                .contains(&*root.path().to_string_lossy())
        );
    }

    #[test]
    fn many_layers_mount_and_too_many_are_refused() {
        if !is_root() {
            return;
        }
        // A data root whose path is longer than one option may be.
        let top = tempfile::tempdir().unwrap();
        let root = top.path().join("x".repeat(200)).join("y".repeat(200));
        fs::create_dir_all(&root).unwrap();
        let all = layers(&root, 500);
        let snapshotter = Snapshotter::open(&root, MountApi::Auto).unwrap();
        for count in [1, 60, 127, 128, 200, 500] {
            let plan = snapshotter
                .prepare("many", &all[..count], Durability::Volatile)
                .unwrap();
            for way in ways() {
                let (_mount, path) = mount_one(&snapshotter, &plan, way)
                    .unwrap_or_else(|error| panic!("{count}, {way}: {error:?}"));
                assert_eq!(
                    fs::read_to_string(path.join("top")).unwrap(),
                    count.to_string(),
                    "{way}"
                );
                assert!(path.join("file-1").exists(), "{way}");
            }
        }
        let more = layers(&root, 501);
        let error = snapshotter
            .prepare("many", &more, Durability::Volatile)
            .unwrap_err();
        assert!(error.to_string().contains("501 layers"), "{error}");
        // High numbers make long names: 500 of them do not fit the page of mount(2).
        let high: Vec<_> = (0..500)
            .map(|add| LayerDir {
                number: 1_000_000 + add,
                sets_root: false,
            })
            .collect();
        let plan = snapshotter.prepare("many", &high, Durability::Volatile).unwrap();
        assert!(matches!(
            mount_one(&snapshotter, &plan, Way::Legacy),
            Err(Failure::DoesNotFit(500))
        ));
        let legacy = Snapshotter::open(&root, MountApi::Legacy).unwrap();
        let error = legacy.mount(&plan).unwrap_err().to_string();
        assert!(error.contains("500 layers: this kernel takes"), "{error}");
        snapshotter.remove("many").unwrap();
    }

    #[test]
    fn an_image_without_layers_gets_an_empty_root() {
        if !is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        for api in [MountApi::Auto, MountApi::Legacy] {
            let snapshotter = Snapshotter::open(root.path(), api).unwrap();
            let plan = snapshotter.prepare("empty", &[], Durability::Synced).unwrap();
            let mount = snapshotter.mount(&plan).unwrap();
            let path = PathBuf::from(format!("/proc/self/fd/{}", fd::number(&mount)));
            assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
            fs::write(path.join("x"), b"x").unwrap();
            let newest = match api {
                MountApi::Auto => ways()[0],
                MountApi::Legacy => Way::Legacy,
            };
            assert_eq!(snapshotter.way(), Some(newest));
        }
        assert_eq!(
            fs::read_dir(root.path().join("layers/0/fs")).unwrap().count(),
            0,
            "the empty layer stays empty"
        );
    }

    #[test]
    fn an_error_of_the_last_way_is_what_comes_out() {
        if !is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let snapshotter = Snapshotter::open(root.path(), MountApi::Auto).unwrap();
        let missing = [LayerDir {
            number: 7,
            sets_root: false,
        }];
        let plan = snapshotter.prepare("c", &missing, Durability::Volatile).unwrap();
        let error = snapshotter.mount(&plan).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(
            source.contains("No such file") && source.contains('7'),
            "{error}: {source}"
        );
        assert_eq!(snapshotter.way(), None);
    }
}
