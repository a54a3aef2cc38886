//! Pod networks: pinned namespaces with loopback, connected by the built-in bridge or by CNI plugins.
//!
//! A pod's network is a namespace pinned as `/run/netns/coracle-<instance>-<pod>` and what the wiring puts into it.
//! [`Network`] is the one face of both wirings; `bridge` and `cni` say what each does. Calls block; they are for
//! threads that may.
//!
//! What is written down comes before what is done: a pod's [`Row`] is in the [`Book`] before anything of its network
//! exists, and leaves it after everything is gone. The row says who wired the pod, so that it is taken down by the
//! same, whatever the configuration says by then. So [`Network::sweep`] finds whatever a crash left behind.

mod bridge;
mod cni;
mod netns;
mod rows;
mod rtnl;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use coracle_kernel::{Errno, Error as KernelError};
use serde::{Deserialize, Serialize};

use crate::bridge::BridgeNetwork;
pub use crate::bridge::pool::Subnet;
pub use crate::cni::{CniConfig, CniRecord};
use crate::netns::{Fresh, Pins};
use crate::rows::Rows;
pub use crate::rows::{Book, BookError, BridgeLease, Row, Wiring};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Failure of a network operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An instance or pod name that cannot be part of a file name.
    #[error("invalid name {0:?}")]
    Name(String),
    /// A subnet that cannot be one.
    #[error("invalid subnet {text:?}: {why}")]
    Subnet {
        /// As given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The subnet has no free address.
    #[error("no free address in {subnet}: {taken} pods have one each")]
    Exhausted {
        /// The subnet.
        subnet: Subnet,
        /// Addresses in use.
        taken: usize,
    },
    /// The subnet is routed elsewhere already.
    #[error("subnet {subnet} overlaps the host's route to {route}: set another [network] subnet")]
    SubnetInUse {
        /// The pods' subnet.
        subnet: Subnet,
        /// The route that is there.
        route: Subnet,
    },
    /// Pods can have no network of their own now.
    #[error("no pod network: {0}")]
    NotReady(String),
    /// The book of networks failed.
    #[error("{step} the network of pod {pod}")]
    Book {
        /// What was being done, a verb.
        step: &'static str,
        /// The pod.
        pod: String,
        /// The failure.
        #[source]
        source: BookError,
    },
    /// A step that the kernel refused.
    #[error("{step}")]
    Step {
        /// What was being done.
        step: String,
        /// The refusal.
        #[source]
        source: KernelError,
    },
}

/// How pods are connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The built-in bridge.
    Bridge(Bridge),
    /// CNI plugins.
    Cni(CniConfig),
}

/// Settings of the built-in bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Addresses of the pods; the first one is the bridge's own.
    pub subnet: Subnet,
    /// MTU of the bridge and of both ends of each pair.
    pub mtu: u32,
    /// Whether packets that leave the subnet get the host's address.
    pub masquerade: bool,
}

/// What a pod may have of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttachOptions {
    /// `net.*` sysctls of the pod's namespace; they override [`default_sysctls`].
    pub sysctls: BTreeMap<String, String>,
    /// Who the pod is in Kubernetes.
    pub identity: PodIdentity,
    /// The pod's annotations.
    pub annotations: BTreeMap<String, String>,
    /// Resolver settings, where the request has them.
    pub dns: Option<Dns>,
    /// Ports of the host that lead to the pod.
    pub port_mappings: Vec<PortMapping>,
    /// The pod's cgroup, where the request names it.
    pub cgroup_parent: Option<String>,
}

/// Who a pod is in Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodIdentity {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// Resolver settings of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Options of resolv.conf(5).
    pub options: Vec<String>,
}

/// A port of the host that leads to one of the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// The protocol of both.
    pub protocol: Protocol,
    /// The pod's port.
    pub container_port: u16,
    /// The host's port, never 0.
    pub host_port: u16,
    /// The host's address; every one of them where not given.
    pub host_ip: Option<IpAddr>,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A pod's network.
#[derive(Debug)]
pub struct Attachment {
    /// Where the namespace is pinned.
    pub netns: PathBuf,
    /// The namespace.
    pub namespace: OwnedFd,
    /// The pod's addresses, the primary one first.
    pub ips: Vec<IpAddr>,
    /// What the plugins answered, for people who look at a pod.
    pub result: Option<serde_json::Value>,
}

/// Something that an operator should know, with the cure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is the matter.
    pub what: String,
    /// What to do.
    pub cure: String,
}

/// The state of pod networking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Why no pod can have a network; none if they can.
    pub not_ready: Option<String>,
    /// What limits them.
    pub findings: Vec<Finding>,
}

/// Pod networks of one instance. Calls for different pods may run at the same time.
pub struct Network {
    mode: Mode,
    pins: Pins,
    rows: Arc<Rows>,
    bridge: BridgeNetwork,
}

