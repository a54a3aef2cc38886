//! Pod networks: pinned namespaces with loopback, and the built-in bridge.
//!
//! A pod's network is a namespace pinned as `/run/netns/coracle-<instance>-<pod>`, a veth pair from it to the bridge
//! `crc-<instance>`, an address out of the instance's subnet and a default route; packets that leave the subnet are
//! masqueraded by the nf_tables table `coracle-<instance>`. All of it is made by netlink. Calls block; they are for
//! threads that may.
//!
//! The bridge and the table come with the first pod and go with the last one, so an instance without pods leaves
//! nothing on the host. No sysctl of the host is changed but those of the bridge itself: where the host does not
//! forward, [`Network::status`] says so, with the cure.
//!
//! What is written down comes before what is done: an address is in the [`AddressBook`] before anything has it, and
//! leaves it after everything that had it is gone. So [`Network::sweep`] finds whatever a crash left behind.

mod bridge;
mod dial;
mod nat;
mod netns;
mod pool;
mod rtnl;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use coracle_kernel::procfs::Procfs;
use serde::{Deserialize, Serialize};

pub use crate::dial::{DialError, dial};
use crate::netns::Pins;
use crate::pool::Pool;
pub use crate::pool::Subnet;
use crate::rtnl::Rtnl;

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
    /// Pods can have no network of their own.
    #[error("no pod network: {0}")]
    HostOnly(&'static str),
    /// The address book failed.
    #[error("{step} the address of pod {pod}")]
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
        source: coracle_kernel::Error,
    },
}

/// Failure of an [`AddressBook`].
pub type BookError = Box<dyn std::error::Error + Send + Sync>;

/// Where addresses are kept over restarts of the daemon. `save` and `delete` return when the change is durable.
pub trait AddressBook: Send + Sync {
    /// All rows.
    fn load(&self) -> Result<Vec<Row>, BookError>;
    /// Keeps a row.
    fn save(&self, row: &Row) -> Result<(), BookError>;
    /// Forgets the row of a pod; none there is no error.
    fn delete(&self, pod: &str) -> Result<(), BookError>;
}

/// An address that a pod has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The pod's id.
    pub pod: String,
    /// Its address.
    pub address: Ipv4Addr,
}

/// How pods are connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The built-in bridge.
    Bridge(Bridge),
    /// Not at all: pods on the host's network are all there can be, for this reason.
    HostOnly(&'static str),
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
    pub not_ready: Option<&'static str>,
    /// What limits them.
    pub findings: Vec<Finding>,
}

/// Pod networks of one instance. Calls for different pods may run at the same time.
pub struct Network {
    instance: String,
    mode: Mode,
    pins: Pins,
    book: Arc<dyn AddressBook>,
    pool: Mutex<Pool>,
    /// Held while the bridge and its table come or go.
    bridge: Mutex<BridgeState>,
    /// Why packets are not masqueraded though they should be: apart, so that a status waits for no netlink.
    no_masquerade: Mutex<Option<String>>,
}

#[derive(Debug, Default)]
struct BridgeState {
    /// It was made, or looked over, in this life of the daemon.
    ready: bool,
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
    /// Pod networks of `instance` (eight hex digits), with the addresses that pods had before. Touches nothing.
    pub fn new(instance: &str, mode: Mode, book: Arc<dyn AddressBook>) -> Result<Network> {
        Network::with_pins(instance, mode, book, Pins::new("/run/netns", instance))
    }

    fn with_pins(instance: &str, mode: Mode, book: Arc<dyn AddressBook>, pins: Pins) -> Result<Network> {
        if instance.is_empty() || instance.len() > 8 || !instance.bytes().all(|byte| byte.is_ascii_hexdigit())
        {
            return Err(Error::Name(instance.to_owned()));
        }
        let mut pool = Pool::default();
        let load = |source| Error::Book {
            step: "load",
            pod: "any".to_owned(),
            source,
        };
        for row in book.load().map_err(load)? {
            pool.insert(row.pod, row.address);
        }
        let (pool, bridge) = (Mutex::new(pool), Mutex::default());
        Ok(Network {
            instance: instance.to_owned(),
            mode,
            pins,
            book,
            pool,
            bridge,
            no_masquerade: Mutex::default(),
        })
    }

