//! StopContainer: the signal, the grace, the kill. It needs no monitor.

use std::time::Duration;

use std::sync::Arc;

use coracle_kernel::pidfd;
use coracle_kernel::signal::Signal;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::warn;

use super::{Hold, KILL_TIME, blocking, cgroup_manager};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::pod::{Operation, PodHandle, all_done};
use crate::view::ContainerView;

/// How long the exit may take to be recorded once everything is killed: the kill itself, the monitor's time to
/// tell, and the disk.
const RECORD_TIME: Duration = Duration::from_secs(20);

/// What a stop begins with.
#[derive(Debug)]
pub(crate) struct StopInputs {
    pub(crate) view: Arc<ContainerView>,
    /// Creation and start of it, where they are in flight.
    pub(crate) before: Vec<Operation>,
    /// When to kill; a later stop brings it forward.
    pub(crate) deadline: watch::Receiver<Instant>,
    /// True once the exit is on the disk.
    pub(crate) exited: watch::Receiver<bool>,
    /// False: no signal, killed at once.
    pub(crate) graceful: bool,
}

/// Stops a container; returns when its exit is on the disk and shown.
pub(crate) async fn stop(pod: PodHandle, inputs: StopInputs) -> Result<()> {
    let StopInputs {
        view,
        before,
        mut deadline,
        mut exited,
        graceful,
    } = inputs;
    // Both have deadlines of their own. How they end does not matter: what there is then is stopped.
    let _ = all_done(before).await;
    let id = view.record.id.as_str();
    let Ok(view) = pod.container(id) else {
        return Ok(());
    };
    if !view.record.is_alive() {
        return Ok(());
    }

    if let Some(hold) = pod.hold(id).filter(|_| graceful) {
        let signal = Signal::from_number(view.record.stop_signal).unwrap_or(Signal::TERM);
        if let Err(error) = pidfd::send_signal(&hold.pidfd, signal) {
            // Gone already, or the kill below will do.
            warn!(container = id, %error, "the stop signal was not sent");
        }
        failpoint::reach("stop.signal").await?;
        if wait_until(&mut exited, &mut deadline).await {
            return Ok(());
        }
    }

    // Without a hold there is no process of it any more: its pod's monitor is gone too, and the task of the pod
    // records that. With one everything in the cgroup is killed, so that a shared pid namespace hides nothing.
    match pod.hold(id) {
        Some(hold) => kill(&pod, id, &hold).await?,
        None => pod.tell(crate::pod::Message::ExitOverdue { id: id.to_owned() }),
    }
    failpoint::reach("stop.kill").await?;
    let recorded = async { exited.wait_for(|exited| *exited).await.is_ok() };
    match timeout(RECORD_TIME, recorded).await {
        Ok(_) => Ok(()),
        Err(_) => Err(stuck(id, pod.hold(id).as_deref())),
    }
}

/// Waits for the exit or the deadline, whichever is first; whether it was the exit.
async fn wait_until(exited: &mut watch::Receiver<bool>, deadline: &mut watch::Receiver<Instant>) -> bool {
    loop {
        let at = *deadline.borrow_and_update();
        tokio::select! {
            biased;
            gone = exited.wait_for(|exited| *exited) => return gone.is_ok(),
            () = sleep_until(at) => return false,
            changed = deadline.changed() => if changed.is_err() { return false },
        }
    }
}

async fn kill(pod: &PodHandle, id: &str, hold: &Hold) -> Result<()> {
    // The init first: with a pid namespace of its own that alone ends everything, at once.
    let _ = pidfd::send_signal(&hold.pidfd, Signal::KILL);
    let location = hold.with_cgroup(|cgroup| cgroup.location().clone());
    let cgroup = cgroup_manager(pod.core().cgroups.clone(), location).await?;
    let killed = blocking(move || cgroup.kill(KILL_TIME)).await?;
    if let Err(error) = killed {
        let error = Error::step("kill the cgroup", error);
        warn!(
            container = id,
            error = error.chain(),
            "not everything in the cgroup was killed"
        );
    }
    Ok(())
}

/// Names what keeps a killed process alive.
fn stuck(id: &str, hold: Option<&Hold>) -> Error {
    let Some(hold) = hold else {
        return Error::Deadline {
            step: "record the exit of the container",
            limit: RECORD_TIME,
        };
    };
    let pid = hold.pid;
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let status = read("status");
    let state = status
        .lines()
        .find_map(|line| line.strip_prefix("State:"))
        .unwrap_or("?")
        .trim();
    let place = read("wchan");
    Error::State {
        what: "container",
        id: id.to_owned(),
        why: format!("survives SIGKILL: pid {pid} in state {state} at wchan {place}"),
    }
}
