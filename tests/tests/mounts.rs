//! Mounts from the configuration: options, order, places, propagation.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::PathBuf;

use coracle_tests::{Bundle, host};

/// A bundle with a directory beside its root filesystem that holds one file.
fn with_source() -> (Bundle, PathBuf) {
    let bundle = Bundle::new();
    let source = bundle.dir().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content\n").unwrap();
    (bundle, source)
}

/// The mountinfo line of a mount point, seen from inside.
const LINE: &str = "grep ' /mnt ' /proc/self/mountinfo";

#[test]
fn a_directory_is_bound() {
    let (bundle, source) = with_source();
    let c = bundle
        .bind(&source, "/mnt", &["bind"])
        .sh("cat /mnt/file; echo new > /mnt/made")
        .container();
    assert_eq!(c.run().ok().text(), "content");
    assert_eq!(fs::read_to_string(source.join("made")).unwrap(), "new\n");
}

#[test]
fn a_file_is_bound_and_its_place_made() {
    let (bundle, source) = with_source();
    let c = bundle
        .bind(&source.join("file"), "/srv/new/place", &["bind"])
        .sh("cat /srv/new/place")
        .container();
    assert_eq!(c.run().ok().text(), "content");
    assert!(c.inside("/srv/new/place").is_file());
    assert_eq!(fs::metadata(c.inside("/srv/new/place")).unwrap().len(), 0);
}

#[test]
fn a_missing_mount_point_is_made() {
    use std::os::unix::fs::PermissionsExt as _;
    let (bundle, source) = with_source();
    let c = bundle.bind(&source, "/srv/a/b", &["bind"]).container();
    c.run().ok();
    assert_eq!(
        fs::metadata(c.inside("/srv/a")).unwrap().permissions().mode() & 0o7777,
        0o755
    );
}

#[test]
fn a_readonly_bind_cannot_be_written() {
    let (bundle, source) = with_source();
    let c = bundle
        .bind(&source, "/mnt", &["bind", "ro"])
        .sh("echo x > /mnt/file")
        .container();
    let out = c.run();
    assert_ne!(out.code, 0);
    assert!(out.stderr.contains("Read-only file system"), "{out}");
    assert_eq!(fs::read_to_string(source.join("file")).unwrap(), "content\n");
}

#[test]
fn bind_flags_are_set() {
    let (bundle, source) = with_source();
    let c = bundle
        .bind(&source, "/mnt", &["bind", "nosuid", "nodev", "noexec", "noatime"])
        .sh(LINE)
        .container();
    let out = c.run().ok();
    for flag in ["nosuid", "nodev", "noexec", "noatime"] {
        assert!(out.stdout.contains(flag), "{flag}: {out}");
    }
    assert!(out.stdout.contains(" rw,"), "{out}");
}

#[test]
fn noexec_is_obeyed() {
    let (bundle, source) = with_source();
    fs::copy(host::busybox(), source.join("tool")).unwrap();
    let c = bundle
        .bind(&source, "/mnt", &["bind", "noexec"])
        .sh("/mnt/tool true")
        .container();
    let out = c.run();
    assert_eq!(out.code, 126, "{out}");
}

#[test]
fn a_plain_bind_has_one_mount_and_rbind_all() {
    // /dev of any machine has mounts below it
    for (option, below) in [("bind", false), ("rbind", true)] {
        let c = Bundle::new()
            .mount("/copy", "bind", "/dev", &[option])
            .sh("grep -c ' /copy/' /proc/self/mountinfo; true")
            .container();
        let out = c.run().ok();
        assert_eq!(out.text() != "0", below, "{option}: {out}");
    }
}

