//! The two programs, as they ship and as they are tested.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::Places;
use crate::install::MUSL;

/// What of `coracled` is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Daemon {
    /// As it ships.
    Release,
    /// With failpoints, for tests alone; static, since guests have no libraries; not optimised, and so quick to build.
    Test,
}

/// `coracle`, static, at a fixed address: its monitors hold a third of the memory of a position-independent one.
pub(crate) fn runtime(places: &Places) -> Result<PathBuf> {
    let target = places.target.join("static");
    let mut command = cargo(places);
    command
        .args([
            "build",
            "--quiet",
            "--profile",
            "runtime",
            "--package",
            "coracle-cli",
            "--target",
            MUSL,
            "--target-dir",
        ])
        .arg(&target)
        .env("RUSTFLAGS", "-C relocation-model=static");
    finish(&mut command, target.join(MUSL).join("runtime/coracle"))
}

/// `coracled`, static.
pub(crate) fn daemon(places: &Places, kind: Daemon) -> Result<PathBuf> {
    let mut command = cargo(places);
    command.args([
        "build",
        "--quiet",
        "--package",
        "coracle-server",
        "--target",
        MUSL,
    ]);
    let (flags, profile): (&[&str], _) = match kind {
        Daemon::Release => (&["--release"], "release"),
        Daemon::Test => (&["--features", "failpoints"], "debug"),
    };
    command.args(flags);
    finish(
        &mut command,
        places.target.join(MUSL).join(profile).join("coracled"),
    )
}

/// `coracled` with `coracle` beside it, where the daemon looks for its runtime.
pub(crate) fn node(places: &Places, kind: Daemon) -> Result<PathBuf> {
    let coracle = runtime(places)?;
    let coracled = daemon(places, kind)?;
    let beside = coracled.with_file_name("coracle");
    // A program that somebody runs cannot be written over.
    let _ = fs::remove_file(&beside);
    fs::copy(&coracle, &beside)
        .with_context(|| format!("copy {} to {}", coracle.display(), beside.display()))?;
    Ok(coracled)
}

/// The demonstration, static: it drives a pod where there is nothing else.
pub(crate) fn demo_static(places: &Places) -> Result<PathBuf> {
    let mut command = cargo(places);
    command.args([
        "build",
        "--quiet",
        "--package",
        "coracle-integration",
        "--bin",
        "coracle-demo",
        "--target",
        MUSL,
    ]);
    finish(&mut command, places.target.join(MUSL).join("debug/coracle-demo"))
}

/// A built test program.
pub(crate) struct TestProgram {
    /// The name of its target: `lifecycle`, `coracle_kernel`.
    pub(crate) name: String,
    /// Where it lies.
    pub(crate) path: PathBuf,
}

/// The static test programs of packages, of one kind of target (`lib`, `test`), built and not run.
pub(crate) fn test_programs(places: &Places, packages: &[&str], kind: &str) -> Result<Vec<TestProgram>> {
    let mut command = cargo(places);
    command.args(["test", "--no-run", "--message-format=json", "--target", MUSL]);
    packages.iter().for_each(|package| {
        command.args(["--package", package]);
    });
    let output = command.output().context("run cargo test --no-run")?;
    ensure!(
        output.status.success(),
        "cargo test --no-run: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut programs = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else {
            continue;
        };
        let is_wanted = message["profile"]["test"] == true && message["target"]["kind"][0] == kind;
        let (name, path) = (message["target"]["name"].as_str(), message["executable"].as_str());
        if let (true, Some(name), Some(path)) = (is_wanted, name, path) {
            programs.push(TestProgram {
                name: name.to_owned(),
                path: PathBuf::from(path),
            });
        }
    }
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(programs)
}

/// Cargo in the checkout.
pub(crate) fn cargo(places: &Places) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&places.repository);
    command
}

fn finish(command: &mut Command, path: PathBuf) -> Result<PathBuf> {
    let status = command.status().with_context(|| format!("run {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    ensure!(path.exists(), "{} was not built", path.display());
    Ok(path)
}
