//! The daemon dies at every named step of every operation; the next one finds everything running and listed, or gone.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use coracle_integration::{Node, Options, leaks, node, request, skipped};
use coracle_proto::cri::{ContainerState, PodSandboxState};

use crate::Test;
use crate::support::eventually;

/// One test a step and a way of going wrong there.
pub(crate) fn all() -> Vec<Test> {
    let mut all = Vec::new();
    for step in steps().unwrap_or_default() {
        let (died, failed) = (step.clone(), step.clone());
        all.push(Test::new(format!("cri::kill9::death_at::{step}"), move || {
            let step = died.clone();
            Box::pin(async move { one_death(&step).await })
        }));
        all.push(Test::new(format!("cri::kill9::failure_at::{step}"), move || {
            let step = failed.clone();
            Box::pin(async move { one_failure(&step).await })
        }));
    }
    let mut all: Vec<Test> = all.into_iter().map(Test::beside).collect();
    if all.is_empty() {
        all.push(Test::new("cri::kill9::every_step", || {
            skipped("cri::kill9: coracled was built without its feature failpoints");
            Box::pin(async { Ok(()) })
        }));
    }
    all
}

/// The steps, as the daemon itself names them; none if it was built without failpoints.
pub(crate) fn steps() -> Result<Vec<String>> {
    let output = Command::new(node::binary("coracled"))
        .arg("failpoints")
        .output()?;
    if !output.status.success() {
        return Ok(Vec::new());
    }
    Ok(String::from_utf8(output.stdout)?
        .lines()
        .map(str::to_owned)
        .collect())
}

async fn one_death(step: &str) -> Result<()> {
    let mut node = Node::with_busybox(Options::default()).await?;
    node.options.failpoint = Some(format!("{step}=abort"));
    node.restart().await?;
    let mut known = Known::default();
    // Everything that has steps, until the daemon is gone.
    let died = whole_life(&node, &mut known).await.is_err();
    ensure!(died, "the step was not reached");
    node.wait_ended(Duration::from_secs(10)).await?;
    node.options.failpoint = None;
    node.spawn().await?;
    check(&node, &known).await?;
    finish_stop(&node, &known).await?;
    // The same requests again end well: no name is taken, nothing stands in the way.
    let mut again = Known::default();
    whole_life(&node, &mut again).await.context("the same again")?;
    node.finish().await
}

/// What clients were told before the end.
#[derive(Debug, Default)]
struct Known {
    pod: Option<String>,
    created: Option<String>,
    started: bool,
    /// A stop was asked for: its signal may have been sent.
    stopping: bool,
    exit_code: Option<i32>,
    container_removed: bool,
    pod_stopped: bool,
    pod_removed: bool,
}

async fn whole_life(node: &Node, known: &mut Known) -> Result<()> {
    let mut config = request::pod("matrix", &node.logs);
    if let Some(metadata) = config.metadata.as_mut() {
        metadata.uid = "fixed".into();
    }
    config.log_directory = node.logs.join("matrix").to_string_lossy().into_owned();
    let pod = node.run_pod(&config).await?;
    known.pod = Some(pod.clone());
    let script = "trap 'exit 5' TERM; echo ready; while true; do sleep 0.05; done";
    let id = node
        .create(&pod, &request::container("main", script), &config)
        .await?;
    known.created = Some(id.clone());
    node.start_container(&id).await?;
    known.started = true;
    known.stopping = true;
    node.stop_container(&id, 1).await?;
    known.exit_code = Some(node.status(&id).await?.exit_code);
    node.remove_container(&id).await?;
    known.container_removed = true;
    let second = node
        .run_container(&pod, &request::container("second", "sleep 1000"), &config)
        .await?;
    node.stop_container(&second, 0).await?;
    node.run_container(&pod, &request::container("third", "sleep 1000"), &config)
        .await?;
    node.stop_pod(&pod).await?;
    known.pod_stopped = true;
    node.remove_pod(&pod).await?;
    known.pod_removed = true;
    Ok(())
}

/// Nothing that was acknowledged is lost, nothing unlisted is there.
async fn check(node: &Node, known: &Known) -> Result<()> {
    eventually(async || {
        let pods = node.pod_ids().await?;
        let containers = node.container_ids().await?;
        match (&known.pod, known.pod_removed) {
            (Some(pod), false) => {
                // Removal may have been under way: then it is completed.
                if let Ok(status) = node.pod_status(pod).await {
                    let stopped = known.pod_stopped && status.state() == PodSandboxState::SandboxReady;
                    ensure!(!stopped, "a stopped pod is ready again");
                } else {
                    ensure!(known.pod_stopped, "an acknowledged pod is gone");
                }
            }
            (Some(pod), true) => ensure!(!pods.contains(pod), "a removed pod is back"),
            // It may be there before its caller could be told; then it is a whole one.
            (None, _) => {
                for pod in &pods {
                    let status = node.pod_status(pod).await?;
                    ensure!(
                        status.state() == PodSandboxState::SandboxReady,
                        "half a pod: {status:?}"
                    );
                }
            }
        }
        if let (Some(id), false) = (&known.created, known.container_removed) {
            if let Ok(status) = node.status(id).await {
                if let Some(code) = known.exit_code {
                    ensure!(status.exit_code == code, "{status:?}");
                }
                let started = matches!(
                    status.state(),
                    ContainerState::ContainerRunning | ContainerState::ContainerExited
                );
                ensure!(
                    !known.started || started,
                    "an acknowledged start was lost: {status:?}"
                );
            } else {
                ensure!(known.exit_code.is_some(), "an acknowledged container is gone");
            }
        }
        // What is on the host belongs to what is listed.
        for file in leaks::pod_files(&node.dir) {
            let name = file
                .rsplit('/')
                .next()
                .unwrap_or_default()
                .trim_end_matches(".sock")
                .to_owned();
            if !pods.contains(&name) && !containers.contains(&name) {
                bail!("{file} belongs to nothing that is listed");
            }
        }
        Ok(())
    })
    .await
}

/// A stop without an answer is asked for again, as a kubelet does. Until it ended the container may be on its way out,
/// and a creation of the same name would be given the one that is.
async fn finish_stop(node: &Node, known: &Known) -> Result<()> {
    let (Some(id), true, None) = (&known.created, known.stopping, known.exit_code) else {
        return Ok(());
    };
    node.stop_container(id, 1).await?;
    let status = node.status(id).await?;
    ensure!(
        status.state() == ContainerState::ContainerExited && [5, 137].contains(&status.exit_code),
        "{status:?}"
    );
    Ok(())
}

/// A step that fails: the operation says so, and what was begun is undone or can be done again.
async fn one_failure(step: &str) -> Result<()> {
    let mut node = Node::with_busybox(Options::default()).await?;
    node.options.failpoint = Some(format!("{step}=error"));
    node.restart().await?;
    let mut known = Known::default();
    let failed = whole_life(&node, &mut known).await.is_err();
    // What is done beside the exit of a container is nobody's answer.
    ensure!(failed || step == "exit.record", "the step was not reached");
    node.options.failpoint = None;
    node.restart().await?;
    finish_stop(&node, &known).await?;
    whole_life(&node, &mut Known::default())
        .await
        .context("afterwards")?;
    node.finish().await
}
