//! Unix sockets: pairs, messages with descriptors, peer credentials, names relative to a directory descriptor.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
};

use crate::error::{Errno, Error, Result};
use crate::fd::{number, show};

/// Most descriptors in one message of ours (the kernel's own limit is 253).
pub const MAX_FDS: usize = 32;

/// What a socket keeps together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes, without borders.
    Stream,
    /// Messages, in order, with an end of file.
    Seqpacket,
}

/// Whether calls on the socket wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Calls wait.
    Blocking,
    /// Calls answer `EAGAIN`.
    Nonblocking,
}

/// A received message.
#[derive(Debug)]
pub struct Received {
    /// Bytes written to the buffer; 0 is the end of file (or an empty message, which we never send).
    pub len: usize,
    /// Descriptors that came along, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Who is at the other end, as the kernel recorded it at connect time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCred {
    /// Process id in our pid namespace; 0 if the peer is outside of it.
    pub pid: i32,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
}

/// A connected pair.
pub fn pair(kind: Kind, mode: Mode) -> Result<(OwnedFd, OwnedFd)> {
    net::socketpair(AddressFamily::UNIX, kind.into(), mode.into(), None)
        .map_err(|e| Error::new("socketpair", format!("AF_UNIX, {kind:?}"), e.into()))
}

/// Sends one message with descriptors; never raises SIGPIPE. The bare errno, because callers in loops decide by it.
///
/// On a stream socket fewer bytes may go than asked; the descriptors go with the first byte.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    if fds.len() > MAX_FDS {
        return Err(Errno::E2BIG);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::E2BIG);
    }
    let slices = [IoSlice::new(bytes)];
    Ok(rustix::io::retry_on_intr(|| {
        net::sendmsg(socket.as_fd(), &slices, &mut control, SendFlags::NOSIGNAL)
    })?)
}

/// Receives one message. A message that is longer than `buffer` is `EMSGSIZE`, one with more than [`MAX_FDS`]
/// descriptors `E2BIG`; in both cases its descriptors are closed.
pub fn recv(socket: impl AsFd, buffer: &mut [u8]) -> Result<Received, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = rustix::io::retry_on_intr(|| {
        net::recvmsg(socket.as_fd(), &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut fds = Vec::new();
    for item in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = item {
            fds.extend(received);
        }
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Err(Errno::EMSGSIZE);
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Errno::E2BIG);
    }
    Ok(Received {
        len: message.bytes,
        fds,
    })
}

/// How many bytes the next message has, which stays where it is; 0 at the end of file.
pub fn next_len(socket: impl AsFd) -> Result<usize, Errno> {
    let flags = RecvFlags::PEEK | RecvFlags::TRUNC;
    let (_, len) = rustix::io::retry_on_intr(|| net::recv(socket.as_fd(), &mut [0u8; 0][..], flags))?;
    Ok(len)
}

/// Binds a socket as `name` in the directory, whatever the length of the directory's own path, and listens.
///
/// The file gets the process's umask; a caller that wants less access puts it into a directory of mode 0700.
pub fn listen(dir: impl AsFd, name: &str, kind: Kind, mode: Mode) -> Result<OwnedFd> {
    let dir = dir.as_fd();
    let (socket, address) = named("bind", dir, name, kind, mode)?;
    net::bind(&socket, &address).map_err(|e| Error::new("bind", args(dir, name), e.into()))?;
    net::listen(&socket, 16).map_err(|e| Error::new("listen", args(dir, name), e.into()))?;
    Ok(socket)
}

/// Connects to the socket `name` in the directory.
pub fn connect(dir: impl AsFd, name: &str, kind: Kind, mode: Mode) -> Result<OwnedFd> {
    let dir = dir.as_fd();
    let (socket, address) = named("connect", dir, name, kind, mode)?;
    rustix::io::retry_on_intr(|| net::connect(&socket, &address))
        .map_err(|e| Error::new("connect", args(dir, name), e.into()))?;
    Ok(socket)
}

/// Takes the next connection of a listening socket.
pub fn accept(listener: impl AsFd, mode: Mode) -> Result<OwnedFd, Errno> {
    Ok(rustix::io::retry_on_intr(|| {
        net::accept_with(listener.as_fd(), mode.into())
    })?)
}

/// The peer's credentials (`SO_PEERCRED`).
pub fn peer_cred(socket: impl AsFd) -> Result<PeerCred> {
    let socket = socket.as_fd();
    // The answer's pid may be 0 (a peer outside our pid namespace), which the typed wrappers cannot hold.
    let mut cred = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `cred` is a live ucred and `len` its size; the kernel writes at most that much.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &raw mut len,
        )
    };
    if done < 0 {
        return Err(Error::last(
            "getsockopt",
            format!("{}, SO_PEERCRED", number(socket)),
        ));
    }
    Ok(PeerCred {
        pid: cred.pid,
        uid: cred.uid,
        gid: cred.gid,
    })
}

