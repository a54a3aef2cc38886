//! Frames: unmasked and handed on as they arrive. A message is never collected, so there is no longest one.

use bytes::{Buf as _, Bytes, BytesMut};

use super::Error;

/// Bytes before the payload of the longest frame that a server sends.
pub(crate) const MOST_HEAD: usize = 10;

/// Longest payload of a control frame.
const MOST_CONTROL: usize = 125;

/// Frame types.
pub(crate) mod opcode {
    pub(crate) const CONTINUATION: u8 = 0;
    pub(crate) const TEXT: u8 = 1;
    pub(crate) const BINARY: u8 = 2;
    pub(crate) const CLOSE: u8 = 8;
    pub(crate) const PING: u8 = 9;
    pub(crate) const PONG: u8 = 10;
}

/// What a peer has sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// A part of a message.
    Piece(Piece),
    /// To be answered by a pong with the same bytes.
    Ping(Bytes),
    /// The peer leaves; to be answered by the same status.
    Close(Option<u16>),
}

/// A part of a text or binary message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Its bytes; empty in an empty message, or where only the end was still to be told.
    pub(crate) bytes: BytesMut,
    /// Whether a message begins with it.
    pub(crate) first: bool,
    /// Whether the message ends with it.
    pub(crate) last: bool,
}

/// The state of the side that reads.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    payload: Option<Payload>,
    /// A message has begun whose last frame has not come.
    in_message: bool,
}

/// A data frame of which a part is still to come.
#[derive(Debug)]
struct Payload {
    left: u64,
    mask: [u8; 4],
    /// The frame ends its message.
    fin: bool,
    /// Nothing of the message was handed on yet.
    first: bool,
}

impl Decoder {
    /// Takes the next event out of what has arrived; `None` when more bytes are needed.
    pub(crate) fn next(&mut self, input: &mut BytesMut) -> Result<Option<Event>, Error> {
        loop {
            if let Some(payload) = self.payload.take() {
                return Ok(self.piece(payload, input).map(Event::Piece));
            }
            let Some(head) = Head::parse(input)? else {
                return Ok(None);
            };
            if head.opcode < opcode::CLOSE {
                let continues = head.opcode == opcode::CONTINUATION;
                if continues != self.in_message {
                    return Err(Error::Fragment);
                }
                input.advance(head.size);
                self.in_message = !head.fin;
                self.payload = Some(Payload {
                    left: head.length,
                    mask: head.mask,
                    fin: head.fin,
                    first: !continues,
                });
                continue;
            }
            let length = match usize::try_from(head.length) {
                Ok(length) if head.fin && length <= MOST_CONTROL => length,
                _ => return Err(Error::Control),
            };
            if input.len() < head.size + length {
                return Ok(None);
            }
            input.advance(head.size);
            let mut body = input.split_to(length);
            unmask(&mut body, head.mask);
            match head.opcode {
                opcode::CLOSE => {
                    let status = body.first_chunk::<2>().map(|bytes| u16::from_be_bytes(*bytes));
                    return Ok(Some(Event::Close(status)));
                }
                opcode::PING => return Ok(Some(Event::Ping(body.freeze()))),
                _ => {}
            }
        }
    }

    /// What there is of the frame's payload; `None` if nothing is.
    fn piece(&mut self, mut payload: Payload, input: &mut BytesMut) -> Option<Piece> {
        if payload.left > 0 && input.is_empty() {
            self.payload = Some(payload);
            return None;
        }
        let here = usize::try_from(payload.left)
            .unwrap_or(usize::MAX)
            .min(input.len());
        let mut bytes = input.split_to(here);
        unmask(&mut bytes, payload.mask);
        payload.mask.rotate_left(here % 4);
        payload.left -= here as u64;
        let piece = Piece {
            bytes,
            first: payload.first,
            last: payload.left == 0 && payload.fin,
        };
        payload.first = false;
        if payload.left > 0 {
            self.payload = Some(payload);
        }
        Some(piece)
    }
}

/// Writes the head of a whole, unmasked message of `length` bytes so that it ends at `end`; where it begins.
pub(crate) fn put_head(buffer: &mut [u8], end: usize, opcode: u8, length: usize) -> usize {
    let (head, size) = head(opcode, length);
    let start = end - size;
    buffer[start..end].copy_from_slice(&head[..size]);
    start
}

/// A whole, unmasked frame.
pub(crate) fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let (head, size) = head(opcode, payload.len());
    [&head[..size], payload].concat()
}

/// A close frame with this status.
pub(crate) fn close(status: Option<u16>) -> Vec<u8> {
    match status {
        Some(status) => frame(opcode::CLOSE, &status.to_be_bytes()),
        None => frame(opcode::CLOSE, &[]),
    }
}

fn head(opcode: u8, length: usize) -> ([u8; MOST_HEAD], usize) {
    let mut head = [0; MOST_HEAD];
    head[0] = 0x80 | opcode;
    if let Some(short) = u8::try_from(length).ok().filter(|short| *short < 126) {
        head[1] = short;
        return (head, 2);
    }
    if let Ok(middle) = u16::try_from(length) {
        head[1] = 126;
        head[2..4].copy_from_slice(&middle.to_be_bytes());
        return (head, 4);
    }
    head[1] = 127;
    head[2..10].copy_from_slice(&(length as u64).to_be_bytes());
    (head, 10)
}

