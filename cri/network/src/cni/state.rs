//! The network in force: read from the configuration directory, asked whether it is ready, told which pods there are.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coracle_kernel::Error as KernelError;
use serde_json::{Map, json};

use super::conf::{self, Chain, Loaded, Version};
use super::plugin::{Binary, Command, Deadline};
use super::{CniError, CniNetwork, Watch, request, template};
use crate::{Finding, chain_text, lock};

/// The file that a template becomes.
const RENDERED: &str = "10-coracle-net.conflist";
/// How long STATUS and GC may take: nobody waits for STATUS, and everybody for GC.
const STATUS_TIME: Duration = Duration::from_secs(10);
const GC_TIME: Duration = Duration::from_secs(20);
/// How often plugins are asked for their status, and how often while they refuse.
const STATUS_PERIODS: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(5));
/// How long what was read stands where no change of the directories is told of: mounts over them are not.
const PERIOD: Duration = Duration::from_secs(60);

/// What is known of the network; read from memory by everybody who asks.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The configuration in force, and its file.
    pub(super) network: Option<(PathBuf, Chain)>,
    /// Why there is none, or why it cannot work.
    pub(super) trouble: Option<String>,
    /// What its plugins answered when they were asked whether they are ready.
    refused: Option<String>,
    findings: Vec<Finding>,
    pub(super) pod_cidrs: Vec<String>,
    /// The configuration whose plugins have been told which pods there are.
    collected: Option<String>,
    /// How many times reading the directory was begun, and which of them this is what was read.
    begun: u64,
    read: u64,
    /// When all of this is to be looked over again.
    due: Option<Instant>,
}

/// What was read of the configuration directory.
struct Read {
    /// The how many-th time.
    number: u64,
    loaded: Result<Loaded, KernelError>,
    /// The plugin that is not there.
    missing: Option<String>,
}

impl State {
    pub(super) fn new(pod_cidrs: Vec<String>) -> State {
        State {
            pod_cidrs,
            ..State::default()
        }
    }
}

impl CniNetwork {
    /// Why no pod can be connected, and what else there is to say; from memory.
    pub(crate) fn status(&self) -> (Option<String>, Vec<Finding>) {
        let state = lock(&self.state);
        let not_ready = state.trouble.clone().or_else(|| state.refused.clone());
        (not_ready, state.findings.clone())
    }

    /// A watch over everything that the network depends on.
    pub(crate) fn watch(&self) -> Result<Watch, KernelError> {
        Watch::new()
    }

    /// Takes the watch's news. If there are any, or it is time: reads the configuration again, asks its plugins for
    /// their status, and tells them after a change which pods there are (`attached`: container and interface, by
    /// network). How long until the next time.
    pub(crate) fn refresh(
        &self,
        watch: &mut Watch,
        attached: impl Fn(&str) -> Vec<(String, String)>,
    ) -> Result<Duration, KernelError> {
        let changed = watch.take()?;
        let now = Instant::now();
        if let Some(due) = lock(&self.state).due.filter(|due| !changed && *due > now) {
            return Ok(due - now);
        }
        let mut dirs = self.dirs();
        watch.arm(&dirs)?;
        let mut network = self.reload();
        if dirs != self.dirs() {
            // Another network has another folder of plugins; what changed in it before it was watched is read again.
            dirs = self.dirs();
            watch.arm(&dirs)?;
            network = self.reload();
        }
        let mut pause = PERIOD;
        if let Some((file, chain)) = network.filter(|(_, chain)| chain.version >= Version::V110) {
            let refused = self.ask_status(&chain).err().map(|error| {
                let file = file.display();
                format!("the network of {file} is not ready: {}", chain_text(&error))
            });
            pause = if refused.is_some() {
                STATUS_PERIODS.1
            } else {
                STATUS_PERIODS.0
            };
            lock(&self.state).refused = refused;
            if !self.collect(&chain, attached) {
                pause = STATUS_PERIODS.1;
            }
        }
        lock(&self.state).due = Some(Instant::now() + pause);
        Ok(pause)
    }

    /// Takes note of the node's pod addresses, and writes a configuration from the template where nobody else brought
    /// one.
    pub(crate) fn set_pod_cidr(&self, text: &str) -> Result<(), CniError> {
        let cidrs = template::parse_cidrs(text).ok_or_else(|| CniError::Argument {
            name: "pod_cidr",
            why: "is not a list of addresses like 10.0.0.0/16,fd00::/64".to_owned(),
        })?;
        lock(&self.state).pod_cidrs.clone_from(&cidrs);
        if let Some(file) = &self.config.pod_cidr_file {
            replace(file, &cidrs.join(","))?;
        }
        let Some(template) = &self.config.template else {
            return Ok(());
        };
        let rendered = self.config.conf_dir.join(RENDERED);
        if self.reload().is_some_and(|(file, _)| file != rendered) {
            return Ok(());
        }
        let failed = |why: String| CniError::Template {
            place: template.display().to_string(),
            why,
        };
        let bytes = conf::read_file(template).map_err(|error| failed(chain_text(&error)))?;
        let text = String::from_utf8(bytes).map_err(|_| failed("is not UTF-8".to_owned()))?;
        let text = template::render(&text, &cidrs).map_err(failed)?;
        Chain::parse(text.as_bytes())
            .map_err(|error| failed(format!("what it makes {}", chain_text(&error))))?;
        std::fs::create_dir_all(&self.config.conf_dir).map_err(|source| CniError::File {
            step: "make the directory",
            path: self.config.conf_dir.clone(),
            source,
        })?;
        replace(&rendered, &text)?;
        self.reload();
        Ok(())
    }

