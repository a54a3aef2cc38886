//! Port-forward: each connection of the client's is a pair of streams, one for data and one for an error.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::chunk::{Kind, Pool};
use crate::link::{Event, Gone, Link, Piece, Reader, run};
use crate::shares::Shares;
use crate::spdy::Headers;
use crate::spdy::frame::Reason;
use crate::writer::{QUEUE, Send};
use crate::{Limits, PortForwardRequest, Sessions, chain};

/// Streams that a client may have open at once: two a connection.
pub(crate) const MOST_STREAMS: usize = 512;

/// Bytes of all connections that wait for pods at most. One that does not read stops the others only beyond this.
const BUDGET: usize = 4 << 20;
/// Bytes read from a pod at a time, and how many such chunks may be on their way to the client: one that is written, one
/// that waits for that, one being read.
const CHUNK: usize = 256 << 10;
const CHUNKS: usize = 3;
/// The same where the pod's sessions have their share of memory already: enough to go on.
const LEAST_BUDGET: usize = 512 << 10;
const LEAST_CHUNKS: usize = 2;
/// Pieces that are written to a pod in one call.
const BATCH: usize = 32;

/// What the port-forwards of all pods have together.
pub(crate) struct Room {
    pub(crate) connections: Arc<Shares>,
    pub(crate) memory: Arc<Shares>,
}

/// Serves one session to its end.
pub(crate) async fn serve<S: Sessions>(
    link: Link,
    request: &PortForwardRequest,
    sessions: Arc<S>,
    room: &Room,
    limits: &Limits,
) -> Result<(), Gone> {
    let Link {
        mut reader,
        writer,
        clock,
        wire,
    } = link;
    // Held to the end.
    let memory = room.memory.take(&request.pod, BUDGET + CHUNKS * CHUNK);
    let (budget, chunks) = match memory {
        Ok(_) => (BUDGET, CHUNKS),
        Err(_) => (LEAST_BUDGET, LEAST_CHUNKS),
    };
    writer.keep_little();
    let (to, queue) = mpsc::channel(QUEUE);
    let mut forwards = Forwards {
        request,
        sessions,
        connections: &room.connections,
        limits,
        half_close: wire.has_streams(),
        pairs: HashMap::new(),
        targets: HashMap::new(),
        tasks: JoinSet::new(),
        budget: Arc::new(Semaphore::new(budget)),
        kind: writer.kind(),
        chunks,
        pool: Weak::new(),
        to,
    };
    let body = async {
        match wire.has_streams() {
            true => forwards.streams(&mut reader).await?,
            false => forwards.channels(&mut reader).await?,
        }
        Ok(reader)
    };
    run(writer, &clock, queue, limits.idle, body).await
}

/// The connections of one client.
struct Forwards<'a, S> {
    request: &'a PortForwardRequest,
    sessions: Arc<S>,
    /// Connections that this pod and others may have.
    connections: &'a Arc<Shares>,
    limits: &'a Limits,
    /// Whether the client can say that it sends no more.
    half_close: bool,
    /// Pairs of which one stream is still to come, by what the client calls them.
    pairs: HashMap<String, Pair>,
    /// Where the data of a stream goes.
    targets: HashMap<u32, Target>,
    tasks: JoinSet<Streams>,
    budget: Arc<Semaphore>,
    kind: Kind,
    chunks: usize,
    /// There as long as a connection or a chunk is: a session without connections keeps no memory and no pipes.
    pool: Weak<Pool>,
    to: mpsc::Sender<Send>,
}

/// Streams of one connection.
#[derive(Debug, Clone, Copy)]
struct Streams {
    data: u32,
    error: u32,
}

struct Pair {
    data: Option<u32>,
    error: Option<u32>,
    port: u16,
    until: Instant,
}

/// Where the data of a stream goes. To drop it is to say that the client wants no more of the connection.
struct Target {
    data: mpsc::UnboundedSender<Upward>,
    _reset: oneshot::Sender<Infallible>,
}

/// What goes to a pod.
enum Upward {
    Data(Piece),
    /// The client sends no more.
    Finished,
}

