//! Hooks: when they run, where, with what on standard input, and what their failure means.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::{Path, PathBuf};

use coracle_tests::{Bundle, Container, Value, json, skip_on};

const ALL: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// A script that a hook runs; the ones of the container's side get a copy inside.
fn script(bundle: &Bundle, name: &str, body: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let path = bundle.dir().join(name);
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    fs::copy(&path, bundle.inside("/bin").join(name)).unwrap();
    path
}

/// Every hook writes its name and its standard input to a file of its own; `log` is bound into the container.
fn recording(body: &str) -> (Bundle, PathBuf) {
    let mut bundle = Bundle::new();
    let log = bundle.dir().join("log");
    fs::create_dir(&log).unwrap();
    fs::set_permissions(&log, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    bundle = bundle.bind(&log, "/log", &["bind"]);
    for name in ALL {
        let inside = name == "startContainer";
        let place = if inside {
            "/log".to_owned()
        } else {
            log.display().to_string()
        };
        // createContainer runs in the container's namespaces, but its path and the log are still the host's
        let path = script(&bundle, name, &format!("name={name}; log={place}\n{body}"));
        let path = if inside {
            PathBuf::from("/bin").join(name)
        } else {
            path
        };
        bundle = bundle.push(
            &format!("/hooks/{name}"),
            json!({"path": path, "args": [name], "env": ["PATH=/bin:/usr/bin"]}),
        );
    }
    (bundle, log)
}

fn read(log: &Path, name: &str) -> String {
    fs::read_to_string(log.join(name)).unwrap_or_default()
}

fn state_of(log: &Path, name: &str) -> Value {
    let text = read(log, name);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name} got {text:?}: {e}"))
}

#[test]
fn they_run_in_order() {
    let (bundle, log) = recording("cat > /dev/null; echo $name >> $log/order");
    let c = bundle.sh("echo process >> /log/order; sleep 600").container();
    let order = || -> Vec<String> {
        let text = read(&log, "order");
        text.lines()
            .filter(|l| !["poststart", "process"].contains(l))
            .map(str::to_owned)
            .collect()
    };
    c.create().ok();
    assert_eq!(order(), ALL[..3]);
    c.start().ok();
    coracle_tests::wait_for("the process", || {
        read(&log, "order").contains("process").then_some(())
    });
    assert_eq!(order(), ALL[..4]);
    let text = read(&log, "order");
    assert!(text.find("startContainer") < text.find("process"), "{text}");
    c.call(&["delete", "-f"]).ok();
    assert_eq!(order(), [&ALL[..4], &ALL[5..]].concat());
}

#[test]
fn poststart_runs_when_the_process_does() {
    if skip_on("runc", "up to 1.5 it runs them at the end of create") {
        return;
    }
    let (bundle, log) = recording("cat > /dev/null; echo $name >> $log/order");
    let c = bundle.args(&["/bin/sleep", "600"]).container();
    c.create().ok();
    assert!(!read(&log, "order").contains("poststart"));
    c.start().ok();
    assert_eq!(
        read(&log, "order").lines().last(),
        Some("poststart"),
        "before start returns"
    );
}

#[test]
fn they_get_the_state() {
    let (bundle, log) = recording("cat > $log/$name.new; mv $log/$name.new $log/$name");
    let c = bundle
        .set("/annotations", json!({"key": "value"}))
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    let pid = c.pid();
    c.call(&["delete", "-f"]).ok();
    for (name, status) in ALL.iter().zip([
        "creating", "creating", "creating", "created", "running", "stopped",
    ]) {
        if *name == "poststart" && skip_on("runc", "(poststart alone) up to 1.5 it runs at the end of create")
        {
            continue;
        }
        let state = state_of(&log, name);
        assert_eq!(state["id"], c.id(), "{name}");
        assert_eq!(state["status"], status, "{name}");
        assert_eq!(state["bundle"], c.dir().display().to_string(), "{name}");
        assert_eq!(state["annotations"]["key"], "value", "{name}");
        assert!(
            state["ociVersion"].as_str().is_some_and(|v| v.starts_with("1.")),
            "{name}"
        );
        if ["prestart", "createRuntime", "poststart"].contains(name) {
            assert_eq!(state["pid"], pid, "{name}");
        }
    }
}

