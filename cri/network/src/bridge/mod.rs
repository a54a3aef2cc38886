//! The bridge of an instance, and a pod's way onto it.
//!
//! A veth pair leads from the pod's namespace to the bridge `crc-<instance>`; the pod has an address out of the
//! instance's subnet and a default route; packets that leave the subnet are masqueraded by the nf_tables table
//! `coracle-<instance>`. All of it is made by netlink.
//!
//! The bridge and the table come with the first pod and go with the last one, so an instance without pods leaves
//! nothing on the host. No sysctl of the host is changed but those of the bridge itself: where the host does not
//! forward, [`BridgeNetwork::status`] says so, with the cure.

mod nat;
pub(crate) mod pool;

use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coracle_kernel::procfs::Procfs;
use coracle_kernel::{Errno, Error as KernelError};

use self::pool::{Pool, Subnet};
use crate::netns::Fresh;
use crate::rows::{BridgeLease, Rows, Wiring};
use crate::rtnl::{LinkEvents, Pair, Rtnl};
use crate::{AttachOptions, Bridge, Error, Finding, Result, Status, lock, step};

/// How long the kernel may take to notice a carrier; usually it is less than a millisecond.
const CARRIER_TIME: Duration = Duration::from_secs(10);

/// The device's name inside of every pod.
const INSIDE: &str = "eth0";

/// What the names of all pairs begin with.
const PAIR_PREFIX: &str = "crv";

/// The built-in bridge of one instance. It takes down what it made also where pods are wired by others now.
pub(crate) struct BridgeNetwork {
    instance: String,
    rows: Arc<Rows>,
    pool: Mutex<Pool>,
    /// Held while the bridge and its table come or go.
    state: Mutex<BridgeState>,
    /// Why packets are not masqueraded though they should be: apart, so that a status waits for no netlink.
    no_masquerade: Mutex<Option<String>>,
}

#[derive(Debug, Default)]
struct BridgeState {
    /// It was made, or looked over, in this life of the daemon.
    ready: bool,
}

impl BridgeNetwork {
    /// The bridge of `instance`, with the addresses that pods have by their rows. Touches nothing.
    pub(crate) fn new(instance: &str, rows: Arc<Rows>) -> BridgeNetwork {
        let mut pool = Pool::default();
        for (pod, lease) in rows.leases() {
            pool.insert(pod, lease.address);
        }
        BridgeNetwork {
            instance: instance.to_owned(),
            rows,
            pool: Mutex::new(pool),
            state: Mutex::default(),
            no_masquerade: Mutex::default(),
        }
    }

    /// What the pod gets: the address that it had, or a free one; written down before it is used.
    pub(crate) fn reserve(&self, pod: &str, bridge: &Bridge, options: &AttachOptions) -> Result<BridgeLease> {
        if !options.port_mappings.is_empty() {
            let why = "the built-in bridge has no ports of the host in this release";
            return Err(Error::NotReady(why.to_owned()));
        }
        let address = self.address_for(pod, bridge.subnet)?;
        Ok(BridgeLease {
            address,
            v6: None,
            ports: Vec::new(),
        })
    }

    /// Connects the pod's new namespace, step by step.
    pub(crate) fn connect(
        &self,
        pod: &str,
        bridge: &Bridge,
        lease: &BridgeLease,
        fresh: &mut Fresh,
    ) -> Result<()> {
        let mut rtnl = rtnl()?;
        let bridge_index = self.ensure_bridge(&mut rtnl, bridge)?;
        let Fresh {
            namespace,
            rtnl: inside,
            events: inside_events,
        } = fresh;

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
        let inner = find(inside, INSIDE)?;
        let outer = find(&mut rtnl, &name)?;

        inside
            .add_address(inner, lease.address, bridge.subnet)
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
            .wait_operational(inner, inside_events, CARRIER_TIME)
            .map_err(step("wait for the pod's device"))
    }

    /// Removes the pod's pair; none there is no error.
    pub(crate) fn disconnect(&self, pod: &str) -> Result<()> {
        // The pair goes with its namespace, but some time later: removed by name it is gone at once.
        rtnl()?
            .delete_link(&self.pair_name(pod))
            .map(drop)
            .map_err(step("remove the pod's pair"))
    }

    /// Gives the pod's address back, after its row is gone; without any pod the bridge goes too.
    pub(crate) fn release(&self, pod: &str) -> Result<()> {
        lock(&self.pool).remove(pod);
        self.remove_unused_bridge()
    }

    /// Removes pairs whose namespace is unpinned but kept alive by a process, and of which no record tells, and a
    /// bridge without pods. How many pairs there were.
    pub(crate) fn sweep(&self) -> Result<usize> {
        let mut pairs = 0;
        let mut rtnl = rtnl()?;
        let known: Vec<String> = lock(&self.pool).pods().map(|pod| self.pair_name(&pod)).collect();
        if let Some(index) = rtnl
            .link_index(&self.bridge_name())
            .map_err(step("look for the bridge"))?
        {
            for port in rtnl.ports(index).map_err(step("list the bridge's ports"))? {
                if port.starts_with(PAIR_PREFIX) && !known.contains(&port) {
                    rtnl.delete_link(&port).map_err(step("remove a left-over pair"))?;
                    pairs += 1;
                }
            }
        }
        self.remove_unused_bridge()?;
        Ok(pairs)
    }

    /// What limits the pods of the bridge.
    pub(crate) fn status(&self, bridge: &Bridge) -> Status {
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
        let lease = BridgeLease {
            address,
            v6: None,
            ports: Vec::new(),
        };
        // Outside of the lock: other pods' rows go to the disk at the same time.
        if let Err(error) = self.rows.save(pod, Wiring::Bridge(lease)) {
            lock(&self.pool).remove(pod);
            return Err(error);
        }
        Ok(address)
    }

    /// The bridge's index; made with its address and the masquerading table where it is missing.
    fn ensure_bridge(&self, rtnl: &mut Rtnl, bridge: &Bridge) -> Result<u32> {
        let name = self.bridge_name();
        let mut state = lock(&self.state);
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
    fn remove_unused_bridge(&self) -> Result<()> {
        let mut state = lock(&self.state);
        // A pod that is being attached has its address already, and waits for the lock to ask for the bridge.
        if !lock(&self.pool).is_empty() {
            return Ok(());
        }
        let known = state.ready;
        *state = BridgeState::default();
        let removed = rtnl()?
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

    fn bridge_name(&self) -> String {
        format!("crc-{}", self.instance)
    }

    fn pair_name(&self, pod: &str) -> String {
        pair_name(&self.instance, pod)
    }

    fn table_name(&self) -> String {
        format!("coracle-{}", self.instance)
    }
}

fn rtnl() -> Result<Rtnl> {
    Rtnl::open().map_err(step("open a route socket"))
}

/// Name of the host's end of a pod's pair: 15 characters at most.
fn pair_name(instance: &str, pod: &str) -> String {
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
    use super::*;

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
}
