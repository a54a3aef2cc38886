//! The side of the socket that is written: what is sent becomes frames.

use std::io;
use std::sync::Arc;

use coracle_kernel::tcp;
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::chunk::{Chunk, HEADROOM, Kind, Pipe};
use crate::link::{Clock, Wire};
use crate::spdy::frame as spdy;
use crate::transport::Writing;
use crate::ws::channel;
use crate::ws::frame::{self as ws, opcode};

/// Sends that wait for the writer.
pub(crate) const QUEUE: usize = 8;

/// What is kept in the socket of a client at a loopback address; the kernel takes twice this, if its limit is not less.
const LITTLE: usize = 256 << 10;

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

    /// Where the chunks may be that are sent here. What is encoded or encrypted comes from memory.
    pub(crate) fn kind(&self) -> Kind {
        match &self.socket {
            Writing::Left(_) if !self.wire.is_base64() => Kind::Pipe,
            _ => Kind::Memory,
        }
    }

    /// Keeps little of what is written in the socket of a client at a loopback address: what waits there is neither
    /// fetched sooner by it, nor still in a cache of the processor when it is. Others need much, to fill their line.
    pub(crate) fn keep_little(&self) {
        if let Writing::Left(half) = &self.socket
            && half
                .peer_addr()
                .is_ok_and(|peer| peer.ip().to_canonical().is_loopback())
        {
            // without it the same arrives
            let _ = tcp::set_send_buffer(half.as_ref(), LITTLE);
        }
    }

    /// Writes what comes, until the end is sent or nobody is left to send anything.
    pub(crate) async fn run(mut self, mut queue: mpsc::Receiver<Send>) -> io::Result<()> {
        while let Some(send) = queue.recv().await {
            match send {
                Send::Data(stream, chunk) => self.chunk(stream, chunk).await?,
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

    async fn chunk(&mut self, stream: u32, mut chunk: Chunk) -> io::Result<()> {
        let length = chunk.len();
        if let Some(pipe) = chunk.pipe() {
            let mut heads = [0; HEADROOM];
            let from = self.wire.put_heads(stream, length, &mut heads);
            return self.splice(&heads[from..], pipe).await;
        }
        let memory = chunk.memory();
        if self.wire.is_base64() {
            let text = channel::encode(number(stream), &memory[HEADROOM..]);
            return self.write(&ws::frame(opcode::TEXT, &text)).await;
        }
        // in one call, without being copied
        let from = self.wire.put_heads(stream, length, &mut memory[..HEADROOM]);
        self.write(&memory[from..]).await
    }

    /// Writes heads, and what is in a pipe as it is there.
    async fn splice(&mut self, heads: &[u8], pipe: &mut Pipe) -> io::Result<()> {
        let Writing::Left(half) = &self.socket else {
            // by `kind` there are no such chunks
            return Err(io::ErrorKind::Unsupported.into());
        };
        let socket: &TcpStream = half.as_ref();
        let mut left = heads;
        while !left.is_empty() {
            let send = || Ok(tcp::send_more(socket, left)?);
            let sent = socket.async_io(Interest::WRITABLE, send).await?;
            left = &left[sent..];
        }
        while pipe.holds() > 0 {
            let splice = || Ok(pipe.empty(socket)?);
            if socket.async_io(Interest::WRITABLE, splice).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.clock.tick();
        }
        Ok(())
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
    fn is_base64(self) -> bool {
        matches!(self, Wire::Channels { base64: true, .. })
    }

    /// Writes the heads that come before so many bytes on a stream to the end of `room`; where they begin.
    fn put_heads(self, stream: u32, length: usize, room: &mut [u8]) -> usize {
        let end = room.len();
        match self {
            Wire::Spdy | Wire::Tunnel => {
                let frame = end - spdy::HEAD;
                room[frame..].copy_from_slice(&spdy::data(stream, 0, length));
                match self {
                    Wire::Tunnel => ws::put_head(room, frame, opcode::BINARY, spdy::HEAD + length),
                    _ => frame,
                }
            }
            Wire::Channels { .. } => {
                room[end - 1] = number(stream);
                ws::put_head(room, end - 1, opcode::BINARY, 1 + length)
            }
        }
    }
}

/// The number of a channel; streams of channels are made from one.
fn number(stream: u32) -> u8 {
    u8::try_from(stream).unwrap_or(u8::MAX)
}
