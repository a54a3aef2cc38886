//! The process: directory, environment, user, limits, what it inherits and what it must not.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::process::Command;

use coracle_tests::runner::Running;
use coracle_tests::{Bundle, Container, Output, host, json, skip_on, skip_unless};

#[test]
fn the_working_directory_is_set() {
    assert_eq!(
        Bundle::new()
            .set("/process/cwd", json!("/etc"))
            .sh("pwd")
            .container()
            .run()
            .ok()
            .text(),
        "/etc"
    );
}

#[test]
fn a_missing_working_directory_is_made() {
    let c = Bundle::new()
        .set("/process/cwd", json!("/srv/deep/er"))
        .sh("pwd; stat -c %a /srv/deep")
        .container();
    assert_eq!(c.run().ok().text(), "/srv/deep/er\n755");
}

#[test]
fn a_relative_working_directory_is_refused() {
    for cwd in ["tmp", "./tmp", ""] {
        Bundle::new()
            .set("/process/cwd", json!(cwd))
            .container()
            .run()
            .refused(&["cwd"]);
    }
}

#[test]
fn a_working_directory_that_only_the_user_may_enter_works() {
    let bundle = Bundle::new();
    let home = bundle.inside("/home");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(1000), Some(1000)).unwrap();
    fs::set_permissions(&home, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let user = json!({"uid": 1000, "gid": 1000});
    let c = bundle
        .set("/process/user", user)
        .set("/process/cwd", json!("/home"))
        .sh("pwd")
        .container();
    assert_eq!(c.run().ok().text(), "/home");
}

#[test]
fn the_environment_is_what_is_configured() {
    let env = json!(["PATH=/bin", "A=1", "B=two words", "C=line\nbreak", "E="]);
    let c = Bundle::new()
        .set("/process/env", env)
        .args(&["/bin/env"])
        .container();
    let out = c.run().ok();
    for line in ["PATH=/bin", "A=1", "B=two words", "C=line", "break", "E="] {
        assert!(out.stdout.lines().any(|l| l == line), "{line:?} in {out}");
    }
    assert!(
        !out.stdout.contains("CORACLE_TEST_MARK"),
        "the runtime's own environment: {out}"
    );
}

#[test]
fn the_last_of_a_repeated_variable_wins() {
    let env = json!(["PATH=/nowhere", "A=first", "PATH=/bin", "A=last"]);
    let c = Bundle::new()
        .set("/process/env", env)
        .args(&["sh", "-c", "echo $A; env | grep -c ^A="])
        .container();
    assert_eq!(c.run().ok().text(), "last\n1");
}

#[test]
fn home_is_set_from_the_containers_passwd() {
    for (uid, home) in [(0, "/root"), (1000, "/home/user"), (4321, "/")] {
        let user = json!({"uid": uid, "gid": 0});
        let c = Bundle::new()
            .set("/process/user", user)
            .sh("echo $HOME")
            .container();
        assert_eq!(c.run().ok().text(), home, "uid {uid}");
    }
    let c = Bundle::new()
        .push("/process/env", json!("HOME=/here"))
        .sh("echo $HOME")
        .container();
    assert_eq!(c.run().ok().text(), "/here");
    let c = Bundle::new()
        .push("/process/env", json!("HOME="))
        .sh("echo $HOME")
        .container();
    assert_eq!(c.run().ok().text(), "/root", "an empty one counts as unset");
}

#[test]
fn programs_are_looked_up_in_the_containers_path() {
    let bundle = Bundle::new()
        .set("/process/env", json!(["PATH=/nowhere:/opt/tools:/bin"]))
        .args(&["tool"]);
    fs::create_dir_all(bundle.inside("/opt/tools")).unwrap();
    std::os::unix::fs::symlink("/bin/busybox", bundle.inside("/opt/tools/tool")).unwrap();
    // busybox does not know this name, and says so with its own text
    let out = bundle.container().run();
    assert_eq!(out.code, 127, "{out}");
    assert!(out.stderr.contains("tool: applet not found"), "{out}");
}

