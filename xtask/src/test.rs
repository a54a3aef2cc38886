//! `cargo xtask test`: everything that CI runs, cheap stages first, each with its seconds.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::build::{self, Daemon, cargo};
use crate::install::{self, AARCH64, Want};
use crate::run::{Counts, shown};
use crate::tools::{self, Tool};
use crate::vm_stage;
use crate::{Places, TestFlags};

/// Tells tests where the CNI reference plugins are.
const CNI_BIN: &str = "CORACLE_CNI_BIN";

/// A run of the stages.
pub(crate) struct Run<'a> {
    /// Where things are.
    pub(crate) places: &'a Places,
    /// What was asked for.
    pub(crate) flags: &'a TestFlags,
    start: Instant,
    counts: Counts,
    failed_stages: Vec<&'static str>,
    skipped: Vec<String>,
}

/// Whether a stage is run when the clock has run out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    Quick,
    Slow,
}

/// Runs the stages; true when everything passed.
pub(crate) fn test(places: &Places, flags: &TestFlags) -> Result<bool> {
    let mut run = Run {
        places,
        flags,
        start: Instant::now(),
        counts: Counts::default(),
        failed_stages: Vec::new(),
        skipped: Vec::new(),
    };
    for package in install::install(Want::Everything)? {
        run.skip(format!("{package} cannot be installed here"));
    }
    run.stage("fmt", Pace::Quick, |run| run.cargo(&["fmt", "--all", "--check"]));
    run.stage("layout", Pace::Quick, |run| {
        run.cargo(&[
            "test",
            "--quiet",
            "--package",
            "coracle-tests",
            "--test",
            "layout_rules",
        ])
    });
    run.stage("clippy", Pace::Quick, |run| {
        run.cargo(&[
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--features",
            "failpoints",
            "--",
            "--deny",
            "warnings",
        ])
    });
    run.stage("docs", Pace::Quick, docs);
    run.stage("deny", Pace::Quick, deny);
    run.stage("unit", Pace::Quick, unit);
    run.stage("aarch64", Pace::Quick, aarch64);
    run.stage("oci", Pace::Quick, oci);
    run.stage("cri", Pace::Quick, cri);
    run.stage("vm", Pace::Slow, vm_stage::guest);
    run.stage("qemu", Pace::Slow, vm_stage::qemu);
    run.stage("kubelet", Pace::Slow, kubelet);
    run.stage("cluster", Pace::Slow, cluster);
    Ok(run.finish())
}

impl Run<'_> {
    fn stage(&mut self, name: &'static str, pace: Pace, work: impl FnOnce(&mut Self) -> Result<bool>) {
        let only = &self.flags.only;
        if !only.is_empty() && !only.iter().any(|wanted| wanted == name) {
            return;
        }
        let limit = Duration::from_secs(self.flags.limit_minutes * 60);
        if pace == Pace::Slow && self.start.elapsed() > limit {
            self.skip(format!(
                "stage {name}: {} minutes have passed",
                self.flags.limit_minutes
            ));
            return;
        }
        println!("\n=== {name}");
        let start = Instant::now();
        let passed = work(self).unwrap_or_else(|error| {
            println!("FAILED: {error:#}");
            false
        });
        println!(
            "=== {name}: {} in {:.0} s",
            if passed { "ok" } else { "FAILED" },
            start.elapsed().as_secs_f64()
        );
        // A stage without test programs counts as one test.
        self.counts.add(Counts {
            passed: u64::from(passed),
            failed: u64::from(!passed),
        });
        if !passed {
            self.failed_stages.push(name);
        }
    }

    /// Notes what was not tested; told again at the end.
    pub(crate) fn skip(&mut self, what: String) {
        println!("!!! SKIPPED: {what}");
        self.skipped.push(what);
    }

    /// Cargo with these words.
    fn cargo(&mut self, words: &[&str]) -> Result<bool> {
        let mut command = cargo(self.places);
        command.args(words);
        self.command(&mut command)
    }

    /// A command whose test results count.
    pub(crate) fn command(&mut self, command: &mut Command) -> Result<bool> {
        let (passed, counts) = shown(command)?;
        self.counts.add(counts);
        Ok(passed)
    }

    /// Counts what a guest printed.
    pub(crate) fn count(&mut self, counts: Counts) {
        self.counts.add(counts);
    }

    /// The programs of a tool; a tool that cannot be built is a skip.
    pub(crate) fn tool(&mut self, tool: Tool) -> Option<std::path::PathBuf> {
        match tools::build(self.places, tool) {
            Ok(dir) => Some(dir),
            Err(error) => {
                self.skip(format!("{tool:?} cannot be built: {error:#}"));
                None
            }
        }
    }

    fn finish(self) -> bool {
        println!("\n=== {:.0} s in all", self.start.elapsed().as_secs_f64());
        for what in &self.skipped {
            println!("!!! SKIPPED: {what}");
        }
        for stage in &self.failed_stages {
            println!("FAILED stage: {stage}");
        }
        println!(
            "{} passed, {} failed, {} skipped",
            self.counts.passed,
            self.counts.failed,
            self.skipped.len()
        );
        self.failed_stages.is_empty() && self.counts.failed == 0
    }
}

