//! The namespaces that a container makes or joins.

use std::path::PathBuf;

use oci_spec::runtime::LinuxNamespaceType;

/// A kind of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NamespaceKind {
    /// Mount points.
    Mount,
    /// cgroup root.
    Cgroup,
    /// Host and domain name.
    Uts,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// User and group ids, capabilities.
    User,
    /// Process ids.
    Pid,
    /// Network devices, addresses, ports.
    Network,
    /// Boot and monotonic clocks.
    Time,
}

impl NamespaceKind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Mount,
        Self::Cgroup,
        Self::Uts,
        Self::Ipc,
        Self::User,
        Self::Pid,
        Self::Network,
        Self::Time,
    ];

    /// The `CLONE_NEW*` bit.
    #[must_use]
    pub const fn clone_flag(self) -> u64 {
        match self {
            Self::Mount => 0x0002_0000,
            Self::Cgroup => 0x0200_0000,
            Self::Uts => 0x0400_0000,
            Self::Ipc => 0x0800_0000,
            Self::User => 0x1000_0000,
            Self::Pid => 0x2000_0000,
            Self::Network => 0x4000_0000,
            Self::Time => 0x0000_0080,
        }
    }

    /// The word of the specification.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mount => "mount",
            Self::Cgroup => "cgroup",
            Self::Uts => "uts",
            Self::Ipc => "ipc",
            Self::User => "user",
            Self::Pid => "pid",
            Self::Network => "network",
            Self::Time => "time",
        }
    }

    /// The file below `/proc/<pid>/ns`.
    #[must_use]
    pub const fn proc_name(self) -> &'static str {
        match self {
            Self::Mount => "mnt",
            Self::Network => "net",
            other => other.name(),
        }
    }
}

impl From<LinuxNamespaceType> for NamespaceKind {
    fn from(kind: LinuxNamespaceType) -> Self {
        match kind {
            LinuxNamespaceType::Mount => Self::Mount,
            LinuxNamespaceType::Cgroup => Self::Cgroup,
            LinuxNamespaceType::Uts => Self::Uts,
            LinuxNamespaceType::Ipc => Self::Ipc,
            LinuxNamespaceType::User => Self::User,
            LinuxNamespaceType::Pid => Self::Pid,
            LinuxNamespaceType::Network => Self::Network,
            LinuxNamespaceType::Time => Self::Time,
        }
    }
}

/// What a container does about one kind of namespace that its configuration names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// Make a new one.
    New,
    /// Join the one at this absolute path.
    Join(PathBuf),
}

/// The namespaces of a container, at most one of a kind; a kind that is absent is the runtime's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    // In the order of the configuration: it is short, and joins keep the author's order.
    entries: Vec<(NamespaceKind, Namespace)>,
}

impl Namespaces {
    /// What the configuration says of this kind; `None`: stay in the runtime's.
    #[must_use]
    pub fn get(&self, kind: NamespaceKind) -> Option<&Namespace> {
        self.entries.iter().find(|(k, _)| *k == kind).map(|(_, n)| n)
    }

    /// Whether the container has a namespace of this kind apart from the runtime's, new or joined.
    #[must_use]
    pub fn contains(&self, kind: NamespaceKind) -> bool {
        self.get(kind).is_some()
    }

    /// Whether a new namespace of this kind is made.
    #[must_use]
    pub fn is_new(&self, kind: NamespaceKind) -> bool {
        self.get(kind) == Some(&Namespace::New)
    }

    /// Adds or replaces the entry of one kind.
    pub fn set(&mut self, kind: NamespaceKind, namespace: Namespace) {
        self.entries.retain(|(k, _)| *k != kind);
        self.entries.push((kind, namespace));
    }

    /// All entries, in the order of the configuration.
    pub fn iter(&self) -> impl Iterator<Item = (NamespaceKind, &Namespace)> {
        self.entries.iter().map(|(k, n)| (*k, n))
    }

    /// The `CLONE_NEW*` bits of all new namespaces.
    #[must_use]
    pub fn clone_flags(&self) -> u64 {
        self.entries
            .iter()
            .filter(|(_, n)| *n == Namespace::New)
            .fold(0, |bits, (k, _)| bits | k.clone_flag())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_new_namespaces_are_clone_flags() {
        let mut namespaces = Namespaces::default();
        namespaces.set(NamespaceKind::Pid, Namespace::New);
        namespaces.set(NamespaceKind::Mount, Namespace::New);
        namespaces.set(NamespaceKind::Network, Namespace::Join("/run/netns/a".into()));
        assert_eq!(namespaces.clone_flags(), 0x2002_0000);
        assert!(namespaces.contains(NamespaceKind::Network));
        assert!(!namespaces.is_new(NamespaceKind::Network));
        assert!(!namespaces.contains(NamespaceKind::User));
        namespaces.set(NamespaceKind::Pid, Namespace::Join("/proc/1/ns/pid".into()));
        assert_eq!(namespaces.clone_flags(), 0x0002_0000);
    }
}
