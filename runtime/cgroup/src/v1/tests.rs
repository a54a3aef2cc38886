//! Groups of version 1 on directories that stand for hierarchies.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};

use coracle_kernel::exec::{Program, Spawn};
use coracle_kernel::pidfd;
use coracle_kernel::signal::Signal;
use coracle_kernel::wait::{self, Id};
use coracle_spec::oci::LinuxResources;

use super::*;
use crate::Kind;
use crate::testing::{Cleanup, PATIENCE, Shell, place};

/// The host, where it has v1 hierarchies that can be written.
fn real() -> Option<Host> {
    let host = Host::detect().unwrap();
    if host.kind() != Kind::V1 {
        eprintln!("SKIPPED: no v1 hierarchies on this host");
        return None;
    }
    let location = place();
    let mut group = host.manager(&location, Options::default()).unwrap();
    let made = group.create(&LinuxResources::default()).is_ok() && group.exists();
    drop(Cleanup(&host, location));
    if !made {
        eprintln!("SKIPPED: no right to make a cgroup");
        return None;
    }
    Some(host)
}

fn resources(json: &str) -> LinuxResources {
    serde_json::from_str(json).unwrap()
}

fn text(controller: &str, location: &Location, file: &str) -> String {
    fs::read_to_string(format!("/sys/fs/cgroup/{controller}{}/{file}", location.path()))
        .unwrap()
        .trim()
        .to_owned()
}

#[test]
fn limits_become_files_of_their_hierarchies() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    let given = resources(
        r#"{"memory": {"limit": 67108864, "swap": 67108864, "reservation": 33554432},
            "cpu": {"shares": 512, "quota": 50000, "period": 200000, "cpus": "0", "mems": "0"},
            "pids": {"limit": 20},
            "devices": [{"allow": false, "access": "rwm"}]}"#,
    );
    group.create(&given).unwrap();
    group.apply(&given, Change::First).unwrap();
    for (controller, file, value) in [
        ("memory", "memory.limit_in_bytes", "67108864"),
        ("memory", "memory.memsw.limit_in_bytes", "67108864"),
        ("memory", "memory.soft_limit_in_bytes", "33554432"),
        ("cpu", "cpu.shares", "512"),
        ("cpu", "cpu.cfs_quota_us", "50000"),
        ("cpu", "cpu.cfs_period_us", "200000"),
        ("cpuset", "cpuset.cpus", "0"),
        ("cpuset", "cpuset.mems", "0"),
        ("pids", "pids.max", "20"),
    ] {
        assert_eq!(text(controller, &location, file), value, "{file}");
    }
    assert!(text("devices", &location, "devices.list").starts_with("c *:* m"));

    let mut shell = Shell::inside(&*group);
    assert_eq!(shell.run("echo alive"), "alive");
    let own = fs::read_to_string(format!("/proc/{}/cgroup", shell.pid())).unwrap();
    for controller in ["memory", "cpu", "cpuset", "pids", "devices", "freezer"] {
        let line = format!(":{controller}:{}", location.path());
        assert!(own.contains(&line), "{line} in {own}");
    }
    assert!(
        !own.contains(&format!(":blkio:{}", location.path())),
        "nothing was asked of blkio: {own}"
    );

    // Both ways, through a moment in which memory may not exceed memory and swap.
    for limit in [134_217_728u64, 33_554_432] {
        let given = resources(&format!(r#"{{"memory": {{"limit": {limit}, "swap": {limit}}}}}"#));
        group.apply(&given, Change::Update).unwrap();
        assert_eq!(
            text("memory", &location, "memory.limit_in_bytes"),
            limit.to_string()
        );
        assert_eq!(
            text("memory", &location, "memory.memsw.limit_in_bytes"),
            limit.to_string()
        );
    }
    let stats = group.stats().unwrap();
    assert_eq!(stats.memory.unwrap().limit_bytes, Some(33_554_432));
    assert_eq!(stats.pids.unwrap().limit, Some(20));
    assert!(stats.pids.unwrap().current >= 1);
}

#[test]
fn devices_are_denied_and_allowed() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    let given = resources(
        r#"{"devices": [{"allow": false, "access": "rwm"},
                        {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "r"}]}"#,
    );
    group.create(&given).unwrap();
    group.apply(&given, Change::First).unwrap();
    let mut shell = Shell::inside(&*group);
    let mut can = |what: &str| shell.run(&format!("({what}) 2>/dev/null && echo yes || echo no"));
    assert_eq!(can(": < /dev/zero"), "yes");
    assert_eq!(can(": < /dev/kmsg"), "yes");
    assert_eq!(can(": > /dev/kmsg"), "no");
    drop(shell);

    // A later container in the same place begins from its own rules; without any, all is denied but the usual.
    let mut next = host.manager(&location, Options::default()).unwrap();
    next.create(&LinuxResources::default()).unwrap();
    next.apply(&LinuxResources::default(), Change::First).unwrap();
    let mut shell = Shell::inside(&*next);
    assert_eq!(
        shell.run("(: < /dev/kmsg) 2>/dev/null && echo yes || echo no"),
        "no"
    );
}

