//! Descriptors: duplicates, flags, bulk closing, memfds with seals, and what a descriptor refers to.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use rustix::fs::{MemfdFlags, OFlags, SealFlags};
use rustix::io::FdFlags;
use rustix::pipe::SpliceFlags;

use crate::error::{Errno, Error, Result};

/// The first descriptor after standard input, output and error.
pub const FIRST_FREE: i32 = 3;

/// `MFD_NOEXEC_SEAL`, which rustix does not name.
const MFD_NOEXEC_SEAL: u32 = 0x0008;
/// `MFD_EXEC`, which rustix does not name.
const MFD_EXEC: u32 = 0x0010;

/// How often a file with busy pages is tried to be sealed.
const SEAL_ATTEMPTS: u32 = 20;

/// Everything a program needs so that nobody can change the bytes it runs from.
const IMMUTABLE: SealFlags = SealFlags::WRITE
    .union(SealFlags::SHRINK)
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// A close-on-exec duplicate, numbered 3 or above.
pub fn dup(fd: impl AsFd) -> Result<OwnedFd> {
    dup_above(fd, FIRST_FREE)
}

/// A close-on-exec duplicate, numbered `lowest` or above.
pub fn dup_above(fd: impl AsFd, lowest: i32) -> Result<OwnedFd> {
    let fd = fd.as_fd();
    rustix::io::fcntl_dupfd_cloexec(fd, lowest).map_err(|e| {
        Error::new(
            "fcntl",
            format!("{}, F_DUPFD_CLOEXEC, {lowest}", show(fd)),
            e.into(),
        )
    })
}

/// Sets or clears close-on-exec.
pub fn set_cloexec(fd: impl AsFd, on: bool) -> Result<()> {
    let fd = fd.as_fd();
    let flags = if on { FdFlags::CLOEXEC } else { FdFlags::empty() };
    rustix::io::fcntl_setfd(fd, flags)
        .map_err(|e| Error::new("fcntl", format!("{}, F_SETFD, {on}", show(fd)), e.into()))
}

/// Sets or clears `O_NONBLOCK`. The flag belongs to the open file, so everyone who shares it is changed with us.
pub fn set_nonblocking(fd: impl AsFd, on: bool) -> Result<()> {
    let fd = fd.as_fd();
    let set = || {
        let mut flags = rustix::fs::fcntl_getfl(fd)?;
        flags.set(OFlags::NONBLOCK, on);
        rustix::fs::fcntl_setfl(fd, flags)
    };
    set().map_err(|e| Error::new("fcntl", format!("{}, O_NONBLOCK, {on}", show(fd)), e.into()))
}

