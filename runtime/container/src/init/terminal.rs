//! The pseudo-terminal of a process, out of the container's own devpts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coracle_kernel::path::{self, Kind, OFlags, Root};
use coracle_kernel::{fd, tty};

use super::error::{self, At, Failure, Step};

/// `DEVPTS_SUPER_MAGIC`.
const DEVPTS_MAGIC: u64 = 0x1cd1;
/// Major and minor number of `ptmx`.
const PTMX: (u32, u32) = (5, 2);

/// Both ends of a terminal.
#[derive(Debug)]
pub(super) struct Terminal {
    master: OwnedFd,
    /// The end that the process gets.
    pub(super) slave: OwnedFd,
}

impl Terminal {
    /// Makes a new terminal of the devpts at `dev/pts` below `root`, which is looked at before it is believed.
    pub(super) fn open(root: BorrowedFd<'_>, size: Option<(u16, u16)>) -> Result<Terminal, Failure> {
        let place = Root::new(&root).open_path("dev/pts/ptmx").at(Step::Console)?;
        let seen = path::stat(&place).at(Step::Console)?;
        let magic = path::filesystem_magic(&place).at(Step::Console)?;
        if seen.kind != Kind::CharDevice || seen.rdev != PTMX || magic != DEVPTS_MAGIC {
            let text = "a terminal needs a devpts mounted at /dev/pts";
            return Err(Failure::said(Step::Console, error::Kind::Refused, text));
        }
        let master = path::reopen(&place, OFlags::RDWR | OFlags::NOCTTY).at(Step::Console)?;
        tty::unlock(&master).at(Step::Console)?;
        let slave = tty::open_slave(&master).at(Step::Console)?;
        if let Some((rows, columns)) = size {
            tty::set_size(&slave, tty::Size { rows, columns }).at(Step::Console)?;
        }
        Ok(Terminal { master, slave })
    }

    /// The end that the caller gets.
    pub(super) fn master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    /// Makes it the controlling terminal of our session; what becomes standard input, output and error.
    pub(super) fn attach(self) -> Result<[Option<OwnedFd>; 3], Failure> {
        tty::set_controlling(&self.slave).at(Step::Console)?;
        let copy = || fd::dup(&self.slave).at(Step::Console).map(Some);
        Ok([copy()?, copy()?, copy()?])
    }
}
