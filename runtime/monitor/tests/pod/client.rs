//! The daemon's side of a monitor, for tests: one thread, every wait with an end.

use std::collections::VecDeque;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coracle_kernel::clone::Child;
use coracle_kernel::epoll::{Interest, wait_one};
use coracle_kernel::exec::{Program, Spawn};
use coracle_kernel::signal::Signal;
use coracle_kernel::wait::{Id, wait};
use coracle_kernel::{fd, pidfd, scm};
use coracle_wire::{
    Body, Client, Create, Exec, ExecExited, Exited, Failed, Incoming, LISTENER_FD, MAX_FRAME, Sandbox,
    SetupSandbox, Start,
};

/// How long anything may take here.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A monitor in a directory of its own, killed with everything in it at the end.
pub(crate) struct Monitor {
    pub(crate) dir: PathBuf,
    pub(crate) child: Child,
    pub(crate) program: OwnedFd,
    socket: OwnedFd,
    session: Client,
    events: VecDeque<Body>,
    answers: Vec<(u64, Body, Vec<OwnedFd>)>,
}

impl Monitor {
    /// Starts a monitor and greets it.
    pub(crate) fn begin(name: &str) -> Monitor {
        let dir = std::env::temp_dir().join(format!("coracle-pod-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(dir.join("shm")).unwrap();
        std::fs::create_dir_all(dir.join("files")).unwrap();
        let program = fd::sealed_program(c"coracle", File::open(program()).unwrap()).unwrap();
        let place = File::open(&dir).unwrap();
        let listener = scm::listen(&place, "m.sock", scm::Kind::Seqpacket, scm::Mode::Blocking).unwrap();
        let args = [CString::from(c"monitor-under-test"), CString::from(c"monitor")];
        let stderr = std::io::stderr();
        let fds = [(listener.as_fd(), LISTENER_FD), (stderr.as_fd(), 2)];
        let spawn = Spawn {
            fds: &fds,
            new_session: true,
            ..Spawn::new(Program::Fd(program.as_fd()), &args)
        };
        let child = spawn.spawn().unwrap();
        let (socket, session) = greet(&dir);
        Monitor {
            dir,
            child,
            program,
            socket,
            session,
            events: VecDeque::new(),
            answers: Vec::new(),
        }
    }

    /// Drops the connection and makes another one.
    pub(crate) fn reconnect(&mut self) {
        (self.socket, self.session) = greet(&self.dir);
        self.events.clear();
        self.answers.clear();
    }

    /// Sets the pod up with everything of its own.
    pub(crate) fn setup(&mut self) -> Sandbox {
        let dir = self.dir.to_str().unwrap().to_owned();
        let setup = SetupSandbox {
            pod_id: "pod".into(),
            pod_dir: dir,
            hostname: "the-pod".into(),
            ipc: true,
            uts: true,
            ..Default::default()
        };
        match self.ask(setup, &[]) {
            (Body::Sandbox(sandbox), _) => sandbox,
            other => panic!("{other:?}"),
        }
    }

    /// Sends a request.
    pub(crate) fn send(&mut self, body: impl Into<Body>, fds: &[&OwnedFd]) -> u64 {
        let (id, bytes) = self.session.request(body.into()).unwrap();
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        scm::send(&self.socket, &bytes, &fds).unwrap();
        id
    }

    /// Sends a request and waits for its answer.
    pub(crate) fn ask(&mut self, body: impl Into<Body>, fds: &[&OwnedFd]) -> (Body, Vec<OwnedFd>) {
        let id = self.send(body, fds);
        self.answer(id)
    }

    /// Waits for the answer to a request.
    pub(crate) fn answer(&mut self, id: u64) -> (Body, Vec<OwnedFd>) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(index) = self.answers.iter().position(|(of, _, _)| *of == id) {
                let (_, body, fds) = self.answers.remove(index);
                return (body, fds);
            }
            self.receive(deadline);
        }
    }

    /// Expects that a request fails.
    pub(crate) fn refused(&mut self, body: impl Into<Body>, fds: &[&OwnedFd]) -> Failed {
        match self.ask(body, fds) {
            (Body::Failed(failed), _) => failed,
            other => panic!("{other:?}"),
        }
    }

    /// Expects that a request is done.
    pub(crate) fn done(&mut self, body: impl Into<Body>) {
        let (answer, _) = self.ask(body, &[]);
        assert!(matches!(answer, Body::Done(_)), "{answer:?}");
    }

