//! Control groups: limits are written, and bite; v1 hierarchies and v2 hold the same ones.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;

use coracle_tests::{Bundle, Container, host, json, skip_on, skip_unless, wait_for};

fn lacks(controller: &str) -> bool {
    skip_unless(
        host::has_controller(controller),
        &format!("no {controller} controller"),
    )
}

/// A sleeping container with these resources.
fn with(resources: &[(&str, serde_json::Value)]) -> Container {
    let mut bundle = Bundle::new().args(&["/bin/sleep", "600"]);
    for (name, value) in resources {
        bundle = bundle.set(&format!("/linux/resources/{name}"), value.clone());
    }
    let c = bundle.container();
    c.up();
    c
}

/// The name of a file on v1 and on v2.
fn file(c: &Container, controller: &str, v1: &str, v2: &str) -> String {
    c.cgroup_file(controller, if host::cgroup_v2() { v2 } else { v1 })
}

#[test]
fn the_process_is_in_its_cgroup() {
    if lacks("pids") {
        return;
    }
    let c = with(&[("pids", json!({"limit": 20}))]);
    let procs = c.cgroup_file("pids", "cgroup.procs");
    assert!(procs.lines().any(|l| l == c.pid().to_string()), "{procs}");
}

#[test]
fn the_process_is_in_its_cgroup_of_every_hierarchy() {
    if !host::cgroup_v2()
        && skip_on(
            "coracle",
            "on v1 it joins the hierarchies that limits need, and coracled those of its statistics",
        )
    {
        return;
    }
    let c = with(&[]);
    let seen = fs::read_to_string(format!("/proc/{}/cgroup", c.pid())).unwrap();
    assert!(
        seen.lines()
            .all(|l| l.ends_with(c.cgroup()) || l.starts_with("0::")),
        "{seen}"
    );
    assert!(seen.contains(c.cgroup()), "{seen}");
}

#[test]
fn an_exec_is_in_it_too() {
    let c = with(&[]);
    let out = c.exec_sh("cat /proc/self/cgroup").ok();
    assert!(out.stdout.contains(c.id()), "{out}");
}

#[test]
fn a_created_container_is_already_limited() {
    if lacks("pids") {
        return;
    }
    let c = Bundle::new()
        .set("/linux/resources/pids", json!({"limit": 20}))
        .args(&["/bin/sleep", "600"])
        .container();
    c.create().ok();
    assert_eq!(c.cgroup_file("pids", "pids.max"), "20");
    assert_eq!(c.cgroup_file("pids", "cgroup.procs"), c.pid().to_string());
}

#[test]
fn a_deep_path_is_made_and_its_leaf_removed() {
    let bundle = Bundle::new();
    let path = format!("/{0}/{0}-leaf", bundle.id());
    let c = bundle
        .set("/linux/cgroupsPath", json!(path))
        .set("/linux/resources/pids", json!({"limit": 20}))
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    assert!(host::cgroup_dir("pids", &path).is_dir());
    c.call(&["delete", "-f"]).ok();
    assert!(!host::cgroup_dir("pids", &path).exists());
    // the parent was made on the way, and may belong to others by now: it stays, and is the test's to remove
    coracle_tests::leaks::sweep(c.id());
}

#[test]
fn without_a_path_the_id_is_the_name() {
    let c = Bundle::new()
        .remove("/linux/cgroupsPath")
        .sh("cat /proc/self/cgroup")
        .container();
    let out = c.run().ok();
    assert!(out.stdout.contains(c.id()), "{out}");
}

#[test]
fn a_relative_path_is_below_some_parent() {
    let bundle = Bundle::new();
    let path = bundle.id().to_owned();
    let c = bundle
        .set("/linux/cgroupsPath", json!(path))
        .sh("cat /proc/self/cgroup")
        .container();
    let out = c.run().ok();
    assert!(
        out.stdout.lines().any(|l| l.ends_with(&format!("/{path}"))),
        "{out}"
    );
}

