//! Containers: their life, their ends, what their program finds.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::image::ImageSpec;
use coracle_integration::{Node, Options, request};
use coracle_proto::cri::{
    ContainerConfig, ContainerState, Int64Value, KeyValue, LinuxContainerSecurityContext, Mount,
};
use serde_json::json;

use crate::support::join_all;

crate::tests![
    life_of_a_container,
    life_on_the_old_mount_call,
    the_same_request_joins_or_gets_the_result,
    a_program_that_is_not_there,
    exit_codes_and_reasons,
    what_the_program_finds,
    mounts,
    users_and_groups,
    out_of_memory,
    a_stopped_pod_takes_no_container,
];

/// The way of older kernels: mount(2) in a namespace of its own, cloned out of it.
async fn life_on_the_old_mount_call() -> Result<()> {
    let options = Options {
        config: "[runtime]\nmount_api = \"legacy\"\n".to_owned(),
        ..Options::default()
    };
    let mut node = Node::with_busybox(options).await?;
    let config = request::pod("legacy", &node.logs);
    let pod = node.run_pod(&config).await?;
    let writer = request::container("main", "echo kept > /file; sleep 1000");
    let id = node.run_container(&pod, &writer, &config).await?;
    node.restart().await?;
    let second = node
        .run_container(&pod, &request::container("second", "ls /file"), &config)
        .await?;
    ensure!(
        node.wait_exit(&second, Duration::from_secs(10)).await?.exit_code == 1,
        "two containers share a writable layer"
    );
    let answer = node.exec(&id, &["cat", "/file"], 10).await?;
    ensure!(answer.stdout == b"kept\n", "{answer:?}");
    let host = std::fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!host.contains("overlay"), "the host's table shows it:\n{host}");
    node.finish().await
}

async fn life_of_a_container() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("life", &node.logs);
    let pod = node.run_pod(&config).await?;
    let wanted = request::container(
        "main",
        "trap 'exit 5' TERM; echo started; while true; do sleep 0.05; done",
    );
    let id = node.create(&pod, &wanted, &config).await?;
    let created = node.status(&id).await?;
    ensure!(created.state() == ContainerState::ContainerCreated, "{created:?}");
    ensure!(
        created.created_at > 0 && created.started_at == 0 && created.finished_at == 0,
        "{created:?}"
    );
    ensure!(
        created.labels == wanted.labels && created.metadata == wanted.metadata,
        "{created:?}"
    );
    ensure!(
        !created.image_ref.is_empty() && !created.image_id.is_empty(),
        "{created:?}"
    );
    ensure!(
        !created.image.clone().context("no image")?.image.is_empty(),
        "{created:?}"
    );
    ensure!(
        created.log_path == format!("{}/main/0.log", config.log_directory),
        "{}",
        created.log_path
    );

    node.start_container(&id).await?;
    let running = node.status(&id).await?;
    ensure!(running.state() == ContainerState::ContainerRunning, "{running:?}");
    ensure!(running.started_at >= running.created_at, "{running:?}");
    ensure!(
        std::path::Path::new(&running.log_path).exists(),
        "no log when start returns"
    );
    node.wait_log(&running, "started", Duration::from_secs(5)).await?;
    // The same request again gets the result of the first.
    node.start_container(&id).await?;
    ensure!(node.status(&id).await? == running, "it was started twice");

    node.stop_container(&id, 10).await?;
    let exited = node.status(&id).await?;
    ensure!(exited.state() == ContainerState::ContainerExited, "{exited:?}");
    ensure!(
        exited.finished_at >= exited.started_at && exited.exit_code == 5,
        "{exited:?}"
    );
    ensure!(exited.reason == "Error", "{exited:?}");
    node.stop_container(&id, 1).await?;
    node.remove_container(&id).await?;
    ensure!(node.container_ids().await?.is_empty(), "it is listed still");
    node.finish().await
}

async fn the_same_request_joins_or_gets_the_result() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("retry", &node.logs);
    let pod = node.run_pod(&config).await?;
    let wanted = request::container("main", "sleep 1000");
    let ids = join_all((0..5).map(|_| node.create(&pod, &wanted, &config)).collect()).await?;
    ensure!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    ensure!(
        node.create(&pod, &wanted, &config).await? == ids[0],
        "not the result of the first"
    );
    // Another request of the same name undoes the first.
    let other = request::container("main", "sleep 2000");
    let second = node.create(&pod, &other, &config).await?;
    ensure!(
        second != ids[0] && node.container_ids().await? == [second],
        "the first one is there still"
    );
    // The next attempt is another container.
    let mut next = wanted.clone();
    next.metadata.as_mut().context("no metadata")?.attempt = 1;
    node.create(&pod, &next, &config).await?;
    ensure!(node.container_ids().await?.len() == 2, "not two attempts");
    node.finish().await
}

