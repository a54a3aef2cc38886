//! Seccomp: actions, operators, 64-bit values, architectures, and what a profile may not say.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use coracle_tests::{Bundle, Container, Output, Value, json, skip_on, skip_unless};

/// System call numbers of this machine's architecture.
#[cfg(target_arch = "x86_64")]
mod nr {
    pub(crate) const LSEEK: &str = "8";
    pub(crate) const GETPPID: &str = "110";
    pub(crate) const PERSONALITY: &str = "135";
    pub(crate) const SETPRIORITY: &str = "141";
}
#[cfg(target_arch = "aarch64")]
mod nr {
    pub(crate) const LSEEK: &str = "62";
    pub(crate) const GETPPID: &str = "173";
    pub(crate) const PERSONALITY: &str = "92";
    pub(crate) const SETPRIORITY: &str = "140";
}

/// A profile that allows all but what the rules say.
fn except(rules: &Value) -> Value {
    json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})
}

/// What the probe reports of a system call under a profile: `ret=… errno=…`.
fn under(profile: Value, call: &[&str]) -> Output {
    let args = [&["/bin/probe", "syscall"], call].concat();
    Bundle::new()
        .args(&args)
        .set("/linux/seccomp", profile)
        .container()
        .run()
}

fn refused(profile: Value) -> (Container, Output) {
    let c = Bundle::new().set("/linux/seccomp", profile).container();
    let out = c.run();
    assert_eq!(out.code, 1, "{out}");
    c.assert_gone();
    (c, out)
}

