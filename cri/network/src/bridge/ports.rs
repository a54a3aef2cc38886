//! Ports of the host: what a request means, and what cannot be.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::rows::BridgeLease;
use crate::{Error, PortMapping, Protocol, Result};

/// Most ports of one pod.
const PORTS_MAX: usize = 4096;

/// One address family's part of a mapping: what comes to the port goes to the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Forward {
    pub(crate) pod: String,
    pub(crate) protocol: Protocol,
    /// The host's address; every one of the family where not given.
    pub(crate) at: Option<IpAddr>,
    pub(crate) host_port: u16,
    pub(crate) to: SocketAddr,
}

impl Protocol {
    /// Its number in an IP header.
    pub(crate) fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

/// A pod's mappings, each once; those that the bridge cannot make are refused.
pub(crate) fn check(mappings: &[PortMapping], has_v6: bool) -> Result<Vec<PortMapping>> {
    let mut checked: Vec<PortMapping> = Vec::new();
    if mappings.len() > PORTS_MAX {
        return Err(Error::HostPort {
            port: show(&mappings[PORTS_MAX]),
            why: "a pod may have 4096 at most",
        });
    }
    for mapping in mappings {
        let refused = |why| {
            Err(Error::HostPort {
                port: show(mapping),
                why,
            })
        };
        let mapping = PortMapping {
            host_ip: mapping.host_ip.map(|ip| ip.to_canonical()),
            ..mapping.clone()
        };
        match mapping.host_ip {
            Some(IpAddr::V6(Ipv6Addr::LOCALHOST)) => {
                return refused("the kernel routes nothing from ::1 to a pod");
            }
            Some(IpAddr::V6(_)) if !has_v6 => {
                return refused("the pod has no IPv6 address: set [network] subnet_v6, on a host with IPv6");
            }
            _ => {}
        }
        if mapping.host_port == 0 || mapping.container_port == 0 {
            return refused("0 is no port");
        }
        if checked.contains(&mapping) {
            continue;
        }
        // The same host port twice could lead to the one port of the pod or to the other.
        if clash(std::slice::from_ref(&mapping), &checked).is_some() {
            return refused("the pod asks for it more than once");
        }
        checked.push(mapping);
    }
    Ok(checked)
}

/// The first of `wanted` that `taken` has already, as people read it.
pub(crate) fn clash(wanted: &[PortMapping], taken: &[PortMapping]) -> Option<String> {
    let clashes = |one: &PortMapping, other: &PortMapping| {
        let meet = |(a, b): (IpAddr, IpAddr)| {
            a.is_ipv4() == b.is_ipv4() && (a == b || a.is_unspecified() || b.is_unspecified())
        };
        let pairs = addresses(one).flat_map(|a| addresses(other).map(move |b| (a, b)));
        (one.protocol, one.host_port) == (other.protocol, other.host_port) && pairs.into_iter().any(meet)
    };
    let first = wanted
        .iter()
        .find(|one| taken.iter().any(|other| clashes(one, other)));
    first.map(show)
}

/// What a pod's mappings come to: a mapping without an address is one of each family that the pod has.
pub(crate) fn forwards<'a>(pod: &'a str, lease: &'a BridgeLease) -> impl Iterator<Item = Forward> + 'a {
    lease.ports.iter().flat_map(move |mapping| {
        addresses(mapping).filter_map(move |address| {
            let to: IpAddr = match address {
                IpAddr::V4(_) => lease.address.into(),
                IpAddr::V6(_) => lease.v6?.into(),
            };
            Some(Forward {
                pod: pod.to_owned(),
                protocol: mapping.protocol,
                at: (!address.is_unspecified()).then_some(address),
                host_port: mapping.host_port,
                to: (to, mapping.container_port).into(),
            })
        })
    })
}

/// The host's addresses that a mapping is for; an unspecified one stands for all of its family.
fn addresses(mapping: &PortMapping) -> impl Iterator<Item = IpAddr> {
    let all = [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ];
    let (first, second) = match mapping.host_ip {
        None => (all[0], Some(all[1])),
        Some(address) => (address, None),
    };
    [first].into_iter().chain(second)
}

fn show(mapping: &PortMapping) -> String {
    let protocol = match mapping.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    let at = mapping.host_ip.map(|ip| format!(" on {ip}")).unwrap_or_default();
    format!("{}/{protocol}{at}", mapping.host_port)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(protocol: Protocol, host_port: u16, host_ip: &str) -> PortMapping {
        PortMapping {
            protocol,
            container_port: 80,
            host_port,
            host_ip: (!host_ip.is_empty()).then(|| host_ip.parse().unwrap()),
        }
    }

    #[test]
    fn ports_clash_where_one_packet_would_fit_both() {
        use Protocol::{Sctp, Tcp, Udp};
        let clash = |a, b| clash(&[a], &[b]).is_some();
        assert!(clash(mapping(Tcp, 80, ""), mapping(Tcp, 80, "")));
        assert!(clash(mapping(Tcp, 80, "192.0.2.1"), mapping(Tcp, 80, "")));
        assert!(clash(mapping(Tcp, 80, ""), mapping(Tcp, 80, "fd00::1")));
        assert!(clash(mapping(Tcp, 80, "0.0.0.0"), mapping(Tcp, 80, "192.0.2.1")));
        assert!(!clash(
            mapping(Tcp, 80, "192.0.2.1"),
            mapping(Tcp, 80, "192.0.2.2")
        ));
        assert!(!clash(mapping(Tcp, 80, "0.0.0.0"), mapping(Tcp, 80, "::")));
        assert!(!clash(mapping(Tcp, 80, ""), mapping(Udp, 80, "")));
        assert!(!clash(mapping(Sctp, 80, ""), mapping(Sctp, 81, "")));
    }

    #[test]
    fn mappings_are_refused_by_what_is_wrong_with_them() {
        use Protocol::{Tcp, Udp};
        let refused = |mappings: &[PortMapping], v6| check(mappings, v6).unwrap_err().to_string();
        assert_eq!(
            refused(&[mapping(Udp, 53, "::1")], true),
            "host port 53/udp on ::1: the kernel routes nothing from ::1 to a pod"
        );
        assert!(refused(&[mapping(Udp, 53, "fd00::1")], false).contains("subnet_v6"));
        assert!(refused(&[mapping(Tcp, 0, "")], true).contains("0 is no port"));
        let other = PortMapping {
            container_port: 81,
            ..mapping(Tcp, 80, "192.0.2.1")
        };
        assert!(refused(&[mapping(Tcp, 80, ""), other], true).contains("more than once"));
        assert!(refused(&vec![mapping(Tcp, 80, ""); 4097], true).contains("4096"));
        let twice = [
            mapping(Tcp, 80, "::ffff:192.0.2.1"),
            mapping(Tcp, 80, "192.0.2.1"),
        ];
        assert_eq!(check(&twice, false).unwrap(), twice[1..]);
    }

    #[test]
    fn a_mapping_without_an_address_is_one_of_each_family() {
        let mut lease = BridgeLease {
            address: [10, 0, 0, 2].into(),
            v6: Some("fd00::2".parse().unwrap()),
            ports: vec![
                mapping(Protocol::Tcp, 8080, ""),
                mapping(Protocol::Udp, 53, "0.0.0.0"),
            ],
        };
        let shown = |lease: &BridgeLease| -> Vec<String> {
            forwards("a", lease)
                .map(|f| format!("{:?} {}", f.at, f.to))
                .collect()
        };
        assert_eq!(
            shown(&lease),
            ["None 10.0.0.2:80", "None [fd00::2]:80", "None 10.0.0.2:80"]
        );
        lease.v6 = None;
        lease.ports[1].host_ip = Some([192, 0, 2, 1].into());
        assert_eq!(shown(&lease), ["None 10.0.0.2:80", "Some(192.0.2.1) 10.0.0.2:80"]);
    }
}
