//! Exec and attach: the streams of the protocol, joined to those of a process.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_kernel::tty::Size;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::link::{Event, Gone, Link, Piece, Reader, Wire, run};
use crate::negotiate::Protocol;
use crate::process::{Inputs, Outputs, copy};
use crate::resize::Resizes;
use crate::spdy::frame::Reason;
use crate::status::Outcome;
use crate::writer::{QUEUE, Send};
use crate::{AttachRequest, ExecRequest, Limits, Sessions, chain};

/// Streams that a client may have open at once; five mean something.
pub(crate) const MOST_STREAMS: usize = 16;

/// Bytes of input that wait for the process at most.
const BUDGET: usize = 512 << 10;

/// What the session is for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Command<'a> {
    Exec(&'a ExecRequest),
    Attach(&'a AttachRequest),
}

/// Serves one session to its end.
pub(crate) async fn serve<S: Sessions>(
    link: Link,
    protocol: &Protocol,
    command: Command<'_>,
    sessions: &S,
    limits: &Limits,
) -> Result<(), Gone> {
    let Link {
        reader,
        writer,
        clock,
        wire,
    } = link;
    let (to_writer, queue) = mpsc::channel(QUEUE);
    let body = body(reader, to_writer, wire, protocol, command, sessions, limits);
    run(writer, &clock, queue, limits.idle, body).await
}

async fn body<S: Sessions>(
    mut reader: Reader,
    to: mpsc::Sender<Send>,
    wire: Wire,
    protocol: &Protocol,
    command: Command<'_>,
    sessions: &S,
    limits: &Limits,
) -> Result<Reader, Gone> {
    let (mut inbound, opened, inputs) = Inbound::new(to.clone(), wire, protocol, command);
    let work = async {
        let streams = tokio::time::timeout(limits.handshake, opened).await;
        let Ok(Ok(streams)) = streams else {
            return Err(Gone::Handshake(limits.handshake));
        };
        if !wire.has_streams() {
            // tells the client that the connection stands
            let lowest = streams.stdout.or(streams.stderr).or(streams.error);
            to.send(Send::Text(lowest.unwrap_or_default(), Vec::new()))
                .await
                .map_err(|_| Gone::Closed)?;
        }
        let outputs = Outputs {
            stdout: streams.stdout,
            stderr: streams.stderr,
            to: to.clone(),
        };
        Ok((
            streams,
            play(command, sessions, inputs, outputs, limits.drain).await,
        ))
    };
    let (streams, outcome) = tokio::select! {
        gone = inbound.run(&mut reader) => return Err(gone),
        result = work => result?,
    };
    finish(&to, streams, &outcome, protocol.status)
        .await
        .map_err(|_| Gone::Closed)?;
    Ok(reader)
}

/// Has the process, and copies until it has ended; what belongs to it is dropped with the return.
async fn play<S: Sessions>(
    command: Command<'_>,
    sessions: &S,
    inputs: Inputs,
    outputs: Outputs,
    drain: Duration,
) -> Outcome {
    let (process, doing) = match command {
        Command::Exec(request) => (sessions.exec(request).await, "executing command in container"),
        Command::Attach(request) => (sessions.attach(request).await, "attaching to container"),
    };
    let process = match process {
        Ok(process) => process,
        Err(error) => return Outcome::Failed(format!("error {doing}: {}", chain(&error))),
    };
    match copy(process, inputs, outputs, drain).await {
        Ok(outcome) => outcome,
        Err(error) => Outcome::Failed(format!("error {doing}: {error}")),
    }
}

/// Ends output before it tells the status, and closes what the client may still wait for.
async fn finish(
    to: &mpsc::Sender<Send>,
    streams: Streams,
    outcome: &Outcome,
    json: bool,
) -> Result<(), mpsc::error::SendError<Send>> {
    for stream in [streams.stdout, streams.stderr].into_iter().flatten() {
        to.send(Send::Finish(stream)).await?;
    }
    if let Some(error) = streams.error {
        let text = match json {
            true => outcome.status(),
            false => outcome.text().into_bytes(),
        };
        if !text.is_empty() {
            to.send(Send::Text(error, text)).await?;
        }
        to.send(Send::Finish(error)).await?;
    }
    for stream in [streams.stdin, streams.resize].into_iter().flatten() {
        to.send(Send::Finish(stream)).await?;
    }
    to.send(Send::End).await
}

/// The client's streams by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Streams {
    error: Option<u32>,
    stdin: Option<u32>,
    stdout: Option<u32>,
    stderr: Option<u32>,
    resize: Option<u32>,
}

/// What is done with what arrives.
struct Inbound {
    streams: Streams,
    /// Those that the session waits for: a number says that there has to be one.
    expected: Streams,
    has_resize: bool,
    /// Told when the expected streams are there.
    opened: Option<oneshot::Sender<Streams>>,
    /// Dropped at the input's end.
    stdin: Option<mpsc::UnboundedSender<Piece>>,
    budget: Arc<Semaphore>,
    resizes: Resizes,
    size: watch::Sender<Option<Size>>,
    /// Whether the client gave stdout and stderr up.
    given_up: [watch::Sender<bool>; 2],
    to: mpsc::Sender<Send>,
}

