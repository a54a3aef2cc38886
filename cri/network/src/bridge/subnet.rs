//! Subnets of pods.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::{Error, Result};

/// An IPv4 subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    network: u32,
    prefix: u8,
}

/// An IPv6 subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubnetV6 {
    network: u128,
    prefix: u8,
}

impl Subnet {
    /// The subnet of `prefix` bits that `address` is in, large enough for the bridge and a pod.
    pub fn new(address: Ipv4Addr, prefix: u8) -> Result<Subnet> {
        let refused = |why| Err(refused(format!("{address}/{prefix}"), why));
        if !(8..=29).contains(&prefix) {
            return refused("the prefix must be 8 to 29 bits long");
        }
        if address.is_loopback()
            || address.is_multicast()
            || address.is_unspecified()
            || address.is_link_local()
        {
            return refused("hosts cannot have such addresses");
        }
        Ok(Subnet {
            network: address.to_bits() & mask(prefix),
            prefix,
        })
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

    /// How many pods can have an address.
    #[must_use]
    pub fn capacity(self) -> u32 {
        !mask(self.prefix) - 2
    }

    /// Whether `address` is in it.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix) == self.network
    }

    /// How far behind the first address `address` is.
    pub(crate) fn offset(self, address: Ipv4Addr) -> u32 {
        address.to_bits() & !mask(self.prefix)
    }

    /// Whether it and the subnet of `prefix` bits at `address` have an address in common.
    pub(crate) fn overlaps(self, address: IpAddr, prefix: u8) -> bool {
        let common = mask(self.prefix.min(prefix));
        matches!(address, IpAddr::V4(address) if (self.network ^ address.to_bits()) & common == 0)
    }

    pub(crate) fn mask(self) -> Ipv4Addr {
        mask(self.prefix).into()
    }
}

impl SubnetV6 {
    /// The subnet of `prefix` bits that `address` is in.
    pub fn new(address: Ipv6Addr, prefix: u8) -> Result<SubnetV6> {
        let refused = |why| Err(refused(format!("{address}/{prefix}"), why));
        if !(64..=120).contains(&prefix) {
            return refused("the prefix must be 64 to 120 bits long");
        }
        if address.is_loopback()
            || address.is_multicast()
            || address.is_unspecified()
            || address.is_unicast_link_local()
            || address.to_ipv4_mapped().is_some()
        {
            return refused("hosts cannot have such addresses");
        }
        Ok(SubnetV6 {
            network: address.to_bits() & mask_v6(prefix),
            prefix,
        })
    }

    /// The bits of the network's part.
    #[must_use]
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The first address, which is every router's.
    #[must_use]
    pub fn network(self) -> Ipv6Addr {
        self.network.into()
    }

    /// The bridge's own address.
    #[must_use]
    pub fn gateway(self) -> Ipv6Addr {
        self.at(1)
    }

    /// Whether `address` is in it.
    #[must_use]
    pub fn contains(self, address: Ipv6Addr) -> bool {
        address.to_bits() & mask_v6(self.prefix) == self.network
    }

    /// The address that is as far behind the first one as a pod's IPv4 address is in `subnet`: who has the one has the
    /// other, so there is one pool for both.
    #[must_use]
    pub fn beside(self, subnet: Subnet, address: Ipv4Addr) -> Ipv6Addr {
        self.at(subnet.offset(address))
    }

    /// Refuses a subnet with fewer addresses than the pods' IPv4 one.
    pub(crate) fn check_size(self, subnet: Subnet) -> Result<()> {
        if 128 - self.prefix < 32 - subnet.prefix {
            return Err(refused(
                self.to_string(),
                "it has fewer addresses than [network] subnet",
            ));
        }
        Ok(())
    }

    /// Whether it and the subnet of `prefix` bits at `address` have an address in common.
    pub(crate) fn overlaps(self, address: IpAddr, prefix: u8) -> bool {
        let common = mask_v6(self.prefix.min(prefix));
        matches!(address, IpAddr::V6(address) if (self.network ^ address.to_bits()) & common == 0)
    }

