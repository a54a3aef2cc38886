//! A coracled of the test's own: `Server` is its process and places, `Daemon` one in a cell.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use coracle_kernel::signal::{self, Signal};

use crate::cell::{Cell, run, wait_for};
use crate::client::Client;
use crate::image::pack;
use crate::leaks;
use crate::registry::Registry;

/// How long a daemon may take until it serves.
pub const START_LIMIT: Duration = Duration::from_secs(30);

/// How long a daemon may take to end after SIGTERM.
pub const END_LIMIT: Duration = Duration::from_secs(20);

/// The path that an environment variable names; without it the test says loudly that it was skipped.
pub fn program(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable)
        .map(PathBuf::from)
        .filter(|path| path.exists());
    if path.is_none() {
        crate::skipped(&format!(
            "{variable} does not name a program; `cargo xtask test` sets it"
        ));
    }
    path
}

/// A daemon and its places, `root`, `state`, `coracle.sock`, `config.toml` and `coracled.log` in one directory.
/// Killed when dropped.
#[derive(Debug)]
pub struct Server {
    program: PathBuf,
    dir: PathBuf,
    child: Option<Child>,
    /// How much it logs.
    pub log_level: &'static str,
    /// Who connects its pods.
    pub network: &'static str,
}

/// A running daemon; its places are in the cell's scratch directory.
pub struct Daemon {
    server: Server,
}

/// A pod sandbox as tests look at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// The pod's name.
    pub name: String,
    /// How often the pod was set up anew.
    pub attempt: u32,
    /// Whether it is ready.
    pub ready: bool,
}

/// A container as tests look at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// The pod's name.
    pub pod: String,
    /// Its own name.
    pub name: String,
}

impl Server {
    /// A daemon that is not started yet; its things are looked for by `leaks` from now on.
    pub fn new(program: &Path, dir: &Path, config: &str) -> Result<Server> {
        fs::create_dir_all(dir.join("root")).with_context(|| format!("make {}", dir.display()))?;
        fs::write(dir.join("config.toml"), config)?;
        leaks::watch(dir);
        Ok(Server {
            program: program.to_owned(),
            dir: dir.to_owned(),
            child: None,
            log_level: "debug",
            network: "bridge",
        })
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Where everything of it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its data root.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// Its state directory.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("coracle.sock")
    }

    /// What it logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        let log = fs::read(self.dir.join("coracled.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Starts the program, which `command` runs, on these places; the process is the caller's.
    pub fn launch(&self, mut command: Command) -> Result<Child> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("coracled.log"))?;
        command
            .args(["serve", "--network", self.network, "--log-format", "text"])
            .args(["--log-level", self.log_level])
            .arg("--config")
            .arg(self.dir.join("config.toml"))
            .arg("--root")
            .arg(self.root())
            .arg("--state")
            .arg(self.state())
            .arg("--socket")
            .arg(self.socket())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        command.spawn().with_context(|| format!("start {command:?}"))
    }

    /// Starts it; [`Server::is_serving`] tells when it serves.
    pub fn start(&mut self, command: Command) -> Result<()> {
        self.child = Some(self.launch(command)?);
        Ok(())
    }

    /// Whether it serves yet; an error when it ended instead.
    pub fn is_serving(&mut self) -> Result<bool> {
        if let Some(status) = self.ended()? {
            anyhow::bail!("coracled ended at its start ({status}):\n{}", self.log());
        }
        // The socket gets its name when everything else is ready.
        Ok(UnixStream::connect(self.socket()).is_ok())
    }

    /// How it ended, once it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        let child = self.child.as_mut().context("the daemon was not started")?;
        Ok(child.try_wait()?)
    }

    /// The daemon's process id.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// kill -9.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Asks it to end, as a service manager does.
    pub fn ask_to_end(&self) -> Result<()> {
        let pid = self.pid().context("the daemon runs")?;
        Ok(signal::kill(i32::try_from(pid)?, Signal::TERM)?)
    }

    /// Waits until it serves.
    pub fn wait_serving(&mut self) -> Result<()> {
        wait_for("coracled to serve", START_LIMIT, || {
            Ok(self.is_serving()?.then_some(()))
        })
    }

    /// Has it end; pods live on.
    pub fn terminate(&mut self) -> Result<()> {
        self.ask_to_end()?;
        let status = wait_for("coracled to end", END_LIMIT, || self.ended())?;
        self.child = None;
        ensure!(status.success(), "coracled ended with {status}:\n{}", self.log());
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A test that failed: nothing of it may disturb the next one.
        let _ = self.kill();
    }
}

impl Daemon {
    /// Starts the daemon that `CORACLED` names; with an authority the test's registry is configured.
    pub fn start(cell: &Cell, authority: Option<&Path>) -> Result<Self> {
        let program = program("CORACLED").context("CORACLED names the daemon to test")?;
        let certs = cell.subdir("certs.d")?;
        if let Some(authority) = authority {
            let dir = cell.subdir(&format!("certs.d/{}", Registry::ADDRESS))?;
            fs::write(dir.join("hosts.toml"), format!("ca = {authority:?}\n"))?;
        }
        let config = format!("[image]\ncerts_dir = {certs:?}\n[network]\nsubnet = \"10.222.0.0/16\"\n");
        let server = Server::new(&program, cell.dir(), &config)?;
        Self::serve(cell, server)
    }

