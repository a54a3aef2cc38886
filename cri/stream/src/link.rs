//! The socket of one session, and the side of it that is read: bytes become events.
//!
//! No protocol here has windows, so back-pressure has no other means than these: the writer writes one thing at a
//! time and its queue is short, chunks come from a pool that has few of them, and what has arrived but was not yet
//! taken counts against a budget, beyond which nothing more is read.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;

use crate::spdy::{self, Connection, Headers};
use crate::transport::{self, Reading, Socket};
use crate::writer::{Send, Writer};
use crate::ws::frame::opcode;
use crate::ws::{self, Channels, Decoder};

/// What one read of the socket takes at most, and what it takes at first: a session that carries little keeps little.
const MOST_READ: usize = 256 << 10;
const FIRST_READ: usize = 8 << 10;

/// How long a peer may take to close its side after we have closed ours.
const LINGER: Duration = Duration::from_secs(5);

/// How long what is queued for a peer that has left is tried to be written.
const FAREWELL: Duration = Duration::from_secs(1);

/// What a piece that waits costs beside its bytes.
const PIECE: usize = 128;

/// The largest block that a piece lies in: what one read takes, behind a frame that has not come whole yet (little more
/// than 16 KiB at most).
const BLOCK: usize = MOST_READ + (32 << 10);

/// Below this a piece that waits is a copy. Others keep the block that they lie in, and count for it.
const COPIED: usize = MOST_READ / 2;

/// What a piece counts for that keeps its block: no budget is smaller.
const MOST_COST: usize = BLOCK + PIECE;

/// What the bytes on a socket are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wire {
    /// SPDY frames.
    Spdy,
    /// SPDY frames in binary messages of a WebSocket.
    Tunnel,
    /// Messages of a WebSocket that begin with a channel's number.
    Channels { base64: bool, half_close: bool },
}

impl Wire {
    /// Whether the peer opens streams; otherwise channels are there from the beginning.
    pub(crate) fn has_streams(self) -> bool {
        !matches!(self, Wire::Channels { .. })
    }
}

