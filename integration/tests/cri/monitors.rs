//! A monitor dies in each state of its pod, with the daemon there and with the daemon gone too.
//!
//! What is asked of the daemon meanwhile ends, soon. Then the pod is listed, not ready, with every container ended; or,
//! where nobody had been told of it, gone. Whatever it was, the next attempt works, and nothing is left.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{Node, Options, leaks, request, stretched};
use coracle_kernel::Errno;
use coracle_kernel::signal::{self, Signal};
use coracle_proto::cri::{ContainerState, PodSandboxConfig, PodSandboxState};

use crate::Test;
use crate::support::eventually;

/// How long a step waits in which the monitor is to die.
const DELAY_MS: u64 = 600;

/// What is going on when the monitor dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    Empty,
    Created,
    Running,
    Exited,
    Exec,
    Writing,
    Grace,
    /// In this step of the operations that the monitor is asked for.
    Step(&'static str),
}

const MOMENTS: &[(&str, Moment)] = &[
    ("empty", Moment::Empty),
    ("created", Moment::Created),
    ("running", Moment::Running),
    ("exited", Moment::Exited),
    ("exec", Moment::Exec),
    ("writing", Moment::Writing),
    ("grace", Moment::Grace),
    ("run", Moment::Step("run.monitor")),
    ("create", Moment::Step("create.bundle")),
    ("start", Moment::Step("start.intent")),
    ("remove", Moment::Step("remove.intent")),
    ("stop_pod", Moment::Step("stop-pod.intent")),
];

/// A test for each moment, and one where the daemon dies with the monitor.
pub(crate) fn all() -> Vec<Test> {
    let mut all = Vec::new();
    for &(name, moment) in MOMENTS {
        for (daemon, both) in [("daemon_there", false), ("both", true)] {
            let name = format!("cri::monitors::{name}::{daemon}");
            all.push(Test::new(name, move || Box::pin(one(moment, both))).beside());
        }
    }
    all
}

async fn one(moment: Moment, both: bool) -> Result<()> {
    let mut node = Node::with_busybox(Options::default()).await?;
    if let Moment::Step(step) = moment {
        node.options.failpoint = Some(format!("{step}=delay:{DELAY_MS}"));
        node.restart().await?;
        node.options.failpoint = None;
    }
    let config = request::pod("monitor", &node.logs);
    // Far from what the calls themselves would wait for.
    let life = tokio::time::timeout(stretched(Duration::from_secs(15)), life(&node, &config, moment));
    let death = kill_in_time(&node, moment, both);
    let (lived, died) = tokio::join!(life, death);
    died?;
    // An answer there is in any case: that it may be a failure is what the rest is about.
    let _ = lived.context("a call did not end")?;
    if both {
        node.restart().await?;
    }
    settled(&node, moment).await?;
    let mut next = config.clone();
    next.metadata.as_mut().context("no metadata")?.attempt = 1;
    let pod = node.run_pod(&next).await?;
    let id = node
        .run_container(&pod, &request::container("main", "exit 6"), &next)
        .await?;
    let status = node.wait_exit(&id, Duration::from_secs(10)).await?;
    ensure!(status.exit_code == 6, "{status:?}");
    node.finish().await
}

/// Brings the pod where its monitor is to die, says so, and goes on.
async fn life(node: &Node, config: &PodSandboxConfig, moment: Moment) -> Result<()> {
    let pod = node.run_pod(config).await?;
    let script = match moment {
        Moment::Exited => "exit 3",
        Moment::Writing => "while true; do echo 0123456789012345678901234567890123456789; done",
        Moment::Grace => "trap '' TERM; echo ready; while true; do sleep 0.1; done",
        _ => "sleep 1000",
    };
    let ready = node.logs.join("ready");
    if moment == Moment::Empty {
        fs::write(&ready, "")?;
        return wait(Duration::from_millis(300)).await;
    }
    let id = node
        .create(&pod, &request::container("main", script), config)
        .await?;
    if moment != Moment::Created {
        node.start_container(&id).await?;
    }
    let status = node.status(&id).await?;
    match moment {
        Moment::Exited => drop(node.wait_exit(&id, Duration::from_secs(5)).await?),
        Moment::Grace => drop(node.wait_log(&status, "ready", Duration::from_secs(5)).await?),
        Moment::Writing => drop(node.wait_log(&status, "0123", Duration::from_secs(5)).await?),
        _ => {}
    }
    if !matches!(moment, Moment::Step(_)) {
        fs::write(&ready, "")?;
    }
    match moment {
        Moment::Exec => drop(node.exec(&id, &["sleep", "1000"], 120).await?),
        Moment::Grace => node.stop_container(&id, 120).await?,
        Moment::Step(_) => {
            node.remove_container(&id).await?;
            node.run_container(&pod, &request::container("second", "sleep 1000"), config)
                .await?;
            node.stop_pod(&pod).await?;
            node.remove_pod(&pod).await?;
        }
        _ => wait(Duration::from_millis(300)).await?,
    }
    Ok(())
}

