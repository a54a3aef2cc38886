//! CreateContainer: the intent on the disk, the root file system, the bundle, the init that waits for the word.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;

use coracle_proto::cri::{ContainerConfig, NamespaceMode};
use coracle_snapshot::{Durability, LayerDir};
use tracing::warn;

use super::gather::{Gathered, gather, log_path, stop_signal};
use super::remove::{discard, remove_dir};
use super::{blocking, start_time, take_hold};
use crate::core::Core;
use crate::error::{Context as _, Error, Result};
use crate::failpoint;
use crate::monitor::{CreateCall, Monitor};
use crate::pod::{Change, PodHandle};
use crate::record::{ContainerPhase, ContainerRecord};
use crate::spec_gen::{self, Generated, ImageProcess, Inputs, PodNamespaces};
use crate::view::{ContainerView, PodView};

/// Makes a container, or leaves nothing of it.
pub(crate) async fn create(pod: PodHandle, view: Arc<ContainerView>) -> Result<()> {
    let id = view.record.id.clone();
    let Err(error) = make(&pod, &view).await else {
        return Ok(());
    };
    let undone = async {
        discard(&pod, &id).await?;
        pod.change(Change::ContainerGone { id: id.clone() }).await
    };
    if let Err(leftover) = undone.await {
        // It stays on record, hidden, and goes with the next removal of it or of its pod.
        warn!(
            container = id,
            error = leftover.chain(),
            "a failed creation was not undone yet"
        );
    }
    Err(error)
}

async fn make(pod: &PodHandle, view: &ContainerView) -> Result<()> {
    let core = pod.core();
    let (id, config) = (view.record.id.as_str(), &view.config);
    let pod_view = pod.view();
    let monitor = pod.monitor().ok_or_else(|| lost(pod.id()))?;

    spec_gen::check_container(&pod_view.config, config)?;
    // Nothing is touched before the intent is on the disk.
    let reference = config
        .image
        .as_ref()
        .map(|image| image.image.as_str())
        .unwrap_or_default();
    let pinned = core.pin_image(reference).await?;
    let image = &pinned.image;
    let mut record = view.record.clone();
    record.image_id = image.id.to_string();
    record.image_name = image
        .tags
        .first()
        .map_or_else(|| reference.to_owned(), ToString::to_string);
    record.image_ref = image
        .digests
        .first()
        .map_or_else(|| image.id.to_string(), ToString::to_string);
    record.log_path = log_path(&pod_view.config, config)?;
    record.stop_signal = stop_signal(config, &image.config.stop_signal)?.number();
    record.cgroup = cgroup_path(core, &pod_view, id);
    let location = core
        .cgroups
        .locate(Some(&record.cgroup), id)
        .map_err(|error| Error::invalid("config.linux.cgroup_parent", error.to_string()))?;
    record.cgroup_location = location.to_map();
    let log = record.log_path.clone();
    pod.change(Change::NewContainer {
        record: Box::new(record.clone()),
    })
    .await?;
    failpoint::reach("create.intent").await?;

    let rootfs = pod.unless_stopping(mount_rootfs(pod, id, &image.layers)).await?;
    failpoint::reach("create.rootfs").await?;

    let made = pod.unless_stopping(bundle(
        pod,
        &pod_view,
        view,
        &record,
        &image.config,
        &monitor,
        rootfs,
    ));
    let (generated, gathered, rootfs) = made.await?;
    failpoint::reach("create.bundle").await?;

    let call = CreateCall {
        container: id.to_owned(),
        bundle: core.paths.bundle(pod.id(), id),
        log_path: log,
        tty: config.tty,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        rootfs,
    };
    let created = pod.unless_stopping(monitor.create(call)).await?;
    failpoint::reach("create.monitor").await?;
    take_hold(pod, id, created.pid, created.pidfd, location).await?;

    let sources = mount_sources(config, &gathered);
    let pid_start = start_time(created.pid);
    pod.edit_container(id, move |record| {
        // An init that died meanwhile has its exit on record already.
        if record.phase == ContainerPhase::Creating {
            record.phase = ContainerPhase::Created;
        }
        record.pid = created.pid;
        record.pid_start = pid_start;
        record.uid = generated.uid;
        record.gid = generated.gid;
        record.groups = generated.groups;
        record.mount_sources = sources;
    })
    .await?;
    failpoint::reach("create.done").await
}

/// The container's leaf below the parent that the kubelet made, else below the instance's own group.
pub(crate) fn cgroup_path(core: &Core, pod: &PodView, id: &str) -> String {
    let parent = pod
        .config
        .linux
        .as_ref()
        .map(|linux| linux.cgroup_parent.as_str())
        .unwrap_or_default();
    match parent {
        "" => format!("/coracle/{}/containers/{id}", core.instance),
        parent => format!("/{}/{id}", parent.trim_matches('/')),
    }
}