#[test]
fn sub_cgroups_go_with_the_container() {
    let c = with(&[]);
    for controller in ["pids", "memory"] {
        fs::create_dir_all(host::cgroup_dir(controller, c.cgroup()).join("inner/most")).unwrap();
    }
    c.call(&["delete", "-f"]).ok();
    c.assert_gone();
}

#[test]
fn a_cgroup_in_use_is_refused() {
    let first = with(&[("pids", json!({"limit": 20}))]);
    let c = Bundle::new()
        .set("/linux/cgroupsPath", json!(first.cgroup()))
        .args(&["/bin/sleep", "600"])
        .container();
    c.create()
        .refused(&["container's cgroup is not empty: 1 process(es) found"]);
    assert_eq!(first.state()["status"], "running");
    assert!(
        host::cgroup_dir("pids", first.cgroup()).is_dir(),
        "it is still the first one's"
    );
}

#[test]
fn a_memory_limit_is_set() {
    if lacks("memory") {
        return;
    }
    let c = with(&[("memory", json!({"limit": 64 << 20, "reservation": 32 << 20}))]);
    assert_eq!(
        file(&c, "memory", "memory.limit_in_bytes", "memory.max"),
        (64 << 20).to_string()
    );
    assert_eq!(
        file(&c, "memory", "memory.soft_limit_in_bytes", "memory.low"),
        (32 << 20).to_string()
    );
}

#[test]
fn memory_beyond_the_limit_kills() {
    if lacks("memory") {
        return;
    }
    let c = Bundle::new()
        .set("/linux/resources/memory", json!({"limit": 32 << 20}))
        .args(&["/bin/probe", "mem", "500000000"])
        .container();
    let out = c.run();
    assert_eq!(out.code, 137, "{out}");
    // the same without a limit: it was the limit
    let c = Bundle::new().args(&["/bin/probe", "mem", "60000000"]).container();
    assert_eq!(c.run().ok().text(), "touched=60000000");
}

#[test]
fn a_swap_limit_is_set() {
    let v1 = host::cgroup_dir("memory", "")
        .join("memory.memsw.limit_in_bytes")
        .exists();
    let v2 = host::cgroup_v2() && fs::read_to_string("/proc/swaps").is_ok();
    if lacks("memory") || skip_unless(v1 || v2, "no swap accounting") {
        return;
    }
    let c = with(&[("memory", json!({"limit": 64 << 20, "swap": 96 << 20}))]);
    if host::cgroup_v2() {
        let max = host::cgroup_dir("memory", c.cgroup()).join("memory.swap.max");
        if skip_unless(max.exists(), "no memory.swap.max") {
            return;
        }
        assert_eq!(c.cgroup_file("memory", "memory.swap.max"), (32 << 20).to_string());
    } else {
        assert_eq!(
            c.cgroup_file("memory", "memory.memsw.limit_in_bytes"),
            (96 << 20).to_string()
        );
    }
}

#[test]
fn an_unlimited_memory_is_unlimited() {
    if lacks("memory") {
        return;
    }
    let c = with(&[("memory", json!({"limit": -1}))]);
    let value = file(&c, "memory", "memory.limit_in_bytes", "memory.max");
    assert!(
        value == "max" || value.parse::<u64>().is_ok_and(|v| v > 1 << 60),
        "{value}"
    );
}

#[test]
fn swap_below_the_limit_is_refused() {
    if lacks("memory") {
        return;
    }
    let c = Bundle::new()
        .set(
            "/linux/resources/memory",
            json!({"limit": 64 << 20, "swap": 32 << 20}),
        )
        .container();
    c.run().refused(&["memory+swap", "swap", "memsw", "memory limit"]);
    c.assert_gone();
}

#[test]
fn cpu_shares_are_set() {
    if lacks("cpu") {
        return;
    }
    // the conversion is fixed: agents invert it
    for (shares, weight) in [(2, "1"), (1024, "100"), (512, "59"), (262_144, "10000")] {
        let c = with(&[("cpu", json!({"shares": shares}))]);
        let v1 = shares.to_string();
        let expected = if host::cgroup_v2() { weight } else { &v1 };
        assert_eq!(file(&c, "cpu", "cpu.shares", "cpu.weight"), expected, "{shares}");
    }
}

