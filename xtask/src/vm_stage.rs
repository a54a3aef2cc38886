//! The stages that run in guests: the suites under cgroup v2, and the fallbacks under an older kernel.
//!
//! A group of tests is one boot; two groups run at a time. All programs that are carried in are static.

use std::collections::VecDeque;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::build::{self, Daemon};
use crate::run::{Counts, parse_result, quiet};
use crate::test::Run;
use crate::tools::Tool;
use crate::vm::Guest;

/// System calls of the guests are dear: every deadline of a test is multiplied by this.
const SLOWNESS: u32 = 6;

/// Unit tests that go another way on an older kernel.
const UNIT_TESTS: [&str; 4] = [
    "coracle-kernel",
    "coracle-cgroup",
    "coracle-container",
    "coracle-snapshot",
];

/// What is done in one boot.
struct Group {
    name: &'static str,
    share: TempDir,
    script: String,
    memory_mib: u32,
    limit_seconds: u32,
}

/// The OCI suite, the CRI suite and the kubelet tests in the cgroup v2 guest.
pub(crate) fn guest(run: &mut Run<'_>) -> Result<bool> {
    let Some(guest) = Guest::prepare(&run.places.repository, &run.places.cache, run.flags.long)? else {
        run.skip(
            "no guest kernel (CORACLE_UML, the cache, shared/vm): cgroup v2 is untested; --long builds one"
                .into(),
        );
        return Ok(true);
    };
    let mut groups = VecDeque::from([oci_group(run)?, cri_group(run)?]);
    groups.extend(kubelet_group(run)?);
    let queue = Mutex::new(groups);
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for cpu in 0..2 {
            let (queue, done, guest) = (&queue, &done, &guest);
            scope.spawn(move || {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(group) = next else { return };
                    let outcome = boot(guest, &group, cpu);
                    done.lock().unwrap_or_else(PoisonError::into_inner).push(outcome);
                }
            });
        }
    });
    let mut passed = true;
    for outcome in done.into_inner().unwrap_or_else(PoisonError::into_inner) {
        let (counts, group_passed) = outcome?;
        run.count(counts);
        passed &= group_passed;
    }
    Ok(passed)
}

/// Unit tests whose fallbacks an older kernel takes, a container and a pod, under Debian's 6.1 kernel.
pub(crate) fn qemu(run: &mut Run<'_>) -> Result<bool> {
    let payload = share()?;
    carry(&build::runtime(run.places)?, payload.path(), "coracle")?;
    carry(
        &build::daemon(run.places, Daemon::Test)?,
        payload.path(),
        "coracled",
    )?;
    carry(&build::demo_static(run.places)?, payload.path(), "coracle-demo")?;
    let unit = payload.path().join("unit");
    fs::create_dir(&unit)?;
    for program in build::test_programs(run.places, &UNIT_TESTS, "lib")? {
        carry(&program.path, &unit, &program.name)?;
    }
    let script = include_str!("qemu_smoke.sh");
    let output = Command::new("bash")
        .arg(run.places.repository.join("integration/vm/qemu61"))
        .arg(run.places.cache.join("vm"))
        .arg(payload.path())
        .args(["-t", "900", "--", script])
        .output()
        .context("run integration/vm/qemu61")?;
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    run.count(counts_of(&text));
    Ok(output.status.success())
}

/// The OCI suite on coracle; with `--long` on runc before it, to tell a wrong test from a wrong runtime.
fn oci_group(run: &mut Run<'_>) -> Result<Group> {
    let share = share()?;
    carry(&build::runtime(run.places)?, share.path(), "coracle")?;
    let mut runtimes = vec!["coracle"];
    if run.flags.long
        && let Some(dir) = run.tool(Tool::Runc)
    {
        carry(&dir.join("runc"), share.path(), "runc")?;
        runtimes.insert(0, "runc");
    }
    let tests = share.path().join("tests");
    fs::create_dir(&tests)?;
    for program in build::test_programs(run.places, &["coracle-tests"], "test")? {
        if program.name != "layout_rules" {
            carry(&program.path, &tests, &program.name)?;
        }
    }
    let source = run.places.repository.join("tests/programs/probe.c");
    quiet(
        Command::new("gcc")
            .args(["-static", "-O1", "-o"])
            .arg(share.path().join("probe"))
            .arg(source),
    )?;
    let script = format!(
        "{BEGIN} mkdir -p /var/lib/bundles; chmod 755 /var/lib/bundles; export CORACLE_TEST_DIR=/var/lib/bundles CORACLE_TEST_PROBE=$PWD/probe RUST_TEST_THREADS=2; \
         for runtime in {}; do echo \"--- $runtime\"; for test in tests/*; do RUNTIME=$PWD/$runtime $test {} || failed=1; done; done; exit $failed",
        runtimes.join(" "),
        filter(run)
    );
    Ok(Group {
        name: "oci",
        share,
        script,
        memory_mib: 2048,
        limit_seconds: if run.flags.long { 1500 } else { 600 },
    })
}