#[test]
fn they_run_in_the_right_namespaces() {
    let (bundle, log) = recording(
        "cat > /dev/null; readlink /proc/self/ns/mnt /proc/self/ns/pid > $log/$name || \
        { readlink /proc/self/ns/mnt; readlink /proc/self/ns/pid; } > $log/$name",
    );
    let c = bundle.args(&["/bin/sleep", "600"]).container();
    c.up();
    let own = fs::read_link("/proc/self/ns/mnt").unwrap().display().to_string();
    let theirs = fs::read_link(format!("/proc/{}/ns/mnt", c.pid()))
        .unwrap()
        .display()
        .to_string();
    c.call(&["delete", "-f"]).ok();
    for (name, expected) in ALL.iter().zip([&own, &own, &theirs, &theirs, &own, &own]) {
        let seen = read(&log, name);
        assert_eq!(seen.lines().next(), Some(expected.as_str()), "{name}: {seen}");
    }
}

#[test]
fn mounts_are_there_before_the_container_is() {
    // vendors' hooks look for the container's files, and add mounts of their own
    let (bundle, log) = recording(
        "cat > /dev/null; [ $name != createContainer ] || cut -d' ' -f5 /proc/self/mountinfo > $log/$name",
    );
    let c = bundle.container();
    c.run().ok();
    let seen = read(&log, "createContainer");
    let root = c.dir().join("rootfs").display().to_string();
    for place in ["/proc", "/dev", "/sys", "/log"] {
        assert!(
            seen.lines().any(|l| l == format!("{root}{place}")),
            "{place} in {seen}"
        );
    }
}

#[test]
fn a_mount_made_by_create_container_is_seen_inside() {
    let mut bundle = Bundle::new();
    let root = bundle.rootfs().display().to_string();
    let path = script(
        &bundle,
        "mounter",
        &format!("cat > /dev/null; mount -t tmpfs hook {root}/mnt && touch {root}/mnt/by-hook"),
    );
    bundle = bundle.push(
        "/hooks/createContainer",
        json!({"path": path, "env": ["PATH=/bin:/usr/bin:/sbin"]}),
    );
    assert_eq!(bundle.sh("ls /mnt").container().run().ok().text(), "by-hook");
}

#[test]
fn they_have_their_own_arguments_and_environment_alone() {
    let bundle = Bundle::new();
    let out = bundle.dir().join("out");
    let path = script(
        &bundle,
        "hook",
        &format!("cat > /dev/null; echo \"$0 $*\" > {0}; env >> {0}", out.display()),
    );
    let hook =
        json!({"path": path, "args": ["hook", "one", "two words"], "env": ["PATH=/usr/bin:/bin", "MINE=1"]});
    let c = bundle
        .push("/hooks/createRuntime", hook)
        .push("/process/env", json!("CONTAINERS=1"))
        .container();
    c.run().ok();
    let text = fs::read_to_string(&out).unwrap();
    assert!(text.lines().next().unwrap().ends_with("one two words"), "{text}");
    assert!(text.contains("MINE=1"), "{text}");
    assert!(
        !text.contains("CONTAINERS=1") && !text.contains("CORACLE_TEST_MARK"),
        "{text}"
    );
}

#[test]
fn they_are_not_in_the_containers_cgroup() {
    let (bundle, log) = recording("cat > /dev/null; cat /proc/self/cgroup > $log/$name");
    let c = bundle.args(&["/bin/sleep", "600"]).container();
    c.up();
    c.call(&["delete", "-f"]).ok();
    for name in ["createRuntime", "poststart", "poststop"] {
        assert!(!read(&log, name).contains(c.id()), "{name}: {}", read(&log, name));
    }
}

#[test]
fn limits_are_set_before_create_runtime() {
    let bundle = Bundle::new();
    let file = coracle_tests::host::cgroup_dir("pids", &format!("/{}/pids.max", bundle.id()));
    let out = bundle.dir().join("out");
    let path = script(
        &bundle,
        "hook",
        &format!("cat > /dev/null; cat {} > {}", file.display(), out.display()),
    );
    let c = bundle
        .set("/linux/resources/pids", json!({"limit": 33}))
        .push(
            "/hooks/createRuntime",
            json!({"path": path, "env": ["PATH=/bin:/usr/bin"]}),
        )
        .container();
    c.run().ok();
    assert_eq!(fs::read_to_string(out).unwrap().trim(), "33");
}

/// A container with one hook that fails, and whether its process has run.
fn failing(kind: &str) -> Container {
    let bundle = Bundle::new();
    let path = script(&bundle, "fail", "cat > /dev/null; echo why >&2; exit 9");
    let path = if kind == "startContainer" {
        PathBuf::from("/bin/fail")
    } else {
        path
    };
    bundle
        .push(&format!("/hooks/{kind}"), json!({"path": path}))
        .sh("echo ran > /tmp/ran; sleep 600")
        .container()
}

