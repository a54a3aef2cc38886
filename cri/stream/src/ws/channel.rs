//! Channels: each message begins with the number of the channel that the rest belongs to.

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::{Buf as _, Bytes, BytesMut};

use super::Error;
use super::frame::Piece;

/// The channel number of v5 that means: the channel named in the next byte is closed.
const CLOSE: u8 = 255;

/// With padding on the way out; with or without it on the way in.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What a peer has sent on a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// Bytes; those of one message may come in several events.
    Data { channel: u8, bytes: Bytes },
    /// The peer sends no more on this channel.
    Finished { channel: u8 },
}

/// The state of the side that reads.
#[derive(Debug)]
pub(crate) struct Channels {
    base64: bool,
    half_close: bool,
    message: Message,
}

/// How far into a message we are.
#[derive(Debug, PartialEq, Eq)]
enum Message {
    /// Its first byte has not come.
    Start,
    /// What belongs to this channel; in base64, characters that are no whole group yet.
    Data { channel: u8, group: Vec<u8> },
    /// A close signal; the channel, if it has come.
    Close(Option<u8>),
}

impl Channels {
    /// `base64`: messages are texts, the channel number a digit. `half_close`: channel 255 closes others.
    pub(crate) fn new(base64: bool, half_close: bool) -> Channels {
        Channels {
            base64,
            half_close,
            message: Message::Start,
        }
    }

    /// Takes the next part of a message.
    pub(crate) fn piece(&mut self, piece: Piece) -> Result<Option<Event>, Error> {
        let Piece { mut bytes, last, .. } = piece;
        if self.message == Message::Start && !bytes.is_empty() {
            let number = bytes.get_u8();
            self.message = match number {
                CLOSE if self.half_close => Message::Close(None),
                _ => Message::Data {
                    channel: if self.base64 {
                        number.wrapping_sub(b'0')
                    } else {
                        number
                    },
                    group: Vec::new(),
                },
            };
        }
        let event = match &mut self.message {
            // an empty message means nothing
            Message::Start => None,
            Message::Close(channel) => {
                for byte in bytes {
                    if channel.replace(byte).is_some() {
                        return Err(Error::CloseSignal);
                    }
                }
                match channel {
                    Some(channel) if last => Some(Event::Finished { channel: *channel }),
                    None if last => return Err(Error::CloseSignal),
                    _ => None,
                }
            }
            Message::Data { channel, group } => {
                let bytes = match self.base64 {
                    true => decode(group, &bytes, last)?,
                    false => bytes.freeze(),
                };
                let channel = *channel;
                (!bytes.is_empty()).then_some(Event::Data { channel, bytes })
            }
        };
        if last {
            self.message = Message::Start;
        }
        Ok(event)
    }
}

/// A text message for a channel.
pub(crate) fn encode(channel: u8, bytes: &[u8]) -> Vec<u8> {
    let mut text = String::with_capacity(1 + bytes.len().div_ceil(3) * 4);
    text.push(char::from(b'0' + channel));
    BASE64.encode_string(bytes, &mut text);
    text.into_bytes()
}

/// Decodes the whole groups of four, or everything at the end of a message.
fn decode(group: &mut Vec<u8>, bytes: &BytesMut, last: bool) -> Result<Bytes, Error> {
    group.extend_from_slice(bytes);
    let whole = if last { group.len() } else { group.len() / 4 * 4 };
    let plain = BASE64.decode(&group[..whole]).map_err(|_| Error::Base64)?;
    group.drain(..whole);
    Ok(plain.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(bytes: &[u8], first: bool, last: bool) -> Piece {
        Piece {
            bytes: BytesMut::from(bytes),
            first,
            last,
        }
    }

    fn data(channel: u8, bytes: &'static [u8]) -> Option<Event> {
        let bytes = Bytes::from_static(bytes);
        Some(Event::Data { channel, bytes })
    }

    #[test]
    fn the_first_byte_of_a_message_is_its_channel() {
        let mut channels = Channels::new(false, false);
        assert_eq!(channels.piece(piece(b"", true, true)), Ok(None));
        assert_eq!(channels.piece(piece(b"\0", true, false)), Ok(None));
        assert_eq!(channels.piece(piece(b"in", false, false)), Ok(data(0, b"in")));
        assert_eq!(channels.piece(piece(b"put", false, true)), Ok(data(0, b"put")));
        assert_eq!(channels.piece(piece(b"\x04{}", true, true)), Ok(data(4, b"{}")));
        // no close signal before v5
        assert_eq!(channels.piece(piece(b"\xff\0", true, true)), Ok(data(255, b"\0")));
    }

    #[test]
    fn base64_is_decoded_in_groups() {
        let mut channels = Channels::new(true, false);
        assert_eq!(channels.piece(piece(b"0Zm9", true, false)), Ok(None));
        assert_eq!(channels.piece(piece(b"vYm", false, false)), Ok(data(0, b"foo")));
        assert_eq!(
            channels.piece(piece(b"FyCg==", false, true)),
            Ok(data(0, b"bar\n"))
        );
        assert_eq!(channels.piece(piece(b"4!!!!", true, true)), Err(Error::Base64));
        assert_eq!(encode(1, b"\n"), b"1Cg==");
    }

    #[test]
    fn a_close_signal_names_one_channel() {
        let mut channels = Channels::new(false, true);
        assert_eq!(channels.piece(piece(b"\xff", true, false)), Ok(None));
        assert_eq!(
            channels.piece(piece(b"\0", false, true)),
            Ok(Some(Event::Finished { channel: 0 }))
        );
        for wrong in [&b"\xff"[..], b"\xff\0\0"] {
            let mut channels = Channels::new(false, true);
            assert_eq!(channels.piece(piece(wrong, true, true)), Err(Error::CloseSignal));
        }
    }
}