fn docs(run: &mut Run<'_>) -> Result<bool> {
    let mut command = cargo(run.places);
    command
        .args([
            "doc",
            "--keep-going",
            "--quiet",
            "--workspace",
            "--no-deps",
            "--document-private-items",
        ])
        // Private items are in it: it is for those who work on the code.
        .env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links");
    run.command(&mut command)
}

fn deny(run: &mut Run<'_>) -> Result<bool> {
    if Command::new("cargo-deny").arg("--version").output().is_err() {
        run.skip("cargo-deny is not installed: licences, bans and sources unchecked".into());
        return Ok(true);
    }
    run.cargo(&["deny", "--offline", "check", "bans", "licenses", "sources"])
}

/// Unit and property tests; the black-box suites have stages of their own.
fn unit(run: &mut Run<'_>) -> Result<bool> {
    let mut command = cargo(run.places);
    command.args([
        "test",
        "--quiet",
        "--workspace",
        "--exclude",
        "coracle-tests",
        "--exclude",
        "coracle-integration",
    ]);
    // The reference plugins, where pods are connected by them.
    if let Some(dir) = run.tool(Tool::Cni) {
        command.env(CNI_BIN, dir);
    }
    if run.flags.long {
        command.env("CORACLE_LONG", "1");
    }
    if let Some(filter) = &run.flags.filter {
        command.arg(filter);
    }
    run.command(&mut command)
}

fn aarch64(run: &mut Run<'_>) -> Result<bool> {
    let mut command = cargo(run.places);
    command
        .args([
            "check",
            "--quiet",
            "--target",
            AARCH64,
            "--package",
            "coracle-cli",
            "--package",
            "coracle-server",
        ])
        .env("CC_aarch64_unknown_linux_musl", "aarch64-linux-gnu-gcc")
        .env(
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER",
            "aarch64-linux-gnu-gcc",
        );
    run.command(&mut command)
}

/// On the reference runtime first: a test that fails there is a wrong test.
fn oci(run: &mut Run<'_>) -> Result<bool> {
    let mut passed = true;
    if let Some(runc) = run.tool(Tool::Runc) {
        println!("--- on runc 1.5.2");
        passed &= oci_suite(run, &runc.join("runc"))?;
    }
    println!("--- on coracle");
    let coracle = build::runtime(run.places)?;
    passed &= oci_suite(run, &coracle)?;
    Ok(passed)
}

/// The suite in one folder, with what it skips counted, and a look at the end for what all of it has left behind.
fn oci_suite(run: &mut Run<'_>, runtime: &Path) -> Result<bool> {
    let scratch = tempfile::Builder::new()
        .prefix("coracle-oci-")
        .tempdir()
        .context("make a folder for bundles")?;
    // Containers of user namespaces have to get through.
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755))?;
    let skips = scratch.path().join("skips");
    let mut passed = true;
    for program in build::test_programs(run.places, &["coracle-tests"], "test")? {
        if program.name == "layout_rules" {
            continue;
        }
        println!("--- {}", program.name);
        let mut command = Command::new(&program.path);
        command
            .args(["--quiet"])
            .args(&run.flags.filter)
            .current_dir(&run.places.repository);
        command
            .env("RUNTIME", runtime)
            .env("CORACLE_TEST_DIR", scratch.path())
            .env("CORACLE_TEST_SKIPS", &skips);
        if run.flags.long {
            command.env("CORACLE_TEST_LONG", "1");
        }
        passed &= run.command(&mut command)?;
    }
    for line in fs::read_to_string(&skips).unwrap_or_default().lines() {
        run.skip(line.trim_start_matches("SKIPPED ").to_owned());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    let place = scratch.path().display().to_string();
    let left: Vec<_> = mounts.lines().filter(|line| line.contains(&place)).collect();
    let bundles = fs::read_dir(scratch.path())?
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with("ct-"));
    let bundles: Vec<_> = bundles.map(|entry| entry.path()).collect();
    if !left.is_empty() || !bundles.is_empty() {
        // Nothing is removed through a mount.
        println!(
            "FAILED: left behind in {}: {bundles:?} {left:?}",
            scratch.keep().display()
        );
        return Ok(false);
    }
    Ok(passed)
}

