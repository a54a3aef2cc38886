//! The protocol between coracled and a pod's monitor: messages, framing and sessions, without any IO.
//!
//! # Transport
//!
//! An `AF_UNIX` `SOCK_SEQPACKET` socket, `<state>/monitors/<pod-id>.sock`. coracled binds it and starts the monitor with
//! the listening descriptor at number 3 ([`LISTENER_FD`]); every connection, the first and those after a restart of
//! the daemon, is made through it. The monitor serves one connection: a new one replaces the old. It accepts peers of
//! its own user alone (`SO_PEERCRED`).
//!
//! One packet is one [`Frame`], a prost message of at most [`MAX_FRAME`] bytes, with up to [`MAX_FDS`] descriptors
//! (`SCM_RIGHTS`). `Frame::fds` says how many belong to it and each message's documentation says which, in order; a
//! frame whose descriptors do not fit its message is an error.
//!
//! # Session
//!
//! The daemon speaks first: [`Hello`] with the versions it knows; the monitor answers [`Welcome`] with the one that
//! holds from then on, or [`Failed`] with [`FailKind::Unsupported`] and closes. Then the daemon sends requests with ids
//! that grow from frame to frame; the monitor answers each, in any order, with a frame of the same id. A request body
//! that a monitor does not know is answered [`FailKind::Unsupported`], so a newer daemon finds out what an old one can.
//! Frames with id 0 are the monitor's events: [`Exited`] and the like.
//!
//! Events tell of changes; what they tell stays in the monitor (exits until [`Forget`]), and a daemon that connects
//! asks for all of it with [`List`]. So no event needs an answer, and a daemon that does not read loses its connection
//! and nothing else.
//!
//! Signals do not pass here: coracled holds pidfds and cgroups itself.

mod answer;
mod message;
mod request;
mod session;

use prost::Message as _;

pub use answer::*;
pub use message::{Body, Frame};
pub use request::*;
pub use session::{Client, Incoming, Server, Taken};

/// The newest version of the protocol that this build speaks.
pub const VERSION: u32 = 1;

/// The oldest one; two versions back are kept.
pub const OLDEST_VERSION: u32 = 1;

/// Most bytes in a frame.
pub const MAX_FRAME: usize = 64 << 10;

/// Most descriptors with a frame.
pub const MAX_FDS: usize = 8;

/// Most requests of one session that wait for their answers.
pub const MAX_PENDING: usize = 256;

/// The number under which a monitor is given its listening socket.
pub const LISTENER_FD: i32 = 3;

/// What is wrong with a frame, or with its place in the session. The connection is of no use after any of these.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than [`MAX_FRAME`].
    #[error("frame of {0} bytes, of which {MAX_FRAME} are allowed")]
    TooLong(usize),
    /// Not a protobuf message.
    #[error("malformed frame")]
    Malformed(#[source] prost::DecodeError),
    /// Descriptors that do not fit the message.
    #[error("{body} came with {received} descriptors, says {declared}, and wants {wanted}")]
    Descriptors {
        /// The message.
        body: &'static str,
        /// How many came.
        received: usize,
        /// How many the frame says.
        declared: u32,
        /// How many the message wants, given its fields.
        wanted: usize,
    },
    /// Something else than `Hello` at the beginning, or `Hello` later.
    #[error("{0} out of turn")]
    OutOfTurn(&'static str),
    /// An id that is not higher than the one before.
    #[error("request id {0} is not new")]
    StaleId(u64),
    /// An answer that nothing asked for.
    #[error("answer to request {0}, which is not open")]
    NotAsked(u64),
    /// An answer of another kind than the request wants.
    #[error("{answer} is no answer to request {id}")]
    WrongAnswer {
        /// The request.
        id: u64,
        /// What came.
        answer: &'static str,
    },
    /// More than [`MAX_PENDING`] requests without an answer.
    #[error("more than {MAX_PENDING} requests are open")]
    TooManyPending,
    /// The other side chose a version that was not offered.
    #[error("protocol version {0} was not offered")]
    Version(u32),
}

/// The bytes of a frame, or [`WireError::TooLong`].
pub fn encode(frame: &Frame) -> Result<Vec<u8>, WireError> {
    let length = frame.encoded_len();
    if length > MAX_FRAME {
        return Err(WireError::TooLong(length));
    }
    Ok(frame.encode_to_vec())
}

/// A frame from its bytes and the number of descriptors that came with them.
///
/// A body that this build does not know comes out as `None`: fields are added, not changed, from version to version.
pub fn decode(bytes: &[u8], fds: usize) -> Result<Frame, WireError> {
    if bytes.len() > MAX_FRAME {
        return Err(WireError::TooLong(bytes.len()));
    }
    let frame = Frame::decode(bytes).map_err(WireError::Malformed)?;
    let wanted = frame.body.as_ref().map_or(fds, Body::fds);
    if wanted != fds || usize::try_from(frame.fds) != Ok(fds) {
        let body = frame.body.as_ref().map_or("unknown message", Body::name);
        return Err(WireError::Descriptors {
            body,
            received: fds,
            declared: frame.fds,
            wanted,
        });
    }
    Ok(frame)
}
