//! What goes wrong, and what must not come of it.

use std::io::Read as _;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use coracle_kernel::epoll::{Interest, wait_one};
use coracle_kernel::signal::Signal;
use coracle_kernel::{Errno, fd, pidfd, scm};
use coracle_wire::{Adopt, Body, ContainerState, Exec, FailKind, Forget, List, Start, Upgrade};
use serde_json::json;

use crate::Case;
use crate::bundle::{bundle, bundle_with, process};
use crate::client::{Monitor, pause};
use crate::look::{children, closed_again, eventually, is_zombie, state};

pub(crate) const ALL: &[Case] = &[
    (
        "what_cannot_be_made_leaves_nothing",
        what_cannot_be_made_leaves_nothing,
    ),
    ("a_hanging_helper_is_killed", a_hanging_helper_is_killed),
    (
        "without_a_daemon_everything_goes_on",
        without_a_daemon_everything_goes_on,
    ),
    (
        "a_daemon_that_does_not_read_is_dropped",
        a_daemon_that_does_not_read_is_dropped,
    ),
    (
        "hostile_frames_end_the_connection_alone",
        hostile_frames_end_the_connection_alone,
    ),
    (
        "an_exec_whose_asker_is_gone_does_not_stay",
        an_exec_whose_asker_is_gone_does_not_stay,
    ),
    (
        "ends_that_come_before_their_reports_are_told",
        ends_that_come_before_their_reports_are_told,
    ),
    ("an_upgrade_loses_no_byte", an_upgrade_loses_no_byte),
    ("a_bad_upgrade_changes_nothing", a_bad_upgrade_changes_nothing),
];

fn what_cannot_be_made_leaves_nothing() {
    let mut monitor = Monitor::begin("bad");
    let before = monitor.open_fds();
    type Edit = fn(&mut serde_json::Value);
    let cases: [(&str, Edit, FailKind); 4] = [
        (
            "syntax",
            |config| *config = json!({"ociVersion": 7}),
            FailKind::Invalid,
        ),
        (
            "mount",
            |config| config["mounts"][0]["type"] = json!("nosuchfs"),
            FailKind::Other,
        ),
        (
            "program",
            |config| config["process"]["args"] = json!(["/no/such"]),
            FailKind::NoProgram,
        ),
        (
            "hook",
            |config| config["hooks"] = json!({"createRuntime": [{"path": "/bin/false"}]}),
            FailKind::Other,
        ),
    ];
    for (id, edit, kind) in cases {
        let bundle = bundle_with(&monitor.dir, id, "true", edit);
        let request = monitor.create_request(id, &bundle);
        let failed = match monitor.ask(request, &[]) {
            (Body::Failed(failed), _) => failed,
            // The program is looked for at the start at the latest.
            (Body::Created(_), _) => {
                let failed = monitor.refused(
                    Start {
                        container_id: id.into(),
                        deadline_ms: 0,
                    },
                    &[],
                );
                monitor.exited(id);
                monitor.done(Forget {
                    container_id: id.into(),
                });
                failed
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(failed.kind(), kind, "{id}: {failed:?}");
        assert!(
            !failed.message.is_empty() && !failed.step.is_empty(),
            "{id}: {failed:?}"
        );
        assert_eq!(state(&mut monitor, id), None, "{id}");
    }
    let request = monitor.create_request("gone", &monitor.dir.join("nowhere"));
    assert_eq!(monitor.refused(request, &[]).kind(), FailKind::Invalid);
    let mut request = monitor.create_request("c", &monitor.dir);
    request.log_path = "/nonexistent/x.log".into();
    assert_eq!(monitor.refused(request, &[]).errno, Errno::ENOENT.raw());
    closed_again(&monitor, &before);
    eventually("children are left", || children(monitor.child.pid).is_empty());
}

fn a_hanging_helper_is_killed() {
    let mut monitor = Monitor::begin("hang");
    let hanging = bundle_with(&monitor.dir, "c1", "true", |config| {
        config["hooks"] = json!({"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"]}]});
    });
    let mut request = monitor.create_request("c1", &hanging);
    request.deadline_ms = 500;
    let id = monitor.send(request, &[]);
    // The rest is served meanwhile.
    let other = bundle(&monitor.dir, "c2", "exit 5");
    monitor.create("c2", &other);
    monitor.start("c2");
    assert_eq!(monitor.exited("c2").exit.exit_code, 5);
    let (answer, _) = monitor.answer(id);
    let Body::Failed(failed) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(failed.kind(), FailKind::Deadline);
    assert!(!failed.step.is_empty(), "{failed:?}");
    assert_eq!(state(&mut monitor, "c1"), None);
    // A start that hangs in a hook of its own ends with the container.
    let late = bundle_with(&monitor.dir, "c3", "true", |config| {
        config["hooks"] = json!({"startContainer": [{"path": "/bin/sleep", "args": ["sleep", "1000"]}]});
    });
    monitor.create("c3", &late);
    let failed = monitor.refused(
        Start {
            container_id: "c3".into(),
            deadline_ms: 300,
        },
        &[],
    );
    assert_eq!(failed.kind(), FailKind::Deadline, "{failed:?}");
    assert_eq!(monitor.exited("c3").exit.exit_code, 137);
    for id in ["c2", "c3"] {
        monitor.done(Forget {
            container_id: id.into(),
        });
    }
    // Its hook went with the helper, and so did the init that nobody can start any more.
    eventually("something is left", || children(monitor.child.pid).is_empty());
}

