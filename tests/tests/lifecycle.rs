//! create, start, kill, delete, run, state, list: one container's life and what may go wrong in it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use coracle_tests::{Bundle, json, skip_on, wait_for};

fn sleeper() -> Bundle {
    Bundle::new().args(&["/bin/sleep", "600"])
}

#[test]
fn run_succeeds_and_leaves_nothing() {
    let c = Bundle::new().container();
    let out = c.run().ok();
    assert_eq!((out.stdout.as_str(), out.stderr.as_str()), ("", ""));
    c.assert_gone();
}

#[test]
fn run_passes_the_exit_code_on() {
    for code in [1, 42, 127, 255] {
        let c = Bundle::new().sh(&format!("exit {code}")).container();
        assert_eq!(c.run().code, code);
    }
}

#[test]
fn run_answers_128_plus_the_signal() {
    // without its own pid namespace the process is no init, and may kill itself
    let c = Bundle::new()
        .without_namespace("pid")
        .sh("kill -TERM $$; sleep 9")
        .container();
    assert_eq!(c.run().code, 128 + 15);
    let c = Bundle::new()
        .without_namespace("pid")
        .sh("kill -KILL $$; sleep 9")
        .container();
    assert_eq!(c.run().code, 128 + 9);
}

#[test]
fn run_connects_the_three_standard_streams() {
    let c = Bundle::new().sh("cat; echo out; echo err >&2").container();
    let out = c.run_with(&[], Some("from outside\n")).ok();
    assert_eq!(out.stdout, "from outside\nout\n");
    assert_eq!(out.stderr, "err\n");
}

#[test]
fn run_passes_a_megabyte_through() {
    let c = Bundle::new()
        .sh("yes 0123456789abcde | head -c 1048576")
        .container();
    assert_eq!(c.run().ok().stdout.len(), 1 << 20);
}

#[test]
fn run_forwards_signals() {
    let c = Bundle::new()
        .sh("trap 'echo got-it; exit 7' TERM; echo up; while :; do sleep 0.05; done")
        .container();
    let running = c.run_in_background();
    wait_for("the container", || {
        running.stdout_so_far().contains("up").then_some(())
    });
    assert!(coracle_tests::host::signal(running.pid(), "TERM"));
    let out = running.wait();
    assert_eq!(out.code, 7, "{out}");
    assert!(out.stdout.contains("got-it"), "{out}");
}

#[test]
fn run_detached_returns_at_once() {
    let c = sleeper().container();
    c.run_with(&["--detach"], None).ok();
    assert_eq!(c.state()["status"], "running");
}

#[test]
fn run_keep_leaves_the_stopped_container() {
    let c = Bundle::new().container();
    c.run_with(&["--keep"], None).ok();
    assert_eq!(c.state()["status"], "stopped");
    c.call(&["delete"]).ok();
    c.assert_gone();
}

#[test]
fn create_runs_nothing_until_start() {
    let c = Bundle::new()
        .sh("echo started > /tmp/mark; sleep 600")
        .container();
    c.create().ok();
    assert_eq!(c.state()["status"], "created");
    assert!(!c.inside("/tmp/mark").exists());
    c.start().ok();
    wait_for("the program", || c.inside("/tmp/mark").exists().then_some(()));
    assert_eq!(c.state()["status"], "running");
}

#[test]
fn state_has_all_fields() {
    let c = sleeper()
        .set("/annotations", json!({"org.example.key": "value"}))
        .container();
    c.create().ok();
    let state = c.state();
    assert!(
        state["ociVersion"].as_str().is_some_and(|v| v.starts_with("1.")),
        "{state}"
    );
    assert_eq!(state["id"], c.id());
    assert_eq!(state["status"], "created");
    assert_eq!(state["bundle"], c.dir().display().to_string());
    assert_eq!(state["annotations"]["org.example.key"], "value");
    assert!(state["pid"].as_u64().is_some_and(|p| p > 1), "{state}");
    if !skip_on("crun", "its state has no rootfs") {
        assert_eq!(state["rootfs"], c.dir().join("rootfs").display().to_string());
    }
    let created = state["created"].as_str().unwrap();
    assert!(
        created.len() > 20 && created.contains('T') && created.ends_with('Z'),
        "{created}"
    );
}

