//! What a daemon asks for, with the descriptors that each message carries.

use prost::Message;

/// The versions that a daemon speaks.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// The oldest.
    #[prost(uint32, tag = "1")]
    pub min: u32,
    /// The newest.
    #[prost(uint32, tag = "2")]
    pub max: u32,
}

/// A pod to be. Descriptors: the pod's network namespace, if `netns`.
#[derive(Clone, PartialEq, Message)]
pub struct SetupSandbox {
    /// The pod's id.
    #[prost(string, tag = "1")]
    pub pod_id: String,
    /// Directory of the pod. In the monitor's mount namespace for this pod alone its /dev/shm is mounted on `shm`, and
    /// on `files` a small file system with what was in that directory before.
    #[prost(string, tag = "2")]
    pub pod_dir: String,
    /// Host name for the UTS namespace; not with the host's.
    #[prost(string, tag = "3")]
    pub hostname: String,
    /// Sysctls of the pod's namespaces: `net.*` of the network namespace that came along, `kernel.*` and `fs.mqueue.*`
    /// of the IPC namespace.
    #[prost(message, repeated, tag = "4")]
    pub sysctls: Vec<Sysctl>,
    /// Whether the pod has its own IPC namespace and /dev/shm, or the host's.
    #[prost(bool, tag = "5")]
    pub ipc: bool,
    /// Whether it has its own UTS namespace, or the host's (pods on the host's network).
    #[prost(bool, tag = "6")]
    pub uts: bool,
    /// Whether its containers share one pid namespace, with an init of the monitor's.
    #[prost(bool, tag = "7")]
    pub pid: bool,
    /// Whether the network namespace came along.
    #[prost(bool, tag = "8")]
    pub netns: bool,
    /// Size of the pod's /dev/shm; 0 means 64 MiB.
    #[prost(uint64, tag = "9")]
    pub shm_bytes: u64,
    /// The user namespace of the pod, where it has one.
    #[prost(message, optional, tag = "10")]
    pub user: Option<UserMaps>,
    /// Cgroup of the shared pid namespace's init; wanted with `pid`.
    #[prost(message, repeated, tag = "11")]
    pub pid_cgroup: Vec<CgroupPath>,
}

/// A kernel setting.
#[derive(Clone, PartialEq, Message)]
pub struct Sysctl {
    /// Dotted name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// The id maps of a user namespace.
#[derive(Clone, PartialEq, Message)]
pub struct UserMaps {
    /// User ids.
    #[prost(message, repeated, tag = "1")]
    pub uids: Vec<IdRange>,
    /// Group ids.
    #[prost(message, repeated, tag = "2")]
    pub gids: Vec<IdRange>,
}

/// One range of an id map.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct IdRange {
    /// First id inside.
    #[prost(uint32, tag = "1")]
    pub inside: u32,
    /// First id outside.
    #[prost(uint32, tag = "2")]
    pub outside: u32,
    /// How many.
    #[prost(uint32, tag = "3")]
    pub count: u32,
}

/// A cgroup's path, one entry a hierarchy: as `coracle_cgroup::Location::to_map` gives it.
#[derive(Clone, PartialEq, Message)]
pub struct CgroupPath {
    /// First controller of the hierarchy; empty for the path that all others share.
    #[prost(string, tag = "1")]
    pub controller: String,
    /// Path below the hierarchy's root.
    #[prost(string, tag = "2")]
    pub path: String,
}

/// A container to be. Descriptors: its root file system as a detached mount, if `rootfs`.
#[derive(Clone, PartialEq, Message)]
pub struct Create {
    /// Its id.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// The bundle's directory.
    #[prost(string, tag = "2")]
    pub bundle: String,
    /// Path of the log file; empty for none. Its directory exists.
    #[prost(string, tag = "3")]
    pub log_path: String,
    /// Whether it gets a terminal; the config must say the same.
    #[prost(bool, tag = "4")]
    pub tty: bool,
    /// Whether its standard input is kept open for attach; `/dev/null` otherwise.
    #[prost(bool, tag = "5")]
    pub stdin: bool,
    /// Whether that input ends with the first attach.
    #[prost(bool, tag = "6")]
    pub stdin_once: bool,
    /// Time until it has to be created; 0 means two minutes.
    #[prost(uint64, tag = "7")]
    pub deadline_ms: u64,
    /// Whether the root came along; otherwise it is `root.path` of the bundle.
    #[prost(bool, tag = "8")]
    pub rootfs: bool,
}

