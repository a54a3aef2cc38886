//! The steps that both lists of `child` take, each on its own.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use coracle_kernel::caps::{self, CapSet, Capability, Sets};
use coracle_kernel::exec;
use coracle_kernel::path::{self, Kind as FileKind, Root};
use coracle_kernel::procfs::Procfs;
use coracle_kernel::rlimit::{self, Resource};
use coracle_kernel::signal::{self, Set};
use coracle_kernel::{Errno, creds, fd, keyring, lsm, sched, scm, seccomp};
use coracle_spec::Process;

use super::error::{At, Failure, Kind, Step};
use super::handshake::{Heard, Link, Order, Word};
use super::setup::{Barrier, Setup};
use crate::{env, hooks};

/// The umask of a process whose configuration has none, as runc sets it.
const DEFAULT_UMASK: u32 = 0o022;

/// The timer slack that the kernel starts its first process with.
const TIMER_SLACK_NS: u64 = 50_000;

/// Waits for the parent's word. If the parent is gone there is nobody to become a container for.
pub(super) fn await_order(link: &Link, expected: Order) -> Result<(), Failure> {
    match link.next_order().at(Step::Handshake)? {
        Heard::Word(order, _) if order == expected => Ok(()),
        Heard::Word(..) => Err(Failure::new(Step::Handshake, &Errno::EPROTO)),
        Heard::End => coracle_kernel::clone::exit(1),
    }
}

/// Moves us into a cgroup by our own hand, while we have one thread and see the host's hierarchies through these files.
pub(super) fn enter_cgroup(setup: &mut Setup<'_>) -> Result<(), Failure> {
    for tasks in std::mem::take(&mut setup.tasks) {
        fd::write_word(tasks, "0").at(Step::Cgroup)?;
    }
    Ok(())
}

/// Takes root's ids of the user namespace, without which files made from here on would belong to nobody.
pub(super) fn become_root(setup: &Setup<'_>) -> Result<(), Failure> {
    if !setup.rootless {
        creds::set_groups(&[]).at(Step::BecomeRoot)?;
    }
    creds::set_gid(0).at(Step::BecomeRoot)?;
    creds::set_uid(0).at(Step::BecomeRoot)
}

/// Joins a session keyring of the container's, so that keys of the caller's session are out of reach.
pub(super) fn join_keyring(setup: &Setup<'_>) -> Result<(), Failure> {
    let Some(name) = &setup.keyring else { return Ok(()) };
    let key = match keyring::join_session(name) {
        // Built without keyrings, or in a container that hides them: there is nothing to be found either.
        Err(error) if error.errno() == Errno::ENOSYS => return Ok(()),
        other => other.at(Step::Keyring)?,
    };
    // So that processes with other ids of this container find their session's keys; and in a user namespace, whose
    // root did not make the keyring, root itself.
    let permissions = keyring::permissions(key).at(Step::Keyring)?;
    keyring::set_permissions(key, permissions | keyring::USER_SEARCH).at(Step::Keyring)
}

/// The processors of an exec'd process once it is in its cgroup: those asked for, or all.
pub(super) fn set_last_affinity(process: &Process) -> Result<(), Failure> {
    let asked = process.exec_cpu_affinity.as_ref();
    let mask = match asked {
        Some(affinity) if !affinity.last.is_empty() => cpu_mask(&affinity.last),
        Some(affinity) if !affinity.initial.is_empty() => return Ok(()),
        _ => sched::CpuMask::all(),
    };
    sched::set_affinity(0, &mask).at(Step::Affinity)
}

/// The mask of a list of processors; numbers beyond any kernel's limit are left out.
pub(super) fn cpu_mask(cpus: &[u32]) -> sched::CpuMask {
    let mut mask = sched::CpuMask::default();
    for cpu in cpus {
        mask.insert(*cpu as usize);
    }
    mask
}

/// Puts what the process gets as standard input, output and error at 0, 1 and 2, and gives it to the process's user.
pub(super) fn place_stdio(setup: &mut Setup<'_>) -> Result<(), Failure> {
    let given = setup.stdio.iter().zip(0i32..);
    let pairs: Vec<_> = given
        .filter_map(|(fd, number)| Some((fd.as_ref()?.as_fd(), number)))
        .collect();
    fd::place(&pairs).at(Step::Stdio)?;
    setup.stdio = [None, None, None];
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    for fd in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        own_stdio(fd, setup.process.user.uid)?;
    }
    Ok(())
}