    /// Reads the configuration directory; what is in force from now on.
    pub(super) fn reload(&self) -> Option<(PathBuf, Chain)> {
        self.put_in_force(self.read())
    }

    fn read(&self) -> Read {
        let number = {
            let mut state = lock(&self.state);
            state.begun += 1;
            state.begun
        };
        let loaded = conf::load(&self.config.conf_dir);
        let missing = loaded.as_ref().ok().and_then(|loaded| {
            let (file, chain) = loaded.network.as_ref()?;
            let mut plugins = chain.plugins.iter();
            let error = plugins.find_map(|plugin| Binary::find(&plugin.kind, &self.config.bin_dirs).err())?;
            Some(format!("{}: {}", file.display(), chain_text(&error)))
        });
        Read {
            number,
            loaded,
            missing,
        }
    }

    fn put_in_force(&self, read: Read) -> Option<(PathBuf, Chain)> {
        let Read {
            number,
            loaded,
            missing,
        } = read;
        let dir = self.config.conf_dir.display();
        let mut state = lock(&self.state);
        // Several may read at once: what was read from an older directory must not come after.
        if number < state.read {
            return state.network.clone();
        }
        state.read = number;
        let before = state.network.take();
        state.findings.clear();
        let Loaded { network, bad } = match loaded {
            Ok(loaded) => loaded,
            Err(error) => {
                state.trouble = Some(format!("the CNI configurations in {dir} cannot be read: {error}"));
                return None;
            }
        };
        let bad: Vec<_> = bad
            .iter()
            .map(|(file, error)| format!("{}: {}", file.display(), chain_text(error)))
            .collect();
        if network.is_none() {
            let way_out = "or set [network] mode = \"bridge\"";
            state.trouble = Some(if bad.is_empty() {
                format!("no CNI configuration in {dir}: put one there, {way_out}")
            } else {
                format!(
                    "no valid CNI configuration in {dir}: correct {}, {way_out}",
                    bad.join("; ")
                )
            });
            return None;
        }
        state.trouble = missing;
        if before != network {
            state.refused = None;
            if let Some((file, chain)) = &network {
                let (file, name) = (file.display(), &chain.name);
                tracing::info!(%file, name, version = chain.version.as_str(), "CNI network");
            }
        }
        state.findings.extend(bad.into_iter().map(|what| Finding {
            what: format!("no valid CNI configuration: {what}"),
            cure: "correct or remove the file".to_owned(),
        }));
        state.network = network;
        state.network.clone()
    }

    fn ask_status(&self, chain: &Chain) -> Result<(), CniError> {
        let deadline = Deadline::after(STATUS_TIME.min(self.config.timeout));
        for plugin in &chain.plugins {
            let request = request(chain, plugin, Map::new());
            self.run_alone(Command::Status, plugin, &request, deadline)?;
        }
        Ok(())
    }

    /// Runs GC where it was not run for this configuration yet. False if it must wait, for pods that come or go.
    fn collect(&self, chain: &Chain, attached: impl Fn(&str) -> Vec<(String, String)>) -> bool {
        let text = chain.to_text();
        if chain.disable_gc || lock(&self.state).collected.as_ref() == Some(&text) {
            return true;
        }
        let Ok(_gate) = self.gate.try_write() else {
            return false;
        };
        let valid = attached(&chain.name).into_iter();
        let valid: Vec<_> = valid
            .map(|(container, interface)| json!({"containerID": container, "ifname": interface}))
            .collect();
        let deadline = Deadline::after(GC_TIME.min(self.config.timeout));
        for plugin in &chain.plugins {
            let mut extra = Map::new();
            // The second name is what the first plugins with GC looked for.
            extra.insert("cni.dev/valid-attachments".to_owned(), json!(valid));
            extra.insert("cni.dev/attachments".to_owned(), json!(valid));
            let request = request(chain, plugin, extra);
            if let Err(error) = self.run_alone(Command::Gc, plugin, &request, deadline) {
                tracing::warn!(error = chain_text(&error), "CNI garbage may be left");
            }
        }
        lock(&self.state).collected = Some(text);
        true
    }

    fn dirs(&self) -> Vec<PathBuf> {
        let mut dirs = vec![self.config.conf_dir.clone()];
        dirs.extend(self.config.bin_dirs.iter().cloned());
        if let Some((_, chain)) = &lock(&self.state).network {
            dirs.push(conf::plugin_dir(&self.config.conf_dir, &chain.name));
        }
        dirs
    }
}

/// Puts a file in the place of another, whole or not at all.
fn replace(file: &Path, text: &str) -> Result<(), CniError> {
    let mut name = std::ffi::OsString::from(".");
    name.push(file.file_name().unwrap_or_default());
    name.push(".tmp");
    let temporary = file.with_file_name(name);
    let write = || -> std::io::Result<()> {
        use std::io::Write as _;
        let mut written = std::fs::File::create(&temporary)?;
        written.write_all(text.as_bytes())?;
        written.sync_all()?;
        std::fs::rename(&temporary, file)
    };
    write().map_err(|source| CniError::File {
        step: "write",
        path: file.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CniConfig;

    #[test]
    fn what_was_read_earlier_does_not_come_into_force_later() {
        let dir = tempfile::tempdir().unwrap();
        let network = CniNetwork::new(CniConfig {
            conf_dir: dir.path().to_owned(),
            ..CniConfig::default()
        });
        let early = network.read();
        std::fs::write(dir.path().join("1.conf"), r#"{"name":"net","type":"x"}"#).unwrap();
        assert!(network.reload().is_some());
        assert!(network.put_in_force(early).is_some());
        assert!(lock(&network.state).network.is_some());
    }
}