#[test]
fn recursive_readonly_reaches_submounts() {
    // /dev of the host has /dev/pts or /dev/shm below it on any machine
    let c = Bundle::new()
        .mount("/copy", "bind", "/dev", &["rbind", "rro"])
        .sh("grep ' /copy' /proc/self/mountinfo | cut -d' ' -f6")
        .container();
    let out = c.run().ok();
    assert!(out.stdout.lines().count() >= 2, "{out}");
    assert!(
        out.stdout.lines().all(|l| l.split(',').any(|w| w == "ro")),
        "{out}"
    );
    // a plain ro stays with the top
    let c = Bundle::new()
        .mount("/copy", "bind", "/dev", &["rbind", "ro"])
        .sh("grep ' /copy' /proc/self/mountinfo | cut -d' ' -f6")
        .container();
    let out = c.run().ok();
    assert!(out.stdout.starts_with("ro"), "{out}");
    assert!(
        out.stdout.lines().any(|l| l.split(',').any(|w| w == "rw")),
        "{out}"
    );
}

#[test]
fn mounts_are_made_in_order() {
    let (bundle, source) = with_source();
    let c = bundle
        .mount("/mnt", "tmpfs", "tmpfs", &["mode=755"])
        .bind(&source, "/mnt/inner", &["bind"])
        .sh("cat /mnt/inner/file; grep -c ' /mnt' /proc/self/mountinfo")
        .container();
    assert_eq!(c.run().ok().text(), "content\n2");
    // the other way round the later mount hides the earlier one
    let (bundle, source) = with_source();
    let c = bundle
        .bind(&source, "/mnt/inner", &["bind"])
        .mount("/mnt", "tmpfs", "tmpfs", &["mode=755"])
        .sh("ls /mnt")
        .container();
    assert_eq!(c.run().ok().text(), "");
}

#[test]
fn a_later_mount_may_use_an_earlier_one_as_its_place() {
    let (bundle, source) = with_source();
    let (first, second) = (source.join("one"), source.join("two"));
    fs::create_dir_all(first.join("sub")).unwrap();
    fs::create_dir_all(&second).unwrap();
    fs::write(second.join("deep"), "deep").unwrap();
    let c = bundle
        .bind(&first, "/mnt", &["bind"])
        .bind(&second, "/mnt/sub", &["bind"])
        .sh("cat /mnt/sub/deep")
        .container();
    assert_eq!(c.run().ok().text(), "deep");
}

#[test]
fn a_tmpfs_has_its_size_and_mode() {
    let c = Bundle::new()
        .mount("/mnt", "tmpfs", "tmpfs", &["size=1m", "mode=1751", "nodev"])
        .sh("stat -c %a /mnt; dd if=/dev/zero of=/mnt/f bs=1k count=2000; true")
        .container();
    let out = c.run().ok();
    assert_eq!(out.text(), "1751");
    assert!(out.stderr.contains("No space left"), "{out}");
}

#[test]
fn a_tmpfs_takes_the_mode_of_what_it_covers() {
    let bundle = Bundle::new();
    fs::create_dir(bundle.inside("/covered")).unwrap();
    fs::set_permissions(
        bundle.inside("/covered"),
        std::os::unix::fs::PermissionsExt::from_mode(0o710),
    )
    .unwrap();
    let c = bundle
        .mount("/covered", "tmpfs", "tmpfs", &[])
        .sh("stat -c %a /covered")
        .container();
    assert_eq!(c.run().ok().text(), "710");
}

#[test]
fn a_readonly_tmpfs_is_readonly() {
    let c = Bundle::new()
        .mount("/mnt", "tmpfs", "tmpfs", &["ro"])
        .sh("touch /mnt/f")
        .container();
    assert!(c.run().stderr.contains("Read-only file system"));
}

#[test]
fn tmpcopyup_keeps_what_was_there() {
    let bundle = Bundle::new();
    fs::create_dir_all(bundle.inside("/data/sub")).unwrap();
    fs::write(bundle.inside("/data/sub/file"), "kept\n").unwrap();
    let c = bundle
        .mount("/data", "tmpfs", "tmpfs", &["tmpcopyup"])
        .sh("cat /data/sub/file; echo changed > /data/sub/file; stat -f -c %T /data")
        .container();
    assert_eq!(c.run().ok().text(), "kept\ntmpfs");
    assert_eq!(fs::read_to_string(c.inside("/data/sub/file")).unwrap(), "kept\n");
}

