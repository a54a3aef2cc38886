//! Capability names and the five sets of a process, as bit masks.

use crate::validate::Finding;

/// The names of all capabilities, in the order of their numbers.
pub const CAPABILITY_NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The five capability sets of a process; bit `n` stands for capability number `n`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilitySets {
    /// Capabilities that the process and its children may ever have.
    pub bounding: u64,
    /// Capabilities that count now.
    pub effective: u64,
    /// Capabilities kept over `execve` of a file that has them inheritable too.
    pub inheritable: u64,
    /// Capabilities that may be made effective.
    pub permitted: u64,
    /// Capabilities kept over `execve` of an unprivileged file.
    pub ambient: u64,
}

/// The number of a capability, named with or without `CAP_`, in any case.
#[must_use]
pub fn capability_number(name: &str) -> Option<u32> {
    let bare = match name.get(..4) {
        Some(prefix) if prefix.eq_ignore_ascii_case("CAP_") => &name[4..],
        _ => name,
    };
    (0u32..)
        .zip(CAPABILITY_NAMES)
        .find(|(_, known)| known[4..].eq_ignore_ascii_case(bare))
        .map(|(n, _)| n)
}

/// The mask of a list of names. The specification asks for a warning, not a refusal, where a name is unknown.
pub(crate) fn capability_mask(path: &str, names: &[String], warnings: &mut Vec<Finding>) -> u64 {
    let mut mask = 0;
    for (i, name) in names.iter().enumerate() {
        match capability_number(name) {
            Some(number) => mask |= 1 << number,
            None => warnings.push(Finding::new(
                format!("{path}[{i}]"),
                format!("unknown capability {name:?} is ignored"),
            )),
        }
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_any_form() {
        assert_eq!(capability_number("CAP_CHOWN"), Some(0));
        assert_eq!(capability_number("sys_admin"), Some(21));
        assert_eq!(capability_number("cap_checkpoint_restore"), Some(40));
        assert_eq!(capability_number("CAP_"), None);
        assert_eq!(capability_number("CAP_CAP_CHOWN"), None);
        assert_eq!(capability_number(""), None);
        assert_eq!(capability_number("éé"), None);
    }

    #[test]
    fn an_unknown_name_is_a_warning_with_its_path() {
        let mut warnings = Vec::new();
        let names = ["CAP_CHOWN".to_owned(), "CAP_TELEPORT".to_owned()];
        let mask = capability_mask("process.capabilities.bounding", &names, &mut warnings);
        assert_eq!(mask, 1);
        assert_eq!(
            warnings[0].to_string(),
            "process.capabilities.bounding[1]: unknown capability \"CAP_TELEPORT\" is ignored"
        );
    }
}