#[test]
fn a_group_freezes_thaws_and_kills_what_is_nested_and_frozen() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    group.create(&LinuxResources::default()).unwrap();
    let mut shell = Shell::inside(&*group);
    group.freeze(PATIENCE).unwrap();
    assert!(group.frozen().unwrap());
    shell.send("echo late");
    group.thaw(PATIENCE).unwrap();
    assert_eq!(shell.run(""), "late");
    let mut again = host.manager(&location, Options::default()).unwrap();
    assert!(matches!(
        again.create(&LinuxResources::default()),
        Err(Error::NotEmpty(1))
    ));

    let inner = group.sub_group("exec-1").unwrap();
    let child = Shell::inside(&*inner);
    let own = fs::read_to_string(format!("/proc/{}/cgroup", child.pid())).unwrap();
    assert!(
        own.contains(&format!(":freezer:{}/exec-1\n", location.path())),
        "{own}"
    );
    assert!(own.contains(&format!(":devices:{}\n", location.path())), "{own}");
    // Opened by its place alone, as a monitor does, it is the same group.
    let opened = host.manager(inner.location(), Options::default()).unwrap();
    let other = Shell::inside(&*opened);
    let own = |pid: Pid| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert_eq!(own(other.pid()), own(child.pid()));
    assert_eq!(
        other.pid(),
        *opened
            .pids()
            .unwrap()
            .iter()
            .find(|pid| **pid != child.pid())
            .unwrap()
    );
    inner.freeze(PATIENCE).unwrap();
    group.freeze(PATIENCE).unwrap();
    group.kill(PATIENCE).unwrap();
    assert!(group.wait_empty(PATIENCE).unwrap());
    assert_eq!((shell.signal(), child.signal()), (Some(9), Some(9)));
    group.remove(PATIENCE).unwrap();
    group.remove(PATIENCE).unwrap();
    assert!(!host.manager(&location, Options::default()).unwrap().exists());
}

