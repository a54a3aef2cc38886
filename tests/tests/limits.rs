//! Resource limits of the process, and sizes at the edge: what is large works, what is too large is refused.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use coracle_tests::{Bundle, host, json, skip_on, skip_unless};

fn limit(kind: &str, soft: u64, hard: u64) -> serde_json::Value {
    json!({"type": kind, "soft": soft, "hard": hard})
}

#[test]
fn rlimits_are_set() {
    let c = Bundle::new()
        .set(
            "/process/rlimits",
            json!([limit("RLIMIT_NOFILE", 512, 1024), limit("RLIMIT_CORE", 0, 4096)]),
        )
        .sh("grep -E 'open files|core file' /proc/self/limits")
        .container();
    let out = c.run().ok();
    let words: Vec<Vec<&str>> = out
        .stdout
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(words[0][4..6], ["0", "4096"], "{out}");
    assert_eq!(words[1][3..5], ["512", "1024"], "{out}");
}

#[test]
fn every_rlimit_has_a_name() {
    let kinds = [
        "AS",
        "CORE",
        "CPU",
        "DATA",
        "FSIZE",
        "LOCKS",
        "MEMLOCK",
        "MSGQUEUE",
        "NICE",
        "NOFILE",
        "NPROC",
        "RSS",
        "RTPRIO",
        "RTTIME",
        "SIGPENDING",
        "STACK",
    ];
    // lowered to what anyone may have; address space and processes have to leave room for the program
    let of = |kind: &str| match kind {
        "NICE" | "RTPRIO" => 0,
        "AS" | "DATA" | "FSIZE" | "RSS" | "CPU" | "RTTIME" => 1 << 33,
        "STACK" => 4 << 20,
        "NPROC" | "SIGPENDING" => 1000,
        _ => 64,
    };
    let list: Vec<_> = kinds
        .iter()
        .map(|k| limit(&format!("RLIMIT_{k}"), of(k), of(k)))
        .collect();
    let out = Bundle::new()
        .set("/process/rlimits", json!(list))
        .sh("cat /proc/self/limits")
        .container()
        .run()
        .ok();
    for (line, value) in [
        ("Max stack size", 4 << 20),
        ("Max processes", 1000),
        ("Max open files", 64),
    ] {
        let found = out
            .stdout
            .lines()
            .find(|l| l.starts_with(line))
            .unwrap_or_default();
        let words: Vec<_> = found[line.len()..].split_whitespace().take(2).collect();
        assert_eq!(words, [value.to_string(), value.to_string()], "{found}");
    }
}

#[test]
fn limits_that_are_not_given_are_the_callers() {
    let own = std::fs::read_to_string("/proc/self/limits").unwrap();
    let out = Bundle::new().sh("cat /proc/self/limits").container().run().ok();
    for name in [
        "Max open files",
        "Max locked memory",
        "Max processes",
        "Max core file size",
    ] {
        let line = |text: &str| text.lines().find(|l| l.starts_with(name)).map(str::to_owned);
        assert_eq!(line(&out.stdout), line(&own));
    }
}

#[test]
fn an_rlimit_given_twice_is_refused() {
    if skip_on(
        "runc",
        "it takes the last one, where the specification demands an error",
    ) {
        return;
    }
    let twice = json!([limit("RLIMIT_NOFILE", 64, 64), limit("RLIMIT_NOFILE", 65, 65)]);
    Bundle::new()
        .set("/process/rlimits", twice)
        .container()
        .run()
        .refused(&["rlimit"]);
}

#[test]
fn an_unknown_rlimit_is_refused() {
    let c = Bundle::new()
        .set("/process/rlimits", json!([limit("RLIMIT_BOGUS", 1, 1)]))
        .container();
    c.run().refused(&["rlimit_bogus", "rlimit"]);
}

#[test]
fn a_soft_limit_above_the_hard_one_is_refused() {
    let c = Bundle::new()
        .set("/process/rlimits", json!([limit("RLIMIT_NOFILE", 100, 50)]))
        .container();
    let out = c.run();
    assert_ne!(out.code, 0, "{out}");
    c.assert_gone();
}

#[test]
fn raising_a_limit_works_where_the_host_allows_it() {
    if skip_unless(
        host::has_capability(24),
        "raising a hard limit needs CAP_SYS_RESOURCE",
    ) {
        return;
    }
    let c = Bundle::new()
        .set(
            "/process/rlimits",
            json!([limit("RLIMIT_NOFILE", 1_000_000, 1_000_000)]),
        )
        .set("/process/user", json!({"uid": 1000, "gid": 1000}))
        .sh("ulimit -n")
        .container();
    assert_eq!(c.run().ok().text(), "1000000");
}

