//! Create: from a bundle to a process that waits for its start.

use std::ffi::CString;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_cgroup::{Change, DevicePolicy, Host, Manager};
use coracle_kernel::idmap::Line;
use coracle_kernel::namespace::Kinds;
use coracle_kernel::path::{self, OFlags};
use coracle_kernel::time::Offsets;
use coracle_kernel::{lsm, scm};
use coracle_spec::oci::LinuxResources;
use coracle_spec::{Bind, Config, IdMapping, NamespaceKind, Process, TimeClock};

use crate::init::{Barrier, Console, Filter, Init, Keep, Launch, Newborn, Parent, Role, Setup, launch};
use crate::rootfs::{Context, Entry as RootEntry, Lent, Source};
use crate::state::{Process as Seen, State};
use crate::store::{Entry, START, Store, rootless};
use crate::{Error, Result, delete, env, filter, namespaces};

/// The file of a bundle.
const CONFIG: &str = "config.json";

/// Where the root file system comes from.
#[derive(Debug)]
pub enum Root {
    /// `root.path` of the configuration.
    Path,
    /// A mount that is attached nowhere; it is attached at `root.path` inside the container's mount namespace.
    Detached(OwnedFd),
}

/// Where the init waits for its start.
#[derive(Debug)]
pub enum StartAt {
    /// At a listening `SOCK_SEQPACKET` socket; see [`crate::release`] for what is said there.
    Listening(OwnedFd),
    /// At one end of a connected pair.
    Connected(OwnedFd),
}

/// What to create, beyond the configuration.
#[derive(Debug)]
pub struct Options<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The bundle, absolute.
    pub bundle: &'a Path,
    /// The configuration.
    pub config: &'a Config,
    /// Where the root comes from.
    pub root: Root,
    /// What its binds find besides the host's mounts.
    pub lent: Vec<Lent>,
    /// Standard input, output and error; the caller's where there is none. Not used with a terminal.
    pub stdio: [Option<OwnedFd>; 3],
    /// Where the terminal goes, if the configuration has one.
    pub console: Option<Console>,
    /// Where the init waits.
    pub start_at: StartAt,
    /// Whose child the init is.
    pub parent: Parent,
    /// How many of the caller's descriptors from 3 on are passed on.
    pub preserve_fds: i32,
    /// `LISTEN_FDS` of socket activation, counted in `preserve_fds` too.
    pub listen_fds: i32,
    /// Enter the root by MS_MOVE and chroot.
    pub no_pivot: bool,
    /// Stay in the caller's session keyring.
    pub no_new_keyring: bool,
}

/// What to create and keep in a store.
#[derive(Debug)]
pub struct StoredOptions<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The bundle, absolute.
    pub bundle: &'a Path,
    /// A connected socket that takes the terminal.
    pub console: Option<Console>,
    /// Where the pid is written to.
    pub pid_file: Option<&'a Path>,
    /// A connected socket that takes the init's pidfd.
    pub pidfd_socket: Option<OwnedFd>,
    /// Descriptors from 3 on that are passed on.
    pub preserve_fds: i32,
    /// `LISTEN_FDS` of socket activation.
    pub listen_fds: i32,
    /// Enter the root by MS_MOVE and chroot.
    pub no_pivot: bool,
    /// Stay in the caller's session keyring.
    pub no_new_keyring: bool,
    /// The caller starts it itself, over the socket that comes back: nobody else can.
    pub own_start: bool,
}

/// A created container.
#[derive(Debug)]
pub struct Created {
    newborn: Newborn,
}

/// A created container of a store.
#[derive(Debug)]
pub struct Stored {
    /// Its directory, locked.
    pub entry: Entry,
    /// Its record.
    pub state: State,
    /// Its init.
    pub pidfd: OwnedFd,
    /// The terminal's master, with [`Console::Return`].
    pub terminal: Option<OwnedFd>,
    /// The socket to start it over, with `own_start`.
    pub start: Option<OwnedFd>,
    /// What was ignored of the configuration or could not be granted.
    pub warnings: Vec<String>,
}

