//! Capability sets of the calling thread.
//!
//! The C library spreads some credential calls to every thread; these are raw system calls and touch the caller alone.

use std::fmt;

use crate::{Errno, Error, Result};

/// One capability, by its number in the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Capability(u8);

/// A set of capabilities: bit n stands for capability n.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct CapSet(u64);

/// The three sets that `capset` writes together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sets {
    /// What permission checks look at.
    pub effective: CapSet,
    /// The limit of the effective set.
    pub permitted: CapSet,
    /// What survives an `execve` of a file whose inheritable set has it too.
    pub inheritable: CapSet,
}

/// The names in the order of their numbers.
const NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

impl Capability {
    /// `CAP_CHOWN`
    pub const CHOWN: Capability = Capability(0);
    /// `CAP_DAC_OVERRIDE`
    pub const DAC_OVERRIDE: Capability = Capability(1);
    /// `CAP_FOWNER`
    pub const FOWNER: Capability = Capability(3);
    /// `CAP_FSETID`
    pub const FSETID: Capability = Capability(4);
    /// `CAP_SETGID`
    pub const SETGID: Capability = Capability(6);
    /// `CAP_SETUID`
    pub const SETUID: Capability = Capability(7);
    /// `CAP_SETPCAP`
    pub const SETPCAP: Capability = Capability(8);
    /// `CAP_SYS_ADMIN`
    pub const SYS_ADMIN: Capability = Capability(21);
    /// `CAP_MKNOD`
    pub const MKNOD: Capability = Capability(27);
    /// `CAP_SETFCAP`
    pub const SETFCAP: Capability = Capability(31);

    /// The capability of a name as configurations write it, `CAP_KILL`; case is not significant.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Capability> {
        let number = NAMES.iter().position(|known| known.eq_ignore_ascii_case(name))?;
        u8::try_from(number).ok().map(Capability)
    }

    /// Every capability that has a name, in the order of the numbers.
    pub fn all() -> impl Iterator<Item = Capability> {
        (0u8..).take(NAMES.len()).map(Capability)
    }

    /// The name, `CAP_KILL`.
    #[must_use]
    pub fn name(self) -> &'static str {
        NAMES[usize::from(self.0)]
    }

    /// The number.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }
}

impl CapSet {
    /// No capability.
    pub const EMPTY: CapSet = CapSet(0);

    /// A set from its bits.
    #[must_use]
    pub const fn from_bits(bits: u64) -> CapSet {
        CapSet(bits)
    }

    /// Its bits.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Adds one.
    pub fn insert(&mut self, cap: Capability) {
        self.0 |= 1 << cap.0;
    }

