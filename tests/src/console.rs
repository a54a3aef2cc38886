//! The engine's end of a console socket: the probe receives the terminal and relays it.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use crate::host;

/// A listening console socket and, once a runtime has connected, the terminal behind it.
#[derive(Debug)]
pub struct Console {
    child: Child,
    stdin: Option<ChildStdin>,
    socket: PathBuf,
    output: PathBuf,
}

impl Console {
    /// Listen in `dir`, under `name`.
    #[must_use]
    pub fn listen(dir: &Path, name: &str) -> Self {
        Self::start(dir, name, &[])
    }

    /// Listen, and give the received terminal this size.
    #[must_use]
    pub fn listen_sized(dir: &Path, name: &str, rows: u16, columns: u16) -> Self {
        Self::start(dir, name, &[rows, columns])
    }

    fn start(dir: &Path, name: &str, size: &[u16]) -> Self {
        let (socket, output) = (dir.join(name), dir.join(format!("{name}.out")));
        let mut child = Command::new(host::probe())
            .arg("console")
            .arg(name)
            .args(size.iter().map(ToString::to_string))
            // a relative name: the directory may be longer than a socket address
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(File::create(&output).expect("output file"))
            .spawn()
            .expect("probe");
        let stdin = child.stdin.take();
        let console = Self {
            child,
            stdin,
            socket,
            output,
        };
        console.wait_output("ready\n");
        console
    }

    /// The socket's path.
    #[must_use]
    pub fn socket(&self) -> String {
        self.socket.display().to_string()
    }

    /// Everything received so far: `ready`, `name=… fds=…`, then the terminal's output.
    #[must_use]
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.output).unwrap_or_default()).into_owned()
    }

    /// Wait until this has been received.
    pub fn wait_output(&self, text: &str) {
        host::wait_for(&format!("{text:?} on the console"), || {
            self.output().contains(text).then_some(())
        });
    }

    /// Type something.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn type_in(&mut self, text: &str) {
        self.stdin
            .as_mut()
            .expect("piped")
            .write_all(text.as_bytes())
            .expect("typing");
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
