//! The container's view of its cgroups.
//!
//! With a cgroup namespace of its own a fresh mount shows the container's part alone. Without one the host's mount is
//! cloned and never mounted afresh: in the host's cgroup namespace that would reset options of the host's own mount.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use coracle_kernel::Errno;
use coracle_kernel::mount::{self, Depth, Filesystem};
use coracle_kernel::mount_attr::Attr;
use coracle_kernel::mountinfo;
use coracle_kernel::path::{self, Leaf, OFlags, Root};
use coracle_kernel::procfs::Procfs;
use coracle_spec::{Mount, NamespaceKind};

use super::error::{Doing, Error, Result};
use super::mounts::{self, Covering, fresh_flags};
use super::{Rootfs, show};

/// Where the host has its hierarchies.
const HOST: &str = "/sys/fs/cgroup";
/// `CGROUP2_SUPER_MAGIC`.
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// The longest `/proc/self/cgroup` that is read: a dozen hierarchies with paths of full length.
const MAX_OWN_BYTES: usize = 64 * 1024;

/// One hierarchy of a v1 or hybrid host.
struct Hierarchy {
    /// Directory name below the mount: `cpu,cpuacct`.
    name: String,
    /// Where the host has it.
    mount_point: PathBuf,
    /// The directory of it that is mounted there: not `/` where we are in a container ourselves.
    mounted: PathBuf,
    /// Its controllers, or `name=systemd`; empty for the unified one.
    options: Vec<String>,
}

/// Mounts the cgroup hierarchy, or on older hosts a directory with one mount a hierarchy.
pub(super) fn make(rootfs: &mut Rootfs<'_>, mount: &Mount) -> Result<()> {
    let target = mounts::target(rootfs, mount, Leaf::Directory(0o755), Covering::Other)?;
    let host = path::open_dir(HOST).doing("open the host's cgroups", || HOST.into())?;
    let magic = path::filesystem_magic(&host).doing("look at the host's cgroups", || HOST.into())?;
    let own_namespace = rootfs.config.namespaces.contains(NamespaceKind::Cgroup);
    if magic == CGROUP2_MAGIC {
        let view = unified(mount, &host, own_namespace)?;
        mount::attach(&view, &target).doing("mount", || shown(mount))?;
        return mounts::settle(&view, mount);
    }
    let top = holder(mount)?;
    mount::attach(&top, &target).doing("mount", || shown(mount))?;
    fill(mount, &top, own_namespace)?;
    mounts::settle(&top, mount)?;
    if fresh_flags(&mount.options).contains(Attr::RDONLY) {
        rootfs.read_only_later.push(top);
    }
    Ok(())
}

/// cgroup v2: a detached mount of what the container may see.
fn unified(mount: &Mount, host: &OwnedFd, own_namespace: bool) -> Result<OwnedFd> {
    let flags = fresh_flags(&mount.options);
    let fresh = if own_namespace {
        Some(mount::make("cgroup2", &[], flags))
    } else {
        None
    };
    match fresh {
        Some(Err(error)) if matches!(error.errno(), Errno::EPERM | Errno::EBUSY) => {}
        Some(other) => return other.doing("mount", || shown(mount)),
        None => return clone_with(host, flags).doing("bind the host's cgroups for", || shown(mount)),
    }
    // The namespace is not ours to mount in: our own directory is as much as we may show.
    let own = own_cgroups()?;
    let own = own.get("").map_or(Path::new(""), PathBuf::as_path);
    let directory = Root::new(host).open(own, OFlags::PATH | OFlags::DIRECTORY);
    directory
        .and_then(|directory| clone_with(&directory, flags))
        .doing("bind the own cgroup for", || shown(mount))
}

/// The tmpfs that holds one directory a hierarchy.
fn holder(mount: &Mount) -> Result<OwnedFd> {
    let flags =
        fresh_flags(&mount.options).difference(Attr::RDONLY) | Attr::NOSUID | Attr::NODEV | Attr::NOEXEC;
    mount::make("tmpfs", &[("mode", c"755")], flags).doing("mount", || shown(mount))
}

