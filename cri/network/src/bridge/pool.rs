//! Addresses: which there are, and who has them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use crate::{Error, Result};

/// An IPv4 subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    network: u32,
    prefix: u8,
}

impl Subnet {
    /// The subnet of `prefix` bits that `address` is in, large enough for the bridge and a pod.
    pub fn new(address: Ipv4Addr, prefix: u8) -> Result<Subnet> {
        let refused = |why| Error::Subnet {
            text: format!("{address}/{prefix}"),
            why,
        };
        if !(8..=29).contains(&prefix) {
            return Err(refused("the prefix must be 8 to 29 bits long"));
        }
        if address.is_loopback()
            || address.is_multicast()
            || address.is_unspecified()
            || address.is_link_local()
        {
            return Err(refused("hosts cannot have such addresses"));
        }
        Ok(Subnet::of(address, prefix))
    }

    /// A subnet of any size, as routes have them.
    pub(crate) fn of(address: Ipv4Addr, prefix: u8) -> Subnet {
        let prefix = prefix.min(32);
        Subnet {
            network: address.to_bits() & mask(prefix),
            prefix,
        }
    }

    /// The bits of the network's part.
    #[must_use]
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The first address, which is no host's.
    #[must_use]
    pub fn network(self) -> Ipv4Addr {
        self.network.into()
    }

    /// The bridge's own address: the first one.
    #[must_use]
    pub fn gateway(self) -> Ipv4Addr {
        (self.network + 1).into()
    }

    /// The last address, which is everybody's.
    #[must_use]
    pub fn broadcast(self) -> Ipv4Addr {
        (self.network | !mask(self.prefix)).into()
    }

    /// Whether `address` is in it.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix) == self.network
    }

    pub(crate) fn overlaps(self, other: Subnet) -> bool {
        let common = mask(self.prefix.min(other.prefix));
        self.network & common == other.network & common
    }

    pub(crate) fn mask(self) -> Ipv4Addr {
        mask(self.prefix).into()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = Error;

    fn from_str(text: &str) -> Result<Subnet> {
        let refused = |why| Error::Subnet {
            text: text.chars().take(64).collect(),
            why,
        };
        let (address, prefix) = text
            .split_once('/')
            .ok_or_else(|| refused("it is not like 10.0.0.0/16"))?;
        let address = address.parse().map_err(|_| refused("its address is none"))?;
        let prefix = prefix.parse().map_err(|_| refused("its prefix is no number"))?;
        Subnet::new(address, prefix)
    }
}

/// Addresses in use.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    by_pod: BTreeMap<String, Ipv4Addr>,
    taken: BTreeSet<Ipv4Addr>,
    /// The address given last: the next one follows it, so that one just released rests as long as it can and no
    /// neighbour's cache takes a new pod for an old one.
    last: Option<Ipv4Addr>,
}

impl Pool {
    pub(crate) fn insert(&mut self, pod: String, address: Ipv4Addr) {
        self.taken.insert(address);
        self.last = self.last.max(Some(address));
        if let Some(old) = self.by_pod.insert(pod, address).filter(|old| *old != address) {
            self.taken.remove(&old);
        }
    }

    /// Gives `pod` a free address of `subnet`.
    pub(crate) fn take(&mut self, pod: &str, subnet: Subnet) -> Result<Ipv4Addr> {
        let first = subnet.gateway().to_bits() + 1;
        let end = subnet.broadcast().to_bits();
        let start = self
            .last
            .filter(|last| subnet.contains(*last))
            .map_or(first, |last| last.to_bits() + 1);
        let candidates = (start.max(first)..end).chain(first..start.min(end));
        let free = candidates
            .map(Ipv4Addr::from)
            .find(|address| !self.taken.contains(address));
        let address = free.ok_or(Error::Exhausted {
            subnet,
            taken: self.taken.len(),
        })?;
        self.insert(pod.to_owned(), address);
        self.last = Some(address);
        Ok(address)
    }

    pub(crate) fn remove(&mut self, pod: &str) {
        if let Some(address) = self.by_pod.remove(pod) {
            self.taken.remove(&address);
        }
    }

    pub(crate) fn get(&self, pod: &str) -> Option<Ipv4Addr> {
        self.by_pod.get(pod).copied()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_pod.is_empty()
    }

    pub(crate) fn pods(&self) -> impl Iterator<Item = String> + '_ {
        self.by_pod.keys().cloned()
    }

    /// How many addresses are not of `subnet`.
    pub(crate) fn outside(&self, subnet: Subnet) -> usize {
        self.taken
            .iter()
            .filter(|address| !subnet.contains(**address))
            .count()
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_are_read_and_shown() {
        let subnet: Subnet = "10.85.3.7/16".parse().unwrap();
        assert_eq!(subnet.to_string(), "10.85.0.0/16");
        assert_eq!(
            (subnet.gateway(), subnet.broadcast()),
            ([10, 85, 0, 1].into(), [10, 85, 255, 255].into())
        );
        assert_eq!(subnet.mask(), Ipv4Addr::new(255, 255, 0, 0));
        assert!(subnet.contains([10, 85, 200, 1].into()) && !subnet.contains([10, 86, 0, 1].into()));
        for wrong in [
            "",
            "10.0.0.0",
            "10.0.0.0/7",
            "10.0.0.0/30",
            "x/16",
            "10.0.0.0/x",
            "127.0.0.0/16",
            "224.0.0.0/8",
        ] {
            wrong.parse::<Subnet>().unwrap_err();
        }
    }

    #[test]
    fn subnets_overlap_in_both_directions() {
        let subnet = |text: &str| {
            let (address, prefix) = text.split_once('/').unwrap();
            Subnet::of(address.parse().unwrap(), prefix.parse().unwrap())
        };
        assert!(subnet("10.0.0.0/8").overlaps(subnet("10.3.0.0/16")));
        assert!(subnet("10.3.0.0/16").overlaps(subnet("10.0.0.0/8")));
        assert!(subnet("10.3.0.0/16").overlaps(subnet("10.3.4.5/32")));
        assert!(!subnet("10.3.0.0/16").overlaps(subnet("10.4.0.0/16")));
    }

    #[test]
    fn addresses_rest_before_they_are_given_again() {
        let subnet: Subnet = "10.9.0.0/29".parse().unwrap();
        let mut pool = Pool::default();
        let given: Vec<Ipv4Addr> = ["a", "b", "c", "d", "e"]
            .map(|pod| pool.take(pod, subnet).unwrap())
            .into();
        assert_eq!(given.first().unwrap(), &Ipv4Addr::new(10, 9, 0, 2));
        assert_eq!(given.last().unwrap(), &Ipv4Addr::new(10, 9, 0, 6));
        let text = pool.take("f", subnet).unwrap_err().to_string();
        assert_eq!(text, "no free address in 10.9.0.0/29: 5 pods have one each");
        pool.remove("b");
        pool.remove("d");
        assert_eq!(pool.take("g", subnet).unwrap(), given[1]);
        pool.remove("g");
        assert_eq!(pool.take("h", subnet).unwrap(), given[3]);
        assert_eq!(pool.get("h"), Some(given[3]));
    }

    #[test]
    fn addresses_of_another_subnet_are_kept_and_counted() {
        let mut pool = Pool::default();
        pool.insert("old".to_owned(), [10, 1, 0, 2].into());
        let subnet: Subnet = "10.2.0.0/24".parse().unwrap();
        assert_eq!(pool.take("new", subnet).unwrap(), Ipv4Addr::new(10, 2, 0, 2));
        assert_eq!(pool.outside(subnet), 1);
    }
}