impl Created {
    /// The init's process id, as the caller sees it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.newborn.pid
    }

    /// The init's process descriptor.
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

    /// To be called once the container is on record: it waits for its start from here on. Dropping a created container
    /// instead kills it.
    pub fn recorded(self) -> Result<OwnedFd> {
        Ok(self.newborn.keep(Keep::AtBarrier)?)
    }
}

/// Reads the configuration of a bundle; its bytes come along for a copy.
pub fn load_config(bundle: &Path) -> Result<(Config, Vec<u8>)> {
    let file = bundle.join(CONFIG);
    let failed = |what, path: &Path, error: &coracle_kernel::Error| Error::Bundle {
        what,
        path: path.to_path_buf(),
        reason: error.errno().to_string().to_lowercase(),
    };
    let dir = path::open_dir(bundle).map_err(|error| failed("cannot open bundle", bundle, &error))?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = path::Root::new(&dir)
        .open(CONFIG, flags)
        .or_else(|_| path::open(&file, flags))
        .map_err(|error| failed("cannot open configuration", &file, &error))?;
    let mut bytes = Vec::with_capacity(16 << 10);
    let mut limited = std::fs::File::from(fd).take(coracle_spec::MAX_CONFIG_BYTES + 1);
    limited.read_to_end(&mut bytes).map_err(|error| {
        failed(
            "cannot read configuration",
            &file,
            &coracle_kernel::Error::from_io("read", CONFIG, &error),
        )
    })?;
    let config = Config::from_slice(&bytes).map_err(Error::Config)?;
    Ok((config, bytes))
}

/// The cgroup that a configuration asks for, not made yet.
pub fn cgroup_of(config: &Config, id: &str, accounting: bool) -> Result<Box<dyn Manager>> {
    let host = Host::detect()?;
    let location = host.locate(config.cgroups_path.as_deref(), id)?;
    let user_namespace = config.namespaces.contains(NamespaceKind::User);
    let devices = if user_namespace {
        DevicePolicy::BestEffort
    } else {
        DevicePolicy::Enforce
    };
    Ok(host.manager(&location, coracle_cgroup::Options { accounting, devices })?)
}

/// Creates a container in a cgroup that is there. It ends with what comes back, until that is [`Created::recorded`].
pub fn create(options: Options<'_>, cgroup: &dyn Manager) -> Result<Created> {
    let config = options.config;
    let process = &config.process;
    check_labels(process, config.mount_label.as_deref())?;
    let rootfs = options.bundle.join(&config.root_path);
    let hooks_cwd = path::open(options.bundle, OFlags::PATH | OFlags::DIRECTORY)
        .map_err(|source| Error::call("open the bundle", source))?;
    let listen = listen_variables(options.listen_fds);
    let mut environment = env::unique(&process.env);
    for variable in &listen {
        environment.retain(|entry| entry.split('=').next() != variable.split('=').next());
        environment.push(variable);
    }
    let mut namespaces = namespaces::Plan::open(&config.namespaces)?;
    let detached = matches!(options.root, Root::Detached(_));
    let binds = detached || config.mounts.iter().any(|mount| mount.options.bind != Bind::No);
    // Without privilege there is nobody who could keep anything from the container's root.
    namespaces.gathers = binds && namespaces.user() && namespaces.new.contains(Kinds::MOUNT) && !rootless();
    let setup = Setup {
        process,
        namespaces,
        args: arguments(process)?,
        env: environment,
        keyring: keyring(options.id, options.no_new_keyring)?,
        filter: compile_filter(config)?,
        tasks: Vec::new(),
        stdio: options.stdio,
        preserve_fds: options.preserve_fds,
        rootless: rootless(),
    };
    let source = match options.root {
        Root::Path => Source::Path,
        Root::Detached(mount) => Source::Detached(mount),
    };
    let entry = if options.no_pivot {
        RootEntry::Move
    } else {
        RootEntry::Pivot
    };
    let init = Init {
        id: options.id,
        config,
        bundle: options.bundle,
        rootfs: Some(Box::new(Context {
            bundle: options.bundle,
            root: &rootfs,
            source,
            lent: options.lent,
            entry,
        })),
        time_offsets: time_offsets(config),
        uids: lines(&config.uid_mappings),
        gids: lines(&config.gid_mappings),
        barrier: match options.start_at {
            StartAt::Listening(socket) => Barrier::Listening(socket),
            StartAt::Connected(socket) => Barrier::Connected(socket),
        },
    };
    let launching = Launch {
        setup,
        role: Role::Init(init),
        parent: options.parent,
        console: options.console,
        hooks_cwd: Some(hooks_cwd),
    };
    Ok(Created {
        newborn: launch(launching, cgroup)?,
    })
}

