//! What is on the host that a daemon could have left: compared before and after each test.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, bail};
use sha2::{Digest as _, Sha256};

/// Instances whose things are looked for: those of the daemons that this process started, and nobody else's.
static INSTANCES: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Things of the daemon with this data root are looked for from now on.
pub fn watch(root: &Path) {
    // The first 8 digits of the SHA-256 of the canonical data root.
    let canonical = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    let digest = Sha256::digest(canonical.as_os_str().as_encoded_bytes());
    let instance = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    INSTANCES
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(instance);
}

fn is_ours(text: &str) -> bool {
    INSTANCES
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .iter()
        .any(|instance| text.contains(instance.as_str()))
}

/// Names of everything of ours on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Processes in cgroups of ours, and daemons on roots of ours: pid and command line.
    pub processes: BTreeSet<String>,
    /// Lines of mountinfo, without their ids.
    pub mounts: BTreeSet<String>,
    /// Pinned network namespaces.
    pub namespaces: BTreeSet<String>,
    /// Directories of our instances' cgroups.
    pub cgroups: BTreeSet<String>,
    /// Network interfaces of this namespace.
    pub links: BTreeSet<String>,
}

impl Snapshot {
    /// Looks around.
    pub fn take() -> Result<Snapshot> {
        Ok(Snapshot {
            processes: processes()?,
            mounts: mounts(),
            namespaces: names("/run/netns")
                .into_iter()
                .filter(|name| name.starts_with("coracle-"))
                .collect(),
            cgroups: cgroups(),
            links: names("/sys/class/net"),
        })
    }

    /// An error that names whatever is there now and was not `before`.
    pub fn check_no_more_than(&self, before: &Snapshot) -> Result<()> {
        let mut leaks = Vec::new();
        let sets = [
            ("process", &self.processes, &before.processes),
            ("mount", &self.mounts, &before.mounts),
            ("network namespace", &self.namespaces, &before.namespaces),
            ("cgroup", &self.cgroups, &before.cgroups),
            ("network interface", &self.links, &before.links),
        ];
        for (what, now, before) in sets {
            leaks.extend(now.difference(before).map(|leak| format!("{what} {leak}")));
        }
        if !leaks.is_empty() {
            bail!("left behind: {}", leaks.join("; "));
        }
        Ok(())
    }
}

/// Files below a directory that hold something of a pod: empty when all pods are gone.
#[must_use]
pub fn pod_files(root: &Path, state: &Path) -> BTreeSet<String> {
    let mut left = BTreeSet::new();
    for dir in [
        root.join("containers"),
        state.join("pods"),
        state.join("monitors"),
    ] {
        let found = names(&dir.to_string_lossy());
        left.extend(found.into_iter().map(|name| format!("{}/{name}", dir.display())));
    }
    left
}

fn processes() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let pid = entry.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let command = read("cmdline").replace('\0', " ");
        let scratch = format!("/tmp/coracle-it-{}-", std::process::id());
        let ours = command.contains(&scratch) || read("cgroup").lines().any(is_ours);
        // A zombie holds nothing; its parent reaps it when it gets to it.
        let zombie = read("stat")
            .rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'));
        if ours && !zombie {
            found.insert(format!("{pid} {}", command.trim()));
        }
    }
    Ok(found)
}

fn mounts() -> BTreeSet<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(" / ").map(|(_, rest)| rest.to_owned()))
        .collect()
}

fn cgroups() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut roots = vec![Path::new("/sys/fs/cgroup").to_owned()];
    roots.extend(
        names("/sys/fs/cgroup")
            .into_iter()
            .map(|name| Path::new("/sys/fs/cgroup").join(name)),
    );
    for root in roots {
        walk(&root.join("coracle"), &mut found);
    }
    found
}

fn walk(dir: &Path, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    if is_ours(&dir.to_string_lossy()) {
        found.insert(dir.to_string_lossy().into_owned());
    }
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), found);
        }
    }
}

fn names(dir: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
