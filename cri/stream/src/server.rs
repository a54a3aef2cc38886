//! The HTTP side: URLs are given, requests checked, connections upgraded and counted.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::link::{Gone, Link};
use crate::negotiate::{Protocol, Refusal, negotiate};
use crate::session::{self, Command};
use crate::shares::{Exhausted, Shares};
use crate::tls::Tls;
use crate::token::{self, Granted, Tokens};
use crate::transport::Socket;
use crate::{AttachRequest, ExecRequest, Limits, Sessions, StreamRequest, portforward};

/// Most bytes of a request's head; the kubelet passes on what an API server and its proxies have added.
const MOST_HEAD: usize = 32 << 10;
/// Most headers of a request.
const MOST_HEADERS: usize = 100;
/// How often, and how many times in vain, a silent peer is asked whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(20);
const KEEPALIVE_COUNT: u32 = 3;
/// How long accepting waits when the process is out of descriptors: nothing tells when there are some again.
const RETRY: Duration = Duration::from_millis(100);

/// The server: one listener, and whatever was upgraded from it.
pub struct Server<S> {
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared<S>>,
}

/// Why there is no URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A request that no session can serve (`InvalidArgument`).
    #[error("{0}")]
    Invalid(&'static str),
    /// The pod has its share of sessions (`ResourceExhausted`).
    #[error(transparent)]
    TooMany(#[from] Exhausted),
    /// The host gives no random bytes.
    #[error("read /dev/urandom: {0}")]
    Random(io::ErrorKind),
}

struct Shared<S> {
    sessions: Arc<S>,
    limits: Limits,
    tls: Option<Tls>,
    tokens: Tokens,
    /// Sessions, and URLs that wait for theirs.
    places: Arc<Shares>,
    /// Bytes of their requests.
    bytes: Arc<Shares>,
    /// What port-forwards have.
    forwards: portforward::Room,
    /// Connections that have not shown a token, oldest first. Each is closed when its entry is dropped.
    pending: Mutex<BTreeMap<u64, oneshot::Sender<Infallible>>>,
}

/// What an accepted request becomes when its connection is upgraded.
struct Upgrade {
    upgrade: OnUpgrade,
    protocol: Protocol,
    granted: Granted,
}

impl<S: Sessions> Server<S> {
    /// Listens on an address; port 0 is any free port. Without TLS, whoever sees what goes there sees everything.
    pub async fn bind(
        address: SocketAddr,
        tls: Option<Tls>,
        limits: Limits,
        sessions: Arc<S>,
    ) -> io::Result<Server<S>> {
        let listener = TcpListener::bind(address).await?;
        Ok(Server {
            address: listener.local_addr()?,
            listener,
            shared: Arc::new(Shared {
                sessions,
                limits,
                tls,
                tokens: Tokens::new(limits.token_life),
                places: Shares::new("streaming sessions", limits.sessions, limits.sessions_of_one),
                bytes: Shares::new(
                    "bytes of streaming requests",
                    limits.request_bytes,
                    limits.request_bytes_of_one,
                ),
                forwards: portforward::Room {
                    connections: Shares::new(
                        "forwarded connections",
                        limits.forwards,
                        limits.forwards_of_one,
                    ),
                    memory: Shares::new("bytes on their way", limits.memory, limits.memory_of_one),
                },
                pending: Mutex::default(),
            }),
        })
    }

    /// The address that is listened on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A URL for one session with this request: it works once, and for as long as a token lives.
    pub fn url(&self, request: StreamRequest) -> Result<String, Refused> {
        check(&request)?;
        let (shared, path, now) = (&self.shared, path(&request), Instant::now());
        shared.tokens.expire(now);
        let place = [
            shared.places.take(pod(&request), 1)?,
            shared.bytes.take(pod(&request), bytes(&request))?,
        ];
        let issued = shared.tokens.issue(Granted { request, place }, now);
        let token = issued.map_err(|e| Refused::Random(e.kind()))?;
        let scheme = if shared.tls.is_some() { "https" } else { "http" };
        Ok(format!("{scheme}://{}/{path}/{token}", self.address))
    }

    /// Serves until `shutdown` is there; then every session is dropped.
    pub async fn serve(&self, shutdown: impl Future<Output = ()>) {
        tokio::pin!(shutdown);
        let mut tasks = JoinSet::new();
        let mut number = 0;
        loop {
            let accepted = tokio::select! {
                () = &mut shutdown => return,
                Some(_) = tasks.join_next() => continue,
                accepted = self.listener.accept() => accepted,
            };
            let socket = match accepted {
                Ok((socket, _)) => socket,
                // the peer has gone before it was accepted
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    tracing::warn!(%error, "streaming connection not accepted");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            number += 1;
            let pending = Pending::new(&self.shared, number);
            tasks.spawn(connection(Arc::clone(&self.shared), socket, pending));
        }
    }
}

/// Serves one connection: a request, and if that is accepted, the session.
async fn connection<S: Sessions>(shared: Arc<Shared<S>>, socket: TcpStream, mut pending: Pending<S>) {
    // a keystroke is not to wait for the next one
    let _ = socket.set_nodelay(true);
    // A peer may die with so much on its way to us that its end comes only when we read on, which a process that takes
    // no input may prevent for ever. This finds out.
    let _ = coracle_kernel::tcp::set_keepalive(&socket, KEEPALIVE, KEEPALIVE_COUNT);
    let accepted = Mutex::new(None);
    let service = service_fn(|request| {
        let answer = match accept(&shared, request) {
            Ok((answer, upgrade)) => {
                *accepted.lock().unwrap_or_else(PoisonError::into_inner) = Some(upgrade);
                answer
            }
            Err(refusal) => refuse(&refusal),
        };
        async { Ok::<_, Infallible>(answer) }
    });
    // One request a connection: every answer but an upgrade has "Connection: close". With `keep_alive(false)` the
    // upgrade would have it too, which Go's clients do not take.
    let http = async {
        let socket = match &shared.tls {
            Some(tls) => Socket::Right(Box::new(tls.accept(socket).await?)),
            None => Socket::Left(socket),
        };
        http1::Builder::new()
            .max_headers(MOST_HEADERS)
            .max_buf_size(MOST_HEAD)
            .timer(TokioTimer::new())
            .serve_connection(TokioIo::new(socket), service)
            .with_upgrades()
            .await?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
    };
    let http = tokio::time::timeout(shared.limits.handshake, http);
    let served = tokio::select! {
        served = http => served,
        _ = &mut pending.evicted => return tracing::debug!("streaming connection closed for later ones"),
    };
    match served {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return tracing::debug!(%error, "streaming request failed"),
        Err(_) => return tracing::debug!("streaming request did not come in time"),
    }
    let accepted = accepted.into_inner().unwrap_or_else(PoisonError::into_inner);
    let Some(accepted) = accepted else { return };
    drop(pending);
    if let Err(error) = accepted.serve(&shared).await {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        tracing::debug!(%error, source, "streaming session ended");
    }
}

type Answer = Response<Full<Bytes>>;

/// Accepts a request, or says why not. Its token is used up in either case: a URL is for one attempt, as callers expect
/// (the kubelet and `crictl` ask for a new one), and what was shown in a request that failed is worth nothing to others.
fn accept<S>(shared: &Shared<S>, mut request: Request<Incoming>) -> Result<(Answer, Upgrade), Refusal> {
    let unknown = || Refusal {
        code: StatusCode::NOT_FOUND,
        text: "no such session, or its URL was used already".to_owned(),
        accepted: None,
    };
    let (kind, token) = split(request.uri().path()).ok_or_else(unknown)?;
    let granted = shared.tokens.take(token, Instant::now()).ok_or_else(unknown)?;
    if path(&granted.request) != kind {
        return Err(unknown());
    }
    let protocol = negotiate(request.method(), request.headers(), &granted.request)?;
    let upgrade = hyper::upgrade::on(&mut request);
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *answer.headers_mut() = protocol.headers.clone();
    Ok((
        answer,
        Upgrade {
            upgrade,
            protocol,
            granted,
        },
    ))
}

impl Upgrade {
    async fn serve<S: Sessions>(self, shared: &Shared<S>) -> Result<(), Gone> {
        let Upgrade {
            upgrade,
            protocol,
            granted: Granted { request, place },
        } = self;
        let _place = place;
        // neither fails: the answer is written, and the socket is the one that was given to the builder
        let Ok(upgraded) = upgrade.await else {
            return Ok(());
        };
        let Ok(parts) = upgraded.downcast::<TokioIo<Socket>>() else {
            return Ok(());
        };
        let socket = parts.io.into_inner();
        let link = |streams| Link::new(socket, &parts.read_buf, protocol.wire, streams).map_err(Gone::Socket);
        let (sessions, limits) = (&shared.sessions, &shared.limits);
        match &request {
            StreamRequest::PortForward(request) => {
                let link = link(portforward::MOST_STREAMS)?;
                portforward::serve(link, request, Arc::clone(sessions), &shared.forwards, limits).await
            }
            StreamRequest::Exec(request) => {
                let link = link(session::MOST_STREAMS)?;
                session::serve(link, &protocol, Command::Exec(request), &**sessions, limits).await
            }
            StreamRequest::Attach(request) => {
                let link = link(session::MOST_STREAMS)?;
                session::serve(link, &protocol, Command::Attach(request), &**sessions, limits).await
            }
        }
    }
}

impl<S> Shared<S> {
    fn lock_pending(&self) -> MutexGuard<'_, BTreeMap<u64, oneshot::Sender<Infallible>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that has not shown a token yet.
struct Pending<S> {
    shared: Arc<Shared<S>>,
    number: u64,
    evicted: oneshot::Receiver<Infallible>,
}

impl<S> Pending<S> {
    /// Notes a connection, and closes the oldest one if there are too many: who only connects keeps nobody out.
    fn new(shared: &Arc<Shared<S>>, number: u64) -> Pending<S> {
        let (held, evicted) = oneshot::channel();
        let mut pending = shared.lock_pending();
        pending.insert(number, held);
        if pending.len() > shared.limits.pending {
            pending.pop_first();
        }
        Pending {
            shared: Arc::clone(shared),
            number,
            evicted,
        }
    }
}

impl<S> Drop for Pending<S> {
    fn drop(&mut self) {
        self.shared.lock_pending().remove(&self.number);
    }
}

/// Refuses what no session can serve.
fn check(request: &StreamRequest) -> Result<(), Refused> {
    let (tty, streams, stderr) = match request {
        StreamRequest::PortForward(request) => {
            return match (request.pod.is_empty(), request.ports.contains(&0)) {
                (true, _) => Err(Refused::Invalid("missing pod_sandbox_id")),
                (_, true) => Err(Refused::Invalid("port 0 cannot be forwarded")),
                _ => Ok(()),
            };
        }
        StreamRequest::Exec(r) if r.command.is_empty() => return Err(Refused::Invalid("missing cmd")),
        StreamRequest::Exec(ExecRequest { container, .. })
        | StreamRequest::Attach(AttachRequest { container, .. })
            if container.is_empty() =>
        {
            return Err(Refused::Invalid("missing container_id"));
        }
        StreamRequest::Exec(r) => (r.tty, r.stdin || r.stdout || r.stderr, r.stderr),
        StreamRequest::Attach(r) => (r.tty, r.stdin || r.stdout || r.stderr, r.stderr),
    };
    if tty && stderr {
        return Err(Refused::Invalid("tty and stderr cannot both be true"));
    }
    if !streams {
        return Err(Refused::Invalid("one of stdin, stdout, or stderr must be set"));
    }
    Ok(())
}

/// What sessions are counted by.
fn pod(request: &StreamRequest) -> &str {
    match request {
        StreamRequest::Exec(request) => &request.pod,
        StreamRequest::Attach(request) => &request.pod,
        StreamRequest::PortForward(request) => &request.pod,
    }
}

/// What a request keeps in memory beside what every one does.
fn bytes(request: &StreamRequest) -> usize {
    match request {
        StreamRequest::Exec(request) => request
            .command
            .iter()
            .map(|word| size_of::<String>() + word.len())
            .sum(),
        StreamRequest::Attach(_) => 0,
        StreamRequest::PortForward(request) => size_of_val(&*request.ports),
    }
}

/// The first part of a URL's path.
fn path(request: &StreamRequest) -> &'static str {
    match request {
        StreamRequest::Exec(_) => "exec",
        StreamRequest::Attach(_) => "attach",
        StreamRequest::PortForward(_) => "portforward",
    }
}

/// The two parts of a URL's path, if the second can be a token.
fn split(path: &str) -> Option<(&str, &str)> {
    let (kind, token) = path.strip_prefix('/')?.split_once('/')?;
    (token.len() == token::LENGTH).then_some((kind, token))
}

fn refuse(refusal: &Refusal) -> Answer {
    let mut answer = Response::new(Full::from(format!("{}\n", refusal.text)));
    *answer.status_mut() = refusal.code;
    let headers = answer.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    if let Some((name, values)) = &refusal.accepted {
        for value in *values {
            headers.append(name, HeaderValue::from_static(value));
        }
    }
    answer
}
