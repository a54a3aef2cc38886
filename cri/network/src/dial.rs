//! Connections to what programs in a pod listen on.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_kernel::namespace::{self, Kind};

/// How long a port of the same machine may take to answer: a filter in the pod may drop what it is sent.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Failure of [`dial`].
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The pod's namespace cannot be entered.
    #[error("enter the network namespace {0}")]
    Namespace(PathBuf, #[source] coracle_kernel::Error),
    /// No thread to do it with.
    #[error("start a thread")]
    Thread(#[source] io::Error),
    /// Nobody listens there, or nobody answers.
    #[error("connect to port {0} at the loopback address")]
    Connect(u16, #[source] io::Error),
}

/// Connects to a TCP port at the loopback address of a network namespace (IPv4 first), or of the host's if there is no
/// path. Blocks.
pub fn dial(netns: Option<&Path>, port: u16) -> Result<TcpStream, DialError> {
    let Some(path) = netns else {
        return connect(port);
    };
    let no_entry = |error| DialError::Namespace(path.to_owned(), error);
    let namespace = namespace::open(path, Kind::Network).map_err(no_entry)?;
    let inside = || {
        namespace::enter(&namespace, Kind::Network).map_err(no_entry)?;
        connect(port)
    };
    // A thread that changed its namespace is of no use to anybody afterwards; a socket stays where it was made.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("dial".to_owned());
        match thread
            .spawn_scoped(scope, inside)
            .map_err(DialError::Thread)?
            .join()
        {
            Ok(connected) => connected,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn connect(port: u16) -> Result<TcpStream, DialError> {
    let at = |ip: IpAddr| TcpStream::connect_timeout(&SocketAddr::new(ip, port), ANSWER_TIME);
    // The failure that is told is that of IPv4: a pod without IPv6 says nothing of interest about it.
    at(Ipv4Addr::LOCALHOST.into())
        .or_else(|error| at(Ipv6Addr::LOCALHOST.into()).map_err(|_| error))
        .map_err(|error| DialError::Connect(port, error))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn either_loopback_address_will_do() {
        for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            let Ok(listener) = TcpListener::bind((ip, 0)) else {
                println!("SKIPPED: {ip} is not there");
                continue;
            };
            let address = listener.local_addr().unwrap();
            assert_eq!(dial(None, address.port()).unwrap().peer_addr().unwrap(), address);
        }
    }

    #[test]
    fn a_port_of_a_namespace_is_not_the_hosts() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, receiver) = std::sync::mpsc::channel();
        let (done, until) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            namespace::unshare(namespace::Kinds::NETWORK).unwrap();
            let path = format!(
                "/proc/self/task/{}/ns/net",
                std::fs::read_link("/proc/thread-self")
                    .unwrap()
                    .file_name()
                    .unwrap()
                    .to_string_lossy()
            );
            sender.send(path).unwrap();
            let _ = until.recv();
        });
        let path = receiver.recv().unwrap();
        // Its loopback is down: nothing is there to be connected to.
        dial(Some(Path::new(&path)), port).unwrap_err();
        dial(None, port).unwrap();
        drop(done);
        other.join().unwrap();
        dial(Some(Path::new("/nowhere")), port).unwrap_err();
    }
}
