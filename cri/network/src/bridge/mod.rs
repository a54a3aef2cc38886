//! The bridge of an instance, and a pod's way onto it.
//!
//! A veth pair leads from the pod's namespace to the bridge `crc-<instance>`; the pod has an address out of the
//! instance's subnet, of the IPv6 one too where there is one, and default routes. The nf_tables tables
//! `coracle-<instance>` masquerade packets that leave the subnets and lead ports of the host to pods; `rules` says how.
//! All of it is made by netlink.
//!
//! The bridge and the tables come with the first pod and go with the last one, so an instance without pods leaves
//! nothing on the host. No sysctl of the host is changed but those of the bridge and of the pairs: where the host does
//! not forward, [`BridgeNetwork::status`] says so, with the cure.
//!
//! No IPv6 router advertisement of a pod reaches anybody (CVE-2020-10749): the bridge and the pods do not listen to
//! them, and the host's ends of the pairs have no IPv6.

mod conntrack;
mod expr;
mod host;
mod nfnl;
pub(crate) mod pool;
mod ports;
mod rules;
pub(crate) mod subnet;
mod table;

use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coracle_kernel::{Errno, Error as KernelError};

pub(crate) use self::host::sysctls;
use self::host::{check_route, default_mtu, is_sysctl, plan, set_ipv6};
use self::pool::Pool;
use self::rules::Rules;
use self::subnet::{Subnet, SubnetV6};
use self::table::Plan;
use crate::netns::Fresh;
use crate::rows::{BridgeLease, Rows as Book, Wiring};
use crate::rtnl::{LinkEvents, Pair, Rtnl};
use crate::{AttachOptions, Error, Finding, Result, Status, lock, step};

/// How long the kernel may take to notice a carrier; usually it is less than a millisecond.
const CARRIER_TIME: Duration = Duration::from_secs(10);

/// The device's name inside of every pod.
const INSIDE: &str = "eth0";

/// What the names of all pairs begin with.
const PAIR_PREFIX: &str = "crv";

/// Settings of the built-in bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Addresses of the pods; the first one is the bridge's own.
    pub subnet: Subnet,
    /// IPv6 addresses of the pods, at least as many; the first one is the bridge's own. Without it pods have none.
    pub subnet_v6: Option<SubnetV6>,
    /// MTU of the bridge and of both ends of each pair; 0 for that of the device of the host's default route. It is
    /// the bridge's, and lasts as long as that one.
    pub mtu: u32,
    /// Whether packets that leave the subnet get the host's address.
    pub masquerade: bool,
}

/// The built-in bridge of one instance. It takes down what it made also where pods are wired by others now.
pub(crate) struct BridgeNetwork {
    instance: String,
    rows: Arc<Book>,
    pool: Arc<Mutex<Pool>>,
    rules: Arc<Rules>,
    /// Held while the bridge and its tables come or go.
    state: Mutex<BridgeState>,
}

#[derive(Debug, Default)]
struct BridgeState {
    /// What it was made for, or looked over for, in this life of the daemon.
    plan: Option<Plan>,
    mtu: u32,
}

impl BridgeNetwork {
    /// The bridge of `instance`, with what pods have by their rows. Touches nothing.
    pub(crate) fn new(instance: &str, rows: Arc<Book>) -> BridgeNetwork {
        let mut pool = Pool::default();
        for (pod, lease) in rows.leases() {
            pool.insert(&pod, lease);
        }
        let pool = Arc::new(Mutex::new(pool));
        let rules = Rules::new(format!("coracle-{instance}"), bridge_name(instance), pool.clone());
        BridgeNetwork {
            instance: instance.to_owned(),
            rows,
            pool,
            rules: Arc::new(rules),
            state: Mutex::default(),
        }
    }

