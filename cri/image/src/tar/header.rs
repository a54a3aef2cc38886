//! One header block: its fields, and the entry that it describes together with the headers before it.

use coracle_kernel::file::Time;

use super::{BLOCK, Entry, Kind, MAX_PATH_BYTES, Path, TarError, shown};
use crate::pax::Overrides;

/// The largest size that a header's octal field can say.
const MAX_OCTAL_SIZE: u64 = 0o777_7777_7777;

/// A header block.
pub(super) struct Header<'a> {
    pub(super) block: &'a [u8; BLOCK],
}

/// Which of the formats a header is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    /// Before 1988: no magic.
    V7,
    Ustar,
    Gnu,
}

impl Header<'_> {
    fn field(&self, at: usize, length: usize) -> &[u8] {
        &self.block[at..at + length]
    }

    /// A text field up to its first NUL.
    fn text(&self, at: usize, length: usize) -> &[u8] {
        let field = self.field(at, length);
        field.split(|byte| *byte == 0).next().unwrap_or(field)
    }

    pub(super) fn flag(&self) -> u8 {
        self.block[156]
    }

    pub(super) fn size(&self) -> Result<u64, TarError> {
        u64::try_from(number(self.field(124, 12))?).map_err(|_| TarError::Header("a negative size"))
    }

    /// The checksum is over the block with its own field as spaces; old writers took bytes as signed.
    pub(super) fn check(&self) -> Result<(), TarError> {
        let said = number(self.field(148, 8))?;
        let bytes = || {
            self.block
                .iter()
                .enumerate()
                .map(|(at, byte)| if (148..156).contains(&at) { b' ' } else { *byte })
        };
        let unsigned: i64 = bytes().map(i64::from).sum();
        let signed: i64 = bytes().map(|byte| i64::from(byte.cast_signed())).sum();
        if said != unsigned && said != signed {
            return Err(TarError::Header("its checksum is wrong"));
        }
        Ok(())
    }

    fn format(&self) -> Result<Format, TarError> {
        match self.field(257, 8) {
            b"ustar\x0000" if self.field(508, 4) == b"tar\0" => {
                Err(TarError::Unsupported("archives of star"))
            }
            b"ustar\x0000" => Ok(Format::Ustar),
            b"ustar  \0" => Ok(Format::Gnu),
            [0, 0, 0, 0, 0, 0, 0, 0] => Ok(Format::V7),
            _ => Err(TarError::Header("unknown magic")),
        }
    }

    pub(super) fn entry(
        &self,
        overrides: Overrides,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, TarError> {
        let format = self.format()?;
        let own_path = match (format, self.text(345, 155)) {
            (Format::Ustar, prefix) if !prefix.is_empty() => [prefix, self.text(0, 100)].join(&b'/'),
            _ => self.text(0, 100).to_vec(),
        };
        let raw_path = overrides.path.or(long_path).unwrap_or(own_path);
        let path = Path::parse(&raw_path)?;
        let link = overrides
            .link
            .or(long_link)
            .unwrap_or_else(|| self.text(157, 100).to_vec());
        let own_size = self.size()?;
        let size = match overrides.size {
            // The header's field cannot hold more than 8 GiB in octal; below, the two must agree.
            Some(size) if size != own_size && size <= MAX_OCTAL_SIZE => {
                return Err(TarError::Ambiguous("an entry with two different sizes"));
            }
            Some(size) => size,
            None => own_size,
        };
        if i64::try_from(size).is_err() {
            return Err(TarError::Header("a size beyond any file"));
        }
        let is_slashed = raw_path.ends_with(b"/");
        let kind = match self.flag() {
            0 if is_slashed => Kind::Directory,
            0 | b'0' | b'7' if is_slashed => {
                return Err(TarError::Ambiguous("a file whose name ends in a slash"));
            }
            0 | b'0' | b'7' => Kind::File,
            b'1' => Kind::HardLink(Path::parse(&link)?),
            b'2' => Kind::Symlink(symlink_target(link)?),
            b'3' => Kind::CharDevice(self.device(329)?, self.device(337)?),
            b'4' => Kind::BlockDevice(self.device(329)?, self.device(337)?),
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => return Err(TarError::Unsupported("sparse entries")),
            b'M' | b'V' => return Err(TarError::Unsupported("archives of several volumes")),
            _ => return Err(TarError::Unsupported("entries of an unknown type")),
        };
        if size > 0 && kind != Kind::File {
            return Err(TarError::Ambiguous("data behind an entry that is no file"));
        }
        if path.0.is_empty() && kind != Kind::Directory {
            return Err(TarError::Path(
                shown(&raw_path),
                "the root can only be a directory",
            ));
        }
        let id = |said: Option<u64>, at| match said {
            Some(id) => id_of(i64::try_from(id).unwrap_or(i64::MAX)),
            None => id_of(number(self.field(at, 8))?),
        };
        let time = match overrides.time {
            Some(time) => time,
            None => Time {
                seconds: number(self.field(136, 12))?,
                nanoseconds: 0,
            },
        };
        Ok(Entry {
            path,
            kind,
            mode: u32::try_from(number(self.field(100, 8))? & 0o7777).unwrap_or_default(),
            uid: id(overrides.uid, 108)?,
            gid: id(overrides.gid, 116)?,
            time,
            size,
            xattrs: overrides.xattrs,
        })
    }

    /// A device number; Linux has 12 bits for the major and 20 for the minor one, and both fit 20.
    fn device(&self, at: usize) -> Result<u32, TarError> {
        let limit = if at == 329 { 1 << 12 } else { 1 << 20 };
        let value = number(self.field(at, 8))?;
        u32::try_from(value)
            .ok()
            .filter(|value| *value < limit)
            .ok_or(TarError::Header("a device number out of range"))
    }
}