/// The CRI suite, on a daemon with failpoints.
fn cri_group(run: &Run<'_>) -> Result<Group> {
    let share = share()?;
    carry_programs(run, share.path(), "cri")?;
    let script = format!("{BEGIN} ./cri {} || failed=1; exit $failed", filter(run));
    Ok(Group {
        name: "cri",
        share,
        script,
        memory_mib: 2048,
        limit_seconds: 900,
    })
}

/// The kubelet tests; the one that takes six minutes with `--long` alone.
fn kubelet_group(run: &mut Run<'_>) -> Result<Option<Group>> {
    let Some(dir) = run.tool(Tool::Kubelet) else {
        return Ok(None);
    };
    let share = share()?;
    carry_programs(run, share.path(), "kubelet-test")?;
    carry(&dir.join("kubelet"), share.path(), "kubelet")?;
    let tests = match (&run.flags.filter, run.flags.long) {
        (Some(filter), _) => filter.as_str(),
        (None, true) => "",
        (None, false) => "a_pod_lives a_reboot",
    };
    // A user-mode kernel tells no clock speed, and the kubelet's cAdvisor insists on one.
    let script = format!(
        "{BEGIN} awk '1; /^model name/{{print \"cpu MHz\\t\\t: 2000.000\"}}' /proc/cpuinfo >/root/cpuinfo; mount --bind /root/cpuinfo /proc/cpuinfo; \
         KUBELET=$PWD/kubelet ./kubelet-test {tests} --test-threads 1 || failed=1; exit $failed"
    );
    Ok(Some(Group {
        name: "kubelet",
        share,
        script,
        memory_mib: 3000,
        limit_seconds: 1500,
    }))
}

/// Everything lies on the guest's own disk: a host folder cannot hold what containers need.
const BEGIN: &str = "cp -r /mnt/share /var/lib/suite; cd /var/lib/suite; failed=0; export CORACLED=$PWD/coracled CORACLE=$PWD/coracle CORACLE_BIN_DIR=$PWD;";

fn boot(guest: &Guest, group: &Group, cpu: u32) -> Result<(Counts, bool)> {
    let start = Instant::now();
    let script = format!("export CORACLE_TEST_SLOW={SLOWNESS}; {}", group.script);
    let outcome = guest.run(
        group.share.path(),
        &script,
        group.memory_mib,
        group.limit_seconds,
        cpu,
    )?;
    let word = if outcome.status == 0 { "ok" } else { "FAILED" };
    // In one piece: two groups run at a time.
    println!(
        "--- {} in the guest\n{}--- {}: {word} ({}) in {:.0} s",
        group.name,
        outcome.output,
        group.name,
        outcome.status,
        start.elapsed().as_secs_f64()
    );
    Ok((counts_of(&outcome.output), outcome.status == 0))
}

/// `coracle`, `coracled` and one test program of the integration crate, named `name`.
fn carry_programs(run: &Run<'_>, share: &Path, name: &str) -> Result<()> {
    carry(&build::runtime(run.places)?, share, "coracle")?;
    carry(&build::daemon(run.places, Daemon::Test)?, share, "coracled")?;
    let wanted = name.trim_end_matches("-test");
    let programs = build::test_programs(run.places, &["coracle-integration"], "test")?;
    let program = programs
        .iter()
        .find(|program| program.name == wanted)
        .with_context(|| format!("no test program {wanted}"))?;
    carry(&program.path, share, name)
}

/// Copies a program without its symbols: most of a debug build is symbols.
fn carry(program: &Path, dir: &Path, name: &str) -> Result<()> {
    quiet(Command::new("strip").arg("-o").arg(dir.join(name)).arg(program)).map(drop)
}

fn share() -> Result<TempDir> {
    tempfile::Builder::new()
        .prefix("coracle-share-")
        .tempdir_in("/var/tmp")
        .context("make a folder for a guest")
}

fn filter<'r>(run: &'r Run<'_>) -> &'r str {
    run.flags.filter.as_deref().unwrap_or_default()
}

fn counts_of(output: &str) -> Counts {
    let mut counts = Counts::default();
    output.lines().for_each(|line| counts.add(parse_result(line)));
    counts
}
