//! Pods connected by CNI plugins, by the specification 0.1.0 to 1.1.0.
//!
//! The network is the first valid configuration of the configuration directory. What a pod is connected with is in its
//! record before any plugin runs – configuration, arguments, values of capabilities – and what the plugins answered is
//! there before anybody is told: so a pod is taken down by what it was made with, whatever the directory says by then.
//!
//! - `conf`: configurations; `watch`: their directories; `template`: one made from the node's pod addresses
//! - `arguments`: what a pod's request says to plugins
//! - `plugin`: one run of one plugin; `groups`: the cgroup that it has; `result`: its answer
//! - `state`: what is in force, and whether its plugins are ready

mod arguments;
mod conf;
mod error;
mod groups;
mod plugin;
mod result;
mod state;
mod template;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use self::conf::{Chain, Plugin, Version};
use self::groups::Groups;
use self::plugin::{Binary, Command, Deadline, UNKNOWN_CONTAINER};
use self::state::State;
use crate::{AttachOptions, lock};
pub use conf::ConfError;
pub use error::CniError;
pub use watch::Watch;

/// The name that the pod's interface gets.
const INTERFACE: &str = "eth0";
/// Settings of CNI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniConfig {
    /// Where network configurations are.
    pub conf_dir: PathBuf,
    /// Where plugins are looked for, in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// How long the plugins of one pod may take for one operation, all together.
    pub timeout: Duration,
    /// A template of a configuration, for nodes where nobody else brings one.
    pub template: Option<PathBuf>,
    /// Where the node's pod addresses are kept, as the kubelet has told them.
    pub pod_cidr_file: Option<PathBuf>,
}

/// What taking a pod down by CNI needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniRecord {
    /// The configuration that the pod is connected with, complete, as JSON.
    pub conf: String,
    /// The name of its interface.
    pub interface: String,
    /// `CNI_ARGS`, in order.
    pub args: Vec<(String, String)>,
    /// Values of the capabilities that the plugins declare.
    pub capabilities: Map<String, Value>,
    /// Where the plugins were.
    pub bin_dirs: Vec<PathBuf>,
    /// What the last plugin answered; none as long as the pod is not connected.
    #[serde(default)]
    pub result: Option<Value>,
    /// What the last plugin before the one that failed answered: plugins find what they made by it.
    #[serde(default)]
    pub partial: Option<Value>,
}

/// The plugins' side of the pods' networks.
pub(crate) struct CniNetwork {
    config: CniConfig,
    state: Mutex<State>,
    /// ADD and DEL hold it to read, GC to write: it must run alone.
    gate: RwLock<()>,
    /// Where plugins run; none: where we do.
    groups: Option<Groups>,
}

impl Default for CniConfig {
    fn default() -> CniConfig {
        CniConfig {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into()],
            timeout: Duration::from_secs(90),
            template: None,
            pod_cidr_file: None,
        }
    }
}

impl CniRecord {
    /// Addresses of the pod, the primary one first; none as long as it is not connected.
    pub(crate) fn ips(&self) -> Vec<std::net::IpAddr> {
        let ips =
            || result::addresses(self.result.as_ref()?, self.chain().ok()?.version, &self.interface).ok();
        ips().unwrap_or_default()
    }

    /// The name of the network.
    pub(crate) fn network(&self) -> Option<String> {
        self.chain().ok().map(|chain| chain.name)
    }

    fn chain(&self) -> Result<Chain, CniError> {
        Chain::parse(self.conf.as_bytes()).map_err(|source| CniError::Conf {
            place: "of the pod's record".to_owned(),
            source,
        })
    }
}

impl CniNetwork {
    /// Looks at the configuration that is there. Runs nothing.
    pub(crate) fn new(config: CniConfig) -> CniNetwork {
        let kept = config.pod_cidr_file.as_ref();
        let kept = kept.and_then(|file| conf::read_file(file).ok());
        let kept = kept.and_then(|bytes| template::parse_cidrs(String::from_utf8(bytes).ok()?.trim()));
        let network = CniNetwork {
            config,
            state: Mutex::new(State::new(kept.unwrap_or_default())),
            gate: RwLock::default(),
            groups: None,
        };
        network.reload();
        network
    }

