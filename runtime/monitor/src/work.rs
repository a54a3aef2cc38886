//! What helpers do: the pod's namespaces, containers, execs, hooks. Nothing here runs in the monitor itself.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use coracle_cgroup::{Change, Host, Options as CgroupOptions};
use coracle_container::{
    Console, ExecOptions, FailureKind, LateHooks, LaunchError, Options, Parent, Root, StartAt, load_config,
};
use coracle_kernel::namespace::{self, Kind, Kinds};
use coracle_kernel::procfs::Procfs;
use coracle_kernel::{fd, persona};
use coracle_spec::MAX_CONFIG_BYTES;
use coracle_spec::oci::LinuxResources;
use coracle_wire::{CgroupPath, FailKind, Failed, Sysctl};

use crate::connection::failed;
use crate::container::{location, paths};
use crate::helper::{Made, Reporter, Work};
use crate::pod_init;
use crate::pod_mounts::{self, PodMounts};

/// Makes the pod's namespaces.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) pod_dir: String,
    pub(crate) hostname: String,
    pub(crate) sysctls: Vec<Sysctl>,
    pub(crate) ipc: bool,
    pub(crate) uts: bool,
    pub(crate) shm_bytes: u64,
    pub(crate) netns: Option<OwnedFd>,
    /// Cgroup of the init of a shared pid namespace; empty where there is none.
    pub(crate) pid_cgroup: Vec<CgroupPath>,
}

/// Makes a container.
#[derive(Debug)]
pub(crate) struct Create {
    pub(crate) id: String,
    pub(crate) bundle: String,
    pub(crate) tty: bool,
    pub(crate) rootfs: Option<OwnedFd>,
    pub(crate) stdio: [Option<OwnedFd>; 3],
    pub(crate) start: OwnedFd,
    pub(crate) mounts: Option<PodMounts>,
}

/// Executes a process.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) container_id: String,
    pub(crate) bundle: String,
    pub(crate) init: OwnedFd,
    pub(crate) init_pid: i32,
    /// The process document.
    pub(crate) process: OwnedFd,
    pub(crate) stdio: [Option<OwnedFd>; 3],
    pub(crate) tty: bool,
    pub(crate) cgroup: Vec<CgroupPath>,
}

/// Runs hooks that the monitor is responsible for.
#[derive(Debug)]
pub(crate) struct Hooks {
    pub(crate) which: LateHooks,
    pub(crate) container_id: String,
    pub(crate) bundle: String,
    pub(crate) pid: i32,
}

impl Work for Setup {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.netns.iter().map(AsFd::as_fd).collect()
    }

    fn run(self, reporter: &Reporter) -> Result<(), Failed> {
        reporter.step("make the pod's namespaces");
        if let Some(netns) = &self.netns {
            namespace::enter(netns, Kind::Network).map_err(call)?;
        }
        let mut kinds = Kinds::empty();
        kinds.set(Kinds::MOUNT, true);
        kinds.set(Kinds::IPC, self.ipc);
        kinds.set(Kinds::UTS, self.uts);
        namespace::unshare(kinds).map_err(call)?;
        if self.uts && !self.hostname.is_empty() {
            persona::set_hostname(&self.hostname).map_err(call)?;
        }
        reporter.step("mount the pod's /dev/shm and files");
        pod_mounts::make(&self.pod_dir, self.ipc.then_some(self.shm_bytes))?;
        if !self.sysctls.is_empty() {
            reporter.step("set the pod's sysctls");
            self.set_sysctls()?;
        }
        let mut made = Made::default();
        let mut fds = Vec::new();
        if !self.pid_cgroup.is_empty() {
            reporter.step("make the pod's init");
            let host = Host::detect().map_err(other)?;
            let place = location(&self.pid_cgroup).map_err(other)?;
            let cgroup = host.manager(&place, CgroupOptions::default()).map_err(other)?;
            let init = pod_init::spawn(cgroup.as_ref(), &self.pod_dir)?;
            made.pid = init.pid;
            made.namespaces.push(Kind::Pid.file_name().to_owned());
            fds.push(init.pidfd);
            fds.push(namespace::open_of(init.pid, Kind::Pid).map_err(call)?);
        }
        for (kind, wanted) in [(Kind::Ipc, self.ipc), (Kind::Uts, self.uts), (Kind::Mount, true)] {
            if wanted {
                made.namespaces.push(kind.file_name().to_owned());
                fds.push(namespace::open_own(kind).map_err(call)?);
            }
        }
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        reporter.made(made, &fds);
        Ok(())
    }
}