/// Gives one of the three to a user, so that it can open `/dev/stdout` again. Not `/dev/null`, which all share.
fn own_stdio(fd: BorrowedFd<'_>, uid: u32) -> Result<(), Failure> {
    let seen = match path::stat(fd) {
        // It is closed, and stays so.
        Err(error) if error.errno() == Errno::EBADF => return Ok(()),
        other => other.at(Step::Stdio)?,
    };
    if seen.uid == uid || (seen.kind == FileKind::CharDevice && seen.rdev == (1, 3)) {
        return Ok(());
    }
    match path::chown(fd, uid, seen.gid) {
        // A read-only or id-mapped file system, a file of somebody else: the process can still use the descriptor.
        Err(error)
            if matches!(
                error.errno(),
                Errno::EINVAL | Errno::EPERM | Errno::EROFS | Errno::EOVERFLOW
            ) =>
        {
            Ok(())
        }
        other => other.at(Step::Stdio),
    }
}

/// Whether a step needs a procfs.
pub(super) fn needs_procfs(process: &Process) -> bool {
    process.apparmor_profile.is_some() || process.selinux_label.is_some()
}

/// Says which label the program gets at `execve`.
pub(super) fn set_labels(process: &Process, procfs: &Procfs) -> Result<(), Failure> {
    if let Some(profile) = &process.apparmor_profile {
        lsm::set_apparmor_exec(procfs, profile).at(Step::Label)?;
    }
    if let Some(label) = &process.selinux_label {
        lsm::set_selinux_exec(procfs, label).at(Step::Label)?;
    }
    Ok(())
}

/// The environment as `execve` takes it, with a home directory where none is set.
pub(super) fn environment(setup: &Setup<'_>, root: BorrowedFd<'_>) -> Result<Vec<CString>, Failure> {
    let home = match env::value(&setup.env, "HOME") {
        None | Some("") => Some(format!("HOME={}", env::home(root, setup.process.user.uid))),
        Some(_) => None,
    };
    let kept = setup
        .env
        .iter()
        .filter(|entry| home.is_none() || !entry.starts_with("HOME="))
        .copied();
    kept.chain(home.as_deref())
        .map(|entry| CString::new(entry).at(Step::Execute))
        .collect()
}

/// Everything that makes us the process's user with the process's privileges, in an order in which each step still may.
/// Returns the path of the program, which is looked for with those privileges.
pub(super) fn become_user(setup: &Setup<'_>, root: BorrowedFd<'_>, link: &Link) -> Result<CString, Failure> {
    let process = setup.process;
    let user = &process.user;
    // Needs privilege for real-time policies; after the move into the cgroup, whose cpuset they must fit.
    if let Some(scheduler) = &process.scheduler {
        let attr = sched::SchedAttr {
            policy: scheduler.policy,
            flags: scheduler.flags,
            nice: scheduler.nice,
            priority: scheduler.priority,
            runtime: scheduler.runtime_ns,
            deadline: scheduler.deadline_ns,
            period: scheduler.period_ns,
        };
        sched::set_attr(&attr).at(Step::Scheduler)?;
    }
    if let Some(priority) = process.io_priority {
        sched::set_io_priority(priority).at(Step::IoPriority)?;
    }
    // The kernel's "default" is what the caller had at the clone.
    creds::set_timer_slack_ns(TIMER_SLACK_NS).at(Step::Scheduler)?;
    creds::set_umask(user.umask.unwrap_or(DEFAULT_UMASK));
    // Before the switch of users, as root may enter what the user may not; after it again, as on a network file system
    // the user may enter what root may not.
    let entered = match change_directory(root, &process.cwd) {
        Err(failure) if failure.errno == Some(Errno::EACCES) => false,
        other => other.map(|()| true)?,
    };
    if process.no_new_privileges {
        creds::set_no_new_privs().at(Step::NoNewPrivileges)?;
    }
    // While CAP_SETPCAP is there. What is dropped here no execve can bring back.
    let wanted = &process.capabilities;
    caps::limit_bounding(CapSet::from_bits(wanted.bounding)).at(Step::Bounding)?;
    // Or the switch of users would clear the permitted set; execve clears the flag.
    creds::set_keep_caps(true).at(Step::User)?;
    set_groups(setup)?;
    creds::set_gid(user.gid).map_err(|error| id_refused(&error, "gid", user.gid))?;
    creds::set_uid(user.uid).map_err(|error| id_refused(&error, "uid", user.uid))?;
    set_capabilities(setup, link)?;
    if !entered {
        change_directory(root, &process.cwd)?;
    }
    // With the user's eyes, and at create time: a missing program must not surface at the start.
    let name = process.args.first().map_or("", String::as_str);
    env::find_program(name, env::value(&setup.env, "PATH"))
        .map_err(|text| Failure::said(Step::FindProgram, Kind::Program, text))
}

/// Marks everything close-on-exec but the three and what is passed on.
pub(super) fn close_on_exec(setup: &Setup<'_>) -> Result<(), Failure> {
    fd::cloexec_from(fd::FIRST_FREE + setup.preserve_fds).at(Step::Descriptors)
}

