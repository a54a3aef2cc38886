//! What the host is like: its IPv6, its routes, its sysctls.

use std::collections::BTreeMap;

use coracle_kernel::Errno;
use coracle_kernel::procfs::Procfs;

use super::table::Plan;
use crate::rtnl::{Route, Rtnl};
use crate::{Bridge, Error, Result, step};

/// MTU where nothing says otherwise.
const MTU: u32 = 1500;

/// What the configuration comes to on this host.
pub(super) fn plan(bridge: &Bridge) -> Plan {
    let has_ipv6 = || is_sysctl("net.ipv6.conf.all.disable_ipv6", "0");
    Plan {
        subnet: bridge.subnet,
        subnet_v6: bridge.subnet_v6.filter(|_| has_ipv6()),
        masquerade: bridge.masquerade,
    }
}

/// What a pod's namespace gets beside `asked`, which wins: it listens to no router advertisement, and takes its
/// addresses at once, since nobody else can have them.
pub(crate) fn sysctls(bridge: &Bridge, asked: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut sysctls = asked.clone();
    if !has_sysctl("net.ipv6.conf.default.accept_ra") {
        return sysctls;
    }
    let mut set = |name: &str, value: &str| {
        sysctls.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    };
    for device in ["all", "default"] {
        set(&format!("net.ipv6.conf.{device}.accept_ra"), "0");
        set(&format!("net.ipv6.conf.{device}.accept_dad"), "0");
        if plan(bridge).subnet_v6.is_some() {
            // Namespaces may take after a host that has it off for new devices.
            set(&format!("net.ipv6.conf.{device}.disable_ipv6"), "0");
        }
    }
    sysctls
}

/// Refuses a subnet that the host reaches by another device.
pub(super) fn check_route(rtnl: &mut Rtnl, route: &Route, plan: Plan) -> Result<()> {
    let Some(destination) = route.destination.filter(|_| route.prefix > 0) else {
        return Ok(());
    };
    let (subnet, key) = match plan.subnet_v6 {
        _ if plan.subnet.overlaps(destination, route.prefix) => (plan.subnet.to_string(), "subnet"),
        Some(v6) if v6.overlaps(destination, route.prefix) => (v6.to_string(), "subnet_v6"),
        _ => return Ok(()),
    };
    let link = match route.link {
        Some(index) => rtnl.link(index).map_err(step("look at the host's routes"))?,
        None => None,
    };
    Err(Error::SubnetInUse {
        subnet,
        route: format!("{destination}/{}", route.prefix),
        link: link.map_or_else(|| "no device".to_owned(), |(name, _)| name),
        key,
    })
}

/// MTU of the device that the host's packets leave by.
pub(super) fn default_mtu(rtnl: &mut Rtnl, routes: &[Route]) -> Result<u32> {
    let defaults = routes.iter().filter(|route| route.destination.is_none());
    let Some(index) = defaults
        .min_by_key(|route| route.metric)
        .and_then(|route| route.link)
    else {
        return Ok(MTU);
    };
    let link = rtnl
        .link(index)
        .map_err(step("look at the host's default route"))?;
    Ok(link.map_or(MTU, |(_, mtu)| mtu))
}

/// Sets IPv6 sysctls of a device. A kernel without IPv6 has none.
pub(super) fn set_ipv6(device: &str, sysctls: &[(&str, &str)]) {
    for (name, value) in sysctls {
        let set = |proc: Procfs| proc.sysctl(&format!("net/ipv6/conf/{device}/{name}"), value);
        match Procfs::visible().and_then(set) {
            Err(error) if error.errno() != Errno::ENOENT => {
                tracing::warn!(%error, "a router advertisement may reach the host");
            }
            _ => {}
        }
    }
}

pub(super) fn is_sysctl(name: &str, value: &str) -> bool {
    let read = Procfs::visible().and_then(|proc| proc.read_sysctl(name));
    read.is_ok_and(|read| read == value)
}

fn has_sysctl(name: &str) -> bool {
    Procfs::visible().is_ok_and(|proc| proc.read_sysctl(name).is_ok())
}
