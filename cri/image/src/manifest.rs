//! The JSON documents of an image: index, manifest, configuration, and the list inside a docker archive.
//!
//! The `parse_*` functions run in the parse worker, on bytes whose digest is already known to be right. What they
//! return is plain, bounded and typed; the daemon checks the bounds again ([`Document::check`] and its like) on what
//! the worker answers, since a worker that was taken over may answer anything.
//!
//! Ambiguity is refused, not resolved: a document that is both index and manifest, a media type that differs from the
//! one it was announced with, a key given twice.

mod parse;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
pub use parse::{parse_archive, parse_config, parse_document};

/// The largest index or manifest that is looked at.
pub const MAX_MANIFEST_BYTES: usize = 4 << 20;
/// The largest image configuration that is looked at.
pub const MAX_CONFIG_BYTES: usize = 8 << 20;
/// The most layers of an image: what overlayfs can stack.
pub const MAX_LAYERS: usize = 500;
/// The most entries of an index.
pub const MAX_INDEX_ENTRIES: usize = 4096;
/// The most images in a docker archive.
const MAX_ARCHIVE_IMAGES: usize = 256;
/// The most bytes of text (environment, labels, command …) that a configuration may come to.
const MAX_CONFIG_TEXT_BYTES: usize = 1 << 20;
/// The most bytes of one text, as much as one argument of execve may have.
const MAX_TEXT_BYTES: usize = 128 << 10;
/// The most entries of one list in a configuration.
const MAX_LIST_ENTRIES: usize = 16 << 10;
/// The largest blob that a descriptor may announce.
const MAX_BLOB_BYTES: u64 = 1 << 40;

/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Docker manifest list, the older name of an index.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker manifest, version 2 schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// OCI image configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Docker image configuration.
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Why a document is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum DocumentError {
    /// More bytes than are looked at.
    #[error("{document} is larger than {limit} bytes")]
    TooLarge {
        /// What it is.
        document: String,
        /// The limit.
        limit: usize,
    },
    /// Not JSON, or a field of a wrong type, or a field given twice.
    #[error("{document} is malformed: {reason}")]
    Malformed {
        /// What it is.
        document: String,
        /// The parser's words, with line and column.
        reason: String,
    },
    /// Well formed, but nothing that can be run.
    #[error("{0}")]
    Refused(String),
}

/// A platform that an image is made for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64` …, as Go names them.
    pub architecture: String,
    /// `v7`, `v3` …, or nothing.
    pub variant: String,
}

/// A blob as a document announces it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// The platform, of an index entry that says one.
    pub platform: Option<Platform>,
    /// The image's name, of an entry in an OCI layout's index that says one.
    pub name: Option<String>,
}

/// An index or a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Document {
    /// Several images, one a platform, or an OCI layout's list.
    Index {
        /// The entries in order.
        manifests: Vec<Descriptor>,
    },
    /// One image.
    Manifest {
        /// The configuration.
        config: Descriptor,
        /// The layers, lowest first.
        layers: Vec<Descriptor>,
    },
}

/// The fields of an image configuration that matter for running it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// What it was built for.
    pub platform: Platform,
    /// When it was built, as it says.
    pub created: String,
    /// User to run as: name or number, and optional group.
    pub user: String,
    /// Environment, `KEY=value`.
    pub env: Vec<String>,
    /// The program and its fixed arguments.
    pub entrypoint: Vec<String>,
    /// Default arguments.
    pub cmd: Vec<String>,
    /// Current directory.
    pub working_dir: String,
    /// Signal that asks it to stop.
    pub stop_signal: String,
    /// Paths that it declares as volumes.
    pub volumes: Vec<String>,
    /// Ports that it declares (`80/tcp`).
    pub exposed_ports: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Digests of the uncompressed layers, lowest first.
    pub diff_ids: Vec<Digest>,
}

/// One image of a docker archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveImage {
    /// Name of the configuration's entry in the archive.
    pub config: String,
    /// Names of the image.
    pub repo_tags: Vec<String>,
    /// Names of the layers' entries, lowest first.
    pub layers: Vec<String>,
}

/// Holds the list of a docker archive against its bounds.
pub fn check_archive(images: &[ArchiveImage]) -> Result<(), DocumentError> {
    if images.is_empty() || images.len() > MAX_ARCHIVE_IMAGES {
        return refuse(format!(
            "archive of {} images, between 1 and {MAX_ARCHIVE_IMAGES} are supported",
            images.len()
        ));
    }
    for image in images {
        check_layer_count(image.layers.len())?;
        let mut texts = Texts::default();
        texts.one("Config", &image.config)?;
        texts.list("RepoTags", &image.repo_tags)?;
        texts.list("Layers", &image.layers)?;
    }
    Ok(())
}