    pub(crate) fn mask(self) -> Ipv6Addr {
        mask_v6(self.prefix).into()
    }

    fn at(self, offset: u32) -> Ipv6Addr {
        (self.network | u128::from(offset)).into()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.prefix)
    }
}

impl fmt::Display for SubnetV6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = Error;

    fn from_str(text: &str) -> Result<Subnet> {
        let (address, prefix) = split(text, "it is not like 10.0.0.0/16")?;
        Subnet::new(address, prefix)
    }
}

impl FromStr for SubnetV6 {
    type Err = Error;

    fn from_str(text: &str) -> Result<SubnetV6> {
        let (address, prefix) = split(text, "it is not like fd00:10:244::/64")?;
        SubnetV6::new(address, prefix)
    }
}

fn split<A: FromStr>(text: &str, like: &'static str) -> Result<(A, u8)> {
    let refused = |why| refused(text.chars().take(64).collect(), why);
    let (address, prefix) = text.split_once('/').ok_or_else(|| refused(like))?;
    let address = address.parse().map_err(|_| refused("its address is none"))?;
    let prefix = prefix.parse().map_err(|_| refused("its prefix is no number"))?;
    Ok((address, prefix))
}

fn refused(text: String, why: &'static str) -> Error {
    Error::Subnet { text, why }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

fn mask_v6(prefix: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_are_read_and_shown() {
        let subnet: Subnet = "10.85.3.7/16".parse().unwrap();
        assert_eq!(subnet.to_string(), "10.85.0.0/16");
        assert_eq!(
            (subnet.gateway(), subnet.broadcast(), subnet.capacity()),
            ([10, 85, 0, 1].into(), [10, 85, 255, 255].into(), 65533)
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
            "fd00::/64",
        ] {
            wrong.parse::<Subnet>().unwrap_err();
        }
    }

    #[test]
    fn ipv6_addresses_stand_beside_the_ipv4_ones() {
        let subnet: Subnet = "10.85.0.0/16".parse().unwrap();
        let v6: SubnetV6 = "fd00:85::77/64".parse().unwrap();
        assert_eq!(v6.to_string(), "fd00:85::/64");
        assert_eq!(v6.gateway(), v6.beside(subnet, subnet.gateway()));
        let pod = v6.beside(subnet, [10, 85, 1, 2].into());
        assert_eq!(pod.to_string(), "fd00:85::102");
        assert!(v6.contains(pod));
        v6.check_size(subnet).unwrap();
        let small: SubnetV6 = "fd00:85::/113".parse().unwrap();
        assert!(
            small
                .check_size(subnet)
                .unwrap_err()
                .to_string()
                .contains("fewer addresses")
        );
        for wrong in [
            "",
            "fd00::",
            "fd00::/63",
            "fd00::/121",
            "fe80::/64",
            "::1/120",
            "::/64",
            "ff02::/64",
            "::ffff:10.0.0.0/120",
            "10.0.0.0/64",
        ] {
            wrong.parse::<SubnetV6>().unwrap_err();
        }
    }

    #[test]
    fn subnets_overlap_in_both_directions() {
        let subnet: Subnet = "10.3.0.0/16".parse().unwrap();
        let overlaps = |address: &str, prefix| subnet.overlaps(address.parse().unwrap(), prefix);
        assert!(overlaps("10.0.0.0", 8) && overlaps("10.3.4.5", 32) && overlaps("10.3.0.0", 16));
        assert!(!overlaps("10.4.0.0", 16) && !overlaps("::", 0));
        let v6: SubnetV6 = "fd00:85::/64".parse().unwrap();
        let overlaps = |address: &str, prefix| v6.overlaps(address.parse().unwrap(), prefix);
        assert!(overlaps("fd00:85::", 48) && overlaps("fd00:85::9", 128));
        assert!(!overlaps("fd00:85:0:1::", 64) && !overlaps("0.0.0.0", 0));
    }
}
