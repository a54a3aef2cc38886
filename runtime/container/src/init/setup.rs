//! What an init works from: computed before the clone, and inherited by it as memory.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::Path;

use coracle_kernel::idmap::Line;
use coracle_kernel::seccomp::{FilterFlags, Instruction};
use coracle_kernel::time::Offsets;
use coracle_spec::{Config, Process};

use crate::namespaces;
use crate::rootfs::Context;

/// Everything that any process of a container needs between clone and `execve`.
#[derive(Debug)]
pub(crate) struct Setup<'a> {
    /// Its settings.
    pub(crate) process: &'a Process,
    /// The namespaces it is to be in.
    pub(crate) namespaces: namespaces::Plan,
    /// Its arguments.
    pub(crate) args: Vec<CString>,
    /// Its environment, each name once.
    pub(crate) env: Vec<&'a str>,
    /// The session keyring to join.
    pub(crate) keyring: Option<CString>,
    /// The system-call filter.
    pub(crate) filter: Option<Filter>,
    /// The `tasks` files through which it enters its cgroup by itself, where it was not born there.
    pub(crate) tasks: Vec<OwnedFd>,
    /// Its standard input, output and error; ours where there is none.
    pub(crate) stdio: [Option<OwnedFd>; 3],
    /// How many descriptors from 3 on it inherits.
    pub(crate) preserve_fds: i32,
    /// Whether its caller has no privilege over the ids of others: supplementary groups are left alone.
    pub(crate) rootless: bool,
}

/// What the process is.
#[derive(Debug)]
pub(crate) enum Role<'a> {
    /// The first process of a container.
    Init(Init<'a>),
    /// One more process of a container.
    Exec,
}

/// What only the first process needs.
#[derive(Debug)]
pub(crate) struct Init<'a> {
    /// The container's id.
    pub(crate) id: &'a str,
    /// The configuration.
    pub(crate) config: &'a Config,
    /// The bundle, absolute.
    pub(crate) bundle: &'a Path,
    /// Where the root comes from and goes to; taken when it is attached.
    pub(crate) rootfs: Option<Box<Context<'a>>>,
    /// Offsets of a new time namespace.
    pub(crate) time_offsets: Option<Offsets>,
    /// Ids of a new user namespace.
    pub(crate) uids: Vec<Line>,
    /// The same for groups.
    pub(crate) gids: Vec<Line>,
    /// Where it waits for its start.
    pub(crate) barrier: Barrier,
}

/// Where an init waits for its start.
#[derive(Debug)]
pub(crate) enum Barrier {
    /// A listening socket: whoever reaches it in the file system starts.
    Listening(OwnedFd),
    /// One end of a pair: its other end starts.
    Connected(OwnedFd),
}

/// A compiled filter.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    /// The program.
    pub(crate) program: Vec<Instruction>,
    /// How it is loaded.
    pub(crate) flags: FilterFlags,
}
