//! Device nodes and links below `/dev`, and the console.
//!
//! All of it happens in one directory that was opened without following a link: an image whose `/dev` is a symlink is
//! refused. Where nodes may not be made (user namespaces, outer containers) the host's are bound, after a look that they
//! are what they are named.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use coracle_kernel::mount::{self, Depth};
use coracle_kernel::path::{self, Kind, Node, OFlags, Stat};
use coracle_kernel::{Errno, fd};
use coracle_spec::{Bind, Config, Device, NamespaceKind};

use super::error::{Doing, Error, Result};
use super::mounts::{clean, real_directory};
use super::{Rootfs, show};

/// Nodes that every container has, all of mode 0666.
const DEFAULT_NODES: [(&str, Node); 6] = [
    ("null", Node::Char(1, 3)),
    ("zero", Node::Char(1, 5)),
    ("full", Node::Char(1, 7)),
    ("random", Node::Char(1, 8)),
    ("urandom", Node::Char(1, 9)),
    ("tty", Node::Char(5, 0)),
];

/// Links that every container has.
const LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// `DEVPTS_SUPER_MAGIC`.
const DEVPTS_MAGIC: u64 = 0x1cd1;
/// File type bits of a device in the configuration.
const S_IFCHR: u32 = 0o020_000;
/// As above.
const S_IFBLK: u32 = 0o060_000;

/// Makes the devices of the configuration, then the default ones that it does not name, then the links.
pub(super) fn make(rootfs: &Rootfs<'_>) -> Result<()> {
    if binds_dev(rootfs.config) {
        return Ok(());
    }
    let dev = real_directory(rootfs, Path::new("/dev"), "devices")?;
    for device in &rootfs.config.devices {
        make_configured(rootfs, device)?;
    }
    for (name, node) in DEFAULT_NODES {
        make_or_bind(
            rootfs,
            &dev,
            OsStr::new(name),
            &Path::new("/dev").join(name),
            node,
            0o666,
        )?;
    }
    link_ptmx(&dev)?;
    for (name, to) in LINKS {
        link(&dev, name, to)?;
    }
    // Seen from the host's tree: does this kernel have it?
    if path::open("/proc/kcore", OFlags::PATH).is_ok() {
        link(&dev, "core", "/proc/kcore")?;
    }
    Ok(())
}

/// Binds the terminal onto `/dev/console`.
pub(super) fn bind_console(rootfs: &Rootfs<'_>, slave: impl AsFd) -> Result<()> {
    let console = || "/dev/console".to_owned();
    let magic = path::filesystem_magic(&slave).doing("look at the terminal for", console)?;
    if magic != DEVPTS_MAGIC {
        return Err(Error::refused(fd::show(&slave), "is no terminal of a devpts"));
    }
    let dev = real_directory(rootfs, Path::new("/dev"), "the console")?;
    let name = OsStr::new("console");
    let place = match path::create_file_at(&dev, name, 0o666) {
        Err(error) if error.errno() != Errno::EEXIST => Err(error),
        _ => path::open_at(&dev, name, OFlags::PATH),
    };
    let place = place.doing("open", console)?;
    let kind = path::stat(&place).doing("look at", console)?.kind;
    if !matches!(kind, Kind::File | Kind::CharDevice) {
        return Err(Error::refused(
            "/dev/console",
            format!("is a {kind:?} and cannot be the terminal"),
        ));
    }
    let terminal = mount::clone_tree(slave, Depth::Single).doing("bind the terminal to", console)?;
    mount::attach(terminal, place).doing("bind the terminal to", console)
}

/// Opens a node that is the null device beyond doubt: the container's own, else the host's.
pub(super) fn null_device(rootfs: &Rootfs<'_>) -> Result<OwnedFd> {
    let null = |stat: Stat| stat.kind == Kind::CharDevice && stat.rdev == (1, 3);
    if let Ok(fd) = rootfs.root().open_real("/dev/null", OFlags::PATH)
        && path::stat(&fd).is_ok_and(null)
    {
        return Ok(fd);
    }
    Err(Error::refused(
        "/dev/null",
        "is not the null device, and masking a file needs that",
    ))
}

