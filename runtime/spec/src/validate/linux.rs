//! Checks of the `linux` object.

use oci_spec::runtime::{Linux, LinuxDeviceType};

use crate::mount_options::Propagation;

use super::{Report, namespaces, resources, seccomp};

/// Checks the whole object.
pub(super) fn linux(linux: &Linux, report: &mut Report) {
    unsupported(linux, report);
    namespaces::namespaces(linux, report);
    namespaces::id_mappings(linux, report);
    namespaces::time_offsets(linux, report);
    namespaces::sysctl(linux, report);
    devices(linux, report);
    cgroups_path(linux, report);
    rootfs_propagation(linux, report);
    restricted_paths(linux, report);
    mount_label(linux, report);
    personality(linux, report);
    if let Some(limits) = linux.resources() {
        resources("linux.resources", limits, report);
    }
    if let Some(profile) = linux.seccomp() {
        seccomp("linux.seccomp", profile, report);
    }
}

/// Fields of runtime-spec 1.3 that are not carried out.
fn unsupported(linux: &Linux, report: &mut Report) {
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        report.unsupported("linux.netDevices");
    }
    if linux.intel_rdt().is_some() {
        report.unsupported("linux.intelRdt");
    }
    if linux.memory_policy().is_some() {
        report.unsupported("linux.memoryPolicy");
    }
}

fn devices(linux: &Linux, report: &mut Report) {
    for (i, device) in linux.devices().iter().flatten().enumerate() {
        let field = format!("linux.devices[{i}]");
        report.absolute(&format!("{field}.path"), &device.path().to_string_lossy());
        match device.typ() {
            LinuxDeviceType::A => report.error(format!("{field}.type"), "\"a\" is not a type of device node"),
            LinuxDeviceType::P => {}
            LinuxDeviceType::B | LinuxDeviceType::C | LinuxDeviceType::U => {
                // The kernel's dev_t holds 12 and 20 bits.
                if !(0..1 << 12).contains(&device.major()) {
                    report.error(
                        format!("{field}.major"),
                        format!("{} is no major number", device.major()),
                    );
                }
                if !(0..1 << 20).contains(&device.minor()) {
                    report.error(
                        format!("{field}.minor"),
                        format!("{} is no minor number", device.minor()),
                    );
                }
            }
        }
    }
}

fn cgroups_path(linux: &Linux, report: &mut Report) {
    if let Some(path) = linux.cgroups_path() {
        report.no_nul("linux.cgroupsPath", &path.to_string_lossy());
    }
}

fn rootfs_propagation(linux: &Linux, report: &mut Report) {
    if let Some(word) = linux
        .rootfs_propagation()
        .as_deref()
        .filter(|word| !word.is_empty())
        && Propagation::parse(word).is_none()
    {
        report.error("linux.rootfsPropagation", format!("unknown propagation {word:?}"));
    }
}

fn restricted_paths(linux: &Linux, report: &mut Report) {
    for (name, paths) in [
        ("maskedPaths", linux.masked_paths()),
        ("readonlyPaths", linux.readonly_paths()),
    ] {
        for (i, path) in paths.iter().flatten().enumerate() {
            report.absolute(&format!("linux.{name}[{i}]"), path);
        }
    }
}

/// The label becomes a part of mount data.
fn mount_label(linux: &Linux, report: &mut Report) {
    if linux
        .mount_label()
        .as_ref()
        .is_some_and(|label| label.contains(['\0', '"', '\n']))
    {
        report.error("linux.mountLabel", "is not an SELinux context");
    }
}

fn personality(linux: &Linux, report: &mut Report) {
    let flags = linux
        .personality()
        .as_ref()
        .and_then(|personality| personality.flags().as_ref());
    if flags.is_some_and(|flags| !flags.is_empty()) {
        report.warn(
            "linux.personality.flags",
            "is ignored, the specification defines no flag",
        );
    }
}
