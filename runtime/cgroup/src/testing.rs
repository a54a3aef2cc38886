//! What tests on real hierarchies share: a group of their own, and processes that do as told.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::{Host, Location, Manager, Options, Pid};

/// Long enough for a loaded machine; nothing waits for it to pass.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A place below `coracle-test-<pid>` that no other test uses.
pub(crate) fn place() -> Location {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    Location::absolute(&format!("coracle-test-{}-{number}/leaf", std::process::id())).unwrap()
}

/// Removes the group and the parent that was made for it, also when a test fails.
pub(crate) struct Cleanup<'a>(pub(crate) &'a Host, pub(crate) Location);

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        let path = self.1.path();
        let parent = path.rsplit_once('/').map_or(path.as_str(), |(parent, _)| parent);
        let mut group = self
            .0
            .manager(&Location::absolute(parent).unwrap(), Options::default())
            .unwrap();
        let _ = group.kill(PATIENCE);
        group.remove(PATIENCE).unwrap();
        assert!(!group.exists());
    }
}

/// A shell that runs one line at a time.
pub(crate) struct Shell(Child);

impl Shell {
    pub(crate) fn start() -> Shell {
        let command = "while read -r line; do eval \"$line\"; echo; done";
        let mut shell = Command::new("/bin/sh");
        shell
            .args(["-c", command])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        Shell(shell.spawn().unwrap())
    }

    /// A shell in `group`.
    pub(crate) fn inside(group: &dyn Manager) -> Shell {
        let shell = Shell::start();
        group.add(shell.pid()).unwrap();
        shell
    }

    pub(crate) fn pid(&self) -> Pid {
        self.0.id().cast_signed()
    }

    /// Runs `line`, which prints one line or none.
    pub(crate) fn run(&mut self, line: &str) -> String {
        self.send(line);
        let mut answer = String::new();
        BufReader::with_capacity(1, self.0.stdout.as_mut().unwrap())
            .read_line(&mut answer)
            .unwrap();
        if answer.trim().is_empty() {
            return String::new();
        }
        let mut end = String::new();
        BufReader::with_capacity(1, self.0.stdout.as_mut().unwrap())
            .read_line(&mut end)
            .unwrap();
        answer.trim().to_owned()
    }

    pub(crate) fn send(&mut self, line: &str) {
        let stdin = self.0.stdin.as_mut().unwrap();
        writeln!(stdin, "{line}").unwrap();
        stdin.flush().unwrap();
    }

    /// Waits for its end; the signal that ended it.
    pub(crate) fn signal(mut self) -> Option<i32> {
        std::os::unix::process::ExitStatusExt::signal(&self.0.wait().unwrap())
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