#[test]
fn an_unknown_option_goes_to_the_filesystem() {
    let c = Bundle::new()
        .mount("/mnt", "tmpfs", "tmpfs", &["no-such-option=1"])
        .container();
    let out = c.run();
    assert_eq!(out.code, 1, "{out}");
    assert!(
        out.stderr.contains("/mnt") || out.stderr.contains("no-such-option"),
        "{out}"
    );
    c.assert_gone();
}

#[test]
fn a_bind_with_filesystem_options_is_refused() {
    let (bundle, source) = with_source();
    let c = bundle.bind(&source, "/mnt", &["bind", "size=1m"]).container();
    c.run().refused(&["size=1m", "/mnt"]);
}

#[test]
fn an_unknown_filesystem_is_refused() {
    Bundle::new()
        .mount("/mnt", "bilgefs", "x", &[])
        .container()
        .run()
        .refused(&["bilgefs", "/mnt", "no such device"]);
}

#[test]
fn a_missing_source_is_refused() {
    let c = Bundle::new()
        .bind("/nonexistent/source".as_ref(), "/mnt", &["bind"])
        .container();
    c.run().refused(&["/nonexistent/source"]);
    c.assert_gone();
}

#[test]
fn a_directory_over_a_file_is_refused() {
    let (bundle, source) = with_source();
    let c = bundle.bind(&source, "/etc/passwd", &["bind"]).container();
    c.run().refused(&["/etc/passwd", "not a directory"]);
    let (bundle, source) = with_source();
    let c = bundle.bind(&source.join("file"), "/etc", &["bind"]).container();
    c.run().refused(&["/etc", "not a directory", "is a directory"]);
}

#[test]
fn a_relative_source_is_relative_to_the_bundle() {
    let (bundle, _) = with_source();
    let c = bundle
        .mount("/mnt", "bind", "source", &["bind"])
        .sh("cat /mnt/file")
        .container();
    assert_eq!(c.run().ok().text(), "content");
}

#[test]
fn a_relative_destination_is_relative_to_the_root() {
    let (bundle, source) = with_source();
    let c = bundle
        .bind(&source, "mnt", &["bind"])
        .sh("cat /mnt/file")
        .container();
    assert_eq!(c.run().ok().text(), "content");
}

#[test]
fn a_destination_through_a_link_stays_inside() {
    let (bundle, source) = with_source();
    std::os::unix::fs::symlink("/srv/real", bundle.inside("/link")).unwrap();
    fs::create_dir_all(bundle.inside("/srv/real")).unwrap();
    let c = bundle
        .bind(&source, "/link/place", &["bind"])
        .sh("cat /srv/real/place/file")
        .container();
    assert_eq!(c.run().ok().text(), "content");
}

#[test]
fn a_source_that_is_a_link_is_followed() {
    let (bundle, source) = with_source();
    let link = bundle.dir().join("link");
    std::os::unix::fs::symlink(&source, &link).unwrap();
    let c = bundle
        .bind(&link, "/mnt", &["bind"])
        .sh("cat /mnt/file")
        .container();
    assert_eq!(c.run().ok().text(), "content");
}

#[test]
fn a_socket_and_a_fifo_can_be_bound() {
    let (bundle, source) = with_source();
    let _socket = std::os::unix::net::UnixListener::bind(source.join("socket")).unwrap();
    let made = std::process::Command::new(host::busybox())
        .arg("mkfifo")
        .arg(source.join("fifo"))
        .status()
        .unwrap();
    assert!(made.success());
    let c = bundle
        .bind(&source.join("socket"), "/run/socket", &["bind"])
        .bind(&source.join("fifo"), "/run/fifo", &["bind"])
        .sh("test -S /run/socket && test -p /run/fifo")
        .container();
    c.run().ok();
}

#[test]
fn type_bind_is_enough() {
    let (bundle, source) = with_source();
    let c = bundle
        .bind(&source, "/mnt", &["ro"])
        .sh("cat /mnt/file")
        .container();
    let out = c.run();
    // runc takes the option for the decision, the specification the option too; either way nothing else is mounted
    assert!(out.text() == "content" || out.code == 1, "{out}");
}

