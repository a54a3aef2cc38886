//! The side that stays outside: it clones, does for the child what the child may not do itself, and listens.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use coracle_cgroup::{Manager, Placement};
use coracle_kernel::clone::Clone3;
use coracle_kernel::namespace::Kinds;
use coracle_kernel::signal::Signal;
use coracle_kernel::wait::{self, Id};
use coracle_kernel::{Errno, creds, epoll, pidfd, scm};

use super::error::{Failure, Kind};
use super::handshake::{Heard, Link, Order, Word};
use super::outside::Outside;
use super::setup::{Role, Setup};
use super::{between, child};
use crate::hooks;

/// Whose child the new process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// The caller's.
    Direct,
    /// The caller's parent's: the caller is a helper that ends before it (`CLONE_PARENT`).
    Sibling,
}

/// Where the master of the terminal goes.
#[derive(Debug)]
pub enum Console {
    /// To whoever listens at this connected socket, in one message with its name.
    Socket(OwnedFd),
    /// Back to the caller.
    Return,
}

/// Why there is no new process.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// It said so itself.
    #[error(transparent)]
    Init(Failure),
    /// It ended without a word.
    #[error("container init ended while it was set up: {0}")]
    Died(String),
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    /// It could not be put into its cgroup.
    #[error(transparent)]
    Cgroup(Box<coracle_cgroup::Error>),
    /// Something that the parent does for it failed.
    #[error("cannot {doing}")]
    Call {
        /// What was being done.
        doing: &'static str,
        /// The call.
        #[source]
        source: coracle_kernel::Error,
    },
}

/// Everything for one launch.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) setup: Setup<'a>,
    pub(crate) role: Role<'a>,
    pub(crate) parent: Parent,
    pub(crate) console: Option<Console>,
    /// The bundle's directory, in which hooks run.
    pub(crate) hooks_cwd: Option<OwnedFd>,
}

/// A process that has done everything up to its start; killed if it is dropped before [`Newborn::keep`].
#[derive(Debug)]
pub(crate) struct Newborn {
    /// Its pid, as we see it.
    pub(crate) pid: i32,
    pidfd: Option<OwnedFd>,
    /// The master of its terminal, where it came back.
    pub(crate) terminal: Option<OwnedFd>,
    /// What was left out of what was asked for.
    pub(crate) warnings: Vec<String>,
    link: Link,
    parent: Parent,
    /// The process between, which ends while we go on.
    between: Option<OwnedFd>,
}

/// Clones the process, sets it up from outside and waits until it is ready.
pub(crate) fn launch(launch: Launch<'_>, cgroup: &dyn Manager) -> Result<Newborn, LaunchError> {
    let launched = clone_and_set_up(launch, cgroup);
    if let Err(LaunchError::Died(_)) = launched {
        let watch = cgroup.watch_oom().ok().flatten();
        if watch.is_some_and(|watch| watch.kills().is_ok_and(|kills| kills > 0)) {
            return Err(LaunchError::Died("OOM-killed (memory limit too low?)".to_owned()));
        }
    }
    launched
}

