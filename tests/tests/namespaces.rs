//! Namespaces: new ones, joined ones, the host's; hostname, user mappings, time offsets.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::Path;

use coracle_tests::{Bundle, Container, json, skip_on, skip_unless};

/// The inode name of a namespace of the suite itself, which is the host for the containers.
fn host_ns(kind: &str) -> String {
    fs::read_link(format!("/proc/self/ns/{kind}"))
        .unwrap()
        .display()
        .to_string()
}

fn print_ns(kind: &str) -> String {
    format!("readlink /proc/self/ns/{kind}")
}

fn sleeper() -> Container {
    let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
    c.up();
    c
}

fn ns_path(c: &Container, kind: &str) -> String {
    format!("/proc/{}/ns/{kind}", c.pid())
}

/// The names that the kernel and the configuration use for one namespace.
const KINDS: [(&str, &str); 5] = [
    ("pid", "pid"),
    ("net", "network"),
    ("ipc", "ipc"),
    ("uts", "uts"),
    ("mnt", "mount"),
];

#[test]
fn listed_namespaces_are_new() {
    let script = KINDS.map(|(kernel, _)| print_ns(kernel)).join("; ");
    let out = Bundle::new().sh(&script).container().run().ok();
    for ((kernel, _), line) in KINDS.iter().zip(out.stdout.lines()) {
        assert!(line.starts_with(kernel), "{out}");
        assert_ne!(line, host_ns(kernel));
    }
}

#[test]
fn namespaces_not_listed_are_the_hosts() {
    for (kernel, name) in KINDS.iter().filter(|(_, name)| *name != "mount") {
        let mut bundle = Bundle::new().without_namespace(name).sh(&print_ns(kernel));
        if *name == "uts" {
            bundle = bundle.remove("/hostname");
        }
        if *name == "network" {
            // a sysfs belongs to a network namespace, and the host's may not be mounted anew everywhere
            bundle = bundle
                .remove("/mounts/5/options")
                .set("/mounts/5/options", json!(["ro"]));
        }
        let out = bundle.container().run().ok();
        assert_eq!(out.text(), host_ns(kernel), "{name}");
    }
    for kernel in ["user", "cgroup", "time"] {
        let out = Bundle::new().sh(&print_ns(kernel)).container().run().ok();
        assert_eq!(out.text(), host_ns(kernel), "{kernel}");
    }
}

#[test]
fn a_cgroup_namespace_hides_the_path() {
    let c = Bundle::new()
        .namespace("cgroup")
        .sh("readlink /proc/self/ns/cgroup; cat /proc/self/cgroup")
        .container();
    let out = c.run().ok();
    let mut lines = out.stdout.lines();
    assert_ne!(lines.next().unwrap(), host_ns("cgroup"));
    for line in lines {
        assert!(line.ends_with(":/"), "{line} in {out}");
    }
}

#[test]
fn the_process_is_number_one() {
    let out = Bundle::new().sh("echo $$; ps -o pid,args").container().run().ok();
    assert!(out.stdout.starts_with("1\n"), "{out}");
    assert!(out.stdout.lines().count() <= 4, "others are seen: {out}");
}

#[test]
fn a_network_namespace_has_loopback_up_and_nothing_else() {
    let out = Bundle::new()
        .sh("ip -o link; ip -o addr show lo")
        .container()
        .run()
        .ok();
    let links: Vec<_> = out
        .stdout
        .lines()
        .filter(|l| l.contains("mtu") && !l.contains("NOARP"))
        .collect();
    assert!(links.iter().all(|l| l.contains("lo:")), "{out}");
    assert!(
        out.stdout.contains("LOOPBACK,UP") && out.stdout.contains("127.0.0.1/8"),
        "{out}"
    );
}

#[test]
fn hostname_is_set_inside_alone() {
    let before = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let out = Bundle::new()
        .set("/hostname", json!("lighthouse"))
        .sh("hostname")
        .container()
        .run()
        .ok();
    assert_eq!(out.text(), "lighthouse");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), before);
}

