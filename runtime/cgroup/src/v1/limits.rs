//! Limits on v1, through the cgroups-rs crate; what it has no call for (burst, idle, blkio, hugetlb, network, rdma) is
//! written here.
//!
//! The crate works on paths. It is given `/proc/self/fd/N` of the directory that we hold, so that it too stays on
//! what was checked.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use cgroups_rs::MaxValue;
use cgroups_rs::cpu::CpuController;
use cgroups_rs::cpuset::CpuSetController;
use cgroups_rs::memory::MemController;
use cgroups_rs::pid::PidController;
use coracle_kernel::{Errno, Error as KernelError, fd};
use coracle_spec::oci::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use crate::dir::Dir;
use crate::{DevicePolicy, Error, Result, device_rules, is_page_size};

/// Finds the leaf in the hierarchy of a controller.
type LeafOf<'a> = dyn Fn(&str) -> Option<&'a Dir> + 'a;

/// Refuses what v1 cannot do, before anything is made.
pub(crate) fn check(resources: &LinuxResources) -> Result<()> {
    if resources
        .unified()
        .as_ref()
        .is_some_and(|unified| !unified.is_empty())
    {
        return Err(Error::Limit(
            "linux.resources.unified has no meaning on cgroup v1".to_owned(),
        ));
    }
    for limit in resources.hugepage_limits().as_deref().unwrap_or_default() {
        if !is_page_size(limit.page_size()) {
            let size = limit.page_size();
            return Err(Error::Limit(format!(
                "linux.resources.hugepageLimits: {size:?} is no page size like \"2MB\""
            )));
        }
    }
    Ok(())
}

/// Controllers that `resources` needs.
pub(crate) fn controllers(resources: &LinuxResources, devices: DevicePolicy) -> Vec<&'static str> {
    let cpu = resources.cpu().as_ref();
    let given = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    let cpus = cpu.is_some_and(|cpu| given(cpu.cpus()) || given(cpu.mems()));
    let time = cpu.is_some_and(|cpu| {
        cpu.shares().is_some_and(|shares| shares != 0)
            || cpu.quota().is_some_and(|quota| quota > 0)
            || cpu.period().is_some_and(|period| period != 0)
            || cpu.idle().is_some()
            || cpu.burst().is_some()
            || cpu.realtime_runtime().is_some()
            || cpu.realtime_period().is_some()
    });
    let network = resources.network().as_ref();
    let asked = [
        (
            devices == DevicePolicy::Enforce || device_rules::restrict(resources),
            "devices",
        ),
        (resources.memory().as_ref().is_some_and(limits_memory), "memory"),
        (time, "cpu"),
        (cpus, "cpuset"),
        (
            resources.pids().as_ref().is_some_and(|pids| pids.limit() >= 0),
            "pids",
        ),
        (resources.block_io().is_some(), "blkio"),
        (
            resources
                .hugepage_limits()
                .as_ref()
                .is_some_and(|limits| !limits.is_empty()),
            "hugetlb",
        ),
        (
            resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()),
            "rdma",
        ),
        (
            network.is_some_and(|network| network.class_id().is_some()),
            "net_cls",
        ),
        (
            network.is_some_and(|network| network.priorities().is_some()),
            "net_prio",
        ),
    ];
    asked
        .into_iter()
        .filter_map(|(asked, name)| asked.then_some(name))
        .collect()
}

