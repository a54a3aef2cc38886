//! The image store: what is there, under which names, and its removal.
//!
//! Reads answer from memory and never wait. Changes go one after the other: record (on the disk), memory, then files
//! that nobody needs any more.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

use tokio::sync::OwnedMutexGuard;

use crate::content::{Content, Listed};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::images::{Image, Images};
use crate::ingest::{Ingest, Names, NewImage, run_blocking};
use crate::layers::{FileError, Layers};
use crate::manifest::Document;
use crate::parser::{ParseError, Parser};
use crate::records::{Change, ImageRecord, KeptManifest, Records, SCHEMA};
use crate::reference::Reference;
use crate::report::Limits;
use crate::workers::Workers;

/// The longest name that is looked up.
const MAX_NAME_BYTES: usize = 1024;

/// What the store takes on its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreUsage {
    /// Bytes of layers, manifests and configurations.
    pub bytes: u64,
    /// Inodes of layers.
    pub inodes: u64,
}

/// What an image store is opened with.
#[derive(Debug)]
pub struct StoreOptions {
    /// The data root; `layers/` and `content/` are below it.
    pub root: PathBuf,
    /// How workers are started.
    pub workers: Workers,
    /// What one layer may come to.
    pub limits: Limits,
}

/// The images of a data root. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) layers: Arc<Layers>,
    pub(crate) content: Content,
    pub(crate) workers: Workers,
    pub(crate) limits: Limits,
    pub(crate) turns: Turns,
    records: Arc<dyn Records>,
    images: RwLock<Arc<Images>>,
    /// Held across a change, awaits included.
    changes: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageStore")
            .field("layers", &self.layers)
            .finish_non_exhaustive()
    }
}

/// One turn a digest: whoever enters second waits until the first is done.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    waiting: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
}

impl ImageStore {
    /// Opens the store, removes what a crash left half-made, and rebuilds lost records from the folders.
    ///
    /// An image whose layers are no longer there is forgotten (and said so): its next pull fetches what is missing.
    pub async fn open(options: StoreOptions, records: Arc<dyn Records>) -> Result<ImageStore, ImageError> {
        let StoreOptions {
            root,
            workers,
            limits,
        } = options;
        let loader = Arc::clone(&records);
        let (layers, content, garbage, rows) = run_blocking(move || {
            make_folders(&root)?;
            let (layers, garbage) = Layers::open(&root)?;
            Ok((
                layers,
                Content::open(&root)?,
                garbage,
                loader.load().map_err(ImageError::Records)?,
            ))
        })
        .await?;
        let inner = Arc::new(Inner {
            layers,
            content,
            workers,
            limits,
            turns: Turns::default(),
            records,
            images: RwLock::default(),
            changes: tokio::sync::Mutex::default(),
        });
        let store = ImageStore { inner };
        let certain = store.load(rows).await?;
        let mut garbage = garbage;
        if certain {
            garbage.extend(store.inner.unused_layers()?);
            let inner = Arc::clone(&store.inner);
            run_blocking(move || {
                inner.content.retain(&inner.images().digests())?;
                inner.list_images();
                Ok(())
            })
            .await?;
        }
        let layers = Arc::clone(&store.inner.layers);
        // Large trees take long; nothing waits for their removal.
        tokio::task::spawn_blocking(move || layers.remove_folders(&garbage));
        Ok(store)
    }

    /// The image of that name: a reference with tag or digest, an id, or the beginning of one that is unambiguous.
    #[must_use]
    pub fn resolve(&self, name: &str) -> Option<Arc<Image>> {
        if name.len() > MAX_NAME_BYTES {
            return None;
        }
        let images = self.inner.images();
        if let Ok(digest) = name.parse::<Digest>() {
            return images.by_id.get(digest.hex()).map(|(_, image)| Arc::clone(image));
        }
        let id = name
            .parse::<Reference>()
            .ok()
            .and_then(|reference| images.by_reference(&reference));
        let id = id.or_else(|| images.by_short_id(name))?;
        images.by_id.get(id).map(|(_, image)| Arc::clone(image))
    }

