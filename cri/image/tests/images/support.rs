//! Images made in memory, records that forget, and a store below a temporary root.

use std::collections::BTreeMap;
use std::io::{self, Seek as _, Write as _};
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coracle_image::manifest::{self, Descriptor, OCI_CONFIG, OCI_MANIFEST};
use coracle_image::records::Pending;
use coracle_image::{
    Blob, Change, Claim, Digest, Image, ImageConfig, ImageError, ImageStore, Ingest, Limits, Names, NewImage,
    Records, StoreOptions, Workers,
};

/// A layer under construction.
pub(crate) struct Layer {
    tar: tar::Builder<Vec<u8>>,
}

/// A layer as it is served.
#[derive(Clone)]
pub(crate) struct Packed {
    pub(crate) bytes: Vec<u8>,
    pub(crate) diff_id: Digest,
    pub(crate) media_type: &'static str,
}

/// An image as it is served.
#[derive(Clone)]
pub(crate) struct Built {
    pub(crate) manifest: Blob,
    pub(crate) config: Blob,
    pub(crate) parsed: ImageConfig,
    pub(crate) descriptors: Vec<Descriptor>,
    pub(crate) layers: Vec<Vec<u8>>,
}

impl Layer {
    pub(crate) fn new() -> Layer {
        Layer {
            tar: tar::Builder::new(Vec::new()),
        }
    }

    pub(crate) fn raw(bytes: &[u8]) -> Packed {
        Packed {
            bytes: bytes.to_vec(),
            diff_id: Digest::sha256(bytes),
            media_type: LAYER,
        }
    }

    pub(crate) fn dir(self, name: &str, mode: u32) -> Layer {
        self.entry(tar::EntryType::Directory, &format!("{name}/"), "", mode, "")
    }

    pub(crate) fn file(self, name: &str, text: &str, mode: u32) -> Layer {
        self.entry(tar::EntryType::Regular, name, text, mode, "")
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Layer {
        self.entry(tar::EntryType::Symlink, name, "", 0o777, target)
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Layer {
        self.entry(tar::EntryType::Link, name, "", 0o644, target)
    }

    pub(crate) fn plain(self) -> Packed {
        let bytes = self.tar.into_inner().unwrap();
        Packed {
            diff_id: Digest::sha256(&bytes),
            bytes,
            media_type: LAYER,
        }
    }

    pub(crate) fn gzip(self) -> Packed {
        let plain = self.plain();
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&plain.bytes).unwrap();
        Packed {
            bytes: encoder.finish().unwrap(),
            media_type: LAYER_GZIP,
            ..plain
        }
    }

    pub(crate) fn zstd(self) -> Packed {
        let plain = self.plain();
        Packed {
            bytes: zstd::encode_all(plain.bytes.as_slice(), 3).unwrap(),
            media_type: LAYER_ZSTD,
            ..plain
        }
    }

    fn entry(mut self, kind: tar::EntryType, name: &str, text: &str, mode: u32, link: &str) -> Layer {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(text.len() as u64);
        header.set_mtime(1_000_000);
        header.set_uid(0);
        header.set_gid(0);
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        // Not through the crate's own check, which refuses what is to be tried.
        let field = &mut header.as_old_mut().name;
        field[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        self.tar.append(&header, text.as_bytes()).unwrap();
        self
    }
}

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// The image of these layers.
pub(crate) fn build(layers: &[Packed]) -> Built {
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
    let host = manifest::Platform::host();
    let config = serde_json::json!({
        "os": host.os, "architecture": host.architecture,
        "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = Blob::new(config.to_string().into_bytes());
    let describe = |media_type: &str, bytes: &[u8]| serde_json::json!({ "mediaType": media_type, "digest": Digest::sha256(bytes), "size": bytes.len() });
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": describe(OCI_CONFIG, config.bytes()),
        "layers": layers.iter().map(|layer| describe(layer.media_type, &layer.bytes)).collect::<Vec<_>>(),
    });
    let manifest = Blob::new(manifest.to_string().into_bytes());
    let Ok(manifest::Document::Manifest {
        layers: descriptors, ..
    }) = manifest::parse_document(manifest.bytes(), Some(OCI_MANIFEST))
    else {
        panic!("not a manifest")
    };
    let parsed = manifest::parse_config(config.bytes()).unwrap();
    let layers = layers.iter().map(|layer| layer.bytes.clone()).collect();
    Built {
        manifest,
        config,
        parsed,
        descriptors,
        layers,
    }
}

impl Built {
    pub(crate) fn image(&self) -> NewImage {
        NewImage {
            manifest: self.manifest.clone(),
            media_type: OCI_MANIFEST.into(),
            config: self.config.clone(),
            parsed: self.parsed.clone(),
            layers: self.descriptors.clone(),
        }
    }
}

/// Records in memory.
#[derive(Default)]
pub(crate) struct MemoryRecords {
    state: Mutex<(BTreeMap<String, Vec<u8>>, bool)>,
}

impl MemoryRecords {
    pub(crate) fn rows(&self) -> BTreeMap<String, Vec<u8>> {
        self.state.lock().unwrap().0.clone()
    }

    pub(crate) fn copy(&self) -> MemoryRecords {
        MemoryRecords {
            state: Mutex::new((self.rows(), false)),
        }
    }

    /// Whether each change fails from now on.
    pub(crate) fn fail(&self, fail: bool) {
        self.state.lock().unwrap().1 = fail;
    }
}

impl Records for MemoryRecords {
    fn load(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        Ok(self.rows().into_iter().collect())
    }

    fn commit(&self, changes: Vec<Change>) -> Pending<'_, io::Result<()>> {
        Box::pin(async move {
            let mut state = self.state.lock().unwrap();
            if state.1 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            for change in changes {
                match change {
                    Change::Put { key, value } => drop(state.0.insert(key, value)),
                    Change::Delete { key } => drop(state.0.remove(&key)),
                }
            }
            Ok(())
        })
    }
}

/// A store below a temporary root.
pub(crate) struct Store {
    root: Arc<tempfile::TempDir>,
    pub(crate) records: Arc<MemoryRecords>,
    limits: Limits,
    store: ImageStore,
}

impl Deref for Store {
    type Target = ImageStore;

