//! What a monitor answers and tells, with the descriptors that each message carries.

use prost::{Enumeration, Message};

/// The version that holds, and who answers.
#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    /// The version.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// The monitor's process id.
    #[prost(int32, tag = "2")]
    pub pid: i32,
    /// Version of the program that it runs.
    #[prost(string, tag = "3")]
    pub program: String,
    /// Its pod, if [`SetupSandbox`](crate::SetupSandbox) was done.
    #[prost(message, optional, tag = "4")]
    pub sandbox: Option<Sandbox>,
}

/// The pod's namespaces, as paths `/proc/<monitor>/fd/<n>`; they hold as long as the monitor lives. Empty where the
/// pod has the host's.
#[derive(Clone, PartialEq, Message)]
pub struct Sandbox {
    /// The pod's id.
    #[prost(string, tag = "1")]
    pub pod_id: String,
    /// IPC.
    #[prost(string, tag = "2")]
    pub ipc: String,
    /// UTS.
    #[prost(string, tag = "3")]
    pub uts: String,
    /// User.
    #[prost(string, tag = "4")]
    pub user: String,
    /// Pid, of the shared init.
    #[prost(string, tag = "5")]
    pub pid: String,
    /// The private mount namespace with the pod's files at `<pod dir>/files` and its /dev/shm at `<pod dir>/shm`.
    #[prost(string, tag = "6")]
    pub mnt: String,
}

/// A container that exists. Descriptors: the pidfd of its init.
#[derive(Clone, PartialEq, Message)]
pub struct Created {
    /// Process id of its init.
    #[prost(int32, tag = "1")]
    pub pid: i32,
}

/// A running process. Descriptors: its pidfd, then the terminal's master, if `tty`.
#[derive(Clone, PartialEq, Message)]
pub struct ExecStarted {
    /// Its process id.
    #[prost(int32, tag = "1")]
    pub pid: i32,
    /// Whether a terminal came along.
    #[prost(bool, tag = "2")]
    pub tty: bool,
}

/// A session that has joined. Descriptors: the terminal's master, if `tty`; otherwise the writing end of the standard
/// input, if `stdin`.
#[derive(Clone, PartialEq, Message)]
pub struct Attached {
    /// Whether the input came along.
    #[prost(bool, tag = "1")]
    pub stdin: bool,
    /// Whether a terminal came along: its input, and what a change of its size goes to.
    #[prost(bool, tag = "2")]
    pub tty: bool,
}

/// Containers in the order of their ids, and with the last of them the processes of execs.
#[derive(Clone, PartialEq, Message)]
pub struct Listed {
    /// Containers.
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<Container>,
    /// Running processes of execs.
    #[prost(message, repeated, tag = "2")]
    pub execs: Vec<ExecProcess>,
    /// Whether there are more: ask again, after the last of these.
    #[prost(bool, tag = "3")]
    pub more: bool,
}

/// A container as the monitor knows it.
#[derive(Clone, PartialEq, Message)]
pub struct Container {
    /// Its id.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Where it is in its life.
    #[prost(enumeration = "ContainerState", tag = "2")]
    pub state: i32,
    /// Process id of its init; 0 before there is one and after it was reaped.
    #[prost(int32, tag = "3")]
    pub pid: i32,
    /// How it ended, once it has.
    #[prost(message, optional, tag = "4")]
    pub exit: Option<Exit>,
    /// Bytes of its output that no log holds.
    #[prost(uint64, tag = "5")]
    pub log_lost_bytes: u64,
    /// Processes killed for want of memory.
    #[prost(uint64, tag = "6")]
    pub oom_kills: u64,
}

/// A running process of an exec.
#[derive(Clone, PartialEq, Message)]
pub struct ExecProcess {
    /// Its id.
    #[prost(string, tag = "1")]
    pub exec_id: String,
    /// The container.
    #[prost(string, tag = "2")]
    pub container_id: String,
    /// Process id.
    #[prost(int32, tag = "3")]
    pub pid: i32,
}

/// The life of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum ContainerState {
    /// Being made.
    Creating = 0,
    /// Its init waits for the word.
    Created = 1,
    /// Its program runs, or is about to.
    Running = 2,
    /// Its init ended.
    Exited = 3,
}

/// How a process ended.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Exit {
    /// Exit status, or 128 + signal.
    #[prost(int32, tag = "1")]
    pub exit_code: i32,
    /// The signal, if it was one; otherwise 0.
    #[prost(int32, tag = "2")]
    pub signal: i32,
    /// Whether processes of the container were killed for want of memory.
    #[prost(bool, tag = "3")]
    pub oom: bool,
    /// When: nanoseconds since 1970.
    #[prost(int64, tag = "4")]
    pub finished_at_ns: i64,
}

/// It is done.
#[derive(Clone, PartialEq, Message)]
pub struct Done {}

/// It could not be done; nothing half-made is left.
#[derive(Clone, PartialEq, Message)]
pub struct Failed {
    /// What a program decides by.
    #[prost(enumeration = "FailKind", tag = "1")]
    pub kind: i32,
    /// The kernel's number, where there is one; otherwise 0.
    #[prost(int32, tag = "2")]
    pub errno: i32,
    /// The step that failed or did not end.
    #[prost(string, tag = "3")]
    pub step: String,
    /// The whole reason, for people.
    #[prost(string, tag = "4")]
    pub message: String,
}

/// Kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum FailKind {
    /// Something else, see the message.
    Other = 0,
    /// A request or version that this monitor does not know.
    Unsupported = 1,
    /// A field that cannot be; the message names it.
    Invalid = 2,
    /// A container that is not known.
    NotFound = 3,
    /// An id that is taken.
    Exists = 4,
    /// Not in this state: start of an exited container, exec in one that does not run.
    State = 5,
    /// The deadline passed; `step` says where.
    Deadline = 6,
    /// The program to execute is not there (`errno` says more).
    NoProgram = 7,
}

/// A container's init ended, and its output up to there is in the log.
#[derive(Clone, PartialEq, Message)]
pub struct Exited {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// How.
    #[prost(message, required, tag = "2")]
    pub exit: Exit,
}

/// A process of an exec ended.
#[derive(Clone, PartialEq, Message)]
pub struct ExecExited {
    /// The exec.
    #[prost(string, tag = "1")]
    pub exec_id: String,
    /// How.
    #[prost(message, required, tag = "2")]
    pub exit: Exit,
}

/// Processes of a container were killed for want of memory.
#[derive(Clone, PartialEq, Message)]
pub struct Oom {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// How many so far.
    #[prost(uint64, tag = "2")]
    pub kills: u64,
}

/// Output that no log holds: told when it begins and when writing works again.
#[derive(Clone, PartialEq, Message)]
pub struct LogLost {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Bytes so far, since the container was made.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
    /// Why writing fails; 0 once it works again.
    #[prost(int32, tag = "3")]
    pub errno: i32,
}