    /// All images.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.inner
            .images()
            .by_id
            .values()
            .map(|(_, image)| Arc::clone(image))
            .collect()
    }

    /// What the store takes on the disk, as recorded.
    #[must_use]
    pub fn usage(&self) -> StoreUsage {
        let (bytes, inodes) = self.inner.layers.usage();
        let documents: u64 = self
            .inner
            .images()
            .by_id
            .values()
            .map(|(record, _)| record.document_bytes())
            .sum();
        StoreUsage {
            bytes: bytes + documents,
            inodes,
        }
    }

    /// Begins to bring an image in.
    pub fn begin(&self, image: NewImage) -> Result<Ingest, ImageError> {
        Ingest::new(Arc::clone(&self.inner), image)
    }

    /// Starts a parse worker. Blocks for a millisecond.
    pub fn parser(&self) -> Result<Parser, ParseError> {
        Parser::start(&self.inner.workers)
    }

    /// How workers are started.
    #[must_use]
    pub fn workers(&self) -> &Workers {
        &self.inner.workers
    }

    /// Removes an image with all its names, and the layers that no other image has. One that is not there is removed.
    ///
    /// Refused where `in_use` says so of the image's id.
    pub async fn remove(&self, name: &str, in_use: impl Fn(&Digest) -> bool) -> Result<(), ImageError> {
        let _turn = self.inner.changes.lock().await;
        let Some(image) = self.resolve(name) else {
            return Ok(());
        };
        let key = image.id.hex().to_owned();
        // Out of sight first: whoever has found it by now has said that it uses it, and nobody finds it after this.
        let before = self.inner.images();
        self.inner.publish(before.without(&key));
        let removed = if in_use(&image.id) {
            Err(ImageError::InUse(image.id.clone()))
        } else {
            self.inner.commit(vec![Change::Delete { key }]).await
        };
        if let Err(error) = removed {
            self.inner.publish(before);
            return Err(error);
        }
        let inner = Arc::clone(&self.inner);
        run_blocking(move || {
            inner.content.retain(&inner.images().digests())?;
            let garbage = inner.unused_layers()?;
            inner.layers.remove_folders(&garbage);
            inner.list_images();
            Ok(())
        })
        .await
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Takes the records into memory; `false` where they were lost and could not be rebuilt.
    async fn load(&self, rows: Vec<(String, Vec<u8>)>) -> Result<bool, ImageError> {
        let had_rows = !rows.is_empty();
        let mut images = Images::default();
        let mut changes = Vec::new();
        for (key, value) in rows {
            let record = match serde_json::from_slice::<ImageRecord>(&value) {
                Ok(record) if record.schema <= SCHEMA && record.key() == key => record,
                _ => {
                    tracing::warn!(image = %key, "image record cannot be read");
                    continue;
                }
            };
            match self.inner.image(&record) {
                Some(image) => images.insert(record, image),
                None => {
                    tracing::warn!(image = %record.id, "image has lost a layer and is forgotten; pull it again");
                    changes.push(Change::Delete { key });
                }
            }
        }
        if !changes.is_empty() {
            self.inner.commit(changes).await?;
        }
        self.inner.publish(images);
        if had_rows {
            return Ok(true);
        }
        let inner = Arc::clone(&self.inner);
        match run_blocking(move || Ok(inner.content.read_index()?)).await {
            Ok(listed) => self.rebuild(listed.unwrap_or_default()).await.map(|()| true),
            Err(error) => {
                tracing::warn!(%error, "image records and list are lost; layers are kept for the next pulls");
                Ok(false)
            }
        }
    }

    /// Brings back the images of `content/index.json` whose blobs and layers are all there.
    async fn rebuild(&self, listed: Vec<Listed>) -> Result<(), ImageError> {
        for entry in listed {
            let digest = entry.digest.clone();
            let name = entry.annotations.name.clone();
            let inner = Arc::clone(&self.inner);
            let read = run_blocking(move || inner.read_image(&entry)).await;
            let ingest = match read.and_then(|image| self.begin(image)) {
                Ok(ingest) => ingest,
                Err(error) => {
                    tracing::warn!(manifest = %digest, %error, "image could not be rebuilt");
                    continue;
                }
            };
            let mut names = Names::default();
            match name {
                Some(name) if name.digest().is_some() => names.digests.push(name),
                Some(name) => names.tags.push(name),
                None => {}
            }
            if let Err(error) = ingest.finish(names).await {
                tracing::warn!(manifest = %digest, %error, "image could not be rebuilt");
            }
        }
        Ok(())
    }
}

