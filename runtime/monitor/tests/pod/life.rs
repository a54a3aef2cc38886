//! What a pod is there for: containers, processes in them, their ends.

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Instant;

use coracle_kernel::signal::Signal;
use coracle_kernel::{fd, pidfd};
use coracle_wire::{
    Adopt, Body, ContainerState, Exec, FailKind, Forget, List, ReopenLog, SetupSandbox, Shutdown, Start,
    Upgrade,
};
use serde_json::json;

use crate::Case;
use crate::bundle::{bundle, bundle_with, process, remove_cgroups, sub_group};
use crate::client::{Monitor, PATIENCE};
use crate::look::{closed_again, mounts, state, wait_end};

pub(crate) const ALL: &[Case] = &[
    ("a_container_lives_and_dies", a_container_lives_and_dies),
    ("a_terminal_is_logged", a_terminal_is_logged),
    ("the_pod_shares_its_namespaces", the_pod_shares_its_namespaces),
    (
        "containers_share_a_pid_namespace",
        containers_share_a_pid_namespace,
    ),
    ("processes_are_executed", processes_are_executed),
    (
        "requests_out_of_place_are_refused",
        requests_out_of_place_are_refused,
    ),
    ("hooks_run_at_their_times", hooks_run_at_their_times),
    ("oom_is_noticed", oom_is_noticed),
    ("short_lives_are_all_told", short_lives_are_all_told),
    ("many_execs_leave_nothing", many_execs_leave_nothing),
];

fn a_container_lives_and_dies() {
    let mut monitor = Monitor::begin("life");
    let bundle = bundle(&monitor.dir, "c1", "echo hello; exit 42");
    let pidfd = monitor.create("c1", &bundle);
    assert_eq!(state(&mut monitor, "c1"), Some(ContainerState::Created));
    let mode = std::fs::metadata(monitor.log_path("c1"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o640);
    assert!(!pidfd::has_ended(&pidfd).unwrap());
    monitor.start("c1");
    let exited = monitor.exited("c1");
    assert_eq!(
        (exited.exit.exit_code, exited.exit.signal, exited.exit.oom),
        (42, 0, false)
    );
    assert!(pidfd::has_ended(&pidfd).unwrap());
    assert_eq!(monitor.log("c1", "stdout"), "hello\n");
    let (Body::Listed(listed), _) = monitor.ask(List::default(), &[]) else {
        panic!()
    };
    assert_eq!(listed.containers[0].exit, Some(exited.exit));
    assert!(matches!(
        monitor.refused(Shutdown {}, &[]).kind(),
        FailKind::State
    ));
    monitor.done(Forget {
        container_id: "c1".into(),
    });
    monitor.done(Forget {
        container_id: "c1".into(),
    });
    assert_eq!(state(&mut monitor, "c1"), None);
    monitor.done(Shutdown {});
    wait_end(&monitor.child.pidfd);
}

fn a_terminal_is_logged() {
    let mut monitor = Monitor::begin("tty");
    let bundle = bundle_with(&monitor.dir, "c1", "tty; sleep 0.2; exit 3", |config| {
        config["process"]["terminal"] = json!(true);
    });
    let request = coracle_wire::Create {
        tty: true,
        ..monitor.create_request("c1", &bundle)
    };
    let (Body::Created(_), _) = monitor.ask(request, &[]) else {
        panic!()
    };
    monitor.start("c1");
    assert_eq!(monitor.exited("c1").exit.exit_code, 3);
    assert_eq!(monitor.log("c1", "stdout").trim_end(), "/dev/pts/0");
}

fn the_pod_shares_its_namespaces() {
    let mut monitor = Monitor::begin("pod");
    let before = mounts();
    let sandbox = monitor.setup();
    assert!(
        sandbox
            .ipc
            .starts_with(&format!("/proc/{}/fd/", monitor.child.pid)),
        "{sandbox:?}"
    );
    let shared = |script: &str, monitor: &Monitor, id: &str| {
        bundle_with(&monitor.dir, id, script, |config| {
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            for namespace in namespaces {
                match namespace["type"].as_str().unwrap() {
                    "ipc" => namespace["path"] = json!(sandbox.ipc),
                    "uts" => namespace["path"] = json!(sandbox.uts),
                    _ => {}
                }
            }
            config.as_object_mut().unwrap().remove("hostname");
            let shm = monitor.dir.join("shm");
            let mount =
                json!({"destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rbind", "rw"]});
            config["mounts"].as_array_mut().unwrap().push(mount);
        })
    };
    let first = shared(
        "hostname; echo shared > /dev/shm/word; sleep 1000",
        &monitor,
        "c1",
    );
    monitor.create("c1", &first);
    monitor.start("c1");
    monitor.logged("c1", "the-pod");
    let script = "while ! cat /dev/shm/word; do sleep 0.01; done; busybox df -k /dev/shm | tail -1";
    let second = shared(script, &monitor, "c2");
    monitor.create("c2", &second);
    monitor.start("c2");
    assert_eq!(monitor.exited("c2").exit.exit_code, 0);
    let log = monitor.log("c2", "stdout");
    assert!(log.starts_with("shared\n") && log.contains(" 65536 "), "{log}");
    assert_eq!(mounts(), before, "the host's mount table grew");
    let again = SetupSandbox {
        pod_id: "x".into(),
        pod_dir: "/x".into(),
        ..Default::default()
    };
    assert_eq!(monitor.refused(again, &[]).kind(), FailKind::Exists);
}

