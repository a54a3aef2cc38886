//! Layers as they come over the wire: gzip (of any number of members), zstd, or nothing; told by their first bytes.
//!
//! The media type is not asked: registries hold layers whose media type is wrong, every peer goes by the bytes, and the
//! diff-id decides in the end. Memory is bounded by the window, output by a budget that grows with the input.

use std::io::{self, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;

use crate::report::Limits;

/// Bytes read from the pipe at once.
const BUFFER_BYTES: usize = 128 << 10;
/// As many as the longest magic has.
const MAGIC_BYTES: u64 = 6;
/// The largest window of zstd, 128 MiB: what its highest level uses.
const MAX_WINDOW_LOG: u32 = 27;
/// What the output may come to whatever the input is.
const FREE_BYTES: u64 = 1 << 30;

/// The plain bytes of a layer, within its budget.
pub(crate) struct Decompressor<R: Read> {
    stream: Stream<BufReader<Input<R>>>,
    limits: Limits,
    input_bytes: Arc<AtomicU64>,
    output_bytes: u64,
}

/// The first bytes, which were looked at, and the rest.
type Input<R> = io::Chain<io::Cursor<Vec<u8>>, Counted<R>>;

enum Stream<R: io::BufRead> {
    Plain(R),
    Gzip(Box<MultiGzDecoder<R>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, R>>),
}

/// Counts what goes through.
struct Counted<R> {
    input: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Decompressor<R> {
    /// Looks at the first bytes and takes the decoder for them.
    pub(crate) fn new(input: R, limits: Limits) -> io::Result<Decompressor<R>> {
        let input_bytes = Arc::new(AtomicU64::new(0));
        let mut counted = Counted {
            input,
            count: Arc::clone(&input_bytes),
        };
        let mut start = Vec::new();
        (&mut counted).take(MAGIC_BYTES).read_to_end(&mut start)?;
        let format = sniff(&start)?;
        let input = BufReader::with_capacity(BUFFER_BYTES, io::Cursor::new(start).chain(counted));
        let stream = match format {
            Format::Plain => Stream::Plain(input),
            Format::Gzip => Stream::Gzip(Box::new(MultiGzDecoder::new(input))),
            Format::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
                decoder.window_log_max(MAX_WINDOW_LOG)?;
                Stream::Zstd(Box::new(decoder))
            }
        };
        Ok(Decompressor {
            stream,
            limits,
            input_bytes,
            output_bytes: 0,
        })
    }
}

impl<R: Read> Read for Decompressor<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = match &mut self.stream {
            Stream::Plain(input) => input.read(buffer),
            Stream::Gzip(decoder) => decoder.read(buffer),
            Stream::Zstd(decoder) => decoder.read(buffer),
        }?;
        self.output_bytes += count as u64;
        let grown = self
            .input_bytes
            .load(Ordering::Relaxed)
            .saturating_mul(self.limits.ratio);
        if self.output_bytes > self.limits.bytes || self.output_bytes > grown.saturating_add(FREE_BYTES) {
            return Err(invalid("layer unpacks to more than its budget"));
        }
        Ok(count)
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.count.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Plain,
    Gzip,
    Zstd,
}

/// Tells the format from the first bytes.
fn sniff(start: &[u8]) -> io::Result<Format> {
    match start {
        [] => Err(invalid("layer is empty")),
        [0x1f, 0x8b, ..] => Ok(Format::Gzip),
        // A frame, or a skippable frame in front of it.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Format::Zstd),
        [b'B', b'Z', b'h', ..] => Err(invalid("bzip2 layers are not supported")),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Err(invalid("xz layers are not supported")),
        _ => Ok(Format::Plain),
    }
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd_bytes(bytes: &[u8]) -> Vec<u8> {
        zstd::stream::encode_all(bytes, 3).unwrap()
    }

    fn plain(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        Decompressor::new(bytes, Limits::default())?.read_to_end(&mut text)?;
        Ok(text)
    }

    #[test]
    fn formats_are_told_by_their_bytes() {
        for packed in [
            b"plain text".to_vec(),
            gzip(b"plain text"),
            zstd_bytes(b"plain text"),
        ] {
            assert_eq!(plain(&packed).unwrap(), b"plain text");
        }
        for unknown in [&b"BZh9x"[..], b"\xfd7zXZ\0", b""] {
            plain(unknown).unwrap_err();
        }
    }

    #[test]
    fn members_and_frames_are_joined() {
        assert_eq!(
            plain(&[gzip(b"a"), gzip(b""), gzip(b"b")].concat()).unwrap(),
            b"ab"
        );
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"xyz"].concat();
        assert_eq!(
            plain(&[skippable, zstd_bytes(b"a"), zstd_bytes(b"b")].concat()).unwrap(),
            b"ab"
        );
        let named = flate2::GzBuilder::new()
            .filename("name")
            .comment("text")
            .extra(vec![1, 2, 3]);
        let mut encoder = named.write(Vec::new(), flate2::Compression::fast());
        encoder.write_all(b"named").unwrap();
        assert_eq!(plain(&encoder.finish().unwrap()).unwrap(), b"named");
    }

    #[test]
    fn damage_is_an_error() {
        let text = b"some text that is long enough to be cut somewhere in the middle".repeat(50);
        for packed in [gzip(&text), zstd_bytes(&text)] {
            for length in 1..packed.len() {
                assert_ne!(
                    plain(&packed[..length]).ok(),
                    Some(text.clone()),
                    "cut at {length}"
                );
                if length > 4 {
                    assert!(plain(&packed[..length]).is_err(), "cut at {length}");
                }
            }
        }
        let mut wrong_crc = gzip(&text);
        let crc = wrong_crc.len() - 6;
        wrong_crc[crc] ^= 1;
        plain(&wrong_crc).unwrap_err();
        let mut wrong_size = gzip(&text);
        let last = wrong_size.len() - 1;
        wrong_size[last] ^= 1;
        plain(&wrong_size).unwrap_err();
        plain(&[gzip(&text), b"garbage".to_vec()].concat()).unwrap_err();
        plain(&[zstd_bytes(&text), b"garbage".to_vec()].concat()).unwrap_err();
    }

    #[test]
    fn a_window_beyond_the_limit_is_refused() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(28).unwrap();
        encoder.write_all(&[0; 1000]).unwrap();
        // Without the size in its header the window is what the decoder must allot.
        let packed = encoder.finish().unwrap();
        assert!(
            plain(&packed)
                .unwrap_err()
                .to_string()
                .to_lowercase()
                .contains("memory")
        );
    }

    #[test]
    fn a_bomb_stops_at_its_budget() {
        let limits = Limits {
            bytes: 1 << 20,
            ..Limits::default()
        };
        let packed = gzip(&vec![0; 2 << 20]);
        let mut stream = Decompressor::new(packed.as_slice(), limits).unwrap();
        let error = io::copy(&mut stream, &mut io::sink()).unwrap_err();
        assert!(error.to_string().contains("budget"), "{error}");
    }
}
