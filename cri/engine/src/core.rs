//! What every part of the engine shares: configuration, neighbours, places.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use coracle_cgroup::{Host, Kind};
use coracle_image::{Digest, Image, ImageStore};
use coracle_network::Network;
use coracle_proto::cri::{NamespaceMode, PodSandboxConfig};
use coracle_snapshot::Snapshotter;
use coracle_store::Store;
use serde_json::json;
use tokio::sync::Notify;

use crate::error::{Context as _, Error, Result};
use crate::pod::PodHandle;
use crate::registry::Registry;
use crate::spec_gen::{Defaults, HostFacts, PodFiles};
use crate::stats::Usage;
use crate::view::{ContainerView, PodView, namespace_options};

/// What the operator says, as far as the engine depends on it.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Volatile state: pod files, monitors' sockets.
    pub state: PathBuf,
    /// Directory of the writable layers, for the figures of file systems.
    pub layers_mountpoint: String,
    /// First 8 hex digits of the SHA-256 of the canonical data root.
    pub instance: String,
    /// Name of the handler that an empty `runtime_handler` means too.
    pub default_handler: String,
    /// What a request that leaves a field unset means.
    pub defaults: Defaults,
    /// How many descriptors a container may have that asks for no limit: soft and hard `RLIMIT_NOFILE` of monitors.
    pub open_files: (u64, u64),
}

/// The neighbours that the engine works with.
pub struct Parts {
    /// The durable database.
    pub store: Store,
    /// Images and their layers.
    pub images: Arc<ImageStore>,
    /// Root file systems.
    pub snapshots: Arc<Snapshotter>,
    /// Pod networks.
    pub network: Arc<Network>,
    /// The sealed copy of `coracle` that monitors are started from.
    pub monitor_program: OwnedFd,
}

/// What every part of the engine shares.
pub(crate) struct Core {
    pub(crate) config: EngineConfig,
    pub(crate) instance: String,
    pub(crate) boot: String,
    pub(crate) store: Store,
    /// The second copy of the records, for this boot alone.
    pub(crate) volatile: Store,
    pub(crate) images: Arc<ImageStore>,
    pub(crate) snapshots: Arc<Snapshotter>,
    pub(crate) network: Arc<Network>,
    /// Told when a pod's network could not be taken down.
    pub(crate) network_failed: Notify,
    pub(crate) monitor_program: OwnedFd,
    pub(crate) cgroups: Host,
    pub(crate) facts: HostFacts,
    pub(crate) paths: Paths,
    pub(crate) registry: Registry,
    /// Mount point that holds the writable layers, as the kubelet looks it up.
    pub(crate) layers_mountpoint: String,
    pub(crate) usage: Usage,
    /// Told when a container starts that was never measured.
    pub(crate) usage_wanted: Notify,
    /// Images of containers that are about to be made and on no record yet.
    pins: Mutex<BTreeMap<Digest, usize>>,
    ending: AtomicBool,
}

/// Where the engine keeps files, all below the state directory.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    state: PathBuf,
}

/// An image that cannot be removed until this is dropped.
#[derive(Debug)]
pub(crate) struct PinnedImage {
    pub(crate) image: Arc<Image>,
    core: Arc<Core>,
}

impl Core {
    pub(crate) fn new(config: EngineConfig, parts: Parts, findings: &mut Vec<String>) -> Result<Arc<Core>> {
        let paths = Paths {
            state: config.state.clone(),
        };
        let mut private = DirBuilder::new();
        let private = private.recursive(true).mode(0o700);
        private
            .create(paths.monitors())
            .step("make the state directory")?;
        private.create(paths.pods()).step("make the state directory")?;
        let volatile =
            Store::open(&config.state.join("volatile.db")).step("open the database of this boot")?;
        findings.extend(volatile.findings);
        let cgroups = Host::detect().step("look at the host's cgroups")?;
        let facts = host_facts(&cgroups)?;
        Ok(Arc::new(Core {
            instance: config.instance.clone(),
            boot: coracle_store::boot_id().step("read the boot id")?,
            store: parts.store,
            volatile: volatile.store,
            images: parts.images,
            snapshots: parts.snapshots,
            network: parts.network,
            network_failed: Notify::new(),
            monitor_program: parts.monitor_program,
            cgroups,
            facts,
            paths,
            registry: Registry::default(),
            layers_mountpoint: config.layers_mountpoint.clone(),
            usage: Usage::default(),
            usage_wanted: Notify::new(),
            pins: Mutex::default(),
            ending: AtomicBool::new(false),
            config,
        }))
    }

    /// Finds an image and keeps it from being removed.
    pub(crate) async fn pin_image(self: &Arc<Core>, reference: &str) -> Result<PinnedImage> {
        let absent = || Error::NotFound {
            what: "image",
            id: reference.to_owned(),
        };
        let found = self.images.resolve(reference).ok_or_else(absent)?;
        *self.pins().entry(found.id.clone()).or_default() += 1;
        let pinned = PinnedImage {
            image: found,
            core: self.clone(),
        };
        // It may have gone between the look and the pin.
        self.images
            .resolve(&pinned.image.id.to_string())
            .ok_or_else(absent)?;
        Ok(pinned)
    }

    pub(crate) fn is_image_in_use(&self, image: &Digest) -> bool {
        let image_id = image.to_string();
        self.pins().contains_key(image)
            || self.registry.views().iter().any(|pod| {
                pod.containers
                    .values()
                    .any(|container| container.record.image_id == image_id)
            })
    }

