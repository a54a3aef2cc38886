//! Confinement of a worker: what it gives up before it looks at the first byte from outside.
//!
//! In this order, each step behind the one it needs:
//!
//! 1. a mount namespace whose root is the one layer, or an empty file system;
//! 2. Landlock on top, where the kernel has version 2 or newer (the first mistake in 1 would still find it);
//! 3. its own user where it owns nothing, and only the capabilities that its work takes;
//! 4. a list of system calls.
//!
//! It acts on the calling thread and on the threads that this one starts from then on.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use coracle_kernel::caps::{self, CapSet, Capability, Sets};
use coracle_kernel::landlock::{self, Network};
use coracle_kernel::mount::{self, Depth, Filesystem};
use coracle_kernel::mount_attr::{self, Attr, Propagation};
use coracle_kernel::namespace::{self, Kinds};
use coracle_kernel::path::{self, OFlags};
use coracle_kernel::rlimit::{self, Resource};
use coracle_kernel::seccomp::{self, FilterFlags, Instruction};
use coracle_kernel::{Errno, Error as KernelError, creds, file, mount_old, pivot, syscall};

/// The most memory that a worker may map: zstd's largest window, the buffers, and what a layer of millions of entries
/// has to be remembered about.
const MAX_MEMORY_BYTES: u64 = 4 << 30;
/// Descriptors: the open directories and a reserve.
const MAX_DESCRIPTORS: u64 = 1024;
/// Whoever parses owns nothing on any system.
const NOBODY: u32 = 65534;

/// What a worker keeps.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Keep<'a> {
    /// One directory and the capabilities to make any file in it; no network.
    Layer(BorrowedFd<'a>),
    /// Nothing but its descriptors.
    Nothing,
    /// The network, as this user.
    Network(u32),
}

/// Confines the calling thread; returns the root directory, which is all that is left of the file system.
pub(crate) fn confine(keep: Keep<'_>) -> Result<OwnedFd, KernelError> {
    creds::set_no_new_privs()?;
    creds::set_dumpable(false)?;
    for (resource, limit) in [
        ("RLIMIT_AS", MAX_MEMORY_BYTES),
        ("RLIMIT_NOFILE", MAX_DESCRIPTORS),
        ("RLIMIT_CORE", 0),
    ] {
        if let Some(resource) = Resource::from_name(resource) {
            let (_, hard) = rlimit::get(0, resource)?;
            rlimit::set(0, resource, limit.min(hard), limit.min(hard))?;
        }
    }
    let root = enter_root(keep)?;
    restrict_paths(&root, keep)?;
    drop_privileges(keep)?;
    load_filter(keep)?;
    Ok(root)
}

/// Landlock, where the kernel has it: a second wall behind the empty mount namespace.
fn restrict_paths(root: &OwnedFd, keep: Keep<'_>) -> Result<(), KernelError> {
    let restricted = match keep {
        Keep::Layer(_) => landlock::restrict_to(root, Network::None),
        Keep::Nothing => landlock::restrict_all(Network::None),
        Keep::Network(_) => landlock::restrict_all(Network::ConnectOnly),
    };
    match restricted {
        // Too old or not built in: the namespace stands alone, and `coracled check` says so.
        Err(error) if matches!(error.errno(), Errno::ENOSYS | Errno::EOPNOTSUPP) => Ok(()),
        other => other,
    }
}

/// The capabilities of whoever unpacks: everything about files, nothing about the system.
fn unpack_capabilities() -> CapSet {
    let names = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_MKNOD",
        "CAP_SETFCAP",
    ];
    names.into_iter().filter_map(Capability::from_name).collect()
}

/// Leaves the host's mounts for a namespace with one file system.
fn enter_root(keep: Keep<'_>) -> Result<OwnedFd, KernelError> {
    let root = match keep {
        // Cloned before the namespace is left: a mount can be cloned only in its own.
        Keep::Layer(layer) => {
            let root = mount::clone_tree(layer, Depth::Single)?;
            mount_attr::add(&root, Attr::NOSUID | Attr::NODEV | Attr::NOEXEC)?;
            root
        }
        Keep::Nothing | Keep::Network(_) => {
            let empty = Filesystem::open("tmpfs")?;
            empty.string("size", "4096")?;
            empty.create()?;
            empty.mount(Attr::RDONLY | Attr::NOSUID | Attr::NODEV | Attr::NOEXEC)?
        }
    };
    namespace::unshare(Kinds::MOUNT)?;
    mount_old::set_propagation(Path::new("/"), Propagation::Slave, true)?;
    let old = path::open("/", OFlags::PATH | OFlags::DIRECTORY)?;
    mount::attach(&root, &old)?;
    match pivot::pivot_root(&root, &old, false) {
        // The host's root is an initramfs, which cannot be exchanged: a chroot that holds no way out is what is left.
        Err(error) if error.errno() == Errno::EINVAL => path::change_root(&root)?,
        other => other?,
    }
    drop(old);
    file::open_dir_beneath(root.as_fd(), std::ffi::OsStr::new("."))
}

