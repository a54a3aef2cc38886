//! The documents as they are written, and their parsing.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{
    ArchiveImage, DOCKER_LIST, DOCKER_MANIFEST, Descriptor, Document, DocumentError, ImageConfig,
    MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, OCI_INDEX, OCI_MANIFEST, Platform, check_archive, refuse,
};
use crate::digest::Digest;

/// The annotation of an OCI layout's index that names an image.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation that containerd and buildkit put the full name in.
const FULL_NAME: &str = "io.containerd.image.name";

/// Parses an index or a manifest. `announced` is the media type it was served or described with.
pub fn parse_document(bytes: &[u8], announced: Option<&str>) -> Result<Document, DocumentError> {
    limit("manifest", bytes, MAX_MANIFEST_BYTES)?;
    let raw: RawDocument = parse("manifest", bytes)?;
    if raw.schema_version != 2 {
        return refuse(format!(
            "manifest of schema version {}, only 2 is supported",
            raw.schema_version
        ));
    }
    let media_type = match (raw.media_type.as_deref(), announced) {
        (Some(own), Some(announced)) if own != announced => {
            return refuse(format!(
                "manifest says it is {own:?} but was announced as {announced:?}"
            ));
        }
        (own, announced) => own.or(announced),
    };
    let document = match (raw.manifests, raw.config, raw.layers) {
        (Some(manifests), None, None) => {
            only("an index", media_type, &[OCI_INDEX, DOCKER_LIST])?;
            let manifests = manifests
                .into_iter()
                .map(RawDescriptor::convert)
                .collect::<Result<_, _>>()?;
            Document::Index { manifests }
        }
        (None, Some(config), Some(layers)) => {
            only("a manifest", media_type, &[OCI_MANIFEST, DOCKER_MANIFEST])?;
            let layers = layers
                .into_iter()
                .map(RawDescriptor::convert)
                .collect::<Result<_, _>>()?;
            Document::Manifest {
                config: config.convert()?,
                layers,
            }
        }
        _ => return refuse("manifest is neither clearly an index nor clearly a manifest"),
    };
    document.check()?;
    Ok(document)
}

/// Parses an image configuration.
pub fn parse_config(bytes: &[u8]) -> Result<ImageConfig, DocumentError> {
    limit("image configuration", bytes, MAX_CONFIG_BYTES)?;
    let raw: RawImage = parse("image configuration", bytes)?;
    let rootfs = raw.rootfs;
    if !rootfs.kind.is_empty() && rootfs.kind != "layers" {
        return refuse(format!(
            "image configuration with a root file system of type {:?}",
            rootfs.kind
        ));
    }
    let run = raw.config.unwrap_or_default();
    let config = ImageConfig {
        platform: Platform {
            os: raw.os,
            architecture: raw.architecture,
            variant: raw.variant.unwrap_or_default(),
        },
        created: raw.created.unwrap_or_default(),
        user: run.user.unwrap_or_default(),
        env: run.env.unwrap_or_default(),
        entrypoint: run.entrypoint.unwrap_or_default(),
        cmd: run.cmd.unwrap_or_default(),
        working_dir: run.working_dir.unwrap_or_default(),
        stop_signal: run.stop_signal.unwrap_or_default(),
        volumes: run.volumes.unwrap_or_default().into_keys().collect(),
        exposed_ports: run.exposed_ports.unwrap_or_default().into_keys().collect(),
        labels: run.labels.unwrap_or_default(),
        diff_ids: rootfs.diff_ids.unwrap_or_default(),
    };
    config.check()?;
    Ok(config)
}

/// Parses the `manifest.json` of a docker archive.
pub fn parse_archive(bytes: &[u8]) -> Result<Vec<ArchiveImage>, DocumentError> {
    limit("manifest.json", bytes, MAX_MANIFEST_BYTES)?;
    let raw: Vec<RawArchiveImage> = parse("manifest.json", bytes)?;
    let images = raw
        .into_iter()
        .map(|image| ArchiveImage {
            config: image.config,
            repo_tags: image.repo_tags.unwrap_or_default(),
            layers: image.layers.unwrap_or_default(),
        })
        .collect::<Vec<_>>();
    check_archive(&images)?;
    Ok(images)
}

fn only(what: &str, media_type: Option<&str>, allowed: &[&str]) -> Result<(), DocumentError> {
    match media_type {
        Some(media_type) if !allowed.contains(&media_type) => refuse(format!(
            "document has the fields of {what} but is of type {media_type:?}"
        )),
        _ => Ok(()),
    }
}

fn limit(document: &str, bytes: &[u8], limit: usize) -> Result<(), DocumentError> {
    if bytes.len() > limit {
        return Err(DocumentError::TooLarge {
            document: document.into(),
            limit,
        });
    }
    Ok(())
}

fn parse<'de, T: Deserialize<'de>>(document: &str, bytes: &'de [u8]) -> Result<T, DocumentError> {
    serde_json::from_slice(bytes).map_err(|error| {
        // The text may quote a hostile value at any length.
        let reason: String = error.to_string().chars().take(300).collect();
        DocumentError::Malformed {
            document: document.into(),
            reason,
        }
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    schema_version: u32,
    media_type: Option<String>,
    manifests: Option<Vec<RawDescriptor>>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<RawPlatform>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

#[derive(Deserialize)]
struct RawImage {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    variant: Option<String>,
    created: Option<String>,
    config: Option<RawRun>,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(rename = "type", default)]
    kind: String,
    diff_ids: Option<Vec<Digest>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawRun {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    labels: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawArchiveImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

impl RawDescriptor {
    fn convert(self) -> Result<Descriptor, DocumentError> {
        let digest = match self.digest.parse() {
            Ok(digest) => digest,
            Err(error) => return refuse(format!("descriptor with a malformed digest: {error}")),
        };
        let mut annotations = self.annotations.unwrap_or_default();
        let name = annotations
            .remove(FULL_NAME)
            .or_else(|| annotations.remove(REF_NAME));
        let platform = self.platform.map(|raw| Platform {
            os: raw.os,
            architecture: raw.architecture,
            variant: raw.variant,
        });
        Ok(Descriptor {
            media_type: self.media_type,
            digest,
            size: self.size,
            platform,
            name,
        })
    }
}
