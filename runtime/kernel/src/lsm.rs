//! Labels of SELinux and AppArmor: is it on, and what the next execve gets.
//!
//! Written through a [`Procfs`] handle only: a label that lands in a file of the container's making is no label.

use std::path::Path;

use crate::path::{self, OFlags};
use crate::procfs::Procfs;
use crate::{Errno, Result};

/// `SELINUX_MAGIC`: the filesystem at `/sys/fs/selinux`.
const SELINUX_MAGIC: u64 = 0xf97c_ff8c;

/// Whether AppArmor is built in and on.
#[must_use]
pub fn apparmor_enabled() -> bool {
    let read = || {
        let fd = path::open(
            "/sys/module/apparmor/parameters/enabled",
            OFlags::RDONLY | OFlags::NONBLOCK,
        )?;
        path::read_limited(fd, 16).map_err(|errno| crate::Error::new("read", "apparmor enabled", errno))
    };
    read().is_ok_and(|value| value.starts_with(b"Y"))
}

/// Whether SELinux is built in and its filesystem mounted.
#[must_use]
pub fn selinux_enabled() -> bool {
    path::open("/sys/fs/selinux", OFlags::PATH)
        .and_then(path::filesystem_magic)
        .is_ok_and(|magic| magic == SELINUX_MAGIC)
}

/// The AppArmor profile that this thread has after its next execve.
pub fn set_apparmor_exec(proc: &Procfs, profile: &str) -> Result<()> {
    let value = format!("exec {profile}");
    // With several modules stacked each has its own directory; `attr/exec` belongs to the first.
    match proc.write("thread-self/attr/apparmor/exec", value.as_bytes()) {
        Err(error) if error.errno() == Errno::ENOENT => proc.write("thread-self/attr/exec", value.as_bytes()),
        other => other,
    }
}

/// The SELinux label that this thread has after its next execve.
pub fn set_selinux_exec(proc: &Procfs, label: &str) -> Result<()> {
    proc.write("thread-self/attr/exec", label.as_bytes())
}

/// The SELinux label of keyrings that this thread makes; empty for the default.
pub fn set_selinux_key(proc: &Procfs, label: &str) -> Result<()> {
    proc.write("thread-self/attr/keycreate", label.as_bytes())
}

/// The SELinux label of sockets that this thread makes; empty for the default.
pub fn set_selinux_socket(proc: &Procfs, label: &str) -> Result<()> {
    proc.write("thread-self/attr/sockcreate", label.as_bytes())
}

/// The names of the active security modules, from securityfs; empty where that is not mounted.
#[must_use]
pub fn active() -> Vec<String> {
    let Ok(fd) = path::open(Path::new("/sys/kernel/security/lsm"), OFlags::RDONLY) else {
        return Vec::new();
    };
    let list = path::read_limited(fd, 4096).unwrap_or_default();
    String::from_utf8_lossy(&list)
        .trim()
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}
