//! The task of a pod: it owns the records, admits operations, writes and shows changes. It awaits no operation.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock, RwLock};
use std::time::Duration;

use coracle_proto::cri::ContainerConfig;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::error;

use super::change::{Pending, first_commit};
use super::{CreateRequest, Message, Operation, PodConfig, PodHandle, Shared};
use crate::container;
use crate::core::Core;
use crate::error::{Context as _, Error, Result};
use crate::ident::{self, ContainerIdentity};
use crate::record::{ContainerPhase, ContainerRecord, SandboxPhase, SandboxRecord};
use crate::view::{ContainerView, PodView};

/// A container as it is read back from the database.
#[derive(Debug)]
pub(crate) struct RestoredContainer {
    pub(crate) record: ContainerRecord,
    pub(crate) config: ContainerConfig,
    pub(crate) raw: Vec<u8>,
}

/// A pod as it is read back from the database.
#[derive(Debug)]
pub(crate) struct Restored {
    pub(crate) containers: Vec<RestoredContainer>,
    /// Another sandbox has its identity.
    pub(crate) doomed: bool,
}

/// How a pod's task begins.
#[derive(Debug)]
pub(crate) enum Start {
    /// A new pod: the run operation is started.
    Run,
    /// One of an earlier daemon.
    Restore(Restored),
}

/// The task's own state.
pub(super) struct Pod {
    pub(super) handle: PodHandle,
    pub(super) record: SandboxRecord,
    pub(super) config: PodConfig,
    pub(super) containers: BTreeMap<String, Entry>,
    pub(super) stop: Option<Operation>,
    pub(super) remove: Option<Operation>,
    /// Changes on their way to the disk, oldest first.
    pub(super) pending: VecDeque<Pending>,
    mailbox: mpsc::UnboundedReceiver<Message>,
    pub(super) gone: bool,
}

pub(super) struct Entry {
    pub(super) view: Arc<ContainerView>,
    pub(super) raw: Arc<[u8]>,
    pub(super) create: Operation,
    pub(super) start: Option<Operation>,
    pub(super) stop: Option<Stop>,
    pub(super) remove: Option<Operation>,
    /// True once the exit is on the disk.
    pub(super) exited: watch::Sender<bool>,
}

pub(super) struct Stop {
    operation: Operation,
    /// When the grace ends; a later stop may bring it forward.
    deadline: watch::Sender<Instant>,
}

/// Starts the task of a pod. The handle is not in the registry yet.
pub(crate) fn prepare(core: &Arc<Core>, record: SandboxRecord, config: PodConfig) -> (PodHandle, Prepared) {
    let (mailbox, receiver) = mpsc::unbounded_channel();
    let view = Arc::new(PodView {
        record: record.clone(),
        config: config.config.clone(),
        runtime_handler: config.runtime_handler.clone(),
        containers: BTreeMap::new(),
    });
    let handle = PodHandle(Arc::new(Shared {
        id: record.id.clone(),
        core: core.clone(),
        mailbox,
        view: watch::Sender::new(view),
        stopping: watch::Sender::new(false),
        monitor: RwLock::default(),
        holds: RwLock::default(),
        run: OnceLock::new(),
        doomed: AtomicBool::new(false),
    }));
    let (go, begins) = oneshot::channel();
    let work = {
        let handle = handle.clone();
        async move {
            match begins.await {
                Ok(Begin::Make) => super::run::run(handle).await,
                Ok(Begin::TakeUp) => Ok(()),
                // Somebody else's pod is in the registry.
                Err(_) => Err(Error::ShuttingDown),
            }
        }
    };
    // Before anybody can find the handle: whoever joins waits for this one.
    let _ = handle.0.run.set(Operation::spawn("run the pod sandbox", work));
    let pod = Pod {
        handle: handle.clone(),
        record,
        config,
        containers: BTreeMap::new(),
        stop: None,
        remove: None,
        pending: VecDeque::new(),
        mailbox: receiver,
        gone: false,
    };
    let pod = Box::new(pod);
    (handle, Prepared { pod, go })
}

/// A pod whose task has not begun: it begins once the registry has taken the handle.
pub(crate) struct Prepared {
    pod: Box<Pod>,
    go: oneshot::Sender<Begin>,
}

/// What the operation that makes the pod does.
enum Begin {
    Make,
    /// Nothing: the pod was made by an earlier daemon.
    TakeUp,
}

impl Prepared {
    /// Begins.
    pub(crate) fn start(self, start: Start) {
        let mut pod = *self.pod;
        let handle = pod.handle.clone();
        match start {
            Start::Run => drop(self.go.send(Begin::Make)),
            Start::Restore(restored) => {
                let _ = self.go.send(Begin::TakeUp);
                pod.restore(restored);
            }
        }
        tokio::spawn(async move {
            if tokio::spawn(pod.run()).await.is_err_and(|end| end.is_panic()) {
                error!(
                    pod = handle.id(),
                    "the task of the pod panicked, it is taken up again from its records"
                );
                crate::recover::take_up(handle.core(), handle.id()).await;
            }
        });
    }
}

