//! The connection to a monitor: requests out, answers and events in, made again when it breaks.
//!
//! One task a pod serves it. A request waits for its answer as long as its own limit says, and no longer: a monitor
//! that is silent holds up nobody but those who need it.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use coracle_kernel::path;
use coracle_kernel::scm::{self, Kind, Mode};
use coracle_wire::{Body, Client, Exec, FailKind, Incoming, List, MAX_FRAME, WireError};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::execs::{Execs, Expected, Waiter};
use super::process::socket_name;
use super::words::{Refused, chain, exit, listed, refused};
use super::{MonitorEvent, tell};
use crate::error::{Context as _, Error, Result};
use crate::pod::PodHandle;

/// Pause before a broken connection is made again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

/// Requests that may wait for the socket before more are taken.
const OUTBOX: usize = 16;

/// What the rest of the engine has of the connection.
#[derive(Debug, Clone)]
pub(super) struct Link {
    requests: mpsc::UnboundedSender<Request>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    execs: Execs,
    /// Told at each exit of a container.
    exits: Notify,
}

#[derive(Debug)]
struct Request {
    body: Body,
    fds: Vec<OwnedFd>,
    /// Who waits for the end of the exec that this asks for.
    waiter: Option<Waiter>,
    reply: oneshot::Sender<Result<Answer>>,
}

