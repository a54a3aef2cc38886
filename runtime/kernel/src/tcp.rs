//! Options of TCP sockets.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::{SendFlags, sockopt};

use crate::error::{Errno, Error, Result};
use crate::fd::show;

/// Asks a silent peer every `interval` whether it is still there; after `count` questions without answer, or an answer
/// that it is not, the connection is over. Whole seconds.
pub fn set_keepalive(socket: impl AsFd, interval: Duration, count: u32) -> Result<()> {
    let socket = socket.as_fd();
    sockopt::set_tcp_keepidle(socket, interval)
        .and_then(|()| sockopt::set_tcp_keepintvl(socket, interval))
        .and_then(|()| sockopt::set_tcp_keepcnt(socket, count))
        .and_then(|()| sockopt::set_socket_keepalive(socket, true))
        .map_err(|e| {
            Error::new(
                "setsockopt",
                format!("{}, SO_KEEPALIVE, {interval:?}, {count}", show(socket)),
                e.into(),
            )
        })
}

/// Keeps some `bytes` at most of what is written and not yet on its way (`SO_SNDBUF`); the kernel takes twice that for
/// its own records, and no longer looks for a size itself.
pub fn set_send_buffer(socket: impl AsFd, bytes: usize) -> Result<()> {
    let socket = socket.as_fd();
    sockopt::set_socket_send_buffer_size(socket, bytes).map_err(|e| {
        Error::new(
            "setsockopt",
            format!("{}, SO_SNDBUF, {bytes}", show(socket)),
            e.into(),
        )
    })
}

/// send(2) of bytes that go out with those that are sent next (`MSG_MORE`), repeated on `EINTR`; may send less than asked,
/// and does not wait.
pub fn send_more(socket: impl AsFd, bytes: &[u8]) -> Result<usize, Errno> {
    let flags = SendFlags::MORE | SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    Ok(rustix::io::retry_on_intr(|| {
        rustix::net::send(socket.as_fd(), bytes, flags)
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_wait_for_those_that_follow() {
        use std::io::{Read as _, Write as _};
        use std::net::{TcpListener, TcpStream};
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut served, _) = listener.accept().unwrap();
        set_send_buffer(&client, 100_000).unwrap();
        assert_eq!(sockopt::socket_send_buffer_size(&client).unwrap(), 200_000);
        // even where nothing else waits
        client.set_nodelay(true).unwrap();
        assert_eq!(send_more(&client, b"head "), Ok(5));
        served.set_nonblocking(true).unwrap();
        let mut bytes = [0; 100];
        assert_eq!(
            served.read(&mut bytes).unwrap_err().kind(),
            std::io::ErrorKind::WouldBlock
        );
        client.write_all(b"and tail").unwrap();
        let length = served.read(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"head and tail");
        drop(served);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(send_more(&file, b"head"), Err(Errno::ENOTSOCK));
        let error = set_send_buffer(&file, 1).unwrap_err();
        assert!(error.to_string().starts_with("setsockopt("), "{error}");
    }

    #[test]
    fn a_socket_keeps_asking_and_a_file_cannot() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        set_keepalive(&socket, Duration::from_secs(20), 3).unwrap();
        assert!(sockopt::socket_keepalive(&socket).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&socket).unwrap(), Duration::from_secs(20));
        let file = std::fs::File::open("/dev/null").unwrap();
        let error = set_keepalive(&file, Duration::from_secs(20), 3).unwrap_err();
        assert!(error.to_string().starts_with("setsockopt("), "{error}");
    }
}