#[test]
fn a_new_process_moves_itself_into_every_hierarchy() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    group.create(&resources(r#"{"pids": {"limit": 20}}"#)).unwrap();
    for group in [&*group, &*group.sub_group("exec-1").unwrap()] {
        let Placement::Itself(tasks) = group.place().unwrap() else {
            panic!("this is a v1 group")
        };
        let tasks: Vec<_> = tasks.iter().map(OwnedFd::as_fd).collect();
        let args = [c"sleep", c"1000"].map(std::ffi::CString::from);
        let born = Spawn {
            cgroup_tasks: &tasks,
            ..Spawn::new(Program::Path(c"/bin/sleep"), &args)
        };
        let born = born.spawn().unwrap();
        let moved = Shell::inside(group);
        let groups = |pid: Pid| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        // Where it is put by its pid it is by itself too.
        assert_eq!(groups(born.pid), groups(moved.pid()));
        assert!(groups(born.pid).contains(&format!(":freezer:{}\n", group.location().path())));
        pidfd::send_signal(&born.pidfd, Signal::KILL).unwrap();
        wait::wait(Id::Pidfd(born.pidfd.as_fd())).unwrap();
    }
}

#[test]
fn a_forking_crowd_is_killed_and_a_sub_group_dies_alone() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    let given = resources(r#"{"pids": {"limit": 200}}"#);
    group.create(&given).unwrap();
    group.apply(&given, Change::First).unwrap();
    let main = Shell::inside(&*group);
    let mut inner = group.sub_group("exec-7").unwrap();
    let mut crowd = Shell::inside(&*inner);
    crowd.send("f() { while :; do (sleep 0.01 &) ; done; }; f 2>/dev/null & f 2>/dev/null & f 2>/dev/null &");
    assert_eq!(crowd.run("echo on"), "");
    inner.kill(PATIENCE).unwrap();
    assert!(inner.wait_empty(PATIENCE).unwrap());
    assert_eq!(crowd.signal(), Some(9));
    inner.remove(PATIENCE).unwrap();
    assert_eq!(group.pids().unwrap(), [main.pid()]);
}

#[test]
fn a_group_that_is_removed_while_it_is_frozen_is_no_failure() {
    let Some(host) = real() else { return };
    for _ in 0..200 {
        let location = place();
        let _cleanup = Cleanup(&host, location.clone());
        let mut group = Group::new(host.clone(), location, Options::default()).unwrap();
        group.create(&LinuxResources::default()).unwrap();
        let freezer = group.leaf("freezer").unwrap().dir.clone();
        std::thread::scope(|scope| {
            scope.spawn(|| group.remove(PATIENCE).unwrap());
            freezer::hold_still(&freezer).unwrap();
        });
    }
}

#[test]
fn an_oom_kill_is_told_and_counted() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    let given = resources(r#"{"memory": {"limit": 8388608, "swap": 8388608}}"#);
    group.create(&given).unwrap();
    group.apply(&given, Change::First).unwrap();
    let watch = group.watch_oom().unwrap().unwrap();
    assert_eq!(watch.kills().unwrap(), 0);
    assert!(!watch.wait(Duration::ZERO).unwrap());
    let mut shell = Shell::inside(&*group);
    shell.send("x=a; while :; do x=$x$x; done");
    assert!(watch.wait(PATIENCE).unwrap());
    assert_eq!(shell.signal(), Some(9));
    assert_eq!(watch.kills().unwrap(), 1);
    assert!(!watch.wait(Duration::ZERO).unwrap());
    assert_eq!(group.stats().unwrap().memory.unwrap().oom_kills, 1);
}

#[test]
fn accounting_has_something_to_read() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let options = Options {
        accounting: true,
        ..Options::default()
    };
    let mut group = host.manager(&location, options).unwrap();
    group.create(&LinuxResources::default()).unwrap();
    let mut shell = Shell::inside(&*group);
    shell.run("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done");
    let first = group.stats().unwrap();
    assert!(first.cpu.unwrap().usage_nanoseconds > 0, "{first:?}");
    assert!(first.memory.unwrap().usage_bytes > 0);
    assert_eq!(first.memory.unwrap().limit_bytes, None);
    shell.run("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done");
    let second = group.stats().unwrap();
    assert!(second.cpu.unwrap().usage_nanoseconds > first.cpu.unwrap().usage_nanoseconds);
}

#[test]
fn what_v1_cannot_do_is_refused_before_anything_is_made() {
    let Some(host) = real() else { return };
    let location = place();
    let mut group = host.manager(&location, Options::default()).unwrap();
    for json in [
        r#"{"unified": {"memory.max": "1"}}"#,
        r#"{"hugepageLimits": [{"pageSize": "../../2MB", "limit": 1}]}"#,
    ] {
        assert!(group.create(&resources(json)).is_err(), "{json}");
        assert!(!host.manager(&location, Options::default()).unwrap().exists());
    }
}

#[test]
fn a_relative_path_lies_below_the_callers_own_group() {
    let Some(host) = real() else { return };
    let location = host.locate(Some("coracle-test-relative/x"), "x").unwrap();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = own
        .lines()
        .find_map(|line| line.split_once(":memory:"))
        .map_or("", |(_, path)| path);
    let expected = format!("{}/coracle-test-relative/x", own.trim_end_matches('/'));
    assert_eq!(format!("/{}", location.within("memory")), expected);
}