/// The CRI suite, on a daemon with failpoints.
fn cri(run: &mut Run<'_>) -> Result<bool> {
    let tools = [
        (Tool::Criclient, "CRICLIENT", "criclient"),
        (Tool::Streamer, "STREAMER", "streamer"),
        (Tool::Cni, CNI_BIN, ""),
    ];
    let variables: Vec<_> = tools
        .into_iter()
        .filter_map(|(tool, variable, program)| Some((variable, run.tool(tool)?.join(program))))
        .collect();
    let mut command = integration(run)?;
    command.args(["--test", "cri"]).envs(variables);
    counting_skips(run, &mut command)
}

/// A stock kubelet.
fn kubelet(run: &mut Run<'_>) -> Result<bool> {
    let Some(dir) = run.tool(Tool::Kubelet) else {
        return Ok(true);
    };
    let mut command = integration(run)?;
    command
        .args(["--test", "kubelet"])
        .env("KUBELET", dir.join("kubelet"));
    counting_skips(run, &mut command)
}

/// A stock control plane, and kubectl.
fn cluster(run: &mut Run<'_>) -> Result<bool> {
    let tools = [
        (Tool::Kubelet, "KUBELET", "kubelet"),
        (Tool::Kubernetes, "KUBERNETES_BIN", ""),
        (Tool::Etcd, "ETCD", "server"),
        (Tool::Coredns, "COREDNS", "coredns"),
        (Tool::Cni, CNI_BIN, ""),
    ];
    let mut variables = Vec::new();
    for (tool, variable, program) in tools {
        let Some(dir) = run.tool(tool) else {
            return Ok(true);
        };
        variables.push((variable, dir.join(program)));
    }
    // Without it all but the policies is tested.
    if let Some(dir) = run.tool(Tool::KubeRouter) {
        variables.push(("KUBE_ROUTER", dir.join("kube-router")));
    }
    let mut command = integration(run)?;
    command.args(["--test", "cluster"]).envs(variables);
    counting_skips(run, &mut command)
}

/// Runs a suite and notes each test that it skipped.
fn counting_skips(run: &mut Run<'_>, command: &mut Command) -> Result<bool> {
    let skips = tempfile::NamedTempFile::new().context("make a file for what is skipped")?;
    let passed = run.command(command.env("CORACLE_TEST_SKIPS", skips.path()))?;
    for line in fs::read_to_string(skips.path())
        .context("read what was skipped")?
        .lines()
    {
        run.skip(line.trim_start_matches("SKIPPED ").to_owned());
    }
    Ok(passed)
}

/// `cargo test` of the integration crate with our programs in its environment, one test at a time.
fn integration(run: &Run<'_>) -> Result<Command> {
    let coracled = build::node(run.places, Daemon::Test)?;
    let mut command = cargo(run.places);
    command
        .args([
            "test",
            "--quiet",
            "--no-fail-fast",
            "--package",
            "coracle-integration",
        ])
        .env("CORACLED", &coracled)
        .env("CORACLE", coracled.with_file_name("coracle"))
        .env("CORACLE_BIN_DIR", coracled.parent().unwrap_or(&run.places.target))
        .env("RUST_TEST_THREADS", "1");
    if run.flags.long {
        command.env("CORACLE_LONG", "1");
    }
    if let Some(filter) = &run.flags.filter {
        command.arg(filter);
    }
    Ok(command)
}
