//! On the host's cgroup2 mount, in groups of the tests' own.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::mpsc;

use coracle_kernel::exec::{Program, Spawn};
use coracle_spec::oci::{
    LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxMemoryBuilder, LinuxResources, LinuxResourcesBuilder,
};

use super::*;
use crate::testing::{Cleanup, PATIENCE, Shell, place};
use crate::{Host, Kind};

fn resources(json: &str) -> LinuxResources {
    serde_json::from_str(json).unwrap()
}

/// The host's cgroup2 mount, wherever it is; none where there is none or it cannot be written.
fn real() -> Option<Host> {
    let host = match Host::detect().unwrap() {
        host if host.kind() == Kind::Unified => host,
        _ if Path::new("/sys/fs/cgroup/unified/cgroup.procs").exists() => {
            Host::unified_at(Path::new("/sys/fs/cgroup/unified"))
        }
        _ => {
            eprintln!("SKIPPED: no cgroup2 mount on this host");
            return None;
        }
    };
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

#[test]
fn a_group_holds_freezes_thaws_and_kills_its_processes() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    assert!(!group.exists());
    group.create(&LinuxResources::default()).unwrap();
    assert!(matches!(group.place().unwrap(), Placement::Into(_)));
    assert!(group.wait_empty(Duration::ZERO).unwrap());

    let mut shell = Shell::inside(&*group);
    assert_eq!(shell.run("echo alive"), "alive");
    assert_eq!(group.pids().unwrap(), [shell.pid()]);
    assert!(!group.wait_empty(Duration::ZERO).unwrap());

    let mut again = host.manager(&location, Options::default()).unwrap();
    assert!(matches!(
        again.create(&LinuxResources::default()),
        Err(Error::NotEmpty(1))
    ));

    group.freeze(PATIENCE).unwrap();
    assert!(group.frozen().unwrap());
    shell.send("echo late");
    group.thaw(PATIENCE).unwrap();
    assert!(!group.frozen().unwrap());
    assert_eq!(shell.run(""), "late");

    // A frozen group in a frozen group dies as well.
    let inner = group.sub_group("exec-1").unwrap();
    let child = Shell::inside(&*inner);
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
fn a_process_is_born_in_its_group() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    group.create(&LinuxResources::default()).unwrap();
    let Placement::Into(leaf) = group.place().unwrap() else {
        panic!("this is a v2 group")
    };
    let args = [c"sleep", c"1000"].map(std::ffi::CString::from);
    let sleep = Spawn::new(Program::Path(c"/bin/sleep"), &args);
    let born = Spawn {
        cgroup: Some(leaf.as_fd()),
        ..sleep
    }
    .spawn()
    .unwrap();
    assert_eq!(group.pids().unwrap(), [born.pid]);
    group.kill(PATIENCE).unwrap();
    assert!(group.wait_empty(PATIENCE).unwrap());
    coracle_kernel::wait::wait(coracle_kernel::wait::Id::Pidfd(born.pidfd.as_fd())).unwrap();
}

#[test]
fn a_sub_group_of_a_threaded_container_takes_and_kills_its_processes() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    group.create(&LinuxResources::default()).unwrap();
    let main = Shell::inside(&*group);
    // As a container with a writable cgroup mount may do.
    group.sub_group("own").unwrap();
    let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .into_iter()
        .find(|root| fs::write(format!("{root}{}/own/cgroup.type", location.path()), "threaded").is_ok());
    assert!(root.is_some());
    let mut inner = group.sub_group("exec-1").unwrap();
    let child = Shell::inside(&*inner);
    assert_eq!(inner.pids().unwrap(), [child.pid()]);
    inner.kill(PATIENCE).unwrap();
    assert!(inner.wait_empty(PATIENCE).unwrap());
    assert_eq!(child.signal(), Some(9));
    inner.remove(PATIENCE).unwrap();
    assert_eq!(group.pids().unwrap(), [main.pid()]);
}

#[test]
fn the_end_of_the_last_process_is_an_event() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    group.create(&LinuxResources::default()).unwrap();
    let mut shell = Shell::inside(&*group);
    let (sender, receiver) = mpsc::channel();
    let waiter = host.manager(&location, Options::default()).unwrap();
    let thread = std::thread::spawn(move || {
        sender.send(()).unwrap();
        waiter.wait_empty(PATIENCE).unwrap()
    });
    receiver.recv().unwrap();
    shell.send("exit");
    assert!(thread.join().unwrap());
}

