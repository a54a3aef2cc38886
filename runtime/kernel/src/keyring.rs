//! Session keyrings.

use std::ffi::CStr;

use crate::{Error, Result};

/// The serial number of a key or keyring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key(i32);

/// The bit that lets the owning user search a keyring, as [`permissions`] and [`set_permissions`] speak it.
pub const USER_SEARCH: u32 = 0x0008_0000;

/// Joins the session keyring `name`, creating it where there is none of that name that the caller may search.
pub fn join_session(name: &CStr) -> Result<Key> {
    let args = || format!("KEYCTL_JOIN_SESSION_KEYRING, {name:?}");
    // SAFETY: the kernel reads a string that ends in NUL.
    let ret = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    i32::try_from(ret)
        .ok()
        .filter(|key| *key >= 0)
        .map(Key)
        .ok_or_else(|| Error::last("keyctl", args()))
}

/// The permission bits of a key.
pub fn permissions(key: Key) -> Result<u32> {
    let mut text = [0u8; 1024];
    // SAFETY: the kernel writes at most as many bytes as the array has.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_DESCRIBE,
            key.0,
            text.as_mut_ptr(),
            text.len(),
        )
    };
    let args = || format!("KEYCTL_DESCRIBE, {}", key.0);
    let length = usize::try_from(ret).map_err(|_| Error::last("keyctl", args()))?;
    // "type;uid;gid;permissions in hex;description"
    std::str::from_utf8(&text[..length.min(text.len())])
        .ok()
        .and_then(|text| text.split(';').nth(3))
        .and_then(|hex| u32::from_str_radix(hex, 16).ok())
        .ok_or_else(|| Error::new("keyctl", args(), crate::Errno::EPROTO))
}

/// Sets the permission bits of a key.
pub fn set_permissions(key: Key, permissions: u32) -> Result<()> {
    // SAFETY: takes numbers alone.
    let ret = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_SETPERM, key.0, permissions) };
    if ret == 0 {
        return Ok(());
    }
    Err(Error::last(
        "keyctl",
        format!("KEYCTL_SETPERM, {}, {permissions:#x}", key.0),
    ))
}