#[test]
fn propagation_words_are_obeyed() {
    // whether a mount also follows the host's depends on where its source lies; what was asked for does not
    for (word, wanted, unwanted) in [
        ("rprivate", None, ["shared:", "master:"]),
        ("shared", Some("shared:"), ["unbindable", "unbindable"]),
        ("runbindable", Some("unbindable"), ["shared:", "master:"]),
    ] {
        let (bundle, source) = with_source();
        let c = bundle.bind(&source, "/mnt", &["bind", word]).sh(LINE).container();
        let out = c.run().ok();
        let optional = out.stdout.split(" - ").next().unwrap_or_default().to_owned();
        assert!(wanted.is_none_or(|w| optional.contains(w)), "{word}: {out}");
        assert!(!unwanted.iter().any(|w| optional.contains(w)), "{word}: {out}");
    }
}

#[test]
fn a_mount_of_the_host_reaches_a_slave() {
    // the test's own mount namespace stands for the host's: its mounts propagate into the container
    let (bundle, source) = with_source();
    let c = bundle
        .bind(&source, "/mnt", &["rbind", "rslave"])
        .args(&["/bin/sleep", "600"])
        .container();
    let runtime = c.runtime().program().display().to_string();
    let (root, dir, id) = (
        c.runtime().root().display().to_string(),
        c.dir().display().to_string(),
        c.id(),
    );
    let source = source.display();
    let script = format!(
        "mount --bind {source} {source} && mount --make-shared {source} && \
         {runtime} --root {root} run -d -b {dir} {id} </dev/null >/dev/null 2>&1 && \
         mkdir {source}/late && mount -t tmpfs late {source}/late && touch {source}/late/seen && \
         {runtime} --root {root} exec {id} ls /mnt/late; \
         {runtime} --root {root} delete -f {id}"
    );
    let out = std::process::Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", &script])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&out.stdout),
        "seen\n",
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn a_bind_of_a_bind_keeps_the_flags_it_was_given() {
    let (bundle, source) = with_source();
    let c = bundle
        .bind(&source, "/mnt", &["bind", "ro", "nosuid"])
        .bind(&source, "/srv", &["bind", "rw"])
        .sh("grep ' /mnt ' /proc/self/mountinfo; echo y > /srv/file; cat /mnt/file; echo x > /mnt/file; true")
        .container();
    let out = c.run().ok();
    assert!(
        out.stdout.contains(" ro,nosuid") && out.stdout.ends_with("y\n"),
        "{out}"
    );
}

#[test]
fn nosymfollow_is_obeyed() {
    let (bundle, source) = with_source();
    std::os::unix::fs::symlink("file", source.join("link")).unwrap();
    let c = bundle
        .bind(&source, "/mnt", &["bind", "nosymfollow"])
        .sh("cat /mnt/file; cat /mnt/link")
        .container();
    let out = c.run();
    assert_eq!(out.text(), "content");
    assert!(
        out.stderr.contains("Too many levels") || out.stderr.contains("ymbolic link"),
        "{out}"
    );
}

#[test]
fn an_overlay_can_be_mounted() {
    let bundle = Bundle::new();
    let top = bundle.dir().join("layers");
    for dir in ["lower", "upper", "work"] {
        fs::create_dir_all(top.join(dir)).unwrap();
    }
    fs::write(top.join("lower/file"), "lower").unwrap();
    let top = top.display();
    let options = [
        &format!("lowerdir={top}/lower")[..],
        &format!("upperdir={top}/upper"),
        &format!("workdir={top}/work"),
    ];
    let c = bundle
        .mount("/mnt", "overlay", "overlay", &options)
        .sh("cat /mnt/file; echo new > /mnt/file")
        .container();
    assert_eq!(c.run().ok().text(), "lower");
    assert_eq!(
        fs::read_to_string(c.dir().join("layers/upper/file")).unwrap(),
        "new\n"
    );
}
