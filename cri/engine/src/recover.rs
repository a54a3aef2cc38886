//! What an earlier daemon left, or an earlier boot: every pod is found again, or taken down to nothing.
//!
//! Records come first: they say what may be on the host, since each was written before its effects. Then each pod is
//! brought to a state that can be shown, all of them side by side; one that does not get there in time is served as
//! its record says and goes on in the background. Last goes what no record knows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coracle_proto::cri::{ContainerConfig, CreateContainerRequest, RunPodSandboxRequest};
use coracle_store::{CommitError, Loaded, Record, Table};
use prost::Message as _;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::container::{self, blocking};
use crate::core::Core;
use crate::error::{Context as _, Result};
use crate::ident::{self, is_id};
use crate::monitor::Monitor;
use crate::pod::{self, Exit, PodConfig, PodHandle, Restored, RestoredContainer, Start};
use crate::record::{ContainerPhase, ContainerRecord, SandboxPhase, SandboxRecord};

/// How long the start of the daemon waits for its pods.
const PATIENCE: Duration = Duration::from_secs(10);

/// First and longest pause before something that could not be taken down is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What the recovery has to tell the operator, one line each.
#[derive(Debug, Default)]
pub struct Report {
    /// Records that could not be read, and what else was put right.
    pub findings: Vec<String>,
    /// Pods that were found.
    pub pods: usize,
}

/// Finds everything again.
pub(crate) async fn recover(core: &Arc<Core>, report: &mut Report) -> Result<()> {
    let (sandboxes, containers) = load(core, report).await?;
    let mut by_pod: BTreeMap<String, Vec<RestoredContainer>> = BTreeMap::new();
    for (id, record) in containers {
        let restored = decode(&id, record, report);
        by_pod
            .entry(restored.record.pod.clone())
            .or_default()
            .push(restored);
    }

    let mut pods = Vec::new();
    for (id, record) in sandboxes {
        let old_boot = record.boot != core.boot;
        let containers = by_pod.remove(&id).unwrap_or_default();
        if let Some(pod) = restore(core, record, containers, report) {
            pods.push((pod, old_boot));
        }
    }
    // Containers whose pod is on no record: their pod is made up for long enough to take them down.
    for (id, containers) in by_pod {
        report.findings.push(format!(
            "pod sandbox {id}: its record is lost, what is left of it is removed"
        ));
        if let Some(pod) = restore(core, lost_record(core, &id), containers, report) {
            pods.push((pod, false));
        }
    }
    report.pods = pods.len();

    let settling: Vec<_> = pods
        .into_iter()
        .map(|(pod, old_boot)| tokio::spawn(async move { settle(&pod, old_boot).await }))
        .collect();
    let all = async {
        for pod in settling {
            let _ = pod.await;
        }
    };
    if timeout(PATIENCE, all).await.is_err() {
        report
            .findings
            .push("some pods are still being recovered".to_owned());
    }
    sweep(core, report).await?;
    tokio::spawn(crate::stats::walk_layers(core.clone()));
    crate::tend::start(core);
    Ok(())
}

/// Begins a pod anew from its records, after its task panicked. What waits for the old task is told that it is gone.
pub(crate) async fn take_up(core: &Arc<Core>, id: &str) {
    core.registry.remove(id);
    let mut report = Report::default();
    let Ok((sandboxes, containers)) = load(core, &mut report).await else {
        return;
    };
    let of_pod = containers.into_iter().filter(|(_, record)| record.body.pod == id);
    let containers = of_pod
        .map(|(key, record)| decode(&key, record, &mut report))
        .collect();
    let Some((_, record)) = sandboxes.into_iter().find(|(key, _)| key == id) else {
        return;
    };
    if let Some(pod) = restore(core, record, containers, &mut report) {
        settle(&pod, false).await;
    }
    for finding in report.findings {
        warn!("{finding}");
    }
}

type Rows<T> = Vec<(String, Record<T>)>;

async fn load(core: &Arc<Core>, report: &mut Report) -> Result<(Rows<SandboxRecord>, Rows<ContainerRecord>)> {
    let (durable, volatile) = (core.store.clone(), core.volatile.clone());
    let load = move || -> Result<_, CommitError> {
        let sandboxes = durable.load::<SandboxRecord>(Table::Sandboxes)?;
        let containers = durable.load::<ContainerRecord>(Table::Containers)?;
        Ok((
            sandboxes,
            containers,
            volatile.load::<SandboxRecord>(Table::Sandboxes)?,
            volatile.load::<ContainerRecord>(Table::Containers)?,
        ))
    };
    let (mut sandboxes, mut containers, pods_copy, containers_copy) =
        blocking(load).await?.step("read the records")?;
    for bad in &sandboxes.bad {
        report.findings.push(format!(
            "pod sandbox {}: {}, its record is in quarantine",
            bad.key, bad.error
        ));
    }
    for bad in &containers.bad {
        report.findings.push(format!(
            "container {}: {}, its record is in quarantine",
            bad.key, bad.error
        ));
    }
    let found_again =
        fill_in(&mut sandboxes.rows, pods_copy) + fill_in(&mut containers.rows, containers_copy);
    if found_again > 0 {
        report.findings.push(format!(
            "{found_again} lost records were found again in the copy of this boot"
        ));
    }
    Ok((sandboxes.rows, containers.rows))
}

