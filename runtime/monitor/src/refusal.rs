//! Why a request is not served.

use coracle_wire::{ContainerState, FailKind, Failed};

use crate::connection::failed;
use crate::container::Container;

/// A request that cannot be served, and why.
pub(crate) type Outcome<T = ()> = Result<T, Failed>;

/// Longest id.
const MAX_ID: usize = 256;

/// A request that does not fit what the container does.
pub(crate) fn not_in_state(container: &Container, what: &str, state: ContainerState) -> Failed {
    let state = match state {
        ContainerState::Creating => "being created",
        ContainerState::Created => "created and not started",
        ContainerState::Running => "running",
        ContainerState::Exited => "exited",
    };
    failed(
        FailKind::State,
        format!("cannot {what} container {:?}: it is {state}", container.id),
    )
}

/// An id may become part of a path.
pub(crate) fn check_id(field: &str, id: &str) -> Outcome {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-' | b'+');
    if id.is_empty() || id.len() > MAX_ID || !id.bytes().all(good) {
        return Err(failed(
            FailKind::Invalid,
            format!("{field}: not 1 to {MAX_ID} of [A-Za-z0-9_.+-]"),
        ));
    }
    Ok(())
}

/// A name that is only ever compared; it may hold what a path does.
pub(crate) fn check_exec_id(id: &str) -> Outcome {
    if id.is_empty() || id.len() > MAX_ID || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(failed(
            FailKind::Invalid,
            format!("exec_id: not 1 to {MAX_ID} visible characters"),
        ));
    }
    Ok(())
}

/// Paths are the daemon's own, and it has none that is relative.
pub(crate) fn check_path(field: &str, path: &str) -> Outcome {
    if !path.starts_with('/') || path.contains('\0') || path.len() >= 4096 {
        return Err(failed(
            FailKind::Invalid,
            format!("{field}: not an absolute path"),
        ));
    }
    Ok(())
}

/// Says what was being done when a call failed.
pub(crate) fn kernel(doing: &'static str) -> impl Fn(coracle_kernel::Error) -> Failed {
    move |error| Failed {
        errno: error.errno().raw(),
        step: doing.to_owned(),
        ..failed(FailKind::Other, format!("cannot {doing}: {error}"))
    }
}
