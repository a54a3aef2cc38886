//! The read-only layers on disk: `layers/<integer>/fs`, and `meta` beside it once the layer is whole.
//!
//! A folder without a `meta` is half-made and is removed at the next start; a `meta` is written only when everything
//! below `fs` is on the disk. So the folders describe themselves and need no database.
//!
//! A layer that says everything about itself is shared by every image that has it and is found by its diff-id. One that
//! took attributes or files from the layers below is right above exactly those, and is found by its chain ID.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coracle_kernel::path::{self, OFlags};
use coracle_kernel::{Errno, Error as KernelError, file};
use coracle_snapshot::{LAYERS, LayerDir, tree};
use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// Version of [`Meta`] as it is written.
const SCHEMA: u32 = 1;
/// A `meta` larger than this is not ours.
const MAX_META_BYTES: u64 = 64 << 10;
/// Folders that are looked at.
const MAX_FOLDERS: usize = 1 << 20;

/// What a layer is found by.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LayerKey {
    /// Digest of the uncompressed archive: the layer stands for itself.
    Diff(Digest),
    /// Digest of the whole stack up to it: the layer depends on what is below.
    Chain(Digest),
}

/// How a layer's files are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LayerKind {
    /// As a directory.
    Dir,
}

/// The `meta` file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Meta {
    schema: u32,
    pub(crate) key: LayerKey,
    pub(crate) diff_id: Digest,
    /// Folder of the layer below, where this one depends on it.
    pub(crate) parent: Option<u64>,
    pub(crate) kind: LayerKind,
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// The archive says what mode and owner `/` has.
    pub(crate) sets_root: bool,
    pub(crate) complete: bool,
}

/// A whole layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    pub(crate) number: u64,
    pub(crate) meta: Meta,
}

