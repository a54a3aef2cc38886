//! The fetch worker: talks to registries and token servers, sees no file, decides nothing about digests.
//!
//! It is given its setup and its requests over one socket and writes bodies into pipes. It ends when the socket
//! closes.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use coracle_kernel::error::Errno;
use coracle_kernel::{fd, scm};
use http::StatusCode;
use http::header::{self, HeaderMap, HeaderValue};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::unix::pipe;
use tokio::runtime::Runtime;
use tokio::time::Instant;

use super::http::{Dns, Server};
use super::protocol::{
    Failure, FailureKind, Head, Numbered, Outcome, PACKET_LIMIT_BYTES, Request, SETUP_LIMIT_BYTES, Setup,
};
use super::{Credentials, Endpoint};

/// Manifests and indexes: what the distribution specification asks registries to take.
const MANIFEST_LIMIT_BYTES: u64 = 4 << 20;

const ATTEMPTS: u32 = 5;

/// Waiting time before the second attempt; doubled before each further one.
const BACK_OFF: Duration = Duration::from_millis(if cfg!(test) { 2 } else { 500 });

/// A body must bring this many bytes within this time of waiting for the network, else the server is too slow.
const FLOOR: (u64, Duration) = (64 << 10, Duration::from_secs(60));

const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// The runtime, made before the process is confined: it opens a socket pair, which is not allowed afterwards.
pub(crate) fn runtime() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Serves requests on `socket` until it closes; called after the process has been confined.
pub(crate) fn serve(runtime: &Runtime, socket: OwnedFd, setup: Setup) -> Result<(), Failure> {
    let broken =
        |e: &dyn std::fmt::Display| Failure::new(FailureKind::Protocol, format!("fetch worker: {e}"));
    fd::set_nonblocking(&socket, true).map_err(|e| broken(&e))?;
    let tasks = tokio::task::LocalSet::new();
    tasks.block_on(runtime, async {
        let socket = Rc::new(super::watch(socket).map_err(|e| broken(&e))?);
        let servers = Rc::new(Servers::new(setup)?);
        while let Some((request, body)) = receive_request(&socket).await.map_err(|e| broken(&e))? {
            let (socket, servers) = (Rc::clone(&socket), Rc::clone(&servers));
            tokio::task::spawn_local(async move {
                let outcome = match open_pipe(body) {
                    Ok(pipe) => servers.fetch(&request.body, pipe).await,
                    Err(error) => Err(Failure::new(
                        FailureKind::Protocol,
                        format!("the body's pipe: {error}"),
                    )),
                };
                // A daemon that has gone needs no answer; the loop above sees the end of file.
                let _ = send_outcome(
                    &socket,
                    &Numbered {
                        id: request.id,
                        body: outcome,
                    },
                )
                .await;
            });
        }
        Ok(())
    })
}

/// The checked way asks the kernel for the kind of file, which the confined process may not do.
fn open_pipe(body: OwnedFd) -> std::io::Result<pipe::Sender> {
    fd::set_nonblocking(&body, true)?;
    pipe::Sender::from_owned_fd_unchecked(body)
}

/// The servers of one pull, in order.
struct Servers {
    repository: String,
    servers: Vec<Server>,
}

impl Servers {
    fn new(setup: Setup) -> Result<Self, Failure> {
        let dns = Dns::new(&setup.resolv_conf, &setup.hosts)?;
        let make = |endpoint: Endpoint| {
            // A mirror is somebody else's server: what the registry's users are known by is not for it.
            let credentials = match endpoint.namespace {
                None => setup.credentials.clone(),
                Some(_) => Credentials::Anonymous,
            };
            Server::new(endpoint, &setup.repository, credentials, &setup.authorities, &dns)
        };
        let servers = setup.endpoints.into_iter().map(make).collect::<Result<_, _>>()?;
        Ok(Self {
            repository: setup.repository,
            servers,
        })
    }

