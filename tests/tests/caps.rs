//! Capabilities: five sets for the container's process and for exec, as root and as anyone.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use coracle_tests::{Bundle, Container, Output, Value, json, skip_on};

const CHOWN: u64 = 1;
const KILL: u64 = 1 << 5;
const BIND: u64 = 1 << 10;
const MKNOD: u64 = 1 << 27;
const AUDIT_WRITE: u64 = 1 << 29;

const SHOW: &str = "grep ^Cap /proc/self/status";

/// Inheritable, permitted, effective, bounding, ambient.
fn sets(out: &Output) -> [u64; 5] {
    let mut all = out.stdout.lines().filter(|l| l.starts_with("Cap")).map(|l| {
        let hex = l.split_whitespace().nth(1).unwrap_or_default();
        u64::from_str_radix(hex, 16).unwrap_or_else(|e| panic!("{l}: {e}"))
    });
    std::array::from_fn(|_| all.next().unwrap_or_else(|| panic!("five sets in {out}")))
}

fn with(capabilities: Value, uid: u32) -> Container {
    let bundle = Bundle::new().set("/process/user", json!({"uid": uid, "gid": uid}));
    bundle
        .set("/process/capabilities", capabilities)
        .sh(&format!("{SHOW}; sleep 600"))
        .container()
}

fn started(c: &Container) -> [u64; 5] {
    c.up();
    c.wait_stdout("CapAmb:\t0");
    sets(&Output {
        code: 0,
        stdout: c.stdout(),
        stderr: String::new(),
    })
}

#[test]
fn the_five_sets_are_set() {
    let c = with(
        json!({
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"],
            "permitted": ["CAP_CHOWN", "CAP_KILL"],
            "effective": ["CAP_CHOWN", "CAP_KILL"],
            "inheritable": ["CAP_CHOWN", "CAP_KILL"],
            "ambient": ["CAP_CHOWN", "CAP_KILL"]
        }),
        1000,
    );
    let two = CHOWN | KILL;
    assert_eq!(started(&c), [two, two, two, two | BIND, two]);
}

#[test]
fn root_gains_the_bounding_set_unless_new_privileges_are_forbidden() {
    // execve gives uid 0 everything that is bounded in, as capabilities(7) says
    let two = CHOWN | KILL;
    for (no_new_privileges, gained) in [(false, two), (true, 0)] {
        let c = Bundle::new()
            .set(
                "/process/capabilities",
                json!({"bounding": ["CAP_CHOWN", "CAP_KILL"]}),
            )
            .set("/process/noNewPrivileges", json!(no_new_privileges))
            .sh(SHOW)
            .container();
        assert_eq!(sets(&c.run().ok()), [0, gained, gained, two, 0]);
    }
}

