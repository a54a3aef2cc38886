//! A container as its monitor keeps it: the init, the streams, the log, how it ended.

use std::os::fd::{AsFd as _, OwnedFd};

use coracle_cgroup::{Host, Location, OomWatch, Options};
use coracle_container::Release;
use coracle_kernel::wait::Status;
use coracle_kernel::{Errno, epoll, fd, pidfd, signal::Signal, time};
use coracle_wire::{CgroupPath, Container as Listed, ContainerState, Exit};

use crate::attach::Attached;
use crate::log::{Log, Now, Stream};

/// Most bytes read from one stream at a time.
pub(crate) const CHUNK: usize = 16 << 10;

/// Most bytes read from one stream when its container has ended: what a pipe can hold, and no more, for somebody else
/// may go on writing.
const LAST_BYTES: usize = 1 << 20;

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    /// What its tokens carry.
    pub(crate) serial: u32,
    pub(crate) id: String,
    pub(crate) bundle: String,
    pub(crate) state: ContainerState,
    /// 0 before there is an init and after it was reaped.
    pub(crate) pid: i32,
    pub(crate) pidfd: Option<OwnedFd>,
    /// Our end of the barrier at which the init waits.
    pub(crate) start: Option<OwnedFd>,
    /// A start that is under way.
    pub(crate) starting: Option<Starting>,
    /// Standard output (or the terminal) and standard error.
    pub(crate) outputs: [Option<Output>; 2],
    /// The writing end of its standard input, kept open.
    pub(crate) stdin: Option<OwnedFd>,
    /// Whether that end is given away to whoever attaches first, and the input so ends with them.
    pub(crate) stdin_once: bool,
    /// Who looks on.
    pub(crate) attached: Vec<Attached>,
    /// Open until nobody writes to it any more.
    pub(crate) log: Option<Log>,
    /// Bytes that the closed log does not hold.
    pub(crate) log_lost: u64,
    /// Whether the daemon was told of the loss that is going on.
    pub(crate) loss_told: bool,
    pub(crate) cgroup: Vec<CgroupPath>,
    pub(crate) oom: Option<OomWatch>,
    pub(crate) oom_kills: u64,
    pub(crate) exit: Option<Exit>,
    /// Whether the configuration has such hooks.
    pub(crate) poststart: bool,
    pub(crate) poststop: bool,
    /// Who waits for it to be forgotten.
    pub(crate) forgetting: Vec<Reply>,
}

/// To whom an answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    /// Number of the connection: another one has not asked.
    pub(crate) connection: u64,
    /// The request.
    pub(crate) id: u64,
}

/// A start that is under way.
#[derive(Debug)]
pub(crate) struct Starting {
    pub(crate) release: Release,
    /// By the monotonic clock.
    pub(crate) deadline_ns: u64,
    pub(crate) replies: Vec<Reply>,
}

/// A stream on its way to the log.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) fd: OwnedFd,
    /// A line whose end has not come.
    pub(crate) pending: Vec<u8>,
    pub(crate) terminal: bool,
}

/// What a read of a stream gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// Something.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// Nothing ever again.
    End,
}

impl Container {
    /// A container that is about to be made.
    pub(crate) fn new(serial: u32, id: String, bundle: String, log: Option<Log>) -> Container {
        Container {
            serial,
            id,
            bundle,
            state: ContainerState::Creating,
            pid: 0,
            pidfd: None,
            start: None,
            starting: None,
            outputs: [None, None],
            stdin: None,
            stdin_once: false,
            attached: Vec::new(),
            log,
            log_lost: 0,
            loss_told: false,
            cgroup: Vec::new(),
            oom: None,
            oom_kills: 0,
            exit: None,
            poststart: false,
            poststop: false,
            forgetting: Vec::new(),
        }
    }

    /// As the daemon is told of it.
    pub(crate) fn listed(&self) -> Listed {
        Listed {
            container_id: self.id.clone(),
            state: self.state.into(),
            pid: self.pid,
            exit: self.exit,
            log_lost_bytes: self.log.as_ref().map_or(self.log_lost, Log::lost),
            oom_kills: self.oom_kills,
        }
    }

    /// Moves one read's worth from a stream to the log.
    pub(crate) fn pump(&mut self, stream: Stream) -> Read {
        let mut buffer = [0; CHUNK];
        let slot = slot(&mut self.outputs, stream);
        let Some(output) = slot else { return Read::Nothing };
        let read = match fd::read(&output.fd, &mut buffer) {
            Ok(0) => Read::End,
            Ok(count) => Read::Bytes(count),
            Err(Errno::EAGAIN) => Read::Nothing,
            // A terminal whose other side nobody has open.
            Err(_) => Read::End,
        };
        match read {
            Read::Bytes(count) => {
                let bytes = buffer.get(..count).unwrap_or_default();
                if let Some(log) = &mut self.log {
                    log.append(stream, &mut output.pending, bytes, now());
                }
                self.attached.retain_mut(|attached| attached.show(stream, bytes));
            }
            Read::End => {
                if let Some(log) = &mut self.log {
                    log.end(stream, &mut output.pending, now());
                }
                *slot = None;
                self.attached.iter_mut().for_each(|attached| attached.end(stream));
            }
            Read::Nothing => {}
        }
        read
    }