    /// What the pod gets: the addresses that it had, or free ones, and its ports of the host; written down before it
    /// is used.
    pub(crate) fn reserve(&self, pod: &str, bridge: &Bridge, options: &AttachOptions) -> Result<BridgeLease> {
        let plan = plan(bridge);
        let before = lock(&self.pool).get(pod).cloned();
        let lease = lock(&self.pool).reserve(pod, plan.subnet, plan.subnet_v6, &options.port_mappings)?;
        if before.as_ref() == Some(&lease) {
            return Ok(lease);
        }
        // Outside of the lock: other pods' rows go to the disk at the same time.
        if let Err(error) = self.rows.save(pod, Wiring::Bridge(lease.clone())) {
            let mut pool = lock(&self.pool);
            pool.remove(pod);
            // The row is what it was.
            if let Some(before) = before {
                pool.insert(pod, before);
                pool.set_open(pod, false);
            }
            return Err(error);
        }
        Ok(lease)
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
        let plan = plan(bridge);
        let (bridge_index, mtu) = self.ensure_bridge(&mut rtnl, bridge, plan)?;
        let Fresh {
            namespace,
            rtnl: inside,
            events: inside_events,
        } = fresh;

        let name = self.pair_name(pod);
        let pair = Pair {
            name: &name,
            alias: format!("coracle pod {pod}"),
            mtu,
            peer: INSIDE,
            peer_namespace: namespace.as_fd(),
        };
        rtnl.create_pair(&pair).map_err(step("make the pod's pair"))?;
        let find = |rtnl: &mut Rtnl, name: &str| {
            let index = rtnl.link_index(name).map_err(step("find the pod's pair"))?;
            index.ok_or_else(|| gone("find the pod's pair", name))
        };
        let inner = find(inside, INSIDE)?;
        let outer = find(&mut rtnl, &name)?;

        inside
            .add_address(inner, lease.address.into(), plan.subnet.prefix())
            .map_err(step("give the pod its address"))?;
        inside.up(inner).map_err(step("bring the pod's device up"))?;
        inside
            .add_default_route(plan.subnet.gateway().into(), inner)
            .map_err(step("give the pod its default route"))?;
        if let (Some(subnet), Some(address)) = (bridge.subnet_v6, lease.v6) {
            // To a device that is up, or there is no route to the subnet yet, and so none by its gateway.
            inside
                .add_address(inner, address.into(), subnet.prefix())
                .and_then(|_| inside_events.wait_address(address, CARRIER_TIME))
                .map_err(step("give the pod its IPv6 address"))?;
            inside
                .add_default_route(subnet.gateway().into(), inner)
                .map_err(step("give the pod its IPv6 default route"))?;
        }
        let events = LinkEvents::open().map_err(step("open a route socket"))?;
        set_ipv6(&name, &[("disable_ipv6", "1")]);
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
            .map_err(step("wait for the pod's device"))?;
        self.open_ports(pod, lease, plan)
    }

    /// Removes the pod's ports of the host and its pair; what is not there is no error.
    pub(crate) fn disconnect(&self, pod: &str) -> Result<()> {
        let lease = lock(&self.pool).get(pod).cloned();
        if let Some(lease) = lease.filter(|lease| !lease.ports.is_empty()) {
            self.rules
                .close(pod)
                .map_err(step("close the pod's ports of the host"))?;
            let forwards: Vec<_> = ports::forwards(pod, &lease).collect();
            report(conntrack::forget_own(&forwards));
        }
        // The pair goes with its namespace, but some time later: removed by name it is gone at once.
        rtnl()?
            .delete_link(&self.pair_name(pod))
            .map(drop)
            .map_err(step("remove the pod's pair"))
    }

    /// Gives back what the pod had, after its row is gone; without any pod the bridge goes too.
    pub(crate) fn release(&self, pod: &str) -> Result<()> {
        let had = lock(&self.pool).remove(pod);
        // A pod of others: it need not pay for a look at nf_tables.
        if had.is_none() && lock(&self.state).plan.is_none() {
            return Ok(());
        }
        self.remove_unused_bridge()
    }