#[test]
fn domainname_is_set_inside_alone() {
    let before = fs::read_to_string("/proc/sys/kernel/domainname").unwrap();
    let c = Bundle::new()
        .set("/domainname", json!("harbour.test"))
        .sh("cat /proc/sys/kernel/domainname")
        .container();
    assert_eq!(c.run().ok().text(), "harbour.test");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/domainname").unwrap(), before);
}

#[test]
fn hostname_without_a_uts_namespace_is_refused() {
    let c = Bundle::new().without_namespace("uts").container();
    c.run().refused(&["hostname", "uts"]);
    let c = Bundle::new()
        .without_namespace("uts")
        .remove("/hostname")
        .set("/domainname", json!("x"))
        .container();
    c.run().refused(&["domainname", "uts"]);
}

#[test]
fn a_namespace_given_twice_is_refused() {
    let c = Bundle::new().namespace("ipc").container();
    c.run().refused(&["duplicate", "twice"]);
    c.assert_gone();
}

#[test]
fn an_unknown_namespace_is_refused() {
    Bundle::new()
        .namespace("galley")
        .container()
        .run()
        .refused(&["galley", "namespace"]);
}

#[test]
fn namespaces_can_be_joined_by_path() {
    let first = sleeper();
    for (kernel, name) in KINDS.iter().filter(|(_, name)| *name != "mount") {
        let path = ns_path(&first, kernel);
        let mut bundle = Bundle::new().join(name, &path).sh(&print_ns(kernel));
        if *name == "uts" {
            bundle = bundle.remove("/hostname");
        }
        let out = bundle.container().run().ok();
        assert_eq!(
            out.text(),
            fs::read_link(&path).unwrap().display().to_string(),
            "{name}"
        );
    }
}

#[test]
fn a_joined_pid_namespace_shows_its_processes() {
    let first = sleeper();
    let c = Bundle::new()
        .join("pid", &ns_path(&first, "pid"))
        .sh("echo me $$; ps -o pid,args")
        .container();
    let out = c.run().ok();
    assert!(!out.stdout.starts_with("me 1\n"), "{out}");
    assert!(out.stdout.contains("/bin/sleep 600"), "{out}");
    assert_eq!(first.state()["status"], "running", "its init was not ours to end");
}

#[test]
fn a_container_in_a_joined_pid_namespace_can_be_killed() {
    let first = sleeper();
    let c = Bundle::new()
        .join("pid", &ns_path(&first, "pid"))
        .args(&["/bin/sleep", "601"])
        .container();
    c.up();
    c.kill("KILL").ok();
    c.wait_status("stopped");
    assert_eq!(first.state()["status"], "running");
}

#[test]
fn a_joined_ipc_namespace_shares_message_queues() {
    let first = sleeper();
    first
        .exec_sh("mkdir -p /dev/mqueue && touch /dev/mqueue/letter")
        .ok();
    let c = Bundle::new()
        .join("ipc", &ns_path(&first, "ipc"))
        .sh("ls /dev/mqueue")
        .container();
    assert_eq!(c.run().ok().text(), "letter");
    let other = Bundle::new().sh("ls /dev/mqueue").container();
    assert_eq!(other.run().ok().text(), "");
}

#[test]
fn a_namespace_path_that_is_missing_is_refused() {
    let c = Bundle::new().join("network", "/nonexistent/netns").container();
    c.run().refused(&["/nonexistent/netns"]);
    c.assert_gone();
}

#[test]
fn a_namespace_path_of_the_wrong_kind_is_refused() {
    let c = Bundle::new().join("network", "/proc/self/ns/ipc").container();
    let out = c.run();
    assert_ne!(out.code, 0, "{out}");
    let c = Bundle::new().join("network", "/etc/passwd").container();
    let out = c.run();
    assert_ne!(out.code, 0, "{out}");
    c.assert_gone();
}

