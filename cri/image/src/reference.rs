//! Image references, normalised as Docker does: `busybox` is `docker.io/library/busybox:latest`.
//!
//! A parsed [`Reference`] always has a registry and a repository, and a tag or a digest (or both).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::digest::{Digest, DigestError};

/// The registry of names that do not say one.
pub const DEFAULT_REGISTRY: &str = "docker.io";
/// The tag of names that do not say one.
pub const DEFAULT_TAG: &str = "latest";
/// The longest repository name, registry included.
const MAX_NAME_BYTES: usize = 255;
/// The longest tag.
const MAX_TAG_BYTES: usize = 128;
/// The longest text that is looked at.
const MAX_REFERENCE_BYTES: usize = 1024;

/// A repository: the registry that serves it and its path there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository {
    registry: Box<str>,
    path: Box<str>,
}

/// A parsed, normalised reference to an image.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    repository: Repository,
    tag: Option<Box<str>>,
    digest: Option<Digest>,
}

/// Why a text is no reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Nothing, or more than could be a reference.
    #[error("image reference is empty or too long")]
    Length,
    /// The registry is no host name or address with an optional port.
    #[error("image reference with a malformed registry {0:?}")]
    Registry(String),
    /// The repository's path has a component that the grammar does not allow.
    #[error("image reference with a malformed repository {0:?}")]
    Repository(String),
    /// 64 hexadecimal digits alone: an image id, which would be ambiguous as a name.
    #[error("image reference is an image id")]
    IsId,
    /// The tag is malformed.
    #[error("image reference with a malformed tag {0:?}")]
    Tag(String),
    /// The digest is malformed.
    #[error("image reference with a malformed digest")]
    Digest(#[source] DigestError),
}

impl Repository {
    /// Host and optional port as in the reference: `docker.io`, `localhost:5000`, `[::1]:5000`.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path at the registry: `library/busybox`.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.path)
    }
}

impl Reference {
    /// The repository that it names.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The registry, `docker.io` where none was written.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.repository.registry
    }

    /// The repository's path at the registry.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.repository.path
    }

    /// The tag, if it has one (`latest` was put there if it had neither tag nor digest).
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if it has one.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// `repository:tag` without digest, as an image lists it; `None` without a tag.
    #[must_use]
    pub fn tagged(&self) -> Option<Reference> {
        self.tag.as_ref().map(|_| Reference {
            digest: None,
            ..self.clone()
        })
    }

    /// `repository@digest` without tag: the same repository at a digest that was resolved.
    #[must_use]
    pub fn at_digest(&self, digest: &Digest) -> Reference {
        Reference {
            repository: self.repository.clone(),
            tag: None,
            digest: Some(digest.clone()),
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Reference, ReferenceError> {
        if text.is_empty() || text.len() > MAX_REFERENCE_BYTES {
            return Err(ReferenceError::Length);
        }
        if text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(ReferenceError::IsId);
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse().map_err(ReferenceError::Digest)?)),
            None => (text, None),
        };
        // A colon after the last slash begins a tag; one before it a port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag.filter(|tag| !is_tag(tag)) {
            return Err(ReferenceError::Tag(tag.to_owned()));
        }
        let (registry, path) = split_registry(name);
        if !is_registry(registry) {
            return Err(ReferenceError::Registry(registry.to_owned()));
        }
        let path = match registry {
            DEFAULT_REGISTRY if !path.contains('/') => format!("library/{path}"),
            _ => path.to_owned(),
        };
        if registry.len() + 1 + path.len() > MAX_NAME_BYTES || !path.split('/').all(is_path_component) {
            return Err(ReferenceError::Repository(path));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some(DEFAULT_TAG),
            (tag, _) => tag,
        };
        let repository = Repository {
            registry: registry.into(),
            path: path.into(),
        };
        Ok(Reference {
            repository,
            tag: tag.map(Into::into),
            digest,
        })
    }
}

impl TryFrom<String> for Reference {
    type Error = ReferenceError;

    fn try_from(text: String) -> Result<Reference, ReferenceError> {
        text.parse()
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> String {
        reference.to_string()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.repository.fmt(f)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// The first component is a registry where it could be none of a Docker Hub path: dots, a port, upper case, localhost.
fn split_registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some(("index.docker.io", path)) => (DEFAULT_REGISTRY, path),
        Some((first, path))
            if first.contains(['.', ':', '['])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (first, path)
        }
        _ => (DEFAULT_REGISTRY, name),
    }
}

fn is_registry(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let Some((address, rest)) = rest.split_once(']') else {
                return false;
            };
            let port = match rest {
                "" => None,
                rest => match rest.strip_prefix(':') {
                    Some(port) => Some(port),
                    None => return false,
                },
            };
            return address.parse::<std::net::Ipv6Addr>().is_ok() && port.is_none_or(is_port);
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.split('.').all(is_label) && port.is_none_or(is_port)
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<u16>().is_ok_and(|port| port > 0)
}

/// Lower-case words joined by `.`, `_`, `__` or any number of `-`.
fn is_path_component(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if !text.bytes().next().is_some_and(is_word) || !text.bytes().last().is_some_and(is_word) {
        return false;
    }
    text.as_bytes()
        .chunk_by(|a, b| is_word(*a) == is_word(*b))
        .all(|run| {
            is_word(run[0]) || matches!(run, b"." | b"_" | b"__") || run.iter().all(|byte| *byte == b'-')
        })
}

fn is_tag(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= MAX_TAG_BYTES
        && text.bytes().next().is_some_and(is_word)
        && text
            .bytes()
            .all(|byte| is_word(byte) || byte == b'.' || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_normalised() {
        for (text, normal) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("me/app", "docker.io/me/app:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a/b:v1", "localhost:5000/a/b:v1"),
            ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("Registry/a", "Registry/a:latest"),
            ("quay.io/a/b__c/d--e.f", "quay.io/a/b__c/d--e.f:latest"),
        ] {
            let reference: Reference = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(reference.to_string(), normal);
            assert_eq!(
                normal.parse::<Reference>().unwrap(),
                reference,
                "normal form parses to itself"
            );
        }
    }

    #[test]
    fn a_digest_stands_with_or_without_a_tag() {
        let both: Reference = format!("a.io/x:v1@{DIGEST}").parse().unwrap();
        assert_eq!(both.tag(), Some("v1"));
        assert_eq!(both.tagged().unwrap().to_string(), "a.io/x:v1");
        let alone: Reference = format!("a.io/x@{DIGEST}").parse().unwrap();
        assert_eq!((alone.tag(), alone.tagged()), (None, None));
        assert_eq!(both.at_digest(alone.digest().unwrap()), alone);
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for bad in [
            "",
            "/a",
            "a/",
            "a//b",
            "A",
            "a:",
            "a:-x",
            "a@sha256:abc",
            "a@",
            "-a/b",
            "a.io:0/b",
            "a.io:99999/b",
            "a.io:/b",
            "a b",
            "a___b",
            "a..b",
            "../a",
            "a/../b",
            "http://a.io/b",
            "[::1/a",
            "[::1]x/a",
            "[x]/a",
            "a\n",
            "é",
            &"a".repeat(256),
            &format!("a:{}", "t".repeat(129)),
            &"x".repeat(2000),
            &DIGEST["sha256:".len()..],
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?} was taken");
        }
    }
}
