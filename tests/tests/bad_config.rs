//! Configurations that are wrong: each is refused with an error that names what is wrong, and nothing is left.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use coracle_tests::{Bundle, Value, host, json, skip_on};

/// The configuration as text is refused by create and by run.
fn refused_text(text: &[u8], names: &[&str]) {
    let c = Bundle::new().container_of(text);
    c.create().refused(names);
    c.run().refused(names);
    c.assert_gone();
}

fn refused(bundle: Bundle, names: &[&str]) {
    let c = bundle.container();
    c.create().refused(names);
    c.assert_gone();
}

#[test]
fn what_is_no_json_is_refused() {
    for text in [
        &b""[..],
        b"{",
        b"[]",
        b"null",
        b"\"text\"",
        b"{\"ociVersion\": }",
        b"\xff\xfe",
        b"{}}",
        b"\0",
    ] {
        refused_text(
            text,
            &[
                "config.json",
                "json",
                "unexpected",
                "invalid",
                "expected",
                "process",
                "eof",
                "unmarshal",
                "cannot be null",
            ],
        );
    }
}

#[test]
fn a_missing_config_is_named() {
    let c = Bundle::new().container();
    std::fs::remove_file(c.dir().join("config.json")).unwrap();
    c.create()
        .refused(&["json specification file config.json not found", "config.json"]);
    c.assert_gone();
}