/// Puts limits into force. A limit whose hierarchy has no leaf is an error that names it.
pub(crate) fn apply<'a>(resources: &LinuxResources, leaf: &LeafOf<'a>, path: &str) -> Result<()> {
    let need = |controller: &'static str, file: &str| {
        leaf(controller).ok_or_else(|| Error::NoController {
            controller: controller.to_owned(),
            file: file.to_owned(),
            path: path.to_owned(),
        })
    };
    if let Some(pids) = resources.pids() {
        match leaf("pids") {
            Some(dir) => {
                let limit = if pids.limit() < 0 {
                    MaxValue::Max
                } else {
                    MaxValue::Value(pids.limit().max(1))
                };
                let set = PidController::new(by_descriptor(dir), false).set_pid_max(limit);
                through(dir, "pids.max", &limit.to_string(), set)?;
            }
            None if pids.limit() < 0 => {}
            None => return Err(need("pids", "pids.max").err().unwrap_or(Error::Frozen)),
        }
    }
    if let Some(given) = resources
        .memory()
        .as_ref()
        .filter(|given| limits_memory(given) || leaf("memory").is_some())
    {
        memory(need("memory", "memory.limit_in_bytes")?, given)?;
    }
    if let Some(given) = resources.cpu() {
        cpu(given, &need)?;
        for (file, value) in [("cpuset.cpus", given.cpus()), ("cpuset.mems", given.mems())] {
            if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
                let dir = need("cpuset", file)?;
                let controller = CpuSetController::new(by_descriptor(dir), false);
                let set = if file == "cpuset.cpus" {
                    controller.set_cpus(value)
                } else {
                    controller.set_mems(value)
                };
                through(dir, file, value, set)?;
            }
        }
    }
    if let Some(given) = resources.block_io() {
        block_io(need("blkio", "blkio.weight")?, given)?;
    }
    for limit in resources.hugepage_limits().as_deref().unwrap_or_default() {
        let dir = need(
            "hugetlb",
            &format!("hugetlb.{}.limit_in_bytes", limit.page_size()),
        )?;
        let value = limit.limit().to_string();
        dir.write(&format!("hugetlb.{}.limit_in_bytes", limit.page_size()), &value)?;
        // Reservations have a limit of their own since 5.7.
        optional(
            dir,
            &format!("hugetlb.{}.rsvd.limit_in_bytes", limit.page_size()),
            &value,
        )?;
    }
    if let Some(devices) = resources.rdma() {
        for (device, limit) in devices.iter().collect::<BTreeMap<_, _>>() {
            let mut value = device.clone();
            if let Some(handles) = limit.hca_handles() {
                value.push_str(&format!(" hca_handle={handles}"));
            }
            if let Some(objects) = limit.hca_objects() {
                value.push_str(&format!(" hca_object={objects}"));
            }
            need("rdma", "rdma.max")?.write("rdma.max", &value)?;
        }
    }
    if let Some(network) = resources.network() {
        if let Some(id) = network.class_id() {
            need("net_cls", "net_cls.classid")?.write("net_cls.classid", &id.to_string())?;
        }
        for priority in network.priorities().as_deref().unwrap_or_default() {
            let value = format!("{} {}", priority.name(), priority.priority());
            need("net_prio", "net_prio.ifpriomap")?.write("net_prio.ifpriomap", &value)?;
        }
    }
    Ok(())
}

/// Gives each cpuset on the way to `path` its parent's processors and nodes where it has none.
pub(crate) fn inherit_cpuset(root: &Dir, path: &str) -> Result<()> {
    let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
    let mut above = [root.try_read("cpuset.cpus")?, root.try_read("cpuset.mems")?];
    for end in ends {
        let Some(dir) = root.find(&path[..end])? else {
            return Ok(());
        };
        for (file, above) in ["cpuset.cpus", "cpuset.mems"].into_iter().zip(&mut above) {
            let own = dir.try_read(file)?;
            match (&own, &above) {
                (Some(own), Some(above)) if own.trim().is_empty() => dir.write(file, above.trim())?,
                (None, _) | (Some(_), None) => {}
                (Some(_), Some(_)) => *above = own,
            }
        }
    }
    Ok(())
}

fn limits_memory(memory: &LinuxMemory) -> bool {
    let set = |value: Option<i64>| value.is_some_and(|value| value > 0);
    set(memory.limit())
        || set(memory.reservation())
        || set(memory.swap())
        || memory.swappiness().is_some()
        || memory.disable_oom_killer() == Some(true)
}