async fn wait(time: Duration) -> Result<()> {
    tokio::time::sleep(time).await;
    Ok(())
}

/// Kills the monitor, and the daemon, once the moment has come: the state is reached, or the daemon waits in the step.
async fn kill_in_time(node: &Node, moment: Moment, both: bool) -> Result<()> {
    eventually(async || match moment {
        Moment::Step(step) => {
            ensure!(reached(node, step).await?, "{step} is not reached");
            Ok(())
        }
        _ => Ok(fs::metadata(node.logs.join("ready")).map(drop)?),
    })
    .await?;
    // Within what was begun, and far from its end.
    wait(Duration::from_millis(100)).await?;
    let monitors = leaks::monitors()?;
    ensure!(!monitors.is_empty(), "there is no monitor to kill");
    for pid in monitors {
        match signal::kill(pid, Signal::KILL) {
            // A helper of the monitor, which ends by itself.
            Err(error) if error.errno() == Errno::ESRCH => {}
            other => other?,
        }
    }
    if both {
        let daemon = i32::try_from(node.pid().context("no daemon")?)?;
        signal::kill(daemon, Signal::KILL)?;
    }
    Ok(())
}

/// Whether the daemon waits in a step: what is on the host tells, and what is listed.
async fn reached(node: &Node, step: &str) -> Result<bool> {
    let files = leaks::pod_files(&node.dir);
    let has = |place: &str| files.iter().any(|file| file.contains(place));
    let bundles = || -> Result<usize> {
        let mut count = 0;
        for pod in fs::read_dir(node.state().join("pods"))? {
            let bundles = fs::read_dir(pod?.path().join("containers")).into_iter().flatten();
            count += bundles
                .flatten()
                .filter(|bundle| bundle.path().join("config.json").exists())
                .count();
        }
        Ok(count)
    };
    let listed = async |running: bool| -> Result<usize> {
        let wanted = if running {
            ContainerState::ContainerRunning
        } else {
            ContainerState::ContainerCreated
        };
        let all = node.containers().await?;
        Ok(all.iter().filter(|container| container.state() == wanted).count())
    };
    let log = node.log();
    Ok(match step {
        "run.monitor" => has("state/monitors") && !leaks::monitors()?.is_empty(),
        "create.bundle" => bundles()? == 1 && listed(false).await? == 0,
        "start.intent" => listed(false).await? == 1,
        // The first container runs, and its removal has begun: it is not listed as running any more.
        "remove.intent" => bundles()? == 1 && log.contains("container exited"),
        // The second container runs, the first is gone: the stop of the pod is the next that is asked for.
        _ => listed(true).await? == 1 && bundles()? == 1 && log.matches("container exited").count() == 1,
    })
}

/// Everything is either listed and ended, or gone; and nothing else is there.
async fn settled(node: &Node, moment: Moment) -> Result<()> {
    eventually(async || {
        let (pods, containers) = (node.pods().await?, node.containers().await?);
        for pod in &pods {
            ensure!(pod.state() == PodSandboxState::SandboxNotready, "{pod:?}");
        }
        for container in &containers {
            let status = node.status(&container.id).await?;
            ensure!(status.state() == ContainerState::ContainerExited, "{status:?}");
            ensure!(!status.reason.is_empty() && status.finished_at > 0, "{status:?}");
            // What was known before stays known.
            ensure!(moment != Moment::Exited || status.exit_code == 3, "{status:?}");
        }
        ensure!(leaks::monitors()?.is_empty(), "a monitor is there still");
        for file in leaks::pod_files(&node.dir) {
            let name = file
                .rsplit('/')
                .next()
                .unwrap_or_default()
                .trim_end_matches(".sock");
            ensure!(
                pods.iter().any(|pod| pod.id == name) || containers.iter().any(|c| c.id == name),
                "{file} belongs to nothing that is listed"
            );
        }
        Ok(())
    })
    .await
}