/// What every pod's namespace gets unless told otherwise: ports below 1024 and ping without capabilities.
#[must_use]
pub fn default_sysctls() -> BTreeMap<String, String> {
    [
        ("net.ipv4.ip_unprivileged_port_start", "0"),
        ("net.ipv4.ping_group_range", "0 2147483647"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

impl Network {
    /// Pod networks of `instance` (eight hex digits), with what pods had before. Touches nothing.
    pub fn new(instance: &str, mode: Mode, book: Arc<dyn Book>) -> Result<Network> {
        if instance.is_empty() || instance.len() > 8 || !instance.bytes().all(|byte| byte.is_ascii_hexdigit())
        {
            return Err(Error::Name(instance.to_owned()));
        }
        let rows = Arc::new(Rows::load(book)?);
        Ok(Network {
            pins: Pins::new("/run/netns", instance),
            bridge: BridgeNetwork::new(instance, rows.clone()),
            rows,
            mode,
        })
    }

    /// The name of the mode, for records.
    #[must_use]
    pub fn mode(&self) -> &'static str {
        match self.mode {
            Mode::Bridge(_) => "bridge",
            Mode::Cni(_) => "cni",
        }
    }

    /// Gives a pod its network. Whatever an earlier try left for this pod is removed first; on the bridge its address
    /// stays the same if it had one. After a failure nothing is left.
    pub fn attach(&self, pod: &str, options: &AttachOptions) -> Result<Attachment> {
        check_pod(pod)?;
        let sysctls = pod_sysctls(options)?;
        self.take_down(pod)?;
        let attached = match &self.mode {
            Mode::Bridge(bridge) => self.attach_to_bridge(pod, bridge, &sysctls, options),
            Mode::Cni(_) => Err(Error::NotReady("CNI is not there yet".to_owned())),
        };
        if attached.is_err()
            && let Err(error) = self.detach(pod)
        {
            tracing::warn!(
                pod,
                error = &error as &dyn std::error::Error,
                "undo of a failed attach"
            );
        }
        attached
    }

    /// Takes a pod's network away; what is not there, or only half, is no error.
    pub fn detach(&self, pod: &str) -> Result<()> {
        check_pod(pod)?;
        self.take_down(pod)?;
        self.rows.forget(pod)?;
        self.bridge.release(pod)
    }

    /// The network that a pod has, after a restart of the daemon; none if its namespace is not pinned or its row not
    /// known.
    pub fn attachment(&self, pod: &str) -> Result<Option<Attachment>> {
        check_pod(pod)?;
        let Some(wiring) = self.rows.get(pod) else {
            return Ok(None);
        };
        let Some(namespace) = self.pins.open(pod)? else {
            return Ok(None);
        };
        let (ips, result) = match wiring {
            Wiring::Bridge(lease) => (lease.ips(), None),
            Wiring::Cni(_) => (Vec::new(), None),
        };
        Ok(Some(Attachment {
            netns: self.pins.path(pod),
            namespace,
            ips,
            result,
        }))
    }

    /// Removes what this instance made for pods that are not alive: namespaces, rows and what their wirings made. How
    /// many pods' things were removed.
    pub fn sweep(&self, alive: impl Fn(&str) -> bool) -> Result<usize> {
        let mut dead: Vec<String> = self.pins.list()?;
        dead.extend(self.rows.pods());
        dead.retain(|pod| !alive(pod));
        dead.sort_unstable();
        dead.dedup();
        for pod in &dead {
            self.detach(pod)?;
        }
        Ok(dead.len() + self.bridge.sweep()?)
    }

    /// Whether pods can have networks, and what limits them.
    #[must_use]
    pub fn status(&self) -> Status {
        match &self.mode {
            Mode::Bridge(bridge) => self.bridge.status(bridge),
            Mode::Cni(_) => Status {
                not_ready: Some("CNI is not there yet".to_owned()),
                findings: Vec::new(),
            },
        }
    }

    fn attach_to_bridge(
        &self,
        pod: &str,
        bridge: &Bridge,
        sysctls: &BTreeMap<String, String>,
        options: &AttachOptions,
    ) -> Result<Attachment> {
        let lease = self.bridge.reserve(pod, bridge, options)?;
        let mut fresh = self.make_namespace(pod, sysctls)?;
        self.bridge.connect(pod, bridge, &lease, &mut fresh)?;
        Ok(Attachment {
            netns: self.pins.path(pod),
            namespace: fresh.namespace,
            ips: lease.ips(),
            result: None,
        })
    }

    /// The pod's namespace with nothing but its loopback in it.
    fn make_namespace(&self, pod: &str, sysctls: &BTreeMap<String, String>) -> Result<Fresh> {
        let mut fresh = self.pins.make(pod, sysctls)?;
        fresh
            .rtnl
            .loopback_up()
            .map_err(step("bring the pod's loopback up"))?;
        Ok(fresh)
    }

    /// Removes what connects the pod, by its row's wiring, and its namespace; the row stays.
    fn take_down(&self, pod: &str) -> Result<()> {
        match self.rows.get(pod) {
            // A pair may be there whose row is lost.
            Some(Wiring::Bridge(_)) | None => self.bridge.disconnect(pod)?,
            Some(Wiring::Cni(_)) => {}
        }
        self.pins.remove(pod)
    }
}

/// The sysctls of a pod's namespace.
fn pod_sysctls(options: &AttachOptions) -> Result<BTreeMap<String, String>> {
    let mut sysctls = default_sysctls();
    for (name, value) in &options.sysctls {
        // Only these are the namespace's; any other one would change the host.
        if !name.starts_with("net.") && !name.starts_with("net/") {
            let source = KernelError::new("sysctl", format!("{name:?}"), Errno::EINVAL);
            return Err(Error::Step {
                step: "set a sysctl of the pod's network".to_owned(),
                source,
            });
        }
        sysctls.insert(name.replace('/', "."), value.clone());
    }
    Ok(sysctls)
}

/// A pod id becomes part of a file name.
fn check_pod(pod: &str) -> Result<()> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if pod.is_empty() || pod.len() > 128 || pod.starts_with('.') || !pod.bytes().all(fits) {
        return Err(Error::Name(pod.chars().take(64).collect()));
    }
    Ok(())
}

fn step(step: impl Into<String>) -> impl FnOnce(KernelError) -> Error {
    let step = step.into();
    move |source| Error::Step { step, source }
}

/// A panic of another thread leaves the state as it was between two steps, which is a state that every step copes
/// with.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
