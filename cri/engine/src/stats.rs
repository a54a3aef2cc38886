//! What running containers use: cgroup files read through held descriptors, at most once a second each; the size
//! of writable layers by a walk in the background. Each figure carries its own time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use coracle_proto::cri::{
    ContainerAttributes, ContainerStats, ContainerStatsFilter, CpuUsage, FilesystemIdentifier,
    FilesystemUsage, MemoryUsage, SwapUsage, UInt64Value,
};

use crate::container::{Hold, blocking};
use crate::core::Core;
use crate::error::Result;
use crate::ident::now_ns;
use crate::pod::PodHandle;
use crate::view::{ContainerView, has_labels};

/// How long a reading is good for.
const FRESH: Duration = Duration::from_secs(1);

/// Pause between two walks over the writable layers.
const WALK_PAUSE: Duration = Duration::from_secs(60);

/// The last reading of one container.
#[derive(Debug, Default)]
pub(crate) struct Cache(Mutex<Option<Reading>>);

#[derive(Debug, Clone)]
struct Reading {
    taken: Instant,
    at_ns: i64,
    stats: coracle_cgroup::Stats,
}

/// Sizes of writable layers by container id.
#[derive(Debug, Default)]
pub(crate) struct Usage(Mutex<BTreeMap<String, LayerUsage>>);

#[derive(Debug, Clone, Copy)]
struct LayerUsage {
    at_ns: i64,
    bytes: u64,
    inodes: u64,
}

/// The running containers that the filter lets through.
pub(crate) fn wanted(
    core: &Core,
    filter: Option<&ContainerStatsFilter>,
) -> Vec<(PodHandle, Arc<ContainerView>)> {
    let fits = |view: &ContainerView| {
        filter.is_none_or(|filter| {
            (filter.id.is_empty() || view.record.id.starts_with(&filter.id))
                && (filter.pod_sandbox_id.is_empty() || view.record.pod.starts_with(&filter.pod_sandbox_id))
                && has_labels(&view.config.labels, &filter.label_selector)
        })
    };
    let mut found = Vec::new();
    for pod in core.registry.pods() {
        for view in pod.view().containers.values() {
            if view.running && view.record.is_alive() && fits(view) {
                found.push((pod.clone(), view.clone()));
            }
        }
    }
    found
}

/// Reads what is not fresh, on one blocking thread, and converts it.
pub(crate) async fn collect(
    core: &Arc<Core>,
    wanted: Vec<(PodHandle, Arc<ContainerView>)>,
) -> Result<Vec<ContainerStats>> {
    let core = core.clone();
    blocking(move || {
        let mut all = Vec::with_capacity(wanted.len());
        for (pod, view) in wanted {
            // One that ended since then, or whose files are gone, has no figures but keeps its name.
            let reading = pod.hold(&view.record.id).and_then(|hold| read(&hold));
            let usage = core.usage.get(&view.record.id);
            all.push(convert(&view, reading.as_ref(), usage, &core.layers_mountpoint));
        }
        all
    })
    .await
}

/// Walks over the writable layers for as long as the daemon runs.
pub(crate) async fn walk_layers(core: Arc<Core>) {
    loop {
        for (_, view) in wanted(&core, None) {
            let (snapshots, id) = (core.snapshots.clone(), view.record.id.clone());
            if let Ok(Ok(usage)) = blocking(move || snapshots.usage(&id)).await {
                core.usage.set(&view.record.id, usage.bytes, usage.inodes);
            }
        }
        core.usage.retain(|id| core.registry.container(id).is_ok());
        tokio::select! {
            () = tokio::time::sleep(WALK_PAUSE) => {}
            // A container that has never been measured is cheap to walk: its layer is new.
            () = core.usage_wanted.notified() => {}
        }
    }
}

fn read(hold: &Hold) -> Option<Reading> {
    let mut cache = hold.stats.0.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(reading) = cache.as_ref().filter(|reading| reading.taken.elapsed() < FRESH) {
        return Some(reading.clone());
    }
    let stats = hold.with_cgroup(|cgroup| cgroup.stats()).ok()?;
    let reading = Reading {
        taken: Instant::now(),
        at_ns: now_ns(),
        stats,
    };
    *cache = Some(reading.clone());
    Some(reading)
}

