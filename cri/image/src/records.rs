//! What the image store writes durably, and the seam to whoever keeps it.
//!
//! Layers describe themselves (`layers/<n>/meta`); a record is an image: its names and which layers it is made of.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::manifest::ImageConfig;
use crate::reference::Reference;

/// Version of [`ImageRecord`] as it is written.
pub const SCHEMA: u32 = 1;

/// A future that can be sent between threads.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Durable rows by image id, kept by the daemon's database.
pub trait Records: Send + Sync + 'static {
    /// All rows, read once at start; what cannot be read is the keeper's to report.
    fn load(&self) -> std::io::Result<Vec<(String, Vec<u8>)>>;

    /// Applies all changes in one transaction; they are on the disk when it returns `Ok`.
    fn commit(&self, changes: Vec<Change>) -> Pending<'_, std::io::Result<()>>;
}

/// One change of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The row is made or replaced.
    Put {
        /// Image id, 64 hexadecimal digits.
        key: String,
        /// The record as JSON.
        value: Vec<u8>,
    },
    /// The row is removed, if it is there.
    Delete {
        /// Image id.
        key: String,
    },
}

/// An image as it is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// [`SCHEMA`] of whoever wrote it.
    pub schema: u32,
    /// Digest of the configuration: the image's id.
    pub id: Digest,
    /// Bytes of the configuration.
    pub config_size: u64,
    /// The manifests that it came with, kept in `content/`.
    pub manifests: Vec<KeptManifest>,
    /// `repository:tag` names.
    pub tags: BTreeSet<Reference>,
    /// `repository@digest` names.
    pub digests: BTreeSet<Reference>,
    /// Folder numbers of the layers, lowest first.
    pub layers: Vec<u64>,
    /// When it was first brought in.
    pub created_at: SystemTime,
    /// Garbage collectors are told to keep it.
    pub pinned: bool,
    /// The configuration.
    pub config: ImageConfig,
}

/// A manifest in `content/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptManifest {
    /// Its digest.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// Its bytes.
    pub size: u64,
}

impl ImageRecord {
    /// The image's id as Docker and the kubelet write it: the digits of its digest.
    #[must_use]
    pub fn key(&self) -> String {
        self.id.hex().to_owned()
    }

    /// Bytes of manifests and configuration.
    #[must_use]
    pub fn document_bytes(&self) -> u64 {
        self.config_size + self.manifests.iter().map(|kept| kept.size).sum::<u64>()
    }
}
