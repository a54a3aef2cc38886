//! The command line as callers know it from runc: flags, texts, exit codes, logs, the features document.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;

use coracle_tests::runner::Running;
use coracle_tests::{Bundle, Container, Output, Runtime, Value, skip_on};

fn bare(args: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let runtime = Runtime::new(&dir.path().join("state"), "cli");
    let mut command = runtime.bare(args);
    command.current_dir(dir.path());
    Running::start(command, None).wait()
}

fn sleeper() -> Container {
    Bundle::new().args(&["/bin/sleep", "600"]).container()
}

#[test]
fn version_has_the_lines_callers_parse() {
    for flag in ["--version", "-v"] {
        let out = bare(&[flag]).ok();
        let first = out.stdout.lines().next().unwrap_or_default().to_owned();
        assert!(
            first.contains(" version ") && first.split(' ').count() >= 3,
            "{out}"
        );
        assert!(out.stdout.lines().any(|l| l.starts_with("spec: 1.")), "{out}");
    }
}

#[test]
fn a_standard_error_that_takes_nothing_changes_no_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = Runtime::new(&dir.path().join("state"), "cli");
    let logged = ["--log", "/dev/null", "state", "nosuch"];
    for args in [&["state", "nosuch"][..], &logged, &["--no-such-flag"]] {
        let mut command = runtime.bare(args);
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let status = command.stderr(full).stdout(std::process::Stdio::null()).status();
        assert_eq!(status.unwrap().code(), Some(1), "{args:?}");
    }
}

#[test]
fn help_names_the_commands() {
    for args in [&["--help"][..], &["-h"], &["help"]] {
        let out = bare(args).ok();
        for command in [
            "create", "start", "run", "exec", "state", "kill", "delete", "list", "spec", "features",
        ] {
            assert!(out.stdout.contains(command), "{command} in {args:?}: {out}");
        }
    }
}

#[test]
fn help_of_a_command_names_its_flags() {
    let wanted: &[(&str, &[&str])] = &[
        (
            "create",
            &[
                "--bundle",
                "--console-socket",
                "--pid-file",
                "--no-pivot",
                "--preserve-fds",
            ],
        ),
        (
            "run",
            &["--bundle", "--console-socket", "--detach", "--keep", "--pid-file"],
        ),
        (
            "exec",
            &[
                "--console-socket",
                "--cwd",
                "--env",
                "--tty",
                "--user",
                "--process",
                "--detach",
                "--cap",
            ],
        ),
        ("delete", &["--force"]),
        ("list", &["--format", "--quiet"]),
    ];
    for (command, flags) in wanted {
        let out = bare(&[command, "--help"]).ok();
        for flag in *flags {
            assert!(out.stdout.contains(flag), "{flag} of {command}: {out}");
        }
    }
}

#[test]
fn a_wrong_number_of_arguments_is_an_incorrect_usage() {
    let wrong: &[&[&str]] = &[
        &["state"],
        &["start"],
        &["delete"],
        &["create"],
        &["run"],
        &["kill"],
        &["state", "a", "b"],
    ];
    for args in wrong {
        let out = bare(args);
        assert_eq!(out.code, 1, "{args:?}: {out}");
        assert!(
            format!("{}{}", out.stdout, out.stderr).contains("Incorrect Usage."),
            "{args:?}: {out}"
        );
    }
}

#[test]
fn an_unknown_flag_is_an_error() {
    assert_eq!(bare(&["--bogus", "list"]).code, 1);
    assert_eq!(bare(&["list", "--bogus"]).code, 1);
    assert_eq!(bare(&["run", "--bogus", "x"]).code, 1);
}

#[test]
fn an_unknown_command_is_an_error() {
    assert_ne!(bare(&["bogus"]).code, 0);
}

#[test]
fn container_ids_are_checked() {
    let c = sleeper();
    let (dir, long) = (c.dir().display().to_string(), "x".repeat(2000));
    let bad = [
        "", ".", "..", "a/b", "../x", "/abs", "a b", "a\nb", "é", "a:b", "a*", "a\\b", "a%00", "@", &long,
    ];
    for id in bad {
        for command in ["create", "run"] {
            let out = c.runtime().call(&[command, "--bundle", &dir, "--", id]);
            assert_ne!(out.code, 0, "{command} {id:?}: {out}");
            assert!(!out.stderr.contains("panicked"), "{out}");
        }
        for command in ["state", "start", "delete"] {
            let out = c.runtime().call(&[command, "--", id]);
            assert_ne!(out.code, 0, "{command} {id:?}: {out}");
        }
    }
    assert!(
        fs::read_dir(c.runtime().root()).map(|d| d.count()).unwrap_or(0) == 0,
        "something was made"
    );
}

#[test]
fn container_id_errors_have_runcs_words() {
    let c = sleeper();
    let dir = c.dir().display().to_string();
    c.runtime()
        .call(&["create", "--bundle", &dir, "a/b"])
        .refused(&["invalid container ID format"]);
    c.runtime()
        .call(&["create", "--bundle", &dir, ""])
        .refused(&["container id cannot be empty"]);
}

