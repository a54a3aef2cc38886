//! Signals: names, masks, dispositions, signalfd.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _, OwnedFd};

use crate::error::{Errno, Error, Result};

/// The last real-time signal, and so the last signal.
const LAST: i32 = 64;
/// The first real-time signal as the shell counts them: glibc and musl keep 32 to 34 or fewer, `kill -l` says 34.
const RTMIN: i32 = 34;

/// A signal number, 1 to 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Signal(i32);

/// A set of signals, as the kernel keeps it: bit n-1 for signal n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Set(u64);

/// A descriptor that becomes readable when a signal of its set is pending (the set must be blocked).
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

macro_rules! signals {
    ($($name:ident = $libc:ident),* $(,)?) => {
        impl Signal {
            $(
                #[doc = concat!("`", stringify!($libc), "`")]
                pub const $name: Signal = Signal(libc::$libc);
            )*
        }

        const NAMES: &[(&str, i32)] = &[$((stringify!($name), libc::$libc)),*];
    };
}

signals! {
    HUP = SIGHUP, INT = SIGINT, QUIT = SIGQUIT, ILL = SIGILL, TRAP = SIGTRAP, ABRT = SIGABRT, BUS = SIGBUS,
    FPE = SIGFPE, KILL = SIGKILL, USR1 = SIGUSR1, SEGV = SIGSEGV, USR2 = SIGUSR2, PIPE = SIGPIPE, ALRM = SIGALRM,
    TERM = SIGTERM, STKFLT = SIGSTKFLT, CHLD = SIGCHLD, CONT = SIGCONT, STOP = SIGSTOP, TSTP = SIGTSTP,
    TTIN = SIGTTIN, TTOU = SIGTTOU, URG = SIGURG, XCPU = SIGXCPU, XFSZ = SIGXFSZ, VTALRM = SIGVTALRM,
    PROF = SIGPROF, WINCH = SIGWINCH, IO = SIGIO, PWR = SIGPWR, SYS = SIGSYS,
}

/// Other names of the same numbers.
const ALIASES: &[(&str, i32)] = &[
    ("IOT", libc::SIGABRT),
    ("POLL", libc::SIGIO),
    ("CLD", libc::SIGCHLD),
    ("UNUSED", libc::SIGSYS),
];

impl Signal {
    /// A signal from its number; `None` outside 1 to 64.
    #[must_use]
    pub fn from_number(number: i32) -> Option<Signal> {
        (1..=LAST).contains(&number).then_some(Signal(number))
    }

