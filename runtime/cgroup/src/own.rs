//! The daemon's own groups: `/coracle/<instance>/monitors/<pod>`, `/coracle/<instance>/workers`, and `plugins` and
//! `helpers` there.
//!
//! Monitors are outside the daemon's unit and outside every pod, so that neither a limit nor the end of one reaches
//! them; workers share a bound to their memory and the least weight. Below `plugins` each running CNI plugin has a group
//! with all that it starts; what plugins leave in the background is in `helpers`.

use std::time::Duration;

use coracle_spec::oci::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResources, LinuxResourcesBuilder};

use crate::{Change, DevicePolicy, Error, Host, Location, Manager, Options, Result};

/// What all image workers of an instance may hold in memory: several layers at a time, each with its window.
const WORKERS_MEMORY_BYTES: i64 = 2 << 30;

/// The group above all instances.
const TOP: &str = "coracle";

/// Where the monitor of `pod` is.
pub fn monitor_location(instance: &str, pod: &str) -> Result<Location> {
    top(instance)?.child("monitors")?.child(pod)
}

/// The group of an instance's image workers, made where it is missing: with a bound to their memory and the least weight
/// for the processor, where the host has the controllers.
pub fn make_workers(host: &Host, instance: &str) -> Result<Box<dyn Manager>> {
    let location = workers_location(instance)?;
    match make_own(host, &location, &worker_limits()?) {
        // A group without limits is better than none: it keeps them out of the daemon's own.
        Err(Error::NoController { .. } | Error::NoCgroup { .. }) => {
            make_own(host, &location, &LinuxResources::default())
        }
        made => made,
    }
}

/// Kills the image workers of an instance; true when none is left within `timeout`.
pub fn end_workers(host: &Host, instance: &str, timeout: Duration) -> Result<bool> {
    let group = host.manager(&workers_location(instance)?, Options::default())?;
    if !group.exists() {
        return Ok(true);
    }
    Ok(in_time(group.kill(timeout))? && group.wait_empty(timeout)?)
}

/// The group above those of an instance's running CNI plugins, made where it is missing. It holds no process itself: each
/// run has a sub-group.
pub fn make_plugins(host: &Host, instance: &str) -> Result<Box<dyn Manager>> {
    make_own(host, &plugins_location(instance)?, &LinuxResources::default())
}

/// The group of what CNI plugins have left in the background, made where it is missing.
pub fn make_helpers(host: &Host, instance: &str) -> Result<Box<dyn Manager>> {
    make_own(
        host,
        &top(instance)?.child("helpers")?,
        &LinuxResources::default(),
    )
}

/// Kills what CNI plugins of an instance and all that they have started are still doing, and removes their groups; true
/// when none is left within `timeout`.
pub fn end_plugins(host: &Host, instance: &str, timeout: Duration) -> Result<bool> {
    let mut group = host.manager(&plugins_location(instance)?, Options::default())?;
    if !group.exists() {
        return Ok(true);
    }
    Ok(in_time(group.kill(timeout))? && in_time(group.remove(timeout))?)
}

/// Removes an instance's groups that hold no process; whether none is left.
///
/// For the end of the daemon: groups of running monitors stay.
pub fn remove_own(host: &Host, instance: &str) -> Result<bool> {
    let mut group = host.manager(&top(instance)?, Options::default())?;
    if !group.exists() {
        return Ok(true);
    }
    let removed = in_time(group.remove(Duration::ZERO))?;
    if removed {
        // Shared with other instances: it goes with the last one.
        host.remove_if_empty(TOP);
    }
    Ok(removed)
}

/// Whether it was done before its deadline.
fn in_time(outcome: Result<()>) -> Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(Error::Deadline { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn plugins_location(instance: &str) -> Result<Location> {
    top(instance)?.child("plugins")
}

fn workers_location(instance: &str) -> Result<Location> {
    top(instance)?.child("workers")
}

fn worker_limits() -> Result<LinuxResources> {
    let memory = LinuxMemoryBuilder::default().limit(WORKERS_MEMORY_BYTES).build();
    // The least that there is.
    let cpu = LinuxCpuBuilder::default().shares(2_u64).build();
    let limits = memory.and_then(|memory| LinuxResourcesBuilder::default().memory(memory).cpu(cpu?).build());
    limits.map_err(|error| Error::Limit(error.to_string()))
}

/// The group at `location`, made where it is missing, with `limits` in force. It may hold processes already, and has no
/// device rules.
fn make_own(host: &Host, location: &Location, limits: &LinuxResources) -> Result<Box<dyn Manager>> {
    let options = Options {
        accounting: false,
        devices: DevicePolicy::BestEffort,
    };
    let mut group = host.manager(location, options)?;
    if !group.exists() {
        group.create(limits)?;
    }
    group.apply(limits, Change::Update)?;
    Ok(group)
}

fn top(instance: &str) -> Result<Location> {
    Location::absolute(TOP)?.child(instance)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;
    use crate::testing::{PATIENCE, Shell};

    #[test]
    fn own_groups_are_kept_while_a_monitor_runs() {
        let host = Host::detect().unwrap();
        let instance = format!("coracle-test-{}", std::process::id());
        let location = monitor_location(&instance, "pod-1").unwrap();
        let Ok(group) = make_own(&host, &location, &LinuxResources::default()) else {
            eprintln!("SKIPPED: no right to make a cgroup");
            return;
        };
        if host.kind() == Kind::None || !group.exists() {
            eprintln!("SKIPPED: no cgroups on this host");
            return;
        }
        let shell = Shell::inside(&*group);
        assert_eq!(group.pids().unwrap(), [shell.pid()]);
        make_own(&host, &location, &LinuxResources::default()).unwrap();
        make_workers(&host, &instance).unwrap();

        assert!(!remove_own(&host, &instance).unwrap());
        assert!(group.exists());
        assert!(
            !host
                .manager(&workers_location(&instance).unwrap(), Options::default())
                .unwrap()
                .exists()
        );
        let workers = make_workers(&host, &instance).unwrap();
        // Where the host limits memory at all.
        let files = ["memory/coracle", "coracle"]
            .into_iter()
            .zip(["memory.limit_in_bytes", "memory.max"]);
        for (top, file) in files {
            if let Ok(limit) =
                std::fs::read_to_string(format!("/sys/fs/cgroup/{top}/{instance}/workers/{file}"))
            {
                assert_eq!(limit.trim(), WORKERS_MEMORY_BYTES.to_string());
            }
        }
        let worker = Shell::inside(&*workers);
        assert!(end_workers(&host, &instance, PATIENCE).unwrap());
        drop(worker);
        assert_eq!(group.pids().unwrap(), [shell.pid()], "a monitor is no worker");
        drop(shell);
        assert!(group.wait_empty(PATIENCE).unwrap());
        assert!(remove_own(&host, &instance).unwrap());
        assert!(remove_own(&host, &instance).unwrap());
        monitor_location("../x", "pod").unwrap_err();
    }
}
