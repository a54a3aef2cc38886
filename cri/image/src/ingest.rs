//! One image being brought in: which layers are missing, the stream of each, and the record at the end.
//!
//! A layer's bytes go once through the hash stage (a thread of the daemon that parses nothing) into an unpack worker.
//! What the worker made is thrown away unless the compressed digest, the size and the diff-id are all right. A layer
//! that stands for itself is settled at once, the others in [`Ingest::finish`], from the lowest up.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedMutexGuard;
use tokio::task::spawn_blocking;

use crate::commit;
use crate::content::Blob;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::images::Image;
use crate::layers::{Half, Pin};
use crate::manifest::{Descriptor, ImageConfig};
use crate::reference::Reference;
use crate::report::Report;
use crate::stage::Unpacking;
use crate::store::Inner;

/// What the reports of an image's layers may hold in memory until the layers below have come.
const MAX_HELD_BYTES: u64 = 64 << 20;

/// An image that is to be brought in: everything about it but its layers' content.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// The manifest, kept byte for byte.
    pub manifest: Blob,
    /// Its media type.
    pub media_type: String,
    /// The configuration, kept byte for byte; its digest is the image's id.
    pub config: Blob,
    /// The configuration as a parse worker read it.
    pub parsed: ImageConfig,
    /// The manifest's layers as a parse worker read them, lowest first.
    pub layers: Vec<Descriptor>,
}

/// Names that an image gets. A tag that another image has moves to this one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// `repository:tag` names; a digest in one is ignored.
    pub tags: Vec<Reference>,
    /// `repository@digest` names, of the manifest or of the index that it was chosen from.
    pub digests: Vec<Reference>,
}

/// An image being brought in. Dropping it leaves nothing but whole layers, which the next removal collects.
#[derive(Clone, Debug)]
pub struct Ingest {
    shared: Arc<Shared>,
}

/// What is to be done about a layer.
#[derive(Debug)]
pub enum Claim {
    /// Nothing: it is there.
    Present,
    /// Its compressed bytes are wanted.
    Unpack(LayerJob),
}

/// A layer that this pull, and no other at the moment, is to bring in.
#[derive(Debug)]
pub struct LayerJob {
    shared: Arc<Shared>,
    index: usize,
    progress: Arc<AtomicU64>,
    /// Others who want the same layer wait for this.
    _turn: OwnedMutexGuard<()>,
}

#[derive(Debug)]
struct Shared {
    store: Arc<Inner>,
    image: NewImage,
    slots: Vec<Slot>,
    /// What the reports of unpacked layers hold in memory.
    held_bytes: AtomicU64,
}

#[derive(Debug)]
struct Slot {
    diff_id: Digest,
    chain_id: Digest,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Missing,
    /// Unpacked, but it depends on the layers below.
    Unpacked(Half, Report),
    Present(Pin),
}

impl Ingest {
    pub(crate) fn new(store: Arc<Inner>, image: NewImage) -> Result<Ingest, ImageError> {
        let diff_ids = &image.parsed.diff_ids;
        if diff_ids.len() != image.layers.len() {
            return Err(ImageError::LayerCount {
                manifest: image.layers.len(),
                config: diff_ids.len(),
            });
        }
        let mut slots: Vec<Slot> = Vec::with_capacity(diff_ids.len());
        for diff_id in diff_ids {
            let chain_id = match slots.last() {
                None => diff_id.clone(),
                Some(below) => Digest::sha256(format!("{} {diff_id}", below.chain_id).as_bytes()),
            };
            let state = match store.layers.find(diff_id, &chain_id) {
                Some(pin) => State::Present(pin),
                None => State::Missing,
            };
            slots.push(Slot {
                diff_id: diff_id.clone(),
                chain_id,
                state: Mutex::new(state),
            });
        }
        Ok(Ingest {
            shared: Arc::new(Shared {
                store,
                image,
                slots,
                held_bytes: AtomicU64::new(0),
            }),
        })
    }

    /// The layers as the manifest announces them, lowest first.
    #[must_use]
    pub fn layers(&self) -> &[Descriptor] {
        &self.shared.image.layers
    }

    /// Whether a layer is there already: nothing is to be fetched for it.
    #[must_use]
    pub fn is_present(&self, index: usize) -> bool {
        self.shared
            .slots
            .get(index)
            .is_none_or(|slot| !matches!(*slot.lock(), State::Missing))
    }

    /// Takes on a layer, waiting while another pull (or another position of this one) brings in the same.
    ///
    /// To be called from one task a layer, each going straight on to [`LayerJob::unpack`]: claims that are collected
    /// first and worked on later could wait for each other.
    pub async fn claim(&self, index: usize) -> Claim {
        let slot = match self.shared.slots.get(index) {
            Some(slot) if matches!(*slot.lock(), State::Missing) => slot,
            _ => return Claim::Present,
        };
        let turn = self.shared.store.turns.enter(&slot.diff_id).await;
        if let Some(pin) = self.shared.store.layers.find(&slot.diff_id, &slot.chain_id) {
            *slot.lock() = State::Present(pin);
            return Claim::Present;
        }
        let progress = Arc::new(AtomicU64::new(0));
        Claim::Unpack(LayerJob {
            shared: Arc::clone(&self.shared),
            index,
            progress,
            _turn: turn,
        })
    }

