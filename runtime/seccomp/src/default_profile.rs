//! The profile of containers that ask for the runtime's default: a list of what is allowed, as data.
//!
//! Every call of the tables is named here, also those that are refused, so that a new kernel's calls are a decision
//! and not an accident: a test holds that.

use coracle_spec::oci::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompOperator as Op, LinuxSyscall,
};

use crate::arch::Abi;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// Namespaces that only an administrator of the container may make: all of them, since one of them (user) opens the
/// way to the others.
const CLONE_NEW_FLAGS: u64 = 0x7e02_0000;
/// Time namespaces are asked for by `unshare` alone: in `clone` the bit belongs to the exit signal.
const CLONE_NEWTIME: u64 = 0x80;

/// Socket families that everyone may use: UNIX, INET, INET6, NETLINK. The others are rarely used and have a long
/// history of bugs.
const FAMILIES: [u64; 4] = [1, 2, 10, 16];
const AF_UNIX: u64 = 1;
const AF_PACKET: u64 = 17;

/// Execution domains: Linux and 32-bit Linux, each with or without a 2.6 version number, and the query.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

const NET_RAW: u32 = 13;
const SYS_MODULE: u32 = 16;
const SYS_RAWIO: u32 = 17;
const SYS_CHROOT: u32 = 18;
const SYS_PTRACE: u32 = 19;
const SYS_PACCT: u32 = 20;
const SYS_ADMIN: u32 = 21;
const SYS_BOOT: u32 = 22;
const SYS_NICE: u32 = 23;
const SYS_TIME: u32 = 25;
const SYS_TTY_CONFIG: u32 = 26;
const SYSLOG: u32 = 34;
const PERFMON: u32 = 38;
const BPF: u32 = 39;
const DAC_READ_SEARCH: u32 = 2;

/// The profile for a container that holds these capabilities (bit `n` is capability number `n`), on a machine whose
/// own ABI is `native`. x32 is left out: next to nobody runs it, and it doubles what can be attacked.
#[must_use]
pub fn default_profile(capabilities: u64, native: Abi) -> LinuxSeccomp {
    let has = |capability: u32| capabilities & (1 << capability) != 0;
    let mut rules = vec![rule(ALLOWED, Action::ScmpActAllow, None, &[])];
    for value in PERSONALITIES {
        rules.push(allow_if(&["personality"], 0, Op::ScmpCmpEq, value, 0));
    }
    for family in FAMILIES {
        rules.push(allow_if(&["socket"], 0, Op::ScmpCmpEq, family, 0));
    }
    if has(NET_RAW) {
        rules.push(allow_if(&["socket"], 0, Op::ScmpCmpEq, AF_PACKET, 0));
    }
    rules.push(allow_if(&["socketpair"], 0, Op::ScmpCmpEq, AF_UNIX, 0));
    for (needed, names) in WITH_CAPABILITY {
        if needed.iter().any(|capability| has(*capability)) {
            rules.push(rule(names, Action::ScmpActAllow, None, &[]));
        }
    }
    if has(SYS_ADMIN) {
        rules.push(rule(NAMESPACE_CALLS, Action::ScmpActAllow, None, &[]));
    } else {
        rules.push(allow_if(&["clone"], 0, Op::ScmpCmpMaskedEq, CLONE_NEW_FLAGS, 0));
        rules.push(allow_if(
            &["unshare"],
            0,
            Op::ScmpCmpMaskedEq,
            CLONE_NEW_FLAGS | CLONE_NEWTIME,
            0,
        ));
        // Its flags lie in memory, out of a filter's reach; C libraries fall back to clone.
        rules.push(rule(&["clone3"], Action::ScmpActErrno, Some(ENOSYS), &[]));
    }
    // Through it the family of a socket would lie in memory; C libraries have called socket itself since 2016.
    rules.push(rule(&["socketcall"], Action::ScmpActErrno, Some(ENOSYS), &[]));

    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(Action::ScmpActErrno)
        .set_default_errno_ret(Some(EPERM))
        .set_architectures(Some(architectures(native)))
        .set_syscalls(Some(rules));
    profile
}