/// Takes over a descriptor that this process inherited under a fixed number, and makes it close-on-exec.
///
/// To be called once a number, early, by the program that defines what that number means (a role that is started
/// with its socket at 3): the number must not belong to anything else in the process.
pub fn inherited(number: i32) -> Result<OwnedFd> {
    // SAFETY: only borrowed for the fcntl below, which fails with EBADF and touches nothing if it is not open.
    let probe = unsafe { BorrowedFd::borrow_raw(number.max(0)) };
    rustix::io::fcntl_setfd(probe, FdFlags::CLOEXEC)
        .map_err(|e| Error::new("fcntl", format!("{number}, F_SETFD, true"), e.into()))?;
    // SAFETY: it is open (just proved), and by the contract above no other owner of this number exists.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Puts each descriptor at its number and clears close-on-exec there, whatever order the two sides overlap in.
///
/// For a process that is about to `execve`: a target number that was open is silently replaced, whoever owned it.
/// Does not allocate, so it may run in the clone of a threaded process. At most 64 pairs.
pub fn place(pairs: &[(BorrowedFd<'_>, i32)]) -> Result<(), Errno> {
    const MOST: usize = 64;
    if pairs.len() > MOST {
        return Err(Errno::E2BIG);
    }
    let above = pairs
        .iter()
        .map(|(_, number)| *number)
        .max()
        .unwrap_or(0)
        .saturating_add(1);
    // First every source that lies in the target range moves above it; then nothing that is replaced is still needed.
    let mut sources = [-1; MOST];
    for (slot, (fd, _)) in sources.iter_mut().zip(pairs) {
        *slot = fd.as_raw_fd();
        if *slot < above {
            // SAFETY: plain call on numbers; the duplicate is closed by the execve that follows (close-on-exec).
            let moved = unsafe { libc::fcntl(*slot, libc::F_DUPFD_CLOEXEC, above) };
            if moved < 0 {
                return Err(Errno::last());
            }
            *slot = moved;
        }
    }
    for (source, (_, number)) in sources.iter().zip(pairs) {
        // SAFETY: plain call on numbers; by the contract above nobody uses the replaced descriptor any more.
        if unsafe { libc::dup2(*source, *number) } < 0 {
            return Err(Errno::last());
        }
    }
    Ok(())
}

/// Marks every descriptor from `first` on close-on-exec.
pub fn cloexec_from(first: i32) -> Result<()> {
    close_range(first, i32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

/// Closes every descriptor from `first` on, whoever owns it: only in a cloned child that has taken what it needs.
pub fn close_from(first: i32) -> Result<()> {
    close_range(first, i32::MAX, 0)
}

/// Closes every descriptor from 3 on but these, whoever owns them: for a cloned child, so that nothing of its parent's
/// is kept open by it. What it still holds by other owned values must not be dropped afterwards.
pub fn close_all_but(keep: &[BorrowedFd<'_>]) -> Result<()> {
    let mut numbers: Vec<i32> = keep
        .iter()
        .map(|fd| fd.as_raw_fd())
        .filter(|number| *number >= FIRST_FREE)
        .collect();
    numbers.sort_unstable();
    let mut first = FIRST_FREE;
    for number in numbers {
        if number > first {
            close_range(first, number - 1, 0)?;
        }
        first = number + 1;
    }
    close_range(first, i32::MAX, 0)
}

/// A close-on-exec pipe: (read end, write end).
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| Error::new("pipe2", "O_CLOEXEC", e.into()))
}

/// Asks for a pipe buffer of `bytes`; the kernel rounds up, and refuses above its limit with `EPERM`.
pub fn set_pipe_size(fd: impl AsFd, bytes: usize) -> Result<()> {
    let fd = fd.as_fd();
    rustix::pipe::fcntl_setpipe_size(fd, bytes)
        .map(drop)
        .map_err(|e| Error::new("fcntl", format!("{}, F_SETPIPE_SZ, {bytes}", show(fd)), e.into()))
}

/// How many bytes a pipe has room for.
pub fn pipe_size(fd: impl AsFd) -> Result<usize> {
    let fd = fd.as_fd();
    rustix::pipe::fcntl_getpipe_size(fd)
        .map_err(|e| Error::new("fcntl", format!("{}, F_GETPIPE_SZ", show(fd)), e.into()))
}

/// Moves up to `most` bytes between a pipe and another file without copying them (splice(2)), repeated on `EINTR`; 0 at
/// the end of what is read. Where there is nothing to move, or no room, it does not wait for the pipe, and for the other
/// file only if that waits: `EAGAIN`. A closed socket makes `SIGPIPE` of this, which nothing but ignoring it prevents.
pub fn splice(from: impl AsFd, to: impl AsFd, most: usize) -> Result<usize, Errno> {
    Ok(rustix::io::retry_on_intr(|| {
        let (from, to) = (from.as_fd(), to.as_fd());
        rustix::pipe::splice(from, None, to, None, most, SpliceFlags::NONBLOCK)
    })?)
}

/// Bytes that can be read at once (`FIONREAD`).
pub fn readable_bytes(fd: impl AsFd) -> Result<u64> {
    let fd = fd.as_fd();
    rustix::io::ioctl_fionread(fd)
        .map_err(|e| Error::new("ioctl", format!("{}, FIONREAD", show(fd)), e.into()))
}

/// read(2), repeated on `EINTR`. The bare errno, because callers in loops decide by it and seldom show it.
pub fn read(fd: impl AsFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    Ok(rustix::io::retry_on_intr(|| {
        rustix::io::read(fd.as_fd(), &mut *buffer)
    })?)
}

/// write(2), repeated on `EINTR`; may write less than asked.
pub fn write(fd: impl AsFd, bytes: &[u8]) -> Result<usize, Errno> {
    Ok(rustix::io::retry_on_intr(|| {
        rustix::io::write(fd.as_fd(), bytes)
    })?)
}

/// The same of a word that a file of the kernel takes whole or not at all, with an error that names the file.
pub fn write_word(fd: impl AsFd, word: &str) -> Result<()> {
    match write(&fd, word.as_bytes()) {
        Ok(_) => Ok(()),
        Err(errno) => Err(Error::new("write", format!("{}, {word:?}", show(fd)), errno)),
    }
}

/// writev(2), repeated on `EINTR`; may write less than asked.
pub fn write_vectored(fd: impl AsFd, slices: &[std::io::IoSlice<'_>]) -> Result<usize, Errno> {
    Ok(rustix::io::retry_on_intr(|| {
        rustix::io::writev(fd.as_fd(), slices)
    })?)
}

/// An empty memfd that can be written and sealed, and not executed where the kernel can promise that.
pub fn memfd(name: &CStr) -> Result<OwnedFd> {
    memfd_with(name, MFD_NOEXEC_SEAL)
}

/// A sealed memfd with these bytes: whoever gets it can trust that they never change.
pub fn sealed_memfd(name: &CStr, bytes: &[u8]) -> Result<OwnedFd> {
    let mut file = File::from(memfd(name)?);
    file.write_all(bytes)
        .map_err(|e| Error::from_io("write", format!("memfd {name:?}"), &e))?;
    rewind(&file)?;
    seal(&file)?;
    Ok(file.into())
}

/// A sealed memfd with the contents of `program`, to be executed: the file behind a process that enters a container
/// must be one that nobody can open for writing.
///
/// `EACCES` where `vm.memfd_noexec` forbids executable memfds.
pub fn sealed_program(name: &CStr, program: impl AsFd) -> Result<OwnedFd> {
    let program = program.as_fd();
    let file = File::from(memfd_with(name, MFD_EXEC)?);
    let mut offset = 0;
    loop {
        let sent = rustix::fs::sendfile(&file, program, Some(&mut offset), 1 << 30)
            .map_err(|e| Error::new("sendfile", format!("memfd {name:?}, {}", show(program)), e.into()))?;
        if sent == 0 {
            break;
        }
    }
    // Only the owner's execute bit matters to us, but a program that drops its uid must still be able to re-open it.
    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o555))
        .map_err(|e| Error::new("fchmod", format!("memfd {name:?}, 0555"), e.into()))?;
    seal(&file)?;
    Ok(file.into())
}

/// Whether the file is sealed against every change.
#[must_use]
pub fn is_sealed(fd: impl AsFd) -> bool {
    rustix::fs::fcntl_get_seals(fd.as_fd()).is_ok_and(|seals| seals.contains(IMMUTABLE))
}

/// Adds the seals after which nobody can change the file.
///
/// The kernel waits a good tenth of a second for whoever holds a page of the file, and then says `EBUSY`: that may be a
/// scanner of its own (DAMON, migration), so it is asked again. With a writable mapping it says so at once, each time.
pub fn seal(fd: impl AsFd) -> Result<()> {
    let fd = fd.as_fd();
    let mut attempt = 1;
    loop {
        match rustix::fs::fcntl_add_seals(fd, IMMUTABLE) {
            Err(rustix::io::Errno::BUSY) if attempt < SEAL_ATTEMPTS => attempt += 1,
            done => {
                return done.map_err(|e| Error::new("fcntl", format!("{}, F_ADD_SEALS", show(fd)), e.into()));
            }
        }
    }
}

/// Back to the first byte.
pub fn rewind(fd: impl AsFd) -> Result<()> {
    let fd = fd.as_fd();
    rustix::fs::seek(fd, rustix::fs::SeekFrom::Start(0))
        .map(drop)
        .map_err(|e| Error::new("lseek", format!("{}, 0", show(fd)), e.into()))
}

/// `/proc/self/fd/N`, for the calls that take a path only. Valid in this process and while `fd` is open.
#[must_use]
pub fn proc_path(fd: impl AsFd) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).unwrap_or_default()
}

/// The descriptor's number, for messages and for paths below `/proc`; it owns nothing.
#[must_use]
pub fn number(fd: impl AsFd) -> i32 {
    fd.as_fd().as_raw_fd()
}

/// The descriptor with what it refers to, for messages alone: `3</run/x>`.
#[must_use]
pub fn show(fd: impl AsFd) -> String {
    let number = fd.as_fd().as_raw_fd();
    if number == libc::AT_FDCWD {
        return "AT_FDCWD".into();
    }
    match std::fs::read_link(format!("/proc/self/fd/{number}")) {
        Ok(target) => format!("{number}<{}>", target.display()),
        Err(_) => number.to_string(),
    }
}

fn memfd_with(name: &CStr, exec: u32) -> Result<OwnedFd> {
    let base = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let create = |flags| rustix::fs::memfd_create(name, flags);
    match create(base | MemfdFlags::from_bits_retain(exec)) {
        // Before 6.3 the two flags do not exist, and every memfd is executable.
        Err(rustix::io::Errno::INVAL) => create(base),
        other => other,
    }
    .map_err(|e| Error::new("memfd_create", format!("{name:?}"), e.into()))
}

fn close_range(first: i32, last: i32, flags: u32) -> Result<()> {
    // SAFETY: takes numbers only; closing what others own is the caller's declared intention (see the callers' docs).
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if done < 0 {
        return Err(Error::last("close_range", format!("{first}, {last}, {flags:#x}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn what_is_spliced_arrives_once_and_whole() {
        use std::io::{Read as _, Write as _};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut here = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (there, _) = listener.accept().unwrap();
        there.set_nonblocking(true).unwrap();
        let (read, write) = pipe().unwrap();
        assert_eq!(splice(&there, &write, 100), Err(Errno::EAGAIN));
        // more than the pipe has room for, so in several turns
        let much: Vec<u8> = (0..30_000u32).flat_map(u32::to_be_bytes).collect();
        here.write_all(&much).unwrap();
        let mut left = much.len();
        while left > 0 {
            let mut moved = splice(&there, &write, left).unwrap();
            left -= moved;
            while moved > 0 {
                moved -= splice(&read, &there, moved).unwrap();
            }
        }
        let mut bytes = vec![0; much.len()];
        here.read_exact(&mut bytes).unwrap();
        assert!(bytes == much);
        here.write_all(b"ahoy").unwrap();
        assert_eq!(splice(&there, &write, 3), Ok(3));
        assert_eq!(splice(&read, &there, 100), Ok(3));
        assert_eq!(splice(&there, &write, 100), Ok(1));
        assert_eq!(splice(&read, &there, 100), Ok(1));
        // an empty pipe whose write end is open
        assert_eq!(splice(&read, &there, 100), Err(Errno::EAGAIN));
        here.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(splice(&there, &write, 100), Ok(0));
        drop(there);
        let mut bytes = String::new();
        here.read_to_string(&mut bytes).unwrap();
        assert_eq!(bytes, "ahoy");
    }

    #[test]
    fn a_sealed_memfd_cannot_be_changed() {
        let fd = sealed_memfd(c"test", b"abc").unwrap();
        assert!(is_sealed(&fd));
        assert_eq!(write(&fd, b"x"), Err(Errno::EPERM));
        let mut text = String::new();
        File::from(fd).read_to_string(&mut text).unwrap();
        assert_eq!(text, "abc");
    }

    #[test]
    fn pages_that_are_held_for_a_moment_are_waited_for() {
        let file = memfd_with(c"held", 0).unwrap();
        write(&file, &[1; 4096]).unwrap();
        // The pipe holds the page itself until it is read.
        let (reader, writer) = pipe().unwrap();
        rustix::fs::sendfile(&writer, &file, Some(&mut 0), 4096).unwrap();
        let refused = rustix::fs::fcntl_add_seals(&file, IMMUTABLE);
        assert_eq!(refused, Err(rustix::io::Errno::BUSY), "nothing holds it");
        let other = std::thread::spawn(move || drop(File::from(reader).read_exact(&mut [0; 4096])));
        seal(&file).unwrap();
        other.join().unwrap();
        assert!(is_sealed(&file));
    }

    #[test]
    fn a_sealed_program_runs() {
        let shell = File::open("/bin/true").unwrap();
        let program = sealed_program(c"true", &shell).unwrap();
        assert!(is_sealed(&program));
        let path = format!("/proc/{}/fd/{}", std::process::id(), number(&program));
        let mut command = std::process::Command::new(path);
        // busybox asks by which name it was called.
        std::os::unix::process::CommandExt::arg0(&mut command, "true");
        assert!(command.status().unwrap().success());
    }

    #[test]
    fn messages_name_the_file() {
        let fd = File::open("/dev/null").unwrap();
        assert_eq!(show(&fd), format!("{}</dev/null>", number(&fd)));
    }
}
