//! Options of TCP sockets.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;

use crate::error::{Error, Result};
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

#[cfg(test)]
mod tests {
    use super::*;

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
