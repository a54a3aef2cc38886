//! Names, numbers and processes made to hurt the host: ids, cgroup paths, users, descriptors, the runtime's own program.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use coracle_tests::adversary::{canary, link};
use coracle_tests::leaks::Snapshot;
use coracle_tests::{Bundle, Container, Output, host, json, skip_on};

/// Run to the end; a refusal is fine, a panic or a signal is not.
fn tolerated(c: &Container) -> Output {
    let out = c.run();
    assert!(out.code < 128, "{out}");
    assert!(
        !out.stderr.contains("panicked") && !out.stderr.contains("goroutine "),
        "{out}"
    );
    out
}

#[test]
fn a11_a_user_data_base_that_is_a_trap() {
    // a directory, a fifo, a device, an endless line: HOME may be wrong, nothing may hang or grow
    for kind in ["directory", "fifo", "zero", "long", "nul"] {
        let bundle = Bundle::new();
        let passwd = bundle.inside("/etc/passwd");
        fs::remove_file(&passwd).unwrap();
        match kind {
            "directory" => fs::create_dir(&passwd).unwrap(),
            "fifo" => {
                if skip_on("runc", "(the fifo alone) it waits for a writer for ever") {
                    continue;
                }
                let made = std::process::Command::new(host::busybox())
                    .arg("mkfifo")
                    .arg(&passwd)
                    .status();
                assert!(made.unwrap().success());
            }
            "zero" => symlink("/dev/zero", &passwd).unwrap(),
            "long" => fs::write(
                &passwd,
                format!("root:x:0:0:{}:/long:/bin/sh\n", "x".repeat(3 << 20)),
            )
            .unwrap(),
            _ => fs::write(&passwd, "\0\0\0:x:0:0::/nul:/bin/sh\n\0").unwrap(),
        }
        tolerated(&bundle.sh("echo $HOME").container());
    }
}

#[test]
fn a13_cgroup_paths_cannot_leave_their_place() {
    let long = "/x".repeat(2500);
    let outside = format!("ct-outside-{}", std::process::id());
    for path in [
        format!("../../{outside}"),
        format!("/../../../{outside}"),
        format!("/a/../../../../tmp/{outside}"),
        "/..".to_owned(),
        "/nul\u{0}byte".to_owned(),
        long,
        format!("/{outside}\n"),
    ] {
        let bundle = Bundle::new();
        let marked = path.replace("outside", bundle.id());
        let canary = canary(&bundle);
        let c = bundle
            .set("/linux/cgroupsPath", json!(marked))
            .sh("cat /proc/self/cgroup")
            .container();
        let before = Snapshot::take(&canary);
        tolerated(&c);
        before.assert_same();
        assert!(
            !Path::new("/tmp")
                .join(format!("ct-{}-{}", c.id(), std::process::id()))
                .exists()
        );
    }
}

#[test]
fn a14_hostile_ids_do_nothing() {
    let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
    c.up();
    let dir = c.dir().display().to_string();
    let root = c.runtime().root().to_path_buf();
    let id = c.id().to_owned();
    let up = ["..", "../", "../..", "./", ".", "/", "", " ", "\t", "\n"];
    let around = [
        format!("../{id}"),
        format!("./{id}"),
        format!("{id}/"),
        format!("{id}/.."),
        format!("/{id}"),
        format!("{id}\n"),
        format!("{id} "),
        format!("x/../{id}"),
        format!("{id}/state.json"),
        format!("{}/{id}", root.display()),
    ];
    let mut ids: Vec<String> = up.iter().map(|s| (*s).to_owned()).chain(around).collect();
    ids.extend(
        (1..128_u8)
            .filter(|b| !b.is_ascii_alphanumeric() && !b"_+-.".contains(b))
            .map(|b| format!("{id}{}x", char::from(b))),
    );
    // each command is given each id, on a slow machine each id to one command
    let few = host::rounds(10) < 10;
    let commands = ["state", "start", "delete", "kill", "exec", "create"];
    for (n, bad) in ids.iter().enumerate() {
        for (m, command) in commands.into_iter().enumerate() {
            if few && n % commands.len() != m {
                continue;
            }
            let mut args = vec![command];
            match command {
                "delete" => args.push("--force"),
                "create" => args.extend(["--bundle", &dir]),
                _ => {}
            }
            args.extend(["--", bad]);
            if command == "exec" {
                args.push("true");
            }
            let out = c.runtime().call(&args);
            assert!(out.code != 0 || command == "delete", "{command} {bad:?}: {out}");
            assert!(!out.stderr.contains("panicked"), "{command} {bad:?}: {out}");
        }
    }
    assert_eq!(c.state()["status"], "running");
    assert!(c.dir().join("config.json").exists());
}

