//! Clocks, and the offsets of a time namespace.

use crate::Result;
use crate::procfs::Procfs;

/// Offsets that a time namespace adds to the clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    /// Of `CLOCK_MONOTONIC`: seconds and nanoseconds.
    pub monotonic: Option<(i64, u32)>,
    /// Of `CLOCK_BOOTTIME`: seconds and nanoseconds.
    pub boottime: Option<(i64, u32)>,
}

/// Writes the offsets for the children of a process that has unshared its time namespace, before it has any.
pub fn write_offsets(proc: &Procfs, pid: i32, offsets: Offsets) -> Result<()> {
    let mut text = String::new();
    for (clock, offset) in [("monotonic", offsets.monotonic), ("boottime", offsets.boottime)] {
        if let Some((seconds, nanoseconds)) = offset {
            text.push_str(&format!("{clock} {seconds} {nanoseconds}\n"));
        }
    }
    if text.is_empty() {
        return Ok(());
    }
    proc.write(format!("{pid}/timens_offsets"), text.as_bytes())
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[must_use]
pub fn monotonic_ns() -> u64 {
    now(libc::CLOCK_MONOTONIC)
}

/// Nanoseconds of `CLOCK_BOOTTIME`, which goes on during suspend.
#[must_use]
pub fn boottime_ns() -> u64 {
    now(libc::CLOCK_BOOTTIME)
}

/// Nanoseconds since 1970 by the wall clock, which can jump.
#[must_use]
pub fn realtime_ns() -> u64 {
    now(libc::CLOCK_REALTIME)
}

/// By libc, which does without a vDSO: rustix panics where there is one that lacks a function (user-mode Linux).
fn now(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec, alive here. It cannot fail for a clock that every kernel has.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    // Neither is negative on a host whose clock stands after 1970; a clock before that reads as 0.
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}
