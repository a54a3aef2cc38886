//! Manifests and configurations, kept byte for byte: `content/blobs/<algorithm>/<hex>`.
//!
//! Beside them `content/index.json` lists what is kept and under which names, in the form of an OCI layout. It is
//! written after the database and read only where that was lost.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use coracle_kernel::Errno;
use coracle_kernel::path::{self, OFlags};
use coracle_snapshot::tree;
use serde::{Deserialize, Serialize};

use crate::digest::{Algorithm, Digest};
use crate::layers::FileError;
use crate::manifest::{MAX_CONFIG_BYTES, OCI_INDEX};
use crate::reference::Reference;

const INDEX: &str = "index.json";
const INGEST: &str = "ingest";
/// An index of ours is far below this; more is damage.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// A blob whose digest has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    digest: Digest,
    bytes: Vec<u8>,
}

/// Bytes that do not have the digest that they were announced with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("content does not match its digest {expected}")]
pub struct WrongDigest {
    /// What was announced.
    pub expected: Digest,
}

/// A manifest in `index.json`, with one of the names of its image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Listed {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) annotations: Annotations,
}

/// Annotations of a manifest in `index.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Annotations {
    #[serde(rename = "io.containerd.image.name", skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<Reference>,
}

/// The folder `content/`.
#[derive(Debug)]
pub(crate) struct Content {
    root: PathBuf,
    next: AtomicU64,
}

