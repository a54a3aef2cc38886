//! A strict reader of tar archives: ustar, PAX, GNU long names and base-256 numbers, all of it bounded.
//!
//! Where readers are known to disagree about an archive, it is refused instead of read in one of the ways: two sizes for
//! one entry, a header that is described twice, data behind an entry that has none, sparse maps, global overrides.
//! Nothing is guessed and nothing is skipped in silence.

mod header;

use std::io::{self, BufRead};

use coracle_kernel::file::Time;

use crate::pax::{self, Overrides};
use header::Header;

/// Size of every block.
const BLOCK: usize = 512;
/// The most bytes of a PAX header.
const MAX_PAX_BYTES: u64 = 1 << 20;
/// The most bytes of a path or link target: the kernel's own limit.
const MAX_PATH_BYTES: u64 = 4096;
/// The most bytes of one component of a path.
const MAX_NAME_BYTES: usize = 255;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file.
    File,
    /// A further name of the file at this path.
    HardLink(Path),
    /// A symlink with this target.
    Symlink(Vec<u8>),
    /// A character device, major and minor.
    CharDevice(u32, u32),
    /// A block device, major and minor.
    BlockDevice(u32, u32),
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// A path below the archive's root: plain components joined by `/`; empty is the root itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Path(pub(crate) Vec<u8>);