    /// Asks each server in turn. The last one's failure, which is the registry's own, says what kind it is, and the
    /// mirrors' are told behind it.
    async fn fetch(&self, request: &Request, pipe: pipe::Sender) -> Outcome {
        let (path, tag) = match request {
            Request::Manifest { reference } => (
                format!("/v2/{}/manifests/{reference}", self.repository),
                !reference.contains(':'),
            ),
            Request::Blob { digest, .. } => (format!("/v2/{}/blobs/{digest}", self.repository), false),
        };
        let mut body = Body::new(request, pipe);
        let mut failures: Vec<Failure> = Vec::new();
        for server in self.servers.iter().filter(|s| s.resolves_tags() || !tag) {
            match fetch_from(server, &path, request, &mut body).await {
                Ok(head) => return Ok(head),
                Err(failure) => failures.push(failure),
            }
        }
        Err(told(&failures))
    }
}

/// The failures of all servers as one.
fn told(failures: &[Failure]) -> Failure {
    let Some((last, mirrors)) = failures.split_last() else {
        let why = "no server is configured that may be asked";
        return Failure::new(FailureKind::Unavailable, why);
    };
    let mut message = last.message.clone();
    for mirror in mirrors {
        message = format!("{message}; before that, {mirror}");
    }
    Failure::new(last.kind, message)
}

/// Up to five attempts at one server; a body that broke off is taken up where it ended.
async fn fetch_from(server: &Server, path: &str, request: &Request, body: &mut Body) -> Outcome {
    let mut attempt = 0;
    loop {
        let before = body.written;
        let failure = match attempt_once(server, path, request, body).await {
            Ok(head) => return Ok(head),
            Err(failure) => failure,
        };
        // Progress earns the attempts anew: a large layer over a shaky line arrives in the end.
        attempt = if body.written > before { 1 } else { attempt + 1 };
        if failure.kind != FailureKind::Unavailable || attempt >= ATTEMPTS || body.closed {
            return Err(failure);
        }
        tokio::time::sleep(BACK_OFF * (1 << (attempt - 1))).await;
    }
}

async fn attempt_once(server: &Server, path: &str, request: &Request, body: &mut Body) -> Outcome {
    let mut headers = HeaderMap::new();
    // A server that compresses on the way would defeat sizes and ranges.
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    if matches!(request, Request::Manifest { .. }) {
        headers.insert(header::ACCEPT, HeaderValue::from_static(MANIFEST_TYPES));
    }
    let from = body.written;
    if from > 0
        && let Ok(range) = HeaderValue::from_str(&format!("bytes={from}-"))
    {
        headers.insert(header::RANGE, range);
    }
    let answer = server.get(path, &headers).await?;
    let protocol = |why: String| Failure::new(FailureKind::Protocol, format!("{path}: {why}"));
    let text = |name: header::HeaderName| {
        answer
            .headers()
            .get(name)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
    };
    let skip = match answer.status() {
        StatusCode::PARTIAL_CONTENT => {
            let range = text(header::CONTENT_RANGE);
            if from == 0 || !range.starts_with(&format!("bytes {from}-")) {
                return Err(protocol(format!("asked from byte {from}, got range {range:?}")));
            }
            0
        }
        // The server does not know ranges and starts anew: what we have is read again and dropped.
        StatusCode::OK => from,
        other => return Err(protocol(format!("status {other}"))),
    };
    let encoding = text(header::CONTENT_ENCODING);
    if !encoding.is_empty() && encoding != "identity" {
        return Err(protocol(format!(
            "content encoding {encoding:?} was not asked for"
        )));
    }
    let head = Head {
        media_type: text(header::CONTENT_TYPE)
            .split(';')
            .next()
            .unwrap_or_default()
            .trim()
            .to_ascii_lowercase(),
        digest: answer
            .headers()
            .get("docker-content-digest")
            .and_then(|v| v.to_str().ok())
            .map(str::to_owned),
    };
    body.copy(answer.into_body(), skip, path).await?;
    Ok(head)
}

/// A body on its way into a pipe, over as many connections as it takes.
struct Body {
    pipe: pipe::Sender,
    written: u64,
    limit: u64,
    exact: bool,
    closed: bool,
}

