//! Which namespaces a container makes and joins, and the order of joining.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use coracle_kernel::namespace::{self, Kind, Kinds};
use coracle_kernel::{Errno, Error};
use coracle_spec::{Namespace, NamespaceKind, Namespaces};

/// The namespaces of one process to be, opened before anything is changed.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Made for it.
    pub(crate) new: Kinds,
    /// Joined, in the order of the configuration.
    join: Vec<(Kind, OwnedFd)>,
    /// Or those of a whole process, joined at once.
    process: Option<(OwnedFd, Kinds)>,
    /// A user namespace was joined, and is no longer among the above.
    user: bool,
    /// What the container is given is gathered in a mount namespace between the host's and its own.
    pub(crate) gathers: bool,
}

/// A namespace that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot join the {kind} namespace at {path:?}")]
pub struct OpenError {
    kind: &'static str,
    path: PathBuf,
    #[source]
    source: Error,
}

impl Plan {
    /// Opens every namespace that is joined: a path may lead through what a later join changes.
    pub(crate) fn open(namespaces: &Namespaces) -> Result<Plan, OpenError> {
        let mut plan = Plan::default();
        for (kind, namespace) in namespaces.iter() {
            match namespace {
                Namespace::New => plan.new |= kernel_kind(kind).flag(),
                Namespace::Join(path) => {
                    let fd = namespace::open(path, kernel_kind(kind)).map_err(|source| OpenError {
                        kind: kind.name(),
                        path: path.clone(),
                        source,
                    })?;
                    plan.join.push((kernel_kind(kind), fd));
                }
            }
        }
        Ok(plan)
    }

    /// The namespaces of a running process behind a pidfd, of these kinds.
    pub(crate) fn of_process(pidfd: OwnedFd, kinds: Kinds) -> Plan {
        Plan {
            process: Some((pidfd, kinds)),
            ..Plan::default()
        }
    }

    /// Whether this kind is joined.
    pub(crate) fn joins(&self, kind: Kind) -> bool {
        self.join.iter().any(|(joined, _)| *joined == kind)
            || self
                .process
                .as_ref()
                .is_some_and(|(_, kinds)| kinds.contains(kind.flag()))
    }

    /// Whether the process will be in a user namespace other than ours.
    pub(crate) fn user(&self) -> bool {
        self.user || self.new.contains(Kinds::USER) || self.joins(Kind::User)
    }

    /// Whether one clone is not enough.
    ///
    /// Namespaces belong to the user namespace in which they are made, and namespaces of others can be joined only
    /// before ours is made: so where a user namespace meets a join, a process between joins first and clones then.
    /// The clock offsets of a new time namespace are written before anybody is in it, and a joined pid namespace takes
    /// in only children. What is gathered for a user namespace is gathered by somebody outside of it. And what joins a running container is to be seen there only once it holds nothing of the host.
    pub(crate) fn needs_two_clones(&self) -> bool {
        self.process.is_some()
            || self.gathers
            || self.joins(Kind::User)
            || self.joins(Kind::Pid)
            || self.new.contains(Kinds::TIME)
            || (self.new.contains(Kinds::USER) && !self.join.is_empty())
    }

    /// Gives up the descriptors of what was joined without closing them: somebody closes them by number.
    pub(crate) fn forget(&mut self) {
        self.user = self.user();
        let process = self.process.take().map(|(pidfd, _)| pidfd);
        let others = std::mem::take(&mut self.join).into_iter().map(|(_, fd)| fd);
        others.chain(process).for_each(std::mem::forget);
    }

    /// Whether the clone of the init is made by somebody who may not put it into its cgroup: whose ids are not the
    /// host's, or who has entered a cgroup namespace, from which a delegated tree shows no way from the host's groups
    /// into the container's (ENOENT).
    pub(crate) fn clones_as_stranger(&self) -> bool {
        self.joins(Kind::User) || self.joins(Kind::Cgroup)
    }

    /// What the clone of the init makes: all but the cgroup namespace, whose root is the group that the process is in
    /// when it is made (the clone itself would take the parent's), and what [`Plan::needs_two_clones`] made before.
    pub(crate) fn clone_flags(&self) -> Kinds {
        self.new.difference(Kinds::CGROUP | Kinds::TIME)
    }

    /// Joins: first all but the user namespace, then that one, then again those that only its owner may join. The
    /// mount namespace is last, because joining it moves root and working directory.
    pub(crate) fn join(&self) -> Result<(), Error> {
        if let Some((pidfd, kinds)) = &self.process {
            return namespace::enter_process(pidfd, *kinds);
        }
        let rank = |kind: Kind| match kind {
            Kind::Mount => 1,
            _ => 0,
        };
        let mut others: Vec<_> = self.join.iter().filter(|(kind, _)| *kind != Kind::User).collect();
        others.sort_by_key(|(kind, _)| rank(*kind));
        let Some((_, user)) = self.join.iter().find(|(kind, _)| *kind == Kind::User) else {
            return others
                .iter()
                .try_for_each(|(kind, fd)| namespace::enter(fd, *kind));
        };
        let mut left = Vec::new();
        for entry in others {
            match namespace::enter(&entry.1, entry.0) {
                Err(error) if error.errno() == Errno::EPERM => left.push(entry),
                other => other?,
            }
        }
        namespace::enter(user, Kind::User)?;
        left.iter().try_for_each(|(kind, fd)| namespace::enter(fd, *kind))
    }
}

fn kernel_kind(kind: NamespaceKind) -> Kind {
    match kind {
        NamespaceKind::Mount => Kind::Mount,
        NamespaceKind::Cgroup => Kind::Cgroup,
        NamespaceKind::Uts => Kind::Uts,
        NamespaceKind::Ipc => Kind::Ipc,
        NamespaceKind::User => Kind::User,
        NamespaceKind::Pid => Kind::Pid,
        NamespaceKind::Network => Kind::Network,
        NamespaceKind::Time => Kind::Time,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(entries: &[(NamespaceKind, Namespace)]) -> Plan {
        let mut namespaces = Namespaces::default();
        for (kind, namespace) in entries {
            namespaces.set(*kind, namespace.clone());
        }
        Plan::open(&namespaces).unwrap()
    }

    #[test]
    fn one_clone_is_enough_unless_a_user_namespace_meets_a_join() {
        let join = |name: &str| Namespace::Join(format!("/proc/self/ns/{name}").into());
        let new = Namespace::New;
        assert!(
            !plan(&[
                (NamespaceKind::User, new.clone()),
                (NamespaceKind::Pid, new.clone())
            ])
            .needs_two_clones()
        );
        assert!(
            !plan(&[
                (NamespaceKind::Network, join("net")),
                (NamespaceKind::Pid, new.clone())
            ])
            .needs_two_clones()
        );
        assert!(
            plan(&[
                (NamespaceKind::User, new.clone()),
                (NamespaceKind::Ipc, join("ipc"))
            ])
            .needs_two_clones()
        );
        assert!(plan(&[(NamespaceKind::User, join("user"))]).needs_two_clones());
        assert!(plan(&[(NamespaceKind::Pid, join("pid"))]).needs_two_clones());
        assert!(plan(&[(NamespaceKind::Time, new)]).needs_two_clones());
    }

    #[test]
    fn a_path_to_another_kind_is_named() {
        let mut namespaces = Namespaces::default();
        namespaces.set(
            NamespaceKind::Network,
            Namespace::Join("/proc/self/ns/ipc".into()),
        );
        let error = Plan::open(&namespaces).unwrap_err().to_string();
        assert_eq!(
            error,
            "cannot join the network namespace at \"/proc/self/ns/ipc\""
        );
    }
}
