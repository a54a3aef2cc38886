//! What is made in a pod's network namespace and used outside of it: a socket stays where it was made.

use std::io;
use std::path::{Path, PathBuf};

use coracle_kernel::namespace::{self, Kind};

/// Failure of [`within`].
#[derive(Debug, thiserror::Error)]
pub enum WithinError {
    /// The pod's namespace cannot be entered.
    #[error("enter the network namespace {0}")]
    Namespace(PathBuf, #[source] coracle_kernel::Error),
    /// No thread to do it with.
    #[error("start a thread")]
    Thread(#[source] io::Error),
}

/// Runs `make` in a network namespace, or here if there is no path. Blocks as long as it does.
pub fn within<T: Send>(netns: Option<&Path>, make: impl FnOnce() -> T + Send) -> Result<T, WithinError> {
    let Some(path) = netns else {
        return Ok(make());
    };
    let no_entry = |error| WithinError::Namespace(path.to_owned(), error);
    let namespace = namespace::open(path, Kind::Network).map_err(no_entry)?;
    let inside = || {
        namespace::enter(&namespace, Kind::Network).map_err(no_entry)?;
        Ok(make())
    };
    // A thread that changed its namespace is of no use to anybody afterwards.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("within".to_owned());
        match thread
            .spawn_scoped(scope, inside)
            .map_err(WithinError::Thread)?
            .join()
        {
            Ok(made) => made,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_port_of_a_namespace_is_not_the_hosts() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, receiver) = std::sync::mpsc::channel();
        let (done, until) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            namespace::unshare(namespace::Kinds::NETWORK).unwrap();
            let own = std::fs::read_link("/proc/thread-self").unwrap();
            let path = format!(
                "/proc/self/task/{}/ns/net",
                own.file_name().unwrap().to_string_lossy()
            );
            sender.send(path).unwrap();
            let _ = until.recv();
        });
        let path = receiver.recv().unwrap();
        let dial = || TcpStream::connect((Ipv4Addr::LOCALHOST, port));
        // Its loopback is down: nothing is there to be connected to.
        within(Some(Path::new(&path)), dial).unwrap().unwrap_err();
        within(None, dial).unwrap().unwrap();
        drop(done);
        other.join().unwrap();
        within(Some(Path::new("/nowhere")), dial).unwrap_err();
    }
}
