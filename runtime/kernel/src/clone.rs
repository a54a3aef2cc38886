//! clone3(2) used as a fork: a child with a copy of our memory, a pidfd of it, and only two ways out for it.

use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::namespace::Kinds;

const CLONE_PIDFD: u64 = 0x1000;
const CLONE_PARENT: u64 = 0x8000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Exit status of a child that panicked, the one that Rust programs end with.
pub const PANIC_STATUS: i32 = 101;

/// How to clone. The child's exit signal is SIGCHLD, and 0 for a sibling, as the kernel wants it: waits use `__WALL`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clone3<'fd> {
    /// Namespaces that the child gets for itself.
    pub namespaces: Kinds,
    /// The child becomes our sibling: our parent reaps it (`CLONE_PARENT`).
    pub sibling: bool,
    /// The cgroup v2 directory that the child is born in (`CLONE_INTO_CGROUP`; `EBADF` for v1 directories).
    pub cgroup: Option<BorrowedFd<'fd>>,
}

/// A child process.
#[derive(Debug)]
pub struct Child {
    /// Its process id, as seen from our pid namespace.
    pub pid: i32,
    /// Its process descriptor.
    pub pidfd: OwnedFd,
}

/// `struct clone_args`, version 2 (Linux 5.7).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

impl Clone3<'_> {
    /// Clones; the child runs `child` and leaves by `_exit` with its result (or by an `execve` inside of it).
    ///
    /// A panic in the child prints and ends it with [`PANIC_STATUS`]: nothing of the parent is unwound or run twice.
    /// To be called in a process with one thread, or with a closure that neither allocates nor takes locks: another
    /// thread may have held them at the moment of the clone, and does not exist in the child.
    pub fn spawn(self, child: impl FnOnce() -> i32) -> Result<Child> {
        install_panic_hook();
        self.raw(|| {
            IN_CHILD.store(true, Ordering::Relaxed);
            child()
        })
    }

    /// As [`Self::spawn`], without the panic hook, for closures that cannot panic: nothing here allocates.
    pub(crate) fn raw(self, child: impl FnOnce() -> i32) -> Result<Child> {
        let mut pidfd: libc::c_int = -1;
        let mut args = CloneArgs {
            flags: self.namespaces.bits() | CLONE_PIDFD,
            // The kernel writes through it, so its provenance is exposed.
            pidfd: (&raw mut pidfd).expose_provenance() as u64,
            ..CloneArgs::default()
        };
        if self.sibling {
            args.flags |= CLONE_PARENT;
        } else {
            args.exit_signal = libc::SIGCHLD as u64;
        }
        if let Some(cgroup) = self.cgroup {
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = cgroup.as_raw_fd() as u64;
        }
        // SAFETY: `args` is a live clone_args of the size given, and its one pointer is to the live `pidfd`. Without
        // CLONE_VM the child has its own copy of everything, stack included; that it leaves by _exit or execve
        // alone is upheld by `exit` below.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
        match pid {
            0 => exit(child()),
            -1 => Err(Error::last("clone3", format!("{self:?}"))),
            pid => {
                // SAFETY: the kernel has just installed this descriptor (close-on-exec) for us; nobody else knows it.
                let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
                Ok(Child {
                    pid: i32::try_from(pid).unwrap_or_default(),
                    pidfd,
                })
            }
        }
    }
}

/// Set in a cloned child that may panic.
static IN_CHILD: AtomicBool = AtomicBool::new(false);

/// Makes a panic in a cloned child end it there. Installed before the clone, because the hook's lock may be held by
/// another thread at the moment of it; and a hook, because `abort` is no way out of a clone: musl's raise() would
/// signal the thread id that it has cached, which is our parent's.
fn install_panic_hook() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !IN_CHILD.load(Ordering::Relaxed) {
                return previous(info);
            }
            let mut text = [0; 512];
            let len = crate::error::format_into(&mut text, format_args!("{info}\n"));
            let _ = crate::fd::write(rustix::stdio::stderr(), text.get(..len).unwrap_or_default());
            exit(PANIC_STATUS)
        }));
    });
}

/// Ends the process at once: no exit handlers, no buffers flushed. The way out of a cloned child.
pub fn exit(status: i32) -> ! {
    // Not the C library's _exit: where a container's filter refuses the call, that one repeats it for ever.
    // SAFETY: takes a number, and runs nothing of ours.
    unsafe { libc::syscall(libc::SYS_exit_group, status) };
    // Refused. This ends in an instruction that no filter can allow.
    std::process::abort()
}

/// Our process id.
#[must_use]
pub fn own_pid() -> i32 {
    std::process::id().cast_signed()
}

/// Our parent's process id; 0 if it lives in another pid namespace.
#[must_use]
pub fn parent_pid() -> i32 {
    rustix::process::getppid().map_or(0, rustix::process::Pid::as_raw_pid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wait::{Id, Status, wait};

    #[test]
    fn a_childs_result_is_its_exit_status() {
        let child = Clone3::default().spawn(|| 42).unwrap();
        assert_eq!(wait(Id::Process(child.pid)).unwrap().status, Status::Exited(42));
    }

    #[test]
    fn a_childs_panic_ends_the_child_alone() {
        let child = Clone3::default()
            .spawn(|| panic!("expected in this test"))
            .unwrap();
        assert_eq!(
            wait(Id::Process(child.pid)).unwrap().status,
            Status::Exited(PANIC_STATUS)
        );
    }

    #[test]
    fn a_sibling_is_reaped_by_the_grandparent() {
        let (read, write) = crate::fd::pipe().unwrap();
        let helper = Clone3::default()
            .spawn(|| {
                match (Clone3 {
                    sibling: true,
                    ..Clone3::default()
                })
                .spawn(|| 7)
                {
                    Ok(child) => {
                        let _ = crate::fd::write(&write, &child.pid.to_ne_bytes());
                        0
                    }
                    Err(_) => 1,
                }
            })
            .unwrap();
        assert_eq!(wait(Id::Process(helper.pid)).unwrap().status, Status::Exited(0));
        let mut pid = [0; 4];
        assert_eq!(crate::fd::read(&read, &mut pid), Ok(4));
        assert_eq!(
            wait(Id::Process(i32::from_ne_bytes(pid))).unwrap().status,
            Status::Exited(7)
        );
    }
}
