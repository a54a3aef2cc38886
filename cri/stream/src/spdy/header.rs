//! Header blocks: one zlib stream a connection and direction, with a dictionary; bounded before and after inflating.

use flate2::{Decompress, FlushDecompress, Status};

use super::Error;
use super::dict::DICTIONARY;

/// Most bytes of a compressed block.
pub(crate) const MOST_COMPRESSED: usize = 16 << 10;
/// Most bytes that a block may inflate to.
const MOST_INFLATED: usize = 64 << 10;
/// Most headers of a block.
const MOST_HEADERS: u32 = 64;
/// Longest value that we keep.
const LONGEST_VALUE: usize = 256;
/// How much the output grows at a time.
const STEP: usize = 4 << 10;

/// The headers of a stream that mean something to us.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Headers {
    /// `streamType`: error, stdin, stdout, stderr, resize, data.
    pub(crate) stream_type: Option<String>,
    /// `port`, of port-forward.
    pub(crate) port: Option<String>,
    /// `requestID`: what an error and a data stream have in common.
    pub(crate) request_id: Option<String>,
}

/// Reads the blocks of one direction of a connection, in their order.
pub(crate) struct Inflater {
    stream: Decompress,
}

impl Inflater {
    pub(crate) fn new() -> Inflater {
        Inflater {
            stream: Decompress::new(true),
        }
    }

    /// Reads the next block. An error is the end of the connection: what follows cannot be inflated any more.
    pub(crate) fn block(&mut self, compressed: &[u8]) -> Result<Headers, Error> {
        if compressed.len() > MOST_COMPRESSED {
            return Err(Error::Headers("too many compressed bytes"));
        }
        parse(&self.inflate(compressed)?)
    }

    fn inflate(&mut self, mut input: &[u8]) -> Result<Vec<u8>, Error> {
        let mut output = Vec::with_capacity(STEP);
        loop {
            if output.len() == output.capacity() {
                if output.len() >= MOST_INFLATED {
                    return Err(Error::Headers("inflates to too many bytes"));
                }
                output.reserve_exact(STEP.min(MOST_INFLATED - output.len()));
            }
            let (seen, made) = (self.stream.total_in(), output.len());
            let result = self
                .stream
                .decompress_vec(input, &mut output, FlushDecompress::Sync);
            let taken = usize::try_from(self.stream.total_in() - seen).unwrap_or(usize::MAX);
            input = input.get(taken..).unwrap_or_default();
            match result {
                Ok(Status::StreamEnd) => return Err(Error::Headers("the compressed stream ends")),
                // all is read, and there was room for more output: nothing is held back
                Ok(_) if input.is_empty() && output.len() < output.capacity() => return Ok(output),
                Ok(_) if taken == 0 && made == output.len() => {
                    return Err(Error::Headers("the compressed stream stands still"));
                }
                Ok(_) => {}
                Err(e) if e.needs_dictionary().is_some() => {
                    self.stream
                        .set_dictionary(&DICTIONARY)
                        .map_err(|_| Error::Headers("another dictionary"))?;
                }
                Err(_) => return Err(Error::Headers("not a zlib stream")),
            }
        }
    }
}

/// Splits an inflated block: a count, then names and values with their lengths before them.
fn parse(mut block: &[u8]) -> Result<Headers, Error> {
    let count = number(&mut block)?;
    if count > MOST_HEADERS {
        return Err(Error::Headers("too many headers"));
    }
    let mut names: Vec<&[u8]> = Vec::new();
    let mut headers = Headers::default();
    for _ in 0..count {
        let (name, value) = (field(&mut block)?, field(&mut block)?);
        if name.is_empty() {
            return Err(Error::Headers("an empty name"));
        }
        if names.contains(&name) {
            return Err(Error::Headers("a name that stands twice"));
        }
        names.push(name);
        let slot = match name.to_ascii_lowercase().as_slice() {
            b"streamtype" => &mut headers.stream_type,
            b"port" => &mut headers.port,
            b"requestid" => &mut headers.request_id,
            _ => continue,
        };
        // several values are separated by NUL: the first counts
        let first = value.split(|byte| *byte == 0).next().unwrap_or_default();
        if first.len() > LONGEST_VALUE {
            return Err(Error::Headers("a long value"));
        }
        let text = std::str::from_utf8(first).map_err(|_| Error::Headers("a value that is not UTF-8"))?;
        *slot = Some(text.to_owned());
    }
    if !block.is_empty() {
        return Err(Error::Headers("bytes after the last header"));
    }
    Ok(headers)
}

