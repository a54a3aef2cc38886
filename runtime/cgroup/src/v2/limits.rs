//! Limits as files of the unified hierarchy: a pure list first, then one write each.

use std::borrow::Cow;
use std::collections::BTreeMap;

use coracle_kernel::Errno;
use coracle_spec::oci::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources, LinuxThrottleDevice,
};
use coracle_spec::resources::{cpu_weight, io_weight, limit_text, memory_swap, pids_max};

use crate::dir::Dir;
use crate::{Error, Result, is_page_size};

/// One value for one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    file: Cow<'static, str>,
    value: String,
    how: How,
}

/// What is particular about a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// Write it.
    Plain,
    /// A new group has this value already.
    Default,
    /// The file may be missing: what it says is so without it.
    Optional,
    /// A period for `cpu.max` without a quota: the one in force stays.
    PeriodAlone,
    /// `io.weight`, or the same in BFQ's terms where that scheduler's file is there.
    IoWeight,
    /// Refused while it is larger than the quota in force, which is written later: tried again at the end.
    Burst,
}

/// Controllers that `resources` needs.
pub(crate) fn controllers(resources: &LinuxResources) -> Vec<&str> {
    let mut names = Vec::new();
    // A list that cannot be made is refused when it is applied.
    for setting in settings(resources).unwrap_or_default() {
        if setting.how != How::Default && setting.how != How::Optional {
            let name = match setting.file {
                Cow::Borrowed(file) => controller(file).to_owned(),
                Cow::Owned(file) => controller(&file).to_owned(),
            };
            names.push(name);
        }
    }
    names.sort_unstable();
    names.dedup();
    // Names of known controllers only; what `unified` may name beyond them is for the kernel to know.
    ["cpu", "cpuset", "io", "memory", "pids", "hugetlb", "rdma", "misc"]
        .into_iter()
        .filter(|known| names.iter().any(|name| name == known))
        .collect()
}

/// All settings of `resources`, in the order in which they are written.
pub(crate) fn settings(resources: &LinuxResources) -> Result<Vec<Setting>> {
    let mut list = Vec::new();
    if let Some(pids) = resources.pids() {
        list.push(plain("pids.max", pids_max(pids.limit())));
    }
    if let Some(given) = resources.memory() {
        memory(given, &mut list)?;
    }
    if let Some(given) = resources.block_io() {
        io(given, &mut list)?;
    }
    if let Some(given) = resources.cpu() {
        cpu(given, &mut list)?;
    }
    for limit in resources.hugepage_limits().as_deref().unwrap_or_default() {
        hugetlb(limit, &mut list)?;
    }
    if let Some(devices) = resources.rdma() {
        for (device, limit) in devices.iter().collect::<BTreeMap<_, _>>() {
            if device.is_empty() || device.contains(char::is_whitespace) {
                return Err(Error::Limit(format!(
                    "linux.resources.rdma: {device:?} is no device name"
                )));
            }
            let mut value = device.clone();
            if let Some(handles) = limit.hca_handles() {
                value.push_str(&format!(" hca_handle={handles}"));
            }
            if let Some(objects) = limit.hca_objects() {
                value.push_str(&format!(" hca_object={objects}"));
            }
            list.push(plain("rdma.max", value));
        }
    }
    if let Some(network) = resources.network()
        && (network.class_id().is_some_and(|id| id != 0)
            || network.priorities().as_ref().is_some_and(|list| !list.is_empty()))
    {
        return Err(v1_only("network"));
    }
    // Last, so that what is said in the kernel's own words wins.
    if let Some(unified) = resources.unified() {
        for (file, value) in unified.iter().collect::<BTreeMap<_, _>>() {
            if file.is_empty() || file.contains(['/', '\0']) || !file.contains('.') || file.starts_with('.') {
                return Err(Error::Limit(format!(
                    "linux.resources.unified: {file:?} is no file of a cgroup"
                )));
            }
            if file.starts_with("cgroup.") {
                return Err(Error::Limit(format!(
                    "linux.resources.unified: {file:?} is not a limit"
                )));
            }
            // Several lines are several settings: the kernel takes one a write.
            for line in value.lines() {
                list.push(Setting {
                    file: Cow::Owned(file.clone()),
                    value: line.to_owned(),
                    how: How::Plain,
                });
            }
        }
    }
    Ok(list)
}