/// Adds the rows that are in the copy alone. A row whose removal did not get to the copy is in its last phase, or one
/// whose making did not get to the disk in its first: either is taken down, so nothing comes back to life.
fn fill_in<T>(rows: &mut Rows<T>, copy: Loaded<T>) -> usize {
    let known: BTreeSet<String> = rows.iter().map(|(key, _)| key.clone()).collect();
    let before = rows.len();
    rows.extend(copy.rows.into_iter().filter(|(key, _)| !known.contains(key)));
    rows.len() - before
}

fn decode(id: &str, record: Record<ContainerRecord>, report: &mut Report) -> RestoredContainer {
    match CreateContainerRequest::decode(record.request.as_slice()).map(|request| request.config) {
        Ok(Some(config)) => RestoredContainer {
            record: record.body,
            config,
            raw: record.request,
        },
        _ => {
            report.findings.push(format!(
                "container {id}: its request cannot be read, it is removed"
            ));
            RestoredContainer {
                record: doomed(record.body),
                config: ContainerConfig::default(),
                raw: Vec::new(),
            }
        }
    }
}

fn restore(
    core: &Arc<Core>,
    record: Record<SandboxRecord>,
    containers: Vec<RestoredContainer>,
    report: &mut Report,
) -> Option<PodHandle> {
    let mut body = record.body;
    let request = match RunPodSandboxRequest::decode(record.request.as_slice()) {
        Ok(request) if request.config.is_some() => request,
        _ => {
            report.findings.push(format!(
                "pod sandbox {}: its request cannot be read, it is removed",
                body.id
            ));
            body.phase = SandboxPhase::Removing;
            RunPodSandboxRequest::default()
        }
    };
    let config = PodConfig {
        config: Arc::new(request.config.unwrap_or_default()),
        runtime_handler: request.runtime_handler.into(),
        raw: record.request.into(),
    };
    let (id, identity) = (body.id.clone(), body.identity());
    let (pod, prepared) = pod::prepare(core, body, config);
    if let Err(other) = core.registry.insert(&id, identity, pod.clone()) {
        // Two records of one identity: an undoing was interrupted between them. The older one goes.
        report.findings.push(format!(
            "pod sandbox {id}: {} has the same identity, it is removed",
            other.id()
        ));
        core.registry.insert_nameless(&id, pod.clone());
        prepared.start(Start::Restore(Restored {
            containers,
            doomed: true,
        }));
        return Some(pod);
    }
    prepared.start(Start::Restore(Restored {
        containers,
        doomed: false,
    }));
    Some(pod)
}

/// Brings a pod to a state that can be shown, or takes it down; what fails is tried again in the background.
async fn settle(pod: &PodHandle, old_boot: bool) {
    if is_settled(pod, old_boot).await {
        return;
    }
    let pod = pod.clone();
    tokio::spawn(async move {
        let mut pause = RETRY.0;
        loop {
            sleep(pause).await;
            if is_settled(&pod, old_boot).await {
                return;
            }
            pause = (pause * 2).min(RETRY.1);
        }
    });
}

async fn is_settled(pod: &PodHandle, old_boot: bool) -> bool {
    let stepped = step(pod, old_boot).await;
    if let Err(error) = &stepped {
        warn!(
            pod = pod.id(),
            error = error.chain(),
            "the pod is not recovered yet"
        );
    }
    stepped.is_ok()
}

