//! Pods and containers as state machines: what the CRI's runtime service asks for, done and remembered.
//!
//! - `pod`: one task a pod owns its records; run, stop, remove
//! - `container`: create, start, stop, remove, exec
//! - `monitor`: the process that stays with a pod, and the connection to it
//! - `spec_gen`: CRI request to OCI config
//! - `recover`: what an earlier daemon left, or an earlier boot
//! - `record`, `view`, `registry`: on the disk, to be shown, to be found
//! - `stats`: figures from cgroups
//! - `tend`: what pod networks need between requests
//!
//! Status and list calls read published snapshots: they wait for nothing and nobody.

mod container;
mod core;
mod error;
pub mod failpoint;
mod ident;
mod monitor;
mod pod;
mod record;
mod recover;
mod registry;
pub mod spec_gen;
mod stats;
mod tend;
mod view;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use coracle_proto::cri::{
    Container, ContainerFilter, ContainerStats, ContainerStatsFilter, ContainerStatusResponse,
    CreateContainerRequest, ExecSyncRequest, ExecSyncResponse, PodSandbox, PodSandboxFilter,
    PodSandboxStatusResponse, RunPodSandboxRequest,
};
use tracing::info;

pub use crate::core::{EngineConfig, Parts};
pub use container::{Streams, Wanted};
pub use error::{Cause, Error, Result};
pub use monitor::{ExecExit, seal_monitor_program};
pub use recover::Report;

use crate::core::Core;
use ident::{ContainerIdentity, PodIdentity};
use pod::{CreateRequest, PodConfig, Start};
use record::{NetworkRecord, SandboxPhase, SandboxRecord};

/// Longest grace that a stop may ask for; beyond it a timer has no meaning.
const MAX_GRACE: Duration = Duration::from_secs(365 * 24 * 3600);

/// The engine; clones are the same one.
#[derive(Debug, Clone)]
pub struct Engine(Arc<Core>);

impl Engine {
    /// Takes over what earlier daemons left and is ready to serve. What had to be put right is in the report.
    pub async fn open(config: EngineConfig, parts: Parts) -> Result<(Engine, Report)> {
        let mut report = Report::default();
        let core = Core::new(config, parts, &mut report.findings)?;
        recover::recover(&core, &mut report).await?;
        Ok((Engine(core), report))
    }

    /// Makes a pod sandbox; it is ready when this returns its id. `raw` are the request's original bytes.
    ///
    /// The same request again joins the one that runs, or gets its result; another one of the same identity undoes
    /// the first.
    pub async fn run_pod_sandbox(&self, request: RunPodSandboxRequest, raw: Vec<u8>) -> Result<String> {
        let hash = ident::run_hash(&request);
        let handler = request.runtime_handler;
        if !handler.is_empty() && handler != self.0.config.default_handler {
            return Err(Error::invalid(
                "runtime_handler",
                format!("{handler:?} is not configured"),
            ));
        }
        let config = request
            .config
            .ok_or_else(|| Error::invalid("config", "is missing"))?;
        let identity = PodIdentity::of(config.metadata.as_ref())?;
        spec_gen::check_pod(&config)?;
        let config = PodConfig {
            config: Arc::new(config),
            runtime_handler: handler.into(),
            raw: raw.into(),
        };
        loop {
            self.0.check_running()?;
            if let Some(pod) = self.0.registry.identity(&identity) {
                let view = pod.view();
                let made = matches!(view.record.phase, SandboxPhase::Creating | SandboxPhase::Ready);
                if made && view.record.hash == hash && !pod.is_stopping() {
                    return pod.run_operation().done().await.map(|()| pod.id().to_owned());
                }
                info!(
                    pod = pod.id(),
                    "an earlier sandbox of the same identity is undone first"
                );
                gone_is_fine(pod.remove_pod().await)?;
                continue;
            }
            let record = self.new_record(&identity, &hash, &config)?;
            let id = record.id.clone();
            let (pod, prepared) = pod::prepare(&self.0, record, config.clone());
            if self
                .0
                .registry
                .insert(&id, identity.clone(), pod.clone())
                .is_err()
            {
                continue;
            }
            prepared.start(Start::Run);
            return pod.run_operation().done().await.map(|()| id);
        }
    }

