//! The bridge of an instance, and a pod's way onto it.

use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::time::Duration;

use coracle_kernel::procfs::Procfs;
use coracle_kernel::{Errno, Error as KernelError};

use crate::netns::Fresh;
use crate::rtnl::{LinkEvents, Pair, Rtnl};
use crate::{
    AttachOptions, Attachment, Bridge, BridgeState, Error, Network, Result, default_sysctls, lock, nat, step,
};

/// How long the kernel may take to notice a carrier; usually it is less than a millisecond.
const CARRIER_TIME: Duration = Duration::from_secs(10);

/// The device's name inside of every pod.
const INSIDE: &str = "eth0";

/// What the names of all pairs begin with.
pub(crate) const PAIR_PREFIX: &str = "crv";

impl Network {
    /// Makes the namespace and connects it, step by step.
    pub(crate) fn bring_up(
        &self,
        pod: &str,
        bridge: &Bridge,
        address: std::net::Ipv4Addr,
        options: &AttachOptions,
    ) -> Result<Attachment> {
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
        let mut rtnl = self.rtnl()?;
        let bridge_index = self.ensure_bridge(&mut rtnl, bridge)?;
        let Fresh {
            namespace,
            rtnl: mut inside,
            events: inside_events,
        } = self.pins.make(pod, &sysctls)?;
        inside
            .loopback_up()
            .map_err(step("bring the pod's loopback up"))?;

        let name = self.pair_name(pod);
        let pair = Pair {
            name: &name,
            alias: format!("coracle pod {pod}"),
            mtu: bridge.mtu,
            peer: INSIDE,
            peer_namespace: namespace.as_fd(),
        };
        rtnl.create_pair(&pair).map_err(step("make the pod's pair"))?;
        let gone = |name: &str| {
            let source = KernelError::new("netlink", format!("RTM_GETLINK {name}"), Errno::ENODEV);
            Error::Step {
                step: "find the pod's pair".to_owned(),
                source,
            }
        };
        let find = |rtnl: &mut Rtnl, name: &str| {
            rtnl.link_index(name)
                .map_err(step("find the pod's pair"))?
                .ok_or_else(|| gone(name))
        };
        let inner = find(&mut inside, INSIDE)?;
        let outer = find(&mut rtnl, &name)?;

        inside
            .add_address(inner, address, bridge.subnet)
            .map_err(step("give the pod its address"))?;
        inside.up(inner).map_err(step("bring the pod's device up"))?;
        inside
            .add_default_route(bridge.subnet.gateway(), inner)
            .map_err(step("give the pod its default route"))?;
        let events = LinkEvents::open().map_err(step("open a route socket"))?;
        rtnl.up(outer)
            .map_err(step("bring the host's end of the pod's pair up"))?;
        // A port that is operational when it is added forwards at once; the bridge and the pod's device begin to send
        // when they are. So from here on no first packet is lost.
        rtnl.wait_operational(outer, &events, CARRIER_TIME)
            .map_err(step("wait for the pod's pair"))?;
        rtnl.set_bridge(outer, bridge_index)
            .map_err(step("connect the pod to the bridge"))?;
        rtnl.wait_operational(bridge_index, &events, CARRIER_TIME)
            .map_err(step("wait for the bridge"))?;
        inside
            .wait_operational(inner, &inside_events, CARRIER_TIME)
            .map_err(step("wait for the pod's device"))?;
        Ok(Attachment {
            netns: self.pins.path(pod),
            namespace,
            ips: vec![IpAddr::V4(address)],
        })
    }

    /// The bridge's index; made with its address and the masquerading table where it is missing.
    fn ensure_bridge(&self, rtnl: &mut Rtnl, bridge: &Bridge) -> Result<u32> {
        let name = self.bridge_name();
        let mut state = lock(&self.bridge);
        let look = |rtnl: &mut Rtnl| rtnl.link_index(&name).map_err(step("look for the bridge"));
        if state.ready
            && let Some(index) = look(rtnl)?
        {
            return Ok(index);
        }
        *state = BridgeState::default();
        let own = look(rtnl)?;
        for (route, link) in rtnl.routes().map_err(step("look at the host's routes"))? {
            if link != own && route.prefix() > 0 && route.overlaps(bridge.subnet) {
                return Err(Error::SubnetInUse {
                    subnet: bridge.subnet,
                    route,
                });
            }
        }
        rtnl.create_bridge(&name, hardware_address(&self.instance), bridge.mtu)
            .map_err(step("make the bridge"))?;
        let index = look(rtnl)?.ok_or_else(|| {
            let source = KernelError::new("netlink", format!("RTM_GETLINK {name}"), Errno::ENODEV);
            Error::Step {
                step: "make the bridge".to_owned(),
                source,
            }
        })?;
        no_ipv6(&name);
        rtnl.add_address(index, bridge.subnet.gateway(), bridge.subnet)
            .map_err(step("give the bridge its address"))?;
        rtnl.up(index).map_err(step("bring the bridge up"))?;
        if bridge.masquerade
            && let Err(error) = nat::install(&self.table_name(), bridge.subnet)
        {
            // Pods reach this host and each other without it.
            tracing::warn!(%error, "packets of pods are not masqueraded");
            *lock(&self.no_masquerade) = Some(error.to_string());
        }
        state.ready = true;
        Ok(index)
    }

