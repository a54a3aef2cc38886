//! Import of image archives: OCI layouts and what `docker save` writes, as one tar (compressed or not).
//!
//! The archive is unpacked by an unpack worker like a layer, into a spool folder, because its parts may come in any
//! order and the one that explains the others comes last. From there everything goes the way of a pull: digests are
//! checked, documents go through the parse worker, layers through workers of their own.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use coracle_kernel::path::{self, Kind, OFlags, Root};
use coracle_kernel::{Errno, Error as KernelError};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::content::Blob;
use crate::digest::{Algorithm, Digest};
use crate::error::ImageError;
use crate::images::Image;
use crate::ingest::{Claim, Ingest, Names, NewImage, run_blocking};
use crate::manifest::{
    ArchiveImage, Descriptor, Document, MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, OCI_CONFIG, OCI_MANIFEST,
    Platform, select,
};
use crate::parser::Parser;
use crate::reference::Reference;
use crate::stage::Unpacking;
use crate::store::{ImageStore, Inner};

/// Layers that are unpacked at the same time: one reads while another writes.
const LAYERS_AT_ONCE: usize = 2;
/// What the layers of a docker archive are, as far as anyone says.
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// An archive's files, removed with it.
struct Spool {
    inner: Arc<Inner>,
    name: OsString,
    dir: OwnedFd,
}

/// An image of an archive: what is recorded, and the file of each layer.
struct Found {
    image: NewImage,
    layers: Vec<String>,
    names: Names,
}

impl ImageStore {
    /// Brings in all images of an archive that suit this machine, from a file or a stream.
    ///
    /// `name` is given to the image of an archive that has exactly one, beside the names that the archive itself says.
    pub async fn import(
        &self,
        archive: OwnedFd,
        name: Option<Reference>,
    ) -> Result<Vec<Arc<Image>>, ImageError> {
        let inner = Arc::clone(self.inner());
        let (spool, unpacking) = run_blocking(move || {
            let spool = Spool::new(inner)?;
            let unpacking = Unpacking::start(&spool.inner.workers, spool.inner.limits, &spool.dir)?;
            Ok((spool, unpacking))
        })
        .await?;
        let guard = unpacking.kill_on_drop()?;
        let (spool, mut found) = run_blocking(move || {
            let (copied, unpacked) = unpacking.run_unchecked(archive);
            copied.map_err(|error| ImageError::Archive(format!("reading it: {error}")))?;
            unpacked.map_err(ImageError::Archive)?;
            let found = spool.find()?;
            Ok((Arc::new(spool), found))
        })
        .await?;
        drop(guard);
        if let (Some(name), [only]) = (name, found.as_mut_slice()) {
            only.names.tags.extend(name.tagged());
        }
        let mut images = Vec::new();
        for Found { image, layers, names } in found {
            let ingest = self.begin(image)?;
            bring_in(&spool, &ingest, layers).await?;
            images.push(ingest.finish(names).await?);
        }
        Ok(images)
    }
}

