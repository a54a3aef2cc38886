//! The daemon dies and comes back; so does the node.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::leaks::{self, Snapshot};
use coracle_integration::{Node, Options, request};
use coracle_kernel::mount_old::{self, Flags};
use coracle_kernel::signal::{self, Signal};
use coracle_proto::cri::{ContainerState, Mount, PodSandboxState, ReopenContainerLogRequest};

use crate::support::{eventually, monitor_of};

crate::tests![
    pods_live_on,
    an_exit_while_the_daemon_is_away_is_known_afterwards,
    no_byte_of_a_log_is_lost,
    a_new_runtime_reaches_running_pods,
    a_clean_shutdown_leaves_the_pods,
    a_created_container_is_started_by_the_next_daemon,
    after_a_reboot_nothing_is_ready_and_nothing_is_left,
    a_lost_database_is_made_good_within_the_boot,
    with_both_copies_lost_nothing_is_left,
];

async fn pods_live_on() -> Result<()> {
    let mut node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("restart", &node.logs);
    let pod = node.run_pod(&config).await?;
    let id = node
        .run_container(&pod, &request::container("main", "sleep 1000"), &config)
        .await?;
    let (pod_before, before) = (node.pod_status(&pod).await?, node.status(&id).await?);
    for _ in 0..3 {
        let begun = Instant::now();
        node.restart().await?;
        println!("    back after {:.0} ms", begun.elapsed().as_secs_f64() * 1e3);
        ensure!(
            node.pod_status(&pod).await? == pod_before,
            "{:?}",
            node.pod_status(&pod).await?
        );
        ensure!(node.status(&id).await? == before, "{:?}", node.status(&id).await?);
        ensure!(
            node.exec(&id, &["echo", "alive"], 10).await?.stdout == b"alive\n",
            "no exec"
        );
        // The pod takes new containers still, and the retry of an old request finds its result.
        ensure!(node.run_pod(&config).await? == pod, "the request was forgotten");
    }
    let more = node
        .run_container(&pod, &request::container("more", "exit 5"), &config)
        .await?;
    ensure!(
        node.wait_exit(&more, Duration::from_secs(10)).await?.exit_code == 5,
        "wrong exit code"
    );
    node.stop_container(&id, 0).await?;
    ensure!(
        node.status(&id).await?.exit_code == 137,
        "{:?}",
        node.status(&id).await?
    );
    node.finish().await
}

async fn an_exit_while_the_daemon_is_away_is_known_afterwards() -> Result<()> {
    let mut node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("away", &node.logs);
    let pod = node.run_pod(&config).await?;
    let host = node.dir.join("volume");
    std::fs::create_dir_all(&host)?;
    let script = "while [ ! -e /v/go ]; do sleep 0.02; done; echo going; exit 42";
    let mut main = request::container("main", script);
    main.mounts = vec![Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: "/v".into(),
        ..Default::default()
    }];
    let id = node.run_container(&pod, &main, &config).await?;
    let other = node
        .run_container(&pod, &request::container("other", "sleep 1000"), &config)
        .await?;
    let running = node.status(&id).await?;
    // It ends when nobody is there to see it.
    node.kill()?;
    std::fs::write(host.join("go"), "")?;
    node.wait_log(&running, "going", Duration::from_secs(10)).await?;
    tokio::time::sleep(Duration::from_millis(100)).await;
    node.spawn().await?;
    let status = node.wait_exit(&id, Duration::from_secs(5)).await?;
    ensure!(status.exit_code == 42 && status.reason == "Error", "{status:?}");
    ensure!(
        node.status(&other).await?.state() == ContainerState::ContainerRunning,
        "the other one ended"
    );
    node.finish().await
}

async fn no_byte_of_a_log_is_lost() -> Result<()> {
    let mut node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("log", &node.logs);
    let pod = node.run_pod(&config).await?;
    const LINES: usize = 100_000;
    let id = node
        .run_container(
            &pod,
            &request::container("main", &format!("seq 1 {LINES}; echo over")),
            &config,
        )
        .await?;
    let status = node.status(&id).await?;
    node.kill()?;
    node.wait_log(&status, "over", Duration::from_secs(60)).await.ok();
    node.spawn().await?;
    node.wait_exit(&id, Duration::from_secs(30)).await?;
    let log = std::fs::read_to_string(&status.log_path)?;
    ensure!(log.lines().count() == LINES + 1, "{} lines", log.lines().count());
    let request = ReopenContainerLogRequest { container_id: id };
    ensure!(
        node.runtime().reopen_container_log(request).await.is_err(),
        "an exited container's log was reopened"
    );
    node.finish().await
}