impl Pod {
    async fn run(mut self) {
        loop {
            tokio::select! {
                biased;
                outcome = first_commit(&mut self.pending) => self.settle(outcome),
                message = self.mailbox.recv() => match message {
                    Some(message) => self.handle(message),
                    None => return,
                },
            }
            if self.gone && self.pending.is_empty() {
                return;
            }
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Create { request, reply } => self.create(request, reply),
            Message::Start { id, reply } => answer(reply, self.start(&id)),
            Message::Stop { id, grace, reply } => answer(reply, self.stop(&id, grace)),
            Message::Remove { id, reply } => answer(reply, self.remove(&id)),
            Message::StopPod { reply } => answer(reply, Ok(self.stop_pod(""))),
            Message::StopFor { reason, reply } => answer(reply, self.stop_pod(reason)),
            Message::RemovePod { reply } => answer(reply, Ok(self.remove_pod())),
            Message::InFlight { reply } => {
                let entries = self.containers.values();
                let flights = entries.flat_map(|entry| [Some(entry.create.clone()), entry.start.clone()]);
                answer(
                    reply,
                    flights
                        .flatten()
                        .filter(|operation| !operation.is_done())
                        .collect(),
                );
            }
            Message::StopAll { reply } => {
                let ids: Vec<String> = self.containers.keys().cloned().collect();
                let stops = ids
                    .iter()
                    .filter_map(|id| self.stop(id, Duration::ZERO).ok())
                    .collect();
                answer(reply, stops);
            }
            Message::RemoveAll { reply } => {
                let ids: Vec<String> = self.containers.keys().cloned().collect();
                let removals = ids
                    .iter()
                    .map(|id| self.remove(id).unwrap_or_else(|e| Operation::finished(Err(e))));
                answer(reply, removals.collect());
            }
            Message::Change { change, reply } => self.change(change, vec![reply]),
            Message::Insist { id, replies } => self.insist(&id, replies),
            Message::Monitor(event) => self.monitor_event(event),
            Message::InitGone { id } => self.init_gone(id),
            Message::ExitOverdue { id } => self.exit_overdue(&id),
        }
    }

    fn create(&mut self, request: Box<CreateRequest>, reply: oneshot::Sender<Result<(String, Operation)>>) {
        if let Err(error) = self.may_create() {
            return answer(reply, Err(error));
        }
        if let Some((id, entry)) = self.by_identity(&request.identity) {
            let alive = entry.view.record.is_alive() && entry.remove.is_none();
            let failed = entry.create.is_done() && entry.view.record.phase == ContainerPhase::Creating;
            if alive && !failed && entry.view.record.hash == request.hash {
                return answer(reply, Ok((id.to_owned(), entry.create.clone())));
            }
            // Another request with this name, or what is left of an earlier one: that goes first.
            let (id, handle) = (id.to_owned(), self.handle.clone());
            let removal = self.remove(&id);
            tokio::spawn(async move {
                match async { removal?.done().await }.await {
                    Ok(()) => handle.tell(Message::Create { request, reply }),
                    Err(error) => answer(reply, Err(error)),
                }
            });
            return;
        }
        let id = match ident::new_id().step("draw a container id") {
            Ok(id) => id,
            Err(error) => return answer(reply, Err(error)),
        };
        let last = self
            .containers
            .values()
            .map(|entry| entry.view.record.created_at)
            .max();
        let record = container::new_record(&id, self.handle.id(), &request, ident::after(last));
        let view = Arc::new(ContainerView {
            record,
            config: Arc::new(request.config),
            running: false,
        });
        self.handle
            .core()
            .registry
            .insert_container(&id, self.handle.id());
        let work = container::create(self.handle.clone(), view.clone());
        let create = Operation::spawn("create the container", work);
        let entry = Entry {
            view,
            raw: request.raw.into(),
            create: create.clone(),
            start: None,
            stop: None,
            remove: None,
            exited: watch::Sender::new(false),
        };
        self.containers.insert(id.clone(), entry);
        answer(reply, Ok((id, create)));
    }

    fn may_create(&self) -> Result<()> {
        if self.handle.is_stopping() {
            return Err(Error::Stopping(self.record.id.clone()));
        }
        if self.record.phase != SandboxPhase::Ready {
            return Err(self.state_error("pod sandbox", &self.record.id, "is not ready"));
        }
        Ok(())
    }

