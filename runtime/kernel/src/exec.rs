//! Starting programs: execve and execveat, and `spawn`, which does clone and exec with everything said explicitly.

use std::ffi::{CStr, CString, c_char};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use crate::clone::{Child, Clone3};
use crate::error::{Errno, Error, Result};
use crate::fd;
use crate::rlimit;
use crate::signal::{self, Set};
use crate::wait::{Id, wait};

/// A program to execute.
#[derive(Clone, Copy, Debug)]
pub enum Program<'a> {
    /// By an open descriptor (a sealed memfd); not for scripts, whose interpreter could not open it.
    Fd(BorrowedFd<'a>),
    /// By its path.
    Path(&'a CStr),
}

/// A program to be started as a child: nothing is inherited that is not named here.
#[derive(Clone, Copy, Debug)]
pub struct Spawn<'a> {
    /// The program.
    pub program: Program<'a>,
    /// Its arguments, the name first.
    pub args: &'a [CString],
    /// Its whole environment.
    pub env: &'a [CString],
    /// Its descriptors, by the number that each gets; of 0, 1 and 2 those not named are `/dev/null`.
    pub fds: &'a [(BorrowedFd<'a>, i32)],
    /// The cgroup v2 directory that it is born in.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// `tasks` files of v1's hierarchies that it writes itself to before anything else.
    pub cgroup_tasks: &'a [BorrowedFd<'a>],
    /// Its working directory; ours where not named.
    pub cwd: Option<BorrowedFd<'a>>,
    /// Whether it leads a session of its own.
    pub new_session: bool,
    /// Whether it is killed when the thread that starts it ends: for callers that wait for it in that thread.
    pub dies_with_caller: bool,
}

impl<'a> Spawn<'a> {
    /// A program with arguments, an empty environment and no descriptors.
    #[must_use]
    pub fn new(program: Program<'a>, args: &'a [CString]) -> Spawn<'a> {
        Spawn {
            program,
            args,
            env: &[],
            fds: &[],
            cgroup: None,
            cgroup_tasks: &[],
            cwd: None,
            new_session: false,
            dies_with_caller: false,
        }
    }

    /// Starts it and returns when it runs. A failure of the child up to and with execve comes back as the error of
    /// the call that failed, with no child left over.
    ///
    /// Every signal has its default action and none is blocked in the new program, and its soft limit of open descriptors
    /// is the one that we had before [`rlimit::raise_open_files`]; unless asked for it does not die
    /// with the thread that started it. Safe in a threaded process: between clone and execve nothing is allocated or locked.
    pub fn spawn(self) -> Result<Child> {
        let above = self
            .fds
            .iter()
            .map(|(_, number)| *number)
            .max()
            .unwrap_or(2)
            .max(2)
            .saturating_add(1);
        let null = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(|e| Error::from_io("open", "\"/dev/null\", O_RDWR", &e))?;
        let mut pairs = self.fds.to_vec();
        for number in 0..=2 {
            if !self.fds.iter().any(|(_, taken)| *taken == number) {
                pairs.push((null.as_fd(), number));
            }
        }
        // What the child still needs after its descriptors are placed lies above all of them.
        let (read, write) = fd::pipe()?;
        let write = fd::dup_above(write, above)?;
        let program = match self.program {
            Program::Fd(program) => Some(fd::dup_above(program, above)?),
            Program::Path(_) => None,
        };
        let (args, env) = (pointers(self.args), pointers(self.env));
        let caller = self.dies_with_caller.then(crate::clone::own_pid);

        let mask = signal::set_mask(Set::ALL);
        let child = Clone3 {
            cgroup: self.cgroup,
            ..Clone3::default()
        }
        .raw(|| {
            let (step, errno) = self.become_program(program.as_ref(), &pairs, &args, &env, caller);
            let mut report = [0; 8];
            report[..4].copy_from_slice(&(step as u32).to_ne_bytes());
            report[4..].copy_from_slice(&errno.raw().to_ne_bytes());
            let _ = fd::write(&write, &report);
            127
        });
        signal::set_mask(mask);
        drop(write);
        let child = child?;

        let mut report = [0; 8];
        match fd::read(&read, &mut report) {
            // Closed by the execve.
            Ok(0) => Ok(child),
            outcome => {
                let _ = wait(Id::Pidfd(child.pidfd.as_fd()));
                let (step, errno) = report.split_at(4);
                let step = u32::from_ne_bytes(step.try_into().unwrap_or_default());
                let errno = i32::from_ne_bytes(errno.try_into().unwrap_or_default());
                let errno = if outcome == Ok(report.len()) {
                    Errno::from_raw(errno)
                } else {
                    Errno::EIO
                };
                Err(self.error(step, errno))
            }
        }
    }

    /// The child's side; returns only if a step failed.
    fn become_program(
        &self,
        program: Option<&OwnedFd>,
        pairs: &[(BorrowedFd<'_>, i32)],
        args: &[*const c_char],
        env: &[*const c_char],
        caller: Option<i32>,
    ) -> (Step, Errno) {
        signal::reset_dispositions();
        signal::set_mask(Set::EMPTY);
        if let Some(caller) = caller {
            // SAFETY: takes numbers only.
            if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } < 0 {
                return (Step::Caller, Errno::last());
            }
            // It may have ended before: then there is nobody left to die with.
            if crate::clone::parent_pid() != caller {
                return (Step::Caller, Errno::ESRCH);
            }
        }
        for tasks in self.cgroup_tasks {
            if let Err(errno) = fd::write(tasks, b"0") {
                return (Step::Cgroup, errno);
            }
        }
        if let Some(cwd) = self.cwd {
            // SAFETY: takes a number; the child has a working directory of its own.
            if unsafe { libc::fchdir(cwd.as_raw_fd()) } < 0 {
                return (Step::Cwd, Errno::last());
            }
        }
        if self.new_session {
            // SAFETY: no arguments.
            if unsafe { libc::setsid() } < 0 {
                return (Step::Session, Errno::last());
            }
        }
        // Everything closes at execve; `place` takes out what the program gets.
        // SAFETY: takes numbers only.
        if unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } < 0 {
            return (Step::Descriptors, Errno::last());
        }
        if let Err(errno) = fd::place(pairs) {
            return (Step::Descriptors, errno);
        }
        // After that, which may need numbers above the soft limit that there was.
        if let Err(errno) = rlimit::give_back_open_files() {
            return (Step::Limits, errno);
        }
        let errno = match (self.program, program) {
            (Program::Path(path), _) => raw_execveat(libc::AT_FDCWD, path, args, env, 0),
            (Program::Fd(_), Some(fd)) => raw_execveat(fd.as_raw_fd(), c"", args, env, libc::AT_EMPTY_PATH),
            (Program::Fd(_), None) => Errno::EBADF,
        };
        (Step::Execute, errno)
    }

    fn error(&self, step: u32, errno: Errno) -> Error {
        let name = self
            .args
            .first()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let call = match step {
            step if step == Step::Cgroup as u32 => "write",
            step if step == Step::Cwd as u32 => "fchdir",
            step if step == Step::Session as u32 => "setsid",
            step if step == Step::Descriptors as u32 => "dup2",
            step if step == Step::Caller as u32 => "prctl",
            step if step == Step::Limits as u32 => "prlimit64",
            _ => "execveat",
        };
        let args = match (call, self.program) {
            ("write", _) => "tasks of its cgroup, 0".into(),
            (_, Program::Path(path)) => format!("{path:?}"),
            (_, Program::Fd(fd)) => format!("{}, {name:?}", fd::show(fd)),
        };
        Error::new(call, args, errno)
    }
}

