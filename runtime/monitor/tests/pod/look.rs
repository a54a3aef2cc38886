//! What tests look at.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use coracle_kernel::epoll::{Interest, wait_one};
use coracle_wire::{Body, ContainerState, List};

use crate::client::{Monitor, PATIENCE, pause};

pub(crate) fn state(monitor: &mut Monitor, id: &str) -> Option<ContainerState> {
    let (answer, _) = monitor.ask(List::default(), &[]);
    let Body::Listed(listed) = answer else {
        panic!("{answer:?}")
    };
    listed
        .containers
        .iter()
        .find(|container| container.container_id == id)
        .map(|container| container.state())
}

pub(crate) fn wait_end(process: &OwnedFd) {
    assert!(
        !wait_one(process, Interest::READ, Some(PATIENCE))
            .unwrap()
            .is_empty(),
        "the process lives on"
    );
}

pub(crate) fn eventually(failure: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{failure}");
        pause(Duration::from_millis(10));
    }
}

/// Waits until the monitor holds no more descriptors than it held before.
pub(crate) fn closed_again(monitor: &Monitor, before: &[String]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // One that was still being closed when they were listed first may be missing now.
        let now = monitor.open_fds();
        if now.len() <= before.len() {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "descriptors are left: {now:?}, before: {before:?}"
        );
        pause(Duration::from_millis(10));
    }
}

pub(crate) fn mounts() -> usize {
    std::fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .count()
}

pub(crate) fn children(pid: i32) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(child) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{child}/stat")) else {
            continue;
        };
        let parent = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(1)?.parse::<i32>().ok());
        if parent == Some(pid) {
            found.push(child);
        }
    }
    found
}

/// Whether a process has ended, and its parent has not asked how.
pub(crate) fn is_zombie(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('Z'))
}