    /// Creates a container that logs to `<id>.log`; its init's pidfd.
    pub(crate) fn create(&mut self, id: &str, bundle: &Path) -> OwnedFd {
        let create = self.create_request(id, bundle);
        match self.ask(create, &[]) {
            (Body::Created(created), mut fds) => {
                assert!(created.pid > 0);
                fds.remove(0)
            }
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn create_request(&self, id: &str, bundle: &Path) -> Create {
        Create {
            container_id: id.into(),
            bundle: bundle.to_str().unwrap().into(),
            log_path: self.log_path(id).to_str().unwrap().into(),
            ..Default::default()
        }
    }

    pub(crate) fn start(&mut self, id: &str) {
        self.done(Start {
            container_id: id.into(),
            deadline_ms: 0,
        });
    }

    /// Waits until a container has exited.
    pub(crate) fn exited(&mut self, id: &str) -> Exited {
        match self.event(|event| matches!(event, Body::Exited(exited) if exited.container_id == id)) {
            Body::Exited(exited) => exited,
            other => panic!("{other:?}"),
        }
    }

    /// Executes a shell command; the answer, and the reading end of its output.
    pub(crate) fn exec(&mut self, exec_id: &str, id: &str, args: &[&str]) -> (Body, File) {
        let (read, write) = fd::pipe().unwrap();
        let process = super::bundle::process(args).to_string();
        let process = fd::sealed_memfd(c"process", process.as_bytes()).unwrap();
        let exec = Exec {
            exec_id: exec_id.into(),
            container_id: id.into(),
            stdout: true,
            ..Default::default()
        };
        let (answer, _) = self.ask(exec, &[&process, &write]);
        (answer, File::from(read))
    }

    pub(crate) fn exec_exited(&mut self, exec_id: &str) -> ExecExited {
        match self.event(|event| matches!(event, Body::ExecExited(exited) if exited.exec_id == exec_id)) {
            Body::ExecExited(exited) => exited,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for an event.
    pub(crate) fn event(&mut self, wanted: impl Fn(&Body) -> bool) -> Body {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(index) = self.events.iter().position(&wanted) {
                return self.events.remove(index).unwrap();
            }
            self.receive(deadline);
        }
    }

    pub(crate) fn log_path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.log"))
    }

    /// The texts of a container's log, by stream, with pieces of lines joined.
    pub(crate) fn log(&self, id: &str, stream: &str) -> String {
        joined(&std::fs::read_to_string(self.log_path(id)).unwrap(), stream)
    }

    /// Waits until a container's log holds a text.
    pub(crate) fn logged(&self, id: &str, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !std::fs::read_to_string(self.log_path(id)).unwrap().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} is not logged");
            pause(Duration::from_millis(5));
        }
    }

    /// The process's figure in /proc/<pid>/smaps_rollup, in KiB.
    pub(crate) fn memory_kib(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.pid)).unwrap();
        let line = text.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// How many descriptors the monitor has open.
    pub(crate) fn open_fds(&self) -> Vec<String> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.child.pid)).unwrap();
        let targets = entries
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok());
        targets
            .map(|target| target.to_string_lossy().into_owned())
            .collect()
    }

    fn receive(&mut self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        let ready = wait_one(&self.socket, Interest::READ, Some(left)).unwrap();
        assert!(!ready.is_empty(), "the monitor did not answer");
        let mut buffer = vec![0; MAX_FRAME];
        let received = scm::recv(&self.socket, &mut buffer).unwrap();
        assert_ne!(received.len, 0, "the monitor closed the connection");
        match self
            .session
            .receive(&buffer[..received.len], received.fds.len())
            .unwrap()
        {
            Incoming::Answer { id, body } => self.answers.push((id, body, received.fds)),
            Incoming::Event(event) => self.events.push_back(event),
            Incoming::Ignored => {}
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = pidfd::send_signal(&self.child.pidfd, Signal::KILL);
        let _ = wait(Id::Pidfd(self.child.pidfd.as_fd()));
        super::bundle::remove_cgroups();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The program that is a monitor: this one, or the one that `CORACLE_BINARY` names.
fn program() -> PathBuf {
    std::env::var_os("CORACLE_BINARY").map_or_else(|| "/proc/self/exe".into(), PathBuf::from)
}

/// The text of one stream of a CRI log.
pub(crate) fn joined(log: &str, stream: &str) -> String {
    let mut text = String::new();
    for line in log.lines() {
        let mut parts = line.splitn(4, ' ');
        let (_, of, tag, content) = (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next().expect(line),
        );
        if of == Some(stream) {
            text.push_str(content);
            match tag {
                Some("F") => text.push('\n'),
                Some("P") => {}
                other => panic!("{other:?} in {line:?}"),
            }
        }
    }
    text
}

/// Waits where there is nothing to wait for: the monitor's output is a file.
#[allow(
    clippy::disallowed_methods,
    reason = "a log file has no event that a test could wait for"
)]
pub(crate) fn pause(time: Duration) {
    std::thread::sleep(time);
}

fn greet(dir: &Path) -> (OwnedFd, Client) {
    let place = File::open(dir).unwrap();
    let socket = scm::connect(&place, "m.sock", scm::Kind::Seqpacket, scm::Mode::Blocking).unwrap();
    let (mut session, hello) = Client::begin().unwrap();
    scm::send(&socket, &hello, &[]).unwrap();
    let mut buffer = [0; 4096];
    assert!(
        !wait_one(&socket, Interest::READ, Some(PATIENCE))
            .unwrap()
            .is_empty()
    );
    let received = scm::recv(&socket, &mut buffer).unwrap();
    let answer = session.receive(&buffer[..received.len], 0).unwrap();
    assert!(
        matches!(
            answer,
            Incoming::Answer {
                body: Body::Welcome(_),
                ..
            }
        ),
        "{answer:?}"
    );
    (socket, session)
}