    /// Stops a pod sandbox and everything in it; one that is not there is stopped.
    pub async fn stop_pod_sandbox(&self, id: &str) -> Result<()> {
        gone_is_fine(async { self.0.registry.pod(id)?.stop_pod().await }.await)
    }

    /// Removes a pod sandbox and everything in it; one that is not there is removed.
    pub async fn remove_pod_sandbox(&self, id: &str) -> Result<()> {
        gone_is_fine(async { self.0.registry.pod(id)?.remove_pod().await }.await)
    }

    /// What a pod sandbox is now.
    pub fn pod_sandbox_status(&self, id: &str, verbose: bool) -> Result<PodSandboxStatusResponse> {
        let pod = self.0.registry.pod(id)?;
        let view = pod.view();
        if !view.is_listed() {
            return Err(Error::NotFound {
                what: "pod sandbox",
                id: id.to_owned(),
            });
        }
        let info = if verbose {
            self.0.pod_info(&pod, &view)
        } else {
            BTreeMap::new()
        };
        Ok(PodSandboxStatusResponse {
            status: Some(view.to_status()),
            info,
            ..Default::default()
        })
    }

    /// Every pod sandbox that the filter lets through.
    #[must_use]
    pub fn list_pod_sandboxes(&self, filter: Option<&PodSandboxFilter>) -> Vec<PodSandbox> {
        let views = self.0.registry.views();
        let wanted = views
            .iter()
            .filter(|view| view.is_listed() && view.matches(filter));
        wanted.map(|view| view.to_list_item()).collect()
    }

    /// Makes a container that waits to be started. `raw` are the request's original bytes.
    pub async fn create_container(&self, request: CreateContainerRequest, raw: Vec<u8>) -> Result<String> {
        self.0.check_running()?;
        let pod = self.0.registry.pod(&request.pod_sandbox_id)?;
        let hash = ident::create_hash(&request);
        let config = request
            .config
            .ok_or_else(|| Error::invalid("config", "is missing"))?;
        let identity = ContainerIdentity::of(config.metadata.as_ref())?;
        pod.create(CreateRequest {
            identity,
            hash,
            config,
            raw,
        })
        .await
    }