#[test]
fn a_relative_namespace_path_is_refused() {
    let out = Bundle::new()
        .join("network", "proc/self/ns/net")
        .container()
        .run();
    assert_ne!(out.code, 0, "{out}");
}

#[test]
fn a_named_network_namespace_survives_its_container() {
    // a network namespace that is pinned by a file, as CRI servers make them
    let holder = sleeper();
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("net");
    std::os::unix::fs::symlink(ns_path(&holder, "net"), &link).unwrap();
    for _ in 0..2 {
        let c = Bundle::new()
            .join("network", &link.display().to_string())
            .sh(&print_ns("net"))
            .container();
        assert_eq!(
            c.run().ok().text(),
            fs::read_link(ns_path(&holder, "net"))
                .unwrap()
                .display()
                .to_string()
        );
    }
}

#[test]
fn a_user_namespace_maps_ids() {
    let c = Bundle::new()
        .userns()
        .sh("cat /proc/self/uid_map /proc/self/gid_map; id -u; sleep 600")
        .container();
    c.up();
    c.wait_stdout("\n0\n");
    let words: Vec<_> = c.stdout().split_whitespace().map(str::to_owned).collect();
    assert_eq!(words[..6], ["0", "100000", "65536", "0", "100000", "65536"]);
    let status = fs::read_to_string(format!("/proc/{}/status", c.pid())).unwrap();
    assert!(
        status.contains("Uid:\t100000\t100000\t100000\t100000"),
        "{status}"
    );
    assert!(
        status.contains("Gid:\t100000\t100000\t100000\t100000"),
        "{status}"
    );
    // exec enters it too
    assert_eq!(
        c.exec_sh("id -u; cat /proc/self/uid_map | wc -l").ok().text(),
        "0\n1"
    );
}

#[test]
fn a_user_namespace_with_several_ranges_works() {
    let map = json!([
        {"containerID": 0, "hostID": 100_000, "size": 1000},
        {"containerID": 1000, "hostID": 0, "size": 1},
        {"containerID": 1001, "hostID": 200_000, "size": 100}
    ]);
    let c = Bundle::new()
        .userns()
        .set("/linux/uidMappings", map)
        .sh("cat /proc/self/uid_map")
        .container();
    assert_eq!(c.run().ok().stdout.lines().count(), 3);
}

#[test]
fn another_user_of_a_user_namespace_works() {
    let c = Bundle::new()
        .userns()
        .set(
            "/process/user",
            json!({"uid": 1000, "gid": 1000, "additionalGids": [2000]}),
        )
        .sh("id -u; id -g; id -G; sleep 600")
        .container();
    c.up();
    c.wait_stdout("2000");
    assert!(c.stdout().starts_with("1000\n1000\n1000 2000"), "{}", c.stdout());
    let status = fs::read_to_string(format!("/proc/{}/status", c.pid())).unwrap();
    assert!(status.contains("Uid:\t101000\t"), "{status}");
}

#[test]
fn an_unmapped_user_is_refused() {
    let user = json!({"uid": 70_000, "gid": 0});
    let c = Bundle::new().userns().set("/process/user", user).container();
    let out = c.run();
    assert_ne!(out.code, 0, "{out}");
    c.assert_gone();
}

#[test]
fn a_user_namespace_without_mappings_is_refused() {
    let c = Bundle::new().namespace("user").container();
    let out = c.run();
    assert_ne!(out.code, 0, "{out}");
    c.assert_gone();
}

#[test]
fn root_of_a_user_namespace_is_powerless_outside() {
    let everything = [
        "CAP_SYS_ADMIN",
        "CAP_NET_ADMIN",
        "CAP_SYS_CHROOT",
        "CAP_MKNOD",
        "CAP_DAC_OVERRIDE",
    ];
    let c = Bundle::new()
        .userns()
        .capabilities(&everything)
        .sh("mknod /tmp/null c 1 3 && echo made; echo 1 > /proc/sys/kernel/sysrq && echo wrote; hostname x && echo named")
        .container();
    let out = c.run().ok();
    assert_eq!(
        out.text(),
        "named",
        "the host name is its own, the rest is not: {out}"
    );
}

