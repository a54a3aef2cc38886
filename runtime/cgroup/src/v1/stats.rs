//! Statistics on v1, read through descriptors that stay open.

use std::collections::BTreeMap;

use crate::dir::{CachedFile, Dir, keyed};
use crate::stats::limit;
use crate::{Cpu, Io, Memory, Pids, Result, Stats, Throttling};

/// `USER_HZ`: the unit of `cpuacct.stat`, 100 on every architecture that we run on.
const NANOSECONDS_A_TICK: u64 = 10_000_000;

/// The files, opened at the first look.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    files: Option<Files>,
}

#[derive(Debug)]
struct Files {
    cpu_usage: Option<CachedFile>,
    cpu_split: Option<CachedFile>,
    cpu_throttling: Option<CachedFile>,
    memory_usage: Option<CachedFile>,
    memory_limit: Option<CachedFile>,
    memory_stat: Option<CachedFile>,
    memory_kernel: Option<CachedFile>,
    memory_oom: Option<CachedFile>,
    swap_limit: Option<CachedFile>,
    pids_current: Option<CachedFile>,
    pids_max: Option<CachedFile>,
    io_bytes: Option<CachedFile>,
    io_counts: Option<CachedFile>,
}

impl Readers {
    pub(crate) fn read<'a>(&mut self, leaf: &dyn Fn(&str) -> Option<&'a Dir>) -> Result<Stats> {
        if self.files.is_none() {
            self.files = Some(Files::open(leaf)?);
        }
        let Some(files) = &self.files else {
            return Ok(Stats::default());
        };
        Ok(Stats {
            cpu: files.cpu()?,
            memory: files.memory()?,
            pids: files.pids()?,
            io: files.io()?,
        })
    }
}

impl Files {
    fn open<'a>(leaf: &dyn Fn(&str) -> Option<&'a Dir>) -> Result<Files> {
        let open = |controller: &str, file: &str| match leaf(controller) {
            Some(dir) => dir.cache(file),
            None => Ok(None),
        };
        Ok(Files {
            cpu_usage: open("cpuacct", "cpuacct.usage")?,
            cpu_split: open("cpuacct", "cpuacct.stat")?,
            cpu_throttling: open("cpu", "cpu.stat")?,
            memory_usage: open("memory", "memory.usage_in_bytes")?,
            memory_limit: open("memory", "memory.limit_in_bytes")?,
            memory_stat: open("memory", "memory.stat")?,
            memory_kernel: open("memory", "memory.kmem.usage_in_bytes")?,
            memory_oom: open("memory", "memory.oom_control")?,
            swap_limit: open("memory", "memory.memsw.limit_in_bytes")?,
            pids_current: open("pids", "pids.current")?,
            pids_max: open("pids", "pids.max")?,
            io_bytes: open("blkio", "blkio.throttle.io_service_bytes_recursive")?,
            io_counts: open("blkio", "blkio.throttle.io_serviced_recursive")?,
        })
    }

    fn cpu(&self) -> Result<Option<Cpu>> {
        let Some(usage) = text(&self.cpu_usage)? else {
            return Ok(None);
        };
        let split = text(&self.cpu_split)?.unwrap_or_default();
        let ticks = |key| keyed(&split, key).unwrap_or(0).saturating_mul(NANOSECONDS_A_TICK);
        let throttling = text(&self.cpu_throttling)?.unwrap_or_default();
        let of = |key| keyed(&throttling, key).unwrap_or(0);
        Ok(Some(Cpu {
            usage_nanoseconds: usage.trim().parse().unwrap_or(0),
            user_nanoseconds: ticks("user"),
            system_nanoseconds: ticks("system"),
            throttling: Throttling {
                periods: of("nr_periods"),
                throttled_periods: of("nr_throttled"),
                throttled_nanoseconds: of("throttled_time"),
            },
        }))
    }

    fn memory(&self) -> Result<Option<Memory>> {
        let Some(usage) = text(&self.memory_usage)? else {
            return Ok(None);
        };
        let stat = text(&self.memory_stat)?.unwrap_or_default();
        // With what is below the group.
        let of = |key| keyed(&stat, key).unwrap_or(0);
        let limit_bytes = text(&self.memory_limit)?.and_then(|text| limit(&text));
        let both = text(&self.swap_limit)?.and_then(|text| limit(&text));
        Ok(Some(Memory {
            usage_bytes: usage.trim().parse().unwrap_or(0),
            limit_bytes,
            anonymous_bytes: of("total_rss"),
            file_bytes: of("total_cache"),
            mapped_file_bytes: of("total_mapped_file"),
            inactive_file_bytes: of("total_inactive_file"),
            kernel_bytes: text(&self.memory_kernel)?
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0),
            swap_usage_bytes: keyed(&stat, "total_swap"),
            swap_limit_bytes: both.map(|both| both.saturating_sub(limit_bytes.unwrap_or(0))),
            page_faults: of("total_pgfault"),
            major_page_faults: of("total_pgmajfault"),
            oom_kills: text(&self.memory_oom)?
                .and_then(|text| keyed(&text, "oom_kill"))
                .unwrap_or(0),
        }))
    }

    fn pids(&self) -> Result<Option<Pids>> {
        let Some(current) = text(&self.pids_current)? else {
            return Ok(None);
        };
        Ok(Some(Pids {
            current: current.trim().parse().unwrap_or(0),
            limit: text(&self.pids_max)?.and_then(|text| limit(&text)),
        }))
    }

    fn io(&self) -> Result<Vec<Io>> {
        let bytes = text(&self.io_bytes)?.unwrap_or_default();
        let counts = text(&self.io_counts)?.unwrap_or_default();
        Ok(io(&bytes, &counts))
    }
}

fn text(file: &Option<CachedFile>) -> Result<Option<String>> {
    file.as_ref().map(CachedFile::read).transpose()
}

/// Lines like `254:0 Read 4096`.
fn io(bytes: &str, counts: &str) -> Vec<Io> {
    let mut devices: BTreeMap<(u32, u32), Io> = BTreeMap::new();
    for (text, counted) in [(bytes, false), (counts, true)] {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let numbers = words.next().and_then(|word| word.split_once(':'));
            let (Some((major, minor)), Some(what), Some(Ok(value))) =
                (numbers, words.next(), words.next().map(str::parse::<u64>))
            else {
                continue;
            };
            let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else {
                continue;
            };
            let io = devices.entry((major, minor)).or_insert(Io {
                major,
                minor,
                ..Io::default()
            });
            match (what, counted) {
                ("Read", false) => io.read_bytes = value,
                ("Write", false) => io.write_bytes = value,
                ("Read", true) => io.reads = value,
                ("Write", true) => io.writes = value,
                _ => {}
            }
        }
    }
    devices.into_values().collect()
}
