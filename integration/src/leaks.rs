//! What daemons and pods leave on a host, if they do: processes, mounts, links, network namespaces, cgroups and files.
//!
//! Looked for is what belongs to the daemons that this process started (`watch`), and whatever is new in the mount and
//! network namespaces that are looked at. `tests/cri/oracle.rs` shows that each look can fail.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::cell::{Cell, wait_for};

/// Everything of one kind, by name.
pub type Names = BTreeSet<String>;

/// A view of all that may be left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    kinds: Vec<(&'static str, Names)>,
}

/// A daemon whose things are looked for.
struct Watched {
    /// It is in the names of everything that the daemon makes outside its directories.
    instance: String,
    dir: PathBuf,
}

static WATCHED: Mutex<Vec<Watched>> = Mutex::new(Vec::new());

/// Looks for things of the daemon on these directories from now on; gives the instance.
pub fn watch(dir: &Path) -> String {
    let root = dir.join("root");
    // The first 8 digits of the SHA-256 of the canonical data root.
    let canonical = root.canonicalize().unwrap_or(root);
    let digest = Sha256::digest(canonical.as_os_str().as_encoded_bytes());
    let instance: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    watched().push(Watched {
        instance: instance.clone(),
        dir: dir.to_owned(),
    });
    instance
}

/// What is there in this process's own namespaces.
pub fn snapshot_here() -> Result<Snapshot> {
    take("self", None)
}

/// What is there in a cell's namespaces.
pub fn snapshot(cell: &Cell) -> Result<Snapshot> {
    take(&cell.pid().to_string(), Some(&cell.cgroup()))
}

/// The monitors of the daemons that this process started, by their cgroups.
pub fn monitors() -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("list /proc")? {
        let entry = entry.context("list /proc")?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        if watched()
            .iter()
            .any(|daemon| groups.contains(&format!("/{}/monitors/", daemon.instance)))
        {
            found.push(pid);
        }
    }
    Ok(found)
}

impl Snapshot {
    /// Everything of one kind.
    #[must_use]
    pub fn of(&self, kind: &str) -> Names {
        let found = self.kinds.iter().find(|(name, _)| *name == kind);
        found.map(|(_, names)| names.clone()).unwrap_or_default()
    }
}

/// What is in `after` and not in `before`: one entry a kind, empty ones included.
#[must_use]
pub fn difference(before: &Snapshot, after: &Snapshot) -> Vec<(&'static str, Vec<String>)> {
    let kinds = before.kinds.iter().zip(&after.kinds);
    kinds
        .map(|((kind, old), (_, new))| (*kind, new.difference(old).cloned().collect()))
        .collect()
}

/// Fails with a list when anything is left.
pub fn check(before: &Snapshot, after: &Snapshot) -> Result<()> {
    let left: Vec<_> = difference(before, after)
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .collect();
    ensure!(left.is_empty(), "left behind: {left:#?}");
    Ok(())
}

/// Files and directories that belong to one pod, container or import of the daemon on these directories.
#[must_use]
pub fn pod_files(dir: &Path) -> Names {
    let mut found = Names::new();
    for place in [
        "root/containers",
        "root/content/ingest",
        "state/pods",
        "state/monitors",
    ] {
        let place = dir.join(place);
        found.extend(
            names(&place)
                .iter()
                .map(|name| format!("{}/{name}", place.display())),
        );
    }
    found
}

/// Removes the cgroups that the kubelet itself made for the node and leaves to its next start; fails when one of
/// them still holds a pod.
pub fn remove_kubelet_cgroups(cell: &Cell) -> Result<()> {
    let root = cell.cgroup();
    wait_for("the pods' cgroups to go", Duration::from_secs(30), || {
        let pods: Vec<_> = cgroups(Some(&root))
            .into_iter()
            .filter(|path| path.contains("/pod"))
            .collect();
        ensure!(pods.is_empty(), "left: {pods:?}");
        Ok(Some(()))
    })?;
    cell.sh(&format!(
        "for c in /sys/fs/cgroup /sys/fs/cgroup/*/; do [ ! -d $c{root} ] || find $c{root} -depth -type d -exec rmdir '{{}}' ';'; done"
    ))?;
    Ok(())
}