fn drop_privileges(keep: Keep<'_>) -> Result<(), KernelError> {
    let capabilities = match keep {
        Keep::Layer(_) => unpack_capabilities(),
        Keep::Nothing | Keep::Network(_) => CapSet::EMPTY,
    };
    let user = match keep {
        Keep::Layer(_) => None,
        Keep::Nothing => Some(NOBODY),
        Keep::Network(uid) => Some(uid),
    };
    caps::limit_bounding(capabilities)?;
    if let Some(user) = user {
        creds::set_groups(&[])?;
        creds::set_gid(user)?;
        creds::set_uid(user)?;
        // Changing the user makes a process dumpable again, and its memory readable to others of that user.
        creds::set_dumpable(false)?;
    }
    caps::clear_ambient()?;
    caps::set(&Sets {
        effective: capabilities,
        permitted: capabilities,
        inheritable: CapSet::EMPTY,
    })
}

/// What memory, threads and open descriptors take.
const BASE: &[u32] = &[
    syscall::READ,
    syscall::READV,
    syscall::WRITE,
    syscall::WRITEV,
    syscall::CLOSE,
    syscall::FSTAT,
    syscall::LSEEK,
    syscall::FCNTL,
    syscall::MMAP,
    syscall::MUNMAP,
    syscall::MREMAP,
    syscall::MPROTECT,
    syscall::MADVISE,
    syscall::BRK,
    syscall::FUTEX,
    syscall::RSEQ,
    syscall::SET_ROBUST_LIST,
    syscall::SET_TID_ADDRESS,
    syscall::MEMBARRIER,
    syscall::SCHED_YIELD,
    syscall::SCHED_GETAFFINITY,
    syscall::EXIT,
    syscall::EXIT_GROUP,
    syscall::GETPID,
    syscall::GETTID,
    syscall::TGKILL,
    syscall::UNAME,
    syscall::GETRANDOM,
    syscall::CLOCK_GETTIME,
    syscall::RT_SIGACTION,
    syscall::RT_SIGPROCMASK,
    syscall::RT_SIGRETURN,
    syscall::SIGALTSTACK,
    syscall::RESTART_SYSCALL,
];

/// What making files takes.
const FILES: &[u32] = &[
    syscall::STATX,
    syscall::OPENAT,
    syscall::OPENAT2,
    syscall::NEWFSTATAT,
    syscall::GETDENTS64,
    syscall::READLINKAT,
    syscall::MKDIRAT,
    syscall::MKNODAT,
    syscall::SYMLINKAT,
    syscall::LINKAT,
    syscall::UNLINKAT,
    syscall::RENAMEAT,
    syscall::RENAMEAT2,
    syscall::FCHOWN,
    syscall::FCHOWNAT,
    syscall::FCHMOD,
    syscall::UTIMENSAT,
    syscall::FSETXATTR,
];

/// What an event loop with connections takes.
const NETWORK: &[u32] = &[
    syscall::PPOLL,
    #[cfg(target_arch = "x86_64")]
    syscall::POLL,
    syscall::EPOLL_CREATE1,
    syscall::EPOLL_CTL,
    #[cfg(target_arch = "x86_64")]
    syscall::EPOLL_WAIT,
    syscall::EPOLL_PWAIT,
    syscall::EVENTFD2,
    syscall::TIMERFD_CREATE,
    syscall::TIMERFD_SETTIME,
    syscall::CLOCK_NANOSLEEP,
    syscall::NANOSLEEP,
    syscall::IOCTL,
    // The event loop's own, connected to nothing but itself.
    syscall::SOCKETPAIR,
    syscall::CONNECT,
    // To the wildcard address: resolvers choose their port.
    syscall::BIND,
    syscall::SENDTO,
    syscall::RECVFROM,
    syscall::SENDMSG,
    syscall::RECVMSG,
    syscall::SHUTDOWN,
    syscall::GETSOCKNAME,
    syscall::GETPEERNAME,
    syscall::GETSOCKOPT,
    syscall::SETSOCKOPT,
];