    /// Starts it with pods connected by CNI plugins: a configuration's directory and that of the programs.
    pub fn start_with_plugins(cell: &Cell, conf: &Path, bin: &Path) -> Result<Self> {
        let program = program("CORACLED").context("CORACLED names the daemon to test")?;
        let config = format!("[network]\ncni_conf_dir = {conf:?}\ncni_bin_dirs = [{bin:?}]\n");
        let mut server = Server::new(&program, cell.dir(), &config)?;
        server.network = "cni";
        Self::serve(cell, server)
    }

    fn serve(cell: &Cell, server: Server) -> Result<Self> {
        let mut daemon = Self { server };
        daemon.launch(cell, &[])?;
        Ok(daemon)
    }

    /// Starts the daemon again with further variables in its environment (failpoints).
    pub fn launch(&mut self, cell: &Cell, environment: &[(&str, &str)]) -> Result<()> {
        let mut command = cell.command(self.server.program());
        command.envs(environment.iter().copied());
        self.server.start(command)?;
        self.server.wait_serving()
    }

    /// The CRI socket.
    pub fn socket(&self) -> PathBuf {
        self.server.socket()
    }

    /// A new connection.
    pub fn client(&self) -> Result<Client> {
        Client::connect(&self.socket())
    }

    /// The daemon's process id.
    pub fn pid(&self) -> Result<u32> {
        self.server.pid().context("the daemon runs")
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.server.ended(), Ok(None))
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.server.kill()
    }

    /// SIGKILL, and a new start.
    pub fn kill_and_restart(&mut self, cell: &Cell) -> Result<()> {
        self.kill()?;
        self.launch(cell, &[])
    }

    /// SIGTERM; pods live on.
    pub fn terminate(mut self) -> Result<()> {
        self.server.terminate()
    }

    /// What a reboot does: every process of a pod ends, the state directory is empty, the boot id is another one.
    pub fn reboot(&mut self, cell: &Cell) -> Result<()> {
        self.kill()?;
        wait_for(
            "all processes of the pods to end",
            Duration::from_secs(10),
            || {
                let left = leaks::snapshot(cell)?.of("process");
                // Of the whole cell only the pods' are in a group of theirs.
                let pods: Vec<i32> = left.iter().filter_map(|line| pod_process(cell, line)).collect();
                for pid in &pods {
                    let _ = signal::kill(*pid, Signal::KILL);
                }
                Ok(pods.is_empty().then_some(()))
            },
        )?;
        let boot_id = cell.dir().join("boot_id");
        match fs::remove_dir_all(self.server.state()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        fs::write(&boot_id, "11111111-2222-4333-8444-555555555555\n")?;
        cell.sh(&format!(
            "mount --bind {} /proc/sys/kernel/random/boot_id",
            boot_id.display()
        ))?;
        self.launch(cell, &[])
    }

    /// Imports an OCI layout under a name, through `coracled image import`; gives the name.
    pub fn import(&self, cell: &Cell, layout: &Path, name: &str) -> Result<String> {
        let tar = layout.with_extension("tar");
        pack(layout, &tar)?;
        let mut command = cell.command(self.server.program());
        command
            .args(["image", "import", "--socket"])
            .arg(self.socket())
            .args(["--name", name])
            .arg(&tar);
        run(&mut command).with_context(|| format!("import {name}"))?;
        fs::remove_file(&tar)?;
        Ok(name.to_owned())
    }

    /// All pod sandboxes.
    pub fn sandboxes(&self, _cell: &Cell) -> Result<Vec<Sandbox>> {
        let pods = self.client()?.pods()?;
        Ok(pods
            .into_iter()
            .map(|pod| {
                let metadata = pod.metadata.unwrap_or_default();
                Sandbox {
                    id: pod.id,
                    name: metadata.name,
                    attempt: metadata.attempt,
                    ready: pod.state == 0,
                }
            })
            .collect())
    }

    /// All containers.
    pub fn containers(&self, _cell: &Cell) -> Result<Vec<Container>> {
        let list = self.client()?.containers()?;
        Ok(list
            .into_iter()
            .map(|c| Container {
                pod: c
                    .labels
                    .get("io.kubernetes.pod.name")
                    .cloned()
                    .unwrap_or_default(),
                name: c.metadata.unwrap_or_default().name,
                id: c.id,
            })
            .collect())
    }

    /// The names of all images.
    pub fn images(&self, _cell: &Cell) -> Result<Vec<String>> {
        Ok(self
            .client()?
            .images()?
            .into_iter()
            .flat_map(|image| image.repo_tags)
            .collect())
    }
}

/// The process of a line of the leak check, if its cgroup is one of pods or monitors.
fn pod_process(cell: &Cell, line: &str) -> Option<i32> {
    let pid = line.split(' ').next()?;
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let of_pod = groups.contains(&cell.cgroup()) || groups.contains("/coracle/");
    of_pod.then(|| pid.parse().ok())?
}