/// A failure at a file of the store.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {path:?}")]
pub struct FileError {
    doing: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl FileError {
    pub(crate) fn new(
        doing: &'static str,
        path: impl Into<PathBuf>,
        source: impl Into<io::Error>,
    ) -> FileError {
        FileError {
            doing,
            path: path.into(),
            source: source.into(),
        }
    }

    /// The reason, such as `StorageFull`.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

/// All layers of a data root.
#[derive(Debug)]
pub(crate) struct Layers {
    path: PathBuf,
    dir: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    by_key: HashMap<LayerKey, u64>,
    by_number: BTreeMap<u64, Layer>,
    /// Layers in use by unfinished pulls.
    pins: HashMap<u64, usize>,
    next: u64,
}

/// A layer that nobody removes while this lives.
#[derive(Debug)]
pub(crate) struct Pin {
    layers: Arc<Layers>,
    pub(crate) layer: Layer,
}

/// A layer being made; its folder is removed if it never becomes whole.
#[derive(Debug)]
pub(crate) struct Half {
    layers: Arc<Layers>,
    number: u64,
    dir: OwnedFd,
    /// `layers/<number>/fs`, opened before anything was written: a write error since then shows at its syncfs.
    pub(crate) fs: OwnedFd,
    whole: bool,
}

impl Meta {
    pub(crate) fn new(key: LayerKey, diff_id: Digest, parent: Option<u64>, bytes: u64, inodes: u64) -> Meta {
        let (kind, sets_root, complete) = (LayerKind::Dir, false, true);
        Meta {
            schema: SCHEMA,
            key,
            diff_id,
            parent,
            kind,
            bytes,
            inodes,
            sets_root,
            complete,
        }
    }
}

impl Layer {
    pub(crate) fn dir(&self) -> LayerDir {
        LayerDir {
            number: self.number,
            sets_root: self.meta.sets_root,
        }
    }
}

impl Layers {
    /// Reads all folders. What is half-made or not ours is returned by name, to be removed without haste.
    pub(crate) fn open(root: &Path) -> Result<(Arc<Layers>, Vec<String>), FileError> {
        let path = root.join(LAYERS);
        let fail = |doing, source: KernelError| FileError::new(doing, &path, source);
        let dir = path::open(&path, OFlags::RDONLY | OFlags::DIRECTORY).map_err(|e| fail("opening", e))?;
        let mut state = State {
            next: 1,
            ..State::default()
        };
        let mut garbage = Vec::new();
        for (name, _) in path::list_dir(&dir, MAX_FOLDERS).map_err(|e| fail("listing", e))? {
            let Some(name) = name.to_str() else { continue };
            let number = name
                .parse::<u64>()
                .ok()
                .filter(|number| number.to_string() == name);
            match number {
                // The empty layer of images without any; the snapshots' own.
                Some(0) => {}
                Some(number) => {
                    state.next = state.next.max(number.saturating_add(1));
                    match read_meta(&dir, name) {
                        Ok(Some(meta)) => state.insert(Layer { number, meta }),
                        Ok(None) => garbage.push(name.to_owned()),
                        // Unreadable or of a newer version: it is left alone and not used.
                        Err(error) => tracing::warn!(layer = number, %error, "layer cannot be read"),
                    }
                }
                None => garbage.push(name.to_owned()),
            }
        }
        let layers = Layers {
            path,
            dir,
            state: Mutex::new(state),
        };
        Ok((Arc::new(layers), garbage))
    }

    /// A whole layer with this diff-id that can stand where `chain_id` says, kept from removal.
    pub(crate) fn find(self: &Arc<Layers>, diff_id: &Digest, chain_id: &Digest) -> Option<Pin> {
        let mut state = self.lock();
        let keys = [LayerKey::Diff(diff_id.clone()), LayerKey::Chain(chain_id.clone())];
        let number = keys.iter().find_map(|key| state.by_key.get(key)).copied()?;
        *state.pins.entry(number).or_default() += 1;
        let layer = state.by_number.get(&number)?.clone();
        drop(state);
        Some(Pin {
            layers: Arc::clone(self),
            layer,
        })
    }

    /// The layer in a folder, if it is whole.
    pub(crate) fn get(&self, number: u64) -> Option<Layer> {
        self.lock().by_number.get(&number).cloned()
    }

    /// A new folder to unpack into.
    pub(crate) fn begin(self: &Arc<Layers>) -> Result<Half, FileError> {
        let number = {
            let mut state = self.lock();
            let number = state.next;
            state.next += 1;
            number
        };
        let name = number.to_string();
        let make = || {
            path::make_dir(&self.dir, &name, 0o700)?;
            let dir = path::open_at(&self.dir, &name, OFlags::RDONLY | OFlags::DIRECTORY)?;
            path::make_dir(&dir, "fs", 0o755)?;
            let fs = path::open_at(&dir, "fs", OFlags::RDONLY | OFlags::DIRECTORY)?;
            // Neither the umask nor a set-group-id bit of the data root may show in an image.
            path::chmod(&fs, 0o755)?;
            path::chown(&fs, 0, 0).or_else(|error| match error.errno() {
                // Without root (tests) the files are ours anyway.
                Errno::EPERM => Ok(()),
                _ => Err(error),
            })?;
            Ok((dir, fs))
        };
        let (dir, fs) =
            make().map_err(|e: KernelError| FileError::new("making", self.path.join(&name), e))?;
        Ok(Half {
            layers: Arc::clone(self),
            number,
            dir,
            fs,
            whole: false,
        })
    }

    /// `fs` of a layer.
    pub(crate) fn open_fs(&self, number: u64) -> Result<OwnedFd, FileError> {
        let open = || {
            let dir = path::open_at(&self.dir, number.to_string(), OFlags::RDONLY | OFlags::DIRECTORY)?;
            path::open_at(dir, "fs", OFlags::RDONLY | OFlags::DIRECTORY)
        };
        open().map_err(|e: KernelError| FileError::new("opening", self.path.join(number.to_string()), e))
    }

    /// Forgets every layer that `keep` does not want and no pull uses, and returns the folders to be removed.
    pub(crate) fn forget(&self, keep: impl Fn(u64) -> bool) -> Result<Vec<String>, FileError> {
        let mut state = self.lock();
        let unused: Vec<u64> = state
            .by_number
            .keys()
            .copied()
            .filter(|number| !keep(*number) && !state.pins.contains_key(number))
            .collect();
        let mut names = Vec::new();
        for number in unused {
            let name = number.to_string();
            // Without its meta it is garbage, whatever happens before the folder is gone.
            let remove = || {
                let dir = path::open_at(&self.dir, &name, OFlags::RDONLY | OFlags::DIRECTORY)?;
                path::unlink(&dir, "meta")
            };
            match remove() {
                Err(error) if error.errno() == Errno::ENOENT => {}
                other => {
                    other.map_err(|e: KernelError| {
                        FileError::new("removing", self.path.join(&name).join("meta"), e)
                    })?;
                }
            }
            if let Some(layer) = state.by_number.remove(&number) {
                state.by_key.remove(&layer.meta.key);
            }
            names.push(name);
        }
        Ok(names)
    }

    /// Removes folders that nothing knows any more. Takes as long as the disk does.
    pub(crate) fn remove_folders(&self, names: &[String]) {
        for name in names {
            if let Err(error) = tree::remove(self.dir.as_fd(), OsStr::new(name)) {
                // It has no meta: the next start tries again.
                tracing::warn!(layer = %name, %error, "layer's folder could not be removed yet");
            }
        }
    }

    /// Bytes and inodes of all whole layers.
    pub(crate) fn usage(&self) -> (u64, u64) {
        let state = self.lock();
        state.by_number.values().fold((0, 0), |(bytes, inodes), layer| {
            (bytes + layer.meta.bytes, inodes + layer.meta.inodes)
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change below is made whole before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn insert(&mut self, layer: Layer) {
        self.by_key.insert(layer.meta.key.clone(), layer.number);
        self.by_number.insert(layer.number, layer);
    }
}

impl Half {
    /// Makes the layer known, after everything below `fs` has been written to the disk.
    ///
    /// Where the same layer has become whole meanwhile, that one is returned and this one removed.
    pub(crate) fn complete(mut self, meta: Meta) -> Result<Pin, FileError> {
        let place = self.layers.path.join(self.number.to_string()).join("meta");
        let fail = |source: io::Error| FileError::new("writing", &place, source);
        let json = serde_json::to_vec(&meta).map_err(|error| fail(error.into()))?;
        let write = || {
            let file = path::create_file_at(&self.dir, "meta.new", 0o600)?;
            let mut file = std::fs::File::from(file);
            file.write_all(&json)?;
            file.sync_all()?;
            path::rename(&self.dir, "meta.new", &self.dir, "meta")?;
            file::sync(&self.dir)?;
            file::sync(&self.layers.dir)?;
            Ok(())
        };
        let mut state = self.layers.lock();
        let number = match state.by_key.get(&meta.key) {
            Some(number) => *number,
            None => {
                drop(state);
                write().map_err(fail)?;
                state = self.layers.lock();
                match state.by_key.get(&meta.key) {
                    // Two finished at once: the first stays.
                    Some(number) => *number,
                    None => {
                        state.insert(Layer {
                            number: self.number,
                            meta,
                        });
                        self.whole = true;
                        self.number
                    }
                }
            }
        };
        *state.pins.entry(number).or_default() += 1;
        let layer = state.by_number.get(&number).cloned();
        drop(state);
        let layers = Arc::clone(&self.layers);
        match layer {
            Some(layer) => Ok(Pin { layers, layer }),
            // Both maps change together.
            None => Err(fail(io::ErrorKind::NotFound.into())),
        }
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        if self.whole {
            return;
        }
        let _ = path::unlink(&self.dir, "meta");
        let (layers, name) = (Arc::clone(&self.layers), self.number.to_string());
        // Removing may take seconds and this may be an async task; if there is no thread, the next start does it.
        let thread = std::thread::Builder::new().name("layer-garbage".into());
        let _ = thread.spawn(move || layers.remove_folders(&[name]));
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.layers.lock();
        if let Some(count) = state.pins.get_mut(&self.layer.number) {
            *count -= 1;
            if *count == 0 {
                state.pins.remove(&self.layer.number);
            }
        }
    }
}

/// The `meta` of a folder; `None` where it is not there or not complete.
fn read_meta(layers: &OwnedFd, name: &str) -> io::Result<Option<Meta>> {
    let dir = path::open_at(layers, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let file = match path::open_at(&dir, "meta", OFlags::RDONLY) {
        Err(error) if error.errno() == Errno::ENOENT => return Ok(None),
        other => std::fs::File::from(other?),
    };
    let mut text = Vec::new();
    file.take(MAX_META_BYTES).read_to_end(&mut text)?;
    let meta: Meta = serde_json::from_slice(&text)?;
    if meta.schema > SCHEMA {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("meta of schema {}", meta.schema),
        ));
    }
    Ok(meta.complete.then_some(meta))
}
