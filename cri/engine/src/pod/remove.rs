//! RemovePodSandbox: the pod is stopped, its containers go, then its files, its record last.

use super::stop::release;
use super::{Change, Message, PodHandle, all_done};
use crate::container::{blocking, remove_dir};
use crate::error::{Context as _, Result};
use crate::failpoint;
use crate::record::SandboxPhase;

/// Removes a pod in whatever state it is; each step may have been done before.
pub(super) async fn remove(pod: PodHandle) -> Result<()> {
    // A failed run that undid itself leaves nothing to do.
    if pod.run_operation().done().await.is_err() && pod.is_gone() {
        return Ok(());
    }
    pod.stop_pod().await?;
    pod.edit(|record| record.phase = SandboxPhase::Removing).await?;
    failpoint::reach("remove-pod.intent").await?;
    let removals = pod.ask(|reply| Message::RemoveAll { reply }).await?;
    all_done(removals).await?;
    failpoint::reach("remove-pod.containers").await?;
    discard(&pod).await?;
    pod.change(Change::SandboxGone).await?;
    failpoint::reach("remove-pod.done").await
}

/// Takes away what a sandbox may still hold and its files.
pub(crate) async fn discard(pod: &PodHandle) -> Result<()> {
    release(pod).await?;
    let dir = pod.core().paths.pod(pod.id());
    blocking(move || remove_dir(&dir))
        .await?
        .step("remove the pod's files")?;
    failpoint::reach("remove-pod.files").await
}
