//! A pull from a registry, from reference to record.
//!
//! The steps: which servers (`hosts`), what the reference means there, manifest and configuration (hashed, then
//! parsed elsewhere), the missing layers side by side, the record. Dropping the future ends the worker processes and
//! leaves nothing half.

use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_blocking};

use crate::content::{Blob, WrongDigest};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::fetch::{Credentials, FetchError, Fetcher, Head, Request, Setup};
use crate::hosts::{self, HostsError};
use crate::images::Image;
use crate::ingest::{Claim, Ingest, Names, NewImage};
use crate::manifest::{self, Descriptor, Document, MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, Platform};
use crate::parser::{ParseError, Parser};
use crate::reference::Reference;
use crate::store::ImageStore;

/// Layers of one pull that are on their way at the same time.
const LAYERS_AT_ONCE: usize = 4;

/// Where distributions keep the bundle of authorities; the first that exists is taken.
const AUTHORITIES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

const HOST_FILE_LIMIT_BYTES: u64 = 2 << 20;

/// What the operator configured about pulls.
#[derive(Clone, Debug)]
pub struct PullOptions {
    /// Directory of `<host>/hosts.toml`.
    pub certs_dir: PathBuf,
    /// User id of the process that talks to registries.
    pub fetch_uid: u32,
}

