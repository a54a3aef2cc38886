//! The messages of a kubelet, with little in them.

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

/// A pod with a name and uid of its own.
#[must_use]
pub fn pod(name: &str, logs: &std::path::Path) -> PodSandboxConfig {
    let number = UNIQUE.fetch_add(1, Ordering::Relaxed);
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            uid: format!("uid-{number}"),
            namespace: "test".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        log_directory: logs
            .join(format!("{name}-{number}"))
            .to_string_lossy()
            .into_owned(),
        labels: [("app".to_owned(), name.to_owned())].into(),
        annotations: [("note".to_owned(), "kept as it is".to_owned())].into(),
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

/// A RunPodSandbox request.
#[must_use]
pub fn run(config: &PodSandboxConfig) -> RunPodSandboxRequest {
    RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: String::new(),
    }
}

/// A busybox container that runs `sh -c script`.
#[must_use]
pub fn container(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: BUSYBOX.into(),
            ..Default::default()
        }),
        command: vec!["/bin/sh".into(), "-c".into(), script.into()],
        log_path: format!("{name}/0.log"),
        labels: [("container".to_owned(), name.to_owned())].into(),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources {
                oom_score_adj: 1000,
                ..Default::default()
            }),
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
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