    /// Removes the bridge and its table if no pod has an address.
    pub(crate) fn remove_unused_bridge(&self) -> Result<()> {
        let mut state = lock(&self.bridge);
        // A pod that is being attached has its address already, and waits for the lock to ask for the bridge.
        if !lock(&self.pool).is_empty() {
            return Ok(());
        }
        let known = state.ready;
        *state = BridgeState::default();
        let removed = self
            .rtnl()?
            .delete_link(&self.bridge_name())
            .map_err(step("remove the bridge"))?;
        // A crash may have left the one without the other; a host without nf_tables has neither.
        if let Err(error) = nat::remove(&self.table_name())
            && (removed || known)
        {
            tracing::debug!(%error, "no table to remove");
        }
        Ok(())
    }
}

/// Name of the host's end of a pod's pair: 15 characters at most.
pub(crate) fn pair_name(instance: &str, pod: &str) -> String {
    let hash = hash(&[instance, pod]) & 0xffff_ffff_ffff;
    format!("{PAIR_PREFIX}{hash:012x}")
}

/// The bridge's hardware address: locally administered, the same each time.
fn hardware_address(instance: &str) -> [u8; 6] {
    let [a, b, c, d, e, ..] = hash(&["bridge", instance]).to_be_bytes();
    [0x02, a, b, c, d, e]
}

/// The bridge has no IPv6: a pod that sends router advertisements must not configure the host.
fn no_ipv6(name: &str) {
    let set = |proc: Procfs| proc.sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1");
    match Procfs::visible().and_then(set) {
        // A kernel without IPv6.
        Err(error) if error.errno() != Errno::ENOENT => tracing::warn!(%error, "IPv6 of the bridge stays on"),
        _ => {}
    }
}

/// FNV-1a: short, and the same in every release, as names need it.
fn hash(words: &[&str]) -> u64 {
    let bytes = words.iter().flat_map(|word| word.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::tests::{Book, INSTANCE};
    use crate::{AddressBook, Mode};

    #[test]
    fn names_fit_and_differ() {
        let pod = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
        let name = pair_name("0a1b2c3d", pod);
        assert_eq!(name.len(), 15);
        assert_ne!(name, pair_name("0a1b2c3e", pod));
        assert_ne!(name, pair_name("0a1b2c3d", &pod[1..]));
        assert_eq!(name, pair_name("0a1b2c3d", pod));
        assert_eq!(hardware_address("0a1b2c3d")[0], 2);
    }

    #[test]
    fn names_that_could_leave_their_place_are_refused() {
        let book: Arc<dyn AddressBook> = Arc::new(Book::default());
        for instance in ["", "../x", "012345678", "xyz"] {
            assert!(matches!(
                Network::new(instance, Mode::HostOnly("x"), book.clone()),
                Err(Error::Name(_))
            ));
        }
        let network = Network::new(
            INSTANCE,
            Mode::HostOnly("[network] mode = \"cni\" is for later"),
            book,
        )
        .unwrap();
        let long = "a".repeat(129);
        for pod in [
            "",
            "..",
            ".hidden",
            "a/b",
            "../../etc/passwd",
            "a\0b",
            "ä",
            long.as_str(),
        ] {
            assert!(
                matches!(
                    network.attach(pod, &AttachOptions::default()),
                    Err(Error::Name(_))
                ),
                "{pod:?}"
            );
            assert!(matches!(network.detach(pod), Err(Error::Name(_))), "{pod:?}");
        }
        let text = network
            .attach("pod", &AttachOptions::default())
            .unwrap_err()
            .to_string();
        assert!(text.contains("cni"), "{text}");
        assert_eq!(
            network.status().not_ready,
            Some("[network] mode = \"cni\" is for later")
        );
    }
}
