//! What a CreateContainer request names on the host, looked up before the config is generated. All of it may block
//! (a source on a dead network file system does): it runs on a thread of its own and is given up with the pod.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use coracle_kernel::mountinfo;
use coracle_kernel::path::{self, Kind, Root};
use coracle_kernel::procfs::Procfs;
use coracle_kernel::signal::Signal;
use coracle_proto::cri::{
    self, ContainerConfig, Device, MountPropagation, PodSandboxConfig, SecurityProfile,
    security_profile::ProfileType,
};

use crate::error::{Context as _, Error, Result};
use crate::spec_gen::{HostDevice, HostMount, UserFiles};

/// User databases of images are small; what is larger is refused before it is parsed.
const USER_FILE_BYTES: usize = 1 << 20;

/// A seccomp profile with every system call spelled out stays far below it.
const PROFILE_BYTES: u64 = 1 << 20;

/// Most entries of a device directory.
const DEVICE_ENTRIES: usize = 4096;

/// What was looked up.
#[derive(Debug)]
pub(super) struct Gathered {
    pub(super) mounts: Vec<HostMount>,
    pub(super) devices: Vec<HostDevice>,
    pub(super) seccomp_profile: Option<Vec<u8>>,
    pub(super) users: UserFiles,
}

/// Looks everything up; `rootfs` is the container's mounted root.
pub(super) fn gather(config: &ContainerConfig, rootfs: &OwnedFd) -> Result<Gathered> {
    Ok(Gathered {
        mounts: mounts(config)?,
        devices: devices(config)?,
        seccomp_profile: seccomp_profile(config)?,
        users: users(rootfs)?,
    })
}

/// Absolute path of the log; empty where none is asked for.
///
/// The directory is the kubelet's, the rest must be plain names below it.
pub(super) fn log_path(pod: &PodSandboxConfig, container: &ContainerConfig) -> Result<String> {
    let (directory, name) = (Path::new(&pod.log_directory), Path::new(&container.log_path));
    if pod.log_directory.is_empty() || container.log_path.is_empty() {
        return Ok(String::new());
    }
    if !directory.is_absolute() {
        return Err(Error::invalid("config.log_directory", "is not an absolute path"));
    }
    if !name.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(Error::invalid(
            "config.log_path",
            "is not a path below the log directory",
        ));
    }
    Ok(directory.join(name).to_string_lossy().into_owned())
}

/// The signal that stops the container: the request's, the image's, SIGTERM.
pub(super) fn stop_signal(config: &ContainerConfig, image: &str) -> Result<Signal> {
    if config.stop_signal() != cri::Signal::RuntimeDefault {
        let name = config.stop_signal().as_str_name();
        let name = name.replace("MINPLUS", "MIN+").replace("MAXMINUS", "MAX-");
        return Signal::parse(&name)
            .ok_or_else(|| Error::invalid("config.stop_signal", "is not a signal of Linux"));
    }
    if image.is_empty() {
        return Ok(Signal::TERM);
    }
    Signal::parse(image)
        .ok_or_else(|| Error::invalid("image", format!("stop signal {image:?} is not a signal")))
}

fn mounts(config: &ContainerConfig) -> Result<Vec<HostMount>> {
    let mut resolved = Vec::with_capacity(config.mounts.len());
    for (index, mount) in config.mounts.iter().enumerate() {
        let field = || format!("config.mounts[{index}].host_path");
        if !Path::new(&mount.host_path).is_absolute() {
            return Err(Error::invalid(
                field(),
                format!("{:?} is not an absolute path", mount.host_path),
            ));
        }
        let source = match fs::canonicalize(&mount.host_path) {
            Ok(source) => source,
            // As other CRI servers do: an absent source becomes a directory.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&mount.host_path).step("make the source of a mount")?;
                fs::canonicalize(&mount.host_path).step("resolve the source of a mount")?
            }
            Err(error) => return Err(Error::invalid(field(), format!("{:?}: {error}", mount.host_path))),
        };
        let source = source
            .into_os_string()
            .into_string()
            .map_err(|_| Error::invalid(field(), "is not UTF-8"))?;
        resolved.push(HostMount { index, source });
    }
    check_propagation(config, &resolved)?;
    Ok(resolved)
}

/// A propagation that the host cannot give is refused now: the mounts would silently stay private.
fn check_propagation(config: &ContainerConfig, mounts: &[HostMount]) -> Result<()> {
    let wanted = |mount: &HostMount| config.mounts[mount.index].propagation();
    if mounts
        .iter()
        .all(|mount| wanted(mount) == MountPropagation::PropagationPrivate)
    {
        return Ok(());
    }
    let host = mountinfo::read_own(&Procfs::open().step("open /proc")?).step("read the host's mounts")?;
    for mount in mounts {
        let source = Path::new(&mount.source);
        let holder = host
            .iter()
            .filter(|other| source.starts_with(&other.mount_point))
            .max_by_key(|other| other.mount_point.components().count());
        let (shared, slave) = holder.map_or((false, false), |on| (on.shared.is_some(), on.master.is_some()));
        let refused = match wanted(mount) {
            MountPropagation::PropagationPrivate => false,
            MountPropagation::PropagationHostToContainer => !shared && !slave,
            MountPropagation::PropagationBidirectional => !shared,
        };
        if refused {
            let field = format!("config.mounts[{}].propagation", mount.index);
            let why = format!("{} is not on a shared mount of the host", source.display());
            return Err(Error::invalid(field, why));
        }
    }
    Ok(())
}

