//! Waiting: epoll, poll, timers and wake-ups by descriptor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;
use rustix::event::{EventfdFlags, Timespec};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags};

use crate::error::{Errno, Error, Result};
use crate::fd::show;

bitflags::bitflags! {
    /// What to wait for, and what happened.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Interest: u32 {
        /// Readable, or at end of file.
        const READ = libc::EPOLLIN as u32;
        /// Writable.
        const WRITE = libc::EPOLLOUT as u32;
        /// Out-of-band: cgroup event files, terminals.
        const PRIORITY = libc::EPOLLPRI as u32;
        /// The other side is gone; always reported.
        const HANGUP = libc::EPOLLHUP as u32;
        /// An error is pending (also cgroup event files); always reported.
        const ERROR = libc::EPOLLERR as u32;
        /// Edge-triggered (epoll alone).
        const EDGE = libc::EPOLLET as u32;
    }
}

/// A descriptor that became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The token it was added with.
    pub token: u64,
    /// What happened.
    pub ready: Interest,
}

/// An epoll instance.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

/// A timer of the monotonic clock, as a descriptor that becomes readable.
#[derive(Debug)]
pub struct Timer(OwnedFd);

/// An eventfd.
#[derive(Debug)]
pub struct Wakeup(OwnedFd);

impl Epoll {
    /// A new instance.
    pub fn new() -> Result<Epoll> {
        epoll::create(epoll::CreateFlags::CLOEXEC)
            .map(Epoll)
            .map_err(|e| Error::new("epoll_create1", "EPOLL_CLOEXEC", e.into()))
    }

    /// Watches a descriptor under a token. `EPERM` for regular files.
    pub fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> Result<()> {
        let fd = fd.as_fd();
        epoll::add(&self.0, fd, epoll::EventData::new_u64(token), flags(interest))
            .map_err(|e| Error::new("epoll_ctl", format!("ADD, {}, {interest:?}", show(fd)), e.into()))
    }

    /// Changes what is waited for.
    pub fn modify(&self, fd: impl AsFd, token: u64, interest: Interest) -> Result<()> {
        let fd = fd.as_fd();
        epoll::modify(&self.0, fd, epoll::EventData::new_u64(token), flags(interest))
            .map_err(|e| Error::new("epoll_ctl", format!("MOD, {}, {interest:?}", show(fd)), e.into()))
    }

    /// Stops watching. Needed before closing a descriptor whose open file others share.
    pub fn remove(&self, fd: impl AsFd) -> Result<()> {
        let fd = fd.as_fd();
        epoll::delete(&self.0, fd)
            .map_err(|e| Error::new("epoll_ctl", format!("DEL, {}", show(fd)), e.into()))
    }

