//! Helpers: short-lived clones of the monitor that read configurations and do the parent's half of the work. Their
//! memory goes with them, and a helper that hangs is killed at its deadline while the monitor serves the rest.
//!
//! A helper has one socket to the monitor. Over it goes the step that it has come to, and at the end one report; a
//! socket that closes without one is a helper that died.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use coracle_kernel::clone::{Child, Clone3};
use coracle_kernel::signal::{self, Signal};
use coracle_kernel::{fd, pidfd, scm, tty};
use coracle_wire::{CgroupPath, FailKind, Failed};
use prost::Message;

use crate::connection::{cut, failed};
use crate::container::Reply;

/// Longest text that a report carries.
const MAX_TEXT: usize = 8192;

/// A helper at work.
#[derive(Debug)]
pub(crate) struct Helper {
    /// What its tokens carry.
    pub(crate) serial: u32,
    pub(crate) child: Child,
    /// Our end of its socket.
    pub(crate) socket: OwnedFd,
    /// By the monotonic clock.
    pub(crate) deadline_ns: u64,
    /// The step that it has come to.
    pub(crate) step: String,
    pub(crate) job: Job,
}

/// What a helper is for.
#[derive(Debug)]
pub(crate) enum Job {
    /// Makes the pod's namespaces.
    Setup {
        reply: Reply,
        pod_id: String,
        pod_dir: String,
    },
    /// Makes the container with this serial.
    Create { reply: Reply, container: u32 },
    /// Executes a process.
    Exec {
        reply: Reply,
        exec_id: String,
        container: u32,
        tty: bool,
    },
    /// Runs the hooks after the start of the container with this serial.
    Poststart { container: u32, replies: Vec<Reply> },
    /// Runs the hooks after its end.
    Poststop { container: u32 },
}

/// What a helper says.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Report {
    /// It has come to this step.
    #[prost(string, tag = "1")]
    pub(crate) step: String,
    /// It is done. Descriptors: as the fields say.
    #[prost(message, optional, tag = "2")]
    pub(crate) made: Option<Made>,
    /// It failed.
    #[prost(message, optional, tag = "3")]
    pub(crate) failed: Option<Failed>,
}

/// What a helper has made.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Made {
    /// The new process; its pidfd is the first descriptor. 0 where none was made.
    #[prost(int32, tag = "1")]
    pub(crate) pid: i32,
    /// Whether a terminal's master comes after it.
    #[prost(bool, tag = "2")]
    pub(crate) terminal: bool,
    /// Kinds of the namespaces whose descriptors came: their names below `/proc/<pid>/ns`.
    #[prost(string, repeated, tag = "3")]
    pub(crate) namespaces: Vec<String>,
    /// The container's cgroup.
    #[prost(message, repeated, tag = "4")]
    pub(crate) cgroup: Vec<CgroupPath>,
    /// Whether there are poststart hooks.
    #[prost(bool, tag = "5")]
    pub(crate) poststart: bool,
    /// Whether there are poststop hooks.
    #[prost(bool, tag = "6")]
    pub(crate) poststop: bool,
    /// What could not be granted.
    #[prost(string, repeated, tag = "7")]
    pub(crate) warnings: Vec<String>,
}

/// The helper's end of its socket.
#[derive(Debug)]
pub(crate) struct Reporter(OwnedFd);

impl Reporter {
    /// Says which step begins: what an answer names if the step does not end in time.
    pub(crate) fn step(&self, step: &str) {
        self.send(
            &Report {
                step: step.to_owned(),
                ..Report::default()
            },
            &[],
        );
    }

    /// Says that it is done.
    pub(crate) fn made(&self, made: Made, fds: &[BorrowedFd<'_>]) {
        self.send(
            &Report {
                made: Some(made),
                ..Report::default()
            },
            fds,
        );
    }

    fn send(&self, report: &Report, fds: &[BorrowedFd<'_>]) {
        // A monitor that is gone hears nothing, and the helper ends soon.
        let _ = scm::send(&self.0, &report.encode_to_vec(), fds);
    }
}

/// What came over a helper's socket.
#[derive(Debug)]
pub(crate) enum Heard {
    /// It has come to another step.
    Step,
    /// It is done.
    Made(Made, Vec<OwnedFd>),
    /// It failed, or died.
    Failed(Failed),
}

/// What a helper does, with everything that it needs.
pub(crate) trait Work {
    /// The descriptors in it; all others of the monitor are closed in the helper.
    fn fds(&self) -> Vec<BorrowedFd<'_>>;

    /// Does it, and reports what was made.
    fn run(self, reporter: &Reporter) -> Result<(), Failed>;
}

/// Clones a helper. `oom_score` is what it, and whatever it makes, has instead of the monitor's own.
pub(crate) fn spawn(work: impl Work, oom_score: &str) -> coracle_kernel::Result<(Child, OwnedFd)> {
    let (ours, theirs) = scm::pair(scm::Kind::Seqpacket, scm::Mode::Blocking)?;
    let child = Clone3::default().spawn(move || {
        let reporter = Reporter(theirs);
        let mut keep = work.fds();
        keep.push(reporter.0.as_fd());
        let closed = fd::close_all_but(&keep);
        drop(keep);
        let outcome = closed
            .map_err(|error| failed(FailKind::Other, error.to_string()))
            .and_then(|()| {
                // Raising it needs no right. Where procfs is not there to say so, nothing was lowered either.
                let _ = std::fs::write("/proc/self/oom_score_adj", oom_score);
                signal::set_mask(signal::Set::EMPTY);
                // Its own process group: whoever ends it ends its hooks too, as far as they are no daemons.
                tty::new_session().map_err(|error| failed(FailKind::Other, error.to_string()))?;
                work.run(&reporter)
            });
        if let Err(mut failed) = outcome {
            failed.message.truncate(cut(&failed.message, MAX_TEXT));
            reporter.send(
                &Report {
                    failed: Some(failed),
                    ..Report::default()
                },
                &[],
            );
        }
        0
    })?;
    Ok((child, ours))
}

impl Helper {
    /// Hears what it says; to be called when its socket is readable.
    pub(crate) fn hear(&mut self) -> Heard {
        let mut buffer = vec![0; scm::next_len(&self.socket).unwrap_or(0)];
        let died = || Heard::Failed(self.died());
        let Ok(received) = scm::recv(&self.socket, &mut buffer) else {
            return died();
        };
        let Ok(report) = Report::decode(buffer.get(..received.len).unwrap_or_default()) else {
            return died();
        };
        if let Some(mut failed) = report.failed {
            if failed.step.is_empty() {
                failed.step.clone_from(&self.step);
            }
            return Heard::Failed(failed);
        }
        match report.made {
            Some(made) => {
                let wanted = usize::from(made.pid != 0) + usize::from(made.terminal) + made.namespaces.len();
                if received.fds.len() == wanted {
                    Heard::Made(made, received.fds)
                } else {
                    died()
                }
            }
            None if report.step.is_empty() => died(),
            None => {
                self.step = report.step;
                Heard::Step
            }
        }
    }

    /// Ends it, with the hooks that it has started. To be called before it is reaped: then the group is its own.
    pub(crate) fn kill(&self) {
        // Dead already is as good.
        let _ = pidfd::send_signal(&self.child.pidfd, Signal::KILL);
        let _ = signal::kill_group(self.child.pid, Signal::KILL);
    }

    fn died(&self) -> Failed {
        Failed {
            step: self.step.clone(),
            ..failed(FailKind::Other, format!("helper died: {}", self.step))
        }
    }
}