fn memory(dir: &Dir, given: &LinuxMemory) -> Result<()> {
    let controller = MemController::new(by_descriptor(dir), false);
    let limit = given.limit().filter(|limit| *limit != 0);
    // Memory without limit means swap without limit, unless told otherwise.
    let swap = given
        .swap()
        .filter(|swap| *swap != 0)
        .or(limit.filter(|limit| *limit == -1));
    if let (Some(limit), Some(swap)) = (limit, swap)
        && swap != -1
        && (limit == -1 || swap < limit)
    {
        return Err(Error::Limit(
            "memory+swap limit should be >= memory limit".to_owned(),
        ));
    }
    if given.check_before_update() == Some(true)
        && let Some(limit) = limit.and_then(|limit| u64::try_from(limit).ok())
        && let Ok(usage) = dir.read("memory.usage_in_bytes")?.trim().parse::<u64>()
        && limit <= usage
    {
        return Err(Error::Limit(format!(
            "rejecting memory limit {limit} <= usage {usage}"
        )));
    }
    let set_limit = || match limit {
        Some(limit) => through(
            dir,
            "memory.limit_in_bytes",
            &limit.to_string(),
            controller.set_limit(limit),
        )
        .map_err(|error| over_usage(dir, limit, error)),
        None => Ok(()),
    };
    let set_swap = || match swap {
        Some(swap) => {
            let file = "memory.memsw.limit_in_bytes";
            // A kernel that does not account swap has no such file; "no swap" and "any swap" are what it does then.
            if (swap == -1 || Some(swap) == limit) && dir.try_read(file)?.is_none() {
                return Ok(());
            }
            through(dir, file, &swap.to_string(), controller.set_memswap_limit(swap))
        }
        None => Ok(()),
    };
    // Memory may never exceed memory and swap: the order depends on which way both move.
    match set_limit() {
        Ok(()) => set_swap()?,
        Err(error) if swap.is_some() && error.errno() == Some(Errno::EINVAL) => {
            set_swap()?;
            set_limit()?;
        }
        Err(error) => return Err(error),
    }
    if let Some(reservation) = given.reservation().filter(|reservation| *reservation != 0) {
        let set = controller.set_soft_limit(reservation);
        through(dir, "memory.soft_limit_in_bytes", &reservation.to_string(), set)?;
    }
    if let Some(swappiness) = given.swappiness() {
        if swappiness > 100 {
            return Err(Error::Limit(format!(
                "invalid memory swappiness value: {swappiness}, valid is 0 to 100"
            )));
        }
        through(
            dir,
            "memory.swappiness",
            &swappiness.to_string(),
            controller.set_swappiness(swappiness),
        )?;
    }
    if given.disable_oom_killer() == Some(true) {
        through(dir, "memory.oom_control", "1", controller.disable_oom_killer())?;
    }
    Ok(())
}

/// EBUSY says that more is used than the new limit allows, and that it cannot be reclaimed.
fn over_usage(dir: &Dir, limit: i64, error: Error) -> Error {
    if error.errno() != Some(Errno::EBUSY) {
        return error;
    }
    let number = |file| {
        dir.read(file)
            .map(|text| text.trim().to_owned())
            .unwrap_or_default()
    };
    Error::Limit(format!(
        "unable to set memory limit to {limit} (current usage: {}, peak usage: {})",
        number("memory.usage_in_bytes"),
        number("memory.max_usage_in_bytes")
    ))
}

fn cpu<'a>(given: &LinuxCpu, need: &dyn Fn(&'static str, &str) -> Result<&'a Dir>) -> Result<()> {
    let number = |file: &'static str, value: String| need("cpu", file)?.write(file, &value);
    if let Some(idle) = given.idle() {
        number("cpu.idle", idle.to_string())?;
    }
    // An idle group has no weight and refuses one.
    if let Some(shares) = given
        .shares()
        .filter(|shares| *shares != 0 && given.idle() != Some(1))
    {
        let dir = need("cpu", "cpu.shares")?;
        let set = CpuController::new(by_descriptor(dir), false).set_shares(shares);
        through(dir, "cpu.shares", &shares.to_string(), set)?;
    }
    let quota = given.quota().filter(|quota| *quota != 0);
    let period = given.period().filter(|period| *period != 0);
    let set_period = || match period {
        Some(period) => {
            let dir = need("cpu", "cpu.cfs_period_us")?;
            let set = CpuController::new(by_descriptor(dir), false).set_cfs_period(period);
            through(dir, "cpu.cfs_period_us", &period.to_string(), set)
        }
        None => Ok(()),
    };
    // The kernel holds quota over period against the parent's, so the period may have to come second; the burst is
    // held against the quota.
    let period_first = set_period();
    let burst = || {
        given
            .burst()
            .map_or(Ok(()), |burst| number("cpu.cfs_burst_us", burst.to_string()))
    };
    let burst_first = burst();
    // "No quota" is how a new group begins: that alone needs no leaf.
    if let Some(quota) = quota {
        match need("cpu", "cpu.cfs_quota_us") {
            Err(_) if quota < 0 => {}
            dir => {
                let dir = dir?;
                let set = CpuController::new(by_descriptor(dir), false).set_cfs_quota(quota.max(-1));
                through(dir, "cpu.cfs_quota_us", &quota.to_string(), set)?;
            }
        }
    }
    for (first, again) in [
        (period_first, &set_period as &dyn Fn() -> Result<()>),
        (burst_first, &burst),
    ] {
        match first {
            Err(error) if quota.is_some() && error.errno() == Some(Errno::EINVAL) => again()?,
            other => other?,
        }
    }
    if let Some(period) = given.realtime_period().filter(|period| *period != 0) {
        number("cpu.rt_period_us", period.to_string())?;
    }
    if let Some(runtime) = given.realtime_runtime().filter(|runtime| *runtime != 0) {
        number("cpu.rt_runtime_us", runtime.to_string())?;
    }
    Ok(())
}