async fn a_new_runtime_reaches_running_pods() -> Result<()> {
    const LINES: usize = 1_000_000;
    let mut node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("upgrade", &node.logs);
    let pod = node.run_pod(&config).await?;
    let writer = request::container("main", &format!("seq 1 {LINES}; exit 7"));
    let id = node.run_container(&pod, &writer, &config).await?;
    let program = |pid: i32| std::fs::read_link(format!("/proc/{pid}/exe"));
    let monitor = monitor_of(&node, &pod).await?;
    let before = program(monitor)?;
    node.restart().await?;
    ensure!(program(monitor)? == before, "the same program was executed again");

    // The same code with one byte behind its end: another program.
    let next = node.dir.join("coracle");
    std::fs::copy(coracle_integration::node::binary("coracle"), &next)?;
    std::fs::OpenOptions::new()
        .append(true)
        .open(&next)?
        .write_all(b"\n")?;
    let drop_ins = node.dir.join("config.d");
    std::fs::create_dir_all(&drop_ins)?;
    let text = format!("[runtime]\nbinary = {:?}\n", next.display().to_string());
    std::fs::write(drop_ins.join("runtime.toml"), text)?;
    node.restart().await?;
    ensure!(
        monitor_of(&node, &pod).await? == monitor && program(monitor)? != before,
        "the monitor runs {} still",
        before.display()
    );
    let status = node.wait_exit(&id, Duration::from_secs(60)).await?;
    ensure!(status.exit_code == 7, "{status:?}");
    let log = std::fs::read_to_string(&status.log_path)?;
    let mut expected = 1;
    for line in log.lines() {
        let number = line.rsplit(' ').next().and_then(|number| number.parse().ok());
        ensure!(number == Some(expected), "after {} came {line:?}", expected - 1);
        expected += 1;
    }
    ensure!(expected == LINES + 1, "{} lines", expected - 1);
    // What the monitor is now makes containers and runs commands in them.
    let more = node
        .run_container(&pod, &request::container("more", "sleep 1000"), &config)
        .await?;
    ensure!(
        node.exec(&more, &["echo", "alive"], 10).await?.stdout == b"alive\n",
        "no exec"
    );
    node.finish().await
}

async fn a_clean_shutdown_leaves_the_pods() -> Result<()> {
    let mut node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("clean", &node.logs);
    let pod = node.run_pod(&config).await?;
    let id = node
        .run_container(&pod, &request::container("main", "sleep 1000"), &config)
        .await?;
    node.terminate().await?;
    node.spawn().await?;
    ensure!(
        node.status(&id).await?.state() == ContainerState::ContainerRunning,
        "{:?}",
        node.status(&id).await?
    );
    node.finish().await
}

async fn a_created_container_is_started_by_the_next_daemon() -> Result<()> {
    let mut node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("created", &node.logs);
    let pod = node.run_pod(&config).await?;
    let id = node
        .create(&pod, &request::container("main", "exit 9"), &config)
        .await?;
    node.restart().await?;
    ensure!(
        node.status(&id).await?.state() == ContainerState::ContainerCreated,
        "{:?}",
        node.status(&id).await?
    );
    node.start_container(&id).await?;
    ensure!(
        node.wait_exit(&id, Duration::from_secs(10)).await?.exit_code == 9,
        "wrong exit code"
    );
    node.finish().await
}

