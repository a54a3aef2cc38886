//! What happens to a pod without anybody asking: its monitor's words, ends of processes, the daemon's own restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tracing::warn;

use super::task::{Entry, Pod, Restored, RestoredContainer, running};
use super::{Change, Exit, Message, Operation};
use crate::container;
use crate::error::Result;
use crate::monitor::{Listed, ListedState, MonitorEvent};
use crate::record::{ContainerPhase, ContainerRecord, SandboxPhase};
use crate::view::ContainerView;

/// How long the monitor may take to say how a container ended that is known to be gone.
const EXIT_OVERDUE: Duration = Duration::from_secs(5);

impl Pod {
    pub(super) fn monitor_event(&mut self, event: MonitorEvent) {
        match event {
            MonitorEvent::Exited { container, exit } => self.monitor_told_exit(container, exit),
            MonitorEvent::LogLost { container, bytes } => {
                warn!(
                    container,
                    bytes, "log output was lost, its file could not be written"
                );
            }
            MonitorEvent::Containers { listed, done } => self.reconcile(listed, done),
            MonitorEvent::Died => {
                if self.record.phase == SandboxPhase::Ready && running(self.stop.as_ref()).is_none() {
                    warn!(pod = self.record.id, "the monitor died, the pod is taken down");
                    self.stop_pod("MonitorLost");
                }
            }
        }
    }

    /// Compares what a monitor has with what the records say.
    fn reconcile(&mut self, listed: Vec<Listed>, done: oneshot::Sender<Result<()>>) {
        let mut listed: BTreeMap<String, ListedState> = listed
            .into_iter()
            .map(|container| (container.id, container.state))
            .collect();
        let mut changes = Vec::new();
        for (id, entry) in &self.containers {
            let state = listed.remove(id);
            let record = &entry.view.record;
            let in_flight = running(Some(&entry.create))
                .or_else(|| running(entry.start.as_ref()))
                .is_some();
            if !record.is_alive() || in_flight || record.phase == ContainerPhase::Creating {
                continue;
            }
            let id = id.clone();
            match state {
                Some(ListedState::Running) => changes.push(Change::Running { id, running: true }),
                Some(ListedState::Created) => {
                    // The word was never given: the one who asked for it was not told otherwise.
                    changes.push(Change::Running {
                        id: id.clone(),
                        running: false,
                    });
                    let edit = |record: &mut ContainerRecord| record.phase = ContainerPhase::Created;
                    changes.push(Change::Container {
                        id,
                        edit: Box::new(edit),
                    });
                }
                Some(ListedState::Exited(exit)) => changes.push(exit_change(id, exit)),
                None => {
                    let hold = self.handle.hold(&id);
                    changes.push(exit_change(id, container::exit_without_monitor(hold.as_deref())));
                }
            }
        }
        for change in changes {
            self.change(change, Vec::new());
        }
        if let Some(monitor) = self.handle.monitor() {
            // Left over from a removal that was interrupted.
            for id in listed.into_keys() {
                let monitor = monitor.clone();
                tokio::spawn(async move { monitor.forget(&id).await });
            }
        }
        self.acknowledge(done);
    }

    fn monitor_told_exit(&mut self, container: String, exit: Exit) {
        let start = self
            .containers
            .get(&container)
            .and_then(|entry| entry.start.as_ref());
        let Some(start) = running(start) else {
            return self.exited(&container, exit);
        };
        // The start has the first word: where it failed, this is the end of our init and not of the program.
        let handle = self.handle.clone();
        tokio::spawn(async move {
            let _ = start.done().await;
            handle.tell(Message::Monitor(MonitorEvent::Exited { container, exit }));
        });
    }

    fn exited(&mut self, id: &str, exit: Exit) {
        let Some(entry) = self.containers.get(id) else {
            return;
        };
        if !entry.view.record.is_alive() {
            return;
        }
        self.change(exit_change(id.to_owned(), exit), Vec::new());
    }

    pub(super) fn init_gone(&mut self, id: String) {
        let (handle, monitor) = (self.handle.clone(), self.handle.monitor());
        tokio::spawn(async move {
            // A dead monitor tells nothing any more; its own end may be noticed after that of an init that died of it.
            if let Some(monitor) = monitor {
                let _ = tokio::time::timeout(EXIT_OVERDUE, monitor.died()).await;
            }
            handle.tell(Message::ExitOverdue { id });
        });
    }

    pub(super) fn exit_overdue(&mut self, id: &str) {
        let Some(entry) = self.containers.get(id) else {
            return;
        };
        if entry.view.record.is_alive() {
            // What ended before its start was our init, whose status tells nothing of the program.
            let started = entry.view.record.phase != ContainerPhase::Created;
            let hold = self.handle.hold(id).filter(|_| started);
            let exit = container::exit_without_monitor(hold.as_deref());
            self.exited(id, exit);
        }
    }

    pub(super) fn restore(&mut self, restored: Restored) {
        self.handle.0.doomed.store(restored.doomed, Ordering::Relaxed);
        for RestoredContainer { record, config, raw } in restored.containers {
            let exited = !record.is_alive();
            let id = record.id.clone();
            self.handle
                .core()
                .registry
                .insert_container(&id, self.handle.id());
            let entry = Entry {
                // A container that was started is taken for running until its monitor says otherwise.
                view: Arc::new(ContainerView {
                    running: record.phase == ContainerPhase::Started,
                    record,
                    config: Arc::new(config),
                }),
                raw: raw.into(),
                create: Operation::finished(Ok(())),
                start: None,
                stop: None,
                remove: None,
                exited: watch::Sender::new(exited),
            };
            self.containers.insert(id, entry);
        }
        self.handle.publish(self.snapshot());
    }
}

fn exit_change(id: String, exit: Exit) -> Change {
    Change::Container {
        id,
        edit: Box::new(move |record| container::record_exit(record, exit)),
    }
}