#[test]
fn b2_the_runtime_cannot_be_overwritten() {
    let program = host::runtime_path();
    let before = fs::read(&program).unwrap();
    // the container's program is the runtime itself: started again inside, it shows what could be opened
    for entry in ["/proc/self/exe", "/bin/script"] {
        let bundle = Bundle::new().args(&[entry, "overwrite-exe"]);
        fs::write(bundle.inside("/bin/script"), "#!/proc/self/exe overwrite-exe\n").unwrap();
        fs::set_permissions(bundle.inside("/bin/script"), fs::Permissions::from_mode(0o755)).unwrap();
        let c = bundle.container();
        let out = c.run();
        assert!(
            !out.stdout.contains("direct=1") && !out.stdout.contains("again=1"),
            "{out}"
        );
    }
    // and a process inside looks at every program that enters
    let c = Bundle::new()
        .capabilities(&["CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE"])
        .sh("while :; do probe overwrite-exe; done")
        .container();
    c.up();
    c.wait_stdout("pid=1");
    for _ in 0..host::rounds(30) {
        c.exec(&["true"]).ok();
    }
    let seen = c.stdout();
    let foreign =
        |l: &&str| !l.contains("exe=/bin/busybox") && !l.contains("exe=/bin/probe") && l.contains("exe=/");
    let opened: Vec<_> = seen
        .lines()
        .filter(foreign)
        .filter(|l| l.contains("direct=1") || l.contains("again=1"))
        .collect();
    assert!(opened.is_empty(), "{opened:?}");
    assert!(
        fs::read(&program).unwrap() == before,
        "the runtime's program has changed"
    );
}

#[test]
fn b3_a_working_directory_in_a_leaked_descriptor_is_refused() {
    for n in (3..24).chain([100, 400]) {
        let c = Bundle::new()
            .set("/process/cwd", json!(format!("/proc/self/fd/{n}")))
            .sh("pwd; ls")
            .container();
        let out = c.run();
        assert_ne!(out.code, 0, "{n}: {out}");
    }
    let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
    c.up();
    for n in 3..24 {
        let out = c.exec_with(&["--cwd", &format!("/proc/self/fd/{n}")], &["pwd"]);
        assert_ne!(out.code, 0, "{n}: {out}");
    }
}

#[test]
fn b3_a_link_to_a_descriptor_is_no_way_out() {
    for n in 3..12 {
        let bundle = Bundle::new();
        link(&bundle, "/leak", Path::new(&format!("/proc/self/fd/{n}")));
        link(&bundle, "/leak2", Path::new(&format!("/proc/1/fd/{n}/..")));
        let c = bundle
            .set("/process/cwd", json!(if n % 2 == 0 { "/leak" } else { "/leak2" }))
            .sh("ls -d canary")
            .container();
        let out = c.run();
        assert_ne!(out.code, 0, "{n}: {out}");
    }
}

#[test]
fn b5_users_are_numbers_in_range() {
    for user in [
        json!({"uid": -1, "gid": 0}),
        json!({"uid": 4_294_967_296_u64, "gid": 0}),
        json!({"uid": "0", "gid": 0}),
        json!({"uid": 1.5, "gid": 0}),
        json!({"uid": 0, "gid": 4_294_967_296_u64}),
        json!({"uid": 0, "gid": 0, "additionalGids": [4_294_967_296_u64]}),
    ] {
        let c = Bundle::new()
            .set("/process/user", user.clone())
            .sh("id -u")
            .container();
        let out = c.run();
        assert_eq!(out.code, 1, "{user}: {out}");
        c.assert_gone();
    }
}

#[test]
fn b6_exec_is_never_wider_than_asked() {
    let c = Bundle::new()
        .capabilities(&["CAP_CHOWN"])
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    for flags in [
        &[][..],
        &["--user", "1000"],
        &["--no-new-privs"],
        &["--cwd", "/tmp"],
        &["--env", "A=1"],
    ] {
        let out = c
            .exec_with(flags, &["sh", "-c", "grep ^Cap /proc/self/status"])
            .ok();
        for line in out.stdout.lines() {
            let set = u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap();
            assert_eq!(set & !1, 0, "{flags:?}: {out}");
        }
        assert!(out.stdout.contains("CapInh:\t0000000000000000"), "{out}");
        assert!(out.stdout.contains("CapAmb:\t0000000000000000"), "{out}");
    }
}

#[test]
fn b10_environment_entries_without_a_value_do_not_inherit() {
    for entry in ["CORACLE_TEST_MARK", "=x", "", "A"] {
        let env = json!(["PATH=/bin", entry]);
        let c = Bundle::new()
            .set("/process/env", env)
            .args(&["/bin/env"])
            .container();
        let out = tolerated(&c);
        assert!(!out.stdout.contains(c.id()), "{entry:?}: {out}");
    }
}