/// An answer and the descriptors that came with it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) body: Body,
    pub(super) fds: Vec<OwnedFd>,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("cannot connect")]
    Connect(#[source] coracle_kernel::Error),
    #[error("cannot watch the socket")]
    Watch(#[source] io::Error),
    #[error("cannot {0}")]
    Socket(&'static str, #[source] io::Error),
    #[error("the monitor closed the connection")]
    Closed,
    #[error("the monitor does not keep to the protocol")]
    Protocol(#[from] WireError),
    #[error("the monitor refuses")]
    Refused(#[source] Refused),
    #[error("the monitor is dead")]
    Dead,
}

/// The connection broke before the answer came.
#[derive(Debug, thiserror::Error)]
#[error("the connection to the monitor broke")]
pub(super) struct Lost;

impl Link {
    /// Begins to serve the connection to a pod's monitor.
    pub(super) fn start(
        pod: PodHandle,
        dead: watch::Receiver<bool>,
        reconciled: watch::Sender<bool>,
    ) -> Result<Link> {
        let (requests, queue) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared::default());
        let dir = path::open_dir(pod.core().paths.monitors())
            .step("open the directory of the monitors' sockets")?;
        let service = Service {
            pod,
            dir,
            dead,
            reconciled,
            queue,
            shared: shared.clone(),
        };
        tokio::spawn(service.run());
        Ok(Link { requests, shared })
    }

    /// Sends a request and waits for its answer, at most `limit`. `step` is what it means to whoever asked.
    pub(super) async fn request(
        &self,
        step: &'static str,
        body: impl Into<Body>,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Answer> {
        self.ask(step, body.into(), fds, None, limit).await
    }

    /// Asks for an exec: its answer, and its end.
    pub(super) async fn exec(
        &self,
        step: &'static str,
        exec: Exec,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<(Answer, Expected)> {
        let (waiter, expected) = self.shared.execs.expect(&exec.exec_id);
        let answer = self.ask(step, exec.into(), fds, Some(waiter), limit).await?;
        Ok((answer, expected))
    }

    async fn ask(
        &self,
        step: &'static str,
        body: Body,
        fds: Vec<OwnedFd>,
        waiter: Option<Waiter>,
        limit: Duration,
    ) -> Result<Answer> {
        let (reply, answer) = oneshot::channel();
        let request = Request {
            body,
            fds,
            waiter,
            reply,
        };
        // A service that has ended drops the request, and with it the reply.
        let _ = self.requests.send(request);
        match timeout(limit, answer).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(Error::Step { cause, .. }))) => Err(Error::Step { step, cause }),
            Ok(Ok(Err(error))) => Err(error),
            Ok(Err(_)) => Err(Error::step(step, Lost)),
            Err(_) => Err(Error::Deadline { step, limit }),
        }
    }

    /// Told when a container exits; ask for it before looking.
    pub(super) fn exits(&self) -> &Notify {
        &self.shared.exits
    }
}

struct Service {
    pod: PodHandle,
    dir: OwnedFd,
    dead: watch::Receiver<bool>,
    reconciled: watch::Sender<bool>,
    queue: mpsc::UnboundedReceiver<Request>,
    shared: Arc<Shared>,
}

/// One connection.
struct Connection {
    /// A seqpacket socket: tokio's type serves to wait, every packet goes through `scm`.
    socket: UnixStream,
    client: Client,
    outbox: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    open: BTreeMap<u64, oneshot::Sender<Result<Answer>>>,
}

impl Service {
    async fn run(mut self) {
        self.keep_connected().await;
        self.shared.execs.clear();
    }

    /// Serves one connection after the other, until the monitor is dead or nobody asks it anything any more.
    async fn keep_connected(&mut self) {
        loop {
            let broken = match self.connect().await {
                Ok(mut connection) => match self.serve(&mut connection).await {
                    Ok(never) => never,
                    Err(broken) => broken,
                },
                Err(broken) => broken,
            };
            if matches!(broken, Broken::Dead) || *self.dead.borrow() || self.queue.is_closed() {
                debug!(pod = self.pod.id(), "the monitor's connection is over");
                return;
            }
            tokio::select! {
                // The end of a monitor closes its connection a moment before.
                () = dead(&mut self.dead) => return,
                () = sleep(RECONNECT_PAUSE) => warn!(
                    pod = self.pod.id(),
                    error = chain(&broken),
                    "the connection to the monitor broke"
                ),
            }
        }
    }

    /// Connects, agrees on the version, and has the monitor tell all that it knows.
    async fn connect(&mut self) -> Result<Connection, Broken> {
        let name = socket_name(self.pod.id());
        let socket =
            scm::connect(&self.dir, &name, Kind::Seqpacket, Mode::Nonblocking).map_err(Broken::Connect)?;
        let (client, hello) = Client::begin()?;
        let mut connection = Connection {
            socket: UnixStream::from_std(socket.into()).map_err(Broken::Watch)?,
            client,
            outbox: [(hello, Vec::new())].into(),
            open: BTreeMap::new(),
        };
        let (welcome, answer) = oneshot::channel();
        connection.open.insert(1, welcome);
        match self.until(&mut connection, answer).await? {
            Body::Welcome(_) => {}
            other => return Err(out_of_turn(&other)),
        }
        self.list(&mut connection).await?;
        Ok(connection)
    }

    /// Asks for everything that events tell of, and has the pod's task compare it with the records.
    async fn list(&mut self, connection: &mut Connection) -> Result<(), Broken> {
        let mut all = Vec::new();
        let mut execs = Vec::new();
        let mut after = String::new();
        loop {
            let answer = connection.request(List { after: after.clone() }.into(), Vec::new())?;
            let page = match self.until(connection, answer).await? {
                Body::Listed(page) => page,
                other => return Err(out_of_turn(&other)),
            };
            if let Some(last) = page.containers.last() {
                after.clone_from(&last.container_id);
            }
            all.extend(page.containers.into_iter().filter_map(listed));
            execs.extend(page.execs);
            if !page.more {
                break;
            }
        }
        self.shared.execs.compare(&execs);
        let (done, compared) = oneshot::channel();
        tell(&self.pod, MonitorEvent::Containers { listed: all, done });
        let reconciled = self.reconciled.clone();
        tokio::spawn(async move {
            let _ = compared.await;
            reconciled.send_replace(true);
        });
        Ok(())
    }

    /// Serves the connection until one request of its own is answered.
    async fn until(
        &mut self,
        connection: &mut Connection,
        mut answer: oneshot::Receiver<Result<Answer>>,
    ) -> Result<Body, Broken> {
        loop {
            tokio::select! {
                biased;
                () = dead(&mut self.dead) => return Err(Broken::Dead),
                answer = &mut answer => return match answer {
                    Ok(Ok(answer)) => Ok(answer.body),
                    Ok(Err(Error::Step { cause, .. })) => Err(Broken::Refused(Refused {
                        kind: FailKind::Other,
                        message: cause.to_string(),
                    })),
                    _ => Err(Broken::Closed),
                },
                ready = ready(connection) => self.turn(connection, ready?)?,
            }
        }
    }

    async fn serve(&mut self, connection: &mut Connection) -> Result<Broken, Broken> {
        loop {
            tokio::select! {
                biased;
                () = dead(&mut self.dead) => return Err(Broken::Dead),
                ready = ready(connection) => self.turn(connection, ready?)?,
                request = self.queue.recv(), if connection.outbox.len() < OUTBOX => match request {
                    Some(request) => connection.take(request, &self.shared.execs),
                    // Every handle of this monitor is gone.
                    None => return Err(Broken::Dead),
                },
            }
        }
    }

    /// Does what the socket is ready for.
    fn turn(&self, connection: &mut Connection, ready: Ready) -> Result<(), Broken> {
        match ready {
            Ready::Writable => Ok(()),
            Ready::Packet(bytes, fds) => {
                let count = fds.len();
                match connection.client.receive(&bytes, count)? {
                    Incoming::Answer { id, body } => connection.answer(id, body, fds),
                    Incoming::Event(body) => self.event(body),
                    Incoming::Ignored => {}
                }
                Ok(())
            }
        }
    }

    fn event(&self, body: Body) {
        match body {
            Body::Exited(exited) => {
                self.shared.exits.notify_waiters();
                let exit = exit(&exited.exit);
                tell(
                    &self.pod,
                    MonitorEvent::Exited {
                        container: exited.container_id,
                        exit,
                    },
                );
            }
            Body::ExecExited(exited) => self.shared.execs.ended(&exited.exec_id, exited.exit.exit_code),
            Body::LogLost(lost) => {
                tell(
                    &self.pod,
                    MonitorEvent::LogLost {
                        container: lost.container_id,
                        bytes: lost.bytes,
                    },
                );
            }
            Body::Oom(oom) => debug!(container = oom.container_id, kills = oom.kills, "out of memory"),
            other => debug!(event = other.name(), "an event that means nothing here"),
        }
    }
}

impl Connection {
    /// A request of the service itself.
    fn request(
        &mut self,
        body: Body,
        fds: Vec<OwnedFd>,
    ) -> Result<oneshot::Receiver<Result<Answer>>, WireError> {
        let (reply, answer) = oneshot::channel();
        let (id, bytes) = self.client.request(body)?;
        self.outbox.push_back((bytes, fds));
        self.open.insert(id, reply);
        Ok(answer)
    }

    fn take(&mut self, request: Request, execs: &Execs) {
        // It waited here for longer than its caller.
        if request.reply.is_closed() {
            return;
        }
        match self.client.request(request.body) {
            Ok((id, bytes)) => {
                if let Some(waiter) = request.waiter {
                    execs.enter(waiter);
                }
                self.outbox.push_back((bytes, request.fds));
                self.open.insert(id, request.reply);
            }
            // Too long, or too many: the connection is as good as before.
            Err(error) => {
                let _ = request.reply.send(Err(Error::step("ask the monitor", error)));
            }
        }
    }

    fn answer(&mut self, id: u64, body: Body, fds: Vec<OwnedFd>) {
        let Some(reply) = self.open.remove(&id) else {
            return;
        };
        let answer = match body {
            Body::Failed(failed) => Err(refused(failed)),
            body => Ok(Answer { body, fds }),
        };
        // Whoever asked may have given up: descriptors that came are closed then.
        let _ = reply.send(answer);
    }
}

enum Ready {
    Packet(Vec<u8>, Vec<OwnedFd>),
    /// Something was sent.
    Writable,
}

/// Waits until a packet came or one went.
async fn ready(connection: &mut Connection) -> Result<Ready, Broken> {
    let wanted = if connection.outbox.is_empty() {
        Interest::READABLE
    } else {
        Interest::READABLE | Interest::WRITABLE
    };
    loop {
        let ready = connection.socket.ready(wanted).await.map_err(Broken::Watch)?;
        if ready.is_readable() || ready.is_read_closed() {
            let mut buffer = vec![0; MAX_FRAME];
            let socket = &connection.socket;
            match socket.try_io(Interest::READABLE, || Ok(scm::recv(socket, &mut buffer)?)) {
                Ok(received) if received.len == 0 => return Err(Broken::Closed),
                Ok(received) => {
                    buffer.truncate(received.len);
                    return Ok(Ready::Packet(buffer, received.fds));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(Broken::Socket("receive", error)),
            }
        }
        let Some((bytes, fds)) = connection.outbox.front() else {
            continue;
        };
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let socket = &connection.socket;
        match socket.try_io(Interest::WRITABLE, || Ok(scm::send(socket, bytes, &fds)?)) {
            Ok(_) => {
                connection.outbox.pop_front();
                return Ok(Ready::Writable);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Broken::Socket("send", error)),
        }
    }
}

async fn dead(dead: &mut watch::Receiver<bool>) {
    // The sender lives in the monitor's handle; without any handle nobody asks any more.
    let _ = dead.wait_for(|dead| *dead).await;
}

fn out_of_turn(body: &Body) -> Broken {
    Broken::Protocol(WireError::OutOfTurn(body.name()))
}
