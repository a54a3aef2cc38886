//! Exec and attach with streams: the daemon makes the pipes, a session copies them, the monitor knows neither.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use coracle_kernel::fd;

use super::exec::{process, running};
use crate::error::{Context as _, Result};
use crate::monitor::{AttachCall, ExecCall};
use crate::pod::PodHandle;

/// What may wait in the pipe of a session that looks on: a container never waits for it.
const ATTACH_BYTES: usize = 256 << 10;

/// Which streams a session wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// A terminal, which is all of the others.
    pub tty: bool,
    /// Standard input.
    pub stdin: bool,
    /// Standard output.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
}

/// The daemon's ends of a session's streams, those that there are. Reading and writing them never waits.
#[derive(Debug)]
pub struct Streams {
    /// To be written: the process's input.
    pub stdin: Option<OwnedFd>,
    /// To be read: what it writes.
    pub stdout: Option<OwnedFd>,
    /// To be read: its errors.
    pub stderr: Option<OwnedFd>,
    /// The master of its terminal, for its input and its size. Its output comes from here too, if there is no `stdout`.
    pub terminal: Option<OwnedFd>,
    /// Resolves to the exit code. None for those who look on: it is over when the output ends.
    pub exit: Option<crate::monitor::ExecExit>,
}

/// Whether the container runs.
pub(crate) fn check_running(pod: &PodHandle, id: &str) -> Result<()> {
    running(pod, id).map(drop)
}

/// Runs a command. It is in the container's own cgroup and ends with it; a session that ends closes its streams.
pub(crate) async fn exec(pod: &PodHandle, id: &str, command: Vec<String>, wanted: Wanted) -> Result<Streams> {
    let (hold, monitor) = running(pod, id)?;
    let process = process(pod, id, command, wanted.tty).await?;
    let (stdin_end, stdin) = input(wanted.stdin && !wanted.tty)?;
    let (stdout, stdout_end) = output(wanted.stdout && !wanted.tty)?;
    let (stderr, stderr_end) = output(wanted.stderr && !wanted.tty)?;
    let number = hold.next_exec.fetch_add(1, Ordering::Relaxed);
    let call = ExecCall {
        container: id.to_owned(),
        exec: format!("{id}/session-{number}"),
        process,
        stdio: [stdin_end, stdout_end, stderr_end],
        tty: wanted.tty,
        cgroup: None,
    };
    let started = monitor.exec(call).await?;
    if let Some(terminal) = &started.terminal {
        fd::set_nonblocking(terminal, true).step("set up the terminal")?;
    }
    Ok(Streams {
        stdin,
        stdout,
        stderr,
        terminal: started.terminal,
        exit: Some(started.exit),
    })
}

/// Joins the streams of a container. What it writes from now on is seen, in its log too.
pub(crate) async fn attach(pod: &PodHandle, id: &str, wanted: Wanted) -> Result<Streams> {
    let (_, monitor) = running(pod, id)?;
    let (stdout, stdout_end) = output(wanted.stdout)?;
    let (stderr, stderr_end) = output(wanted.stderr)?;
    for pipe in [&stdout, &stderr].into_iter().flatten() {
        // A smaller one is worse for that session alone.
        let _ = fd::set_pipe_size(pipe, ATTACH_BYTES);
    }
    let call = AttachCall {
        container: id.to_owned(),
        stdin: wanted.stdin,
        stdout: stdout_end,
        stderr: stderr_end,
    };
    let attached = monitor.attach_to(call).await?;
    if let Some(input) = &attached.stdin {
        fd::set_nonblocking(input, true).step("set up the container's input")?;
    }
    Ok(Streams {
        stdin: attached.stdin,
        stdout,
        stderr,
        terminal: attached.terminal,
        exit: None,
    })
}

/// A pipe into a process: its end and ours.
fn input(wanted: bool) -> Result<(Option<OwnedFd>, Option<OwnedFd>)> {
    let Some((theirs, ours)) = pipe(wanted)? else {
        return Ok((None, None));
    };
    fd::set_nonblocking(&ours, true).step("set up a pipe")?;
    Ok((Some(theirs), Some(ours)))
}

/// A pipe out of a process: our end and its.
fn output(wanted: bool) -> Result<(Option<OwnedFd>, Option<OwnedFd>)> {
    let Some((ours, theirs)) = pipe(wanted)? else {
        return Ok((None, None));
    };
    fd::set_nonblocking(&ours, true).step("set up a pipe")?;
    Ok((Some(ours), Some(theirs)))
}

fn pipe(wanted: bool) -> Result<Option<(OwnedFd, OwnedFd)>> {
    wanted.then(fd::pipe).transpose().step("make a pipe")
}
