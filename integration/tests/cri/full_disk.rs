//! A disk without a free byte: calls fail by name, connections and pods live on, and what frees space works.

use std::fs::File;
use std::io::{ErrorKind, Write as _};

use anyhow::{Result, ensure};
use coracle_integration::node::binary;
use coracle_integration::{Node, Options, request};

crate::tests![
    a_full_disk_ends_no_connection_and_no_pod,
    pods_are_removed_from_a_full_disk,
    an_answer_that_nobody_takes_is_an_error,
];

async fn an_answer_that_nobody_takes_is_an_error() -> Result<()> {
    let full = File::options().write(true).open("/dev/full")?;
    let config = std::process::Command::new(binary("coracled"))
        .args(["config", "--default"])
        .stdout(full)
        .output()?;
    let said = String::from_utf8_lossy(&config.stderr);
    ensure!(
        config.status.code() == Some(1) && said.contains("standard output: No space left on device"),
        "{}: {said}",
        config.status
    );
    Ok(())
}

async fn a_full_disk_ends_no_connection_and_no_pod() -> Result<()> {
    let node = small_node().await?;
    let config = request::pod("alive", &node.logs);
    let pod = node.run_pod(&config).await?;
    let container = request::container("main", "sleep 1000");
    let container = node.run_container(&pod, &container, &config).await?;
    let pid = node.pid();

    let filled = fill(&node)?;
    for n in 0..3 {
        let refused = request::container(&format!("more{n}"), "sleep 1000");
        let answer = node.create(&pod, &refused, &config).await;
        let error = answer
            .map(|id| format!("{id} was made"))
            .map_err(|e| e.to_string());
        ensure!(
            error
                .as_ref()
                .is_err_and(|error| error.contains("No space left on device")),
            "{error:?}"
        );
        // On the same connection, whose frames are logged to the same disk.
        ensure!(
            node.pod_ids().await? == [pod.clone()],
            "{:?}",
            node.pod_ids().await?
        );
    }
    let answer = node.exec(&container, &["echo", "there"], 5).await?;
    ensure!(answer.stdout == b"there\n", "{answer:?}");
    ensure!(node.pid() == pid);
    // All that was refused has not taken what this needs.
    node.stop_pod(&pod).await?;
    node.remove_pod(&pod).await?;

    std::fs::remove_file(filled)?;
    let pod = node.run_pod(&config).await?;
    let container = request::container("main", "sleep 1000");
    node.run_container(&pod, &container, &config).await?;
    node.finish().await
}

/// Whoever wants space back removes pods, and that must need none.
async fn pods_are_removed_from_a_full_disk() -> Result<()> {
    let mut node = small_node().await?;
    let mut pods = Vec::new();
    for n in 0..3 {
        let config = request::pod(&format!("p{n}"), &node.logs);
        let pod = node.run_pod(&config).await?;
        let container = request::container("main", "sleep 1000");
        let container = node.run_container(&pod, &container, &config).await?;
        pods.push((pod, container));
    }
    fill(&node)?;
    let reserve = node.root().join("meta.db.reserve");
    let kept = std::fs::metadata(reserve)?.len();
    ensure!(kept == 512 << 10, "{kept}");
    let (pod, container) = &pods[0];
    node.stop_container(container, 0).await?;
    node.remove_container(container).await?;
    node.stop_pod(pod).await?;
    node.remove_pod(pod).await?;
    // The same for a daemon that begins with a full disk.
    fill(&node)?;
    node.restart().await?;
    ensure!(node.pod_ids().await?.len() == 2);
    for (pod, _) in &pods[1..] {
        node.stop_pod(pod).await?;
        node.remove_pod(pod).await?;
    }
    ensure!(node.pod_ids().await?.is_empty());
    node.finish().await
}

async fn small_node() -> Result<Node> {
    Node::with_busybox(Options {
        disk_mib: Some(64),
        ..Options::default()
    })
    .await
}

/// Takes every byte that is left.
fn fill(node: &Node) -> Result<std::path::PathBuf> {
    let path = node.dir.join("filled");
    let mut file = File::options().append(true).create(true).open(&path)?;
    for size in [1 << 20, 4096] {
        let piece = vec![1; size];
        let error = loop {
            if let Err(error) = file.write_all(&piece) {
                break error;
            }
        };
        ensure!(error.kind() == ErrorKind::StorageFull, "{error}");
    }
    Ok(path)
}