    /// Whether it is in the set.
    #[must_use]
    pub fn contains(self, cap: Capability) -> bool {
        self.0 & (1 << cap.0) != 0
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// What is in both sets.
    #[must_use]
    pub fn and(self, other: CapSet) -> CapSet {
        CapSet(self.0 & other.0)
    }

    /// What is in this set and not in the other.
    #[must_use]
    pub fn without(self, other: CapSet) -> CapSet {
        CapSet(self.0 & !other.0)
    }

    /// The named capabilities of the set in the order of their numbers.
    pub fn iter(self) -> impl Iterator<Item = Capability> {
        Capability::all().filter(move |cap| self.contains(*cap))
    }
}

impl FromIterator<Capability> for CapSet {
    fn from_iter<I: IntoIterator<Item = Capability>>(iter: I) -> CapSet {
        let mut set = CapSet::EMPTY;
        for cap in iter {
            set.insert(cap);
        }
        set
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for CapSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The effective, permitted and inheritable sets of the calling thread.
pub fn get() -> Result<Sets> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: version 3 makes the kernel write exactly two `Data`, which the array holds; both pointers are live locals.
    let ret = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    if ret != 0 {
        return Err(Error::last("capget", ""));
    }
    let join = |low: u32, high: u32| CapSet(u64::from(low) | u64::from(high) << 32);
    Ok(Sets {
        effective: join(data[0].effective, data[1].effective),
        permitted: join(data[0].permitted, data[1].permitted),
        inheritable: join(data[0].inheritable, data[1].inheritable),
    })
}

/// Sets the effective, permitted and inheritable sets of the calling thread.
pub fn set(sets: &Sets) -> Result<()> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the low and the high word are what capset takes"
    )]
    let half = |shift: u32| Data {
        effective: (sets.effective.0 >> shift) as u32,
        permitted: (sets.permitted.0 >> shift) as u32,
        inheritable: (sets.inheritable.0 >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 makes the kernel read exactly two `Data`, which the array holds; both pointers are live locals.
    let ret = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    if ret == 0 {
        Ok(())
    } else {
        Err(Error::last("capset", format!("{sets:?}")))
    }
}

/// The capabilities that this kernel knows, read from the bounding set: those that may be kept or dropped.
///
/// The answer is `(known, bounding)`: a capability in the first and not in the second was dropped for good.
pub fn bounding() -> Result<(CapSet, CapSet)> {
    let (mut known, mut bounding) = (CapSet::EMPTY, CapSet::EMPTY);
    for number in 0..64 {
        match prctl(libc::PR_CAPBSET_READ, number, 0) {
            Ok(present) => {
                known.0 |= 1 << number;
                bounding.0 |= u64::from(present != 0) << number;
            }
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(Error::new("prctl", format!("PR_CAPBSET_READ, {number}"), errno)),
        }
    }
    Ok((known, bounding))
}

/// Drops every capability from the bounding set that is not in `keep`. Needs CAP_SETPCAP.
///
/// Goes by the kernel's own numbers, so that capabilities newer than this program are dropped too.
pub fn limit_bounding(keep: CapSet) -> Result<()> {
    for number in 0..64 {
        if keep.0 & (1 << number) != 0 {
            continue;
        }
        match prctl(libc::PR_CAPBSET_DROP, number, 0) {
            Ok(_) => {}
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(Error::new("prctl", format!("PR_CAPBSET_DROP, {number}"), errno)),
        }
    }
    Ok(())
}

/// Empties the ambient set.
pub fn clear_ambient() -> Result<()> {
    let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL as u64;
    prctl(libc::PR_CAP_AMBIENT, clear, 0)
        .map(drop)
        .map_err(|errno| Error::new("prctl", "PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL", errno))
}

/// Adds one capability to the ambient set; it must be permitted and inheritable.
pub fn raise_ambient(cap: Capability) -> Result<()> {
    let raise = libc::PR_CAP_AMBIENT_RAISE as u64;
    prctl(libc::PR_CAP_AMBIENT, raise, u64::from(cap.0))
        .map(drop)
        .map_err(|errno| {
            Error::new(
                "prctl",
                format!("PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, {cap}"),
                errno,
            )
        })
}

/// `_LINUX_CAPABILITY_VERSION_3`: two words a set.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn prctl(option: i32, arg2: u64, arg3: u64) -> Result<i32, Errno> {
    // SAFETY: the capability options of prctl take numbers alone, no pointers.
    let ret = unsafe { libc::prctl(option, arg2, arg3, 0u64, 0u64) };
    if ret < 0 { Err(Errno::last()) } else { Ok(ret) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_agree_both_ways() {
        for cap in Capability::all() {
            assert_eq!(Capability::from_name(cap.name()), Some(cap));
        }
        assert_eq!(
            Capability::from_name("cap_sys_admin"),
            Some(Capability::SYS_ADMIN)
        );
        assert_eq!(Capability::from_name("SYS_ADMIN"), None);
        assert_eq!(Capability::SETFCAP.name(), "CAP_SETFCAP");
        assert_eq!(Capability::MKNOD.name(), "CAP_MKNOD");
    }

    #[test]
    fn the_sets_read_are_those_of_proc_status() {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        let sets = get().unwrap();
        assert_eq!(sets.effective.bits(), field("CapEff:"));
        assert_eq!(sets.permitted.bits(), field("CapPrm:"));
        assert_eq!(sets.inheritable.bits(), field("CapInh:"));
        assert_eq!(bounding().unwrap().1.bits(), field("CapBnd:"));
    }

    #[test]
    fn setting_touches_the_calling_thread_alone() {
        let before = get().unwrap();
        std::thread::spawn(|| {
            set(&Sets::default()).unwrap();
            assert_eq!(get().unwrap(), Sets::default());
        })
        .join()
        .unwrap();
        assert_eq!(get().unwrap(), before);
    }
}
