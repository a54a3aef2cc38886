//! Running the runtime: one call, its exit code and what it wrote, never longer than a deadline.

use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};

use crate::host;

/// The runtime under test with its own state directory.
#[derive(Debug, Clone)]
pub struct Runtime {
    program: PathBuf,
    root: PathBuf,
    mark: String,
}

/// What a finished call left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit code; 128 + number when a signal ended it.
    pub code: i32,
    /// All that was written to standard output, by the runtime or by a container that got it.
    pub stdout: String,
    /// The same for standard error.
    pub stderr: String,
}

/// A call that has not finished yet.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: File,
    stderr: File,
    what: String,
}

impl Runtime {
    /// The runtime that `RUNTIME` names, keeping its state in `root`; `mark` goes into its environment.
    #[must_use]
    pub fn new(root: &Path, mark: &str) -> Self {
        Self {
            program: host::runtime_path(),
            root: root.to_path_buf(),
            mark: mark.to_owned(),
        }
    }

    /// The program itself.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The state directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `RUNTIME --root R ARGS`, ready to be changed before it runs.
    #[must_use]
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Command {
        let mut command = self.bare(&["--root"]);
        command.arg(&self.root).args(args);
        command
    }

    /// `RUNTIME ARGS`, without `--root`.
    #[must_use]
    pub fn bare<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).env("CORACLE_TEST_MARK", &self.mark);
        command
    }

    /// Run `RUNTIME --root R ARGS` to its end.
    #[must_use]
    pub fn call<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Output {
        Running::start(self.command(args), None).wait()
    }
}

impl Running {
    /// Start a command whose output goes to files: a container may outlive the call and keep them open.
    ///
    /// # Panics
    /// When the program cannot be started.
    #[must_use]
    pub fn start(command: Command, stdin: Option<&str>) -> Self {
        let stdout = tempfile::tempfile().expect("temporary file");
        let stderr = tempfile::tempfile().expect("temporary file");
        Self::start_into(command, stdin, stdout, stderr)
    }

    /// The same with files of the caller's.
    ///
    /// # Panics
    /// When the program cannot be started.
    #[must_use]
    pub fn start_into(mut command: Command, stdin: Option<&str>, stdout: File, stderr: File) -> Self {
        let what = format!("{command:?}");
        let input = stdin.map_or_else(Stdio::null, |text| {
            let mut file = tempfile::tempfile().expect("temporary file");
            file.write_all(text.as_bytes())
                .and_then(|()| file.rewind())
                .expect("temporary file");
            file.into()
        });
        command.stdin(input);
        command
            .stdout(stdout.try_clone().expect("descriptor"))
            .stderr(stderr.try_clone().expect("descriptor"));
        let child = command.spawn().unwrap_or_else(|e| panic!("{what}: {e}"));
        Self {
            child,
            stdout,
            stderr,
            what,
        }
    }

    /// The process id of the call.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What has been written to standard output so far.
    #[must_use]
    pub fn stdout_so_far(&self) -> String {
        read_all(&self.stdout)
    }

    /// What has been written to standard error so far.
    #[must_use]
    pub fn stderr_so_far(&self) -> String {
        read_all(&self.stderr)
    }

    /// Wait for the end.
    ///
    /// # Panics
    /// When it takes longer than the deadline; the call is killed then.
    #[must_use]
    pub fn wait(self) -> Output {
        let Self {
            mut child,
            stdout,
            stderr,
            what,
        } = self;
        let pid = child.id();
        let (tell, told) = channel();
        let waiter = std::thread::spawn(move || {
            let _ = tell.send(child.wait());
        });
        let status = match told.recv_timeout(host::deadline(60)) {
            Ok(status) => status.unwrap_or_else(|e| panic!("{what}: {e}")),
            Err(RecvTimeoutError::Timeout) => {
                host::signal(pid, "KILL");
                panic!(
                    "{what}: not done in time\nstdout: {}\nstderr: {}",
                    read_all(&stdout),
                    read_all(&stderr)
                );
            }
            Err(RecvTimeoutError::Disconnected) => panic!("{what}: nobody waits for it"),
        };
        let _ = waiter.join();
        Output {
            code: exit_code(status),
            stdout: read_all(&stdout),
            stderr: read_all(&stderr),
        }
    }
}

impl Output {
    /// The same, if the call succeeded.
    ///
    /// # Panics
    /// When it failed.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "failed: {self}");
        self
    }

    /// The same, if the call ended with `code` and one of its outputs has `text` in it.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn fails(&self, code: i32, text: &str) {
        assert_eq!(self.code, code, "{self}");
        assert!(
            self.stderr.contains(text) || self.stdout.contains(text),
            "no {text:?} in {self}"
        );
    }

    /// A refusal: exit code 1 and an error that has one of `texts` in it, whatever the case.
    ///
    /// # Panics
    /// When the call succeeded, ended by a signal, panicked, or said something else.
    #[track_caller]
    pub fn refused(&self, texts: &[&str]) {
        assert_eq!(self.code, 1, "not refused: {self}");
        let said = self.stderr.replace("\\\"", "\"").to_lowercase();
        assert!(
            !said.contains("panicked at") && !said.contains("goroutine "),
            "a panic: {self}"
        );
        assert!(
            texts.iter().any(|t| said.contains(&t.to_lowercase())),
            "none of {texts:?} in {self}"
        );
    }

    /// Standard output without the white space around it.
    #[must_use]
    pub fn text(&self) -> &str {
        self.stdout.trim()
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "exit code {}\nstdout: {}\nstderr: {}",
            self.code, self.stdout, self.stderr
        )
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Everything in the file, without moving the offset that it shares with a writer.
fn read_all(file: &File) -> String {
    let size = file.metadata().map_or(0, |m| m.len());
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], done as u64) {
            Ok(0) | Err(_) => break,
            Ok(n) => done += n,
        }
    }
    bytes.truncate(done);
    String::from_utf8_lossy(&bytes).into_owned()
}
