//! The monitor as a process: spawned from the sealed program into a cgroup of its own, watched, killed.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use coracle_cgroup::{Options, Placement, monitor_location};
use coracle_kernel::clone::Child;
use coracle_kernel::exec::{Program, Spawn};
use coracle_kernel::scm::{self, Kind, Mode};
use coracle_kernel::signal::Signal;
use coracle_kernel::wait::{Id, try_wait};
use coracle_kernel::{fd, path, pidfd};
use coracle_spec::oci::LinuxResources;
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;

use super::{Monitor, MonitorEvent, tell};
use crate::container::{blocking, process_end};
use crate::core::Core;
use crate::error::{Context as _, Error, Result};
use crate::ident::hex;
use crate::pod::PodHandle;

/// Number of the listening socket in the monitor.
const SOCKET_FD: i32 = 3;

/// How long a killed monitor may take to be gone.
const KILL_TIME: Duration = Duration::from_secs(5);

/// Name of a pod's socket in the directory of sockets.
pub(super) fn socket_name(pod: &str) -> String {
    format!("{pod}.sock")
}

/// A sealed copy of `coracle` to run monitors from. It is named by its content, so that `/proc/<pid>/exe` of a monitor
/// says which program it runs.
pub fn seal_monitor_program(program: &File) -> io::Result<OwnedFd> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match (&*program).read(&mut buffer)? {
            0 => break,
            count => hash.update(&buffer[..count]),
        }
    }
    let name = format!("coracle-{}", &hex(&hash.finalize())[..16]);
    // Hex digits have no zero among them.
    let name = CString::new(name).unwrap_or_default();
    fd::sealed_program(&name, program).map_err(io::Error::from)
}

/// Whether the process `pid` runs this sealed program.
pub(super) fn runs(pid: i32, program: &OwnedFd) -> bool {
    let own = std::fs::read_link(format!("/proc/self/fd/{}", fd::number(program)));
    let its = std::fs::read_link(format!("/proc/{pid}/exe"));
    matches!((own, its), (Ok(own), Ok(its)) if own == its)
}

/// Starts a monitor; it can be connected to when this returns.
pub(super) async fn spawn(core: Arc<Core>, pod: String) -> Result<Child> {
    blocking(move || spawn_blocking(&core, &pod)).await?
}

fn spawn_blocking(core: &Core, pod: &str) -> Result<Child> {
    let dir = path::open_dir(core.paths.monitors()).step("open the directory of the monitors' sockets")?;
    let listener = scm::listen(&dir, &socket_name(pod), Kind::Seqpacket, Mode::Nonblocking)
        .step("bind the monitor's socket")?;
    let location = monitor_location(&core.instance, pod).step("name the monitor's cgroup")?;
    let mut cgroup = core
        .cgroups
        .manager(&location, Options::default())
        .step("open the monitor's cgroup")?;
    cgroup
        .create(&LinuxResources::default())
        .step("make the monitor's cgroup")?;
    let (directory, tasks) = match cgroup.place().step("place the monitor")? {
        Placement::Into(directory) => (Some(directory), Vec::new()),
        Placement::Itself(tasks) => (None, tasks),
    };
    let tasks: Vec<_> = tasks.iter().map(|tasks| tasks.as_fd()).collect();

    let args = [c"coracle", c"monitor"].map(CString::from);
    // What it has to say goes where our own log goes.
    let stderr = io::stderr();
    let fds = [(listener.as_fd(), SOCKET_FD), (stderr.as_fd(), 2)];
    Spawn {
        fds: &fds,
        cgroup: directory.as_ref().map(|directory| directory.as_fd()),
        cgroup_tasks: &tasks,
        new_session: true,
        ..Spawn::new(Program::Fd(core.monitor_program.as_fd()), &args)
    }
    .spawn()
    .step("start the monitor")
}

/// Tells the pod when the monitor's process is gone.
pub(super) fn watch(pod: PodHandle, monitor: Monitor) -> Result<()> {
    let pidfd = fd::dup(&monitor.0.pidfd).step("duplicate the monitor's pidfd")?;
    let gone = process_end(pidfd).step("watch the monitor")?;
    tokio::spawn(async move {
        let pidfd = gone.await;
        // Reaped where it is our child; one of an earlier daemon is somebody else's.
        let _ = try_wait(Id::Pidfd(pidfd.as_fd()));
        monitor.declare_dead();
        tell(&pod, MonitorEvent::Died);
    });
    Ok(())
}

/// Kills a monitor and waits until it is gone.
pub(super) async fn kill(monitor: &Monitor) -> Result<()> {
    if monitor.is_dead() {
        return Ok(());
    }
    // Gone in the meantime is as good.
    let _ = pidfd::send_signal(&monitor.0.pidfd, Signal::KILL);
    timeout(KILL_TIME, monitor.died())
        .await
        .map_err(|_| Error::Deadline {
            step: "kill the monitor",
            limit: KILL_TIME,
        })
}

/// Removes what a monitor leaves: whatever is in its cgroup, the cgroup, the socket.
pub(super) async fn clean(core: Arc<Core>, pod: String) -> Result<()> {
    blocking(move || end_unknown(&core, &pod)).await?
}

/// The same for a monitor that nobody holds; blocks.
pub(crate) fn end_unknown(core: &Core, pod: &str) -> Result<()> {
    let location = monitor_location(&core.instance, pod).step("name the monitor's cgroup")?;
    let mut cgroup = core
        .cgroups
        .manager(&location, Options::default())
        .step("open the monitor's cgroup")?;
    if cgroup.exists() {
        cgroup.kill(KILL_TIME).step("kill what is left of the monitor")?;
        cgroup.remove(KILL_TIME).step("remove the monitor's cgroup")?;
    }
    match std::fs::remove_file(core.paths.monitors().join(socket_name(pod))) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::step("remove the socket", error)),
        _ => Ok(()),
    }
}
