//! StopPodSandbox, and the end of a pod whose monitor died: everything that it holds is released.

use coracle_proto::cri::NamespaceMode;
use tracing::warn;

use super::{Message, PodHandle, all_done};
use crate::container::{blocking, cgroup_manager, kill_and_remove};
use crate::error::{Context as _, Result};
use crate::failpoint;
use crate::record::SandboxPhase;
use crate::view::namespace_options;

/// Stops a pod; each step may have been done before. `reason` is why, where nobody asked for it.
pub(super) async fn stop(pod: PodHandle, reason: &'static str) -> Result<()> {
    // Creations and starts give up or end by their own deadlines; what they made is stopped below.
    let _ = pod.run_operation().done().await;
    let in_flight = pod.ask(|reply| Message::InFlight { reply }).await?;
    let _ = all_done(in_flight).await;
    if pod.view().record.phase == SandboxPhase::NotReady {
        return Ok(());
    }

    pod.edit(move |record| {
        if record.phase == SandboxPhase::Ready {
            record.phase = SandboxPhase::Stopping;
        }
        if record.reason.is_empty() {
            reason.clone_into(&mut record.reason);
        }
    })
    .await?;
    failpoint::reach("stop-pod.intent").await?;

    let stops = pod.ask(|reply| Message::StopAll { reply }).await?;
    // A container that will not die must not keep the address and the rest: its failure is told at the end.
    let stopped = all_done(stops).await;
    failpoint::reach("stop-pod.containers").await?;
    release(&pod).await?;
    stopped?;
    pod.edit(|record| {
        if record.phase == SandboxPhase::Stopping {
            record.phase = SandboxPhase::NotReady;
        }
    })
    .await?;
    failpoint::reach("stop-pod.done").await
}

/// Releases what a sandbox holds apart from its containers and its files: network and monitor.
pub(crate) async fn release(pod: &PodHandle) -> Result<()> {
    // Processes first, whatever the network does.
    if namespace_options(&pod.view().config).pid() == NamespaceMode::Pod {
        let cgroup = cgroup_manager(pod.core().cgroups.clone(), super::run::init_cgroup(pod)?).await?;
        kill_and_remove(cgroup).await?;
    }
    // Neither needs the other, and a plugin that fails must not keep the monitor.
    let (detached, ended) = tokio::join!(detach(pod), end_monitor(pod));
    if let (Err(error), Err(_)) = (&detached, &ended) {
        // The monitor's failure is the answer.
        warn!(
            pod = pod.id(),
            error = error.chain(),
            "the network was not taken down either"
        );
    }
    ended.and(detached)
}

async fn end_monitor(pod: &PodHandle) -> Result<()> {
    crate::monitor::end(pod).await?;
    failpoint::reach("stop-pod.monitor").await
}

async fn detach(pod: &PodHandle) -> Result<()> {
    if pod.view().record.network.is_none() {
        return failpoint::reach("stop-pod.network").await;
    }
    let (network, id) = (pod.core().network.clone(), pod.id().to_owned());
    let detached = blocking(move || network.detach(&id))
        .await?
        .step("detach the pod's network");
    if detached.is_err() {
        pod.core().network_failed.notify_one();
    }
    failpoint::reach("stop-pod.network").await?;
    detached
}
