//! The checked model of a container's configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::{self as oci, LinuxDeviceType, LinuxPersonalityDomain, LinuxResources, LinuxSeccomp};

use crate::load::Document;
use crate::mount_options::{MountOptions, Propagation, parse_mount_options};
use crate::namespaces::{Namespace, Namespaces};
use crate::process::Process;
use crate::validate::{Finding, sysctl_path};

/// A configuration in which every check passed.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The version that the document names, 1.x.
    pub oci_version: String,
    /// Root file system, relative to the bundle unless absolute.
    pub root_path: PathBuf,
    /// The root is made read-only at the end.
    pub root_readonly: bool,
    /// The process.
    pub process: Process,
    /// Host name; set only with a UTS namespace of the container's own.
    pub hostname: Option<String>,
    /// Domain name; as the host name.
    pub domainname: Option<String>,
    /// Mounts, in the order in which they are made.
    pub mounts: Vec<Mount>,
    /// Namespaces to make and to join.
    pub namespaces: Namespaces,
    /// User ids of the user namespace.
    pub uid_mappings: Vec<IdMapping>,
    /// Group ids of the user namespace.
    pub gid_mappings: Vec<IdMapping>,
    /// Offsets of the clocks of a new time namespace.
    pub time_offsets: Vec<TimeOffset>,
    /// Device nodes beyond the default ones.
    pub devices: Vec<Device>,
    /// Kernel parameters by their file below `/proc/sys`, such as `net/ipv4/ip_forward`.
    pub sysctl: BTreeMap<String, String>,
    /// cgroup of the container, as the document has it.
    pub cgroups_path: Option<String>,
    /// Limits.
    pub resources: Option<LinuxResources>,
    /// System-call filter.
    pub seccomp: Option<LinuxSeccomp>,
    /// Propagation of the root mount.
    pub rootfs_propagation: Option<Propagation>,
    /// Paths that are hidden, absolute inside the container.
    pub masked_paths: Vec<String>,
    /// Paths that are made read-only, absolute inside the container.
    pub readonly_paths: Vec<String>,
    /// SELinux context of the mounts.
    pub mount_label: Option<String>,
    /// Execution domain.
    pub personality: Option<Personality>,
    /// Programs run along the container's life.
    pub hooks: Hooks,
    /// Free-form pairs.
    pub annotations: BTreeMap<String, String>,
    /// What was ignored, each with its field.
    pub warnings: Vec<Finding>,
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where, inside the container.
    pub destination: PathBuf,
    /// File system type; empty or `bind` for a bind.
    pub fstype: String,
    /// What: a path of the host for a bind (relative to the bundle unless absolute), a name otherwise.
    pub source: Option<PathBuf>,
    /// How.
    pub options: MountOptions,
}

/// One range of a user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdMapping {
    /// First id inside.
    pub container_id: u32,
    /// First id outside.
    pub host_id: u32,
    /// Number of ids, at least 1.
    pub size: u32,
}

/// A clock that a time namespace can shift.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeClock {
    /// `CLOCK_MONOTONIC`.
    Monotonic,
    /// `CLOCK_BOOTTIME`.
    Boottime,
}

/// The shift of one clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeOffset {
    /// Which clock.
    pub clock: TimeClock,
    /// Seconds.
    pub secs: i64,
    /// Nanoseconds to add to the seconds.
    pub nanosecs: u32,
}

/// One device node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Where, absolute inside the container.
    pub path: PathBuf,
    /// File type bits, as `mknod` takes them: character, block or fifo.
    pub file_type: u32,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits; `None`: the runtime's default.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

/// Execution domain of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Personality {
    /// The machine's own.
    Linux,
    /// The 32-bit one.
    Linux32,
}

/// Programs run along the container's life, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Deprecated form of `create_runtime`; run before it.
    pub prestart: Vec<Hook>,
    /// In the runtime's namespaces, before pivot_root.
    pub create_runtime: Vec<Hook>,
    /// In the container's namespaces, before pivot_root.
    pub create_container: Vec<Hook>,
    /// In the container, before the program starts.
    pub start_container: Vec<Hook>,
    /// In the runtime's namespaces, after the program started.
    pub poststart: Vec<Hook>,
    /// In the runtime's namespaces, after the container was deleted.
    pub poststop: Vec<Hook>,
}

/// One hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// Program, absolute.
    pub path: PathBuf,
    /// `argv`, its first entry included; empty: the path alone.
    pub args: Vec<String>,
    /// Its whole environment; `None` where the document has none.
    pub env: Option<Vec<String>>,
    /// It is killed after this many seconds.
    pub timeout_secs: Option<u64>,
}

