//! Addresses and ports of the host: which there are, and who has them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use super::ports::{self, Forward};
use super::subnet::{Subnet, SubnetV6};
use crate::rows::BridgeLease;
use crate::{Error, PortMapping, Result};

/// What pods have.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    by_pod: BTreeMap<String, Held>,
    taken: BTreeSet<Ipv4Addr>,
    taken_v6: BTreeSet<Ipv6Addr>,
    /// The address given last: the next one follows it, so that one just released rests as long as it can and no
    /// neighbour's cache takes a new pod for an old one.
    last: Option<Ipv4Addr>,
}

#[derive(Debug)]
struct Held {
    lease: BridgeLease,
    /// Whether its ports of the host are to lead to it now.
    open: bool,
}

impl Pool {
    /// What a pod has by its row.
    pub(crate) fn insert(&mut self, pod: &str, lease: BridgeLease) {
        self.last = self.last.max(Some(lease.address));
        self.put(pod, lease, true);
    }

    /// Gives `pod` a free address of each subnet, the one that it has if it fits, and `wanted` ports of the host, which
    /// are closed at first.
    pub(crate) fn reserve(
        &mut self,
        pod: &str,
        subnet: Subnet,
        subnet_v6: Option<SubnetV6>,
        wanted: &[PortMapping],
    ) -> Result<BridgeLease> {
        let ports = ports::check(wanted, subnet_v6.is_some())?;
        for (other, held) in &self.by_pod {
            if other != pod
                && let Some(port) = ports::clash(&ports, &held.lease.ports)
            {
                return Err(Error::HostPortTaken {
                    port,
                    pod: other.clone(),
                });
            }
        }
        let before = self.remove(pod);
        let first = subnet.gateway().to_bits() + 1;
        let end = subnet.broadcast().to_bits();
        let start = self
            .last
            .filter(|last| subnet.contains(*last))
            .map_or(first, |last| last.to_bits() + 1);
        let had = before.as_ref().map(|lease| lease.address);
        let candidates = (start.max(first)..end).chain(first..start.min(end));
        let mut candidates = had
            .into_iter()
            .filter(|address| subnet.contains(*address))
            .chain(candidates.map(Ipv4Addr::from));
        let v6_of = |address| subnet_v6.map(|v6| v6.beside(subnet, address));
        let free = |address: &Ipv4Addr| {
            !self.taken.contains(address) && v6_of(*address).is_none_or(|v6| !self.taken_v6.contains(&v6))
        };
        let Some(address) = candidates.find(free) else {
            let taken = self.taken.iter().filter(|address| subnet.contains(**address));
            let taken = taken.count();
            if let Some(before) = before {
                self.put(pod, before, false);
            }
            return Err(Error::Exhausted { subnet, taken });
        };
        let lease = BridgeLease {
            address,
            v6: v6_of(address),
            ports,
        };
        self.put(pod, lease.clone(), false);
        if had != Some(address) {
            self.last = Some(address);
        }
        Ok(lease)
    }

    /// Takes everything of `pod` back; what it had.
    pub(crate) fn remove(&mut self, pod: &str) -> Option<BridgeLease> {
        let lease = self.by_pod.remove(pod)?.lease;
        self.taken.remove(&lease.address);
        if let Some(v6) = lease.v6 {
            self.taken_v6.remove(&v6);
        }
        Some(lease)
    }

    pub(crate) fn get(&self, pod: &str) -> Option<&BridgeLease> {
        self.by_pod.get(pod).map(|held| &held.lease)
    }

    /// Says whether the pod's ports of the host are to lead to it. They are nobody else's in both cases.
    pub(crate) fn set_open(&mut self, pod: &str, open: bool) {
        if let Some(held) = self.by_pod.get_mut(pod) {
            held.open = open;
        }
    }

    /// All ports of the host that are to lead to a pod.
    pub(crate) fn forwards(&self) -> Vec<Forward> {
        let open = self.by_pod.iter().filter(|(_, held)| held.open);
        open.flat_map(|(pod, held)| ports::forwards(pod, &held.lease))
            .collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_pod.is_empty()
    }

