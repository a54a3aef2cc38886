//! Pseudo-terminals and the controlling terminal.

use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::sys::termios::{self, OutputFlags, SetArg, Termios};
use rustix::pty::OpenptFlags;

use crate::error::{Error, Result};
use crate::fd::{number, show};

/// `TIOCGPTPEER`, which rustix hides from some libcs.
const TIOCGPTPEER: u32 = 0x5441;

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

/// The settings of a terminal, to be put back.
#[derive(Clone, Debug)]
pub struct Settings(Termios);

/// Opens the master of a new pair of the calling process's `/dev/ptmx`, its slave unlocked.
///
/// In a container: of the container's own devpts, reached by a descriptor; see [`unlock`].
pub fn open_master() -> Result<OwnedFd> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .map_err(|e| Error::new("posix_openpt", "O_RDWR|O_NOCTTY", e.into()))?;
    unlock(&master)?;
    Ok(master)
}

/// Unlocks the slave of a master (an open `ptmx`).
pub fn unlock(master: impl AsFd) -> Result<()> {
    let master = master.as_fd();
    rustix::pty::unlockpt(master)
        .map_err(|e| Error::new("ioctl", format!("{}, TIOCSPTLCK", show(master)), e.into()))
}

/// Opens the slave through its master (`TIOCGPTPEER`): no path is followed, so nobody can put another file there.
pub fn open_slave(master: impl AsFd) -> Result<OwnedFd> {
    let master = master.as_fd();
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the request takes an integer and answers a descriptor.
    let slave = unsafe { libc::ioctl(master.as_raw_fd(), TIOCGPTPEER as libc::Ioctl, flags) };
    if slave < 0 {
        return Err(Error::last("ioctl", format!("{}, TIOCGPTPEER", show(master))));
    }
    // SAFETY: the kernel has just installed this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(slave) })
}

/// The slave's number N, as in `/dev/pts/N`.
pub fn slave_number(master: impl AsFd) -> Result<u32> {
    let master = master.as_fd();
    let mut number: libc::c_uint = 0;
    // SAFETY: `number` is the live unsigned int that the request fills.
    let done = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) };
    if done < 0 {
        return Err(Error::last("ioctl", format!("{}, TIOCGPTN", show(master))));
    }
    Ok(number)
}

/// Sets the size; the foreground process group gets SIGWINCH if it changed.
pub fn set_size(terminal: impl AsFd, size: Size) -> Result<()> {
    let terminal = terminal.as_fd();
    let raw = libc::winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: `raw` is a live winsize that the kernel reads.
    let done = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const raw) };
    if done < 0 {
        return Err(Error::last(
            "ioctl",
            format!("{}, TIOCSWINSZ, {size:?}", show(terminal)),
        ));
    }
    Ok(())
}

/// The size.
pub fn size(terminal: impl AsFd) -> Result<Size> {
    let terminal = terminal.as_fd();
    let mut raw = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: `raw` is a live winsize that the kernel fills.
    let done = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut raw) };
    if done < 0 {
        return Err(Error::last("ioctl", format!("{}, TIOCGWINSZ", show(terminal))));
    }
    Ok(Size {
        rows: raw.ws_row,
        columns: raw.ws_col,
    })
}

/// Whether the descriptor is a terminal.
#[must_use]
pub fn is_terminal(fd: impl AsFd) -> bool {
    use std::io::IsTerminal as _;
    fd.as_fd().is_terminal()
}

/// Makes us the leader of a new session and process group, without a controlling terminal.
pub fn new_session() -> Result<()> {
    rustix::process::setsid()
        .map(drop)
        .map_err(|e| Error::new("setsid", "", e.into()))
}

/// Makes the terminal the controlling one of our session, which must have none.
pub fn set_controlling(terminal: impl AsFd) -> Result<()> {
    let terminal = terminal.as_fd();
    // SAFETY: the request takes an integer, 0: steal from nobody.
    let done = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) };
    if done < 0 {
        return Err(Error::last(
            "ioctl",
            format!("{}, TIOCSCTTY, 0", number(terminal)),
        ));
    }
    Ok(())
}

/// Puts our own terminal into raw mode (every key goes to the container); the settings before.
pub fn set_raw(terminal: impl AsFd) -> Result<Settings> {
    let terminal = terminal.as_fd();
    let old = get(&terminal)?;
    let mut raw = old.clone();
    termios::cfmakeraw(&mut raw);
    put(&terminal, &raw)?;
    Ok(Settings(old))
}

/// Puts settings back.
pub fn restore(terminal: impl AsFd, settings: &Settings) -> Result<()> {
    put(&terminal.as_fd(), &settings.0)
}

/// Stops the line discipline from turning NL into CR NL: output is logged and forwarded as written.
pub fn clear_newline_conversion(terminal: impl AsFd) -> Result<()> {
    let terminal = terminal.as_fd();
    let mut settings = get(&terminal)?;
    settings.output_flags.remove(OutputFlags::ONLCR);
    put(&terminal, &settings)
}

fn get(terminal: &impl AsFd) -> Result<Termios> {
    termios::tcgetattr(terminal).map_err(|e| Error::new("tcgetattr", show(terminal), e.into()))
}

fn put(terminal: &impl AsFd, settings: &Termios) -> Result<()> {
    termios::tcsetattr(terminal, SetArg::TCSANOW, settings)
        .map_err(|e| Error::new("tcsetattr", format!("{}, TCSANOW", show(terminal)), e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_to_the_slave_comes_out_of_the_master() {
        let master = open_master().unwrap();
        let slave = open_slave(&master).unwrap();
        assert!(is_terminal(&slave));
        assert!(show(&slave).ends_with(&format!("/{}>", slave_number(&master).unwrap())));
        set_size(
            &master,
            Size {
                rows: 10,
                columns: 20,
            },
        )
        .unwrap();
        assert_eq!(
            size(&slave).unwrap(),
            Size {
                rows: 10,
                columns: 20
            }
        );
        clear_newline_conversion(&slave).unwrap();
        crate::fd::write(&slave, b"a\n").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(crate::fd::read(&master, &mut buffer), Ok(2));
        assert_eq!(&buffer[..2], b"a\n");
    }
}