fn devices(config: &ContainerConfig) -> Result<Vec<HostDevice>> {
    let privileged = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .is_some_and(|context| context.privileged);
    let mut found = Vec::new();
    if privileged {
        let all = Device {
            host_path: "/dev".into(),
            container_path: "/dev".into(),
            permissions: "rwm".into(),
        };
        expand(&all, Path::new("/dev"), &mut found, true)?;
    }
    for (index, device) in config.devices.iter().enumerate() {
        let field = format!("config.devices[{index}]");
        if !device.permissions.bytes().all(|access| b"rwm".contains(&access)) {
            return Err(Error::invalid(
                field,
                format!("permissions {:?} are not of rwm", device.permissions),
            ));
        }
        if !Path::new(&device.host_path).is_absolute() || !Path::new(&device.container_path).is_absolute() {
            return Err(Error::invalid(field, "paths are not absolute"));
        }
        let before = found.len();
        expand(device, Path::new(&device.host_path), &mut found, false)?;
        if found.len() == before {
            return Err(Error::invalid(
                field,
                format!("{} is no device and holds none", device.host_path),
            ));
        }
    }
    // The same node named twice counts once, the last word on its permissions.
    let mut seen = std::collections::BTreeSet::new();
    found.reverse();
    found.retain(|device| seen.insert(device.path.clone()));
    found.reverse();
    Ok(found)
}

/// The node, or the nodes in the directory, that a device entry names.
fn expand(device: &Device, at: &Path, found: &mut Vec<HostDevice>, host_dev: bool) -> Result<()> {
    let fd = path::open(at, path::OFlags::PATH).step("open a device of the host")?;
    let stat = path::stat(&fd).step("look at a device of the host")?;
    let kind = match stat.kind {
        Kind::CharDevice => 'c',
        Kind::BlockDevice => 'b',
        Kind::Directory => {
            for (name, kind) in path::list_dir(&fd, DEVICE_ENTRIES).step("list a device directory")? {
                // What every container gets of its own, and what is a file system of the host.
                let own = [
                    "pts",
                    "shm",
                    "fd",
                    "mqueue",
                    ".lxc",
                    ".lxd-mounts",
                    ".udev",
                    "hugepages",
                ];
                if host_dev && (own.iter().any(|own| name == *own) || name == "console") {
                    continue;
                }
                if matches!(kind, Kind::CharDevice | Kind::BlockDevice | Kind::Directory) {
                    expand(device, &at.join(name), found, host_dev)?;
                }
            }
            return Ok(());
        }
        _ => return Ok(()),
    };
    let below = at.strip_prefix(&device.host_path).unwrap_or(Path::new(""));
    let inside = if below.as_os_str().is_empty() {
        PathBuf::from(&device.container_path)
    } else {
        Path::new(&device.container_path).join(below)
    };
    found.push(HostDevice {
        path: inside.to_string_lossy().into_owned(),
        kind,
        major: stat.rdev.0,
        minor: stat.rdev.1,
        mode: stat.mode & 0o777,
        uid: stat.uid,
        gid: stat.gid,
        access: if device.permissions.is_empty() {
            "rwm".into()
        } else {
            device.permissions.clone()
        },
    });
    Ok(())
}

fn seccomp_profile(config: &ContainerConfig) -> Result<Option<Vec<u8>>> {
    let context = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let Some(SecurityProfile {
        profile_type,
        localhost_ref,
    }) = context.and_then(|context| context.seccomp.as_ref())
    else {
        return Ok(None);
    };
    if *profile_type != i32::from(ProfileType::Localhost) {
        return Ok(None);
    }
    let field = "config.linux.security_context.seccomp.localhost_ref";
    if !Path::new(localhost_ref).is_absolute() {
        return Err(Error::invalid(
            field,
            format!("{localhost_ref:?} is not an absolute path"),
        ));
    }
    let mut bytes = Vec::new();
    fs::File::open(localhost_ref)
        .and_then(|file| io::Read::read_to_end(&mut io::Read::take(file, PROFILE_BYTES + 1), &mut bytes))
        .map_err(|error| Error::invalid(field, format!("{localhost_ref}: {error}")))?;
    if bytes.len() as u64 > PROFILE_BYTES {
        return Err(Error::invalid(
            field,
            format!("{localhost_ref} is larger than {PROFILE_BYTES} bytes"),
        ));
    }
    Ok(Some(bytes))
}