impl Body {
    fn new(request: &Request, pipe: pipe::Sender) -> Self {
        let (limit, exact) = match request {
            Request::Manifest { .. } => (MANIFEST_LIMIT_BYTES, false),
            Request::Blob { size, .. } => (*size, true),
        };
        Self {
            pipe,
            written: 0,
            limit,
            exact,
            closed: false,
        }
    }

    async fn copy(&mut self, mut body: Incoming, mut skip: u64, path: &str) -> Result<(), Failure> {
        let unavailable = |why: String| Failure::new(FailureKind::Unavailable, format!("{path}: {why}"));
        let (mut waited, mut brought) = (Duration::ZERO, 0);
        loop {
            let start = Instant::now();
            let frame = tokio::time::timeout(FLOOR.1, body.frame()).await;
            let frame = frame.map_err(|_| unavailable(format!("no byte for {:?}", FLOOR.1)))?;
            let Some(frame) = frame else { break };
            let Ok(mut data) = frame.map_err(|e| unavailable(e.to_string()))?.into_data() else {
                continue;
            };
            waited += start.elapsed();
            brought += data.len() as u64;
            if waited >= FLOOR.1 {
                if brought < FLOOR.0 {
                    return Err(unavailable(format!("{brought} bytes in {waited:?} are too few")));
                }
                (waited, brought) = (Duration::ZERO, 0);
            }
            let dropped = skip.min(data.len() as u64);
            skip -= dropped;
            bytes::Buf::advance(&mut data, usize::try_from(dropped).unwrap_or(usize::MAX));
            if self.written + data.len() as u64 > self.limit {
                return Err(Failure::new(
                    FailureKind::Protocol,
                    format!("{path}: longer than {} bytes", self.limit),
                ));
            }
            if let Err(error) = self.pipe.write_all(&data).await {
                self.closed = true;
                return Err(unavailable(format!("the reader has gone: {error}")));
            }
            self.written += data.len() as u64;
        }
        if self.exact && self.written < self.limit {
            return Err(unavailable(format!(
                "ended after {} of {} bytes",
                self.written, self.limit
            )));
        }
        Ok(())
    }
}

/// The first packet, which carries the setup in a memfd; read before the process is confined, for it names the user.
pub(crate) fn receive_setup(socket: impl AsFd) -> Result<Setup, String> {
    use std::io::Read;
    let mut packet = [0; 16];
    let received = scm::recv(socket, &mut packet).map_err(|e| e.to_string())?;
    let Ok([memfd]) = <[OwnedFd; 1]>::try_from(received.fds) else {
        return Err("the setup does not come with one descriptor".into());
    };
    let mut text = Vec::new();
    let mut file = std::fs::File::from(memfd).take(SETUP_LIMIT_BYTES);
    file.read_to_end(&mut text)
        .map_err(|e| format!("read the setup: {e}"))?;
    serde_json::from_slice(&text).map_err(|e| format!("parse the setup: {e}"))
}

async fn receive_request(socket: &AsyncFd<OwnedFd>) -> Result<Option<(Numbered<Request>, OwnedFd)>, String> {
    let mut packet = vec![0; PACKET_LIMIT_BYTES];
    let receive = |socket: &OwnedFd| scm::recv(socket, &mut packet).map_err(io_error);
    let received = socket
        .async_io(Interest::READABLE, receive)
        .await
        .map_err(|e| format!("receive: {e}"))?;
    if received.len == 0 {
        return Ok(None);
    }
    let Ok([body]) = <[OwnedFd; 1]>::try_from(received.fds) else {
        return Err("a request does not come with one descriptor".into());
    };
    let request =
        serde_json::from_slice(&packet[..received.len]).map_err(|e| format!("parse a request: {e}"))?;
    Ok(Some((request, body)))
}

async fn send_outcome(socket: &AsyncFd<OwnedFd>, outcome: &Numbered<Outcome>) -> std::io::Result<()> {
    let packet = serde_json::to_vec(outcome)?;
    socket
        .async_io(Interest::WRITABLE, |socket| {
            scm::send(socket, &packet, &[]).map_err(io_error)
        })
        .await?;
    Ok(())
}

fn io_error(errno: Errno) -> std::io::Error {
    std::io::Error::from_raw_os_error(errno.raw())
}
