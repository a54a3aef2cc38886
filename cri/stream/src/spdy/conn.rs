//! A connection: frames are cut out of the bytes that arrive, streams are counted, events come out.

use std::collections::HashMap;
use std::collections::VecDeque;

use bytes::{Buf as _, Bytes, BytesMut};

use super::frame::{FIN, HEAD, Head, Reason, UNIDIRECTIONAL, VERSION, kind};
use super::header::{Headers, Inflater, MOST_COMPRESSED};
use super::{Error, frame};

/// Most bytes of a control frame: a header block and what stands before it. SETTINGS have less.
const MOST_CONTROL: usize = MOST_COMPRESSED + 16;

/// What a peer has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// A stream, to be accepted or refused.
    Opened { stream: u32, headers: Headers },
    /// Bytes of an open stream; a long frame comes in pieces.
    Data { stream: u32, bytes: Bytes },
    /// The peer sends no more on this stream.
    Finished { stream: u32 },
    /// The peer has given the stream up, in both directions. It is forgotten.
    Reset { stream: u32 },
    /// To be written back as it is: an answered PING, a stream that cannot be.
    Answer(Vec<u8>),
}

/// The state of the side that reads.
pub(crate) struct Connection {
    inflater: Inflater,
    /// Open streams, and whether the peer may still send on them.
    streams: HashMap<u32, bool>,
    most_streams: usize,
    /// The highest number that the peer has opened.
    last: u32,
    payload: Option<Payload>,
    /// The second of two events that one frame makes.
    later: VecDeque<Event>,
}

/// A DATA frame of which a part is still to come.
struct Payload {
    stream: u32,
    left: usize,
    fin: bool,
}

impl Connection {
    /// A fresh connection on which the peer may have this many streams at once.
    pub(crate) fn new(most_streams: usize) -> Connection {
        Connection {
            inflater: Inflater::new(),
            streams: HashMap::new(),
            most_streams,
            last: 0,
            payload: None,
            later: VecDeque::new(),
        }
    }

    /// Takes the next event out of what has arrived; `None` when more bytes are needed. A control frame is waited for
    /// whole (at most 16 KiB), data is not.
    pub(crate) fn next(&mut self, input: &mut BytesMut) -> Result<Option<Event>, Error> {
        loop {
            if let Some(event) = self.later.pop_front() {
                return Ok(Some(event));
            }
            if let Some(payload) = self.payload.take() {
                match self.data(payload, input) {
                    Step::Event(event) => return Ok(Some(event)),
                    Step::Wait => return Ok(None),
                    Step::Next => continue,
                }
            }
            let Some(head) = input.first_chunk::<HEAD>() else {
                return Ok(None);
            };
            match Head::parse(*head) {
                Head::Data {
                    stream,
                    flags,
                    length,
                } => {
                    if stream == 0 {
                        return Err(Error::StreamZero(0));
                    }
                    input.advance(HEAD);
                    self.payload = Some(Payload {
                        stream,
                        left: length,
                        fin: flags & FIN != 0,
                    });
                }
                Head::Control { version, .. } if version != VERSION => return Err(Error::Version(version)),
                Head::Control {
                    kind, flags, length, ..
                } => {
                    if length > MOST_CONTROL {
                        return Err(Error::Length { kind, length });
                    }
                    if input.len() < HEAD + length {
                        return Ok(None);
                    }
                    input.advance(HEAD);
                    let body = input.split_to(length);
                    if let Some(event) = self.control(kind, flags, &body)? {
                        return Ok(Some(event));
                    }
                }
            }
        }
    }

    /// Forgets a stream: what still comes for it is dropped, and it no longer counts.
    pub(crate) fn forget(&mut self, stream: u32) {
        self.streams.remove(&stream);
    }

    fn data(&mut self, mut payload: Payload, input: &mut BytesMut) -> Step {
        let open = self.streams.get(&payload.stream).copied().unwrap_or(false);
        let (stream, fin) = (payload.stream, payload.fin);
        if payload.left > 0 {
            if input.is_empty() {
                self.payload = Some(payload);
                return Step::Wait;
            }
            let bytes = input.split_to(payload.left.min(input.len()));
            payload.left -= bytes.len();
            self.payload = Some(payload);
            return match open {
                true => Step::Event(Event::Data {
                    stream,
                    bytes: bytes.freeze(),
                }),
                // it may have been closed while this was on its way
                false => Step::Next,
            };
        }
        if fin && open {
            self.streams.insert(stream, false);
            return Step::Event(Event::Finished { stream });
        }
        Step::Next
    }

    fn control(&mut self, kind: u16, flags: u8, body: &[u8]) -> Result<Option<Event>, Error> {
        let wrong = Error::Length {
            kind,
            length: body.len(),
        };
        match kind {
            kind::SYN_STREAM => {
                let (fixed, block) = body.split_first_chunk::<10>().ok_or(wrong)?;
                let stream = stream_of(kind, fixed)?;
                // read even if the stream is refused: the next block builds on this one
                let headers = self.inflater.block(block)?;
                Ok(Some(self.opened(stream, flags, headers)))
            }
            kind::SYN_REPLY | kind::HEADERS => {
                let (fixed, block) = body.split_first_chunk::<4>().ok_or(wrong)?;
                let stream = stream_of(kind, fixed)?;
                self.inflater.block(block)?;
                if flags & FIN != 0 && self.streams.get(&stream) == Some(&true) {
                    self.streams.insert(stream, false);
                    return Ok(Some(Event::Finished { stream }));
                }
                Ok(None)
            }
            kind::RST_STREAM => {
                let fixed = body.first_chunk::<8>().ok_or(wrong)?;
                let stream = stream_of(kind, fixed)?;
                Ok(self.streams.remove(&stream).map(|_| Event::Reset { stream }))
            }
            kind::PING => {
                let number = u32::from_be_bytes(*body.first_chunk::<4>().ok_or(wrong)?);
                // a client's numbers are odd; an even one would answer a question that we never ask
                Ok((!number.is_multiple_of(2)).then(|| Event::Answer(frame::ping(number))))
            }
            kind::GOAWAY | kind::WINDOW_UPDATE if body.len() != 8 => Err(wrong),
            kind::SETTINGS if body.len() < 4 || !(body.len() - 4).is_multiple_of(8) => Err(wrong),
            // Nothing to do: the peer closes the connection after GOAWAY, no setting means anything without windows,
            // and frames of unknown types are to be ignored.
            _ => Ok(None),
        }
    }

    fn opened(&mut self, stream: u32, flags: u8, headers: Headers) -> Event {
        if stream.is_multiple_of(2) || stream <= self.last || flags & UNIDIRECTIONAL != 0 {
            return Event::Answer(frame::reset(stream, Reason::Protocol));
        }
        self.last = stream;
        if self.streams.len() >= self.most_streams {
            return Event::Answer(frame::reset(stream, Reason::Refused));
        }
        let fin = flags & FIN != 0;
        self.streams.insert(stream, !fin);
        if fin {
            self.later.push_back(Event::Finished { stream });
        }
        Event::Opened { stream, headers }
    }
}

/// What a piece of data comes to.
enum Step {
    Event(Event),
    Wait,
    Next,
}

fn stream_of(kind: u16, body: &[u8]) -> Result<u32, Error> {
    let bytes = body.first_chunk::<4>().copied().unwrap_or_default();
    match u32::from_be_bytes(bytes) & 0x7fff_ffff {
        0 => Err(Error::StreamZero(kind)),
        stream => Ok(stream),
    }
}
