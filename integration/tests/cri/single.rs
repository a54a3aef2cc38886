//! Each single call through the kubelet's own client library: a program of ours over k8s.io/cri-client makes them and
//! checks the answers.

use std::process::Stdio;

use anyhow::{Result, ensure};
use coracle_integration::daemon::program;
use coracle_integration::{Node, Options, leaks, request};

crate::tests![the_kubelets_own_client];

/// What the program reports, in this order.
const STEPS: &[&str] = &[
    "Version",
    "Status",
    "RuntimeConfig",
    "UpdateRuntimeConfig",
    "images",
    "RunPodSandbox",
    "sandbox status",
    "container life",
    "not found",
    "unimplemented",
    "stop and remove",
    "PullImage",
    "RemoveImage",
];

async fn the_kubelets_own_client() -> Result<()> {
    let Some(program) = program("CRICLIENT") else {
        return Ok(());
    };
    let node = Node::with_busybox(Options::default()).await?;
    let output = tokio::process::Command::new(program)
        .arg(node.socket())
        .arg(request::BUSYBOX)
        .arg(&node.logs)
        .stdin(Stdio::null())
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}\n{text}{errors}", output.status);
    let told: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_once(" ok "))
        .map(|(step, _)| step.trim())
        .collect();
    ensure!(told == STEPS, "{told:?}");
    // It took away what it had made, with the last calls.
    ensure!(
        node.pod_ids().await?.is_empty() && node.container_ids().await?.is_empty(),
        "something is listed still"
    );
    ensure!(
        node.images().await?.is_empty(),
        "an image is listed still: {:?}",
        node.images().await?
    );
    let left = leaks::pod_files(&node.dir);
    ensure!(left.is_empty(), "{left:?}");
    node.finish().await
}
