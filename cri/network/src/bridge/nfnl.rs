//! Requests to netfilter: attributes, transactions of nf_tables, dumps.

use coracle_kernel::{Errno, Error, Result, scm};
use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable as _, NLA_F_NESTED, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST,
    NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily, NetfilterSubsystem,
};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::netlink::{RECEIVE_BYTES, ended, messages, open_socket, receive, send};

/// `NFNL_SUBSYS_NFTABLES`, in the resource field of a batch's first and last message.
const NF_TABLES: u16 = 10;
/// What fits the send buffer of every kernel.
const SEND_BYTES: usize = 64 << 10;
/// The bytes of a message's header that come before its attributes.
const HEADER_BYTES: usize = 4;

/// An address family as netfilter numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    V4,
    V6,
}

/// One message of a request.
pub(super) struct Request {
    /// Its name, for errors.
    pub(super) name: &'static str,
    pub(super) subsystem: NetfilterSubsystem,
    pub(super) kind: u8,
    pub(super) family: Family,
    /// Beside NLM_F_REQUEST, and NLM_F_ACK or NLM_F_DUMP.
    pub(super) flags: u16,
    pub(super) attributes: Vec<DefaultNla>,
}

/// A message of an answer, its attributes unread.
struct Answer(Vec<u8>);

impl Family {
    pub(super) fn number(self) -> u8 {
        self.proto().into()
    }

    fn proto(self) -> NetfilterProtoFamily {
        match self {
            Family::V4 => NetfilterProtoFamily::IPv4,
            Family::V6 => NetfilterProtoFamily::IPv6,
        }
    }
}

impl NetlinkDeserializable for Answer {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Answer, DecodeError> {
        Ok(Answer(payload.get(HEADER_BYTES..).unwrap_or_default().to_vec()))
    }
}

pub(super) fn bytes(kind: u16, value: impl Into<Vec<u8>>) -> DefaultNla {
    DefaultNla::new(kind, value.into())
}

pub(super) fn be32(kind: u16, value: u32) -> DefaultNla {
    bytes(kind, value.to_be_bytes())
}

pub(super) fn text(kind: u16, value: &str) -> DefaultNla {
    bytes(kind, [value.as_bytes(), &[0]].concat())
}

/// Attributes within an attribute.
pub(super) fn nest(kind: u16, attributes: &[DefaultNla]) -> DefaultNla {
    let mut value = vec![0; attributes.buffer_len()];
    attributes.emit(&mut value);
    bytes(kind | NLA_F_NESTED, value)
}

/// The attributes of an answer, or of an attribute; what is cut off ends them.
pub(super) fn fields(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let &[length_low, length_high, kind_low, kind_high, ..] = rest else {
            return None;
        };
        let length = usize::from(u16::from_ne_bytes([length_low, length_high]));
        // The upper two bits are flags.
        let kind = u16::from_ne_bytes([kind_low, kind_high]) & 0x3fff;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of that kind.
pub(super) fn field(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    fields(bytes).find_map(|(found, value)| (found == kind).then_some(value))
}

/// One transaction of nf_tables: all of it or nothing.
pub(super) fn batch(requests: Vec<Request>) -> Result<()> {
    let names: Vec<&'static str> = requests.iter().map(|request| request.name).collect();
    let what = || "nf_tables batch".to_owned();
    let socket = open_socket(NETLINK_NETFILTER)?;
    let mut buffer = Vec::new();
    let control = |message: ControlMessage| {
        NetfilterMessage::new(
            NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NF_TABLES),
            message,
        )
    };
    append(&mut buffer, control(ControlMessage::BatchBegin), 0, 0);
    let mut expected = 0;
    for request in requests {
        expected += 1;
        let flags = request.flags | NLM_F_ACK;
        append(&mut buffer, request.into_message(), flags, expected);
    }
    append(&mut buffer, control(ControlMessage::BatchEnd), 0, 0);
    // A transaction is one datagram, and one that does not fit the buffer is refused: by default a thousand ports.
    if buffer.len() > SEND_BYTES {
        scm::force_send_buffer(&socket, buffer.len())?;
    }
    // Refusals need not repeat what they refuse: many of them would not fit the other buffer.
    socket
        .set_cap_ack(true)
        .map_err(|error| Error::from_io("setsockopt", what(), &error))?;
    send(&socket, &buffer, &what)?;

    // Every message is answered, also when the transaction fails; the first refusal is its reason. A refusal of the
    // batch as a whole (no nf_tables in this kernel) is answered once, for its first message.
    let mut outcome = Ok(());
    let mut answered = 0;
    let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
    while answered < expected {
        receive(&socket, &mut buffer, &what)?;
        for message in messages::<Answer>(&buffer, &what) {
            let message = message?;
            if let NetlinkPayload::Error(error) = message.payload {
                let sequence = message.header.sequence_number;
                let index = usize::try_from(sequence).unwrap_or(usize::MAX).wrapping_sub(1);
                let what = || format!("nf_tables batch, {}", names.get(index).unwrap_or(&"as a whole"));
                let ended = ended(error.raw_code(), &what);
                if sequence == 0 {
                    return ended.and_then(|()| Err(Error::new("netlink", what(), Errno::EBADMSG)));
                }
                answered += 1;
                outcome = outcome.and(ended);
            }
        }
    }
    outcome
}

