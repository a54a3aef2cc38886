//! exec: more processes in a running container.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;

use coracle_tests::runner::Running;
use coracle_tests::{Bundle, Container, json, skip_on, wait_for};

fn sleeper() -> Container {
    let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
    c.up();
    c
}

fn process_file(c: &Container, process: &serde_json::Value) -> String {
    let file = c.dir().join("process.json");
    fs::write(&file, process.to_string()).unwrap();
    file.display().to_string()
}

#[test]
fn output_and_exit_code_come_back() {
    let c = sleeper();
    let out = c.exec_sh("echo out; echo err >&2; exit 37");
    assert_eq!(out.code, 37);
    assert_eq!(out.stdout, "out\n");
    assert_eq!(out.stderr, "err\n");
}

#[test]
fn standard_input_is_connected() {
    let c = sleeper();
    let command = c.runtime().command(&["exec", c.id(), "cat"]);
    assert_eq!(
        Running::start(command, Some("typed\n")).wait().ok().stdout,
        "typed\n"
    );
}

#[test]
fn a_signal_is_answered_as_128_plus_number() {
    let c = sleeper();
    assert_eq!(c.exec_sh("kill -KILL $$").code, 137);
    assert_eq!(c.exec_sh("kill -TERM $$").code, 143);
}

#[test]
fn it_has_the_containers_environment_and_its_own() {
    let c = sleeper();
    let out = c
        .exec_with(&["-e", "A=1", "-e", "B=two words", "-e", "PATH=/bin"], &["env"])
        .ok();
    for line in ["A=1", "B=two words", "PATH=/bin", "HOME=/root"] {
        assert!(out.stdout.lines().any(|l| l == line), "{line} in {out}");
    }
    assert!(
        out.stdout.contains("CORACLE_TEST_MARK="),
        "the container's own: {out}"
    );
}

#[test]
fn it_has_its_directory() {
    let c = sleeper();
    assert_eq!(c.exec(&["pwd"]).ok().text(), "/");
    assert_eq!(c.exec_with(&["--cwd", "/etc"], &["pwd"]).ok().text(), "/etc");
}

#[test]
fn it_runs_as_another_user() {
    let c = sleeper();
    assert_eq!(
        c.exec_with(&["--user", "1000:2000"], &["id"]).ok().text(),
        "uid=1000(user) gid=2000(extra)"
    );
    assert_eq!(
        c.exec_with(&["-u", "1000"], &["sh", "-c", "id -u; id -g; echo $HOME"])
            .ok()
            .text(),
        "1000\n0\n/home/user"
    );
    let out = c
        .exec_with(&["-u", "1000:1000", "-g", "2000", "-g", "3000"], &["id", "-G"])
        .ok();
    assert_eq!(out.text(), "1000 2000 3000");
}

#[test]
fn a_user_that_is_no_number_is_refused() {
    let c = sleeper();
    let mut bad = vec![
        "user",
        "1:user",
        "0x0",
        "1:2:3",
        "1x",
        " 1",
        "٣",
        "99999999999999999999",
        ":",
        "1:",
        ":1",
    ];
    if !skip_on("runc", "(ids out of range alone) it takes them modulo 2^32") {
        bad.extend(["4294967296", "-1", "4294967295", "0:4294967296", "+1"]);
    }
    for user in bad {
        let out = c.exec_with(&[&format!("--user={user}")], &["id", "-u"]);
        assert_eq!(out.code, 255, "{user:?}: {out}");
    }
}

#[test]
fn a_process_document_has_its_own_umask() {
    if skip_on("runc", "it always takes the container's") {
        return;
    }
    let c = sleeper();
    let process =
        json!({"user": {"uid": 0, "gid": 0, "umask": 0o27}, "args": ["/bin/sh", "-c", "umask"], "cwd": "/"});
    let file = process_file(&c, &process);
    assert_eq!(
        c.runtime()
            .call(&["exec", "--process", &file, c.id()])
            .ok()
            .text(),
        "0027"
    );
}

