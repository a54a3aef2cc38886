//! Copying from and to the descriptors of a process, and the end of it.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Buf as _;
use coracle_kernel::tty::{self, Size};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::Process;
use crate::chunk::{Chunk, Kind, Pool};
use crate::link::Piece;
use crate::status::Outcome;
use crate::writer::Send;

/// Bytes read at a time: a pipe's buffer.
const CHUNK: usize = 64 << 10;
/// Chunks of a session: one of each output being written, one being read.
const CHUNKS: usize = 3;
/// What is still read of an output that others keep filling after the drain time: as much as the largest pipe that an
/// unprivileged process can make, so everything that the process itself has written is among it.
const AFTER_DRAIN: usize = 1 << 20;

/// A descriptor that is waited for.
type Fd = Arc<AsyncFd<OwnedFd>>;

/// What a client has sent for a process.
pub(crate) struct Inputs {
    /// Its input; the end of the channel is the end of the input.
    pub(crate) stdin: mpsc::UnboundedReceiver<Piece>,
    /// The size of the terminal.
    pub(crate) size: watch::Receiver<Option<Size>>,
    /// Whether the client gave stdout and stderr up.
    pub(crate) given_up: [watch::Receiver<bool>; 2],
}

/// The streams that output goes to; what has none is read and dropped.
pub(crate) struct Outputs {
    pub(crate) stdout: Option<u32>,
    pub(crate) stderr: Option<u32>,
    pub(crate) to: mpsc::Sender<Send>,
}

/// Copies until the process has ended and its output is sent: to its end, or if others hold it open, for as long as
/// there is something in it after the drain time.
pub(crate) async fn copy(
    process: Process,
    inputs: Inputs,
    outputs: Outputs,
    drain: Duration,
) -> io::Result<Outcome> {
    let Process {
        stdin,
        stdout,
        stderr,
        tty,
        exit,
        guard,
    } = process;
    // declared first, so dropped last
    let _guard = guard;
    let tty_interest = match (&stdin, &stdout) {
        (_, Some(_)) => Interest::WRITABLE,
        (Some(_), None) => Interest::READABLE,
        (None, None) => Interest::READABLE | Interest::WRITABLE,
    };
    let tty = tty.map(|fd| register(fd, tty_interest)).transpose()?;
    let stdin = or_tty(stdin, tty.as_ref(), Interest::WRITABLE)?;
    // Who attaches is given the output apart: the terminal's is read by somebody else.
    let of_tty = tty.as_ref().filter(|_| exit.is_some());
    let stdout = or_tty(stdout, of_tty, Interest::READABLE)?;
    let stderr = stderr.map(|fd| register(fd, Interest::READABLE)).transpose()?;

    let Inputs {
        stdin: pieces,
        size,
        given_up: [no_stdout, no_stderr],
    } = inputs;
    let (exited, exit_time) = watch::channel(None);
    let pool = Pool::new(Kind::Memory, CHUNKS, CHUNK);
    let output = |source: Option<Fd>, stream, given_up| {
        let (exit_time, pool, to) = (exit_time.clone(), Arc::clone(&pool), outputs.to.clone());
        async move {
            let Some(source) = source else { return };
            let end = End {
                exited: exit_time,
                drain,
                most_after: AFTER_DRAIN,
            };
            tokio::select! {
                () = is_true(given_up) => {}
                () = copy_out(&source, stream, &to, &pool, end) => {}
            }
        }
    };
    let silent = stdout.is_none() && stderr.is_none();
    let reading = async {
        tokio::join!(
            output(stdout, outputs.stdout, no_stdout),
            output(stderr, outputs.stderr, no_stderr),
        );
    };
    let (fed, input_over) = oneshot::channel::<()>();
    let feeding = async {
        if let Some(stdin) = stdin {
            feed(&stdin, pieces).await;
        }
        drop(fed);
    };
    let ending = async {
        let Some(exit) = exit else {
            // an attachment: joined with the end of its output, if it has any
            if silent {
                let _ = input_over.await;
            }
            return Outcome::Exit(0);
        };
        let code = exit.await;
        exited.send_replace(Some(Instant::now()));
        match code {
            Ok(code) => Outcome::Exit(code),
            Err(_) => Outcome::Failed("the exit code of the process is lost".to_owned()),
        }
    };
    let beside = async {
        // a size comes before what was typed after it
        tokio::join!(biased; resize(tty, size), feeding);
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        ((), outcome) = async { tokio::join!(reading, ending) } => Ok(outcome),
        never = beside => match never {},
    }
}

/// When to stop reading an output that others hold open.
struct End {
    /// When the process exited.
    exited: watch::Receiver<Option<Instant>>,
    drain: Duration,
    /// Bytes that are still read when the time is over.
    most_after: usize,
}

impl End {
    /// Returns when the time after the exit is over; never for an attachment.
    async fn due(&mut self) {
        let exited = match self.exited.wait_for(Option::is_some).await {
            Ok(time) => *time,
            Err(_) => None,
        };
        match exited {
            Some(time) => tokio::time::sleep_until(time + self.drain).await,
            None => std::future::pending().await,
        }
    }

    fn is_over(&self) -> bool {
        self.exited
            .borrow()
            .is_some_and(|time| time + self.drain <= Instant::now())
    }
}