    /// Has plugins run in cgroups from now on, and kills what those of an earlier daemon are still doing.
    pub(crate) fn contain(&mut self, instance: &str) -> coracle_cgroup::Result<()> {
        self.groups = Some(Groups::take_over(instance)?);
        Ok(())
    }

    /// What a pod will be connected with; nothing has been done yet.
    pub(crate) fn plan(&self, pod: &str, options: &AttachOptions) -> Result<CniRecord, crate::Error> {
        let current = || lock(&self.state).network.clone();
        let chain = match current() {
            Some((_, chain)) => chain,
            None => {
                // It may have come a moment ago.
                self.reload();
                let why = || lock(&self.state).trouble.clone().unwrap_or_default();
                current().ok_or_else(|| crate::Error::NotReady(why()))?.1
            }
        };
        // A pod that cannot be connected for want of a plugin leaves nothing that its other plugins must undo.
        for plugin in &chain.plugins {
            Binary::find(&plugin.kind, &self.config.bin_dirs)?;
        }
        let pod_cidrs = lock(&self.state).pod_cidrs.clone();
        let mut capabilities = arguments::capabilities(options, &pod_cidrs)?;
        capabilities.retain(|name, _| chain.declares(name));
        Ok(CniRecord {
            conf: chain.to_text(),
            interface: INTERFACE.to_owned(),
            args: arguments::arguments(pod, &options.identity)?,
            capabilities,
            bin_dirs: self.config.bin_dirs.clone(),
            result: None,
            partial: None,
        })
    }

    /// Runs ADD through the chain; what the last plugin answered is on the record then, also after a failure.
    pub(crate) fn add(&self, pod: &str, record: &mut CniRecord, netns: &Path) -> Result<(), CniError> {
        let mut previous = None;
        let added = self.add_each(pod, record, netns, &mut previous);
        match added {
            Ok(()) => record.result = previous,
            Err(_) => record.partial = previous,
        }
        added
    }

    fn add_each(
        &self,
        pod: &str,
        record: &CniRecord,
        netns: &Path,
        previous: &mut Option<Value>,
    ) -> Result<(), CniError> {
        let chain = record.chain()?;
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let deadline = Deadline::after(self.config.timeout);
        let place = Place {
            pod,
            record,
            netns: Some(netns),
        };
        let mut ips = Vec::new();
        for plugin in &chain.plugins {
            let answer = self.run(Command::Add, &chain, plugin, place, previous.as_ref(), deadline)?;
            let rubbish = |why| CniError::Rubbish {
                plugin: plugin.kind.clone(),
                why,
            };
            let result = result::parse(&answer, chain.version).map_err(rubbish)?;
            // Checked for each: it is the one plugin's fault and not the last one's.
            ips = result::addresses(&result, chain.version, &record.interface).map_err(rubbish)?;
            *previous = Some(result);
        }
        if ips.is_empty() {
            return Err(CniError::NoAddress {
                network: chain.name.clone(),
                interface: record.interface.clone(),
            });
        }
        Ok(())
    }

