//! `cargo xtask bench`: builds everything as it ships, and the peers, and runs the bench program.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::Places;
use crate::build::{self, Daemon, cargo};
use crate::install::{self, Want};
use crate::tools::{self, Tool};

/// Prints tables of times and ratios; `part` is oci, cri, forward, memory or cluster.
pub(crate) fn bench(places: &Places, part: Option<&str>) -> Result<()> {
    install::install(Want::Everything)?;
    let coracle = build::runtime(places)?;
    let coracled = build::node(places, Daemon::Release)?;
    let containerd = tools::build(places, Tool::Containerd)?;
    let mut command: Command = cargo(places);
    command
        .args([
            "run",
            "--quiet",
            "--package",
            "coracle-integration",
            "--bin",
            "coracle-bench",
            "--",
        ])
        .args(part)
        .env("CORACLE", coracle)
        .env("CORACLED", coracled)
        .env("RUNC", tools::build(places, Tool::Runc)?.join("runc"))
        .env("CRUN", "/usr/bin/crun")
        .env("CONTAINERD", containerd.join("containerd"))
        .env("CTR", containerd.join("ctr"))
        .env("CNI_PLUGINS", tools::build(places, Tool::Cni)?)
        .env("STREAMER", tools::build(places, Tool::Streamer)?.join("streamer"))
        .env("KUBELET", tools::build(places, Tool::Kubelet)?.join("kubelet"))
        .env("KUBERNETES_BIN", tools::build(places, Tool::Kubernetes)?)
        .env("ETCD", tools::build(places, Tool::Etcd)?.join("server"))
        .env("COREDNS", tools::build(places, Tool::Coredns)?.join("coredns"));
    let status = command.status().context("run the bench program")?;
    ensure!(status.success(), "the bench ended with {status}");
    Ok(())
}
