//! What is kept of a container between calls: `state.json`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use coracle_kernel::signal;
use coracle_spec::{Config, ContainerState, NamespaceKind, Status, rfc3339_nanos};
use serde::{Deserialize, Serialize};

/// The layout of the file; another one is refused.
const VERSION: u32 = 1;

/// The record of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    version: u32,
    /// Its name.
    pub id: String,
    /// Version of the specification that its configuration names.
    pub oci_version: String,
    /// Its bundle, absolute.
    pub bundle: PathBuf,
    /// Its root file system, absolute.
    pub rootfs: PathBuf,
    /// When it was created, RFC 3339.
    pub created: String,
    /// Its init as the host sees it; 0 until there is one.
    pub pid: i32,
    /// When that process started, in clock ticks since boot: with the pid it names one process for ever.
    pub start_time: u64,
    /// Its cgroup, by controller.
    pub cgroup: BTreeMap<String, String>,
    /// Whether its processes have a pid namespace of their own, and so end with the init.
    pub own_pid_namespace: bool,
    /// Whether there are hooks to run at the start.
    pub poststart_hooks: bool,
    /// Whether there are hooks to run at the end.
    pub poststop_hooks: bool,
    /// Annotations of its configuration.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

impl State {
    /// The record of a container that is about to be made.
    pub(crate) fn new(id: &str, config: &Config, bundle: PathBuf, rootfs: PathBuf) -> State {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        State {
            version: VERSION,
            id: id.to_owned(),
            oci_version: config.oci_version.clone(),
            bundle,
            rootfs,
            created: rfc3339_nanos(i64::try_from(now.as_secs()).unwrap_or(0), now.subsec_nanos()),
            pid: 0,
            start_time: 0,
            cgroup: BTreeMap::new(),
            own_pid_namespace: config.namespaces.is_new(NamespaceKind::Pid),
            poststart_hooks: !config.hooks.poststart.is_empty(),
            poststop_hooks: !config.hooks.poststop.is_empty(),
            annotations: config.annotations.clone(),
        }
    }

    /// Whether this program wrote it.
    pub(crate) fn is_known(&self) -> bool {
        self.version == VERSION
    }

    /// Whether the init is there and runs (a zombie does not).
    #[must_use]
    pub fn init_runs(&self) -> bool {
        self.pid > 0
            && Process::look(self.pid).is_some_and(|seen| seen.start_time == self.start_time && seen.runs)
    }

    /// The document that `state` prints.
    #[must_use]
    pub fn document(&self, status: Status) -> ContainerState {
        ContainerState {
            oci_version: self.oci_version.clone(),
            id: self.id.clone(),
            pid: if status == Status::Stopped { 0 } else { self.pid },
            status,
            bundle: self.bundle.display().to_string(),
            rootfs: self.rootfs.display().to_string(),
            created: self.created.clone(),
            annotations: self.annotations.clone(),
            owner: String::new(),
        }
    }
}

/// What `/proc/<pid>/stat` says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) start_time: u64,
    pub(crate) runs: bool,
}

impl Process {
    /// Looks at a process; `None` where there is none.
    pub(crate) fn look(pid: i32) -> Option<Process> {
        if !signal::exists(pid) {
            return None;
        }
        Process::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(stat: &str) -> Option<Process> {
        // The name in parentheses may hold anything, parentheses too.
        let (_, fields) = stat.rsplit_once(") ")?;
        let mut fields = fields.split(' ');
        let runs = !matches!(fields.next()?, "Z" | "X" | "x");
        let start_time = fields.nth(18)?.parse().ok()?;
        Some(Process { start_time, runs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let tail = "S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 1 2";
        let wanted = Some(Process {
            start_time: 4242,
            runs: true,
        });
        assert_eq!(Process::parse(&format!("7 (a) b) {tail}")), wanted);
        assert_eq!(
            Process::parse(&format!("7 (x) {}", tail.replacen('S', "Z", 1))).map(|p| p.runs),
            Some(false)
        );
        assert_eq!(Process::parse("7 (x"), None);
    }

    #[test]
    fn our_own_process_is_seen_running() {
        let own = Process::look(coracle_kernel::clone::own_pid()).unwrap();
        assert!(own.runs && own.start_time > 0);
        assert_eq!(Process::look(0), None);
    }

    #[test]
    fn a_state_survives_the_file() {
        let state = State::new("x", &Config::default(), "/b".into(), "/b/rootfs".into());
        let json = serde_json::to_vec(&state).unwrap();
        assert_eq!(serde_json::from_slice::<State>(&json).unwrap(), state);
        assert!(!state.init_runs());
    }
}
