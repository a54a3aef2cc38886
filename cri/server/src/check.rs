//! `coracled check`: can this host run it? One line a finding, with the cure.

use std::fs;
use std::process::ExitCode;

use anyhow::Result;
use coracle_cgroup::{Host, Kind};
use coracle_kernel::{landlock, probe};

use crate::args::Serve;
use crate::config::Config;
use crate::startup;

/// Whether a finding keeps the daemon from running.
enum Weight {
    Good,
    Note,
    Bad,
}

/// Prints the findings; the exit status is 1 when one of them keeps the daemon from running.
pub(crate) fn check(flags: &Serve) -> Result<ExitCode> {
    let config = Config::load(flags.config.as_deref())?;
    let findings = [
        kernel(),
        cgroups(),
        runtime(&config),
        workers(),
        forwarding(),
        root_file_system(),
    ];
    let mut code = ExitCode::SUCCESS;
    for (weight, text) in findings {
        let word = match weight {
            Weight::Good => "ok  ",
            Weight::Note => "note",
            Weight::Bad => {
                code = ExitCode::FAILURE;
                "BAD "
            }
        };
        crate::answer(format_args!("{word} {text}"))?;
    }
    Ok(code)
}

fn kernel() -> (Weight, String) {
    match probe::kernel_version() {
        Ok((major, minor)) if (major, minor) >= startup::OLDEST_KERNEL => match probe::missing_call() {
            None => (Weight::Good, format!("kernel {major}.{minor}")),
            Some(call) => (
                Weight::Bad,
                format!(
                    "kernel {major}.{minor} lacks the system call {call}: allow it in whatever runs coracled"
                ),
            ),
        },
        Ok((major, minor)) => (
            Weight::Bad,
            format!("kernel {major}.{minor} is too old: install 5.14 or newer"),
        ),
        Err(error) => (Weight::Bad, format!("kernel version: {error}")),
    }
}

fn cgroups() -> (Weight, String) {
    match Host::detect().map(|host| host.kind()) {
        Ok(Kind::Unified) => (Weight::Good, "cgroup v2".into()),
        Ok(Kind::V1) => (
            Weight::Note,
            "cgroups are v1 or hybrid: they work; boot with systemd.unified_cgroup_hierarchy=1 for v2, and set the kubelet's failCgroupV1: false until then".into(),
        ),
        Ok(Kind::None) => (Weight::Bad, "no cgroup file system is mounted: mount cgroup2 at /sys/fs/cgroup".into()),
        Err(error) => (Weight::Bad, format!("cgroups: {error}; mount cgroup2 at /sys/fs/cgroup")),
    }
}

fn runtime(config: &Config) -> (Weight, String) {
    match startup::find_runtime(config) {
        Ok(path) => (Weight::Good, format!("runtime {}", path.display())),
        Err(error) => (Weight::Bad, format!("{error:#}")),
    }
}

fn workers() -> (Weight, String) {
    match landlock::abi() {
        Some(abi) if abi >= 2 => (Weight::Good, format!("Landlock ABI {abi} confines the image workers")),
        _ => (Weight::Note, "no Landlock (ABI 2 or newer): image workers are confined by namespaces, user and capabilities alone; add landlock to the kernel's lsm= list".into()),
    }
}

fn forwarding() -> (Weight, String) {
    match fs::read_to_string("/proc/sys/net/ipv4/ip_forward")
        .as_deref()
        .map(str::trim)
    {
        Ok("1") => (Weight::Good, "IPv4 forwarding is on".into()),
        _ => (
            Weight::Note,
            "IPv4 forwarding is off: pods reach this node alone; sysctl -w net.ipv4.ip_forward=1".into(),
        ),
    }
}

fn root_file_system() -> (Weight, String) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let on_ramdisk = mounts
        .lines()
        .any(|line| line.split(' ').nth(4) == Some("/") && line.contains(" - rootfs "));
    if on_ramdisk {
        return (Weight::Note, "the root is the initramfs, which pivot_root refuses: coracle needs --no-pivot here, and coracled a real root".into());
    }
    (
        Weight::Good,
        "the root file system can be pivoted away from".into(),
    )
}