    pub(crate) fn shut_down(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    pub(crate) fn check_running(&self) -> Result<()> {
        if self.ending.load(Ordering::Relaxed) {
            Err(Error::ShuttingDown)
        } else {
            Ok(())
        }
    }

    /// Verbose status of a pod, with the keys that tools know from other CRI servers.
    pub(crate) fn pod_info(&self, pod: &PodHandle, view: &PodView) -> BTreeMap<String, String> {
        let monitor = view.record.monitor.as_ref();
        let namespaces = pod
            .monitor()
            .map(|monitor| monitor.namespaces())
            .unwrap_or_default();
        let info = json!({
            "sandboxID": view.record.id,
            "pid": monitor.map_or(0, |monitor| monitor.pid),
            "runtimeHandler": &*view.runtime_handler,
            "reason": view.record.reason,
            "cniResult": self.network.result(&view.record.id),
            "namespaces": {
                "network": namespaces.network,
                "ipc": namespaces.ipc,
                "uts": namespaces.uts,
                "pid": namespaces.pid,
                "user": namespaces.user,
            },
            "config": {
                "metadata": {
                    "name": view.record.name,
                    "namespace": view.record.namespace,
                    "uid": view.record.uid,
                    "attempt": view.record.attempt,
                },
                "hostname": view.config.hostname,
                "log_directory": view.config.log_directory,
                "labels": view.config.labels,
                "annotations": view.config.annotations,
                "cgroup_parent": view.config.linux.as_ref().map(|linux| &linux.cgroup_parent),
            },
        });
        [("info".to_owned(), info.to_string())].into()
    }

    /// Verbose status of a container.
    pub(crate) fn container_info(&self, pod: &PodHandle, view: &ContainerView) -> BTreeMap<String, String> {
        let config = self.paths.bundle(pod.id(), &view.record.id).join("config.json");
        // The bundle lies on a tmpfs; after a reboot there is none.
        let spec = std::fs::read(config)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let info = json!({
            "sandboxID": view.record.pod,
            "pid": if view.record.is_alive() { view.record.pid } else { 0 },
            "runtimeSpec": spec.unwrap_or(serde_json::Value::Null),
            "config": {
                "metadata": { "name": view.record.name, "attempt": view.record.attempt },
                "image": { "image": view.record.image_id },
                "labels": view.config.labels,
                "annotations": view.config.annotations,
                "log_path": view.record.log_path,
            },
        });
        [("info".to_owned(), info.to_string())].into()
    }

    fn pins(&self) -> std::sync::MutexGuard<'_, BTreeMap<Digest, usize>> {
        // Each change under the lock is one insertion or removal: nothing is left half done by a panic.
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Drop for PinnedImage {
    fn drop(&mut self) {
        let mut pins = self.core.pins();
        if let Some(count) = pins.get_mut(&self.image.id) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.image.id);
            }
        }
    }
}

impl Paths {
    pub(crate) fn pods(&self) -> PathBuf {
        self.state.join("pods")
    }

    pub(crate) fn pod(&self, pod: &str) -> PathBuf {
        self.pods().join(pod)
    }

    pub(crate) fn bundle(&self, pod: &str, container: &str) -> PathBuf {
        self.pod(pod).join("containers").join(container)
    }

    /// Directory of the monitors' sockets.
    pub(crate) fn monitors(&self) -> PathBuf {
        self.state.join("monitors")
    }

    /// What of the pod every container gets mounted.
    pub(crate) fn pod_files(&self, pod: &str, config: &PodSandboxConfig) -> PodFiles {
        let dir = self.pod(pod);
        let text = |path: &Path| Some(path.to_string_lossy().into_owned());
        let host_ipc = namespace_options(config).ipc() == NamespaceMode::Node;
        PodFiles {
            resolv_conf: text(&dir.join("files/resolv.conf")),
            hostname: text(&dir.join("files/hostname")),
            hosts: text(&dir.join("files/hosts")),
            shm: if host_ipc {
                text(Path::new("/dev/shm"))
            } else {
                text(&dir.join("shm"))
            },
        }
    }
}

fn host_facts(cgroups: &Host) -> Result<HostFacts> {
    let controllers = cgroups.controllers().step("list the host's cgroup controllers")?;
    let hugepages = || -> std::io::Result<Vec<String>> {
        let mut sizes = Vec::new();
        for entry in std::fs::read_dir("/sys/kernel/mm/hugepages")? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Some(kib) = name
                .strip_prefix("hugepages-")
                .and_then(|rest| rest.strip_suffix("kB"))
            {
                sizes.extend(kib.parse().ok().map(page_size));
            }
        }
        Ok(sizes)
    };
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").step("read the host's name")?;
    Ok(HostFacts {
        cgroup_v2: cgroups.kind() == Kind::Unified,
        swap_accounting: swap_accounting(cgroups.kind()),
        hugepage_sizes: if controllers.iter().any(|name| name == "hugetlb") {
            hugepages().unwrap_or_default()
        } else {
            Vec::new()
        },
        hostname: hostname.trim().to_owned(),
    })
}

/// On v2 the root group has no swap file: every kernel that we run on with the controller accounts for it.
fn swap_accounting(kind: Kind) -> bool {
    match kind {
        Kind::Unified => Path::new("/proc/swaps").exists(),
        Kind::V1 => Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists(),
        Kind::None => false,
    }
}

/// A page size as the hugetlb files are called.
fn page_size(kib: u64) -> String {
    match kib {
        kib if kib >= 1 << 20 => format!("{}GB", kib >> 20),
        kib if kib >= 1 << 10 => format!("{}MB", kib >> 10),
        kib => format!("{kib}KB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_are_named_as_the_controller_names_them() {
        assert_eq!(page_size(2048), "2MB");
        assert_eq!(page_size(1 << 20), "1GB");
        assert_eq!(page_size(64), "64KB");
    }
}
