//! Who waits for the end of which exec.
//!
//! A waiter goes with its request through the queue, and is put on the list in the moment in which a connection takes
//! that. A connection begins by asking what the monitor runs, before it takes anything. So whoever is on the list then
//! was asked for on an earlier connection; what the monitor does not run of that has ended, and nobody will tell of it
//! any more. The kernel may: it keeps how a process ended for those who hold its descriptor.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use coracle_wire::ExecProcess;
use tokio::sync::oneshot;

use super::client::Lost;
use super::words::kill_stray;
use crate::container::{code_from_kernel, process_end};
use crate::error::{Context as _, Error, Result};

/// What learning the end of a command is called.
const STEP: &str = "learn how the command ended";

/// The list; clones are the same one.
#[derive(Debug, Clone, Default)]
pub(super) struct Execs(Arc<Mutex<BTreeMap<String, oneshot::Sender<i32>>>>);

/// Somebody who waits, as it goes with the request.
#[derive(Debug)]
pub(super) struct Waiter {
    exec: String,
    code: oneshot::Sender<i32>,
}

/// The other end of a waiter; dropped, nobody waits any more.
#[derive(Debug)]
pub(super) struct Expected {
    exec: String,
    code: oneshot::Receiver<i32>,
    execs: Execs,
}

/// The end of an exec that was begun: await it for the exit code.
pub struct ExecExit(Pin<Box<dyn Future<Output = Result<i32>> + Send>>);

impl Execs {
    /// Somebody who waits for the end of an exec that is about to be asked for.
    pub(super) fn expect(&self, exec: &str) -> (Waiter, Expected) {
        let (sender, receiver) = oneshot::channel();
        let waiter = Waiter {
            exec: exec.to_owned(),
            code: sender,
        };
        let expected = Expected {
            exec: exec.to_owned(),
            code: receiver,
            execs: self.clone(),
        };
        (waiter, expected)
    }

    /// Its request goes out.
    pub(super) fn enter(&self, waiter: Waiter) {
        let mut list = self.list();
        // Whoever has given up before looks for itself on the list no more.
        if !waiter.code.is_closed() {
            list.insert(waiter.exec, waiter.code);
        }
    }

    /// An exec ended.
    pub(super) fn ended(&self, exec: &str, code: i32) {
        if let Some(waiter) = self.list().remove(exec) {
            let _ = waiter.send(code);
        }
    }

    /// A connection was made, and these run: nobody will be told of the others, and whom nobody waits for is killed.
    pub(super) fn compare(&self, running: &[ExecProcess]) {
        let mut list = self.list();
        list.retain(|id, _| running.iter().any(|exec| exec.exec_id == *id));
        let (_, strays): (Vec<_>, Vec<_>) = running.iter().partition(|exec| list.contains_key(&exec.exec_id));
        drop(list);
        strays.into_iter().for_each(kill_stray);
    }

    /// Nobody is left who could tell.
    pub(super) fn clear(&self) {
        self.list().clear();
    }

    fn list(&self) -> MutexGuard<'_, BTreeMap<String, oneshot::Sender<i32>>> {
        // Single insertions and removals: a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expected {
    /// The end of what was begun as this process.
    pub(super) fn of(mut self, process: OwnedFd) -> ExecExit {
        ExecExit(Box::pin(async move {
            if let Ok(code) = (&mut self.code).await {
                return Ok(code);
            }
            let ended = process_end(process).step(STEP)?.await;
            code_from_kernel(&ended).ok_or_else(|| Error::step(STEP, Lost))
        }))
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        // Closed before it is looked for: from here on it is not put on the list.
        self.code.close();
        self.execs.list().remove(&self.exec);
    }
}

impl Future for ExecExit {
    type Output = Result<i32>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(context)
    }
}

impl std::fmt::Debug for ExecExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExecExit").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(id: &str) -> ExecProcess {
        ExecProcess {
            exec_id: id.into(),
            // No process of ours is that of a stray.
            container_id: "none".into(),
            pid: 0,
        }
    }

    #[test]
    fn a_new_connection_leaves_those_alone_who_were_not_asked_for_yet() {
        let execs = Execs::default();
        let (queued, mut later) = execs.expect("queued");
        let (sent, mut lost) = execs.expect("sent");
        let (found, mut runs) = execs.expect("found");
        execs.enter(sent);
        execs.enter(found);
        execs.compare(&[running("found"), running("stray")]);
        assert!(
            lost.code
                .try_recv()
                .is_err_and(|error| error == oneshot::error::TryRecvError::Closed)
        );
        execs.enter(queued);
        execs.ended("queued", 1);
        execs.ended("found", 2);
        assert_eq!((later.code.try_recv(), runs.code.try_recv()), (Ok(1), Ok(2)));
    }

    #[test]
    fn who_gives_up_is_not_on_the_list_whenever_that_is() {
        let execs = Execs::default();
        let (before, given_up) = execs.expect("before");
        drop(given_up);
        execs.enter(before);
        assert!(execs.list().is_empty());
        let (after, given_up) = execs.expect("after");
        execs.enter(after);
        assert_eq!(execs.list().len(), 1);
        drop(given_up);
        assert!(execs.list().is_empty());
    }
}