fn containers_share_a_pid_namespace() {
    let mut monitor = Monitor::begin("pidns");
    let group = crate::bundle::group("sandbox");
    let paths = group.location().to_map().into_iter();
    let setup = SetupSandbox {
        pod_id: "pod".into(),
        pod_dir: monitor.dir.to_str().unwrap().into(),
        pid: true,
        pid_cgroup: paths
            .map(|(controller, path)| coracle_wire::CgroupPath { controller, path })
            .collect(),
        ..Default::default()
    };
    let unplaced = SetupSandbox {
        pid_cgroup: Vec::new(),
        ..setup.clone()
    };
    assert_eq!(monitor.refused(unplaced, &[]).kind(), FailKind::Invalid);
    let (Body::Sandbox(sandbox), _) = monitor.ask(setup, &[]) else {
        panic!()
    };
    let init = *group
        .pids()
        .unwrap()
        .first()
        .expect("an init in the sandbox's cgroup");
    let joining = |id: &str, script: &str, monitor: &Monitor| {
        bundle_with(&monitor.dir, id, script, |config| {
            for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
                if namespace["type"] == "pid" {
                    namespace["path"] = json!(sandbox.pid);
                }
            }
        })
    };
    // It is out of reach from inside, and reaps what containers leave behind.
    let script = "kill -9 1; cat /proc/1/comm; (sleep 0.1 & exec true) & wait; sleep 0.3; \
        grep -l '^State:.Z' /proc/[0-9]*/status; ls /proc/1/fd /proc/1/root; sleep 1000";
    let script = script
        .replace("grep", "busybox grep")
        .replace("ls ", "busybox ls ");
    let first = joining("c1", &script, &monitor);
    let pidfd = monitor.create("c1", &first);
    monitor.start("c1");
    let second = joining(
        "c2",
        "while ! busybox grep -lx sleep /proc/[0-9]*/comm; do busybox usleep 10000; done",
        &monitor,
    );
    monitor.create("c2", &second);
    monitor.start("c2");
    assert_eq!(monitor.exited("c2").exit.exit_code, 0);
    assert_eq!(
        monitor.log("c1", "stdout").lines().next(),
        Some("coracle-init"),
        "{}",
        monitor.log("c1", "stderr")
    );
    assert!(
        !monitor.log("c1", "stdout").contains("status"),
        "zombies: {}",
        monitor.log("c1", "stdout")
    );

    let status = std::fs::read_to_string(format!("/proc/{init}/status")).unwrap();
    for line in [
        "CapPrm:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    assert_eq!(std::fs::read_dir(format!("/proc/{init}/fd")).unwrap().count(), 0);
    assert_eq!(
        std::fs::read_dir(format!("/proc/{init}/root")).unwrap().count(),
        0
    );
    let mounts = std::fs::read_to_string(format!("/proc/{init}/mountinfo")).unwrap();
    assert!(mounts.lines().count() == 1 && mounts.contains(" ro,"), "{mounts}");

    let program = fd::dup(&monitor.program).unwrap();
    let (answer, _) = monitor.ask(Upgrade {}, &[&program]);
    assert!(matches!(answer, Body::Done(_)), "{answer:?}");
    assert_eq!(group.pids().unwrap(), [init]);
    pidfd::send_signal(&pidfd, Signal::KILL).unwrap();
    monitor.exited("c1");
    for id in ["c1", "c2"] {
        monitor.done(Forget {
            container_id: id.into(),
        });
    }
    monitor.done(Shutdown {});
    wait_end(&monitor.child.pidfd);
    assert!(group.wait_empty(PATIENCE).unwrap());
}