/// Creates a container of a store.
pub fn create_stored(store: &Store, options: StoredOptions<'_>) -> Result<Stored> {
    let (config, bytes) = load_config(options.bundle)?;
    check_console(&config, options.console.as_ref())?;
    let rootfs = options.bundle.join(&config.root_path);
    let mut state = State::new(options.id, &config, options.bundle.to_path_buf(), rootfs);
    let mut cgroup = cgroup_of(&config, options.id, false)?;
    let entry = store.reserve(options.id)?;
    let made = (|| {
        entry.lock()?;
        // Before it is on record as ours: what a record names, a delete empties.
        check_unused(cgroup.as_ref())?;
        state.cgroup = cgroup.location().to_map();
        // From the record a delete finds whatever we may leave behind by dying from here on.
        entry.write_state(&state)?;
        entry.write_config(&bytes)?;
        make(&entry, &mut state, &config, options, cgroup.as_mut())
    })();
    match made {
        Ok(made) => {
            let warnings = config
                .warnings
                .iter()
                .map(ToString::to_string)
                .chain(made.warnings)
                .collect();
            let Made {
                pidfd,
                terminal,
                start,
                ..
            } = made;
            Ok(Stored {
                entry,
                state,
                pidfd,
                terminal,
                start,
                warnings,
            })
        }
        Err(error) => {
            // The first failure is the one to tell; what cannot be removed now a delete finds by the record.
            let _ = delete::destroy(&entry, Some(&state));
            Err(error)
        }
    }
}

struct Made {
    pidfd: OwnedFd,
    terminal: Option<OwnedFd>,
    start: Option<OwnedFd>,
    warnings: Vec<String>,
}

fn make(
    entry: &Entry,
    state: &mut State,
    config: &Config,
    options: StoredOptions<'_>,
    cgroup: &mut dyn Manager,
) -> Result<Made> {
    let none = LinuxResources::default();
    let resources = config.resources.as_ref().unwrap_or(&none);
    if let Err(error) = cgroup.create(resources) {
        if let coracle_cgroup::Error::NotEmpty(_) | coracle_cgroup::Error::Frozen = error {
            // Somebody was faster, and it is theirs.
            state.cgroup.clear();
            entry.write_state(state)?;
        }
        return Err(error.into());
    }
    cgroup.apply(resources, Change::First)?;
    let socket = |source| Error::call("make the start socket", source);
    let (start_at, start) = if options.own_start {
        let (ours, theirs) = scm::pair(scm::Kind::Seqpacket, scm::Mode::Blocking).map_err(socket)?;
        (StartAt::Connected(theirs), Some(ours))
    } else {
        let listener =
            scm::listen(entry.dir(), START, scm::Kind::Seqpacket, scm::Mode::Blocking).map_err(socket)?;
        (StartAt::Listening(listener), None)
    };
    let created = create(
        Options {
            id: options.id,
            bundle: options.bundle,
            config,
            root: Root::Path,
            lent: Vec::new(),
            stdio: [None, None, None],
            console: options.console,
            start_at,
            parent: Parent::Direct,
            preserve_fds: options.preserve_fds,
            listen_fds: options.listen_fds,
            no_pivot: options.no_pivot,
            no_new_keyring: options.no_new_keyring,
        },
        cgroup,
    )?;
    let mut created = created;
    state.pid = created.pid();
    state.start_time = Seen::look(state.pid).map_or(0, |seen| seen.start_time);
    entry.write_state(state)?;
    if let Some(file) = options.pid_file {
        write_pid_file(file, state.pid)?;
    }
    if let (Some(socket), Some(pidfd)) = (&options.pidfd_socket, created.pidfd()) {
        scm::send(socket, b"pidfd", &[pidfd.as_fd()]).map_err(|errno| {
            Error::call(
                "send the pidfd",
                coracle_kernel::Error::new("sendmsg", "pidfd socket", errno),
            )
        })?;
    }
    let (terminal, warnings) = (created.take_terminal(), created.warnings().to_vec());
    let pidfd = created.recorded()?;
    Ok(Made {
        pidfd,
        terminal,
        start,
        warnings,
    })
}

