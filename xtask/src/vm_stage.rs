//! The stages that run in guests: the suites under cgroup v2, and the fallbacks under an older kernel.
//!
//! A group of tests is one boot; two groups run at a time. All programs that are carried in are static.

use std::collections::{BTreeMap, VecDeque};
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
use crate::vm::{Guest, Outcome};

/// System calls of the guests are dear: every deadline of a test is multiplied by this.
const SLOWNESS: u32 = 6;

/// What the guest runs, a boot each; the filter may name one.
const GROUPS: [&str; 4] = ["oci", "cri", "kubelet", "cluster"];

/// The CRI suite takes as long as all the rest, so it is run in as many boots.
const CRI_SHARDS: usize = 2;

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
    // The longest first: two boots at a time, and none that is left over at the end takes long.
    let mut groups = VecDeque::new();
    for shard in 0..CRI_SHARDS {
        if is_wanted(run, "cri") {
            groups.push_back(cri_group(run, shard)?);
        }
    }
    if is_wanted(run, "oci") {
        groups.push_back(oci_group(run)?);
    }
    if is_wanted(run, "kubelet") {
        groups.extend(kubelet_group(run)?);
    }
    // 3 to 10 minutes, as the host is busy. Its tests are chosen by words of their own: a word for others leaves it out.
    let filter = run.flags.filter.as_deref();
    if filter == Some("cluster") || (run.flags.long && filter.is_none()) {
        groups.extend(cluster_group(run)?);
    }
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
        passed &= tell(run, &outcome?);
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
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    let outcome = Outcome {
        output: text,
        status: output.status.code().unwrap_or(125),
    };
    println!("{}", outcome.output);
    Ok(tell(run, &("qemu", outcome)))
}

/// Whether a group is run: all are, but where the filter is the name of one.
fn is_wanted(run: &Run<'_>, group: &str) -> bool {
    match run.flags.filter.as_deref() {
        Some(filter) if GROUPS.contains(&filter) => filter == group,
        _ => true,
    }
}

/// Counts what a guest told, and passes on what it skipped; whether all of it passed.
fn tell(run: &mut Run<'_>, (name, outcome): &(&'static str, Outcome)) -> bool {
    let mut counts = Counts::default();
    let mut skipped = BTreeMap::<&str, u32>::new();
    for line in outcome.output.lines() {
        counts.add(parse_result(line));
        if let Some(what) = skipped_of(line) {
            *skipped.entry(what).or_default() += 1;
        }
    }
    run.count(counts);
    for (what, times) in skipped {
        let times = if times > 1 {
            format!(" ({times} tests)")
        } else {
            String::new()
        };
        run.skip(format!("in the guest ({name}): {what}{times}"));
    }
    let passed = outcome.status == 0 && counts.failed == 0;
    // A guest that ran nothing has not passed; with a filter most groups have nothing of that name.
    if passed && counts.passed == 0 && filter(run).is_empty() {
        println!("FAILED: {name}: no test ran");
        return false;
    }
    passed
}

/// What a suite says of a test that it skipped, in any of its wordings.
fn skipped_of(line: &str) -> Option<&str> {
    // A harness with one thread has written the test's name already.
    let line = line.rsplit_once(" ... ").map_or(line, |(_, rest)| rest).trim();
    let rest = line
        .strip_prefix("SKIPPED")
        .or_else(|| line.strip_prefix("skipped"))?;
    Some(rest.trim_start_matches([':', ',', ' ']))
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
fn cri_group(run: &mut Run<'_>, shard: usize) -> Result<Group> {
    let share = share()?;
    carry_programs(run, share.path(), "cri")?;
    let mut client = "";
    if let Some(dir) = run.tool(Tool::Criclient) {
        carry(&dir.join("criclient"), share.path(), "criclient")?;
        client = "CRICLIENT=$PWD/criclient";
    }
    let script = format!(
        "{BEGIN} {client} CORACLE_TEST_SHARD={shard}/{CRI_SHARDS} ./cri {} || failed=1; exit $failed",
        filter(run)
    );
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
    let tests = match (filter(run), run.flags.long) {
        ("", true) => "",
        ("", false) => "a_pod_lives a_reboot",
        (filter, _) => filter,
    };
    let script = format!(
        "{BEGIN} {CLOCK} \
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

/// What people do with kubectl; without services, whose proxy is no part of it.
fn cluster_group(run: &mut Run<'_>) -> Result<Option<Group>> {
    let tools = [
        (Tool::Kubelet, &["kubelet"][..]),
        (
            Tool::Kubernetes,
            &[
                "kube-apiserver",
                "kube-controller-manager",
                "kube-scheduler",
                "kubectl",
            ],
        ),
        (Tool::Etcd, &["server"]),
        (Tool::Coredns, &["coredns"]),
    ];
    let share = share()?;
    carry_programs(run, share.path(), "cluster-test")?;
    for (tool, programs) in tools {
        let Some(dir) = run.tool(tool) else {
            return Ok(None);
        };
        for program in programs {
            carry(&dir.join(program), share.path(), program)?;
        }
    }
    let script = format!(
        "{BEGIN} {CLOCK} KUBELET=$PWD/kubelet KUBERNETES_BIN=$PWD ETCD=$PWD/server COREDNS=$PWD/coredns \
         ./cluster-test exec attach ports files logs debugged || failed=1; exit $failed"
    );
    Ok(Some(Group {
        name: "cluster",
        share,
        script,
        memory_mib: 6000,
        limit_seconds: 2400,
    }))
}

/// A user-mode kernel tells no clock speed, and the kubelet's cAdvisor insists on one.
const CLOCK: &str = "awk '1; /^model name/{print \"cpu MHz\\t\\t: 2000.000\"}' /proc/cpuinfo >/root/cpuinfo; mount --bind /root/cpuinfo /proc/cpuinfo;";

/// Everything lies on the guest's own disk: a host folder cannot hold what containers need.
const BEGIN: &str = "cp -r /mnt/share /var/lib/suite; cd /var/lib/suite; failed=0; export CORACLED=$PWD/coracled CORACLE=$PWD/coracle CORACLE_BIN_DIR=$PWD;";

fn boot(guest: &Guest, group: &Group, cpu: u32) -> Result<(&'static str, Outcome)> {
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
    Ok((group.name, outcome))
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

/// The filter for names of tests: none where it names a group.
fn filter<'r>(run: &'r Run<'_>) -> &'r str {
    let filter = run.flags.filter.as_deref().unwrap_or_default();
    if GROUPS.contains(&filter) { "" } else { filter }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skipped_tests_are_found_in_all_their_wordings() {
        for (line, what) in [
            (
                "SKIPPED some_test here: no systemd",
                Some("some_test here: no systemd"),
            ),
            (
                "SKIPPED: no right to make a cgroup",
                Some("no right to make a cgroup"),
            ),
            ("SKIPPED, all 12 tests: no root", Some("all 12 tests: no root")),
            (
                "skipped: overlay mounts need root",
                Some("overlay mounts need root"),
            ),
            (
                "test t ... SKIPPED t on runc: it differs",
                Some("t on runc: it differs"),
            ),
            ("test a_skipped_one ... ok", None),
        ] {
            assert_eq!(skipped_of(line), what, "{line}");
        }
    }
}
