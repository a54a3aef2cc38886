//! Scheduling of the calling thread: policy, affinity, io priority, memory policy.

use crate::{Error, Result};

/// The arguments of `sched_setattr`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SchedAttr {
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// Nice value of SCHED_OTHER and SCHED_BATCH.
    pub nice: i32,
    /// Static priority of SCHED_FIFO and SCHED_RR.
    pub priority: u32,
    /// SCHED_DEADLINE, nanoseconds.
    pub runtime: u64,
    /// SCHED_DEADLINE, nanoseconds.
    pub deadline: u64,
    /// SCHED_DEADLINE, nanoseconds.
    pub period: u64,
}

/// Sets policy and parameters of the calling thread.
pub fn set_attr(attr: &SchedAttr) -> Result<()> {
    let raw = Raw {
        size: 48,
        policy: attr.policy,
        flags: attr.flags,
        nice: attr.nice,
        priority: attr.priority,
        times: [attr.runtime, attr.deadline, attr.period],
    };
    // SAFETY: the structure says its own size, and the kernel reads no more than that.
    let ret = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const raw, 0) };
    if ret == 0 {
        Ok(())
    } else {
        Err(Error::last("sched_setattr", format!("{attr:?}")))
    }
}

/// A set of processors of any size.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CpuMask(Vec<u64>);

impl CpuMask {
    /// Every processor that a kernel can have (8192 is its compile-time limit).
    #[must_use]
    pub fn all() -> CpuMask {
        CpuMask(vec![u64::MAX; 8192 / 64])
    }

    /// Adds one processor; `false` where the number is beyond any kernel's limit.
    pub fn insert(&mut self, cpu: usize) -> bool {
        if cpu >= 8192 {
            return false;
        }
        if self.0.len() <= cpu / 64 {
            self.0.resize(cpu / 64 + 1, 0);
        }
        if let Some(word) = self.0.get_mut(cpu / 64) {
            *word |= 1 << (cpu % 64);
        }
        true
    }
}

/// Lets process or thread `pid` (0: the caller) run on these processors.
pub fn set_affinity(pid: u32, mask: &CpuMask) -> Result<()> {
    // SAFETY: the kernel reads as many bytes as said from a live slice.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            pid,
            size_of_val(&*mask.0),
            mask.0.as_ptr(),
        )
    };
    if ret == 0 {
        Ok(())
    } else {
        Err(Error::last("sched_setaffinity", pid.to_string()))
    }
}

/// The number of processors that the calling thread may run on.
pub fn affinity_count() -> Result<usize> {
    let mut mask = [0u64; 8192 / 64];
    // SAFETY: the kernel writes at most as many bytes as the array has.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            0,
            size_of_val(&mask),
            mask.as_mut_ptr(),
        )
    };
    if ret < 0 {
        return Err(Error::last("sched_getaffinity", "0"));
    }
    Ok(mask.iter().map(|word| word.count_ones() as usize).sum())
}

/// Sets the io priority of the caller's process group: class in the bits from 13 up, level (0 to 7) below.
pub fn set_io_priority(priority: u16) -> Result<()> {
    const WHO_PROCESS_GROUP: i32 = 2;
    // SAFETY: takes numbers alone.
    let ret = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS_GROUP, 0, i32::from(priority)) };
    if ret == 0 {
        Ok(())
    } else {
        Err(Error::last("ioprio_set", format!("{priority:#x}")))
    }
}

/// `struct sched_attr`, first version.
#[repr(C)]
struct Raw {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    times: [u64; 3],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn affinity_is_set_and_reset() {
        std::thread::spawn(|| {
            let before = affinity_count().unwrap();
            let mut one = CpuMask::default();
            assert!(one.insert(0));
            assert!(!one.insert(8192));
            set_affinity(0, &one).unwrap();
            assert_eq!(affinity_count().unwrap(), 1);
            set_affinity(0, &CpuMask::all()).unwrap();
            assert!(affinity_count().unwrap() >= before);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn the_scheduler_takes_batch() {
        std::thread::spawn(|| {
            set_attr(&SchedAttr {
                policy: 3,
                nice: 1,
                ..SchedAttr::default()
            })
            .unwrap();
        })
        .join()
        .unwrap();
    }
}