#[test]
fn state_of_a_stopped_container_has_pid_zero() {
    let c = Bundle::new().container();
    c.up();
    c.wait_status("stopped");
    assert_eq!(c.state()["pid"], 0);
}

#[test]
fn the_state_pid_is_the_init() {
    let c = sleeper().container();
    c.up();
    let command = std::fs::read_to_string(format!("/proc/{}/cmdline", c.pid())).unwrap();
    assert_eq!(command, "/bin/sleep\x00600\x00");
}

#[test]
fn stdio_of_a_created_container_is_that_of_create() {
    let c = Bundle::new().sh("echo to-out; echo to-err >&2").container();
    c.up();
    c.wait_status("stopped");
    assert!(c.stdout().contains("to-out"));
    assert!(c.stderr().contains("to-err"));
}

#[test]
fn start_is_refused_twice() {
    let c = sleeper().container();
    c.up();
    c.start().refused(&["cannot start an already running container"]);
}

#[test]
fn start_is_refused_once_stopped() {
    let c = Bundle::new().container();
    c.up();
    c.wait_status("stopped");
    c.start().refused(&["cannot start a container that has stopped"]);
}

#[test]
fn start_after_the_init_was_killed_is_refused() {
    let c = sleeper().container();
    c.create().ok();
    c.kill("KILL").ok();
    c.wait_status("stopped");
    c.start().refused(&["stopped", "not running", "dead"]);
}

#[test]
fn a_second_create_with_the_same_id_is_refused() {
    let c = sleeper().container();
    c.up();
    c.create().refused(&["already exists"]);
    assert_eq!(c.state()["status"], "running", "the first one lives on");
}

#[test]
fn unknown_containers_are_named_so() {
    let c = Bundle::new().container();
    for command in ["start", "state", "delete"] {
        c.call(&[command]).refused(&["container does not exist"]);
    }
    c.kill("TERM").refused(&["container does not exist"]);
    c.call(&["delete", "--force"]).ok();
}

#[test]
fn delete_refuses_a_running_container() {
    let c = sleeper().container();
    c.up();
    c.call(&["delete"]).refused(&["that is not stopped: running"]);
    assert_eq!(c.state()["status"], "running");
    c.call(&["delete", "-f"]).ok();
    c.assert_gone();
}

#[test]
fn delete_takes_a_created_container_without_force() {
    let c = sleeper().container();
    c.create().ok();
    c.call(&["delete"]).ok();
    c.assert_gone();
    c.call(&["delete"]).refused(&["does not exist"]);
}

#[test]
fn an_id_can_be_used_again() {
    let c = Bundle::new().sh("exit 3").container();
    for _ in 0..3 {
        assert_eq!(c.run().code, 3);
    }
}

#[test]
fn kill_takes_numbers_and_names() {
    let script = "for s in HUP USR1 USR2 TERM 35; do trap \"echo got-$s\" $s; done; echo up; \
                  while :; do sleep 0.02; done";
    let c = Bundle::new().sh(script).container();
    c.up();
    c.wait_stdout("up");
    for (signal, name) in [
        ("HUP", "HUP"),
        ("SIGUSR1", "USR1"),
        ("usr2", "USR2"),
        ("15", "TERM"),
        ("35", "35"),
    ] {
        c.kill(signal).ok();
        c.wait_stdout(&format!("got-{name}"));
    }
}

#[test]
fn kill_defaults_to_term() {
    let c = Bundle::new()
        .sh("trap 'echo term; exit 0' TERM; echo up; while :; do sleep 0.02; done")
        .container();
    c.up();
    c.wait_stdout("up");
    c.call(&["kill"]).ok();
    c.wait_status("stopped");
    assert!(c.stdout().contains("term"));
}

