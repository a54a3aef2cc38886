//! One run of one plugin: a program with a fixed name, an environment from nothing, its request on standard input.
//!
//! The program leads a session of its own. What it answers is bounded, and so is its time: past either bound it is killed
//! with all that it has started. It does not outlive the daemon either, and what it has started ends with the next one's
//! start. What it leaves running in the background when it has ended is not waited for, and stays.

use std::ffi::CString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use coracle_kernel::clone::Child;
use coracle_kernel::epoll::{self, Interest};
use coracle_kernel::exec::{Program, Spawn};
use coracle_kernel::path::{self, Kind, OFlags};
use coracle_kernel::signal::{Signal, kill_group};
use coracle_kernel::wait::{self, Id, Status};
use coracle_kernel::{Error as KernelError, fd};
use serde::Deserialize;

use super::CniError;
use super::groups::Group;

/// Most that a plugin may answer.
const ANSWER_BYTES: usize = 1 << 20;
/// How much of what it says beside its answer is kept: the end, where the failure is.
const SAID_BYTES: usize = 4096;
/// Longest name of a plugin, as of any file.
const NAME_BYTES: usize = 255;
/// Longest texts of a plugin's own error that are passed on.
const ERROR_CHARS: usize = 1024;
/// The error code that says: there is nothing of this container, nothing needs to be cleaned up.
pub(super) const UNKNOWN_CONTAINER: u64 = 3;

/// What a plugin is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
}

/// When a plugin must have ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    at: Instant,
    limit: Duration,
}

/// A plugin's program, found.
#[derive(Debug)]
pub(super) struct Binary {
    name: String,
    path: PathBuf,
    file: OwnedFd,
}

/// The error that a plugin may answer.
#[derive(Deserialize)]
struct Refusal {
    code: u64,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl Command {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
            Command::Check => "CHECK",
            Command::Gc => "GC",
            Command::Status => "STATUS",
        }
    }
}

impl Deadline {
    pub(super) fn after(limit: Duration) -> Deadline {
        Deadline {
            at: Instant::now() + limit,
            limit,
        }
    }

    fn left(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }
}

impl Binary {
    /// Looks a plugin up in the directories, in their order.
    pub(super) fn find(name: &str, dirs: &[PathBuf]) -> Result<Binary, CniError> {
        let missing = || CniError::Missing {
            plugin: name.chars().take(64).collect(),
            dirs: dirs_text(dirs),
        };
        if !is_plugin_name(name) {
            return Err(missing());
        }
        for dir in dirs {
            let path = dir.join(name);
            let Ok(file) = path::open(&path, OFlags::RDONLY | OFlags::NONBLOCK) else {
                continue;
            };
            let runs = path::stat(&file).is_ok_and(|stat| stat.kind == Kind::File && stat.mode & 0o111 != 0);
            if runs {
                return Ok(Binary {
                    name: name.to_owned(),
                    path,
                    file,
                });
            }
        }
        Err(missing())
    }

    /// Runs it to its end; what it answered on standard output.
    pub(super) fn run(
        &self,
        command: Command,
        env: &[(&str, String)],
        request: &[u8],
        deadline: Deadline,
        group: Option<&Group<'_>>,
    ) -> Result<Vec<u8>, CniError> {
        let kernel = |source: KernelError| CniError::Run {
            plugin: self.name.clone(),
            source,
        };
        let string = |bytes: &[u8]| {
            CString::new(bytes).map_err(|_| CniError::Argument {
                name: "environment of a plugin",
                why: "holds a NUL byte".to_owned(),
            })
        };
        let path = string(self.path.as_os_str().as_bytes())?;
        let args = [path.clone()];
        let env = env
            .iter()
            .map(|(name, value)| string(format!("{name}={value}").as_bytes()))
            .collect::<Result<Vec<_>, _>>()?;
        // A file, not a pipe: a plugin that does not read its request keeps nobody waiting.
        let input = fd::sealed_memfd(c"request", request).map_err(kernel)?;
        fd::rewind(&input).map_err(kernel)?;
        let (answer, answer_writer) = fd::pipe().map_err(kernel)?;
        let (said, said_writer) = fd::pipe().map_err(kernel)?;
        for end in [&answer, &said] {
            fd::set_nonblocking(end, true).map_err(kernel)?;
        }
        let root = path::open_dir("/").map_err(kernel)?;
        // An interpreter opens its script by name: only what the kernel runs itself can be run by descriptor.
        let program = if self.is_script() {
            Program::Path(&path)
        } else {
            Program::Fd(self.file.as_fd())
        };
        let tasks: Vec<_> = group
            .iter()
            .flat_map(|group| &group.cgroup_tasks)
            .map(|tasks| tasks.as_fd())
            .collect();
        let child = Spawn {
            env: &env,
            fds: &[
                (input.as_fd(), 0),
                (answer_writer.as_fd(), 1),
                (said_writer.as_fd(), 2),
            ],
            cgroup: group
                .and_then(|group| group.cgroup.as_ref())
                .map(|cgroup| cgroup.as_fd()),
            cgroup_tasks: &tasks,
            cwd: Some(root.as_fd()),
            new_session: true,
            // The next daemon sends DEL, and an ADD that goes on behind its back would undo that. The caller is this thread,
            // which stays in this call until the plugin has ended.
            dies_with_caller: true,
            ..Spawn::new(program, &args)
        }
        .spawn()
        .map_err(kernel)?;
        drop((answer_writer, said_writer));

        let mut talk = Talk {
            answer: Some(answer),
            said: Some(said),
            answered: Vec::new(),
            tail: Vec::new(),
        };
        let end = talk.listen(&child, deadline).map_err(kernel);
        if !matches!(end, Ok(End::Ended)) {
            // Its leader is not reaped yet, so the group's number is still its own. Dead already is as good.
            let _ = kill_group(child.pid, Signal::KILL);
            // What it started may have left its process group.
            if let Some(group) = group {
                group.kill();
            }
        }
        let exit = wait::wait(Id::Pidfd(child.pidfd.as_fd())).map_err(kernel)?;
        let said = talk.said_text();
        if !said.is_empty() {
            tracing::debug!(plugin = self.name, command = command.as_str(), said, "CNI plugin");
        }
        match end? {
            End::Ended => self.outcome(command, exit.status, talk.answered, &said),
            End::TooMuch => Err(CniError::TooMuch {
                plugin: self.name.clone(),
                command: command.as_str(),
            }),
            End::Late => Err(CniError::Late {
                plugin: self.name.clone(),
                command: command.as_str(),
                limit: deadline.limit,
            }),
        }
    }

