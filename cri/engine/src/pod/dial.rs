//! Port forwarding: a connection into a pod.

use std::net::TcpStream;
use std::path::PathBuf;

use super::PodHandle;
use crate::container::blocking;
use crate::error::{Context as _, Error, Result};
use crate::record::SandboxPhase;

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

/// Connects to a TCP port of the pod's loopback address.
pub(crate) async fn dial(pod: &PodHandle, port: u16) -> Result<TcpStream> {
    check_ready(pod)?;
    let network = &pod.view().record.network;
    let netns = network.as_ref().map(|network| PathBuf::from(&network.netns));
    blocking(move || coracle_network::dial(netns.as_deref(), port))
        .await?
        .step("connect into the pod")
}
