//! Exec: one more process in a running container.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use coracle_cgroup::{Host, Location, Manager};
use coracle_kernel::namespace::{self, Kind, Kinds};
use coracle_kernel::{Errno, fd, scm};
use coracle_spec::{Config, NamespaceKind, Process, Status};

use crate::create::{arguments, check_labels, compile_filter, keyring, listen_variables, write_pid_file};
use crate::init::{Console, Keep, Launch, LaunchError, Newborn, Parent, Role, Setup, Step, launch};
use crate::state::State;
use crate::store::{Entry, manager, rootless};
use crate::{Error, Result, env, kill, namespaces};

/// What to execute.
#[derive(Debug)]
pub struct ExecOptions<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The container's configuration as it was created: its namespaces and its filter.
    pub config: &'a Config,
    /// The container's init.
    pub init: OwnedFd,
    /// Its pid, as the caller sees it.
    pub init_pid: i32,
    /// The process.
    pub process: &'a Process,
    /// Standard input, output and error; the caller's where there is none. Not used with a terminal.
    pub stdio: [Option<OwnedFd>; 3],
    /// Where the terminal goes, if the process has one.
    pub console: Option<Console>,
    /// Whose child the process is.
    pub parent: Parent,
    /// How many of the caller's descriptors from 3 on are passed on.
    pub preserve_fds: i32,
    /// `LISTEN_FDS` of socket activation, counted in `preserve_fds` too.
    pub listen_fds: i32,
}

/// What to execute in a container of a store.
#[derive(Debug)]
pub struct StoredExec<'a> {
    /// The process.
    pub process: &'a Process,
    /// Where the terminal goes.
    pub console: Option<Console>,
    /// Where the pid is written to.
    pub pid_file: Option<&'a Path>,
    /// A connected socket that takes the pidfd.
    pub pidfd_socket: Option<OwnedFd>,
    /// Descriptors from 3 on that are passed on.
    pub preserve_fds: i32,
    /// `LISTEN_FDS` of socket activation.
    pub listen_fds: i32,
    /// Execute although nothing in the container would run.
    pub ignore_paused: bool,
    /// A sub-cgroup of the container's that is there, as the process sees it: relative, or absolute from the
    /// container's own as root.
    pub sub_cgroup: Option<&'a str>,
}

/// A process that waits for the word to become its program; killed if it is dropped.
#[derive(Debug)]
pub struct Executed {
    newborn: Newborn,
}

impl Executed {
    /// Its process id, as the caller sees it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.newborn.pid
    }

    /// Its process descriptor.
    #[must_use]
    pub fn pidfd(&self) -> Option<&OwnedFd> {
        self.newborn.pidfd()
    }

    /// The master of its terminal, with [`Console::Return`].
    pub fn take_terminal(&mut self) -> Option<OwnedFd> {
        self.newborn.terminal.take()
    }

    /// What could not be granted.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.newborn.warnings
    }

    /// Lets it become its program, and returns when it has.
    pub fn recorded(self) -> Result<OwnedFd> {
        Ok(self.newborn.keep(Keep::UntilProgram)?)
    }
}

/// Executes a process in a container; it is born in the cgroup.
pub fn exec(options: ExecOptions<'_>, cgroup: &dyn Manager) -> Result<Executed> {
    let process = options.process;
    check_labels(process, None)?;
    let kinds = kinds(options.config, options.init_pid)?;
    let listen = listen_variables(options.listen_fds);
    let mut environment = env::unique(&process.env);
    for variable in &listen {
        environment.retain(|entry| entry.split('=').next() != variable.split('=').next());
        environment.push(variable);
    }
    let setup = Setup {
        process,
        namespaces: namespaces::Plan::of_process(options.init, kinds),
        args: arguments(process)?,
        env: environment,
        keyring: keyring(options.id, false)?,
        filter: compile_filter(options.config)?,
        tasks: Vec::new(),
        stdio: options.stdio,
        preserve_fds: options.preserve_fds,
        rootless: rootless(),
    };
    let launching = Launch {
        setup,
        role: Role::Exec,
        parent: options.parent,
        console: options.console,
        hooks_cwd: None,
    };
    Ok(Executed {
        newborn: launch(launching, cgroup)?,
    })
}

