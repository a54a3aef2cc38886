//! The operations of an OCI runtime: create, start, exec, kill, delete, state.
//!
//! One way through for two callers. The `coracle` command keeps its containers in a [`Store`] and calls
//! [`create_stored`], [`start_stored`], [`exec_stored`], [`kill()`] and [`delete()`]; a pod's monitor keeps its own records
//! and calls what those are made of: [`create()`], [`release`], [`exec()`].
//!
//! ```text
//! create   configuration -> claim and record -> cgroup -> clone -> init set up -> recorded -> waits
//! start    connect to where the init waits -> "go" -> execve -> poststart hooks
//! delete   the init's end -> cgroup emptied and removed -> record removed -> poststop hooks
//! ```
//!
//! Nothing here starts a thread, sleeps where an event can be waited for, or assumes uid 0.

mod create;
mod delete;
mod env;
mod error;
mod exec;
mod filter;
pub mod hooks;
mod init;
mod kill;
mod late;
mod namespaces;
mod rootfs;
mod start;
mod state;
mod store;

pub use create::{
    Created, Options, Root, StartAt, Stored, StoredOptions, cgroup_of, create, create_stored, load_config,
};
pub use delete::{Force, delete};
pub use error::{Error, Result};
pub use exec::{ExecOptions, Executed, StoredExec, exec, exec_stored};
pub use filter::SECCOMP_ARCHS;
pub use init::{Console, Failure, Kind as FailureKind, LaunchError, Parent, Step};
pub use kill::kill;
pub use late::{LateHooks, run_late_hooks};
pub use namespaces::OpenError;
pub use rootfs::Lent;
pub use start::{Release, release, start_stored};
pub use state::State;
pub use store::{Entry, Store};