fn processes_are_executed() {
    let mut monitor = Monitor::begin("exec");
    let bundle = bundle(&monitor.dir, "c1", "sleep 1000");
    monitor.create("c1", &bundle);
    monitor.start("c1");
    let (answer, mut output) = monitor.exec("e1", "c1", &["/bin/sh", "-c", "echo from exec; exit 7"]);
    let Body::ExecStarted(started) = answer else {
        panic!("{answer:?}")
    };
    assert!(started.pid > 0);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "from exec\n");
    assert_eq!(monitor.exec_exited("e1").exit.exit_code, 7);

    let (answer, _) = monitor.exec("e2", "c1", &["/bin/nothing"]);
    let Body::Failed(failed) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(failed.kind(), FailKind::NoProgram, "{failed:?}");
    // In a cgroup of its own, as the daemon has it.
    let group = sub_group("c1", "exec-1");
    let document = fd::sealed_memfd(c"p", process(&["/bin/sleep", "1000"]).to_string().as_bytes());
    let cgroup: Vec<_> = group.location().to_map().into_iter().collect();
    let cgroup = cgroup
        .into_iter()
        .map(|(controller, path)| coracle_wire::CgroupPath { controller, path })
        .collect();
    let exec = Exec {
        exec_id: "c1/exec-1".into(),
        container_id: "c1".into(),
        cgroup,
        ..Default::default()
    };
    let (answer, _) = monitor.ask(exec, &[&document.unwrap()]);
    let Body::ExecStarted(started) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(group.pids().unwrap(), [started.pid]);
    group.kill(PATIENCE).unwrap();
    assert_eq!(monitor.exec_exited("c1/exec-1").exit.signal, 9);

    let (answer, _) = monitor.exec("e3", "c1", &["/bin/sh", "-c", "kill -9 $$"]);
    assert!(matches!(answer, Body::ExecStarted(_)), "{answer:?}");
    assert_eq!((monitor.exec_exited("e3").exit.exit_code), 137);
    // A terminal comes back to the daemon.
    let mut document = process(&["/bin/tty"]);
    document["terminal"] = json!(true);
    let document = fd::sealed_memfd(c"process", document.to_string().as_bytes()).unwrap();
    let exec = Exec {
        exec_id: "e4".into(),
        container_id: "c1".into(),
        tty: true,
        ..Default::default()
    };
    let (answer, fds) = monitor.ask(exec, &[&document]);
    assert!(
        matches!(answer, Body::ExecStarted(ref started) if started.tty),
        "{answer:?}"
    );
    let mut buffer = [0; 64];
    let count = fd::read(&fds[1], &mut buffer).unwrap();
    assert_eq!(&buffer[..count], b"/dev/pts/0\r\n");
    assert_eq!(monitor.exec_exited("e4").exit.exit_code, 0);
}

fn requests_out_of_place_are_refused() {
    let mut monitor = Monitor::begin("refuse");
    let none = || "none".to_owned();
    for body in [
        Body::from(Start {
            container_id: none(),
            deadline_ms: 0,
        }),
        ReopenLog { container_id: none() }.into(),
        Adopt { container_id: none() }.into(),
    ] {
        assert_eq!(monitor.refused(body, &[]).kind(), FailKind::NotFound);
    }
    let bundle = bundle(&monitor.dir, "c1", "sleep 1000");
    for id in ["", "../x", "a/b", &"x".repeat(300)] {
        let request = monitor.create_request(id, &bundle);
        assert_eq!(monitor.refused(request, &[]).kind(), FailKind::Invalid, "{id:?}");
    }
    let pidfd = monitor.create("c1", &bundle);
    let request = monitor.create_request("c1", &bundle);
    assert_eq!(monitor.refused(request, &[]).kind(), FailKind::Exists);
    assert_eq!(
        monitor
            .refused(
                Forget {
                    container_id: "c1".into()
                },
                &[]
            )
            .kind(),
        FailKind::State
    );
    monitor.start("c1");
    monitor.start("c1");
    pidfd::send_signal(&pidfd, Signal::KILL).unwrap();
    assert_eq!(monitor.exited("c1").exit.exit_code, 137);
    for body in [
        Body::from(Start {
            container_id: "c1".into(),
            deadline_ms: 0,
        }),
        ReopenLog {
            container_id: "c1".into(),
        }
        .into(),
        Adopt {
            container_id: "c1".into(),
        }
        .into(),
    ] {
        assert_eq!(monitor.refused(body, &[]).kind(), FailKind::State);
    }
    let (answer, _) = monitor.exec("e1", "c1", &["/bin/true"]);
    assert!(
        matches!(answer, Body::Failed(ref failed) if failed.kind() == FailKind::State),
        "{answer:?}"
    );
}

