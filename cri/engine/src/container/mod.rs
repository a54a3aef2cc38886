//! A container: the operations on it, and what the daemon itself holds of its processes.

mod create;
mod exec;
mod gather;
mod remove;
mod session;
mod start;
mod stop;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use coracle_cgroup::{Host, Location, Manager, Options};
use coracle_kernel::{pidfd, wait::Status};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

pub(crate) use create::{cgroup_path, create};
pub(crate) use exec::exec_sync;
pub(crate) use remove::{remove, remove_dir};
pub use session::{Streams, Wanted};
pub(crate) use session::{attach, check_running, exec};
pub(crate) use start::start;
pub(crate) use stop::{StopInputs, stop};

use crate::error::{Context as _, Result};
use crate::failpoint;
use crate::ident;
use crate::pod::{CreateRequest, Exit, Message, PodHandle};
use crate::record::{ContainerPhase, ContainerRecord};

/// How long processes may take to be gone after SIGKILL.
pub(crate) const KILL_TIME: Duration = Duration::from_secs(10);

/// What the daemon holds of a container with a process: it can signal, measure and kill without the monitor.
pub(crate) struct Hold {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    /// The container's leaf. Locked on blocking threads alone, for calls that do not wait: what kills opens its own.
    cgroup: Mutex<Box<dyn Manager>>,
    /// What was read of it last.
    pub(crate) stats: crate::stats::Cache,
    /// Number of the next exec in it; begins high, so that none of an earlier daemon has it.
    pub(crate) next_exec: AtomicU64,
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hold")
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

impl Hold {
    /// Runs a call on the container's cgroup; blocks.
    pub(crate) fn with_cgroup<T>(&self, act: impl FnOnce(&mut dyn Manager) -> T) -> T {
        // A panic under the lock leaves the manager as whole as it was: it caches descriptors.
        act(&mut **self.cgroup.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Takes hold of a container: its cgroup, its pidfd, and a task that tells the pod when the init is gone.
pub(crate) async fn take_hold(
    pod: &PodHandle,
    id: &str,
    pid: i32,
    pidfd: OwnedFd,
    location: Location,
) -> Result<()> {
    let cgroup = cgroup_manager(pod.core().cgroups.clone(), location).await?;
    let watched = coracle_kernel::fd::dup(&pidfd).step("duplicate the container's pidfd")?;
    let hold = Hold {
        pid,
        pidfd,
        cgroup: Mutex::new(cgroup),
        stats: crate::stats::Cache::default(),
        next_exec: AtomicU64::new(ident::now_ns().unsigned_abs()),
    };
    pod.set_hold(id, Some(hold.into()));
    watch_init(pod.clone(), id.to_owned(), watched)
}

/// The manager of a leaf; made on a blocking thread, for it opens files.
pub(crate) async fn cgroup_manager(host: Host, location: Location) -> Result<Box<dyn Manager>> {
    let options = Options {
        accounting: true,
        ..Options::default()
    };
    blocking(move || host.manager(&location, options))
        .await?
        .step("open the container's cgroup")
}

/// Runs `work` on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .step("run a blocking step")
}

fn watch_init(pod: PodHandle, id: String, pidfd: OwnedFd) -> Result<()> {
    let gone = process_end(pidfd).step("watch the container's init")?;
    tokio::spawn(async move {
        gone.await;
        pod.tell(Message::InitGone { id });
    });
    Ok(())
}

/// Ready when the process is gone; the pidfd comes back.
pub(crate) fn process_end(pidfd: OwnedFd) -> std::io::Result<impl Future<Output = OwnedFd> + Send> {
    #[allow(
        deprecated,
        reason = "an OwnedFd is one descriptor for as long as it lives: the unsafe twin asks no more"
    )]
    let watched = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
    Ok(async move {
        // A pidfd becomes readable once and for all; an error means that the runtime is going down.
        let _ = watched.readable().await;
        watched.into_inner()
    })
}

/// The record of a container that is about to be made.
pub(crate) fn new_record(id: &str, pod: &str, request: &CreateRequest, created_at: i64) -> ContainerRecord {
    ContainerRecord {
        id: id.to_owned(),
        pod: pod.to_owned(),
        name: request.identity.name.clone(),
        attempt: request.identity.attempt,
        hash: request.hash.clone(),
        phase: ContainerPhase::Creating,
        created_at,
        started_at: 0,
        finished_at: 0,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        image_id: String::new(),
        image_name: String::new(),
        image_ref: String::new(),
        cgroup: String::new(),
        cgroup_location: std::collections::BTreeMap::new(),
        log_path: String::new(),
        pid: 0,
        pid_start: 0,
        stop_signal: 0,
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        mount_sources: Vec::new(),
    }
}

/// When a process was born, in clock ticks since boot (field 22 of its stat); 0 for one that is not there.
pub(crate) fn start_time(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything, parentheses too.
    let after_name = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    after_name
        .split_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok())
        .unwrap_or(0)
}

/// Takes hold of a container of an earlier daemon; false if its init is gone.
pub(crate) async fn retake_hold(pod: &PodHandle, record: &ContainerRecord) -> Result<bool> {
    let Ok(pidfd) = pidfd::open(record.pid) else {
        return Ok(false);
    };
    // The number may have been given to another process since: the birth time tells.
    if record.pid_start == 0 || start_time(record.pid) != record.pid_start {
        return Ok(false);
    }
    let location = Location::from_map(&record.cgroup_location).step("read the container's cgroup path")?;
    take_hold(pod, &record.id, record.pid, pidfd, location).await?;
    Ok(true)
}