impl Setup {
    fn set_sysctls(&self) -> Result<(), Failed> {
        let procfs = Procfs::open().map_err(call)?;
        for Sysctl { name, value } in &self.sysctls {
            let ours = match name.split('.').next() {
                Some("net") => self.netns.is_some(),
                Some("kernel") | Some("fs") => self.ipc && is_ipc_sysctl(name),
                _ => false,
            };
            if !ours {
                let text = format!("sysctl {name:?} is not one of a namespace that the pod has for itself");
                return Err(failed(FailKind::Invalid, text));
            }
            procfs.sysctl(name, value).map_err(call)?;
        }
        Ok(())
    }
}

/// The sysctls that an IPC namespace has of its own.
fn is_ipc_sysctl(name: &str) -> bool {
    let names = [
        "kernel.sem",
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.shm_rmid_forced",
    ];
    let more = ["kernel.shmall", "kernel.shmmax", "kernel.shmmni"];
    names.contains(&name) || more.contains(&name) || name.starts_with("fs.mqueue.")
}

impl Work for Create {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let mut fds: Vec<BorrowedFd<'_>> = self.stdio.iter().flatten().map(AsFd::as_fd).collect();
        fds.extend(self.rootfs.iter().chain([&self.start]).map(AsFd::as_fd));
        fds.extend(self.mounts.iter().map(|mounts| mounts.namespace.as_fd()));
        fds
    }

    fn run(self, reporter: &Reporter) -> Result<(), Failed> {
        reporter.step("read the container's configuration");
        let bundle = Path::new(&self.bundle);
        let (config, _) = load_config(bundle).map_err(container)?;
        if config.process.terminal != self.tty {
            return Err(failed(
                FailKind::Invalid,
                "process.terminal of the configuration differs from the request",
            ));
        }
        reporter.step("copy the pod's mounts");
        let lent = self.mounts.as_ref().map(PodMounts::lend).transpose();
        let lent = lent.map_err(call)?.unwrap_or_default();
        reporter.step("make the container's cgroup");
        let mut cgroup = coracle_container::cgroup_of(&config, &self.id, true).map_err(container)?;
        let none = LinuxResources::default();
        let resources = config.resources.as_ref().unwrap_or(&none);
        cgroup
            .create(resources)
            .and_then(|()| cgroup.apply(resources, Change::First))
            .map_err(other)?;
        reporter.step("set up the container's init");
        let options = Options {
            id: &self.id,
            bundle,
            config: &config,
            root: self.rootfs.map_or(Root::Path, Root::Detached),
            lent,
            stdio: self.stdio,
            console: self.tty.then_some(Console::Return),
            start_at: StartAt::Connected(self.start),
            parent: Parent::Sibling,
            preserve_fds: 0,
            listen_fds: 0,
            no_pivot: false,
            no_new_keyring: false,
        };
        let mut created = coracle_container::create(options, cgroup.as_ref()).map_err(container)?;
        let (pid, terminal) = (created.pid(), created.take_terminal());
        let mut warnings: Vec<String> = config.warnings.iter().map(ToString::to_string).collect();
        warnings.extend_from_slice(created.warnings());
        let pidfd = created.recorded().map_err(container)?;
        let mut fds = vec![pidfd.as_fd()];
        fds.extend(terminal.iter().map(AsFd::as_fd));
        let made = Made {
            pid,
            terminal: terminal.is_some(),
            cgroup: paths(cgroup.location()),
            poststart: !config.hooks.poststart.is_empty(),
            poststop: !config.hooks.poststop.is_empty(),
            warnings,
            ..Made::default()
        };
        reporter.made(made, &fds);
        Ok(())
    }
}