    /// Removes what no record tells of: pairs whose namespace is unpinned but kept alive by a process, ports of the
    /// host, and a bridge without pods. How many pods it was of. With pods, the tables are made where they are missing.
    pub(crate) fn sweep(&self, bridge: Option<&Bridge>) -> Result<usize> {
        let mut swept = 0;
        let mut rtnl = rtnl()?;
        let known: Vec<String> = lock(&self.pool).pods().map(|pod| self.pair_name(pod)).collect();
        let index = rtnl
            .link_index(&self.bridge_name())
            .map_err(step("look for the bridge"))?;
        if let Some(index) = index {
            for port in rtnl.ports(index).map_err(step("list the bridge's ports"))? {
                if port.starts_with(PAIR_PREFIX) && !known.contains(&port) {
                    rtnl.delete_link(&port).map_err(step("remove a left-over pair"))?;
                    swept += 1;
                }
            }
        }
        if !known.is_empty() {
            // A host without nf_tables has none.
            match self.rules.close_unknown() {
                Ok(pods) => swept += pods,
                Err(error) => tracing::debug!(%error, "no ports of the host to sweep"),
            }
        }
        if let Some(bridge) = bridge
            && index.is_some()
            && !known.is_empty()
            && let Err(error) = self.ensure_bridge(&mut rtnl, bridge, plan(bridge))
        {
            // The next pod fails by it, and says so.
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the bridge is not looked over"
            );
        }
        self.remove_unused_bridge()?;
        Ok(swept)
    }

    /// What limits the pods of the bridge.
    pub(crate) fn status(&self, bridge: &Bridge) -> Status {
        let mut findings = Vec::new();
        let mut find = |what: String, cure: &str| {
            findings.push(Finding {
                what,
                cure: cure.to_owned(),
            });
        };
        let plan = plan(bridge);
        if is_sysctl("net.ipv4.ip_forward", "0") {
            find(
                "net.ipv4.ip_forward is 0: pods reach this host and each other, and nothing else".to_owned(),
                "sysctl -w net.ipv4.ip_forward=1, and a file in /etc/sysctl.d for the next boot",
            );
        }
        if plan.subnet_v6.is_some() && is_sysctl("net.ipv6.conf.all.forwarding", "0") {
            find(
                "net.ipv6.conf.all.forwarding is 0: by IPv6 pods reach this host and each other, and nothing else"
                    .to_owned(),
                "sysctl -w net.ipv6.conf.all.forwarding=1, and a file in /etc/sysctl.d for the next boot; a host that \
                 has its own route from router advertisements needs accept_ra=2 on that device first",
            );
        }
        if let (Some(subnet), None) = (bridge.subnet_v6, plan.subnet_v6) {
            find(
                format!("pods have no IPv6 address of {subnet}: this host has IPv6 switched off"),
                "switch it on (the kernel's ipv6.disable, the sysctl net.ipv6.conf.all.disable_ipv6), or remove \
                 [network] subnet_v6",
            );
        }
        if let Some(why) = self.rules.trouble() {
            find(
                format!(
                    "packets of pods keep their own address outside of this host, and its ports lead to no pod: {why}"
                ),
                "a kernel with nf_tables and its nat, masq and fib expressions, or a route back to the pods' subnet",
            );
        } else if let Some(made_for) = self.state.try_lock().ok().and_then(|state| state.plan)
            && !self.rules.watch(made_for)
        {
            find(
                format!(
                    "somebody changed or removed the nf_tables table coracle-{}; it is being made anew",
                    self.instance
                ),
                "have other services flush their own tables, not the whole ruleset",
            );
        }
        let strangers = lock(&self.pool).outside(plan.subnet, bridge.subnet_v6);
        if strangers > 0 {
            find(
                format!("{strangers} pods have addresses outside of {}", bridge.subnet),
                "recreate them: they were made with another [network] subnet or subnet_v6",
            );
        }
        Status {
            not_ready: None,
            findings,
        }
    }

    /// Lets the pod's ports of the host lead to it.
    fn open_ports(&self, pod: &str, lease: &BridgeLease, plan: Plan) -> Result<()> {
        if lease.ports.is_empty() {
            return Ok(());
        }
        self.rules
            .open(pod, plan)
            .map_err(step("open the pod's ports of the host"))?;
        // What is on its way to the host, or to another pod, comes here from now on.
        let forwards: Vec<_> = ports::forwards(pod, lease).collect();
        report(conntrack::forget_others(&forwards));
        Ok(())
    }

    /// The bridge's index and MTU; made with its addresses and the tables where it is missing.
    fn ensure_bridge(&self, rtnl: &mut Rtnl, bridge: &Bridge, plan: Plan) -> Result<(u32, u32)> {
        let name = self.bridge_name();
        let mut state = lock(&self.state);
        let look = |rtnl: &mut Rtnl| rtnl.link_index(&name).map_err(step("look for the bridge"));
        if state.plan == Some(plan)
            && let Some(index) = look(rtnl)?
        {
            self.ensure_rules(plan, false);
            return Ok((index, state.mtu));
        }
        *state = BridgeState::default();
        let own = look(rtnl)?;
        let routes = rtnl.routes().map_err(step("look at the host's routes"))?;
        for route in routes.iter().filter(|route| route.link != own) {
            check_route(rtnl, route, plan)?;
        }
        let mtu = match bridge.mtu {
            0 => default_mtu(rtnl, &routes)?,
            mtu => mtu,
        };
        rtnl.create_bridge(&name, hardware_address(&self.instance), mtu)
            .map_err(step("make the bridge"))?;
        let index = look(rtnl)?.ok_or_else(|| gone("make the bridge", &name))?;
        // One that was there may have been made with another MTU, and its pods with it.
        let (_, mtu) = rtnl
            .link(index)
            .map_err(step("look at the bridge"))?
            .ok_or_else(|| gone("look at the bridge", &name))?;
        match plan.subnet_v6 {
            Some(_) => set_ipv6(
                &name,
                &[
                    ("accept_ra", "0"),
                    ("accept_redirects", "0"),
                    ("accept_dad", "0"),
                    ("disable_ipv6", "0"),
                ],
            ),
            None => set_ipv6(&name, &[("disable_ipv6", "1")]),
        }
        rtnl.add_address(index, plan.subnet.gateway().into(), plan.subnet.prefix())
            .map_err(step("give the bridge its address"))?;
        rtnl.up(index).map_err(step("bring the bridge up"))?;
        if let Some(subnet) = plan.subnet_v6 {
            let failed = "give the bridge its IPv6 address";
            let events = LinkEvents::open().map_err(step(failed))?;
            let added = rtnl.add_address(index, subnet.gateway().into(), subnet.prefix());
            if added.map_err(step(failed))? {
                events
                    .wait_address(subnet.gateway(), CARRIER_TIME)
                    .map_err(step(failed))?;
            }
        }
        self.ensure_rules(plan, true);
        *state = BridgeState {
            plan: Some(plan),
            mtu,
        };
        Ok((index, mtu))
    }

    /// Pods reach this host and each other without the tables, so their absence is told of and no error; but a pod
    /// with ports of the host needs them.
    fn ensure_rules(&self, plan: Plan, anew: bool) {
        if let Err(error) = self.rules.ensure(plan, anew) {
            tracing::warn!(%error, "packets of pods are not masqueraded, and ports of the host lead to no pod");
        }
    }

    /// Removes the bridge and its tables if no pod has an address.
    fn remove_unused_bridge(&self) -> Result<()> {
        let mut state = lock(&self.state);
        // A pod that is being attached has its address already, and waits for the lock to ask for the bridge.
        if !lock(&self.pool).is_empty() {
            return Ok(());
        }
        let removed = rtnl()?
            .delete_link(&self.bridge_name())
            .map_err(step("remove the bridge"))?;
        let known = state.plan.is_some();
        *state = BridgeState::default();
        // A crash may have left the one without the other; a host without nf_tables has neither.
        if let Err(error) = self.rules.remove()
            && (removed || known)
        {
            tracing::debug!(%error, "no table to remove");
        }
        Ok(())
    }

    fn bridge_name(&self) -> String {
        bridge_name(&self.instance)
    }

    fn pair_name(&self, pod: &str) -> String {
        pair_name(&self.instance, pod)
    }
}

fn rtnl() -> Result<Rtnl> {
    Rtnl::open().map_err(step("open a route socket"))
}

fn gone(what: &str, link: &str) -> Error {
    let source = KernelError::new("netlink", format!("RTM_GETLINK {link}"), Errno::ENODEV);
    step(what)(source)
}

/// Flows that the kernel did not forget go where they went until they end: said, but no reason to have no network.
fn report(forgotten: Result<(), KernelError>) {
    if let Err(error) = forgotten {
        tracing::warn!(%error, "flows to a port of the host may go where they went before");
    }
}

fn bridge_name(instance: &str) -> String {
    format!("crc-{instance}")
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

/// FNV-1a: short, and the same in every release, as names need it.
fn hash(words: &[&str]) -> u64 {
    let bytes = words.iter().flat_map(|word| word.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests;