#[test]
fn a_container_of_a_user_namespace_cannot_undo_mount_flags() {
    if skip_on(
        "runc",
        "it sets the flags inside the user namespace, whose root may clear them again",
    ) {
        return;
    }
    let bundle = Bundle::new()
        .userns()
        .namespace("cgroup")
        .capabilities(&["CAP_SYS_ADMIN"]);
    let source = bundle.dir().join("shared");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "as it was").unwrap();
    // nothing but the mount's flags is in the way
    std::os::unix::fs::chown(source.join("file"), Some(100_000), Some(100_000)).unwrap();
    let script = "for f in rw suid dev exec; do mount -o remount,bind,$f none /mnt && echo $f-undone; done; \
                  echo changed > /mnt/file && echo written; exit 0";
    let c = bundle
        .bind(&source, "/mnt", &["rbind", "ro", "nosuid", "nodev", "noexec"])
        .sh(script)
        .container();
    let out = c.run().ok();
    assert_eq!(out.text(), "", "{out}");
    assert_eq!(fs::read_to_string(source.join("file")).unwrap(), "as it was");
}

#[test]
fn a_user_namespace_can_be_joined() {
    let first = Bundle::new().userns().args(&["/bin/sleep", "600"]).container();
    first.up();
    let c = Bundle::new()
        .join("user", &ns_path(&first, "user"))
        .join("network", &ns_path(&first, "net"))
        .sh("readlink /proc/self/ns/user; id -u")
        .container();
    // its root filesystem is not the mapped root's, which reading does not need
    let out = c.run().ok();
    let expected = fs::read_link(ns_path(&first, "user"))
        .unwrap()
        .display()
        .to_string();
    assert_eq!(out.text(), format!("{expected}\n0"));
}

#[test]
fn a_time_namespace_has_its_offsets() {
    if skip_unless(
        Path::new("/proc/self/ns/time").exists(),
        "no time namespaces in this kernel",
    ) {
        return;
    }
    let offsets =
        json!({"boottime": {"secs": 1_000_000, "nanosecs": 0}, "monotonic": {"secs": 5, "nanosecs": 0}});
    let c = Bundle::new()
        .namespace("time")
        .set("/linux/timeOffsets", offsets)
        .sh("readlink /proc/self/ns/time; cut -d. -f1 /proc/uptime")
        .container();
    let out = c.run().ok();
    let mut lines = out.stdout.lines();
    assert_ne!(lines.next().unwrap(), host_ns("time"));
    assert!(
        lines.next().unwrap().parse::<u64>().unwrap() >= 1_000_000,
        "{out}"
    );
}

#[test]
fn time_offsets_without_a_time_namespace_are_refused() {
    let c = Bundle::new()
        .set("/linux/timeOffsets", json!({"boottime": {"secs": 1}}))
        .container();
    c.run().refused(&["time"]);
}

#[test]
fn exec_is_in_all_namespaces_of_the_container() {
    let c = Bundle::new()
        .namespace("cgroup")
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    let kinds = ["pid", "net", "ipc", "uts", "mnt", "cgroup", "user"];
    let script = kinds.map(print_ns).join("; ");
    let out = c.exec_sh(&script).ok();
    for (kind, line) in kinds.iter().zip(out.stdout.lines()) {
        assert_eq!(
            line,
            fs::read_link(ns_path(&c, kind)).unwrap().display().to_string()
        );
    }
}

#[test]
fn the_hosts_mount_table_does_not_grow() {
    let c = sleeper();
    assert_eq!(coracle_tests::leaks::mounts(c.id()), Vec::<String>::new());
}