async fn a_program_that_is_not_there() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("missing", &node.logs);
    let pod = node.run_pod(&config).await?;
    // What is not there is told when the container is created.
    let missing = ContainerConfig {
        command: vec!["/no/such/program".into()],
        ..request::container("missing", "")
    };
    let error = node
        .create(&pod, &missing, &config)
        .await
        .unwrap_err()
        .to_string();
    ensure!(error.contains("/no/such/program"), "{error}");
    ensure!(
        node.container_ids().await?.is_empty(),
        "a failed creation is listed"
    );

    // What is no program is told when it is executed.
    let volume = node.dir.join("volume");
    std::fs::create_dir_all(&volume)?;
    std::fs::write(volume.join("nonsense"), b"\x7fELF and then nothing")?;
    std::fs::set_permissions(
        volume.join("nonsense"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let mut wanted = ContainerConfig {
        command: vec!["/v/nonsense".into()],
        ..request::container("main", "")
    };
    wanted.mounts = vec![Mount {
        host_path: volume.to_string_lossy().into_owned(),
        container_path: "/v".into(),
        ..Default::default()
    }];
    let id = node.create(&pod, &wanted, &config).await?;
    let error = node.start_container(&id).await.unwrap_err().to_string();
    ensure!(error.contains("exec format error"), "{error}");
    let status = node.status(&id).await?;
    ensure!(status.state() == ContainerState::ContainerExited, "{status:?}");
    ensure!(
        status.exit_code == 128 && status.reason == "StartError" && !status.message.is_empty(),
        "{status:?}"
    );
    node.finish().await
}

async fn exit_codes_and_reasons() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("exits", &node.logs);
    let pod = node.run_pod(&config).await?;
    for (name, script, code, reason) in [
        ("zero", "true", 0, "Completed"),
        ("fortytwo", "exit 42", 42, "Error"),
        ("killed", "kill -9 $$", 137, "Error"),
        ("termed", "kill $$", 143, "Error"),
    ] {
        // As pid 1 a shell is not killed by its own signals: its child is.
        let script = format!("sh -c '{script}'; code=$?; [ $code -gt 128 ] && exit $code; exit $code");
        let id = node
            .run_container(&pod, &request::container(name, &script), &config)
            .await?;
        let status = node.wait_exit(&id, Duration::from_secs(10)).await?;
        ensure!(
            status.exit_code == code && status.reason == reason,
            "{name}: {status:?}"
        );
    }
    node.finish().await
}

async fn what_the_program_finds() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let mut image = ImageSpec::busybox("test.local/env:latest");
    image.config = json!({
        "Env": ["PATH=/bin", "FROM_IMAGE=1", "BOTH=image"],
        "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": ["echo default command"],
        "WorkingDir": "/var/lib/work",
    });
    node.import(&image).await?;
    let config = request::pod("finds", &node.logs);
    let pod = node.run_pod(&config).await?;
    let with_image = |name: &str, args: &[&str]| {
        let mut container = request::container(name, "");
        container.command.clear();
        container.args = args.iter().map(|arg| (*arg).to_owned()).collect();
        if let Some(image) = container.image.as_mut() {
            image.image = "test.local/env:latest".into();
        }
        container.envs = vec![
            KeyValue {
                key: "BOTH".into(),
                value: "request".into(),
            },
            KeyValue {
                key: "LINES".into(),
                value: b"a b=c".to_vec(),
            },
        ];
        container
    };
    let id = node
        .run_container(&pod, &with_image("default", &[]), &config)
        .await?;
    let status = node.wait_exit(&id, Duration::from_secs(10)).await?;
    node.wait_log(&status, "default command", Duration::from_secs(5))
        .await?;
    let script = "pwd; echo $FROM_IMAGE $BOTH \"$LINES\" $HOSTNAME; ls /proc/self/fd | wc -l; cat /proc/1/oom_score_adj; echo done";
    let id = node
        .run_container(&pod, &with_image("args", &[script]), &config)
        .await?;
    let status = node.wait_exit(&id, Duration::from_secs(10)).await?;
    let log = node.wait_log(&status, "done", Duration::from_secs(5)).await?;
    // 0, 1, 2 and the directory itself.
    for line in ["/var/lib/work", "1 request a b=c finds", "4", "1000"] {
        ensure!(
            log.lines().any(|found| found.ends_with(&format!(" F {line}"))),
            "no {line:?} in\n{log}"
        );
    }
    node.finish().await
}

