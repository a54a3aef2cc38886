//! Getting bytes from registries: the daemon's side of the fetch worker.
//!
//! The worker (module `worker`) is a process of its own, without files, capabilities or the daemon's user id; it
//! resolves, connects, authenticates and retries. Whether the bytes are the right ones is not its business: they
//! come out of a pipe here and are hashed before anything looks at them.

mod auth;
mod http;
mod protocol;
#[cfg(test)]
mod tests;
mod worker;

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use coracle_kernel::{fd, scm};
use thiserror::Error;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

pub use protocol::{Credentials, Failure, FailureKind};
pub(crate) use protocol::{Endpoint, Head, Request, Scheme, Setup};
pub(crate) use worker::{receive_setup, runtime, serve};

use crate::workers::{Role, Worker, Workers};
use protocol::{Numbered, Outcome, PACKET_LIMIT_BYTES};

/// Why content could not be fetched.
#[derive(Debug, Error)]
pub enum FetchError {
    /// The worker could not be started or spoken to.
    #[error("fetch worker: {0}")]
    Worker(String),
    /// The worker ended in the middle.
    #[error("the fetch worker ended unexpectedly")]
    WorkerLost,
    /// What the registry, or the way to it, answered.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The body is longer than its kind may be.
    #[error("the body is longer than {0} bytes")]
    TooLarge(u64),
}

/// A running fetch worker; killed when dropped.
pub(crate) struct Fetcher {
    shared: Arc<Shared>,
    reader: tokio::task::JoinHandle<()>,
    // Held for its drop, which ends the process; a test's worker is a thread.
    _process: Option<Worker>,
}

/// A body that is arriving.
pub(crate) struct Download {
    /// Where the bytes come out, to the end of the file.
    pub(crate) body: OwnedFd,
    outcome: oneshot::Receiver<Outcome>,
}

struct Shared {
    socket: AsyncFd<OwnedFd>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    last_id: u64,
    by_id: HashMap<u64, oneshot::Sender<Outcome>>,
}

impl Fetcher {
    /// Starts a worker for one pull.
    pub(crate) fn start(workers: &Workers, setup: &Setup) -> Result<Self, FetchError> {
        let (ours, theirs) = scm::pair(scm::Kind::Seqpacket, scm::Mode::Blocking).map_err(broken)?;
        let process = workers.start(Role::Fetch, &[theirs.as_fd()]).map_err(broken)?;
        Self::over(ours, Some(process), setup)
    }

    /// Speaks to the worker at the other end of `socket`.
    fn over(socket: OwnedFd, process: Option<Worker>, setup: &Setup) -> Result<Self, FetchError> {
        let document = serde_json::to_vec(setup).map_err(broken)?;
        let memfd = fd::sealed_memfd(c"fetch-setup", &document).map_err(broken)?;
        scm::send(&socket, b"setup", &[memfd.as_fd()]).map_err(broken)?;
        fd::set_nonblocking(&socket, true).map_err(broken)?;
        let socket = watch(socket).map_err(broken)?;
        let shared = Arc::new(Shared {
            socket,
            waiting: Mutex::default(),
        });
        let reader = tokio::spawn(read_outcomes(Arc::clone(&shared)));
        Ok(Self {
            shared,
            reader,
            _process: process,
        })
    }

    /// Asks for content; the body starts to arrive at once.
    pub(crate) async fn begin(&self, request: Request) -> Result<Download, FetchError> {
        let (body, write_end) = fd::pipe().map_err(broken)?;
        let (sender, outcome) = oneshot::channel();
        let id = {
            let mut waiting = self.shared.lock();
            waiting.last_id += 1;
            let id = waiting.last_id;
            waiting.by_id.insert(id, sender);
            id
        };
        let packet = serde_json::to_vec(&Numbered { id, body: request }).map_err(broken)?;
        let send = |socket: &OwnedFd| scm::send(socket, &packet, &[write_end.as_fd()]).map_err(io_error);
        self.shared
            .socket
            .async_io(Interest::WRITABLE, send)
            .await
            .map_err(broken)?;
        Ok(Download { body, outcome })
    }

    /// A whole body of at most `limit_bytes`.
    pub(crate) async fn small(
        &self,
        request: Request,
        limit_bytes: u64,
    ) -> Result<(Vec<u8>, Head), FetchError> {
        let download = self.begin(request).await?;
        let body = pipe::Receiver::from_owned_fd(download.body).map_err(broken)?;
        let mut bytes = Vec::new();
        body.take(limit_bytes + 1)
            .read_to_end(&mut bytes)
            .await
            .map_err(broken)?;
        if bytes.len() as u64 > limit_bytes {
            return Err(FetchError::TooLarge(limit_bytes));
        }
        let head = outcome(download.outcome).await?;
        Ok((bytes, head))
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Download {
    /// The body, and how it ended: a future that is asked after the body's end of file.
    pub(crate) fn split(self) -> (OwnedFd, impl Future<Output = Result<Head, FetchError>>) {
        (self.body, outcome(self.outcome))
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A socket that tokio tells about.
#[allow(
    deprecated,
    reason = "an OwnedFd keeps its descriptor valid; the new constructor is unsafe for everybody"
)]
fn watch(socket: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(socket)
}

fn broken(error: impl std::fmt::Display) -> FetchError {
    FetchError::Worker(error.to_string())
}

async fn outcome(receiver: oneshot::Receiver<Outcome>) -> Result<Head, FetchError> {
    Ok(receiver.await.map_err(|_| FetchError::WorkerLost)??)
}

/// Hands outcomes to those who wait; when the worker has gone, all of them learn it.
async fn read_outcomes(shared: Arc<Shared>) {
    let mut packet = vec![0; PACKET_LIMIT_BYTES];
    loop {
        let receive = |socket: &OwnedFd| scm::recv(socket, &mut packet).map_err(io_error);
        let Ok(received) = shared.socket.async_io(Interest::READABLE, receive).await else {
            break;
        };
        let Ok(Numbered { id, body }) = serde_json::from_slice::<Numbered<Outcome>>(&packet[..received.len])
        else {
            break;
        };
        if let Some(sender) = shared.lock().by_id.remove(&id) {
            // Who has stopped waiting has dropped the body as well.
            let _ = sender.send(body);
        }
    }
    shared.lock().by_id.clear();
}

fn io_error(errno: coracle_kernel::error::Errno) -> std::io::Error {
    std::io::Error::from_raw_os_error(errno.raw())
}
