//! The daemon's side of the worker processes: starting them, what they are given, and their end.
//!
//! A worker gets its descriptors at fixed numbers from 3 on, nothing else, and no environment. It is killed when its
//! handle is dropped; nothing that it leaves behind is visible to anyone.

use std::ffi::{CString, OsStr};
use std::fmt;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coracle_kernel::exec::{Program, Spawn};
use coracle_kernel::signal::Signal;
use coracle_kernel::wait::{self, Id, Status};
use coracle_kernel::{Errno, Error as KernelError, pidfd};

/// What a worker process is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Talks to registries: network, no files.
    Fetch,
    /// Parses manifests and configurations: neither network nor files.
    Parse,
    /// Unpacks one layer: one directory, no network.
    Unpack,
}

/// How workers are started.
pub struct Workers {
    /// The daemon's own program.
    program: CString,
    /// Arguments in front of the role's name.
    args: Vec<CString>,
    home: Mutex<Arc<Home>>,
    make_home: Box<dyn Fn() -> Home + Send + Sync>,
}

/// The cgroup of the workers; none of both: the daemon's own.
#[derive(Debug, Default)]
pub struct Home {
    /// The cgroup v2 directory that they are born in.
    pub cgroup: Option<OwnedFd>,
    /// `tasks` files of v1's hierarchies that they write themselves to.
    pub cgroup_tasks: Vec<OwnedFd>,
}

/// A running worker; killed and reaped on drop.
#[derive(Debug)]
pub struct Worker {
    pidfd: OwnedFd,
    reaped: bool,
}

impl Role {
    /// The word on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Fetch => "fetch",
            Role::Parse => "parse",
            Role::Unpack => "unpack",
        }
    }

    /// The role of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Role> {
        [Role::Fetch, Role::Parse, Role::Unpack]
            .into_iter()
            .find(|role| role.name() == name)
    }
}

impl Workers {
    /// Workers that are `program worker <role>`; the daemon gives `/proc/self/exe`.
    #[must_use]
    pub fn new(program: &Path) -> Workers {
        Workers::with_args(program, &["coracled", "worker"])
    }

    /// Workers that are `program` with these arguments (its name first) and then the role.
    #[must_use]
    pub fn with_args(program: &Path, args: &[&str]) -> Workers {
        // A NUL cannot be in a path that exists, nor in a literal.
        let text = |text: &OsStr| CString::new(text.as_bytes()).unwrap_or_default();
        Workers {
            program: text(program.as_os_str()),
            args: args.iter().map(|arg| text(OsStr::new(arg))).collect(),
            home: Mutex::default(),
            make_home: Box::new(Home::default),
        }
    }

    /// The same, in the cgroup that `make` makes: now, and again where somebody has removed it.
    #[must_use]
    pub fn at_home(self, make: impl Fn() -> Home + Send + Sync + 'static) -> Workers {
        Workers {
            home: Mutex::new(Arc::new(make())),
            make_home: Box::new(make),
            ..self
        }
    }

    /// Starts a worker with these descriptors at 3, 4 and so on.
    pub fn start(&self, role: Role, fds: &[BorrowedFd<'_>]) -> Result<Worker, KernelError> {
        let mut args = self.args.clone();
        args.push(CString::new(role.name()).unwrap_or_default());
        let stderr = std::io::stderr();
        let mut numbered: Vec<_> = fds.iter().copied().zip(3..).collect();
        // What a worker has to say beside its answer (a panic) belongs in the daemon's log.
        numbered.push((stderr.as_fd(), 2));
        let spawn = |home: &Home| {
            let tasks: Vec<_> = home.cgroup_tasks.iter().map(|tasks| tasks.as_fd()).collect();
            Spawn {
                fds: &numbered,
                cgroup: home.cgroup.as_ref().map(|cgroup| cgroup.as_fd()),
                cgroup_tasks: &tasks,
                new_session: true,
                ..Spawn::new(Program::Path(&self.program), &args)
            }
            .spawn()
        };
        let home = Arc::clone(&self.home());
        let child = match spawn(&home) {
            // What a removed cgroup answers: to a write into it on v1, to a clone into it on v2.
            Err(error) if matches!(error.errno(), Errno::ENODEV | Errno::ENOENT) => {
                tracing::warn!(%error, "the cgroup of the image workers was removed, it is made anew");
                let home = Arc::new((self.make_home)());
                *self.home() = Arc::clone(&home);
                spawn(&home)?
            }
            outcome => outcome?,
        };
        Ok(Worker {
            pidfd: child.pidfd,
            reaped: false,
        })
    }

    fn home(&self) -> MutexGuard<'_, Arc<Home>> {
        // Replaced in one step: a panic leaves it whole.
        self.home.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers")
            .field("program", &self.program)
            .field("args", &self.args)
            .field("home", &self.home)
            .finish_non_exhaustive()
    }
}

impl Worker {
    /// A descriptor of the process: for killing it from elsewhere.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills it; [`Worker::wait`] or the drop reaps it.
    pub fn kill(&self) {
        // It may have ended by itself.
        let _ = pidfd::send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits for its end and reaps it. Blocks: not in an async task.
    pub fn wait(mut self) -> Result<Status, KernelError> {
        self.reaped = true;
        wait::wait(Id::Pidfd(self.pidfd.as_fd())).map(|exit| exit.status)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
            // It is dying, so this ends soon; a worker stuck in the kernel's disk code would hold a blocking thread.
            let _ = wait::wait(Id::Pidfd(self.pidfd.as_fd()));
        }
    }
}
