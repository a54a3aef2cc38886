//! One model of what a group uses, whatever the hierarchy.

/// What a group uses; a part is none where its controller is not there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// CPU time.
    pub cpu: Option<Cpu>,
    /// Memory.
    pub memory: Option<Memory>,
    /// Processes and threads.
    pub pids: Option<Pids>,
    /// Block input and output, one a device.
    pub io: Vec<Io>,
}

/// CPU time of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// Total.
    pub usage_nanoseconds: u64,
    /// In user mode.
    pub user_nanoseconds: u64,
    /// In the kernel.
    pub system_nanoseconds: u64,
    /// What a quota did; zero without one.
    pub throttling: Throttling,
}

/// What a CPU quota did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Throttling {
    /// Periods that passed.
    pub periods: u64,
    /// Periods in which it was throttled.
    pub throttled_periods: u64,
    /// How long, over all.
    pub throttled_nanoseconds: u64,
}

/// Memory of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Charged bytes, page cache included.
    pub usage_bytes: u64,
    /// The limit; none without one.
    pub limit_bytes: Option<u64>,
    /// Anonymous memory.
    pub anonymous_bytes: u64,
    /// Page cache.
    pub file_bytes: u64,
    /// Page cache mapped by a process.
    pub mapped_file_bytes: u64,
    /// File pages that would be reclaimed first.
    pub inactive_file_bytes: u64,
    /// Memory of the kernel on behalf of the group.
    pub kernel_bytes: u64,
    /// Swapped out; none where swap is not accounted.
    pub swap_usage_bytes: Option<u64>,
    /// The limit of swap; none without one.
    pub swap_limit_bytes: Option<u64>,
    /// Minor and major faults.
    pub page_faults: u64,
    /// Faults that read from a disk.
    pub major_page_faults: u64,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
}

impl Memory {
    /// Usage without what the kernel could drop at once: what schedulers and people look at.
    #[must_use]
    pub fn working_set_bytes(&self) -> u64 {
        self.usage_bytes.saturating_sub(self.inactive_file_bytes)
    }

    /// What is left of the limit; none without one.
    #[must_use]
    pub fn available_bytes(&self) -> Option<u64> {
        self.limit_bytes
            .map(|limit| limit.saturating_sub(self.working_set_bytes()))
    }
}

/// Processes and threads of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pids {
    /// How many there are.
    pub current: u64,
    /// How many there may be; none without a limit.
    pub limit: Option<u64>,
}

/// Input and output on one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Io {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// A number or `max`; v1's `no limit` is a number just below 2^63, rounded down to a page.
pub(crate) fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|limit| *limit < (1 << 62))
}
