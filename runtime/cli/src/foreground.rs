//! A call that stays until the process has ended: signals are passed on, the terminal is copied both ways.

use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coracle_kernel::epoll::{self, Interest};
use coracle_kernel::signal::{self, Set, Signal, SignalFd};
use coracle_kernel::wait::{self, Id};
use coracle_kernel::{Errno, fd, pidfd, tty};

/// Signals are blocked and come by descriptor, from the beginning to the end of this.
#[derive(Debug)]
pub(crate) struct Foreground {
    signals: SignalFd,
    mask: Set,
}

/// The caller's terminal in raw mode, as long as this lives.
struct Raw(tty::Settings);

/// One direction of the terminal: what was read and not yet written.
struct Copy {
    pending: Vec<u8>,
    open: bool,
}

impl Foreground {
    /// Blocks all signals. The clone inherits that and undoes it before its program.
    pub(crate) fn begin() -> anyhow::Result<Foreground> {
        let mask = signal::set_mask(Set::ALL);
        Ok(Foreground {
            signals: SignalFd::new(Set::ALL)?,
            mask,
        })
    }

    /// Serves the process until it ends; its exit code, 128 + number if a signal ended it.
    pub(crate) fn wait(&mut self, process: &OwnedFd, terminal: Option<&OwnedFd>) -> anyhow::Result<u8> {
        let stdin = std::io::stdin();
        let raw = match terminal {
            Some(terminal) if stdin.is_terminal() => {
                copy_size(stdin.as_fd(), terminal.as_fd());
                Some(Raw(tty::set_raw(&stdin)?))
            }
            _ => None,
        };
        let (mut input, mut output) = (Copy::new(), Copy::new());
        loop {
            let mut set = vec![
                (self.signals.as_fd(), Interest::READ),
                (process.as_fd(), Interest::READ),
            ];
            if let Some(terminal) = terminal {
                let mut wanted = Interest::empty();
                wanted.set(Interest::READ, output.open);
                wanted.set(Interest::WRITE, !input.pending.is_empty());
                set.push((terminal.as_fd(), wanted));
                if input.open && input.pending.is_empty() {
                    set.push((stdin.as_fd(), Interest::READ));
                }
            }
            epoll::poll(&mut set, None)?;
            let (signalled, ended) = (!set[0].1.is_empty(), !set[1].1.is_empty());
            let on_terminal = set.get(2).map_or(Interest::empty(), |entry| entry.1);
            let on_stdin = set.get(3).is_some_and(|entry| !entry.1.is_empty());
            if let Some(terminal) = terminal {
                if on_terminal.contains(Interest::WRITE) {
                    input.write_to(terminal.as_fd());
                }
                if output.open && on_terminal.intersects(Interest::READ | Interest::HANGUP | Interest::ERROR)
                {
                    output.read_from(terminal.as_fd());
                    output.write_all_to(std::io::stdout().as_fd());
                }
                if on_stdin {
                    input.read_from(stdin.as_fd());
                }
            }
            if signalled {
                self.pass_on(process, terminal);
            }
            if ended {
                let exit = wait::wait(Id::Pidfd(process.as_fd()))?;
                if let Some(terminal) = terminal {
                    drain(terminal.as_fd(), &mut output);
                }
                drop(raw);
                return Ok(u8::try_from(exit.status.code() & 0xff).unwrap_or(u8::MAX));
            }
        }
    }

    fn pass_on(&self, process: &OwnedFd, terminal: Option<&OwnedFd>) {
        while let Some((signal, _)) = self.signals.take() {
            match signal {
                // Orphans that became ours, as a subreaper; the process itself is left for its own wait.
                Signal::CHLD => reap_others(process),
                Signal::WINCH => {
                    if let Some(terminal) = terminal {
                        copy_size(std::io::stdin().as_fd(), terminal.as_fd());
                    }
                }
                // Ours, when nobody reads what the container writes.
                Signal::PIPE => {}
                // One that has just ended needs no signal any more.
                signal => drop(pidfd::send_signal(process, signal)),
            }
        }
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        // What is pending now was for the process, which is gone.
        while self.signals.take().is_some() {}
        signal::set_mask(self.mask);
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that went away needs no settings.
        let _ = tty::restore(std::io::stdin(), &self.0);
    }
}

impl Copy {
    fn new() -> Copy {
        Copy {
            pending: Vec::new(),
            open: true,
        }
    }

    fn read_from(&mut self, from: BorrowedFd<'_>) {
        let mut buffer = [0; 8192];
        match fd::read(from, &mut buffer) {
            Ok(0) => self.open = false,
            Ok(count) => self
                .pending
                .extend_from_slice(buffer.get(..count).unwrap_or_default()),
            Err(Errno::EAGAIN) => {}
            // EIO: nobody has the other side of the terminal open.
            Err(_) => self.open = false,
        }
    }

    fn write_to(&mut self, to: BorrowedFd<'_>) {
        match fd::write(to, &self.pending) {
            Ok(count) => drop(self.pending.drain(..count)),
            Err(Errno::EAGAIN) => {}
            Err(_) => self.pending.clear(),
        }
    }

    fn write_all_to(&mut self, to: BorrowedFd<'_>) {
        while !self.pending.is_empty() {
            match fd::write(to, &self.pending) {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(Errno::EAGAIN) => {
                    if epoll::wait_one(to, Interest::WRITE, None).is_err() {
                        return;
                    }
                }
                Err(_) => self.pending.clear(),
            }
        }
    }
}

/// Copies what the ended process has left in its terminal.
fn drain(terminal: BorrowedFd<'_>, output: &mut Copy) {
    while output.open {
        let ready = epoll::wait_one(terminal, Interest::READ, Some(std::time::Duration::ZERO));
        if !ready.is_ok_and(|ready| ready.contains(Interest::READ)) {
            return;
        }
        output.read_from(terminal);
        output.write_all_to(std::io::stdout().as_fd());
    }
}

fn copy_size(from: BorrowedFd<'_>, to: BorrowedFd<'_>) {
    // Only a convenience: a program with the wrong size still runs.
    if let Ok(size) = tty::size(from) {
        let _ = tty::set_size(to, size);
    }
}

fn reap_others(process: &OwnedFd) {
    let own = pidfd::pid(process).unwrap_or(0);
    while let Ok(Some(exit)) = wait::peek(Id::Any) {
        if exit.pid == own || wait::try_wait(Id::Process(exit.pid)).is_err() {
            return;
        }
    }
}
