//! On files in a directory, for the controllers that a test machine may not have on v2.

use std::fs;
use std::path::Path;

use coracle_spec::oci::{LinuxCpuBuilder, LinuxPidsBuilder, LinuxResources, LinuxResourcesBuilder};

use super::*;
use crate::Host;

/// A leaf of files with a kernel's first values.
fn fixture() -> (tempfile::TempDir, Box<dyn Manager>) {
    let root = tempfile::tempdir().unwrap();
    let leaf = root.path().join("pods/leaf");
    fs::create_dir_all(&leaf).unwrap();
    let all = "cpuset cpu io memory hugetlb pids rdma";
    fs::write(root.path().join("cgroup.controllers"), all).unwrap();
    for (file, text) in [
        ("cgroup.controllers", all),
        ("cgroup.events", "populated 0\nfrozen 0\n"),
        ("cgroup.type", "domain\n"),
        ("cgroup.procs", ""),
        ("cpu.max", "max 100000\n"),
        ("cpu.weight", ""),
        ("memory.max", ""),
        ("memory.low", ""),
        ("memory.swap.max", ""),
        ("memory.current", "4096\n"),
        ("pids.max", ""),
        ("io.weight", ""),
        ("io.max", ""),
        ("cpuset.cpus", ""),
        ("memory.high", ""),
        (
            "memory.stat",
            "anon 10\nfile 20\ninactive_file 5\nfile_mapped 3\nkernel 7\npgfault 8\npgmajfault 1\n",
        ),
        ("memory.events", "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\n"),
        (
            "cpu.stat",
            "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 4\nnr_throttled 1\nthrottled_usec 9\n",
        ),
        ("pids.current", "2\n"),
        (
            "io.stat",
            "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:16 \n",
        ),
    ] {
        fs::write(leaf.join(file), text).unwrap();
    }
    let host = Host::unified_at(root.path());
    let group = host
        .manager(&Location::absolute("/pods/leaf").unwrap(), Options::default())
        .unwrap();
    (root, group)
}

fn text(root: &Path, file: &str) -> String {
    fs::read_to_string(root.join("pods/leaf").join(file)).unwrap()
}

fn resources(json: &str) -> LinuxResources {
    serde_json::from_str(json).unwrap()
}

#[test]
fn limits_become_files() {
    let (root, mut group) = fixture();
    group.create(&LinuxResources::default()).unwrap();
    let given = resources(
        r#"{"memory": {"limit": 1000000, "swap": 1500000, "reservation": 500000},
            "cpu": {"shares": 2048, "quota": 50000, "period": 20000, "cpus": "0-1"},
            "pids": {"limit": 64},
            "blockIO": {"weight": 10, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1024}]},
            "unified": {"memory.high": "max\n900000"}}"#,
    );
    group.apply(&given, Change::Update).unwrap();
    let expected = [
        ("memory.max", "1000000"),
        ("memory.swap.max", "500000"),
        ("memory.low", "500000"),
        ("cpu.weight", "174"),
        ("cpu.max", "50000 20000"),
        ("cpuset.cpus", "0-1"),
        ("pids.max", "64"),
        ("io.weight", "1"),
        ("io.max", "8:0 rbps=1024"),
        ("memory.high", "900000"),
    ];
    for (file, value) in expected {
        assert!(
            text(root.path(), file).starts_with(value),
            "{file}: {:?}",
            text(root.path(), file)
        );
    }
}