/// Mounts each hierarchy of the host below `top`, and links the names of those that are mounted together.
fn fill(mount: &Mount, top: &OwnedFd, own_namespace: bool) -> Result<()> {
    let own = own_cgroups()?;
    let flags = fresh_flags(&mount.options);
    for hierarchy in host_hierarchies()? {
        let doing = || format!("{} for {}", hierarchy.name, shown(mount));
        let place = Root::new(top)
            .mkdir_all(&hierarchy.name, 0o755)
            .doing("make the directory of", doing)?;
        let view = if own_namespace {
            make_hierarchy(&hierarchy, flags)
        } else {
            bind_hierarchy(&hierarchy, &own, flags)
        };
        let view = view.doing("mount the hierarchy", doing)?;
        mount::attach(&view, &place).doing("mount the hierarchy", doing)?;
        for controller in hierarchy.name.split(',').filter(|name| *name != hierarchy.name) {
            path::make_symlink(&hierarchy.name, top, controller).doing("link the controllers of", doing)?;
        }
    }
    Ok(())
}

fn make_hierarchy(hierarchy: &Hierarchy, flags: Attr) -> coracle_kernel::Result<OwnedFd> {
    if hierarchy.options.is_empty() {
        return mount::make("cgroup2", &[], flags);
    }
    let filesystem = Filesystem::open("cgroup")?;
    if hierarchy.options.iter().any(|option| option.starts_with("name=")) {
        filesystem.flag("none")?;
    }
    hierarchy
        .options
        .iter()
        .try_for_each(|option| filesystem.option(option))?;
    filesystem.create()?;
    filesystem.mount(flags)
}

fn bind_hierarchy(
    hierarchy: &Hierarchy,
    own: &BTreeMap<String, PathBuf>,
    flags: Attr,
) -> coracle_kernel::Result<OwnedFd> {
    let key = hierarchy.options.first().map_or("", String::as_str);
    let own = own.get(key).map_or(Path::new("/"), PathBuf::as_path);
    let below = own.strip_prefix(&hierarchy.mounted).unwrap_or(Path::new(""));
    let host = path::open_dir(&hierarchy.mount_point)?;
    clone_with(
        &Root::new(&host).open(below, OFlags::PATH | OFlags::DIRECTORY)?,
        flags,
    )
}

fn clone_with(directory: &OwnedFd, flags: Attr) -> coracle_kernel::Result<OwnedFd> {
    let tree = mount::clone_tree(directory, Depth::Single)?;
    coracle_kernel::mount_attr::add(&tree, flags)?;
    Ok(tree)
}

/// The hierarchies that are mounted below the host's directory.
fn host_hierarchies() -> Result<Vec<Hierarchy>> {
    let proc = Procfs::visible().doing("open", || "/proc".into())?;
    let mounts = mountinfo::read_own(&proc).doing("read the mounts of", || HOST.into())?;
    let mut found: Vec<Hierarchy> = Vec::new();
    for mount in mounts {
        let name = mount
            .mount_point
            .strip_prefix(HOST)
            .ok()
            .and_then(|name| name.to_str());
        let Some(name) = name.filter(|name| !name.is_empty() && !name.contains('/')) else {
            continue;
        };
        if found.iter().any(|known| known.name == name) {
            continue;
        }
        let options = match mount.kind.as_str() {
            "cgroup2" => Vec::new(),
            "cgroup" => mount
                .super_options
                .split(',')
                .filter(|word| is_controller(word))
                .map(str::to_owned)
                .collect(),
            _ => continue,
        };
        found.push(Hierarchy {
            name: name.to_owned(),
            mount_point: mount.mount_point.clone(),
            mounted: mount.root,
            options,
        });
    }
    Ok(found)
}

/// Of the options of a v1 mount, those that say which hierarchy it is.
fn is_controller(word: &str) -> bool {
    let flag = matches!(
        word,
        "rw" | "ro" | "xattr" | "noprefix" | "clone_children" | "none" | "all"
    );
    !flag && (!word.contains('=') || word.starts_with("name="))
}

/// `/proc/self/cgroup`: controller (or `name=…`, or nothing for the unified one) to path.
fn own_cgroups() -> Result<BTreeMap<String, PathBuf>> {
    let text = Procfs::visible()
        .and_then(|proc| proc.read("thread-self/cgroup", MAX_OWN_BYTES))
        .doing("read", || "/proc/self/cgroup".into())?;
    let mut own = BTreeMap::new();
    for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let mut fields = line.splitn(3, |byte| *byte == b':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            return Err(Error::refused("/proc/self/cgroup", "has a line that is none"));
        };
        let path: &OsStr = std::os::unix::ffi::OsStrExt::from_bytes(path);
        for controller in String::from_utf8_lossy(controllers).split(',') {
            own.insert(controller.to_owned(), PathBuf::from(path));
        }
    }
    Ok(own)
}

fn shown(mount: &Mount) -> String {
    format!("cgroups at {}", show(&mount.destination))
}