    fn deref(&self) -> &ImageStore {
        &self.store
    }
}

impl Store {
    pub(crate) async fn open() -> Store {
        Store::open_with(Arc::default(), Limits::default()).await
    }

    pub(crate) async fn open_with(records: Arc<MemoryRecords>, limits: Limits) -> Store {
        Store::open_at(Arc::new(tempfile::tempdir().unwrap()), records, limits).await
    }

    /// As after a restart of the daemon.
    pub(crate) async fn reopen(self) -> Store {
        Store::open_at(self.root, self.records, self.limits).await
    }

    /// The same with another database.
    pub(crate) async fn reopen_with(self, records: MemoryRecords) -> Store {
        Store::open_at(self.root, Arc::new(records), self.limits).await
    }

    pub(crate) async fn open_at(
        root: Arc<tempfile::TempDir>,
        records: Arc<MemoryRecords>,
        limits: Limits,
    ) -> Store {
        // This very program; the role's name is the name of an ignored test that is the worker.
        let args = [
            "worker",
            "--ignored",
            "--exact",
            "--nocapture",
            "--test-threads=1",
        ];
        let workers = Workers::with_args(&std::env::current_exe().unwrap(), &args);
        let options = StoreOptions {
            root: root.path().to_owned(),
            workers,
            limits,
        };
        let store = ImageStore::open(options, Arc::clone(&records) as Arc<dyn Records>)
            .await
            .unwrap();
        Store {
            root,
            records,
            limits,
            store,
        }
    }

    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    /// Brings an image in as a pull does: a task a layer.
    pub(crate) async fn bring_in(&self, built: &Built, tags: &[&str]) -> Result<Arc<Image>, ImageError> {
        let ingest = self.begin(built.image())?;
        let mut tasks = tokio::task::JoinSet::new();
        for (index, bytes) in built.layers.iter().cloned().enumerate() {
            let ingest = ingest.clone();
            tasks.spawn(async move { one(&ingest, index, &bytes).await });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap()?;
        }
        let tags: Vec<coracle_image::Reference> = tags.iter().map(|tag| tag.parse().unwrap()).collect();
        let digests = tags
            .iter()
            .map(|tag| tag.at_digest(built.manifest.digest()))
            .collect();
        ingest.finish(Names { tags, digests }).await
    }

    /// Unpacks the first layer from these bytes.
    pub(crate) async fn unpack_one(&self, built: &Built, bytes: Vec<u8>) -> Result<(), ImageError> {
        one(&self.begin(built.image())?, 0, &bytes).await
    }

    /// Folders of layers but for the empty one of the snapshots.
    pub(crate) fn layer_folders(&self) -> usize {
        let names = std::fs::read_dir(self.root().join("layers")).unwrap();
        names
            .filter(|entry| entry.as_ref().unwrap().file_name() != "0")
            .count()
    }

    pub(crate) fn content_blobs(&self) -> usize {
        std::fs::read_dir(self.root().join("content/blobs/sha256"))
            .unwrap()
            .count()
    }

    /// Waits until garbage has been removed, which nobody else waits for.
    pub(crate) async fn settled(&self, settled: impl Fn() -> bool) {
        for _ in 0..1000 {
            if settled() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("still not settled: {} layers", self.layer_folders());
    }
}

async fn one(ingest: &Ingest, index: usize, bytes: &[u8]) -> Result<(), ImageError> {
    match ingest.claim(index).await {
        Claim::Present => Ok(()),
        Claim::Unpack(job) => job.unpack(file(bytes)).await,
    }
}

/// A descriptor from which exactly these bytes are read.
pub(crate) fn file(bytes: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file.into()
}

pub(crate) fn is_root() -> bool {
    let root = coracle_kernel::creds::effective_uid() == 0;
    if !root {
        eprintln!("skipped: unpacking needs root");
    }
    root
}

/// The folders in `/proc` of all threads of this process's children.
pub(crate) fn threads_of_children() -> Vec<PathBuf> {
    let own = std::process::id().to_string();
    let is_child = |dir: &PathBuf| {
        let status = std::fs::read_to_string(dir.join("status")).unwrap_or_default();
        status.lines().any(|line| {
            line.strip_prefix("PPid:")
                .is_some_and(|parent| parent.trim() == own)
        })
    };
    let list = |dir: PathBuf| {
        std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
    };
    list("/proc".into())
        .filter(is_child)
        .flat_map(|dir| list(dir.join("task")))
        .collect()
}
