//! The oracle: what is left of a container, and whether the host is as it was.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::host;

/// Everything that still carries the mark, or lies in the state directory, after a short time of grace: a killed
/// process is seen for a moment until somebody has waited for it.
#[must_use]
pub fn wait_gone(mark: &str, state: &Path) -> Vec<String> {
    let end = Instant::now() + host::deadline(3);
    loop {
        let left = [processes(mark), mounts(mark), cgroups(mark), files(state)].concat();
        if left.is_empty() || Instant::now() > end {
            return left;
        }
        #[allow(
            clippy::disallowed_methods,
            reason = "nothing tells when a stranger's process is reaped"
        )]
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Processes with the mark in their arguments or environment.
#[must_use]
pub fn processes(mark: &str) -> Vec<String> {
    let own = std::process::id().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == own || !name.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let read = |file| fs::read(entry.path().join(file)).unwrap_or_default();
        let (command, environment) = (read("cmdline"), read("environ"));
        if contains(&command, mark) || contains(&environment, mark) {
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let status = String::from_utf8_lossy(&read("status"))
                .lines()
                .take(3)
                .collect::<Vec<_>>()
                .join(", ");
            found.push(format!("process {name}: {command} ({status})"));
        }
    }
    found
}

/// Mounts of this mount namespace with the mark in their line.
#[must_use]
pub fn mounts(mark: &str) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter(|l| l.contains(mark))
        .map(|l| format!("mount {l}"))
        .collect()
}

/// Control groups with the mark in their name, in any hierarchy.
#[must_use]
pub fn cgroups(mark: &str) -> Vec<String> {
    let mut found = Vec::new();
    let top = Path::new("/sys/fs/cgroup");
    let mut hierarchies = vec![top.to_path_buf()];
    if !host::cgroup_v2() {
        hierarchies = dirs(top);
    }
    // the suite's cgroups lie at most two levels down; deeper ones have these as parents
    for hierarchy in hierarchies {
        for one in dirs(&hierarchy) {
            for two in dirs(&one).into_iter().chain([one.clone()]) {
                if two.to_string_lossy().contains(mark) {
                    found.push(format!("cgroup {}", two.display()));
                }
            }
        }
    }
    found
}

/// Put right what a failed test has left: end the processes, remove the cgroups.
pub fn sweep(mark: &str) {
    for line in processes(mark) {
        let pid = line
            .trim_start_matches("process ")
            .split(':')
            .next()
            .and_then(|p| p.parse().ok());
        if let Some(pid) = pid {
            host::signal(pid, "KILL");
        }
    }
    let end = Instant::now() + host::deadline(3);
    // children come after their parents in the list, and have to go first
    while !cgroups(mark).is_empty() && Instant::now() < end {
        for line in cgroups(mark).iter().rev() {
            remove_cgroup(Path::new(line.trim_start_matches("cgroup ")));
        }
    }
}

fn remove_cgroup(dir: &Path) {
    for child in dirs(dir) {
        remove_cgroup(&child);
    }
    let _ = fs::remove_dir(dir);
}

/// Whatever lies in a state directory.
fn files(state: &Path) -> Vec<String> {
    let entries = fs::read_dir(state).into_iter().flatten().flatten();
    // a cache that belongs to no container is not a leak
    let entries = entries.filter(|e| !e.file_name().to_string_lossy().starts_with('.'));
    entries.map(|e| format!("state {}", e.path().display())).collect()
}

/// The host as an attacker might change it: writable kernel settings, `/dev`, `/etc`, and a canary directory.
#[derive(Debug)]
pub struct Snapshot {
    canary: PathBuf,
    seen: BTreeMap<String, String>,
}

impl Snapshot {
    /// Look at the host now. `canary` is a directory outside every container.
    #[must_use]
    pub fn take(canary: &Path) -> Self {
        Self {
            canary: canary.to_path_buf(),
            seen: look(canary),
        }
    }

    /// Nothing has changed since.
    ///
    /// # Panics
    /// With the differences, if it has.
    #[track_caller]
    pub fn assert_same(&self) {
        let now = look(&self.canary);
        let mut changed = Vec::new();
        for key in self.seen.keys().chain(now.keys()) {
            if self.seen.get(key) != now.get(key) {
                changed.push(format!("{key}: {:?} -> {:?}", self.seen.get(key), now.get(key)));
            }
        }
        changed.dedup();
        assert!(changed.is_empty(), "the host has changed: {changed:#?}");
    }
}

