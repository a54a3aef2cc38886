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

pub(crate) const IMAGE: &str = "bench.example/busybox:1";
const ROUNDS: usize = 30;
const FIRST_ROUNDS: usize = 10;

/// A CRI server of the comparison.
struct Target {
    name: &'static str,
    client: Client,
    logs: PathBuf,
    /// A pod that stays: on a node there is always one, and bridges and tables are there.
    resident: Option<String>,
}

/// Takes and prints the figures: with our own bridge, and with the peer's plugins on both sides.
pub(crate) fn run() -> Result<()> {
    let ours = Cell::new("bench-coracle")?;
    let layout = busybox_layout(ours.dir(), "busybox", IMAGE)?;
    let daemon = Daemon::start(&ours, None)?;
    daemon.import(&ours, &layout, IMAGE)?;
    let plugged = Cell::new("bench-plugins")?;
    let plugins = program("CNI_PLUGINS");
    let with_plugins = plugins
        .map(|plugins| -> Result<Daemon> {
            let conf = write_network(&plugged)?;
            let daemon = Daemon::start_with_plugins(&plugged, &conf, &plugins)?;
            daemon.import(&plugged, &layout, IMAGE)?;
            Ok(daemon)
        })
        .transpose()?;
    let theirs = Cell::new("bench-containerd")?;
    let peer = Containerd::start(&theirs, &layout)?;
    let target = |name, client, cell: &Cell| {
        Ok::<_, anyhow::Error>(Target {
            name,
            client,
            logs: cell.subdir("logs")?,
            resident: None,
        })
    };
    let mut targets = vec![target("coracled", daemon.client()?, &ours)?];
    if let Some(peer) = &peer {
        targets.push(target(
            "containerd+runc",
            Client::connect(&peer.socket)?,
            &theirs,
        )?);
    }
    if let Some(daemon) = &with_plugins {
        targets.push(target(
            "coracled with the same plugin",
            daemon.client()?,
            &plugged,
        )?);
    }
    let first_pod = measure_first_pod(&targets)?;
    for target in &mut targets {
        target.resident = Some(target.client.run_pod(&pod_config("resident", &target.logs))?);
    }
    let mut rows = measure(&targets)?;
    for target in &targets {
        if let Some(sandbox) = &target.resident {
            target.client.discard_pod(sandbox)?;
        }
    }
    // Ours with the plugin is no peer of ours without it: a line of its own.
    if let Some(row) = rows.first_mut()
        && row.samples.len() == 3
    {
        let samples = vec![row.samples.swap_remove(2), row.samples[1].clone()];
        let same_plugin = Row {
            operation: "RunPodSandbox with the same CNI plugin",
            samples,
            target: Some(0.5),
        };
        rows.insert(1, same_plugin);
    }
    rows.push(first_pod);
    for row in &mut rows {
        row.samples.truncate(2);
    }
    print_rows(&rows);
    daemon.terminate()?;
    if let Some(daemon) = with_plugins {
        daemon.terminate()?;
    }
    peer.map_or(Ok(()), Containerd::stop)
}

/// What a pod takes that finds no other: ours makes bridge and tables, and removes them with the last one.
fn measure_first_pod(targets: &[Target]) -> Result<Row> {
    let mut row = Row {
        operation: "RunPodSandbox on a node without pods",
        samples: names(targets),
        target: None,
    };
    for round in 0..=FIRST_ROUNDS {
        for (n, target) in targets.iter().enumerate() {
            let pod = pod_config(&format!("first{round}"), &target.logs);
            let mut warm_up = Sample::default();
            let sample = if round == 0 {
                &mut warm_up
            } else {
                &mut row.samples[n].1
            };
            let sandbox = sample.time(|| Ok(target.client.run_pod(&pod)?))?;
            target.client.discard_pod(&sandbox)?;
        }
    }
    Ok(row)
}

fn names(targets: &[Target]) -> Vec<(&'static str, Sample)> {
    let named = |target: &Target| (target.name, Sample::default());
    targets.iter().map(named).collect()
}

fn measure(targets: &[Target]) -> Result<Vec<Row>> {
    let operations = [
        ("RunPodSandbox", Some(0.15)),
        ("CreateContainer + StartContainer", None),
        ("RunPodSandbox + CreateContainer + StartContainer", Some(0.25)),
        ("ExecSync", Some(0.1)),
        ("StopPodSandbox + RemovePodSandbox", None),
    ];
    let row = |(operation, wanted)| Row {
        operation,
        samples: names(targets),
        target: wanted,
    };
    let mut rows: Vec<Row> = operations.map(row).into();
    for round in 0..=ROUNDS {
        for (n, target) in targets.iter().enumerate() {
            // The first round fills caches and is not counted.
            let mut warm_up: Vec<Sample> = vec![Sample::default(); operations.len()];
            let mut samples: Vec<&mut Sample> = if round == 0 {
                warm_up.iter_mut().collect()
            } else {
                rows.iter_mut().map(|row| &mut row.samples[n].1).collect()
            };
            one_pod(&target.client, &target.logs, round, &mut samples)?;
        }
    }
    Ok(rows)
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
pub(crate) struct Containerd {
    process: Process,
    pub(crate) socket: PathBuf,
}

impl Containerd {
    /// Starts it with an image; none, said loudly, where a program is missing.
    pub(crate) fn start(cell: &Cell, layout: &Path) -> Result<Option<Self>> {
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
        let conf = write_network(cell)?;
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
conf_dir = "{conf}"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{runc}"
"#,
            dir = dir.display(),
            conf = conf.display(),
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

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Ends it.
    pub(crate) fn stop(self) -> Result<()> {
        self.process.terminate()?;
        // Its group above the pods' it leaves behind, empty; one that is not is somebody else's.
        for hierarchy in fs::read_dir("/sys/fs/cgroup")?.flatten() {
            let _ = fs::remove_dir(hierarchy.path().join("k8s.io"));
        }
        Ok(())
    }
}

/// The network of the comparison: the bridge plugin, and where its configuration is.
fn write_network(cell: &Cell) -> Result<PathBuf> {
    let conf = cell.subdir("net.d")?;
    let network = json!({"cniVersion": "1.0.0", "name": "bench", "plugins": [{
        "type": "bridge", "bridge": "bench0", "isGateway": true, "ipMasq": false,
        "ipam": {"type": "host-local", "dataDir": cell.dir().join("ipam"), "ranges": [[{"subnet": "10.223.0.0/16"}]]},
    }]});
    fs::write(conf.join("10-bench.conflist"), network.to_string())?;
    Ok(conf)
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
