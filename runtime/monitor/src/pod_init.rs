//! The init of a pid namespace that a pod's containers share: it reaps, and does nothing else. It has an empty
//! read-only root, no descriptor, no capability, and a filter that leaves it six system calls.

use std::os::fd::{AsFd, OwnedFd};

use coracle_cgroup::{Manager, Placement};
use coracle_kernel::caps::{self, CapSet, Sets};
use coracle_kernel::clone::{Child, Clone3};
use coracle_kernel::mount_attr::{Attr, Propagation};
use coracle_kernel::namespace::Kinds;
use coracle_kernel::seccomp::{self, FilterFlags};
use coracle_kernel::signal::{self, Set, Signal};
use coracle_kernel::{Errno, Error, creds, fd, mount, mount_attr, path, pidfd, pivot, wait};
use coracle_wire::Failed;

use crate::connection::{cut, failed};
use crate::refusal::kernel;
use crate::work::other;

/// Whom it runs as: nobody that owns a file.
const NOBODY: u32 = 65535;

/// Longest text of a failure.
const MAX_TEXT: usize = 512;

/// Makes the init as a child of the monitor, in a cgroup of its own. To be called by a helper.
pub(crate) fn spawn(cgroup: &dyn Manager, empty_dir: &str) -> Result<Child, Failed> {
    let (leaf, tasks) = match cgroup.place().map_err(other)? {
        Placement::Into(leaf) => (Some(leaf), Vec::new()),
        Placement::Itself(tasks) => (None, tasks),
    };
    let (ours, theirs) = fd::pipe().map_err(kernel("make a pipe"))?;
    let clone = Clone3 {
        namespaces: Kinds::PID | Kinds::MOUNT,
        sibling: true,
        cgroup: leaf.as_ref().map(AsFd::as_fd),
    };
    let child = clone
        .spawn(|| run(&theirs, &tasks, empty_dir))
        .map_err(kernel("clone the pod's init"))?;
    drop(theirs);
    let mut text = [0; MAX_TEXT];
    let ready = match fd::read(&ours, &mut text) {
        // Closed with everything else, at the end of its preparations.
        Ok(0) => Ok(()),
        Ok(count) => {
            let text = String::from_utf8_lossy(text.get(..count).unwrap_or_default());
            Err(failed(
                coracle_wire::FailKind::Other,
                format!("the pod's init: {text}"),
            ))
        }
        Err(errno) => Err(kernel("hear the pod's init")(Error::new("read", "pipe", errno))),
    };
    if let Err(failed) = ready {
        // Dead already is as good.
        let _ = pidfd::send_signal(&child.pidfd, Signal::KILL);
        return Err(failed);
    }
    Ok(child)
}

fn run(report: &OwnedFd, tasks: &[OwnedFd], empty_dir: &str) -> i32 {
    if let Err(error) = enter(tasks).and_then(|()| prepare(empty_dir)) {
        let text = error.to_string();
        let _ = fd::write(
            report,
            text.get(..cut(&text, MAX_TEXT)).unwrap_or_default().as_bytes(),
        );
        return 1;
    }
    // Our end of the pipe too: that is the word that all went well.
    if fd::close_from(0).is_err() || seccomp::load(&seccomp::reaper_program(), FilterFlags::empty()).is_err()
    {
        return 1;
    }
    let children = Set::EMPTY.with(Signal::CHLD);
    loop {
        while wait::reap_any() {}
        signal::wait_for(children);
    }
}

/// Moves itself into its cgroup, which v1 knows no other cheap way into.
fn enter(tasks: &[OwnedFd]) -> coracle_kernel::Result<()> {
    tasks.iter().try_for_each(|tasks| fd::write_word(tasks, "0"))
}

fn prepare(empty_dir: &str) -> coracle_kernel::Result<()> {
    // Whoever asks for a signal at the death of its parent gets none if that has happened; then nobody holds our pipe.
    creds::set_parent_death_signal(u8::try_from(Signal::KILL.number()).unwrap_or_default())?;
    creds::set_dumpable(false)?;
    creds::set_name("coracle-init")?;
    // Everything stays blocked: what waits for SIGCHLD takes it, and nothing else concerns an init.
    signal::set_mask(Set::ALL);

    let old_root = path::open_dir("/")?;
    mount_attr::set_propagation(&old_root, Propagation::Private, true)?;
    let empty = mount::make(
        "tmpfs",
        &[("size", c"4k"), ("mode", c"0555")],
        Attr::RDONLY | Attr::NOSUID | Attr::NOEXEC,
    )?;
    mount::attach(&empty, path::open_dir(empty_dir)?)?;
    pivot::pivot_root(&empty, &old_root, false)?;

    creds::set_groups(&[])?;
    creds::set_gid(NOBODY)?;
    caps::limit_bounding(CapSet::EMPTY)?;
    // Takes the capabilities along.
    creds::set_uid(NOBODY)?;
    caps::set(&Sets {
        effective: CapSet::EMPTY,
        permitted: CapSet::EMPTY,
        inheritable: CapSet::EMPTY,
    })?;
    creds::set_no_new_privs()?;
    // setuid has made us dumpable or not as the host says; and the death signal is gone with the change of ids.
    creds::set_dumpable(false)?;
    creds::set_parent_death_signal(u8::try_from(Signal::KILL.number()).unwrap_or_default())?;
    if caps::get()?.permitted.is_empty() {
        Ok(())
    } else {
        Err(Error::new("capset", "", Errno::EPERM))
    }
}