/// Unpacks all layers that are missing.
async fn bring_in(spool: &Arc<Spool>, ingest: &Ingest, layers: Vec<String>) -> Result<(), ImageError> {
    let turns = Arc::new(Semaphore::new(LAYERS_AT_ONCE));
    let mut tasks = JoinSet::new();
    for (index, name) in layers.into_iter().enumerate() {
        let (spool, ingest, turns) = (Arc::clone(spool), ingest.clone(), Arc::clone(&turns));
        tasks.spawn(async move {
            // Never closed; without a permit the layer would only come sooner.
            let _turn = turns.acquire().await;
            match ingest.claim(index).await {
                Claim::Present => Ok(()),
                Claim::Unpack(job) => {
                    let file = run_blocking(move || spool.open(&name)?.ok_or_else(|| missing(&name))).await?;
                    job.unpack(file.into()).await
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap_or_else(|error| Err(ImageError::Panicked(error.to_string())))?;
    }
    Ok(())
}

impl Spool {
    fn new(inner: Arc<Inner>) -> Result<Spool, ImageError> {
        let (name, dir) = inner.content.spool_dir()?;
        Ok(Spool { inner, name, dir })
    }

    /// Reads what the archive says is in it.
    fn find(&self) -> Result<Vec<Found>, ImageError> {
        let mut parser = Parser::start(&self.inner.workers)?;
        if let Some(index) = self.read("index.json", MAX_MANIFEST_BYTES)? {
            return self.find_in_layout(&mut parser, &index);
        }
        match self.read("manifest.json", MAX_MANIFEST_BYTES)? {
            Some(list) => {
                let images = parser.archive(&list)?;
                images
                    .into_iter()
                    .map(|image| self.docker_image(&mut parser, image))
                    .collect()
            }
            None => Err(ImageError::Archive(
                "it has neither index.json nor manifest.json".into(),
            )),
        }
    }

    fn find_in_layout(&self, parser: &mut Parser, index: &[u8]) -> Result<Vec<Found>, ImageError> {
        let Document::Index { manifests } = parser.document(index, None)? else {
            return Err(ImageError::Archive("its index.json is a manifest".into()));
        };
        let host = Platform::host();
        let is_foreign = |entry: &Descriptor| {
            let platform = entry.platform.as_ref();
            platform.is_some_and(|platform| host.suitability(platform).is_none())
        };
        let mut found = Vec::new();
        for entry in manifests.iter().filter(|entry| !is_foreign(entry)) {
            found.push(self.layout_image(parser, entry, &host)?);
        }
        if found.is_empty() {
            let Platform { os, architecture, .. } = host;
            return Err(ImageError::Archive(format!(
                "it has no image for {os}/{architecture}"
            )));
        }
        Ok(found)
    }

    /// An image of an OCI layout, directly or through an index of platforms.
    fn layout_image(
        &self,
        parser: &mut Parser,
        entry: &Descriptor,
        host: &Platform,
    ) -> Result<Found, ImageError> {
        let mut manifest = self.blob(entry, MAX_MANIFEST_BYTES)?;
        let mut media_type = entry.media_type.clone();
        let mut document = parser.document(manifest.bytes(), Some(&media_type))?;
        if let Document::Index { manifests } = &document {
            let none = || {
                ImageError::Archive(format!(
                    "no image for {}/{} in its index",
                    host.os, host.architecture
                ))
            };
            let chosen = select(manifests, host).ok_or_else(none)?;
            manifest = self.blob(chosen, MAX_MANIFEST_BYTES)?;
            media_type.clone_from(&chosen.media_type);
            document = parser.document(manifest.bytes(), Some(&media_type))?;
        }
        let Document::Manifest { config, layers } = document else {
            return Err(ImageError::Archive("an index leads to an index".into()));
        };
        let config = self.blob(&config, MAX_CONFIG_BYTES)?;
        let parsed = parser.config(config.bytes())?;
        let tags: Vec<Reference> = entry.name.as_deref().and_then(full_name).into_iter().collect();
        let digests = tags.iter().map(|tag| tag.at_digest(&entry.digest)).collect();
        let files = layers.iter().map(|layer| blob_name(&layer.digest)).collect();
        let image = NewImage {
            manifest,
            media_type,
            config,
            parsed,
            layers,
        };
        Ok(Found {
            image,
            layers: files,
            names: Names { tags, digests },
        })
    }

    /// An image of a docker archive, which has no manifest: one is written for it.
    fn docker_image(&self, parser: &mut Parser, image: ArchiveImage) -> Result<Found, ImageError> {
        let config = self
            .read(&image.config, MAX_CONFIG_BYTES)?
            .ok_or_else(|| missing(&image.config))?;
        let parsed = parser.config(&config)?;
        let mut layers = Vec::new();
        for name in &image.layers {
            let (digest, size) = self.hash(name)?;
            let media_type = LAYER_TYPE.into();
            layers.push(Descriptor {
                media_type,
                digest,
                size,
                platform: None,
                name: None,
            });
        }
        let config_digest = Digest::sha256(&config);
        let described = |media_type: &str, digest: &Digest, size: u64| serde_json::json!({ "mediaType": media_type, "digest": digest, "size": size });
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": described(OCI_CONFIG, &config_digest, config.len() as u64),
            "layers": layers.iter().map(|l| described(&l.media_type, &l.digest, l.size)).collect::<Vec<_>>(),
        });
        let manifest = Blob::new(manifest.to_string().into_bytes());
        let tags = image
            .repo_tags
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect();
        let image_layers = image.layers;
        let image = NewImage {
            manifest,
            media_type: OCI_MANIFEST.into(),
            config: Blob::new(config),
            parsed,
            layers,
        };
        Ok(Found {
            image,
            layers: image_layers,
            names: Names {
                tags,
                digests: Vec::new(),
            },
        })
    }

    /// A document of the layout whose digest and size are right.
    fn blob(&self, descriptor: &Descriptor, limit: usize) -> Result<Blob, ImageError> {
        let name = blob_name(&descriptor.digest);
        let bytes = self.read(&name, limit)?.ok_or_else(|| missing(&name))?;
        if bytes.len() as u64 != descriptor.size {
            let why = format!("{name} has {} bytes instead of {}", bytes.len(), descriptor.size);
            return Err(ImageError::Archive(why));
        }
        Blob::verified(&descriptor.digest, bytes)
            .map_err(|error| ImageError::Archive(format!("{name}: {error}")))
    }

    /// The whole of a file of the archive; `None` where there is none.
    fn read(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(file) = self.open(name)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(limit as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| unreadable(name, &error))?;
        if bytes.len() > limit {
            return Err(ImageError::Archive(format!(
                "{name} is larger than {limit} bytes"
            )));
        }
        Ok(Some(bytes))
    }

    fn hash(&self, name: &str) -> Result<(Digest, u64), ImageError> {
        let mut file = self.open(name)?.ok_or_else(|| missing(name))?;
        let mut hasher = Algorithm::Sha256.hasher();
        let mut buffer = vec![0; 1 << 20];
        let mut size = 0;
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok((hasher.finish(), size)),
                Ok(count) => {
                    hasher.update(&buffer[..count]);
                    size += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(unreadable(name, &error)),
            }
        }
    }

    /// Opens a regular file of the archive. Its symlinks (docker archives share layers by them) lead nowhere else.
    fn open(&self, name: &str) -> Result<Option<File>, ImageError> {
        let open = || -> Result<Option<File>, KernelError> {
            let place = match Root::new(&self.dir).open_path(name) {
                Err(error) if matches!(error.errno(), Errno::ENOENT | Errno::ENOTDIR) => return Ok(None),
                other => other?,
            };
            // Looked at before it is opened: a pipe would wait and a device would act.
            if path::stat(&place)?.kind != Kind::File {
                return Err(KernelError::new(
                    "open",
                    format!("{name:?}, not a file"),
                    Errno::EINVAL,
                ));
            }
            path::reopen(&place, OFlags::RDONLY).map(|fd| Some(fd.into()))
        };
        open().map_err(|error| unreadable(name, &error))
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        let (inner, name) = (Arc::clone(&self.inner), std::mem::take(&mut self.name));
        // May be large, and this may be an async task; the next start removes what is left.
        let remove = move || inner.content.remove_spool(&name);
        let _ = std::thread::Builder::new()
            .name("import-garbage".into())
            .spawn(remove);
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

/// The annotation of an entry is a whole name, or only a tag of whatever the archive is called.
fn full_name(name: &str) -> Option<Reference> {
    name.contains(['/', ':'])
        .then(|| name.parse::<Reference>().ok()?.tagged())
        .flatten()
}

fn missing(name: &str) -> ImageError {
    ImageError::Archive(format!("it lacks {name}"))
}

fn unreadable(name: &str, error: &dyn std::error::Error) -> ImageError {
    ImageError::Archive(format!("{name}: {error}"))
}
