//! Frames: the eight bytes before each, and those that we send.

use super::dict::CHECKSUM;

/// Bytes before the payload of every frame.
pub(crate) const HEAD: usize = 8;

/// The version that control frames name.
pub(crate) const VERSION: u16 = 3;

/// Flag of DATA, SYN_STREAM, SYN_REPLY and HEADERS: the sender's last frame on this stream.
pub(crate) const FIN: u8 = 0x01;
/// Flag of SYN_STREAM: the receiver may not answer on this stream.
pub(crate) const UNIDIRECTIONAL: u8 = 0x02;

/// Types of control frames.
pub(crate) mod kind {
    pub(crate) const SYN_STREAM: u16 = 1;
    pub(crate) const SYN_REPLY: u16 = 2;
    pub(crate) const RST_STREAM: u16 = 3;
    pub(crate) const SETTINGS: u16 = 4;
    pub(crate) const PING: u16 = 6;
    pub(crate) const GOAWAY: u16 = 7;
    pub(crate) const HEADERS: u16 = 8;
    pub(crate) const WINDOW_UPDATE: u16 = 9;
}

/// Why a stream is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Reason {
    /// Its number is not a new odd one.
    Protocol = 1,
    /// We will not serve it.
    Refused = 3,
    /// What it was for has failed.
    Internal = 6,
}

/// What the first eight bytes of a frame say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Head {
    Data {
        stream: u32,
        flags: u8,
        length: usize,
    },
    Control {
        version: u16,
        kind: u16,
        flags: u8,
        length: usize,
    },
}

impl Head {
    pub(crate) fn parse(bytes: [u8; HEAD]) -> Head {
        let [a, b, c, d, flags, e, f, g] = bytes;
        let length = u32::from_be_bytes([0, e, f, g]) as usize;
        if a & 0x80 == 0 {
            return Head::Data {
                stream: u32::from_be_bytes([a, b, c, d]),
                flags,
                length,
            };
        }
        Head::Control {
            version: u16::from_be_bytes([a & 0x7f, b]),
            kind: u16::from_be_bytes([c, d]),
            flags,
            length,
        }
    }
}

/// The head of a DATA frame. `length` is below 16 MiB: our chunks are 256 KiB.
pub(crate) fn data(stream: u32, flags: u8, length: usize) -> [u8; HEAD] {
    let [a, b, c, d] = (stream & 0x7fff_ffff).to_be_bytes();
    let [e, f, g] = three(length);
    [a, b, c, d, flags, e, f, g]
}

/// SYN_REPLY without headers.
///
/// An empty block is four zero bytes. They go as a stored block of the zlib stream with the sync flush after it that
/// a receiver needs to see the block's end, so no compressor (a quarter of a MiB a connection) is needed. The first
/// reply of a connection begins that stream.
pub(crate) fn reply(stream: u32, first: bool) -> Vec<u8> {
    let mut block = Vec::with_capacity(20);
    if first {
        // deflate with a 32 KiB window, a dictionary is named
        block.extend([0x78, 0x20]);
        block.extend(CHECKSUM.to_be_bytes());
    }
    block.extend([0, 4, 0, 0xfb, 0xff, 0, 0, 0, 0]);
    block.extend([0, 0, 0, 0xff, 0xff]);
    control(kind::SYN_REPLY, &[&stream.to_be_bytes(), &block])
}

/// RST_STREAM.
pub(crate) fn reset(stream: u32, reason: Reason) -> Vec<u8> {
    control(
        kind::RST_STREAM,
        &[&stream.to_be_bytes(), &(reason as u32).to_be_bytes()],
    )
}

/// PING; an answer has the number of the question.
pub(crate) fn ping(number: u32) -> Vec<u8> {
    control(kind::PING, &[&number.to_be_bytes()])
}

/// GOAWAY with status OK.
pub(crate) fn goaway(last_stream: u32) -> Vec<u8> {
    control(kind::GOAWAY, &[&last_stream.to_be_bytes(), &[0; 4]])
}

fn control(kind: u16, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut frame = Vec::with_capacity(HEAD + length);
    frame.extend((0x8000 | VERSION).to_be_bytes());
    frame.extend(kind.to_be_bytes());
    frame.push(0);
    frame.extend(three(length));
    parts.iter().for_each(|part| frame.extend(*part));
    frame
}

/// A length in the three bytes that frames have for it.
fn three(length: usize) -> [u8; 3] {
    // what we send is far shorter
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    let [_, a, b, c] = length.to_be_bytes();
    [a, b, c]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_as_they_are_written() {
        assert_eq!(
            Head::parse(data(7, FIN, 0x01_0203)),
            Head::Data {
                stream: 7,
                flags: FIN,
                length: 0x01_0203
            }
        );
        let frame = reset(5, Reason::Refused);
        assert_eq!(
            Head::parse(frame[..HEAD].try_into().unwrap()),
            Head::Control {
                version: 3,
                kind: kind::RST_STREAM,
                flags: 0,
                length: 8
            }
        );
        assert_eq!(frame[HEAD..], [0, 0, 0, 5, 0, 0, 0, 3]);
    }
}