#[test]
fn a_config_that_is_no_file_is_refused() {
    let c = Bundle::new().container();
    let path = c.dir().join("config.json");
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    c.create().refused(&["config.json", "is a directory"]);
    std::fs::remove_dir(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    c.create().refused(&["config.json", "invalid character"]);
}

#[test]
fn deeply_nested_json_is_refused_without_a_crash() {
    let mut text = String::from("{\"annotations\": ");
    text.push_str(&"[".repeat(200_000));
    let c = Bundle::new().container_of(text.as_bytes());
    let out = c.create();
    assert_eq!(out.code, 1, "{}", out.code);
    assert!(!out.stderr.contains("overflow"), "{out}");
}

#[test]
fn a_large_config_works_and_an_absurd_one_is_refused() {
    let c = Bundle::new()
        .set("/annotations", json!({"large": "x".repeat(1 << 20)}))
        .container();
    c.run().ok();
    if skip_on("runc", "(64 MiB of annotations alone) it takes any size") {
        return;
    }
    let c = Bundle::new()
        .set("/annotations", json!({"large": "x".repeat(64 << 20)}))
        .container();
    c.run().refused(&["config.json", "too large", "larger"]);
}

#[test]
fn wrong_types_are_refused() {
    for (pointer, value) in [
        ("/process", json!("none")),
        ("/process/args", json!("sh")),
        ("/process/env", json!({"A": "1"})),
        ("/process/user", json!(0)),
        ("/process/user/uid", json!("root")),
        ("/process/terminal", json!("yes")),
        ("/process/rlimits", json!({"nofile": 1})),
        ("/process/capabilities", json!(["CAP_CHOWN"])),
        ("/root", json!("rootfs")),
        ("/root/readonly", json!("no")),
        ("/mounts", json!({"destination": "/mnt"})),
        ("/mounts/0/options", json!("ro")),
        ("/hooks", json!([])),
        ("/annotations", json!(["a"])),
        ("/annotations", json!({"a": 1})),
        ("/linux", json!([])),
        ("/linux/namespaces", json!("pid")),
        ("/linux/resources", json!([])),
        ("/linux/resources/memory", json!({"limit": "1G"})),
        ("/linux/resources/pids", json!({"limit": 1.5})),
        ("/linux/devices", json!({"path": "/dev/x"})),
        ("/linux/maskedPaths", json!("/proc")),
        ("/linux/sysctl", json!({"net.ipv4.ip_forward": 1})),
        ("/linux/seccomp", json!("default")),
        ("/linux/cgroupsPath", json!(5)),
        ("/hostname", json!(5)),
        ("/ociVersion", json!(1)),
    ] {
        let c = Bundle::new().set(pointer, value.clone()).container();
        let out = c.create();
        assert_eq!(out.code, 1, "{pointer} = {value}: {out}");
        assert!(!out.stderr.contains("panicked"), "{out}");
        c.assert_gone();
    }
}

#[test]
fn missing_parts_are_refused() {
    refused(Bundle::new().remove("/root"), &["root"]);
    refused(Bundle::new().remove("/process"), &["process"]);
    refused(Bundle::new().remove("/process/cwd"), &["cwd"]);
    refused(Bundle::new().remove("/process/args"), &["args"]);
    refused(Bundle::new().remove("/linux"), &["linux", "namespace"]);
}

#[test]
fn fields_the_specification_does_not_know_are_ignored() {
    let c = Bundle::new()
        .set("/x-future", json!({"a": [1, 2, 3]}))
        .set("/process/x-future", json!(true))
        .set("/linux/x-future", json!("yes"))
        .set("/linux/resources/x-future", json!({"limit": 1}))
        .set("/mounts/0/x-future", json!(null))
        .set("/windows", json!({"layerFolders": ["C:"]}))
        .set("/solaris", json!({}))
        .set("/vm", json!({"kernel": {"path": "/vmlinuz"}}))
        .sh("echo ran")
        .container();
    assert_eq!(c.run().ok().text(), "ran");
}

#[test]
fn every_version_one_is_accepted() {
    for version in ["1.0.0", "1.0.2", "1.0.2-dev", "1.1.0", "1.2.1", "1.3.0", "1.99.0"] {
        if version == "1.99.0" && skip_on("crun", "(1.99.0 alone) it refuses what it does not know") {
            continue;
        }
        Bundle::new()
            .set("/ociVersion", json!(version))
            .container()
            .run()
            .ok();
    }
}

#[test]
fn bytes_that_no_path_can_hold_are_refused() {
    for (pointer, value) in [
        ("/process/cwd", json!("/tmp\0x")),
        ("/process/args", json!(["/bin/echo", "a\0b"])),
        ("/process/env", json!(["A=\0"])),
        ("/hostname", json!("a\0b")),
        ("/root/path", json!("rootfs\0")),
        ("/mounts/0/destination", json!("/proc\0")),
        ("/linux/maskedPaths", json!(["/proc/kcore\0"])),
        ("/linux/cgroupsPath", json!("/a\0b")),
    ] {
        if skip_on_nul(pointer) {
            continue;
        }
        let c = Bundle::new().set(pointer, value).container();
        let out = c.create();
        assert_eq!(out.code, 1, "{pointer}: {out}");
        assert!(!out.stderr.contains("panicked"), "{pointer}: {out}");
        c.assert_gone();
    }
}

fn skip_on_nul(pointer: &str) -> bool {
    let taken_by_runc = ["/process/args", "/hostname", "/linux/maskedPaths"].contains(&pointer);
    taken_by_runc
        && skip_on(
            "runc",
            &format!("({pointer} alone) it is found at start, or never"),
        )
}

#[test]
fn a_namespace_of_the_mount_kind_is_needed() {
    // without one, the mounts would be made on the host
    let c = Bundle::new().without_namespace("mount").container();
    let out = c.create();
    assert_eq!(out.code, 1, "{out}");
    assert!(coracle_tests::leaks::mounts(c.id()).is_empty());
}

#[test]
fn masked_paths_need_a_mount_namespace() {
    let c = Bundle::new()
        .set("/linux/namespaces", json!([{"type": "pid"}]))
        .set("/mounts", json!([]))
        .container();
    let out = c.create();
    assert_eq!(out.code, 1, "{out}");
    c.assert_gone();
}

#[test]
fn what_is_not_done_yet_is_refused_by_name() {
    if skip_on("runc", "it does these") || skip_on("crun", "it does these") {
        return;
    }
    let bind_idmap = json!({"destination": "/mnt", "type": "bind", "source": "/tmp", "options": ["bind"],
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
        "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}]});
    let cases: [(&str, Value, &[&str]); 7] = [
        ("/linux/intelRdt", json!({"closID": "x"}), &["intelrdt"]),
        (
            "/linux/netDevices",
            json!({"eth7": {"name": "eth0"}}),
            &["netdevices", "eth7"],
        ),
        (
            "/linux/memoryPolicy",
            json!({"mode": "MPOL_BIND", "nodes": "0"}),
            &["memorypolicy"],
        ),
        (
            "/process/apparmorProfile",
            json!("no-such-profile"),
            &["apparmor", "no-such-profile"],
        ),
        ("/process/selinuxLabel", json!("a:b:c:d"), &["selinux"]),
        ("/linux/mountLabel", json!("a:b:c:d"), &["mountlabel", "selinux"]),
        ("/mounts/6", bind_idmap, &["uidmappings", "idmap"]),
    ];
    for (pointer, value, names) in cases {
        let bundle = match pointer {
            "/mounts/6" => Bundle::new().push("/mounts", value),
            _ => Bundle::new().set(pointer, value),
        };
        let c = bundle.container();
        let out = c.create();
        // done or refused; never passed over in silence
        if out.code != 0 {
            out.refused(names);
            c.assert_gone();
        } else {
            eprintln!("{pointer} is taken: give it a test of its own");
        }
    }
}

#[test]
fn mutated_configurations_never_crash_it() {
    let base = Bundle::new().container();
    let text = base.config.to_string();
    let mut seed = 0x1234_5678_9abc_def0_u64;
    let mut next = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % below as u64).unwrap()
    };
    let rounds = host::rounds(200);
    for round in 0..rounds {
        let mut bytes = text.clone().into_bytes();
        for _ in 0..=next(4) {
            let at = next(bytes.len());
            match next(4) {
                0 => bytes[at] = b"{}[]\",:0-9eE\\\0 truefalsn"[next(24)],
                1 => drop(bytes.remove(at)),
                2 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, b"\"{}[],:1"[next(8)]),
            }
        }
        let parsed: Option<Value> = serde_json::from_slice(&bytes).ok();
        // a mutation that still names a place of the host's is not run
        if parsed
            .as_ref()
            .is_some_and(|v| v.pointer("/root/path") != Some(&json!("rootfs")))
        {
            continue;
        }
        let c = Bundle::new().container_of(&bytes);
        let out = c.create();
        assert!(
            out.code == 0 || out.code == 1,
            "round {round}: {out}\n{}",
            String::from_utf8_lossy(&bytes)
        );
        assert!(!out.stderr.contains("panicked"), "round {round}: {out}");
    }
}