/// `memory.checkBeforeUpdate`: a limit below what is used would have the kernel kill for it.
pub(crate) fn check_before_update(dir: &Dir, resources: &LinuxResources) -> Result<()> {
    let Some(memory) = resources.memory() else {
        return Ok(());
    };
    if memory.check_before_update() != Some(true) {
        return Ok(());
    }
    let check = |file: &str, limit: Option<i64>, what: &str| -> Result<()> {
        let Some(limit) = limit
            .and_then(|limit| u64::try_from(limit).ok())
            .filter(|limit| *limit > 0)
        else {
            return Ok(());
        };
        let usage = dir
            .try_read(file)?
            .and_then(|text| text.trim().parse::<u64>().ok())
            .unwrap_or(0);
        if limit <= usage {
            return Err(Error::Limit(format!(
                "rejecting {what} limit {limit} <= usage {usage}"
            )));
        }
        Ok(())
    };
    check("memory.current", memory.limit(), "memory")?;
    let swap = swap_alone(memory)?;
    check("memory.swap.current", swap, "memory+swap")
}

fn memory(given: &LinuxMemory, list: &mut Vec<Setting>) -> Result<()> {
    if given.swappiness().is_some() {
        return Err(v1_only("memory.swappiness"));
    }
    if given.disable_oom_killer() == Some(true) {
        return Err(v1_only("memory.disableOOMKiller"));
    }
    // Before memory.max: lowered the other way round, what no longer fits would be swapped out first.
    if let Some(swap) = swap_alone(given)? {
        let (value, how) = match swap {
            // Without swap on the host there is no file, and both are true.
            -1 => ("max".to_owned(), How::Optional),
            0 => ("0".to_owned(), How::Optional),
            bytes => (bytes.to_string(), How::Plain),
        };
        list.push(Setting {
            file: "memory.swap.max".into(),
            value,
            how,
        });
    }
    let mut bytes = |file: &'static str, value: Option<i64>| match value {
        None | Some(0) => {}
        Some(value) => list.push(plain(file, limit_text(value))),
    };
    bytes("memory.max", given.limit());
    bytes("memory.low", given.reservation());
    Ok(())
}

/// Swap without memory, which is v2's way to count it.
fn swap_alone(given: &LinuxMemory) -> Result<Option<i64>> {
    memory_swap(given.limit(), given.swap()).map_err(|error| Error::Limit(error.to_string()))
}

fn cpu(given: &LinuxCpu, list: &mut Vec<Setting>) -> Result<()> {
    if given.realtime_runtime().is_some_and(|runtime| runtime != 0)
        || given.realtime_period().is_some_and(|period| period != 0)
    {
        return Err(v1_only("cpu.realtimeRuntime and cpu.realtimePeriod"));
    }
    if let Some(idle) = given.idle() {
        list.push(plain("cpu.idle", idle.to_string()));
    }
    // An idle group has no weight and refuses one.
    if let Some(weight) = given
        .shares()
        .and_then(cpu_weight)
        .filter(|_| given.idle() != Some(1))
    {
        let how = if weight == 100 { How::Default } else { How::Plain };
        list.push(Setting {
            file: "cpu.weight".into(),
            value: weight.to_string(),
            how,
        });
    }
    if let Some(burst) = given.burst() {
        list.push(Setting {
            file: "cpu.max.burst".into(),
            value: burst.to_string(),
            how: How::Burst,
        });
    }
    let quota = given.quota().filter(|quota| *quota != 0);
    let period = given.period().filter(|period| *period != 0);
    match (quota, period) {
        (None, None) => {}
        (Some(quota), period) => {
            let quota = limit_text(quota);
            // A quota alone leaves the period in force.
            let value = period.map_or_else(|| quota.clone(), |period| format!("{quota} {period}"));
            let default = quota == "max" && period.is_none_or(|period| period == 100_000);
            list.push(Setting {
                file: "cpu.max".into(),
                value,
                how: if default { How::Default } else { How::Plain },
            });
        }
        (None, Some(period)) => {
            let how = if period == 100_000 {
                How::Default
            } else {
                How::PeriodAlone
            };
            list.push(Setting {
                file: "cpu.max".into(),
                value: period.to_string(),
                how,
            });
        }
    }
    for (file, value) in [("cpuset.cpus", given.cpus()), ("cpuset.mems", given.mems())] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            list.push(plain(file, value.clone()));
        }
    }
    Ok(())
}

