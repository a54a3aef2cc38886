//! Hooks: programs of the configuration, run with the container's state on their standard input.
//!
//! A hook gets its own environment and nothing of ours or the container's, the bundle as working directory, no
//! descriptor but its three; at its time-out it is killed. What it writes is kept only as far as an error message
//! needs it.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use coracle_kernel::clone::Child;
use coracle_kernel::epoll::{self, Interest};
use coracle_kernel::exec::{Program, Spawn};
use coracle_kernel::signal::Signal;
use coracle_kernel::wait::{self, Id, Status};
use coracle_kernel::{fd, pidfd};
use coracle_spec::{Hook, HookState};

/// How much of a hook's output an error carries.
const MAX_OUTPUT: usize = 4096;

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
#[error("error running {list} hook #{index}: {why}")]
pub struct Error {
    list: &'static str,
    index: usize,
    why: String,
}

/// Where a list of hooks runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    /// The name of the list in the configuration.
    pub(crate) list: &'static str,
    /// The working directory.
    pub(crate) cwd: BorrowedFd<'a>,
    /// The environment of hooks that have none of their own (startContainer hooks get the program's).
    pub(crate) default_env: &'a [CString],
}

/// Runs all hooks of a list in order; the first that fails ends it.
pub(crate) fn run(hooks: &[Hook], place: Place<'_>, state: &HookState<'_>) -> Result<(), Error> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = state.to_json();
    for (index, hook) in hooks.iter().enumerate() {
        one(hook, place, &state).map_err(|why| Error {
            list: place.list,
            index,
            why,
        })?;
    }
    Ok(())
}

/// Runs all hooks of a list whatever becomes of each; the errors.
pub(crate) fn run_all(hooks: &[Hook], place: Place<'_>, state: &HookState<'_>) -> Vec<Error> {
    let state = state.to_json();
    let run = |(index, hook)| {
        one(hook, place, &state).err().map(|why| Error {
            list: place.list,
            index,
            why,
        })
    };
    hooks.iter().enumerate().filter_map(run).collect()
}

fn one(hook: &Hook, place: Place<'_>, state: &str) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let deadline = hook
        .timeout_secs
        .map(|secs| Instant::now() + Duration::from_secs(secs));
    let path = CString::new(hook.path.as_os_str().as_bytes()).map_err(|e| text(&e))?;
    let mut args = strings(&hook.args)?;
    if args.is_empty() {
        args.push(path.clone());
    }
    let own_env = match &hook.env {
        Some(env) => Some(strings(env)?),
        None => None,
    };
    // A file, not a pipe: a hook that does not read its input keeps nobody waiting.
    let input = fd::sealed_memfd(c"state", state.as_bytes()).map_err(|e| text(&e))?;
    fd::rewind(&input).map_err(|e| text(&e))?;
    let (output, writer) = fd::pipe().map_err(|e| text(&e))?;
    let child = Spawn {
        env: own_env.as_deref().unwrap_or(place.default_env),
        fds: &[(input.as_fd(), 0), (writer.as_fd(), 1), (writer.as_fd(), 2)],
        cwd: Some(place.cwd),
        ..Spawn::new(Program::Path(&path), &args)
    }
    .spawn()
    .map_err(|e| text(&e))?;
    drop(writer);
    let said = match listen(&child, &output, deadline) {
        Ok(Some(said)) => said,
        timed_out => {
            // Dead already is as good.
            let _ = pidfd::send_signal(&child.pidfd, Signal::KILL);
            let _ = wait::wait(Id::Pidfd(child.pidfd.as_fd()));
            timed_out.map_err(|e| text(&e))?;
            return Err(format!(
                "{} did not end within {}s",
                hook.path.display(),
                hook.timeout_secs.unwrap_or(0)
            ));
        }
    };
    let said = String::from_utf8_lossy(&said);
    match wait::wait(Id::Pidfd(child.pidfd.as_fd()))
        .map_err(|e| text(&e))?
        .status
    {
        Status::Exited(0) => Ok(()),
        Status::Exited(code) => Err(format!("exit status {code}, output: {}", said.trim_end())),
        Status::Signaled(number) => Err(format!("killed by signal {number}, output: {}", said.trim_end())),
    }
}

/// Reads what the hook writes until it ends; its first bytes, or nothing at the deadline. What it leaves running in the
/// background may keep the pipe open, and is not waited for.
fn listen(
    child: &Child,
    output: &OwnedFd,
    deadline: Option<Instant>,
) -> Result<Option<Vec<u8>>, coracle_kernel::Error> {
    let mut said = Vec::new();
    let mut open = true;
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(None);
        }
        let mut set = [
            (child.pidfd.as_fd(), Interest::READ),
            (output.as_fd(), Interest::READ),
        ];
        let watched = if open { &mut set[..] } else { &mut set[..1] };
        epoll::poll(watched, left)?;
        let ended = !set[0].1.is_empty();
        if open && !set[1].1.is_empty() {
            let mut buffer = [0; 4096];
            match fd::read(output, &mut buffer) {
                Ok(0) | Err(_) => open = false,
                Ok(count) => {
                    let room = MAX_OUTPUT - said.len();
                    said.extend_from_slice(buffer.get(..count.min(room)).unwrap_or_default());
                }
            }
            continue;
        }
        if ended {
            return Ok(Some(said));
        }
    }
}

fn strings(texts: &[String]) -> Result<Vec<CString>, String> {
    texts
        .iter()
        .map(|text| CString::new(text.as_bytes()).map_err(|error| error.to_string()))
        .collect()
}
