//! Requests that nobody in their right mind would send: a clear error, nothing half-made, and the daemon goes on.

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{Node, Options, leaks, request};
use coracle_proto::cri::{
    ContainerConfig, CreateContainerRequest, Device, DnsConfig, ExecSyncRequest, ImageSpec, KeyValue, Mount,
    PodSandboxConfig, RunPodSandboxRequest, SecurityProfile, security_profile::ProfileType,
};
use tonic::Code;

crate::tests![pods_that_cannot_be, containers_that_cannot_be, ids_that_are_none];

type PodChange = Box<dyn Fn(&mut PodSandboxConfig)>;
type ContainerChange = Box<dyn Fn(&mut ContainerConfig)>;

async fn pods_that_cannot_be() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let changes: Vec<(&str, PodChange)> = vec![
        ("no metadata", Box::new(|c| c.metadata = None)),
        ("an empty name", Box::new(|c| name(c, ""))),
        ("a name with a slash", Box::new(|c| name(c, "a/../b"))),
        ("a name with a line break", Box::new(|c| name(c, "a\nb"))),
        ("a huge name", Box::new(|c| name(c, &"x".repeat(100_000)))),
        (
            "a host name with white space",
            Box::new(|c| c.hostname = "a b".into()),
        ),
        ("a huge host name", Box::new(|c| c.hostname = "h".repeat(300))),
        (
            "a resolver line of its own",
            Box::new(|c| {
                c.dns_config = Some(DnsConfig {
                    servers: vec!["1.1.1.1\noptions x".into()],
                    ..Default::default()
                });
            }),
        ),
        (
            "a sysctl of the whole host",
            Box::new(|c| sysctl(c, "kernel.core_pattern", "|/bin/evil")),
        ),
        (
            "a sysctl with a path",
            Box::new(|c| sysctl(c, "net/../kernel/core_pattern", "x")),
        ),
        (
            "a cgroup parent that leaves",
            Box::new(|c| cgroup(c, "/a/../../../b")),
        ),
    ];
    for (what, change) in changes {
        let mut config = request::pod("hostile", &node.logs);
        change(&mut config);
        let request = RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: String::new(),
        };
        let outcome = node.runtime().run_pod_sandbox(request).await;
        // A parent that leaves its hierarchy is told at the latest when something is put there.
        if what != "a cgroup parent that leaves" {
            let error = outcome.err().with_context(|| format!("{what} was taken"))?;
            ensure!(error.code() == Code::InvalidArgument, "{what}: {error}");
        }
        for pod in node.pod_ids().await? {
            node.remove_pod(&pod).await?;
        }
        let left = leaks::pod_files(&node.dir);
        ensure!(left.is_empty(), "{what}: {left:?}");
    }
    let empty = node
        .runtime()
        .run_pod_sandbox(RunPodSandboxRequest::default())
        .await;
    ensure!(empty.is_err(), "an empty request was taken");
    node.finish().await
}

fn name(config: &mut PodSandboxConfig, name: &str) {
    if let Some(metadata) = config.metadata.as_mut() {
        metadata.name = name.into();
    }
}

fn sysctl(config: &mut PodSandboxConfig, name: &str, value: &str) {
    if let Some(linux) = config.linux.as_mut() {
        linux.sysctls.insert(name.into(), value.into());
    }
}

fn cgroup(config: &mut PodSandboxConfig, parent: &str) {
    if let Some(linux) = config.linux.as_mut() {
        linux.cgroup_parent = parent.into();
    }
}