/// Writes down how a container ended; the first word counts.
pub(crate) fn record_exit(record: &mut ContainerRecord, exit: Exit) {
    if !record.is_alive() {
        return;
    }
    record.phase = ContainerPhase::Exited;
    record.exit_code = exit.code;
    record.reason = exit.reason;
    record.message = exit.message;
    // Clocks jump: an end before the start would confuse whoever subtracts them.
    record.finished_at = exit.at.max(record.started_at).max(record.created_at);
}

/// The exit of a container as its own monitor told it.
pub(crate) fn exit_from_status(code: i32, oom_killed: bool, at: i64) -> Exit {
    let reason = match code {
        137 if oom_killed => "OOMKilled",
        0 => "Completed",
        _ => "Error",
    };
    Exit {
        code,
        reason: reason.to_owned(),
        message: String::new(),
        at,
    }
}

/// The exit of a container whose monitor cannot tell: from the kernel where that knows, else as if killed.
pub(crate) fn exit_without_monitor(hold: Option<&Hold>) -> Exit {
    let told = hold.and_then(|hold| code_from_kernel(&hold.pidfd));
    Exit {
        code: told.unwrap_or(137),
        reason: "MonitorLost".to_owned(),
        message: "the monitor of the pod was lost before it told how the container ended".to_owned(),
        at: ident::now_ns(),
    }
}

/// How the process ended, where the kernel keeps that for holders of its descriptor (Linux 6.15).
pub(crate) fn code_from_kernel(pidfd: impl AsFd) -> Option<i32> {
    pidfd::info(pidfd).ok()?.exit.map(Status::code)
}

/// Takes away what an ended container leaves in the kernel: stray processes and its cgroup. Done again by the
/// removal, so a failure here is only told.
pub(crate) async fn release(pod: PodHandle, id: String) {
    let released = async {
        failpoint::reach("exit.record").await?;
        release_cgroup(&pod, &id).await
    };
    if let Err(error) = released.await {
        warn!(
            container = id,
            error = error.chain(),
            "the container's cgroup was not removed yet"
        );
    }
}

/// Kills what is left in the container's cgroup and removes it; nothing there is no error.
pub(crate) async fn release_cgroup(pod: &PodHandle, id: &str) -> Result<()> {
    let Ok(view) = pod.container(id) else {
        return Ok(());
    };
    let location =
        Location::from_map(&view.record.cgroup_location).step("read the container's cgroup path")?;
    if view.record.cgroup_location.is_empty() {
        return Ok(());
    }
    let host = pod.core().cgroups.clone();
    blocking(move || end_location(&host, &location))
        .await?
        .step("remove the container's cgroup")?;
    pod.set_hold(id, None);
    Ok(())
}

/// Kills what is in the leaf at this place and removes it; one that is not there is removed. Blocks.
pub(crate) fn end_location(host: &Host, location: &Location) -> coracle_cgroup::Result<()> {
    let options = Options {
        accounting: true,
        ..Options::default()
    };
    end_group(&mut *host.manager(location, options)?)
}

/// Kills what is in a cgroup and removes it; one that is not there is removed.
pub(crate) async fn kill_and_remove(mut cgroup: Box<dyn Manager>) -> Result<()> {
    blocking(move || end_group(&mut *cgroup))
        .await?
        .step("remove a cgroup")
}

fn end_group(cgroup: &mut dyn Manager) -> coracle_cgroup::Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    cgroup.kill(KILL_TIME)?;
    cgroup.remove(KILL_TIME)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::container;
    use coracle_kernel::clone::{Child, Clone3};
    use coracle_kernel::wait::{self, Id};
    use coracle_kernel::{Errno, creds, probe, seccomp, syscall};

    #[test]
    fn the_first_exit_counts_and_never_precedes_the_start() {
        let mut record = container("c", ContainerPhase::Started).record;
        record.started_at = 1000;
        record_exit(&mut record, exit_from_status(137, true, 5));
        assert_eq!(
            (record.exit_code, record.reason.as_str(), record.finished_at),
            (137, "OOMKilled", 1000)
        );
        record_exit(&mut record, exit_from_status(0, false, 2000));
        assert_eq!((record.exit_code, record.finished_at), (137, 1000));
    }

    #[test]
    fn reasons_are_worded_as_the_kubelet_expects() {
        for (code, oom, reason) in [
            (0, false, "Completed"),
            (0, true, "Completed"),
            (1, true, "Error"),
            (137, false, "Error"),
            (137, true, "OOMKilled"),
        ] {
            assert_eq!(exit_from_status(code, oom, 0).reason, reason, "{code} {oom}");
        }
    }

    #[test]
    fn birth_times_tell_processes_apart() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(start_time(own) > 0);
        assert_eq!(start_time(-1), 0);
    }

    #[test]
    fn without_anybody_who_knows_it_was_killed() {
        let exit = exit_without_monitor(None);
        assert_eq!((exit.code, exit.reason.as_str()), (137, "MonitorLost"));
    }

    #[test]
    fn the_kernel_tells_an_exit_code_where_it_keeps_one() {
        const PIDFD_GET_INFO: u32 = 0xc040_ff0b;
        let reaped = || -> Child {
            let child = Clone3::default().spawn(|| 42).unwrap();
            wait::wait(Id::Process(child.pid)).unwrap();
            child
        };
        let expected = (probe::kernel_version().unwrap() >= (6, 15)).then_some(42);
        assert_eq!(code_from_kernel(&reaped().pidfd), expected);
        // An older kernel does not know the request.
        let older = std::thread::spawn(move || {
            let program = seccomp::lacking_program(syscall::IOCTL, Some((1, PIDFD_GET_INFO)), Errno::ENOTTY);
            creds::set_no_new_privs().unwrap();
            seccomp::load(&program, seccomp::FilterFlags::empty()).unwrap();
            code_from_kernel(&reaped().pidfd)
        });
        assert_eq!(older.join().unwrap(), None);
    }
}
