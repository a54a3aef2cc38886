//! Window sizes: JSON documents `{"Width":80,"Height":24}`, one after another, cut anywhere.

use coracle_kernel::tty::Size;
use serde::Deserialize;

/// Longest document; what is longer is none of ours.
const LONGEST: usize = 256;

/// The state of a resize stream.
#[derive(Debug, Default)]
pub(crate) struct Resizes {
    /// The document that is not complete yet.
    part: Vec<u8>,
    /// Something came that is no size: nothing more is read.
    broken: bool,
}

#[derive(Deserialize)]
struct Document {
    #[serde(alias = "width", default)]
    #[serde(rename = "Width")]
    width: u16,
    #[serde(alias = "height", default)]
    #[serde(rename = "Height")]
    height: u16,
}

impl Resizes {
    /// The last size that is complete with these bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Option<Size> {
        let mut last = None;
        for part in bytes.chunks(LONGEST) {
            if self.broken {
                break;
            }
            self.part.extend(part);
            last = self.read().or(last);
        }
        last
    }

    fn read(&mut self) -> Option<Size> {
        let mut last = None;
        let mut documents = serde_json::Deserializer::from_slice(&self.part).into_iter::<Document>();
        let mut done = 0;
        for document in documents.by_ref() {
            match document {
                // a terminal without lines or columns is one that does not know its size
                Ok(Document { width: 0, .. } | Document { height: 0, .. }) => {}
                Ok(Document { width, height }) => {
                    last = Some(Size {
                        rows: height,
                        columns: width,
                    });
                }
                Err(e) => {
                    self.broken = !e.is_eof();
                    break;
                }
            }
        }
        done += documents.byte_offset();
        self.part.drain(..done);
        self.broken |= self.part.len() > LONGEST;
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(columns: u16, rows: u16) -> Option<Size> {
        Some(Size { rows, columns })
    }

    #[test]
    fn the_last_complete_size_counts() {
        let mut resizes = Resizes::default();
        assert_eq!(resizes.push(b"{\"Width\":80,\"Hei"), None);
        assert_eq!(
            resizes.push(b"ght\":24}\n{\"width\":100,\"height\":30}{"),
            size(100, 30)
        );
        assert_eq!(resizes.push(b"\"Width\":0,\"Height\":5}"), None);
        assert_eq!(resizes.push(b" {\"Width\":1,\"Height\":2}\n"), size(1, 2));
    }

    #[test]
    fn rubbish_ends_it() {
        for rubbish in [
            &b"]"[..],
            &[b' '; 600],
            b"{\"Width\":70000,\"Height\":1}",
            &[b'['; 1000],
        ] {
            let mut resizes = Resizes::default();
            assert_eq!(resizes.push(rubbish), None);
            let after = resizes.push(b"{\"Width\":1,\"Height\":2}");
            // white space is no rubbish, and is not kept
            assert_eq!(after.is_some(), rubbish[0] == b' ');
            assert!(resizes.part.len() <= 2 * LONGEST);
        }
    }
}