    /// Writes down how the init ended. Everything it wrote is in the log afterwards.
    pub(crate) fn ended(&mut self, status: Status) -> Exit {
        for stream in [Stream::Stdout, Stream::Stderr] {
            let mut total = 0;
            while let Read::Bytes(count) = self.pump(stream) {
                total += count;
                if total >= LAST_BYTES {
                    break;
                }
            }
            // Where others still hold the stream it stays open, but the init's last line is complete.
            if let (Some(log), Some(output)) = (&mut self.log, slot(&mut self.outputs, stream)) {
                log.end(stream, &mut output.pending, now());
            }
        }
        self.look_for_oom();
        let exit = exit_of(status, self.oom_kills > 0);
        self.state = ContainerState::Exited;
        self.exit = Some(exit);
        self.pid = 0;
        self.pidfd = None;
        self.start = None;
        self.stdin = None;
        for mut attached in std::mem::take(&mut self.attached) {
            attached.end(Stream::Stdout);
            attached.end(Stream::Stderr);
        }
        self.oom = None;
        exit
    }

    /// Reads the counter of processes killed for want of memory; whether it has grown.
    pub(crate) fn look_for_oom(&mut self) -> bool {
        let before = self.oom_kills;
        if let Some(oom) = &self.oom {
            // The file goes with the cgroup; what was counted stays.
            self.oom_kills = oom.kills().unwrap_or(before).max(before);
        }
        self.oom_kills > before
    }

    /// Begins to watch for processes killed for want of memory. A host without the controller tells of none.
    pub(crate) fn watch_oom(&mut self) {
        let watch = || {
            let location = location(&self.cgroup)?;
            Host::detect()?
                .manager(&location, Options::default())?
                .watch_oom()
        };
        self.oom = if self.cgroup.is_empty() {
            None
        } else {
            watch().unwrap_or_default()
        };
    }

    /// Ends the init, if there is one.
    pub(crate) fn kill(&self) {
        if let Some(pidfd) = &self.pidfd {
            // Dead already is as good.
            let _ = pidfd::send_signal(pidfd, Signal::KILL);
        }
    }

    /// Whether the init has said something about its start, or closed the socket.
    pub(crate) fn start_is_decided(&self) -> bool {
        let look = |starting: &Starting| {
            epoll::wait_one(
                &starting.release,
                epoll::Interest::READ,
                Some(std::time::Duration::ZERO),
            )
        };
        self.starting
            .as_ref()
            .is_some_and(|starting| look(starting).is_ok_and(|ready| !ready.is_empty()))
    }
}

/// The exit record of a status.
pub(crate) fn exit_of(status: Status, oom: bool) -> Exit {
    let signal = match status {
        Status::Exited(_) => 0,
        Status::Signaled(signal) => signal,
    };
    let finished_at_ns = i64::try_from(time::realtime_ns()).unwrap_or(i64::MAX);
    Exit {
        exit_code: status.code(),
        signal,
        oom,
        finished_at_ns,
    }
}

/// The two clocks.
pub(crate) fn now() -> Now {
    Now {
        wall_ns: time::realtime_ns(),
        monotonic_ns: time::monotonic_ns(),
    }
}

/// A cgroup's place from the wire.
pub(crate) fn location(paths: &[CgroupPath]) -> coracle_cgroup::Result<Location> {
    let map = paths
        .iter()
        .map(|one| (one.controller.clone(), one.path.clone()))
        .collect();
    Location::from_map(&map)
}

/// A cgroup's place for the wire.
pub(crate) fn paths(location: &Location) -> Vec<CgroupPath> {
    location
        .to_map()
        .into_iter()
        .map(|(controller, path)| CgroupPath { controller, path })
        .collect()
}

fn slot(outputs: &mut [Option<Output>; 2], stream: Stream) -> &mut Option<Output> {
    let [stdout, stderr] = outputs;
    match stream {
        Stream::Stdout => stdout,
        Stream::Stderr => stderr,
    }
}

impl Output {
    /// A stream that is read without waiting.
    pub(crate) fn new(fd: OwnedFd, terminal: bool) -> coracle_kernel::Result<Output> {
        fd::set_nonblocking(fd.as_fd(), true)?;
        Ok(Output {
            fd,
            pending: Vec::new(),
            terminal,
        })
    }
}
