//! Monitors that die or fall silent, steps that hang, clients that give up.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::image::ImageSpec;
use coracle_integration::{Node, Options, leaks, request, stretched};
use coracle_kernel::signal::{self, Signal};
use coracle_proto::cri::{self, ContainerState, PodSandboxState, PullImageRequest};
use tokio::io::AsyncReadExt as _;

use crate::support::{eventually, join_all, monitor_of};

crate::tests![
    the_death_of_a_monitor_is_noticed_within_a_second,
    the_death_of_a_monitor_while_the_daemon_is_away,
    a_silent_monitor_holds_up_nobody,
    the_daemon_may_be_stopped_for_long,
    status_and_list_are_quick_whatever_hangs,
    churn_leaves_nothing,
    the_cgroup_of_the_workers_is_made_anew,
    a_pull_ends_with_its_deadline,
];

/// A registry that takes the connection and says nothing holds a pull up for no longer than its caller waits.
async fn a_pull_ends_with_its_deadline() -> Result<()> {
    let registry = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
    let host = registry.local_addr()?.to_string();
    let certs = tempfile::tempdir()?;
    std::fs::create_dir(certs.path().join(&host))?;
    std::fs::write(
        certs.path().join(&host).join("hosts.toml"),
        format!("server = \"http://{host}\"\n"),
    )?;
    let node = Node::start(Options {
        config: format!("[image]\ncerts_dir = {:?}\n", certs.path()),
        ..Options::default()
    })
    .await?;
    let mut request = tonic::Request::new(PullImageRequest {
        image: Some(cri::ImageSpec {
            image: format!("{host}/silent:1"),
            ..Default::default()
        }),
        ..Default::default()
    });
    request.set_timeout(Duration::from_secs(2));
    let begun = Instant::now();
    let mut images = node.image();
    let (answer, held) = tokio::join!(images.pull_image(request), registry.accept());
    let error = answer.map(drop).unwrap_err();
    let took = begun.elapsed();
    ensure!(
        took >= Duration::from_secs(2) && took < stretched(Duration::from_secs(20)),
        "{took:?}: {error}"
    );
    ensure!(
        matches!(
            error.code(),
            tonic::Code::DeadlineExceeded | tonic::Code::Cancelled
        ),
        "{error:?}"
    );
    // The worker's connection closes: nobody works on it any more.
    let (mut held, _) = held?;
    let mut rest = Vec::new();
    tokio::time::timeout(stretched(Duration::from_secs(10)), held.read_to_end(&mut rest)).await??;
    node.finish().await
}

async fn the_death_of_a_monitor_is_noticed_within_a_second() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("monitor", &node.logs);
    let pod = node.run_pod(&config).await?;
    let running = node
        .run_container(&pod, &request::container("running", "sleep 1000"), &config)
        .await?;
    let created = node
        .create(&pod, &request::container("created", "sleep 1000"), &config)
        .await?;
    let exited = node
        .run_container(&pod, &request::container("exited", "exit 3"), &config)
        .await?;
    node.wait_exit(&exited, Duration::from_secs(10)).await?;
    let begun = Instant::now();
    signal::kill(monitor_of(&node, &pod).await?, Signal::KILL)?;
    for id in [&running, &created] {
        let status = node.wait_exit(id, Duration::from_secs(5)).await?;
        ensure!(
            status.reason == "MonitorLost" && status.exit_code == 137,
            "{status:?}"
        );
    }
    let took = begun.elapsed();
    ensure!(took < stretched(Duration::from_millis(1500)), "{took:?}");
    ensure!(
        node.status(&exited).await?.exit_code == 3,
        "{:?}",
        node.status(&exited).await?
    );
    eventually(async || {
        let status = node.pod_status(&pod).await?;
        ensure!(status.state() == PodSandboxState::SandboxNotready, "{status:?}");
        Ok(())
    })
    .await?;
    ensure!(
        node.create(&pod, &request::container("late", "true"), &config)
            .await
            .is_err(),
        "it takes containers still"
    );
    node.finish().await
}

async fn the_death_of_a_monitor_while_the_daemon_is_away() -> Result<()> {
    let mut node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("both", &node.logs);
    let pod = node.run_pod(&config).await?;
    let id = node
        .run_container(&pod, &request::container("main", "sleep 1000"), &config)
        .await?;
    let monitor = monitor_of(&node, &pod).await?;
    node.kill()?;
    signal::kill(monitor, Signal::KILL)?;
    node.spawn().await?;
    let status = node.wait_exit(&id, Duration::from_secs(5)).await?;
    ensure!(
        status.exit_code == 137 && status.reason == "MonitorLost",
        "{status:?}"
    );
    eventually(async || {
        let status = node.pod_status(&pod).await?;
        ensure!(status.state() == PodSandboxState::SandboxNotready, "{status:?}");
        Ok(())
    })
    .await?;
    node.finish().await
}

