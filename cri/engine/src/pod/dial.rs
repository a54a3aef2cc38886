//! Port forwarding: a connection into a pod.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::PodHandle;
use crate::container::blocking;
use crate::error::{Context as _, Error, Result};
use crate::record::SandboxPhase;

/// How long a port of the same machine may take to answer: a filter in the pod may drop what it is sent, and a program
/// may take no more connections.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Nobody listens there, or nobody answers.
#[derive(Debug, thiserror::Error)]
#[error("connect to port {0} at the loopback address")]
struct NoAnswer(u16, #[source] io::Error);

/// Whether there is a pod to connect into.
pub(crate) fn check_ready(pod: &PodHandle) -> Result<()> {
    if pod.view().record.phase == SandboxPhase::Ready && !pod.is_stopping() {
        return Ok(());
    }
    Err(Error::State {
        what: "pod sandbox",
        id: pod.id().to_owned(),
        why: "is not ready".to_owned(),
    })
}

/// Connects to a TCP port of the pod's loopback address, IPv4 first. Dropped, it leaves nothing.
pub(crate) async fn dial(pod: &PodHandle, port: u16) -> Result<TcpStream> {
    check_ready(pod)?;
    let network = &pod.view().record.network;
    let netns = network.as_ref().map(|network| PathBuf::from(&network.netns));
    // Only the sockets are made by a thread that blocks: what waits for an answer holds none.
    let sockets = blocking(move || {
        coracle_network::within(netns.as_deref(), || (TcpSocket::new_v4(), TcpSocket::new_v6()))
    });
    let (v4, v6) = sockets.await?.step("connect into the pod")?;
    let connected = match connect(v4, Ipv4Addr::LOCALHOST.into(), port).await {
        Ok(stream) => Ok(stream),
        // The failure that is told is that of IPv4: a pod without IPv6 says nothing of interest about it.
        Err(error) => connect(v6, Ipv6Addr::LOCALHOST.into(), port)
            .await
            .map_err(|_| error),
    };
    connected
        .map_err(|error| NoAnswer(port, error))
        .step("connect into the pod")
}

async fn connect(socket: io::Result<TcpSocket>, ip: IpAddr, port: u16) -> io::Result<TcpStream> {
    let connecting = socket?.connect((ip, port).into());
    timeout(ANSWER_TIME, connecting)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
