//! The wire's words in the engine's.

use coracle_wire::ContainerState;

use super::{Listed, ListedState};
use crate::container::exit_from_status;

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
    let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", exec.pid)).unwrap_or_default();
    // The number may have been given away since the monitor listed it.
    if cgroups.contains(&exec.container_id) {
        let _ = coracle_kernel::signal::kill(exec.pid, coracle_kernel::signal::Signal::KILL);
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
