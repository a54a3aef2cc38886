//! CRI request to OCI config: a pure function, one section a file.
//!
//! Nothing here touches the system. What the request names on the host – mount sources, device nodes, profile
//! files, the image's user database – was looked up before by the container's create steps and comes in as
//! plain data; what comes out is the document that goes into the bundle.

mod capabilities;
mod devices;
mod env;
mod error;
mod mounts;
mod namespaces;
mod network;
mod pod;
mod process;
mod resources;
mod security;
mod user;

use coracle_proto::cri::{ContainerConfig, LinuxContainerSecurityContext, PodSandboxConfig};
use coracle_spec::{Config, LoadError, OCI_VERSION};
use serde_json::{Value, json};

pub use network::network;
pub use pod::{check_pod, sysctls};
pub use process::exec_process;

/// Everything that a container's OCI config is made from.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// Id of the sandbox.
    pub sandbox_id: &'a str,
    /// The sandbox's request.
    pub pod: &'a PodSandboxConfig,
    /// Id of the container.
    pub container_id: &'a str,
    /// The container's request.
    pub container: &'a ContainerConfig,
    /// What the image says about the process.
    pub image: &'a ImageProcess,
    /// `/etc/passwd` and `/etc/group` of the image.
    pub users: &'a UserFiles,
    /// `linux.cgroupsPath`, ready to be written.
    pub cgroup_path: &'a str,
    /// Namespaces of the pod that the container joins.
    pub namespaces: &'a PodNamespaces,
    /// Files of the pod that every container gets mounted.
    pub files: &'a PodFiles,
    /// The request's mounts, in its order, with sources resolved.
    pub mounts: &'a [HostMount],
    /// The request's devices (directories already expanded); for a privileged container the host's devices.
    pub devices: &'a [HostDevice],
    /// Bytes of the seccomp profile that a `Localhost` field names.
    pub seccomp_profile: Option<&'a [u8]>,
    /// What this host is.
    pub host: &'a HostFacts,
    /// What the configuration says where the request says nothing.
    pub defaults: &'a Defaults,
}