/// The image's user database, read inside its root.
fn users(rootfs: &OwnedFd) -> Result<UserFiles> {
    let fd = rootfs.as_fd();
    let root = Root::new(&fd);
    let read = |name: &str| match root.read_file(name, USER_FILE_BYTES) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    Ok(UserFiles {
        passwd: read("etc/passwd").step("read the image's /etc/passwd")?,
        group: read("etc/group").step("read the image's /etc/group")?,
    })
}

#[cfg(test)]
mod tests {
    use coracle_proto::cri::{LinuxContainerConfig, LinuxContainerSecurityContext, Mount};

    use super::*;

    #[test]
    fn a_log_path_stays_below_its_directory() {
        let pod = PodSandboxConfig {
            log_directory: "/var/log/pods/p".into(),
            ..Default::default()
        };
        let container = |path: &str| ContainerConfig {
            log_path: path.into(),
            ..Default::default()
        };
        assert_eq!(
            log_path(&pod, &container("c/0.log")).unwrap(),
            "/var/log/pods/p/c/0.log"
        );
        assert_eq!(log_path(&pod, &container("")).unwrap(), "");
        for bad in ["../x", "/etc/passwd", "a/../../b", "./x/.."] {
            assert!(log_path(&pod, &container(bad)).is_err(), "{bad}");
        }
        let relative = PodSandboxConfig {
            log_directory: "logs".into(),
            ..Default::default()
        };
        log_path(&relative, &container("0.log")).unwrap_err();
    }

    #[test]
    fn the_stop_signal_is_the_requests_then_the_images_then_term() {
        let config = |signal: cri::Signal| ContainerConfig {
            stop_signal: signal.into(),
            ..Default::default()
        };
        let number =
            |config: &ContainerConfig, image: &str| stop_signal(config, image).map(Signal::number).ok();
        assert_eq!(number(&config(cri::Signal::Sigusr1), "SIGINT"), Some(10));
        assert_eq!(number(&config(cri::Signal::Sigrtminplus3), ""), Some(37));
        assert_eq!(number(&config(cri::Signal::Sigrtmaxminus14), ""), Some(50));
        assert_eq!(number(&config(cri::Signal::RuntimeDefault), "SIGINT"), Some(2));
        assert_eq!(number(&config(cri::Signal::RuntimeDefault), "3"), Some(3));
        assert_eq!(number(&config(cri::Signal::RuntimeDefault), ""), Some(15));
        assert_eq!(number(&config(cri::Signal::RuntimeDefault), "SIGNONSENSE"), None);
        // Every name of the CRI is one of ours.
        for value in 0..=65 {
            if let Ok(signal) = cri::Signal::try_from(value) {
                assert!(number(&config(signal), "").is_some(), "{signal:?}");
            }
        }
    }

    #[test]
    fn an_absent_source_becomes_a_directory_and_a_symlink_its_target() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(real.join("target"), real.join("link")).unwrap();
        fs::create_dir(real.join("target")).unwrap();
        let mount = |path: PathBuf| Mount {
            host_path: path.to_string_lossy().into(),
            ..Default::default()
        };
        let config = ContainerConfig {
            mounts: vec![mount(real.join("link")), mount(real.join("new/deep"))],
            ..Default::default()
        };
        let found = mounts(&config).unwrap();
        assert_eq!(Path::new(&found[0].source), real.join("target"));
        assert!(real.join("new/deep").is_dir());
        let relative = ContainerConfig {
            mounts: vec![mount("tmp".into())],
            ..Default::default()
        };
        assert!(
            mounts(&relative)
                .unwrap_err()
                .to_string()
                .starts_with("config.mounts[0].host_path")
        );
    }

    #[test]
    fn devices_are_told_by_their_nodes() {
        let device = |host: &str, permissions: &str| Device {
            host_path: host.into(),
            container_path: "/dev/x".into(),
            permissions: permissions.into(),
        };
        let config = |device| ContainerConfig {
            devices: vec![device],
            ..Default::default()
        };
        let found = devices(&config(device("/dev/null", "rw"))).unwrap();
        assert_eq!((found[0].kind, found[0].major, found[0].minor), ('c', 1, 3));
        assert_eq!(
            (found[0].path.as_str(), found[0].access.as_str()),
            ("/dev/x", "rw")
        );
        for bad in [
            device("/etc/passwd", "r"),
            device("/dev/null", "x"),
            device("dev/null", "r"),
            device("/nope", "r"),
        ] {
            assert!(devices(&config(bad.clone())).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_local_profile_must_be_there() {
        let config = |path: &str| ContainerConfig {
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    seccomp: Some(SecurityProfile {
                        profile_type: ProfileType::Localhost.into(),
                        localhost_ref: path.into(),
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        for bad in ["", "relative.json", "/does/not/exist.json", "/dev/zero"] {
            assert!(seccomp_profile(&config(bad)).is_err(), "{bad:?}");
        }
    }
}
