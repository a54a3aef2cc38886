//! The side of the socket that is written: what is sent becomes frames. Also the chunks that carry data there.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncWriteExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::link::{Clock, Wire};
use crate::spdy::frame as spdy;
use crate::transport::Writing;
use crate::ws::channel;
use crate::ws::frame::{self as ws, opcode};

/// Sends that wait for the writer.
pub(crate) const QUEUE: usize = 8;

/// Room before the payload of a chunk for every head that may come before it.
const HEADROOM: usize = 32;

/// Unused buffers that a pool keeps.
const KEPT: usize = 2;

/// Close status: the purpose is fulfilled.
const NORMAL: u16 = 1000;

/// What is to be written.
pub(crate) enum Send {
    /// A stream that was opened is served.
    Accept(u32),
    /// It is not, or no longer. Channels have no such thing.
    Reset(u32, spdy::Reason),
    /// Bytes on a stream.
    Data(u32, Chunk),
    /// A few bytes on a stream.
    Text(u32, Vec<u8>),
    /// We send no more on this stream. Channels have no such thing.
    Finish(u32),
    /// A SPDY frame as it stands.
    Frame(Vec<u8>),
    /// A control frame of the WebSocket as it stands.
    Control(Vec<u8>),
    /// The session is over.
    End,
}

/// The side of the socket that is written.
pub(crate) struct Writer {
    socket: Writing,
    wire: Wire,
    /// The highest stream that was accepted; 0 before the first reply, which begins the compressed stream.
    accepted: u32,
    clock: Arc<Clock>,
}

impl Writer {
    pub(crate) fn new(socket: Writing, wire: Wire, clock: Arc<Clock>) -> Writer {
        Writer {
            socket,
            wire,
            accepted: 0,
            clock,
        }
    }

    /// Writes what comes, until the end is sent or nobody is left to send anything.
    pub(crate) async fn run(mut self, mut queue: mpsc::Receiver<Send>) -> io::Result<()> {
        while let Some(send) = queue.recv().await {
            match send {
                Send::Data(stream, mut chunk) => {
                    if let Wire::Channels { base64: true, .. } = self.wire {
                        let text = channel::encode(number(stream), chunk.payload());
                        self.write(&ws::frame(opcode::TEXT, &text)).await?;
                    } else {
                        let from = self.wire.put_heads(stream, &mut chunk);
                        self.write(&chunk.buffer[from..HEADROOM + chunk.length]).await?;
                    }
                }
                Send::Text(stream, bytes) => {
                    let frame = match self.wire {
                        Wire::Channels { base64: true, .. } => {
                            ws::frame(opcode::TEXT, &channel::encode(number(stream), &bytes))
                        }
                        Wire::Channels { .. } => {
                            ws::frame(opcode::BINARY, &[&[number(stream)], &bytes[..]].concat())
                        }
                        Wire::Spdy | Wire::Tunnel => {
                            [&spdy::data(stream, 0, bytes.len())[..], &bytes].concat()
                        }
                    };
                    self.frame(frame).await?;
                }
                Send::Accept(stream) => {
                    let first = self.accepted == 0;
                    self.accepted = self.accepted.max(stream);
                    self.frame(spdy::reply(stream, first)).await?;
                }
                Send::Reset(stream, reason) if self.wire.has_streams() => {
                    self.frame(spdy::reset(stream, reason)).await?;
                }
                Send::Finish(stream) if self.wire.has_streams() => {
                    self.frame(spdy::data(stream, spdy::FIN, 0).to_vec()).await?;
                }
                Send::Reset(..) | Send::Finish(_) => {}
                Send::Frame(frame) => self.frame(frame).await?,
                Send::Control(frame) => self.write(&frame).await?,
                Send::End => return self.farewell().await,
            }
        }
        // nobody is left, and nobody has said that it went well
        self.socket.shutdown().await
    }

    async fn farewell(mut self) -> io::Result<()> {
        if self.wire.has_streams() {
            self.frame(spdy::goaway(self.accepted)).await?;
        }
        if self.wire != Wire::Spdy {
            self.write(&ws::close(Some(NORMAL))).await?;
        }
        self.socket.shutdown().await
    }

    /// Writes a frame of the inner protocol.
    async fn frame(&mut self, frame: Vec<u8>) -> io::Result<()> {
        match self.wire {
            Wire::Tunnel => self.write(&ws::frame(opcode::BINARY, &frame)).await,
            Wire::Spdy | Wire::Channels { .. } => self.write(&frame).await,
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut left = bytes;
        while !left.is_empty() {
            let wrote = self.socket.write(left).await?;
            left = &left[wrote..];
            // not after the whole: a slow peer is not an idle one
            self.clock.tick();
        }
        self.socket.flush().await
    }
}

impl Wire {
    /// Writes the heads that come before a chunk's payload, right before it: a chunk is written in one call without
    /// being copied. Where they begin.
    fn put_heads(self, stream: u32, chunk: &mut Chunk) -> usize {
        let (buffer, length) = (&mut chunk.buffer, chunk.length);
        let frame = HEADROOM - spdy::HEAD;
        match self {
            Wire::Spdy | Wire::Tunnel => {
                buffer[frame..HEADROOM].copy_from_slice(&spdy::data(stream, 0, length));
                match self {
                    Wire::Tunnel => ws::put_head(buffer, frame, opcode::BINARY, spdy::HEAD + length),
                    _ => frame,
                }
            }
            Wire::Channels { .. } => {
                buffer[HEADROOM - 1] = number(stream);
                ws::put_head(buffer, HEADROOM - 1, opcode::BINARY, 1 + length)
            }
        }
    }
}

/// Buffers of one session for what it sends: as many as may be on their way at once, whatever the number of streams.
pub(crate) struct Pool {
    size: usize,
    unused: Mutex<Vec<Box<[u8]>>>,
    turns: Arc<Semaphore>,
}

impl Pool {
    /// `count` chunks of `size` bytes, none of them allocated yet.
    pub(crate) fn new(count: usize, size: usize) -> Arc<Pool> {
        Arc::new(Pool {
            size,
            unused: Mutex::default(),
            turns: Arc::new(Semaphore::new(count)),
        })
    }

    /// Waits for a chunk; who asks first is served first.
    pub(crate) async fn take(self: &Arc<Pool>) -> Chunk {
        let turn = Arc::clone(&self.turns).acquire_owned().await.ok();
        let unused = self.lock().pop();
        Chunk {
            buffer: unused.unwrap_or_else(|| vec![0; HEADROOM + self.size].into_boxed_slice()),
            length: 0,
            pool: Arc::clone(self),
            _turn: turn,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Box<[u8]>>> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer of a pool, to which it returns.
pub(crate) struct Chunk {
    buffer: Box<[u8]>,
    length: usize,
    pool: Arc<Pool>,
    /// None only if the semaphore were closed, which nobody does.
    _turn: Option<OwnedSemaphorePermit>,
}

impl Chunk {
    /// The room for data.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        &mut self.buffer[HEADROOM..]
    }

    /// Says how much of the room is data.
    pub(crate) fn filled(mut self, length: usize) -> Chunk {
        self.length = length.min(self.buffer.len() - HEADROOM);
        self
    }

    /// How much is data.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    fn payload(&self) -> &[u8] {
        &self.buffer[HEADROOM..HEADROOM + self.length]
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let mut unused = self.pool.lock();
        if unused.len() < KEPT {
            unused.push(std::mem::take(&mut self.buffer));
        }
    }
}

/// The number of a channel; streams of channels are made from one.
fn number(stream: u32) -> u8 {
    u8::try_from(stream).unwrap_or(u8::MAX)
}
