//! Why an image could not be brought in, found or removed.

use coracle_kernel::Error as KernelError;

use crate::digest::Digest;
use crate::layers::FileError;
use crate::parser::ParseError;

/// Why an image could not be brought in, found or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Manifest and configuration disagree.
    #[error("image with {manifest} layers in its manifest and {config} in its configuration")]
    LayerCount {
        /// Layers of the manifest.
        manifest: usize,
        /// Diff-ids of the configuration.
        config: usize,
    },
    /// A layer was neither there nor brought in.
    #[error("layer {0} is missing")]
    LayerMissing(usize),
    /// The compressed bytes are fewer or more than announced.
    #[error("layer {digest} has {actual} bytes instead of {expected}")]
    BlobSize {
        /// The layer's digest.
        digest: Digest,
        /// As the manifest says.
        expected: u64,
        /// As they came, counted no further than one read beyond.
        actual: u64,
    },
    /// The compressed bytes are others than announced.
    #[error("layer {digest} came with other content")]
    BlobDigest {
        /// The layer's digest.
        digest: Digest,
    },
    /// The archive in the layer is another one than the configuration says.
    #[error("layer has diff-id {actual} instead of {expected}")]
    DiffId {
        /// As the configuration says.
        expected: Digest,
        /// As unpacked.
        actual: Digest,
    },
    /// The layer cannot be unpacked.
    #[error("layer {digest}: {reason}")]
    Unpack {
        /// The layer's digest.
        digest: Digest,
        /// The worker's words.
        reason: String,
    },
    /// The bytes of a layer stopped coming.
    #[error("reading layer {digest}")]
    Source {
        /// The layer's digest.
        digest: Digest,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A layer could not be fitted to the ones below.
    #[error("settling {path:?} of a layer")]
    Settle {
        /// Path in the layer.
        path: String,
        /// The call that failed.
        #[source]
        source: KernelError,
    },
    /// The layer could not be written to the disk.
    #[error("writing a layer to the disk")]
    Sync(#[source] KernelError),
    /// A worker could not be started.
    #[error("starting an image worker")]
    Worker(#[source] KernelError),
    /// No pipe to a worker.
    #[error("pipe to an image worker")]
    Pipe(#[source] std::io::Error),
    /// A document could not be parsed.
    #[error(transparent)]
    Parse(#[from] ParseError),
    /// A file of the store could not be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The image's record could not be written or read.
    #[error("image records")]
    Records(#[source] std::io::Error),
    /// The image is used by a container.
    #[error("image {0} is in use")]
    InUse(Digest),
    /// An archive to be imported is not one.
    #[error("image archive: {0}")]
    Archive(String),
    /// A task of the daemon panicked.
    #[error("image task panicked: {0}")]
    Panicked(String),
}
