//! Pod networks need care between requests: their configuration is watched, and what could not be taken down is tried
//! again. What to do and when is the network's to say; here are the timers.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use coracle_network::{Network, Watch};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::{Id, JoinSet};
use tracing::{info, warn};

use crate::container::blocking;
use crate::core::Core;
use crate::error::{Context as _, Result};
use crate::record::SandboxPhase;

/// Pause after something that should not fail did.
const PAUSE: Duration = Duration::from_secs(10);

/// How many networks are tried again at a time.
const RETRIES_AT_ONCE: usize = 4;

/// Starts the care; it ends with the daemon.
pub(crate) fn start(core: &Arc<Core>) {
    tokio::spawn(keep_watching(core.network.clone()));
    tokio::spawn(keep_retrying(core.clone()));
    tokio::spawn(check_adopted(core.clone()));
}

async fn keep_watching(network: Arc<Network>) {
    loop {
        match watch(&network).await {
            Ok(()) => return,
            Err(error) => warn!(
                error = error.chain(),
                "the network's configuration is not watched"
            ),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Follows the network's configuration; ends where there is none to follow.
async fn watch(network: &Arc<Network>) -> Result<()> {
    let Some(watch) = network.watch().step("watch the network's configuration")? else {
        return Ok(());
    };
    let mut watch = register(watch).step("watch the network's configuration")?;
    loop {
        let network = network.clone();
        let refreshed = blocking(move || {
            let next = network.refresh(watch.get_mut());
            (watch, next)
        })
        .await?;
        watch = refreshed.0;
        let next = refreshed.1.step("look over the network's configuration")?;
        tokio::select! {
            ready = watch.readable() => {
                // Cleared before the events are taken: one that comes meanwhile makes it ready again.
                ready.step("watch the network's configuration")?.clear_ready();
            }
            () = tokio::time::sleep(next) => {}
        }
    }
}

fn register(watch: Watch) -> std::io::Result<AsyncFd<Watch>> {
    #[allow(
        deprecated,
        reason = "a watch is one descriptor for as long as it lives: the unsafe twin asks no more"
    )]
    AsyncFd::with_interest(watch, Interest::READABLE)
}

/// Tries networks again that could not be taken down, and brings their pods to their end then. Some side by side: one
/// plugin that hangs must not keep the others waiting.
async fn keep_retrying(core: Arc<Core>) {
    let mut tries = JoinSet::new();
    let mut busy: HashMap<Id, String> = HashMap::new();
    loop {
        let due = core.network.due(|pod| busy.values().any(|other| other == pod));
        let free = RETRIES_AT_ONCE.saturating_sub(busy.len());
        for pod in due.pods.into_iter().take(free) {
            let id = tries.spawn(retry(core.clone(), pod.clone())).id();
            busy.insert(id, pod);
        }
        tokio::select! {
            // Those that found no place have their turn at the latest now.
            Some(ended) = tries.join_next_with_id() => {
                let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
                busy.remove(&id);
            }
            () = core.network_failed.notified() => {}
            () = sleep_or_wait(due.next) => {}
        }
    }
}

async fn retry(core: Arc<Core>, pod: String) {
    let (network, id) = (core.network.clone(), pod.clone());
    match blocking(move || network.retry(&id)).await {
        // Apart: its containers may keep it waiting, and others wait for this place.
        Ok(true) => drop(tokio::spawn(async move { finish(&core, &pod).await })),
        Ok(false) => {}
        Err(error) => {
            warn!(
                pod,
                error = error.chain(),
                "a network that is left is not tried again yet"
            );
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// A pod whose stop failed for its network alone is stopped now.
async fn finish(core: &Arc<Core>, id: &str) {
    let Ok(pod) = core.registry.pod(id) else { return };
    if pod.view().record.phase == SandboxPhase::Stopping
        && let Err(error) = pod.stop_pod().await
    {
        info!(pod = id, error = error.chain(), "the pod is not stopped yet");
    }
}

/// Asks the plugins, one pod after the other, whether the pods that were found again still have their network.
async fn check_adopted(core: Arc<Core>) {
    let views = core.registry.views();
    let ready = views
        .iter()
        .filter(|view| view.record.phase == SandboxPhase::Ready && view.record.network.is_some());
    for view in ready {
        let (network, id) = (core.network.clone(), view.record.id.clone());
        match blocking(move || network.check(&id)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let error = crate::Error::step("check the pod's network", error);
                warn!(
                    pod = view.record.id,
                    error = error.chain(),
                    "the pod's network is not as it was made"
                );
            }
            Err(_) => return,
        }
    }
}

async fn sleep_or_wait(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}
