//! The root filesystem and what every container finds in it: pivot, propagation, masked and read-only paths, /proc,
//! /sys, /dev, cgroup mounts.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;

use coracle_tests::{Bundle, host, json, skip_unless};

#[test]
fn the_root_is_private_to_the_container_by_default() {
    let c = Bundle::new()
        .capabilities(&["CAP_SYS_ADMIN"])
        .sh("mount -t tmpfs x /mnt && grep -c ' /mnt ' /proc/self/mountinfo")
        .container();
    assert_eq!(c.run().ok().text(), "1");
    assert!(coracle_tests::leaks::mounts(c.id()).is_empty());
}

#[test]
fn rootfs_propagation_is_obeyed() {
    for (word, flag) in [
        ("shared", "shared:"),
        ("private", ""),
        ("unbindable", "unbindable"),
    ] {
        let c = Bundle::new().set("/linux/rootfsPropagation", json!(word)).sh("grep ' / / ' /proc/self/mountinfo || grep -E '^[0-9]+ [0-9]+ [0-9:]+ [^ ]+ / ' /proc/self/mountinfo").container();
        let out = c.run().ok();
        assert!(out.stdout.contains(flag), "{word}: {out}");
        assert!(
            flag == "shared:" || !out.stdout.contains("shared:"),
            "{word}: {out}"
        );
    }
}

#[test]
fn an_unknown_rootfs_propagation_is_refused() {
    let c = Bundle::new()
        .set("/linux/rootfsPropagation", json!("sideways"))
        .container();
    c.run().refused(&["sideways", "propagation"]);
}

#[test]
fn a_readonly_root_is_readonly() {
    let c = Bundle::new()
        .set("/root/readonly", json!(true))
        .sh("touch /file; touch /dev/shm/x && echo shm")
        .container();
    let out = c.run().ok();
    assert_eq!(out.text(), "shm");
    assert!(out.stderr.contains("Read-only file system"), "{out}");
    assert!(!c.inside("/file").exists());
}

#[test]
fn the_hosts_root_is_out_of_reach() {
    let c = Bundle::new()
        .sh("ls -d /../../../../.. && ls /proc/1/root/ | wc -l; ls / | wc -l; cd /..; pwd")
        .container();
    let out = c.run().ok();
    let lines: Vec<_> = out.stdout.lines().collect();
    assert_eq!(lines[1], lines[2], "{out}");
    assert_eq!(lines[3], "/", "{out}");
}

#[test]
fn no_mount_of_the_host_is_left_inside() {
    let c = Bundle::new().sh("cut -d' ' -f5 /proc/self/mountinfo").container();
    let out = c.run().ok();
    for line in out.stdout.lines() {
        let known = ["/", "/dev", "/proc", "/sys"]
            .iter()
            .any(|p| line == *p || line.starts_with(&format!("{p}/")));
        assert!(known, "{line} in {out}");
    }
}

#[test]
fn no_pivot_works_and_hides_the_host() {
    let c = Bundle::new()
        .sh("ls /; cut -d' ' -f5 /proc/self/mountinfo; touch /tmp/made")
        .container();
    let out = c.run_with(&["--no-pivot"], None).ok();
    assert!(!out.stdout.contains(c.id()), "{out}");
    assert!(c.inside("/tmp/made").exists());
}

#[test]
fn masked_files_are_empty_and_masked_directories_too() {
    let bundle = Bundle::new();
    fs::create_dir(bundle.inside("/vault")).unwrap();
    fs::write(bundle.inside("/vault/gold"), "gold").unwrap();
    fs::write(bundle.inside("/secret"), "secret").unwrap();
    let c = bundle
        .push("/linux/maskedPaths", json!("/vault"))
        .push("/linux/maskedPaths", json!("/secret"))
        .sh("cat /secret; ls -A /vault; touch /vault/x; echo x > /secret; cat /secret; mount | grep -c vault")
        .container();
    let out = c.run().ok();
    assert_eq!(out.text(), "1", "{out}");
    assert!(out.stderr.contains("Read-only file system"), "{out}");
    assert_eq!(fs::read_to_string(c.inside("/secret")).unwrap(), "secret");
}

#[test]
fn missing_and_repeated_masked_paths_do_not_matter() {
    let c = Bundle::new()
        .push("/linux/maskedPaths", json!("/nonexistent/path"))
        .push("/linux/maskedPaths", json!("/proc/kcore"))
        .push("/linux/readonlyPaths", json!("/nonexistent/path"))
        .container();
    c.run().ok();
}