#[test]
fn a_process_document_is_obeyed() {
    let c = sleeper();
    let process = json!({
        "terminal": false,
        "user": {"uid": 1000, "gid": 1000, "additionalGids": [5], "umask": 0o22},
        "args": ["/bin/sh", "-c", "id -u; id -G; umask; pwd; echo $A; ulimit -n; grep NoNewPrivs /proc/self/status | cut -f2"],
        "env": ["PATH=/bin", "A=1"],
        "cwd": "/etc",
        "noNewPrivileges": true,
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}]
    });
    let file = process_file(&c, &process);
    let out = c.runtime().call(&["exec", "--process", &file, c.id()]).ok();
    assert_eq!(out.text(), "1000\n1000 5\n0022\n/etc\n1\n99\n1");
}

#[test]
fn a_bad_process_document_is_refused() {
    let c = sleeper();
    for text in [
        "",
        "{",
        "[]",
        "{\"args\": []}",
        "{\"args\": [\"true\"], \"cwd\": \"relative\"}",
    ] {
        let file = c.dir().join("process.json");
        fs::write(&file, text).unwrap();
        let out = c
            .runtime()
            .call(&["exec", "--process", &file.display().to_string(), c.id()]);
        assert_eq!(out.code, 255, "{text:?}: {out}");
        assert!(!out.stderr.contains("panicked"), "{out}");
    }
    let out = c
        .runtime()
        .call(&["exec", "--process", "/nonexistent/process.json", c.id()]);
    assert_eq!(out.code, 255, "{out}");
}

#[test]
fn nothing_to_run_is_refused() {
    let c = sleeper();
    assert_eq!(c.exec(&[]).code, 255);
}

#[test]
fn a_missing_program_is_named() {
    let c = sleeper();
    c.exec(&["no-such-program"]).fails(
        255,
        r#"exec: \"no-such-program\": executable file not found in $PATH"#,
    );
    let out = c.exec(&["/no/such/program"]);
    assert_eq!(out.code, 255, "{out}");
    assert!(out.stderr.contains("no such file or directory"), "{out}");
}

#[test]
fn errors_have_their_prefix() {
    let c = sleeper();
    c.exec(&["no-such-program"]).fails(255, "exec failed: ");
}

#[test]
fn a_stopped_container_is_refused() {
    let c = Bundle::new().container();
    c.up();
    c.wait_status("stopped");
    c.exec(&["true"]).fails(255, "cannot exec in a stopped container");
}

#[test]
fn a_created_container_takes_execs() {
    let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
    c.create().ok();
    assert_eq!(c.exec(&["echo", "early"]).ok().text(), "early");
    assert_eq!(c.state()["status"], "created");
    c.start().ok();
}

#[test]
fn detached_it_returns_at_once_and_leaves_a_pid() {
    let c = sleeper();
    let file = c.dir().join("exec.pid");
    c.exec_with(
        &["--detach", "--pid-file", &file.display().to_string()],
        &["sleep", "601"],
    )
    .ok();
    let pid = fs::read_to_string(&file).unwrap();
    wait_for("the program", || {
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        (command == "sleep\x00601\x00").then_some(())
    });
}

#[test]
fn flags_after_the_program_are_the_programs() {
    let c = sleeper();
    assert_eq!(
        c.exec(&["echo", "-n", "--tty", "--", "-x"]).ok().stdout,
        "--tty -- -x"
    );
}

#[test]
fn it_ends_with_the_container() {
    let c = sleeper();
    let command = c
        .runtime()
        .command(&["exec", c.id(), "sh", "-c", "echo up; sleep 600"]);
    let running = Running::start(command, None);
    wait_for("the exec", || {
        running.stdout_so_far().contains("up").then_some(())
    });
    c.kill("KILL").ok();
    assert_eq!(running.wait().code, 137);
}

#[test]
fn signals_are_forwarded() {
    let c = sleeper();
    let script = "trap 'echo got; exit 5' TERM; echo up; while :; do sleep 0.02; done";
    let running = Running::start(c.runtime().command(&["exec", c.id(), "sh", "-c", script]), None);
    wait_for("the exec", || {
        running.stdout_so_far().contains("up").then_some(())
    });
    coracle_tests::host::signal(running.pid(), "TERM");
    let out = running.wait();
    assert_eq!(out.code, 5, "{out}");
}

