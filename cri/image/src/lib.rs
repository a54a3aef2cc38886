//! Images: references, credentials, pull, import, content, unpack, removal.
//!
//! The daemon parses nothing that comes from a registry or an archive. A pull or import goes so:
//!
//! 1. Manifest and configuration are hashed ([`Blob::verified`]), then parsed by a parse worker ([`Parser`]).
//! 2. [`ImageStore::begin`] says which layers are missing ([`Ingest::claim`]); each comes as a stream of compressed
//!    bytes and goes through the hash stage into an unpack worker of its own ([`LayerJob::unpack`]).
//! 3. [`Ingest::finish`] settles the layers in order, syncs them, and records the image. Until then nothing is visible.
//!
//! - `digest`, `reference`, `manifest`: parsed types of what images are named and described by
//! - `tar`, `decompress`, `whiteout`, `unpack`, `confine`, `worker`: what runs in the worker processes
//! - `workers`, `parser`, `ingest`, `stage`, `commit`: the daemon's side of a pull
//! - `layers`, `content`, `records`, `images`, `store`: what is on the disk, and the images in memory
//! - `pull`, `hosts`, `fetch`: registries, and the process that speaks to them
//! - `import`: OCI layouts and docker archives

mod commit;
mod confine;
mod content;
mod decompress;
pub mod digest;
mod error;
mod fetch;
mod hosts;
mod images;
mod import;
mod ingest;
mod layers;
pub mod manifest;
mod parser;
mod pax;
mod pull;
pub mod records;
pub mod reference;
mod report;
mod stage;
mod store;
mod tar;
#[cfg(test)]
mod test_archive;
mod unpack;
mod whiteout;
mod worker;
pub mod workers;

pub use content::{Blob, WrongDigest};
pub use coracle_snapshot::LayerDir;
pub use digest::Digest;
pub use error::ImageError;
pub use fetch::{Credentials, Failure, FailureKind, FetchError};
pub use images::Image;
pub use ingest::{Claim, Ingest, LayerJob, Names, NewImage};
pub use layers::FileError;
pub use manifest::ImageConfig;
pub use parser::{ParseError, Parser};
pub use pull::{PullError, PullOptions};
pub use records::{Change, ImageRecord, Pending, Records};
pub use reference::Reference;
pub use report::Limits;
pub use store::{ImageStore, StoreOptions, StoreUsage};
pub use worker::{WorkerError, worker_main};
pub use workers::{Home, Role, Worker, Workers};