fn architectures(native: Abi) -> Vec<Arch> {
    match native {
        Abi::X86_64 | Abi::X32 => vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86],
        Abi::X86 => vec![Arch::ScmpArchX86],
        Abi::Aarch64 => vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm],
        Abi::Arm => vec![Arch::ScmpArchArm],
        Abi::Riscv64 => vec![Arch::ScmpArchRiscv64],
    }
}

fn allow_if(names: &[&str], index: usize, op: Op, value: u64, value_two: u64) -> LinuxSyscall {
    let mut arg = LinuxSeccompArgBuilder::default().index(index).op(op).value(value);
    if op == Op::ScmpCmpMaskedEq {
        arg = arg.value_two(value_two);
    }
    let arg = arg.build().expect("every field of the builder has a default");
    rule(names, Action::ScmpActAllow, None, &[arg])
}

fn rule(names: &[&str], action: Action, errno: Option<u32>, args: &[LinuxSeccompArg]) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.iter().map(|name| (*name).to_owned()).collect())
        .set_action(action)
        .set_errno_ret(errno);
    if !args.is_empty() {
        rule.set_args(Some(args.to_vec()));
    }
    rule
}

/// Calls allowed to a container that holds one of the capabilities.
const WITH_CAPABILITY: &[(&[u32], &[&str])] = &[
    (&[DAC_READ_SEARCH], &["open_by_handle_at"]),
    (&[SYS_MODULE], &["delete_module", "finit_module", "init_module"]),
    (&[SYS_RAWIO], &["ioperm", "iopl"]),
    (&[SYS_CHROOT, SYS_ADMIN], &["chroot"]),
    (&[SYS_PTRACE], &["kcmp", "pidfd_getfd", "process_madvise"]),
    (&[SYS_PACCT], &["acct"]),
    (&[SYS_BOOT], &["reboot"]),
    (
        &[SYS_NICE],
        &[
            "get_mempolicy",
            "mbind",
            "set_mempolicy",
            "set_mempolicy_home_node",
        ],
    ),
    (
        &[SYS_TIME],
        &["clock_settime", "clock_settime64", "settimeofday", "stime"],
    ),
    (&[SYS_TTY_CONFIG], &["vhangup"]),
    (&[SYSLOG, SYS_ADMIN], &["syslog"]),
    (&[PERFMON, SYS_ADMIN], &["perf_event_open"]),
    (&[BPF, SYS_ADMIN], &["bpf"]),
    (
        &[SYS_ADMIN],
        &[
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "open_tree_attr",
            "pivot_root",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "umount",
            "umount2",
        ],
    ),
];

/// Calls that can make namespaces; without SYS_ADMIN allowed with conditions.
const NAMESPACE_CALLS: &[&str] = &["clone", "clone3", "unshare"];

