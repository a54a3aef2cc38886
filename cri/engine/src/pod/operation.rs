//! An operation: a child task whose outcome any number of callers wait for.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::watch;

use crate::error::{Error, Result};

/// A running or finished operation; clones wait for the same outcome. Dropping it stops nothing.
#[derive(Debug, Clone)]
pub(crate) struct Operation(watch::Receiver<Option<Result<()>>>);

/// The task of an operation ended without an outcome: it panicked.
#[derive(Debug, thiserror::Error)]
#[error("the task of the operation panicked")]
struct Panicked(#[source] tokio::task::JoinError);

impl Operation {
    /// Starts `work`; one that panics has failed.
    pub(crate) fn spawn(
        step: &'static str,
        work: impl Future<Output = Result<()>> + Send + 'static,
    ) -> Operation {
        let (outcome, receiver) = watch::channel(None);
        tokio::spawn(async move {
            let result = match tokio::spawn(work).await {
                Ok(result) => result,
                Err(error) => Err(Error::Step {
                    step,
                    cause: Arc::new(Panicked(error)),
                }),
            };
            outcome.send_replace(Some(result));
        });
        Operation(receiver)
    }

    /// One that is over.
    pub(crate) fn finished(result: Result<()>) -> Operation {
        Operation(watch::channel(Some(result)).1)
    }

    /// Waits for the outcome.
    pub(crate) async fn done(mut self) -> Result<()> {
        match self.0.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Ok(())),
            // The sender is dropped only after it sent, or with the whole runtime.
            Err(_) => Err(Error::ShuttingDown),
        }
    }

    /// Whether the outcome is known.
    pub(crate) fn is_done(&self) -> bool {
        self.0.borrow().is_some()
    }
}

/// Waits for all of them; the first failure counts.
pub(crate) async fn all_done(operations: Vec<Operation>) -> Result<()> {
    let mut result = Ok(());
    for operation in operations {
        let outcome = operation.done().await;
        if result.is_ok() {
            result = outcome;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn everybody_gets_the_outcome() {
        let (go, gate) = tokio::sync::oneshot::channel::<()>();
        let operation = Operation::spawn("wait", async move {
            let _ = gate.await;
            Err(Error::ShuttingDown)
        });
        assert!(!operation.is_done());
        let waiters: Vec<_> = (0..5).map(|_| tokio::spawn(operation.clone().done())).collect();
        go.send(()).unwrap();
        for waiter in waiters {
            assert!(matches!(waiter.await.unwrap(), Err(Error::ShuttingDown)));
        }
        assert!(operation.is_done());
        // Somebody who comes late gets it too.
        assert!(operation.done().await.is_err());
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_and_not_the_end() {
        let operation = Operation::spawn("fall over", async { panic!("on purpose") });
        let error = operation.done().await.unwrap_err().chain();
        assert!(
            error.starts_with("cannot fall over: the task of the operation panicked: ")
                && error.contains("on purpose"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn the_first_failure_of_many_counts() {
        let operations = vec![
            Operation::finished(Ok(())),
            Operation::finished(Err(Error::Stopping("p".into()))),
            Operation::finished(Err(Error::ShuttingDown)),
        ];
        assert!(matches!(all_done(operations).await, Err(Error::Stopping(_))));
    }
}
