//! What the daemon and a fetch worker say to each other: JSON in sequenced packets, bodies through pipes.
//!
//! The worker gets one [`Setup`] (in a memfd: a bundle of authorities is larger than a packet), then one
//! [`Numbered`] request a packet, each with the write end of a pipe. The body goes into the pipe, its end and the
//! outcome come back as [`Outcome`] under the request's number.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Largest packet in either direction.
pub(crate) const PACKET_LIMIT_BYTES: usize = 32 << 10;

/// Largest setup document: four bundles of authorities and some.
pub(crate) const SETUP_LIMIT_BYTES: u64 = 4 << 20;

/// All that a worker may know: it sees no file of the host.
#[derive(Serialize, Deserialize)]
pub(crate) struct Setup {
    /// Where to ask, in order.
    pub(crate) endpoints: Vec<Endpoint>,
    /// The repository that this pull is about.
    pub(crate) repository: String,
    /// Who asks.
    pub(crate) credentials: Credentials,
    /// Content of the host's `/etc/resolv.conf`.
    pub(crate) resolv_conf: String,
    /// Content of the host's `/etc/hosts`.
    pub(crate) hosts: String,
    /// The host's authorities, PEM.
    pub(crate) authorities: String,
    /// The user that the worker becomes.
    pub(crate) uid: u32,
}

/// One server that may have the content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Endpoint {
    /// `https`, or `http` where the operator wrote so.
    pub(crate) scheme: Scheme,
    /// Host and optional port.
    pub(crate) authority: String,
    /// Authorities (PEM) trusted for this server besides the host's.
    pub(crate) authorities: String,
    /// For a mirror: the registry it stands for, sent as `ns=`.
    pub(crate) namespace: Option<String>,
    /// Whether it may be asked what a tag means (a digest may be asked of every server).
    pub(crate) resolves_tags: bool,
}

/// How a server is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Scheme {
    /// TLS.
    Https,
    /// Plain, only where the operator configured it.
    Http,
}

/// Who asks; redacted when printed.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Credentials {
    /// Nobody.
    #[default]
    Anonymous,
    /// A user with a password.
    Basic {
        /// User name.
        username: String,
        /// Password.
        password: String,
    },
    /// An OAuth2 refresh token.
    Identity(String),
    /// A bearer token that the registry takes as it is.
    Bearer(String),
}

/// What is asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// A manifest or index, by tag or digest.
    Manifest {
        /// Tag or digest.
        reference: String,
    },
    /// A blob.
    Blob {
        /// Its digest.
        digest: String,
        /// Its size as its descriptor says: more is an error, fewer too.
        size: u64,
    },
}

/// A request with the number under which its outcome comes back.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Numbered<T> {
    /// The request's number.
    pub(crate) id: u64,
    /// Request or outcome.
    pub(crate) body: T,
}

/// How a request ended.
pub(crate) type Outcome = Result<Head, Failure>;

/// What the answer's headers said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Head {
    /// `Content-Type` without parameters.
    pub(crate) media_type: String,
    /// `Docker-Content-Digest`, unverified.
    pub(crate) digest: Option<String>,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What the caller may decide by.
    pub kind: FailureKind,
    /// For people: the URL and what was wrong.
    pub message: String,
}

/// What a caller may decide by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The registry does not have it.
    NotFound,
    /// The registry refuses these credentials.
    Denied,
    /// The registry cannot be reached, is too slow or overloaded.
    Unavailable,
    /// The registry answers what the protocol does not allow.
    Protocol,
}

impl Failure {
    /// A failure of one kind.
    pub(crate) fn new(kind: FailureKind, message: impl fmt::Display) -> Self {
        let mut message = message.to_string();
        // A packet must hold it.
        if let Some((at, _)) = message.char_indices().nth(2048) {
            message.truncate(at);
        }
        Self { kind, message }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("Anonymous"),
            Self::Basic { username, .. } => write!(f, "Basic({username}, redacted)"),
            Self::Identity(_) => f.write_str("Identity(redacted)"),
            Self::Bearer(_) => f.write_str("Bearer(redacted)"),
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Https => "https",
            Self::Http => "http",
        })
    }
}