/// Where a child failed.
#[derive(Clone, Copy)]
enum Step {
    Cgroup = 1,
    Cwd,
    Session,
    Descriptors,
    Caller,
    Limits,
    Execute,
}

/// execve(2): replaces this process's program; returns only the error.
#[must_use]
pub fn execve(path: &CStr, args: &[CString], env: &[CString]) -> Error {
    let errno = raw_execveat(libc::AT_FDCWD, path, &pointers(args), &pointers(env), 0);
    Error::new("execve", format!("{path:?}"), errno)
}

/// execveat(2) with `AT_EMPTY_PATH`: replaces this process's program by the open one; returns only the error.
///
/// `ENOENT` for a script behind a close-on-exec descriptor: its interpreter could not open it.
#[must_use]
pub fn execve_fd(program: BorrowedFd<'_>, args: &[CString], env: &[CString]) -> Error {
    let errno = raw_execveat(
        program.as_raw_fd(),
        c"",
        &pointers(args),
        &pointers(env),
        libc::AT_EMPTY_PATH,
    );
    Error::new(
        "execveat",
        format!("{}, \"\", AT_EMPTY_PATH", fd::show(program)),
        errno,
    )
}

/// Whether this process may execute the file by its effective ids (`faccessat2` with `X_OK`); mounts with `noexec` count.
pub fn may_execute(path: &CStr) -> Result<(), Errno> {
    // SAFETY: `path` is a live string; the rest are numbers.
    let done = unsafe {
        libc::syscall(
            libc::SYS_faccessat2,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::X_OK,
            libc::AT_EACCESS,
        )
    };
    if done < 0 { Err(Errno::last()) } else { Ok(()) }
}

/// The null-terminated array that the kernel wants; valid as long as the strings.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([std::ptr::null()])
        .collect()
}

