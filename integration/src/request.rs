//! The messages of a kubelet, with little in them.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use coracle_proto::cri::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ImageSpec, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    RunPodSandboxRequest,
};

/// The image that most tests run.
pub const BUSYBOX: &str = "test.local/busybox:latest";

static UNIQUE: AtomicU32 = AtomicU32::new(0);

/// Each container its own pid namespace, as a kubelet asks for by default.
#[must_use]
pub fn namespaces() -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    }
}

/// A pod with nothing unusual; its logs are in `logs` itself.
#[must_use]
pub fn pod_config(name: &str, logs: &Path) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            uid: format!("uid-{name}"),
            namespace: "test".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        log_directory: logs.to_string_lossy().into_owned(),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A pod with a uid and a log directory of its own below `logs`, a label and an annotation.
#[must_use]
pub fn pod(name: &str, logs: &Path) -> PodSandboxConfig {
    let number = UNIQUE.fetch_add(1, Ordering::Relaxed);
    let mut config = pod_config(name, &logs.join(format!("{name}-{number}")));
    if let Some(metadata) = config.metadata.as_mut() {
        metadata.uid = format!("uid-{number}");
    }
    config.labels.insert("app".into(), name.into());
    config.annotations.insert("note".into(), "kept as it is".into());
    config
}

/// A RunPodSandbox request.
#[must_use]
pub fn run(config: &PodSandboxConfig) -> RunPodSandboxRequest {
    RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: String::new(),
    }
}

/// A container that runs `command`; its log is `<name>.log`.
#[must_use]
pub fn container_config(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: image.into(),
            ..Default::default()
        }),
        command: command.iter().map(|&word| word.into()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A busybox container that runs `sh -c script`, with a label; its log is `<name>/0.log`.
#[must_use]
pub fn container(name: &str, script: &str) -> ContainerConfig {
    let mut config = container_config(name, BUSYBOX, &["/bin/sh", "-c", script]);
    config.log_path = format!("{name}/0.log");
    config.labels.insert("container".into(), name.into());
    if let Some(linux) = config.linux.as_mut() {
        linux.resources = Some(LinuxContainerResources {
            oom_score_adj: 1000,
            ..Default::default()
        });
    }
    config
}

/// A CreateContainer request.
#[must_use]
pub fn create(pod: &str, config: &ContainerConfig, sandbox: &PodSandboxConfig) -> CreateContainerRequest {
    CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config: Some(config.clone()),
        sandbox_config: Some(sandbox.clone()),
    }
}