    /// Starts a created container; its program runs when this returns.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        self.0.check_running()?;
        let (id, pod) = self.0.registry.container(id)?;
        pod.start(&id).await
    }

    /// Stops a container within `grace_seconds`, 0 = at once; one that is not there is stopped.
    pub async fn stop_container(&self, id: &str, grace_seconds: i64) -> Result<()> {
        let grace = Duration::from_secs(u64::try_from(grace_seconds).unwrap_or(0)).min(MAX_GRACE);
        let stopped = async {
            let (id, pod) = self.0.registry.container(id)?;
            pod.stop(&id, grace).await
        };
        gone_is_fine(stopped.await)
    }

    /// Removes a container in whatever state it is; one that is not there is removed.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let removed = async {
            let (id, pod) = self.0.registry.container(id)?;
            pod.remove(&id).await
        };
        gone_is_fine(removed.await)
    }

    /// Every container that the filter lets through.
    #[must_use]
    pub fn list_containers(&self, filter: Option<&ContainerFilter>) -> Vec<Container> {
        let views = self.0.registry.views();
        let containers = views.iter().flat_map(|pod| pod.containers.values());
        let wanted = containers.filter(|view| view.is_listed() && view.matches(filter));
        wanted.map(|view| view.to_list_item()).collect()
    }

    /// What a container is now.
    pub fn container_status(&self, id: &str, verbose: bool) -> Result<ContainerStatusResponse> {
        let (full, pod) = self.0.registry.container(id)?;
        let view = pod.container(&full)?;
        if !view.is_listed() {
            return Err(Error::NotFound {
                what: "container",
                id: id.to_owned(),
            });
        }
        let info = if verbose {
            self.0.container_info(&pod, &view)
        } else {
            BTreeMap::new()
        };
        Ok(ContainerStatusResponse {
            status: Some(view.to_status()),
            info,
        })
    }

    /// Runs a command in a running container and returns what it wrote.
    pub async fn exec_sync(&self, request: ExecSyncRequest) -> Result<ExecSyncResponse> {
        let (id, pod) = self.0.registry.container(&request.container_id)?;
        container::exec_sync(pod, id, request.cmd, request.timeout).await
    }

    /// Whether a command could be run in this container, or a session attach to it; its full id, and its pod's.
    pub fn check_running(&self, id: &str) -> Result<(String, String)> {
        self.0.check_running()?;
        let (id, pod) = self.0.registry.container(id)?;
        container::check_running(&pod, &id).map(|()| (id, pod.id().to_owned()))
    }

    /// Runs a command in a running container, with streams that the caller copies.
    pub async fn exec(&self, id: &str, command: Vec<String>, streams: Wanted) -> Result<Streams> {
        let (id, pod) = self.0.registry.container(id)?;
        container::exec(&pod, &id, command, streams).await
    }

    /// Joins the streams of a running container.
    pub async fn attach(&self, id: &str, streams: Wanted) -> Result<Streams> {
        let (id, pod) = self.0.registry.container(id)?;
        container::attach(&pod, &id, streams).await
    }

    /// The full id of a pod sandbox that a connection could be made into.
    pub fn check_ready(&self, id: &str) -> Result<String> {
        self.0.check_running()?;
        let pod = self.0.registry.pod(id)?;
        pod::check_ready(&pod).map(|()| pod.id().to_owned())
    }

    /// Connects to a TCP port that a program in the pod listens on at its loopback address.
    pub async fn dial(&self, id: &str, port: u16) -> Result<tokio::net::TcpStream> {
        pod::dial(&self.0.registry.pod(id)?, port).await
    }

    /// Has the monitor open the log of a running container anew, after a rotation.
    pub async fn reopen_container_log(&self, id: &str) -> Result<()> {
        let (id, pod) = self.0.registry.container(id)?;
        let view = pod.container(&id)?;
        let monitor = pod.monitor().filter(|_| view.running && view.record.is_alive());
        let monitor = monitor.ok_or_else(|| Error::State {
            what: "container",
            id: id.clone(),
            why: "is not running".to_owned(),
        })?;
        monitor.reopen_log(&id).await
    }

    /// What a container uses.
    pub async fn container_stats(&self, id: &str) -> Result<ContainerStats> {
        let (id, pod) = self.0.registry.container(id)?;
        let view = pod.container(&id)?;
        let mut stats = stats::collect(&self.0, vec![(pod, view)]).await?;
        stats.pop().ok_or(Error::NotFound {
            what: "container",
            id,
        })
    }

    /// What each running container uses that the filter lets through.
    pub async fn list_container_stats(
        &self,
        filter: Option<&ContainerStatsFilter>,
    ) -> Result<Vec<ContainerStats>> {
        stats::collect(&self.0, stats::wanted(&self.0, filter)).await
    }

    /// Whether a container, in whatever state, was made from this image, or is being made.
    #[must_use]
    pub fn is_image_in_use(&self, image: &coracle_image::Digest) -> bool {
        self.0.is_image_in_use(image)
    }

    /// From now on nothing new is begun; what runs goes on. Pods live on without the daemon.
    pub fn shut_down(&self) {
        self.0.shut_down();
    }

    fn new_record(&self, identity: &PodIdentity, hash: &str, config: &PodConfig) -> Result<SandboxRecord> {
        let views = self.0.registry.views();
        let earlier = views.iter().map(|view| &view.record).filter(|record| {
            (&record.namespace, &record.name, &record.uid)
                == (&identity.namespace, &identity.name, &identity.uid)
        });
        let last = earlier.map(|record| record.created_at).max();
        let network = (!view::is_host_network(&config.config)).then(NetworkRecord::default);
        Ok(SandboxRecord {
            id: ident::new_id().map_err(|error| Error::step("draw a pod id", error))?,
            namespace: identity.namespace.clone(),
            name: identity.name.clone(),
            uid: identity.uid.clone(),
            attempt: identity.attempt,
            hash: hash.to_owned(),
            phase: SandboxPhase::Creating,
            created_at: ident::after(last),
            network,
            monitor: None,
            reason: String::new(),
        })
    }
}

/// Stop and remove are idempotent: what is gone is done.
fn gone_is_fine(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(Error::NotFound { .. }) => Ok(()),
        other => other,
    }
}
