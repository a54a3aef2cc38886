//! The wire's words in the engine's.

use coracle_kernel::pidfd;
use coracle_kernel::signal::Signal;
use coracle_wire::{ContainerState, FailKind, Failed};

use super::{Listed, ListedState};
use crate::container::exit_from_status;
use crate::error::Error;

/// A container of the monitor's list; none for one that is not there yet.
pub(super) fn listed(container: coracle_wire::Container) -> Option<Listed> {
    let state = match (container.state(), container.exit) {
        // Being made for somebody who is gone: it is forgotten once it is there.
        (ContainerState::Creating, _) => return None,
        (ContainerState::Created, _) => ListedState::Created,
        (ContainerState::Exited, Some(end)) => ListedState::Exited(exit(&end)),
        (ContainerState::Running | ContainerState::Exited, _) => ListedState::Running,
    };
    Some(Listed {
        id: container.container_id,
        state,
    })
}

/// How a process ended.
pub(super) fn exit(exit: &coracle_wire::Exit) -> crate::pod::Exit {
    exit_from_status(exit.exit_code, exit.oom, exit.finished_at_ns)
}

/// An exec whose caller is gone with an earlier daemon is killed.
pub(super) fn kill_stray(exec: &coracle_wire::ExecProcess) {
    let Ok(pidfd) = pidfd::open(exec.pid) else { return };
    // The number may have been given away before it was opened. From there on it is one process that is meant.
    let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", exec.pid)).unwrap_or_default();
    if cgroups.contains(&exec.container_id) {
        let _ = pidfd::send_signal(&pidfd, Signal::KILL);
    }
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// What a monitor answers to a request that failed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(super) struct Refused {
    pub(super) kind: FailKind,
    pub(super) message: String,
}

/// A refusal as an error.
pub(super) fn refused(failed: Failed) -> Error {
    let kind = failed.kind();
    Error::step(
        "ask the monitor",
        Refused {
            kind,
            message: failed.message,
        },
    )
}

/// Whether a failed request was refused for this reason.
pub(super) fn is_refusal(error: &Error, kind: FailKind) -> bool {
    matches!(error, Error::Step { cause, .. }
        if cause.downcast_ref::<Refused>().is_some_and(|refused| refused.kind == kind))
}