#[test]
fn cpu_quota_and_period_are_set() {
    if lacks("cpu") {
        return;
    }
    let c = with(&[("cpu", json!({"quota": 20_000, "period": 100_000}))]);
    if host::cgroup_v2() {
        assert_eq!(c.cgroup_file("cpu", "cpu.max"), "20000 100000");
    } else {
        assert_eq!(c.cgroup_file("cpu", "cpu.cfs_quota_us"), "20000");
        assert_eq!(c.cgroup_file("cpu", "cpu.cfs_period_us"), "100000");
    }
}

#[test]
fn an_unlimited_quota_is_unlimited() {
    if lacks("cpu") {
        return;
    }
    let c = with(&[("cpu", json!({"quota": -1, "period": 50_000}))]);
    assert!(["-1", "max 50000"].contains(&file(&c, "cpu", "cpu.cfs_quota_us", "cpu.max").as_str()));
}

#[test]
fn a_quota_throttles() {
    if lacks("cpu") {
        return;
    }
    let c = Bundle::new()
        .set(
            "/linux/resources/cpu",
            json!({"quota": 10_000, "period": 100_000}),
        )
        .sh("while :; do :; done")
        .container();
    c.up();
    wait_for("throttling", || {
        let stat = c.cgroup_file("cpu", "cpu.stat");
        let times: u64 = stat
            .lines()
            .find_map(|l| l.strip_prefix("nr_throttled "))?
            .parse()
            .ok()?;
        (times > 0).then_some(())
    });
}

#[test]
fn a_cpuset_is_set() {
    if lacks("cpuset") {
        return;
    }
    let last = std::thread::available_parallelism().map_or(1, usize::from) - 1;
    let c = with(&[("cpu", json!({"cpus": last.to_string(), "mems": "0"}))]);
    assert_eq!(c.cgroup_file("cpuset", "cpuset.cpus"), last.to_string());
    assert_eq!(c.cgroup_file("cpuset", "cpuset.mems"), "0");
    let out = c
        .exec_sh("grep -E '^(Cpus|Mems)_allowed_list' /proc/self/status | cut -f2")
        .ok();
    assert_eq!(out.text(), format!("{last}\n0"));
}

#[test]
fn a_processor_that_is_not_there_is_refused() {
    if lacks("cpuset") {
        return;
    }
    let c = Bundle::new()
        .set("/linux/resources/cpu", json!({"cpus": "4000", "mems": "0"}))
        .container();
    let out = c.run();
    assert_eq!(out.code, 1, "{out}");
    c.assert_gone();
}

#[test]
fn a_process_limit_holds() {
    if lacks("pids") {
        return;
    }
    let c = Bundle::new()
        .set("/linux/resources/pids", json!({"limit": 10}))
        .args(&["/bin/probe", "fork", "50"])
        .container();
    assert_eq!(c.run().ok().text(), "made=9 errno=11");
    let c = Bundle::new()
        .set("/linux/resources/pids", json!({"limit": -1}))
        .args(&["/bin/probe", "fork", "50"])
        .container();
    assert_eq!(c.run().ok().text(), "made=50 errno=0");
}

#[test]
fn unified_values_are_written_last() {
    if skip_unless(host::cgroup_v2(), "unified is for cgroup v2") {
        return;
    }
    let unified = json!({"pids.max": "77", "memory.high": "50000000", "cpu.weight": "321"});
    let c = with(&[("pids", json!({"limit": 10})), ("unified", unified)]);
    assert_eq!(c.cgroup_file("pids", "pids.max"), "77");
    assert_eq!(c.cgroup_file("cpu", "cpu.weight"), "321");
    assert_eq!(
        c.cgroup_file("memory", "memory.high"),
        (50_000_000 / 4096 * 4096).to_string()
    );
}

#[test]
fn unified_is_refused_on_v1() {
    if skip_unless(!host::cgroup_v2(), "cgroup v1") {
        return;
    }
    let c = Bundle::new()
        .set("/linux/resources/unified", json!({"pids.max": "7"}))
        .container();
    c.run().refused(&["unified"]);
    c.assert_gone();
}