fn without_a_daemon_everything_goes_on() {
    let mut monitor = Monitor::begin("alone");
    let first = bundle(
        &monitor.dir,
        "c1",
        "while ! [ -e /go ]; do sleep 0.01; done; echo alone; exit 9",
    );
    let second = bundle(&monitor.dir, "c2", "sleep 1000");
    monitor.create("c1", &first);
    monitor.start("c1");
    monitor.create("c2", &second);
    let slow = bundle_with(&monitor.dir, "c3", "echo late", |config| {
        config["hooks"] = json!({"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "0.3"]}]});
    });
    // Asked for, and the connection closed before the answer: the operation goes on.
    let request = monitor.create_request("c3", &slow);
    monitor.send(request, &[]);
    monitor.reconnect();
    std::fs::write(first.join("rootfs/go"), "").unwrap();
    eventually("the end is not listed", || {
        state(&mut monitor, "c1") == Some(ContainerState::Exited)
    });
    eventually("the container is not made", || {
        state(&mut monitor, "c3") == Some(ContainerState::Created)
    });
    assert_eq!(monitor.log("c1", "stdout"), "alone\n");
    let (Body::Listed(listed), _) = monitor.ask(List::default(), &[]) else {
        panic!()
    };
    assert_eq!(listed.containers[0].exit.unwrap().exit_code, 9);
    let (answer, fds) = monitor.ask(
        Adopt {
            container_id: "c2".into(),
        },
        &[],
    );
    let Body::Created(created) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(created.pid, listed.containers[1].pid);
    pidfd::send_signal(&fds[0], Signal::KILL).unwrap();
    assert_eq!(monitor.exited("c2").exit.signal, 9);
    monitor.start("c3");
    assert_eq!(monitor.exited("c3").exit.exit_code, 0);
}

fn a_daemon_that_does_not_read_is_dropped() {
    let mut monitor = Monitor::begin("stuck");
    let bundle = bundle(
        &monitor.dir,
        "c1",
        "while ! [ -e /go ]; do sleep 0.01; done; exit 4",
    );
    monitor.create("c1", &bundle);
    monitor.start("c1");
    // Questions without end, and nobody who hears the answers.
    for _ in 0..200 {
        monitor.send(List::default(), &[]);
    }
    std::fs::write(bundle.join("rootfs/go"), "").unwrap();
    pause(Duration::from_millis(100));
    monitor.reconnect();
    eventually("the end is not listed", || {
        state(&mut monitor, "c1") == Some(ContainerState::Exited)
    });
}

fn hostile_frames_end_the_connection_alone() {
    let mut monitor = Monitor::begin("hostile");
    let bundle = bundle(&monitor.dir, "c1", "sleep 1000");
    monitor.create("c1", &bundle);
    monitor.start("c1");
    let before = monitor.open_fds();
    let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let place = std::fs::File::open(&monitor.dir).unwrap();
    let mut noise = 1u32;
    for round in 0..200 {
        let socket = scm::connect(&place, "m.sock", scm::Kind::Seqpacket, scm::Mode::Blocking).unwrap();
        let mut bytes = vec![0; if round % 50 == 0 { 70_000 } else { round * 3 }];
        for byte in &mut bytes {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (noise >> 24) as u8;
        }
        let fds = [null.as_fd(), null.as_fd()];
        // The monitor may have closed already.
        let _ = scm::send(&socket, &bytes, &fds[..round % 3]);
        if round % 7 == 0 {
            let _ = wait_one(&socket, Interest::READ, Some(Duration::from_millis(50)));
        }
    }
    monitor.reconnect();
    assert_eq!(state(&mut monitor, "c1"), Some(ContainerState::Running));
    closed_again(&monitor, &before);
}

fn an_upgrade_loses_no_byte() {
    let mut monitor = Monitor::begin("upgrade");
    let sandbox = monitor.setup();
    let line = "0123456789abcdef".repeat(8);
    // Numbered lines as fast as a pipe takes them.
    let script = format!("busybox awk 'BEGIN {{ for (i = 0; ; i++) print i, \"{line}\" }}'");
    let writer = bundle(
        &monitor.dir,
        "c1",
        &format!("{script} & echo $! > /pid; wait; echo end; exit 6"),
    );
    let waiting = bundle(
        &monitor.dir,
        "c2",
        "printf beg; while ! [ -e /go ]; do sleep 0.01; done; echo in; exit 8",
    );
    let unstarted = bundle(&monitor.dir, "c3", "exit 11");
    let pidfd = monitor.create("c1", &writer);
    monitor.start("c1");
    monitor.create("c2", &waiting);
    monitor.start("c2");
    monitor.create("c3", &unstarted);
    let (answer, mut output) = monitor.exec("e1", "c1", &["/bin/sh", "-c", "sleep 0.5; echo over; exit 12"]);
    assert!(matches!(answer, Body::ExecStarted(_)), "{answer:?}");
    monitor.logged("c1", " 1000 ");
    let pid = monitor.child.pid;
    for round in 0..10 {
        let program = fd::dup(&monitor.program).unwrap();
        // More requests behind it are read by the new program.
        let upgrade = monitor.send(Upgrade {}, &[&program]);
        let list = monitor.send(List::default(), &[]);
        let (answer, _) = monitor.answer(upgrade);
        assert!(matches!(answer, Body::Done(_)), "{answer:?}");
        let (answer, _) = monitor.answer(list);
        assert!(
            matches!(answer, Body::Listed(ref listed) if listed.containers.len() == 3),
            "{answer:?}"
        );
        pause(Duration::from_millis(50 + 10 * round));
    }
    assert_eq!(monitor.child.pid, pid);
    assert!(!pidfd::has_ended(&pidfd).unwrap());
    // Children, namespaces and waiting inits are as they were.
    std::fs::metadata(&sandbox.ipc).unwrap();
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(
        (text.as_str(), monitor.exec_exited("e1").exit.exit_code),
        ("over\n", 12)
    );
    monitor.start("c3");
    assert_eq!(monitor.exited("c3").exit.exit_code, 11);
    std::fs::write(waiting.join("rootfs/go"), "").unwrap();
    assert_eq!(monitor.exited("c2").exit.exit_code, 8);
    assert_eq!(monitor.log("c2", "stdout"), "begin\n");
    let (answer, _) = monitor.exec("e2", "c1", &["/bin/sh", "-c", "kill $(cat /pid)"]);
    assert!(matches!(answer, Body::ExecStarted(_)), "{answer:?}");
    assert_eq!(monitor.exited("c1").exit.exit_code, 6);
    let log = monitor.log("c1", "stdout");
    let lines: Vec<&str> = log.lines().collect();
    let (last, numbered) = lines.split_last().unwrap();
    for (number, text) in numbered.iter().enumerate() {
        // The writer's last line may have been cut by its end.
        let whole = format!("{number} {line}");
        assert!(
            *text == whole
                || (number + 1 == numbered.len() && (whole.starts_with(text) || text.ends_with("end"))),
            "line {number}: {text:?}"
        );
    }
    assert!(last.ends_with("end"), "{last:?}");
    println!(
        "    {} lines, {} MiB through ten upgrades",
        numbered.len(),
        log.len() >> 20
    );
}

fn an_exec_whose_asker_is_gone_does_not_stay() {
    let mut monitor = Monitor::begin("asker");
    let bundle = bundle(&monitor.dir, "c1", "sleep 1000");
    monitor.create("c1", &bundle);
    monitor.start("c1");
    let (pid, before) = (monitor.child.pid, children(monitor.child.pid));
    // It finds the request and another connection at the same time: it is begun, and nobody is left to be answered.
    pidfd::send_signal(&monitor.child.pidfd, Signal::STOP).unwrap();
    let process = process(&["/bin/sleep", "1000"]).to_string();
    let process = fd::sealed_memfd(c"process", process.as_bytes()).unwrap();
    let exec = Exec {
        exec_id: "e1".into(),
        container_id: "c1".into(),
        ..Default::default()
    };
    monitor.send(exec, &[&process]);
    let place: OwnedFd = std::fs::File::open(&monitor.dir).unwrap().into();
    let rival = scm::connect(&place, "m.sock", scm::Kind::Seqpacket, scm::Mode::Blocking).unwrap();
    pidfd::send_signal(&monitor.child.pidfd, Signal::CONT).unwrap();
    monitor.reconnect();
    drop(rival);
    // The helper is gone, and the process that it made.
    eventually("a process of nobody lives on", || children(pid) == before);
    assert_eq!(state(&mut monitor, "c1"), Some(ContainerState::Running));
}

/// Execs whose processes have ended, and whose helpers too, when the monitor hears of any of it: at every moment of their
/// lives, and several at a time.
fn ends_that_come_before_their_reports_are_told() {
    let mut monitor = Monitor::begin("early-ends");
    let bundle = bundle(&monitor.dir, "c1", "sleep 1000");
    monitor.create("c1", &bundle);
    monitor.start("c1");
    let process = process(&["/bin/true"]).to_string();
    let (pid, fds) = (monitor.child.pid, monitor.open_fds());
    let init = children(pid);
    for round in 0..200 {
        let exec = |number| Exec {
            exec_id: format!("e{round}-{number}"),
            container_id: "c1".into(),
            ..Default::default()
        };
        let mut ask = |number| {
            // Each its own: they share no place in it.
            let document = fd::sealed_memfd(c"process", process.as_bytes()).unwrap();
            monitor.send(exec(number), &[&document])
        };
        let asked: Vec<u64> = (0..12).map(&mut ask).collect();
        if round % 8 == 0 {
            // What they do is found all at once.
            pause(Duration::from_micros(50 * round));
            pidfd::send_signal(&monitor.child.pidfd, Signal::STOP).unwrap();
            eventually("what was begun does not end", || {
                let others = children(pid).into_iter().filter(|child| !init.contains(child));
                others.into_iter().all(is_zombie)
            });
            pidfd::send_signal(&monitor.child.pidfd, Signal::CONT).unwrap();
        }
        for (number, id) in asked.into_iter().enumerate() {
            let (answer, _) = monitor.answer(id);
            assert!(matches!(answer, Body::ExecStarted(_)), "{answer:?}");
            let exited = monitor.exec_exited(&format!("e{round}-{number}"));
            assert_eq!(exited.exit.exit_code, 0);
        }
    }
    closed_again(&monitor, &fds);
}

fn a_bad_upgrade_changes_nothing() {
    let mut monitor = Monitor::begin("bad-upgrade");
    let bundle = bundle(
        &monitor.dir,
        "c1",
        "while ! [ -e /go ]; do sleep 0.01; done; echo fine",
    );
    monitor.create("c1", &bundle);
    monitor.start("c1");
    let before = monitor.open_fds();
    let loose: OwnedFd = std::fs::File::open("/bin/busybox").unwrap().into();
    assert_eq!(monitor.refused(Upgrade {}, &[&loose]).kind(), FailKind::Invalid);
    let text: OwnedFd = std::fs::File::open("/proc/self/status").unwrap().into();
    let noise = fd::sealed_program(c"noise", &text);
    let noise = noise.unwrap_or_else(|_| fd::sealed_memfd(c"noise", b"no program").unwrap());
    let failed = monitor.refused(Upgrade {}, &[&noise]);
    assert!(failed.errno != 0, "{failed:?}");
    closed_again(&monitor, &before);
    monitor.reconnect();
    std::fs::write(bundle.join("rootfs/go"), "").unwrap();
    assert_eq!(monitor.exited("c1").exit.exit_code, 0);
    assert_eq!(monitor.log("c1", "stdout"), "fine\n");
}