fn block_io(dir: &Dir, given: &LinuxBlockIo) -> Result<()> {
    // BFQ's file has the kernel's default name only where no older scheduler has it.
    let weight_file = |old: &'static str, bfq: &'static str| {
        Ok::<&str, Error>(if dir.try_read(old)?.is_some() { old } else { bfq })
    };
    if let Some(weight) = given.weight().filter(|weight| *weight != 0) {
        dir.write(
            weight_file("blkio.weight", "blkio.bfq.weight")?,
            &weight.to_string(),
        )?;
    }
    if let Some(weight) = given.leaf_weight().filter(|weight| *weight != 0) {
        dir.write("blkio.leaf_weight", &weight.to_string())?;
    }
    for device in given.weight_device().as_deref().unwrap_or_default() {
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let file = weight_file("blkio.weight_device", "blkio.bfq.weight_device")?;
            dir.write(file, &format!("{}:{} {weight}", device.major(), device.minor()))?;
        }
        if let Some(weight) = device.leaf_weight().filter(|weight| *weight != 0) {
            let value = format!("{}:{} {weight}", device.major(), device.minor());
            dir.write("blkio.leaf_weight_device", &value)?;
        }
    }
    let throttle = |devices: &Option<Vec<LinuxThrottleDevice>>, file: &str| {
        devices
            .as_deref()
            .unwrap_or_default()
            .iter()
            .try_for_each(|device| {
                dir.write(
                    file,
                    &format!("{}:{} {}", device.major(), device.minor(), device.rate()),
                )
            })
    };
    throttle(given.throttle_read_bps_device(), "blkio.throttle.read_bps_device")?;
    throttle(
        given.throttle_write_bps_device(),
        "blkio.throttle.write_bps_device",
    )?;
    throttle(
        given.throttle_read_iops_device(),
        "blkio.throttle.read_iops_device",
    )?;
    throttle(
        given.throttle_write_iops_device(),
        "blkio.throttle.write_iops_device",
    )
}

fn optional(dir: &Dir, file: &str, value: &str) -> Result<()> {
    match dir.write(file, value) {
        Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

/// The directory's path for the crate.
pub(super) fn by_descriptor(dir: &Dir) -> PathBuf {
    PathBuf::from(std::ffi::OsStr::from_bytes(fd::proc_path(dir).to_bytes()))
}

/// The crate's answer as ours: which file, which value, and the errno from below its own error.
pub(super) fn through(
    dir: &Dir,
    file: &str,
    value: &str,
    result: cgroups_rs::error::Result<()>,
) -> Result<()> {
    let Err(error) = result else { return Ok(()) };
    let errno = error
        .source()
        .and_then(|source| source.downcast_ref::<std::io::Error>());
    let errno = errno
        .and_then(std::io::Error::raw_os_error)
        .map_or(Errno::EIO, Errno::from_raw);
    Err(Error::Write {
        file: file.to_owned(),
        value: value.to_owned(),
        path: format!("/{}", dir.path()),
        source: KernelError::new("write", format!("{file:?}, {value:?}"), errno),
    })
}
