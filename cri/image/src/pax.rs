//! PAX extended headers: `length key=value\n` records that override fields of the next entry.

use std::collections::BTreeSet;

use coracle_kernel::file::Time;

use crate::tar::TarError;

/// The longest name of an extended attribute.
const MAX_XATTR_NAME_BYTES: usize = 255;
/// The longest value of an extended attribute.
const MAX_XATTR_VALUE_BYTES: usize = 64 << 10;
/// Prefix of the keys that carry extended attributes.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// What a PAX header says instead of the entry's own header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Overrides {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<u64>,
    pub(crate) gid: Option<u64>,
    pub(crate) time: Option<Time>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Overrides {
    /// Whether an entry looks different with these than without.
    pub(crate) fn changes_entries(&self) -> bool {
        *self != Overrides::default()
    }
}

/// Parses all records of a header. A key given twice is refused: not all readers take the last.
pub(crate) fn parse(mut records: &[u8]) -> Result<Overrides, TarError> {
    let mut overrides = Overrides::default();
    let mut keys = BTreeSet::new();
    while !records.is_empty() {
        let (key, value, rest) = record(records)?;
        records = rest;
        if !keys.insert(key) {
            return Err(TarError::Ambiguous("a PAX header with a key given twice"));
        }
        // An empty value takes the override back, so the entry's own field stands.
        if value.is_empty() && !key.starts_with(XATTR) {
            continue;
        }
        match key {
            b"path" => overrides.path = Some(text(value)?),
            b"linkpath" => overrides.link = Some(text(value)?),
            b"size" => overrides.size = Some(decimal(value)?),
            b"uid" => overrides.uid = Some(decimal(value)?),
            b"gid" => overrides.gid = Some(decimal(value)?),
            b"mtime" => overrides.time = Some(time(value)?),
            key if key.starts_with(b"GNU.sparse.") || key == b"SCHILY.realsize" => {
                return Err(TarError::Unsupported("sparse entries"));
            }
            key => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    let length = 1..=MAX_XATTR_NAME_BYTES;
                    if !length.contains(&name.len()) || value.len() > MAX_XATTR_VALUE_BYTES {
                        return Err(TarError::Pax("an extended attribute out of bounds"));
                    }
                    overrides.xattrs.push((name.to_vec(), value.to_vec()));
                }
                // Names of owners, access times, comments, what vendors add: nothing that is applied.
            }
        }
    }
    overrides.xattrs.sort();
    Ok(overrides)
}

/// Key, value, and what follows the record.
type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// Splits the first record off.
fn record(records: &[u8]) -> Result<Record<'_>, TarError> {
    let space = records
        .iter()
        .position(|byte| *byte == b' ')
        .ok_or(TarError::Pax("a record without length"))?;
    let length = usize::try_from(decimal(&records[..space])?).unwrap_or(usize::MAX);
    if length > records.len() || length < space + 2 || records[length - 1] != b'\n' {
        return Err(TarError::Pax("a record with a wrong length"));
    }
    let (record, rest) = records.split_at(length);
    let record = &record[space + 1..length - 1];
    let equals = record
        .iter()
        .position(|byte| *byte == b'=')
        .ok_or(TarError::Pax("a record without a key"))?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    if key.is_empty() || key.contains(&0) {
        return Err(TarError::Pax("a record with a malformed key"));
    }
    Ok((key, value, rest))
}

fn text(value: &[u8]) -> Result<Vec<u8>, TarError> {
    if value.contains(&0) {
        return Err(TarError::Pax("a path with a NUL byte"));
    }
    Ok(value.to_vec())
}

/// Digits alone: neither sign nor space.
fn decimal(digits: &[u8]) -> Result<u64, TarError> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(TarError::Pax("a number that is none"));
    }
    let text = std::str::from_utf8(digits).unwrap_or_default();
    text.parse()
        .map_err(|_| TarError::Pax("a number that is too large"))
}

