//! Delete: what is left of a container goes, in the order in which a delete that dies in between can be taken up again.

use std::os::fd::AsFd;
use std::time::Duration;

use coracle_kernel::epoll::{self, Interest};
use coracle_kernel::path;
use coracle_spec::{HookState, Status};

use crate::state::State;
use crate::store::{Entry, manager};
use crate::{Error, Result, hooks, kill};

/// How long an init that was killed, and then its cgroup, may take to be gone.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether a running container may be deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// It is killed first.
    Yes,
    /// That is refused.
    No,
}

/// Deletes a container; what its poststop hooks had to complain about.
pub fn delete(entry: &Entry, force: Force) -> Result<Vec<String>> {
    entry.lock()?;
    let state = match entry.state() {
        Ok(state) => state,
        // With force an unreadable record too is removed with the rest.
        Err(Error::Record(_)) if force == Force::Yes => None,
        Err(error) => return Err(error),
    };
    let Some(state) = state else {
        if force == Force::Yes {
            return destroy(entry, None);
        }
        return Err(Error::NotFound);
    };
    let status = entry.status(&state);
    match status {
        Status::Stopped | Status::Created | Status::Creating => {}
        Status::Running | Status::Paused if force == Force::Yes => {}
        status => {
            return Err(Error::NotStopped {
                id: entry.id().to_owned(),
                status,
            });
        }
    }
    destroy(entry, Some(&state))
}

/// Ends and removes everything that the record tells of: processes, cgroup, record; then the hooks.
pub(crate) fn destroy(entry: &Entry, state: Option<&State>) -> Result<Vec<String>> {
    let Some(state) = state else {
        entry.remove()?;
        return Ok(Vec::new());
    };
    // Read before it goes with the rest.
    let config = if state.poststop_hooks {
        entry.config().ok()
    } else {
        None
    };
    if let Some(pidfd) = kill::init(state)? {
        kill::kill_all(state)?;
        let ended = epoll::wait_one(&pidfd, Interest::READ, Some(END_TIMEOUT))
            .map_err(|source| Error::call("wait for the container's init", source))?;
        if ended.is_empty() {
            return Err(Error::Refused("container init still running".to_owned()));
        }
    }
    if let Some(mut cgroup) = manager(state)?
        && cgroup.exists()
    {
        // Without a pid namespace, or after a create that died, others may be left.
        if !cgroup.pids()?.is_empty() {
            cgroup.kill(END_TIMEOUT)?;
        }
        cgroup.remove(END_TIMEOUT)?;
    }
    entry.remove()?;
    let Some(config) = config else {
        return Ok(Vec::new());
    };
    let document = HookState::new(entry.id(), Status::Stopped, 0, &state.bundle, &config.annotations);
    let cwd = path::open_dir(&state.bundle)
        .or_else(|_| path::open_dir("/"))
        .map_err(|source| Error::call("open the bundle", source))?;
    let place = hooks::Place {
        list: "poststop",
        cwd: cwd.as_fd(),
        default_env: &[],
    };
    let complaints = hooks::run_all(&config.hooks.poststop, place, &document);
    Ok(complaints.iter().map(ToString::to_string).collect())
}
