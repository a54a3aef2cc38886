//! Those who look on: pipes that get what a container writes, beside its log, and its standard input.
//!
//! A container never waits for them. What does not fit into a pipe when it is written is dropped for that one session,
//! and a line says how much as soon as there is room; the log has it all.

use std::os::fd::OwnedFd;

use coracle_kernel::epoll::Interest;
use coracle_kernel::{Errno, fd};
use coracle_wire::{Attach, Attached as Answer, ContainerState, FailKind};

use crate::connection::failed;
use crate::container::{Output, Reply};
use crate::log::Stream;
use crate::monitor::{Monitor, Token};
use crate::refusal::{Outcome, kernel, not_in_state};

/// Most sessions of one container.
const MAX_ATTACHED: usize = 64;

/// What a pipe is made to hold when its last line does not fit: more than a daemon asks for at first.
const LAST_PIPE_BYTES: usize = 512 << 10;

/// A session: both its outputs, those that it wants.
#[derive(Debug)]
pub(crate) struct Attached {
    outputs: [Option<Sink>; 2],
}

/// The writing end of a session's pipe.
#[derive(Debug)]
struct Sink {
    /// What its token carries.
    serial: u32,
    fd: OwnedFd,
    /// Bytes that did not fit since the last line that says so.
    dropped: u64,
}

impl Attached {
    /// Passes on what came out of a stream; whether anybody is left to look.
    pub(crate) fn show(&mut self, stream: Stream, bytes: &[u8]) -> bool {
        let slot = self.slot(stream);
        if slot.as_mut().is_some_and(|sink| !sink.write(bytes)) {
            *slot = None;
        }
        self.is_open()
    }

    /// The stream has ended.
    pub(crate) fn end(&mut self, stream: Stream) {
        if let Some(sink) = self.slot(stream).take() {
            sink.finish();
        }
    }

    fn is_open(&self) -> bool {
        self.outputs.iter().any(Option::is_some)
    }

    fn slot(&mut self, stream: Stream) -> &mut Option<Sink> {
        let [stdout, stderr] = &mut self.outputs;
        match stream {
            Stream::Stdout => stdout,
            Stream::Stderr => stderr,
        }
    }
}

impl Sink {
    /// Whether the other end is still there.
    fn write(&mut self, bytes: &[u8]) -> bool {
        if self.dropped > 0 {
            // Only once the other side has taken everything: so there is one such line for a pipe's fill of output.
            if fd::readable_bytes(&self.fd).is_ok_and(|waiting| waiting > 0) {
                self.dropped += bytes.len() as u64;
                return true;
            }
            match fd::write(&self.fd, self.note().as_bytes()) {
                Ok(_) => self.dropped = 0,
                Err(Errno::EAGAIN) => {
                    self.dropped += bytes.len() as u64;
                    return true;
                }
                Err(_) => return false,
            }
        }
        let written = match fd::write(&self.fd, bytes) {
            Ok(written) => written,
            Err(Errno::EAGAIN) => 0,
            Err(_) => return false,
        };
        self.dropped += (bytes.len() - written) as u64;
        true
    }

    /// Tells of what is missing still: nobody can once the pipe is closed.
    fn finish(self) {
        if self.dropped > 0 {
            // It is full of what has not been read yet. Where it may not grow, the log alone knows.
            let _ = fd::set_pipe_size(&self.fd, LAST_PIPE_BYTES);
            let _ = fd::write(&self.fd, self.note().as_bytes());
        }
    }

    /// The line in the place of what was dropped. Less than `PIPE_BUF`: it is written as a whole or not at all.
    fn note(&self) -> String {
        format!(
            "\r\ncoracle: {} bytes of output are not shown here\r\n",
            self.dropped
        )
    }
}