#[test]
fn kill_refuses_what_is_no_signal() {
    let c = sleeper().container();
    c.up();
    for signal in ["BOGUS", "SIGBOGUS", "1x", "-"] {
        let out = c.kill(signal);
        assert_eq!(out.code, 1, "{signal:?}: {out}");
    }
    assert_eq!(c.state()["status"], "running");
}

#[test]
fn kill_of_a_stopped_container_says_so() {
    let c = Bundle::new().container();
    c.up();
    c.wait_status("stopped");
    c.kill("TERM").refused(&["container not running"]);
}

#[test]
fn kill_all_is_accepted() {
    let c = sleeper().container();
    c.up();
    c.runtime().call(&["kill", "--all", c.id(), "KILL"]).ok();
    c.wait_status("stopped");
    // callers send it once more to be sure, and do not expect an error
    c.runtime().call(&["kill", "-a", c.id(), "KILL"]).ok();
}

#[test]
fn kill_without_a_pid_namespace_takes_the_whole_cgroup() {
    let c = Bundle::new()
        .without_namespace("pid")
        .sh("setsid sleep 600 & setsid sleep 601 & echo up; wait")
        .container();
    c.up();
    c.wait_stdout("up");
    c.kill("KILL").ok();
    c.wait_status("stopped");
    wait_for("the other processes' end", || {
        coracle_tests::leaks::processes(c.id()).is_empty().then_some(())
    });
}

#[test]
fn delete_takes_processes_that_outlive_the_init() {
    let c = Bundle::new()
        .without_namespace("pid")
        .sh("setsid sleep 600 & exit 0")
        .container();
    c.up();
    c.wait_status("stopped");
    c.call(&["delete"]).ok();
    c.assert_gone();
}

#[test]
fn kill_reaches_a_container_that_was_never_started() {
    let c = sleeper().container();
    c.create().ok();
    c.kill("KILL").ok();
    c.wait_status("stopped");
}

#[test]
fn the_pid_file_holds_the_number_alone() {
    let c = sleeper().container();
    let file = c.dir().join("pid");
    c.create_with(&["--pid-file", &file.display().to_string()]).ok();
    let text = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text, c.pid().to_string(), "no newline: callers parse all of it");
}

#[test]
fn a_pid_file_in_no_directory_fails_the_create() {
    let c = sleeper().container();
    c.create_with(&["--pid-file", "/nonexistent/dir/pid"])
        .refused(&["pid", "/nonexistent/dir"]);
    c.assert_gone();
}

#[test]
fn list_shows_what_is_there() {
    let c = sleeper().container();
    assert_eq!(
        c.runtime().call(&["list", "-q"]).code,
        1,
        "the state directory is not there yet"
    );
    c.up();
    let table = c.runtime().call(&["list"]).ok();
    assert!(table.stdout.starts_with("ID "), "{table}");
    assert!(
        table.stdout.contains(c.id()) && table.stdout.contains("running"),
        "{table}"
    );
    assert_eq!(c.runtime().call(&["list", "--quiet"]).ok().text(), c.id());
    let all: serde_json::Value =
        serde_json::from_str(&c.runtime().call(&["list", "--format", "json"]).ok().stdout).unwrap();
    let one = &all[0];
    assert_eq!(one["id"], c.id());
    assert_eq!(one["status"], "running");
    assert_eq!(one["pid"], c.pid());
    assert_eq!(one["owner"], "root");
    c.runtime()
        .call(&["list", "--format", "yaml"])
        .refused(&["format"]);
}

#[test]
fn list_of_nothing_is_empty() {
    let c = Bundle::new().container();
    c.run().ok();
    assert_eq!(c.runtime().call(&["list", "-q"]).ok().text(), "");
    let json = c.runtime().call(&["list", "-f", "json"]).ok();
    assert!(["null", "[]"].contains(&json.text()), "{json}");
}