#[test]
fn a_large_environment_arrives() {
    let mut bundle = Bundle::new();
    for n in 0..4000 {
        bundle = bundle.push("/process/env", json!(format!("VARIABLE_{n}={}", "v".repeat(40))));
    }
    let out = bundle.sh("env | grep -c ^VARIABLE_").container().run().ok();
    assert_eq!(out.text(), "4000");
}

#[test]
fn a_field_longer_than_a_netlink_attribute_arrives() {
    // lengths above 16 bits have been read as something else by others (CVE-2021-43784)
    let bundle = Bundle::new().push("/process/env", json!(format!("LONG={}", "x".repeat(70_000))));
    let out = bundle.sh("echo ${#LONG}").container().run().ok();
    assert_eq!(out.text(), "70000");
}

#[test]
fn an_argument_list_that_no_kernel_takes_is_refused() {
    let long = "x".repeat(200_000);
    let c = Bundle::new().args(&["/bin/echo", &long]).container();
    let out = c.run();
    assert_ne!(out.code, 0, "{}", out.stderr);
    assert!(
        out.stderr.to_lowercase().contains("argument list too long"),
        "{}",
        out.stderr
    );
    c.assert_gone();
}

#[test]
fn many_mounts_work() {
    let mut bundle = Bundle::new();
    let source = bundle.dir().join("source");
    std::fs::create_dir(&source).unwrap();
    for n in 0..200 {
        bundle = bundle.bind(&source, &format!("/mnt/{n}"), &["bind", "ro"]);
    }
    let out = bundle
        .sh("grep -c ' /mnt/' /proc/self/mountinfo")
        .container()
        .run()
        .ok();
    assert_eq!(out.text(), "200");
}

#[test]
fn many_masked_and_readonly_paths_work() {
    let mut bundle = Bundle::new();
    for n in 0..200 {
        std::fs::create_dir_all(bundle.inside(&format!("/srv/dir{n}"))).unwrap();
        std::fs::write(bundle.inside(&format!("/srv/file{n}")), "secret").unwrap();
        bundle = bundle.push("/linux/maskedPaths", json!(format!("/srv/dir{n}")));
        bundle = bundle.push("/linux/maskedPaths", json!(format!("/srv/file{n}")));
    }
    let out = bundle
        .sh("cat /srv/file* | wc -c; ls -A /srv/dir* | grep -v -e : -e '^$' | wc -l")
        .container()
        .run()
        .ok();
    assert_eq!(out.text(), "0\n0");
}

#[test]
fn a_deep_bundle_works() {
    // deeper than a unix socket address is long
    let bundle = Bundle::new().sh("exit 9");
    let deep = bundle.dir().join("d".repeat(120)).join("e".repeat(120));
    std::fs::create_dir_all(&deep).unwrap();
    let c = bundle.container();
    std::fs::rename(c.dir().join("rootfs"), deep.join("rootfs")).unwrap();
    std::fs::copy(c.dir().join("config.json"), deep.join("config.json")).unwrap();
    let root = deep.join("state").display().to_string();
    let args = [
        "--root",
        &root,
        "run",
        "--bundle",
        &deep.display().to_string(),
        c.id(),
    ];
    let out = coracle_tests::runner::Running::start(c.runtime().bare(&args), None).wait();
    assert_eq!(out.code, 9, "{out}");
}

#[test]
fn a_long_hostname_is_refused_and_a_short_one_works() {
    let name = "h".repeat(63);
    assert_eq!(
        Bundle::new()
            .set("/hostname", json!(name))
            .sh("hostname")
            .container()
            .run()
            .ok()
            .text(),
        name
    );
    let out = Bundle::new()
        .set("/hostname", json!("h".repeat(100)))
        .container()
        .run();
    assert_ne!(out.code, 0, "{out}");
}

#[test]
fn a_small_memory_limit_starts() {
    if skip_unless(host::has_controller("memory"), "no memory controller")
        || skip_on("runc", "its own init needs more than this")
    {
        return;
    }
    let c = Bundle::new()
        .set("/linux/resources/memory", json!({"limit": 1 << 20}))
        .sh("echo alive")
        .container();
    assert_eq!(c.run().ok().text(), "alive");
}

#[test]
fn a_process_limit_of_a_few_starts() {
    if skip_unless(host::has_controller("pids"), "no pids controller") {
        return;
    }
    // the runtime's own helpers must not be counted against the container for long
    let c = Bundle::new()
        .set("/linux/resources/pids", json!({"limit": 12}))
        .args(&["/bin/echo", "alive"])
        .container();
    assert_eq!(c.run().ok().text(), "alive");
}