async fn after_a_reboot_nothing_is_ready_and_nothing_is_left() -> Result<()> {
    let before = leaks::snapshot_here()?;
    let mut node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("reboot", &node.logs);
    let pod = node.run_pod(&config).await?;
    let address = node.pod_status(&pod).await?.network.context("no network")?.ip;
    let id = node
        .run_container(&pod, &request::container("main", "sleep 1000"), &config)
        .await?;
    node.kill()?;
    power_cut(&node, &before)?;
    let boot = node.dir.join("boot_id");
    std::fs::write(&boot, "11111111-2222-3333-4444-555555555555\n")?;
    let target = Path::new("/proc/sys/kernel/random/boot_id");
    mount_old::mount_at(
        &std::ffi::CString::new(boot.to_string_lossy().as_bytes())?,
        target,
        c"",
        Flags::BIND,
        c"",
    )?;
    let rebooted = async {
        node.spawn().await?;
        let status = node.pod_status(&pod).await?;
        ensure!(status.state() == PodSandboxState::SandboxNotready, "{status:?}");
        let status = node.status(&id).await?;
        ensure!(
            status.state() == ContainerState::ContainerExited && status.exit_code != 0,
            "{status:?}"
        );
        let mut next = config.clone();
        next.metadata.as_mut().context("no metadata")?.attempt = 1;
        let second = node.run_pod(&next).await?;
        ensure!(
            node.pod_status(&second).await?.created_at > node.pod_status(&pod).await?.created_at,
            "not newer"
        );
        // The old address is free again: it is the first one to be given.
        println!(
            "    address before {address}, after {}",
            node.pod_status(&second).await?.network.context("none")?.ip
        );
        node.finish().await
    };
    let outcome = rebooted.await;
    coracle_kernel::mount::detach(target)?;
    outcome
}

/// What a power cut takes: every process, the state directory, namespaces, links, cgroups.
fn power_cut(node: &Node, before: &Snapshot) -> Result<()> {
    for _ in 0..100 {
        let now = leaks::snapshot_here()?;
        let added = |kind: &str| {
            now.of(kind)
                .difference(&before.of(kind))
                .cloned()
                .collect::<Vec<_>>()
        };
        let (processes, cgroups) = (added("process"), added("cgroup"));
        for process in &processes {
            if let Some(pid) = process.split(' ').next().and_then(|pid| pid.parse().ok()) {
                let _ = signal::kill(pid, Signal::KILL);
            }
        }
        for cgroup in cgroups.iter().rev() {
            let _ = std::fs::remove_dir(cgroup);
        }
        for namespace in added("network namespace") {
            let path = Path::new("/run/netns").join(namespace);
            let _ = coracle_kernel::mount::detach(&path);
            let _ = std::fs::remove_file(path);
        }
        if processes.is_empty() && cgroups.is_empty() {
            break;
        }
        #[allow(
            clippy::disallowed_methods,
            reason = "the oracle looks at /proc, which tells nobody"
        )]
        std::thread::sleep(Duration::from_millis(20));
    }
    std::fs::remove_dir_all(node.state())?;
    Ok(())
}

async fn a_lost_database_is_made_good_within_the_boot() -> Result<()> {
    let mut node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("damage", &node.logs);
    let pod = node.run_pod(&config).await?;
    let id = node
        .run_container(&pod, &request::container("main", "sleep 1000"), &config)
        .await?;
    let (pod_before, before) = (node.pod_status(&pod).await?, node.status(&id).await?);
    node.kill()?;
    std::fs::write(node.root().join("meta.db"), b"garbage".repeat(1000))?;
    node.spawn().await?;
    ensure!(
        node.pod_status(&pod).await? == pod_before,
        "{:?}",
        node.pod_status(&pod).await?
    );
    ensure!(node.status(&id).await? == before, "{:?}", node.status(&id).await?);
    node.finish().await
}

async fn with_both_copies_lost_nothing_is_left() -> Result<()> {
    let mut node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("lost", &node.logs);
    let pod = node.run_pod(&config).await?;
    node.run_container(&pod, &request::container("main", "sleep 1000"), &config)
        .await?;
    node.kill()?;
    std::fs::write(node.root().join("meta.db"), b"garbage".repeat(1000))?;
    std::fs::remove_file(node.state().join("volatile.db"))?;
    node.spawn().await?;
    eventually(async || {
        let left = leaks::pod_files(&node.dir);
        ensure!(node.pod_ids().await?.is_empty() && left.is_empty(), "{left:?}");
        Ok(())
    })
    .await?;
    node.finish().await
}
