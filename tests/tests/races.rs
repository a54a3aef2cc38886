//! Races with an attacker who shares a volume with the container that is being made: a name and a link are exchanged
//! as fast as the kernel can, while the victim is started again and again.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use coracle_tests::adversary::{Exchange, canary};
use coracle_tests::leaks::Snapshot;
use coracle_tests::{Bundle, Console, Container, host, json, skip_on};

/// How often the victim is started: enough to be caught now and then.
fn rounds() -> u32 {
    host::rounds(60)
}

/// Start the victim again and again; nothing of the host's may change, and nothing of it be seen.
fn under_attack(c: &Container, mut attack: Exchange, canary: &Path) -> u32 {
    let before = Snapshot::take(canary);
    let mut worked = 0;
    for _ in 0..rounds() {
        let out = c.run();
        assert!(out.code < 128, "{out}");
        assert!(!out.stdout.contains("host's"), "the host was seen inside: {out}");
        assert!(!out.stderr.contains("panicked"), "{out}");
        worked += u32::from(out.code == 0);
    }
    assert!(attack.alive(), "nobody raced");
    drop(attack);
    before.assert_same();
    worked
}

#[test]
fn a5_the_mount_point_is_exchanged() {
    let bundle = Bundle::new();
    let canary = canary(&bundle);
    let volume = bundle.inside("/volume");
    fs::create_dir_all(volume.join("place")).unwrap();
    symlink(&canary, volume.join("link")).unwrap();
    let source = bundle.dir().join("source");
    fs::create_dir(&source).unwrap();
    let c = bundle
        .bind(&source, "/volume/place", &["bind"])
        .sh("cat /volume/*/file; true")
        .container();
    let attack = Exchange::start(c.dir(), &volume.join("place"), &volume.join("link"));
    under_attack(&c, attack, &canary);
}

#[test]
fn a5_the_parent_of_the_mount_point_is_exchanged() {
    let bundle = Bundle::new();
    let canary = canary(&bundle);
    let volume = bundle.inside("/volume");
    fs::create_dir_all(volume.join("parent/place")).unwrap();
    fs::create_dir(canary.join("place")).unwrap();
    symlink(&canary, volume.join("link")).unwrap();
    let c = bundle
        .mount("/volume/parent/place", "tmpfs", "tmpfs", &[])
        .sh("cat /volume/*/file /volume/*/place/file; true")
        .container();
    let attack = Exchange::start(c.dir(), &volume.join("parent"), &volume.join("link"));
    under_attack(&c, attack, &canary);
}

#[test]
fn a6_missing_parents_are_made_inside_alone() {
    let bundle = Bundle::new();
    let canary = canary(&bundle);
    let volume = bundle.inside("/volume");
    fs::create_dir_all(volume.join("parent")).unwrap();
    symlink(&canary, volume.join("link")).unwrap();
    let c = bundle
        .mount("/volume/parent/a/b/c", "tmpfs", "tmpfs", &[])
        .set("/process/cwd", json!("/volume/parent/w/x/y"))
        .container();
    let attack = Exchange::start(c.dir(), &volume.join("parent"), &volume.join("link"));
    under_attack(&c, attack, &canary);
}

#[test]
fn a7_the_null_device_is_exchanged_while_masking() {
    let bundle = Bundle::new().without_mounts(&["/dev"]);
    let canary = canary(&bundle);
    fs::write(bundle.inside("/secret"), "secret").unwrap();
    let dev = bundle.inside("/dev");
    symlink(canary.join("file"), dev.join("bait")).unwrap();
    fs::write(dev.join("null"), "").unwrap();
    let c = bundle
        .push("/linux/maskedPaths", json!("/secret"))
        .sh("cat /secret; echo attacked > /secret; true")
        .container();
    let attack = Exchange::start(c.dir(), &dev.join("null"), &dev.join("bait"));
    under_attack(&c, attack, &canary);
}

