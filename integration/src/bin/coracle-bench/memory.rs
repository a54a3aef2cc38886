//! Private memory of the monitors and resident memory of the daemon.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use coracle_integration::cell::Cell;
use coracle_integration::client::{container_config, pod_config};
use coracle_integration::daemon::Daemon;
use coracle_integration::image::busybox_layout;

const IMAGE: &str = "bench.example/busybox:1";
const PODS: usize = 50;

/// Runs fifty pods of two containers and reads the kernel's own figures.
#[allow(clippy::print_stdout, reason = "this is what the program is for")]
pub(crate) fn run() -> Result<()> {
    let cell = Cell::new("bench-memory")?;
    let layout = busybox_layout(cell.dir(), "busybox", IMAGE)?;
    let daemon = Daemon::start(&cell, None)?;
    daemon.import(&cell, &layout, IMAGE)?;
    let client = daemon.client()?;
    let logs = cell.subdir("logs")?;
    let mut pods = Vec::new();
    for n in 0..PODS {
        let pod = pod_config(&format!("memory{n}"), &logs);
        let sandbox = client.run_pod(&pod)?;
        for name in ["one", "two"] {
            let config = container_config(name, IMAGE, &["sleep", "3600"]);
            let id = client.create(&sandbox, &config, &pod)?;
            client.start(&id)?;
        }
        pods.push(sandbox);
    }
    let daemon_kib = field(Path::new(&format!("/proc/{}/status", daemon.pid()?)), "VmRSS:")?;
    let mut private: Vec<u64> = Vec::new();
    for pid in monitors(&cell)? {
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
    println!("\n### Memory with {PODS} pods of two containers\n");
    println!("| what | KiB |\n| --- | --- |");
    println!(
        "| a monitor, anonymous (smaps_rollup), median | {} |",
        private[PODS / 2]
    );
    println!("| a monitor, anonymous, largest | {} |", private[PODS - 1]);
    println!("| coracled, RSS | {daemon_kib} |");
    for sandbox in pods {
        client.discard_pod(&sandbox)?;
    }
    daemon.terminate()
}

/// The monitors of the cell's daemon: they name their pod's state directory.
fn monitors(cell: &Cell) -> Result<Vec<u32>> {
    let state = cell.dir().join("state").display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains("monitor")
            && (command.contains(&state) || is_memfd(pid))
            && !command.contains("--root")
        {
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