    /// Waits for events (up to 32 at a time) and puts them into `events`, which is emptied first; none at time-out.
    pub fn wait(&self, events: &mut Vec<Event>, timeout: Option<Duration>) -> Result<()> {
        events.clear();
        let mut buffer = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 32];
        let timeout = timeout.map(timespec);
        let count = match epoll::wait(&self.0, &mut buffer, timeout.as_ref()) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => 0,
            // Before 5.11 there is no epoll_pwait2, but such kernels are refused at start.
            Err(e) => return Err(Error::new("epoll_pwait2", "", e.into())),
        };
        events.extend(buffer.iter().take(count).map(|event| Event {
            // Copies out of a packed struct.
            token: { event.data }.u64(),
            ready: Interest::from_bits_truncate({ event.flags }.bits()),
        }));
        Ok(())
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Timer {
    /// A timer that is not set.
    pub fn new() -> Result<Timer> {
        rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )
        .map(Timer)
        .map_err(|e| Error::new("timerfd_create", "CLOCK_MONOTONIC", e.into()))
    }

    /// Fires once, this much from now (at once for zero); `None` stops it.
    pub fn set(&self, after: Option<Duration>) -> Result<()> {
        // A zero value would disarm.
        let value = after.map_or(Duration::ZERO, |after| after.max(Duration::from_nanos(1)));
        let spec = Itimerspec {
            it_interval: timespec(Duration::ZERO),
            it_value: timespec(value),
        };
        rustix::time::timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &spec)
            .map(drop)
            .map_err(|e| Error::new("timerfd_settime", format!("{after:?}"), e.into()))
    }

    /// Takes the pending expirations, so that the descriptor stops being readable; 0 if there are none.
    pub fn take(&self) -> u64 {
        take_counter(&self.0)
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Wakeup {
    /// An eventfd with counter 0, non-blocking.
    pub fn new() -> Result<Wakeup> {
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(Wakeup)
            .map_err(|e| Error::new("eventfd2", "0", e.into()))
    }

    /// An eventfd that came from elsewhere (over a socket, or kept over an upgrade).
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Wakeup {
        Wakeup(fd)
    }

    /// Makes it readable.
    pub fn signal(&self) -> Result<()> {
        match crate::fd::write(&self.0, &1u64.to_ne_bytes()) {
            // Full means readable already.
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(Error::new("write", "eventfd", errno)),
        }
    }

    /// Takes the counter; 0 if nobody signalled.
    pub fn take(&self) -> u64 {
        take_counter(&self.0)
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits for one descriptor; what happened, empty at time-out.
pub fn wait_one(fd: impl AsFd, interest: Interest, timeout: Option<Duration>) -> Result<Interest> {
    let mut set = [(fd.as_fd(), interest)];
    poll(&mut set, timeout)?;
    Ok(set[0].1)
}

/// Waits for any of up to 16 descriptors; each entry's interest is replaced by what happened to it.
///
/// `EINTR` is taken up again with the full time-out: callers with a deadline compute it from the clock.
pub fn poll(set: &mut [(BorrowedFd<'_>, Interest)], timeout: Option<Duration>) -> Result<()> {
    let mut fds: Vec<rustix::event::PollFd<'_>> = Vec::with_capacity(set.len());
    for (fd, interest) in set.iter() {
        let mut wanted = rustix::event::PollFlags::empty();
        wanted.set(rustix::event::PollFlags::IN, interest.contains(Interest::READ));
        wanted.set(rustix::event::PollFlags::OUT, interest.contains(Interest::WRITE));
        wanted.set(
            rustix::event::PollFlags::PRI,
            interest.contains(Interest::PRIORITY),
        );
        fds.push(rustix::event::PollFd::from_borrowed_fd(*fd, wanted));
    }
    let timeout = timeout.map(timespec);
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, timeout.as_ref()))
        .map_err(|e| Error::new("ppoll", format!("{} descriptors", set.len()), e.into()))?;
    let happened: Vec<u32> = fds.iter().map(|fd| u32::from(fd.revents().bits())).collect();
    for ((_, interest), bits) in set.iter_mut().zip(happened) {
        // The low bits of poll and epoll have the same values.
        *interest = Interest::from_bits_truncate(bits);
    }
    Ok(())
}

fn take_counter(fd: &OwnedFd) -> u64 {
    let mut value = [0; 8];
    match crate::fd::read(fd, &mut value) {
        Ok(8) => u64::from_ne_bytes(value),
        _ => 0,
    }
}

fn flags(interest: Interest) -> epoll::EventFlags {
    epoll::EventFlags::from_bits_retain(interest.bits())
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_descriptors_come_with_their_token() {
        let epoll = Epoll::new().unwrap();
        let wakeup = Wakeup::new().unwrap();
        let timer = Timer::new().unwrap();
        epoll.add(&wakeup, 7, Interest::READ).unwrap();
        epoll.add(&timer, 8, Interest::READ).unwrap();
        let mut events = Vec::new();
        epoll.wait(&mut events, Some(Duration::ZERO)).unwrap();
        assert_eq!(events, []);
        wakeup.signal().unwrap();
        epoll.wait(&mut events, None).unwrap();
        assert_eq!(
            events,
            [Event {
                token: 7,
                ready: Interest::READ
            }]
        );
        assert_eq!(wakeup.take(), 1);
        assert_eq!(wakeup.take(), 0);
        timer.set(Some(Duration::ZERO)).unwrap();
        epoll.wait(&mut events, None).unwrap();
        assert_eq!(events[0].token, 8);
        assert_eq!(timer.take(), 1);
    }

    #[test]
    fn poll_says_which() {
        let a = Wakeup::new().unwrap();
        let b = Wakeup::new().unwrap();
        b.signal().unwrap();
        let mut set = [(a.as_fd(), Interest::READ), (b.as_fd(), Interest::READ)];
        poll(&mut set, None).unwrap();
        assert_eq!((set[0].1, set[1].1), (Interest::empty(), Interest::READ));
        assert_eq!(
            wait_one(&a, Interest::READ, Some(Duration::from_millis(1))).unwrap(),
            Interest::empty()
        );
    }
}
