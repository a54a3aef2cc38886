//! Images and configurations made to hurt the host. A case passes when the host is as it was and the request either
//! works inside the root filesystem or is refused. The tests are numbered by recipe: A is paths and mounts, B processes
//! and identities. That they can fail is known: Debian 12's runc 1.1.5 fails A1, A6 (in races.rs), A9 and A10.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use coracle_tests::adversary::{canary, link, upwards};
use coracle_tests::leaks::Snapshot;
use coracle_tests::{Bundle, Console, Container, Output, json};

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
fn a1_mount_points_that_are_links_to_the_host() {
    for (place, make) in [
        ("/proc", true),
        ("/sys", true),
        ("/dev", true),
        ("/run", false),
        ("/etc", false),
    ] {
        for form in 0..2 {
            let bundle = Bundle::new();
            let canary = canary(&bundle);
            let target = if form == 0 {
                canary.clone()
            } else {
                upwards(&canary)
            };
            link(&bundle, place, &target);
            let bundle = if make {
                bundle
            } else {
                bundle.mount(place, "tmpfs", "tmpfs", &[])
            };
            let c = bundle.sh("true").container();
            let before = Snapshot::take(&canary);
            tolerated(&c);
            before.assert_same();
        }
    }
}

#[test]
fn a1_volumes_over_proc_are_refused() {
    for place in [
        "/proc",
        "/proc/self",
        "/proc/sys",
        "/proc/1",
        "/proc/sysrq-trigger",
    ] {
        let bundle = Bundle::new();
        let volume = bundle.dir().join("volume");
        fs::create_dir(&volume).unwrap();
        let c = bundle.bind(&volume, place, &["bind"]).container();
        c.run().refused(&[place, "proc"]);
        c.assert_gone();
    }
}

#[test]
fn a1_a_tmpfs_over_proc_is_refused() {
    let c = Bundle::new().mount("/proc", "tmpfs", "tmpfs", &[]).container();
    c.run().refused(&["/proc"]);
}