#[test]
fn no_descriptor_but_the_three_is_inherited() {
    let c = sleeper();
    let mut command = std::process::Command::new(coracle_tests::host::probe());
    command
        .args(["open-fds", "20"])
        .arg(c.runtime().program())
        .arg("--root")
        .arg(c.runtime().root());
    command.args(["exec", c.id(), "sh", "-c", "probe fds | cut -d' ' -f1"]);
    assert_eq!(Running::start(command, None).wait().ok().text(), "0\n1\n2");
}

#[test]
fn preserved_descriptors_are_passed_on() {
    let c = sleeper();
    let mut command = std::process::Command::new(coracle_tests::host::probe());
    command
        .args(["open-fds", "3"])
        .arg(c.runtime().program())
        .arg("--root")
        .arg(c.runtime().root());
    command.args([
        "exec",
        "--preserve-fds",
        "1",
        c.id(),
        "sh",
        "-c",
        "probe fds | cut -d' ' -f1",
    ]);
    assert_eq!(Running::start(command, None).wait().ok().text(), "0\n1\n2\n3");
}

#[test]
fn the_session_keyring_is_the_containers() {
    let c = Bundle::new().sh("probe keyring; sleep 600").container();
    c.up();
    c.wait_stdout("\n");
    assert_eq!(c.exec(&["probe", "keyring"]).ok().text(), c.stdout().trim());
}

#[test]
fn no_new_privileges_can_be_asked_for() {
    let c = Bundle::new()
        .set("/process/noNewPrivileges", json!(false))
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    let show = ["sh", "-c", "grep NoNewPrivs /proc/self/status | cut -f2"];
    assert_eq!(c.exec(&show).ok().text(), "0");
    assert_eq!(c.exec_with(&["--no-new-privs"], &show).ok().text(), "1");
}

#[test]
fn oom_score_and_limits_are_the_containers() {
    let c = Bundle::new()
        .set("/process/oomScoreAdj", json!(77))
        .set(
            "/process/rlimits",
            json!([{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}]),
        )
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    let out = c
        .exec_sh("cat /proc/self/oom_score_adj; ulimit -n; ulimit -H -n")
        .ok();
    assert_eq!(out.text(), "77\n99\n100");
}

#[test]
fn many_at_once_work() {
    let c = sleeper();
    std::thread::scope(|scope| {
        for n in 0..30 {
            let c = &c;
            scope.spawn(move || {
                assert_eq!(c.exec_sh(&format!("echo {n}; exit {n}")).code, n);
            });
        }
    });
    let out = c.exec_sh("ls /proc | grep -c '^[0-9]'").ok();
    assert!(
        out.text().parse::<u32>().unwrap() < 8,
        "processes are left: {out}"
    );
}

#[test]
fn a_megabyte_comes_back() {
    let c = sleeper();
    let out = c.exec_sh("yes 0123456789abcde | head -c 1048576").ok();
    assert_eq!(out.stdout.len(), 1 << 20);
}

#[test]
fn a_container_in_a_sub_cgroup_takes_execs() {
    let limits = json!({"limit": 100});
    let c = Bundle::new()
        .set("/linux/resources/pids", limits)
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    let dir = coracle_tests::host::cgroup_dir("pids", c.cgroup());
    fs::create_dir(dir.join("inner")).unwrap();
    fs::write(dir.join("inner/cgroup.procs"), c.pid().to_string()).unwrap();
    assert_eq!(c.exec(&["echo", "in"]).ok().text(), "in");
}

#[test]
fn an_exec_into_a_joined_namespace_works() {
    let first = sleeper();
    let path = format!("/proc/{}/ns/net", first.pid());
    let c = Bundle::new()
        .join("network", &path)
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    let expected = fs::read_link(&path).unwrap().display().to_string();
    assert_eq!(c.exec_sh("readlink /proc/self/ns/net").ok().text(), expected);
}
