//! Figures of speed and memory, as ratios against the real peers in the same run: `cargo xtask bench` starts it.
//!
//! Programs come from the environment: `CORACLE`, `CORACLED`, `RUNC`, `CRUN`, `CONTAINERD`, `CTR`, `CNI_PLUGINS`,
//! `STREAMER` and those of a cluster; a peer that is missing is said so, and its rows are left out.

mod cluster;
mod cri;
mod forward;
mod memory;
mod oci;
mod sample;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if !matches!(arguments.as_slice(), [oci::INNER, _]) {
        print_machine();
        sample::print_head();
    }
    match arguments.as_slice() {
        [] => {
            oci::run()?;
            cri::run()?;
            forward::run()?;
            memory::run()?;
            cluster::run()
        }
        ["oci"] => oci::run(),
        [oci::INNER, scratch] => oci::measure(scratch.as_ref()),
        ["cri"] => cri::run(),
        ["forward"] => forward::run(),
        ["memory"] => memory::run(),
        ["cluster"] => cluster::run(),
        other => bail!("unknown arguments {other:?}: nothing, oci, cri, forward, memory or cluster"),
    }
}

/// Figures are those of one machine: which one.
#[allow(clippy::print_stdout, reason = "this is what the program is for")]
fn print_machine() {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = text("/proc/cpuinfo");
    let mut models = cpus.lines().filter(|line| line.starts_with("model name"));
    let model = models.next().and_then(|line| line.split(": ").nth(1));
    let count = std::thread::available_parallelism().map_or(0, usize::from);
    println!(
        "{count} × {}, Linux {}, {}; load before: {}\n",
        model.unwrap_or("unknown processor"),
        text("/proc/sys/kernel/osrelease").trim(),
        std::env::consts::ARCH,
        text("/proc/loadavg")
            .split_whitespace()
            .next()
            .unwrap_or("unknown"),
    );
}