#[test]
fn errno_is_answered() {
    let rules = json!([{"names": ["getppid"], "action": "SCMP_ACT_ERRNO"}]);
    assert_eq!(
        under(except(&rules), &[nr::GETPPID]).ok().text(),
        "ret=-1 errno=1"
    );
    let rules = json!([{"names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 111}]);
    assert_eq!(
        under(except(&rules), &[nr::GETPPID]).ok().text(),
        "ret=-1 errno=111"
    );
    assert_eq!(
        under(except(&json!([])), &[nr::GETPPID]).ok().text(),
        "ret=0 errno=0"
    );
}

#[test]
fn the_default_errno_is_answered() {
    let mut profile = default_profile();
    profile["defaultErrnoRet"] = json!(99);
    assert_eq!(
        under(profile, &[nr::PERSONALITY, "0xffffffff"]).ok().text(),
        "ret=-1 errno=99"
    );
}

#[test]
fn kill_kills() {
    for action in ["SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL_PROCESS"] {
        let rules = json!([{"names": ["getppid"], "action": action}]);
        let out = under(except(&rules), &[nr::GETPPID]);
        assert_eq!(out.code, 128 + 31, "{action}: {out}");
    }
}

#[test]
fn trap_sends_sigsys() {
    let rules = json!([{"names": ["getppid"], "action": "SCMP_ACT_TRAP"}]);
    // an init without a handler is not ended by an ordinary signal, but by a forced one
    let out = under(except(&rules), &[nr::GETPPID]);
    assert_eq!(out.code, 128 + 31, "{out}");
}

#[test]
fn trace_without_a_tracer_is_enosys() {
    let rules = json!([{"names": ["getppid"], "action": "SCMP_ACT_TRACE", "errnoRet": 7}]);
    assert_eq!(
        under(except(&rules), &[nr::GETPPID]).ok().text(),
        "ret=-1 errno=38"
    );
}

#[test]
fn log_lets_pass() {
    let rules = json!([{"names": ["getppid"], "action": "SCMP_ACT_LOG"}]);
    assert_eq!(under(except(&rules), &[nr::GETPPID]).ok().text(), "ret=0 errno=0");
}

/// The second argument of lseek(-1, OFFSET, 0) is a 64-bit number: EBADF when let through.
fn lseek(op: &str, value: u64, two: Option<u64>, offset: u64) -> String {
    let mut arg = json!({"index": 1, "value": value, "op": op});
    if let Some(two) = two {
        arg["valueTwo"] = json!(two);
    }
    let rules = json!([{"names": ["lseek"], "action": "SCMP_ACT_ERRNO", "errnoRet": 111, "args": [arg]}]);
    let out = under(except(&rules), &[nr::LSEEK, "-1", &offset.to_string(), "0"]).ok();
    out.text().trim_start_matches("ret=-1 errno=").to_owned()
}

const MATCH: &str = "111";
const PASS: &str = "9";

#[test]
fn every_operator_compares() {
    for (op, less, equal, greater) in [
        ("SCMP_CMP_EQ", PASS, MATCH, PASS),
        ("SCMP_CMP_NE", MATCH, PASS, MATCH),
        ("SCMP_CMP_LT", MATCH, PASS, PASS),
        ("SCMP_CMP_LE", MATCH, MATCH, PASS),
        ("SCMP_CMP_GT", PASS, PASS, MATCH),
        ("SCMP_CMP_GE", PASS, MATCH, MATCH),
    ] {
        assert_eq!(lseek(op, 1000, None, 999), less, "{op}");
        assert_eq!(lseek(op, 1000, None, 1000), equal, "{op}");
        assert_eq!(lseek(op, 1000, None, 1001), greater, "{op}");
    }
}

#[test]
fn all_64_bits_are_compared() {
    let big = 0x1_0000_0000_u64;
    for (op, value, offset, expected) in [
        ("SCMP_CMP_EQ", big + 5, big + 5, MATCH),
        ("SCMP_CMP_EQ", big + 5, 5, PASS),
        ("SCMP_CMP_EQ", 5, big + 5, PASS),
        ("SCMP_CMP_NE", big + 5, 5, MATCH),
        ("SCMP_CMP_GT", 0xffff_ffff, big, MATCH),
        ("SCMP_CMP_GT", big + 1, 0xffff_ffff, PASS),
        ("SCMP_CMP_GE", big, big, MATCH),
        ("SCMP_CMP_LT", big, 0xffff_ffff, MATCH),
        ("SCMP_CMP_LT", big, big + 1, PASS),
        ("SCMP_CMP_LE", big, big + 1, PASS),
    ] {
        assert_eq!(
            lseek(op, value, None, offset),
            expected,
            "{op} {value:#x} {offset:#x}"
        );
    }
}

#[test]
fn a_masked_comparison_masks() {
    // `value` is the mask, `valueTwo` what has to be left
    assert_eq!(lseek("SCMP_CMP_MASKED_EQ", 0xff00, Some(0x1200), 0x1234), MATCH);
    assert_eq!(lseek("SCMP_CMP_MASKED_EQ", 0xff00, Some(0x1200), 0x1334), PASS);
    let high = 0xff_0000_0000;
    assert_eq!(
        lseek("SCMP_CMP_MASKED_EQ", high, Some(0x01_0000_0000), 0x01_0000_0077),
        MATCH
    );
    assert_eq!(
        lseek("SCMP_CMP_MASKED_EQ", high, Some(0x01_0000_0000), 0x77),
        PASS
    );
}

#[test]
fn conditions_on_different_arguments_are_all_needed() {
    let rules = json!([{"names": ["lseek"], "action": "SCMP_ACT_ERRNO", "errnoRet": 111, "args": [
        {"index": 1, "value": 5, "op": "SCMP_CMP_EQ"}, {"index": 2, "value": 1, "op": "SCMP_CMP_EQ"}]}]);
    for (offset, whence, expected) in [("5", "1", MATCH), ("5", "0", PASS), ("6", "1", PASS)] {
        let out = under(except(&rules), &[nr::LSEEK, "-1", offset, whence]).ok();
        assert_eq!(
            out.text(),
            format!("ret=-1 errno={expected}"),
            "{offset} {whence}"
        );
    }
}

#[test]
fn conditions_on_the_same_argument_are_alternatives() {
    let rules = json!([{"names": ["lseek"], "action": "SCMP_ACT_ERRNO", "errnoRet": 111, "args": [
        {"index": 1, "value": 5, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 7, "op": "SCMP_CMP_EQ"}]}]);
    for (offset, expected) in [("5", MATCH), ("7", MATCH), ("6", PASS)] {
        let out = under(except(&rules), &[nr::LSEEK, "-1", offset, "0"]).ok();
        assert_eq!(out.text(), format!("ret=-1 errno={expected}"), "{offset}");
    }
}

#[test]
fn two_rules_of_one_call_are_alternatives() {
    let rule = |value, errno| {
        json!({"names": ["lseek"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno,
               "args": [{"index": 1, "value": value, "op": "SCMP_CMP_EQ"}]})
    };
    let rules = json!([rule(5, 111), rule(6, 112)]);
    for (offset, expected) in [("5", "111"), ("6", "112"), ("7", "9")] {
        let out = under(except(&rules), &[nr::LSEEK, "-1", offset, "0"]).ok();
        assert_eq!(out.text(), format!("ret=-1 errno={expected}"), "{offset}");
    }
}

#[test]
fn unknown_names_are_skipped() {
    let rules = json!([
        {"names": ["no_such_syscall", "getppid", "another_one"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5}
    ]);
    assert_eq!(
        under(except(&rules), &[nr::GETPPID]).ok().text(),
        "ret=-1 errno=5"
    );
}

#[test]
fn newer_calls_than_the_profile_knows_do_not_exist() {
    // else the C library takes "not permitted" for an answer where it would have fallen back
    let profile = default_profile();
    assert_eq!(under(profile.clone(), &["9999"]).ok().text(), "ret=-1 errno=38");
    // one that is older than the newest known gets the default
    assert_eq!(
        under(profile, &[nr::PERSONALITY, "0xffffffff"]).ok().text(),
        "ret=-1 errno=1"
    );
}

/// An allow-list in the style of Docker's, large enough for a filter that is a tree.
fn default_profile() -> Value {
    let names = "accept accept4 access alarm arch_prctl bind brk capget capset chdir chmod chown clock_getres \
        clock_gettime clock_nanosleep clone clone3 close close_range connect copy_file_range dup dup2 dup3 epoll_create \
        epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd eventfd2 execve execveat exit exit_group faccessat \
        faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchown fchownat fcntl fdatasync flock fork fstat fstatfs \
        fsync ftruncate futex getcwd getdents getdents64 getegid geteuid getgid getgroups getpeername getpgid getpgrp \
        getpid getppid getpriority getrandom getresgid getresuid getrlimit getsid getsockname getsockopt gettid \
        gettimeofday getuid getxattr ioctl kill lchown link linkat listen lseek lstat madvise memfd_create mkdir mkdirat \
        mmap mprotect mremap msync munmap nanosleep newfstatat open openat openat2 pause pipe pipe2 poll ppoll prctl \
        pread64 preadv prlimit64 pselect6 pwrite64 pwritev read readlink readlinkat readv recvfrom recvmsg rename \
        renameat renameat2 rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn \
        rt_sigsuspend rt_sigtimedwait sched_getaffinity sched_setaffinity sched_yield select sendfile sendmsg sendto \
        set_robust_list set_tid_address setgid setgroups setitimer setpgid setsid setsockopt setuid shutdown sigaltstack \
        socket socketpair splice stat statfs statx symlink symlinkat sysinfo tee tgkill time timer_create times truncate \
        umask uname unlink unlinkat utimensat vfork wait4 waitid write writev";
    let names: Vec<_> = names.split_whitespace().collect();
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}]
    })
}

#[test]
fn a_large_allow_list_works() {
    let script = "ls / > /dev/null; mkdir /tmp/x; cat /etc/passwd | grep -c root; sleep 0.01; echo $$";
    let c = Bundle::new()
        .set("/linux/seccomp", default_profile())
        .sh(script)
        .container();
    assert_eq!(c.run().ok().text(), "1\n1");
}

#[test]
fn exec_is_filtered_too() {
    let rules = json!([{"names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 44}]);
    let c = Bundle::new()
        .set("/linux/seccomp", except(&rules))
        .args(&["/bin/sleep", "600"])
        .container();
    c.up();
    assert_eq!(
        c.exec(&["/bin/probe", "syscall", nr::GETPPID]).ok().text(),
        "ret=-1 errno=44"
    );
    let out = c.exec_sh("grep -E '^Seccomp:' /proc/self/status | cut -f2").ok();
    assert_eq!(out.text(), "2");
}

#[test]
fn a_filter_works_with_and_without_new_privileges() {
    for no_new_privileges in [true, false] {
        let rules = json!([{"names": ["setpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 45}]);
        let c = Bundle::new()
            .set("/linux/seccomp", except(&rules))
            .set("/process/noNewPrivileges", json!(no_new_privileges))
            .set("/process/user", json!({"uid": 1000, "gid": 1000}))
            .args(&["/bin/probe", "syscall", nr::SETPRIORITY, "0", "0", "0"])
            .container();
        assert_eq!(c.run().ok().text(), "ret=-1 errno=45", "{no_new_privileges}");
    }
}

#[test]
fn a_profile_may_forbid_what_the_runtime_itself_does() {
    // with no_new_privs the filter is loaded last: only execve and what follows are under it
    let names = [
        "mount",
        "umount2",
        "pivot_root",
        "setuid",
        "setgid",
        "setresuid",
        "setresgid",
        "setgroups",
        "capset",
        "unshare",
        "setns",
        "chroot",
        "sethostname",
        "keyctl",
        "fchdir",
        "chdir",
    ];
    let rules = json!([{"names": names, "action": "SCMP_ACT_KILL_PROCESS"}]);
    let c = Bundle::new()
        .set("/linux/seccomp", except(&rules))
        .args(&["/bin/echo", "ran"])
        .container();
    assert_eq!(c.run().ok().text(), "ran");
}

#[test]
#[cfg(target_arch = "x86_64")]
fn the_other_entry_point_is_no_way_around() {
    // getppid has number 64 for 32-bit programs
    let plain = Bundle::new().args(&["/bin/probe", "int80", "64"]).container();
    if skip_unless(
        plain.run().text() == "ret=0",
        "no 32-bit system calls in this kernel",
    ) {
        return;
    }
    let profile = |archs: &[&str]| {
        let rules = json!([{"names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 46}]);
        let mut profile = except(&rules);
        profile["architectures"] = json!(archs);
        Bundle::new()
            .args(&["/bin/probe", "int80", "64"])
            .set("/linux/seccomp", profile)
            .container()
    };
    assert_eq!(
        profile(&["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]).run().ok().text(),
        "ret=-46"
    );
    let out = profile(&["SCMP_ARCH_X86_64"]).run();
    assert_ne!(
        out.text(),
        "ret=0",
        "an architecture that is not listed must not pass: {out}"
    );
}

#[test]
fn flags_are_accepted() {
    let rules = json!([{"names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 47}]);
    for flags in [
        json!([]),
        json!(["SECCOMP_FILTER_FLAG_TSYNC"]),
        json!(["SECCOMP_FILTER_FLAG_LOG"]),
        json!(["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]),
        json!([
            "SECCOMP_FILTER_FLAG_TSYNC",
            "SECCOMP_FILTER_FLAG_LOG",
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW"
        ]),
    ] {
        let mut profile = except(&rules);
        profile["flags"] = flags;
        assert_eq!(under(profile, &[nr::GETPPID]).ok().text(), "ret=-1 errno=47");
    }
}

#[test]
fn bad_profiles_are_refused() {
    let rule = |rule: Value| except(&json!([rule]));
    let (_, out) = refused(json!({"defaultAction": "SCMP_ACT_PERHAPS"}));
    assert!(out.stderr.contains("SCMP_ACT_PERHAPS"), "{out}");
    let (_, out) = refused(rule(json!({"names": ["getppid"], "action": "SCMP_ACT_PERHAPS"})));
    assert!(out.stderr.contains("SCMP_ACT_PERHAPS"), "{out}");
    let (_, out) = refused(rule(json!({"names": ["lseek"], "action": "SCMP_ACT_ERRNO",
        "args": [{"index": 1, "value": 1, "op": "SCMP_CMP_ABOUT"}]})));
    assert!(out.stderr.contains("SCMP_CMP_ABOUT"), "{out}");
    let mut profile = except(&json!([]));
    profile["architectures"] = json!(["SCMP_ARCH_VAX"]);
    let (_, out) = refused(profile);
    assert!(out.stderr.contains("SCMP_ARCH_VAX"), "{out}");
    let mut profile = except(&json!([]));
    profile["flags"] = json!(["SECCOMP_FILTER_FLAG_BOGUS"]);
    let (_, out) = refused(profile);
    assert!(out.stderr.contains("SECCOMP_FILTER_FLAG_BOGUS"), "{out}");
}

#[test]
fn an_argument_index_out_of_range_is_refused() {
    refused(except(&json!([{"names": ["lseek"], "action": "SCMP_ACT_ERRNO",
        "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}])));
}

#[test]
fn an_errno_on_an_action_without_one_is_refused() {
    if skip_on("runc", "it takes it, where the specification demands an error") {
        return;
    }
    refused(except(
        &json!([{"names": ["getppid"], "action": "SCMP_ACT_KILL", "errnoRet": 1}]),
    ));
}

#[test]
fn notifying_about_write_is_refused() {
    let rules = json!([{"names": ["write"], "action": "SCMP_ACT_NOTIFY"}]);
    let mut profile = except(&rules);
    profile["listenerPath"] = json!("/nonexistent/listener");
    refused(profile);
    refused(json!({"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/nonexistent/listener"}));
}

#[test]
fn an_empty_name_list_is_refused_or_harmless() {
    let profile = except(&json!([{"names": [], "action": "SCMP_ACT_ERRNO"}]));
    let out = under(profile, &[nr::GETPPID]);
    assert!(out.code == 1 || out.text() == "ret=0 errno=0", "{out}");
}
