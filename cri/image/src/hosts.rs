//! Which servers a registry's content is asked from: `<certs_dir>/<host>/hosts.toml`, read at every pull.
//!
//! The keys `server`, `capabilities`, `ca` and `[host."URL"]` with `capabilities` and `ca` mean what they mean to
//! containerd; any other key is refused by name, for a key that is ignored might be one that protects. Plain HTTP
//! is spoken where a URL says `http://` and nowhere else.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use crate::fetch::{Endpoint, Scheme};
use crate::reference::DEFAULT_REGISTRY;

const FILE_LIMIT_BYTES: u64 = 1 << 20;

/// The server that stands behind the default registry's name.
const DEFAULT_REGISTRY_SERVER: &str = "registry-1.docker.io";

/// Why a host's configuration cannot be used.
#[derive(Debug, Error)]
pub enum HostsError {
    /// A file cannot be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is larger than 1 MiB.
    #[error("{0} is larger than 1 MiB")]
    TooLarge(PathBuf),
    /// `hosts.toml` does not parse, or has a key that is not known.
    #[error("parse {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A URL is not `http[s]://host[:port]`.
    #[error("{path}: {url:?} is not http[s]://host[:port]")]
    Url {
        /// The file.
        path: PathBuf,
        /// What stands there.
        url: String,
    },
    /// A capability is not known.
    #[error("{path}: unknown capability {word:?} (known: pull, resolve, push)")]
    Capability {
        /// The file.
        path: PathBuf,
        /// What stands there.
        word: String,
    },
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct HostsFile {
    server: Option<String>,
    capabilities: Option<Vec<String>>,
    ca: Paths,
    // The order of the file is the order of asking.
    host: toml::map::Map<String, toml::Value>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct HostSection {
    capabilities: Option<Vec<String>>,
    ca: Paths,
}

#[derive(Default, Deserialize)]
#[serde(untagged)]
enum Paths {
    #[default]
    None,
    One(PathBuf),
    Many(Vec<PathBuf>),
}

/// The servers to ask for content of `registry`, in order; mirrors first, the registry itself last.
pub(crate) fn endpoints(certs_dir: &Path, registry: &str) -> Result<Vec<Endpoint>, HostsError> {
    let server = if registry == DEFAULT_REGISTRY {
        DEFAULT_REGISTRY_SERVER
    } else {
        registry
    };
    let own = |authorities| Endpoint {
        scheme: Scheme::Https,
        authority: server.to_owned(),
        authorities,
        namespace: None,
        resolves_tags: true,
    };
    for dir in [registry, "_default"] {
        let path = certs_dir.join(dir).join("hosts.toml");
        if let Some(text) = read_optional(&path)? {
            return parse(&path, &text, registry, own(String::new()));
        }
    }
    Ok(vec![own(String::new())])
}

fn parse(path: &Path, text: &str, registry: &str, own: Endpoint) -> Result<Vec<Endpoint>, HostsError> {
    let bad = |source| HostsError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    };
    let file: HostsFile = toml::from_str(text).map_err(bad)?;
    let mut found = Vec::new();
    for (url, section) in file.host {
        let section: HostSection = section.try_into().map_err(bad)?;
        let (scheme, authority) = split_url(path, &url)?;
        let Some(resolves_tags) = may_pull(path, section.capabilities.as_deref())? else {
            continue;
        };
        let namespace = (authority != registry).then(|| registry.to_owned());
        found.push(Endpoint {
            scheme,
            authority,
            authorities: read_authorities(path, section.ca)?,
            namespace,
            resolves_tags,
        });
    }
    let (scheme, authority) = match &file.server {
        Some(url) => split_url(path, url)?,
        None => (own.scheme, own.authority.clone()),
    };
    if let Some(resolves_tags) = may_pull(path, file.capabilities.as_deref())? {
        found.push(Endpoint {
            scheme,
            authority,
            authorities: read_authorities(path, file.ca)?,
            resolves_tags,
            ..own
        });
    }
    Ok(found)
}

/// `Some(resolve)` where `pull` is allowed; both are when nothing is said.
fn may_pull(path: &Path, words: Option<&[String]>) -> Result<Option<bool>, HostsError> {
    let Some(words) = words else { return Ok(Some(true)) };
    if let Some(word) = words
        .iter()
        .find(|w| !["pull", "resolve", "push"].contains(&w.as_str()))
    {
        return Err(HostsError::Capability {
            path: path.to_owned(),
            word: word.clone(),
        });
    }
    let has = |word: &str| words.iter().any(|w| w == word);
    Ok(has("pull").then(|| has("resolve")))
}

fn split_url(path: &Path, url: &str) -> Result<(Scheme, String), HostsError> {
    let bad = || HostsError::Url {
        path: path.to_owned(),
        url: url.to_owned(),
    };
    let (scheme, rest) = match url.split_once("://") {
        Some(("https", rest)) => (Scheme::Https, rest),
        Some(("http", rest)) => (Scheme::Http, rest),
        Some(_) => return Err(bad()),
        None => (Scheme::Https, url),
    };
    let authority = rest.trim_end_matches('/');
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b".-:[]_".contains(&b);
    if authority.is_empty() || !authority.bytes().all(allowed) {
        return Err(bad());
    }
    Ok((scheme, authority.to_owned()))
}

/// All the PEM files as one text; relative paths are relative to the hosts.toml.
fn read_authorities(hosts_toml: &Path, paths: Paths) -> Result<String, HostsError> {
    let paths = match paths {
        Paths::None => Vec::new(),
        Paths::One(path) => vec![path],
        Paths::Many(paths) => paths,
    };
    let mut text = String::new();
    for path in paths {
        let path = hosts_toml.parent().unwrap_or(Path::new("/")).join(path);
        let missing = || HostsError::Read {
            path: path.clone(),
            source: std::io::ErrorKind::NotFound.into(),
        };
        text.push_str(&read_optional(&path)?.ok_or_else(missing)?);
        text.push('\n');
    }
    Ok(text)
}

fn read_optional(path: &Path) -> Result<Option<String>, HostsError> {
    let fail = |source| HostsError::Read {
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
    };
    let mut text = String::new();
    file.take(FILE_LIMIT_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(fail)?;
    if text.len() as u64 > FILE_LIMIT_BYTES {
        return Err(HostsError::TooLarge(path.to_owned()));
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(registry: &str, text: &str) -> Result<Vec<Endpoint>, HostsError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(registry)).unwrap();
        std::fs::write(dir.path().join(registry).join("hosts.toml"), text).unwrap();
        std::fs::write(dir.path().join(registry).join("ca.pem"), "CERT").unwrap();
        endpoints(dir.path(), registry)
    }

    #[test]
    fn nothing_configured_means_https() {
        let dir = tempfile::tempdir().unwrap();
        let found = endpoints(dir.path(), "registry.example:5000").unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].scheme, found[0].authority.as_str()),
            (Scheme::Https, "registry.example:5000")
        );
        assert_eq!(
            endpoints(dir.path(), DEFAULT_REGISTRY).unwrap()[0].authority,
            DEFAULT_REGISTRY_SERVER
        );
    }

    #[test]
    fn mirrors_come_first_in_the_order_of_the_file() {
        let found = with(
            "r.example",
            "server = \"http://real.example\"\nca = \"ca.pem\"\n[host.\"https://z.example:5000\"]\ncapabilities = [\"pull\"]\n\
             [host.\"http://a.example/\"]\nca = [\"ca.pem\"]\n[host.\"https://push.example\"]\ncapabilities = [\"push\"]\n",
        )
        .unwrap();
        let short: Vec<_> = found
            .iter()
            .map(|e| {
                (
                    e.scheme,
                    e.authority.as_str(),
                    e.resolves_tags,
                    e.namespace.as_deref(),
                )
            })
            .collect();
        assert_eq!(
            short,
            [
                (Scheme::Https, "z.example:5000", false, Some("r.example")),
                (Scheme::Http, "a.example", true, Some("r.example")),
                (Scheme::Http, "real.example", true, None),
            ]
        );
        assert_eq!(found[1].authorities, "CERT\n");
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        for (text, part) in [
            ("skip_verify = true\n", "skip_verify"),
            ("[host.\"https://m\"]\noverride_path = true\n", "override_path"),
            ("server = \"ftp://x\"\n", "ftp://x"),
            ("server = \"https://x/../y\"\n", "x/../y"),
            ("capabilities = [\"fly\"]\n", "fly"),
            ("ca = \"absent.pem\"\n", "absent.pem"),
            ("server =\n", "hosts.toml"),
        ] {
            let error = with("r.example", text).unwrap_err();
            let text = format!(
                "{error} {}",
                std::error::Error::source(&error)
                    .map(ToString::to_string)
                    .unwrap_or_default()
            );
            assert!(text.contains(part), "{text}");
        }
    }
}
