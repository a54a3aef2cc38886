//! What the host does with packets of pods: one nf_tables table `coracle-<instance>` in each address family.
//!
//! | chain, hook | what |
//! | --- | --- |
//! | `guard`, prerouting before everything | nothing but the loopback device brings packets of 127.0.0.0/8 |
//! | `prerouting`, `output` | packets to an address of the host go through `ports`, those of pods by `from-pods` |
//! | `ports`, `from-pods` | look the port up in the maps `ports-at`, `ports`: they give the pod's address and port |
//! | `postrouting` | packets that leave the subnet get the host's address; those back onto the bridge, its own |
//!
//! The chains are the same whatever pods there are. A pod's ports are elements of the maps, each with the pod's id as
//! its comment: one transaction adds them, one removes them. Whoever finds the table not as it should be makes it
//! anew, with all elements, in one transaction: no packet sees it half made.

use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use coracle_kernel::procfs::Procfs;
use coracle_kernel::{Errno, Result};

use super::nfnl::{self, Family};
use super::pool::Pool;
use super::table::{self, MAPS, Plan, Table};
use crate::lock;

/// The tables of one instance, and whose turn it is to change them.
pub(super) struct Rules {
    table: Table,
    pool: Arc<Mutex<Pool>>,
    /// Held while they change: what is in them and what the pool says agree when nobody holds it.
    turn: Mutex<()>,
    /// Why they are not there: apart, so that a status waits for no netlink.
    trouble: Mutex<Option<String>>,
}

impl Rules {
    pub(super) fn new(table: String, bridge: String, pool: Arc<Mutex<Pool>>) -> Rules {
        Rules {
            table: Table { name: table, bridge },
            pool,
            turn: Mutex::default(),
            trouble: Mutex::default(),
        }
    }

    /// Makes the tables where they are missing or not as they should be; `anew` in every case. Without pods there are
    /// none: whoever repairs them may come after the last pod has gone.
    pub(super) fn ensure(&self, plan: Plan, anew: bool) -> Result<()> {
        let _turn = lock(&self.turn);
        if lock(&self.pool).is_empty() {
            return Ok(());
        }
        if !anew && self.intact(plan).unwrap_or(false) {
            return Ok(());
        }
        self.replace(plan)
    }

    /// Lets the pod's ports of the host lead to it.
    pub(super) fn open(&self, pod: &str, plan: Plan) -> Result<()> {
        let _turn = lock(&self.turn);
        let mut forwards = {
            let mut pool = lock(&self.pool);
            pool.set_open(pod, true);
            pool.forwards()
        };
        forwards.retain(|forward| forward.pod == pod && plan.has(forward));
        if forwards.is_empty() {
            return Ok(());
        }
        // The tables may have gone since they were looked at, or hold something of a pod that was forgotten.
        nfnl::batch(self.table.add(&forwards)).or_else(|_| self.replace(plan))?;
        self.set_route_localnet(true);
        Ok(())
    }

    /// The pod's ports of the host lead nowhere from here on.
    pub(super) fn close(&self, pod: &str) -> Result<()> {
        let _turn = lock(&self.turn);
        let open = {
            let mut pool = lock(&self.pool);
            pool.set_open(pod, false);
            !pool.forwards().is_empty()
        };
        if !open {
            self.set_route_localnet(false);
        }
        self.remove_elements(|of| of == pod).map(drop)
    }

    /// Closes ports of pods that nobody knows. How many pods there were.
    pub(super) fn close_unknown(&self) -> Result<usize> {
        let _turn = lock(&self.turn);
        let pool = lock(&self.pool);
        let known: Vec<String> = pool.pods().cloned().collect();
        drop(pool);
        self.remove_elements(|of| !known.iter().any(|pod| pod == of))
    }

    /// Removes the tables; none there is no error.
    pub(super) fn remove(&self) -> Result<()> {
        let _turn = lock(&self.turn);
        let mut outcome = Ok(());
        for family in [Family::V4, Family::V6] {
            match nfnl::batch(vec![self.table.remove(family)]) {
                Err(error) if !absent(error.errno()) => outcome = Err(error),
                _ => {}
            }
        }
        *lock(&self.trouble) = None;
        outcome
    }