impl Work for Exec {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let mut fds: Vec<BorrowedFd<'_>> = self.stdio.iter().flatten().map(AsFd::as_fd).collect();
        fds.extend([self.init.as_fd(), self.process.as_fd()]);
        fds
    }

    fn run(self, reporter: &Reporter) -> Result<(), Failed> {
        reporter.step("read the process document");
        let (config, _) = load_config(Path::new(&self.bundle)).map_err(container)?;
        fd::rewind(&self.process).map_err(call)?;
        let mut document = Vec::new();
        File::from(self.process)
            .take(MAX_CONFIG_BYTES + 1)
            .read_to_end(&mut document)
            .map_err(|error| {
                call(coracle_kernel::Error::from_io(
                    "read",
                    "the process document",
                    &error,
                ))
            })?;
        let (process, _) = coracle_spec::load_process(&document)
            .map_err(|error| failed(FailKind::Invalid, chain(&error)))?;
        if process.terminal != self.tty {
            return Err(failed(
                FailKind::Invalid,
                "terminal of the process document differs from the request",
            ));
        }
        reporter.step("find the process's cgroup");
        let host = Host::detect().map_err(other)?;
        let place = location(&self.cgroup).map_err(other)?;
        let cgroup = host.manager(&place, CgroupOptions::default()).map_err(other)?;
        reporter.step("set up the process");
        let options = ExecOptions {
            id: &self.container_id,
            config: &config,
            init: self.init,
            init_pid: self.init_pid,
            process: &process,
            stdio: self.stdio,
            console: self.tty.then_some(Console::Return),
            parent: Parent::Sibling,
            preserve_fds: 0,
            listen_fds: 0,
        };
        let mut executed = coracle_container::exec(options, cgroup.as_ref()).map_err(container)?;
        let (pid, terminal) = (executed.pid(), executed.take_terminal());
        let pidfd = executed.recorded().map_err(container)?;
        let mut fds = vec![pidfd.as_fd()];
        fds.extend(terminal.iter().map(AsFd::as_fd));
        reporter.made(
            Made {
                pid,
                terminal: terminal.is_some(),
                // What could not be granted was told when the container was made: a probe must not tell it each time.
                warnings: Vec::new(),
                ..Made::default()
            },
            &fds,
        );
        Ok(())
    }
}

impl Work for Hooks {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn run(self, reporter: &Reporter) -> Result<(), Failed> {
        reporter.step(match self.which {
            LateHooks::Poststart => "run poststart hooks",
            LateHooks::Poststop => "run poststop hooks",
        });
        let warnings = coracle_container::run_late_hooks(
            self.which,
            &self.container_id,
            Path::new(&self.bundle),
            self.pid,
        )
        .map_err(container)?;
        reporter.made(
            Made {
                warnings,
                ..Made::default()
            },
            &[],
        );
        Ok(())
    }
}

/// A failure of the container library, with what a program can decide by kept apart.
#[allow(clippy::needless_pass_by_value, reason = "as map_err hands it over")]
fn container(error: coracle_container::Error) -> Failed {
    use coracle_container::Error;
    let mut said = failed(FailKind::Other, chain(&error));
    let init = match &error {
        Error::Launch(LaunchError::Init(failure)) | Error::Init(failure) => Some(failure),
        _ => None,
    };
    if let Some(failure) = init {
        said.step = failure.step.to_string();
        said.errno = failure.errno.map_or(0, coracle_kernel::Errno::raw);
        if failure.kind == FailureKind::Program {
            said.kind = FailKind::NoProgram.into();
        }
    }
    if let Error::Config(_) | Error::Refused(_) | Error::Bundle { .. } = &error {
        said.kind = FailKind::Invalid.into();
    }
    said
}

#[allow(clippy::needless_pass_by_value, reason = "as map_err hands it over")]
fn call(error: coracle_kernel::Error) -> Failed {
    Failed {
        errno: error.errno().raw(),
        ..failed(FailKind::Other, error.to_string())
    }
}

#[allow(clippy::needless_pass_by_value, reason = "as map_err hands it over")]
pub(crate) fn other(error: coracle_cgroup::Error) -> Failed {
    let errno = error.errno().map_or(0, coracle_kernel::Errno::raw);
    Failed {
        errno,
        ..failed(FailKind::Other, chain(&error))
    }
}

/// An error with all that it was caused by.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