#[test]
fn every_allowed_character_is_allowed_in_an_id() {
    let c = Bundle::new().container();
    let dir = c.dir().display().to_string();
    for id in ["A", "z-9", "a_b", "a+b", "a.b", "..a", "a..", "0"] {
        let id = format!("{id}{}", c.id());
        c.runtime().call(&["run", "--bundle", &dir, &id]).ok();
    }
}

#[test]
fn flags_take_both_forms() {
    let c = Bundle::new().sh("exit 6").container();
    let (dir, root) = (
        c.dir().display().to_string(),
        c.runtime().root().display().to_string(),
    );
    let forms: [&[&str]; 3] = [
        &[
            &format!("--root={root}"),
            "run",
            &format!("--bundle={dir}"),
            c.id(),
        ],
        &["--root", &root, "run", "--bundle", &dir, c.id()],
        &["--root", &root, "run", "-b", &dir, c.id()],
    ];
    for args in forms {
        assert_eq!(
            Running::start(c.runtime().bare(args), None).wait().code,
            6,
            "{args:?}"
        );
    }
}

#[test]
fn the_last_of_repeated_global_flags_wins() {
    let c = sleeper();
    c.up();
    let root = c.runtime().root().display().to_string();
    let args = [
        "--root",
        "/nonexistent/a",
        "--root",
        &root,
        "--log-format",
        "text",
        "--log-format",
        "json",
        "state",
    ];
    let mut command = c.runtime().bare(&args);
    command.arg(c.id());
    Running::start(command, None).wait().ok();
}

#[test]
fn global_flags_of_all_callers_are_accepted() {
    let c = sleeper();
    let root = c.runtime().root().display().to_string();
    let log = c.dir().join("log.json").display().to_string();
    for flags in [
        &["--debug"][..],
        &["--rootless", "auto"],
        &["--rootless=false"],
        &["--log-format", "json"],
    ] {
        let args = [&["--root", &root, "--log", &log], flags, &["list"]].concat();
        let out = Running::start(c.runtime().bare(&args), None).wait();
        // the state directory is missing: an error, but not one of usage
        assert!(
            !out.stdout.contains("Incorrect") && !out.stderr.contains("flag provided"),
            "{flags:?}: {out}"
        );
    }
}

#[test]
fn an_unknown_log_format_is_an_error() {
    let out = bare(&["--log-format", "xml", "list"]);
    assert_eq!(out.code, 1, "{out}");
    assert!(
        out.stderr.contains("log-format") || out.stderr.contains("log format"),
        "{out}"
    );
}

#[test]
fn errors_go_to_the_log_and_to_stderr() {
    let c = sleeper();
    let log = c.dir().join("log");
    let root = c.runtime().root().display().to_string();
    for (format, wanted) in [("text", "level=error"), ("json", "\"level\":\"error\"")] {
        let args = [
            "--root",
            &root,
            "--log",
            &log.display().to_string(),
            "--log-format",
            format,
            "state",
            "nobody",
        ];
        let out = Running::start(c.runtime().bare(&args), None).wait();
        assert_eq!(out.code, 1);
        assert!(out.stderr.contains("container does not exist"), "{out}");
        let text = fs::read_to_string(&log).unwrap();
        assert!(
            text.contains(wanted) && text.contains("container does not exist"),
            "{text}"
        );
    }
    // the log is appended to, and a JSON line holds what containerd's shim reads
    let text = fs::read_to_string(&log).unwrap();
    assert_eq!(text.matches("container does not exist").count(), 2);
    let line: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(line["msg"], "container does not exist");
    assert!(line["time"].as_str().is_some_and(|t| t.contains('T')), "{line}");
}

#[test]
fn a_create_error_has_its_prefix() {
    let c = Bundle::new().set("/process/cwd", "relative".into()).container();
    let out = c.create();
    out.refused(&["create failed: "]);
    c.run().refused(&["run failed: "]);
    c.assert_gone();
}

#[test]
fn a_log_that_cannot_be_opened_is_an_error() {
    let out = bare(&["--log", "/nonexistent/dir/log", "list"]);
    assert_eq!(out.code, 1, "{out}");
    assert!(out.stderr.contains("/nonexistent/dir/log"), "{out}");
}

#[test]
fn a_relative_root_works() {
    let c = Bundle::new().sh("exit 4").container();
    let mut command = c.runtime().bare(&["--root", "state", "run", c.id()]);
    command.current_dir(c.dir());
    assert_eq!(Running::start(command, None).wait().code, 4);
}

#[test]
fn the_root_may_not_be_the_root_directory() {
    let out = bare(&["--root", "/", "list"]);
    assert_eq!(out.code, 1, "{out}");
}

#[test]
fn a_container_is_found_under_its_root_alone() {
    let c = sleeper();
    c.up();
    let other = tempfile::tempdir().unwrap();
    let other = Runtime::new(other.path(), "cli");
    other
        .call(&["state", c.id()])
        .refused(&["container does not exist"]);
}

