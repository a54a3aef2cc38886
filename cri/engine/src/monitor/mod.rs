//! The monitor of a pod, seen from the daemon: its start, its connection, its end.
//!
//! The daemon holds a pidfd of each monitor and of each container's init itself: what has to be killed is killed
//! without asking. The monitor is asked for what only the parent of a process can do or know.

mod calls;
mod client;
mod execs;
mod process;
mod words;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coracle_cgroup::Location;
use coracle_proto::cri::NamespaceOption;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tracing::{info, warn};

pub use execs::ExecExit;
pub(crate) use process::end_unknown;
pub use process::seal_monitor_program;

use crate::container::start_time;
use crate::error::{Error, Result};
use crate::pod::{Exit, Message, PodHandle};
use crate::record::MonitorRecord;
use crate::spec_gen::PodNamespaces;
use client::Link;

/// How long a monitor without containers may take to leave after it was asked to.
const LEAVE_TIME: Duration = Duration::from_secs(2);

/// A monitor; clones are the same one.
#[derive(Debug, Clone)]
pub(crate) struct Monitor(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pid: i32,
    start_time: u64,
    pidfd: OwnedFd,
    link: Link,
    namespaces: watch::Sender<PodNamespaces>,
    dead: watch::Sender<bool>,
    reconciled: watch::Receiver<bool>,
}

/// What a monitor tells without being asked.
#[derive(Debug)]
pub(crate) enum MonitorEvent {
    /// A container's init ended.
    Exited { container: String, exit: Exit },
    /// Output that could not be written to the log.
    LogLost { container: String, bytes: u64 },
    /// A connection was made: this is what the monitor has.
    Containers {
        listed: Vec<Listed>,
        done: oneshot::Sender<Result<()>>,
    },
    /// Its process is gone.
    Died,
}

/// A container as its monitor knows it.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    pub(crate) id: String,
    pub(crate) state: ListedState,
}

#[derive(Debug, Clone)]
pub(crate) enum ListedState {
    /// Its init waits for the word.
    Created,
    Running,
    Exited(Exit),
}

/// What the monitor makes for a pod.
#[derive(Debug)]
pub(crate) struct SetupCall {
    pub(crate) pod_id: String,
    pub(crate) pod_dir: PathBuf,
    pub(crate) hostname: String,
    pub(crate) sysctls: Vec<(String, String)>,
    pub(crate) options: NamespaceOption,
    /// The pod's pinned network namespace; none for the host's.
    pub(crate) netns: Option<String>,
    /// Cgroup of the init of a pid namespace that the pod's containers share; none where they do not.
    pub(crate) pid_cgroup: Option<Location>,
}

/// A container to be created.
#[derive(Debug)]
pub(crate) struct CreateCall {
    pub(crate) container: String,
    pub(crate) bundle: PathBuf,
    pub(crate) log_path: String,
    pub(crate) tty: bool,
    pub(crate) stdin: bool,
    pub(crate) stdin_once: bool,
    /// Its root file system, a detached mount.
    pub(crate) rootfs: OwnedFd,
}

/// A created container.
#[derive(Debug)]
pub(crate) struct Created {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
}

/// A command to be run in a container.
#[derive(Debug)]
pub(crate) struct ExecCall {
    pub(crate) container: String,
    pub(crate) exec: String,
    /// OCI process document.
    pub(crate) process: Vec<u8>,
    /// Standard input, output and error; what is none is `/dev/null`, or the terminal.
    pub(crate) stdio: [Option<OwnedFd>; 3],
    /// Whether it gets a terminal, and none of these.
    pub(crate) tty: bool,
    /// Where it runs; none is the container's own leaf.
    pub(crate) cgroup: Option<Location>,
}

/// A command that runs.
#[derive(Debug)]
pub(crate) struct ExecStarted {
    pub(crate) exit: ExecExit,
    /// The terminal's master, if it has one.
    pub(crate) terminal: Option<OwnedFd>,
}

/// A session that looks on.
#[derive(Debug)]
pub(crate) struct AttachCall {
    pub(crate) container: String,
    /// Whether the container's input is wanted.
    pub(crate) stdin: bool,
    /// Where its output and its errors go.
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

/// What a session has of a container.
#[derive(Debug)]
pub(crate) struct Attached {
    /// The container's input, if it has one and it was wanted.
    pub(crate) stdin: Option<OwnedFd>,
    /// The terminal's master, which is its input too.
    pub(crate) terminal: Option<OwnedFd>,
}

impl Monitor {
    /// Starts a monitor for a pod.
    pub(crate) async fn start(pod: &PodHandle) -> Result<Monitor> {
        let child = process::spawn(pod.core().clone(), pod.id().to_owned()).await?;
        let start_time = start_time(child.pid);
        Monitor::attach(pod, child.pid, start_time, child.pidfd, PodNamespaces::default())
    }