/// `process` is one in the namespaces that are looked at, `cgroup` another group that pods are in.
fn take(process: &str, cgroup: Option<&str>) -> Result<Snapshot> {
    let proc = Path::new("/proc").join(process);
    let files = watched()
        .iter()
        .flat_map(|daemon| pod_files(&daemon.dir))
        .collect();
    let kinds = vec![
        ("process", processes(cgroup)?),
        ("mount", mounts(&proc)?),
        ("link", links(&proc)?),
        ("network namespace", names(&proc.join("root/run/netns"))),
        ("cgroup", cgroups(cgroup)),
        ("file", files),
    ];
    Ok(Snapshot { kinds })
}

fn watched() -> MutexGuard<'static, Vec<Watched>> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Daemons, monitors, workers, containers: by their arguments or by their cgroups.
fn processes(cgroup: Option<&str>) -> Result<Names> {
    let mut found = Names::new();
    for entry in fs::read_dir("/proc").context("list /proc")? {
        let entry = entry.context("list /proc")?;
        let pid = entry.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let read = |name: &str| {
            let bytes = fs::read(entry.path().join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (command, groups) = (read("cmdline").replace('\0', " "), read("cgroup"));
        let of_daemon = watched().iter().any(|daemon| {
            groups.contains(&daemon.instance) || command.contains(&*daemon.dir.to_string_lossy())
        });
        let in_cgroup = cgroup.is_some_and(|cgroup| groups.contains(cgroup));
        // A monitor that never got into a group of ours.
        let exe = fs::read_link(entry.path().join("exe")).unwrap_or_default();
        let stray = exe.to_string_lossy().starts_with("/memfd:coracle") && !groups.contains("/coracle/");
        // A zombie holds nothing; its parent reaps it when it gets to it.
        let stat = read("stat");
        let state = stat.rsplit_once(')').map_or("", |(_, rest)| rest.trim_start());
        if (of_daemon || in_cgroup || stray) && !state.starts_with('Z') {
            found.insert(format!("{pid} {}", command.trim()));
        }
    }
    Ok(found)
}

/// Mount points with their types; one that is covered counts again.
fn mounts(proc: &Path) -> Result<Names> {
    let path = proc.join("mountinfo");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let mut found = Names::new();
    for line in text.lines() {
        let point = line.split(' ').nth(4).unwrap_or_default();
        // The directory of pins becomes a mount with the first one that anybody on the host makes, and stays one.
        if point == "/run/netns" {
            continue;
        }
        let kind = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').next());
        let name = format!("{point} ({})", kind.unwrap_or_default());
        let again = (1..)
            .map(|n| format!("{name} #{n}"))
            .find(|name| !found.contains(name));
        found.extend(again);
    }
    Ok(found)
}

/// Links of the network namespace, by name. sysfs would show those of the namespace that mounted it.
fn links(proc: &Path) -> Result<Names> {
    let path = proc.join("net/dev");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    Ok(lines.map(|(name, _)| name.trim().to_owned()).collect())
}

/// The watched instances' groups, and all below another one.
fn cgroups(cgroup: Option<&str>) -> Names {
    let mut below: Vec<String> = watched()
        .iter()
        .map(|daemon| format!("coracle/{}", daemon.instance))
        .collect();
    below.extend(cgroup.map(|cgroup| cgroup.trim_start_matches('/').to_owned()));
    let top = Path::new("/sys/fs/cgroup");
    let mut roots = vec![top.to_owned()];
    roots.extend(names(top).iter().map(|name| top.join(name)));
    let mut found = Names::new();
    for root in roots {
        for name in &below {
            walk(&root.join(name), &mut found);
        }
    }
    found
}

fn walk(dir: &Path, found: &mut Names) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    found.insert(dir.to_string_lossy().into_owned());
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), found);
        }
    }
}

fn names(dir: &Path) -> Names {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