#[test]
fn unified_keys_that_do_not_exist_are_refused() {
    if skip_unless(host::cgroup_v2(), "unified is for cgroup v2") {
        return;
    }
    for key in [
        "no.such.file",
        "memory.no_such",
        "../pids.max",
        "/pids.max",
        "a/b",
    ] {
        let c = Bundle::new()
            .set("/linux/resources/unified", json!({key: "1"}))
            .container();
        let out = c.run();
        assert_eq!(out.code, 1, "{key}: {out}");
        c.assert_gone();
    }
}

#[test]
fn a_bad_value_is_refused_and_nothing_is_left() {
    for resources in [
        json!({"cpu": {"period": 1}}),
        json!({"cpu": {"quota": 20_000, "period": 3}}),
        json!({"memory": {"limit": "lots"}}),
        json!({"pids": {"limit": "ten"}}),
        json!({"cpu": {"cpus": "a-b"}}),
    ] {
        let c = Bundle::new()
            .set("/linux/resources", resources.clone())
            .container();
        let out = c.run();
        assert_eq!(out.code, 1, "{resources}: {out}");
        c.assert_gone();
    }
}

#[test]
fn devices_that_are_not_allowed_are_denied() {
    let everything = ["CAP_MKNOD", "CAP_DAC_OVERRIDE"];
    let c = Bundle::new()
        .capabilities(&everything)
        .sh("mknod /tmp/kmsg c 1 11 && dd if=/tmp/kmsg of=/dev/null count=1; cat /dev/null && echo null; echo x > /dev/full")
        .container();
    let out = c.run();
    assert_eq!(out.text(), "null", "{out}");
    assert!(out.stderr.contains("not permitted"), "{out}");
    assert!(
        out.stderr.contains("No space left"),
        "full is one of the default devices: {out}"
    );
}

#[test]
fn allowed_devices_are_allowed() {
    let rules = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "rw"}
    ]);
    let c = Bundle::new()
        .capabilities(&["CAP_MKNOD", "CAP_SYSLOG"])
        .set("/linux/resources/devices", rules)
        .sh("mknod /tmp/kmsg c 1 11 && exec 3<> /tmp/kmsg && echo open; mknod /tmp/mem c 1 1 && cat /tmp/mem | head -c1")
        .container();
    let out = c.run();
    assert_eq!(out.text(), "open", "{out}");
    assert!(out.stderr.contains("not permitted"), "{out}");
}

#[test]
fn a_later_device_rule_overrides_an_earlier_one() {
    let rules = json!([
        {"allow": true, "access": "rwm"},
        {"allow": false, "type": "c", "major": 1, "minor": 11, "access": "rwm"}
    ]);
    let c = Bundle::new()
        .capabilities(&["CAP_MKNOD", "CAP_SYSLOG"])
        .set("/linux/resources/devices", rules)
        .sh("mknod /tmp/mem c 1 1 && echo mem; mknod /tmp/kmsg c 1 11 && exec 3<> /tmp/kmsg && echo kmsg")
        .container();
    let out = c.run();
    assert_eq!(out.text(), "mem", "{out}");
}

#[test]
fn reading_may_be_allowed_without_writing() {
    let rules = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "r"}
    ]);
    let c = Bundle::new()
        .capabilities(&["CAP_MKNOD", "CAP_SYSLOG"])
        .set("/linux/resources/devices", rules)
        .sh("mknod /tmp/kmsg c 1 11; (exec 3< /tmp/kmsg) && echo read; (exec 3> /tmp/kmsg) && echo write")
        .container();
    let out = c.run();
    assert_eq!(out.text(), "read", "{out}");
}

#[test]
fn an_exec_obeys_the_device_rules() {
    let c = Bundle::new()
        .capabilities(&["CAP_MKNOD", "CAP_SYSLOG"])
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    let out = c
        .exec_sh("mknod /tmp/kmsg c 1 11; (exec 3< /tmp/kmsg) && echo read; true")
        .ok();
    assert_eq!(out.text(), "", "{out}");
}
