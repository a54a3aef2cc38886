//! Numbers of system calls, for filters of processes that need few of them.

/// The architecture as seccomp reports it (`AUDIT_ARCH_*`) on this machine.
#[cfg(target_arch = "x86_64")]
pub const ARCHITECTURE: u32 = 0xc000_003e;
/// The architecture as seccomp reports it (`AUDIT_ARCH_*`) on this machine.
#[cfg(target_arch = "aarch64")]
pub const ARCHITECTURE: u32 = 0xc000_00b7;

/// Bits of `clone` flags that make namespaces (`CLONE_NEW*`; the time namespace's lies among the exit signal's bits and
/// needs clone3 or unshare).
pub const CLONE_NAMESPACES: u32 = 0x7e02_0000;

macro_rules! numbers {
    ($($(#[$gate:meta])? $name:ident = $number:ident),* $(,)?) => {
        $(
            $(#[$gate])?
            #[doc = concat!("`", stringify!($number), "`")]
            // Numbers are small and never negative.
            pub const $name: u32 = libc::$number as u32;
        )*
    };
}

numbers! {
    READ = SYS_read,
    READV = SYS_readv,
    PREAD64 = SYS_pread64,
    WRITE = SYS_write,
    WRITEV = SYS_writev,
    CLOSE = SYS_close,
    FSTAT = SYS_fstat,
    STATX = SYS_statx,
    LSEEK = SYS_lseek,
    SPLICE = SYS_splice,
    FCNTL = SYS_fcntl,
    DUP = SYS_dup,
    IOCTL = SYS_ioctl,
    OPENAT = SYS_openat,
    OPENAT2 = SYS_openat2,
    GETDENTS64 = SYS_getdents64,
    READLINKAT = SYS_readlinkat,
    MKDIRAT = SYS_mkdirat,
    MKNODAT = SYS_mknodat,
    SYMLINKAT = SYS_symlinkat,
    LINKAT = SYS_linkat,
    UNLINKAT = SYS_unlinkat,
    RENAMEAT = SYS_renameat,
    RENAMEAT2 = SYS_renameat2,
    FCHOWN = SYS_fchown,
    FCHOWNAT = SYS_fchownat,
    FCHMOD = SYS_fchmod,
    UTIMENSAT = SYS_utimensat,
    FSETXATTR = SYS_fsetxattr,
    FTRUNCATE = SYS_ftruncate,
    FALLOCATE = SYS_fallocate,
    NEWFSTATAT = SYS_newfstatat,
    MMAP = SYS_mmap,
    MUNMAP = SYS_munmap,
    MREMAP = SYS_mremap,
    MPROTECT = SYS_mprotect,
    MADVISE = SYS_madvise,
    BRK = SYS_brk,
    FUTEX = SYS_futex,
    RSEQ = SYS_rseq,
    SET_ROBUST_LIST = SYS_set_robust_list,
    SET_TID_ADDRESS = SYS_set_tid_address,
    MEMBARRIER = SYS_membarrier,
    SCHED_YIELD = SYS_sched_yield,
    SCHED_GETAFFINITY = SYS_sched_getaffinity,
    CLONE = SYS_clone,
    CLONE3 = SYS_clone3,
    EXIT = SYS_exit,
    EXIT_GROUP = SYS_exit_group,
    GETPID = SYS_getpid,
    GETTID = SYS_gettid,
    TGKILL = SYS_tgkill,
    PRCTL = SYS_prctl,
    PRLIMIT64 = SYS_prlimit64,
    UNAME = SYS_uname,
    GETRANDOM = SYS_getrandom,
    CLOCK_GETTIME = SYS_clock_gettime,
    CLOCK_NANOSLEEP = SYS_clock_nanosleep,
    NANOSLEEP = SYS_nanosleep,
    RT_SIGACTION = SYS_rt_sigaction,
    RT_SIGPROCMASK = SYS_rt_sigprocmask,
    RT_SIGRETURN = SYS_rt_sigreturn,
    SIGALTSTACK = SYS_sigaltstack,
    RESTART_SYSCALL = SYS_restart_syscall,
    #[cfg(target_arch = "x86_64")]
    POLL = SYS_poll,
    PPOLL = SYS_ppoll,
    EPOLL_CREATE1 = SYS_epoll_create1,
    EPOLL_CTL = SYS_epoll_ctl,
    #[cfg(target_arch = "x86_64")]
    EPOLL_WAIT = SYS_epoll_wait,
    EPOLL_PWAIT = SYS_epoll_pwait,
    EVENTFD2 = SYS_eventfd2,
    TIMERFD_CREATE = SYS_timerfd_create,
    TIMERFD_SETTIME = SYS_timerfd_settime,
    SOCKET = SYS_socket,
    SOCKETPAIR = SYS_socketpair,
    CONNECT = SYS_connect,
    BIND = SYS_bind,
    SENDTO = SYS_sendto,
    RECVFROM = SYS_recvfrom,
    SENDMSG = SYS_sendmsg,
    RECVMSG = SYS_recvmsg,
    SHUTDOWN = SYS_shutdown,
    GETSOCKNAME = SYS_getsockname,
    GETPEERNAME = SYS_getpeername,
    GETSOCKOPT = SYS_getsockopt,
    SETSOCKOPT = SYS_setsockopt,
    FSOPEN = SYS_fsopen,
    FSMOUNT = SYS_fsmount,
    OPEN_TREE = SYS_open_tree,
    MOVE_MOUNT = SYS_move_mount,
    MOUNT_SETATTR = SYS_mount_setattr,
    PIDFD_OPEN = SYS_pidfd_open,
    CLOSE_RANGE = SYS_close_range,
    LANDLOCK_CREATE_RULESET = SYS_landlock_create_ruleset,
    PIVOT_ROOT = SYS_pivot_root,
}