/// Calls allowed whatever their arguments are.
#[rustfmt::skip]
const ALLOWED: &[&str] = &[
    "_llseek", "_newselect", "accept", "accept4", "access", "adjtimex", "alarm", "arch_prctl",
    "arm_fadvise64_64", "arm_sync_file_range", "bind", "breakpoint", "brk", "cacheflush", "cachestat",
    "capget", "capset", "chdir", "chmod", "chown", "chown32", "clock_adjtime", "clock_adjtime64",
    "clock_getres", "clock_getres_time64", "clock_gettime", "clock_gettime64", "clock_nanosleep",
    "clock_nanosleep_time64", "close", "close_range", "connect", "copy_file_range", "creat", "dup", "dup2",
    "dup3", "epoll_create", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait",
    "eventfd", "eventfd2", "execve", "execveat", "exit", "exit_group", "faccessat", "faccessat2", "fadvise64",
    "fadvise64_64", "fallocate", "fanotify_mark", "fchdir", "fchmod", "fchmodat", "fchmodat2", "fchown",
    "fchown32", "fchownat", "fcntl", "fcntl64", "fdatasync", "fgetxattr", "file_getattr", "file_setattr",
    "flistxattr", "flock", "fork", "fremovexattr", "fsetxattr", "fstat", "fstat64", "fstatat64", "fstatfs",
    "fstatfs64", "fsync", "ftruncate", "ftruncate64", "futex", "futex_requeue", "futex_time64", "futex_wait",
    "futex_waitv", "futex_wake", "futimesat", "get_robust_list", "get_thread_area", "get_tls", "getcpu",
    "getcwd", "getdents", "getdents64", "getegid", "getegid32", "geteuid", "geteuid32", "getgid", "getgid32",
    "getgroups", "getgroups32", "getitimer", "getpeername", "getpgid", "getpgrp", "getpid", "getppid",
    "getpriority", "getrandom", "getresgid", "getresgid32", "getresuid", "getresuid32", "getrlimit",
    "getrusage", "getsid", "getsockname", "getsockopt", "gettid", "gettimeofday", "getuid", "getuid32",
    "getxattr", "getxattrat", "inotify_add_watch", "inotify_init", "inotify_init1", "inotify_rm_watch",
    "io_cancel", "io_destroy", "io_getevents", "io_pgetevents", "io_pgetevents_time64", "io_setup",
    "io_submit", "ioctl", "ioprio_get", "ioprio_set", "ipc", "kill", "landlock_add_rule",
    "landlock_create_ruleset", "landlock_restrict_self", "lchown", "lchown32", "lgetxattr", "link", "linkat",
    "listen", "listmount", "listxattr", "listxattrat", "llistxattr", "lremovexattr", "lseek", "lsetxattr",
    "lsm_get_self_attr", "lsm_list_modules", "lsm_set_self_attr", "lstat", "lstat64", "madvise",
    "map_shadow_stack", "membarrier", "memfd_create", "memfd_secret", "mincore", "mkdir", "mkdirat", "mknod",
    "mknodat", "mlock", "mlock2", "mlockall", "mmap", "mmap2", "modify_ldt", "mprotect", "mq_getsetattr",
    "mq_notify", "mq_open", "mq_timedreceive", "mq_timedreceive_time64", "mq_timedsend",
    "mq_timedsend_time64", "mq_unlink", "mremap", "mseal", "msgctl", "msgget", "msgrcv", "msgsnd", "msync",
    "munlock", "munlockall", "munmap", "name_to_handle_at", "nanosleep", "newfstatat", "nice", "open",
    "openat", "openat2", "pause", "pidfd_open", "pidfd_send_signal", "pipe", "pipe2", "pkey_alloc",
    "pkey_free", "pkey_mprotect", "poll", "ppoll", "ppoll_time64", "prctl", "pread64", "preadv", "preadv2",
    "prlimit64", "process_mrelease", "process_vm_readv", "process_vm_writev", "pselect6", "pselect6_time64",
    "ptrace", "pwrite64", "pwritev", "pwritev2", "read", "readahead", "readlink", "readlinkat", "readv",
    "recv", "recvfrom", "recvmmsg", "recvmmsg_time64", "recvmsg", "remap_file_pages", "removexattr",
    "removexattrat", "rename", "renameat", "renameat2", "restart_syscall", "riscv_flush_icache",
    "riscv_hwprobe", "rmdir", "rseq", "rt_sigaction", "rt_sigpending", "rt_sigprocmask", "rt_sigqueueinfo",
    "rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait", "rt_sigtimedwait_time64", "rt_tgsigqueueinfo",
    "sched_get_priority_max", "sched_get_priority_min", "sched_getaffinity", "sched_getattr",
    "sched_getparam", "sched_getscheduler", "sched_rr_get_interval", "sched_rr_get_interval_time64",
    "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler", "sched_yield", "seccomp",
    "select", "semctl", "semget", "semop", "semtimedop", "semtimedop_time64", "send", "sendfile",
    "sendfile64", "sendmmsg", "sendmsg", "sendto", "set_robust_list", "set_thread_area", "set_tid_address",
    "set_tls", "setfsgid", "setfsgid32", "setfsuid", "setfsuid32", "setgid", "setgid32", "setgroups",
    "setgroups32", "setitimer", "setpgid", "setpriority", "setregid", "setregid32", "setresgid",
    "setresgid32", "setresuid", "setresuid32", "setreuid", "setreuid32", "setrlimit", "setsid", "setsockopt",
    "setuid", "setuid32", "setxattr", "setxattrat", "shmat", "shmctl", "shmdt", "shmget", "shutdown",
    "sigaction", "sigaltstack", "signal", "signalfd", "signalfd4", "sigpending", "sigprocmask", "sigreturn",
    "sigsuspend", "splice", "stat", "stat64", "statfs", "statfs64", "statmount", "statx", "symlink",
    "symlinkat", "sync", "sync_file_range", "sync_file_range2", "syncfs", "sysinfo", "tee", "tgkill", "time",
    "timer_create", "timer_delete", "timer_getoverrun", "timer_gettime", "timer_gettime64", "timer_settime",
    "timer_settime64", "timerfd_create", "timerfd_gettime", "timerfd_gettime64", "timerfd_settime",
    "timerfd_settime64", "times", "tkill", "truncate", "truncate64", "ugetrlimit", "umask", "uname", "unlink",
    "unlinkat", "uprobe", "uretprobe", "utime", "utimensat", "utimensat_time64", "utimes", "vfork",
    "vmsplice", "wait4", "waitid", "waitpid", "write", "writev",
];