#[test]
fn a_user_without_ambient_ones_has_none() {
    let c = with(
        json!({"bounding": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"]}),
        1000,
    );
    assert_eq!(started(&c), [0, 0, 0, CHOWN, 0]);
}

#[test]
fn ambient_ones_reach_a_user() {
    let one = json!(["CAP_NET_BIND_SERVICE"]);
    let c = with(
        json!({"bounding": one, "permitted": one, "effective": one, "inheritable": one, "ambient": one}),
        1000,
    );
    assert_eq!(started(&c), [BIND, BIND, BIND, BIND, BIND]);
}

#[test]
fn ambient_without_inheritable_is_not_raised() {
    let one = json!(["CAP_CHOWN"]);
    let c = with(
        json!({"bounding": one, "permitted": one, "effective": one, "ambient": one}),
        1000,
    );
    assert_eq!(started(&c), [0, 0, 0, CHOWN, 0]);
}

#[test]
fn without_the_object_there_are_none() {
    if skip_on("runc", "it leaves the process all of its own") {
        return;
    }
    let c = Bundle::new().remove("/process/capabilities").sh(SHOW).container();
    assert_eq!(sets(&c.run().ok()), [0; 5]);
}

#[test]
fn with_an_empty_object_there_are_none() {
    let c = Bundle::new()
        .set("/process/capabilities", json!({}))
        .sh(SHOW)
        .container();
    assert_eq!(sets(&c.run().ok()), [0; 5]);
}

#[test]
fn what_is_not_granted_cannot_be_done() {
    let c = Bundle::new()
        .sh("chown 5 /tmp; mknod /tmp/x c 1 3; hostname x")
        .container();
    let out = c.run();
    assert_eq!(out.stderr.matches("not permitted").count(), 3, "{out}");
}

#[test]
fn what_is_granted_can_be_done() {
    let c = Bundle::new()
        .capabilities(&["CAP_CHOWN", "CAP_MKNOD", "CAP_SYS_ADMIN"])
        .sh("chown 5 /tmp && mknod /tmp/x c 1 3 && hostname x && hostname")
        .container();
    assert_eq!(c.run().ok().text(), "x");
}

#[test]
fn an_unknown_name_is_no_reason_not_to_start() {
    let c = Bundle::new()
        .capabilities(&["CAP_CHOWN", "CAP_TIME_TRAVEL"])
        .sh(SHOW)
        .container();
    let out = c.run().ok();
    assert_eq!(sets(&out)[2], CHOWN);
    assert!(
        out.stderr.contains("CAP_TIME_TRAVEL"),
        "a warning names it: {out}"
    );
}

#[test]
fn exec_has_the_containers_capabilities() {
    let c = Bundle::new()
        .capabilities(&["CAP_CHOWN", "CAP_KILL"])
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    let two = CHOWN | KILL;
    assert_eq!(sets(&c.exec_sh(SHOW).ok()), [0, two, two, two, 0]);
}

#[test]
fn exec_as_a_user_has_none() {
    let c = Bundle::new()
        .capabilities(&["CAP_CHOWN"])
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    let out = c.exec_with(&["--user", "1000"], &["/bin/sh", "-c", SHOW]).ok();
    assert_eq!(sets(&out), [0, 0, 0, CHOWN, 0]);
}

#[test]
fn exec_can_be_given_more() {
    let c = Bundle::new()
        .capabilities(&["CAP_CHOWN"])
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    let out = c
        .exec_with(&["--cap", "CAP_MKNOD"], &["/bin/sh", "-c", SHOW])
        .ok();
    let [inheritable, permitted, effective, bounding, _] = sets(&out);
    assert_eq!([permitted, effective, bounding], [CHOWN | MKNOD; 3], "{out}");
    // inheritable has to stay empty unless asked for (CVE-2022-29162)
    assert_eq!(inheritable, 0, "{out}");
}

#[test]
fn exec_of_an_unknown_capability_fails_or_warns() {
    let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
    c.up();
    let out = c.exec_with(&["--cap", "CAP_TIME_TRAVEL"], &["/bin/sh", "-c", SHOW]);
    assert!(out.code != 0 || out.stderr.contains("CAP_TIME_TRAVEL"), "{out}");
}

#[test]
fn exec_of_a_process_document_has_its_sets() {
    let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
    c.up();
    let one = json!(["CAP_KILL"]);
    let process = json!({
        "user": {"uid": 1000, "gid": 1000},
        "args": ["/bin/sh", "-c", SHOW],
        "cwd": "/",
        "env": ["PATH=/bin"],
        "capabilities": {"bounding": one, "permitted": one, "effective": one, "inheritable": one, "ambient": one}
    });
    let file = c.dir().join("process.json");
    std::fs::write(&file, process.to_string()).unwrap();
    let out = c
        .runtime()
        .call(&["exec", "--process", &file.display().to_string(), c.id()])
        .ok();
    assert_eq!(sets(&out), [KILL; 5]);
}

#[test]
fn set_uid_programs_do_not_matter_without_new_privileges() {
    let geteuid = if cfg!(target_arch = "aarch64") {
        "175"
    } else {
        "107"
    };
    for (no_new_privileges, uid) in [(true, 1000), (false, 0)] {
        let c = set_uid_probe(&["syscall", geteuid], no_new_privileges);
        assert_eq!(c.run().ok().text(), format!("ret={uid} errno=0"));
    }
}

/// The probe, set-uid root, run by a user.
fn set_uid_probe(args: &[&str], no_new_privileges: bool) -> Container {
    use std::os::unix::fs::PermissionsExt as _;
    let bundle = Bundle::new();
    let tool = bundle.inside("/bin/suid-probe");
    std::fs::copy(coracle_tests::host::probe(), &tool).unwrap();
    std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o4755)).unwrap();
    bundle
        .set("/process/noNewPrivileges", json!(no_new_privileges))
        .set("/process/user", json!({"uid": 1000, "gid": 1000}))
        .capabilities(&["CAP_CHOWN", "CAP_SETUID"])
        .args(&[&["/bin/suid-probe"], args].concat())
        .container()
}

#[test]
fn a_dropped_bounding_set_holds_for_set_uid_programs() {
    // the program is root afterwards, but may not make a device
    let mknodat = if cfg!(target_arch = "aarch64") {
        "33"
    } else {
        "259"
    };
    let c = set_uid_probe(
        &["syscall", mknodat, "-100", "s:/tmp/dev", "0x21b6", "0x103"],
        false,
    );
    assert_eq!(c.run().ok().text(), "ret=-1 errno=1");
}

#[test]
fn a_user_namespace_has_the_sets_too() {
    let c = Bundle::new()
        .userns()
        .capabilities(&["CAP_CHOWN", "CAP_KILL"])
        .sh(SHOW)
        .container();
    let two = CHOWN | KILL;
    assert_eq!(sets(&c.run().ok()), [0, two, two, two, 0]);
}

#[test]
fn the_default_capabilities_are_the_configured_ones() {
    let three = AUDIT_WRITE | KILL | BIND;
    assert_eq!(
        sets(&Bundle::new().sh(SHOW).container().run().ok()),
        [0, three, three, three, 0]
    );
}
