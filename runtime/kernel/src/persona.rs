//! What `uname` answers: execution domain, host name, domain name.

use crate::{Error, Result};

/// What `uname -m` answers and which address layout programs get.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Persona {
    /// The machine's own.
    Linux = 0x0000,
    /// The 32-bit sibling of the machine.
    Linux32 = 0x0008,
}

/// Sets the execution domain; it survives `execve`.
pub fn set(persona: Persona) -> Result<()> {
    // SAFETY: takes a number alone.
    let ret = unsafe { libc::syscall(libc::SYS_personality, persona as u64) };
    if ret < 0 {
        Err(Error::last("personality", format!("{persona:?}")))
    } else {
        Ok(())
    }
}

/// Sets the host name of the UTS namespace, at most 64 bytes.
pub fn set_hostname(name: &str) -> Result<()> {
    // SAFETY: the kernel reads as many bytes as said from a live string.
    let ret = unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) };
    if ret == 0 {
        Ok(())
    } else {
        Err(Error::last("sethostname", format!("{name:?}")))
    }
}

/// Sets the NIS domain name of the UTS namespace, at most 64 bytes.
pub fn set_domainname(name: &str) -> Result<()> {
    // SAFETY: the kernel reads as many bytes as said from a live string.
    let ret = unsafe { libc::syscall(libc::SYS_setdomainname, name.as_ptr(), name.len()) };
    if ret == 0 {
        Ok(())
    } else {
        Err(Error::last("setdomainname", format!("{name:?}")))
    }
}