    fn outcome(
        &self,
        command: Command,
        status: Status,
        answer: Vec<u8>,
        said: &str,
    ) -> Result<Vec<u8>, CniError> {
        if status == Status::Exited(0) {
            return Ok(answer);
        }
        if let Ok(refusal) = serde_json::from_slice::<Refusal>(&answer) {
            let words = [refusal.msg, refusal.details];
            let words: Vec<_> = words
                .iter()
                .map(|words| words.trim())
                .filter(|words| !words.is_empty())
                .collect();
            return Err(CniError::Refused {
                plugin: self.name.clone(),
                command: command.as_str(),
                code: refusal.code,
                words: words.join(": ").chars().take(ERROR_CHARS).collect(),
            });
        }
        // Plugins that are scripts often complain where their answer should be.
        let complaint = String::from_utf8_lossy(answer.get(..SAID_BYTES).unwrap_or(&answer));
        let said = Some(said).filter(|said| !said.is_empty());
        let said = said.unwrap_or(complaint.trim());
        let how = match status {
            Status::Exited(code) => format!("ended with status {code}"),
            Status::Signaled(number) => format!("was killed by signal {number}"),
        };
        Err(CniError::Died {
            plugin: self.name.clone(),
            command: command.as_str(),
            how,
            said: if said.is_empty() {
                "nothing".to_owned()
            } else {
                said.to_owned()
            },
        })
    }

    fn is_script(&self) -> bool {
        let mut start = [0; 2];
        let read = path::reopen(&self.file, OFlags::RDONLY).map(|file| fd::read(&file, &mut start));
        matches!(read, Ok(Ok(2))) && start == *b"#!"
    }
}

/// Whether this can be the name of a plugin: one component of a path, and a plain one.
pub(super) fn is_plugin_name(name: &str) -> bool {
    let rest = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-' | b'+');
    let first = name
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    first && name.len() <= NAME_BYTES && name.bytes().all(rest)
}

/// Directories as `CNI_PATH` and people have them.
pub(super) fn dirs_text(dirs: &[PathBuf]) -> String {
    let texts: Vec<_> = dirs
        .iter()
        .map(|dir: &PathBuf| dir.display().to_string())
        .collect();
    texts.join(":")
}

/// What a plugin says while it runs.
struct Talk {
    answer: Option<OwnedFd>,
    said: Option<OwnedFd>,
    answered: Vec<u8>,
    tail: Vec<u8>,
}

/// How listening ended.
enum End {
    /// With the plugin.
    Ended,
    /// At the bound of the answer.
    TooMuch,
    /// At the deadline.
    Late,
}

impl Talk {
    /// Reads until the plugin ends, and then what it left in the pipes.
    fn listen(&mut self, child: &Child, deadline: Deadline) -> Result<End, KernelError> {
        loop {
            let left = deadline.left();
            if left.is_zero() {
                return Ok(End::Late);
            }
            let mut set = vec![(child.pidfd.as_fd(), Interest::READ)];
            let pipes = [&self.answer, &self.said].into_iter().flatten();
            set.extend(pipes.map(|pipe| (pipe.as_fd(), Interest::READ)));
            epoll::poll(&mut set, Some(left))?;
            // Looked at before the pipes are read: what it wrote before its end is in them by then.
            let ended = !set[0].1.is_empty();
            self.read_answer();
            if self.answered.len() > ANSWER_BYTES {
                return Ok(End::TooMuch);
            }
            self.read_said();
            if ended {
                return Ok(End::Ended);
            }
        }
    }

    /// Takes what is there, up to a little more than the bound.
    fn read_answer(&mut self) {
        let mut buffer = [0; 16 << 10];
        while self.answered.len() <= ANSWER_BYTES {
            let Some(pipe) = &self.answer else { return };
            match fd::read(pipe, &mut buffer) {
                Ok(0) => self.answer = None,
                Ok(count) => self
                    .answered
                    .extend_from_slice(buffer.get(..count).unwrap_or_default()),
                Err(_) => return,
            }
        }
    }

    /// Takes what is there, once around: a plugin that never stops talking must not keep us from looking at the clock.
    fn read_said(&mut self) {
        let mut buffer = [0; 16 << 10];
        for _ in 0..16 {
            let Some(pipe) = &self.said else { return };
            match fd::read(pipe, &mut buffer) {
                Ok(0) => self.said = None,
                Ok(count) => {
                    self.tail
                        .extend_from_slice(buffer.get(..count).unwrap_or_default());
                    let surplus = self.tail.len().saturating_sub(SAID_BYTES);
                    self.tail.drain(..surplus);
                }
                Err(_) => return,
            }
        }
    }

    fn said_text(&self) -> String {
        String::from_utf8_lossy(&self.tail).trim().to_owned()
    }
}