fn convert(
    view: &ContainerView,
    reading: Option<&Reading>,
    usage: Option<LayerUsage>,
    mountpoint: &str,
) -> ContainerStats {
    let number = |value: u64| Some(UInt64Value { value });
    let cpu = reading.and_then(|reading| {
        let cpu = reading.stats.cpu?;
        Some(CpuUsage {
            timestamp: reading.at_ns,
            usage_core_nano_seconds: number(cpu.usage_nanoseconds),
            ..Default::default()
        })
    });
    let memory = reading.and_then(|reading| {
        let memory = reading.stats.memory?;
        Some(MemoryUsage {
            timestamp: reading.at_ns,
            working_set_bytes: number(memory.working_set_bytes()),
            available_bytes: memory.available_bytes().and_then(number),
            usage_bytes: number(memory.usage_bytes),
            rss_bytes: number(memory.anonymous_bytes),
            page_faults: number(memory.page_faults),
            major_page_faults: number(memory.major_page_faults),
            psi: None,
        })
    });
    let swap = reading.and_then(|reading| {
        let memory = reading.stats.memory?;
        let used = memory.swap_usage_bytes?;
        Some(SwapUsage {
            timestamp: reading.at_ns,
            swap_available_bytes: memory
                .swap_limit_bytes
                .and_then(|limit| number(limit.saturating_sub(used))),
            swap_usage_bytes: number(used),
        })
    });
    ContainerStats {
        attributes: Some(ContainerAttributes {
            id: view.record.id.clone(),
            metadata: Some(view.metadata()),
            labels: view.config.labels.clone(),
            annotations: view.config.annotations.clone(),
        }),
        cpu,
        memory,
        swap,
        writable_layer: usage.map(|usage| FilesystemUsage {
            timestamp: usage.at_ns,
            fs_id: Some(FilesystemIdentifier {
                mountpoint: mountpoint.to_owned(),
            }),
            used_bytes: number(usage.bytes),
            inodes_used: number(usage.inodes),
        }),
        io: None,
    }
}

impl Usage {
    fn get(&self, id: &str) -> Option<LayerUsage> {
        self.lock().get(id).copied()
    }

    fn set(&self, id: &str, bytes: u64, inodes: u64) {
        self.lock().insert(
            id.to_owned(),
            LayerUsage {
                at_ns: now_ns(),
                bytes,
                inodes,
            },
        );
    }

    fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.lock().retain(|id, _| keep(id));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, LayerUsage>> {
        // Single insertions and removals: a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::ContainerPhase;
    use crate::view::tests::container;

    #[test]
    fn figures_are_converted_and_absent_ones_stay_absent() {
        let view = container("c", ContainerPhase::Started);
        let nothing = convert(&view, None, None, "/data");
        assert!(nothing.cpu.is_none() && nothing.memory.is_none() && nothing.writable_layer.is_none());
        assert_eq!(nothing.attributes.unwrap().id, "c");

        let stats = coracle_cgroup::Stats {
            cpu: Some(coracle_cgroup::Cpu {
                usage_nanoseconds: 5,
                ..Default::default()
            }),
            memory: Some(coracle_cgroup::Memory {
                usage_bytes: 100,
                inactive_file_bytes: 30,
                limit_bytes: Some(200),
                ..Default::default()
            }),
            ..Default::default()
        };
        let reading = Reading {
            taken: Instant::now(),
            at_ns: 9,
            stats,
        };
        let usage = LayerUsage {
            at_ns: 8,
            bytes: 4096,
            inodes: 3,
        };
        let full = convert(&view, Some(&reading), Some(usage), "/data");
        assert_eq!(full.cpu.unwrap().usage_core_nano_seconds.unwrap().value, 5);
        let memory = full.memory.unwrap();
        assert_eq!(memory.working_set_bytes.unwrap().value, 70);
        assert_eq!(memory.available_bytes.unwrap().value, 130);
        assert!(full.swap.is_none());
        let layer = full.writable_layer.unwrap();
        assert_eq!((layer.timestamp, layer.inodes_used.unwrap().value), (8, 3));
    }
}
