//! The daemon's connection: packets in, packets out, and never a wait for it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coracle_kernel::{Errno, creds, scm};
use coracle_wire::{Body, FailKind, Failed, MAX_FRAME, Server, Taken, WireError};

/// Most packets that wait for a daemon that does not read. One that lets more pile up loses its connection: what
/// events tell, a new one asks for.
const MAX_QUEUE: usize = 512;

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    session: Server,
    queue: VecDeque<Packet>,
}

/// A packet that waits to be sent.
#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Closed {
    /// The other side closed it.
    #[error("closed by the daemon")]
    End,
    /// The other side does not keep to the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The socket failed.
    #[error("socket: {0}")]
    Socket(Errno),
    /// The other side does not read.
    #[error("more than {MAX_QUEUE} packets are unread")]
    Stuck,
}

impl Connection {
    /// Takes the next connection of the listener; `None` where there is none after all, or it is not one to talk to.
    pub(crate) fn accept(listener: &OwnedFd) -> Option<Connection> {
        let socket = scm::accept(listener, scm::Mode::Nonblocking).ok()?;
        let peer = scm::peer_cred(&socket).ok()?;
        (peer.uid == creds::effective_uid())
            .then(|| Connection::resume(socket, Server::default(), VecDeque::new()))
    }

    /// The same connection after an upgrade.
    pub(crate) fn resume(socket: OwnedFd, session: Server, queue: VecDeque<Packet>) -> Connection {
        Connection {
            socket,
            session,
            queue,
        }
    }

    /// Its session and what waits to be sent, for an upgrade.
    pub(crate) fn parts(&self) -> (&Server, &VecDeque<Packet>) {
        (&self.session, &self.queue)
    }

    /// Takes the next request and its descriptors; `None` if there is none now. What is refused is answered here.
    pub(crate) fn receive(&mut self) -> Result<Option<(u64, Body, Vec<OwnedFd>)>, Closed> {
        // The buffer is as long as the packet: most are short, and between packets there is none.
        let len = match scm::next_len(&self.socket) {
            Ok(0) => return Err(Closed::End),
            Ok(len) if len > MAX_FRAME => return Err(WireError::TooLong(len).into()),
            Ok(len) => len,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(Closed::Socket(errno)),
        };
        let mut buffer = vec![0; len];
        let received = scm::recv(&self.socket, &mut buffer).map_err(Closed::Socket)?;
        let bytes = buffer.get(..received.len).unwrap_or_default();
        match self.session.receive(bytes, received.fds.len())? {
            Taken::Serve(id, body) => Ok(Some((id, body, received.fds))),
            Taken::Refuse(id, failed) => {
                self.answer(id, failed.into(), Vec::new())?;
                Ok(None)
            }
        }
    }

    /// Answers a request.
    pub(crate) fn answer(&mut self, id: u64, body: Body, fds: Vec<OwnedFd>) -> Result<(), Closed> {
        let bytes = self.session.answer(id, body);
        self.send(Packet { bytes, fds })
    }

    /// Tells of an event, if the daemon has introduced itself.
    pub(crate) fn event(&mut self, body: Body) -> Result<(), Closed> {
        match self.session.event(body) {
            Some(bytes) => self.send(Packet {
                bytes,
                fds: Vec::new(),
            }),
            None => Ok(()),
        }
    }

    /// Sends what waits, as far as the socket takes it.
    pub(crate) fn flush(&mut self) -> Result<(), Closed> {
        while let Some(packet) = self.queue.front() {
            let fds: Vec<BorrowedFd<'_>> = packet.fds.iter().map(AsFd::as_fd).collect();
            match scm::send(&self.socket, &packet.bytes, &fds) {
                Ok(_) => drop(self.queue.pop_front()),
                Err(Errno::EAGAIN) => break,
                Err(errno) => return Err(Closed::Socket(errno)),
            }
        }
        if self.queue.is_empty() {
            self.queue = VecDeque::new();
        }
        Ok(())
    }

    /// Whether something waits to be sent.
    pub(crate) fn has_unsent(&self) -> bool {
        !self.queue.is_empty()
    }

    fn send(&mut self, packet: Packet) -> Result<(), Closed> {
        if self.queue.len() >= MAX_QUEUE {
            return Err(Closed::Stuck);
        }
        self.queue.push_back(packet);
        self.flush()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A failure, as requests are answered with it.
pub(crate) fn failed(kind: FailKind, message: impl Into<String>) -> Failed {
    Failed {
        kind: kind.into(),
        errno: 0,
        step: String::new(),
        message: message.into(),
    }
}

/// Where a text that may be this long is cut, between characters.
pub(crate) fn cut(text: &str, longest: usize) -> usize {
    (0..=longest.min(text.len()))
        .rev()
        .find(|at| text.is_char_boundary(*at))
        .unwrap_or(0)
}
