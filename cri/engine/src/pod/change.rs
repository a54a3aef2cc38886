//! Changes of a pod: written, then shown, then acknowledged, in the order in which they were asked for.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use coracle_store::{Commit, CommitError, Op};
use tokio::sync::oneshot;
use tracing::{error, info};

use super::task::{Pod, answer};
use super::{Change, Message};
use crate::container;
use crate::error::{Error, Result};
use crate::record::{ContainerRecord, SandboxRecord};
use crate::view::{ContainerView, PodView};

/// Pause before a row that must get to the disk is tried again.
const INSIST_PAUSE: Duration = Duration::from_secs(1);

/// A change on its way to the disk.
pub(super) struct Pending {
    commit: Option<Commit>,
    outcome: Result<(), CommitError>,
    /// The same in the database of this boot: behind the disk it would bring back what is gone.
    copy: Option<Commit>,
    /// What is shown once it is on the disk.
    view: Arc<PodView>,
    row: Row,
    undo: Undo,
    replies: Vec<oneshot::Sender<Result<()>>>,
    then: Then,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Row {
    Sandbox,
    Container(String),
}

/// What memory goes back to when the disk refuses.
enum Undo {
    Sandbox(Box<SandboxRecord>),
    Container(Arc<ContainerView>),
    NewContainer,
    /// Nothing: the row is written again until it is on the disk.
    Insist,
    Nothing,
}

enum Then {
    Nothing,
    Exited(String),
    ContainerGone(String),
    SandboxGone,
}

impl Pod {
    pub(super) fn change(&mut self, change: Change, replies: Vec<oneshot::Sender<Result<()>>>) {
        let boot = self.handle.core().boot.clone();
        match change {
            Change::Sandbox(edit) => {
                let undo = Undo::Sandbox(Box::new(self.record.clone()));
                edit(&mut self.record);
                let op = self.record.put(&boot, &self.config.raw);
                self.push(Row::Sandbox, vec![op], undo, replies, Then::Nothing);
            }
            Change::NewContainer { record } => {
                let id = record.id.clone();
                let Ok(entry) = self.entry(&id) else {
                    return refuse(replies, &id);
                };
                let op = record.put(&boot, &entry.raw);
                entry.view = Arc::new(ContainerView {
                    record: *record,
                    ..(*entry.view).clone()
                });
                self.push(
                    Row::Container(id),
                    vec![op],
                    Undo::NewContainer,
                    replies,
                    Then::Nothing,
                );
            }
            Change::Container { id, edit } => {
                let Ok(entry) = self.entry(&id) else {
                    return refuse(replies, &id);
                };
                let before = entry.view.clone();
                let mut record = before.record.clone();
                edit(&mut record);
                let op = record.put(&boot, &entry.raw);
                let exits = before.record.is_alive() && !record.is_alive();
                entry.view = Arc::new(ContainerView {
                    record,
                    ..(*before).clone()
                });
                let (undo, then) = if exits {
                    (Undo::Insist, Then::Exited(id.clone()))
                } else {
                    (Undo::Container(before), Then::Nothing)
                };
                self.push(Row::Container(id), vec![op], undo, replies, then);
            }
            Change::Running { id, running } => {
                let Ok(entry) = self.entry(&id) else {
                    return refuse(replies, &id);
                };
                entry.view = Arc::new(ContainerView {
                    running,
                    ..(*entry.view).clone()
                });
                self.push(
                    Row::Container(id),
                    Vec::new(),
                    Undo::Nothing,
                    replies,
                    Then::Nothing,
                );
            }
            Change::ContainerGone { id } => {
                self.containers.remove(&id);
                let op = ContainerRecord::delete(&id);
                let then = Then::ContainerGone(id.clone());
                self.push(Row::Container(id), vec![op], Undo::Nothing, replies, then);
            }
            Change::SandboxGone => {
                let mut ops: Vec<Op> = self
                    .containers
                    .keys()
                    .map(|id| ContainerRecord::delete(id))
                    .collect();
                ops.push(SandboxRecord::delete(&self.record.id));
                self.push(Row::Sandbox, ops, Undo::Nothing, replies, Then::SandboxGone);
            }
        }
    }

    fn push(
        &mut self,
        row: Row,
        ops: Vec<Op>,
        undo: Undo,
        replies: Vec<oneshot::Sender<Result<()>>>,
        then: Then,
    ) {
        let core = self.handle.core();
        let copy = (!ops.is_empty()).then(|| core.volatile.submit(ops.clone()));
        let commit = (!ops.is_empty()).then(|| core.store.submit(ops));
        let view = self.snapshot();
        self.pending.push_back(Pending {
            commit,
            outcome: Ok(()),
            copy,
            view,
            row,
            undo,
            replies,
            then,
        });
    }

