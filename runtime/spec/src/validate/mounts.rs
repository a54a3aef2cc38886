//! Checks of the mounts.

use oci_spec::runtime::Mount;

use crate::mount_options::{Bind, MountOptions, parse_mount_options};

use super::Report;

/// Checks all mounts.
pub(super) fn mounts(mounts: &[Mount], report: &mut Report) {
    for (i, mount) in mounts.iter().enumerate() {
        let path = format!("mounts[{i}]");
        destination(&path, mount, report);
        id_mappings(&path, mount, report);
        let words = mount.options().iter().flatten().map(String::as_str);
        match parse_mount_options(words) {
            Ok(options) => {
                source(&path, mount, &options, report);
                type_and_data(&path, mount, &options, report);
            }
            Err(error) => report.error(format!("{path}.options"), error.to_string()),
        }
    }
}

fn destination(path: &str, mount: &Mount, report: &mut Report) {
    let destination = mount.destination().to_string_lossy();
    let field = format!("{path}.destination");
    report.no_nul(&field, &destination);
    if destination.is_empty() {
        report.error(field, "missing");
    } else if !destination.starts_with('/') {
        report.warn(
            field,
            format!("{destination:?} is not absolute and is taken from \"/\""),
        );
    }
}

fn id_mappings(path: &str, mount: &Mount, report: &mut Report) {
    if mount
        .uid_mappings()
        .as_ref()
        .is_some_and(|mappings| !mappings.is_empty())
    {
        report.unsupported(format!("{path}.uidMappings"));
    }
    if mount
        .gid_mappings()
        .as_ref()
        .is_some_and(|mappings| !mappings.is_empty())
    {
        report.unsupported(format!("{path}.gidMappings"));
    }
}

fn source(path: &str, mount: &Mount, options: &MountOptions, report: &mut Report) {
    let field = format!("{path}.source");
    match mount.source() {
        Some(source) if !source.as_os_str().is_empty() => report.no_nul(&field, &source.to_string_lossy()),
        _ if options.bind == Bind::No => {}
        _ => report.error(field, "missing for a bind mount"),
    }
}

fn type_and_data(path: &str, mount: &Mount, options: &MountOptions, report: &mut Report) {
    let fstype = mount.typ().as_deref().unwrap_or_default();
    report.no_nul(&format!("{path}.type"), fstype);
    if options.bind != Bind::No {
        if !options.data.is_empty() {
            report.error(
                format!("{path}.options"),
                format!(
                    "bind mounts cannot have any filesystem-specific options, {:?} is one",
                    options.data[0]
                ),
            );
        }
    } else if fstype == "bind" {
        report.error(
            format!("{path}.type"),
            "a mount of type \"bind\" needs the option bind or rbind",
        );
    } else if fstype.is_empty() && !options.remount && options.propagation.is_empty() {
        report.error(format!("{path}.type"), "missing, and the mount is no bind");
    }
    if options.tmpcopyup && fstype != "tmpfs" {
        report.error(format!("{path}.options"), "tmpcopyup is for tmpfs mounts");
    }
}
