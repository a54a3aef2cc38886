//! `cargo xtask demo`: a pod, from nothing to nothing.

use anyhow::{Context, Result, ensure};

use crate::Places;
use crate::build::{self, Daemon, cargo};
use crate::install::{self, Want};

/// Builds both programs static and runs the demonstration.
pub(crate) fn demo(places: &Places, reference: Option<&str>) -> Result<()> {
    for package in install::install(Want::Demo)? {
        println!("{package} cannot be installed here");
    }
    println!("building coracle and coracled (static, release)");
    let coracled = build::node(places, Daemon::Release)?;
    let mut command = cargo(places);
    command
        .args([
            "run",
            "--quiet",
            "--package",
            "coracle-integration",
            "--bin",
            "coracle-demo",
            "--",
        ])
        .args(reference)
        .env("CORACLED", coracled);
    let status = command.status().context("run the demonstration")?;
    ensure!(status.success(), "the demonstration ended with {status}");
    Ok(())
}
