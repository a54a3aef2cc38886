//! Cgroups behind one trait: the unified hierarchy (v2), and v1 and hybrid hosts with the same limits.
//!
//! [`Host::detect`] says what this host has, [`Host::locate`] turns a `cgroupsPath` into a [`Location`], and
//! [`Host::manager`] gives the [`Manager`] of the group there. A group is made before its first process:
//!
//! ```text
//! create   directories, checks on what was there before
//! apply    limits and device rules
//! place    how new processes get in: at their birth, or by their own hand right after
//! ```
//!
//! Everything works on held directory descriptors; no name can leave its hierarchy. Nothing assumes uid 0 or a
//! writable cgroup: where no group can be made, that is an error only if limits were asked for.

mod device_prog;
mod device_rules;
mod dir;
mod host;
mod location;
mod none;
mod own;
mod signal;
mod stats;
#[cfg(test)]
mod testing;
#[cfg(feature = "cgroup-v1")]
mod v1;
mod v2;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use coracle_kernel::epoll::{Interest, Wakeup, wait_one};

pub use coracle_spec::oci::LinuxResources;
pub use device_rules::{Access, DeviceRule, DeviceType};
pub use host::{Host, Kind};
pub use location::Location;
pub use own::{
    end_plugins, end_workers, make_helpers, make_plugins, make_workers, monitor_location, remove_own,
};
pub use stats::{Cpu, Io, Memory, Pids, Stats, Throttling};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A process id in the caller's pid namespace.
pub type Pid = i32;

/// Failure of a cgroup operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A cgroup path that cannot be one.
    #[error("invalid cgroup path {path:?}: {why}")]
    Path {
        /// The path as it was given, shortened.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There are processes in the cgroup that a new container was to have for itself.
    #[error("container's cgroup is not empty: {0} process(es) found")]
    NotEmpty(usize),
    /// The cgroup that a new container was to have is frozen: nothing in it would ever run.
    #[error("container's cgroup unexpectedly frozen")]
    Frozen,
    /// Limits were asked for on a host, or by a user, without a cgroup to hold them.
    #[error("limits were asked for ({wanted}) but no cgroup can be made: {why}")]
    NoCgroup {
        /// The first limit that was asked for.
        wanted: &'static str,
        /// Why there is none.
        why: String,
    },
    /// This build cannot work with the host's hierarchies.
    #[error("cgroup v1 is mounted, and this build has no support for it (cargo feature cgroup-v1)")]
    NoV1,
    /// A limit whose controller is absent or not delegated.
    #[error("cgroup controller {controller} is not available in {path}, so {file} cannot be set")]
    NoController {
        /// The controller.
        controller: String,
        /// The file that would hold the limit.
        file: String,
        /// The cgroup.
        path: String,
    },
    /// A limit that has no meaning here, or contradicts another one.
    #[error("{0}")]
    Limit(String),
    /// A value that the kernel refused.
    #[error("write {value:?} to {file} of cgroup {path}")]
    Write {
        /// The file.
        file: String,
        /// The value.
        value: String,
        /// The cgroup.
        path: String,
        /// The refusal.
        #[source]
        source: coracle_kernel::Error,
    },
    /// Another step that failed.
    #[error("{step} cgroup {path}")]
    Step {
        /// What was being done, a verb.
        step: &'static str,
        /// The cgroup.
        path: String,
        /// The reason.
        #[source]
        source: coracle_kernel::Error,
    },
    /// A file of the cgroup says what no one can read.
    #[error("unreadable {file} of cgroup {path}: {text:?}")]
    Content {
        /// The file.
        file: String,
        /// The cgroup.
        path: String,
        /// What it says, shortened.
        text: String,
    },
    /// The cgroup did not do in time what was asked of it.
    #[error("cgroup {path} did not {what} within {limit:?}")]
    Deadline {
        /// The cgroup.
        path: String,
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
}

impl Error {
    /// The errno below, where there is one.
    #[must_use]
    pub fn errno(&self) -> Option<coracle_kernel::Errno> {
        match self {
            Error::Write { source, .. } | Error::Step { source, .. } => Some(source.errno()),
            _ => None,
        }
    }
}

/// What a group is for, where that changes what is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// v1 only: make memory, cpu, cpuacct and pids leaves even where nothing is limited, so that [`Manager::stats`]
    /// has something to read. (v2 accounts wherever the parent delegates the controllers.)
    pub accounting: bool,
    /// What a refused device program means.
    pub devices: DevicePolicy,
}

/// What a device rule that cannot be put into force means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DevicePolicy {
    /// An error.
    #[default]
    Enforce,
    /// Left out: inside a user namespace mknod is refused anyway, and the kernel attaches no program for us.
    BestEffort,
}