impl Document {
    /// Holds the document against its bounds and the media types that can be run.
    pub fn check(&self) -> Result<(), DocumentError> {
        match self {
            Document::Index { manifests } => {
                if manifests.len() > MAX_INDEX_ENTRIES {
                    return refuse(format!("index of more than {MAX_INDEX_ENTRIES} entries"));
                }
                manifests.iter().try_for_each(Descriptor::check)
            }
            Document::Manifest { config, layers } => {
                check_layer_count(layers.len())?;
                config.check()?;
                if config.media_type != OCI_CONFIG && config.media_type != DOCKER_CONFIG {
                    return refuse(format!(
                        "not an image: its configuration is of type {:?}",
                        config.media_type
                    ));
                }
                if config.size > MAX_CONFIG_BYTES as u64 {
                    return refuse(format!(
                        "image configuration is larger than {MAX_CONFIG_BYTES} bytes"
                    ));
                }
                for layer in layers {
                    layer.check()?;
                    if !is_layer_type(&layer.media_type) {
                        return refuse(format!("layers of type {:?} are not supported", layer.media_type));
                    }
                }
                Ok(())
            }
        }
    }
}

impl Descriptor {
    fn check(&self) -> Result<(), DocumentError> {
        let mut texts = Texts::default();
        texts.one("mediaType", &self.media_type)?;
        if let Some(name) = &self.name {
            texts.one("name", name)?;
        }
        if let Some(platform) = &self.platform {
            platform.check(&mut texts)?;
        }
        if self.size > MAX_BLOB_BYTES {
            return refuse(format!(
                "blob {} of {} bytes is larger than any that is supported",
                self.digest, self.size
            ));
        }
        Ok(())
    }
}

impl ImageConfig {
    /// Holds the configuration against its bounds.
    pub fn check(&self) -> Result<(), DocumentError> {
        check_layer_count(self.diff_ids.len())?;
        let mut texts = Texts::default();
        self.platform.check(&mut texts)?;
        for (field, text) in [
            ("created", &self.created),
            ("User", &self.user),
            ("WorkingDir", &self.working_dir),
            ("StopSignal", &self.stop_signal),
        ] {
            texts.one(field, text)?;
        }
        for (field, list) in [
            ("Env", &self.env),
            ("Entrypoint", &self.entrypoint),
            ("Cmd", &self.cmd),
            ("Volumes", &self.volumes),
            ("ExposedPorts", &self.exposed_ports),
        ] {
            texts.list(field, list)?;
        }
        if self.labels.len() > MAX_LIST_ENTRIES {
            return refuse("image configuration: Labels has too many entries");
        }
        for (key, value) in &self.labels {
            texts.one("Labels", key)?;
            texts.one("Labels", value)?;
        }
        Ok(())
    }
}

impl Platform {
    /// What this machine runs.
    #[must_use]
    pub fn host() -> Platform {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", ""),
            "aarch64" => ("arm64", "v8"),
            "x86" => ("386", ""),
            "arm" => ("arm", "v7"),
            "powerpc64" => ("ppc64le", ""),
            other => (other, ""),
        };
        Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: variant.into(),
        }
    }

    /// How well an image of platform `image` suits this platform: higher is better, `None` is not at all.
    ///
    /// Of arm the host's variant and all below are accepted, the newest first. Variants of other architectures are
    /// raised minimum instruction sets (`amd64/v3`): what says none runs everywhere and is preferred.
    #[must_use]
    pub fn suitability(&self, image: &Platform) -> Option<u8> {
        if image.os != self.os || image.architecture != self.architecture {
            return None;
        }
        match (self.architecture.as_str(), image.variant.as_str()) {
            (_, "") => Some(100),
            (_, variant) if variant == self.variant => Some(101),
            ("arm", _) => level_of(image).filter(|level| Some(*level) <= level_of(self)),
            ("amd64", "v1") => Some(99),
            _ => None,
        }
    }

    fn check(&self, texts: &mut Texts) -> Result<(), DocumentError> {
        texts.one("os", &self.os)?;
        texts.one("architecture", &self.architecture)?;
        texts.one("variant", &self.variant)
    }
}