    /// A signal as people and specs write it: `SIGTERM`, `TERM`, `term`, `15`, `SIGRTMIN+3`, `RTMAX-1`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Signal> {
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            return text.parse().ok().and_then(Signal::from_number);
        }
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        if let Some((_, number)) = NAMES.iter().chain(ALIASES).find(|(known, _)| *known == name) {
            return Some(Signal(*number));
        }
        let (number, limits) = if let Some(rest) = name.strip_prefix("RTMIN") {
            (RTMIN.checked_add(offset(rest, '+')?)?, RTMIN..=LAST)
        } else {
            (
                LAST.checked_sub(offset(name.strip_prefix("RTMAX")?, '-')?)?,
                RTMIN..=LAST,
            )
        };
        limits.contains(&number).then_some(Signal(number))
    }

    /// The number.
    #[must_use]
    pub const fn number(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Signal {
    /// `SIGTERM`, `SIGRTMIN+3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => write!(f, "SIG{name}"),
            None if self.0 == RTMIN => f.write_str("SIGRTMIN"),
            None if self.0 > RTMIN => write!(f, "SIGRTMIN+{}", self.0 - RTMIN),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Set {
    /// No signal.
    pub const EMPTY: Set = Set(0);
    /// Every signal.
    pub const ALL: Set = Set(u64::MAX);

    /// With this signal too.
    #[must_use]
    pub const fn with(self, signal: Signal) -> Set {
        Set(self.0 | 1 << (signal.0 - 1))
    }
}

impl SignalFd {
    /// A non-blocking signalfd of a set that the caller has blocked.
    pub fn new(set: Set) -> Result<SignalFd> {
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        // SAFETY: `set` is 8 bytes, the size given; the kernel only reads it.
        let fd = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const set.0, size_of::<u64>(), flags) };
        if fd < 0 {
            return Err(Error::last("signalfd4", format!("{set:?}")));
        }
        // SAFETY: the kernel has just installed this descriptor for us; nobody else knows it.
        Ok(SignalFd(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// The next pending signal and the process that sent it; `None` if there is none.
    #[must_use]
    pub fn take(&self) -> Option<(Signal, i32)> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        match crate::fd::read(&self.0, &mut info) {
            Ok(len) if len == info.len() => {
                // ssi_signo is the first field, ssi_pid the fourth; all are 32 bits wide.
                let word = |index: usize| {
                    info.get(index * 4..index * 4 + 4)
                        .and_then(|b| b.try_into().ok())
                        .map_or(0, i32::from_ne_bytes)
                };
                Some((Signal::from_number(word(0))?, word(3)))
            }
            _ => None,
        }
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Replaces the calling thread's mask; the old one.
pub fn set_mask(set: Set) -> Set {
    let mut old = Set::EMPTY;
    // SAFETY: both are live and of the size given; the call cannot fail with a valid `how`. It goes to the kernel
    // directly because the C libraries leave out the signals that they keep for themselves.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const set.0,
            &raw mut old.0,
            size_of::<u64>(),
        )
    };
    old
}

/// Waits for one of these signals, which the caller has blocked, and takes it.
pub fn wait_for(set: Set) -> Signal {
    loop {
        // SAFETY: `set` is 8 bytes, the size given, and only read; no siginfo and no time-out are asked for.
        let number = unsafe {
            libc::syscall(
                libc::SYS_rt_sigtimedwait,
                &raw const set.0,
                std::ptr::null_mut::<libc::siginfo_t>(),
                std::ptr::null::<libc::timespec>(),
                size_of::<u64>(),
            )
        };
        // Only EINTR is possible otherwise.
        if let Some(signal) = i32::try_from(number).ok().and_then(Signal::from_number) {
            return signal;
        }
    }
}

/// Gives every signal its default action, those ignored by our parent (and SIGPIPE, by Rust) included.
///
/// For a cloned child before it executes a program: execve keeps what is ignored.
pub fn reset_dispositions() {
    // A kernel_sigaction of zeroes is SIG_DFL with no flags on every architecture; it has at most 32 bytes.
    let default = [0u64; 8];
    for signal in (1..=LAST).filter(|number| *number != libc::SIGKILL && *number != libc::SIGSTOP) {
        // SAFETY: the kernel reads one sigaction out of the 64 live bytes; SIG_DFL refers to no code. In a cloned
        // child no handler of the parent is needed any more.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
    }
}

/// Ignores a signal in this process (and, over execve, in the next program).
pub fn ignore(signal: Signal) -> Result<()> {
    // SAFETY: SIG_IGN refers to no code.
    if unsafe { libc::signal(signal.0, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(Error::last("signal", format!("{signal}, SIG_IGN")));
    }
    Ok(())
}

/// Takes the alternate signal stack away (Rust sets one up for its overflow message).
pub fn disable_alternate_stack() {
    let stack = libc::stack_t {
        ss_sp: std::ptr::null_mut(),
        ss_flags: libc::SS_DISABLE,
        ss_size: 0,
    };
    // SAFETY: `stack` is live; with SS_DISABLE the kernel keeps no pointer. Nothing runs on the old one now.
    unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) };
}

/// kill(2): a process by its id. Only for children that are not reaped and for ids that someone vouches for.
pub fn kill(pid: i32, signal: Signal) -> Result<()> {
    kill_raw(pid, signal.0)
}

/// Whether a process with this id exists (kill with signal 0; also true when it is not ours to signal).
#[must_use]
pub fn exists(pid: i32) -> bool {
    pid > 0 && kill_raw(pid, 0).map_or_else(|error| error.errno() == Errno::EPERM, |()| true)
}

/// kill(2) for a whole process group.
pub fn kill_group(group: i32, signal: Signal) -> Result<()> {
    if group <= 1 {
        // 0 and 1 would mean our own group and everybody.
        return Err(Error::new("kill", format!("-{group}, {signal}"), Errno::EINVAL));
    }
    kill_raw(-group, signal.0)
}

fn kill_raw(pid: i32, signal: i32) -> Result<()> {
    // SAFETY: takes numbers only.
    if unsafe { libc::kill(pid, signal) } < 0 {
        return Err(Error::last("kill", format!("{pid}, {signal}")));
    }
    Ok(())
}

fn offset(rest: &str, sign: char) -> Option<i32> {
    if rest.is_empty() {
        return Some(0);
    }
    let digits = rest.strip_prefix(sign)?;
    (!digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_read_as_they_are_written() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("TERM", 15),
            ("term", 15),
            ("9", 9),
            ("SIGRTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("SIGRTMAX", 64),
            ("SIGPOLL", 29),
        ] {
            assert_eq!(Signal::parse(text).map(Signal::number), Some(number), "{text}");
        }
        for text in [
            "",
            "0",
            "65",
            "SIG",
            "SIGFOO",
            "RTMIN-1",
            "RTMIN+31",
            "RTMIN+",
            "-9",
            "9999999999",
            "RTMAX+1",
        ] {
            assert_eq!(Signal::parse(text), None, "{text}");
        }
        assert_eq!(Signal::TERM.to_string(), "SIGTERM");
        assert_eq!(Signal(37).to_string(), "SIGRTMIN+3");
    }

    #[test]
    fn a_blocked_signal_is_read_from_its_descriptor() {
        let old = set_mask(Set::EMPTY.with(Signal::USR2));
        let fd = SignalFd::new(Set::EMPTY.with(Signal::USR2)).unwrap();
        assert_eq!(fd.take(), None);
        // SAFETY: no preconditions.
        let thread = unsafe { libc::gettid() };
        // To this thread alone: the other threads of the test do not block it.
        // SAFETY: takes numbers only.
        unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), thread, libc::SIGUSR2) };
        assert_eq!(fd.take(), Some((Signal::USR2, std::process::id().cast_signed())));
        assert_eq!(set_mask(old), Set::EMPTY.with(Signal::USR2));
    }
}