/// Closes everything but the three, what is passed on, the link and the barrier, which move right behind.
///
/// What we inherited from the parent, its locks among them, must not live as long as we wait.
pub(super) fn close_all_but(
    setup: &Setup<'_>,
    link: &mut Link,
    barrier: &Barrier,
) -> Result<Barrier, Failure> {
    let first = fd::FIRST_FREE + setup.preserve_fds;
    let socket = match barrier {
        Barrier::Connected(socket) | Barrier::Listening(socket) => socket.as_fd(),
    };
    fd::place(&[(link.as_fd(), first), (socket, first + 1)]).at(Step::Descriptors)?;
    let moved = fd::inherited(first).at(Step::Descriptors)?;
    // Its old number may by now be that of another descriptor: it is closed below, with all the rest.
    std::mem::forget(std::mem::replace(link, Link::new(moved)));
    let socket = fd::inherited(first + 1).at(Step::Descriptors)?;
    fd::close_from(first + 2).at(Step::Descriptors)?;
    Ok(match barrier {
        Barrier::Connected(_) => Barrier::Connected(socket),
        Barrier::Listening(_) => Barrier::Listening(socket),
    })
}

/// Puts the three at their place and closes everything else but what is passed on, the link and the cgroup's descriptor,
/// which move right behind.
pub(super) fn shed(
    setup: &mut Setup<'_>,
    link: Option<Link>,
    cgroup: Option<OwnedFd>,
) -> Result<(Option<Link>, Option<OwnedFd>), Failure> {
    let first = fd::FIRST_FREE + setup.preserve_fds;
    let given = setup.stdio.iter().zip(0i32..);
    let mut pairs: Vec<_> = given
        .filter_map(|(fd, number)| Some((fd.as_ref()?.as_fd(), number)))
        .collect();
    pairs.extend(link.as_ref().map(|link| (link.as_fd(), first)));
    pairs.extend(cgroup.as_ref().map(|cgroup| (cgroup.as_fd(), first + 1)));
    fd::place(&pairs).at(Step::Descriptors)?;
    let had_cgroup = cgroup.is_some();
    // Their old numbers are closed below, with all the rest, or belong to others by now.
    for fd in setup.stdio.iter_mut().filter_map(Option::take) {
        std::mem::forget(fd);
    }
    std::mem::forget((link, cgroup));
    setup.namespaces.forget();
    let link = Link::new(fd::inherited(first).at(Step::Descriptors)?);
    let cgroup = if had_cgroup {
        Some(fd::inherited(first + 1).at(Step::Descriptors)?)
    } else {
        None
    };
    fd::close_from(first + 1 + i32::from(had_cgroup)).at(Step::Descriptors)?;
    Ok((Some(link), cgroup))
}

/// Closes everything behind the link, which [`shed`] has put right behind what is passed on.
pub(super) fn close_after(setup: &Setup<'_>, link: &Link) -> Result<(), Failure> {
    let first = fd::FIRST_FREE + setup.preserve_fds;
    debug_assert_eq!(fd::number(link), first);
    fd::close_from(first + 1).at(Step::Descriptors)
}

/// Waits until somebody says go; the link to that somebody.
pub(super) fn wait_at_barrier(barrier: Barrier) -> Result<Link, Failure> {
    let connection = match barrier {
        Barrier::Connected(socket) => socket,
        Barrier::Listening(listener) => scm::accept(&listener, scm::Mode::Blocking).at(Step::Barrier)?,
    };
    let link = Link::new(connection);
    await_order(&link, Order::Go)?;
    Ok(link)
}

/// Takes on the resource limits, of which the parent has raised what needed privilege.
pub(super) fn set_limits(process: &Process) -> Result<(), Failure> {
    for limit in &process.rlimits {
        rlimit::set(0, Resource::from_number(limit.resource), limit.soft, limit.hard).at(Step::Limits)?;
    }
    Ok(())
}

/// Loads the filter and gives up what was kept for that.
pub(super) fn load_filter(setup: &Setup<'_>) -> Result<(), Failure> {
    let Some(filter) = &setup.filter else {
        return Ok(());
    };
    seccomp::load(&filter.program, filter.flags).at(Step::Seccomp)?;
    if keeps_admin(setup) {
        let wanted = &setup.process.capabilities;
        let granted = caps::get().at(Step::Capabilities)?;
        caps::set(&Sets {
            effective: granted.effective.and(CapSet::from_bits(wanted.effective)),
            permitted: granted.permitted.and(CapSet::from_bits(wanted.permitted)),
            inheritable: granted.inheritable,
        })
        .at(Step::Capabilities)?;
    }
    Ok(())
}

