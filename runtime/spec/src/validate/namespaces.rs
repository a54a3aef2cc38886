//! Checks of the namespaces, and of what depends on which of them a container has.

use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType as Kind};

use crate::load::Document;
use crate::namespaces::NamespaceKind;

use super::Report;

/// What the container has of one kind.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Has {
    None,
    New,
    Joined,
}

pub(super) fn has(linux: &Linux, kind: Kind) -> Has {
    let mut entries = linux.namespaces().iter().flatten();
    match entries.find(|namespace| namespace.typ() == kind) {
        None => Has::None,
        Some(namespace)
            if namespace
                .path()
                .as_ref()
                .is_some_and(|p| !p.as_os_str().is_empty()) =>
        {
            Has::Joined
        }
        Some(_) => Has::New,
    }
}

/// Checks the list itself.
pub(super) fn namespaces(linux: &Linux, report: &mut Report) {
    let entries = linux.namespaces().as_deref().unwrap_or_default();
    for (i, entry) in entries.iter().enumerate() {
        let field = format!("linux.namespaces[{i}]");
        if entries[..i].iter().any(|earlier| earlier.typ() == entry.typ()) {
            report.error(
                format!("{field}.type"),
                format!("duplicated namespace {:?}", entry.typ()),
            );
        }
        if let Some(path) = entry.path().as_ref().filter(|path| !path.as_os_str().is_empty()) {
            report.absolute(&format!("{field}.path"), &path.to_string_lossy());
        }
    }
    // Without one the container's mounts would be made on the host.
    if has(linux, Kind::Mount) == Has::None {
        report.error("linux.namespaces", "a mount namespace is required");
    }
}

/// Host and domain name need a UTS namespace.
pub(super) fn names(document: &Document, report: &mut Report) {
    let uts = document
        .linux
        .as_ref()
        .map_or(Has::None, |linux| has(linux, Kind::Uts));
    for (field, name) in [
        ("hostname", &document.hostname),
        ("domainname", &document.domainname),
    ] {
        let Some(name) = name.as_deref().filter(|name| !name.is_empty()) else {
            continue;
        };
        report.no_nul(field, name);
        if name.len() > 64 {
            report.error(field, "is longer than 64 bytes");
        }
        if uts == Has::None {
            report.error(
                field,
                format!("unable to set {field} without a private UTS namespace"),
            );
        }
    }
}

/// Mappings and user namespace go together.
pub(super) fn id_mappings(linux: &Linux, report: &mut Report) {
    let lists = [
        ("uidMappings", linux.uid_mappings()),
        ("gidMappings", linux.gid_mappings()),
    ];
    for (name, mappings) in lists {
        let field = format!("linux.{name}");
        let mappings = mappings.as_deref().unwrap_or_default();
        match (has(linux, Kind::User), mappings.is_empty()) {
            (Has::None, false) => {
                report.error(&field, "user namespace mappings specified, but no user namespace");
            }
            (Has::New, true) => {
                report.error(
                    &field,
                    format!("user namespaces enabled, but no {} found", &name[..11]),
                );
            }
            (Has::Joined, false) => report.warn(&field, "is ignored, the joined user namespace has its own"),
            _ => {}
        }
        ranges(&field, mappings, report);
    }
}

fn ranges(field: &str, mappings: &[LinuxIdMapping], report: &mut Report) {
    /// The kernel's limit on lines of a map.
    const MAX: usize = 340;
    if mappings.len() > MAX {
        report.error(
            field,
            format!("has {} ranges, the kernel takes {MAX}", mappings.len()),
        );
        return;
    }
    let clash = |start: u32, size: u32, other: u32, other_size: u32| {
        u64::from(start) < u64::from(other) + u64::from(other_size)
            && u64::from(other) < u64::from(start) + u64::from(size)
    };
    for (i, one) in mappings.iter().enumerate() {
        if one.size() == 0 {
            report.error(format!("{field}[{i}].size"), "is zero");
        }
        let past_end = |start: u32| u64::from(start) + u64::from(one.size()) > u64::from(u32::MAX);
        if past_end(one.container_id()) || past_end(one.host_id()) {
            report.error(format!("{field}[{i}]"), "reaches past the last id");
        }
        let overlaps = mappings[..i].iter().any(|other| {
            clash(one.container_id(), one.size(), other.container_id(), other.size())
                || clash(one.host_id(), one.size(), other.host_id(), other.size())
        });
        if overlaps {
            report.error(format!("{field}[{i}]"), "overlaps an earlier range");
        }
    }
}

/// Offsets belong to a new time namespace.
pub(super) fn time_offsets(linux: &Linux, report: &mut Report) {
    let Some(offsets) = linux
        .time_offsets()
        .as_ref()
        .filter(|offsets| !offsets.is_empty())
    else {
        return;
    };
    match has(linux, Kind::Time) {
        Has::New => {}
        Has::None => report.error("linux.timeOffsets", "time namespace is not enabled"),
        Has::Joined => report.error("linux.timeOffsets", "cannot be set in a joined time namespace"),
    }
    for (clock, offset) in offsets {
        let field = format!("linux.timeOffsets.{clock}");
        if clock != "monotonic" && clock != "boottime" {
            report.error(&field, "is not a clock of a time namespace");
        }
        if offset
            .nanosecs()
            .is_some_and(|nanosecs| nanosecs >= 1_000_000_000)
        {
            report.error(format!("{field}.nanosecs"), "is a second or more");
        }
    }
}

