//! A pod's start and ExecSync over the CRI: coracled with its bridge, containerd + runc with the bridge plugin.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use coracle_integration::cell::{Cell, Process, run as run_command, wait_for};
use coracle_integration::client::Client;
use coracle_integration::daemon::{Daemon, program};
use coracle_integration::image::{Layout, busybox_layout, busybox_root, pack};
use coracle_integration::request::{container_config, pod_config};
use coracle_proto::cri::security_profile::ProfileType;
use coracle_proto::cri::{ContainerConfig, SecurityProfile};
use serde_json::json;

use crate::sample::{Row, Sample, print_rows};

const IMAGE: &str = "bench.example/busybox:1";
const ROUNDS: usize = 30;

/// Takes and prints the figures.
pub(crate) fn run() -> Result<()> {
    let ours = Cell::new("bench-coracle")?;
    let layout = busybox_layout(ours.dir(), "busybox", IMAGE)?;
    let daemon = Daemon::start(&ours, None)?;
    daemon.import(&ours, &layout, IMAGE)?;
    let theirs = Cell::new("bench-containerd")?;
    let peer = Containerd::start(&theirs, &layout)?;
    let mut targets = vec![("coracled", daemon.client()?, ours.subdir("logs")?)];
    if let Some(peer) = &peer {
        targets.push((
            "containerd+runc",
            Client::connect(&peer.socket)?,
            theirs.subdir("logs")?,
        ));
    }
    let operations = [
        ("RunPodSandbox", None),
        ("CreateContainer + StartContainer", None),
        ("RunPodSandbox + CreateContainer + StartContainer", Some(0.25)),
        ("ExecSync", Some(0.25)),
        ("StopPodSandbox + RemovePodSandbox", None),
    ];
    let mut rows: Vec<Row> = operations
        .map(|(operation, target)| Row {
            operation,
            samples: targets
                .iter()
                .map(|(name, ..)| (*name, Sample::default()))
                .collect(),
            target,
        })
        .into();
    for round in 0..=ROUNDS {
        for (n, (_, client, logs)) in targets.iter().enumerate() {
            // The first round fills caches and is not counted.
            let mut warm_up: Vec<Sample> = vec![Sample::default(); operations.len()];
            let mut samples: Vec<&mut Sample> = if round == 0 {
                warm_up.iter_mut().collect()
            } else {
                rows.iter_mut().map(|row| &mut row.samples[n].1).collect()
            };
            one_pod(client, logs, round, &mut samples)?;
        }
    }
    print_rows(&rows);
    daemon.terminate()?;
    if let Some(peer) = peer {
        peer.process.terminate()?;
        // Its group above the pods' it leaves behind, empty; one that is not is somebody else's.
        for hierarchy in fs::read_dir("/sys/fs/cgroup")?.flatten() {
            let _ = fs::remove_dir(hierarchy.path().join("k8s.io"));
        }
    }
    Ok(())
}

fn one_pod(client: &Client, logs: &Path, round: usize, samples: &mut [&mut Sample]) -> Result<()> {
    let [sandbox_time, container_time, whole_time, exec_time, end_time] = samples else {
        return Ok(());
    };
    let pod = pod_config(&format!("bench{round}"), logs);
    let container = confined(container_config("main", IMAGE, &["sleep", "3600"]));
    let (sandbox, container) = whole_time.time(|| {
        let sandbox = sandbox_time.time(|| Ok(client.run_pod(&pod)?))?;
        let container = container_time.time(|| {
            let id = client.create(&sandbox, &container, &pod)?;
            client.start(&id)?;
            Ok(id)
        })?;
        Ok((sandbox, container))
    })?;
    for _ in 0..3 {
        exec_time.time(|| Ok(client.exec(&container, &["true"], Duration::from_secs(10))?))?;
    }
    client.stop(&container, Duration::ZERO)?;
    end_time.time(|| Ok(client.discard_pod(&sandbox)?))
}

/// With the runtime's own profile, as a kubelet asks for with `seccompDefault`: left out, it means different things.
fn confined(mut container: ContainerConfig) -> ContainerConfig {
    let context = container.linux.as_mut().and_then(|l| l.security_context.as_mut());
    if let Some(context) = context {
        context.seccomp = Some(SecurityProfile {
            profile_type: ProfileType::RuntimeDefault.into(),
            localhost_ref: String::new(),
        });
    }
    container
}

/// containerd with runc and the bridge plugin, from their Go modules.
struct Containerd {
    process: Process,
    socket: PathBuf,
}

impl Containerd {
    fn start(cell: &Cell, layout: &Path) -> Result<Option<Self>> {
        let (Some(containerd), Some(ctr), Some(runc), Some(plugins)) = (
            program("CONTAINERD"),
            program("CTR"),
            program("RUNC"),
            program("CNI_PLUGINS"),
        ) else {
            return Ok(None);
        };
        let dir = cell.subdir("containerd")?;
        let socket = dir.join("containerd.sock");
        fs::create_dir_all(dir.join("net.d"))?;
        let network = json!({"cniVersion": "1.0.0", "name": "bench", "plugins": [{
            "type": "bridge", "bridge": "bench0", "isGateway": true, "ipMasq": false,
            "ipam": {"type": "host-local", "dataDir": dir.join("ipam"), "ranges": [[{"subnet": "10.223.0.0/16"}]]},
        }]});
        fs::write(dir.join("net.d/10-bench.conflist"), network.to_string())?;
        let config = format!(
            r#"version = 3
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = ["io.containerd.nri.v1.nri"]
[grpc]
address = "{socket}"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "bench.example/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{plugins}"]
conf_dir = "{dir}/net.d"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{runc}"
"#,
            dir = dir.display(),
            socket = socket.display(),
            plugins = plugins.display(),
            runc = runc.display(),
        );
        fs::write(dir.join("config.toml"), config)?;
        let path = format!(
            "{}:/usr/sbin:/usr/bin:/sbin:/bin",
            containerd
                .parent()
                .context("containerd is in a directory")?
                .display()
        );
        let mut command = cell.command(&containerd);
        command
            .arg("--config")
            .arg(dir.join("config.toml"))
            .env("PATH", path);
        let process = cell.spawn("containerd", &mut command)?;
        wait_for("containerd", Duration::from_secs(60), || {
            Client::connect(&socket)?.pods().map(Some).map_err(Into::into)
        })?;
        let pause = pause_layout(cell.dir())?;
        for (layout, name) in [(layout, IMAGE), (&pause, "bench.example/pause:1")] {
            let tar = dir.join("image.tar");
            pack(layout, &tar)?;
            let base = name.rsplit_once(':').map_or(name, |(base, _)| base);
            let mut import = cell.command(&ctr);
            import
                .arg("--address")
                .arg(&socket)
                .args(["-n", "k8s.io", "images", "import", "--base-name", base])
                .arg(&tar);
            run_command(&mut import)?;
        }
        Ok(Some(Self { process, socket }))
    }
}

fn pause_layout(scratch: &Path) -> Result<PathBuf> {
    let root = scratch.join("pause-root");
    busybox_root(&root)?;
    let mut layout = Layout::new(&scratch.join("pause"))?;
    layout.add_layer(&root, coracle_integration::image::Compression::Gzip)?;
    run_command(Command::new("rm").arg("-rf").arg(&root))?;
    layout.finish(
        "bench.example/pause:1",
        &json!({"Env": ["PATH=/bin"], "Entrypoint": ["sleep", "infinity"]}),
    )
}
