//! A coracled of the test's own, in a cell.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cell::{Cell, Process, run, wait_for};
use crate::client::Client;
use crate::image::pack;
use crate::registry::Registry;

/// The path that an environment variable names; without it the test says loudly that it was skipped.
#[allow(clippy::print_stderr, reason = "a skipped test says so")]
pub fn program(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable)
        .map(PathBuf::from)
        .filter(|path| path.exists());
    if path.is_none() {
        eprintln!("SKIPPED: {variable} does not name a program; `cargo xtask test` sets it");
    }
    path
}

/// A running daemon; its data, state and socket are below the cell's scratch directory.
pub struct Daemon {
    process: Option<Process>,
    program: PathBuf,
    scratch: PathBuf,
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

impl Daemon {
    /// Starts the daemon that `CORACLED` names; with an authority the test's registry is configured.
    pub fn start(cell: &Cell, authority: Option<&Path>) -> Result<Self> {
        let program = program("CORACLED").context("CORACLED names the daemon to test")?;
        let scratch = cell.dir().to_owned();
        let certs = cell.subdir("certs.d")?;
        if let Some(authority) = authority {
            let dir = cell.subdir(&format!("certs.d/{}", Registry::ADDRESS))?;
            fs::write(dir.join("hosts.toml"), format!("ca = {authority:?}\n"))?;
        }
        fs::write(
            scratch.join("config.toml"),
            format!(
                "[image]\ncerts_dir = {certs:?}\n[network]\nmode = \"bridge\"\nsubnet = \"10.222.0.0/16\"\n"
            ),
        )?;
        let mut daemon = Self {
            process: None,
            program,
            scratch,
        };
        daemon.launch(cell, &[])?;
        Ok(daemon)
    }

    /// Starts the daemon again with further variables in its environment (failpoints).
    pub fn launch(&mut self, cell: &Cell, environment: &[(&str, &str)]) -> Result<()> {
        let mut command = cell.command(&self.program);
        command
            .arg("serve")
            .arg("--config")
            .arg(self.scratch.join("config.toml"));
        command
            .arg("--root")
            .arg(self.scratch.join("data"))
            .arg("--state")
            .arg(self.scratch.join("state"));
        command
            .arg("--socket")
            .arg(self.socket())
            .args(["--log-level", "debug"]);
        command.envs(environment.iter().copied());
        let mut process = cell.spawn("coracled", &mut command)?;
        wait_for("coracled to serve", Duration::from_secs(20), || {
            anyhow::ensure!(
                process.is_running(),
                "it ended; see {}",
                cell.log_path("coracled").display()
            );
            self.client().map(Some)
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// The CRI socket.
    pub fn socket(&self) -> PathBuf {
        self.scratch.join("coracle.sock")
    }

    /// A new connection.
    pub fn client(&self) -> Result<Client> {
        Client::connect(&self.socket())
    }

    /// The daemon's process id.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.process.as_ref().context("the daemon runs")?.pid())
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::is_running)
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("the daemon runs")?.kill()
    }

    /// SIGKILL, and a new start.
    pub fn kill_and_restart(&mut self, cell: &Cell) -> Result<()> {
        self.kill()?;
        self.launch(cell, &[])
    }

    /// SIGTERM; pods live on.
    pub fn terminate(mut self) -> Result<()> {
        self.process.take().context("the daemon runs")?.terminate()
    }

    /// What a reboot does: every process of a pod ends, the state directory is empty, the boot id is another one.
    pub fn reboot(&mut self, cell: &Cell) -> Result<()> {
        self.kill()?;
        for pid in pod_processes(cell) {
            let _ = run(std::process::Command::new("kill").args(["-KILL", &pid]));
        }
        wait_for(
            "all processes of the pods to end",
            Duration::from_secs(10),
            || Ok(pod_processes(cell).is_empty().then_some(())),
        )?;
        let (state, boot_id) = (self.scratch.join("state"), self.scratch.join("boot_id"));
        fs::remove_dir_all(&state).or_else(|e| {
            if e.kind() == std::io::ErrorKind::NotFound {
                Ok(())
            } else {
                Err(e)
            }
        })?;
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
        let mut command = cell.command(&self.program);
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

/// Monitors and container processes: by their cgroups and by the memfd that a monitor runs from.
fn pod_processes(cell: &Cell) -> Vec<String> {
    let cgroup = cell.cgroup();
    let state = cell.dir().join("state").display().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|pid| pid.bytes().all(|b| b.is_ascii_digit()))
        .filter(|pid| {
            let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            groups.contains(&cgroup) || String::from_utf8_lossy(&command).contains(&state)
        })
        .collect()
}