/// Seconds with an optional sign and fraction; what is finer than nanoseconds is cut off.
fn time(value: &[u8]) -> Result<Time, TarError> {
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, value),
    };
    let (whole, fraction) = match digits.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&digits[..dot], &digits[dot + 1..]),
        None => (digits, &b""[..]),
    };
    let seconds = i64::try_from(decimal(whole)?).map_err(|_| TarError::Pax("a time out of range"))?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(TarError::Pax("a number that is none"));
    }
    let digit = |at: usize| fraction.get(at).map_or(0, |byte| u32::from(byte - b'0'));
    let nanoseconds = (0..9).fold(0, |value, at| value * 10 + digit(at));
    Ok(match (negative, nanoseconds) {
        (false, _) => Time { seconds, nanoseconds },
        (true, 0) => Time {
            seconds: -seconds,
            nanoseconds: 0,
        },
        // -1.25 s is 0.75 s after -2 s.
        (true, _) => Time {
            seconds: -seconds - 1,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(records: &[(&str, &str)]) -> Vec<u8> {
        let mut header = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length += 1;
            }
            header.extend(format!("{length} {key}={value}\n").into_bytes());
        }
        header
    }

    #[test]
    fn records_override_fields() {
        let parsed = parse(&header(&[
            ("path", "a b\n=c"),
            ("size", "17"),
            ("uid", "4000000000"),
            ("mtime", "-1.25"),
            ("SCHILY.xattr.user.b", "x\0y"),
            ("SCHILY.xattr.user.a", ""),
            ("comment", "nothing"),
            ("linkpath", ""),
        ]))
        .unwrap();
        assert_eq!(parsed.path.as_deref(), Some(&b"a b\n=c"[..]));
        assert_eq!(
            (parsed.size, parsed.uid, parsed.link.clone()),
            (Some(17), Some(4_000_000_000), None)
        );
        assert_eq!(
            parsed.time,
            Some(Time {
                seconds: -2,
                nanoseconds: 750_000_000
            })
        );
        assert_eq!(parsed.xattrs[0], (b"user.a".to_vec(), vec![]));
        assert_eq!(parsed.xattrs[1], (b"user.b".to_vec(), b"x\0y".to_vec()));
        assert!(!parse(&header(&[("comment", "x")])).unwrap().changes_entries());
    }

    #[test]
    fn times_are_exact() {
        let at = |text: &str| time(text.as_bytes()).map(|time| (time.seconds, time.nanoseconds));
        assert_eq!(at("0").unwrap(), (0, 0));
        assert_eq!(at("1.5").unwrap(), (1, 500_000_000));
        assert_eq!(at("-3").unwrap(), (-3, 0));
        assert_eq!(at("1.0000000019").unwrap(), (1, 1));
        assert_eq!(at("9223372036854775807").unwrap(), (i64::MAX, 0));
        for bad in [
            "",
            "-",
            ".5",
            "nan",
            "1e5",
            "+1",
            "--1",
            "1.x",
            "9223372036854775808",
            " 1",
        ] {
            assert!(at(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"x"[..],
            b"11 path=abc",
            b"12 path=abcd\n",
            b"99 path=abc\n",
            b"3 \n",
            b"5 ab\n",
            b"5 =a\n",
            b"011 path=ab\n12 path=ab\n",
            b"-9 path=a\n",
            b"99999999999999999999 a=b\n",
            b"10 path=a\0\n",
            b"11 size=-1\n",
            b"10 size= \n",
            b"9 size=x\n",
        ] {
            assert!(parse(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
        assert!(matches!(
            parse(&header(&[("path", "a"), ("path", "b")])),
            Err(TarError::Ambiguous(_))
        ));
        assert!(matches!(
            parse(&header(&[("GNU.sparse.map", "0,1")])),
            Err(TarError::Unsupported(_))
        ));
        let long = "v".repeat(MAX_XATTR_VALUE_BYTES + 1);
        parse(&header(&[("SCHILY.xattr.user.x", &long)])).unwrap_err();
    }
}
