//! The loop: descriptors that are ready, children that ended, deadlines that passed.

use std::os::fd::{AsFd, OwnedFd};

use coracle_kernel::epoll::{Epoll, Event, Interest};
use coracle_kernel::path::Kind as FileKind;
use coracle_kernel::signal::{self, Set, Signal, SignalFd};
use coracle_kernel::wait::{self, Exit, Id};
use coracle_kernel::{Errno, creds, fd, path};
use coracle_wire::{Body, LISTENER_FD, LogLost, Oom};

use crate::connection::{Closed, Connection};
use crate::container::{Container, Output, Read, Reply};
use crate::deadlines::deadline;
use crate::helper::{self, Helper, Job, Work};
use crate::log::Stream;
use crate::say;

/// Ends of children that nobody knows yet, at most: beyond them the oldest is none that a helper could still tell of.
const MAX_STRANGERS: usize = 64;

/// What the monitor's own out-of-memory score is to be: the last to go, but for the kernel itself.
const OOM_SCORE: &str = "-999";

/// Why a monitor ends, or does not begin.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// A system call without which nothing goes.
    #[error("cannot {doing}")]
    Call {
        /// What was being done.
        doing: &'static str,
        /// The call.
        #[source]
        source: coracle_kernel::Error,
    },
    /// Descriptor 3 is not what it has to be.
    #[error("descriptor 3 is neither a listening socket nor a state file")]
    NoListener,
    /// The state of the program before is not one that this program understands.
    #[error("state of the monitor before: {0}")]
    State(String),
}

/// A pod's monitor.
#[derive(Debug)]
pub(crate) struct Monitor {
    pub(crate) epoll: Epoll,
    pub(crate) listener: OwnedFd,
    signals: SignalFd,
    pub(crate) connection: Option<Connection>,
    /// Number of the connection: answers go only to the one that asked.
    pub(crate) connection_number: u64,
    pub(crate) sandbox: Option<Sandbox>,
    pub(crate) containers: Vec<Container>,
    pub(crate) execs: Vec<Exec>,
    pub(crate) helpers: Vec<Helper>,
    /// Children that ended while helpers were at work: one of them may be what a helper is about to tell of.
    pub(crate) strangers: Vec<Exit>,
    /// A helper's report is being taken in.
    pub(crate) telling: bool,
    /// A helper died, and may have left a child that nobody knows.
    pub(crate) lost_child: bool,
    last_serial: u32,
    /// The score that helpers and what they make get back.
    pub(crate) oom_score: String,
    /// A program to become as soon as no helper is at work.
    pub(crate) upgrade: Option<(Reply, OwnedFd)>,
    /// It was told to end.
    pub(crate) ending: bool,
}

/// The pod.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) pod_id: String,
    pub(crate) pod_dir: String,
    pub(crate) ipc: Option<OwnedFd>,
    pub(crate) uts: Option<OwnedFd>,
    /// The mount namespace with the pod's /dev/shm and files.
    pub(crate) mnt: Option<OwnedFd>,
    /// The pid namespace that the containers share, and its init.
    pub(crate) init: Option<PodInit>,
}

/// The init of a pid namespace that containers share.
#[derive(Debug)]
pub(crate) struct PodInit {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) namespace: OwnedFd,
}

/// A running process of an exec.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) id: String,
    pub(crate) container_id: String,
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
}

/// What a token stands for; the lower half is a serial number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Token {
    Listener = 1,
    Connection,
    Signals,
    Helper,
    Init,
    Stdout,
    Stderr,
    Oom,
    Starting,
    Exec,
    Attached,
}

impl Token {
    const ALL: [Token; 11] = [
        Token::Listener,
        Token::Connection,
        Token::Signals,
        Token::Helper,
        Token::Init,
        Token::Stdout,
        Token::Stderr,
        Token::Oom,
        Token::Starting,
        Token::Exec,
        Token::Attached,
    ];