    /// Answers once every change that was asked for so far is on the disk.
    pub(super) fn acknowledge(&mut self, reply: oneshot::Sender<Result<()>>) {
        self.push(
            Row::Sandbox,
            Vec::new(),
            Undo::Nothing,
            vec![reply],
            Then::Nothing,
        );
    }

    pub(super) fn snapshot(&self) -> Arc<PodView> {
        Arc::new(PodView {
            record: self.record.clone(),
            config: self.config.config.clone(),
            runtime_handler: self.config.runtime_handler.clone(),
            containers: self
                .containers
                .iter()
                .map(|(id, entry)| (id.clone(), entry.view.clone()))
                .collect(),
        })
    }

    /// The oldest pending change is on the disk, or the disk refused it.
    pub(super) fn settle(&mut self, outcome: Result<(), CommitError>) {
        let Some(pending) = self.pending.pop_front() else {
            return;
        };
        let Pending {
            view,
            row,
            undo,
            replies,
            then,
            ..
        } = pending;
        if let Err(cause) = outcome {
            return self.roll_back(row, undo, replies, &cause);
        }
        self.handle.publish(view);
        for reply in replies {
            answer(reply, Ok(()));
        }
        match then {
            Then::Nothing => {}
            Then::Exited(id) => {
                if let Some(entry) = self.containers.get(&id) {
                    entry.exited.send_replace(true);
                    let record = &entry.view.record;
                    info!(
                        container = id,
                        code = record.exit_code,
                        reason = record.reason,
                        "container exited"
                    );
                    tokio::spawn(container::release(self.handle.clone(), id));
                }
            }
            Then::ContainerGone(id) => self.handle.core().registry.remove_container(&id),
            Then::SandboxGone => {
                self.handle.core().registry.remove(&self.record.id);
                self.gone = true;
            }
        }
    }

    fn roll_back(
        &mut self,
        row: Row,
        undo: Undo,
        replies: Vec<oneshot::Sender<Result<()>>>,
        cause: &CommitError,
    ) {
        error!(pod = self.record.id, error = %cause, "a change was not written");
        if let (Undo::Insist, Row::Container(id)) = (&undo, &row) {
            let (handle, id) = (self.handle.clone(), id.clone());
            tokio::spawn(async move {
                tokio::time::sleep(INSIST_PAUSE).await;
                handle.tell(Message::Insist { id, replies });
            });
            return;
        }
        // A later change of the same row holds this one too: what it goes back to is what was before both.
        if let Some(later) = self.pending.iter_mut().find(|later| later.row == row) {
            if !matches!(later.undo, Undo::Insist) {
                later.undo = undo;
            }
        } else {
            match (undo, row) {
                (Undo::Sandbox(record), _) => self.record = *record,
                (Undo::Container(view), Row::Container(id)) => {
                    if let Some(entry) = self.containers.get_mut(&id) {
                        entry.view = view;
                    }
                }
                _ => {}
            }
        }
        for reply in replies {
            answer(reply, Err(Error::step("write the record", cause.clone())));
        }
    }

    pub(super) fn insist(&mut self, id: &str, replies: Vec<oneshot::Sender<Result<()>>>) {
        let boot = self.handle.core().boot.clone();
        let Ok(entry) = self.entry(id) else {
            return refuse(replies, id);
        };
        let op = entry.view.record.put(&boot, &entry.raw);
        let row = Row::Container(id.to_owned());
        self.push(row, vec![op], Undo::Insist, replies, Then::Exited(id.to_owned()));
    }
}

/// Waits for the oldest pending change.
pub(super) async fn first_commit(pending: &mut VecDeque<Pending>) -> Result<(), CommitError> {
    let Some(first) = pending.front_mut() else {
        return std::future::pending().await;
    };
    // Each answer is kept as soon as it is there: this future may be dropped and made again at any await.
    if let Some(commit) = &mut first.commit {
        first.outcome = commit.await;
        first.commit = None;
    }
    if let Some(copy) = &mut first.copy {
        // Without the copy a lost database costs more; the change itself is as good.
        let _ = copy.await;
        first.copy = None;
    }
    first.outcome.clone()
}

fn refuse(replies: Vec<oneshot::Sender<Result<()>>>, id: &str) {
    for reply in replies {
        answer(
            reply,
            Err(Error::NotFound {
                what: "container",
                id: id.to_owned(),
            }),
        );
    }
}