/// One request outside of any transaction.
pub(super) fn act(request: Request) -> Result<()> {
    let name = request.name;
    converse(request, NLM_F_ACK, &|| name.to_owned(), |_| {})
}

/// Asks for everything that there is of a kind; `each` gets the attributes of one after the other.
pub(super) fn dump(request: Request, each: impl FnMut(&[u8])) -> Result<()> {
    let name = request.name;
    converse(request, NLM_F_DUMP, &|| format!("{name}, all"), each)
}

fn converse(
    request: Request,
    flags: u16,
    what: &impl Fn() -> String,
    mut each: impl FnMut(&[u8]),
) -> Result<()> {
    let socket = open_socket(NETLINK_NETFILTER)?;
    let mut buffer = Vec::new();
    let flags = request.flags | flags;
    append(&mut buffer, request.into_message(), flags, 1);
    send(&socket, &buffer, what)?;
    let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
    loop {
        receive(&socket, &mut buffer, what)?;
        for message in messages::<Answer>(&buffer, what) {
            match message?.payload {
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return ended(error.raw_code(), what),
                NetlinkPayload::InnerMessage(answer) => each(&answer.0),
                _ => {}
            }
        }
    }
}

impl Request {
    fn into_message(self) -> NetfilterMessage {
        let inner = NetfilterMessageInner::Other {
            subsys: self.subsystem,
            message_type: self.kind,
            attributes: self.attributes,
        };
        NetfilterMessage::new(NetfilterHeader::new(self.family.proto(), 0, 0), inner)
    }
}

fn append(buffer: &mut Vec<u8>, message: NetfilterMessage, flags: u16, sequence: u32) {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let start = buffer.len();
    buffer.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut buffer[start..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_and_cut_ones_end_them() {
        let inner = nest(1, &[text(2, "abc"), be32(3, 7)]);
        let mut value = vec![0; inner.buffer_len()];
        inner.emit(&mut value);
        let inner = field(&value, 1).unwrap();
        assert_eq!(field(inner, 2), Some(&b"abc\0"[..]));
        assert_eq!(field(inner, 3), Some(&[0, 0, 0, 7][..]));
        assert_eq!(field(inner, 4), None);
        for end in 0..value.len() {
            assert!(fields(&value[..end]).count() <= 1);
        }
        // Lengths that are too small or reach behind the end.
        for length in [0u16, 3, 5, 9, u16::MAX] {
            let hostile = [&length.to_ne_bytes()[..], &[1, 0, 0, 0, 0, 0]].concat();
            assert!(fields(&hostile).count() <= 2);
        }
    }
}
