//! Start: the word that lets an init become its program.

use std::os::fd::{AsFd, OwnedFd};

use coracle_kernel::path;
use coracle_kernel::{Errno, scm};
use coracle_spec::{HookState, Status};

use crate::init::{Heard, Link, Order, Word};
use crate::store::{Entry, START};
use crate::{Error, Result, hooks, kill};

/// A start that is under way, for callers that wait for several things at once.
///
/// `Release::begin` says go; then, whenever the socket is readable, [`Release::step`] hears what there is.
#[derive(Debug)]
pub struct Release {
    link: Link,
    entering: bool,
}

impl Release {
    /// Says go over a socket that leads to a waiting init.
    pub fn begin(socket: OwnedFd) -> Result<Release> {
        let link = Link::new(socket);
        link.order(Order::Go).map_err(|errno| gone(errno, false))?;
        Ok(Release {
            link,
            entering: false,
        })
    }

    /// Waits for the next thing that the init says; whether the program runs now.
    pub fn step(&mut self) -> Result<bool> {
        match self.link.next_word() {
            Ok(Heard::Word(Word::Entering, _)) => {
                self.entering = true;
                Ok(false)
            }
            Ok(Heard::Word(Word::Failed(failure), _)) => Err(Error::Init(failure)),
            Ok(Heard::Word(..)) => Err(gone(Errno::EPROTO, self.entering)),
            // execve has closed it. (Killed on its last few steps it looks the same, and its status says the rest.)
            Ok(Heard::End) if self.entering => Ok(true),
            Ok(Heard::End) => Err(gone(Errno::EPIPE, false)),
            Err(errno) => Err(gone(errno, self.entering)),
        }
    }
}

impl AsFd for Release {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.link.as_fd()
    }
}

/// Says go and waits until the program runs.
pub fn release(socket: OwnedFd) -> Result<()> {
    let mut release = Release::begin(socket)?;
    while !release.step()? {}
    Ok(())
}

/// Starts a created container of a store; `socket` where the caller holds it already.
pub fn start_stored(entry: &Entry, socket: Option<OwnedFd>) -> Result<()> {
    if socket.is_none() {
        entry.lock()?;
    }
    let state = entry.state()?.ok_or(Error::NotFound)?;
    let socket = match (socket, entry.status(&state)) {
        (Some(socket), _) => socket,
        (None, Status::Created) => {
            let socket = scm::connect(entry.dir(), START, scm::Kind::Seqpacket, scm::Mode::Blocking)
                .map_err(|source| Error::call("reach the container's init", source))?;
            // Before the word, so that nobody ever finds a running container that looks as if it waited.
            entry.remove_start()?;
            socket
        }
        (None, Status::Stopped) => return Err(Error::Stopped),
        (None, Status::Creating) => return Err(Error::StillCreating),
        (None, Status::Running | Status::Paused) => return Err(Error::AlreadyRunning),
    };
    release(socket)?;
    if state.poststart_hooks {
        let config = entry.config()?;
        let document = HookState::new(
            entry.id(),
            Status::Running,
            state.pid,
            &state.bundle,
            &config.annotations,
        );
        let bundle =
            path::open_dir(&state.bundle).map_err(|source| Error::call("open the bundle", source))?;
        let place = hooks::Place {
            list: "poststart",
            cwd: bundle.as_fd(),
            default_env: &[],
        };
        if let Err(error) = hooks::run(&config.hooks.poststart, place, &document) {
            // The specification: the container is stopped then.
            let _ = kill::kill_all(&state);
            return Err(error.into());
        }
    }
    Ok(())
}

fn gone(errno: Errno, entering: bool) -> Error {
    let when = if entering {
        "while it became its program"
    } else {
        "before it was started"
    };
    let reason = match errno {
        Errno::EPIPE | Errno::ECONNRESET => "container process is already dead".to_owned(),
        other => other.to_string().to_lowercase(),
    };
    Error::Refused(format!("{reason} ({when})"))
}
