//! What a pod leaves behind, if it does: processes, mounts, links, network namespaces, cgroups, rules and files.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::cell::{Cell, wait_for};

/// Everything of one kind, by name.
type Names = BTreeSet<String>;

/// A view of all that pods may leave behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    kinds: Vec<(&'static str, Names)>,
}

/// Takes a snapshot of the cell and of what the host shares with it.
pub fn snapshot(cell: &Cell) -> Result<Snapshot> {
    let kinds = vec![
        ("process", processes(cell)),
        ("mount", cell.mounts()?),
        ("link", cell.links()?),
        ("network namespace", lines(&cell.sh("ls /run/netns")?)),
        ("cgroup", cgroups(cell)),
        ("file", pod_files(cell)),
    ];
    Ok(Snapshot { kinds })
}

/// What is in `after` and not in `before`: one entry a kind, empty ones included.
pub fn difference(before: &Snapshot, after: &Snapshot) -> Vec<(&'static str, Vec<String>)> {
    before
        .kinds
        .iter()
        .zip(&after.kinds)
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

/// Removes the cgroups that the kubelet itself made for the node and leaves to its next start; fails when one of
/// them still holds a pod.
pub fn remove_kubelet_cgroups(cell: &Cell) -> Result<()> {
    let root = cell.cgroup();
    wait_for("the pods' cgroups to go", Duration::from_secs(30), || {
        let pods: Vec<_> = cgroups(cell)
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

fn lines(text: &str) -> Names {
    text.lines().map(str::to_owned).collect()
}

/// Processes of the pods, the monitors, the daemon and the kubelet of this cell.
fn processes(cell: &Cell) -> Names {
    let scratch = cell.dir().to_string_lossy().into_owned();
    let cgroup = cell.cgroup();
    let of = |pid: &str| {
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let command = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let groups = String::from_utf8_lossy(&read("cgroup")).into_owned();
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let ours = command.contains(&scratch)
            || groups.contains(&cgroup)
            || groups.contains("/coracle/")
            || exe.to_string_lossy().starts_with("/memfd:coracle");
        ours.then(|| format!("{pid} {command}"))
    };
    numeric_entries("/proc")
        .iter()
        .filter_map(|pid| of(pid))
        .filter(|line| !line.contains("sleep infinity"))
        .collect()
}

fn numeric_entries(dir: &str) -> Vec<String> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .collect()
}

/// Cgroups of the test's own subtree and of coracle's.
fn cgroups(cell: &Cell) -> Names {
    let mut found = Names::new();
    let mut roots = vec![Path::new("/sys/fs/cgroup").to_owned()];
    roots.extend(
        fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path()),
    );
    for root in roots {
        for name in [cell.cgroup().trim_start_matches('/'), "coracle"] {
            walk(&root.join(name), 12, &mut found);
        }
    }
    found
}

/// Files and directories that belong to one pod or container, below the daemon's data and state directories.
fn pod_files(cell: &Cell) -> Names {
    let mut found = Names::new();
    for dir in ["data/containers", "state/pods", "state/monitors"] {
        for entry in fs::read_dir(cell.dir().join(dir)).into_iter().flatten().flatten() {
            found.insert(format!("{dir}/{}", entry.file_name().to_string_lossy()));
        }
    }
    found
}

fn walk(dir: &Path, depth: u32, found: &mut Names) {
    if !dir.is_dir() || depth == 0 {
        return;
    }
    found.insert(dir.to_string_lossy().into_owned());
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), depth - 1, found);
        }
    }
}