#[test]
fn a2_a_fake_proc_is_not_used_for_labels_and_settings() {
    // the volume has what a runtime would write to
    let bundle = Bundle::new();
    let fake = bundle.dir().join("fake");
    fs::create_dir_all(fake.join("self/attr")).unwrap();
    fs::create_dir_all(fake.join("sys/net/ipv4")).unwrap();
    fs::write(fake.join("self/attr/exec"), "").unwrap();
    fs::write(fake.join("sys/net/ipv4/ip_forward"), "untouched").unwrap();
    let c = bundle
        .set("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}))
        .bind(&fake, "/proc", &["bind"])
        .container();
    let out = c.run();
    assert_eq!(out.code, 1, "{out}");
    assert_eq!(
        fs::read_to_string(fake.join("sys/net/ipv4/ip_forward")).unwrap(),
        "untouched"
    );
}

#[test]
fn a3_proc_and_sys_have_to_be_directories() {
    for place in ["/proc", "/sys"] {
        let bundle = Bundle::new();
        fs::create_dir(bundle.inside("/elsewhere")).unwrap();
        link(&bundle, place, Path::new("/elsewhere"));
        let c = bundle.container();
        c.run().refused(&[
            place,
            "ordinary directory",
            "symlink",
            "not a directory",
            "symbolic link",
        ]);
        c.assert_gone();
    }
}

#[test]
fn a3_proc_that_is_a_file_is_refused() {
    let bundle = Bundle::new();
    fs::remove_dir(bundle.inside("/proc")).unwrap();
    fs::write(bundle.inside("/proc"), "").unwrap();
    bundle.container().run().refused(&["/proc", "not a directory"]);
}

#[test]
fn a4_destinations_below_links_stay_inside() {
    for form in 0..3 {
        let bundle = Bundle::new();
        let canary = canary(&bundle);
        match form {
            0 => link(&bundle, "/a", &canary),
            1 => link(&bundle, "/a", &upwards(&canary)),
            _ => {
                fs::create_dir(bundle.inside("/b")).unwrap();
                link(&bundle, "/b/c", Path::new("../.."));
                link(
                    &bundle,
                    "/a",
                    &Path::new("b/c").join(canary.strip_prefix(bundle.dir()).unwrap()),
                );
            }
        }
        let source = bundle.dir().join("source");
        fs::create_dir(&source).unwrap();
        let c = bundle
            .bind(&source, "/a/new/place", &["bind"])
            .mount("/a/tmpfs", "tmpfs", "tmpfs", &[])
            .sh("touch /a/new/place/made /a/tmpfs/made")
            .container();
        let before = Snapshot::take(&canary);
        tolerated(&c);
        before.assert_same();
    }
}

#[test]
fn a4_destinations_with_dots_stay_inside() {
    let bundle = Bundle::new();
    let canary = canary(&bundle);
    let destination = format!("/../../../../../..{}", canary.display());
    let c = bundle
        .mount(&destination, "tmpfs", "tmpfs", &[])
        .sh(&format!("touch {}/made", canary.display()))
        .container();
    let before = Snapshot::take(&canary);
    tolerated(&c);
    before.assert_same();
}

#[test]
fn a7_a_null_device_of_the_images_making_is_no_mask() {
    // without a mount on /dev the image decides what /dev/null is
    let bundle = Bundle::new().without_dev();
    let canary = canary(&bundle);
    fs::write(bundle.inside("/secret"), "secret").unwrap();
    fs::write(bundle.inside("/bait"), "bait").unwrap();
    for target in [
        canary.join("secret"),
        PathBuf::from("/proc/sys/kernel/core_pattern"),
        PathBuf::from("/bait"),
    ] {
        link(&bundle, "/dev/null", &target);
    }
    let c = bundle
        .push("/linux/maskedPaths", json!("/secret"))
        .sh("cat /secret; echo x > /secret")
        .container();
    let before = Snapshot::take(&canary);
    let out = tolerated(&c);
    assert!(
        !out.stdout.contains("bait") && !out.stdout.contains("host's"),
        "{out}"
    );
    before.assert_same();
}

#[test]
fn a8_a_console_that_is_a_link() {
    for name in ["/dev/console", "/dev/ptmx", "/dev/pts"] {
        let mut bundle = Bundle::new()
            .set("/process/terminal", json!(true))
            .sh("echo up; sleep 600");
        bundle = bundle.without_mounts(&["/dev"]);
        let canary = canary(&bundle);
        fs::create_dir_all(bundle.inside("/dev")).unwrap();
        link(&bundle, name, &canary.join(name.trim_start_matches("/dev/")));
        let c = bundle.container();
        let console = Console::listen(c.dir(), "tty");
        let before = Snapshot::take(&canary);
        let out = c.create_with(&["--console-socket", &console.socket()]);
        if out.code == 0 {
            c.start().ok();
            console.wait_output("up");
        } else {
            assert_eq!(out.code, 1, "{out}");
        }
        before.assert_same();
    }
}

#[test]
fn a9_mounts_over_what_the_runtime_writes_are_refused() {
    for place in [
        "/proc/self/attr",
        "/proc/sys/net",
        "/proc/thread-self/attr",
        "/proc/sys/kernel",
    ] {
        let bundle = Bundle::new();
        let canary = canary(&bundle);
        let c = bundle
            .mount(place, "tmpfs", "tmpfs", &[])
            .set("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}))
            .container();
        let before = Snapshot::take(&canary);
        c.run().refused(&[place, "proc"]);
        before.assert_same();
    }
}

#[test]
fn a10_dev_that_is_a_link_to_the_host() {
    for form in 0..2 {
        for with_mount in [true, false] {
            let mut bundle = Bundle::new();
            if !with_mount {
                bundle = bundle.without_dev();
            }
            let canary = canary(&bundle);
            // the same path exists inside, so that a runtime that looks there first is satisfied
            fs::create_dir_all(bundle.inside(&canary.display().to_string())).unwrap();
            let target = if form == 0 {
                canary.clone()
            } else {
                upwards(&canary)
            };
            link(&bundle, "/dev", &target);
            let c = bundle.args(&["/bin/busybox", "true"]).container();
            let before = Snapshot::take(&canary);
            tolerated(&c);
            before.assert_same();
        }
    }
}

#[test]
fn a11_files_that_a_runtime_might_write_are_links() {
    let bundle = Bundle::new();
    let canary = canary(&bundle);
    for name in [
        "hostname",
        "passwd",
        "group",
        "mtab",
        "resolv.conf",
        "hosts",
        "localtime",
    ] {
        link(&bundle, &format!("/etc/{name}"), &canary.join(name));
    }
    for name in [".containerenv", ".dockerenv", "notify", "secrets"] {
        link(&bundle, &format!("/run/{name}"), &canary.join(name));
    }
    let user = json!({"uid": 1000, "gid": 1000});
    let c = bundle.set("/process/user", user).sh("echo $HOME").container();
    let before = Snapshot::take(&canary);
    assert_eq!(
        tolerated(&c).text(),
        "/",
        "no user data base of the host's was read"
    );
    before.assert_same();
}

#[test]
fn a12_a_working_directory_through_a_link_stays_inside() {
    let bundle = Bundle::new();
    let canary = canary(&bundle);
    link(&bundle, "/work", &canary);
    let c = bundle
        .set("/process/cwd", json!("/work/made/by/attack"))
        .sh("pwd")
        .container();
    let before = Snapshot::take(&canary);
    tolerated(&c);
    before.assert_same();
}

#[test]
fn a12_mount_options_cannot_be_smuggled() {
    for option in [
        "size=1m,exec",
        "mode=755\nsuid",
        "lowerdir=/etc:upperdir=/tmp",
        "size=1m\u{0}",
        ",",
        "=",
        "source=/etc",
    ] {
        let bundle = Bundle::new();
        let c = bundle
            .mount("/mnt", "tmpfs", "tmpfs", &["nosuid", "noexec", option])
            .sh("grep ' /mnt ' /proc/self/mountinfo")
            .container();
        let out = tolerated(&c);
        if out.code == 0 {
            let flags = out.stdout.split(' ').nth(5).unwrap_or_default();
            assert!(
                flags.contains("nosuid") && flags.contains("noexec"),
                "{option:?}: {out}"
            );
        }
    }
}

#[test]
fn the_root_may_not_be_a_trap() {
    let bundle = Bundle::new();
    let canary = canary(&bundle);
    for path in [
        "/",
        "../..",
        "",
        "rootfs/../../..",
        "/nonexistent/root",
        "config.json",
    ] {
        let bundle = Bundle::new().set("/root/path", json!(path));
        let c = bundle.args(&["/nonexistent-program"]).container();
        let before = Snapshot::take(&canary);
        let out = c.run();
        assert_ne!(out.code, 0, "{path:?}: {out}");
        assert!(!out.stderr.contains("panicked"), "{out}");
        before.assert_same();
    }
}

#[test]
fn a_root_that_is_a_link_is_refused_or_followed_once() {
    let bundle = Bundle::new();
    symlink("rootfs", bundle.dir().join("link")).unwrap();
    let c = bundle.set("/root/path", json!("link")).sh("echo in").container();
    let out = c.run();
    assert!(out.code == 1 || out.text() == "in", "{out}");
}

#[test]
fn the_containers_own_settings_do_not_reach_the_host() {
    let everything = [
        "CAP_SYS_ADMIN",
        "CAP_NET_ADMIN",
        "CAP_SYS_BOOT",
        "CAP_SYS_TIME",
        "CAP_MKNOD",
        "CAP_DAC_OVERRIDE",
    ];
    let bundle = Bundle::new();
    let canary = canary(&bundle);
    let script = "echo h > /proc/sysrq-trigger; echo x > /proc/sys/kernel/core_pattern; echo x > /sys/kernel/uevent_helper; \
                  echo 1 > /proc/sys/kernel/sysrq; hostname other; ip link set lo down; true";
    let c = bundle.capabilities(&everything).sh(script).container();
    let before = Snapshot::take(&canary);
    c.run().ok();
    before.assert_same();
}