fn number(block: &mut &[u8]) -> Result<u32, Error> {
    let (bytes, rest) = block
        .split_first_chunk::<4>()
        .ok_or(Error::Headers("ends too early"))?;
    *block = rest;
    Ok(u32::from_be_bytes(*bytes))
}

fn field<'a>(block: &mut &'a [u8]) -> Result<&'a [u8], Error> {
    let length = number(block)? as usize;
    let (bytes, rest) = block
        .split_at_checked(length)
        .ok_or(Error::Headers("ends too early"))?;
    *block = rest;
    Ok(bytes)
}

/// The client's half, for tests.
#[cfg(test)]
pub(crate) mod deflate {
    use flate2::{Compress, Compression, FlushCompress};

    use super::DICTIONARY;

    /// Writes blocks as Go's client does.
    pub(crate) struct Deflater(Compress);

    impl Deflater {
        pub(crate) fn new() -> Deflater {
            let mut stream = Compress::new(Compression::best(), true);
            stream.set_dictionary(&DICTIONARY).unwrap();
            Deflater(stream)
        }

        pub(crate) fn block(&mut self, headers: &[(&str, &str)]) -> Vec<u8> {
            let mut plain = u32::try_from(headers.len()).unwrap().to_be_bytes().to_vec();
            for text in headers.iter().flat_map(|(name, value)| [name, value]) {
                plain.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
                plain.extend(text.as_bytes());
            }
            self.raw(&plain)
        }

        pub(crate) fn raw(&mut self, plain: &[u8]) -> Vec<u8> {
            let mut out = Vec::with_capacity(plain.len() + 1024);
            self.0.compress_vec(plain, &mut out, FlushCompress::Sync).unwrap();
            out
        }
    }
}

#[cfg(test)]
mod tests {
    use super::deflate::Deflater;
    use super::*;

    #[test]
    fn blocks_of_one_context_are_read_in_order() {
        let (mut client, mut server) = (Deflater::new(), Inflater::new());
        for number in 0..50 {
            let id = number.to_string();
            let block = client.block(&[("streamtype", "data"), ("port", "80"), ("requestid", &id)]);
            let headers = server.block(&block).unwrap();
            assert_eq!(headers.request_id, Some(id));
            assert_eq!(headers.stream_type.as_deref(), Some("data"));
        }
    }

    #[test]
    fn our_replies_are_a_zlib_stream_with_the_dictionary() {
        let mut reader = Inflater::new();
        for first in [true, false, false] {
            let frame = super::super::frame::reply(9, first);
            assert_eq!(reader.block(&frame[12..]), Ok(Headers::default()));
        }
    }

    #[test]
    fn bombs_are_refused() {
        // a thousand to one
        let block = Deflater::new().raw(&vec![0; 200_000]);
        assert!(block.len() < 1000);
        assert_eq!(
            Inflater::new().block(&block),
            Err(Error::Headers("inflates to too many bytes"))
        );
        let wide = vec![7; MOST_COMPRESSED + 1];
        assert_eq!(
            Inflater::new().block(&wide),
            Err(Error::Headers("too many compressed bytes"))
        );
    }

    #[test]
    fn blocks_that_lie_are_refused() {
        let block = |plain: &[u8]| Inflater::new().block(&Deflater::new().raw(plain));
        let early = Err(Error::Headers("ends too early"));
        assert_eq!(block(&[]), early);
        assert_eq!(block(&[0, 0, 0, 1]), early);
        assert_eq!(block(&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 1]), early);
        assert_eq!(block(&[0xff; 4]), Err(Error::Headers("too many headers")));
        assert_eq!(
            block(&[0, 0, 0, 0, 9]),
            Err(Error::Headers("bytes after the last header"))
        );
        assert_eq!(
            Inflater::new().block(b"rubbish"),
            Err(Error::Headers("not a zlib stream"))
        );
        let mut client = Deflater::new();
        let twice = client.block(&[("port", "1"), ("port", "2")]);
        assert_eq!(
            Inflater::new().block(&twice),
            Err(Error::Headers("a name that stands twice"))
        );
    }
}