#[test]
fn the_bundle_is_the_current_directory_by_default() {
    let c = Bundle::new().sh("exit 5").container();
    let mut command = c.runtime().command(&["run", c.id()]);
    command.current_dir(c.dir());
    assert_eq!(
        coracle_tests::runner::Running::start(command, None).wait().code,
        5
    );
}

#[test]
fn a_relative_bundle_becomes_absolute_in_the_state() {
    let c = sleeper().container();
    let parent = c.dir().parent().unwrap().to_path_buf();
    let name = c.dir().file_name().unwrap().to_string_lossy().into_owned();
    // files, not pipes: the container keeps them
    let mut command = c.runtime().command(&["create", "--bundle", &name, c.id()]);
    command.current_dir(parent);
    coracle_tests::runner::Running::start(command, None).wait().ok();
    assert_eq!(c.state()["bundle"], c.dir().display().to_string());
}

#[test]
fn a_missing_bundle_is_named() {
    let c = Bundle::new().container();
    let out = c
        .runtime()
        .call(&["run", "--bundle", "/nonexistent/bundle", c.id()]);
    out.refused(&["/nonexistent/bundle", "no such file"]);
}

#[test]
fn a_missing_program_fails_the_create_not_the_start() {
    let c = Bundle::new().args(&["no-such-program"]).container();
    c.create()
        .refused(&[r#"exec: "no-such-program": executable file not found in $PATH"#]);
    c.assert_gone();
}

#[test]
fn a_missing_absolute_program_fails_the_create() {
    let c = Bundle::new().args(&["/no/such/program"]).container();
    c.create()
        .refused(&[r#"exec: "/no/such/program": stat /no/such/program: no such file or directory"#]);
    c.assert_gone();
}

#[test]
fn a_program_without_the_exec_bit_is_refused() {
    let bundle = Bundle::new().args(&["/etc/passwd"]);
    let c = bundle.container();
    c.create().refused(&["permission denied"]);
    c.assert_gone();
}

#[test]
fn a_directory_is_no_program() {
    let c = Bundle::new().args(&["/etc"]).container();
    c.create().refused(&["is a directory", "permission denied"]);
    c.assert_gone();
}

#[test]
fn a_file_that_is_no_program_fails_at_start() {
    use std::os::unix::fs::PermissionsExt as _;
    let bundle = Bundle::new().args(&["/bin/garbage"]);
    std::fs::write(bundle.inside("/bin/garbage"), "\x7fnot an elf").unwrap();
    std::fs::set_permissions(
        bundle.inside("/bin/garbage"),
        std::fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    let c = bundle.container();
    let out = c.run();
    assert_ne!(out.code, 0, "{out}");
    assert!(out.stderr.to_lowercase().contains("exec format error"), "{out}");
    c.assert_gone();
}

#[test]
fn a_killed_create_can_be_deleted() {
    if skip_on(
        "runc",
        "killed before it has written state.json it leaves cgroups behind (runc issue 4757)",
    ) {
        return;
    }
    // the create is killed as early and as late as possible; whatever it has made must go away
    for round in 0..12 {
        let c = sleeper().container();
        let dir = c.dir().display().to_string();
        let command = c.runtime().command(&["create", "--bundle", &dir, c.id()]);
        let running = coracle_tests::runner::Running::start(command, None);
        #[allow(
            clippy::disallowed_methods,
            reason = "the point is to kill at different moments"
        )]
        std::thread::sleep(std::time::Duration::from_millis(round * 3));
        coracle_tests::host::signal(running.pid(), "KILL");
        let _ = running.wait();
        // the drop of `c` deletes with force and looks for what is left
    }
}

#[test]
fn twenty_containers_live_side_by_side() {
    let all: Vec<_> = (0..20).map(|_| sleeper().container()).collect();
    std::thread::scope(|scope| {
        for c in &all {
            scope.spawn(|| {
                c.up();
            });
        }
    });
    for c in &all {
        assert_eq!(c.state()["status"], "running");
    }
}
