//! StartContainer: the intent on the disk, then the word to the init that waits for it.

use super::record_exit;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::ident;
use crate::pod::{Change, Exit, PodHandle};
use crate::record::ContainerPhase;

/// Exit code of a container whose program could not be executed, as other CRI servers report it.
const START_ERROR: i32 = 128;

/// Starts a created container; returns when its program runs.
pub(crate) async fn start(pod: PodHandle, id: String) -> Result<()> {
    let started_at = ident::now_ns();
    pod.edit_container(&id, move |record| {
        if record.phase == ContainerPhase::Created {
            record.phase = ContainerPhase::Started;
            record.started_at = started_at.max(record.created_at);
        }
    })
    .await?;
    failpoint::reach("start.intent").await?;

    let outcome = match pod.monitor() {
        Some(monitor) => monitor.start_container(&id).await,
        None => Err(Error::State {
            what: "container",
            id: id.clone(),
            why: "has lost its monitor".to_owned(),
        }),
    };
    failpoint::reach("start.monitor").await?;
    if let Err(error) = outcome {
        let exit = Exit {
            code: START_ERROR,
            reason: "StartError".to_owned(),
            message: error.chain(),
            at: ident::now_ns(),
        };
        pod.edit_container(&id, move |record| record_exit(record, exit))
            .await?;
        return Err(error);
    }
    pod.change(Change::Running { id, running: true }).await?;
    pod.core().usage_wanted.notify_one();
    failpoint::reach("start.done").await
}