/// Only parameters that live in a namespace of the container's own may be set.
pub(super) fn sysctl(linux: &Linux, report: &mut Report) {
    let entries = linux.namespaces().as_deref().unwrap_or_default();
    let own = |kind: NamespaceKind| {
        entries
            .iter()
            .any(|entry| NamespaceKind::from(entry.typ()) == kind)
    };
    for (name, value) in linux.sysctl().iter().flatten() {
        if let Some(problem) = sysctl_problem(name, value, own) {
            report.error(format!("linux.sysctl.{name}"), problem);
        }
    }
}

/// Why a kernel parameter may not be set by a container with these namespaces of its own; `None`: it may.
#[must_use]
pub fn sysctl_problem(name: &str, value: &str, own: impl Fn(NamespaceKind) -> bool) -> Option<String> {
    const IPC: [&str; 8] = [
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/sem",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/shm_rmid_forced",
    ];
    let Some(path) = sysctl_path(name) else {
        return Some("is not the name of a kernel parameter".to_owned());
    };
    let (kind, article) = match path.as_str() {
        path if IPC.contains(&path) || path.starts_with("fs/mqueue/") => (NamespaceKind::Ipc, "an IPC"),
        path if path.starts_with("net/") => (NamespaceKind::Network, "a network"),
        path if path.starts_with("user/") => (NamespaceKind::User, "a user"),
        "kernel/domainname" => (NamespaceKind::Uts, "a UTS"),
        "kernel/hostname" => return Some("conflicts with the hostname field, set that instead".to_owned()),
        _ => return Some("is not in a separate kernel namespace".to_owned()),
    };
    if !own(kind) {
        Some(format!("is not allowed without {article} namespace"))
    } else if value.contains(['\0', '\n', '\r']) {
        Some("has a value with a line break or NUL byte".to_owned())
    } else {
        None
    }
}

/// The file of a parameter below `/proc/sys`; `None` where the name is none. Whichever separator comes first
/// separates, the other one stands for a dot in a component: `net.ipv4.conf.eth0/1.forwarding` and
/// `net/ipv4/conf/eth0.1/forwarding` are one name.
#[must_use]
pub fn sysctl_path(name: &str) -> Option<String> {
    let first = name.bytes().find(|byte| matches!(byte, b'.' | b'/'))?;
    let path: String = match first {
        b'/' => name.to_owned(),
        _ => name
            .chars()
            .map(|c| match c {
                '/' => '.',
                '.' => '/',
                c => c,
            })
            .collect(),
    };
    let component = |part: &str| !part.is_empty() && part != "." && part != "..";
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
    (path.len() <= 256 && path.bytes().all(known) && path.split('/').all(component)).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_either_separator_are_one() {
        let path = Some("net/ipv4/conf/eth0.1/forwarding".to_owned());
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.1/forwarding"), path);
        assert_eq!(sysctl_path("net.ipv4.conf.eth0/1.forwarding"), path);
    }

    #[test]
    fn hostile_names_are_no_paths() {
        let bad = [
            "",
            "kernel",
            "net..ipv4",
            "net/../kernel/core_pattern",
            "net.//.kernel",
            "net ipv4.x",
            "net.a+kernel.x",
            "/net/a",
            "net/a/",
            "net.a\n",
            "net/./a",
        ];
        for name in bad {
            assert_eq!(sysctl_path(name), None, "{name}");
        }
    }

    #[test]
    fn ranges_must_not_meet() {
        let list = |text: &str| serde_json::from_str::<Vec<LinuxIdMapping>>(text).unwrap();
        let check = |text: &str| {
            let mut report = Report::default();
            ranges("m", &list(text), &mut report);
            report
                .into_result()
                .map_or_else(|findings| findings[0].to_string(), |_| String::new())
        };
        let two = |a: u32, b: u32| {
            format!(
                r#"[{{"containerID":0,"hostID":{a},"size":10}},{{"containerID":10,"hostID":{b},"size":10}}]"#
            )
        };
        assert_eq!(check(&two(100, 110)), "");
        assert_eq!(check(&two(100, 109)), "m[1]: overlaps an earlier range");
        assert_eq!(
            check(r#"[{"containerID":0,"hostID":0,"size":0}]"#),
            "m[0].size: is zero"
        );
        assert_eq!(
            check(r#"[{"containerID":0,"hostID":4294967290,"size":10}]"#),
            "m[0]: reaches past the last id"
        );
        assert_eq!(check(r#"[{"containerID":0,"hostID":0,"size":4294967295}]"#), "");
    }
}
