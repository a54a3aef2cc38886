//! Sessions without a container: commands run as children of the test, ports are those of the test's own network.

use std::net::Ipv4Addr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use coracle_kernel::tty;
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::sync::{oneshot, watch};

use crate::{
    AttachRequest, ExecRequest, Limits, PortForwardRequest, Process, Refused, Server, SessionError, Sessions,
    StreamRequest, Tls,
};

/// Runs commands.
pub(super) struct Local {
    /// Guards that were not dropped yet.
    pub(super) alive: watch::Sender<usize>,
    /// Connections that were dialled.
    pub(super) dialled: AtomicUsize,
}

impl Local {
    pub(super) fn new() -> Arc<Local> {
        Arc::new(Local {
            alive: watch::channel(0).0,
            dialled: AtomicUsize::new(0),
        })
    }

    /// Returns when no session holds anything any more.
    pub(super) async fn all_gone(&self) {
        let mut alive = self.alive.subscribe();
        let gone = alive.wait_for(|alive| *alive == 0);
        tokio::time::timeout(std::time::Duration::from_secs(20), gone)
            .await
            .expect("a session is left")
            .unwrap();
    }

    fn start(&self, command: &[String], with_tty: bool) -> Result<Process, SessionError> {
        let mut child = Command::new(&command[0]);
        child.args(&command[1..]).kill_on_drop(true);
        let mut process = Process {
            stdin: None,
            stdout: None,
            stderr: None,
            tty: None,
            exit: None,
            guard: Box::new(()),
        };
        if with_tty {
            let master = tty::open_master()?;
            let slave = tty::open_slave(&master)?;
            child
                .stdin(Stdio::from(slave.try_clone()?))
                .stdout(Stdio::from(slave.try_clone()?))
                .stderr(Stdio::from(slave));
            process.tty = Some(master);
        } else {
            let (read_in, write_in) = coracle_kernel::fd::pipe()?;
            let (read_out, write_out) = coracle_kernel::fd::pipe()?;
            let (read_err, write_err) = coracle_kernel::fd::pipe()?;
            child
                .stdin(Stdio::from(read_in))
                .stdout(Stdio::from(write_out))
                .stderr(Stdio::from(write_err));
            process.stdin = Some(write_in);
            process.stdout = Some(read_out);
            process.stderr = Some(read_err);
        }
        let mut running = child.spawn().map_err(|e| format!("exec {:?}: {e}", command[0]))?;
        drop(child);
        let (exited, exit) = oneshot::channel();
        let (held, mut dropped) = oneshot::channel::<()>();
        process.exit = Some(exit);
        self.alive.send_modify(|alive| *alive += 1);
        let alive = self.alive.clone();
        tokio::spawn(async move {
            tokio::select! {
                status = running.wait() => {
                    let code = status.ok().and_then(|status| status.code()).unwrap_or(137);
                    let _ = exited.send(code);
                    let _ = dropped.await;
                }
                _ = &mut dropped => {}
            }
            drop(running);
            alive.send_modify(|alive| *alive -= 1);
        });
        process.guard = Box::new(held);
        Ok(process)
    }
}

impl Sessions for Local {
    async fn exec(&self, request: &ExecRequest) -> Result<Process, SessionError> {
        if request.command[0] == "never" {
            std::future::pending::<()>().await;
        }
        let mut process = self.start(&request.command, request.tty)?;
        if request.command[0] == "lost" {
            process.exit = Some(oneshot::channel().1);
        }
        Ok(process)
    }

    /// The container's id is the command; with a terminal its output comes through a pipe, as a monitor would give it.
    async fn attach(&self, request: &AttachRequest) -> Result<Process, SessionError> {
        let command = ["sh", "-c", &request.container].map(str::to_owned);
        let mut process = self.start(&command, false)?;
        process.exit = None;
        if request.tty {
            let master = tty::open_master()?;
            let slave = tty::open_slave(&master)?;
            process.tty = Some(master);
            process.stdin = None;
            // the slave has to stay open
            process.guard = Box::new((process.guard, slave));
        }
        Ok(process)
    }

    async fn dial(&self, _: &str, port: u16) -> Result<TcpStream, SessionError> {
        self.dialled.fetch_add(1, Ordering::Relaxed);
        let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .await
            .map_err(|e| format!("connect 127.0.0.1:{port}: {e}"))?;
        Ok(socket)
    }
}

/// A running server.
pub(super) struct Fixture {
    pub(super) server: Arc<Server<Local>>,
    pub(super) local: Arc<Local>,
    _stop: oneshot::Sender<()>,
}

impl Fixture {
    pub(super) async fn start() -> Fixture {
        Fixture::with(Limits::default()).await
    }

    pub(super) async fn with(limits: Limits) -> Fixture {
        Fixture::over(limits, None).await
    }

    pub(super) async fn over(limits: Limits, tls: Option<Tls>) -> Fixture {
        let local = Local::new();
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let server = Server::bind(address, tls, limits, Arc::clone(&local))
            .await
            .unwrap();
        let server = Arc::new(server);
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = Arc::clone(&server);
        tokio::spawn(async move {
            serving
                .serve(async {
                    let _ = stopped.await;
                })
                .await;
        });
        Fixture {
            server,
            local,
            _stop: stop,
        }
    }

    /// A URL for a shell command with all of its streams.
    pub(super) fn exec(&self, script: &str, tty: bool, stdin: bool) -> String {
        self.url(exec(script, tty, stdin))
    }

    pub(super) fn forward(&self, ports: &[u16]) -> String {
        self.url(StreamRequest::PortForward(PortForwardRequest {
            pod: "pod".to_owned(),
            ports: ports.to_vec(),
        }))
    }

    pub(super) fn url(&self, request: StreamRequest) -> String {
        self.server.url(request).unwrap()
    }
}

pub(super) fn exec(script: &str, tty: bool, stdin: bool) -> StreamRequest {
    StreamRequest::Exec(ExecRequest {
        pod: "pod".to_owned(),
        container: "container".to_owned(),
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        tty,
        stdin,
        stdout: true,
        stderr: !tty,
    })
}

#[tokio::test]
async fn requests_that_cannot_be_get_no_url() {
    let fixture = Fixture::start().await;
    let refused = |change: fn(&mut ExecRequest)| {
        let mut request = ExecRequest {
            container: "c".to_owned(),
            command: vec!["true".to_owned()],
            stdout: true,
            ..ExecRequest::default()
        };
        change(&mut request);
        fixture.server.url(StreamRequest::Exec(request)).unwrap_err()
    };
    let invalid = |why| Refused::Invalid(why);
    assert_eq!(
        refused(|r| (r.tty, r.stderr) = (true, true)),
        invalid("tty and stderr cannot both be true")
    );
    assert_eq!(
        refused(|r| r.stdout = false),
        invalid("one of stdin, stdout, or stderr must be set")
    );
    assert_eq!(refused(|r| r.container.clear()), invalid("missing container_id"));
    assert_eq!(refused(|r| r.command.clear()), invalid("missing cmd"));
    let url = fixture.forward(&[]);
    let (_, token) = url.rsplit_once('/').unwrap();
    assert!(url.starts_with("http://127.0.0.1:") && url.contains("/portforward/"));
    assert_eq!(token.len(), 64);
}
