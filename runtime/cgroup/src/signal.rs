//! Processes of a group one by one, through pidfds: where there is no cgroup.kill and no event of emptiness.

use std::os::fd::OwnedFd;
#[cfg(feature = "cgroup-v1")]
use std::time::{Duration, Instant};

use coracle_kernel::Errno;
#[cfg(feature = "cgroup-v1")]
use coracle_kernel::epoll::{Interest, wait_one};
use coracle_kernel::pidfd;
use coracle_kernel::signal::Signal;

use crate::dir::Dir;
use crate::{Error, Pid, Result};

/// SIGKILL to each process of `dir` and below; how many there were.
pub(crate) fn kill_all(dir: &Dir) -> Result<usize> {
    let processes = open_all(dir)?;
    for (pid, process) in &processes {
        match pidfd::send_signal(process, Signal::KILL) {
            Err(error) if error.errno() != Errno::ESRCH => {
                let step = "kill a process of";
                return Err(Error::Step {
                    step,
                    path: format!("{} ({pid})", dir.path()),
                    source: error,
                });
            }
            _ => {}
        }
    }
    Ok(processes.len())
}

#[cfg(feature = "cgroup-v1")]
/// Waits until no process is left in `dir` and below; whether that is so.
pub(crate) fn wait_empty(dir: &Dir, timeout: Duration) -> Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        let processes = open_all(dir)?;
        let Some((_, process)) = processes.first() else {
            return Ok(dir.pids()?.is_empty());
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        wait_one(process, Interest::READ, Some(left)).map_err(|source| Error::Step {
            step: "wait for a process of",
            path: dir.path().to_owned(),
            source,
        })?;
    }
}

/// Descriptors of the processes, each one looked up again after it was opened: what was meanwhile given the number of
/// a process that ended is none of ours.
fn open_all(dir: &Dir) -> Result<Vec<(Pid, OwnedFd)>> {
    let mut processes = Vec::new();
    for pid in dir.pids()? {
        match pidfd::open(pid) {
            Ok(process) => processes.push((pid, process)),
            Err(error) if error.errno() == Errno::ESRCH => {}
            // The number of a thread: its process is elsewhere (v1 lets threads of one process lie apart).
            Err(error) if matches!(error.errno(), Errno::EINVAL | Errno::ENOENT) => {}
            Err(source) => {
                return Err(Error::Step {
                    step: "open a process of",
                    path: dir.path().to_owned(),
                    source,
                });
            }
        }
    }
    let still = dir.pids()?;
    processes.retain(|(pid, _)| still.contains(pid));
    Ok(processes)
}
