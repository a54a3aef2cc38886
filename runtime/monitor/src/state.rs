//! The whole state of a monitor as one message, for the program that takes over. Descriptors are their numbers: an
//! execve keeps those that are not close-on-exec. Numbers of fields are never used twice.

use coracle_wire::{CgroupPath, Exit};
use prost::Message;

/// Version of this schema. A program reads its own and the two before.
pub(crate) const VERSION: u32 = 1;

/// A monitor.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct MonitorState {
    #[prost(uint32, tag = "1")]
    pub(crate) version: u32,
    #[prost(int32, tag = "2")]
    pub(crate) listener: i32,
    #[prost(string, tag = "3")]
    pub(crate) oom_score: String,
    /// The id of the request for the upgrade, which the new program answers.
    #[prost(uint64, tag = "4")]
    pub(crate) request: u64,
    #[prost(message, optional, tag = "5")]
    pub(crate) connection: Option<ConnectionState>,
    #[prost(message, optional, tag = "6")]
    pub(crate) sandbox: Option<SandboxState>,
    #[prost(message, repeated, tag = "7")]
    pub(crate) containers: Vec<ContainerRecord>,
    #[prost(message, repeated, tag = "8")]
    pub(crate) execs: Vec<ExecState>,
}

/// The daemon's connection.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ConnectionState {
    #[prost(int32, tag = "1")]
    pub(crate) socket: i32,
    /// Version of the protocol; 0 before the greeting.
    #[prost(uint32, tag = "2")]
    pub(crate) version: u32,
    #[prost(uint64, tag = "3")]
    pub(crate) last_id: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) pending: u64,
    #[prost(message, repeated, tag = "5")]
    pub(crate) unsent: Vec<PacketState>,
}

/// A packet that waits to be sent.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct PacketState {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) bytes: Vec<u8>,
    #[prost(int32, repeated, tag = "2")]
    pub(crate) fds: Vec<i32>,
}

/// The pod.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct SandboxState {
    #[prost(string, tag = "1")]
    pub(crate) pod_id: String,
    #[prost(string, tag = "2")]
    pub(crate) pod_dir: String,
    #[prost(int32, optional, tag = "3")]
    pub(crate) ipc: Option<i32>,
    #[prost(int32, optional, tag = "4")]
    pub(crate) uts: Option<i32>,
    #[prost(int32, optional, tag = "5")]
    pub(crate) mnt: Option<i32>,
    #[prost(message, optional, tag = "6")]
    pub(crate) init: Option<PodInitState>,
}

/// The init of a shared pid namespace.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct PodInitState {
    #[prost(int32, tag = "1")]
    pub(crate) pid: i32,
    #[prost(int32, tag = "2")]
    pub(crate) pidfd: i32,
    #[prost(int32, tag = "3")]
    pub(crate) namespace: i32,
}

/// A container; none is being made or started at the moment of an upgrade.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContainerRecord {
    #[prost(string, tag = "1")]
    pub(crate) id: String,
    #[prost(string, tag = "2")]
    pub(crate) bundle: String,
    #[prost(enumeration = "coracle_wire::ContainerState", tag = "3")]
    pub(crate) state: i32,
    #[prost(int32, tag = "4")]
    pub(crate) pid: i32,
    #[prost(int32, optional, tag = "5")]
    pub(crate) pidfd: Option<i32>,
    #[prost(int32, optional, tag = "6")]
    pub(crate) start: Option<i32>,
    #[prost(message, optional, tag = "7")]
    pub(crate) stdout: Option<OutputState>,
    #[prost(message, optional, tag = "8")]
    pub(crate) stderr: Option<OutputState>,
    #[prost(int32, optional, tag = "9")]
    pub(crate) stdin: Option<i32>,
    #[prost(message, optional, tag = "10")]
    pub(crate) log: Option<LogState>,
    #[prost(uint64, tag = "11")]
    pub(crate) log_lost: u64,
    #[prost(bool, tag = "12")]
    pub(crate) loss_told: bool,
    #[prost(message, repeated, tag = "13")]
    pub(crate) cgroup: Vec<CgroupPath>,
    #[prost(uint64, tag = "14")]
    pub(crate) oom_kills: u64,
    #[prost(message, optional, tag = "15")]
    pub(crate) exit: Option<Exit>,
    #[prost(bool, tag = "16")]
    pub(crate) poststart: bool,
    #[prost(bool, tag = "17")]
    pub(crate) poststop: bool,
    #[prost(bool, tag = "18")]
    pub(crate) stdin_once: bool,
}

/// A stream.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct OutputState {
    #[prost(int32, tag = "1")]
    pub(crate) fd: i32,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) pending: Vec<u8>,
    #[prost(bool, tag = "3")]
    pub(crate) terminal: bool,
}

/// A log file.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct LogState {
    #[prost(string, tag = "1")]
    pub(crate) path: String,
    #[prost(int32, tag = "2")]
    pub(crate) file: i32,
    #[prost(uint64, tag = "3")]
    pub(crate) lost: u64,
    #[prost(message, optional, tag = "4")]
    pub(crate) gap: Option<GapState>,
}

/// A loss that is going on.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct GapState {
    #[prost(uint64, tag = "1")]
    pub(crate) bytes: u64,
    #[prost(int32, tag = "2")]
    pub(crate) errno: i32,
    #[prost(bool, tag = "3")]
    pub(crate) torn: bool,
}

/// A running process of an exec.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ExecState {
    #[prost(string, tag = "1")]
    pub(crate) id: String,
    #[prost(string, tag = "2")]
    pub(crate) container_id: String,
    #[prost(int32, tag = "3")]
    pub(crate) pid: i32,
    #[prost(int32, tag = "4")]
    pub(crate) pidfd: i32,
}
