//! The side that becomes the program: two flat lists of steps, for the first process and for one more.
//!
//! The order is the design. A step that needs privilege comes before the one that gives it up, a step that needs the
//! host's view before the one that leaves it, and whatever can fail for a reason of the configuration comes before
//! `Ready`, so that it fails the create and not the start.

use std::convert::Infallible;
use std::mem::ManuallyDrop;
use std::os::fd::AsFd;

use coracle_kernel::clone::own_pid;
use coracle_kernel::namespace::{self, Kinds};
use coracle_kernel::path::open_dir;
use coracle_kernel::procfs::Procfs;
use coracle_kernel::{creds, link, persona, sched, tty};
use coracle_spec::{HookState, Personality, Status};

use super::error::{At, Failure, Kind, Step};
use super::handshake::{Link, Order, Word};
use super::setup::{Init, Role, Setup};
use super::steps;
use super::terminal::Terminal;
use crate::hooks;
use crate::rootfs::Rootfs;

/// Becomes the program, or says why not. The exit status is for nobody: the failure was said.
pub(super) fn run(setup: Setup<'_>, role: Role<'_>, mut link: Link) -> i32 {
    // Near the end descriptors are moved and closed by number; none may be closed once more by its former owner.
    let (mut setup, mut role) = (ManuallyDrop::new(setup), ManuallyDrop::new(role));
    let outcome = match &mut *role {
        Role::Init(init) => first(&mut setup, init, &mut link),
        Role::Exec => one_more(&mut setup, &mut link),
    };
    let Err(failure) = outcome;
    // Where even this fails, the other side is gone.
    let _ = link.write(&Word::Failed(failure));
    std::mem::forget(link);
    1
}

