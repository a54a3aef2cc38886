//! What a monitor is asked for.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use coracle_cgroup::Location;
use coracle_kernel::fd;
use coracle_proto::cri::NamespaceMode;
use coracle_wire::{
    Attach, Body, CgroupPath, Create, Exec, FailKind, Forget, ReopenLog, SetupSandbox, Shutdown, Start,
    Sysctl, Upgrade,
};
use tokio::time::{Instant, timeout_at};

use super::client::Answer;
use super::words::is_refusal;
use super::{AttachCall, Attached, CreateCall, Created, ExecCall, ExecStarted, Monitor, SetupCall};
use crate::error::{Context as _, Error, Result};

/// Limit of requests that a live monitor answers at once; beyond it the monitor counts as silent.
const PROMPT: Duration = Duration::from_secs(5);

/// Limit of what a helper of the monitor does.
const HELPER: Duration = Duration::from_secs(60);

/// What the monitor's own deadline is shorter, so that its answer, with the name of the step, comes first.
const MARGIN: Duration = Duration::from_secs(2);

/// An answer came without what belongs to it.
#[derive(Debug, thiserror::Error)]
#[error("the monitor's answer lacks a descriptor")]
struct NoDescriptor;

impl Monitor {
    /// Has the pod's namespaces made.
    pub(crate) async fn setup(&self, call: SetupCall) -> Result<()> {
        const STEP: &str = "set up the pod's namespaces";
        let netns = match &call.netns {
            Some(path) => {
                Some(coracle_kernel::path::open(path, coracle_kernel::path::OFlags::RDONLY).step(STEP)?)
            }
            None => None,
        };
        let request = SetupSandbox {
            pod_id: call.pod_id,
            pod_dir: text(&call.pod_dir),
            hostname: if netns.is_some() {
                call.hostname
            } else {
                String::new()
            },
            sysctls: call
                .sysctls
                .into_iter()
                .map(|(name, value)| Sysctl { name, value })
                .collect(),
            ipc: call.options.ipc() != NamespaceMode::Node,
            uts: netns.is_some(),
            pid: call.pid_cgroup.is_some(),
            netns: netns.is_some(),
            shm_bytes: 0,
            user: None,
            pid_cgroup: call.pid_cgroup.as_ref().map(cgroup_paths).unwrap_or_default(),
        };
        let answer = self
            .0
            .link
            .request(STEP, request, netns.into_iter().collect(), HELPER)
            .await?;
        let Body::Sandbox(made) = answer.body else {
            return Err(Error::step(STEP, NoDescriptor));
        };
        let some = |path: String| (!path.is_empty()).then_some(path);
        self.0.namespaces.send_modify(|namespaces| {
            namespaces.network = call.netns;
            namespaces.ipc = some(made.ipc);
            namespaces.uts = some(made.uts);
            namespaces.pid = some(made.pid);
            namespaces.user = some(made.user);
        });
        Ok(())
    }

    /// Has a container made, up to the point where its init waits.
    pub(crate) async fn create(&self, call: CreateCall) -> Result<Created> {
        const STEP: &str = "create the container";
        let request = Create {
            container_id: call.container,
            bundle: text(&call.bundle),
            log_path: call.log_path,
            tty: call.tty,
            stdin: call.stdin,
            stdin_once: call.stdin_once,
            deadline_ms: millis(HELPER - MARGIN),
            rootfs: true,
        };
        let Answer { body, mut fds } = self
            .0
            .link
            .request(STEP, request, vec![call.rootfs], HELPER)
            .await?;
        match (body, fds.pop()) {
            (Body::Created(created), Some(pidfd)) => Ok(Created {
                pid: created.pid,
                pidfd,
            }),
            _ => Err(Error::step(STEP, NoDescriptor)),
        }
    }

    /// Gives the word; the program runs when this returns.
    pub(crate) async fn start_container(&self, id: &str) -> Result<()> {
        let request = Start {
            container_id: id.to_owned(),
            deadline_ms: millis(HELPER - MARGIN),
        };
        self.0
            .link
            .request("start the container", request, Vec::new(), HELPER)
            .await
            .map(drop)
    }