impl Blob {
    /// Bytes that nobody has announced: their digest is what it is.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Blob {
        Blob {
            digest: Digest::sha256(&bytes),
            bytes,
        }
    }

    /// Takes bytes that must have this digest.
    pub fn verified(digest: &Digest, bytes: Vec<u8>) -> Result<Blob, WrongDigest> {
        if !digest.matches(&bytes) {
            return Err(WrongDigest {
                expected: digest.clone(),
            });
        }
        Ok(Blob {
            digest: digest.clone(),
            bytes,
        })
    }

    /// The digest.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Content {
    /// Opens the folder, making what is missing and removing what an interrupted import left.
    pub(crate) fn open(data_root: &Path) -> Result<Content, FileError> {
        let root = data_root.join("content");
        let ingest = root.join(INGEST);
        // Written by archives, so it is removed like any of their trees.
        let clear = || path::open_dir(&root).and_then(|dir| tree::remove(dir, OsStr::new(INGEST)));
        match clear() {
            Err(error) if error.errno() != Errno::ENOENT => {
                return Err(FileError::new("clearing", ingest, error));
            }
            _ => {}
        }
        for folder in [
            &ingest,
            &blobs(&root, Algorithm::Sha256),
            &blobs(&root, Algorithm::Sha512),
        ] {
            fs::create_dir_all(folder).map_err(|error| FileError::new("making", folder, error))?;
        }
        let layout = root.join("oci-layout");
        fs::write(&layout, br#"{"imageLayoutVersion":"1.0.0"}"#)
            .map_err(|error| FileError::new("writing", layout, error))?;
        Ok(Content {
            root,
            next: AtomicU64::new(0),
        })
    }

    /// A new, empty folder in `ingest/`: its name there, and the folder.
    pub(crate) fn spool_dir(&self) -> Result<(OsString, OwnedFd), FileError> {
        let path = self.new_name();
        let open = || {
            fs::DirBuilder::new().mode(0o700).create(&path)?;
            Ok(path::open(&path, OFlags::RDONLY | OFlags::DIRECTORY)?)
        };
        let dir = open().map_err(|error: io::Error| FileError::new("making", &path, error))?;
        Ok((path.file_name().unwrap_or_default().to_owned(), dir))
    }

    /// Removes a folder of [`Content::spool_dir`]; what is left of it goes at the next start.
    pub(crate) fn remove_spool(&self, name: &OsStr) {
        let ingest = self.root.join(INGEST);
        let removed = path::open_dir(&ingest).and_then(|dir| tree::remove(dir, name));
        if let Err(error) = removed {
            tracing::warn!(folder = ?ingest.join(name), %error, "spool folder could not be removed yet");
        }
    }

    /// Keeps a blob: it is on the disk when this returns.
    pub(crate) fn put(&self, blob: &Blob) -> Result<(), FileError> {
        let path = self.path(&blob.digest);
        if self.get(&blob.digest).is_ok() {
            return Ok(());
        }
        self.replace(&path, &blob.bytes)
    }

    /// Reads a blob back; `InvalidData` where it is no longer what it was.
    pub(crate) fn get(&self, digest: &Digest) -> Result<Blob, FileError> {
        let path = self.path(digest);
        let read = || {
            let mut bytes = Vec::new();
            File::open(&path)?
                .take(MAX_CONFIG_BYTES as u64 + 1)
                .read_to_end(&mut bytes)?;
            Blob::verified(digest, bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        };
        read().map_err(|error: io::Error| FileError::new("reading", &path, error))
    }

    /// Removes every blob but these.
    pub(crate) fn retain(&self, wanted: &BTreeSet<Digest>) -> Result<(), FileError> {
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let folder = blobs(&self.root, algorithm);
            let list = || {
                fs::read_dir(&folder)?
                    .map(|entry| Ok(entry?.file_name()))
                    .collect::<io::Result<Vec<_>>>()
            };
            for name in list().map_err(|error| FileError::new("listing", &folder, error))? {
                let digest = name
                    .to_str()
                    .and_then(|hex| format!("{}:{hex}", algorithm.name()).parse().ok());
                if digest.is_some_and(|digest| wanted.contains(&digest)) {
                    continue;
                }
                let path = folder.join(&name);
                fs::remove_file(&path).map_err(|error| FileError::new("removing", path, error))?;
            }
        }
        Ok(())
    }

    /// Writes the list of what is kept.
    pub(crate) fn write_index(&self, manifests: &[Listed]) -> Result<(), FileError> {
        let path = self.root.join(INDEX);
        let index = Index {
            schema_version: 2,
            media_type: OCI_INDEX.into(),
            manifests: manifests.to_vec(),
        };
        let json = serde_json::to_vec(&index).map_err(|error| FileError::new("writing", &path, error))?;
        self.replace(&path, &json)
    }

    /// Reads the list back; `None` where there never was one.
    pub(crate) fn read_index(&self) -> Result<Option<Vec<Listed>>, FileError> {
        let path = self.root.join(INDEX);
        let read = || -> io::Result<Vec<Listed>> {
            let mut text = Vec::new();
            File::open(&path)?.take(MAX_INDEX_BYTES).read_to_end(&mut text)?;
            let index: Index = serde_json::from_slice(&text)?;
            Ok(index.manifests)
        };
        match read() {
            Ok(manifests) => Ok(Some(manifests)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(FileError::new("reading", path, error)),
        }
    }

    /// Writes a file so that it is either the old one or the whole new one, whenever the power goes.
    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), FileError> {
        let temporary = self.new_name();
        let write = || {
            let mut file = File::create_new(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, path)?;
            File::open(path.parent().unwrap_or(&self.root))?.sync_all()
        };
        write().map_err(|error| {
            let _ = fs::remove_file(&temporary);
            FileError::new("writing", path, error)
        })
    }

    fn new_name(&self) -> PathBuf {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.root.join(INGEST).join(number.to_string())
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        blobs(&self.root, digest.algorithm()).join(digest.hex())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    media_type: String,
    manifests: Vec<Listed>,
}

fn blobs(root: &Path, algorithm: Algorithm) -> PathBuf {
    root.join("blobs").join(algorithm.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_are_kept_whole_and_damage_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let content = Content::open(root.path()).unwrap();
        let digest = Digest::sha256(b"text");
        Blob::verified(&digest, b"other".to_vec()).unwrap_err();
        let blob = Blob::verified(&digest, b"text".to_vec()).unwrap();
        content.put(&blob).unwrap();
        assert_eq!(content.get(&digest).unwrap(), blob);
        fs::write(content.path(&digest), b"damaged").unwrap();
        assert_eq!(
            content.get(&digest).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        content.put(&blob).unwrap();
        assert_eq!(
            content.get(&digest).unwrap(),
            blob,
            "a damaged blob is written anew"
        );
        content.retain(&BTreeSet::from([digest.clone()])).unwrap();
        content.get(&digest).unwrap();
        content.retain(&BTreeSet::new()).unwrap();
        assert_eq!(content.get(&digest).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_index_is_read_back() {
        let root = tempfile::tempdir().unwrap();
        let content = Content::open(root.path()).unwrap();
        assert_eq!(content.read_index().unwrap(), None);
        let listed = Listed {
            media_type: crate::manifest::OCI_MANIFEST.into(),
            digest: Digest::sha256(b"x"),
            size: 1,
            annotations: Annotations {
                name: Some("busybox".parse().unwrap()),
            },
        };
        content.write_index(std::slice::from_ref(&listed)).unwrap();
        assert_eq!(
            Content::open(root.path()).unwrap().read_index().unwrap(),
            Some(vec![listed])
        );
        fs::write(root.path().join("content/index.json"), b"{").unwrap();
        content.read_index().unwrap_err();
    }
}