#[test]
fn a_program_may_be_relative_to_the_working_directory() {
    let c = Bundle::new()
        .set("/process/cwd", json!("/bin"))
        .args(&["./echo", "here"])
        .container();
    assert_eq!(c.run().ok().text(), "here");
}

#[test]
fn argv_is_passed_as_it_is() {
    let c = Bundle::new()
        .args(&[
            "/bin/sh",
            "-c",
            "printf '<%s>' \"$0\" \"$@\"",
            "zero",
            "",
            "a b",
            "ü\n",
            "*",
        ])
        .container();
    assert_eq!(c.run().ok().stdout, "<zero><><a b><ü\n><*>");
}

#[test]
fn no_arguments_are_refused() {
    Bundle::new()
        .set("/process/args", json!([]))
        .container()
        .run()
        .refused(&["args"]);
    Bundle::new()
        .remove("/process/args")
        .container()
        .run()
        .refused(&["args"]);
}

#[test]
fn a_missing_process_is_refused() {
    Bundle::new()
        .remove("/process")
        .container()
        .run()
        .refused(&["process"]);
}

#[test]
fn user_and_groups_are_set() {
    let user = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 2000]});
    let c = Bundle::new()
        .set("/process/user", user)
        .sh("grep -E '^(Uid|Gid|Groups)' /proc/self/status")
        .container();
    let out = c.run().ok();
    let lines: Vec<_> = out
        .stdout
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(lines[0], "Uid: 1000 1000 1000 1000");
    assert_eq!(lines[1], "Gid: 1001 1001 1001 1001");
    assert_eq!(lines[2], "Groups: 5 2000");
}

#[test]
fn no_groups_of_the_caller_are_inherited() {
    let c = Bundle::new().sh("grep ^Groups /proc/self/status").container();
    assert_eq!(c.run().ok().text(), "Groups:");
}

#[test]
fn the_umask_is_set_or_022() {
    assert_eq!(Bundle::new().sh("umask").container().run().ok().text(), "0022");
    let c = Bundle::new()
        .set("/process/user/umask", json!(0o77))
        .sh("umask")
        .container();
    assert_eq!(c.run().ok().text(), "0077");
}

#[test]
fn no_new_privileges_is_obeyed() {
    for (value, seen) in [(true, "1"), (false, "0")] {
        let c = Bundle::new()
            .set("/process/noNewPrivileges", json!(value))
            .sh("grep NoNewPrivs /proc/self/status")
            .container();
        assert!(c.run().ok().text().ends_with(seen));
    }
}

#[test]
fn oom_score_adj_is_set() {
    let c = Bundle::new()
        .set("/process/oomScoreAdj", json!(321))
        .sh("cat /proc/self/oom_score_adj")
        .container();
    assert_eq!(c.run().ok().text(), "321");
}

#[test]
fn oom_score_adj_is_left_alone_when_not_given() {
    let own = fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    let c = Bundle::new().sh("cat /proc/self/oom_score_adj").container();
    assert_eq!(c.run().ok().stdout, own);
}

#[test]
fn a_lower_oom_score_adj_is_set_where_the_host_allows_it() {
    if skip_unless(host::has_capability(24), "lowering it needs CAP_SYS_RESOURCE") {
        return;
    }
    let c = Bundle::new()
        .set("/process/oomScoreAdj", json!(-500))
        .sh("cat /proc/self/oom_score_adj")
        .container();
    assert_eq!(c.run().ok().text(), "-500");
}

#[test]
fn sysctls_of_the_own_namespaces_are_set() {
    let sysctl = json!({
        "net.ipv4.ip_forward": "1",
        "net/ipv4/conf/lo/forwarding": "1",
        "kernel.shmmax": "123456789",
        "kernel.msgmax": "9000",
        "fs.mqueue.msg_max": "12"
    });
    let script = "cd /proc/sys; cat net/ipv4/ip_forward net/ipv4/conf/lo/forwarding kernel/shmmax kernel/msgmax fs/mqueue/msg_max";
    let before = fs::read_to_string("/proc/sys/kernel/shmmax").unwrap();
    let c = Bundle::new().set("/linux/sysctl", sysctl).sh(script).container();
    assert_eq!(c.run().ok().text(), "1\n1\n123456789\n9000\n12");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/shmmax").unwrap(), before);
}