    /// Why the tables are not there.
    pub(super) fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    /// Whether the tables are as they should be. If not, they are made anew in the background: a status must not wait.
    pub(super) fn watch(self: &Arc<Self>, plan: Plan) -> bool {
        // Whoever has the turn leaves them as they should be.
        let turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => PoisonError::into_inner(turn),
            Err(TryLockError::WouldBlock) => return true,
        };
        // What cannot even be asked for cannot be repaired either: the trouble is told of already.
        if lock(&self.pool).is_empty() || self.intact(plan).unwrap_or(true) {
            return true;
        }
        // Without the guard.
        self.set_route_localnet(false);
        drop(turn);
        let rules = self.clone();
        let repair = move || match rules.ensure(plan, false) {
            Ok(()) => tracing::warn!(
                table = rules.table.name,
                "a table of nf_tables was changed, and is made anew"
            ),
            Err(error) => {
                tracing::warn!(table = rules.table.name, %error, "a table of nf_tables is not repaired");
            }
        };
        if let Err(error) = std::thread::Builder::new()
            .name("nf_tables".to_owned())
            .spawn(repair)
        {
            tracing::warn!(%error, "no thread to repair nf_tables");
        }
        false
    }

    /// Whether all rules and elements are there, by their numbers.
    fn intact(&self, plan: Plan) -> Result<bool> {
        let forwards = lock(&self.pool).forwards();
        for (family, expected) in self.table.expected(plan) {
            let (mut rules, mut elements) = (0, 0);
            nfnl::dump(self.table.ask_rules(family), |_| rules += 1)?;
            for map in MAPS {
                self.elements(family, map, |_, _| elements += 1)?;
            }
            let ours = forwards
                .iter()
                .filter(|forward| table::family_of(forward) == family);
            if (rules, elements) != (expected, ours.count()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    #[cfg(test)]
    pub(super) fn count_elements(&self) -> Result<usize> {
        let mut elements = 0;
        for family in [Family::V4, Family::V6] {
            for map in MAPS {
                self.elements(family, map, |_, _| elements += 1)?;
            }
        }
        Ok(elements)
    }

    fn replace(&self, plan: Plan) -> Result<()> {
        let mut forwards = lock(&self.pool).forwards();
        forwards.retain(|forward| plan.has(forward));
        let outcome = nfnl::batch(self.table.replace(plan, &forwards));
        *lock(&self.trouble) = outcome.as_ref().err().map(ToString::to_string);
        self.set_route_localnet(outcome.is_ok() && !forwards.is_empty());
        outcome
    }

    /// Removes the elements of pods of which `gone` holds. How many pods there were.
    pub(super) fn remove_elements(&self, gone: impl Fn(&str) -> bool) -> Result<usize> {
        let mut requests = Vec::new();
        let mut pods: Vec<String> = Vec::new();
        for family in [Family::V4, Family::V6] {
            for map in MAPS {
                let mut keys = Vec::new();
                self.elements(family, map, |pod, key| {
                    if gone(pod) {
                        keys.push(key.to_vec());
                        pods.push(pod.to_owned());
                    }
                })?;
                requests.extend(self.table.delete(family, map, keys));
            }
        }
        if requests.is_empty() {
            return Ok(0);
        }
        pods.sort_unstable();
        pods.dedup();
        match nfnl::batch(requests) {
            // Somebody removed them meanwhile, or all of the table.
            Err(error) if error.errno() != Errno::ENOENT => Err(error),
            _ => Ok(pods.len()),
        }
    }

    /// Calls `each` with the pod and the key of every element; a table that is not there has none.
    fn elements(&self, family: Family, map: &str, mut each: impl FnMut(&str, &[u8])) -> Result<()> {
        let answered = nfnl::dump(self.table.ask_elements(family, map), |answer| {
            for (pod, key) in table::elements_of(answer) {
                each(pod, key);
            }
        });
        match answered {
            Err(error) if !absent(error.errno()) => Err(error),
            _ => Ok(()),
        }
    }

    /// Packets from 127.0.0.1 may go to the bridge, and come back, while a port of the host leads to a pod, and only
    /// while `guard` is there, which lets in nothing else.
    fn set_route_localnet(&self, on: bool) {
        let name = format!("net/ipv4/conf/{}/route_localnet", self.table.bridge);
        let set = |proc: Procfs| proc.sysctl(&name, if on { "1" } else { "0" });
        match Procfs::visible().and_then(set) {
            // No bridge.
            Err(error) if error.errno() != Errno::ENOENT => {
                tracing::warn!(%error, "ports of the host do not lead from 127.0.0.1 to pods");
            }
            _ => {}
        }
    }
}

/// There is no such table; or no such family, in a kernel without IPv6; or no nf_tables at all, which a dump finds
/// invalid.
fn absent(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::EINVAL
    )
}
