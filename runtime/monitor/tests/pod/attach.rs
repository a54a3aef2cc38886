//! Those who look on: what they see, what they write, and that nobody waits for them.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;

use coracle_kernel::fd;
use coracle_kernel::signal::Signal;
use coracle_kernel::{pidfd, tty};
use coracle_wire::{Attach, Body, Create, FailKind, Upgrade};
use serde_json::json;

use crate::Case;
use crate::bundle::{bundle, bundle_with};
use crate::client::Monitor;
use crate::look::closed_again;

pub(crate) const ALL: &[Case] = &[
    ("who_attaches_sees_and_writes", who_attaches_sees_and_writes),
    (
        "input_ends_with_its_first_session",
        input_ends_with_its_first_session,
    ),
    ("a_session_of_a_terminal", a_session_of_a_terminal),
    ("nobody_waits_for_a_session", nobody_waits_for_a_session),
    ("sessions_leave_nothing", sessions_leave_nothing),
];

/// Creates a container that reads its input.
fn create(monitor: &mut Monitor, script: &str, change: impl FnOnce(&mut Create)) -> OwnedFd {
    let bundle = bundle(&monitor.dir, "c1", script);
    let mut request = Create {
        stdin: true,
        ..monitor.create_request("c1", &bundle)
    };
    change(&mut request);
    let (Body::Created(_), mut fds) = monitor.ask(request, &[]) else {
        panic!()
    };
    fds.remove(0)
}

/// Attaches to all streams: input (if it is there), output, errors.
fn attach(monitor: &mut Monitor) -> (Option<File>, File, File) {
    let (stdout, stdout_end) = fd::pipe().unwrap();
    let (stderr, stderr_end) = fd::pipe().unwrap();
    let request = Attach {
        container_id: "c1".into(),
        stdin: true,
        stdout: true,
        stderr: true,
    };
    let (answer, mut fds) = monitor.ask(request, &[&stdout_end, &stderr_end]);
    assert!(matches!(answer, Body::Attached(_)), "{answer:?}");
    (fds.pop().map(File::from), stdout.into(), stderr.into())
}

fn read_all(mut file: File) -> String {
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

fn who_attaches_sees_and_writes() {
    let mut monitor = Monitor::begin("attach");
    let script = "echo early; read a; echo \"out $a\"; echo \"err $a\" >&2; read b; echo \"out $b\"; exit 7";
    create(&mut monitor, script, |_| {});
    let (input, stdout, stderr) = attach(&mut monitor);
    monitor.start("c1");
    monitor.logged("c1", "early");
    // Two at a time: both see everything from their beginning on, and both may write.
    let (second_input, second, _) = attach(&mut monitor);
    input.unwrap().write_all(b"one\n").unwrap();
    monitor.logged("c1", "err one");
    second_input.unwrap().write_all(b"two\n").unwrap();
    assert_eq!(monitor.exited("c1").exit.exit_code, 7);
    assert_eq!(read_all(stdout), "early\nout one\nout two\n");
    assert_eq!(read_all(stderr), "err one\n");
    assert_eq!(read_all(second), "out one\nout two\n");
    assert_eq!(monitor.log("c1", "stdout"), "early\nout one\nout two\n");
    let late = Attach {
        container_id: "c1".into(),
        ..Default::default()
    };
    assert_eq!(monitor.refused(late, &[]).kind(), FailKind::State);
}

fn input_ends_with_its_first_session() {
    let mut monitor = Monitor::begin("once");
    create(&mut monitor, "cat; echo end", |request| request.stdin_once = true);
    monitor.start("c1");
    let (none, ..) = {
        // Who does not ask for it does not use it up; nor does an upgrade.
        monitor.ask(
            Attach {
                container_id: "c1".into(),
                ..Default::default()
            },
            &[],
        );
        let program = fd::dup(&monitor.program).unwrap();
        let upgrade = monitor.send(Upgrade {}, &[&program]);
        monitor.answer(upgrade);
        let (input, stdout, _) = attach(&mut monitor);
        let second = attach(&mut monitor);
        input.unwrap().write_all(b"last words\n").unwrap();
        assert_eq!(read_all(stdout), "last words\nend\n");
        second
    };
    assert!(none.is_none(), "it was given twice");
    assert_eq!(monitor.exited("c1").exit.exit_code, 0);
}

fn a_session_of_a_terminal() {
    let mut monitor = Monitor::begin("attach-tty");
    let bundle = bundle_with(
        &monitor.dir,
        "c1",
        "read a; echo \"got $a\"; busybox stty size",
        |config| {
            config["process"]["terminal"] = json!(true);
        },
    );
    let request = Create {
        tty: true,
        ..monitor.create_request("c1", &bundle)
    };
    let (Body::Created(_), _) = monitor.ask(request, &[]) else {
        panic!()
    };
    monitor.start("c1");
    let (stdout, end) = fd::pipe().unwrap();
    let request = Attach {
        container_id: "c1".into(),
        stdout: true,
        ..Default::default()
    };
    let (answer, mut fds) = monitor.ask(request, &[&end]);
    drop(end);
    assert!(
        matches!(answer, Body::Attached(ref attached) if attached.tty),
        "{answer:?}"
    );
    let mut master = File::from(fds.remove(0));
    let size = tty::Size {
        rows: 11,
        columns: 22,
    };
    tty::set_size(&master, size).unwrap();
    master.write_all(b"it\n").unwrap();
    assert_eq!(monitor.exited("c1").exit.exit_code, 0);
    assert_eq!(read_all(stdout.into()), "it\r\ngot it\r\n11 22\r\n");
}

fn nobody_waits_for_a_session() {
    let mut monitor = Monitor::begin("slow");
    create(&mut monitor, "seq 200000; exit 5", |_| {});
    let (_, stdout, _) = attach(&mut monitor);
    monitor.start("c1");
    // Nobody reads the session's pipe.
    assert_eq!(monitor.exited("c1").exit.exit_code, 5);
    let log = monitor.log("c1", "stdout");
    assert!(log.ends_with("200000\n") && log.lines().count() == 200_000);
    // What it was shown, and how much of the rest there was, is all that the log has.
    let seen = read_all(stdout);
    let (shown, note) = seen.rsplit_once("\r\ncoracle: ").unwrap();
    let missing: usize = note.split(' ').next().unwrap().parse().unwrap();
    assert!(log.starts_with(shown), "{} bytes were shown", shown.len());
    assert_eq!(shown.len() + missing, log.len());
}

fn sessions_leave_nothing() {
    let mut monitor = Monitor::begin("attach-leaks");
    let init = create(&mut monitor, "cat", |_| {});
    monitor.start("c1");
    let before = monitor.open_fds();
    for _ in 0..300 {
        drop(attach(&mut monitor));
    }
    // The container is silent: that the sessions are gone is seen without a byte of it.
    closed_again(&monitor, &before);
    pidfd::send_signal(&init, Signal::KILL).unwrap();
    monitor.exited("c1");
}
