//! Protection of the program's own file (the attack of CVE-2019-5736).
//!
//! A process that enters a container can be reached there through `/proc/<pid>/exe`, and a container's program may be
//! `/proc/self/exe` itself. Who holds that link as root could wait for the program's end and overwrite the host's file.
//! So the calls that enter a container first execute themselves anew from a file that cannot be written through that
//! link: a read-only mount of the program that is attached nowhere and in no namespace, so that nobody can remount it;
//! where mounts cannot be made, a sealed copy in memory.

use std::ffi::{CString, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use anyhow::{Context, bail};
use coracle_kernel::mount::{self, Depth};
use coracle_kernel::mount_attr::{self, Attr};
use coracle_kernel::path::{self, OFlags};
use coracle_kernel::{creds, exec, fd, file};

/// The calls that enter a container.
const ENTERING: [&str; 3] = ["create", "run", "exec"];
/// The program of this process.
const OWN: &str = "/proc/self/exe";

/// Executes this program anew from a protected file, if the call needs that and it is not so yet.
pub(crate) fn protect() -> anyhow::Result<()> {
    // One argument too many that is called so costs a few microseconds, a second parser of the command line more.
    if !std::env::args_os()
        .skip(1)
        .any(|arg| ENTERING.iter().any(|name| arg == *name))
    {
        return Ok(());
    }
    if is_protected().context("cannot look at own binary")? {
        // Executed by descriptor we would be called by its number.
        creds::set_name("coracle")?;
        return Ok(());
    }
    let args = c_strings(std::env::args_os());
    let env = c_strings(std::env::vars_os().map(|(name, value)| {
        let mut entry = name;
        entry.push("=");
        entry.push(value);
        entry
    }));
    let own = path::open(OWN, OFlags::RDONLY)?;
    // Both return only where they failed.
    let mounted = match read_only_mount(&own) {
        Ok(mount) => exec::execve_fd(mount.as_fd(), &args, &env),
        Err(error) => error,
    };
    let copied = match fd::sealed_program(c"coracle", &own) {
        Ok(copy) => exec::execve_fd(copy.as_fd(), &args, &env),
        Err(error) => error,
    };
    bail!(
        "cannot protect own binary from containers: neither from a read-only mount ({mounted}) nor from a sealed copy ({copied})"
    );
}

/// Whether the file behind us can be written by nobody who gets at it through us.
fn is_protected() -> coracle_kernel::Result<bool> {
    let own = path::open(OWN, OFlags::RDONLY)?;
    if fd::is_sealed(&own) {
        return Ok(true);
    }
    // The root of a mount that is attached nowhere shows as `/`, and nothing else that can be executed does.
    let shown =
        std::fs::read_link(OWN).map_err(|error| coracle_kernel::Error::from_io("readlink", OWN, &error))?;
    Ok(shown.as_os_str() == "/" && file::space(&own)?.read_only)
}

fn read_only_mount(own: &OwnedFd) -> coracle_kernel::Result<OwnedFd> {
    let mount = mount::clone_tree(own, Depth::Single)?;
    mount_attr::add(&mount, Attr::RDONLY)?;
    Ok(mount)
}

fn c_strings(strings: impl Iterator<Item = OsString>) -> Vec<CString> {
    // What the kernel gave us as strings holds no NUL bytes.
    strings
        .filter_map(|string| CString::new(string.into_vec()).ok())
        .collect()
}
