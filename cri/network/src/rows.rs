//! Rows: what each pod's network is, written down before it is made.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::cni::CniRecord;
use crate::{Error, Result, lock};

/// Failure of a [`Book`].
pub type BookError = Box<dyn std::error::Error + Send + Sync>;

/// Where rows are kept over restarts of the daemon. `save` and `delete` return when the change is durable.
pub trait Book: Send + Sync {
    /// All rows.
    fn load(&self) -> Result<Vec<Row>, BookError>;
    /// Keeps a row, in place of an earlier one of this pod.
    fn save(&self, row: &Row) -> Result<(), BookError>;
    /// Forgets the row of a pod; none there is no error.
    fn delete(&self, pod: &str) -> Result<(), BookError>;
}

/// The network of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The pod's id.
    pub pod: String,
    /// Who wires it, and with what.
    pub wiring: Wiring,
}

/// Who wired a pod, with everything that taking it down needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wiring {
    /// The built-in bridge.
    Bridge(BridgeLease),
    /// CNI plugins.
    Cni(Box<CniRecord>),
}

/// What a pod has of the built-in bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeLease {
    /// Its address.
    pub address: Ipv4Addr,
    /// Its IPv6 address.
    #[serde(default)]
    pub v6: Option<Ipv6Addr>,
    /// Ports of the host that lead to it.
    #[serde(default)]
    pub ports: Vec<PortMapping>,
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

/// The book, with a copy in memory.
pub(crate) struct Rows {
    book: Arc<dyn Book>,
    wirings: Mutex<BTreeMap<String, Wiring>>,
}

impl BridgeLease {
    /// All addresses, the primary one first.
    #[must_use]
    pub fn ips(&self) -> Vec<IpAddr> {
        let v6 = self.v6.map(IpAddr::V6);
        [IpAddr::V4(self.address)].into_iter().chain(v6).collect()
    }
}

impl Rows {
    pub(crate) fn load(book: Arc<dyn Book>) -> Result<Rows> {
        let rows = book.load().map_err(|source| Error::Book {
            step: "load",
            pod: "any".to_owned(),
            source,
        })?;
        let wirings = rows.into_iter().map(|row| (row.pod, row.wiring)).collect();
        Ok(Rows {
            book,
            wirings: Mutex::new(wirings),
        })
    }

    pub(crate) fn get(&self, pod: &str) -> Option<Wiring> {
        lock(&self.wirings).get(pod).cloned()
    }

    pub(crate) fn pods(&self) -> Vec<String> {
        lock(&self.wirings).keys().cloned().collect()
    }

    /// All that the bridge wired.
    pub(crate) fn leases(&self) -> Vec<(String, BridgeLease)> {
        let wirings = lock(&self.wirings);
        let leases = wirings.iter().filter_map(|(pod, wiring)| match wiring {
            Wiring::Bridge(lease) => Some((pod.clone(), lease.clone())),
            Wiring::Cni(_) => None,
        });
        leases.collect()
    }

    /// All that plugins wired.
    pub(crate) fn records(&self) -> Vec<(String, CniRecord)> {
        let wirings = lock(&self.wirings);
        let records = wirings.iter().filter_map(|(pod, wiring)| match wiring {
            Wiring::Cni(record) => Some((pod.clone(), CniRecord::clone(record))),
            Wiring::Bridge(_) => None,
        });
        records.collect()
    }

    /// Writes a row down; it is durable when this returns. No lock is held meanwhile: rows of other pods go to the
    /// disk at the same time.
    pub(crate) fn save(&self, pod: &str, wiring: Wiring) -> Result<()> {
        let row = Row {
            pod: pod.to_owned(),
            wiring,
        };
        self.book.save(&row).map_err(|source| Error::Book {
            step: "save",
            pod: pod.to_owned(),
            source,
        })?;
        lock(&self.wirings).insert(row.pod, row.wiring);
        Ok(())
    }

    pub(crate) fn forget(&self, pod: &str) -> Result<()> {
        if !lock(&self.wirings).contains_key(pod) {
            return Ok(());
        }
        self.book.delete(pod).map_err(|source| Error::Book {
            step: "forget",
            pod: pod.to_owned(),
            source,
        })?;
        lock(&self.wirings).remove(pod);
        Ok(())
    }
}
