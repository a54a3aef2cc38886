//! Private memory of the monitors and resident memory of the daemon.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use coracle_integration::cell::Cell;
use coracle_integration::client::Client;
use coracle_integration::daemon::Daemon;
use coracle_integration::image::busybox_layout;
use coracle_integration::request::{container_config, pod_config};

use crate::sample::print_size;

const IMAGE: &str = "bench.example/busybox:1";
const PODS: usize = 50;
const EXECS: usize = 1000;

/// Runs fifty pods of two containers and reads the kernel's own figures.
pub(crate) fn run() -> Result<()> {
    let cell = Cell::new("bench-memory")?;
    let layout = busybox_layout(cell.dir(), "busybox", IMAGE)?;
    let daemon = Daemon::start(&cell, None)?;
    daemon.import(&cell, &layout, IMAGE)?;
    let client = daemon.client()?;
    let logs = cell.subdir("logs")?;
    let mut pods = Vec::new();
    let measured = fill(&client, &logs, &mut pods)
        .and_then(|()| measure(daemon.pid()?))
        .and_then(|()| grow(&client, daemon.pid()?));
    // Whatever has happened: pods outlive the daemon and us.
    for sandbox in pods {
        client.discard_pod(&sandbox)?;
    }
    daemon.terminate()?;
    measured
}

fn fill(client: &Client, logs: &Path, pods: &mut Vec<String>) -> Result<()> {
    for n in 0..PODS {
        let pod = pod_config(&format!("memory{n}"), logs);
        let sandbox = client.run_pod(&pod)?;
        pods.push(sandbox.clone());
        for name in ["one", "two"] {
            let config = container_config(name, IMAGE, &["sleep", "3600"]);
            let id = client.create(&sandbox, &config, &pod)?;
            client.start(&id)?;
        }
    }
    Ok(())
}

fn measure(daemon: u32) -> Result<()> {
    let daemon_kib = field(Path::new(&format!("/proc/{daemon}/status")), "VmRSS:")?;
    let mut private: Vec<u64> = Vec::new();
    for pid in monitors(daemon)? {
        private.push(field(
            Path::new(&format!("/proc/{pid}/smaps_rollup")),
            "Anonymous:",
        )?);
    }
    private.sort_unstable();
    ensure!(
        private.len() == PODS,
        "{} monitors found for {PODS} pods",
        private.len()
    );
    print_size(
        "memory of a monitor with two containers (Anonymous of smaps_rollup)",
        private[0],
        private[PODS / 2],
        "≤ 150 KiB",
    );
    let figure = format!("memory of coracled with {PODS} pods (RSS)");
    print_size(&figure, daemon_kib, daemon_kib, "≤ 20480 KiB");
    Ok(())
}

/// A thousand commands in one container, and what is held of them afterwards.
fn grow(client: &Client, daemon: u32) -> Result<()> {
    let sizes = || -> Result<(u64, u64)> {
        let mut monitors_kib = 0;
        for pid in monitors(daemon)? {
            monitors_kib += field(Path::new(&format!("/proc/{pid}/smaps_rollup")), "Anonymous:")?;
        }
        Ok((
            monitors_kib,
            field(Path::new(&format!("/proc/{daemon}/status")), "VmRSS:")?,
        ))
    };
    let containers = client.containers()?;
    let container = &containers.first().context("there are containers")?.id;
    let execs = |count| -> Result<()> {
        for _ in 0..count {
            client.exec(container, &["true"], Duration::from_secs(10))?;
        }
        Ok(())
    };
    // The first ones bring more of the daemon's program into memory, and come to all of its threads.
    execs(EXECS)?;
    let before = sizes()?;
    execs(EXECS)?;
    let after = sizes()?;
    let grown = |before: u64, after: u64| after.saturating_sub(before);
    let (monitors, daemon) = (grown(before.0, after.0), grown(before.1, after.1));
    print_size(
        &format!("growth of all monitors by {EXECS} more execs (Anonymous)"),
        monitors,
        monitors,
        "0",
    );
    print_size(
        &format!("growth of coracled by {EXECS} more execs (RSS)"),
        daemon,
        daemon,
        "0",
    );
    Ok(())
}

/// The monitors of a daemon: others may be running on this machine, but not in the daemon's mount namespace.
fn monitors(daemon: u32) -> Result<Vec<u32>> {
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let ours = namespace(daemon);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let is_monitor = command.split(|byte| *byte == 0).nth(1) == Some(b"monitor");
        if is_monitor && is_memfd(pid) && namespace(pid) == ours {
            found.push(pid);
        }
    }
    Ok(found)
}

fn is_memfd(pid: u32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.to_string_lossy().starts_with("/memfd:"))
}

fn field(path: &Path, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("{} has no {name}", path.display()))
}
