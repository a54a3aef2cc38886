//! Device nodes: the default ones, the configured ones, and what is no device.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;

use coracle_tests::{Bundle, json};

fn stat_all(paths: &str) -> String {
    format!("cd /dev; stat -c '%n %t:%T %a %u %F' {paths}")
}

#[test]
fn the_default_devices_are_there() {
    let out = Bundle::new()
        .sh(&stat_all("null zero full random urandom tty"))
        .container()
        .run()
        .ok();
    let expected = [
        "null 1:3",
        "zero 1:5",
        "full 1:7",
        "random 1:8",
        "urandom 1:9",
        "tty 5:0",
    ];
    for (line, start) in out.stdout.lines().zip(expected) {
        assert_eq!(line, format!("{start} 666 0 character special file"));
    }
    assert_eq!(out.stdout.lines().count(), 6);
}

#[test]
fn the_default_links_are_there() {
    let out = Bundle::new()
        .sh("cd /dev; for l in fd stdin stdout stderr ptmx; do readlink $l; done")
        .container()
        .run()
        .ok();
    let lines: Vec<_> = out.stdout.lines().collect();
    assert_eq!(
        lines[..4],
        [
            "/proc/self/fd",
            "/proc/self/fd/0",
            "/proc/self/fd/1",
            "/proc/self/fd/2"
        ]
    );
    assert!(lines[4].trim_start_matches("/dev/") == "pts/ptmx", "{out}");
}

#[test]
fn the_default_devices_work() {
    let script = "echo x > /dev/null; head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; echo ok >> /dev/stdout";
    assert_eq!(Bundle::new().sh(script).container().run().ok().text(), "4\n4\nok");
}

#[test]
fn no_console_without_a_terminal() {
    let out = Bundle::new().sh("ls /dev/console").container().run();
    assert_ne!(out.code, 0, "{out}");
}

#[test]
fn a_configured_device_has_its_numbers_mode_and_owner() {
    let device = json!({"path": "/dev/own", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 10, "gid": 20});
    let c = Bundle::new()
        .push("/linux/devices", device)
        .sh("stat -c '%t:%T %a %u %g' /dev/own")
        .container();
    assert_eq!(c.run().ok().text(), "1:3 640 10 20");
}

#[test]
fn a_device_may_lie_anywhere() {
    let device = json!({"path": "/srv/deep/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666});
    let c = Bundle::new()
        .push("/linux/devices", device)
        .sh("echo x > /srv/deep/null; stat -c %F /srv/deep/null")
        .container();
    assert_eq!(c.run().ok().text(), "character special file");
}

#[test]
fn block_devices_and_fifos_can_be_made() {
    let block = json!({"path": "/dev/blk", "type": "b", "major": 250, "minor": 7, "fileMode": 0o600});
    let fifo = json!({"path": "/dev/pipe", "type": "p", "fileMode": 0o600});
    let unbuffered = json!({"path": "/dev/unb", "type": "u", "major": 1, "minor": 3, "fileMode": 0o600});
    let c = Bundle::new()
        .push("/linux/devices", block)
        .push("/linux/devices", fifo)
        .push("/linux/devices", unbuffered)
        .sh(&stat_all("blk pipe unb"))
        .container();
    let out = c.run().ok();
    let lines: Vec<_> = out.stdout.lines().collect();
    assert_eq!(lines[0], "blk fa:7 600 0 block special file");
    assert!(lines[1].ends_with("600 0 fifo"), "{out}");
    assert_eq!(lines[2], "unb 1:3 600 0 character special file");
}

#[test]
fn file_type_bits_in_the_mode_do_not_matter() {
    // Docker sends st_mode as it is
    let device = json!({"path": "/dev/own", "type": "c", "major": 1, "minor": 3, "fileMode": 0o20_0644});
    let c = Bundle::new()
        .push("/linux/devices", device)
        .sh("stat -c '%a %F' /dev/own")
        .container();
    assert_eq!(c.run().ok().text(), "644 character special file");
}

#[test]
fn a_configured_device_replaces_a_default_one() {
    let device = json!({"path": "/dev/full", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600});
    let c = Bundle::new()
        .push("/linux/devices", device)
        .sh("stat -c '%t:%T %a' /dev/full")
        .container();
    assert_eq!(c.run().ok().text(), "1:3 600");
}

#[test]
fn an_unknown_device_type_is_refused() {
    let device = json!({"path": "/dev/own", "type": "q", "major": 1, "minor": 3});
    let c = Bundle::new().push("/linux/devices", device).container();
    let out = c.run();
    assert_eq!(out.code, 1, "{out}");
    c.assert_gone();
}

#[test]
fn devices_in_a_user_namespace_are_the_hosts() {
    let c = Bundle::new()
        .userns()
        .sh("stat -c '%t:%T %F' /dev/null /dev/urandom; echo x > /dev/null; head -c2 /dev/urandom | wc -c")
        .container();
    let out = c.run().ok();
    assert_eq!(
        out.text(),
        "1:3 character special file\n1:9 character special file\n2"
    );
}

#[test]
fn a_bound_dev_is_left_as_it_is() {
    let mut bundle = Bundle::new();
    let dev = bundle.dir().join("dev");
    std::fs::create_dir(&dev).unwrap();
    std::fs::write(dev.join("only"), "").unwrap();
    bundle = bundle.without_dev();
    // masking a file needs /dev/null, which is not there
    let c = bundle
        .bind(&dev, "/dev", &["bind"])
        .set("/linux/maskedPaths", json!([]))
        .args(&["/bin/ls", "/dev"])
        .container();
    let out = c.run();
    assert!(out.text() == "only" || out.code == 1, "{out}");
    assert!(
        !dev.join("null").exists(),
        "nothing is made in a directory of the host's"
    );
}

#[test]
fn the_image_cannot_smuggle_a_device_in() {
    // a regular file where a device is to be made must not be taken for it
    let bundle = Bundle::new().without_dev();
    std::fs::write(bundle.inside("/dev/zero"), "not zeros").unwrap();
    let c = bundle.sh("stat -c %F /dev/zero").container();
    let out = c.run();
    assert!(
        out.code == 1 || out.text() == "character special file" || out.text() == "regular file",
        "{out}"
    );
    assert!(Path::new("/dev/zero").exists());
}

#[test]
fn dev_without_a_mount_gets_the_devices_too() {
    let bundle = Bundle::new().without_dev();
    let c = bundle
        .sh("echo x > /dev/null; stat -c '%t:%T' /dev/null /dev/tty")
        .container();
    assert_eq!(c.run().ok().text(), "1:3\n5:0");
}