/// Lets a container run.
#[derive(Clone, PartialEq, Message)]
pub struct Start {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Time until its program has to run; 0 means two minutes.
    #[prost(uint64, tag = "2")]
    pub deadline_ms: u64,
}

/// A process to run in a container. Descriptors: a memfd with the OCI process document as JSON, then those of
/// `stdin`, `stdout`, `stderr` that are true (the others are `/dev/null`, or the terminal).
#[derive(Clone, PartialEq, Message)]
pub struct Exec {
    /// An id, unique among the running processes of the pod.
    #[prost(string, tag = "1")]
    pub exec_id: String,
    /// The container.
    #[prost(string, tag = "2")]
    pub container_id: String,
    /// Whether a standard input came along.
    #[prost(bool, tag = "3")]
    pub stdin: bool,
    /// Whether a standard output came along.
    #[prost(bool, tag = "4")]
    pub stdout: bool,
    /// Whether a standard error came along.
    #[prost(bool, tag = "5")]
    pub stderr: bool,
    /// Whether it gets a terminal, whose master the answer carries; the document must say the same.
    #[prost(bool, tag = "6")]
    pub tty: bool,
    /// Cgroup that it runs in; the container's own where empty.
    #[prost(message, repeated, tag = "7")]
    pub cgroup: Vec<CgroupPath>,
    /// Time until the program has to run; 0 means two minutes.
    #[prost(uint64, tag = "8")]
    pub deadline_ms: u64,
}

/// Opens a log file anew.
#[derive(Clone, PartialEq, Message)]
pub struct ReopenLog {
    /// The container; one that has exited is refused and gets no new file.
    #[prost(string, tag = "1")]
    pub container_id: String,
}

/// Drops a container's record.
#[derive(Clone, PartialEq, Message)]
pub struct Forget {
    /// The container; refused while its init lives.
    #[prost(string, tag = "1")]
    pub container_id: String,
}

/// Asks for containers and processes, a frame at a time.
#[derive(Clone, PartialEq, Message)]
pub struct List {
    /// The last container that is known already; the answer begins behind it.
    #[prost(string, tag = "1")]
    pub after: String,
}

/// Asks for the descriptor of a container's init.
#[derive(Clone, PartialEq, Message)]
pub struct Adopt {
    /// The container; one that has exited is refused.
    #[prost(string, tag = "1")]
    pub container_id: String,
}

/// Joins the streams of a running container. Descriptors: writing ends of pipes for those of `stdout` and `stderr` that
/// are true. What the container writes from now on goes to its log and into them; what does not fit into a pipe at that
/// moment is dropped there, and a line in its place says how much, for nobody who looks on may hold a container up. The
/// ends close when the container's init has ended.
#[derive(Clone, PartialEq, Message)]
pub struct Attach {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Whether its input is wanted. One that ends with the first attach is handed out once.
    #[prost(bool, tag = "2")]
    pub stdin: bool,
    /// Whether a standard output came along; with a terminal it gets everything.
    #[prost(bool, tag = "3")]
    pub stdout: bool,
    /// Whether a standard error came along.
    #[prost(bool, tag = "4")]
    pub stderr: bool,
}

/// Replaces the monitor's program. Descriptors: the sealed memfd with the new one.
#[derive(Clone, PartialEq, Message)]
pub struct Upgrade {}

/// Ends the monitor; refused while it has containers.
#[derive(Clone, PartialEq, Message)]
pub struct Shutdown {}