/// Calls that nobody gets: retired ones, and those that reach the whole machine, kernel memory, other users' keys, or
/// parts of the kernel with a bad record (io_uring, userfaultfd).
#[cfg(test)]
#[rustfmt::skip]
const REFUSED: &[&str] = &[
    "_sysctl", "add_key", "afs_syscall", "bdflush", "break", "create_module", "epoll_ctl_old",
    "epoll_wait_old", "ftime", "get_kernel_syms", "getpmsg", "gtty", "idle", "io_uring_enter",
    "io_uring_register", "io_uring_setup", "kexec_file_load", "kexec_load", "keyctl", "lock",
    "lookup_dcookie", "migrate_pages", "move_pages", "mpx", "nfsservctl", "oldfstat", "oldlstat",
    "oldolduname", "oldstat", "olduname", "pciconfig_iobase", "pciconfig_read", "pciconfig_write", "prof",
    "profil", "putpmsg", "query_module", "readdir", "request_key", "security", "sgetmask", "ssetmask", "stty",
    "swapoff", "swapon", "sysfs", "tuxcall", "ulimit", "uselib", "userfaultfd", "usr26", "usr32", "ustat",
    "vm86", "vm86old", "vserver",
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::arch::{names, syscall_number};
    use crate::eval::{Data, evaluate};
    use crate::{Filter, compile, ret};

    fn filter(capabilities: &[u32]) -> Filter {
        let mask = capabilities
            .iter()
            .fold(0, |mask, capability| mask | 1 << capability);
        compile(&default_profile(mask, Abi::X86_64), Abi::X86_64).unwrap()
    }

    fn answer(filter: &Filter, abi: Abi, name: &str, first_args: [u64; 2]) -> u32 {
        let mut data = Data {
            nr: syscall_number(name, abi).unwrap(),
            arch: abi.audit_arch(),
            ..Data::default()
        };
        data.args[..2].copy_from_slice(&first_args);
        evaluate(&filter.program, &data).unwrap()
    }

    const REFUSED_NOW: u32 = ret::ERRNO | EPERM;
    const MISSING: u32 = ret::ERRNO | ENOSYS;

    #[test]
    fn every_call_of_the_tables_is_decided_once() {
        let mut places: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut put = |names: &[&'static str], place: &'static str| {
            for name in names {
                places.entry(name).or_default().push(place);
            }
        };
        put(ALLOWED, "allowed");
        put(REFUSED, "refused");
        put(NAMESPACE_CALLS, "namespaces");
        put(
            &["personality", "socket", "socketpair", "socketcall"],
            "by argument",
        );
        for (_, names) in WITH_CAPABILITY {
            put(names, "by capability");
        }
        for name in names() {
            assert_eq!(
                places.get(name).map_or(0, Vec::len),
                1,
                "{name}: {:?}",
                places.get(name)
            );
        }
        for name in places.keys() {
            assert!(
                Abi::ALL.iter().any(|abi| syscall_number(name, *abi).is_some()),
                "{name}"
            );
        }
    }

    #[test]
    fn rare_socket_families_are_refused_however_they_are_asked_for() {
        for (capabilities, packet) in [(&[][..], REFUSED_NOW), (&[NET_RAW][..], ret::ALLOW)] {
            let filter = filter(capabilities);
            for abi in [Abi::X86_64, Abi::X86] {
                for family in 0..64 {
                    let expected = match family {
                        1 | 2 | 10 | 16 => ret::ALLOW,
                        17 => packet,
                        _ => REFUSED_NOW,
                    };
                    assert_eq!(
                        answer(&filter, abi, "socket", [family, 1]),
                        expected,
                        "{abi:?} {family}"
                    );
                }
                // The kernel looks at the low half alone, so AF_ALG must not pass with a bit above it.
                assert_eq!(answer(&filter, abi, "socket", [1 << 32 | 38, 1]), REFUSED_NOW);
            }
            for which in 0..=20 {
                assert_eq!(answer(&filter, Abi::X86, "socketcall", [which, 0]), MISSING);
            }
        }
    }

    #[test]
    fn new_namespaces_need_sys_admin() {
        let plain = filter(&[]);
        let admin = filter(&[SYS_ADMIN]);
        let sigchld = 17;
        for flag in [
            0x2_0000,
            0x200_0000,
            0x400_0000,
            0x800_0000,
            0x1000_0000,
            0x2000_0000,
            0x4000_0000,
        ] {
            assert_eq!(
                answer(&plain, Abi::X86_64, "clone", [flag | sigchld, 0]),
                REFUSED_NOW,
                "{flag:#x}"
            );
            assert_eq!(
                answer(&plain, Abi::X86_64, "unshare", [flag, 0]),
                REFUSED_NOW,
                "{flag:#x}"
            );
            assert_eq!(
                answer(&admin, Abi::X86_64, "clone", [flag | sigchld, 0]),
                ret::ALLOW,
                "{flag:#x}"
            );
            assert_eq!(
                answer(&admin, Abi::X86_64, "unshare", [flag, 0]),
                ret::ALLOW,
                "{flag:#x}"
            );
        }
        assert_eq!(
            answer(&plain, Abi::X86_64, "unshare", [CLONE_NEWTIME, 0]),
            REFUSED_NOW
        );
        // Threads, and the sharing of file tables that some servers undo.
        assert_eq!(answer(&plain, Abi::X86_64, "clone", [0x3d_0f00, 0]), ret::ALLOW);
        assert_eq!(answer(&plain, Abi::X86_64, "unshare", [0x200, 0]), ret::ALLOW);
        assert_eq!(answer(&plain, Abi::X86_64, "clone3", [0, 0]), MISSING);
        assert_eq!(answer(&admin, Abi::X86_64, "clone3", [0, 0]), ret::ALLOW);
    }

    #[test]
    fn dangerous_interfaces_are_off() {
        let filter = filter(&[SYS_ADMIN, NET_RAW, SYS_PTRACE]);
        for name in [
            "io_uring_setup",
            "io_uring_enter",
            "userfaultfd",
            "keyctl",
            "add_key",
            "kexec_load",
        ] {
            assert_eq!(answer(&filter, Abi::X86_64, name, [0, 0]), REFUSED_NOW, "{name}");
        }
        let filter = self::filter(&[]);
        for name in [
            "bpf",
            "perf_event_open",
            "mount",
            "open_by_handle_at",
            "setns",
            "reboot",
            "init_module",
        ] {
            assert_eq!(answer(&filter, Abi::X86_64, name, [0, 0]), REFUSED_NOW, "{name}");
        }
        let x32 = Data {
            nr: 0x4000_0000,
            arch: Abi::X86_64.audit_arch(),
            ..Data::default()
        };
        assert_eq!(evaluate(&filter.program, &x32), Ok(MISSING));
        let newer = Data {
            nr: 470,
            arch: Abi::X86_64.audit_arch(),
            ..Data::default()
        };
        assert_eq!(evaluate(&filter.program, &newer), Ok(MISSING));
    }

    #[test]
    fn execution_domains() {
        let filter = filter(&[]);
        for value in PERSONALITIES {
            assert_eq!(
                answer(&filter, Abi::X86_64, "personality", [value, 0]),
                ret::ALLOW
            );
        }
        // No address randomisation, and readable means executable: both weaken a program that has a hole.
        for value in [0x4_0000, 0x40_0000, 0x6] {
            assert_eq!(
                answer(&filter, Abi::X86_64, "personality", [value, 0]),
                REFUSED_NOW
            );
        }
    }

    #[test]
    fn it_is_small_on_every_machine() {
        for native in [Abi::X86_64, Abi::Aarch64, Abi::Riscv64] {
            let filter = compile(&default_profile(0, native), native).unwrap();
            assert!(filter.program.len() < 400, "{native:?}: {}", filter.program.len());
        }
    }
}