    /// Settles what depends on lower layers, writes manifest and configuration, records the image.
    ///
    /// Everything is on the disk when it returns. It fails, and nothing is visible, where a layer is missing.
    pub async fn finish(self, names: Names) -> Result<Arc<Image>, ImageError> {
        let shared = Arc::clone(&self.shared);
        run_blocking(move || shared.settle()).await?;
        let pins = self.shared.slots.iter().filter_map(Slot::number).collect();
        // The ingest, and with it the pins, lives until the record holds the layers.
        self.shared.store.record(&self.shared.image, pins, names).await
    }
}

impl LayerJob {
    /// Position of the layer, from the lowest.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// How the manifest announces the layer.
    #[must_use]
    pub fn descriptor(&self) -> &Descriptor {
        &self.shared.image.layers[self.index]
    }

    /// Compressed bytes that have gone through so far.
    #[must_use]
    pub fn progress(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.progress)
    }

    /// Brings the layer in from `source`: a pipe, socket or file with exactly its compressed bytes.
    ///
    /// Dropping the future kills the worker and removes what it made; whoever writes into `source` must close it, for
    /// the hash stage reads on until then.
    pub async fn unpack(self, source: OwnedFd) -> Result<(), ImageError> {
        let store = Arc::clone(&self.shared.store);
        let (half, unpacking) = run_blocking(move || {
            let half = store.layers.begin()?;
            let unpacking = Unpacking::start(&store.workers, store.limits, &half.fs)?;
            Ok((half, unpacking))
        })
        .await?;
        let guard = unpacking.kill_on_drop()?;
        let (shared, index, progress) = (Arc::clone(&self.shared), self.index, Arc::clone(&self.progress));
        let result = run_blocking(move || {
            let descriptor = &shared.image.layers[index];
            let (hashed, outcome) = unpacking.run(source, descriptor, &progress);
            // A wrong or short blob explains whatever the worker had to say about it.
            hashed?;
            let unpack_failed = |reason| ImageError::Unpack {
                digest: descriptor.digest.clone(),
                reason,
            };
            shared.unpacked(index, half, outcome.map_err(unpack_failed)?)
        })
        .await;
        drop(guard);
        result
    }
}

impl Shared {
    /// Takes a worker's result: a layer that stands for itself becomes whole at once.
    fn unpacked(&self, index: usize, half: Half, report: Report) -> Result<(), ImageError> {
        let slot = &self.slots[index];
        if report.diff_id != slot.diff_id {
            let (expected, actual) = (slot.diff_id.clone(), report.diff_id);
            return Err(ImageError::DiffId { expected, actual });
        }
        if report.skipped_xattrs > 0 {
            tracing::warn!(diff_id = %report.diff_id, count = report.skipped_xattrs, "extended attributes left out");
        }
        let state = match report.is_self_contained() {
            true => State::Present(commit::settle(half, &report, &slot.chain_id, None)?),
            false => {
                let held = report.held_bytes();
                if self.held_bytes.fetch_add(held, Ordering::Relaxed) + held > MAX_HELD_BYTES {
                    return Err(ImageError::Unpack {
                        digest: self.image.layers[index].digest.clone(),
                        reason: "the image's layers refer to too many paths of layers below them".to_owned(),
                    });
                }
                State::Unpacked(half, report)
            }
        };
        *slot.lock() = state;
        Ok(())
    }

    /// Makes every layer whole, from the lowest up.
    fn settle(&self) -> Result<(), ImageError> {
        let mut below: Vec<u64> = Vec::new();
        for (index, slot) in self.slots.iter().enumerate() {
            let mut state = slot.lock();
            *state = match std::mem::replace(&mut *state, State::Missing) {
                State::Present(pin) => State::Present(pin),
                State::Unpacked(half, report) => {
                    let lowers = below
                        .iter()
                        .map(|number| self.store.layers.open_fs(*number))
                        .rev();
                    let lowers = lowers.collect::<Result<Vec<_>, _>>()?;
                    let parent = below.last().map(|number| (*number, lowers.as_slice()));
                    State::Present(commit::settle(half, &report, &slot.chain_id, parent)?)
                }
                State::Missing => return Err(ImageError::LayerMissing(index)),
            };
            if let State::Present(pin) = &*state {
                below.push(pin.layer.number);
            }
        }
        Ok(())
    }
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn number(&self) -> Option<u64> {
        match &*self.lock() {
            State::Present(pin) => Some(pin.layer.number),
            _ => None,
        }
    }
}

/// Runs blocking work on its own thread; a panic there is an error here.
pub(crate) async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(ImageError::Panicked(error.to_string())))
}