async fn a_silent_monitor_holds_up_nobody() -> Result<()> {
    let mut node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("silent", &node.logs);
    let pod = node.run_pod(&config).await?;
    let id = node
        .run_container(&pod, &request::container("main", "sleep 1000"), &config)
        .await?;
    let monitor = monitor_of(&node, &pod).await?;
    signal::kill(monitor, Signal::STOP)?;
    let other_config = request::pod("other", &node.logs);
    let begun = Instant::now();
    let other = node.run_pod(&other_config).await?;
    node.run_container(&other, &request::container("main", "sleep 1000"), &other_config)
        .await?;
    ensure!(
        begun.elapsed() < stretched(Duration::from_secs(3)),
        "another pod waited: {:?}",
        begun.elapsed()
    );
    // A new daemon finds the pod all the same, and takes it down without the monitor.
    node.restart().await?;
    ensure!(
        node.status(&id).await?.state() == ContainerState::ContainerRunning,
        "{:?}",
        node.status(&id).await?
    );
    let begun = Instant::now();
    node.stop_container(&id, 1).await?;
    let took = begun.elapsed();
    ensure!(took < stretched(Duration::from_secs(9)), "{took:?}");
    ensure!(
        node.status(&id).await?.exit_code == 137,
        "{:?}",
        node.status(&id).await?
    );
    node.stop_pod(&pod).await?;
    node.remove_pod(&pod).await?;
    ensure!(
        !signal::exists(monitor) || is_zombie(monitor),
        "the monitor is there still"
    );
    node.finish().await
}

fn is_zombie(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'))
}

async fn the_daemon_may_be_stopped_for_long() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("paused", &node.logs);
    let pod = node.run_pod(&config).await?;
    const LINES: usize = 300_000;
    let id = node
        .run_container(
            &pod,
            &request::container("main", &format!("seq 1 {LINES}; exit 4")),
            &config,
        )
        .await?;
    let status = node.status(&id).await?;
    let daemon = i32::try_from(node.pid().context("no daemon")?)?;
    signal::kill(daemon, Signal::STOP)?;
    // The container writes far more than any pipe holds: it must not stand still.
    let whole = format!(" {LINES}\n");
    let written = node.wait_log(&status, &whole, Duration::from_secs(60)).await;
    if std::env::var_os("CORACLE_LONG").is_some() {
        tokio::time::sleep(Duration::from_secs(150)).await;
    }
    signal::kill(daemon, Signal::CONT)?;
    ensure!(written?.lines().count() == LINES, "lines were lost");
    ensure!(
        node.wait_exit(&id, Duration::from_secs(5)).await?.exit_code == 4,
        "wrong exit code"
    );
    node.finish().await
}

async fn status_and_list_are_quick_whatever_hangs() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("slow", &node.logs);
    let pod = node.run_pod(&config).await?;
    let stubborn = request::container(
        "stubborn",
        "trap '' TERM; echo ready; while true; do sleep 1; done",
    );
    let id = node.run_container(&pod, &stubborn, &config).await?;
    node.wait_log(&node.status(&id).await?, "ready", Duration::from_secs(5))
        .await?;
    let stop = node.stop_container(&id, 3);
    let look = async {
        let mut worst = Duration::ZERO;
        for _ in 0..100 {
            let begun = Instant::now();
            node.status(&id).await?;
            node.pod_status(&pod).await?;
            node.pod_ids().await?;
            node.container_ids().await?;
            worst = worst.max(begun.elapsed() / 4);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        println!(
            "    slowest round of status and list: {:.2} ms a call",
            worst.as_secs_f64() * 1e3
        );
        // The machine of the tests may be busy: the figure is far above what is promised and far below a stop.
        ensure!(worst < stretched(Duration::from_millis(200)), "{worst:?}");
        Ok(())
    };
    let (stopped, looked) = tokio::join!(stop, look);
    stopped?;
    looked?;
    node.finish().await
}

async fn churn_leaves_nothing() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    for round in 0..5 {
        let pods = (0..4).map(|number| {
            let node = &node;
            async move {
                let config = request::pod(&format!("churn-{round}-{number}"), &node.logs);
                let pod = node.run_pod(&config).await?;
                let script = if number % 2 == 0 { "exit 0" } else { "sleep 1000" };
                let id = node
                    .run_container(&pod, &request::container("main", script), &config)
                    .await?;
                match number {
                    0 => node.wait_exit(&id, Duration::from_secs(10)).await.map(drop)?,
                    1 => node.stop_container(&id, 0).await?,
                    _ => {}
                }
                node.stop_pod(&pod).await?;
                node.remove_pod(&pod).await?;
                Ok::<_, anyhow::Error>(())
            }
        });
        join_all(pods.collect()).await?;
    }
    ensure!(node.pod_ids().await?.is_empty(), "pods are listed still");
    node.finish().await
}

/// Somebody tidies up empty cgroups: images come in all the same.
async fn the_cgroup_of_the_workers_is_made_anew() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let groups = || -> Result<Vec<String>> {
        let all = leaks::snapshot_here()?.of("cgroup");
        Ok(all
            .into_iter()
            .filter(|path| path.ends_with("/workers"))
            .collect())
    };
    let before = groups()?;
    ensure!(!before.is_empty(), "the workers have no cgroup");
    for group in &before {
        std::fs::remove_dir(group)?;
    }
    node.import(&ImageSpec::busybox(request::BUSYBOX)).await?;
    ensure!(groups()? == before, "the workers were in {:?}", groups()?);
    node.finish().await
}