    /// Runs a command; its end is awaited apart.
    pub(crate) async fn exec(&self, call: ExecCall) -> Result<ExecStarted> {
        const STEP: &str = "run the command";
        let document = fd::sealed_memfd(c"process", &call.process).step(STEP)?;
        let request = Exec {
            exec_id: call.exec,
            container_id: call.container,
            stdin: call.stdio[0].is_some(),
            stdout: call.stdio[1].is_some(),
            stderr: call.stdio[2].is_some(),
            tty: call.tty,
            cgroup: call.cgroup.as_ref().map(cgroup_paths).unwrap_or_default(),
            deadline_ms: millis(HELPER - MARGIN),
        };
        let fds = std::iter::once(document).chain(call.stdio.into_iter().flatten());
        let (answer, expected) = self.0.link.exec(STEP, request, fds.collect(), HELPER).await?;
        let mut fds = answer.fds.into_iter();
        match (fds.next(), fds.next()) {
            (Some(process), terminal) if terminal.is_some() == call.tty => Ok(ExecStarted {
                exit: expected.of(process),
                terminal,
            }),
            _ => Err(Error::step(STEP, NoDescriptor)),
        }
    }

    /// Joins the streams of a container.
    pub(crate) async fn attach_to(&self, call: AttachCall) -> Result<Attached> {
        const STEP: &str = "attach to the container";
        let request = Attach {
            container_id: call.container,
            stdin: call.stdin,
            stdout: call.stdout.is_some(),
            stderr: call.stderr.is_some(),
        };
        let fds = call.stdout.into_iter().chain(call.stderr).collect();
        let Answer { body, mut fds } = self.0.link.request(STEP, request, fds, PROMPT).await?;
        let Body::Attached(attached) = body else {
            return Err(Error::step(STEP, NoDescriptor));
        };
        let (input, terminal) = match (attached.tty, fds.pop()) {
            (true, terminal) => (None, terminal),
            (false, input) => (input, None),
        };
        Ok(Attached {
            stdin: input,
            terminal,
        })
    }

    /// Has the log opened anew; no new file after an error.
    pub(crate) async fn reopen_log(&self, id: &str) -> Result<()> {
        let request = ReopenLog {
            container_id: id.to_owned(),
        };
        self.0
            .link
            .request("reopen the container's log", request, Vec::new(), PROMPT)
            .await
            .map(drop)
    }

    /// Has the monitor let go of a container whose init is killed; one that it does not know is let go.
    pub(crate) async fn forget(&self, id: &str) -> Result<()> {
        let until = Instant::now() + PROMPT;
        loop {
            // Asked for before the request, so that no exit in between is missed.
            let exit = self.0.link.exits().notified();
            let request = Forget {
                container_id: id.to_owned(),
            };
            let outcome = self
                .0
                .link
                .request("let go of the container", request, Vec::new(), PROMPT)
                .await;
            match outcome {
                // Killed a moment ago and not reaped yet.
                Err(error) if is_refusal(&error, FailKind::State) => {
                    if timeout_at(until, exit).await.is_err() {
                        return Err(error);
                    }
                }
                outcome => return outcome.map(drop),
            }
        }
    }

    /// Has it become another program.
    pub(super) async fn upgrade(&self, program: &OwnedFd) -> Result<()> {
        const STEP: &str = "upgrade the monitor";
        let program = fd::dup(program).step(STEP)?;
        let request = self.0.link.request(STEP, Upgrade {}, vec![program], HELPER);
        request.await.map(drop)
    }

    /// Asks it to leave.
    pub(crate) async fn shut_down(&self) -> Result<()> {
        self.0
            .link
            .request("end the monitor", Shutdown {}, Vec::new(), PROMPT)
            .await
            .map(drop)
    }
}

fn cgroup_paths(location: &Location) -> Vec<CgroupPath> {
    let entries = location.to_map().into_iter();
    entries
        .map(|(controller, path)| CgroupPath { controller, path })
        .collect()
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