impl<S: Sessions> Forwards<'_, S> {
    /// Serves what the client opens, until it is gone.
    async fn streams(&mut self, reader: &mut Reader) -> Result<(), Gone> {
        loop {
            let overdue = self.pairs.values().map(|pair| pair.until).min();
            let overdue = async {
                match overdue {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = reader.next() => self.take(event?, reader).await?,
                Some(done) = self.tasks.join_next() => {
                    if let Ok(done) = done {
                        self.targets.remove(&done.data);
                        reader.forget(done.data);
                        reader.forget(done.error);
                    }
                }
                () = overdue => self.expire(reader).await?,
            }
        }
    }

    /// Serves the ports of the request, until all of their connections are over.
    async fn channels(&mut self, reader: &mut Reader) -> Result<(), Gone> {
        for (data, port) in (0..).step_by(2).zip(&self.request.ports) {
            let error = data + 1;
            for stream in [data, error] {
                self.send(Send::Text(stream, port.to_le_bytes().to_vec())).await?;
            }
            self.start(Streams { data, error }, *port);
        }
        loop {
            tokio::select! {
                event = reader.next() => self.take(event?, reader).await?,
                done = self.tasks.join_next() => match done {
                    Some(Ok(done)) => drop(self.targets.remove(&done.data)),
                    Some(Err(_)) => {}
                    None => return self.send(Send::End).await,
                },
            }
        }
    }

    async fn take(&mut self, event: Event, reader: &mut Reader) -> Result<(), Gone> {
        match event {
            Event::Opened { stream, headers } => match self.opened(stream, &headers) {
                Some(ready) => {
                    self.send(Send::Accept(stream)).await?;
                    if let Some((streams, port)) = ready {
                        self.start(streams, port);
                    }
                }
                None => {
                    reader.forget(stream);
                    self.send(Send::Reset(stream, Reason::Refused)).await?;
                }
            },
            Event::Data { stream, bytes } => {
                let target = self.targets.get(&stream).map(|target| &target.data);
                if let Some(target) = target.filter(|target| !target.is_closed()) {
                    let piece = reader.hold(&self.budget, bytes).await?;
                    // nobody takes it where the pod has stopped reading
                    let _ = target.send(Upward::Data(piece));
                }
            }
            Event::Finished { stream } => {
                if let Some(target) = self.targets.get(&stream) {
                    let _ = target.data.send(Upward::Finished);
                }
            }
            Event::Reset { stream } => {
                self.targets.remove(&stream);
                self.pairs
                    .retain(|_, pair| pair.data != Some(stream) && pair.error != Some(stream));
            }
            Event::Answer(send) => self.send(send).await?,
        }
        Ok(())
    }

    /// Finds the pair of a new stream. `None`: refused. The inner one: the other stream is still to come.
    fn opened(&mut self, stream: u32, headers: &Headers) -> Option<Option<(Streams, u16)>> {
        let port: u16 = headers.port.as_deref()?.parse().ok()?;
        let is_data = match headers.stream_type.as_deref()? {
            "data" => true,
            "error" => false,
            _ => return None,
        };
        if port == 0 {
            return None;
        }
        // Clients without request ids open the error stream first and the data stream right after it.
        let id = headers.request_id.clone().unwrap_or_else(|| {
            let first = if is_data { stream.saturating_sub(2) } else { stream };
            format!("stream {first}")
        });
        let pair = self.pairs.entry(id.clone()).or_insert_with(|| Pair {
            data: None,
            error: None,
            port,
            until: Instant::now() + self.limits.handshake,
        });
        let slot = if is_data { &mut pair.data } else { &mut pair.error };
        if slot.is_some() {
            return None;
        }
        *slot = Some(stream);
        // the port of the data stream is the one that is dialled
        if is_data {
            pair.port = port;
        }
        let (Some(data), Some(error), port) = (pair.data, pair.error, pair.port) else {
            return Some(None);
        };
        self.pairs.remove(&id);
        Some(Some((Streams { data, error }, port)))
    }

    fn start(&mut self, streams: Streams, port: u16) {
        let (data, upward) = mpsc::unbounded_channel();
        let (held, mut reset) = oneshot::channel();
        self.targets.insert(streams.data, Target { data, _reset: held });
        let (pod, allowed) = (self.request.pod.clone(), &self.request.ports);
        let allowed = allowed.is_empty() || allowed.contains(&port);
        let connection = Connection {
            streams,
            half_close: self.half_close,
            drain: self.limits.drain,
            to: self.to.clone(),
            pool: self.pool(),
        };
        let sessions = Arc::clone(&self.sessions);
        let share = self.connections.take(&pod, 1);
        self.tasks.spawn(async move {
            let dial = async {
                match &share {
                    _ if !allowed => Err("the port is not one of the request's".into()),
                    Err(exhausted) => Err(exhausted.clone().into()),
                    Ok(_) => sessions.dial(&pod, port).await,
                }
            };
            let dialled = tokio::select! {
                dialled = dial => dialled,
                // the client has given it up: who opens and resets without end must not have dials without number
                _ = &mut reset => return streams,
            };
            let result = match dialled {
                Ok(socket) => connection.copy(socket, upward, reset).await,
                Err(error) => {
                    let why = format!("error forwarding port {port} to pod {pod}: {}", chain(&error));
                    connection.fail(why).await
                }
            };
            // the writer is gone only when the session is
            drop(result);
            drop(share);
            streams
        });
    }

    /// Gives up pairs of which one stream did not come.
    async fn expire(&mut self, reader: &mut Reader) -> Result<(), Gone> {
        let now = Instant::now();
        let expired: Vec<_> = self.pairs.extract_if(|_, pair| pair.until <= now).collect();
        for (id, pair) in expired {
            if let Some(error) = pair.error {
                let text = format!("timed out waiting for the data stream of request {id}");
                self.send(Send::Text(error, text.into_bytes())).await?;
                self.send(Send::Finish(error)).await?;
                reader.forget(error);
            }
            if let Some(data) = pair.data {
                self.send(Send::Reset(data, Reason::Internal)).await?;
                reader.forget(data);
            }
        }
        Ok(())
    }

    /// The one pool of all connections.
    fn pool(&mut self) -> Arc<Pool> {
        self.pool.upgrade().unwrap_or_else(|| {
            let pool = Pool::new(self.kind, self.chunks, CHUNK);
            self.pool = Arc::downgrade(&pool);
            pool
        })
    }

    async fn send(&self, send: Send) -> Result<(), Gone> {
        self.to.send(send).await.map_err(|_| Gone::Closed)
    }
}