    pub(crate) fn with(self, serial: u32) -> u64 {
        u64::from(self as u8) << 32 | u64::from(serial)
    }

    fn split(token: u64) -> Option<(Token, u32)> {
        let kind = Token::ALL
            .into_iter()
            .find(|kind| u64::from(*kind as u8) == token >> 32)?;
        Some((kind, u32::try_from(token & u64::from(u32::MAX)).ok()?))
    }
}

impl Monitor {
    /// Takes up its duty, or that of the program before it.
    pub(crate) fn begin() -> Result<Monitor, MonitorError> {
        let given = fd::inherited(LISTENER_FD).map_err(call("take descriptor 3"))?;
        match path::stat(&given).map_err(call("look at descriptor 3"))?.kind {
            FileKind::Socket => {
                let oom_score = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
                Monitor::new(given, &oom_score)
            }
            FileKind::File => Monitor::resume(given),
            _ => Err(MonitorError::NoListener),
        }
    }

    /// A monitor with nothing in it.
    pub(crate) fn new(listener: OwnedFd, oom_score: &str) -> Result<Monitor, MonitorError> {
        let _ = std::env::set_current_dir("/");
        // Where the host refuses it, it stays as it is, the nearest there is.
        let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
        let _ = creds::set_name("coracle-monitor");
        creds::set_child_subreaper(true).map_err(call("become the reaper of the pod"))?;
        let children = Set::EMPTY.with(Signal::CHLD);
        signal::set_mask(children.with(Signal::HUP));
        let signals = SignalFd::new(children).map_err(call("watch for signals"))?;
        fd::set_nonblocking(&listener, true).map_err(call("set up the listener"))?;
        let epoll = Epoll::new().map_err(call("make an epoll instance"))?;
        let watch = |fd: &dyn AsFd, token: Token| epoll.add(fd.as_fd(), token.with(0), Interest::READ);
        watch(&listener, Token::Listener).map_err(call("watch the listener"))?;
        watch(&signals, Token::Signals).map_err(call("watch for signals"))?;
        Ok(Monitor {
            epoll,
            listener,
            signals,
            connection: None,
            connection_number: 0,
            sandbox: None,
            containers: Vec::new(),
            execs: Vec::new(),
            helpers: Vec::new(),
            strangers: Vec::new(),
            telling: false,
            lost_child: false,
            last_serial: 0,
            oom_score: oom_score.trim().to_owned(),
            upgrade: None,
            ending: false,
        })
    }

    /// The loop.
    pub(crate) fn serve(mut self) -> Result<(), MonitorError> {
        let mut events = Vec::new();
        loop {
            self.epoll
                .wait(&mut events, self.timeout())
                .map_err(call("wait"))?;
            for event in &events {
                self.handle(*event);
            }
            self.pass_deadlines();
            if self.helpers.is_empty() {
                self.strangers = Vec::new();
                if std::mem::take(&mut self.lost_child) {
                    self.kill_lost_children();
                }
                self.try_upgrade();
            }
            if self.ending && !self.connection.as_ref().is_some_and(Connection::has_unsent) {
                return Ok(());
            }
        }
    }

    /// Answers a request, if its connection is still there.
    pub(crate) fn answer(&mut self, reply: Reply, body: impl Into<Body>, fds: Vec<OwnedFd>) {
        if reply.connection == self.connection_number
            && let Some(connection) = &mut self.connection
        {
            let outcome = connection.answer(reply.id, body.into(), fds);
            self.after_sending(outcome);
        }
    }

    /// Whether the connection that asked is there still.
    pub(crate) fn is_awaited(&self, reply: Reply) -> bool {
        self.connection.is_some() && reply.connection == self.connection_number
    }

    /// Tells the daemon, if there is one.
    pub(crate) fn tell(&mut self, event: impl Into<Body>) {
        if let Some(connection) = &mut self.connection {
            let outcome = connection.event(event.into());
            self.after_sending(outcome);
        }
    }