async fn mount_rootfs(pod: &PodHandle, id: &str, layers: &[LayerDir]) -> Result<OwnedFd> {
    let (pod, id, layers) = (pod.clone(), id.to_owned(), layers.to_vec());
    blocking(move || {
        let snapshots = &pod.core().snapshots;
        let plan = snapshots
            .prepare(&id, &layers, Durability::default())
            .step("prepare the container's root file system")?;
        let mount = snapshots
            .mount(&plan)
            .step("mount the container's root file system")?;
        if let Err(given_up) = pod.check_not_stopping() {
            // Nobody waits any more, and the undoing may have been here already.
            drop(mount);
            snapshots
                .remove(&id)
                .step("remove the container's writable layer")?;
            return Err(given_up);
        }
        Ok(mount)
    })
    .await?
}

/// Looks up what the request names, generates the config and writes the bundle.
async fn bundle(
    pod: &PodHandle,
    pod_view: &Arc<PodView>,
    view: &ContainerView,
    record: &ContainerRecord,
    image: &coracle_image::ImageConfig,
    monitor: &Monitor,
    rootfs: OwnedFd,
) -> Result<(Generated, Gathered, OwnedFd)> {
    let core = pod.core().clone();
    let process = ImageProcess {
        entrypoint: image.entrypoint.clone(),
        cmd: image.cmd.clone(),
        env: image.env.clone(),
        user: image.user.clone(),
        working_dir: image.working_dir.clone(),
    };
    let namespaces = namespaces(pod, view, monitor)?;
    let files = core.paths.pod_files(pod.id(), &pod_view.config);
    let (pod_view, config, record) = (pod_view.clone(), view.config.clone(), record.clone());
    let (handle, sandbox_id) = (pod.clone(), pod.id().to_owned());
    blocking(move || {
        let gathered = gather(&config, &rootfs)?;
        let inputs = Inputs {
            sandbox_id: &sandbox_id,
            pod: &pod_view.config,
            container_id: &record.id,
            container: &config,
            image: &process,
            users: &gathered.users,
            cgroup_path: &record.cgroup,
            namespaces: &namespaces,
            files: &files,
            mounts: &gathered.mounts,
            devices: &gathered.devices,
            seccomp_profile: gathered.seccomp_profile.as_deref(),
            host: &core.facts,
            defaults: &core.config.defaults,
        };
        let generated = spec_gen::generate(&inputs)?;
        if let Some(directory) = std::path::Path::new(&record.log_path).parent() {
            // A kubelet has made it; who types a request by hand has not.
            std::fs::create_dir_all(directory).step("make the directory of the log")?;
        }
        let bundle = core.paths.bundle(&sandbox_id, &record.id);
        write_bundle(&bundle, &generated.config).step("write the bundle")?;
        if let Err(given_up) = handle.check_not_stopping() {
            remove_dir(&bundle).step("remove the container's bundle")?;
            return Err(given_up);
        }
        Ok((generated, gathered, rootfs))
    })
    .await?
}

/// A real bundle: `config.json` and an empty `rootfs`, on which the root is mounted inside the container's own
/// mount namespace. The directory above it is there as long as the pod is.
fn write_bundle(path: &std::path::Path, config: &serde_json::Value) -> std::io::Result<()> {
    std::fs::create_dir(path)?;
    std::fs::create_dir(path.join("rootfs"))?;
    // The environment is in it: for nobody but root, whatever directory it is found through.
    let mut file = std::fs::OpenOptions::new();
    let mut file = file
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path.join("config.json"))?;
    file.write_all(config.to_string().as_bytes())
}

/// The pod's namespaces; for pid the one that the request says.
fn namespaces(pod: &PodHandle, view: &ContainerView, monitor: &Monitor) -> Result<PodNamespaces> {
    let mut namespaces = monitor.namespaces();
    let context = view
        .config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let options = context.and_then(|context| context.namespace_options.as_ref());
    match options.map_or(NamespaceMode::Pod, coracle_proto::cri::NamespaceOption::pid) {
        NamespaceMode::Pod => {}
        NamespaceMode::Container | NamespaceMode::Node => namespaces.pid = None,
        NamespaceMode::Target => {
            let target = options
                .map(|options| options.target_id.as_str())
                .unwrap_or_default();
            let hold = pod
                .view()
                .containers
                .contains_key(target)
                .then(|| pod.hold(target))
                .flatten();
            let hold = hold.ok_or_else(|| {
                let field = "config.linux.security_context.namespace_options.target_id";
                Error::invalid(
                    field,
                    format!("{target:?} is not a running container of this pod"),
                )
            })?;
            namespaces.pid = Some(format!("/proc/{}/ns/pid", hold.pid));
        }
    }
    Ok(namespaces)
}

/// Resolved sources by the index of the request's mounts.
fn mount_sources(config: &ContainerConfig, gathered: &Gathered) -> Vec<String> {
    let mut sources = vec![String::new(); config.mounts.len()];
    for mount in &gathered.mounts {
        sources[mount.index].clone_from(&mount.source);
    }
    sources
}

fn lost(pod: &str) -> Error {
    Error::State {
        what: "pod sandbox",
        id: pod.to_owned(),
        why: "has lost its monitor".to_owned(),
    }
}
