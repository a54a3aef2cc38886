//! Why an operation failed. The texts that callers of runc look for are kept word for word.

use std::path::PathBuf;

use coracle_spec::{LoadError, Status};

use crate::{hooks, init, namespaces};

/// Result of an operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no container of that id.
    #[error("container does not exist")]
    NotFound,
    /// There is one already.
    #[error("container with given ID already exists")]
    Exists,
    /// An id of other characters than `[A-Za-z0-9_+.-]`.
    #[error("invalid container ID format")]
    BadId,
    /// No id.
    #[error("container id cannot be empty")]
    EmptyId,
    /// Its init has ended.
    #[error("container not running")]
    NotRunning,
    /// It cannot be started any more.
    #[error("cannot start a container that has stopped")]
    Stopped,
    /// It was started before.
    #[error("cannot start an already running container")]
    AlreadyRunning,
    /// Its init is not ready.
    #[error("cannot start a container that is still being created")]
    StillCreating,
    /// It must be stopped first.
    #[error("cannot delete container {id} that is not stopped: {status}")]
    NotStopped {
        /// Which.
        id: String,
        /// What it does instead.
        status: Status,
    },
    /// Nothing can be executed in it.
    #[error("cannot exec in a stopped container")]
    ExecStopped,
    /// Nothing would run in it.
    #[error("cannot exec in a paused container (use --ignore-paused to override)")]
    ExecPaused,
    /// The configuration cannot be read or is refused.
    #[error(transparent)]
    Config(LoadError),
    /// Something of the bundle is not there.
    #[error("{what} {path:?}: {reason}")]
    Bundle {
        /// What it is.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The record of a container cannot be used.
    #[error("unusable container state: {0}")]
    Record(String),
    /// The options, or configuration and host, do not fit together.
    #[error("{0}")]
    Refused(String),
    /// A namespace that is to be joined.
    #[error(transparent)]
    Namespace(#[from] namespaces::OpenError),
    /// The system-call filter.
    #[error(transparent)]
    Seccomp(#[from] coracle_seccomp::CompileError),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(Box<coracle_cgroup::Error>),
    /// The process.
    #[error("unable to start container process")]
    Launch(#[from] init::LaunchError),
    /// The init failed after the word to start.
    #[error(transparent)]
    Init(#[from] init::Failure),
    /// A hook.
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    /// A system call.
    #[error("cannot {doing}")]
    Call {
        /// What was being done.
        doing: &'static str,
        /// The call.
        #[source]
        source: coracle_kernel::Error,
    },
}

impl From<coracle_cgroup::Error> for Error {
    fn from(error: coracle_cgroup::Error) -> Error {
        Error::Cgroup(Box::new(error))
    }
}

impl Error {
    pub(crate) fn call(doing: &'static str, source: coracle_kernel::Error) -> Error {
        Error::Call { doing, source }
    }
}