/// Asks for a send buffer of `bytes`; the kernel doubles it and caps it at its own limit.
pub fn set_send_buffer(socket: impl AsFd, bytes: usize) -> Result<()> {
    let socket = socket.as_fd();
    net::sockopt::set_socket_send_buffer_size(socket, bytes).map_err(|e| {
        Error::new(
            "setsockopt",
            format!("{}, SO_SNDBUF, {bytes}", number(socket)),
            e.into(),
        )
    })
}

/// Sets a send buffer of `bytes`, which the kernel doubles, whatever its limit is: the right of CAP_NET_ADMIN.
pub fn force_send_buffer(socket: impl AsFd, bytes: usize) -> Result<()> {
    let socket = socket.as_fd();
    net::sockopt::set_socket_send_buffer_size_force(socket, bytes).map_err(|e| {
        Error::new(
            "setsockopt",
            format!("{}, SO_SNDBUFFORCE, {bytes}", number(socket)),
            e.into(),
        )
    })
}

/// Ends one direction or both: `connect`ed peers see the end of file.
pub fn shutdown(socket: impl AsFd) -> Result<()> {
    let socket = socket.as_fd();
    net::shutdown(socket, net::Shutdown::Both)
        .map_err(|e| Error::new("shutdown", format!("{}, SHUT_RDWR", number(socket)), e.into()))
}

impl From<Kind> for net::SocketType {
    fn from(kind: Kind) -> net::SocketType {
        match kind {
            Kind::Stream => net::SocketType::STREAM,
            Kind::Seqpacket => net::SocketType::SEQPACKET,
        }
    }
}

impl From<Mode> for SocketFlags {
    fn from(mode: Mode) -> SocketFlags {
        match mode {
            Mode::Blocking => SocketFlags::CLOEXEC,
            Mode::Nonblocking => SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        }
    }
}

/// A new socket and the address `/proc/self/fd/DIR/name`: a unix address holds 108 bytes, a state directory may be
/// longer. The name is one component, so the address cannot leave the directory.
fn named(
    call: &'static str,
    dir: BorrowedFd<'_>,
    name: &str,
    kind: Kind,
    mode: Mode,
) -> Result<(OwnedFd, SocketAddrUnix)> {
    if name.is_empty() || name == "." || name == ".." || name.contains('/') {
        return Err(Error::new(call, args(dir, name), Errno::EINVAL));
    }
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))
        .map_err(|e| Error::new(call, args(dir, name), e.into()))?;
    let socket = net::socket_with(AddressFamily::UNIX, kind.into(), mode.into(), None)
        .map_err(|e| Error::new("socket", format!("AF_UNIX, {kind:?}"), e.into()))?;
    Ok((socket, address))
}

fn args(dir: BorrowedFd<'_>, name: &str) -> String {
    format!("{}, {name:?}", show(dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_message_carries_bytes_and_descriptors() {
        let (a, b) = pair(Kind::Seqpacket, Mode::Blocking).unwrap();
        let null = File::open("/dev/null").unwrap();
        send(&a, b"hello", &[null.as_fd(), a.as_fd()]).unwrap();
        let mut buffer = [0; 16];
        assert_eq!(next_len(&b), Ok(5));
        let message = recv(&b, &mut buffer).unwrap();
        assert_eq!(&buffer[..message.len], b"hello");
        assert_eq!(message.fds.len(), 2);
        assert!(show(&message.fds[0]).ends_with("</dev/null>"));
    }

    #[test]
    fn a_message_that_does_not_fit_is_refused_and_its_descriptors_are_closed() {
        let (a, b) = pair(Kind::Seqpacket, Mode::Blocking).unwrap();
        let (read, write) = crate::fd::pipe().unwrap();
        send(&a, b"hello", &[write.as_fd()]).unwrap();
        drop(write);
        assert_eq!(recv(&b, &mut [0; 2]).unwrap_err(), Errno::EMSGSIZE);
        assert_eq!(
            crate::fd::read(&read, &mut [0; 1]),
            Ok(0),
            "the only write end should be closed"
        );
    }

    #[test]
    fn a_name_in_a_deep_directory_is_bound_and_dialled() {
        let base = std::env::temp_dir().join(format!("coracle-scm-{}", std::process::id()));
        let deep = base.join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let dir = File::open(&deep).unwrap();
        let listener = listen(&dir, "s.sock", Kind::Seqpacket, Mode::Blocking).unwrap();
        let client = connect(&dir, "s.sock", Kind::Seqpacket, Mode::Blocking).unwrap();
        let server = accept(&listener, Mode::Blocking).unwrap();
        assert_eq!(peer_cred(&server).unwrap().pid, std::process::id().cast_signed());
        send(&client, b"x", &[]).unwrap();
        assert_eq!(recv(&server, &mut [0; 4]).unwrap().len, 1);
        drop(client);
        assert_eq!(recv(&server, &mut [0; 4]).unwrap().len, 0);
        assert_eq!(
            connect(&dir, "../x", Kind::Stream, Mode::Blocking)
                .unwrap_err()
                .errno(),
            Errno::EINVAL
        );
        std::fs::remove_dir_all(&base).unwrap();
    }
}