    /// Clones a helper and watches it.
    pub(crate) fn help(
        &mut self,
        work: impl Work,
        job: Job,
        deadline_ms: u64,
    ) -> Result<(), coracle_kernel::Error> {
        let (child, socket) = helper::spawn(work, &self.oom_score)?;
        let serial = self.next_serial();
        self.epoll
            .add(&socket, Token::Helper.with(serial), Interest::READ)?;
        let deadline_ns = deadline(deadline_ms);
        self.helpers.push(Helper {
            serial,
            child,
            socket,
            deadline_ns,
            step: "begin".to_owned(),
            job,
        });
        Ok(())
    }

    /// Numbers that are not used twice within the life of what they stand for.
    pub(crate) fn next_serial(&mut self) -> u32 {
        self.last_serial = self.last_serial.wrapping_add(1);
        self.last_serial
    }

    /// The container with a serial number.
    pub(crate) fn by_serial(&mut self, serial: u32) -> Option<&mut Container> {
        self.containers
            .iter_mut()
            .find(|container| container.serial == serial)
    }

    /// Watches what a container has to be watched for.
    pub(crate) fn watch(&mut self, serial: u32) -> coracle_kernel::Result<()> {
        let Some(container) = self
            .containers
            .iter()
            .find(|container| container.serial == serial)
        else {
            return Ok(());
        };
        let add =
            |fd: &dyn AsFd, token: Token, interest| self.epoll.add(fd.as_fd(), token.with(serial), interest);
        if let Some(pidfd) = &container.pidfd {
            add(pidfd, Token::Init, Interest::READ)?;
        }
        for (output, token) in container.outputs.iter().zip([Token::Stdout, Token::Stderr]) {
            if let Some(Output { fd, .. }) = output {
                add(fd, token, Interest::READ)?;
            }
        }
        if let Some(oom) = &container.oom {
            add(oom, Token::Oom, oom.interest())?;
        }
        Ok(())
    }

    /// Takes the children that have ended, and passes on what they mean.
    pub(crate) fn reap(&mut self) {
        // Nobody has ended, or nobody is left, is the end of it.
        while let Ok(Some(exit)) = wait::peek(Id::Any) {
            self.helper_ended(exit.pid);
            if wait::try_wait(Id::Process(exit.pid)).is_ok_and(|reaped| reaped.is_some()) {
                self.ended(exit);
            }
        }
    }

    /// An end that nobody was waiting for may be that of a process which a helper is about to tell of.
    pub(crate) fn remember_stranger(&mut self, exit: Exit) {
        if self.helpers.is_empty() && !self.telling {
            return;
        }
        if self.strangers.len() >= MAX_STRANGERS {
            self.strangers.remove(0);
        }
        self.strangers.push(exit);
    }

    /// If this process has ended already.
    pub(crate) fn take_stranger(&mut self, pid: i32) -> Option<Exit> {
        let index = self.strangers.iter().position(|exit| exit.pid == pid)?;
        Some(self.strangers.remove(index))
    }

    fn handle(&mut self, event: Event) {
        let Some((token, serial)) = Token::split(event.token) else {
            return;
        };
        match token {
            Token::Listener => self.accept(),
            Token::Connection => self.converse(event.ready),
            Token::Signals => {
                while self.signals.take().is_some() {}
                self.reap();
            }
            Token::Init | Token::Exec => self.reap(),
            Token::Helper => {
                self.hear(serial);
            }
            Token::Stdout => self.pump(serial, Stream::Stdout),
            Token::Stderr => self.pump(serial, Stream::Stderr),
            Token::Starting => self.go_on_starting(serial),
            Token::Attached => self.detach(serial),
            Token::Oom => {
                let Some(container) = self.by_serial(serial) else {
                    return;
                };
                if container.look_for_oom() {
                    let event = Oom {
                        container_id: container.id.clone(),
                        kills: container.oom_kills,
                    };
                    self.tell(event);
                } else if event.ready.contains(Interest::HANGUP) {
                    // The cgroup is gone.
                    container.oom = None;
                }
            }
        }
    }