/// Executes the program; returns only where that failed.
pub(super) fn execute(program: &CString, setup: &Setup<'_>, env: &[CString]) -> Failure {
    // What is ignored or blocked now would stay so in the program; the runtime and its callers ignore SIGPIPE and more.
    signal::reset_dispositions();
    signal::set_mask(Set::EMPTY);
    let error = exec::execve(program, &setup.args, env);
    let path = program.to_string_lossy();
    let text = format!("exec {path}: {}", error.errno().to_string().to_lowercase());
    Failure {
        errno: Some(error.errno()),
        ..Failure::said(Step::Execute, Kind::Program, text)
    }
}

/// A hook's failure as ours.
pub(super) fn hook_failed(step: Step, error: &hooks::Error) -> Failure {
    Failure::said(step, Kind::Hook, error.to_string())
}

/// Without no_new_privs the kernel takes a filter only from CAP_SYS_ADMIN, which is then kept until it is loaded.
fn keeps_admin(setup: &Setup<'_>) -> bool {
    setup.filter.is_some() && !setup.process.no_new_privileges
}

fn change_directory(root: BorrowedFd<'_>, directory: &Path) -> Result<(), Failure> {
    let failed = |error: coracle_kernel::Error| {
        let reason = error.errno().to_string().to_lowercase();
        let text = format!("chdir to cwd ({directory:?}) set in config.json failed: {reason}");
        Failure {
            errno: Some(error.errno()),
            ..Failure::said(Step::Cwd, Kind::Refused, text)
        }
    };
    // By descriptor, found without magic links: /proc/self/fd/N leads out of the root.
    let place = Root::new(&root).open_path(directory).map_err(failed)?;
    path::change_dir(&place).map_err(failed)?;
    // The kernel itself says whether that is below our root.
    match std::env::current_dir() {
        Ok(here) if here.is_absolute() => Ok(()),
        _ => {
            let text = "current working directory is outside of container mount namespace root";
            Err(Failure::said(Step::Cwd, Kind::Refused, text))
        }
    }
}

/// The supplementary groups of the process, and none of the caller's: a group can also be what denies access.
fn set_groups(setup: &Setup<'_>) -> Result<(), Failure> {
    let wanted = &setup.process.user.additional_gids;
    match creds::set_groups(wanted) {
        // Without privilege over groups the kernel denies it, and the namespace maps none that could be dropped.
        Err(error) if error.errno() == Errno::EPERM && setup.rootless && wanted.is_empty() => Ok(()),
        Err(error) if error.errno() == Errno::EINVAL => {
            let text = format!(
                "cannot set supplementary groups {wanted:?}: not all are mapped in the user namespace"
            );
            Err(Failure::said(Step::Groups, Kind::Refused, text))
        }
        other => other.at(Step::Groups),
    }
}

fn id_refused(error: &coracle_kernel::Error, what: &str, id: u32) -> Failure {
    match error.errno() {
        Errno::EINVAL => {
            let text = format!("cannot use {what} {id}: it is not mapped in the user namespace");
            Failure::said(Step::User, Kind::Refused, text)
        }
        _ => Failure::new(Step::User, error),
    }
}

/// The capability sets, cut down to what there is to give; what is left out is said.
fn set_capabilities(setup: &Setup<'_>, link: &Link) -> Result<(), Failure> {
    let wanted = &setup.process.capabilities;
    let there = caps::get().at(Step::Capabilities)?.permitted;
    let give = |bits: u64| CapSet::from_bits(bits).and(there);
    let missing = CapSet::from_bits(wanted.permitted | wanted.effective | wanted.inheritable).without(there);
    for cap in missing.iter() {
        warn(link, format!("capability {cap} cannot be granted"))?;
    }
    let mut keep = CapSet::EMPTY;
    if keeps_admin(setup) {
        keep.insert(Capability::SYS_ADMIN);
    }
    let or = |set: CapSet, more: CapSet| CapSet::from_bits(set.bits() | more.and(there).bits());
    let permitted = give(wanted.permitted);
    let inheritable = give(wanted.inheritable);
    caps::set(&Sets {
        effective: or(give(wanted.effective).and(permitted), keep),
        permitted: or(permitted, keep),
        inheritable,
    })
    .at(Step::Capabilities)?;
    creds::set_keep_caps(false).at(Step::Capabilities)?;
    caps::clear_ambient().at(Step::Capabilities)?;
    for cap in CapSet::from_bits(wanted.ambient).iter() {
        if let Err(error) = caps::raise_ambient(cap) {
            warn(
                link,
                format!(
                    "can't raise ambient capability {cap}: {}",
                    error.errno().to_string().to_lowercase()
                ),
            )?;
        }
    }
    Ok(())
}

fn warn(link: &Link, text: String) -> Result<(), Failure> {
    link.say(&Word::Warning(text)).at(Step::Handshake)
}
