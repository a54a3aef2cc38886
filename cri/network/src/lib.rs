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
mod dial;
mod netlink;
mod netns;
mod retry;
mod rows;
mod rtnl;
mod tend;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use coracle_kernel::Error as KernelError;

pub use crate::bridge::Bridge;
use crate::bridge::BridgeNetwork;
pub use crate::bridge::subnet::{Subnet, SubnetV6};
use crate::cni::CniNetwork;
pub use crate::cni::{CniConfig, CniError, CniRecord, ConfError, Watch};
pub use crate::dial::{WithinError, within};
pub use crate::netns::default_sysctls;
use crate::netns::{Making, Pins, pod_sysctls};
use crate::retry::{Failures, Turns};
use crate::rows::Rows;
pub use crate::rows::{Book, BookError, BridgeLease, PortMapping, Protocol, Row, Wiring};
pub use crate::tend::Due;

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
    #[error(
        "no free address in {subnet}: {taken} of its {} are taken; remove pods, or set a larger [network] subnet",
        subnet.capacity()
    )]
    Exhausted {
        /// The subnet.
        subnet: Subnet,
        /// Addresses in use.
        taken: usize,
    },
    /// The subnet is routed elsewhere already.
    #[error("subnet {subnet} overlaps the host's route to {route} by {link}: set another [network] {key}")]
    SubnetInUse {
        /// The pods' subnet.
        subnet: String,
        /// The route that is there.
        route: String,
        /// The device that it leads to: `crc-…` is the bridge of another instance.
        link: String,
        /// The configuration's key.
        key: &'static str,
    },
    /// A port of the host that another pod has.
    #[error("host port {port} is taken by pod {pod}")]
    HostPortTaken {
        /// Port, protocol and address.
        port: String,
        /// Who has it.
        pod: String,
    },
    /// A port of the host that cannot be had.
    #[error("host port {port}: {why}")]
    HostPort {
        /// Port, protocol and address.
        port: String,
        /// What is in the way, with the cure where there is one.
        why: &'static str,
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
    /// CNI failed.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// The pod could not be taken down a moment ago; it is tried again on its own.
    #[error("the network of pod {pod} could not be taken down a moment ago: {why}")]
    Pending {
        /// The pod.
        pod: String,
        /// How it failed then.
        why: String,
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
    cni: CniNetwork,
    turns: Turns,
    failures: Failures,
}

impl Network {
    /// Pod networks of `instance` (eight hex digits), with what pods had before. Touches nothing.
    pub fn new(instance: &str, mode: Mode, book: Arc<dyn Book>) -> Result<Network> {
        if instance.is_empty() || instance.len() > 8 || !instance.bytes().all(|byte| byte.is_ascii_hexdigit())
        {
            return Err(Error::Name(instance.to_owned()));
        }
        if let Mode::Bridge(bridge) = &mode
            && let Some(v6) = bridge.subnet_v6
        {
            v6.check_size(bridge.subnet)?;
        }
        let rows = Arc::new(Rows::load(book)?);
        let cni = match &mode {
            Mode::Cni(config) => config.clone(),
            // Pods of an earlier mode are taken down by their records.
            Mode::Bridge(_) => CniConfig::default(),
        };
        Ok(Network {
            cni: CniNetwork::new(cni),
            turns: Turns::default(),
            failures: Failures::default(),
            pins: Pins::new("/run/netns", instance),
            bridge: BridgeNetwork::new(instance, rows.clone()),
            rows,
            mode,
        })
    }

    /// Has CNI plugins run in cgroups of `instance` from now on, and kills what those of an earlier daemon are still
    /// doing: before this one sends anything. Blocks for as long as that takes, seconds at most.
    pub fn contain_plugins(&mut self, instance: &str) -> coracle_cgroup::Result<()> {
        self.cni.contain(instance)
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
    /// stays the same if it had one. After a failure nothing is left, or it is on its row and is tried again.
    pub fn attach(&self, pod: &str, options: &AttachOptions) -> Result<Attachment> {
        check_pod(pod)?;
        let sysctls = pod_sysctls(options)?;
        let _turn = self.turns.take(pod);
        self.take_down(pod)?;
        let attached = match &self.mode {
            Mode::Bridge(bridge) => self.attach_to_bridge(pod, bridge, &sysctls, options),
            Mode::Cni(_) => self.attach_by_cni(pod, &sysctls, options),
        };
        if attached.is_err()
            && let Err(error) = self.detach_now(pod)
        {
            tracing::warn!(pod, error = chain_text(&error), "undo of a failed attach");
        }
        attached
    }

    /// Takes a pod's network away; what is not there, or only half, is no error. After a failure the row stays, and
    /// [`Network::retry`] tries again.
    pub fn detach(&self, pod: &str) -> Result<()> {
        check_pod(pod)?;
        let _turn = self.turns.take(pod);
        // Only plugins hang.
        if let Some(Wiring::Cni(_)) = self.rows.get(pod)
            && let Some(why) = self.failures.recent(pod, Instant::now())
        {
            return Err(Error::Pending {
                pod: pod.to_owned(),
                why,
            });
        }
        self.detach_now(pod)
    }

    /// What the plugins answered when they connected the pod.
    #[must_use]
    pub fn result(&self, pod: &str) -> Option<serde_json::Value> {
        match self.rows.get(pod)? {
            Wiring::Cni(record) => record.result,
            Wiring::Bridge(_) => None,
        }
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
            Wiring::Cni(record) => (record.ips(), record.result),
        };
        Ok(Some(Attachment {
            netns: self.pins.path(pod),
            namespace,
            ips,
            result,
        }))
    }

    /// Removes what this instance made for pods that are not alive: namespaces, rows and what their wirings made. How
    /// many pods' things were removed; those of CNI pods are only on their way, by [`Network::retry`], and so is
    /// what could not be removed: one pod's remains keep neither the others' nor the daemon from their way. So an ADD
    /// may meet what is still there of a pod that a crash has left without a record.
    pub fn sweep(&self, alive: impl Fn(&str) -> bool) -> Result<usize> {
        let mut dead: Vec<String> = self.pins.list()?;
        dead.extend(self.rows.pods());
        dead.retain(|pod| !alive(pod));
        dead.sort_unstable();
        dead.dedup();
        dead.retain(|pod| match self.rows.get(pod) {
            // Plugins take their time, and the start of the daemon does not wait for them.
            Some(Wiring::Cni(_)) => {
                self.failures.schedule(pod, Instant::now());
                true
            }
            _ => match self.detach(pod) {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(
                        pod,
                        error = chain_text(&error),
                        "a left-over network is not removed yet"
                    );
                    false
                }
            },
        });
        let bridge = match &self.mode {
            Mode::Bridge(bridge) => Some(bridge),
            Mode::Cni(_) => None,
        };
        Ok(dead.len() + self.bridge.sweep(bridge)?)
    }

    /// Whether pods can have networks, and what limits them.
    #[must_use]
    pub fn status(&self) -> Status {
        let mut status = match &self.mode {
            Mode::Bridge(bridge) => self.bridge.status(bridge),
            Mode::Cni(_) => {
                let (not_ready, findings) = self.cni.status();
                Status { not_ready, findings }
            }
        };
        for (pod, attempts, why) in self.failures.all() {
            status.findings.push(Finding {
                what: format!("the network of pod {pod} could not be taken down, {attempts} times: {why}"),
                cure: "mend what fails: it is tried again until it succeeds".to_owned(),
            });
        }
        status
    }

    fn attach_to_bridge(
        &self,
        pod: &str,
        bridge: &Bridge,
        sysctls: &BTreeMap<String, String>,
        options: &AttachOptions,
    ) -> Result<Attachment> {
        // While the lease goes to the disk.
        let making = Making::begin(bridge::sysctls(bridge, sysctls));
        let lease = self.bridge.reserve(pod, bridge, options)?;
        let mut fresh = self.pins.keep(pod, making)?;
        self.bridge.connect(pod, bridge, &lease, &mut fresh)?;
        Ok(Attachment {
            netns: self.pins.path(pod),
            namespace: fresh.namespace,
            ips: lease.ips(),
            result: None,
        })
    }

    fn attach_by_cni(
        &self,
        pod: &str,
        sysctls: &BTreeMap<String, String>,
        options: &AttachOptions,
    ) -> Result<Attachment> {
        let mut record = self.cni.plan(pod, options)?;
        // While the record goes to the disk.
        let making = Making::begin(sysctls.clone());
        self.rows.save(pod, Wiring::Cni(Box::new(record.clone())))?;
        let fresh = self.pins.keep(pod, making)?;
        let netns = self.pins.path(pod);
        let added = self.cni.add(pod, &mut record, &netns);
        // Also after a failure: the undoing needs what was answered before it.
        let saved = self.rows.save(pod, Wiring::Cni(Box::new(record.clone())));
        added?;
        saved?;
        Ok(Attachment {
            netns,
            namespace: fresh.namespace,
            ips: record.ips(),
            result: record.result,
        })
    }

    /// Takes everything of a pod away, its row last.
    fn detach_now(&self, pod: &str) -> Result<()> {
        let detached = self
            .take_down(pod)
            .and_then(|()| self.rows.forget(pod))
            .and_then(|()| self.bridge.release(pod));
        match &detached {
            Ok(()) => self.failures.forget(pod),
            Err(error) => self.failures.failed(pod, Instant::now(), error),
        }
        detached
    }

    /// Removes what connects the pod, by its row's wiring, and its namespace; the row stays.
    fn take_down(&self, pod: &str) -> Result<()> {
        match self.rows.get(pod) {
            // A pair may be there whose row is lost.
            Some(Wiring::Bridge(_)) | None => self.bridge.disconnect(pod)?,
            Some(Wiring::Cni(record)) => {
                // After a reboot there is none.
                let netns = self.pins.open(pod)?.map(|_| self.pins.path(pod));
                self.cni.delete(pod, &record, netns.as_deref())?;
            }
        }
        self.pins.remove(pod)
    }
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

/// An error and everything under it, in one line.
fn chain_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut under = error.source();
    while let Some(error) = under {
        text += &format!(": {error}");
        under = error.source();
    }
    text
}

/// A panic of another thread leaves the state as it was between two steps, which is a state that every step copes
/// with.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
