//! RunPodSandbox: the intent on the disk, the pod's files, its network, its monitor.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use coracle_cgroup::Location;
use coracle_proto::cri::{DnsConfig, NamespaceMode, PodSandboxConfig};
use coracle_spec::oci::LinuxResources;
use tracing::warn;

use super::PodHandle;
use super::remove::discard;
use crate::container::{blocking, cgroup_manager, cgroup_path};
use crate::core::Core;
use crate::error::{Context as _, Error, Result};
use crate::failpoint;
use crate::monitor::{Monitor, SetupCall};
use crate::pod::Change;
use crate::record::{NetworkRecord, SandboxPhase};
use crate::spec_gen;
use crate::view::is_host_network;

/// A resolver file of a host is far below it.
const RESOLV_BYTES: u64 = 64 << 10;

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
    // The record was made with the phase `Creating` and, where it has one, the network's intent.
    pod.edit(|_| {}).await?;
    failpoint::reach("run.intent").await?;

    write_files(core, pod.id(), &config).await?;
    failpoint::reach("run.files").await?;

    // The monitor starts while the network is made: neither needs the other before the set-up.
    let mut sysctls = spec_gen::sysctls(&config)?;
    sysctls.retain(|(name, _)| !name.starts_with("net."));
    let (network, monitor) = tokio::join!(attach(pod, &config), start_monitor(pod));
    // Whatever came to be is kept where the undoing finds it.
    if let Ok(monitor) = &monitor {
        pod.set_monitor(Some(monitor.clone()));
    }
    let (network, monitor) = (network?, monitor?);

    let options = crate::view::namespace_options(&config);
    let pid_cgroup = match options.pid() {
        NamespaceMode::Pod => Some(make_init_cgroup(pod).await?),
        _ => None,
    };
    let setup = SetupCall {
        pod_id: pod.id().to_owned(),
        pod_dir: core.paths.pod(pod.id()),
        hostname: hostname(core, &config),
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

async fn start_monitor(pod: &PodHandle) -> Result<Monitor> {
    let monitor = Monitor::start(pod).await?;
    failpoint::reach("run.monitor").await?;
    Ok(monitor)
}

/// `resolv.conf` and `hostname` of the pod, which each of its containers gets mounted.
async fn write_files(core: &Arc<Core>, pod: &str, config: &PodSandboxConfig) -> Result<()> {
    let dir = core.paths.pod(pod);
    let hostname = hostname(core, config);
    let resolv = config.dns_config.as_ref().map(resolv_conf).transpose()?;
    blocking(move || -> std::io::Result<()> {
        std::fs::create_dir_all(dir.join("shm"))?;
        std::fs::create_dir_all(dir.join("containers"))?;
        std::fs::write(dir.join("hostname"), format!("{hostname}\n"))?;
        let resolv = resolv.unwrap_or_else(|| host_resolv_conf(Path::new("/etc/resolv.conf")));
        std::fs::write(dir.join("resolv.conf"), resolv)
    })
    .await?
    .step("write the pod's files")
}

/// The pod's host name; the host's for a pod on its network.
fn hostname(core: &Core, config: &PodSandboxConfig) -> String {
    if config.hostname.is_empty() {
        core.facts.hostname.clone()
    } else {
        config.hostname.clone()
    }
}

/// A resolver file of what the request says; nothing in it may start a line of its own.
fn resolv_conf(dns: &DnsConfig) -> Result<String> {
    let fields = [
        ("servers", &dns.servers),
        ("searches", &dns.searches),
        ("options", &dns.options),
    ];
    for (field, values) in fields {
        if values
            .iter()
            .any(|value| value.chars().any(|c| c.is_control() || c.is_whitespace()))
        {
            return Err(Error::invalid(
                format!("config.dns_config.{field}"),
                "holds white space",
            ));
        }
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    Ok(text)
}

fn host_resolv_conf(path: &Path) -> String {
    // A host without one has no resolver to offer: neither has its pod.
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(RESOLV_BYTES + 1).read_to_string(&mut text));
    match read {
        Ok(length) if length as u64 <= RESOLV_BYTES => text,
        Ok(_) => {
            warn!(path = %path.display(), "larger than {RESOLV_BYTES} bytes: pods get an empty one");
            String::new()
        }
        Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resolver_file_says_what_the_request_says() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.10".into(), "fd00::a".into()],
            searches: vec!["default.svc.cluster.local".into(), "cluster.local".into()],
            options: vec!["ndots:5".into()],
        };
        let expected = "search default.svc.cluster.local cluster.local\n\
                        nameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n";
        assert_eq!(resolv_conf(&dns).unwrap(), expected);
        assert_eq!(resolv_conf(&DnsConfig::default()).unwrap(), "");
    }

    #[test]
    fn nothing_in_it_starts_a_line_of_its_own() {
        for bad in ["10.0.0.1\nnameserver 6.6.6.6", "a b", "x\r", "\0"] {
            let dns = DnsConfig {
                servers: vec![bad.into()],
                ..Default::default()
            };
            assert!(resolv_conf(&dns).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_huge_or_absent_resolver_file_of_the_host_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        assert_eq!(host_resolv_conf(&path), "");
        std::fs::write(&path, "#".repeat(100_000)).unwrap();
        assert_eq!(host_resolv_conf(&path), "");
        std::fs::write(&path, "nameserver 1.1.1.1\n").unwrap();
        assert_eq!(host_resolv_conf(&path), "nameserver 1.1.1.1\n");
    }
}