/// What an image's config says about the process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageProcess {
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`, entries `NAME=value`.
    pub env: Vec<String>,
    /// `User`: `uid`, `name`, `uid:gid` …
    pub user: String,
    /// `WorkingDir`.
    pub working_dir: String,
}

/// The image's user database, bounded when it was read; empty where the image has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserFiles {
    /// `/etc/passwd`.
    pub passwd: Vec<u8>,
    /// `/etc/group`.
    pub group: Vec<u8>,
}

/// Paths of namespaces to join; none = the host's (or, for pid, one of the container's own: see the request).
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PodNamespaces {
    /// Network namespace; none for host network.
    pub network: Option<String>,
    /// IPC namespace; none for host IPC.
    pub ipc: Option<String>,
    /// UTS namespace; none for host network.
    pub uts: Option<String>,
    /// PID namespace to join: the pod's shared one, or that of a `TARGET` container.
    pub pid: Option<String>,
    /// User namespace of the pod.
    pub user: Option<String>,
}

/// Files of the pod, as host paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodFiles {
    /// Mounted on `/etc/resolv.conf` unless the request mounts something there.
    pub resolv_conf: Option<String>,
    /// Mounted on `/etc/hostname`.
    pub hostname: Option<String>,
    /// Mounted on `/etc/hosts` unless the request mounts something there.
    pub hosts: Option<String>,
    /// Mounted on `/dev/shm`: the pod's tmpfs, or the host's.
    pub shm: Option<String>,
}

/// A mount of the request whose source was resolved on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostMount {
    /// Index of the mount in `ContainerConfig.mounts`: options and destination are taken from there.
    pub index: usize,
    /// Source with its symlinks resolved.
    pub source: String,
}

/// A device node of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDevice {
    /// Path inside the container.
    pub path: String,
    /// `c` or `b`.
    pub kind: char,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits of the node.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Subset of `rwm` that the container may do.
    pub access: String,
}

/// What this host is, as far as a config depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// Unified hierarchy alone (private cgroup namespace) or v1/hybrid (host's).
    pub cgroup_v2: bool,
    /// Memory + swap can be limited.
    pub swap_accounting: bool,
    /// Page sizes that the hugetlb controller limits, as in file names (`2MB`); empty = no controller.
    pub hugepage_sizes: Vec<String>,
    /// Name of this host, for pods on its network.
    pub hostname: String,
}

/// What the configuration says where a request says nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// Profile for containers whose seccomp field is nil.
    pub unset_seccomp: UnsetSeccomp,
}

/// Meaning of a nil seccomp field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnsetSeccomp {
    /// The runtime's default profile.
    Runtime,
    /// No filter.
    Unconfined,
}

/// What comes out.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The document to write as `config.json`.
    pub config: Value,
    /// The user that the process starts as, for the container's status.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
}

/// Why a request cannot be turned into a config.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A field of the request, or of the image, that can never work.
    #[error("{field}: {why}")]
    Invalid {
        /// Path of the field in the request; `image` for the image's config.
        field: String,
        /// What is wrong with it.
        why: String,
    },
    /// A field of the request that asks for something that is not done yet.
    #[error("{field}: {why} is not supported in this release")]
    Unsupported {
        /// Path of the field in the request.
        field: String,
        /// What is not done.
        why: &'static str,
    },
    /// What was generated does not pass the runtime's own checks.
    #[error("generated configuration is refused")]
    Refused(#[source] LoadError),
}

impl SpecError {
    fn invalid(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            why: why.into(),
        }
    }

    fn unsupported(field: impl Into<String>, why: &'static str) -> Self {
        Self::Unsupported {
            field: field.into(),
            why,
        }
    }
}

/// Checks what a container's request alone can be wrong with, before anything is made for it.
///
/// # Errors
/// The request asks for what cannot be, or for what this release does not do.
pub fn check_container(pod: &PodSandboxConfig, container: &ContainerConfig) -> Result<(), SpecError> {
    security::check(pod, container, &security_context(container))?;
    mounts::check(container)
}

/// Turns a request into the config of a bundle, and checks the result as the runtime will.
///
/// # Errors
/// A field of the request cannot work, is not done yet, or needs what the image does not have.
pub fn generate(inputs: &Inputs<'_>) -> Result<Generated, SpecError> {
    check_container(inputs.pod, inputs.container)?;
    let context = security_context(inputs.container);
    let capabilities = security::capabilities(&context)?;
    let user = user::resolve(&context, &inputs.image.user, inputs.users)?;
    let process = process::process(inputs, &context, &capabilities, &user)?;
    let namespaces = namespaces::namespaces(inputs, &context)?;
    let mounts::Mounts { mounts, propagation } = mounts::mounts(inputs, &context)?;
    let seccomp = security::seccomp(inputs, &context, &capabilities)?;

    let mut linux = json!({
        "cgroupsPath": inputs.cgroup_path,
        "namespaces": namespaces,
        "resources": resources::resources(inputs, &context)?,
        "devices": devices::nodes(inputs.devices)?,
    });
    if let Some(seccomp) = seccomp {
        linux["seccomp"] = seccomp;
    }
    if let Some(propagation) = propagation {
        linux["rootfsPropagation"] = propagation.into();
    }
    if !context.privileged {
        let (masked, readonly) = security::restricted_paths(inputs, &context)?;
        linux["maskedPaths"] = json!(masked);
        linux["readonlyPaths"] = json!(readonly);
    }
    let config = json!({
        "ociVersion": OCI_VERSION,
        "process": process,
        "root": { "path": "rootfs", "readonly": context.readonly_rootfs },
        "mounts": mounts,
        "annotations": annotations(inputs),
        "linux": linux,
    });
    Config::from_slice(config.to_string().as_bytes()).map_err(SpecError::Refused)?;
    Ok(Generated {
        config,
        uid: user.uid,
        gid: user.gid,
        groups: user.groups,
    })
}

fn security_context(container: &ContainerConfig) -> LinuxContainerSecurityContext {
    let linux = container.linux.as_ref();
    linux
        .and_then(|linux| linux.security_context.clone())
        .unwrap_or_default()
}

/// What hooks and tools on a node look for, under the keys that they know from other CRI servers. Annotations of pods
/// and images never get here: they come from people who may not control a runtime.
fn annotations(inputs: &Inputs<'_>) -> Value {
    let pod = inputs.pod.metadata.clone().unwrap_or_default();
    let container = inputs.container.metadata.clone().unwrap_or_default();
    let image = inputs.container.image.clone().unwrap_or_default();
    let image = if image.user_specified_image.is_empty() {
        image.image
    } else {
        image.user_specified_image
    };
    json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.container-name": container.name,
        "io.kubernetes.cri.image-name": image,
        "io.kubernetes.cri.sandbox-id": inputs.sandbox_id,
        "io.kubernetes.cri.sandbox-name": pod.name,
        "io.kubernetes.cri.sandbox-namespace": pod.namespace,
        "io.kubernetes.cri.sandbox-uid": pod.uid,
    })
}

#[cfg(test)]
mod document_tests;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tests;
