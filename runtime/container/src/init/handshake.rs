//! The words that pass between the runtime and an init: one `SOCK_SEQPACKET` message each.
//!
//! ```text
//! runtime                         init
//!    |<--- Cloned + descriptor -----|  only from a process between, which has cloned the init
//!    |                              |  waits
//!    |---- Go --------------------->|  (in its cgroup, ids mapped)
//!    |<--- Mounted -----------------|  only where there are prestart or createRuntime hooks
//!    |---- HooksDone -------------->|
//!    |<--- Terminal + descriptor ---|  only with a terminal
//!    |<--- Ready -------------------|  everything was done that can be done before the start
//!    |---- Recorded --------------->|  the container is on record and will be found again
//! ```
//!
//! At any moment before `Ready` come warnings, and instead of any word a failure.
//!
//! Then the init waits at its start barrier, another socket of the same kind, over which anyone who may start the
//! container says `Go` and reads either a failure or, after `Entering`, the end of file that `execve` makes.
//!
//! An end of file where a word was due ends the init: whoever was to start it is gone.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coracle_kernel::{Errno, scm};

use super::error::Failure;

/// Longest message: a failure with its text.
const MAX_MESSAGE: usize = 8192;

/// What the runtime says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Order {
    /// Begin; or, at the barrier, start.
    Go = b'g',
    /// The hooks in the runtime's namespaces have run.
    HooksDone = b'h',
    /// The container is on record.
    Recorded = b'r',
}

/// What the init says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// The intermediate process has cloned the init; its pidfd comes along.
    Cloned,
    /// Everything is mounted; the hooks in the runtime's namespaces may run.
    Mounted,
    /// The terminal's master comes along.
    Terminal,
    /// Something was left out that was asked for and cannot be given.
    Warning(String),
    /// Everything is done up to the start.
    Ready,
    /// At the barrier: what is left is the filter, the hooks and `execve`.
    Entering,
    /// It failed, and ends.
    Failed(Failure),
}

/// One end of the socket.
#[derive(Debug)]
pub(crate) struct Link(OwnedFd);

/// What came over a link.
#[derive(Debug)]
pub(crate) enum Heard<T> {
    /// A word, and the descriptor that came along.
    Word(T, Option<OwnedFd>),
    /// The other side is gone.
    End,
}

impl Word {
    fn encode(&self) -> Vec<u8> {
        let (tag, rest) = match self {
            Word::Cloned => (b'c', Vec::new()),
            Word::Mounted => (b'm', Vec::new()),
            Word::Terminal => (b't', Vec::new()),
            Word::Warning(text) => (b'w', text.chars().take(1024).collect::<String>().into_bytes()),
            Word::Ready => (b'R', Vec::new()),
            Word::Entering => (b'e', Vec::new()),
            Word::Failed(failure) => (b'f', failure.encode()),
        };
        let mut bytes = vec![tag];
        bytes.extend(rest);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Word> {
        let (tag, rest) = bytes.split_first()?;
        Some(match tag {
            b'c' => Word::Cloned,
            b'm' => Word::Mounted,
            b't' => Word::Terminal,
            b'w' => Word::Warning(String::from_utf8_lossy(rest).into_owned()),
            b'R' => Word::Ready,
            b'e' => Word::Entering,
            b'f' => Word::Failed(Failure::decode(rest)?),
            _ => return None,
        })
    }
}

impl Order {
    fn decode(bytes: &[u8]) -> Option<Order> {
        [Order::Go, Order::HooksDone, Order::Recorded]
            .into_iter()
            .find(|order| bytes == [*order as u8])
    }
}

impl Link {
    /// Two connected ends.
    pub(crate) fn pair() -> coracle_kernel::Result<(Link, Link)> {
        let (a, b) = scm::pair(scm::Kind::Seqpacket, scm::Mode::Blocking)?;
        Ok((Link(a), Link(b)))
    }

    /// Takes a connected socket.
    pub(crate) fn new(socket: OwnedFd) -> Link {
        Link(socket)
    }

    /// Says an order.
    pub(crate) fn order(&self, order: Order) -> Result<(), Errno> {
        self.send(&[order as u8], &[])
    }

    /// Says a word.
    pub(crate) fn say(&self, word: &Word) -> Result<(), Errno> {
        self.send(&word.encode(), &[])
    }

    /// Says a word and passes a descriptor.
    pub(crate) fn pass(&self, word: &Word, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        self.send(&word.encode(), &[fd])
    }

    /// Says a word by write(2) alone, which a container's filter is likeliest to allow.
    pub(crate) fn write(&self, word: &Word) -> Result<(), Errno> {
        coracle_kernel::fd::write(&self.0, &word.encode()).map(drop)
    }

    /// Waits for an order.
    pub(crate) fn next_order(&self) -> Result<Heard<Order>, Errno> {
        self.hear(Order::decode)
    }

    /// Waits for a word.
    pub(crate) fn next_word(&self) -> Result<Heard<Word>, Errno> {
        self.hear(Word::decode)
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        scm::send(&self.0, bytes, fds).map(drop)
    }

    fn hear<T>(&self, decode: impl Fn(&[u8]) -> Option<T>) -> Result<Heard<T>, Errno> {
        let mut buffer = [0; MAX_MESSAGE];
        let received = match scm::recv(&self.0, &mut buffer) {
            Ok(received) => received,
            Err(Errno::ECONNRESET) => return Ok(Heard::End),
            Err(errno) => return Err(errno),
        };
        if received.len == 0 {
            return Ok(Heard::End);
        }
        let word = buffer.get(..received.len).and_then(decode).ok_or(Errno::EPROTO)?;
        Ok(Heard::Word(word, received.fds.into_iter().next()))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Link> for OwnedFd {
    fn from(link: Link) -> OwnedFd {
        link.0
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::{Kind, Step};
    use super::*;

    #[test]
    fn every_word_survives_the_border() {
        let failure = Failure::said(Step::Execute, Kind::Program, "exec: \"x\": exec format error");
        let words = [
            Word::Cloned,
            Word::Mounted,
            Word::Terminal,
            Word::Warning("w".to_owned()),
            Word::Ready,
            Word::Entering,
            Word::Failed(failure),
        ];
        for word in words {
            assert_eq!(Word::decode(&word.encode()), Some(word));
        }
        for order in [Order::Go, Order::HooksDone, Order::Recorded] {
            assert_eq!(Order::decode(&[order as u8]), Some(order));
        }
        assert_eq!(Word::decode(b""), None);
        assert_eq!(Word::decode(b"x"), None);
        assert_eq!(Order::decode(b"gg"), None);
    }

    #[test]
    fn an_end_of_file_is_heard_as_such() {
        let (a, b) = Link::pair().unwrap();
        a.order(Order::Go).unwrap();
        assert!(matches!(b.next_order(), Ok(Heard::Word(Order::Go, None))));
        drop(a);
        assert!(matches!(b.next_order(), Ok(Heard::End)));
    }
}