/// What stands before a masked payload.
struct Head {
    opcode: u8,
    fin: bool,
    length: u64,
    mask: [u8; 4],
    /// Bytes of the head itself.
    size: usize,
}

impl Head {
    fn parse(input: &[u8]) -> Result<Option<Head>, Error> {
        let Some([first, second]) = input.first_chunk::<2>() else {
            return Ok(None);
        };
        if first & 0x70 != 0 {
            return Err(Error::Reserved(first & 0x70));
        }
        let opcode = first & 0x0f;
        if !matches!(opcode, 0..=2 | 8..=10) {
            return Err(Error::Opcode(opcode));
        }
        if second & 0x80 == 0 {
            return Err(Error::Unmasked);
        }
        let rest = &input[2..];
        let (length, wide) = match second & 0x7f {
            126 => (rest.first_chunk().map(|b| u64::from(u16::from_be_bytes(*b))), 2),
            127 => (rest.first_chunk().map(|b| u64::from_be_bytes(*b)), 8),
            short => (Some(u64::from(short)), 0),
        };
        let (Some(length), Some(mask)) = (length, rest.get(wide..).and_then(|r| r.first_chunk::<4>())) else {
            return Ok(None);
        };
        if length >> 63 != 0 {
            return Err(Error::Length(length));
        }
        Ok(Some(Head {
            opcode,
            fin: first & 0x80 != 0,
            length,
            mask: *mask,
            size: 2 + wide + 4,
        }))
    }
}

fn unmask(bytes: &mut [u8], mask: [u8; 4]) {
    let wide = u64::from_ne_bytes(std::array::from_fn(|at| mask[at % 4]));
    let (chunks, rest) = bytes.as_chunks_mut::<8>();
    for chunk in chunks {
        *chunk = (u64::from_ne_bytes(*chunk) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

/// The client's half, for tests.
#[cfg(test)]
pub(crate) fn masked(first: u8, mask: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut bytes = frame(0, payload);
    let size = bytes.len() - payload.len();
    bytes[0] = first;
    bytes[1] |= 0x80;
    let mut payload = payload.to_vec();
    unmask(&mut payload, mask);
    [&bytes[..size], &mask[..], &payload[..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8]) -> Result<Vec<Event>, Error> {
        let (mut decoder, mut input, mut events) = (Decoder::default(), BytesMut::from(bytes), Vec::new());
        while let Some(event) = decoder.next(&mut input)? {
            events.push(event);
        }
        Ok(events)
    }

    fn piece(bytes: &[u8], first: bool, last: bool) -> Event {
        Event::Piece(Piece {
            bytes: BytesMut::from(bytes),
            first,
            last,
        })
    }

    #[test]
    fn messages_come_unmasked_with_control_frames_between_their_fragments() {
        let bytes = [
            masked(0x02, [1, 2, 3, 4], b"first part"),
            masked(0x89, [9, 9, 9, 9], b"hello"),
            masked(0x80, [5, 6, 7, 8], b", second"),
            masked(0x81, [0, 0, 0, 0], b""),
            masked(0x88, [1, 1, 1, 1], &1000u16.to_be_bytes()),
        ]
        .concat();
        let expected = [
            piece(b"first part", true, false),
            Event::Ping(Bytes::from_static(b"hello")),
            piece(b", second", false, true),
            piece(b"", true, true),
            Event::Close(Some(1000)),
        ];
        assert_eq!(all(&bytes).unwrap(), expected);
    }

    #[test]
    fn lengths_are_written_in_their_three_ways() {
        for length in [0, 125, 126, 65535, 65536] {
            let payload = vec![7; length];
            let events = all(&masked(0x82, [3, 1, 4, 1], &payload)).unwrap();
            assert_eq!(events, [piece(&payload, true, true)]);
        }
        let mut buffer = [0; 12];
        assert_eq!(put_head(&mut buffer, 10, opcode::BINARY, 70_000), 0);
        assert_eq!(buffer, [0x82, 127, 0, 0, 0, 0, 0, 1, 0x11, 0x70, 0, 0]);
    }

    #[test]
    fn frames_that_break_the_rules_are_refused() {
        assert_eq!(all(&[0x82, 0x01, b'x']), Err(Error::Unmasked));
        assert_eq!(all(&[0xc2, 0x80]), Err(Error::Reserved(0x40)));
        assert_eq!(all(&[0x83, 0x80]), Err(Error::Opcode(3)));
        assert_eq!(all(&masked(0x09, [0; 4], b"")), Err(Error::Control));
        assert_eq!(all(&masked(0x89, [0; 4], &[0; 126])), Err(Error::Control));
        assert_eq!(all(&masked(0x80, [0; 4], b"x")), Err(Error::Fragment));
        let nested = [masked(0x02, [0; 4], b"x"), masked(0x82, [0; 4], b"y")].concat();
        assert_eq!(all(&nested), Err(Error::Fragment));
        let huge = [&[0x82, 0xff][..], &[0xff; 8], &[0; 4]].concat();
        assert_eq!(all(&huge), Err(Error::Length(u64::MAX)));
        // the longest that is allowed is not waited for
        let long = [&[0x82, 0xff, 0x7f][..], &[0xff; 7], &[0; 4], b"x"].concat();
        assert_eq!(all(&long).unwrap(), [piece(b"x", true, false)]);
    }
}
