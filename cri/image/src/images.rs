//! All images in memory, by id and by name.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

use coracle_snapshot::LayerDir;

use crate::content::{Annotations, Listed};
use crate::digest::Digest;
use crate::manifest::ImageConfig;
use crate::records::ImageRecord;
use crate::reference::Reference;

/// The fewest digits that an image's id may be shortened to.
const MIN_SHORT_ID: usize = 3;

/// An image as everybody sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Digest of its configuration.
    pub id: Digest,
    /// `repository:tag` names, sorted.
    pub tags: Vec<Reference>,
    /// `repository@digest` names, sorted.
    pub digests: Vec<Reference>,
    /// Bytes on the disk, layers shared with others included.
    pub size: u64,
    /// When it was first brought in.
    pub created_at: SystemTime,
    /// Garbage collectors are told to keep it.
    pub pinned: bool,
    /// What it says about running it.
    pub config: ImageConfig,
    /// Its layers, lowest first; empty for an empty image.
    pub layers: Vec<LayerDir>,
}

/// All images at one moment.
#[derive(Debug, Default)]
pub(crate) struct Images {
    pub(crate) by_id: BTreeMap<String, (ImageRecord, Arc<Image>)>,
    by_name: HashMap<Reference, String>,
}

impl Images {
    pub(crate) fn copy(&self) -> Images {
        Images {
            by_id: self.by_id.clone(),
            by_name: self.by_name.clone(),
        }
    }

    pub(crate) fn insert(&mut self, record: ImageRecord, image: Arc<Image>) {
        let key = record.key();
        self.by_name.retain(|_, id| *id != key);
        for name in record.tags.iter().chain(&record.digests) {
            self.by_name.insert(name.clone(), key.clone());
        }
        self.by_id.insert(key, (record, image));
    }

    pub(crate) fn without(&self, key: &str) -> Images {
        let mut images = self.copy();
        images.by_id.remove(key);
        images.by_name.retain(|_, id| id != key);
        images
    }

    /// A reference with a digest is looked up by it alone, as a pull would.
    pub(crate) fn by_reference(&self, reference: &Reference) -> Option<&str> {
        let name = match reference.digest() {
            Some(digest) => &reference.at_digest(digest),
            None => reference,
        };
        self.by_name.get(name).map(String::as_str)
    }

    pub(crate) fn by_short_id(&self, digits: &str) -> Option<&str> {
        let digits = digits.strip_prefix("sha256:").unwrap_or(digits);
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if digits.len() < MIN_SHORT_ID || !digits.bytes().all(is_digit) {
            return None;
        }
        let mut found = self
            .by_id
            .range(digits.to_owned()..)
            .take_while(|(id, _)| id.starts_with(digits));
        match (found.next(), found.next()) {
            (Some((id, _)), None) => Some(id),
            _ => None,
        }
    }

    /// Everything in `content/` that is wanted.
    pub(crate) fn digests(&self) -> BTreeSet<Digest> {
        let records = || self.by_id.values().map(|(record, _)| record);
        let manifests = records().flat_map(|record| record.manifests.iter().map(|kept| kept.digest.clone()));
        manifests
            .chain(records().map(|record| record.id.clone()))
            .collect()
    }

    /// The images as `content/index.json` lists them: an entry for each name.
    pub(crate) fn listed(&self) -> Vec<Listed> {
        let mut listed = Vec::new();
        for (record, _) in self.by_id.values() {
            let names = record.tags.iter().chain(&record.digests).map(Some);
            let names: Vec<_> = if record.tags.is_empty() && record.digests.is_empty() {
                vec![None]
            } else {
                names.collect()
            };
            for kept in &record.manifests {
                listed.extend(names.iter().map(|name| Listed {
                    media_type: kept.media_type.clone(),
                    digest: kept.digest.clone(),
                    size: kept.size,
                    annotations: Annotations { name: name.cloned() },
                }));
            }
        }
        listed
    }
}
