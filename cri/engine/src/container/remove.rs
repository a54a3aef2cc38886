//! RemoveContainer: what still runs is killed, then everything of the container goes, its record last.

use std::io;
use std::time::Duration;

use tracing::warn;

use super::{blocking, release_cgroup};
use crate::error::{Context as _, Result};
use crate::failpoint;
use crate::pod::{Change, Operation, PodHandle};
use crate::record::ContainerPhase;

/// Removes a container in whatever state it is; each step may have been done before.
pub(crate) async fn remove(pod: PodHandle, id: String, create: Operation) -> Result<()> {
    // A failed creation leaves the record only if its undoing failed too: that is made up for here.
    let _ = create.done().await;
    let Ok(view) = pod.container(&id) else {
        return Ok(());
    };
    if view.record.is_alive() && view.record.phase != ContainerPhase::Creating {
        pod.stop(&id, Duration::ZERO).await?;
    }
    pod.edit_container(&id, |record| record.phase = ContainerPhase::Removing)
        .await?;
    failpoint::reach("remove.intent").await?;
    discard(&pod, &id).await?;
    pod.change(Change::ContainerGone { id }).await?;
    failpoint::reach("remove.done").await
}

/// Takes away everything of a container but its record. Also the undoing of a creation, wherever that stopped.
pub(crate) async fn discard(pod: &PodHandle, id: &str) -> Result<()> {
    // Everything dies first: the monitor lets go of no container whose init lives.
    release_cgroup(pod, id).await?;
    pod.set_hold(id, None);
    // A monitor that does not answer keeps nothing that its death, or the pod's end, does not free.
    if let Some(monitor) = pod.monitor()
        && let Err(error) = monitor.forget(id).await
    {
        warn!(
            container = id,
            error = error.chain(),
            "the monitor did not let go of the container"
        );
    }
    failpoint::reach("remove.monitor").await?;

    let core = pod.core().clone();
    let (bundle, container) = (core.paths.bundle(pod.id(), id), id.to_owned());
    let snapshots = core.snapshots.clone();
    blocking(move || snapshots.remove(&container))
        .await?
        .step("remove the container's writable layer")?;
    blocking(move || remove_dir(&bundle))
        .await?
        .step("remove the container's bundle")?;
    failpoint::reach("remove.files").await
}

/// Removes a directory of ours with all that is in it; one that is not there is no error.
pub(crate) fn remove_dir(path: &std::path::Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}