fn hooks_run_at_their_times() {
    let mut monitor = Monitor::begin("hooks");
    let trace = monitor.dir.join("trace");
    let hook = |name: &str| {
        let script = format!(
            "cat > {0}.{name}; pwd >> {0}; echo {name} >> {0}",
            trace.display()
        );
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]}])
    };
    let bundle = bundle_with(&monitor.dir, "c1", "exit 0", |config| {
        config["hooks"] = json!({"poststart": hook("poststart"), "poststop": hook("poststop")});
    });
    monitor.create("c1", &bundle);
    assert!(!trace.exists());
    monitor.start("c1");
    let expected = format!("{}\npoststart\n", bundle.display());
    assert_eq!(std::fs::read_to_string(&trace).unwrap(), expected);
    monitor.exited("c1");
    monitor.done(Forget {
        container_id: "c1".into(),
    });
    let expected = format!("{expected}{}\npoststop\n", bundle.display());
    assert_eq!(std::fs::read_to_string(&trace).unwrap(), expected);
    let stdin = std::fs::read_to_string(format!("{}.poststop", trace.display())).unwrap();
    let document: serde_json::Value = serde_json::from_str(&stdin).unwrap();
    assert_eq!(
        (document["id"].as_str(), document["status"].as_str()),
        (Some("c1"), Some("stopped"))
    );
}

fn oom_is_noticed() {
    let mut monitor = Monitor::begin("oom");
    let bundle = bundle_with(
        &monitor.dir,
        "c1",
        "x=$(busybox yes | head -c 200000000); echo survived",
        |config| {
            config["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
        },
    );
    monitor.create("c1", &bundle);
    monitor.start("c1");
    let exited = monitor.exited("c1");
    assert!(exited.exit.oom, "{exited:?}");
    assert_eq!(exited.exit.exit_code, 137);
}

fn short_lives_are_all_told() {
    let mut monitor = Monitor::begin("short");
    let rounds = if std::env::var_os("CORACLE_TEST_LONG").is_some() {
        2000
    } else {
        150
    };
    let bundle = bundle_with(&monitor.dir, "c1", "", |config| {
        config["process"]["args"] = json!(["/bin/true"]);
    });
    let begun = Instant::now();
    for _ in 0..rounds {
        monitor.create("c1", &bundle);
        monitor.start("c1");
        assert_eq!(monitor.exited("c1").exit.exit_code, 0);
        monitor.done(Forget {
            container_id: "c1".into(),
        });
        // As the daemon does: the cgroup goes with the container.
        remove_cgroups();
    }
    println!("    {:?} a container", begun.elapsed() / rounds);
}

fn many_execs_leave_nothing() {
    let mut monitor = Monitor::begin("execs");
    let bundle = bundle(&monitor.dir, "c1", "sleep 1000");
    monitor.create("c1", &bundle);
    monitor.start("c1");
    let document = process(&["/bin/true"]).to_string();
    let document = fd::sealed_memfd(c"process", document.as_bytes()).unwrap();
    let rounds = if std::env::var_os("CORACLE_TEST_LONG").is_some() {
        20_000
    } else {
        2000
    };
    let run = |monitor: &mut Monitor, count: usize| {
        let begun = Instant::now();
        for number in 0..count {
            let exec_id = format!("e{number}");
            let exec = Exec {
                exec_id: exec_id.clone(),
                container_id: "c1".into(),
                ..Default::default()
            };
            let (answer, _) = monitor.ask(exec, &[&document]);
            assert!(matches!(answer, Body::ExecStarted(_)), "{answer:?}");
            assert_eq!(monitor.exec_exited(&exec_id).exit.exit_code, 0);
        }
        begun.elapsed() / u32::try_from(count).unwrap()
    };
    run(&mut monitor, 50);
    let (fds, memory) = (monitor.open_fds(), monitor.memory_kib("Anonymous:"));
    let time = run(&mut monitor, rounds);
    let after = monitor.memory_kib("Anonymous:");
    println!("    {time:?} an exec; anonymous memory {memory} KiB before, {after} KiB after");
    closed_again(&monitor, &fds);
    assert!(after <= memory + 64, "{memory} KiB grew to {after} KiB");
}
