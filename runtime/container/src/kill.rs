//! Kill: a signal to the init, by its process descriptor.

use std::time::Duration;

use coracle_kernel::signal::Signal;
use coracle_kernel::{Errno, pidfd};
use coracle_spec::Status;

use std::os::fd::OwnedFd;

use crate::state::{Process, State};
use crate::store::{Entry, manager};
use crate::{Error, Result};

/// How long the members of a cgroup may take to be gone after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends a signal to a container's init. SIGKILL to one without a pid namespace of its own kills the whole cgroup, as
/// the end of the init would not end the others.
///
/// With `all` it is no error that the init has ended, and SIGKILL goes to whatever is left.
pub fn kill(entry: &Entry, signal: Signal, all: bool) -> Result<()> {
    let state = entry.state()?.ok_or(Error::NotFound)?;
    let whole = signal == Signal::KILL && (all || !state.own_pid_namespace);
    if entry.status(&state) == Status::Stopped {
        // Of a container without a pid namespace the others may live on.
        if whole && !state.own_pid_namespace && kill_cgroup(&state)? {
            return Ok(());
        }
        return if all { Ok(()) } else { Err(Error::NotRunning) };
    }
    let sent = match init(&state)? {
        Some(pidfd) => send(&pidfd, signal)?,
        None => false,
    };
    if whole {
        kill_cgroup(&state)?;
    }
    if sent || all {
        Ok(())
    } else {
        Err(Error::NotRunning)
    }
}

/// SIGKILL to the init and to whatever is in the cgroup.
pub(crate) fn kill_all(state: &State) -> Result<()> {
    if let Some(pidfd) = init(state)? {
        send(&pidfd, Signal::KILL)?;
    }
    if !state.own_pid_namespace || state.pid == 0 {
        kill_cgroup(state)?;
    }
    Ok(())
}

/// The init's process descriptor, for certain that of the process on record; none where it is gone.
pub(crate) fn init(state: &State) -> Result<Option<OwnedFd>> {
    if state.pid <= 0 {
        return Ok(None);
    }
    let pidfd = match pidfd::open(state.pid) {
        Err(error) if error.errno() == Errno::ESRCH => return Ok(None),
        other => other.map_err(|source| Error::call("open the container's init", source))?,
    };
    // Looked at after it was opened: the descriptor is of the process that is seen now.
    let same = Process::look(state.pid).is_some_and(|seen| seen.start_time == state.start_time);
    Ok(same.then_some(pidfd))
}

/// Whether there was something to kill.
fn kill_cgroup(state: &State) -> Result<bool> {
    let Some(cgroup) = manager(state)? else {
        return Ok(false);
    };
    if !cgroup.exists() || cgroup.pids()?.is_empty() {
        return Ok(false);
    }
    cgroup.kill(KILL_TIMEOUT)?;
    Ok(true)
}

fn send(pidfd: &OwnedFd, signal: Signal) -> Result<bool> {
    match pidfd::send_signal(pidfd, signal) {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Errno::ESRCH => Ok(false),
        Err(source) => Err(Error::call("signal the container's init", source)),
    }
}