fn clone_and_set_up(launch: Launch<'_>, cgroup: &dyn Manager) -> Result<Newborn, LaunchError> {
    let Launch {
        mut setup,
        role,
        parent,
        console,
        hooks_cwd,
    } = launch;
    let (ours, theirs) = Link::pair().map_err(|source| call("make a socket", source))?;
    // One more process of a container gets into its cgroup by the process between, which is cloned there while we see the
    // host's groups, or enters it first of all (v1), and by inheritance: a move by us waits for every processor, many
    // milliseconds. The process between holds nothing there but a place among the container's processes, for less than a
    // millisecond.
    let between_too = matches!(role, Role::Exec);
    let (place, moved_by_us) = match cgroup.place()? {
        Placement::Into(leaf) if between_too || !setup.namespaces.clones_as_stranger() => (Some(leaf), None),
        Placement::Into(_) => (None, Some(cgroup)),
        Placement::Itself(tasks) => {
            setup.tasks = tasks;
            (None, None)
        }
    };
    if !setup.rootless {
        // Inherited by the child, so that there is no moment in which it could be traced.
        creds::set_dumpable(false).map_err(|source| call("become untraceable", source))?;
    }
    let outside = Outside::of(&setup, &role);
    let two = setup.namespaces.needs_two_clones();
    // The child must not hold our end, or it would never see it close. It takes both out of its own copy.
    let ends = Cell::new(Some((ours, theirs)));
    let clone = Clone3 {
        namespaces: if two {
            Kinds::empty()
        } else {
            setup.namespaces.clone_flags()
        },
        sibling: parent == Parent::Sibling,
        cgroup: if two && !between_too {
            None
        } else {
            place.as_ref().map(AsFd::as_fd)
        },
    };
    let child = clone.spawn(|| {
        let Some((ours, theirs)) = ends.take() else {
            return 1;
        };
        drop(ours);
        if two {
            between::run(setup, role, theirs, place.as_ref().filter(|_| !between_too))
        } else {
            child::run(setup, role, theirs)
        }
    });
    let child = child.map_err(|source| call("clone the container's init", source))?;
    let Some((link, _)) = ends.take() else {
        return Err(LaunchError::Died("no socket".to_owned()));
    };
    let mut newborn = Newborn {
        pid: child.pid,
        pidfd: Some(child.pidfd),
        terminal: None,
        warnings: Vec::new(),
        link,
        parent,
        between: None,
    };
    if two {
        newborn = newborn.second()?;
    }
    outside.prepare(newborn.pid, moved_by_us, &mut newborn.warnings)?;
    newborn.order(Order::Go)?;
    newborn.listen(console, &outside, hooks_cwd.as_ref())?;
    Ok(newborn)
}

impl From<coracle_cgroup::Error> for LaunchError {
    fn from(error: coracle_cgroup::Error) -> LaunchError {
        LaunchError::Cgroup(Box::new(error))
    }
}

impl LaunchError {
    /// What kind of failure of the init it was.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        match self {
            LaunchError::Init(failure) => Some(failure.kind),
            LaunchError::Hook(_) => Some(Kind::Hook),
            _ => None,
        }
    }
}

impl Newborn {
    /// Lets it go on, on record now: an init to its barrier, any other process to its program. Its pidfd.
    pub(crate) fn keep(mut self, role: Keep) -> Result<OwnedFd, LaunchError> {
        self.order(Order::Recorded)?;
        if role == Keep::UntilProgram {
            match self.link.next_word() {
                // execve has closed it.
                Ok(Heard::End) => {}
                Ok(Heard::Word(Word::Failed(failure), _)) => return Err(LaunchError::Init(failure)),
                Ok(Heard::Word(..)) => return Err(self.died(Errno::EPROTO)),
                Err(errno) => return Err(self.died(errno)),
            }
        }
        self.reap_between()?;
        self.pidfd
            .take()
            .ok_or_else(|| LaunchError::Died("no pidfd".to_owned()))
    }

    /// A copy of its pidfd.
    pub(crate) fn pidfd(&self) -> Option<&OwnedFd> {
        self.pidfd.as_ref()
    }

    /// From the process between to the one that it has cloned.
    fn second(mut self) -> Result<Newborn, LaunchError> {
        let Some(pidfd) = self.expect_cloned()? else {
            return Err(LaunchError::Died("no pidfd came along".to_owned()));
        };
        self.between = self.pidfd.replace(pidfd);
        let pidfd = self
            .pidfd
            .as_ref()
            .ok_or_else(|| LaunchError::Died("no pidfd".to_owned()))?;
        self.pid = pidfd::pid(pidfd).map_err(|source| call("find the init's pid", source))?;
        Ok(self)
    }

    /// It is ours to reap where the init is our child too; else the monitor reaps both.
    fn reap_between(&mut self) -> Result<(), LaunchError> {
        match self.between.take() {
            Some(between) if self.parent == Parent::Direct => wait::wait(Id::Pidfd(between.as_fd()))
                .map(drop)
                .map_err(|source| call("reap the process between", source)),
            _ => Ok(()),
        }
    }

