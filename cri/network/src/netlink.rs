//! Netlink sockets: one datagram out, datagrams with the answers in.

use coracle_kernel::{Errno, Error, Result};
use netlink_packet_core::{NetlinkDeserializable, NetlinkMessage};

/// The kernel sends no datagram larger than this.
pub(crate) const RECEIVE_BYTES: usize = 64 << 10;

/// A blocking socket that talks to the kernel alone.
pub(crate) fn open_socket(protocol: isize) -> Result<netlink_sys::Socket> {
    let failed =
        |call| move |error: std::io::Error| Error::from_io(call, format!("netlink {protocol}"), &error);
    let mut socket = netlink_sys::Socket::new(protocol).map_err(failed("socket"))?;
    socket.bind_auto().map_err(failed("bind"))?;
    socket
        .connect(&netlink_sys::SocketAddr::new(0, 0))
        .map_err(failed("connect"))?;
    Ok(socket)
}

pub(crate) fn send(socket: &netlink_sys::Socket, bytes: &[u8], what: &impl Fn() -> String) -> Result<()> {
    match socket.send(bytes, 0) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) => Err(Error::new("send", what(), Errno::EMSGSIZE)),
        Err(error) => Err(Error::from_io("send", what(), &error)),
    }
}

pub(crate) fn receive(
    socket: &netlink_sys::Socket,
    buffer: &mut Vec<u8>,
    what: &impl Fn() -> String,
) -> Result<()> {
    loop {
        buffer.clear();
        match socket.recv(buffer, 0) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::from_io("recv", what(), &error)),
        }
    }
}

/// The messages of one datagram.
pub(crate) fn messages<'a, M: NetlinkDeserializable>(
    mut bytes: &'a [u8],
    what: &'a impl Fn() -> String,
) -> impl Iterator<Item = Result<NetlinkMessage<M>>> + 'a {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let message = NetlinkMessage::<M>::deserialize(bytes);
        // Messages are padded to four bytes; the length comes first.
        let length = bytes
            .first_chunk()
            .map_or(u32::MAX, |first| u32::from_ne_bytes(*first))
            .max(16);
        let length = usize::try_from(length).unwrap_or(usize::MAX).saturating_add(3) & !3;
        bytes = bytes.get(length..).unwrap_or_default();
        Some(message.map_err(|_| Error::new("netlink", what(), Errno::EBADMSG)))
    })
}

/// The end of an answer: a negative errno, or 0.
pub(crate) fn ended(code: i32, what: &impl Fn() -> String) -> Result<()> {
    match code {
        0 => Ok(()),
        code => Err(Error::new(
            "netlink",
            what(),
            Errno::from_raw(code.saturating_neg()),
        )),
    }
}