#[test]
fn sysctls_of_the_host_are_refused() {
    for key in [
        "kernel.core_pattern",
        "vm.swappiness",
        "kernel.hostname",
        "kernel.sysrq",
        "fs.file-max",
        "bogus",
    ] {
        let c = Bundle::new().set("/linux/sysctl", json!({key: "1"})).container();
        c.run().refused(&[key]);
        c.assert_gone();
    }
}

#[test]
fn sysctls_need_their_namespace() {
    for (key, namespace) in [
        ("kernel.shmmax", "ipc"),
        ("net.ipv4.ip_forward", "network"),
        ("fs.mqueue.msg_max", "ipc"),
    ] {
        let mut bundle = Bundle::new()
            .without_namespace(namespace)
            .set("/linux/sysctl", json!({key: "1"}));
        if namespace == "network" {
            bundle = bundle.set("/mounts/5/options", json!(["ro"]));
        }
        bundle.container().run().refused(&[key]);
    }
}

/// `run` by a caller of a certain kind: `probe CALLER… RUNTIME run FLAGS ID`.
fn run_by(caller: &[&str], flags: &[&str], c: &Container) -> Output {
    let mut command = Command::new(host::probe());
    command
        .args(caller)
        .arg(c.runtime().program())
        .arg("--root")
        .arg(c.runtime().root());
    command
        .arg("run")
        .args(flags)
        .arg("--bundle")
        .arg(c.dir())
        .arg(c.id());
    Running::start(command, None).wait()
}

#[test]
fn no_descriptor_but_the_three_is_inherited() {
    let c = Bundle::new().sh("probe fds | cut -d' ' -f1").container();
    // the caller has careless descriptors open on the host's root
    assert_eq!(run_by(&["open-fds", "20"], &[], &c).ok().text(), "0\n1\n2");
}

#[test]
fn preserved_descriptors_are_passed_on() {
    let c = Bundle::new().sh("probe fds | cut -d' ' -f1").container();
    let out = run_by(&["open-fds", "4"], &["--preserve-fds", "2"], &c).ok();
    assert_eq!(out.text(), "0\n1\n2\n3\n4");
}

#[test]
fn preserved_descriptors_have_to_be_there() {
    let c = Bundle::new().container();
    let out = c.run_with(&["--preserve-fds", "200"], None);
    assert_eq!(out.code, 1, "{out}");
    if !skip_on(
        "runc",
        "(the rest of the test) it leaves an empty state directory behind",
    ) {
        c.assert_gone();
    }
}

#[test]
fn socket_activation_is_passed_on() {
    let c = Bundle::new()
        .sh("echo $LISTEN_FDS $LISTEN_PID; probe fds | cut -d' ' -f1")
        .container();
    // the process that is handed them has to be the one that LISTEN_PID names
    let shell = "LISTEN_FDS=2 LISTEN_PID=$$ exec \"$@\"";
    let busybox = host::busybox().display().to_string();
    let out = run_by(&["open-fds", "2", &busybox, "sh", "-c", shell, "sh"], &[], &c).ok();
    assert_eq!(out.text(), "2 1\n0\n1\n2\n3\n4");
}

#[test]
fn signal_state_of_the_caller_is_not_inherited() {
    if skip_on("runc", "what its caller ignores or blocks stays so") {
        return;
    }
    let c = Bundle::new().args(&["/bin/probe", "inherited"]).container();
    let out = run_by(&["ignore-all"], &[], &c).ok();
    let expected = "blocked=0 ignored=0 handled=0 altstack=0 timerslack=50000 deathsig=0";
    assert!(out.stdout.contains(expected), "{out}");
}

