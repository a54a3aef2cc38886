//! Filesystems that are made afresh: proc, sysfs, tmpfs, and whatever else the configuration names.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use coracle_kernel::Errno;
use coracle_kernel::mount::{self, Depth, MAX_OPTION_BYTES};
use coracle_kernel::mount_attr::{self, Attr};
use coracle_kernel::mount_old::{self, Flags};
use coracle_kernel::path::{self, Leaf, OFlags};
use coracle_kernel::xattr;
use coracle_spec::{Mount, ms};

use super::error::{Doing, Error, Result};
use super::mounts::{self, Covering, fresh_flags, make_filesystem};
use super::{Rootfs, copyup, show};

/// A procfs or sysfs, on an ordinary directory and nothing else.
pub(super) fn proc_or_sysfs(rootfs: &Rootfs<'_>, mount: &Mount) -> Result<()> {
    let fstype = mount.fstype.as_str();
    let target = mounts::real_directory(rootfs, &mount.destination, &format!("filesystem {fstype:?}"))?;
    let covering = if fstype == "proc" {
        Covering::Procfs
    } else {
        Covering::Other
    };
    mounts::check(rootfs, &mount.destination, &target, covering)?;
    let source = mount.source.as_deref();
    let fresh = match make_filesystem(fstype, source, &mount.options, &[], fresh_flags(&mount.options)) {
        // A user namespace without a network namespace of its own may not mount a sysfs; the host's is what it sees.
        Err(error) if fstype == "sysfs" && error.errno() == Errno::EPERM => host_sysfs(mount),
        other => other,
    };
    let fresh = fresh.doing("mount", || shown(mount))?;
    mount::attach(&fresh, &target).doing("mount", || shown(mount))?;
    mounts::settle(&fresh, mount)
}

/// A tmpfs. It takes the mode of the directory that it covers, and is filled before it becomes read-only.
pub(super) fn tmpfs(rootfs: &mut Rootfs<'_>, mount: &Mount) -> Result<()> {
    let destination = &mount.destination;
    let covered = rootfs
        .root()
        .find(destination, OFlags::PATH)
        .doing("open the mount point", || show(destination))?;
    let mut mode = None;
    let target = match covered {
        Some(target) => {
            let stat = mounts::check(rootfs, destination, &target, Covering::Other)?;
            if mount.options.data_value("mode").is_none() {
                mode = Some(format!("{:o}", stat.mode));
            }
            target
        }
        None => mounts::target(rootfs, mount, Leaf::Directory(0o755), Covering::Other)?,
    };
    let mut extra = Vec::with_capacity(2);
    extra.extend(mode.as_deref().map(|mode| ("mode", mode)));
    extra.extend(label(rootfs));
    let flags = fresh_flags(&mount.options);
    let source = mount.source.as_deref();
    let fresh = make_filesystem(
        "tmpfs",
        source,
        &mount.options,
        &extra,
        flags.difference(Attr::RDONLY),
    )
    .doing("mount", || shown(mount))?;
    if mount.options.tmpcopyup {
        copyup::copy(&target, &fresh).doing("copy up", || show(destination))?;
    }
    mount::attach(&fresh, &target).doing("mount", || shown(mount))?;
    mounts::settle(&fresh, mount)?;
    if flags.contains(Attr::RDONLY) {
        rootfs.read_only_later.push(fresh);
    }
    Ok(())
}

/// Any other filesystem: devpts, mqueue, or one that needs a device.
pub(super) fn other(rootfs: &mut Rootfs<'_>, mount: &Mount) -> Result<()> {
    let target = mounts::target(rootfs, mount, Leaf::Directory(0o755), Covering::Other)?;
    let options = &mount.options;
    let is_mqueue = mount.fstype == "mqueue";
    let label = label(rootfs).filter(|_| !is_mqueue);
    let too_long = options.data.iter().any(|word| word.len() > MAX_OPTION_BYTES);
    let mounted = if too_long || options.fs_flags & ms::I_VERSION != 0 {
        mount_by_text(rootfs, mount, &target, label)?
    } else {
        let extra: Vec<_> = label.into_iter().collect();
        let fresh = make_filesystem(
            &mount.fstype,
            mount.source.as_deref(),
            options,
            &extra,
            fresh_flags(options),
        )
        .doing("mount", || shown(mount))?;
        mount::attach(&fresh, &target).doing("mount", || shown(mount))?;
        fresh
    };
    if let Some(label) = rootfs.config.mount_label.as_deref().filter(|_| is_mqueue) {
        // It has no option for it.
        xattr::set(&mounted, "security.selinux", label.as_bytes()).doing("label", || shown(mount))?;
    }
    mounts::settle(&mounted, mount)
}

/// mount(2): for options longer than fsconfig(2) takes, and flags that have no name there.
fn mount_by_text(
    rootfs: &Rootfs<'_>,
    mount: &Mount,
    target: &OwnedFd,
    label: Option<(&str, &str)>,
) -> Result<OwnedFd> {
    let mut data = mount.options.data_string();
    if let Some((key, value)) = label {
        data.push_str(&format!(",{key}=\"{value}\""));
    }
    let text = |bytes: &[u8]| {
        CString::new(bytes).map_err(|_| Error::refused(shown(mount), "has a NUL byte in its options"))
    };
    let source = text(
        mount
            .source
            .as_deref()
            .unwrap_or(Path::new("none"))
            .as_os_str()
            .as_bytes(),
    )?;
    let kind = text(mount.fstype.as_bytes())?;
    let flags = Flags::from_bits_retain(mount.options.ms_flags());
    mount_old::mount(&source, target, &kind, flags, &text(data.as_bytes())?)
        .doing("mount", || shown(mount))?;
    // The descriptor still means what was covered; the name now leads to the mount.
    let mounted = rootfs
        .root()
        .open_path(&mount.destination)
        .doing("open the mount", || show(&mount.destination))?;
    if !path::mount_place(&mounted)
        .doing("look at the mount", || show(&mount.destination))?
        .is_root
    {
        return Err(Error::refused(
            shown(mount),
            "was moved away while it was mounted",
        ));
    }
    Ok(mounted)
}

/// The host's `/sys`, all of it, with the flags asked for.
fn host_sysfs(mount: &Mount) -> coracle_kernel::Result<OwnedFd> {
    let tree = mount::clone_tree(path::open_dir("/sys")?, Depth::Recursive)?;
    mount_attr::add(&tree, fresh_flags(&mount.options))?;
    Ok(tree)
}

/// The option that gives a filesystem its SELinux context.
fn label<'a>(rootfs: &Rootfs<'a>) -> Option<(&'static str, &'a str)> {
    rootfs
        .config
        .mount_label
        .as_deref()
        .map(|label| ("context", label))
}

fn shown(mount: &Mount) -> String {
    format!("{} at {}", mount.fstype, show(&mount.destination))
}
