//! Landlock: a process gives up the file system but for one directory, or altogether.
//!
//! A rule set names the rights it handles; what it handles is denied where no rule grants it. Rights are added with each
//! ABI version, so the set is cut to what this kernel knows. `no_new_privs` must be on (or `CAP_SYS_ADMIN` held).

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::fd::show;
use crate::{Errno, Error, Result};

/// The first version that can rename and link between directories: below it unpacking is impossible.
pub const FIRST_USABLE: u32 = 2;

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const CREATE_RULESET_VERSION: u32 = 1;
/// `LANDLOCK_RULE_PATH_BENEATH`.
const RULE_PATH_BENEATH: u32 = 1;
/// All rights on files of ABI 1 (bits 0 to 12).
const FS_V1: u64 = (1 << 13) - 1;
/// `LANDLOCK_ACCESS_FS_EXECUTE`.
const FS_EXECUTE: u64 = 1;
/// `LANDLOCK_ACCESS_FS_REFER`, ABI 2.
const FS_REFER: u64 = 1 << 13;
/// `LANDLOCK_ACCESS_FS_TRUNCATE`, ABI 3.
const FS_TRUNCATE: u64 = 1 << 14;
/// `LANDLOCK_ACCESS_FS_IOCTL_DEV`, ABI 5.
const FS_IOCTL_DEV: u64 = 1 << 15;
/// `LANDLOCK_ACCESS_NET_BIND_TCP`, ABI 4.
const NET_BIND_TCP: u64 = 1;
/// `LANDLOCK_ACCESS_NET_CONNECT_TCP`, ABI 4.
const NET_CONNECT_TCP: u64 = 1 << 1;
/// `LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | LANDLOCK_SCOPE_SIGNAL`, ABI 6.
const SCOPES: u64 = 3;

/// What a worker keeps of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Connecting out, but no listening (a fetch worker).
    ConnectOnly,
    /// Neither connecting nor listening.
    None,
}

/// `struct landlock_ruleset_attr`.
#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// `struct landlock_path_beneath_attr`, packed in the kernel.
#[repr(C, packed)]
struct PathBeneathAttr {
    allowed_access: u64,
    parent_fd: i32,
}

/// The ABI version of this kernel; `None` where Landlock is not built in or not on.
#[must_use]
pub fn abi() -> Option<u32> {
    // SAFETY: a null attribute of size 0 with the version flag asks for a number and reads no memory.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0,
            CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// Restricts this thread, and all it starts, to everything but execution below one directory.
///
/// `ENOSYS` where the ABI is below [`FIRST_USABLE`]: the caller decides whether to go on without.
pub fn restrict_to(directory: impl AsFd, network: Network) -> Result<()> {
    let abi = usable()?;
    let handled = file_rights(abi);
    let ruleset = create(abi, network)?;
    let rule = PathBeneathAttr {
        allowed_access: handled & !FS_EXECUTE & !FS_IOCTL_DEV,
        parent_fd: directory.as_fd().as_raw_fd(),
    };
    // SAFETY: the ruleset is open and `rule` is the kernel's packed struct for this rule type, alive here.
    let added = unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            RULE_PATH_BENEATH,
            &raw const rule,
            0,
        )
    };
    if added < 0 {
        let errno = Errno::last();
        return Err(Error::new("landlock_add_rule", show(&directory), errno));
    }
    restrict(&ruleset)
}

/// Takes the whole file system away from this thread and all it starts; open descriptors stay usable.
///
/// `ENOSYS` where the ABI is below [`FIRST_USABLE`].
pub fn restrict_all(network: Network) -> Result<()> {
    restrict(&create(usable()?, network)?)
}

fn usable() -> Result<u32> {
    match abi() {
        Some(version) if version >= FIRST_USABLE => Ok(version),
        found => Err(Error::new(
            "landlock_create_ruleset",
            format!("abi {}", found.unwrap_or(0)),
            Errno::ENOSYS,
        )),
    }
}

fn file_rights(abi: u32) -> u64 {
    let mut rights = FS_V1;
    for (since, right) in [(2, FS_REFER), (3, FS_TRUNCATE), (5, FS_IOCTL_DEV)] {
        if abi >= since {
            rights |= right;
        }
    }
    rights
}

fn create(abi: u32, network: Network) -> Result<OwnedFd> {
    let network = match network {
        Network::ConnectOnly => NET_BIND_TCP,
        Network::None => NET_BIND_TCP | NET_CONNECT_TCP,
    };
    let attr = RulesetAttr {
        handled_access_fs: file_rights(abi),
        handled_access_net: if abi >= 4 { network } else { 0 },
        scoped: if abi >= 6 { SCOPES } else { 0 },
    };
    // Older kernels refuse a longer struct unless the rest is zero, which it is: `abi` decides the fields above.
    // SAFETY: `attr` is the kernel's struct of exactly the size given, alive here.
    let raw = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const attr,
            size_of::<RulesetAttr>(),
            0,
        )
    };
    let raw = i32::try_from(raw).unwrap_or(-1);
    if raw < 0 {
        return Err(Error::last("landlock_create_ruleset", format!("abi {abi}")));
    }
    // SAFETY: the kernel has just made this descriptor (close-on-exec) for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn restrict(ruleset: &OwnedFd) -> Result<()> {
    // SAFETY: takes numbers only.
    let done = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    if done < 0 {
        return Err(Error::last("landlock_restrict_self", ""));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::{self, OFlags};
    use std::fs;

    fn is_usable() -> bool {
        let version = abi();
        let usable = version.is_some_and(|version| version >= FIRST_USABLE);
        eprintln!(
            "{}Landlock ABI: {version:?}",
            if usable { "" } else { "SKIPPED: " }
        );
        usable
    }

    /// Landlock binds the thread that asks for it and its children alone, so a thread of its own is enough.
    fn in_thread<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(body).join().unwrap()
    }

    #[test]
    fn one_directory_stays_writable_and_the_rest_is_gone() {
        if !is_usable() {
            return;
        }
        let base = std::env::temp_dir().join(format!("coracle-landlock-{}", std::process::id()));
        fs::create_dir_all(base.join("in/sub")).unwrap();
        let inner = base.join("in");
        in_thread(move || {
            restrict_to(path::open_dir(&inner).unwrap(), Network::None).unwrap();
            fs::write(inner.join("a"), "x").unwrap();
            fs::rename(inner.join("a"), inner.join("sub/b")).unwrap();
            fs::hard_link(inner.join("sub/b"), inner.join("c")).unwrap();
            for outside in [inner.with_file_name("out"), "/etc/hostname".into()] {
                let error = fs::write(&outside, "x").unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{outside:?}");
            }
            fs::read_dir("/etc").unwrap_err();
        });
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn everything_can_be_given_up_but_what_is_open() {
        if !is_usable() {
            return;
        }
        in_thread(|| {
            let open = path::open("/proc/version", OFlags::RDONLY).unwrap();
            restrict_all(Network::ConnectOnly).unwrap();
            path::open("/proc/version", OFlags::RDONLY).unwrap_err();
            assert!(!path::read_limited(open, 4096).unwrap().is_empty());
        });
    }
}