#[test]
fn the_process_starts_clean() {
    let out = Bundle::new()
        .args(&["/bin/probe", "inherited"])
        .container()
        .run()
        .ok();
    // A shell has what it runs in its background ignore SIGINT and SIGQUIT.
    let inherits = caller_ignores_signals()
        && skip_on(
            "runc",
            "(ignored signals alone) what its caller ignores or blocks stays so",
        );
    let ignored = (!inherits).then_some("ignored=0");
    for word in ignored.into_iter().chain([
        "blocked=0",
        "handled=0",
        "altstack=0",
        "deathsig=0",
        "keepcaps=0",
        "dumpable=1",
    ]) {
        assert!(
            out.stdout.split_whitespace().any(|w| w == word),
            "{word} in {out}"
        );
    }
}

/// Whether this process ignores any but SIGPIPE, which Rust gives back to its children.
fn caller_ignores_signals() -> bool {
    const SIGPIPE: u64 = 1 << 12;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    u64::from_str_radix(mask.unwrap().trim(), 16).unwrap() & !SIGPIPE != 0
}

#[test]
fn the_session_keyring_is_its_own() {
    let c = Bundle::new().args(&["/bin/probe", "keyring"]).container();
    let out = c.run().ok();
    if skip_unless(!out.stdout.contains("error:"), "no keyrings") {
        return;
    }
    assert!(out.stdout.contains(&format!("_ses.{}", c.id())), "{out}");
}

#[test]
fn no_new_keyring_leaves_the_callers() {
    let c = Bundle::new().args(&["/bin/probe", "keyring"]).container();
    let out = c.run_with(&["--no-new-keyring"], None).ok();
    assert!(!out.stdout.contains(&format!("_ses.{}", c.id())), "{out}");
}

#[test]
fn the_process_is_no_child_of_a_leftover() {
    // with a pid namespace of its own the init has no parent inside, and leads its session
    let c = Bundle::new().sh("cut -d' ' -f4-6 /proc/1/stat").container();
    assert_eq!(c.run().ok().text(), "0 1 1");
}

#[test]
fn the_affinity_of_the_caller_is_not_inherited() {
    let all = fs::read_to_string("/proc/self/status").unwrap();
    let all = all.lines().find(|l| l.starts_with("Cpus_allowed_list")).unwrap();
    if skip_unless(all.contains('-') || all.contains(','), "one processor alone") {
        return;
    }
    let c = Bundle::new()
        .sh("grep Cpus_allowed_list /proc/self/status")
        .container();
    let busybox = host::busybox().display().to_string();
    let out = run_by(&["open-fds", "0", &busybox, "taskset", "-c", "0"], &[], &c).ok();
    assert_eq!(out.text(), all);
}

#[test]
fn personality_is_set() {
    let domain = json!({"domain": "LINUX32"});
    let c = Bundle::new()
        .set("/linux/personality", domain)
        .sh("cat /proc/self/personality")
        .container();
    assert_eq!(c.run().ok().text(), "00000008");
}

#[test]
fn an_unknown_personality_is_refused() {
    Bundle::new()
        .set("/linux/personality", json!({"domain": "MULTICS"}))
        .container()
        .run()
        .refused(&["multics", "personality"]);
}

#[test]
fn the_scheduler_is_set() {
    let scheduler = json!({"policy": "SCHED_BATCH", "nice": 5});
    let c = Bundle::new()
        .set("/process/scheduler", scheduler)
        .sh("cut -d' ' -f19,41 /proc/self/stat")
        .container();
    assert_eq!(c.run().ok().text(), "5 3");
}

#[test]
fn an_unknown_scheduler_is_refused() {
    let c = Bundle::new()
        .set("/process/scheduler", json!({"policy": "SCHED_SIESTA"}))
        .container();
    c.run().refused(&["sched_siesta", "scheduler"]);
}

#[test]
fn the_io_priority_is_set() {
    let priority = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
    let c = Bundle::new()
        .set("/process/ioPriority", priority)
        .args(&["/bin/ionice"])
        .container();
    assert_eq!(c.run().ok().text(), "best-effort: prio 6");
}

#[test]
fn an_unknown_io_priority_is_refused() {
    let priority = json!({"class": "IOPRIO_CLASS_URGENT", "priority": 0});
    Bundle::new()
        .set("/process/ioPriority", priority)
        .container()
        .run()
        .refused(&["ioprio_class_urgent", "ioprio", "iopriority"]);
}
