//! What the server shows to clients that connect over TLS.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// A certificate and its key. TLS is 1.2 or 1.3; clients need no certificate, since who has a URL may use it.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    /// Whose handshake goes on.
    turn: Arc<Semaphore>,
}

/// Why these cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Bytes that are no PEM, or of something else.
    #[error("certificate")]
    Certificate(#[source] pem::Error),
    /// The same of the key.
    #[error("private key")]
    Key(#[source] pem::Error),
    /// They are not understood, or do not belong to each other.
    #[error("certificate and private key")]
    Pair(#[from] rustls::Error),
}

impl Tls {
    /// From PEM: the server's certificate, then those that lead from it to its authority; and its private key.
    pub fn new(certificates: &[u8], key: &[u8]) -> Result<Tls, TlsError> {
        let chain = CertificateDer::pem_slice_iter(certificates).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(TlsError::Certificate)?;
        if chain.is_empty() {
            return Err(TlsError::Certificate(pem::Error::NoItemsFound));
        }
        let key = PrivateKeyDer::from_pem_slice(key).map_err(TlsError::Key)?;
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        // each session is a connection, and nobody comes back to one
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(Tls {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            turn: Arc::new(Semaphore::new(1)),
        })
    }

    /// Does a handshake. Anybody who connects can have one, and a signature is dear: they have one thread at a time, and
    /// take turns in the order in which their bytes come. Who sends nothing keeps nobody waiting.
    pub(crate) async fn accept(&self, socket: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        in_turns(&self.turn, self.acceptor.accept(socket)).await
    }
}

/// Polls a future in its turns alone.
async fn in_turns<F: Future>(turn: &Semaphore, future: F) -> F::Output {
    let mut future = pin!(future);
    loop {
        // it fails only when it is closed, which nobody does
        let held = turn.acquire().await;
        let step = poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await;
        drop(held);
        if let Poll::Ready(output) = step {
            return output;
        }
        // the future wakes this task
        let mut woken = false;
        poll_fn(|_| match std::mem::replace(&mut woken, true) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn one_at_a_time_and_none_that_waits_keeps_the_turn() {
        let (turn, busy) = (Arc::new(Semaphore::new(1)), Arc::new(AtomicBool::new(false)));
        let (never, told) = tokio::sync::oneshot::channel::<()>();
        let silent = Arc::clone(&turn);
        let silent = tokio::spawn(async move { in_turns(&silent, told).await });
        let tasks = (0..32).map(|number| {
            let (turn, busy) = (Arc::clone(&turn), Arc::clone(&busy));
            tokio::spawn(async move {
                let mut left = 100;
                let steps = poll_fn(|context| {
                    assert!(!busy.swap(true, Ordering::SeqCst), "two at a time");
                    std::thread::yield_now();
                    busy.store(false, Ordering::SeqCst);
                    left -= 1;
                    context.waker().wake_by_ref();
                    match left {
                        0 => Poll::Ready(number),
                        _ => Poll::Pending,
                    }
                });
                in_turns(&turn, steps).await
            })
        });
        for (number, task) in tasks.collect::<Vec<_>>().into_iter().enumerate() {
            assert_eq!(task.await.unwrap(), number);
        }
        never.send(()).unwrap();
        silent.await.unwrap().unwrap();
    }
}
