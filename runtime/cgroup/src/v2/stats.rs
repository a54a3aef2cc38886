//! Statistics of the unified hierarchy, read through descriptors that stay open.

use crate::dir::{CachedFile, Dir, keyed};
use crate::stats::limit;
use crate::{Cpu, Io, Memory, Pids, Result, Stats, Throttling};

/// The files, opened at the first look.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    files: Option<Files>,
}

#[derive(Debug)]
struct Files {
    cpu_stat: Option<CachedFile>,
    memory_current: Option<CachedFile>,
    memory_max: Option<CachedFile>,
    memory_stat: Option<CachedFile>,
    memory_events: Option<CachedFile>,
    swap_current: Option<CachedFile>,
    swap_max: Option<CachedFile>,
    pids_current: Option<CachedFile>,
    pids_max: Option<CachedFile>,
    io_stat: Option<CachedFile>,
}

impl Readers {
    pub(crate) fn read(&mut self, dir: &Dir) -> Result<Stats> {
        if self.files.is_none() {
            self.files = Some(Files::open(dir)?);
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
    fn open(dir: &Dir) -> Result<Files> {
        Ok(Files {
            cpu_stat: dir.cache("cpu.stat")?,
            memory_current: dir.cache("memory.current")?,
            memory_max: dir.cache("memory.max")?,
            memory_stat: dir.cache("memory.stat")?,
            memory_events: dir.cache("memory.events")?,
            swap_current: dir.cache("memory.swap.current")?,
            swap_max: dir.cache("memory.swap.max")?,
            pids_current: dir.cache("pids.current")?,
            pids_max: dir.cache("pids.max")?,
            io_stat: dir.cache("io.stat")?,
        })
    }

    fn cpu(&self) -> Result<Option<Cpu>> {
        let Some(text) = text(&self.cpu_stat)? else {
            return Ok(None);
        };
        let nanoseconds = |key| keyed(&text, key).unwrap_or(0).saturating_mul(1000);
        Ok(Some(Cpu {
            usage_nanoseconds: nanoseconds("usage_usec"),
            user_nanoseconds: nanoseconds("user_usec"),
            system_nanoseconds: nanoseconds("system_usec"),
            throttling: Throttling {
                periods: keyed(&text, "nr_periods").unwrap_or(0),
                throttled_periods: keyed(&text, "nr_throttled").unwrap_or(0),
                throttled_nanoseconds: nanoseconds("throttled_usec"),
            },
        }))
    }

    fn memory(&self) -> Result<Option<Memory>> {
        let Some(usage) = text(&self.memory_current)? else {
            return Ok(None);
        };
        let stat = text(&self.memory_stat)?.unwrap_or_default();
        let of = |key| keyed(&stat, key).unwrap_or(0);
        // `kernel` is the sum since 5.18; before it there are only its parts.
        let kernel = keyed(&stat, "kernel").unwrap_or_else(|| {
            ["slab", "kernel_stack", "pagetables", "percpu", "sock"]
                .into_iter()
                .map(of)
                .sum()
        });
        Ok(Some(Memory {
            usage_bytes: usage.trim().parse().unwrap_or(0),
            limit_bytes: text(&self.memory_max)?.and_then(|text| limit(&text)),
            anonymous_bytes: of("anon"),
            file_bytes: of("file"),
            mapped_file_bytes: of("file_mapped"),
            inactive_file_bytes: of("inactive_file"),
            kernel_bytes: kernel,
            swap_usage_bytes: text(&self.swap_current)?.and_then(|text| text.trim().parse().ok()),
            swap_limit_bytes: text(&self.swap_max)?.and_then(|text| limit(&text)),
            page_faults: of("pgfault"),
            major_page_faults: of("pgmajfault"),
            oom_kills: text(&self.memory_events)?
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
        Ok(text(&self.io_stat)?.map(|text| io(&text)).unwrap_or_default())
    }
}

fn text(file: &Option<CachedFile>) -> Result<Option<String>> {
    file.as_ref().map(CachedFile::read).transpose()
}

/// Lines like `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
fn io(text: &str) -> Vec<Io> {
    let device = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut io = Io {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            ..Io::default()
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let value = value.parse().ok()?;
            match key {
                "rbytes" => io.read_bytes = value,
                "wbytes" => io.write_bytes = value,
                "rios" => io.reads = value,
                "wios" => io.writes = value,
                _ => {}
            }
        }
        Some(io)
    };
    text.lines().filter_map(device).collect()
}
