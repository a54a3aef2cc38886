//! What is done besides requests: the configuration is watched, and what failed is tried again.
//!
//! Nothing here has a thread of its own: the daemon calls [`Network::refresh`] and [`Network::retry`] when their
//! time has come.

use std::time::{Duration, Instant};

use crate::cni::Watch;
use crate::{Mode, Network, Result, Wiring, chain_text, check_pod, step};

/// Pods that could not be taken down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// Those that are to be tried again now, the one that has waited longest first.
    pub pods: Vec<String>,
    /// How long until the next other one is to be; none if there is none.
    pub next: Option<Duration>,
}

impl Network {
    /// Which pods are to be tried again by [`Network::retry`], each after a pause that grows; `busy` ones are being
    /// tried already.
    pub fn due(&self, busy: impl Fn(&str) -> bool) -> Due {
        let now = Instant::now();
        let (pods, next) = self.failures.due(now, busy);
        Due {
            pods,
            next: next.map(|next| next.saturating_duration_since(now)),
        }
    }

    /// Tries again to take down a pod that is due. Whether it is down now. As long as its plugins hang.
    pub fn retry(&self, pod: &str) -> bool {
        let _turn = self.turns.take(pod);
        // Somebody else may have been at it meanwhile.
        if !self.failures.is_due(pod, Instant::now()) {
            return false;
        }
        match self.detach_now(pod) {
            Ok(()) => {
                tracing::info!(pod, "the pod's network is taken down at last");
                true
            }
            Err(error) => {
                tracing::warn!(
                    pod,
                    error = chain_text(&error),
                    "the pod's network is not taken down yet"
                );
                false
            }
        }
    }

    /// Asks the plugins whether a pod's network is as they made it.
    pub fn check(&self, pod: &str) -> Result<()> {
        check_pod(pod)?;
        let _turn = self.turns.take(pod);
        match self.rows.get(pod) {
            Some(Wiring::Cni(record)) => Ok(self.cni.check(pod, &record, &self.pins.path(pod))?),
            _ => Ok(()),
        }
    }

    /// A watch for [`Network::refresh`]; none where nothing is to be watched.
    pub fn watch(&self) -> Result<Option<Watch>> {
        match self.mode {
            Mode::Cni(_) => self
                .cni
                .watch()
                .map(Some)
                .map_err(step("watch the CNI configuration")),
            Mode::Bridge(_) => Ok(None),
        }
    }

    /// Looks over what the watch tells of, or what it is time for: configuration, plugins, their status and their
    /// garbage. To be called again after this time, or when the watch is readable.
    pub fn refresh(&self, watch: &mut Watch) -> Result<Duration> {
        let attached = |network: &str| {
            let rows = self.rows.records().into_iter();
            let of_network = rows.filter(|(_, record)| record.network().as_deref() == Some(network));
            of_network.map(|(pod, record)| (pod, record.interface)).collect()
        };
        self.cni
            .refresh(watch, attached)
            .map_err(step("watch the CNI configuration"))
    }

    /// Takes note of the addresses that the node's pods shall have, as the kubelet tells them; only CNI asks for them.
    pub fn set_pod_cidr(&self, cidrs: &str) -> Result<()> {
        match self.mode {
            Mode::Cni(_) => Ok(self.cni.set_pod_cidr(cidrs)?),
            Mode::Bridge(_) => Ok(()),
        }
    }
}