impl Monitor {
    /// Lets a session look on.
    pub(crate) fn attach(
        &mut self,
        reply: Reply,
        attach: &Attach,
        mut fds: impl Iterator<Item = OwnedFd>,
    ) -> Outcome {
        let index = self.find(&attach.container_id)?;
        let serials = [self.next_serial(), self.next_serial()];
        let Some(container) = self.containers.get_mut(index) else {
            return Ok(());
        };
        let state = container.state;
        if !matches!(state, ContainerState::Created | ContainerState::Running) {
            return Err(not_in_state(container, "attach to", state));
        }
        if container.attached.len() >= MAX_ATTACHED {
            return Err(failed(
                FailKind::State,
                format!("more than {MAX_ATTACHED} sessions are attached"),
            ));
        }
        let mut outputs = [None, None];
        let wanted = [attach.stdout, attach.stderr];
        for (((sink, wanted), serial), source) in outputs
            .iter_mut()
            .zip(wanted)
            .zip(serials)
            .zip(&container.outputs)
        {
            let Some(fd) = wanted.then(|| fds.next()).flatten() else {
                continue;
            };
            // A stream that has ended, or that a terminal does not have, ends at once.
            if source.is_none() {
                continue;
            }
            fd::set_nonblocking(&fd, true).map_err(kernel("set up a pipe"))?;
            // Nothing is asked for: that nobody reads any more is told in any case.
            self.epoll
                .add(&fd, Token::Attached.with(serial), Interest::empty())
                .map_err(kernel("watch a pipe"))?;
            *sink = Some(Sink {
                serial,
                fd,
                dropped: 0,
            });
        }
        let [stdout, _] = &container.outputs;
        let terminal = stdout.as_ref().filter(|output| output.terminal);
        let given = match terminal {
            Some(Output { fd, .. }) => Some(fd::dup(fd).map_err(kernel("duplicate the terminal"))?),
            None if !attach.stdin => None,
            None if container.stdin_once => container.stdin.take(),
            None => {
                let copy = container.stdin.as_ref().map(fd::dup).transpose();
                copy.map_err(kernel("duplicate the container's input"))?
            }
        };
        let answer = Answer {
            tty: terminal.is_some(),
            stdin: terminal.is_none() && given.is_some(),
        };
        let attached = Attached { outputs };
        if attached.is_open() {
            container.attached.push(attached);
        }
        self.answer(reply, answer, given.into_iter().collect());
        Ok(())
    }

    /// Lets go of a pipe that nobody reads any more.
    pub(crate) fn detach(&mut self, serial: u32) {
        for container in &mut self.containers {
            container.attached.retain_mut(|attached| {
                for sink in &mut attached.outputs {
                    sink.take_if(|sink| sink.serial == serial);
                }
                attached.is_open()
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_told_of_and_nobody_waits() {
        let (read, write) = fd::pipe().unwrap();
        fd::set_nonblocking(&write, true).unwrap();
        fd::set_nonblocking(&read, true).unwrap();
        fd::set_pipe_size(&write, 4096).unwrap();
        let sink = |fd| Sink {
            serial: 1,
            fd,
            dropped: 0,
        };
        let mut attached = Attached {
            outputs: [Some(sink(write)), None],
        };
        for _ in 0..10 {
            assert!(attached.show(Stream::Stdout, &[b'x'; 1000]));
            assert!(attached.show(Stream::Stderr, b"nobody wants it"));
        }
        let mut seen = vec![0; 10_000];
        let count = fd::read(&read, &mut seen).unwrap();
        assert!(seen[..count].iter().all(|byte| *byte == b'x'));
        let dropped = 10_000 - count;
        assert!(attached.show(Stream::Stdout, b"end"));
        let count = fd::read(&read, &mut seen).unwrap();
        let text = String::from_utf8_lossy(&seen[..count]).into_owned();
        assert_eq!(
            text,
            format!("\r\ncoracle: {dropped} bytes of output are not shown here\r\nend")
        );
        drop(read);
        assert!(!attached.show(Stream::Stdout, b"x"), "nobody is there any more");
    }

    #[test]
    fn what_is_missing_at_the_end_is_told_though_the_pipe_is_full() {
        let (read, write) = fd::pipe().unwrap();
        fd::set_nonblocking(&write, true).unwrap();
        fd::set_pipe_size(&write, 256 << 10).unwrap();
        let mut attached = Attached {
            outputs: [
                Some(Sink {
                    serial: 1,
                    fd: write,
                    dropped: 0,
                }),
                None,
            ],
        };
        for _ in 0..30 {
            assert!(attached.show(Stream::Stdout, &[b'x'; 16 << 10]));
        }
        attached.end(Stream::Stdout);
        let mut seen = Vec::new();
        std::io::Read::read_to_end(&mut std::fs::File::from(read), &mut seen).unwrap();
        let dropped = (30 * (16 << 10)) - (256 << 10);
        let note = format!("\r\ncoracle: {dropped} bytes of output are not shown here\r\n");
        assert!(seen.ends_with(note.as_bytes()));
        assert_eq!(seen.len(), (256 << 10) + note.len());
    }

    #[test]
    fn it_is_over_when_its_streams_are() {
        let (_read, write) = fd::pipe().unwrap();
        let sink = Sink {
            serial: 1,
            fd: write,
            dropped: 0,
        };
        let mut attached = Attached {
            outputs: [None, Some(sink)],
        };
        attached.end(Stream::Stdout);
        assert!(attached.is_open());
        attached.end(Stream::Stderr);
        assert!(!attached.is_open());
    }
}