#[test]
fn an_update_of_the_period_keeps_the_quota() {
    let (root, mut group) = fixture();
    fs::write(root.path().join("pods/leaf/cpu.max"), "30000 100000\n").unwrap();
    group
        .apply(&resources(r#"{"cpu": {"period": 50000}}"#), Change::Update)
        .unwrap();
    assert!(text(root.path(), "cpu.max").starts_with("30000 50000"));
}

#[test]
fn a_limit_without_its_controller_names_it() {
    let (_root, mut group) = fixture();
    let given = resources(r#"{"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]}"#);
    let error = group.apply(&given, Change::Update).unwrap_err();
    let said = error.to_string();
    assert!(
        said.contains("hugetlb") && said.contains("hugetlb.2MB.max") && said.contains("/pods/leaf"),
        "{said}"
    );
}

#[test]
fn limits_that_contradict_themselves_or_leave_the_group_are_refused() {
    let (root, mut group) = fixture();
    for (json, why) in [
        (
            r#"{"memory": {"swap": 5}}"#,
            "unable to set swap limit without memory limit",
        ),
        (
            r#"{"memory": {"limit": 10, "swap": 5}}"#,
            "memory+swap limit should be >= memory limit",
        ),
        (
            r#"{"memory": {"limit": 100, "checkBeforeUpdate": true}}"#,
            "rejecting memory limit 100 <= usage 4096",
        ),
        (r#"{"memory": {"swappiness": 5}}"#, "swappiness"),
        (
            r#"{"unified": {"../other/memory.max": "1"}}"#,
            "no file of a cgroup",
        ),
        (r#"{"unified": {"..": "1"}}"#, "no file of a cgroup"),
        (r#"{"unified": {"cgroup.procs": "1"}}"#, "not a limit"),
        (r#"{"unified": {"memory.nothing": "1"}}"#, "memory"),
        (
            r#"{"hugepageLimits": [{"pageSize": "../2MB", "limit": 1}]}"#,
            "page size",
        ),
        (
            r#"{"hugepageLimits": [{"pageSize": "MB", "limit": 1}]}"#,
            "page size",
        ),
        (r#"{"rdma": {"mlx 0": {"hcaHandles": 1}}}"#, "device name"),
        (r#"{"network": {"classID": 1}}"#, "network"),
        (r#"{"cpu": {"realtimeRuntime": 1}}"#, "realtime"),
    ] {
        let said = group
            .apply(&resources(json), Change::Update)
            .unwrap_err()
            .to_string();
        assert!(said.contains(why), "{json}: {said}");
    }
    assert_eq!(text(root.path(), "memory.max"), "");
}

#[test]
fn statistics_are_read_from_files() {
    let (_root, mut group) = fixture();
    let stats = group.stats().unwrap();
    let memory = stats.memory.unwrap();
    assert_eq!(
        (
            memory.usage_bytes,
            memory.working_set_bytes(),
            memory.kernel_bytes
        ),
        (4096, 4091, 7)
    );
    assert_eq!(
        (memory.limit_bytes, memory.oom_kills, memory.anonymous_bytes),
        (None, 1, 10)
    );
    assert_eq!(stats.cpu.unwrap().usage_nanoseconds, 5000);
    assert_eq!(stats.cpu.unwrap().throttling.throttled_nanoseconds, 9000);
    assert_eq!(stats.pids.unwrap().current, 2);
    assert_eq!(stats.io.len(), 2);
    assert_eq!(
        (stats.io[0].read_bytes, stats.io[0].writes, stats.io[1].minor),
        (1, 4, 16)
    );
    assert_eq!(group.watch_oom().unwrap().unwrap().kills().unwrap(), 1);
}

#[test]
fn what_is_there_must_be_empty_and_running() {
    let (root, mut group) = fixture();
    let leaf = root.path().join("pods/leaf");
    fs::write(leaf.join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
    fs::write(leaf.join("cgroup.procs"), "11\n12\n").unwrap();
    let said = group.create(&LinuxResources::default()).unwrap_err().to_string();
    assert_eq!(said, "container's cgroup is not empty: 2 process(es) found");
    fs::write(leaf.join("cgroup.events"), "populated 0\nfrozen 1\n").unwrap();
    let said = group.create(&LinuxResources::default()).unwrap_err().to_string();
    assert_eq!(said, "container's cgroup unexpectedly frozen");
}

#[test]
fn links_and_other_file_systems_are_not_followed() {
    let (root, _group) = fixture();
    std::os::unix::fs::symlink("/tmp", root.path().join("link")).unwrap();
    let host = Host::unified_at(root.path());
    for path in ["/link", "/link/leaf"] {
        let found = host.manager(&Location::absolute(path).unwrap(), Options::default());
        assert!(found.is_err(), "{path}");
    }
}

#[test]
fn settings_of_a_new_group_that_change_nothing_are_not_written() {
    let cpu = LinuxCpuBuilder::default()
        .shares(1024u64)
        .quota(-1)
        .period(100_000u64)
        .build()
        .unwrap();
    let pids = LinuxPidsBuilder::default().limit(-1).build().unwrap();
    let given = LinuxResourcesBuilder::default()
        .cpu(cpu)
        .pids(pids)
        .build()
        .unwrap();
    let empty = tempfile::tempdir().unwrap();
    let dir = Dir::new(
        coracle_kernel::path::open_dir(empty.path()).unwrap(),
        String::new(),
    );
    for setting in limits::settings(&given).unwrap() {
        setting.write(&dir, true).unwrap();
        assert!(setting.write(&dir, false).is_err(), "{setting:?}");
    }
    assert!(limits::controllers(&given).is_empty() || limits::controllers(&given) == ["pids"]);
}