    pub(crate) fn pods(&self) -> impl Iterator<Item = &String> + '_ {
        self.by_pod.keys()
    }

    /// How many pods have an address that is of neither subnet.
    pub(crate) fn outside(&self, subnet: Subnet, subnet_v6: Option<SubnetV6>) -> usize {
        let stranger = |held: &&Held| {
            let v6 = held.lease.v6;
            !subnet.contains(held.lease.address)
                || v6.is_some_and(|v6| subnet_v6.is_none_or(|subnet| !subnet.contains(v6)))
        };
        self.by_pod.values().filter(stranger).count()
    }

    fn put(&mut self, pod: &str, lease: BridgeLease, open: bool) {
        self.remove(pod);
        self.taken.insert(lease.address);
        self.taken_v6.extend(lease.v6);
        self.by_pod.insert(pod.to_owned(), Held { lease, open });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Protocol;

    fn take(pool: &mut Pool, pod: &str, subnet: Subnet) -> Result<Ipv4Addr> {
        pool.reserve(pod, subnet, None, &[]).map(|lease| lease.address)
    }

    fn lease(address: [u8; 4], v6: Option<&str>) -> BridgeLease {
        BridgeLease {
            address: address.into(),
            v6: v6.map(|v6| v6.parse().unwrap()),
            ports: Vec::new(),
        }
    }

    #[test]
    fn addresses_rest_before_they_are_given_again() {
        let subnet: Subnet = "10.9.0.0/29".parse().unwrap();
        let mut pool = Pool::default();
        let given: Vec<Ipv4Addr> = ["a", "b", "c", "d", "e"]
            .map(|pod| take(&mut pool, pod, subnet).unwrap())
            .into();
        assert_eq!(given.first().unwrap(), &Ipv4Addr::new(10, 9, 0, 2));
        assert_eq!(given.last().unwrap(), &Ipv4Addr::new(10, 9, 0, 6));
        let text = take(&mut pool, "f", subnet).unwrap_err().to_string();
        assert_eq!(
            text,
            "no free address in 10.9.0.0/29: 5 of its 5 are taken; remove pods, or set a larger [network] subnet"
        );
        assert_eq!(
            take(&mut pool, "c", subnet).unwrap(),
            given[2],
            "it has one already"
        );
        pool.remove("b");
        pool.remove("d");
        assert_eq!(take(&mut pool, "g", subnet).unwrap(), given[1]);
        pool.remove("g");
        assert_eq!(take(&mut pool, "h", subnet).unwrap(), given[3]);
        assert_eq!(pool.get("h").unwrap().address, given[3]);
    }

    #[test]
    fn addresses_of_another_subnet_are_kept_and_counted() {
        let mut pool = Pool::default();
        pool.insert("old", lease([10, 1, 0, 2], None));
        let subnet: Subnet = "10.2.0.0/24".parse().unwrap();
        assert_eq!(
            take(&mut pool, "new", subnet).unwrap(),
            Ipv4Addr::new(10, 2, 0, 2)
        );
        assert_eq!(pool.outside(subnet, None), 1);
    }

    #[test]
    fn an_ipv6_address_is_never_given_twice_and_comes_when_it_is_switched_on() {
        let v6: SubnetV6 = "fd00:2::/64".parse().unwrap();
        let subnet: Subnet = "10.2.0.0/24".parse().unwrap();
        let mut pool = Pool::default();
        // Of an earlier IPv4 subnet, with the same IPv6 one.
        pool.insert("old", lease([10, 1, 0, 2], Some("fd00:2::2")));
        pool.insert("single", lease([10, 2, 0, 9], None));
        let new = pool.reserve("new", subnet, Some(v6), &[]).unwrap();
        assert_eq!(
            (
                new.address.to_string().as_str(),
                new.v6.unwrap().to_string().as_str()
            ),
            ("10.2.0.10", "fd00:2::a")
        );
        let single = pool.reserve("single", subnet, Some(v6), &[]).unwrap();
        assert_eq!(
            (single.address, single.v6.unwrap().to_string().as_str()),
            ([10, 2, 0, 9].into(), "fd00:2::9")
        );
        pool.last = None;
        let next = pool.reserve("next", subnet, Some(v6), &[]).unwrap();
        assert_eq!(
            next.v6.unwrap().to_string(),
            "fd00:2::3",
            "fd00:2::2 is of the old pod"
        );
        assert_eq!(pool.outside(subnet, Some(v6)), 1);
        assert_eq!(pool.outside(subnet, None), 4);
    }

    #[test]
    fn a_port_is_one_pods_until_it_is_released() {
        let subnet: Subnet = "10.2.0.0/24".parse().unwrap();
        let mut pool = Pool::default();
        let http = PortMapping {
            protocol: Protocol::Tcp,
            container_port: 80,
            host_port: 8080,
            host_ip: None,
        };
        let wanted = std::slice::from_ref(&http);
        pool.reserve("a", subnet, None, wanted).unwrap();
        assert_eq!(pool.forwards(), [], "closed at first");
        pool.set_open("a", true);
        assert_eq!(pool.forwards().len(), 1);
        pool.reserve("a", subnet, None, wanted).unwrap();
        let text = pool.reserve("b", subnet, None, wanted).unwrap_err().to_string();
        assert_eq!(text, "host port 8080/tcp is taken by pod a");
        assert!(pool.get("b").is_none());
        pool.remove("a");
        pool.reserve("b", subnet, None, wanted).unwrap();
    }
}