fn io(given: &LinuxBlockIo, list: &mut Vec<Setting>) -> Result<()> {
    let weighs = |weight: u16| (10..=1000).contains(&weight);
    if given.leaf_weight().is_some_and(|weight| weight != 0) {
        return Err(v1_only("blockIO.leafWeight"));
    }
    if let Some(weight) = given.weight().filter(|weight| *weight != 0) {
        if !weighs(weight) {
            return Err(Error::Limit(format!(
                "linux.resources.blockIO.weight {weight} is not within 10 and 1000"
            )));
        }
        list.push(Setting {
            file: "io.weight".into(),
            value: weight.to_string(),
            how: How::IoWeight,
        });
    }
    for device in given.weight_device().as_deref().unwrap_or_default() {
        if device.leaf_weight().is_some_and(|weight| weight != 0) {
            return Err(v1_only("blockIO.weightDevice.leafWeight"));
        }
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            list.push(plain(
                "io.bfq.weight",
                format!("{}:{} {weight}", device.major(), device.minor()),
            ));
        }
    }
    let mut throttle = |devices: &Option<Vec<LinuxThrottleDevice>>, key: &str| {
        for device in devices.as_deref().unwrap_or_default() {
            let rate = if device.rate() == 0 {
                "max".to_owned()
            } else {
                device.rate().to_string()
            };
            list.push(plain(
                "io.max",
                format!("{}:{} {key}={rate}", device.major(), device.minor()),
            ));
        }
    };
    throttle(given.throttle_read_bps_device(), "rbps");
    throttle(given.throttle_write_bps_device(), "wbps");
    throttle(given.throttle_read_iops_device(), "riops");
    throttle(given.throttle_write_iops_device(), "wiops");
    Ok(())
}

fn hugetlb(limit: &LinuxHugepageLimit, list: &mut Vec<Setting>) -> Result<()> {
    let size = limit.page_size();
    if !is_page_size(size) {
        return Err(Error::Limit(format!(
            "linux.resources.hugepageLimits: {size:?} is no page size like \"2MB\""
        )));
    }
    let value = limit_text(limit.limit());
    list.push(Setting {
        file: format!("hugetlb.{size}.max").into(),
        value: value.clone(),
        how: How::Plain,
    });
    // Reservations have a limit of their own since 5.7, where the kernel was built with it.
    list.push(Setting {
        file: format!("hugetlb.{size}.rsvd.max").into(),
        value,
        how: How::Optional,
    });
    Ok(())
}

impl Setting {
    /// Puts it into force; one that a `fresh` group has already is left.
    pub(crate) fn write(&self, dir: &Dir, fresh: bool) -> Result<()> {
        if fresh && (self.how == How::Default || self.value == "max" && self.how == How::Plain) {
            return Ok(());
        }
        match self.how {
            How::PeriodAlone => {
                let current = dir.try_read("cpu.max")?.unwrap_or_default();
                let quota = current.split_whitespace().next().unwrap_or("max");
                self.write_value(dir, &self.file, &format!("{quota} {}", self.value))
            }
            How::IoWeight => match dir.write_raw("io.bfq.weight", &self.value) {
                Err(error) if error.errno() == Errno::ENOENT => {
                    let weight = self.value.parse().ok().and_then(io_weight).unwrap_or(100);
                    self.write_value(dir, &self.file, &weight.to_string())
                }
                Ok(()) => Ok(()),
                Err(source) => Err(self.refused(dir, "io.bfq.weight", &self.value, source)),
            },
            How::Optional => match self.write_value(dir, &self.file, &self.value) {
                Err(Error::NoController { .. }) => Ok(()),
                other => other,
            },
            How::Plain | How::Default | How::Burst => self.write_value(dir, &self.file, &self.value),
        }
    }

    fn write_value(&self, dir: &Dir, file: &str, value: &str) -> Result<()> {
        match dir.write_raw(file, value) {
            Ok(()) => Ok(()),
            Err(source) => Err(self.refused(dir, file, value, source)),
        }
    }

    fn refused(&self, dir: &Dir, file: &str, value: &str, source: coracle_kernel::Error) -> Error {
        let path = format!("/{}", dir.path());
        // EPERM too: in a container's own hierarchy a file that is not delegated looks so.
        if matches!(source.errno(), Errno::ENOENT | Errno::EPERM) {
            return Error::NoController {
                controller: controller(file).to_owned(),
                file: file.to_owned(),
                path,
            };
        }
        Error::Write {
            file: file.to_owned(),
            value: value.to_owned(),
            path,
            source,
        }
    }

    /// Whether it must be tried again after the others.
    pub(crate) fn is_burst(&self) -> bool {
        self.how == How::Burst
    }
}

fn plain(file: &'static str, value: String) -> Setting {
    Setting {
        file: Cow::Borrowed(file),
        value,
        how: How::Plain,
    }
}

fn controller(file: &str) -> &str {
    file.split_once('.').map_or(file, |(controller, _)| controller)
}

fn v1_only(field: &str) -> Error {
    Error::Limit(format!("linux.resources.{field} has no meaning on cgroup v2"))
}