fn raw_execveat(
    dir: i32,
    path: &CStr,
    args: &[*const c_char],
    env: &[*const c_char],
    flags: libc::c_int,
) -> Errno {
    // SAFETY: `args` and `env` come from `pointers` and end with null; their strings and `path` outlive the call,
    // which returns only if nothing was replaced.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            dir,
            path.as_ptr(),
            args.as_ptr(),
            env.as_ptr(),
            flags,
        )
    };
    Errno::last()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wait::Status;
    use std::fs::File;
    use std::io::Read as _;

    fn strings(of: &[&str]) -> Vec<CString> {
        of.iter().map(|text| CString::new(*text).unwrap()).collect()
    }

    #[test]
    fn a_program_gets_exactly_what_is_named() {
        let (read, write) = fd::pipe().unwrap();
        let args = strings(&["sh", "-c", "echo $0 $A $B; ls /proc/self/fd >&4; cat <&3"]);
        let env = strings(&["A=1", "PATH=/bin:/usr/bin"]);
        // Above those that the program gets, whatever other tests have open.
        let text = fd::sealed_memfd(c"text", b"from three\n").unwrap();
        let text = rustix::io::fcntl_dupfd_cloexec(text, 5).unwrap();
        // The numbers overlap with the sources on purpose.
        let fds = [
            (write.as_fd(), 1),
            (text.as_fd(), 3),
            (write.as_fd(), 4),
            (write.as_fd(), fd::number(&text)),
        ];
        let child = Spawn {
            env: &env,
            fds: &fds,
            new_session: true,
            ..Spawn::new(Program::Path(c"/bin/sh"), &args)
        }
        .spawn()
        .unwrap();
        drop(write);
        let mut output = String::new();
        File::from(read).read_to_string(&mut output).unwrap();
        assert_eq!(
            wait(Id::Pidfd(child.pidfd.as_fd())).unwrap().status,
            Status::Exited(0)
        );
        let mut lines: Vec<&str> = output.lines().collect();
        assert_eq!(lines.first(), Some(&"sh 1"));
        assert_eq!(lines.pop(), Some("from three"));
        // 0 to 4, the extra one, and the directory that ls itself has open: the first number free for it.
        let mut expected = std::collections::BTreeSet::from([0, 1, 2, 3, 4, fd::number(&text)]);
        let free = (0..).find(|number| !expected.contains(number)).unwrap();
        expected.insert(free);
        let open: std::collections::BTreeSet<i32> =
            lines.iter().skip(1).map(|line| line.parse().unwrap()).collect();
        assert_eq!(open, expected, "{output}");
    }

    #[test]
    fn a_sealed_program_is_run_by_descriptor() {
        let program = fd::sealed_program(c"sh", File::open("/bin/sh").unwrap()).unwrap();
        let args = strings(&["sh", "-c", "exit 5"]);
        let child = Spawn::new(Program::Fd(program.as_fd()), &args).spawn().unwrap();
        assert_eq!(
            wait(Id::Pidfd(child.pidfd.as_fd())).unwrap().status,
            Status::Exited(5)
        );
    }

    #[test]
    fn a_program_that_does_not_exist_is_an_error_and_no_child() {
        let args = strings(&["x"]);
        let error = Spawn::new(Program::Path(c"/nonexistent/x"), &args)
            .spawn()
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "execveat(\"/nonexistent/x\"): No such file or directory"
        );
    }

    #[test]
    fn a_program_dies_with_its_caller_only_if_asked_to() {
        let args = strings(&["sleep", "1000"]);
        let started = |dies_with_caller: bool| {
            let start = || {
                Spawn {
                    dies_with_caller,
                    ..Spawn::new(Program::Path(c"/bin/sleep"), &args)
                }
                .spawn()
                .unwrap()
            };
            std::thread::scope(|scope| scope.spawn(start).join().unwrap())
        };
        let survivor = started(false);
        let child = started(true);
        let end = wait(Id::Pidfd(child.pidfd.as_fd())).unwrap();
        assert_eq!(end.status, Status::Signaled(libc::SIGKILL));
        crate::pidfd::send_signal(&survivor.pidfd, signal::Signal::TERM).unwrap();
        let end = wait(Id::Pidfd(survivor.pidfd.as_fd())).unwrap();
        assert_eq!(end.status, Status::Signaled(libc::SIGTERM));
    }

    #[test]
    fn signals_are_as_in_a_fresh_process() {
        // No shell between: busybox's ignores SIGQUIT.
        let args = strings(&["cat", "/proc/self/status"]);
        let env = strings(&["PATH=/bin:/usr/bin"]);
        let (read, write) = fd::pipe().unwrap();
        let fds = [(write.as_fd(), 1)];
        let child = Spawn {
            env: &env,
            fds: &fds,
            ..Spawn::new(Program::Path(c"/bin/cat"), &args)
        }
        .spawn()
        .unwrap();
        drop(write);
        let mut output = String::new();
        File::from(read).read_to_string(&mut output).unwrap();
        wait(Id::Pidfd(child.pidfd.as_fd())).unwrap();
        for name in ["SigBlk", "SigIgn", "SigCgt"] {
            assert!(
                output.contains(&format!("\n{name}:\t0000000000000000\n")),
                "{output}"
            );
        }
    }
}