#[test]
fn a_failing_create_hook_fails_the_create() {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let c = failing(kind);
        c.create()
            .refused(&[&format!("error running {kind} hook #0"), &format!("{kind} hook")]);
        assert!(!c.inside("/tmp/ran").exists());
        c.assert_gone();
    }
}

#[test]
fn a_failing_start_container_hook_runs_nothing() {
    let c = failing("startContainer");
    c.create().ok();
    let _ = c.start();
    c.wait_status("stopped");
    assert!(!c.inside("/tmp/ran").exists());
}

#[test]
fn a_failing_poststart_hook_ends_the_container() {
    if skip_on("runc", "up to 1.5 it runs them at the end of create") {
        return;
    }
    let c = failing("poststart");
    c.create().ok();
    let out = c.start();
    assert_eq!(out.code, 1, "{out}");
    assert!(out.stderr.contains("poststart"), "{out}");
    c.wait_status("stopped");
}

#[test]
fn a_failing_poststop_hook_is_a_warning_and_the_next_one_runs() {
    if skip_on(
        "runc",
        "up to 1.5 delete answers with an error and the next one does not run",
    ) {
        return;
    }
    let bundle = Bundle::new();
    let out = bundle.dir().join("out");
    let fail = script(&bundle, "fail", "cat > /dev/null; exit 9");
    let next = script(
        &bundle,
        "next",
        &format!("cat > /dev/null; echo ran > {}", out.display()),
    );
    let c = bundle
        .push("/hooks/poststop", json!({"path": fail}))
        .push(
            "/hooks/poststop",
            json!({"path": next, "env": ["PATH=/bin:/usr/bin"]}),
        )
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    c.call(&["delete", "-f"]).ok();
    assert_eq!(fs::read_to_string(out).unwrap(), "ran\n");
    c.assert_gone();
}

#[test]
fn a_hook_that_takes_too_long_is_killed() {
    let bundle = Bundle::new();
    let path = script(&bundle, "slow", "exec sleep 500");
    let hook = json!({"path": path, "timeout": 1, "env": ["PATH=/bin:/usr/bin"]});
    let c = bundle.push("/hooks/createRuntime", hook).container();
    let started = std::time::Instant::now();
    c.create().refused(&["createRuntime"]);
    assert!(started.elapsed() < coracle_tests::host::deadline(10));
    c.assert_gone();
}

#[test]
fn a_missing_hook_program_fails_the_create() {
    let c = Bundle::new()
        .push("/hooks/createRuntime", json!({"path": "/nonexistent/hook"}))
        .container();
    c.create().refused(&["/nonexistent/hook"]);
    c.assert_gone();
}

#[test]
fn a_relative_hook_path_is_refused() {
    let c = Bundle::new()
        .push("/hooks/createRuntime", json!({"path": "hook"}))
        .container();
    c.create().refused(&["hook"]);
    c.assert_gone();
}

#[test]
fn a_time_out_of_zero_is_refused() {
    for timeout in [0, -1] {
        let hook = json!({"path": "/bin/true", "timeout": timeout});
        Bundle::new()
            .push("/hooks/createRuntime", hook)
            .container()
            .create()
            .refused(&["timeout"]);
    }
}

#[test]
fn a_hook_that_reads_nothing_is_no_error() {
    let bundle = Bundle::new();
    let path = script(&bundle, "deaf", "exec <&-; exit 0");
    // a state larger than a pipe holds
    let c = bundle
        .set("/annotations", json!({"large": "x".repeat(100_000)}))
        .push("/hooks/createRuntime", json!({"path": path}))
        .container();
    c.run().ok();
}

#[test]
fn several_hooks_of_a_kind_run_in_their_order() {
    let mut bundle = Bundle::new();
    let out = bundle.dir().join("out");
    for n in 0..5 {
        let path = script(
            &bundle,
            &format!("hook{n}"),
            &format!("cat > /dev/null; echo {n} >> {}", out.display()),
        );
        bundle = bundle.push(
            "/hooks/createRuntime",
            json!({"path": path, "env": ["PATH=/bin:/usr/bin"]}),
        );
    }
    let c = bundle.container();
    c.run().ok();
    assert_eq!(fs::read_to_string(&out).unwrap(), "0\n1\n2\n3\n4\n");
}