fn look(canary: &Path) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    sysctls(Path::new("/proc/sys"), &mut seen);
    for file in ["/proc/sys/kernel/core_pattern", "/sys/kernel/uevent_helper"] {
        seen.insert(file.to_owned(), fs::read_to_string(file).unwrap_or_default());
    }
    for dir in ["/dev", "/etc"] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let kind = entry
                .metadata()
                .map(|m| format!("{:o} {}:{} {:x}", m.mode(), m.uid(), m.gid(), m.rdev()));
            seen.insert(entry.path().display().to_string(), kind.unwrap_or_default());
        }
    }
    tree(canary, &mut seen);
    seen
}

/// Settings that other programs on the machine change while we look: counters, and settings of single interfaces.
fn is_noise(path: &Path) -> bool {
    let path = path.to_string_lossy();
    let per_interface = ["/ipv4/conf/", "/ipv6/conf/", "/ipv4/neigh/", "/ipv6/neigh/"]
        .iter()
        .any(|p| path.contains(p));
    per_interface
        || ["ns_last_pid", "/random/", "/binfmt_misc"]
            .iter()
            .any(|p| path.contains(p))
}

fn sysctls(dir: &Path, seen: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(meta) = fs::symlink_metadata(&path) else {
            continue;
        };
        if is_noise(&path) {
            continue;
        }
        if meta.is_dir() {
            sysctls(&path, seen);
        } else if meta.mode() & 0o222 != 0
            && meta.mode() & 0o444 != 0
            && let Ok(text) = fs::read_to_string(&path)
        {
            seen.insert(path.display().to_string(), text);
        }
    }
}

/// Every entry below a directory: kind, owner, link target or content.
fn tree(dir: &Path, seen: &mut BTreeMap<String, String>) {
    let Ok(meta) = fs::symlink_metadata(dir) else {
        return;
    };
    let mut text = format!(
        "{:o} {}:{} {:x} ino {}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.rdev(),
        meta.ino()
    );
    if meta.is_file() {
        text = format!(
            "{text} {:?}",
            fs::read(dir).map(|b| String::from_utf8_lossy(&b).into_owned())
        );
    } else if meta.is_symlink() {
        text = format!("{text} -> {:?}", fs::read_link(dir));
    }
    seen.insert(dir.display().to_string(), text);
    if meta.is_dir() {
        for entry in dirs_and_files(dir) {
            tree(&entry, seen);
        }
    }
}

fn dirs_and_files(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect()
}

fn dirs(dir: &Path) -> Vec<PathBuf> {
    dirs_and_files(dir)
        .into_iter()
        .filter(|p| p.symlink_metadata().is_ok_and(|m| m.is_dir()))
        .collect()
}

fn contains(hay: &[u8], needle: &str) -> bool {
    hay.windows(needle.len()).any(|w| w == needle.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_with_the_mark_is_seen() {
        let mark = format!("leak-control-{}", std::process::id());
        let mut child = Command::new("sleep")
            .arg("60")
            .env("CORACLE_TEST_MARK", &mark)
            .spawn()
            .unwrap();
        let left = wait_gone(&mark, Path::new("/nonexistent"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(left.iter().any(|l| l.starts_with("process ")), "{left:?}");
        assert!(wait_gone(&mark, Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn a_file_in_the_state_directory_is_seen() {
        let state = tempfile::tempdir().unwrap();
        fs::create_dir(state.path().join("box")).unwrap();
        assert_eq!(wait_gone("no-such-mark", state.path()).len(), 1);
    }

    #[test]
    fn a_change_of_the_canary_is_seen() {
        let canary = tempfile::tempdir().unwrap();
        fs::write(canary.path().join("file"), "text").unwrap();
        let before = Snapshot::take(canary.path());
        before.assert_same();
        fs::write(canary.path().join("file"), "other").unwrap();
        assert!(std::panic::catch_unwind(|| before.assert_same()).is_err());
    }
}