/// One connection to a pod, in a task of its own.
struct Connection {
    streams: Streams,
    half_close: bool,
    /// How long a pod that sends no more may still take what was sent to it.
    drain: Duration,
    to: mpsc::Sender<Send>,
    pool: Arc<Pool>,
}

/// The session's writer is gone.
type Over = mpsc::error::SendError<Send>;

impl Connection {
    /// Copies both ways until both are over. The client may end its way long before the pod; the pod's end is soon
    /// that of both.
    async fn copy(
        self,
        socket: TcpStream,
        upward: mpsc::UnboundedReceiver<Upward>,
        mut reset: oneshot::Receiver<Infallible>,
    ) -> Result<(), Over> {
        // what is read is written at once: there is nothing to wait for
        let _ = socket.set_nodelay(true);
        let (read, write) = socket.into_split();
        let (up, down) = (up(write, upward), self.down(read));
        tokio::pin!(up, down);
        let down_over = async {
            tokio::select! {
                ended = &mut down => ended.map(|ended| (ended, false)),
                () = &mut up => down.await.map(|ended| (ended, true)),
            }
        };
        let ended = tokio::select! {
            ended = down_over => Some(ended?),
            _ = &mut reset => None,
        };
        let Streams { data, error } = self.streams;
        if let Some((Downward::Broken, _)) = ended {
            self.to.send(Send::Reset(data, Reason::Internal)).await?;
        }
        // Without a text: clients since 1.23 end the whole session for one. And at once: those before 1.32 close the
        // local connection, without which they never end their stream, only when this one has ended.
        self.to.send(Send::Finish(error)).await?;
        if let Some((Downward::Finished, false)) = ended
            && self.half_close
        {
            // what was sent before the client knew of the end; no client sends more after it
            tokio::select! {
                _ = tokio::time::timeout(self.drain, up) => {}
                _ = reset => {}
            }
        }
        Ok(())
    }

    /// Tells why there is no connection.
    async fn fail(self, why: String) -> Result<(), Over> {
        let Streams { data, error } = self.streams;
        self.to.send(Send::Text(error, why.into_bytes())).await?;
        self.to.send(Send::Finish(error)).await?;
        self.to.send(Send::Reset(data, Reason::Internal)).await
    }

    /// From the pod to the client.
    async fn down(&self, socket: OwnedReadHalf) -> Result<Downward, Over> {
        loop {
            let mut chunk = match socket.readable().await {
                Ok(()) => self.pool.take().await,
                Err(_) => return Ok(Downward::Broken),
            };
            let from: &TcpStream = socket.as_ref();
            match from.try_io(Interest::READABLE, || chunk.fill(from, CHUNK)) {
                Ok(0) => {
                    self.to.send(Send::Finish(self.streams.data)).await?;
                    return Ok(Downward::Finished);
                }
                Ok(_) => self.to.send(Send::Data(self.streams.data, chunk)).await?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Ok(Downward::Broken),
            }
        }
    }
}

enum Downward {
    /// The pod sends no more.
    Finished,
    /// The pod has reset the connection.
    Broken,
}

/// From the client to the pod, until the client has no more or the pod stops reading.
async fn up(mut socket: OwnedWriteHalf, mut upward: mpsc::UnboundedReceiver<Upward>) {
    let mut batch = Vec::with_capacity(BATCH);
    while upward.recv_many(&mut batch, BATCH).await > 0 {
        let mut pieces = Vec::with_capacity(batch.len());
        let mut finished = false;
        for part in batch.drain(..) {
            match part {
                Upward::Data(piece) => pieces.push(piece),
                Upward::Finished => finished = true,
            }
        }
        if write_all(&mut socket, &mut pieces).await.is_err() {
            return;
        }
        if finished {
            // it may be closed already
            let _ = socket.shutdown().await;
            return;
        }
    }
}

async fn write_all(socket: &mut OwnedWriteHalf, pieces: &mut [Piece]) -> io::Result<()> {
    let mut first = 0;
    while first < pieces.len() {
        let slices: Vec<_> = pieces[first..]
            .iter()
            .map(|piece| IoSlice::new(&piece.bytes))
            .collect();
        let mut wrote = socket.write_vectored(&slices).await?;
        while let Some(piece) = pieces.get_mut(first) {
            let here = wrote.min(piece.bytes.len());
            piece.bytes.advance(here);
            wrote -= here;
            if !piece.bytes.is_empty() {
                break;
            }
            // its share of the budget is free again with the batch; its memory at once
            piece.bytes = Bytes::new();
            first += 1;
        }
    }
    Ok(())
}