    fn accept(&mut self) {
        let Some(connection) = Connection::accept(&self.listener) else {
            return;
        };
        if self.upgrade.is_some() {
            // Whoever asked for it is waiting; the new one comes again, and finds the new program.
            return;
        }
        let watched = self
            .epoll
            .add(&connection, Token::Connection.with(0), Interest::READ);
        if watched.is_ok() {
            // The one before closes with this.
            self.connection = Some(connection);
            self.connection_number += 1;
        }
    }

    fn converse(&mut self, ready: Interest) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        let flushed = if ready.contains(Interest::WRITE) {
            connection.flush()
        } else {
            Ok(())
        };
        let heard = match flushed {
            Ok(()) if self.upgrade.is_none() && ready != Interest::WRITE => connection.receive(),
            Ok(()) => Ok(None),
            Err(error) => Err(error),
        };
        match heard {
            Ok(None) => self.after_sending(Ok(())),
            Ok(Some((id, body, fds))) => {
                let reply = Reply {
                    connection: self.connection_number,
                    id,
                };
                self.request(reply, body, fds);
            }
            Err(error) => self.after_sending(Err(error)),
        }
    }

    /// Waits for room where packets are left, and drops the connection where it is of no use.
    pub(crate) fn after_sending(&mut self, outcome: Result<(), Closed>) {
        let Some(connection) = &self.connection else {
            return;
        };
        let outcome = outcome.and_then(|()| {
            // While an upgrade is due, requests stay in the socket for the new program.
            let mut interest = if self.upgrade.is_none() {
                Interest::READ
            } else {
                Interest::empty()
            };
            interest.set(Interest::WRITE, connection.has_unsent());
            let set = self.epoll.modify(connection, Token::Connection.with(0), interest);
            set.map_err(|error| Closed::Socket(error.errno()))
        });
        if let Err(error) = outcome {
            if !matches!(
                error,
                Closed::End | Closed::Socket(Errno::EPIPE | Errno::ECONNRESET)
            ) {
                say(&format!("connection dropped: {error}"));
            }
            self.connection = None;
        }
    }

    fn pump(&mut self, serial: u32, stream: Stream) {
        let Some(container) = self.by_serial(serial) else {
            return;
        };
        // Level-triggered: what is left comes with the next turn, after the others'.
        let read = container.pump(stream);
        let done =
            read == Read::End && container.exit.is_some() && container.outputs.iter().all(Option::is_none);
        self.tell_of_loss(serial);
        if done {
            self.close_log(serial);
        }
    }

    /// A log that nobody writes to any more is closed; what was lost of it stays known.
    pub(crate) fn close_log(&mut self, serial: u32) {
        if let Some(container) = self.by_serial(serial)
            && let Some(log) = &container.log
            && log.gap().is_none()
        {
            container.log_lost = log.lost();
            container.log = None;
        }
    }

    /// Tells when a loss begins and when it ends.
    pub(crate) fn tell_of_loss(&mut self, serial: u32) {
        let Some(container) = self.by_serial(serial) else {
            return;
        };
        let Some(log) = &container.log else { return };
        let (bytes, gap) = (log.lost(), log.gap());
        if gap.is_some() == container.loss_told {
            return;
        }
        container.loss_told = gap.is_some();
        let errno = gap.map_or(0, |gap| gap.errno.raw());
        let event = LogLost {
            container_id: container.id.clone(),
            bytes,
            errno,
        };
        if let Some(gap) = gap {
            say(&format!(
                "log of container {}: {}, output is dropped",
                event.container_id, gap.errno
            ));
        }
        self.tell(event);
    }
}

/// A failure of a call that the monitor cannot be without.
pub(crate) fn call(doing: &'static str) -> impl FnOnce(coracle_kernel::Error) -> MonitorError {
    move |source| MonitorError::Call { doing, source }
}