/// Copies an output to its end.
async fn copy_out(source: &Fd, stream: Option<u32>, to: &mpsc::Sender<Send>, pool: &Arc<Pool>, mut end: End) {
    loop {
        let ready = tokio::select! {
            biased;
            ready = source.readable() => ready,
            () = end.due() => break,
        };
        let Ok(mut ready) = ready else { return };
        let mut chunk = pool.take().await;
        match ready.try_io(|fd| chunk.fill(fd.get_ref(), CHUNK)) {
            // not readable after all, and no longer said to be
            Err(_) => {}
            Ok(Ok(0) | Err(_)) => return,
            Ok(Ok(_)) => {
                if send(to, stream, chunk).await.is_err() {
                    return;
                }
            }
        }
        // readable without end is no reason never to look at the time
        if end.is_over() {
            break;
        }
    }
    let mut left = end.most_after;
    while left > 0 {
        let mut chunk = pool.take().await;
        // empty, or at its end
        if !matches!(chunk.fill(source.get_ref(), left), Ok(1..)) {
            return;
        }
        left -= chunk.len();
        if send(to, stream, chunk).await.is_err() {
            return;
        }
    }
}

async fn send(
    to: &mpsc::Sender<Send>,
    stream: Option<u32>,
    chunk: Chunk,
) -> Result<(), mpsc::error::SendError<Send>> {
    match stream {
        Some(stream) => to.send(Send::Data(stream, chunk)).await,
        None => Ok(()),
    }
}

/// Writes what comes until the input ends, or until nobody reads it any more.
async fn feed(target: &Fd, mut pieces: mpsc::UnboundedReceiver<Piece>) {
    loop {
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            // the last reader of a pipe is gone
            _ = target.ready(Interest::ERROR) => return,
        };
        let Some(mut piece) = piece else { return };
        while piece.bytes.has_remaining() {
            let wrote = target
                .async_io(Interest::WRITABLE, |fd| {
                    Ok(coracle_kernel::fd::write(fd, &piece.bytes)?)
                })
                .await;
            match wrote {
                Ok(wrote) => piece.bytes.advance(wrote),
                Err(_) => return,
            }
        }
    }
}

/// Gives a terminal the sizes that come.
async fn resize(tty: Option<Fd>, mut sizes: watch::Receiver<Option<Size>>) {
    let Some(tty) = tty else { return };
    loop {
        let size = *sizes.borrow_and_update();
        if let Some(size) = size
            && let Err(error) = tty::set_size(tty.get_ref(), size)
        {
            tracing::debug!(%error, "terminal not resized");
        }
        if sizes.changed().await.is_err() {
            return;
        }
    }
}

/// Returns when it is true; never if that can no longer be.
async fn is_true(mut flag: watch::Receiver<bool>) {
    if flag.wait_for(|set| *set).await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[expect(
    deprecated,
    reason = "its successor is unsafe for descriptors in general; an OwnedFd keeps its promise"
)]
fn register(fd: OwnedFd, interest: Interest) -> io::Result<Fd> {
    // a blocking descriptor would stop a thread of the server, not only its session
    coracle_kernel::fd::set_nonblocking(&fd, true)?;
    Ok(Arc::new(AsyncFd::with_interest(fd, interest)?))
}

fn or_tty(fd: Option<OwnedFd>, tty: Option<&Fd>, interest: Interest) -> io::Result<Option<Fd>> {
    match fd {
        Some(fd) => register(fd, interest).map(Some),
        None => Ok(tty.cloned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a pipe that another has filled and holds open after the exit; how many bytes were sent.
    async fn read_after_exit(filled: usize, most_after: usize) -> usize {
        let (read, write) = coracle_kernel::fd::pipe().unwrap();
        assert_eq!(coracle_kernel::fd::write(&write, &vec![7; filled]), Ok(filled));
        let source = register(read, Interest::READABLE).unwrap();
        let end = End {
            exited: watch::channel(Some(Instant::now())).1,
            drain: Duration::ZERO,
            most_after,
        };
        let (to, mut sent) = mpsc::channel(100);
        copy_out(&source, Some(1), &to, &Pool::new(Kind::Memory, 100, 1000), end).await;
        drop(to);
        let mut bytes = 0;
        while let Some(Send::Data(1, chunk)) = sent.recv().await {
            bytes += chunk.len();
        }
        bytes
    }

    #[tokio::test]
    async fn after_the_drain_time_an_output_is_read_until_it_is_empty_or_until_enough() {
        assert_eq!(read_after_exit(40_000, 1 << 20).await, 40_000);
        // one chunk before the time is looked at
        assert_eq!(read_after_exit(40_000, 5_500).await, 1000 + 5_500);
        assert_eq!(read_after_exit(0, 1 << 20).await, 0);
    }

    #[tokio::test]
    async fn who_attaches_to_a_terminal_without_output_takes_none_of_it() {
        let master = tty::open_master().unwrap();
        tty::unlock(&master).unwrap();
        let mut slave = std::fs::File::from(tty::open_slave(&master).unwrap());
        let process = Process {
            stdin: None,
            stdout: None,
            stderr: None,
            tty: Some(master.try_clone().unwrap()),
            exit: None,
            guard: Box::new(()),
        };
        let (input, stdin) = mpsc::unbounded_channel();
        let inputs = Inputs {
            stdin,
            size: watch::channel(None).1,
            given_up: [watch::channel(false).1, watch::channel(false).1],
        };
        let outputs = Outputs {
            stdout: None,
            stderr: None,
            to: mpsc::channel(1).0,
        };
        io::Write::write_all(&mut slave, b"for the log").unwrap();
        let session = copy(process, inputs, outputs, Duration::ZERO);
        let session = tokio::time::timeout(Duration::from_millis(100), session);
        assert!(session.await.is_err(), "it ended before its input");
        drop(input);
        let mut seen = [0; 64];
        let length = coracle_kernel::fd::read(&master, &mut seen).unwrap();
        assert_eq!(&seen[..length], b"for the log");
    }
}