#[test]
fn a_frozen_leftover_is_refused_and_removed() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    group.create(&LinuxResources::default()).unwrap();
    group.freeze(PATIENCE).unwrap();
    assert!(matches!(
        group.create(&LinuxResources::default()),
        Err(Error::Frozen)
    ));
    group.remove(PATIENCE).unwrap();
}

#[test]
fn five_hundred_groups_and_deep_ones_are_removed() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    group.create(&LinuxResources::default()).unwrap();
    let mut deep = group.sub_group("deep").unwrap();
    for _ in 0..40 {
        deep = deep.sub_group("er").unwrap();
    }
    for number in 0..460 {
        group.sub_group(&format!("exec-{number}")).unwrap();
    }
    group.remove(PATIENCE).unwrap();
    assert!(!host.manager(&location, Options::default()).unwrap().exists());
}

#[test]
fn a_group_with_a_process_is_not_removed_in_time() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    group.create(&LinuxResources::default()).unwrap();
    let _shell = Shell::inside(&*group);
    let error = group.remove(Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, Error::Deadline { .. }), "{error}");
    assert!(group.exists());
}

#[test]
fn device_rules_are_in_force_and_replaced() {
    let Some(host) = real() else { return };
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    let deny = LinuxDeviceCgroupBuilder::default()
        .allow(false)
        .access("rwm")
        .build()
        .unwrap();
    let kmsg = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(LinuxDeviceType::C)
        .major(1)
        .minor(11)
        .access("r")
        .build()
        .unwrap();
    let with = |rules| LinuxResourcesBuilder::default().devices(rules).build().unwrap();
    group.create(&LinuxResources::default()).unwrap();
    group.apply(&with(vec![deny.clone()]), Change::First).unwrap();
    let mut shell = Shell::inside(&*group);
    let can =
        |shell: &mut Shell, what: &str| shell.run(&format!("({what}) 2>/dev/null && echo yes || echo no"));
    assert_eq!(can(&mut shell, ": < /dev/zero"), "yes");
    assert_eq!(can(&mut shell, ": < /dev/kmsg"), "no");

    // An update leaves the rules alone; a new container in the same group brings its own.
    group.apply(&with(vec![kmsg.clone()]), Change::Update).unwrap();
    assert_eq!(can(&mut shell, ": < /dev/kmsg"), "no");
    let mut next = host.manager(&location, Options::default()).unwrap();
    next.apply(&with(vec![deny, kmsg]), Change::First).unwrap();
    assert_eq!(can(&mut shell, ": < /dev/kmsg"), "yes");
    assert_eq!(can(&mut shell, ": > /dev/kmsg"), "no");
    let dir = fs::File::open(format!("/sys/fs/cgroup/unified{}", location.path()));
    if let Ok(dir) = dir {
        assert_eq!(
            coracle_kernel::bpf::device_programs(&dir).unwrap().len(),
            1,
            "replaced, not added"
        );
    }
}

#[test]
fn limits_that_this_hierarchy_cannot_hold_say_so() {
    let Some(host) = real() else { return };
    if host.controllers().unwrap().iter().any(|name| name == "memory") {
        eprintln!("SKIPPED: the memory controller is on this hierarchy");
        return;
    }
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    let memory = LinuxMemoryBuilder::default().limit(1 << 20).build().unwrap();
    let given = LinuxResourcesBuilder::default().memory(memory).build().unwrap();
    group.create(&given).unwrap();
    let said = group.apply(&given, Change::First).unwrap_err().to_string();
    assert!(
        said.contains("memory.max") && said.contains("controller memory"),
        "{said}"
    );
    assert_eq!(group.stats().unwrap().memory, None);
    assert!(group.watch_oom().unwrap().is_none());
}

#[test]
fn controllers_are_enabled_down_to_the_leaf() {
    let Some(host) = real() else { return };
    if !host.controllers().unwrap().iter().any(|name| name == "hugetlb") {
        eprintln!("SKIPPED: no hugetlb controller on this hierarchy");
        return;
    }
    let location = place();
    let _cleanup = Cleanup(&host, location.clone());
    let mut group = host.manager(&location, Options::default()).unwrap();
    let size = if cfg!(target_arch = "x86_64") {
        "2MB"
    } else {
        "64KB"
    };
    let given = resources(&format!(
        r#"{{"hugepageLimits": [{{"pageSize": "{size}", "limit": 0}}]}}"#
    ));
    group.create(&given).unwrap();
    group.apply(&given, Change::First).unwrap();
}