    fn start(&mut self, id: &str) -> Result<Operation> {
        let handle = self.handle.clone();
        let stopping = handle.is_stopping();
        let entry = self.entry(id)?;
        if let Some(start) = running(entry.start.as_ref()) {
            return Ok(start);
        }
        let refusal = match (&entry.view.record.phase, &entry.stop) {
            (ContainerPhase::Created, None) if entry.remove.is_none() && !stopping => None,
            (ContainerPhase::Created, _) => Some("is being stopped"),
            (ContainerPhase::Creating, _) => Some("is still being created"),
            // The result of the start that was asked for before, perhaps of an earlier daemon.
            (ContainerPhase::Started, _) => return Ok(Operation::finished(Ok(()))),
            (ContainerPhase::Exited | ContainerPhase::Removing, _) => Some("has exited"),
        };
        if let Some(why) = refusal {
            return Err(self.state_error("container", id, why));
        }
        let work = container::start(handle, id.to_owned());
        let start = Operation::spawn("start the container", work);
        entry.start = Some(start.clone());
        Ok(start)
    }

    fn stop(&mut self, id: &str, grace: Duration) -> Result<Operation> {
        let handle = self.handle.clone();
        let entry = self.entry(id)?;
        let deadline = Instant::now() + grace;
        if let Some(stop) = &entry.stop
            && !stop.operation.is_done()
        {
            stop.deadline.send_if_modified(|present| {
                let earlier = deadline < *present;
                *present = deadline.min(*present);
                earlier
            });
            return Ok(stop.operation.clone());
        }
        if !entry.view.record.is_alive() {
            return Ok(Operation::finished(Ok(())));
        }
        let sender = watch::Sender::new(deadline);
        let inputs = container::StopInputs {
            view: entry.view.clone(),
            before: [Some(entry.create.clone()), entry.start.clone()]
                .into_iter()
                .flatten()
                .collect(),
            deadline: sender.subscribe(),
            exited: entry.exited.subscribe(),
            graceful: !grace.is_zero(),
        };
        let operation = Operation::spawn("stop the container", container::stop(handle, inputs));
        entry.stop = Some(Stop {
            operation: operation.clone(),
            deadline: sender,
        });
        Ok(operation)
    }

    fn remove(&mut self, id: &str) -> Result<Operation> {
        let handle = self.handle.clone();
        let entry = self.entry(id)?;
        if let Some(removal) = running(entry.remove.as_ref()) {
            return Ok(removal);
        }
        if running(entry.start.as_ref()).is_some() {
            return Err(self.state_error("container", id, "is being started"));
        }
        // A failed stop of its own does not stand in the way: the removal stops what still runs.
        let work = container::remove(handle, id.to_owned(), entry.create.clone());
        let removal = Operation::spawn("remove the container", work);
        entry.remove = Some(removal.clone());
        Ok(removal)
    }

    pub(super) fn stop_pod(&mut self, reason: &'static str) -> Operation {
        self.handle.0.stopping.send_replace(true);
        if let Some(stop) = running(self.stop.as_ref()) {
            return stop;
        }
        if self.record.phase == SandboxPhase::NotReady {
            return Operation::finished(Ok(()));
        }
        let work = super::stop::stop(self.handle.clone(), reason);
        let stop = Operation::spawn("stop the pod sandbox", work);
        self.stop = Some(stop.clone());
        stop
    }

    fn remove_pod(&mut self) -> Operation {
        self.handle.0.stopping.send_replace(true);
        if let Some(removal) = running(self.remove.as_ref()) {
            return removal;
        }
        let work = super::remove::remove(self.handle.clone());
        let removal = Operation::spawn("remove the pod sandbox", work);
        self.remove = Some(removal.clone());
        removal
    }

    fn by_identity(&self, identity: &ContainerIdentity) -> Option<(&str, &Entry)> {
        let mut entries = self.containers.iter();
        entries
            .find(|(_, entry)| entry.view.record.identity() == *identity)
            .map(|(id, entry)| (id.as_str(), entry))
    }

    pub(super) fn entry(&mut self, id: &str) -> Result<&mut Entry> {
        self.containers.get_mut(id).ok_or_else(|| Error::NotFound {
            what: "container",
            id: id.to_owned(),
        })
    }

    #[allow(clippy::unused_self)]
    fn state_error(&self, what: &'static str, id: &str, why: &str) -> Error {
        Error::State {
            what,
            id: id.to_owned(),
            why: why.to_owned(),
        }
    }
}

/// The operation if it has not ended.
pub(super) fn running(operation: Option<&Operation>) -> Option<Operation> {
    operation.filter(|operation| !operation.is_done()).cloned()
}

/// Whoever asked may have gone away: nothing is lost by that.
pub(super) fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    let _ = reply.send(value);
}