impl Config {
    /// The model of a document in which validation found nothing.
    pub(crate) fn from_document(document: Document, mut warnings: Vec<Finding>) -> Self {
        let process = document
            .process
            .unwrap_or_default()
            .into_process("process", &mut warnings);
        let linux = document.linux.unwrap_or_else(empty_linux);
        let (root_path, root_readonly) = document.root.map_or_else(Default::default, |root| {
            (root.path().clone(), root.readonly().unwrap_or(false))
        });
        let mut namespaces = Namespaces::default();
        for namespace in linux.namespaces().iter().flatten() {
            let path = namespace
                .path()
                .clone()
                .filter(|path| !path.as_os_str().is_empty());
            namespaces.set(
                namespace.typ().into(),
                path.map_or(Namespace::New, Namespace::Join),
            );
        }
        Self {
            oci_version: document.oci_version,
            root_path,
            root_readonly,
            process,
            hostname: document.hostname.filter(|name| !name.is_empty()),
            domainname: document.domainname.filter(|name| !name.is_empty()),
            mounts: document.mounts.iter().filter_map(mount).collect(),
            namespaces,
            uid_mappings: linux.uid_mappings().iter().flatten().map(id_mapping).collect(),
            gid_mappings: linux.gid_mappings().iter().flatten().map(id_mapping).collect(),
            time_offsets: time_offsets(&linux),
            devices: linux.devices().iter().flatten().filter_map(device).collect(),
            sysctl: sysctl(&linux),
            cgroups_path: linux
                .cgroups_path()
                .as_ref()
                .and_then(|path| path.to_str())
                .filter(|path| !path.is_empty())
                .map(str::to_owned),
            resources: linux.resources().clone(),
            seccomp: linux.seccomp().clone(),
            rootfs_propagation: linux.rootfs_propagation().as_deref().and_then(Propagation::parse),
            masked_paths: linux.masked_paths().clone().unwrap_or_default(),
            readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
            mount_label: linux.mount_label().clone().filter(|label| !label.is_empty()),
            personality: linux
                .personality()
                .as_ref()
                .map(|personality| match personality.domain() {
                    LinuxPersonalityDomain::PerLinux => Personality::Linux,
                    LinuxPersonalityDomain::PerLinux32 => Personality::Linux32,
                }),
            hooks: hooks(&document.hooks),
            annotations: document.annotations,
            warnings,
        }
    }
}

/// The crate's `Default` is a template with namespaces and paths in it, not an empty object.
fn empty_linux() -> oci::Linux {
    let mut linux = oci::Linux::default();
    linux
        .set_namespaces(None)
        .set_resources(None)
        .set_masked_paths(None)
        .set_readonly_paths(None);
    linux
}

fn mount(mount: &oci::Mount) -> Option<Mount> {
    let words = mount.options().iter().flatten().map(String::as_str);
    Some(Mount {
        destination: mount.destination().clone(),
        fstype: mount.typ().clone().unwrap_or_default(),
        source: mount
            .source()
            .clone()
            .filter(|source| !source.as_os_str().is_empty()),
        options: parse_mount_options(words).ok()?,
    })
}

fn id_mapping(mapping: &oci::LinuxIdMapping) -> IdMapping {
    IdMapping {
        container_id: mapping.container_id(),
        host_id: mapping.host_id(),
        size: mapping.size(),
    }
}

fn sysctl(linux: &oci::Linux) -> BTreeMap<String, String> {
    let parameters = linux.sysctl().iter().flatten();
    parameters
        .filter_map(|(name, value)| Some((sysctl_path(name)?, value.clone())))
        .collect()
}

fn time_offsets(linux: &oci::Linux) -> Vec<TimeOffset> {
    let offsets = linux.time_offsets().iter().flatten();
    offsets
        .filter_map(|(clock, offset)| {
            let clock = match clock.as_str() {
                "monotonic" => TimeClock::Monotonic,
                "boottime" => TimeClock::Boottime,
                _ => return None,
            };
            Some(TimeOffset {
                clock,
                secs: offset.secs().unwrap_or(0),
                nanosecs: offset.nanosecs().unwrap_or(0),
            })
        })
        .collect()
}

fn device(device: &oci::LinuxDevice) -> Option<Device> {
    const S_IFIFO: u32 = 0o010_000;
    const S_IFCHR: u32 = 0o020_000;
    const S_IFBLK: u32 = 0o060_000;
    let file_type = match device.typ() {
        LinuxDeviceType::B => S_IFBLK,
        LinuxDeviceType::C | LinuxDeviceType::U => S_IFCHR,
        LinuxDeviceType::P => S_IFIFO,
        LinuxDeviceType::A => return None,
    };
    Some(Device {
        path: device.path().clone(),
        file_type,
        major: u32::try_from(device.major()).ok()?,
        minor: u32::try_from(device.minor()).ok()?,
        // Some writers put the file type into the mode as well.
        mode: device.file_mode().map(|mode| mode & 0o7777),
        uid: device.uid(),
        gid: device.gid(),
    })
}

fn hooks(hooks: &oci::Hooks) -> Hooks {
    fn list(hooks: &Option<Vec<oci::Hook>>) -> Vec<Hook> {
        let hooks = hooks.iter().flatten();
        hooks
            .map(|hook| Hook {
                path: hook.path().clone(),
                args: hook.args().clone().unwrap_or_default(),
                env: hook.env().clone(),
                timeout_secs: hook.timeout().and_then(|secs| u64::try_from(secs).ok()),
            })
            .collect()
    }
    Hooks {
        prestart: list(hooks.prestart()),
        create_runtime: list(hooks.create_runtime()),
        create_container: list(hooks.create_container()),
        start_container: list(hooks.start_container()),
        poststart: list(hooks.poststart()),
        poststop: list(hooks.poststop()),
    }
}