/// What has arrived. A stream is a SPDY stream or a channel.
pub(crate) enum Event {
    Opened {
        stream: u32,
        headers: Headers,
    },
    Data {
        stream: u32,
        bytes: Bytes,
    },
    Finished {
        stream: u32,
    },
    Reset {
        stream: u32,
    },
    /// To be given to the writer.
    Answer(Send),
}

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Gone {
    #[error("the peer has closed the connection")]
    Closed,
    #[error("take the connection")]
    Socket(#[source] io::Error),
    #[error("read from the peer")]
    Read(#[source] io::Error),
    #[error("SPDY")]
    Spdy(#[from] spdy::Error),
    #[error("WebSocket")]
    WebSocket(#[from] ws::Error),
    #[error("the peer did not open its streams in {0:?}")]
    Handshake(Duration),
}

/// A socket whose upgrade is done.
pub(crate) struct Link {
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
    pub(crate) clock: Arc<Clock>,
    pub(crate) wire: Wire,
}

impl Link {
    /// `early` has come with the upgrade request. The peer may have `most_streams` at once.
    pub(crate) fn new(socket: Socket, early: &[u8], wire: Wire, most_streams: usize) -> io::Result<Link> {
        let clock = Arc::new(Clock::new());
        let (read, write) = transport::split(socket)?;
        let spdy = || Box::new(Connection::new(most_streams));
        let decoder = match wire {
            Wire::Spdy => Protocol::Spdy(spdy()),
            Wire::Tunnel => Protocol::Tunnel {
                frames: Decoder::default(),
                inner: BytesMut::new(),
                spdy: spdy(),
            },
            Wire::Channels { base64, half_close } => Protocol::Channels {
                frames: Decoder::default(),
                channels: Channels::new(base64, half_close),
            },
        };
        Ok(Link {
            reader: Reader {
                socket: read,
                input: BytesMut::from(early),
                read: FIRST_READ,
                protocol: decoder,
                closing: false,
                clock: Arc::clone(&clock),
            },
            writer: Writer::new(write, wire, Arc::clone(&clock)),
            clock,
            wire,
        })
    }
}

/// Runs a session: `body` beside the writer, until both are done, the peer is gone, or nothing went either way for
/// `idle`. The body gives the reader back when it has sent everything.
pub(crate) async fn run<F>(
    writer: Writer,
    clock: &Clock,
    queue: mpsc::Receiver<Send>,
    idle: Duration,
    body: F,
) -> Result<(), Gone>
where
    F: Future<Output = Result<Reader, Gone>>,
{
    let work = async {
        let writing = writer.run(queue);
        tokio::pin!(writing, body);
        let body = tokio::select! {
            result = &mut body => result,
            // it ends before the body only when the peer does not take what is written
            _ = &mut writing => return Err(Gone::Closed),
        };
        let reader = match body {
            Ok(reader) => reader,
            Err(gone) => {
                // the answer to a close frame may still be in the queue
                let _ = tokio::time::timeout(FAREWELL, writing).await;
                return Err(gone);
            }
        };
        let flushed = async {
            // what the peer sends meanwhile is no sign that it will ever read
            let _ = tokio::time::timeout(idle, writing).await;
            tokio::time::sleep(LINGER).await;
        };
        tokio::select! {
            () = flushed => {}
            () = reader.discard() => {}
        }
        Ok(())
    };
    tokio::select! {
        result = work => result,
        () = clock.idle(idle) => {
            tracing::debug!(?idle, "streaming session ended: nothing went either way");
            Ok(())
        }
    }
}

/// When something last went over the socket.
#[derive(Debug)]
pub(crate) struct Clock {
    start: Instant,
    /// Milliseconds after the start.
    last: AtomicU64,
}

impl Clock {
    fn new() -> Clock {
        Clock {
            start: Instant::now(),
            last: AtomicU64::new(0),
        }
    }

    /// Something went over the socket.
    pub(crate) fn tick(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    /// Returns when nothing has happened for this long.
    async fn idle(&self, limit: Duration) {
        loop {
            let due = self.start + Duration::from_millis(self.last.load(Ordering::Relaxed)) + limit;
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// The side of the socket that is read.
pub(crate) struct Reader {
    socket: Reading,
    input: BytesMut,
    /// What the next read takes.
    read: usize,
    protocol: Protocol,
    /// The peer's close frame was read.
    closing: bool,
    clock: Arc<Clock>,
}

/// Bytes that have arrived and wait to be taken.
pub(crate) struct Piece {
    pub(crate) bytes: Bytes,
    /// Given back to the budget with the piece; none only if the budget itself is closed, which nobody does.
    #[expect(dead_code, reason = "held for its drop")]
    permit: Option<OwnedSemaphorePermit>,
}

/// What stands between the socket and the events.
enum Protocol {
    Spdy(Box<Connection>),
    Tunnel {
        frames: Decoder,
        /// What the messages have brought.
        inner: BytesMut,
        spdy: Box<Connection>,
    },
    Channels {
        frames: Decoder,
        channels: Channels,
    },
}

impl Reader {
    /// The next event. May be dropped and called again without loss.
    pub(crate) async fn next(&mut self) -> Result<Event, Gone> {
        loop {
            if self.closing {
                return Err(Gone::Closed);
            }
            if let Some(event) = self.decode()? {
                return Ok(event);
            }
            self.fill().await?;
        }
    }

    /// Returns when the peer has closed its side, read or not: for a session that cannot take more at the moment.
    pub(crate) async fn closed(&self) -> Gone {
        match self.socket.closed().await {
            Ok(()) => Gone::Closed,
            Err(e) => Gone::Read(e),
        }
    }

    /// Counts bytes that have arrived against what may wait; when too much does, waits until some of it is taken.
    pub(crate) async fn hold(&self, budget: &Arc<Semaphore>, bytes: Bytes) -> Result<Piece, Gone> {
        let (bytes, cost) = kept(bytes);
        let permit = tokio::select! {
            biased;
            permit = Arc::clone(budget).acquire_many_owned(cost) => permit.ok(),
            gone = self.closed() => return Err(gone),
        };
        Ok(Piece { bytes, permit })
    }

    /// Forgets a stream that is over.
    pub(crate) fn forget(&mut self, stream: u32) {
        match &mut self.protocol {
            Protocol::Spdy(spdy) | Protocol::Tunnel { spdy, .. } => spdy.forget(stream),
            Protocol::Channels { .. } => {}
        }
    }

    /// Reads what still comes, until the peer closes its side.
    async fn discard(mut self) {
        loop {
            self.input.clear();
            if self.fill().await.is_err() {
                return;
            }
        }
    }

    async fn fill(&mut self) -> Result<(), Gone> {
        if self.input.capacity() - self.input.len() < self.read / 2 {
            make_room(&mut self.input, self.read);
        }
        let room = self.input.capacity() - self.input.len();
        let got = self.socket.read_buf(&mut self.input).await.map_err(Gone::Read)?;
        if got == 0 {
            return Err(Gone::Closed);
        }
        if got == room {
            self.read = (self.read * 2).min(MOST_READ);
        }
        self.clock.tick();
        Ok(())
    }

    fn decode(&mut self) -> Result<Option<Event>, Gone> {
        match &mut self.protocol {
            Protocol::Spdy(spdy) => Ok(spdy.next(&mut self.input)?.map(Event::from)),
            Protocol::Tunnel { frames, inner, spdy } => loop {
                if let Some(event) = spdy.next(inner)? {
                    return Ok(Some(event.into()));
                }
                match frames.next(&mut self.input)? {
                    Some(ws::frame::Event::Piece(piece)) if inner.is_empty() => *inner = piece.bytes,
                    Some(ws::frame::Event::Piece(piece)) => {
                        make_room(inner, piece.bytes.len());
                        inner.extend_from_slice(&piece.bytes);
                    }
                    Some(other) => return Ok(answer(other, &mut self.closing)),
                    None => return Ok(None),
                }
            },
            Protocol::Channels { frames, channels } => loop {
                match frames.next(&mut self.input)? {
                    Some(ws::frame::Event::Piece(piece)) => {
                        if let Some(event) = channels.piece(piece)? {
                            return Ok(Some(event.into()));
                        }
                    }
                    Some(other) => return Ok(answer(other, &mut self.closing)),
                    None => return Ok(None),
                }
            },
        }
    }
}

/// A piece as it waits, and what it keeps in memory.
fn kept(bytes: Bytes) -> (Bytes, u32) {
    let (bytes, cost) = match bytes.len() {
        length if length < COPIED => (Bytes::copy_from_slice(&bytes), length + PIECE),
        _ => (bytes, MOST_COST),
    };
    (bytes, u32::try_from(cost).unwrap_or(u32::MAX))
}

/// Makes room for so much more, in a block that is no larger than that asks for: `reserve` would double the last one.
fn make_room(buffer: &mut BytesMut, want: usize) {
    if !buffer.try_reclaim(want) {
        let length = buffer.len();
        // what comes in small parts is not to be copied for each of them
        let mut block = BytesMut::with_capacity(length + want.max(length));
        block.extend_from_slice(buffer);
        *buffer = block;
    }
}

/// What a control frame of a WebSocket asks for.
fn answer(event: ws::frame::Event, closing: &mut bool) -> Option<Event> {
    match event {
        ws::frame::Event::Ping(bytes) => Some(Send::Control(ws::frame::frame(opcode::PONG, &bytes))),
        ws::frame::Event::Close(status) => {
            *closing = true;
            Some(Send::Control(ws::frame::close(status)))
        }
        ws::frame::Event::Piece(_) => None,
    }
    .map(Event::Answer)
}

impl From<spdy::conn::Event> for Event {
    fn from(event: spdy::conn::Event) -> Event {
        match event {
            spdy::conn::Event::Opened { stream, headers } => Event::Opened { stream, headers },
            spdy::conn::Event::Data { stream, bytes } => Event::Data { stream, bytes },
            spdy::conn::Event::Finished { stream } => Event::Finished { stream },
            spdy::conn::Event::Reset { stream } => Event::Reset { stream },
            spdy::conn::Event::Answer(frame) => Event::Answer(Send::Frame(frame)),
        }
    }
}

impl From<ws::channel::Event> for Event {
    fn from(event: ws::channel::Event) -> Event {
        match event {
            ws::channel::Event::Data { channel, bytes } => Event::Data {
                stream: channel.into(),
                bytes,
            },
            ws::channel::Event::Finished { channel } => Event::Finished {
                stream: channel.into(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is left when the longest control frame has not come whole.
    const LEFT: usize = (16 << 10) + 23;

    #[test]
    fn a_piece_counts_for_what_it_keeps() {
        for length in [
            0,
            1,
            4096,
            64 << 10,
            COPIED - 1,
            COPIED,
            192 << 10,
            MOST_READ,
            BLOCK,
        ] {
            let mut block = BytesMut::zeroed(BLOCK);
            let piece = block.split_to(length).freeze();
            let came = piece.as_ptr();
            let (bytes, cost) = kept(piece);
            let keeps = match bytes.as_ptr() == came {
                true if length > 0 => BLOCK,
                _ => length,
            };
            assert!(
                bytes.len() == length && cost as usize >= keeps,
                "{length}: {cost}"
            );
            // a session that has little takes it as well
            assert!(cost <= 512 << 10, "{length}: {cost}");
        }
    }

    #[test]
    fn no_block_is_larger_than_what_is_counted() {
        // what of a block is kept elsewhere, and what is left in the buffer
        for kept in [false, true] {
            for left in [0, 1, 100, LEFT] {
                let (mut buffer, mut read, mut pieces) = (BytesMut::new(), FIRST_READ, Vec::new());
                for _ in 0..20 {
                    make_room(&mut buffer, read);
                    assert!(buffer.capacity() <= BLOCK, "{left}: {}", buffer.capacity());
                    buffer.resize(buffer.capacity(), 0);
                    let piece = buffer.split_to(buffer.len() - left.min(buffer.len()));
                    pieces.extend(kept.then_some(piece));
                    read = (read * 2).min(MOST_READ);
                }
            }
        }
        // and where it comes in small parts
        let mut buffer = BytesMut::new();
        while buffer.len() < LEFT {
            make_room(&mut buffer, 1);
            buffer.extend_from_slice(&[0]);
        }
        assert!(buffer.capacity() <= 2 * LEFT, "{}", buffer.capacity());
    }
}