/// The entry of an index that suits `host` best, the first among equals.
///
/// Entries for `unknown/unknown` (attestations) suit nothing. One that says no platform is taken where it is the only
/// manifest there is.
#[must_use]
pub fn select<'index>(manifests: &'index [Descriptor], host: &Platform) -> Option<&'index Descriptor> {
    let mut best: Option<(u8, &Descriptor)> = None;
    for entry in manifests {
        let rank = entry
            .platform
            .as_ref()
            .and_then(|platform| host.suitability(platform));
        if let Some(rank) = rank
            && best.is_none_or(|(other, _)| rank > other)
        {
            best = Some((rank, entry));
        }
    }
    match (best, manifests) {
        (Some((_, entry)), _) => Some(entry),
        (None, [only]) if only.platform.is_none() => Some(only),
        (None, _) => None,
    }
}

fn level_of(platform: &Platform) -> Option<u8> {
    platform
        .variant
        .strip_prefix('v')
        .and_then(|digits| digits.parse().ok())
}

fn is_layer_type(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    )
}

fn check_layer_count(count: usize) -> Result<(), DocumentError> {
    if count > MAX_LAYERS {
        return refuse(format!(
            "image of {count} layers, at most {MAX_LAYERS} are supported"
        ));
    }
    Ok(())
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, DocumentError> {
    Err(DocumentError::Refused(reason.into()))
}

/// Counts the text of a configuration.
#[derive(Default)]
struct Texts {
    bytes: usize,
}

impl Texts {
    fn one(&mut self, field: &str, text: &str) -> Result<(), DocumentError> {
        if text.contains('\0') {
            return refuse(format!("{field} contains a NUL byte"));
        }
        self.bytes = self.bytes.saturating_add(text.len());
        if text.len() > MAX_TEXT_BYTES || self.bytes > MAX_CONFIG_TEXT_BYTES {
            return refuse(format!("{field} is too long"));
        }
        Ok(())
    }

    fn list(&mut self, field: &str, list: &[String]) -> Result<(), DocumentError> {
        if list.len() > MAX_LIST_ENTRIES {
            return refuse(format!("{field} has too many entries"));
        }
        list.iter().try_for_each(|text| self.one(field, text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn descriptor(media_type: &str) -> String {
        format!(r#"{{"mediaType":"{media_type}","digest":"{DIGEST}","size":7}}"#)
    }

    fn manifest(layers: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","config":{},"layers":[{layers}]}}"#,
            descriptor(OCI_CONFIG)
        )
    }

    fn reason(result: Result<Document, DocumentError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn manifests_and_indexes_of_both_families_parse() {
        let layer = descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip");
        let Document::Manifest { layers, .. } =
            parse_document(manifest(&layer).as_bytes(), Some(OCI_MANIFEST)).unwrap()
        else {
            panic!("not a manifest")
        };
        assert_eq!(layers[0].size, 7);
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
            descriptor(OCI_MANIFEST)
        );
        for announced in [None, Some(OCI_INDEX), Some(DOCKER_LIST)] {
            assert!(matches!(
                parse_document(index.as_bytes(), announced),
                Ok(Document::Index { .. })
            ));
        }
    }

    #[test]
    fn ambiguous_documents_are_refused() {
        let both = format!(
            r#"{{"schemaVersion":2,"manifests":[],"config":{},"layers":[]}}"#,
            descriptor(OCI_CONFIG)
        );
        assert!(reason(parse_document(both.as_bytes(), None)).contains("neither clearly"));
        let text = manifest("");
        assert!(reason(parse_document(text.as_bytes(), Some(OCI_INDEX))).contains("announced"));
        let wrong = text.replace(OCI_MANIFEST, OCI_INDEX);
        assert!(reason(parse_document(wrong.as_bytes(), None)).contains("fields of a manifest"));
        let twice = text.replacen("{", r#"{"layers":[],"#, 1);
        assert!(reason(parse_document(twice.as_bytes(), None)).contains("duplicate field"));
        let old = text.replace(r#""schemaVersion":2"#, r#""schemaVersion":1"#);
        assert!(reason(parse_document(old.as_bytes(), None)).contains("schema version 1"));
        assert!(reason(parse_document(b"{}", None)).contains("schema version 0"));
        let artifact = text.replace(OCI_CONFIG, "application/vnd.oci.empty.v1+json");
        assert!(reason(parse_document(artifact.as_bytes(), None)).contains("not an image"));
        let encrypted = manifest(&descriptor("application/vnd.oci.image.layer.v1.tar+encrypted"));
        assert!(reason(parse_document(encrypted.as_bytes(), None)).contains("not supported"));
    }

    #[test]
    fn documents_are_bounded() {
        let layer = descriptor("application/vnd.oci.image.layer.v1.tar");
        let many = |count| manifest(&vec![layer.clone(); count].join(","));
        parse_document(many(MAX_LAYERS).as_bytes(), None).unwrap();
        assert!(reason(parse_document(many(MAX_LAYERS + 1).as_bytes(), None)).contains("501 layers"));
        let large = format!("{}{}", manifest(""), " ".repeat(MAX_MANIFEST_BYTES));
        assert!(reason(parse_document(large.as_bytes(), None)).contains("larger than"));
        let deep = format!(r#"{{"schemaVersion":2,"annotations":{}"#, "[".repeat(100_000));
        assert!(reason(parse_document(deep.as_bytes(), None)).contains("malformed"));
        let deep = format!(r#"{{"schemaVersion":2,"layers":{}"#, "[".repeat(100_000));
        assert!(reason(parse_document(deep.as_bytes(), None)).contains("malformed"));
        let digest = manifest("").replace(DIGEST, "sha256:../../etc/passwd");
        assert!(reason(parse_document(digest.as_bytes(), None)).contains("malformed digest"));
        let negative = manifest("").replace(r#""size":7"#, r#""size":-7"#);
        assert!(reason(parse_document(negative.as_bytes(), None)).contains("malformed"));
    }

    #[test]
    fn configurations_keep_what_matters_and_refuse_the_rest() {
        let config = parse_config(
            format!(
                r#"{{"os":"linux","architecture":"amd64","created":null,"history":[{{}}],
                "config":{{"User":"4294967296","Env":["A=b"],"Entrypoint":null,"Cmd":["sh"],"Volumes":{{"/../..":{{}}}},
                "Labels":null,"Healthcheck":{{}}}},"rootfs":{{"type":"layers","diff_ids":["{DIGEST}"]}}}}"#
            )
            .as_bytes(),
        )
        .unwrap();
        assert_eq!(config.diff_ids.len(), 1);
        assert_eq!((config.cmd, config.entrypoint), (vec!["sh".to_owned()], vec![]));
        let null = parse_config(br#"{"config":null,"rootfs":{"type":"layers"}}"#).unwrap();
        assert_eq!(null, ImageConfig::default());
        for (bad, why) in [
            (r#"{"rootfs":{"type":"zip"}}"#.to_owned(), "type \"zip\""),
            (r#"{"config":{"Env":["A=\u0000"]},"rootfs":{}}"#.to_owned(), "NUL"),
            (
                format!(
                    r#"{{"config":{{"User":"{}"}},"rootfs":{{}}}}"#,
                    "x".repeat(200_000)
                ),
                "User is too long",
            ),
            (
                format!(
                    r#"{{"config":{{"Env":[{}]}},"rootfs":{{}}}}"#,
                    vec!["\"\""; 20_000].join(",")
                ),
                "too many",
            ),
            (r#"{"config":{}}"#.to_owned(), "missing field"),
        ] {
            let text = parse_config(bad.as_bytes()).unwrap_err().to_string();
            assert!(text.contains(why), "{text}");
        }
    }

    #[test]
    fn the_best_platform_is_taken() {
        let entry = |os: &str, architecture: &str, variant: &str| Descriptor {
            media_type: OCI_MANIFEST.into(),
            digest: Digest::sha256(format!("{os}{architecture}{variant}").as_bytes()),
            size: 1,
            platform: Some(Platform {
                os: os.into(),
                architecture: architecture.into(),
                variant: variant.into(),
            }),
            name: None,
        };
        let host = |architecture: &str, variant: &str| Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: variant.into(),
        };
        let index = [
            entry("unknown", "unknown", ""),
            entry("windows", "amd64", ""),
            entry("linux", "amd64", "v3"),
            entry("linux", "amd64", ""),
            entry("linux", "arm", "v5"),
            entry("linux", "arm", "v6"),
            entry("linux", "arm", "v8"),
            entry("linux", "arm64", "v8"),
        ];
        assert_eq!(select(&index, &host("amd64", "")), Some(&index[3]));
        assert_eq!(select(&index, &host("arm", "v7")), Some(&index[5]));
        assert_eq!(select(&index, &host("arm64", "v8")), Some(&index[7]));
        assert_eq!(select(&index, &host("s390x", "")), None);
        let mut plain = entry("", "", "");
        plain.platform = None;
        assert_eq!(
            select(std::slice::from_ref(&plain), &host("s390x", "")),
            Some(&plain)
        );
    }

    #[test]
    fn docker_archives_list_their_images() {
        let images =
            parse_archive(br#"[{"Config":"a.json","RepoTags":null,"Layers":["x/layer.tar"],"Parent":""}]"#)
                .unwrap();
        assert_eq!(images[0].layers, ["x/layer.tar"]);
        parse_archive(b"[]").unwrap_err();
        parse_archive(b"{}").unwrap_err();
    }
}
