//! What a user of a whole cluster sees: kubectl exec, and the time until forty more pods are ready.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use coracle_integration::cell::{Cell, wait_for};
use coracle_integration::client::Client;
use coracle_integration::cluster::{Cluster, Programs};
use coracle_integration::daemon::Daemon;
use coracle_integration::image::busybox_layout;
use coracle_integration::leaks;
use serde_json::json;

use crate::cri::{Containerd, IMAGE};
use crate::sample::{Row, Sample, print_rows, print_size_once};

const FEW: usize = 3;
const MANY: usize = 43;

/// How often kubectl is called, and how often it is scaled up.
const EXECS: usize = 20;
const ROUNDS: usize = 3;

/// Takes and prints the figures, one runtime after the other: two control planes at a time would be measured otherwise.
pub(crate) fn run() -> Result<()> {
    let Some(programs) = Programs::find() else {
        return Ok(());
    };
    let ours = Cell::new("bench-cluster")?;
    let layout = busybox_layout(ours.dir(), "busybox", IMAGE)?;
    let daemon = Daemon::start(&ours, None)?;
    daemon.import(&ours, &layout, IMAGE)?;
    let pid = daemon.pid()?;
    let mut figures = vec![("coracled", measure(&ours, &programs, &daemon.socket(), pid)?)];
    daemon.terminate()?;
    leaks::remove_kubelet_cgroups(&ours)?;
    let theirs = Cell::new("bench-cluster-peer")?;
    if let Some(peer) = Containerd::start(&theirs, &layout)? {
        let measured = measure(&theirs, &programs, &peer.socket, peer.pid())?;
        figures.push(("containerd+runc", measured));
        peer.stop()?;
        leaks::remove_kubelet_cgroups(&theirs)?;
    }
    let row = |operation, target, pick: &dyn Fn(&Figures) -> Sample| Row {
        operation,
        samples: figures
            .iter()
            .map(|(name, figures)| (*name, pick(figures)))
            .collect(),
        target,
    };
    print_rows(&[
        row("kubectl exec … true", None, &|figures| figures.exec.clone()),
        row(
            "scale a Deployment from 3 to 43 pods, until ready",
            Some(0.5),
            &|figures| figures.scale.clone(),
        ),
    ]);
    let sizes = |of: fn(&Figures) -> u64| -> Vec<(&str, u64)> {
        figures
            .iter()
            .map(|(name, figures)| (*name, of(figures)))
            .collect()
    };
    print_size_once(
        "memory of coracled then (RSS)",
        &sizes(|figures| figures.daemon_kib),
    );
    print_size_once(
        "memory of the monitors or shims then, all (Pss)",
        &sizes(|figures| figures.monitors_kib),
    );
    Ok(())
}

struct Figures {
    exec: Sample,
    scale: Sample,
    daemon_kib: u64,
    monitors_kib: u64,
}

fn measure(cell: &Cell, programs: &Programs, socket: &Path, daemon: u32) -> Result<Figures> {
    let cluster = Cluster::start(cell, programs, socket)?;
    cluster.apply(&[json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "many"},
        "spec": {
            "replicas": FEW, "selector": {"matchLabels": {"app": "many"}},
            "template": {
                "metadata": {"labels": {"app": "many"}},
                "spec": {
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{
                        "name": "main", "image": IMAGE, "imagePullPolicy": "Never",
                        "command": ["sleep", "3600"],
                    }],
                },
            },
        },
    })])?;
    let scale = |count: usize| -> Result<()> {
        cluster.run(&["scale", "deployment/many", &format!("--replicas={count}")])?;
        cluster
            .run(&["rollout", "status", "deployment/many", "--timeout=300s"])
            .map(drop)
    };
    let client = Client::connect(socket)?;
    let settle = |count: usize| {
        wait_for(
            "the pods to be as many as asked for",
            Duration::from_secs(300),
            || {
                let pods = client.pods()?;
                Ok((pods.iter().filter(|pod| pod.state == 0).count() == count).then_some(()))
            },
        )
    };
    scale(FEW)?;
    let mut figures = Figures {
        exec: Sample::default(),
        scale: Sample::default(),
        daemon_kib: 0,
        monitors_kib: 0,
    };
    for round in 0..=EXECS {
        // The first one fills caches and is not counted.
        let mut warm_up = Sample::default();
        let sample = if round == 0 {
            &mut warm_up
        } else {
            &mut figures.exec
        };
        sample.time(|| cluster.run(&["exec", "deployment/many", "--", "true"]))?;
    }
    for _ in 0..ROUNDS {
        figures.scale.time(|| scale(MANY))?;
        figures.daemon_kib = field(&format!("/proc/{daemon}/status"), "VmRSS:")?;
        figures.monitors_kib = monitors(daemon)?;
        scale(FEW)?;
        settle(FEW)?;
    }
    cluster.run(&["delete", "deployment/many", "--wait=true"])?;
    settle(0)?;
    wait_for("the node to be empty", Duration::from_secs(240), || {
        Ok(client.pods()?.is_empty().then_some(()))
    })?;
    cluster.stop()?;
    Ok(figures)
}

/// What the processes that stay with pods have in memory, each shared page counted once.
fn monitors(daemon: u32) -> Result<u64> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let ours = namespace(&daemon.to_string());
    let mut total = 0;
    for entry in fs::read_dir("/proc").context("list /proc")?.flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let stays = name.starts_with("coracle-monitor") || name.starts_with("containerd-shim");
        if stays && namespace(&pid) == ours {
            total += field(&format!("/proc/{pid}/smaps_rollup"), "Pss:").unwrap_or_default();
        }
    }
    Ok(total)
}

fn field(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("{path} has no {name}"))
}