/// Whether the configuration brings a whole `/dev` along; then nothing is made in it.
fn binds_dev(config: &Config) -> bool {
    config
        .mounts
        .iter()
        .any(|mount| mount.options.bind != Bind::No && clean(&mount.destination) == Path::new("/dev"))
}

fn make_configured(rootfs: &Rootfs<'_>, device: &Device) -> Result<()> {
    let shown = || show(&device.path);
    let node = match device.file_type {
        S_IFCHR => Node::Char(device.major, device.minor),
        S_IFBLK => Node::Block(device.major, device.minor),
        _ => Node::Fifo,
    };
    let (parent, name) = rootfs
        .root()
        .parent_of(&device.path)
        .doing("open the directory of the device", shown)?;
    let mode = device.mode.unwrap_or(0o666);
    let made = make_or_bind(rootfs, &parent, &name, &device.path, node, mode)?;
    let (uid, gid) = (device.uid.unwrap_or(0), device.gid.unwrap_or(0));
    match made {
        // A node of ours; one that was there before, or the host's, keeps its owner.
        Some(made) if (uid, gid) != (0, 0) => {
            path::chown(made, uid, gid).doing("give its owner the device", shown)
        }
        _ => Ok(()),
    }
}

/// Makes one node and returns it. `None` where something of that name was there, or the host's node was bound.
fn make_or_bind(
    rootfs: &Rootfs<'_>,
    dev: &OwnedFd,
    name: &OsStr,
    on_host: &Path,
    node: Node,
    mode: u32,
) -> Result<Option<OwnedFd>> {
    // The kernel makes no device nodes for the root of a user namespace; FIFOs are for everyone.
    let may_make = node == Node::Fifo || !rootfs.config.namespaces.contains(NamespaceKind::User);
    if may_make {
        match path::make_node(dev, name, node, mode) {
            Err(error) if error.errno() == Errno::EEXIST => return Ok(None),
            Err(error) if error.errno() == Errno::EPERM && node != Node::Fifo => {}
            other => return other.map(Some).doing("make the device", || show(on_host)),
        }
    }
    bind_node(dev, name, on_host, node)?;
    Ok(None)
}

/// Binds the host's node, which must be the one asked for.
fn bind_node(dev: &OwnedFd, name: &OsStr, on_host: &Path, node: Node) -> Result<()> {
    let shown = || show(on_host);
    let source = path::open(on_host, OFlags::PATH).doing("open the host's device", shown)?;
    let stat = path::stat(&source).doing("look at the host's device", shown)?;
    let found = match stat.kind {
        Kind::CharDevice => Some(Node::Char(stat.rdev.0, stat.rdev.1)),
        Kind::BlockDevice => Some(Node::Block(stat.rdev.0, stat.rdev.1)),
        _ => None,
    };
    if found != Some(node) {
        return Err(Error::refused(
            show(on_host),
            format!("of the host is {found:?} and not {node:?}"),
        ));
    }
    let place = match path::create_file_at(dev, name, 0o666) {
        Err(error) if error.errno() == Errno::EEXIST => return Ok(()),
        Err(error) => Err(error),
        Ok(_) => path::open_at(dev, name, OFlags::PATH),
    };
    let place = place.doing("make the mount point of the device", shown)?;
    let clone = mount::clone_tree(&source, Depth::Single).doing("bind the device", shown)?;
    mount::attach(&clone, &place).doing("bind the device", shown)
}

/// `/dev/ptmx` is the one of the container's own devpts, whatever the image has there.
fn link_ptmx(dev: &OwnedFd) -> Result<()> {
    let shown = || "/dev/ptmx".to_owned();
    match path::make_symlink("pts/ptmx", dev, "ptmx") {
        Err(error) if error.errno() == Errno::EEXIST => {
            path::unlink(dev, "ptmx").doing("replace", shown)?;
            path::make_symlink("pts/ptmx", dev, "ptmx").doing("link", shown)
        }
        other => other.doing("link", shown),
    }
}

fn link(dev: &OwnedFd, name: &str, to: &str) -> Result<()> {
    match path::make_symlink(to, dev, name) {
        Err(error) if error.errno() == Errno::EEXIST => Ok(()),
        other => other.doing("link", || format!("/dev/{name}")),
    }
}
