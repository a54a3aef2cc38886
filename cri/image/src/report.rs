//! What an unpack worker answers: one line of JSON, bounded, and checked again by the daemon.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::Digest;

/// The longest answer that the daemon reads.
pub(crate) const MAX_REPORT_BYTES: u64 = 8 << 20;
/// Bytes of the header in front of the compressed stream.
pub(crate) const LIMITS_BYTES: usize = 24;

/// What one layer may come to, told to the worker in front of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the uncompressed archive.
    pub bytes: u64,
    /// Entries of the archive.
    pub entries: u64,
    /// How much the archive may be larger than its compressed form; the first GiB is free.
    pub ratio: u64,
}

/// A path below the layer's root: plain components joined by `/`, in any bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LayerPath(pub(crate) Vec<u8>);

/// A layer as it was unpacked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Digest of the uncompressed archive.
    pub(crate) diff_id: Digest,
    /// Bytes that the files take, in blocks.
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// The archive has an entry for `/`.
    pub(crate) sets_root: bool,
    /// Directories that hide everything below them in lower layers.
    pub(crate) opaque: Vec<LayerPath>,
    /// Directories that the archive does not mention: their attributes are those of lower layers.
    pub(crate) implied: Vec<LayerPath>,
    /// Hard links whose target is not in this layer: (name, target).
    pub(crate) links: Vec<(LayerPath, LayerPath)>,
    /// Extended attributes that were left out.
    pub(crate) skipped_xattrs: u64,
}

/// The answer of an unpack worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// The layer is unpacked.
    Done(Report),
    /// It cannot be: what was wrong, and at which entry.
    Failed(String),
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            bytes: 128 << 30,
            entries: 8 << 20,
            ratio: 200,
        }
    }
}

impl Limits {
    pub(crate) fn to_bytes(self) -> [u8; LIMITS_BYTES] {
        let mut bytes = [0; LIMITS_BYTES];
        for (slot, value) in bytes
            .chunks_exact_mut(8)
            .zip([self.bytes, self.entries, self.ratio])
        {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn from_bytes(bytes: [u8; LIMITS_BYTES]) -> Limits {
        let value = |at: usize| u64::from_le_bytes(std::array::from_fn(|index| bytes[at + index]));
        Limits {
            bytes: value(0),
            entries: value(8),
            ratio: value(16),
        }
    }
}

impl Report {
    /// Bytes that it keeps in memory for as long as the layers below are on their way.
    pub(crate) fn held_bytes(&self) -> u64 {
        let links = self.links.iter().flat_map(|(name, target)| [name, target]);
        let paths = self.opaque.iter().chain(&self.implied).chain(links);
        let bytes: usize = paths.map(|path| path.0.len() + size_of::<LayerPath>()).sum();
        bytes as u64
    }

    /// Nothing here depends on the layers below.
    pub(crate) fn is_self_contained(&self) -> bool {
        self.implied.is_empty() && self.links.is_empty()
    }
}

impl LayerPath {
    /// The components, from the top.
    pub(crate) fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/')
    }

    fn is_plain(&self) -> bool {
        self.components()
            .all(|name| !name.is_empty() && name != b"." && name != b".." && !name.contains(&0))
    }
}

/// JSON has no bytes, and one character a byte is short and unambiguous.
impl Serialize for LayerPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0.iter().map(|byte| char::from(*byte)).collect::<String>())
    }
}

impl<'de> Deserialize<'de> for LayerPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LayerPath, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = text
            .chars()
            .map(|c| u8::try_from(u32::from(c)))
            .collect::<Result<Vec<u8>, _>>();
        match bytes.map(LayerPath) {
            Ok(path) if path.is_plain() => Ok(path),
            _ => Err(D::Error::custom("not a path below a layer")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_any_bytes_survive_and_bad_ones_are_refused() {
        let path = LayerPath(b"a/\xff\xfe/\"\\\n".to_vec());
        let json = serde_json::to_string(&path).unwrap();
        assert_eq!(serde_json::from_str::<LayerPath>(&json).unwrap(), path);
        for bad in [
            r#""""#,
            r#""/a""#,
            r#""a/../b""#,
            r#""a//b""#,
            r#""a/.""#,
            r#""\u0000""#,
            r#""\u0100""#,
        ] {
            assert!(serde_json::from_str::<LayerPath>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn limits_survive() {
        let limits = Limits {
            bytes: 1,
            entries: u64::MAX,
            ratio: 3,
        };
        assert_eq!(Limits::from_bytes(limits.to_bytes()), limits);
    }
}