/// Whether limits are set for the first time or changed under a running container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Before the first process: device rules too.
    First,
    /// `update`: the device rules stay as they are, or what hooks added to them would be lost.
    Update,
}

/// How a new process gets into a group. [`Manager::add`] is for those that can do neither: to move somebody else, the
/// kernel stops forks and exits everywhere and waits for an RCU grace period first, some 8 ms.
#[derive(Debug)]
pub enum Placement {
    /// `CLONE_INTO_CGROUP` with this descriptor.
    Into(OwnedFd),
    /// It moves itself: writes a `0` to each of these (the `tasks` of v1's hierarchies) before anything else, while it
    /// has one thread. None where there is no group.
    Itself(Vec<OwnedFd>),
}

/// One cgroup: a container's leaf, a sub-group of it, or a group of the daemon's own.
///
/// On v1 it stands for one directory in each hierarchy that is needed.
pub trait Manager: Send {
    /// Where it is.
    fn location(&self) -> &Location;

    /// Whether it is there.
    fn exists(&self) -> bool;

    /// Makes the directories and what they need of their parents. One that is there already must be empty and not
    /// frozen. On v1 `resources` decide which hierarchies get a leaf.
    fn create(&mut self, resources: &LinuxResources) -> Result<()>;

    /// Puts limits into force; only what `resources` names is touched.
    fn apply(&mut self, resources: &LinuxResources, change: Change) -> Result<()>;

    /// How a new process gets in.
    fn place(&self) -> Result<Placement>;

    /// Moves a process in that is there already.
    fn add(&self, pid: Pid) -> Result<()>;

    /// Processes in it and in what is below it.
    fn pids(&self) -> Result<Vec<Pid>>;

    /// Stops every process in it; returns when all are stopped.
    fn freeze(&self, timeout: Duration) -> Result<()>;

    /// Lets them run again; returns when they do.
    fn thaw(&self, timeout: Duration) -> Result<()>;

    /// Whether it is frozen, or being frozen.
    fn frozen(&self) -> Result<bool>;

    /// SIGKILL to every process in it and below it, frozen ones too; none can escape by forking.
    fn kill(&self, timeout: Duration) -> Result<()>;

    /// Waits until no process is left in it or below it; whether that is so.
    fn wait_empty(&self, timeout: Duration) -> Result<bool>;

    /// What it uses. Files are opened once and read again later.
    fn stats(&mut self) -> Result<Stats>;

    /// A descriptor that tells of OOM kills; none where the memory controller is not there.
    fn watch_oom(&self) -> Result<Option<OomWatch>>;

    /// Makes a sub-group (`exec-<n>`) that has no limits of its own and serves to find and kill what is in it. It is
    /// there at once; [`Manager::create`] on it does nothing. Its location, opened in another process, means the same.
    fn sub_group(&self, name: &str) -> Result<Box<dyn Manager>>;

    /// Removes it with everything below it. What was removed before is no error. It must hold no process; one that
    /// is just exiting is waited for.
    fn remove(&mut self, timeout: Duration) -> Result<()>;
}

/// Tells of OOM kills in one group.
#[derive(Debug)]
pub struct OomWatch {
    /// v1: an eventfd; v2: `memory.events` itself.
    notice: Option<Wakeup>,
    /// The file with the counter.
    counter: dir::CachedFile,
}

impl OomWatch {
    /// What to wait for: v1 has a counter that becomes readable, v2 a file that changes (EPOLLPRI until it is read).
    #[must_use]
    pub fn interest(&self) -> Interest {
        if self.notice.is_some() {
            Interest::READ
        } else {
            Interest::PRIORITY
        }
    }

    /// How many processes of the group and below it were killed for want of memory so far. Also takes note of the
    /// event, so that the next wait waits for the next one.
    pub fn kills(&self) -> Result<u64> {
        if let Some(notice) = &self.notice {
            notice.take();
        }
        self.counter.keyed("oom_kill").map(|count| count.unwrap_or(0))
    }

    /// Waits for the next event; whether one came.
    pub fn wait(&self, timeout: Duration) -> Result<bool> {
        let ready = wait_one(self, self.interest(), Some(timeout)).map_err(|source| Error::Step {
            step: "watch memory of",
            path: self.counter.path().to_owned(),
            source,
        })?;
        Ok(!ready.is_empty())
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notice
            .as_ref()
            .map_or_else(|| self.counter.as_fd(), Wakeup::as_fd)
    }
}

/// `2MB`, `1GB`, `64KB`: it becomes part of a file name.
fn is_page_size(size: &str) -> bool {
    let digits = size
        .trim_end_matches("KB")
        .trim_end_matches("MB")
        .trim_end_matches("GB");
    size.len() == digits.len() + 2 && !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}
