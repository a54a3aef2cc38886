//! Fallbacks that no kernel of the test lanes takes: forced by a seccomp filter that says the kernel lacks a call, or
//! denies it as an outer container would. Those that an older kernel takes by itself run on one
//! (`cargo xtask test --only qemu`); `docs/fallbacks.md` lists all of them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::process::Command;

use coracle_tests::runner::Running;
use coracle_tests::{Bundle, Container, Output, host, json, skip_on, skip_unless};

/// `RUNTIME --root R ARGS` on a kernel that answers this system call so.
fn call_without(call: &str, errno: &str, container: &Container, args: &[&str]) -> Output {
    let runtime = container.runtime();
    let mut command = Command::new(host::probe());
    command
        .args(["without", call, errno])
        .arg(runtime.program())
        .arg("--root")
        .arg(runtime.root())
        .args(args)
        .env("CORACLE_TEST_MARK", container.id());
    Running::start(command, None).wait()
}

fn run_without(call: &str, errno: &str, container: &Container) -> Output {
    let bundle = container.dir().display().to_string();
    call_without(
        call,
        errno,
        container,
        &["run", "--bundle", &bundle, container.id()],
    )
}

#[test]
fn a_kernel_without_keyrings_runs_containers() {
    let c = Bundle::new().sh("probe keyring; echo ran").container();
    let out = run_without("keyctl", "ENOSYS", &c).ok();
    assert!(out.stdout.contains("ran"), "{out}");
    assert!(
        out.stdout.contains("error:"),
        "the filter was not in force, nothing was tested: {out}"
    );
}

#[test]
fn where_device_nodes_are_denied_the_hosts_are_bound() {
    if skip_on("runc", "it makes a fifo of its own by the same call") {
        return;
    }
    let c = Bundle::new()
        .sh("mknod /tmp/null c 1 3 && echo made; stat -c '%t:%T %F' /dev/null; echo x > /dev/null; mount")
        .capabilities(&["CAP_MKNOD"])
        .container();
    let out = run_without("mknodat", "EPERM", &c).ok();
    assert!(out.stdout.contains("1:3 character special file"), "{out}");
    assert!(
        out.stdout.contains(" on /dev/null type "),
        "it was made, not bound: {out}"
    );
}

#[test]
fn where_its_program_cannot_be_mounted_it_runs_from_a_copy() {
    if skip_on("runc", "it has a way of its own") || skip_on("crun", "it has a way of its own") {
        return;
    }
    let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
    c.up();
    // Nothing else in an exec takes this call, so that what is protected is the copy.
    let out = call_without(
        "open_tree",
        "ENOSYS",
        &c,
        &["exec", c.id(), "/bin/echo", "inside"],
    )
    .ok();
    assert_eq!(out.text(), "inside");
    // The control: where the call is needed there is no way without it.
    let c = Bundle::new().bind(c.dir(), "/mnt", &["bind"]).container();
    let out = run_without("open_tree", "ENOSYS", &c);
    out.refused(&["open_tree", "function not implemented", "not implemented"]);
    c.assert_gone();
}

#[test]
fn device_rules_that_cannot_be_had_matter_where_nodes_could_be_made() {
    if skip_unless(host::cgroup_v2(), "device programs are for cgroup v2") {
        return;
    }
    for errno in ["EPERM", "EINVAL"] {
        let denied = Bundle::new().sh("echo ran").container();
        run_without("bpf", errno, &denied).refused(&["device"]);
        denied.assert_gone();
        if skip_on("runc", "(user namespaces alone) it wants the program there too") {
            continue;
        }
        // The root of a user namespace makes no device nodes, so that the rules are a second wall alone.
        let user = Bundle::new().userns().sh("echo ran").container();
        assert_eq!(run_without("bpf", errno, &user).ok().text(), "ran");
    }
}

#[test]
fn what_cannot_be_unmounted_is_covered_without_pivot_root() {
    // In a user namespace of its own the mounts that came along are locked.
    let c = Bundle::new()
        .userns()
        .set("/process/capabilities", json!({}))
        .sh("ls /; cat /proc/self/status | grep -c Name")
        .container();
    let out = c.run_with(&["--no-pivot"], None).ok();
    assert!(out.stdout.ends_with("1\n"), "{out}");
}

#[test]
fn a_sysfs_that_may_not_be_mounted_is_the_hosts() {
    if skip_on("runc", "it refuses such a configuration") {
        return;
    }
    // The root of a user namespace does not own the host's network, which a sysfs shows.
    let c = Bundle::new()
        .userns()
        .without_namespace("network")
        .sh("ls /sys/class/net; mount | grep ' on /sys type '")
        .container();
    let out = c.run().ok();
    assert!(out.stdout.contains("lo\n"), "{out}");
    assert!(out.stdout.contains("type sysfs (ro,"), "{out}");
}

#[test]
fn a_cgroup_tree_that_may_not_be_mounted_is_bound() {
    if skip_unless(host::cgroup_v2(), "a cgroup v2 mount") {
        return;
    }
    // The host's cgroup namespace does not belong to the root of the new user namespace.
    let c = Bundle::new()
        .userns()
        .join("cgroup", "/proc/self/ns/cgroup")
        .mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["ro", "nosuid", "noexec", "nodev"],
        )
        .sh("cat /sys/fs/cgroup/cgroup.procs; mkdir /sys/fs/cgroup/x && echo writable; true")
        .container();
    let out = c.run().ok();
    // Processes of other pid namespaces would show as 0.
    assert!(out.stdout.starts_with("1\n"), "not its own group: {out}");
    assert!(
        !out.stdout.lines().any(|pid| pid == "0"),
        "more than its own: {out}"
    );
    assert!(!out.stdout.contains("writable"), "{out}");
}

#[test]
fn a_lower_oom_score_adj_that_is_denied_stays_and_says_so() {
    if skip_unless(!host::has_capability(24), "CAP_SYS_RESOURCE is there") {
        return;
    }
    if skip_on("runc", "it fails") {
        return;
    }
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    let c = Bundle::new()
        .set("/process/oomScoreAdj", json!(-999))
        .sh("cat /proc/self/oom_score_adj")
        .container();
    let out = c.run().ok();
    assert_eq!(out.stdout, own);
    assert!(
        out.stderr.contains("oom_score_adj -999 is not permitted"),
        "{out}"
    );
}