impl Inbound {
    fn new(
        to: mpsc::Sender<Send>,
        wire: Wire,
        protocol: &Protocol,
        command: Command<'_>,
    ) -> (Inbound, oneshot::Receiver<Streams>, Inputs) {
        let (tty, stdin, stdout, stderr) = match command {
            Command::Exec(r) => (r.tty, r.stdin, r.stdout, r.stderr),
            Command::Attach(r) => (r.tty, r.stdin, r.stdout, r.stderr),
        };
        let expected = Streams {
            error: Some(3),
            stdin: stdin.then_some(0),
            stdout: stdout.then_some(1),
            stderr: stderr.then_some(2),
            resize: (tty && protocol.resize).then_some(4),
        };
        let (opened, when_opened) = oneshot::channel();
        let (to_stdin, from_stdin) = mpsc::unbounded_channel();
        let (size, sizes) = watch::channel(None);
        let given_up = [watch::channel(false).0, watch::channel(false).0];
        let inputs = Inputs {
            stdin: from_stdin,
            size: sizes,
            given_up: [given_up[0].subscribe(), given_up[1].subscribe()],
        };
        let mut inbound = Inbound {
            // channels have these numbers, and are there from the beginning
            streams: if wire.has_streams() {
                Streams::default()
            } else {
                expected
            },
            expected,
            has_resize: protocol.resize,
            opened: Some(opened),
            // where none is expected, the input of the process ends at once
            stdin: stdin.then_some(to_stdin),
            budget: Arc::new(Semaphore::new(BUDGET)),
            resizes: Resizes::default(),
            size,
            given_up,
            to,
        };
        inbound.tell_if_opened();
        (inbound, when_opened, inputs)
    }

    /// Takes what arrives until the client is gone.
    async fn run(&mut self, reader: &mut Reader) -> Gone {
        loop {
            let done = match reader.next().await {
                Ok(event) => self.take(event, reader).await,
                Err(gone) => Err(gone),
            };
            if let Err(gone) = done {
                return gone;
            }
        }
    }

    async fn take(&mut self, event: Event, reader: &mut Reader) -> Result<(), Gone> {
        match event {
            Event::Opened { stream, headers } => {
                let slot = self.slot(headers.stream_type.as_deref());
                let send = match slot {
                    Some(slot) if slot.is_none() => {
                        *slot = Some(stream);
                        Send::Accept(stream)
                    }
                    _ => {
                        reader.forget(stream);
                        Send::Reset(stream, Reason::Refused)
                    }
                };
                self.send(send).await?;
                self.tell_if_opened();
            }
            Event::Data { stream, bytes } => {
                if self.streams.stdin == Some(stream) {
                    self.feed(reader, bytes).await?;
                } else if self.streams.resize == Some(stream)
                    && let Some(size) = self.resizes.push(&bytes)
                {
                    self.size.send_replace(Some(size));
                }
            }
            Event::Finished { stream } => {
                if self.streams.stdin == Some(stream) {
                    self.stdin = None;
                }
            }
            Event::Reset { stream } => {
                let Streams {
                    stdin,
                    stdout,
                    stderr,
                    ..
                } = self.streams;
                if stdin == Some(stream) {
                    self.stdin = None;
                } else if stdout == Some(stream) {
                    self.given_up[0].send_replace(true);
                } else if stderr == Some(stream) {
                    self.given_up[1].send_replace(true);
                }
            }
            Event::Answer(send) => self.send(send).await?,
        }
        Ok(())
    }

    /// Keeps input for the process, unless nobody reads it any more.
    async fn feed(&mut self, reader: &Reader, bytes: Bytes) -> Result<(), Gone> {
        let Some(stdin) = self.stdin.as_ref().filter(|stdin| !stdin.is_closed()) else {
            return Ok(());
        };
        let piece = reader.hold(&self.budget, bytes).await?;
        if stdin.send(piece).is_err() {
            self.stdin = None;
        }
        Ok(())
    }

    async fn send(&self, send: Send) -> Result<(), Gone> {
        self.to.send(send).await.map_err(|_| Gone::Closed)
    }

    fn slot(&mut self, kind: Option<&str>) -> Option<&mut Option<u32>> {
        match kind? {
            "error" => Some(&mut self.streams.error),
            "stdin" => Some(&mut self.streams.stdin),
            "stdout" => Some(&mut self.streams.stdout),
            "stderr" => Some(&mut self.streams.stderr),
            "resize" if self.has_resize => Some(&mut self.streams.resize),
            _ => None,
        }
    }

    fn tell_if_opened(&mut self) {
        let (have, want) = (self.streams.list(), self.expected.list());
        let missing = |(have, want): (&Option<u32>, &Option<u32>)| have.is_none() && want.is_some();
        if !have.iter().zip(&want).any(missing)
            && let Some(opened) = self.opened.take()
        {
            // nobody waits any more only if the session is being dropped
            let _ = opened.send(self.streams);
        }
    }
}

impl Streams {
    fn list(self) -> [Option<u32>; 5] {
        [self.error, self.stdin, self.stdout, self.stderr, self.resize]
    }
}
