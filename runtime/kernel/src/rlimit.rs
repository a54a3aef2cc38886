//! Resource limits of a process.

use std::sync::OnceLock;

use crate::{Errno, Error, Result};

/// A kind of limit, `RLIMIT_*`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resource(u32);

/// No limit.
pub const INFINITY: u64 = u64::MAX;

/// The names that configurations use; the numbers are those of every architecture that Coracle builds for.
const NAMES: [(&str, u32); 16] = [
    ("RLIMIT_CPU", 0),
    ("RLIMIT_FSIZE", 1),
    ("RLIMIT_DATA", 2),
    ("RLIMIT_STACK", 3),
    ("RLIMIT_CORE", 4),
    ("RLIMIT_RSS", 5),
    ("RLIMIT_NPROC", 6),
    ("RLIMIT_NOFILE", 7),
    ("RLIMIT_MEMLOCK", 8),
    ("RLIMIT_AS", 9),
    ("RLIMIT_LOCKS", 10),
    ("RLIMIT_SIGPENDING", 11),
    ("RLIMIT_MSGQUEUE", 12),
    ("RLIMIT_NICE", 13),
    ("RLIMIT_RTPRIO", 14),
    ("RLIMIT_RTTIME", 15),
];

impl Resource {
    /// Open descriptors.
    pub const NOFILE: Resource = Resource(7);

    /// The resource of a name, `RLIMIT_NOFILE`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Resource> {
        NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, number)| Resource(*number))
    }

    /// The resource of a number that a checked configuration holds.
    #[must_use]
    pub const fn from_number(number: u32) -> Resource {
        Resource(number)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        NAMES
            .iter()
            .find(|(_, number)| *number == self.0)
            .map_or("RLIMIT_?", |(name, _)| name)
    }
}

/// Sets soft and hard limit of process `pid` (0: the caller).
pub fn set(pid: u32, resource: Resource, soft: u64, hard: u64) -> Result<()> {
    let limits = [soft, hard];
    // SAFETY: the kernel reads a `rlimit64`, two words, from a live local, and writes nothing.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource.0,
            limits.as_ptr(),
            std::ptr::null_mut::<u64>(),
        )
    };
    if ret == 0 {
        return Ok(());
    }
    Err(Error::last(
        "prlimit64",
        format!("{pid}, {}, {soft}, {hard}", resource.name()),
    ))
}

/// The soft and hard limit of process `pid` (0: the caller).
pub fn get(pid: u32, resource: Resource) -> Result<(u64, u64)> {
    let mut limits = [0u64; 2];
    // SAFETY: the kernel writes a `rlimit64`, two words, into a live local, and reads nothing.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource.0,
            std::ptr::null::<u64>(),
            limits.as_mut_ptr(),
        )
    };
    if ret == 0 {
        Ok((limits[0], limits[1]))
    } else {
        Err(Error::last("prlimit64", resource.name()))
    }
}

/// The soft limit of open descriptors that this process had before it raised its own.
static BEFORE: OnceLock<u64> = OnceLock::new();

/// Raises the soft limit of open descriptors to the hard one, for this process alone: programs that
/// [`Spawn`](crate::exec::Spawn) starts begin with the one that there was. Those that use select(2) break beyond 1024.
/// What a `fork` makes that executes nothing keeps the raised one.
pub fn raise_open_files() -> Result<(u64, u64)> {
    let (soft, hard) = get(0, Resource::NOFILE)?;
    let before = *BEFORE.get_or_init(|| soft);
    set(0, Resource::NOFILE, hard, hard)?;
    Ok((before, hard))
}

/// Gives a child the soft limit that there was; for the time between clone and execve.
pub(crate) fn give_back_open_files() -> Result<(), Errno> {
    let Some(before) = BEFORE.get() else {
        return Ok(());
    };
    let mut limits = [0u64; 2];
    // SAFETY: the kernel writes a `rlimit64`, two words, into a live local, and reads nothing.
    let got = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            Resource::NOFILE.0,
            std::ptr::null::<u64>(),
            limits.as_mut_ptr(),
        )
    };
    if got < 0 {
        return Err(Errno::last());
    }
    // Somebody may have lowered the hard one since.
    limits[0] = (*before).min(limits[1]);
    // SAFETY: the kernel reads a `rlimit64`, two words, from a live local, and writes nothing.
    let set = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            Resource::NOFILE.0,
            limits.as_ptr(),
            std::ptr::null_mut::<u64>(),
        )
    };
    if set < 0 { Err(Errno::last()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_back() {
        let core = Resource::from_name("RLIMIT_CORE").unwrap();
        let (_, hard) = get(0, core).unwrap();
        set(0, core, 0, hard).unwrap();
        assert_eq!(get(0, core).unwrap(), (0, hard));
        assert_eq!(core.name(), "RLIMIT_CORE");
        assert!(Resource::from_name("RLIMIT_FOO").is_none());
        assert_eq!(Resource::from_name("RLIMIT_NOFILE"), Some(Resource::NOFILE));
    }

    #[test]
    fn the_numbers_are_the_c_library_s() {
        for (name, number) in [
            ("RLIMIT_AS", libc::RLIMIT_AS),
            ("RLIMIT_NPROC", libc::RLIMIT_NPROC),
        ] {
            #[allow(clippy::unnecessary_cast, reason = "the type differs between C libraries")]
            let number = number as u32;
            assert_eq!(Resource::from_name(name), Some(Resource(number)));
        }
    }
}