async fn containers_that_cannot_be() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("hostile", &node.logs);
    let pod = node.run_pod(&config).await?;
    let clean = leaks::pod_files(&node.dir);
    let mount = |host: &str, inside: &str| {
        let mount = Mount {
            host_path: host.into(),
            container_path: inside.into(),
            ..Default::default()
        };
        Box::new(move |c: &mut ContainerConfig| c.mounts = vec![mount.clone()]) as ContainerChange
    };
    let changes: Vec<(&str, ContainerChange)> = vec![
        ("no metadata", Box::new(|c| c.metadata = None)),
        ("no image", Box::new(|c| c.image = None)),
        (
            "an image that is not there",
            Box::new(|c| image(c, "no.such/image:latest")),
        ),
        (
            "an image name of nonsense",
            Box::new(|c| image(c, "../../etc/passwd")),
        ),
        (
            "a log that leaves its directory",
            Box::new(|c| c.log_path = "../../../etc/cron.d/x".into()),
        ),
        (
            "an absolute log",
            Box::new(|c| c.log_path = "/etc/cron.d/x".into()),
        ),
        ("a relative mount source", mount("etc", "/x")),
        ("a mount of nothing", mount("", "/x")),
        ("a mount without a destination", mount("/tmp", "")),
        (
            "a device that is a file",
            Box::new(|c| device(c, "/etc/passwd", "rwm")),
        ),
        (
            "a device that is not there",
            Box::new(|c| device(c, "/dev/no-such-device", "rwm")),
        ),
        (
            "a device with odd permissions",
            Box::new(|c| device(c, "/dev/null", "xyz")),
        ),
        (
            "an environment without a name",
            Box::new(|c| {
                c.envs = vec![KeyValue {
                    key: String::new(),
                    value: b"x".to_vec(),
                }];
            }),
        ),
        (
            "an environment with NUL",
            Box::new(|c| {
                c.envs = vec![KeyValue {
                    key: "A".into(),
                    value: b"x\0y".to_vec(),
                }];
            }),
        ),
        (
            "an argument with NUL",
            Box::new(|c| c.command = vec!["/bin/sh\0".into()]),
        ),
        (
            "a seccomp profile that is not there",
            Box::new(|c| seccomp(c, "/no/such/profile.json")),
        ),
        (
            "a seccomp profile that is none",
            Box::new(|c| seccomp(c, "/etc/passwd")),
        ),
        ("a seccomp profile without a name", Box::new(|c| seccomp(c, ""))),
        (
            "an endless seccomp profile",
            Box::new(|c| seccomp(c, "/dev/zero")),
        ),
        (
            "a group without a user",
            Box::new(|c| {
                if let Some(context) = c.linux.as_mut().and_then(|linux| linux.security_context.as_mut()) {
                    context.run_as_group = Some(coracle_proto::cri::Int64Value { value: 5 });
                }
            }),
        ),
        (
            "a negative user",
            Box::new(|c| {
                if let Some(context) = c.linux.as_mut().and_then(|linux| linux.security_context.as_mut()) {
                    context.run_as_user = Some(coracle_proto::cri::Int64Value { value: -1 });
                }
            }),
        ),
        (
            "more privileges than its pod",
            Box::new(|c| {
                if let Some(context) = c.linux.as_mut().and_then(|linux| linux.security_context.as_mut()) {
                    context.privileged = true;
                }
            }),
        ),
    ];
    for (what, change) in changes {
        let mut container = request::container("main", "true");
        change(&mut container);
        let request = request::create(&pod, &container, &config);
        let error = node
            .runtime()
            .create_container(request)
            .await
            .err()
            .with_context(|| format!("{what} was taken"))?;
        let code = error.code();
        ensure!(
            matches!(code, Code::InvalidArgument | Code::NotFound | Code::Unknown),
            "{what}: {error}"
        );
        ensure!(!error.message().is_empty(), "{what}: no text");
        ensure!(node.container_ids().await?.is_empty(), "{what}: it is listed");
        let left = leaks::pod_files(&node.dir);
        ensure!(left == clean, "{what}: {left:?}");
    }
    let empty = CreateContainerRequest {
        pod_sandbox_id: pod.clone(),
        ..Default::default()
    };
    ensure!(
        node.runtime().create_container(empty).await.is_err(),
        "an empty request was taken"
    );
    node.run_container(&pod, &request::container("main", "sleep 1000"), &config)
        .await?;
    node.finish().await
}

fn image(config: &mut ContainerConfig, name: &str) {
    config.image = Some(ImageSpec {
        image: name.into(),
        ..Default::default()
    });
}

fn device(config: &mut ContainerConfig, host: &str, permissions: &str) {
    config.devices = vec![Device {
        container_path: "/dev/x".into(),
        host_path: host.into(),
        permissions: permissions.into(),
    }];
}

fn seccomp(config: &mut ContainerConfig, path: &str) {
    if let Some(context) = config
        .linux
        .as_mut()
        .and_then(|linux| linux.security_context.as_mut())
    {
        context.seccomp = Some(SecurityProfile {
            profile_type: ProfileType::Localhost.into(),
            localhost_ref: path.into(),
        });
    }
}

async fn ids_that_are_none() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    for id in ["", "/", "../../etc", "\0", "*", &"a".repeat(100_000), "Ж"] {
        ensure!(node.status(id).await.is_err(), "{id:.20} has a status");
        ensure!(node.pod_status(id).await.is_err(), "{id:.20} has a pod status");
        ensure!(node.start_container(id).await.is_err(), "{id:.20} was started");
        let request = ExecSyncRequest {
            container_id: id.into(),
            cmd: vec!["true".into()],
            timeout: 1,
        };
        ensure!(
            node.runtime().exec_sync(request).await.is_err(),
            "{id:.20} was entered"
        );
        node.stop_pod(id).await?;
        node.remove_pod(id).await?;
    }
    node.finish().await
}
