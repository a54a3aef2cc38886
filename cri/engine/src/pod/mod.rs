//! A pod: one task owns it (`task`), operations run beside that task and ask it for changes.
//!
//! What excludes what, within one pod:
//!
//! | running | create | start | stop container | remove container | stop pod | remove pod |
//! | --- | --- | --- | --- | --- | --- | --- |
//! | run sandbox | refused | – | – | – | waits for it | waits for it |
//! | create A | same request joins, another one undoes A first | – | waits for it | waits for it | waits for it | waits for it |
//! | start A | – | joins | waits for it | refused | waits for it | waits for it |
//! | stop A | – | refused | joins, and may shorten it | waits for it | shortens it to nothing | shortens it |
//! | remove A | – | not found | joins | joins | joins | joins |
//! | stop pod | refused | refused | joins | – | joins | waits for it |
//!
//! Exec and log reopening are not in the table: they change nothing here and never wait for anything in it.
//! Operations on different containers overlap.

mod change;
mod dial;
mod events;
mod files;
mod operation;
mod remove;
mod run;
mod stop;
mod task;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use coracle_proto::cri::{ContainerConfig, PodSandboxConfig};
use tokio::sync::{mpsc, oneshot, watch};

pub(crate) use dial::{check_ready, dial};
pub(crate) use operation::{Operation, all_done};
pub(crate) use task::{Restored, RestoredContainer, Start, prepare};

use crate::container::Hold;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::monitor::{Monitor, MonitorEvent};
use crate::record::{ContainerRecord, SandboxRecord};
use crate::view::{ContainerView, PodView};

/// A pod, as everybody but its task has it.
#[derive(Debug, Clone)]
pub(crate) struct PodHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    id: String,
    core: Arc<Core>,
    mailbox: mpsc::UnboundedSender<Message>,
    view: watch::Sender<Arc<PodView>>,
    /// Set for good once the pod is being taken down: creations give up at their next step.
    stopping: watch::Sender<bool>,
    monitor: RwLock<Option<Monitor>>,
    /// What is held of each container with a process.
    holds: RwLock<BTreeMap<String, Arc<Hold>>>,
    run: OnceLock<Operation>,
    /// Another sandbox has its identity: all that is left to do is to remove it.
    doomed: AtomicBool,
}

/// What a pod's task is sent.
pub(crate) enum Message {
    /// Verbs of clients. The answer is the operation, at once: it is awaited by whoever asked.
    Create {
        request: Box<CreateRequest>,
        reply: oneshot::Sender<Result<(String, Operation)>>,
    },
    Start {
        id: String,
        reply: oneshot::Sender<Result<Operation>>,
    },
    Stop {
        id: String,
        grace: Duration,
        reply: oneshot::Sender<Result<Operation>>,
    },
    Remove {
        id: String,
        reply: oneshot::Sender<Result<Operation>>,
    },
    StopPod {
        reply: oneshot::Sender<Result<Operation>>,
    },
    RemovePod {
        reply: oneshot::Sender<Result<Operation>>,
    },
    /// From the recovery.
    StopFor {
        reason: &'static str,
        reply: oneshot::Sender<Operation>,
    },
    /// From the stop and removal of the pod: what is in flight, stops of everything, removals of everything.
    InFlight {
        reply: oneshot::Sender<Vec<Operation>>,
    },
    StopAll {
        reply: oneshot::Sender<Vec<Operation>>,
    },
    RemoveAll {
        reply: oneshot::Sender<Vec<Operation>>,
    },
    /// From operations.
    Change {
        change: Change,
        reply: oneshot::Sender<Result<()>>,
    },
    /// A row that must get to the disk is tried again.
    Insist {
        id: String,
        replies: Vec<oneshot::Sender<Result<()>>>,
    },
    /// From the monitor's connection.
    Monitor(MonitorEvent),
    /// The daemon's own descriptor says that a container's init is gone.
    InitGone {
        id: String,
    },
    /// The monitor had its time to say how a container ended.
    ExitOverdue {
        id: String,
    },
}

/// A CreateContainer request, checked as far as that goes without the pod.
#[derive(Debug)]
pub(crate) struct CreateRequest {
    pub(crate) identity: crate::ident::ContainerIdentity,
    pub(crate) hash: String,
    pub(crate) config: ContainerConfig,
    /// The request, encoded anew.
    pub(crate) raw: Vec<u8>,
}

/// A change that an operation asks for. It is written, then shown, then acknowledged.
pub(crate) enum Change {
    Sandbox(Box<dyn FnOnce(&mut SandboxRecord) + Send>),
    NewContainer {
        record: Box<ContainerRecord>,
    },
    Container {
        id: String,
        edit: Box<dyn FnOnce(&mut ContainerRecord) + Send>,
    },
    /// The monitor has said whether the program runs; nothing is written for that.
    Running {
        id: String,
        running: bool,
    },
    ContainerGone {
        id: String,
    },
    SandboxGone,
}

/// How a container's init ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) code: i32,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) at: i64,
}

impl PodHandle {
    pub(crate) fn id(&self) -> &str {
        &self.0.id
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.0.core
    }