#[test]
fn spec_writes_a_bundle_that_can_be_used() {
    let c = Bundle::new().container();
    fs::remove_file(c.dir().join("config.json")).unwrap();
    let dir = c.dir().display().to_string();
    c.runtime().call(&["spec", "--bundle", &dir]).ok();
    let text = fs::read_to_string(c.dir().join("config.json")).unwrap();
    assert!(text.contains("\n\t\"ociVersion\""), "indented with tabs");
    let mut spec: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(spec["process"]["terminal"], true);
    assert_eq!(spec["process"]["args"], serde_json::json!(["sh"]));
    assert_eq!(spec["root"]["readonly"], true);
    assert_eq!(spec["process"]["noNewPrivileges"], true);
    c.runtime()
        .call(&["spec", "--bundle", &dir])
        .refused(&["File config.json exists. Remove it first"]);
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = serde_json::json!(["sh", "-c", "echo hello from $(hostname)"]);
    spec["linux"]["cgroupsPath"] = c.cgroup().into();
    fs::write(c.dir().join("config.json"), spec.to_string()).unwrap();
    assert!(c.run().ok().stdout.starts_with("hello from "));
}

#[test]
fn spec_writes_into_the_current_directory() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = Runtime::new(dir.path(), "cli");
    let mut command = runtime.bare(&["spec"]);
    command.current_dir(dir.path());
    Running::start(command, None).wait().ok();
    assert!(dir.path().join("config.json").exists());
}

#[test]
fn features_describe_the_runtime() {
    let out = bare(&["features"]).ok();
    let features: Value = serde_json::from_str(&out.stdout).unwrap();
    assert!(
        features["ociVersionMin"]
            .as_str()
            .is_some_and(|v| v.starts_with("1.0")),
        "{out}"
    );
    assert!(
        features["ociVersionMax"]
            .as_str()
            .is_some_and(|v| v.starts_with("1.")),
        "{out}"
    );
    let has = |pointer: &str, words: &[&str]| {
        let list = features
            .pointer(pointer)
            .unwrap_or_else(|| panic!("{pointer}: {out}"));
        for word in words {
            assert!(
                list.as_array().is_some_and(|l| l.iter().any(|w| w == word)),
                "{word} in {pointer}: {list}"
            );
        }
    };
    has(
        "/hooks",
        &[
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        ],
    );
    has(
        "/mountOptions",
        &["ro", "rw", "bind", "rbind", "nosuid", "rprivate", "rslave", "rro"],
    );
    has(
        "/linux/namespaces",
        &["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
    );
    has("/linux/capabilities", &["CAP_CHOWN", "CAP_SYS_ADMIN"]);
    assert_eq!(features["linux"]["cgroup"]["v2"], true);
    assert_eq!(features["linux"]["seccomp"]["enabled"], true);
    has(
        "/linux/seccomp/actions",
        &[
            "SCMP_ACT_ALLOW",
            "SCMP_ACT_ERRNO",
            "SCMP_ACT_KILL_PROCESS",
            "SCMP_ACT_LOG",
        ],
    );
    has("/linux/seccomp/operators", &["SCMP_CMP_EQ", "SCMP_CMP_MASKED_EQ"]);
    has(
        "/linux/seccomp/archs",
        &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"],
    );
}

#[test]
fn features_of_mount_options_are_true() {
    let out = bare(&["features"]).ok();
    let features: Value = serde_json::from_str(&out.stdout).unwrap();
    let options = features["mountOptions"].as_array().unwrap().clone();
    // each is tried on a bind mount; those that need more than one word or a filesystem of their own are left out
    let special = [
        "defaults",
        "bind",
        "rbind",
        "remount",
        "idmap",
        "ridmap",
        "tmpcopyup",
        "iversion",
        "noiversion",
        "mand",
        "nomand",
    ];
    let mut bundle = Bundle::new().sh("true");
    for (n, option) in options.iter().filter_map(Value::as_str).enumerate() {
        if !special.contains(&option) {
            let source = bundle.dir().to_path_buf();
            bundle = bundle.bind(&source, &format!("/mnt/{n}"), &["bind", option]);
        }
    }
    bundle.container().run().ok();
}

#[test]
fn systemd_cgroup_without_systemd_is_refused_clearly() {
    if coracle_tests::skip_unless(
        !std::path::Path::new("/run/systemd/system").exists(),
        "systemd runs",
    ) {
        return;
    }
    let c = Bundle::new()
        .set("/linux/cgroupsPath", "system.slice:x:y".into())
        .container();
    let dir = c.dir().display().to_string();
    let root = c.runtime().root().display().to_string();
    let args = [
        "--root",
        &root,
        "--systemd-cgroup",
        "run",
        "--bundle",
        &dir,
        c.id(),
    ];
    Running::start(c.runtime().bare(&args), None)
        .wait()
        .refused(&["systemd"]);
}

#[test]
fn exec_errors_answer_255() {
    let c = sleeper();
    c.runtime()
        .call(&["exec", c.id(), "true"])
        .fails(255, "container does not exist");
    if skip_on("crun", "it answers 1 to the rest") {
        return;
    }
    c.up();
    c.exec(&["no-such-program"])
        .fails(255, "executable file not found in $PATH");
}
