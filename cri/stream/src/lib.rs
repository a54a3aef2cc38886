//! The streaming server of the CRI: exec, attach and port-forward, over SPDY/3.1 and WebSocket.
//!
//! A CRI call gets a URL ([`Server::url`]), the kubelet or `crictl` upgrades one HTTP connection to it, and what goes
//! over that connection is copied from and to what [`Sessions`] gives: descriptors of a process, or a TCP connection
//! into a pod. The server knows nothing of pods.
//!
//! What a peer sends decides only about its own session: frames, header blocks, numbers of streams and bytes that wait
//! are bounded, and a session that breaks a rule ends alone. When a session ends, for whatever reason, everything that
//! belongs to it is dropped: the process sees that by its descriptors.
//!
//! The protocols (`spdy`, `ws`, `resize`) take bytes and give events; `link` and `writer` are the socket around them,
//! which `transport` makes one of TCP or of TLS; `chunk` is what goes there in memory or in pipes.

mod chunk;
mod link;
mod negotiate;
mod portforward;
mod process;
mod resize;
mod server;
mod session;
mod shares;
mod spdy;
mod status;
mod tls;
mod token;
mod transport;
mod writer;
mod ws;

use std::any::Any;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::oneshot;

pub use crate::server::{Refused, Server};
pub use crate::shares::Exhausted;
pub use crate::tls::{Tls, TlsError};

/// A command to be run in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// Id of the container's pod, by which sessions are counted.
    pub pod: String,
    /// Id of the container.
    pub container: String,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Whether it gets a terminal.
    pub tty: bool,
    /// Whether its input is the client's.
    pub stdin: bool,
    /// Whether the client wants its output.
    pub stdout: bool,
    /// Whether the client wants its error output; not with a terminal.
    pub stderr: bool,
}

/// A running container's streams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttachRequest {
    /// Id of the container's pod, by which sessions are counted.
    pub pod: String,
    /// Id of the container.
    pub container: String,
    /// Whether the container has a terminal.
    pub tty: bool,
    /// Whether the client writes to the container's input.
    pub stdin: bool,
    /// Whether the client wants its output.
    pub stdout: bool,
    /// Whether the client wants its error output; not with a terminal.
    pub stderr: bool,
}

/// Connections to ports of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortForwardRequest {
    /// Id of the pod.
    pub pod: String,
    /// The ports that may be dialled; any if empty. Over the channels of a WebSocket, those that are.
    pub ports: Vec<u16>,
}

/// What a URL stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamRequest {
    /// Run a command.
    Exec(ExecRequest),
    /// Join a container's streams.
    Attach(AttachRequest),
    /// Connect to ports.
    PortForward(PortForwardRequest),
}

/// Why a session cannot be served; the client is shown it, with its sources.
pub type SessionError = Box<dyn std::error::Error + Send + Sync>;

/// What serves sessions. A future that is dropped has to leave nothing behind: its client has gone.
pub trait Sessions: Send + Sync + 'static {
    /// Starts a command.
    fn exec(&self, request: &ExecRequest) -> impl Future<Output = Result<Process, SessionError>> + Send;

    /// Joins the streams of a container.
    fn attach(&self, request: &AttachRequest) -> impl Future<Output = Result<Process, SessionError>> + Send;

    /// Connects to a port on the loopback interface inside a pod's network namespace.
    fn dial(&self, pod: &str, port: u16) -> impl Future<Output = Result<TcpStream, SessionError>> + Send;
}

/// A process, or a container that is attached to, as a session copies from and to it.
///
/// Descriptors are pipe ends and pty masters; they are made nonblocking. All of them are closed, and then the guard is
/// dropped, when the session ends.
pub struct Process {
    /// Where the client's input goes; without it, it goes to the terminal.
    pub stdin: Option<OwnedFd>,
    /// Where output comes from; without it, it comes from the terminal.
    pub stdout: Option<OwnedFd>,
    /// Where error output comes from.
    pub stderr: Option<OwnedFd>,
    /// The terminal's master. It is resized, and used for what has no descriptor of its own.
    pub tty: Option<OwnedFd>,
    /// The exit code, when there is one; if the sender is dropped, it was lost. `None` for an attachment, which ends
    /// with its output, or without output with its input.
    pub exit: Option<oneshot::Receiver<i32>>,
    /// Whatever has to live as long as the session.
    pub guard: Box<dyn Any + Send>,
}

/// Bounds of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sessions at once. A URL that was given and not used yet is one.
    ///
    /// Of this, as of what follows with a second number, a pod may have an eighth of what is free (one where that is
    /// less), and never more than that number: whatever others take, a pod that has none finds one while any is free.
    pub sessions: usize,
    /// Those of one pod.
    pub sessions_of_one: usize,
    /// Bytes that the commands of all sessions and URLs have.
    pub request_bytes: usize,
    /// Those of one pod.
    pub request_bytes_of_one: usize,
    /// Connections into pods, of all port-forwards.
    pub forwards: usize,
    /// Those into one pod.
    pub forwards_of_one: usize,
    /// Bytes that port-forwards may keep on their way. One has 4.75 MiB of them, or where there are not so many for it
    /// 1 MiB, which does not count.
    pub memory: usize,
    /// Those of one pod.
    pub memory_of_one: usize,
    /// How long a URL may be used.
    pub token_life: Duration,
    /// Connections at once that have not shown a token yet; beyond this, the oldest of them is closed.
    pub pending: usize,
    /// How long a client may take for its request, and after the upgrade for opening its streams.
    pub handshake: Duration,
    /// How long nothing may go either way.
    pub idle: Duration,
    /// How long after the exit of a process others that have its output open are still read, and how long a pod that
    /// sends no more may take what was sent to it.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            sessions: 1024,
            sessions_of_one: 64,
            request_bytes: 32 << 20,
            // the kernel takes no larger command than 2 MiB, unless stacks are larger than usual
            request_bytes_of_one: 4 << 20,
            forwards: 16 << 10,
            forwards_of_one: 2 << 10,
            memory: 256 << 20,
            memory_of_one: 32 << 20,
            token_life: Duration::from_secs(60),
            pending: 128,
            handshake: Duration::from_secs(30),
            idle: Duration::from_secs(4 * 60 * 60),
            drain: Duration::from_secs(2),
        }
    }
}

impl Limits {
    /// As much of the usual bounds as a process that may have this many descriptors can keep, with some left for others.
    #[must_use]
    pub fn within(descriptors: u64) -> Limits {
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        let usual = Limits::default();
        Limits {
            // one has a socket, up to three pipes, some with both of their ends, or a terminal, and another descriptor
            // of the socket for TLS
            sessions: usual.sessions.min(descriptors / 16),
            forwards: usual.forwards.min(descriptors / 4),
            pending: usual.pending.min(descriptors / 16),
            ..usual
        }
    }
}

/// An error with its sources, as a client is shown it.
fn chain(error: &SessionError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