    fn expect_cloned(&mut self) -> Result<Option<OwnedFd>, LaunchError> {
        match self.link.next_word() {
            Ok(Heard::Word(Word::Cloned, pidfd)) => Ok(pidfd),
            Ok(Heard::Word(Word::Failed(failure), _)) => Err(LaunchError::Init(failure)),
            Ok(Heard::Word(..)) => Err(self.died(Errno::EPROTO)),
            Ok(Heard::End) => Err(self.died(Errno::EPIPE)),
            Err(errno) => Err(self.died(errno)),
        }
    }

    /// Serves it until it is ready.
    fn listen(
        &mut self,
        mut console: Option<Console>,
        outside: &Outside<'_>,
        hooks_cwd: Option<&OwnedFd>,
    ) -> Result<(), LaunchError> {
        loop {
            match self.link.next_word() {
                Ok(Heard::Word(Word::Ready, _)) => return Ok(()),
                Ok(Heard::Word(Word::Failed(failure), _)) => return Err(LaunchError::Init(failure)),
                Ok(Heard::Word(Word::Warning(text), _)) => self.warnings.push(text),
                Ok(Heard::Word(Word::Terminal, Some(master))) => match console.take() {
                    Some(Console::Socket(socket)) => {
                        scm::send(&socket, b"/dev/ptmx", &[master.as_fd()]).map_err(|errno| {
                            let source = coracle_kernel::Error::new("sendmsg", "console socket", errno);
                            call("send the terminal", source)
                        })?;
                    }
                    Some(Console::Return) | None => self.terminal = Some(master),
                },
                Ok(Heard::Word(Word::Mounted, _)) => {
                    if let (Some(maps), Some(cwd)) = (&outside.init, hooks_cwd) {
                        maps.run_hooks(self.pid, cwd)?;
                    }
                    self.order(Order::HooksDone)?;
                }
                Ok(Heard::Word(..)) => return Err(self.died(Errno::EPROTO)),
                Ok(Heard::End) => return Err(self.died(Errno::EPIPE)),
                Err(errno) => return Err(self.died(errno)),
            }
        }
    }

    fn order(&self, order: Order) -> Result<(), LaunchError> {
        match self.link.order(order) {
            Ok(()) => Ok(()),
            // It is gone; perhaps it has said why.
            Err(errno) => match self.link.next_word() {
                Ok(Heard::Word(Word::Failed(failure), _)) => Err(LaunchError::Init(failure)),
                _ => Err(self.died(errno)),
            },
        }
    }

    /// What became of it, as far as we may know.
    fn died(&self, errno: Errno) -> LaunchError {
        let ended = self
            .pidfd
            .as_ref()
            .filter(|_| self.parent == Parent::Direct)
            .and_then(|pidfd| {
                let soon = Some(Duration::from_millis(100));
                epoll::wait_one(pidfd, epoll::Interest::READ, soon).ok()?;
                wait::peek(Id::Pidfd(pidfd.as_fd())).ok()?
            });
        LaunchError::Died(match ended {
            Some(exit) => match exit.status {
                wait::Status::Exited(code) => format!("exit status {code}"),
                wait::Status::Signaled(signal) => {
                    let name =
                        Signal::from_number(signal).map_or_else(|| signal.to_string(), |s| s.to_string());
                    format!("killed by {name}")
                }
            },
            None => errno.to_string().to_lowercase(),
        })
    }
}

impl Drop for Newborn {
    fn drop(&mut self) {
        // Dead already is as good, here and below. It may stand still in a frozen cgroup.
        if let Some(between) = &self.between {
            let _ = pidfd::send_signal(between, Signal::KILL);
        }
        let _ = self.reap_between();
        let Some(pidfd) = &self.pidfd else { return };
        let _ = pidfd::send_signal(pidfd, Signal::KILL);
        if self.parent == Parent::Direct {
            let _ = wait::wait(Id::Pidfd(pidfd.as_fd()));
        }
    }
}

/// Until when a launch is our business.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Until it waits at its barrier.
    AtBarrier,
    /// Until it has become its program.
    UntilProgram,
}

pub(super) fn call(doing: &'static str, source: coracle_kernel::Error) -> LaunchError {
    LaunchError::Call { doing, source }
}