/// A numeric field: octal digits between spaces and NULs, or base-256 with the top bit set. Empty is 0.
pub(super) fn number(field: &[u8]) -> Result<i64, TarError> {
    const MALFORMED: TarError = TarError::Header("a number that is none");
    if field[0] & 0x80 != 0 {
        // Two's complement over all bits but the mark.
        let negative = field[0] & 0x40 != 0;
        let mut value: i64 = if negative { -1 } else { 0 };
        for (at, byte) in field.iter().enumerate() {
            let byte = match at {
                0 if negative => byte | 0x80,
                0 => byte & 0x7f,
                _ => *byte,
            };
            let shifted = value.checked_mul(256).ok_or(MALFORMED)?;
            // The first byte carries the sign itself.
            value = if at == 0 {
                i64::from(byte.cast_signed())
            } else {
                shifted | i64::from(byte)
            };
        }
        return Ok(value);
    }
    let padding = |byte: &u8| *byte == b' ' || *byte == 0;
    let start = field
        .iter()
        .position(|byte| !padding(byte))
        .unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(padding).unwrap_or(digits.len());
    let (digits, rest) = digits.split_at(end);
    if !rest.iter().all(padding) {
        return Err(MALFORMED);
    }
    digits.iter().try_fold(0_i64, |value, digit| match digit {
        b'0'..=b'7' => Ok(value * 8 + i64::from(digit - b'0')),
        _ => Err(MALFORMED),
    })
}

/// The kernel reads the highest id as "leave it as it is".
fn id_of(value: i64) -> Result<u32, TarError> {
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or(TarError::Header("an owner out of range"))
}

fn symlink_target(target: Vec<u8>) -> Result<Vec<u8>, TarError> {
    if target.is_empty() || target.len() as u64 >= MAX_PATH_BYTES || target.contains(&0) {
        return Err(TarError::Path(shown(&target), "not the target of a symlink"));
    }
    Ok(target)
}