/// Why an image was not pulled.
#[derive(Debug, Error)]
pub enum PullError {
    /// The configuration of the registry's servers cannot be used.
    #[error(transparent)]
    Hosts(#[from] HostsError),
    /// The registry, or the way to it.
    #[error("fetch {what}")]
    Fetch {
        /// `manifest`, `image configuration` or a layer's digest.
        what: String,
        /// Why.
        source: FetchError,
    },
    /// What came is not what was asked for.
    #[error("{what} from the registry")]
    Content {
        /// `manifest` or `image configuration`.
        what: &'static str,
        /// Expected and actual digest.
        source: WrongDigest,
    },
    /// A document has another size than its descriptor says.
    #[error("{what} has {actual} bytes, its descriptor says {expected}")]
    Size {
        /// `manifest` or `image configuration`.
        what: &'static str,
        /// By the descriptor.
        expected: u64,
        /// What came.
        actual: u64,
    },
    /// A document that is not acceptable.
    #[error(transparent)]
    Parse(#[from] ParseError),
    /// No image of the index is for this machine.
    #[error("no image for {os}/{architecture} in the index")]
    Platform {
        /// This machine's.
        os: String,
        /// This machine's.
        architecture: String,
    },
    /// An index that leads to an index.
    #[error("the index leads to another index")]
    NestedIndex,
    /// The store.
    #[error(transparent)]
    Store(#[from] ImageError),
    /// A task of ours ended in a panic, which stands in the log.
    #[error("a task of the pull panicked")]
    Panicked,
}

/// A document that has been hashed, with the type it was served as.
struct Fetched {
    blob: Blob,
    media_type: String,
}

impl ImageStore {
    /// Brings the image in; returns when everything is on the disk and recorded.
    pub async fn pull(
        &self,
        reference: &Reference,
        credentials: Credentials,
        options: &PullOptions,
    ) -> Result<Arc<Image>, PullError> {
        let setup = Setup {
            endpoints: hosts::endpoints(&options.certs_dir, reference.registry())?,
            repository: reference.path().to_owned(),
            credentials,
            resolv_conf: read_host_file("/etc/resolv.conf"),
            hosts: read_host_file("/etc/hosts"),
            authorities: AUTHORITIES
                .iter()
                .map(|path| read_host_file(path))
                .find(|text| !text.is_empty())
                .unwrap_or_default(),
            uid: options.fetch_uid,
        };
        let starting = |source| PullError::Fetch {
            what: "anything".into(),
            source,
        };
        let fetcher = Arc::new(Fetcher::start(self.workers(), &setup).map_err(starting)?);
        let parser = Parser::start(self.workers())?;

        // What the reference means.
        let top = fetch_manifest(&fetcher, reference).await?;
        let (parser, document) = parse_document(parser, &top).await?;
        let mut names = Names {
            tags: reference.tagged().into_iter().collect(),
            digests: vec![reference.at_digest(top.blob.digest())],
        };

        // From an index, the image for this machine.
        let (parser, manifest, config, layers) = match document {
            Document::Manifest { config, layers } => (parser, top, config, layers),
            Document::Index { manifests } => {
                let chosen = choose(&manifests)?;
                let manifest = fetch_document(&fetcher, "manifest", chosen, MAX_MANIFEST_BYTES).await?;
                names.digests.push(reference.at_digest(manifest.blob.digest()));
                let (parser, document) = parse_document(parser, &manifest).await?;
                let Document::Manifest { config, layers } = document else {
                    return Err(PullError::NestedIndex);
                };
                (parser, manifest, config, layers)
            }
        };

        let config = fetch_document(&fetcher, "image configuration", &config, MAX_CONFIG_BYTES).await?;
        let bytes = config.blob.bytes().to_vec();
        let (_, parsed) = with_parser(parser, move |parser| parser.config(&bytes)).await?;

        let ingest = self.begin(NewImage {
            manifest: manifest.blob,
            media_type: manifest.media_type,
            config: config.blob,
            parsed,
            layers,
        })?;
        fetch_layers(&fetcher, &ingest).await?;
        Ok(ingest.finish(names).await?)
    }
}

/// The manifest or index that the reference names; a digest in the reference binds.
async fn fetch_manifest(fetcher: &Fetcher, reference: &Reference) -> Result<Fetched, PullError> {
    let asked = match (reference.digest(), reference.tag()) {
        (Some(digest), _) => digest.to_string(),
        (None, tag) => tag.unwrap_or(crate::reference::DEFAULT_TAG).to_owned(),
    };
    let failed = |source| PullError::Fetch {
        what: format!("manifest {asked} of {}", reference.repository()),
        source,
    };
    let request = Request::Manifest {
        reference: asked.clone(),
    };
    let (bytes, head) = fetcher
        .small(request, MAX_MANIFEST_BYTES as u64)
        .await
        .map_err(failed)?;
    let announced: Option<Digest> = head.digest.as_deref().and_then(|text| text.parse().ok());
    let expected = reference
        .digest()
        .cloned()
        .or(announced)
        .unwrap_or_else(|| Digest::sha256(&bytes));
    let blob = Blob::verified(&expected, bytes).map_err(|source| PullError::Content {
        what: "manifest",
        source,
    })?;
    Ok(Fetched {
        blob,
        media_type: head.media_type,
    })
}

/// A manifest or configuration by its descriptor: size and digest must be right before anything parses it.
async fn fetch_document(
    fetcher: &Fetcher,
    what: &'static str,
    descriptor: &Descriptor,
    limit_bytes: usize,
) -> Result<Fetched, PullError> {
    let digest = descriptor.digest.to_string();
    let request = match what {
        "manifest" => Request::Manifest { reference: digest },
        _ => Request::Blob {
            digest,
            size: descriptor.size,
        },
    };
    let failed = |source| PullError::Fetch {
        what: format!("{what} {}", descriptor.digest),
        source,
    };
    let (bytes, _): (Vec<u8>, Head) = fetcher.small(request, limit_bytes as u64).await.map_err(failed)?;
    if bytes.len() as u64 != descriptor.size {
        return Err(PullError::Size {
            what,
            expected: descriptor.size,
            actual: bytes.len() as u64,
        });
    }
    let blob =
        Blob::verified(&descriptor.digest, bytes).map_err(|source| PullError::Content { what, source })?;
    Ok(Fetched {
        blob,
        media_type: descriptor.media_type.clone(),
    })
}

fn choose(manifests: &[Descriptor]) -> Result<&Descriptor, PullError> {
    let host = Platform::host();
    manifest::select(manifests, &host).ok_or(PullError::Platform {
        os: host.os,
        architecture: host.architecture,
    })
}

/// All missing layers, some at a time; the first failure ends the others.
async fn fetch_layers(fetcher: &Arc<Fetcher>, ingest: &Ingest) -> Result<(), PullError> {
    let turns = Arc::new(Semaphore::new(LAYERS_AT_ONCE));
    let mut tasks = JoinSet::new();
    for index in 0..ingest.layers().len() {
        let (fetcher, ingest, turns) = (Arc::clone(fetcher), ingest.clone(), Arc::clone(&turns));
        tasks.spawn(async move {
            // The semaphore is never closed; without a permit the layer would only come sooner.
            let _turn = turns.acquire().await;
            fetch_layer(&fetcher, &ingest, index).await
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.map_err(|_| PullError::Panicked)??;
    }
    Ok(())
}

async fn fetch_layer(fetcher: &Fetcher, ingest: &Ingest, index: usize) -> Result<(), PullError> {
    let Claim::Unpack(job) = ingest.claim(index).await else {
        return Ok(());
    };
    let Descriptor { digest, size, .. } = job.descriptor().clone();
    let failed = |source| PullError::Fetch {
        what: format!("layer {digest}"),
        source,
    };
    let request = Request::Blob {
        digest: digest.to_string(),
        size,
    };
    let (body, outcome) = fetcher.begin(request).await.map_err(failed)?.split();
    let unpacked = job.unpack(body).await;
    // A body that broke off explains a digest that is wrong, so the network's word comes first.
    outcome.await.map_err(failed)?;
    Ok(unpacked?)
}

async fn parse_document(parser: Parser, fetched: &Fetched) -> Result<(Parser, Document), PullError> {
    let (bytes, media_type) = (fetched.blob.bytes().to_vec(), fetched.media_type.clone());
    with_parser(parser, move |parser| parser.document(&bytes, Some(&media_type))).await
}

/// Runs a call to the parse worker, which blocks, on its own thread.
async fn with_parser<T: Send + 'static>(
    mut parser: Parser,
    call: impl FnOnce(&mut Parser) -> Result<T, ParseError> + Send + 'static,
) -> Result<(Parser, T), PullError> {
    let work = move || call(&mut parser).map(|answer| (parser, answer));
    Ok(spawn_blocking(work).await.map_err(|_| PullError::Panicked)??)
}

/// A file of the host that a worker needs and may not open; nothing where there is none.
fn read_host_file(path: &str) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(HOST_FILE_LIMIT_BYTES).read_to_end(&mut bytes));
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => String::new(),
    }
}