/// A cgroup with processes in it belongs to somebody else.
fn check_unused(cgroup: &dyn Manager) -> Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    match cgroup.pids()?.len() {
        0 => Ok(()),
        count => Err(coracle_cgroup::Error::NotEmpty(count).into()),
    }
}

/// Replaces the file by one that holds the number and nothing else: callers parse all of it.
pub(crate) fn write_pid_file(file: &Path, pid: i32) -> Result<()> {
    let failed = |error: &std::io::Error| {
        let source = coracle_kernel::Error::from_io("write", format!("{file:?}"), error);
        Error::call("write the pid file", source)
    };
    let name = file
        .file_name()
        .ok_or_else(|| failed(&std::io::ErrorKind::InvalidInput.into()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    let new: PathBuf = file.with_file_name(hidden);
    std::fs::write(&new, pid.to_string()).map_err(|error| failed(&error))?;
    std::fs::rename(&new, file).map_err(|error| {
        let failure = failed(&error);
        // What it was to become is told above; a leftover of it helps nobody.
        let _ = std::fs::remove_file(&new);
        failure
    })
}

pub(crate) fn arguments(process: &Process) -> Result<Vec<CString>> {
    let strings = process.args.iter().map(|arg| CString::new(arg.as_bytes()));
    strings
        .collect::<Result<_, _>>()
        .map_err(|_| Error::Refused("process.args: holds a NUL byte".to_owned()))
}

pub(crate) fn keyring(id: &str, none: bool) -> Result<Option<CString>> {
    if none {
        return Ok(None);
    }
    CString::new(format!("_ses.{id}"))
        .map(Some)
        .map_err(|_| Error::BadId)
}

pub(crate) fn compile_filter(config: &Config) -> Result<Option<Filter>> {
    Ok(config.seccomp.as_ref().map(filter::compile).transpose()?)
}

/// What a process is told of sockets that it inherits.
pub(crate) fn listen_variables(listen_fds: i32) -> Vec<String> {
    if listen_fds <= 0 {
        return Vec::new();
    }
    vec![format!("LISTEN_FDS={listen_fds}"), "LISTEN_PID=1".to_owned()]
}

/// A label that no module would enforce is not dropped in silence.
pub(crate) fn check_labels(process: &Process, mount_label: Option<&str>) -> Result<()> {
    if process.apparmor_profile.is_some() && !lsm::apparmor_enabled() {
        let text =
            "process.apparmorProfile: AppArmor profile given, but AppArmor is not enabled on this host";
        return Err(Error::Refused(text.to_owned()));
    }
    if (process.selinux_label.is_some() || mount_label.is_some()) && !lsm::selinux_enabled() {
        let text = "selinux label is specified in config, but selinux is disabled or not supported";
        return Err(Error::Refused(text.to_owned()));
    }
    Ok(())
}

/// A terminal needs somebody at its other end, and nothing else does.
pub(crate) fn check_console(config: &Config, console: Option<&Console>) -> Result<()> {
    match (config.process.terminal, console) {
        (true, None) => Err(Error::Refused(
            "cannot allocate tty if runc will detach without setting console socket".to_owned(),
        )),
        (false, Some(Console::Socket(_))) => Err(Error::Refused(
            "cannot use console socket if runc will not detach or allocate tty".to_owned(),
        )),
        _ => Ok(()),
    }
}

fn lines(mappings: &[IdMapping]) -> Vec<Line> {
    let line = |one: &IdMapping| Line {
        inside: one.container_id,
        outside: one.host_id,
        count: one.size,
    };
    mappings.iter().map(line).collect()
}

fn time_offsets(config: &Config) -> Option<Offsets> {
    let of = |clock| {
        let offset = config.time_offsets.iter().find(|offset| offset.clock == clock)?;
        Some((offset.secs, offset.nanosecs))
    };
    let offsets = Offsets {
        monotonic: of(TimeClock::Monotonic),
        boottime: of(TimeClock::Boottime),
    };
    (offsets != Offsets::default()).then_some(offsets)
}
