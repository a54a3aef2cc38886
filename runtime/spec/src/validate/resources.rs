//! Checks of the resource limits, as far as no cgroup version matters.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use crate::process::cpu_list;
use crate::resources::memory_swap;

use super::Report;

/// Checks all limits; `path` is where they stand.
pub(crate) fn resources(path: &str, resources: &LinuxResources, report: &mut Report) {
    memory(path, resources, report);
    cpu(path, resources, report);
    pids(path, resources, report);
    block_io(path, resources, report);
    hugepages(path, resources, report);
    unified(path, resources, report);
    for (i, rule) in resources.devices().iter().flatten().enumerate() {
        device_rule(&format!("{path}.devices[{i}]"), rule, report);
    }
}

fn memory(path: &str, resources: &LinuxResources, report: &mut Report) {
    let Some(memory) = resources.memory() else { return };
    for (name, bytes) in [
        ("limit", memory.limit()),
        ("reservation", memory.reservation()),
        ("swap", memory.swap()),
    ] {
        if bytes.is_some_and(|bytes| bytes < -1) {
            report.error(
                format!("{path}.memory.{name}"),
                "is negative, and not -1 for unlimited",
            );
        }
    }
    if let Err(error) = memory_swap(memory.limit(), memory.swap()) {
        report.error(format!("{path}.memory.swap"), error.to_string());
    }
    if memory.swappiness().is_some_and(|swappiness| swappiness > 100) {
        report.error(format!("{path}.memory.swappiness"), "is not between 0 and 100");
    }
    if let (Some(limit), Some(reservation)) = (memory.limit(), memory.reservation())
        && limit > 0
        && reservation > limit
    {
        report.error(format!("{path}.memory.reservation"), "exceeds the limit");
    }
    let kernel = memory.kernel();
    if kernel.is_some() || memory.kernel_tcp().is_some() {
        report.warn(
            format!("{path}.memory.kernel"),
            "is ignored, kernels have no such limit any more",
        );
    }
}

fn cpu(path: &str, resources: &LinuxResources, report: &mut Report) {
    let Some(cpu) = resources.cpu() else { return };
    if cpu.idle().is_some_and(|idle| !(0..=1).contains(&idle)) {
        report.error(format!("{path}.cpu.idle"), "is neither 0 nor 1");
    }
    if cpu
        .period()
        .is_some_and(|period| period != 0 && !(1_000..=1_000_000).contains(&period))
    {
        report.error(
            format!("{path}.cpu.period"),
            "is not between 1000 and 1000000 microseconds",
        );
    }
    if cpu.quota().is_some_and(|quota| quota > 0 && quota < 1_000) {
        report.error(format!("{path}.cpu.quota"), "is below 1000 microseconds");
    }
    for (name, list) in [("cpus", cpu.cpus()), ("mems", cpu.mems())] {
        if let Some(list) = list
            && cpu_list(list).is_none()
        {
            report.error(
                format!("{path}.cpu.{name}"),
                format!("{list:?} is not a list of numbers"),
            );
        }
    }
}

fn pids(path: &str, resources: &LinuxResources, report: &mut Report) {
    if resources.pids().as_ref().is_some_and(|pids| pids.limit() < -1) {
        report.error(
            format!("{path}.pids.limit"),
            "is negative, and not -1 for unlimited",
        );
    }
}

fn block_io(path: &str, resources: &LinuxResources, report: &mut Report) {
    let Some(io) = resources.block_io() else { return };
    let valid = |weight: u16| weight == 0 || (10..=1000).contains(&weight);
    if io.weight().is_some_and(|weight| !valid(weight)) {
        report.error(format!("{path}.blockIO.weight"), "is not between 10 and 1000");
    }
    for (i, device) in io.weight_device().iter().flatten().enumerate() {
        if device.weight().is_some_and(|weight| !valid(weight)) {
            report.error(
                format!("{path}.blockIO.weightDevice[{i}].weight"),
                "is not between 10 and 1000",
            );
        }
    }
}

/// The size becomes a part of a file name.
fn hugepages(path: &str, resources: &LinuxResources, report: &mut Report) {
    for (i, limit) in resources.hugepage_limits().iter().flatten().enumerate() {
        let size = limit.page_size();
        let digits = size
            .trim_end_matches("KB")
            .trim_end_matches("MB")
            .trim_end_matches("GB");
        if digits.is_empty() || digits.len() == size.len() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            report.error(
                format!("{path}.hugepageLimits[{i}].pageSize"),
                format!("{size:?} is not a page size such as \"2MB\""),
            );
        }
    }
}

/// The key is a file name of the cgroup.
fn unified(path: &str, resources: &LinuxResources, report: &mut Report) {
    for key in resources.unified().iter().flatten().map(|(key, _)| key) {
        let well_formed = key.contains('.')
            && !key.starts_with('.')
            && !key.contains("..")
            && key
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if !well_formed {
            report.error(
                format!("{path}.unified"),
                format!("{key:?} is not a file name of a cgroup"),
            );
        }
    }
}

fn device_rule(path: &str, rule: &LinuxDeviceCgroup, report: &mut Report) {
    if let Some(access) = rule.access()
        && !access.bytes().all(|byte| b"rwm".contains(&byte))
    {
        report.error(
            format!("{path}.access"),
            format!("{access:?} holds other letters than r, w, m"),
        );
    }
    if rule.typ() == Some(LinuxDeviceType::P) {
        report.error(
            format!("{path}.type"),
            "a fifo is not under the device controller",
        );
    }
    for (name, number) in [("major", rule.major()), ("minor", rule.minor())] {
        if number.is_some_and(|number| !(-1..=i64::from(u32::MAX)).contains(&number)) {
            report.error(
                format!("{path}.{name}"),
                "is no device number, and not -1 for all",
            );
        }
    }
}
