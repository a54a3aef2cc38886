//! A stock control plane and kubectl on coracled: what people do with a cluster.
//!
//! One cluster serves all tests, one after the other; after each of them the node is empty again. Needs the programs that
//! `cargo xtask test` builds, and root. Words on the command line choose tests by their names.

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

mod policies;
mod services;
mod sessions;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use coracle_integration::cell::{Cell, wait_for};
use coracle_integration::cluster::{Cluster, Programs};
use coracle_integration::daemon::Daemon;
use coracle_integration::image::busybox_layout;
use coracle_integration::leaks;
use serde_json::json;

/// What a test is given.
pub(crate) struct Scene<'a> {
    pub(crate) cell: &'a Cell,
    pub(crate) cluster: Cluster<'a>,
    pub(crate) daemon: Daemon,
    /// An image of busybox, on the node already.
    pub(crate) image: String,
}

/// A test by its name.
pub(crate) type Case = (&'static str, fn(&mut Scene<'_>) -> Result<()>);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let wanted: Vec<Case> = [sessions::ALL, services::ALL, policies::ALL]
        .concat()
        .into_iter()
        .filter(|(name, _)| words.is_empty() || words.iter().any(|word| name.contains(word.as_str())))
        .collect();
    if std::env::args().any(|word| word == "--list") {
        wanted.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let Some(programs) = Programs::find() else {
        return ExitCode::SUCCESS;
    };
    let failed = match run(&programs, &wanted) {
        Ok(failed) => failed,
        Err(error) => {
            println!("    {error:#}");
            vec!["the cluster"]
        }
    };
    println!(
        "\ntest result: {}. {} passed; {} failed",
        if failed.is_empty() { "ok" } else { "FAILED" },
        wanted.len().saturating_sub(failed.len()),
        failed.len()
    );
    failed.iter().for_each(|name| println!("    {name}"));
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// With the reference plugins, as `CORACLE_CNI_BIN` says where they are; else with the bridge of our own.
fn start_daemon(cell: &Cell) -> Result<Daemon> {
    let Some(bin) = std::env::var_os("CORACLE_CNI_BIN") else {
        println!("    pods are on the built-in bridge");
        return Daemon::start(cell, None);
    };
    let conf = cell.subdir("net.d")?;
    let network = json!({"cniVersion": "1.0.0", "name": "cluster", "plugins": [
        {"type": "ptp", "ipMasq": false,
         "ipam": {"type": "host-local", "dataDir": cell.dir().join("ipam"), "ranges": [[{"subnet": "10.222.0.0/16"}]],
                  "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
    ]});
    std::fs::write(conf.join("10-cluster.conflist"), network.to_string())?;
    println!("    pods are connected by the plugins ptp, host-local and portmap");
    Daemon::start_with_plugins(cell, &conf, bin.as_ref())
}

/// Runs the tests; the names of those that failed.
fn run(programs: &Programs, wanted: &[Case]) -> Result<Vec<&'static str>> {
    let begun = Instant::now();
    let cell = Cell::new("cluster")?;
    let before = leaks::snapshot(&cell)?;
    let layout = busybox_layout(cell.dir(), "app", "app:1")?;
    let daemon = start_daemon(&cell)?;
    let image = daemon.import(&cell, &layout, "test.example/app:1")?;
    let mut cluster = Cluster::start(&cell, programs, &daemon.socket())?;
    let with_services = services::ALL
        .iter()
        .any(|(service, _)| wanted.iter().any(|(name, _)| name == service));
    if with_services {
        cluster.start_services()?;
    }
    println!(
        "    the cluster is up after {:.0} s",
        begun.elapsed().as_secs_f64()
    );
    let mut scene = Scene {
        cell: &cell,
        cluster,
        daemon,
        image,
    };
    let mut failed = Vec::new();
    for (name, case) in wanted {
        let started = Instant::now();
        let outcome = case(&mut scene).and_then(|()| scene.cluster.clear(&scene.daemon));
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        if let Err(error) = outcome {
            println!("    {error:#}");
            failed.push(*name);
            let _ = scene.cluster.clear(&scene.daemon);
        }
        println!(
            "test {name} ... {word} ({:.1} s)",
            started.elapsed().as_secs_f64()
        );
    }
    if !failed.is_empty() {
        println!(
            "{}\n{}",
            scene.cluster.tail("kubelet"),
            scene.cluster.tail("coracled")
        );
    }
    wait_for("the node to be empty", Duration::from_secs(180), || {
        Ok(scene.daemon.sandboxes(&cell)?.is_empty().then_some(()))
    })?;
    scene.cluster.stop()?;
    scene.daemon.terminate()?;
    leaks::remove_kubelet_cgroups(&cell)?;
    if with_services {
        // What the proxy leaves is its own.
        cell.sh("nft delete table ip kube-proxy; nft delete table ip6 kube-proxy 2>/dev/null || true")?;
    }
    leaks::check(&before, &leaks::snapshot(&cell)?).context("after all tests")?;
    cell.check_host_sysctls()?;
    Ok(failed)
}
