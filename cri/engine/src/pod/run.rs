//! RunPodSandbox: the intent on the disk, the pod's files, its network, its monitor.

use coracle_cgroup::Location;
use coracle_proto::cri::{NamespaceMode, PodSandboxConfig};
use coracle_spec::oci::LinuxResources;
use tracing::warn;

use super::remove::discard;
use super::{PodHandle, files};
use crate::container::{blocking, cgroup_manager, cgroup_path};
use crate::error::{Context as _, Error, Result};
use crate::failpoint;
use crate::monitor::{Monitor, SetupCall};
use crate::pod::Change;
use crate::record::{NetworkRecord, SandboxPhase};
use crate::spec_gen;
use crate::view::is_host_network;

/// Makes a pod sandbox, or leaves nothing of it.
pub(super) async fn run(pod: PodHandle) -> Result<()> {
    let Err(error) = make(&pod).await else {
        return Ok(());
    };
    let undone = async {
        discard(&pod).await?;
        pod.change(Change::SandboxGone).await
    };
    if let Err(leftover) = undone.await {
        // It stays visible, not ready, so that the kubelet stops and removes it until that works.
        warn!(
            pod = pod.id(),
            error = leftover.chain(),
            "a failed sandbox was not undone yet"
        );
        let _ = pod.edit(|record| record.phase = SandboxPhase::Stopping).await;
    }
    Err(error)
}

async fn make(pod: &PodHandle) -> Result<()> {
    let core = pod.core();
    let config = pod.view().config.clone();
    let mut sysctls = spec_gen::sysctls(&config)?;
    sysctls.retain(|(name, _)| !name.starts_with("net."));

    // The network has an intent of its own, durable before anything of it exists: it is made beside all that needs
    // the pod's. Neither needs the other before the set-up.
    let (network, monitor) = tokio::join!(attach(pod, &config), begin(pod, &config));
    // Whatever came to be is kept where the undoing finds it.
    if let Ok(monitor) = &monitor {
        pod.set_monitor(Some(monitor.clone()));
    }
    if let (Err(_), Err(error)) = (&network, &monitor) {
        // The network's failure is the answer.
        warn!(
            pod = pod.id(),
            error = error.chain(),
            "the monitor did not start either"
        );
    }
    let (network, monitor) = (network?, monitor?);
    files::write_hosts(pod, &config, network.as_ref()).await?;

    let options = crate::view::namespace_options(&config);
    let pid_cgroup = match options.pid() {
        NamespaceMode::Pod => Some(make_init_cgroup(pod).await?),
        _ => None,
    };
    let setup = SetupCall {
        pod_id: pod.id().to_owned(),
        pod_dir: core.paths.pod(pod.id()),
        hostname: files::hostname(core, &config),
        sysctls,
        options,
        pid_cgroup,
        netns: network.as_ref().map(|network| network.netns.clone()),
    };
    pod.unless_stopping(monitor.setup(setup)).await?;
    failpoint::reach("run.setup").await?;

    pod.check_not_stopping()?;
    let record = monitor.record();
    pod.edit(move |sandbox| {
        sandbox.phase = SandboxPhase::Ready;
        sandbox.network = network;
        sandbox.monitor = Some(record);
    })
    .await?;
    failpoint::reach("run.ready").await
}

/// What comes of the pod before it has a network: its record, its files, its monitor.
async fn begin(pod: &PodHandle, config: &PodSandboxConfig) -> Result<Monitor> {
    // The record was made with the phase `Creating`.
    pod.edit(|_| {}).await?;
    failpoint::reach("run.intent").await?;

    files::write_names(pod, config).await?;
    failpoint::reach("run.files").await?;

    let monitor = Monitor::start(pod).await?;
    failpoint::reach("run.monitor").await?;
    Ok(monitor)
}

async fn attach(pod: &PodHandle, config: &PodSandboxConfig) -> Result<Option<NetworkRecord>> {
    if is_host_network(config) {
        return Ok(None);
    }
    let (network, id) = (pod.core().network.clone(), pod.id().to_owned());
    let options = spec_gen::network(config)?;
    let attached = blocking(move || network.attach(&id, &options)).await?;
    if attached.is_err() {
        // It may have left something that is to be tried again.
        pod.core().network_failed.notify_one();
    }
    let attached = attached.step("attach the pod's network")?;
    failpoint::reach("run.network").await?;
    Ok(Some(NetworkRecord {
        mode: pod.core().network.mode().to_owned(),
        netns: attached.netns.to_string_lossy().into_owned(),
        ips: attached.ips.iter().map(ToString::to_string).collect(),
    }))
}

/// The sandbox's own leaf, for the init of the pid namespace that its containers share.
async fn make_init_cgroup(pod: &PodHandle) -> Result<Location> {
    let location = init_cgroup(pod)?;
    let mut cgroup = cgroup_manager(pod.core().cgroups.clone(), location.clone()).await?;
    blocking(move || cgroup.create(&LinuxResources::default()))
        .await?
        .step("make the sandbox's cgroup")?;
    Ok(location)
}

/// Where the sandbox's own leaf is.
pub(super) fn init_cgroup(pod: &PodHandle) -> Result<Location> {
    let path = cgroup_path(pod.core(), &pod.view(), pod.id());
    let located = pod.core().cgroups.locate(Some(&path), pod.id());
    located.map_err(|error| Error::invalid("config.linux.cgroup_parent", error.to_string()))
}