async fn mounts() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("mounts", &node.logs);
    let pod = node.run_pod(&config).await?;
    let host = node.dir.join("volume");
    std::fs::create_dir_all(&host)?;
    std::fs::write(host.join("given"), "from the host\n")?;
    std::os::unix::fs::symlink(&host, node.dir.join("link"))?;
    let mount = |host: std::path::PathBuf, inside: &str, readonly: bool| Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.into(),
        readonly,
        ..Default::default()
    };
    let script = "cat /rw/given /ro/given; echo back > /rw/made; echo x > /ro/made; echo \"ro: $?\"; echo x > /root-file; echo \"root: $?\"; echo done";
    let mut container = request::container("main", script);
    container.mounts = vec![
        mount(host.clone(), "/rw", false),
        mount(node.dir.join("link"), "/ro", true),
        mount(node.dir.join("absent/deep"), "/deep/er", false),
    ];
    if let Some(context) = container
        .linux
        .as_mut()
        .and_then(|linux| linux.security_context.as_mut())
    {
        context.readonly_rootfs = true;
    }
    let id = node.run_container(&pod, &container, &config).await?;
    let status = node.wait_exit(&id, Duration::from_secs(10)).await?;
    let log = node.wait_log(&status, "done", Duration::from_secs(5)).await?;
    ensure!(log.matches("from the host").count() == 2, "{log}");
    ensure!(log.contains("ro: 1") && log.contains("root: 1"), "{log}");
    ensure!(
        std::fs::read_to_string(host.join("made"))? == "back\n",
        "nothing was written"
    );
    ensure!(
        node.dir.join("absent/deep").is_dir(),
        "the absent source was not made"
    );
    ensure!(
        status.mounts.len() == 3 && status.mounts[1].host_path == host.to_string_lossy(),
        "{:?}",
        status.mounts
    );
    node.finish().await
}

async fn users_and_groups() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("users", &node.logs);
    let pod = node.run_pod(&config).await?;
    let run = async |name: &str, change: &dyn Fn(&mut LinuxContainerSecurityContext)| -> Result<String> {
        let mut container = request::container(
            name,
            "id; grep -E 'NoNewPrivs|CapEff' /proc/self/status; echo done",
        );
        change(
            container
                .linux
                .as_mut()
                .and_then(|l| l.security_context.as_mut())
                .context("no context")?,
        );
        let id = node.run_container(&pod, &container, &config).await?;
        let status = node.wait_exit(&id, Duration::from_secs(10)).await?;
        node.wait_log(&status, "done", Duration::from_secs(5)).await
    };
    let root = run("root", &|_| {}).await?;
    ensure!(root.contains("uid=0(root) gid=0(root)"), "{root}");
    let number = run("number", &|c| {
        c.run_as_user = Some(Int64Value { value: 1000 });
        c.supplemental_groups = vec![77];
        c.no_new_privs = true;
    })
    .await?;
    ensure!(number.contains("uid=1000(user) gid=1000(user)"), "{number}");
    ensure!(
        number.contains("5000(extra)") && number.contains("77"),
        "{number}"
    );
    ensure!(
        number.contains("NoNewPrivs:\t1") && number.contains("CapEff:\t0000000000000000"),
        "{number}"
    );
    let name = run("name", &|c| c.run_as_username = "user".into()).await?;
    ensure!(
        name.contains("uid=1000(user)") && name.contains("NoNewPrivs:\t0"),
        "{name}"
    );
    let absent = run("absent", &|c| c.run_as_username = "nobody-knows".into()).await;
    ensure!(absent.is_err(), "an unknown user was taken");
    node.finish().await
}

async fn out_of_memory() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("oom", &node.logs);
    let pod = node.run_pod(&config).await?;
    let mut container = request::container("main", "exec dd if=/dev/zero of=/dev/null bs=60M count=10");
    let resources = container
        .linux
        .as_mut()
        .and_then(|linux| linux.resources.as_mut())
        .context("no resources")?;
    resources.memory_limit_in_bytes = 15 << 20;
    resources.memory_swap_limit_in_bytes = 15 << 20;
    let id = node.run_container(&pod, &container, &config).await?;
    let status = node.wait_exit(&id, Duration::from_secs(20)).await?;
    ensure!(
        status.exit_code == 137 && status.reason == "OOMKilled",
        "{status:?}"
    );
    let shown = status
        .resources
        .context("no resources")?
        .linux
        .context("no linux")?;
    ensure!(shown.memory_limit_in_bytes == 15 << 20, "{shown:?}");
    node.finish().await
}

async fn a_stopped_pod_takes_no_container() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("stopped", &node.logs);
    let pod = node.run_pod(&config).await?;
    let created = node
        .create(&pod, &request::container("created", "sleep 1000"), &config)
        .await?;
    node.stop_pod(&pod).await?;
    let error = node
        .create(&pod, &request::container("late", "true"), &config)
        .await
        .unwrap_err();
    ensure!(error.code() == tonic::Code::FailedPrecondition, "{error}");
    ensure!(
        node.start_container(&created).await.is_err(),
        "started in a stopped pod"
    );
    let absent = node
        .create(&"e".repeat(64), &request::container("x", "true"), &config)
        .await
        .unwrap_err();
    ensure!(absent.code() == tonic::Code::NotFound, "{absent}");
    node.finish().await
}