async fn step(pod: &PodHandle, old_boot: bool) -> Result<()> {
    let view = pod.view();
    match view.record.phase {
        // Nobody was told of it.
        SandboxPhase::Creating | SandboxPhase::Removing => return pod.remove_pod().await,
        SandboxPhase::NotReady => {}
        _ if pod.is_doomed() => return pod.remove_pod().await,
        SandboxPhase::Stopping => pod.stop_pod().await?,
        SandboxPhase::Ready if old_boot => {
            for container in view
                .containers
                .values()
                .filter(|container| container.record.is_alive())
            {
                pod.edit_container(&container.record.id, |record| {
                    container::record_exit(record, rebooted());
                })
                .await?;
            }
            pod.stop_for("NodeRestarted").await?;
            info!(pod = pod.id(), "the pod is of an earlier boot, it is not ready");
        }
        SandboxPhase::Ready => adopt(pod).await?,
    }
    for container in pod.view().containers.values() {
        let id = &container.record.id;
        match container.record.phase {
            ContainerPhase::Creating | ContainerPhase::Removing => pod.remove(id).await?,
            // Its pod is down and so is it, whatever was written last.
            ContainerPhase::Created | ContainerPhase::Started if pod.monitor().is_none() => {
                pod.edit_container(id, |record| {
                    container::record_exit(record, container::exit_without_monitor(None));
                })
                .await?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Takes a running pod over: hold of its containers first, which needs nobody, then its monitor.
async fn adopt(pod: &PodHandle) -> Result<()> {
    let view = pod.view();
    let mut gone = Vec::new();
    for container in view.containers.values() {
        let record = &container.record;
        let started = matches!(record.phase, ContainerPhase::Created | ContainerPhase::Started);
        if started && pod.hold(&record.id).is_none() && !container::retake_hold(pod, record).await? {
            gone.push(record.id.clone());
        }
    }
    let Some(monitor) = &view.record.monitor else {
        return pod.stop_for("MonitorLost").await;
    };
    let Some(monitor) = Monitor::adopt(pod, monitor).await? else {
        warn!(
            pod = pod.id(),
            "the monitor died while the daemon was away, the pod is taken down"
        );
        return pod.stop_for("MonitorLost").await;
    };
    pod.set_monitor(Some(monitor.clone()));
    for id in gone {
        // The monitor has the exit code, and says it below or never. Only with the monitor there it is waited for.
        pod.tell(pod::Message::InitGone { id });
    }
    // A monitor that does not answer is served around until it does.
    if timeout(PATIENCE / 2, monitor.reconciled()).await.is_ok() {
        monitor.upgrade_if_older(pod).await;
    }
    Ok(())
}

/// Removes what no record knows: writable layers, pod folders, networks, monitors.
async fn sweep(core: &Arc<Core>, report: &mut Report) -> Result<()> {
    let views = core.registry.views();
    let pods: BTreeSet<String> = views.iter().map(|view| view.record.id.clone()).collect();
    let containers: BTreeSet<String> = views
        .iter()
        .flat_map(|view| view.containers.keys().cloned())
        .collect();
    let core = core.clone();
    let swept = blocking(move || {
        let layers = core
            .snapshots
            .sweep(|id| containers.contains(id))
            .step("sweep writable layers")?;
        let networks = core
            .network
            .sweep(|id| pods.contains(id))
            .step("sweep pod networks")?;
        let mut folders = 0;
        for entry in std::fs::read_dir(core.paths.pods()).step("list the pod folders")? {
            let entry = entry.step("list the pod folders")?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_id(&name) && !pods.contains(&name) {
                end_unknown_containers(&core, &entry.path())?;
                crate::monitor::end_unknown(&core, &name)?;
                container::remove_dir(&entry.path()).step("remove a pod folder")?;
                folders += 1;
            }
        }
        Ok::<_, crate::Error>((layers, networks, folders))
    })
    .await??;
    if swept != (0, 0, 0) {
        let (layers, networks, folders) = swept;
        report.findings.push(format!(
            "removed what no record knows: {layers} writable layers, {networks} networks, {folders} pod folders"
        ));
    }
    Ok(())
}

/// Kills what runs in the containers of a pod folder that no record knows: their bundles say where they are.
fn end_unknown_containers(core: &Core, pod: &Path) -> Result<()> {
    let Ok(bundles) = std::fs::read_dir(pod.join("containers")) else {
        return Ok(());
    };
    for bundle in bundles {
        let bundle = bundle.step("list the bundles of a pod")?;
        let id = bundle.file_name().to_string_lossy().into_owned();
        let config = std::fs::read(bundle.path().join("config.json")).unwrap_or_default();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
        // A half-written bundle has no process yet.
        let Some(path) = config["linux"]["cgroupsPath"].as_str() else {
            continue;
        };
        let location = core
            .cgroups
            .locate(Some(path), &id)
            .step("read a container's cgroup path")?;
        container::end_location(&core.cgroups, &location).step("remove a container's cgroup")?;
    }
    Ok(())
}

fn rebooted() -> Exit {
    Exit {
        code: 255,
        reason: "Unknown".to_owned(),
        message: "the node was restarted".to_owned(),
        at: ident::now_ns(),
    }
}

fn doomed(record: ContainerRecord) -> ContainerRecord {
    ContainerRecord {
        phase: ContainerPhase::Removing,
        ..record
    }
}

fn lost_record(core: &Core, id: &str) -> Record<SandboxRecord> {
    let body = SandboxRecord {
        id: id.to_owned(),
        namespace: String::new(),
        name: id.to_owned(),
        uid: String::new(),
        attempt: 0,
        hash: String::new(),
        phase: SandboxPhase::Removing,
        created_at: ident::now_ns(),
        network: Some(crate::record::NetworkRecord::default()),
        monitor: None,
        reason: "RecordLost".to_owned(),
    };
    Record {
        boot: core.boot.clone(),
        body,
        request: Vec::new(),
    }
}
