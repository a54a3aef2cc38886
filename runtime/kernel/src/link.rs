//! Network links, as far as a container runtime itself needs them.

use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::{Error, Result};

/// Takes `lo` of the present network namespace up, which a new namespace has down.
pub fn loopback_up() -> Result<()> {
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|errno| Error::new("socket", "AF_INET, SOCK_DGRAM", errno.into()))?;
    let mut request = Request {
        name: *b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        flags: 0,
        rest: [0; 22],
    };
    // SAFETY: `request` is a live ifreq whose flags the kernel fills.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &raw mut request) } < 0 {
        return Err(Error::last("ioctl", "SIOCGIFFLAGS, lo"));
    }
    request.flags |= UP;
    // SAFETY: `request` is a live ifreq that the kernel reads.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) } < 0 {
        return Err(Error::last("ioctl", "SIOCSIFFLAGS, lo, IFF_UP"));
    }
    Ok(())
}

/// `IFF_UP`.
const UP: i16 = 1;

/// `struct ifreq` with its flags member, 40 bytes on every 64-bit architecture.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}