    /// Takes the monitor of an earlier daemon over; none if it is dead.
    pub(crate) async fn adopt(pod: &PodHandle, record: &MonitorRecord) -> Result<Option<Monitor>> {
        let Ok(pidfd) = coracle_kernel::pidfd::open(record.pid) else {
            return Ok(None);
        };
        // The number may belong to another process by now: the birth time tells.
        if start_time(record.pid) != record.start_time {
            return Ok(None);
        }
        Monitor::attach(
            pod,
            record.pid,
            record.start_time,
            pidfd,
            record.namespaces.clone(),
        )
        .map(Some)
    }

    fn attach(
        pod: &PodHandle,
        pid: i32,
        start_time: u64,
        pidfd: OwnedFd,
        namespaces: PodNamespaces,
    ) -> Result<Monitor> {
        let (reconciled_sender, reconciled) = watch::channel(false);
        let dead = watch::Sender::new(false);
        let link = Link::start(pod.clone(), dead.subscribe(), reconciled_sender)?;
        let monitor = Monitor(Arc::new(Inner {
            pid,
            start_time,
            pidfd,
            link,
            namespaces: watch::Sender::new(namespaces),
            dead,
            reconciled,
        }));
        process::watch(pod.clone(), monitor.clone())?;
        Ok(monitor)
    }

    /// Has it run our program where it runs another one: a fixed daemon so fixes running pods. Its pid, its children and
    /// their streams stay; a monitor that cannot goes on as it is.
    pub(crate) async fn upgrade_if_older(&self, pod: &PodHandle) {
        let core = pod.core();
        if process::runs(self.0.pid, &core.monitor_program) {
            return;
        }
        match self.upgrade(&core.monitor_program).await {
            Ok(()) => info!(pod = pod.id(), "the monitor runs the new program"),
            Err(error) => warn!(
                pod = pod.id(),
                error = error.chain(),
                "the monitor stays with its old program"
            ),
        }
    }

    /// What goes on record about it.
    pub(crate) fn record(&self) -> MonitorRecord {
        MonitorRecord {
            pid: self.0.pid,
            start_time: self.0.start_time,
            namespaces: self.namespaces(),
        }
    }

    /// The pod's namespaces that it holds.
    pub(crate) fn namespaces(&self) -> PodNamespaces {
        self.0.namespaces.borrow().clone()
    }

    pub(crate) fn is_dead(&self) -> bool {
        *self.0.dead.borrow()
    }

    /// Returns when its process is gone.
    pub(crate) async fn died(&self) {
        // The sender lives in `self`.
        let _ = self.0.dead.subscribe().wait_for(|dead| *dead).await;
    }

    /// Returns when what it has was compared with what the records say.
    pub(crate) async fn reconciled(&self) {
        let _ = self.0.reconciled.clone().wait_for(|reconciled| *reconciled).await;
    }

    fn declare_dead(&self) {
        self.0.dead.send_replace(true);
    }
}

/// Ends the monitor of a pod whose containers have ended, and removes its socket and its cgroup. One that does not
/// leave is killed; with it go the namespaces that it held.
pub(crate) async fn end(pod: &PodHandle) -> Result<()> {
    if let Some(monitor) = pod.monitor() {
        if !monitor.is_dead() {
            let leave = async {
                for id in pod.view().containers.keys() {
                    monitor.forget(id).await?;
                }
                monitor.shut_down().await?;
                monitor.died().await;
                Ok::<_, Error>(())
            };
            match timeout(LEAVE_TIME, leave).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) if !monitor.is_dead() => {
                    warn!(
                        pod = pod.id(),
                        error = error.chain(),
                        "the monitor does not leave, it is killed"
                    );
                }
                Ok(Err(_)) => {}
                Err(_) => warn!(pod = pod.id(), "the monitor does not leave in time, it is killed"),
            }
        }
        process::kill(&monitor).await?;
        pod.set_monitor(None);
    }
    process::clean(pod.core().clone(), pod.id().to_owned()).await
}

/// Tells the pod's task of an event.
fn tell(pod: &PodHandle, event: MonitorEvent) {
    pod.tell(Message::Monitor(event));
}