/// The first process of a container.
fn first(setup: &mut Setup<'_>, init: &mut Init<'_>, link: &mut Link) -> Result<Infallible, Failure> {
    let (config, process) = (init.config, setup.process);

    // A group that we were not born in we enter before there is anything that it must bound.
    steps::enter_cgroup(setup)?;
    // Id maps and oom score are the parent's to set, and the cgroup where the kernel lets only somebody else move us:
    // nothing before its word.
    steps::await_order(link, Order::Go)?;
    // Nobody in the container may trace us or open our files before execve has made us the program. The parent did it
    // before the clone where it could: without privilege it could not have written our id maps.
    creds::set_dumpable(false).at(Step::BecomeRoot)?;
    // Joins that a process between has not done. After them everything we touch is in the container's namespaces.
    if !setup.namespaces.needs_two_clones() {
        setup.namespaces.join().at(Step::JoinNamespaces)?;
    }
    // In another user namespace we are nobody until we say who.
    if setup.namespaces.user() {
        steps::become_root(setup)?;
    }
    // A session of our own: no terminal of the caller's, and no signals of its process group.
    tty::new_session().at(Step::Session)?;
    // The caller's processors are not the container's; the kernel narrows this to the cpuset of our cgroup.
    sched::set_affinity(0, &sched::CpuMask::all()).at(Step::Affinity)?;
    // Keys of the caller must not be found.
    steps::join_keyring(setup)?;
    // Now that we are in our cgroup it becomes the root of what we see.
    if setup.namespaces.new.contains(Kinds::CGROUP) {
        namespace::unshare(Kinds::CGROUP).at(Step::CreateNamespaces)?;
    }
    if setup.namespaces.new.contains(Kinds::NETWORK) {
        link::loopback_up().at(Step::Loopback)?;
    }
    if let Some(name) = &config.hostname {
        persona::set_hostname(name).at(Step::Hostname)?;
    }
    if let Some(name) = &config.domainname {
        persona::set_domainname(name).at(Step::Domainname)?;
    }

    // The root with everything mounted, still below the host's tree: hooks look for it there.
    let Some(context) = init.rootfs.take() else {
        return Err(Failure::said(
            Step::Rootfs,
            Kind::Refused,
            "there is no root file system",
        ));
    };
    let mut rootfs = Rootfs::attach(config, *context).at(Step::Rootfs)?;
    rootfs.make_mounts().at(Step::Rootfs)?;
    rootfs.make_devices().at(Step::Rootfs)?;
    if !config.hooks.prestart.is_empty() || !config.hooks.create_runtime.is_empty() {
        link.say(&Word::Mounted).at(Step::Handshake)?;
        steps::await_order(link, Order::HooksDone)?;
    }
    let state = |status| HookState::new(init.id, status, own_pid(), init.bundle, &config.annotations);
    let place = hooks::Place {
        list: "createContainer",
        cwd: rootfs.as_fd(),
        default_env: &[],
    };
    hooks::run(&config.hooks.create_container, place, &state(Status::Creating))
        .map_err(|error| steps::hook_failed(Step::CreateContainerHooks, &error))?;

    // The host's tree is gone after this.
    rootfs.enter().at(Step::Pivot)?;
    // The terminal belongs to the container's devpts, and /dev is still writable.
    if process.terminal {
        let terminal = Terminal::open(rootfs.as_fd(), process.console_size)?;
        rootfs.bind_console(&terminal.slave).at(Step::Console)?;
        link.pass(&Word::Terminal, terminal.master())
            .at(Step::Handshake)?;
        setup.stdio = terminal.attach()?;
    }
    steps::place_stdio(setup)?;
    // Made before the root becomes read-only.
    rootfs.make_directory(&process.cwd).at(Step::Cwd)?;
    // Through a handle that no mount of the container can cover.
    if steps::needs_procfs(process) || !config.sysctl.is_empty() {
        let procfs = Procfs::open().at(Step::Sysctl)?;
        for (name, value) in &config.sysctl {
            procfs.sysctl(name, value).at(Step::Sysctl)?;
        }
        steps::set_labels(process, &procfs)?;
    }
    rootfs.seal().at(Step::FinishRootfs)?;
    // It survives execve, and a filter may forbid it.
    if let Some(personality) = config.personality {
        let persona = match personality {
            Personality::Linux => persona::Persona::Linux,
            Personality::Linux32 => persona::Persona::Linux32,
        };
        persona::set(persona).at(Step::Personality)?;
    }
    let env = steps::environment(setup, rootfs.as_fd())?;
    let program = steps::become_user(setup, rootfs.as_fd(), link)?;
    drop(rootfs);

    // From here to the start nothing is open but the three, what is passed on, and two sockets of ours.
    let barrier = steps::close_all_but(setup, link, &init.barrier)?;
    link.say(&Word::Ready).at(Step::Handshake)?;
    // Until we are on record nobody could ever find us: no word, no container.
    steps::await_order(link, Order::Recorded)?;
    // Whoever starts us hears of what fails from here on.
    *link = steps::wait_at_barrier(barrier)?;
    link.say(&Word::Entering).at(Step::Handshake)?;
    // A low limit is meant for the program: nothing but execve, and hooks that ask for it, come after it.
    steps::set_limits(process)?;
    // As late as possible: everything after it is in the container's profile to allow.
    steps::load_filter(setup)?;
    if !config.hooks.start_container.is_empty() {
        let here = open_dir(".").at(Step::StartContainerHooks)?;
        let place = hooks::Place {
            list: "startContainer",
            cwd: here.as_fd(),
            default_env: &env,
        };
        hooks::run(&config.hooks.start_container, place, &state(Status::Created))
            .map_err(|error| steps::hook_failed(Step::StartContainerHooks, &error))?;
    }
    Err(steps::execute(&program, setup, &env))
}

/// One more process of a container, cloned by a process that has joined its namespaces.
fn one_more(setup: &mut Setup<'_>, link: &mut Link) -> Result<Infallible, Failure> {
    let process = setup.process;

    // Of what the process between still needed nothing may stay.
    steps::close_after(setup, link)?;
    // The oom score is the parent's to set: nothing before its word.
    steps::await_order(link, Order::Go)?;
    creds::set_dumpable(false).at(Step::BecomeRoot)?;
    if setup.namespaces.user() {
        steps::become_root(setup)?;
    }
    tty::new_session().at(Step::Session)?;
    steps::set_last_affinity(process)?;
    steps::join_keyring(setup)?;
    let root = open_dir("/").at(Step::Rootfs)?;
    if process.terminal {
        let terminal = Terminal::open(root.as_fd(), process.console_size)?;
        link.pass(&Word::Terminal, terminal.master())
            .at(Step::Handshake)?;
        setup.stdio = terminal.attach()?;
    }
    steps::place_stdio(setup)?;
    if steps::needs_procfs(process) {
        steps::set_labels(process, &Procfs::open().at(Step::Label)?)?;
    }
    let root = root.as_fd();
    let env = steps::environment(setup, root)?;
    let program = steps::become_user(setup, root, link)?;
    link.say(&Word::Ready).at(Step::Handshake)?;
    steps::await_order(link, Order::Recorded)?;
    // The link too is closed by execve: its end of file is how the parent knows.
    steps::close_on_exec(setup)?;
    steps::set_limits(process)?;
    steps::load_filter(setup)?;
    Err(steps::execute(&program, setup, &env))
}
