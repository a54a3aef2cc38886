//! The gRPC services: check, one call, convert.

mod admin;
mod image;
mod runtime;

use std::path::PathBuf;
use std::sync::Arc;

use coracle_engine::Engine;
use coracle_image::{ImageStore, PullOptions};
use coracle_network::Network;
use coracle_stream::Server as StreamServer;
use tokio::sync::watch;
use tonic::Status;

use crate::sessions::EngineSessions;

pub(crate) use admin::AdminService;
pub(crate) use image::Images;
pub(crate) use runtime::Runtime;

/// What all services work with; clones share it.
#[derive(Clone)]
pub(crate) struct Shared {
    /// Pods and containers.
    pub(crate) engine: Engine,
    /// Images.
    pub(crate) images: Arc<ImageStore>,
    /// Pod networks.
    pub(crate) network: Arc<Network>,
    /// What gives the URLs of sessions.
    pub(crate) streams: Arc<StreamServer<EngineSessions>>,
    /// How pulls are done; a reload changes it.
    pub(crate) pulls: watch::Receiver<PullOptions>,
    /// The data root.
    pub(crate) root: PathBuf,
}

/// For calls that this release does not do.
fn not_done(what: &str) -> Status {
    Status::unimplemented(format!("{what} is not part of this release of coracle"))
}