/// `AF_INET` and `AF_INET6`: the only sockets that whoever has the network may make.
const FAMILIES: [u32; 2] = [2, 10];

fn load_filter(keep: Keep<'_>) -> Result<(), KernelError> {
    let (more, families): (&[u32], &[u32]) = match keep {
        Keep::Layer(_) => (FILES, &[]),
        Keep::Nothing => (&[], &[]),
        Keep::Network(_) => (NETWORK, &FAMILIES),
    };
    seccomp::load(&program(more, families), FilterFlags::empty()).map(drop)
}

/// Threads but no namespaces, sockets of these families, the listed calls; everything else is `EPERM`.
fn program(more: &[u32], families: &[u32]) -> Vec<Instruction> {
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;
    const KILL: u32 = 0x8000_0000;
    // Offsets in `struct seccomp_data`; both machines are little-endian, so the low half of an argument comes first.
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    const FIRST_ARGUMENT: u32 = 16;
    let load = |at| Instruction {
        code: 0x20,
        jt: 0,
        jf: 0,
        k: at,
    };
    let unless_equal = |value, skip| Instruction {
        code: 0x15,
        jt: 0,
        jf: skip,
        k: value,
    };
    let if_any_bit = |bits, skip| Instruction {
        code: 0x45,
        jt: 0,
        jf: skip,
        k: bits,
    };
    let answer = |action| Instruction {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: action,
    };
    let eperm = ERRNO | Errno::EPERM.raw().unsigned_abs();
    let enosys = ERRNO | Errno::ENOSYS.raw().unsigned_abs();

    let mut program = vec![
        load(ARCHITECTURE),
        Instruction {
            code: 0x15,
            jt: 1,
            jf: 0,
            k: syscall::ARCHITECTURE,
        },
        answer(KILL),
        load(NUMBER),
        // Its flags are in memory, where a filter cannot look; C libraries then take clone.
        unless_equal(syscall::CLONE3, 1),
        answer(enosys),
        unless_equal(syscall::CLONE, 4),
        load(FIRST_ARGUMENT),
        if_any_bit(syscall::CLONE_NAMESPACES, 1),
        answer(eperm),
        answer(ALLOW),
    ];
    if !families.is_empty() {
        let count = u8::try_from(families.len()).unwrap_or(u8::MAX);
        program.push(unless_equal(syscall::SOCKET, count * 2 + 2));
        program.push(load(FIRST_ARGUMENT));
        for family in families {
            program.extend([unless_equal(*family, 1), answer(ALLOW)]);
        }
        program.push(answer(eperm));
    }
    for number in BASE.iter().chain(more) {
        program.extend([unless_equal(*number, 1), answer(ALLOW)]);
    }
    program.push(answer(eperm));
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    /// Runs `check` in a thread that has been confined; `None` without root.
    fn confined(keep: fn(&OwnedFd) -> Keep<'_>, check: fn(OwnedFd)) {
        if creds::effective_uid() != 0 {
            eprintln!("skipped: confinement needs root");
            return;
        }
        // The limits are the process's, so this runs in a child: the same test executable, this one test.
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("inside"), b"x").unwrap();
        let layer = path::open(dir.path(), OFlags::RDONLY | OFlags::DIRECTORY).unwrap();
        std::thread::spawn(move || {
            let root = confine_thread(keep(&layer)).unwrap();
            drop(layer);
            check(root);
        })
        .join()
        .unwrap();
    }

    /// Everything but the limits of the whole process.
    fn confine_thread(keep: Keep<'_>) -> Result<OwnedFd, KernelError> {
        creds::set_no_new_privs()?;
        let root = enter_root(keep)?;
        restrict_paths(&root, keep)?;
        caps::limit_bounding(CapSet::EMPTY)?;
        let capabilities = match keep {
            Keep::Layer(_) => unpack_capabilities(),
            _ => CapSet::EMPTY,
        };
        caps::set(&Sets {
            effective: capabilities,
            permitted: capabilities,
            inheritable: CapSet::EMPTY,
        })?;
        load_filter(keep)?;
        Ok(root)
    }

    #[test]
    fn a_layer_is_all_that_an_unpacker_sees() {
        confined(
            |layer| Keep::Layer(layer.as_fd()),
            |root| {
                let names = path::list_dir(&root, 10).unwrap();
                assert_eq!(names.len(), 1, "{names:?}");
                let mut text = String::new();
                let inside = path::open_at(&root, "inside", OFlags::RDONLY).unwrap();
                std::fs::File::from(inside).read_to_string(&mut text).unwrap();
                assert_eq!(text, "x");
                // Neither `/` nor `..` leads anywhere else.
                for way_out in ["/etc", "/proc", "/..", "/../etc"] {
                    let found = path::open(way_out, OFlags::RDONLY).and_then(|fd| path::list_dir(fd, 10));
                    assert!(
                        found.is_err() || found.is_ok_and(|names| names.len() == 1),
                        "{way_out}"
                    );
                }
                assert!(
                    std::net::TcpStream::connect("127.0.0.1:1").unwrap_err().kind()
                        == std::io::ErrorKind::PermissionDenied
                );
                std::os::unix::net::UnixStream::pair().unwrap_err();
                namespace::unshare(Kinds::USER).unwrap_err();
                assert!(
                    std::thread::spawn(|| 7).join().is_ok_and(|answer| answer == 7),
                    "threads still start"
                );
                path::make_node(&root, "null", path::Node::Char(1, 3), 0o600).unwrap();
            },
        );
    }

    #[test]
    fn a_parser_sees_nothing() {
        confined(
            |_| Keep::Nothing,
            |root| {
                assert!(
                    path::list_dir(&root, 10).is_err()
                        || path::list_dir(&root, 10).is_ok_and(|names| names.is_empty())
                );
                path::open("/etc/passwd", OFlags::RDONLY).unwrap_err();
                path::make_dir(&root, "x", 0o700).unwrap_err();
                std::net::UdpSocket::bind("127.0.0.1:0").unwrap_err();
            },
        );
    }

    #[test]
    fn without_landlock_the_namespace_stands_alone() {
        confined(
            |layer| {
                take_away(syscall::LANDLOCK_CREATE_RULESET, Errno::ENOSYS);
                let error = landlock::restrict_all(Network::None).unwrap_err();
                assert_eq!(error.errno(), Errno::ENOSYS, "the filter is not in force");
                Keep::Layer(layer.as_fd())
            },
            |root| {
                path::open_at(&root, "inside", OFlags::RDONLY).unwrap();
                for way_out in ["/etc/passwd", "/../etc/passwd"] {
                    path::open(way_out, OFlags::RDONLY).unwrap_err();
                }
            },
        );
    }

    #[test]
    fn on_an_initramfs_a_chroot_takes_the_place_of_pivot_root() {
        confined(
            |layer| {
                // What the kernel says where its root is an initramfs.
                take_away(syscall::PIVOT_ROOT, Errno::EINVAL);
                let host = path::open("/", OFlags::RDONLY | OFlags::DIRECTORY).unwrap();
                let error = pivot::pivot_root(&host, &host, false).unwrap_err();
                assert_eq!(error.errno(), Errno::EINVAL, "the filter is not in force");
                Keep::Layer(layer.as_fd())
            },
            |root| {
                path::open_at(&root, "inside", OFlags::RDONLY).unwrap();
                for way_out in ["/etc/passwd", "/../etc/passwd", "../etc/passwd"] {
                    path::open(way_out, OFlags::RDONLY).unwrap_err();
                }
            },
        );
    }

    /// From now on the kernel answers this thread so.
    fn take_away(call: u32, errno: Errno) {
        creds::set_no_new_privs().unwrap();
        seccomp::load(&seccomp::lacking_program(call, None, errno), FilterFlags::empty()).unwrap();
    }

    #[test]
    fn jumps_stay_in_the_program() {
        for program in [
            program(&[], &[]),
            program(FILES, &[]),
            program(NETWORK, &FAMILIES),
        ] {
            for (at, instruction) in program.iter().enumerate() {
                if matches!(instruction.code, 0x15 | 0x45) {
                    let furthest = at + 1 + usize::from(instruction.jt.max(instruction.jf));
                    assert!(furthest < program.len(), "instruction {at}");
                }
            }
            assert_eq!(program.last().map(|last| last.code), Some(0x06));
        }
    }
}