    /// Runs DEL through the chain, backwards. `netns` is none where the namespace is gone.
    pub(crate) fn delete(&self, pod: &str, record: &CniRecord, netns: Option<&Path>) -> Result<(), CniError> {
        let chain = record.chain()?;
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let deadline = Deadline::after(self.config.timeout);
        let place = Place { pod, record, netns };
        // As libraries of other runtimes have it: earlier versions did not know of it.
        let previous = record.result.as_ref().or(record.partial.as_ref());
        let previous = previous.filter(|_| chain.version >= Version::V040);
        for plugin in chain.plugins.iter().rev() {
            match self.run(Command::Del, &chain, plugin, place, previous, deadline) {
                Ok(_)
                | Err(CniError::Refused {
                    code: UNKNOWN_CONTAINER,
                    ..
                }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Runs CHECK through the chain, where the configuration allows it.
    pub(crate) fn check(&self, pod: &str, record: &CniRecord, netns: &Path) -> Result<(), CniError> {
        let chain = record.chain()?;
        let Some(previous) = record.result.as_ref() else {
            return Ok(());
        };
        if chain.version < Version::V040 || chain.disable_check {
            return Ok(());
        }
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let deadline = Deadline::after(self.config.timeout);
        let place = Place {
            pod,
            record,
            netns: Some(netns),
        };
        for plugin in &chain.plugins {
            self.run(Command::Check, &chain, plugin, place, Some(previous), deadline)?;
        }
        Ok(())
    }

    fn run(
        &self,
        command: Command,
        chain: &Chain,
        plugin: &Plugin,
        place: Place<'_>,
        previous: Option<&Value>,
        deadline: Deadline,
    ) -> Result<Vec<u8>, CniError> {
        let mut extra = Map::new();
        let values: Map<_, _> = place
            .record
            .capabilities
            .iter()
            .filter(|(name, _)| plugin.declares(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !values.is_empty() {
            extra.insert("runtimeConfig".to_owned(), values.into());
        }
        if let Some(previous) = previous {
            extra.insert("prevResult".to_owned(), previous.clone());
        }
        // Plugins may have moved since; a daemon without CNI knows of no other places.
        let mut dirs = self.config.bin_dirs.clone();
        let old = place.record.bin_dirs.iter();
        dirs.extend(old.filter(|dir| !self.config.bin_dirs.contains(dir)).cloned());
        let netns = place.netns.map(|netns| netns.display().to_string());
        let env = [
            ("CNI_COMMAND", command.as_str().to_owned()),
            ("CNI_CONTAINERID", place.pod.to_owned()),
            ("CNI_NETNS", netns.unwrap_or_default()),
            ("CNI_IFNAME", place.record.interface.clone()),
            ("CNI_ARGS", arguments::arguments_text(&place.record.args)),
            ("CNI_PATH", plugin::dirs_text(&dirs)),
            ("PATH", path()),
        ];
        let binary = Binary::find(&plugin.kind, &dirs)?;
        let group = self.groups.as_ref().and_then(Groups::begin);
        binary.run(
            command,
            &env,
            &request(chain, plugin, extra),
            deadline,
            group.as_ref(),
        )
    }

    /// Runs a command that is about no pod.
    fn run_alone(
        &self,
        command: Command,
        plugin: &Plugin,
        request: &[u8],
        deadline: Deadline,
    ) -> Result<(), CniError> {
        let env = [
            ("CNI_COMMAND", command.as_str().to_owned()),
            ("CNI_PATH", plugin::dirs_text(&self.config.bin_dirs)),
            ("PATH", path()),
        ];
        let binary = Binary::find(&plugin.kind, &self.config.bin_dirs)?;
        let group = self.groups.as_ref().and_then(Groups::begin);
        binary
            .run(command, &env, request, deadline, group.as_ref())
            .map(drop)
    }
}

/// Of which pod a plugin is asked.
#[derive(Clone, Copy)]
struct Place<'a> {
    pod: &'a str,
    record: &'a CniRecord,
    netns: Option<&'a Path>,
}

/// A plugin's request: its own configuration, and what the specification adds. `capabilities` stays in it, though the
/// specification would have it removed: every other runtime leaves it, and plugins that run others read it.
fn request(chain: &Chain, plugin: &Plugin, extra: Map<String, Value>) -> Vec<u8> {
    let mut request = plugin.conf.clone();
    request.insert("name".to_owned(), chain.name.as_str().into());
    request.insert("cniVersion".to_owned(), chain.version.as_str().into());
    request.extend(extra);
    Value::Object(request).to_string().into_bytes()
}

/// Where plugins find programs of the host, such as iptables.
fn path() -> String {
    let usual = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    std::env::var("PATH")
        .ok()
        .filter(|path| !path.is_empty())
        .unwrap_or_else(|| usual.to_owned())
}

#[cfg(test)]
mod reference_tests;
#[cfg(test)]
pub(crate) mod tests;
