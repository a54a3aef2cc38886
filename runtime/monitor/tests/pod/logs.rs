//! Logs: what is in them, and what happens when they cannot be written.

use coracle_kernel::mount_attr::Attr;
use coracle_kernel::signal::Signal;
use coracle_kernel::{mount, path, pidfd};
use coracle_wire::{Body, FailKind, ReopenLog};

use crate::Case;
use crate::bundle::bundle;
use crate::client::{Monitor, joined};
use crate::look::eventually;

pub(crate) const ALL: &[Case] = &[
    (
        "output_is_logged_by_stream_and_line",
        output_is_logged_by_stream_and_line,
    ),
    ("a_log_is_reopened", a_log_is_reopened),
    ("a_full_disk_stops_nobody", a_full_disk_stops_nobody),
    (
        "rotation_under_load_loses_no_line",
        rotation_under_load_loses_no_line,
    ),
];

fn output_is_logged_by_stream_and_line() {
    let mut monitor = Monitor::begin("output");
    let script = "echo out; echo err >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; printf unfinished";
    let bundle = bundle(&monitor.dir, "c1", &script.replace("tr ", "busybox tr "));
    monitor.create("c1", &bundle);
    monitor.start("c1");
    monitor.exited("c1");
    assert_eq!(
        monitor.log("c1", "stdout"),
        format!("out\n{}\nunfinished\n", "x".repeat(40000))
    );
    assert_eq!(monitor.log("c1", "stderr"), "err\n");
}

fn a_log_is_reopened() {
    let mut monitor = Monitor::begin("reopen");
    let script = "echo one; while ! [ -e /go ]; do sleep 0.01; done; echo two; sleep 1000";
    let bundle = bundle(&monitor.dir, "c1", script);
    let pidfd = monitor.create("c1", &bundle);
    monitor.start("c1");
    monitor.logged("c1", "one");
    let old = monitor.dir.join("c1.old");
    std::fs::rename(monitor.log_path("c1"), &old).unwrap();
    monitor.done(ReopenLog {
        container_id: "c1".into(),
    });
    assert_eq!(monitor.log("c1", "stdout"), "");
    std::fs::write(bundle.join("rootfs/go"), "").unwrap();
    monitor.logged("c1", "two");
    assert_eq!(joined(&std::fs::read_to_string(&old).unwrap(), "stdout"), "one\n");
    // After its end there is no new file.
    pidfd::send_signal(&pidfd, Signal::KILL).unwrap();
    monitor.exited("c1");
    std::fs::remove_file(monitor.log_path("c1")).unwrap();
    assert_eq!(
        monitor
            .refused(
                ReopenLog {
                    container_id: "c1".into()
                },
                &[]
            )
            .kind(),
        FailKind::State
    );
    assert!(!monitor.log_path("c1").exists());
}

fn a_full_disk_stops_nobody() {
    let mut monitor = Monitor::begin("full");
    let disk = monitor.dir.join("disk");
    std::fs::create_dir(&disk).unwrap();
    let tmpfs = mount::make("tmpfs", &[("size", c"256k")], Attr::empty()).unwrap();
    let place = path::open_dir(&disk).unwrap();
    mount::attach(&tmpfs, &place).unwrap();
    let script =
        "seq 1 200000; echo done > /done; while ! [ -e /go ]; do sleep 0.01; done; echo after; sleep 1000";
    let bundle = bundle(&monitor.dir, "c1", script);
    let mut request = monitor.create_request("c1", &bundle);
    let log = disk.join("c1.log");
    request.log_path = log.to_str().unwrap().into();
    let (Body::Created(_), _) = monitor.ask(request, &[]) else {
        panic!()
    };
    monitor.start("c1");
    // The container gets through although nothing more can be logged.
    eventually("the container is stopped by its log", || {
        bundle.join("rootfs/done").exists()
    });
    let lost = monitor.event(|event| matches!(event, Body::LogLost(lost) if lost.errno != 0));
    let Body::LogLost(lost) = lost else { panic!() };
    assert!(lost.bytes > 0);
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.ends_with('\n'), "a torn line");
    // Room is back: the file is emptied, as somebody might who cleans up.
    std::fs::File::options()
        .write(true)
        .open(&log)
        .unwrap()
        .set_len(0)
        .unwrap();
    let Body::LogLost(healed) =
        monitor.event(|event| matches!(event, Body::LogLost(lost) if lost.errno == 0))
    else {
        panic!()
    };
    std::fs::write(bundle.join("rootfs/go"), "").unwrap();
    eventually("nothing is logged any more", || {
        joined(&std::fs::read_to_string(&log).unwrap(), "stdout") == "after\n"
    });
    let told = format!(
        "coracle: {} bytes of output were not logged here: No space left on device\n",
        healed.bytes
    );
    assert_eq!(joined(&std::fs::read_to_string(&log).unwrap(), "stderr"), told);
    // What was logged and what was lost is everything that was written.
    let all: usize = (1..=200_000).map(|n: u32| n.to_string().len() + 1).sum();
    assert_eq!(joined(&text, "stdout").len() as u64 + healed.bytes, all as u64);
    drop(monitor);
    mount::detach(&disk).unwrap();
    let _ = std::fs::remove_dir_all(disk.parent().unwrap());
}

fn rotation_under_load_loses_no_line() {
    let mut monitor = Monitor::begin("rotate");
    let bundle = bundle(&monitor.dir, "c1", "seq 1 400000; echo end");
    monitor.create("c1", &bundle);
    monitor.start("c1");
    let mut parts = Vec::new();
    for round in 0..1000 {
        let part = monitor.dir.join(format!("part.{round}"));
        std::fs::rename(monitor.log_path("c1"), &part).unwrap();
        match monitor.ask(
            ReopenLog {
                container_id: "c1".into(),
            },
            &[],
        ) {
            (Body::Done(_), _) => parts.push(part),
            // It has ended: the log stays where it is.
            (Body::Failed(failed), _) if failed.kind() == FailKind::State => {
                std::fs::rename(&part, monitor.log_path("c1")).unwrap();
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    monitor.exited("c1");
    let mut text = String::new();
    parts.push(monitor.log_path("c1"));
    for part in &parts {
        text.push_str(&joined(&std::fs::read_to_string(part).unwrap(), "stdout"));
    }
    let expected: String = (1..=400_000).map(|n: u32| format!("{n}\n")).collect();
    assert!(text == expected + "end\n", "lines are lost or doubled");
    assert!(parts.len() > 20, "only {} rotations", parts.len());
    println!("    {} rotations", parts.len() - 1);
}
