//! The features document of runtime-spec 1.3: what this release does, and nothing that it does not.

use serde::Serialize;

use crate::capability::CAPABILITY_NAMES;
use crate::load::OCI_VERSION;
use crate::mount_options::supported_mount_options;

/// What only the caller knows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Supported<'a> {
    /// cgroup v1 is compiled in.
    pub cgroup_v1: bool,
    /// The systemd cgroup driver is there.
    pub cgroup_systemd: bool,
    /// Architectures whose system calls the filter compiler knows, as `SCMP_ARCH_*`.
    pub seccomp_archs: &'a [&'a str],
    /// Filter flags that the running kernel takes, as `SECCOMP_FILTER_FLAG_*`.
    pub seccomp_flags: &'a [&'a str],
    /// Version of the program.
    pub version: &'a str,
    /// Commit that the program was built from; empty: not known.
    pub commit: &'a str,
}

/// The document, indented by four spaces.
#[must_use]
pub fn features(supported: &Supported<'_>) -> String {
    let document = Features {
        oci_version_min: "1.0.0",
        oci_version_max: OCI_VERSION,
        hooks: [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        ],
        mount_options: supported_mount_options().collect(),
        linux: Linux {
            namespaces: ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            capabilities: CAPABILITY_NAMES.to_vec(),
            cgroup: Cgroup {
                v1: supported.cgroup_v1,
                v2: true,
                systemd: supported.cgroup_systemd,
                systemd_user: false,
                rdma: false,
            },
            seccomp: Seccomp {
                enabled: true,
                actions: [
                    "SCMP_ACT_ALLOW",
                    "SCMP_ACT_ERRNO",
                    "SCMP_ACT_KILL",
                    "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD",
                    "SCMP_ACT_LOG",
                    "SCMP_ACT_TRACE",
                    "SCMP_ACT_TRAP",
                ],
                operators: [
                    "SCMP_CMP_EQ",
                    "SCMP_CMP_GE",
                    "SCMP_CMP_GT",
                    "SCMP_CMP_LE",
                    "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ",
                    "SCMP_CMP_NE",
                ],
                archs: supported.seccomp_archs,
                known_flags: [
                    "SECCOMP_FILTER_FLAG_TSYNC",
                    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
                    "SECCOMP_FILTER_FLAG_LOG",
                    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                ],
                supported_flags: supported.seccomp_flags,
            },
            apparmor: Enabled { enabled: true },
            selinux: Enabled { enabled: true },
            intel_rdt: Enabled { enabled: false },
            memory_policy: MemoryPolicy { modes: [], flags: [] },
            mount_extensions: MountExtensions {
                idmap: Enabled { enabled: false },
            },
            net_devices: Enabled { enabled: false },
        },
        annotations: Annotations {
            version: supported.version,
            commit: supported.commit,
            checkpoint: "false",
        },
    };
    let mut bytes = Vec::new();
    let mut writer = serde_json::Serializer::with_formatter(
        &mut bytes,
        serde_json::ser::PrettyFormatter::with_indent(b"    "),
    );
    // Writing text to a vector cannot fail.
    let _ = document.serialize(&mut writer);
    String::from_utf8(bytes).unwrap_or_default()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Features<'a> {
    oci_version_min: &'a str,
    oci_version_max: &'a str,
    hooks: [&'a str; 6],
    mount_options: Vec<&'a str>,
    linux: Linux<'a>,
    annotations: Annotations<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Linux<'a> {
    namespaces: [&'a str; 8],
    capabilities: Vec<&'a str>,
    cgroup: Cgroup,
    seccomp: Seccomp<'a>,
    apparmor: Enabled,
    selinux: Enabled,
    intel_rdt: Enabled,
    memory_policy: MemoryPolicy,
    mount_extensions: MountExtensions,
    net_devices: Enabled,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Cgroup {
    v1: bool,
    v2: bool,
    systemd: bool,
    systemd_user: bool,
    rdma: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Seccomp<'a> {
    enabled: bool,
    actions: [&'a str; 8],
    operators: [&'a str; 7],
    archs: &'a [&'a str],
    known_flags: [&'a str; 4],
    supported_flags: &'a [&'a str],
}

#[derive(Serialize)]
struct Enabled {
    enabled: bool,
}

#[derive(Serialize)]
struct MemoryPolicy {
    modes: [&'static str; 0],
    flags: [&'static str; 0],
}

#[derive(Serialize)]
struct MountExtensions {
    idmap: Enabled,
}

#[derive(Serialize)]
struct Annotations<'a> {
    #[serde(rename = "io.coracle.version")]
    version: &'a str,
    #[serde(rename = "io.coracle.commit", skip_serializing_if = "str::is_empty")]
    commit: &'a str,
    // Container engines look for this key, whatever the runtime is called.
    #[serde(rename = "org.opencontainers.runc.checkpoint.enabled")]
    checkpoint: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_parses_as_the_specification_has_it_and_claims_nothing_that_is_refused() {
        let text = features(&Supported {
            seccomp_archs: &["SCMP_ARCH_X86_64"],
            version: "0.1.0",
            ..Supported::default()
        });
        let parsed: oci_spec::runtime::Features = serde_json::from_str(&text).unwrap();
        assert_eq!(parsed.oci_version_min(), "1.0.0");
        let options = parsed.mount_options().as_ref().unwrap();
        assert!(options.iter().any(|option| option == "rro"));
        assert!(!options.iter().any(|option| option == "idmap"));
        let linux = parsed.linux().as_ref().unwrap();
        assert_eq!(linux.capabilities().as_ref().unwrap().len(), 41);
        let actions = linux.seccomp().as_ref().unwrap().actions().as_ref().unwrap();
        assert!(!actions.contains(&oci_spec::runtime::LinuxSeccompAction::ScmpActNotify));
        assert!(text.starts_with("{\n    \"ociVersionMin\""));
    }
}
