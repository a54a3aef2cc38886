//! A row: one line of JSON header, then the JSON body, then the request's original protobuf bytes.
//!
//! The request is kept byte for byte so that a later version can read fields from it which this one does
//! not know. The header carries lengths and a checksum: a row that was damaged below the database is
//! told from one that is merely old.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Schema version that this program writes into each record and into the database.
pub(crate) const SCHEMA: u32 = 1;

/// Oldest program schema that can still work with what this program writes.
pub(crate) const READABLE_BY: u32 = 1;

/// A typed row of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record<T> {
    /// Boot in which the record was written.
    pub boot: String,
    /// What the row says.
    pub body: T,
    /// The request that led to it, as it came; empty where there was none.
    pub request: Vec<u8>,
}

/// Why a row cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// No header line at the front.
    #[error("the record has no header line")]
    NoHeader,
    /// The header is not what this program writes.
    #[error("the header of the record is malformed")]
    Header(#[source] serde_json::Error),
    /// Shorter or longer than the header says.
    #[error("the record holds {found} bytes where its header says {expected}")]
    Length {
        /// Bytes that the header announces.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// The bytes are not those that were written.
    #[error("the checksum of the record does not match")]
    Checksum,
    /// The body does not have the shape of its table.
    #[error("the body of the record is malformed")]
    Body(#[source] serde_json::Error),
}

#[derive(Serialize, Deserialize)]
struct Header {
    schema: u32,
    boot: String,
    body: usize,
    request: usize,
    sum: u64,
}

impl<T: Serialize> Record<T> {
    /// The bytes of the row.
    ///
    /// # Panics
    /// Never for bodies of this project: they are plain structs with string keys.
    #[must_use]
    #[allow(clippy::expect_used)]
    pub fn encode(&self) -> Vec<u8> {
        // A struct of strings, numbers, lists and string-keyed maps always serialises.
        let body = serde_json::to_vec(&self.body).expect("record bodies serialise");
        let header = Header {
            schema: SCHEMA,
            boot: self.boot.clone(),
            body: body.len(),
            request: self.request.len(),
            sum: checksum(&[&body, &self.request]),
        };
        let mut row = serde_json::to_vec(&header).expect("record headers serialise");
        row.push(b'\n');
        row.extend_from_slice(&body);
        row.extend_from_slice(&self.request);
        row
    }
}

impl<T: DeserializeOwned> Record<T> {
    /// Reads a row back.
    ///
    /// A newer schema is no error here: the database as a whole was found readable when it was opened, and
    /// fields that this program does not know are ignored.
    pub fn decode(row: &[u8]) -> Result<Record<T>, RecordError> {
        let end = row
            .iter()
            .position(|byte| *byte == b'\n')
            .ok_or(RecordError::NoHeader)?;
        let header: Header = serde_json::from_slice(&row[..end]).map_err(RecordError::Header)?;
        let rest = &row[end + 1..];
        let expected = header.body.saturating_add(header.request);
        if rest.len() != expected {
            return Err(RecordError::Length {
                expected,
                found: rest.len(),
            });
        }
        let (body, request) = rest.split_at(header.body);
        if checksum(&[body, request]) != header.sum {
            return Err(RecordError::Checksum);
        }
        Ok(Record {
            boot: header.boot,
            body: serde_json::from_slice(body).map_err(RecordError::Body)?,
            request: request.to_vec(),
        })
    }
}

/// The id of the running boot; another one on a record means that everything volatile in it is gone.
pub fn boot_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// FNV-1a: told damage from truth is all that is asked, nobody hostile writes here.
fn checksum(parts: &[&[u8]]) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    for byte in parts.iter().flat_map(|part| part.iter()) {
        sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    struct Body {
        name: String,
        #[serde(default)]
        count: u32,
    }

    fn sample() -> Record<Body> {
        Record {
            boot: "b".into(),
            body: Body {
                name: "line\nbreak".into(),
                count: 3,
            },
            request: vec![0, 10, 255, b'\n'],
        }
    }

    #[test]
    fn a_record_survives_the_round_trip() {
        let record = sample();
        assert_eq!(Record::<Body>::decode(&record.encode()).unwrap(), record);
    }

    #[test]
    fn every_flipped_or_missing_byte_is_noticed() {
        let row = sample().encode();
        for at in 0..row.len() {
            let mut bad = row.clone();
            bad[at] ^= 0x20;
            if let Ok(read) = Record::<Body>::decode(&bad) {
                // The header's own words outside the checksum: schema and boot.
                assert_eq!(read.body, sample().body, "byte {at}");
                assert_eq!(read.request, sample().request, "byte {at}");
            }
            assert!(Record::<Body>::decode(&row[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn unknown_fields_of_a_newer_program_are_ignored() {
        #[derive(Serialize)]
        struct Newer {
            name: String,
            count: u32,
            added: bool,
        }
        let newer = Record {
            boot: String::new(),
            body: Newer {
                name: "x".into(),
                count: 1,
                added: true,
            },
            request: Vec::new(),
        };
        assert_eq!(Record::<Body>::decode(&newer.encode()).unwrap().body.name, "x");
    }
}