#[test]
fn a_masked_link_does_not_reach_outside() {
    let bundle = Bundle::new();
    std::os::unix::fs::symlink("/etc/passwd", bundle.inside("/masked")).unwrap();
    let c = bundle
        .push("/linux/maskedPaths", json!("/masked"))
        .sh("wc -c < /etc/passwd")
        .container();
    let out = c.run();
    assert!(out.code == 0 || out.code == 1, "{out}");
    assert!(fs::metadata("/etc/passwd").unwrap().len() > 0);
}

#[test]
fn readonly_paths_are_readonly() {
    let bundle = Bundle::new();
    fs::create_dir(bundle.inside("/fixed")).unwrap();
    fs::write(bundle.inside("/fixed/file"), "fixed").unwrap();
    let c = bundle
        .push("/linux/readonlyPaths", json!("/fixed"))
        .sh("echo x > /fixed/file; cat /fixed/file; grep ' /proc/sys ' /proc/self/mountinfo | cut -d' ' -f6")
        .container();
    let out = c.run().ok();
    assert!(out.stderr.contains("Read-only file system"), "{out}");
    assert!(
        out.stdout.starts_with("fixedro,") || out.stdout.starts_with("fixed\nro,"),
        "{out}"
    );
    assert!(
        out.stdout.contains("nosuid") || !out.stdout.contains("rw"),
        "{out}"
    );
}

#[test]
fn readonly_and_masked_paths_keep_the_other_flags() {
    let c = Bundle::new()
        .mount(
            "/mnt",
            "tmpfs",
            "tmpfs",
            &["nosuid", "nodev", "noexec", "mode=755"],
        )
        .push("/linux/readonlyPaths", json!("/mnt"))
        .sh("grep ' /mnt ' /proc/self/mountinfo | tail -n1")
        .container();
    let out = c.run().ok();
    for flag in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(out.stdout.split([' ', ',']).any(|w| w == flag), "{flag}: {out}");
    }
}

#[test]
fn proc_shows_the_containers_processes_alone() {
    let c = Bundle::new().sh("ls /proc | grep -c '^[0-9]'").container();
    let count: u32 = c.run().ok().text().parse().unwrap();
    assert!(count < 6, "{count}");
}

#[test]
fn sysfs_is_readonly() {
    let c = Bundle::new()
        .sh("mkdir /sys/fs/x; grep ' /sys ' /proc/self/mountinfo")
        .container();
    let out = c.run().ok();
    assert!(
        out.stdout.contains(" ro,") && out.stdout.contains("sysfs"),
        "{out}"
    );
}

#[test]
fn devpts_is_a_new_instance() {
    let c = Bundle::new()
        .sh("ls /dev/pts; stat -c '%a %g' /dev/pts/ptmx")
        .container();
    assert_eq!(c.run().ok().text(), "ptmx\n666 0");
}

#[test]
fn dev_shm_has_its_size() {
    let c = Bundle::new().sh("df -k /dev/shm | tail -n1").container();
    assert!(c.run().ok().stdout.contains("65536"));
}

#[test]
fn a_cgroup_mount_shows_the_container_its_own() {
    if skip_unless(host::cgroup_v2(), "a cgroup v2 mount") {
        return;
    }
    let c = Bundle::new()
        .namespace("cgroup")
        .mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        )
        .sh("cat /sys/fs/cgroup/cgroup.procs; mkdir /sys/fs/cgroup/x; stat -f -c %t /sys/fs/cgroup")
        .container();
    let out = c.run().ok();
    assert!(out.stdout.contains("63677270"), "{out}");
    assert!(out.stdout.starts_with('1'), "{out}");
    assert!(out.stderr.contains("Read-only file system"), "{out}");
}

#[test]
fn a_cgroup_mount_on_v1_has_the_controllers() {
    if skip_unless(!host::cgroup_v2(), "cgroup v1 hierarchies") {
        return;
    }
    let c = Bundle::new()
        .mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        )
        .sh("ls /sys/fs/cgroup; cat /sys/fs/cgroup/pids/cgroup.procs; mkdir /sys/fs/cgroup/pids/x; true")
        .container();
    let out = c.run().ok();
    for name in ["cpu", "memory", "pids", "devices"] {
        assert!(out.stdout.lines().any(|l| l == name), "{name}: {out}");
    }
    assert!(
        out.stdout.lines().any(|l| l == "1"),
        "its own group, not the host's root: {out}"
    );
    assert!(out.stderr.contains("Read-only file system"), "{out}");
}