impl Inner {
    /// Records an image whose layers are all whole.
    pub(crate) async fn record(
        self: &Arc<Inner>,
        new: &NewImage,
        layers: Vec<u64>,
        names: Names,
    ) -> Result<Arc<Image>, ImageError> {
        let (inner, manifest, config) = (Arc::clone(self), new.manifest.clone(), new.config.clone());
        let _turn = self.changes.lock().await;
        run_blocking(move || {
            inner.content.put(&manifest)?;
            Ok(inner.content.put(&config)?)
        })
        .await?;
        let before = self.images();
        let id = new.config.digest();
        let mut record = match before.by_id.get(id.hex()) {
            Some((record, _)) => record.clone(),
            None => ImageRecord {
                schema: SCHEMA,
                id: id.clone(),
                config_size: new.config.bytes().len() as u64,
                manifests: Vec::new(),
                tags: BTreeSet::new(),
                digests: BTreeSet::new(),
                layers: Vec::new(),
                created_at: SystemTime::now(),
                pinned: false,
                config: new.parsed.clone(),
            },
        };
        // The layers of an image that is there again may be others than before: a damaged one was fetched anew.
        record.layers = layers;
        let digest = new.manifest.digest();
        if !record.manifests.iter().any(|kept| kept.digest == *digest) {
            record.manifests.push(KeptManifest {
                digest: digest.clone(),
                media_type: new.media_type.clone(),
                size: new.manifest.bytes().len() as u64,
            });
        }
        record
            .tags
            .extend(names.tags.iter().filter_map(Reference::tagged));
        record.digests.extend(
            names
                .digests
                .iter()
                .filter_map(|name| Some(name.at_digest(name.digest()?))),
        );
        let image = self.image(&record).ok_or(ImageError::LayerMissing(0))?;
        // The image it is now, and those that lose a tag to it.
        let mut after = before.copy();
        let mut changes = vec![put(&record)?];
        for (other, _) in before.by_id.values().filter(|(other, _)| other.id != record.id) {
            if other.tags.is_disjoint(&record.tags) {
                continue;
            }
            let mut other = other.clone();
            other.tags.retain(|tag| !record.tags.contains(tag));
            changes.push(put(&other)?);
            if let Some(image) = self.image(&other) {
                after.insert(other, image);
            }
        }
        after.insert(record, Arc::clone(&image));
        self.commit(changes).await?;
        self.publish(after);
        let inner = Arc::clone(self);
        run_blocking(move || Ok(inner.content.write_index(&inner.images().listed())?)).await?;
        Ok(image)
    }

    fn images(&self) -> Arc<Images> {
        Arc::clone(&self.images.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn publish(&self, images: impl Into<Arc<Images>>) {
        *self.images.write().unwrap_or_else(PoisonError::into_inner) = images.into();
    }

    async fn commit(&self, changes: Vec<Change>) -> Result<(), ImageError> {
        self.records.commit(changes).await.map_err(ImageError::Records)
    }

    /// The image of a record, if all its layers are there.
    fn image(&self, record: &ImageRecord) -> Option<Arc<Image>> {
        let layers = record
            .layers
            .iter()
            .map(|number| self.layers.get(*number))
            .collect::<Option<Vec<_>>>()?;
        Some(Arc::new(Image {
            id: record.id.clone(),
            tags: record.tags.iter().cloned().collect(),
            digests: record.digests.iter().cloned().collect(),
            size: record.document_bytes() + layers.iter().map(|layer| layer.meta.bytes).sum::<u64>(),
            created_at: record.created_at,
            pinned: record.pinned,
            config: record.config.clone(),
            layers: layers.iter().map(crate::layers::Layer::dir).collect(),
        }))
    }

    /// Forgets the layers that no image has; their folders are left to be removed.
    fn unused_layers(&self) -> Result<Vec<String>, FileError> {
        let images = self.images();
        let used: BTreeSet<u64> = images
            .by_id
            .values()
            .flat_map(|(record, _)| record.layers.clone())
            .collect();
        self.layers.forget(|number| used.contains(&number))
    }

    /// Writes `content/index.json`, last of all: it needs space, which a full disk has only after what was removed, if
    /// at all. A list that names too much does no harm: without its files nothing is brought back.
    fn list_images(&self) {
        if let Err(error) = self.content.write_index(&self.images().listed()) {
            tracing::warn!(%error, "list of images is not up to date");
        }
    }

    /// Reads a listed image back from its blobs, through a parse worker as if it had just been pulled.
    fn read_image(&self, entry: &Listed) -> Result<NewImage, ImageError> {
        let manifest = self.content.get(&entry.digest)?;
        let mut parser = Parser::start(&self.workers)?;
        let Document::Manifest { config, layers } =
            parser.document(manifest.bytes(), Some(&entry.media_type))?
        else {
            return Err(ImageError::Archive("an index is listed as an image".into()));
        };
        let config = self.content.get(&config.digest)?;
        let parsed = parser.config(config.bytes())?;
        Ok(NewImage {
            manifest,
            media_type: entry.media_type.clone(),
            config,
            parsed,
            layers,
        })
    }
}

impl Turns {
    pub(crate) async fn enter(&self, digest: &Digest) -> OwnedMutexGuard<()> {
        let turn = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody holds or waits for the others that are here with one owner.
            waiting.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(waiting.entry(digest.clone()).or_default())
        };
        turn.lock_owned().await
    }
}

fn put(record: &ImageRecord) -> Result<Change, ImageError> {
    let value = serde_json::to_vec(record).map_err(|error| ImageError::Records(error.into()))?;
    Ok(Change::Put {
        key: record.key(),
        value,
    })
}

fn make_folders(root: &Path) -> Result<(), FileError> {
    use std::os::unix::fs::DirBuilderExt as _;
    for folder in [root.join(coracle_snapshot::LAYERS), root.join("content")] {
        // 0700: files of images may be set-uid.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|error| FileError::new("making", folder, error))?;
    }
    Ok(())
}