#[test]
fn a3_proc_is_exchanged() {
    let bundle = Bundle::new();
    let canary = canary(&bundle);
    let (proc, other) = (bundle.inside("/proc"), bundle.inside("/proc2"));
    symlink(&canary, &other).unwrap();
    let c = bundle
        .set("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}))
        .sh("cat /proc/sys/net/ipv4/ip_forward")
        .container();
    let attack = Exchange::start(c.dir(), &proc, &other);
    under_attack(&c, attack, &canary);
}

#[test]
fn a8_the_console_is_exchanged() {
    let mut bundle = Bundle::new().set("/process/terminal", json!(true));
    bundle = bundle.without_mounts(&["/dev"]);
    let canary = canary(&bundle);
    let dev = bundle.inside("/dev");
    fs::write(dev.join("console"), "").unwrap();
    symlink(canary.join("file"), dev.join("bait")).unwrap();
    let c = bundle.sh("echo attacked > /dev/console; true").container();
    let before = Snapshot::take(&canary);
    let mut attack = Exchange::start(c.dir(), &dev.join("console"), &dev.join("bait"));
    for round in 0..rounds() / 3 {
        let console = Console::listen(c.dir(), &format!("tty{round}"));
        let out = c.create_with(&["--console-socket", &console.socket()]);
        if out.code == 0 {
            let _ = c.start();
            c.wait_status("stopped");
        }
        c.call(&["delete", "--force"]).ok();
    }
    assert!(attack.alive(), "nobody raced");
    drop(attack);
    before.assert_same();
}

#[test]
fn a5_the_source_is_exchanged() {
    // as in a subPath: the source lies in a volume that the attacker writes to; what is bound is one of the two
    let bundle = Bundle::new();
    let canary = canary(&bundle);
    let volume = bundle.dir().join("volume");
    fs::create_dir_all(volume.join("one")).unwrap();
    fs::create_dir_all(volume.join("two")).unwrap();
    fs::write(volume.join("one/name"), "one\n").unwrap();
    fs::write(volume.join("two/name"), "two\n").unwrap();
    let c = bundle
        .bind(&volume.join("one"), "/mnt", &["bind", "ro"])
        .sh("cat /mnt/name; echo x > /mnt/name")
        .container();
    let attack = Exchange::start(c.dir(), &volume.join("one"), &volume.join("two"));
    under_attack(&c, attack, &canary);
    // read-only was set on what was bound, whichever it was
    let texts: Vec<_> = ["one", "two"]
        .iter()
        .map(|d| fs::read_to_string(volume.join(d).join("name")).unwrap())
        .collect();
    assert!(
        texts == ["one\n", "two\n"] || texts == ["two\n", "one\n"],
        "{texts:?}"
    );
}

#[test]
fn b1_an_entering_process_cannot_be_got_at() {
    let c = Bundle::new()
        .args(&["/bin/probe", "hunt", "/bin/busybox", "/bin/probe"])
        .container();
    c.up();
    c.wait_stdout("ready");
    for _ in 0..rounds() {
        c.exec(&["/bin/true"]).ok();
    }
    // whoever hunted saw something: the last ones stay long enough
    c.exec(&["/bin/sleep", "0.2"]).ok();
    coracle_tests::wait_for("the hunter to look", || {
        c.stdout().contains("looked=").then_some(())
    });
    let finds: Vec<_> = c
        .stdout()
        .lines()
        .filter(|l| l.starts_with("find:"))
        .map(str::to_owned)
        .collect();
    assert!(finds.is_empty(), "{finds:#?}");
}

#[test]
fn start_and_delete_race_without_a_leak() {
    for _ in 0..rounds() / 6 {
        let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
        c.create().ok();
        std::thread::scope(|scope| {
            scope.spawn(|| drop(c.start()));
            scope.spawn(|| drop(c.call(&["delete", "--force"])));
        });
    }
}

#[test]
fn two_creates_of_one_id_make_one_container() {
    for _ in 0..rounds() / 6 {
        let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
        let worked: i32 = std::thread::scope(|scope| {
            let both = [scope.spawn(|| c.create().code), scope.spawn(|| c.create().code)];
            both.map(|t| i32::from(t.join().unwrap() == 0)).iter().sum()
        });
        assert_eq!(worked, 1);
        assert_eq!(c.state()["status"], "created");
    }
}

#[test]
fn two_starts_run_it_once() {
    if skip_on(
        "runc",
        "the second one may wait for ever on a fifo that nobody opens again",
    ) {
        return;
    }
    for _ in 0..rounds() / 6 {
        let c = Bundle::new().sh("echo ran; sleep 600").container();
        c.create().ok();
        let worked: i32 = std::thread::scope(|scope| {
            let both = [scope.spawn(|| c.start().code), scope.spawn(|| c.start().code)];
            both.map(|t| i32::from(t.join().unwrap() == 0)).iter().sum()
        });
        assert_eq!(worked, 1);
        c.wait_stdout("ran");
        assert_eq!(c.stdout().matches("ran").count(), 1);
    }
}