    /// The present snapshot.
    pub(crate) fn view(&self) -> Arc<PodView> {
        self.0.view.borrow().clone()
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<ContainerView>> {
        self.view()
            .containers
            .get(id)
            .cloned()
            .ok_or_else(|| Error::NotFound {
                what: "container",
                id: id.to_owned(),
            })
    }

    /// The operation that makes the pod; for a recovered one it is over.
    pub(crate) fn run_operation(&self) -> Operation {
        // Set before the handle is given to anybody.
        let set = self.0.run.get().cloned();
        set.unwrap_or_else(|| Operation::finished(Err(Error::ShuttingDown)))
    }

    pub(crate) fn is_doomed(&self) -> bool {
        self.0.doomed.load(Ordering::Relaxed)
    }

    /// Whether its task has ended: its record is gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.0.mailbox.is_closed()
    }

    pub(crate) fn is_stopping(&self) -> bool {
        *self.0.stopping.borrow()
    }

    /// An error once the pod is being taken down; long steps of a creation race it.
    pub(crate) fn check_not_stopping(&self) -> Result<()> {
        if self.is_stopping() {
            Err(Error::Stopping(self.id().to_owned()))
        } else {
            Ok(())
        }
    }

    /// Runs a step that may take long, and gives it up once the pod is being taken down. A blocking thread that is
    /// stuck in it (on a dead file system, say) is left to itself.
    pub(crate) async fn unless_stopping<T>(&self, step: impl Future<Output = Result<T>>) -> Result<T> {
        let mut stopping = self.0.stopping.subscribe();
        tokio::select! {
            biased;
            _ = stopping.wait_for(|stopping| *stopping) => Err(Error::Stopping(self.id().to_owned())),
            outcome = step => outcome,
        }
    }

    pub(crate) fn monitor(&self) -> Option<Monitor> {
        self.0
            .monitor
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn set_monitor(&self, monitor: Option<Monitor>) {
        *self.0.monitor.write().unwrap_or_else(PoisonError::into_inner) = monitor;
    }

    pub(crate) fn hold(&self, id: &str) -> Option<Arc<Hold>> {
        self.0
            .holds
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(id)
            .cloned()
    }

    pub(crate) fn set_hold(&self, id: &str, hold: Option<Arc<Hold>>) {
        let mut holds = self.0.holds.write().unwrap_or_else(PoisonError::into_inner);
        match hold {
            Some(hold) => holds.insert(id.to_owned(), hold),
            None => holds.remove(id),
        };
    }

    /// Tells the task something; a task that has ended needs to know nothing more.
    pub(crate) fn tell(&self, message: Message) {
        let _ = self.0.mailbox.send(message);
    }

    /// Asks for a change and waits until it is on the disk and shown.
    pub(crate) async fn change(&self, change: Change) -> Result<()> {
        self.ask(|reply| Message::Change { change, reply }).await?
    }

    /// Changes the sandbox's record.
    pub(crate) async fn edit(&self, edit: impl FnOnce(&mut SandboxRecord) + Send + 'static) -> Result<()> {
        self.change(Change::Sandbox(Box::new(edit))).await
    }

    /// Changes a container's record.
    pub(crate) async fn edit_container(
        &self,
        id: &str,
        edit: impl FnOnce(&mut ContainerRecord) + Send + 'static,
    ) -> Result<()> {
        self.change(Change::Container {
            id: id.to_owned(),
            edit: Box::new(edit),
        })
        .await
    }

    pub(crate) async fn create(&self, request: CreateRequest) -> Result<String> {
        let (id, operation) = self
            .ask(|reply| Message::Create {
                request: Box::new(request),
                reply,
            })
            .await??;
        operation.done().await?;
        Ok(id)
    }

    pub(crate) async fn start(&self, id: &str) -> Result<()> {
        self.ask(|reply| Message::Start {
            id: id.to_owned(),
            reply,
        })
        .await??
        .done()
        .await
    }

    pub(crate) async fn stop(&self, id: &str, grace: Duration) -> Result<()> {
        self.ask(|reply| Message::Stop {
            id: id.to_owned(),
            grace,
            reply,
        })
        .await??
        .done()
        .await
    }

    pub(crate) async fn remove(&self, id: &str) -> Result<()> {
        self.ask(|reply| Message::Remove {
            id: id.to_owned(),
            reply,
        })
        .await??
        .done()
        .await
    }

    pub(crate) async fn stop_pod(&self) -> Result<()> {
        self.ask(|reply| Message::StopPod { reply }).await??.done().await
    }

    /// Stops it for a reason that is not a request.
    pub(crate) async fn stop_for(&self, reason: &'static str) -> Result<()> {
        self.ask(|reply| Message::StopFor { reason, reply })
            .await?
            .done()
            .await
    }

    pub(crate) async fn remove_pod(&self) -> Result<()> {
        self.ask(|reply| Message::RemovePod { reply })
            .await??
            .done()
            .await
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let gone = || Error::NotFound {
            what: "pod sandbox",
            id: self.0.id.clone(),
        };
        self.0.mailbox.send(message(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }

    fn publish(&self, view: Arc<PodView>) {
        self.0.view.send_replace(view);
    }
}

/// The decoded request of a pod, shared by every snapshot.
#[derive(Debug, Clone)]
pub(crate) struct PodConfig {
    pub(crate) config: Arc<PodSandboxConfig>,
    pub(crate) runtime_handler: Arc<str>,
    /// The request, encoded anew.
    pub(crate) raw: Arc<[u8]>,
}
