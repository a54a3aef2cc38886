//! `config.json` in, checked model out.
//!
//! [`Config::from_slice`] parses a bundle's configuration, collects every finding of [`validate`] and hands back a
//! model whose words are already numbers: mount options as attributes, capabilities as masks, limits as resource
//! numbers. The leaf types that have no holes come from the `oci-spec` crate and are re-exported as [`oci`].
//!
//! No function here touches the system; the largest effect is to read a descriptor that the caller opened.

mod capability;
mod config;
mod default_spec;
mod features;
mod load;
mod mount_options;
mod namespaces;
mod objects;
mod process;
pub mod resources;
mod state;
mod validate;

pub use capability::{CAPABILITY_NAMES, CapabilitySets, capability_number};
pub use config::{Config, Device, Hook, Hooks, IdMapping, Mount, Personality, TimeClock, TimeOffset};
pub use default_spec::{default_spec, rootless_spec};
pub use features::{Supported, features};
pub use load::{LoadError, MAX_CONFIG_BYTES, OCI_VERSION, load_process, load_resources, load_seccomp};
pub use mount_options::{
    Attrs, Bind, MountOptions, OptionError, Propagation, PropagationKind, attr, ms, parse_mount_options,
    supported_mount_options,
};
pub use namespaces::{Namespace, NamespaceKind, Namespaces};
pub use process::{ExecCpuAffinity, Process, Rlimit, Scheduler, User, rlimit_number};
pub use state::{ContainerState, HookState, Status, rfc3339_nanos};
pub use validate::{Finding, sysctl_path, sysctl_problem};

/// The leaf types of the runtime specification, as the `oci-spec` crate defines them.
pub mod oci {
    pub use oci_spec::runtime::{
        Arch, LinuxBlockIo, LinuxCpu, LinuxDeviceCgroup, LinuxDeviceType, LinuxHugepageLimit, LinuxMemory,
        LinuxPids, LinuxRdma, LinuxResources, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg,
        LinuxSeccompFilterFlag, LinuxSeccompOperator, LinuxSyscall, LinuxThrottleDevice, LinuxWeightDevice,
    };
    pub use oci_spec::runtime::{
        LinuxCpuBuilder, LinuxDeviceCgroupBuilder, LinuxMemoryBuilder, LinuxPidsBuilder,
        LinuxResourcesBuilder, LinuxSeccompArgBuilder, LinuxSeccompBuilder, LinuxSyscallBuilder,
    };
}
