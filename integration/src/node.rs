//! A daemon in a scratch directory, in the test's own namespaces: started, killed, started again, and taken away
//! without a trace.

use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use coracle_proto::cri::{ContainerState, ContainerStatus};

use crate::cell::run;
use crate::client::Calls;
use crate::daemon::{END_LIMIT, START_LIMIT, Server};
use crate::image::ImageSpec;
use crate::{leaks, request};

/// How a daemon is started.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Its configuration.
    pub config: String,
    /// `CORACLE_FAILPOINT` of the next start alone.
    pub failpoint: Option<String>,
    /// Pods are connected by CNI plugins, not by the built-in bridge.
    pub cni: bool,
    /// Everything of it is on a file system of its own of this many MiB.
    pub disk_mib: Option<u32>,
}

/// A daemon, its places, and calls to it.
#[derive(Debug)]
pub struct Node {
    /// The scratch directory.
    pub dir: PathBuf,
    /// Pods' log directories are below it.
    pub logs: PathBuf,
    /// How it is started.
    pub options: Options,
    server: Server,
    calls: Calls,
}

impl Node {
    /// Starts a daemon with nothing in it.
    pub async fn start(options: Options) -> Result<Node> {
        let dir = PathBuf::from(format!("/tmp/coracle-it-{}-{}", std::process::id(), unique()));
        let logs = dir.join("logs");
        if let Some(size) = options.disk_mib {
            fs::create_dir_all(&dir)?;
            let size = format!("size={size}m");
            run(Command::new("mount")
                .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
                .arg(&dir))?;
        }
        fs::create_dir_all(&logs)?;
        let mut server = Server::new(&binary("coracled"), &dir, &options.config)?;
        if options.cni {
            server.network = "cni";
        }
        let calls = serve(&mut server, &options).await?;
        Ok(Node {
            dir,
            logs,
            options,
            server,
            calls,
        })
    }

    /// Starts one that has the busybox image.
    pub async fn with_busybox(options: Options) -> Result<Node> {
        let node = Node::start(options).await?;
        node.import(&ImageSpec::busybox(request::BUSYBOX)).await?;
        Ok(node)
    }

    /// Starts the daemon again; with the failpoint of the options, if one is set.
    pub async fn spawn(&mut self) -> Result<()> {
        self.calls = serve(&mut self.server, &self.options).await?;
        Ok(())
    }

    /// Starts a second daemon on the same places without waiting for an answer.
    pub fn launch(&self) -> Result<Child> {
        self.server.launch(Command::new(self.server.program()))
    }

    /// kill -9.
    pub fn kill(&mut self) -> Result<()> {
        self.server.kill()
    }

    /// kill -9, then another one on the same directories.
    pub async fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.spawn().await
    }

    /// Waits until the daemon ended by itself (at a failpoint).
    pub async fn wait_ended(&mut self, limit: Duration) -> Result<()> {
        let begun = Instant::now();
        while self.server.ended()?.is_none() {
            ensure!(
                begun.elapsed() < crate::stretched(limit),
                "coracled did not end within {limit:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// The daemon's process id.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.server.pid()
    }

    /// What it logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.server.log()
    }

    /// Its data root.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.server.root()
    }

    /// Its state directory.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.server.state()
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.server.socket()
    }

    /// Waits until a container has exited.
    pub async fn wait_exit(&self, id: &str, limit: Duration) -> Result<ContainerStatus> {
        let begun = Instant::now();
        loop {
            let status = self.status(id).await?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            if begun.elapsed() > crate::stretched(limit) {
                bail!("container {id} is {:?} still after {limit:?}", status.state());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The log of a container, waited for until it holds `text`.
    pub async fn wait_log(&self, status: &ContainerStatus, text: &str, limit: Duration) -> Result<String> {
        let begun = Instant::now();
        loop {
            let log = fs::read_to_string(&status.log_path).unwrap_or_default();
            if log.contains(text) {
                return Ok(log);
            }
            if begun.elapsed() > crate::stretched(limit) {
                bail!(
                    "{} does not hold {text:?} after {limit:?}:\n{log}",
                    status.log_path
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Removes every pod, ends the daemon, and checks that no file of a pod is left.
    pub async fn finish(mut self) -> Result<()> {
        for pod in self.pod_ids().await? {
            self.remove_pod(&pod).await?;
        }
        let begun = Instant::now();
        loop {
            let left = leaks::pod_files(&self.dir);
            // The spool of an import goes in the background.
            let spooled = left.iter().all(|file| file.contains("/content/ingest/"));
            if left.is_empty() {
                break;
            }
            ensure!(
                spooled && begun.elapsed() < crate::stretched(Duration::from_secs(3)),
                "files of pods were left: {left:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.terminate().await?;
        if self.options.disk_mib.is_some() {
            run(Command::new("umount").arg(&self.dir))?;
        }
        fs::remove_dir_all(&self.dir)?;
        Ok(())
    }

    /// SIGTERM, as a service manager ends it.
    pub async fn terminate(&mut self) -> Result<()> {
        self.server.ask_to_end()?;
        self.wait_ended(END_LIMIT).await?;
        let status = self.server.ended()?;
        ensure!(
            status.is_some_and(|status| status.success()),
            "coracled ended with {status:?}:\n{}",
            self.log()
        );
        Ok(())
    }
}

impl Deref for Node {
    type Target = Calls;

    fn deref(&self) -> &Calls {
        &self.calls
    }
}

/// Starts the daemon and connects once it serves.
async fn serve(server: &mut Server, options: &Options) -> Result<Calls> {
    let mut command = Command::new(server.program());
    command.env_remove("CORACLE_FAILPOINT");
    if let Some(failpoint) = &options.failpoint {
        command.env("CORACLE_FAILPOINT", failpoint);
    }
    server.start(command)?;
    let begun = Instant::now();
    while !server.is_serving()? {
        ensure!(
            begun.elapsed() < crate::stretched(START_LIMIT),
            "coracled does not serve within {START_LIMIT:?}:\n{}",
            server.log()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Calls::connect(&server.socket())
        .await
        .context("the daemon serves")
}

/// A program of this build: beside the test, or where `CORACLE_BIN_DIR` says.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    if let Some(dir) = std::env::var_os("CORACLE_BIN_DIR") {
        return PathBuf::from(dir).join(name);
    }
    // target/<profile>/deps/<test>
    let own = std::env::current_exe().unwrap_or_default();
    own.parent()
        .and_then(Path::parent)
        .unwrap_or(Path::new("."))
        .join(name)
}

fn unique() -> u32 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}
