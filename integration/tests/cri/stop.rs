//! Stopping: grace, signals, several at once, removal of what still runs.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::image::ImageSpec;
use coracle_integration::{Node, Options, request, stretched};

use coracle_proto::cri::{ContainerConfig, ReopenContainerLogRequest, Signal};
use serde_json::json;

use crate::support::join_all;

crate::tests![
    stop_with_and_without_a_handler,
    a_shorter_stop_overtakes_a_longer_one,
    three_stubborn_containers_take_one_grace_together,
    the_stop_signal_is_the_one_asked_for,
    remove_takes_a_running_container_too,
];

/// A container whose program ignores SIGTERM, and says when it does.
fn stubborn(name: &str) -> ContainerConfig {
    request::container(name, "trap '' TERM; echo ready; while true; do sleep 1; done")
}

async fn ready(node: &Node, id: &str) -> Result<()> {
    let status = node.status(id).await?;
    node.wait_log(&status, "ready", Duration::from_secs(10))
        .await
        .map(drop)
}

async fn stop_with_and_without_a_handler() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("stops", &node.logs);
    let pod = node.run_pod(&config).await?;
    let polite = request::container(
        "polite",
        "trap 'exit 7' TERM; echo ready; while true; do sleep 0.05; done",
    );
    let id = node.run_container(&pod, &polite, &config).await?;
    ready(&node, &id).await?;
    let begun = Instant::now();
    node.stop_container(&id, 10).await?;
    ensure!(
        begun.elapsed() < stretched(Duration::from_secs(3)),
        "{:?}",
        begun.elapsed()
    );
    ensure!(
        node.status(&id).await?.exit_code == 7,
        "{:?}",
        node.status(&id).await?
    );

    let id = node.run_container(&pod, &stubborn("stubborn"), &config).await?;
    ready(&node, &id).await?;
    let begun = Instant::now();
    node.stop_container(&id, 1).await?;
    let took = begun.elapsed();
    ensure!(
        took.as_secs_f64() > 0.9 && took < stretched(Duration::from_secs(3)),
        "{took:?}"
    );
    ensure!(
        node.status(&id).await?.exit_code == 137,
        "{:?}",
        node.status(&id).await?
    );

    let id = node.run_container(&pod, &stubborn("now"), &config).await?;
    ready(&node, &id).await?;
    let begun = Instant::now();
    node.stop_container(&id, 0).await?;
    ensure!(
        begun.elapsed() < stretched(Duration::from_millis(900)),
        "{:?}",
        begun.elapsed()
    );
    node.finish().await
}

async fn a_shorter_stop_overtakes_a_longer_one() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("overtake", &node.logs);
    let pod = node.run_pod(&config).await?;
    let id = node.run_container(&pod, &stubborn("stubborn"), &config).await?;
    ready(&node, &id).await?;
    let begun = Instant::now();
    let late = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        node.stop_container(&id, 1).await
    };
    // A longer one does not lengthen it.
    let later = async {
        tokio::time::sleep(Duration::from_millis(600)).await;
        node.stop_container(&id, 100).await
    };
    let (first, second, third) = tokio::join!(node.stop_container(&id, 60), late, later);
    first?;
    second?;
    third?;
    let took = begun.elapsed();
    ensure!(
        took.as_secs_f64() > 1.2 && took < stretched(Duration::from_secs(4)),
        "{took:?}"
    );
    node.finish().await
}

async fn three_stubborn_containers_take_one_grace_together() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("stubborn", &node.logs);
    let pod = node.run_pod(&config).await?;
    let mut ids = Vec::new();
    for name in ["a", "b", "c"] {
        let id = node.run_container(&pod, &stubborn(name), &config).await?;
        ready(&node, &id).await?;
        ids.push(id);
    }
    const GRACE: i64 = 10;
    let begun = Instant::now();
    let stops = join_all(ids.iter().map(|id| node.stop_container(id, GRACE)).collect());
    let reopen = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let asked = Instant::now();
        let request = ReopenContainerLogRequest {
            container_id: ids[0].clone(),
        };
        node.runtime().reopen_container_log(request).await?;
        node.exec(&ids[1], &["true"], 10).await?;
        ensure!(
            asked.elapsed() < stretched(Duration::from_secs(1)),
            "they waited for the stop: {:?}",
            asked.elapsed()
        );
        Ok(())
    };
    let (stopped, reopened) = tokio::join!(stops, reopen);
    stopped?;
    reopened?;
    node.stop_pod(&pod).await?;
    let took = begun.elapsed();
    ensure!(
        took < stretched(Duration::from_secs(GRACE as u64 + 2)),
        "gone after {took:?}, not soon after one grace period"
    );
    node.finish().await
}

async fn the_stop_signal_is_the_one_asked_for() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let mut image = ImageSpec::busybox("test.local/usr2:latest");
    image.config["StopSignal"] = json!("SIGUSR2");
    node.import(&image).await?;
    let config = request::pod("signals", &node.logs);
    let pod = node.run_pod(&config).await?;
    let script = "trap 'exit 11' USR1; trap 'exit 12' USR2; trap 'exit 15' TERM; echo ready; while true; do sleep 0.05; done";
    for (name, image, signal, code) in [
        ("request", "test.local/usr2:latest", Signal::Sigusr1, 11),
        ("image", "test.local/usr2:latest", Signal::RuntimeDefault, 12),
        ("default", request::BUSYBOX, Signal::RuntimeDefault, 15),
    ] {
        let mut container = request::container(name, script);
        container.image.as_mut().context("no image")?.image = image.into();
        container.stop_signal = signal.into();
        let id = node.run_container(&pod, &container, &config).await?;
        ready(&node, &id).await?;
        node.stop_container(&id, 20).await?;
        let status = node.status(&id).await?;
        ensure!(status.exit_code == code, "{name}: {status:?}");
    }
    node.finish().await
}

async fn remove_takes_a_running_container_too() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("remove", &node.logs);
    let pod = node.run_pod(&config).await?;
    let running = node
        .run_container(&pod, &request::container("running", "sleep 1000"), &config)
        .await?;
    let created = node
        .create(&pod, &request::container("created", "sleep 1000"), &config)
        .await?;
    node.remove_container(&running).await?;
    node.remove_container(&created).await?;
    ensure!(node.container_ids().await?.is_empty(), "they are listed still");
    // The pod goes on.
    node.run_container(&pod, &request::container("again", "sleep 1000"), &config)
        .await?;
    node.finish().await
}