/// One entry. Its data, of a file, follows in the reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: Path,
    pub(crate) kind: Kind,
    /// Permission, set-id and sticky bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) time: Time,
    pub(crate) size: u64,
    /// Extended attributes, sorted by name.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Why an archive is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    #[error("reading the archive")]
    Read(#[source] io::Error),
    #[error("archive ends in the middle of an entry")]
    Truncated,
    #[error("archive has a malformed header: {0}")]
    Header(&'static str),
    #[error("archive has a malformed PAX header: {0}")]
    Pax(&'static str),
    #[error("archive is ambiguous: {0}")]
    Ambiguous(&'static str),
    #[error("{0} are not supported")]
    Unsupported(&'static str),
    #[error("path {0:?} is refused: {1}")]
    Path(String, &'static str),
}

/// Reads entries one after the other.
#[derive(Debug)]
pub(crate) struct Reader<R> {
    input: R,
    /// Data of the present entry that has not been read.
    remaining: u64,
    /// Padding behind it.
    padding: u64,
    ended: bool,
}

impl<R: BufRead> Reader<R> {
    pub(crate) fn new(input: R) -> Reader<R> {
        Reader {
            input,
            remaining: 0,
            padding: 0,
            ended: false,
        }
    }

    /// The next entry; `None` at the end of the archive. Data of the last one that was not read is passed over.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        if self.ended {
            return Ok(None);
        }
        let mut overrides: Option<Overrides> = None;
        let (mut long_path, mut long_link) = (None, None);
        loop {
            self.skip(self.remaining + self.padding)?;
            (self.remaining, self.padding) = (0, 0);
            let described = overrides.is_some() || long_path.is_some() || long_link.is_some();
            let Some(block) = self.header_block()? else {
                self.ended = true;
                return if described {
                    Err(TarError::Truncated)
                } else {
                    Ok(None)
                };
            };
            let header = Header { block: &block };
            header.check()?;
            let is_pax_mixed = |other: bool| match other {
                true => Err(TarError::Ambiguous("an entry with both PAX and GNU headers")),
                false => Ok(()),
            };
            match header.flag() {
                b'x' if overrides.is_some() => {
                    return Err(TarError::Ambiguous("an entry with two PAX headers"));
                }
                b'x' => {
                    is_pax_mixed(long_path.is_some() || long_link.is_some())?;
                    let records = self.special(header.size()?, MAX_PAX_BYTES)?;
                    overrides = Some(pax::parse(&records)?);
                }
                b'g' => {
                    let records = self.special(header.size()?, MAX_PAX_BYTES)?;
                    if pax::parse(&records)?.changes_entries() {
                        return Err(TarError::Ambiguous("a global PAX header that changes entries"));
                    }
                }
                flag @ (b'L' | b'K') => {
                    is_pax_mixed(overrides.is_some())?;
                    let text = self.special(header.size()?, MAX_PATH_BYTES + 1)?;
                    let slot = if flag == b'L' {
                        &mut long_path
                    } else {
                        &mut long_link
                    };
                    if slot.replace(gnu_text(text)?).is_some() {
                        return Err(TarError::Ambiguous("an entry with two GNU long names"));
                    }
                }
                _ => {
                    let entry = header.entry(overrides.unwrap_or_default(), long_path, long_link)?;
                    self.remaining = entry.size;
                    self.padding = entry.size.wrapping_neg() % BLOCK as u64;
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// The next piece of the present entry's data, empty at its end; [`Reader::consume`] says how much was used.
    pub(crate) fn data(&mut self) -> Result<&[u8], TarError> {
        if self.remaining == 0 {
            return Ok(&[]);
        }
        let most = usize::try_from(self.remaining).unwrap_or(usize::MAX);
        let buffer = fill(&mut self.input)?;
        if buffer.is_empty() {
            return Err(TarError::Truncated);
        }
        Ok(&buffer[..buffer.len().min(most)])
    }

    /// Passes over `count` bytes of what [`Reader::data`] returned.
    pub(crate) fn consume(&mut self, count: usize) {
        self.input.consume(count);
        self.remaining -= count as u64;
    }

    /// The input, wherever it stands.
    pub(crate) fn into_inner(self) -> R {
        self.input
    }

    /// A header block that is not zero; `None` at the end: two zero blocks, or nothing more.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let Some(block) = self.block()? else {
            return Ok(None);
        };
        if block != [0; BLOCK] {
            return Ok(Some(block));
        }
        match self.block()? {
            Some(second) if second != [0; BLOCK] => Err(TarError::Header("a single block of zeros")),
            _ => Ok(None),
        }
    }

    /// One block; `None` at the end of the input.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            let buffer = fill(&mut self.input)?;
            if buffer.is_empty() {
                return if filled == 0 {
                    Ok(None)
                } else {
                    Err(TarError::Truncated)
                };
            }
            let count = buffer.len().min(BLOCK - filled);
            block[filled..filled + count].copy_from_slice(&buffer[..count]);
            self.input.consume(count);
            filled += count;
        }
        Ok(Some(block))
    }

    /// The data of a header that describes the next entry.
    fn special(&mut self, size: u64, limit: u64) -> Result<Vec<u8>, TarError> {
        if size > limit {
            return Err(TarError::Header(
                "an extended header larger than any that is needed",
            ));
        }
        (self.remaining, self.padding) = (size, size.wrapping_neg() % BLOCK as u64);
        let mut data = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        while self.remaining > 0 {
            let piece = self.data()?;
            let count = piece.len();
            data.extend_from_slice(piece);
            self.consume(count);
        }
        Ok(data)
    }

    fn skip(&mut self, mut count: u64) -> Result<(), TarError> {
        while count > 0 {
            let available = fill(&mut self.input)?.len();
            if available == 0 {
                return Err(TarError::Truncated);
            }
            let step = available.min(usize::try_from(count).unwrap_or(usize::MAX));
            self.input.consume(step);
            count -= step as u64;
        }
        Ok(())
    }
}

impl Path {
    /// Takes a path of an archive: `/` and `./` in front and empty components mean nothing, `..` is refused.
    pub(crate) fn parse(raw: &[u8]) -> Result<Path, TarError> {
        let refuse = |why| Err(TarError::Path(shown(raw), why));
        if raw.len() as u64 > MAX_PATH_BYTES {
            return refuse("longer than 4096 bytes");
        }
        if raw.contains(&0) {
            return refuse("it contains a NUL byte");
        }
        let mut path = Vec::with_capacity(raw.len());
        for name in raw.split(|byte| *byte == b'/') {
            match name {
                b"" | b"." => {}
                b".." => return refuse("it contains \"..\""),
                name if name.len() > MAX_NAME_BYTES => return refuse("a component is longer than 255 bytes"),
                name => {
                    if !path.is_empty() {
                        path.push(b'/');
                    }
                    path.extend_from_slice(name);
                }
            }
        }
        Ok(Path(path))
    }

    /// The directory and the last component; `None` for the root itself.
    pub(crate) fn split(&self) -> Option<(&[u8], &[u8])> {
        match self.0.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => Some((&self.0[..slash], &self.0[slash + 1..])),
            None if self.0.is_empty() => None,
            None => Some((b"", &self.0)),
        }
    }
}

/// A path for messages: at most 100 characters of it.
pub(crate) fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).chars().take(100).collect()
}

fn fill<R: BufRead>(input: &mut R) -> Result<&[u8], TarError> {
    // Looked at twice, because a borrow that is returned cannot be given up inside a loop.
    while let Err(error) = input.fill_buf() {
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(TarError::Read(error));
        }
    }
    input.fill_buf().map_err(TarError::Read)
}

/// The text of a GNU long name: NULs at the end alone.
fn gnu_text(mut text: Vec<u8>) -> Result<Vec<u8>, TarError> {
    while text.last() == Some(&0) {
        text.pop();
    }
    if text.contains(&0) {
        return Err(TarError::Header("a long name with a NUL byte"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