/// Executes a process in a container of a store; what comes back still waits.
pub fn exec_stored(entry: &Entry, config: &Config, options: StoredExec<'_>) -> Result<Executed> {
    let state = entry.state()?.ok_or(Error::NotFound)?;
    match entry.full_status(&state)? {
        Status::Running | Status::Created => {}
        Status::Paused if options.ignore_paused => {}
        Status::Paused => return Err(Error::ExecPaused),
        Status::Stopped | Status::Creating => return Err(Error::ExecStopped),
    }
    let init = kill::init(&state)?.ok_or(Error::ExecStopped)?;
    let cgroup = match options.sub_cgroup {
        None => manager(&state)?,
        Some(path) => Some(sub_cgroup(&state, path)?),
    };
    let Some(cgroup) = cgroup else {
        return Err(Error::Record("without a cgroup".to_owned()));
    };
    let attempt = |console, cgroup: &dyn Manager| {
        let init = fd::dup(&init).map_err(|source| Error::call("copy the pidfd of the init", source))?;
        let options = ExecOptions {
            id: entry.id(),
            config,
            init,
            init_pid: state.pid,
            process: options.process,
            stdio: [None, None, None],
            console,
            parent: Parent::Direct,
            preserve_fds: options.preserve_fds,
            listen_fds: options.listen_fds,
        };
        exec(options, cgroup)
    };
    let again = match &options.console {
        Some(Console::Socket(socket)) => fd::dup(socket).map(Console::Socket).map(Some),
        Some(Console::Return) => Ok(Some(Console::Return)),
        None => Ok(None),
    };
    let again = again.map_err(|source| Error::call("copy the console socket", source))?;
    let executed = match attempt(options.console, cgroup.as_ref()) {
        // The container has made sub-groups with controllers of its own, and the kernel lets no process beside those.
        Err(error) if is_busy(&error) && options.sub_cgroup.is_none() => {
            attempt(again, init_cgroup(&state)?.as_ref())?
        }
        other => other?,
    };
    if let Some(file) = options.pid_file {
        write_pid_file(file, executed.pid())?;
    }
    if let (Some(socket), Some(pidfd)) = (&options.pidfd_socket, executed.pidfd()) {
        scm::send(socket, b"pidfd", &[pidfd.as_fd()]).map_err(|errno| {
            Error::call(
                "send the pidfd",
                coracle_kernel::Error::new("sendmsg", "pidfd socket", errno),
            )
        })?;
    }
    Ok(executed)
}

/// Whether the cgroup takes no processes itself.
fn is_busy(error: &Error) -> bool {
    match error {
        Error::Launch(LaunchError::Init(failure)) => {
            failure.step == Step::CreateNamespaces && failure.errno == Some(Errno::EBUSY)
        }
        Error::Launch(LaunchError::Call { source, .. }) => source.errno() == Errno::EBUSY,
        _ => false,
    }
}

/// The cgroup of the unified hierarchy that the init is in now: the container's own or one below.
fn init_cgroup(state: &State) -> Result<Box<dyn Manager>> {
    let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", state.pid)).unwrap_or_default();
    let own = state.cgroup.get("").map_or("", String::as_str);
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"));
    match path.and_then(|path| path.strip_prefix(own)) {
        Some(below) if below.starts_with('/') => sub_cgroup(state, below),
        _ => Err(Error::Refused(
            "the container's init has left the container's cgroup".to_owned(),
        )),
    }
}

/// The manager of a sub-cgroup that is there already.
fn sub_cgroup(state: &State, path: &str) -> Result<Box<dyn Manager>> {
    let refused = || Error::Refused(format!("bad sub cgroup path: {path}"));
    let relative = path.trim_matches('/');
    if relative.split('/').any(|part| part == "..") {
        return Err(refused());
    }
    let mut map = state.cgroup.clone();
    for own in map.values_mut() {
        if !relative.is_empty() {
            own.push('/');
            own.push_str(relative);
        }
    }
    let location = Location::from_map(&map).map_err(|_| refused())?;
    let cgroup = Host::detect()?.manager(&location, coracle_cgroup::Options::default())?;
    if !cgroup.exists() {
        return Err(Error::Refused(format!("sub cgroup {path} does not exist")));
    }
    Ok(cgroup)
}

/// The namespaces to join: those that the container made or joined. Only a user namespace may not be joined by those
/// who are in it.
fn kinds(config: &Config, pid: i32) -> Result<Kinds> {
    let mut kinds = config.namespaces.iter().fold(Kinds::empty(), |kinds, (kind, _)| {
        kinds
            | match kind {
                NamespaceKind::Mount => Kinds::MOUNT,
                NamespaceKind::Cgroup => Kinds::CGROUP,
                NamespaceKind::Uts => Kinds::UTS,
                NamespaceKind::Ipc => Kinds::IPC,
                NamespaceKind::User => Kinds::USER,
                NamespaceKind::Pid => Kinds::PID,
                NamespaceKind::Network => Kinds::NETWORK,
                NamespaceKind::Time => Kinds::TIME,
            }
    });
    if kinds.contains(Kinds::USER) {
        let same = || {
            let theirs = namespace::identity(namespace::open_of(pid, Kind::User)?)?;
            Ok(theirs == namespace::own_identity(Kind::User)?)
        };
        if same().map_err(|source| Error::call("compare user namespaces", source))? {
            kinds.remove(Kinds::USER);
        }
    }
    Ok(kinds)
}