    /// The name of the mode, for records.
    #[must_use]
    pub fn mode(&self) -> &'static str {
        match self.mode {
            Mode::Bridge(_) => "bridge",
            Mode::HostOnly(_) => "host-only",
        }
    }

    /// Gives a pod its network. Whatever an earlier try left for this pod is removed first; its address stays the
    /// same if it had one. After a failure nothing is left.
    pub fn attach(&self, pod: &str, options: &AttachOptions) -> Result<Attachment> {
        check_pod(pod)?;
        let bridge = match &self.mode {
            Mode::Bridge(bridge) => bridge,
            Mode::HostOnly(why) => return Err(Error::HostOnly(why)),
        };
        self.take_down(pod)?;
        let address = self.address_for(pod, bridge.subnet)?;
        let attached = self.bring_up(pod, bridge, address, options);
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
        if lock(&self.pool).contains(pod) {
            let forget = |source| Error::Book {
                step: "forget",
                pod: pod.to_owned(),
                source,
            };
            self.book.delete(pod).map_err(forget)?;
            lock(&self.pool).remove(pod);
        }
        self.remove_unused_bridge()
    }

    /// The network that a pod has, after a restart of the daemon; none if its namespace is not pinned or its address
    /// not known.
    pub fn attachment(&self, pod: &str) -> Result<Option<Attachment>> {
        check_pod(pod)?;
        let Some(address) = lock(&self.pool).get(pod) else {
            return Ok(None);
        };
        let Some(namespace) = self.pins.open(pod)? else {
            return Ok(None);
        };
        Ok(Some(Attachment {
            netns: self.pins.path(pod),
            namespace,
            ips: vec![IpAddr::V4(address)],
        }))
    }

    /// Removes what this instance made for pods that are not alive: namespaces, pairs, addresses, and without any pod
    /// the bridge and its table. How many pods' things were removed.
    pub fn sweep(&self, alive: impl Fn(&str) -> bool) -> Result<usize> {
        let mut dead: Vec<String> = self.pins.list()?;
        dead.extend(lock(&self.pool).pods());
        dead.retain(|pod| !alive(pod));
        dead.sort_unstable();
        dead.dedup();
        for pod in &dead {
            self.detach(pod)?;
        }
        // Pairs whose namespace is unpinned but kept alive by a process, and of which no record tells.
        let mut pairs = 0;
        let mut rtnl = self.rtnl()?;
        let known: Vec<String> = lock(&self.pool).pods().map(|pod| self.pair_name(&pod)).collect();
        if let Some(index) = rtnl
            .link_index(&self.bridge_name())
            .map_err(step("look for the bridge"))?
        {
            for port in rtnl.ports(index).map_err(step("list the bridge's ports"))? {
                if port.starts_with(bridge::PAIR_PREFIX) && !known.contains(&port) {
                    rtnl.delete_link(&port).map_err(step("remove a left-over pair"))?;
                    pairs += 1;
                }
            }
        }
        self.remove_unused_bridge()?;
        Ok(dead.len() + pairs)
    }

    /// Whether pods can have networks, and what limits them.
    #[must_use]
    pub fn status(&self) -> Status {
        let bridge = match &self.mode {
            Mode::Bridge(bridge) => bridge,
            Mode::HostOnly(why) => {
                return Status {
                    not_ready: Some(why),
                    findings: Vec::new(),
                };
            }
        };
        let mut findings = Vec::new();
        let forwards = Procfs::visible().and_then(|proc| proc.read_sysctl("net.ipv4.ip_forward"));
        if forwards.is_ok_and(|value| value == "0") {
            findings.push(Finding {
                what: "net.ipv4.ip_forward is 0: pods reach this host and each other, and nothing else"
                    .to_owned(),
                cure: "sysctl -w net.ipv4.ip_forward=1, and a file in /etc/sysctl.d for the next boot"
                    .to_owned(),
            });
        }
        if let Some(why) = &*lock(&self.no_masquerade) {
            findings.push(Finding {
                what: format!("packets of pods keep their own address outside of this host: {why}"),
                cure: "a kernel with nf_tables and its nat and masq expressions, or a route back to the pods' subnet"
                    .to_owned(),
            });
        }
        let strangers = lock(&self.pool).outside(bridge.subnet);
        if strangers > 0 {
            findings.push(Finding {
                what: format!("{strangers} pods have addresses outside of {}", bridge.subnet),
                cure: "recreate them: they were made with another [network] subnet".to_owned(),
            });
        }
        Status {
            not_ready: None,
            findings,
        }
    }

    /// The pod's address: the one it had, or a free one that is written down before it is used.
    fn address_for(&self, pod: &str, subnet: Subnet) -> Result<Ipv4Addr> {
        let address = {
            let mut pool = lock(&self.pool);
            if let Some(address) = pool.get(pod).filter(|address| subnet.contains(*address)) {
                return Ok(address);
            }
            pool.take(pod, subnet)?
        };
        // Outside of the lock: other pods' rows go to the disk at the same time.
        let row = Row {
            pod: pod.to_owned(),
            address,
        };
        if let Err(source) = self.book.save(&row) {
            lock(&self.pool).remove(pod);
            return Err(Error::Book {
                step: "save",
                pod: pod.to_owned(),
                source,
            });
        }
        Ok(address)
    }

    /// Removes the namespace and the pair.
    fn take_down(&self, pod: &str) -> Result<()> {
        // The pair goes with its namespace, but some time later: removed by name it is gone at once.
        let pair = self.pair_name(pod);
        self.rtnl()?
            .delete_link(&pair)
            .map_err(step("remove the pod's pair"))?;
        self.pins.remove(pod)
    }

    fn rtnl(&self) -> Result<Rtnl> {
        Rtnl::open().map_err(step("open a route socket"))
    }

    fn bridge_name(&self) -> String {
        format!("crc-{}", self.instance)
    }

    fn pair_name(&self, pod: &str) -> String {
        bridge::pair_name(&self.instance, pod)
    }

    fn table_name(&self) -> String {
        format!("coracle-{}", self.instance)
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

fn step(step: impl Into<String>) -> impl FnOnce(coracle_kernel::Error) -> Error {
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
