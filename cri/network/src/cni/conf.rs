//! Network configurations: lists of plugins, read from files and checked.
//!
//! What is checked is what the specification asks of the runtime; the rest of a plugin's configuration is its own, and
//! goes to it unchanged.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use coracle_kernel::path::{self, Kind, OFlags};
use coracle_kernel::{Errno, Error as KernelError};
use serde_json::{Map, Value, json};

use super::plugin::is_plugin_name;

/// Largest configuration file.
const FILE_BYTES: u64 = 1 << 20;
/// Most entries of a configuration directory.
const ENTRIES_MAX: usize = 4096;
/// Most plugins of one network.
const PLUGINS_MAX: usize = 64;
/// Longest name of a network.
const NAME_BYTES: usize = 255;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfError {
    /// It cannot be read.
    #[error("cannot be read")]
    Read(#[source] KernelError),
    /// It is no regular file.
    #[error("is not a regular file")]
    Special,
    /// It is too large.
    #[error("is larger than {FILE_BYTES} bytes")]
    Large,
    /// It is not JSON.
    #[error("is not JSON")]
    Json(#[source] serde_json::Error),
    /// It is JSON, and no configuration.
    #[error("{0}")]
    Shape(String),
}

/// A version of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Version {
    V010,
    V020,
    V030,
    V031,
    V040,
    V100,
    V110,
}

/// A network: its plugins in order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Chain {
    pub(super) name: String,
    pub(super) version: Version,
    pub(super) disable_check: bool,
    pub(super) disable_gc: bool,
    pub(super) plugins: Vec<Plugin>,
}

/// One plugin of a network.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plugin {
    /// The program's name.
    pub(super) kind: String,
    /// Everything that the file says about it.
    pub(super) conf: Map<String, Value>,
}

/// What a configuration directory holds.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    /// The first valid configuration by name, and its file.
    pub(super) network: Option<(PathBuf, Chain)>,
    /// Files before it that are not valid; all of them where none is.
    pub(super) bad: Vec<(PathBuf, ConfError)>,
}

impl Version {
    const ALL: [(Version, &'static str); 7] = [
        (Version::V010, "0.1.0"),
        (Version::V020, "0.2.0"),
        (Version::V030, "0.3.0"),
        (Version::V031, "0.3.1"),
        (Version::V040, "0.4.0"),
        (Version::V100, "1.0.0"),
        (Version::V110, "1.1.0"),
    ];

    pub(super) fn parse(text: &str) -> Option<Version> {
        let found = Version::ALL.into_iter().find(|(_, name)| *name == text);
        found.map(|(version, _)| version)
    }

    pub(super) fn as_str(self) -> &'static str {
        Version::ALL[self as usize].1
    }
}

impl Chain {
    /// Reads a configuration that has everything inside, as [`Chain::to_text`] writes it.
    pub(super) fn parse(bytes: &[u8]) -> Result<Chain, ConfError> {
        let (chain, _) = Chain::read(bytes)?;
        chain.complete()
    }

    /// The configuration as one JSON text, whatever files it came from.
    pub(super) fn to_text(&self) -> String {
        let plugins: Vec<_> = self.plugins.iter().map(|plugin| &plugin.conf).collect();
        let text = json!({
            "cniVersion": self.version.as_str(),
            "name": self.name,
            "disableCheck": self.disable_check,
            "disableGC": self.disable_gc,
            "loadOnlyInlinedPlugins": true,
            "plugins": plugins,
        });
        text.to_string()
    }

    /// Whether any of the plugins has declared this capability.
    pub(super) fn declares(&self, capability: &str) -> bool {
        self.plugins.iter().any(|plugin| plugin.declares(capability))
    }

    /// The configuration, and whether plugins of a folder belong to it too. It may have none of its own then.
    fn read(bytes: &[u8]) -> Result<(Chain, bool), ConfError> {
        let mut object: Map<String, Value> = serde_json::from_slice(bytes).map_err(ConfError::Json)?;
        let name = match object.get("name") {
            Some(Value::String(name)) => name.clone(),
            Some(_) => return shape("name is not a string"),
            None => return shape("has no name"),
        };
        if !is_network_name(&name) {
            let short: String = name.chars().take(64).collect();
            return shape(format!(
                "name {short:?} is not a name: letters, digits, '_', '.' and '-'"
            ));
        }
        let version = version(&object)?;
        let inlined_only = flag(&object, "loadOnlyInlinedPlugins")?;
        let mut chain = Chain {
            name,
            version,
            disable_check: flag(&object, "disableCheck")?,
            disable_gc: flag(&object, "disableGC")?,
            plugins: Vec::new(),
        };
        match object.remove("plugins") {
            Some(Value::Array(plugins)) => {
                if plugins.is_empty() {
                    return shape("plugins is empty");
                }
                for (i, plugin) in plugins.into_iter().enumerate() {
                    let Value::Object(conf) = plugin else {
                        return shape(format!("plugins[{i}] is not an object"));
                    };
                    chain.plugins.push(Plugin::read(conf, &format!("plugins[{i}]."))?);
                }
            }
            Some(_) => return shape("plugins is not a list"),
            // The old form: a file is one plugin.
            None if object.contains_key("type") => {
                chain.plugins.push(Plugin::read(object, "")?);
                return Ok((chain, false));
            }
            None if inlined_only => return shape("loadOnlyInlinedPlugins is true, and there are no plugins"),
            None => {}
        }
        Ok((chain, !inlined_only))
    }

    fn complete(self) -> Result<Chain, ConfError> {
        match self.plugins.len() {
            0 => shape("has no plugins"),
            1..=PLUGINS_MAX => Ok(self),
            _ => shape(format!("has more than {PLUGINS_MAX} plugins")),
        }
    }
}

impl Plugin {
    fn read(conf: Map<String, Value>, place: &str) -> Result<Plugin, ConfError> {
        let kind = match conf.get("type") {
            Some(Value::String(kind)) => kind.clone(),
            Some(_) => return shape(format!("{place}type is not a string")),
            None => return shape(format!("{place}type is missing")),
        };
        if !is_plugin_name(&kind) {
            let short: String = kind.chars().take(64).collect();
            return shape(format!("{place}type {short:?} is not the name of a plugin"));
        }
        if let Some(declared) = conf.get("capabilities") {
            let valid = declared
                .as_object()
                .is_some_and(|declared| declared.values().all(Value::is_boolean));
            if !valid && !declared.is_null() {
                return shape(format!("{place}capabilities is not an object of true and false"));
            }
        }
        Ok(Plugin { kind, conf })
    }

    pub(super) fn declares(&self, capability: &str) -> bool {
        let declared = self.conf.get("capabilities").and_then(Value::as_object);
        declared.and_then(|declared| declared.get(capability)) == Some(&Value::Bool(true))
    }
}

/// The network of a directory: the first valid file by name. A directory that is not there holds nothing.
pub(super) fn load(dir: &Path) -> Result<Loaded, KernelError> {
    let mut loaded = Loaded::default();
    for file in files(dir, &["conf", "conflist", "json"])? {
        match load_file(dir, &file) {
            Ok(chain) => {
                loaded.network = Some((file, chain));
                break;
            }
            Err(error) => loaded.bad.push((file, error)),
        }
    }
    Ok(loaded)
}

/// Where further plugins of a network may lie.
pub(super) fn plugin_dir(dir: &Path, network: &str) -> PathBuf {
    dir.join(network)
}

/// Reads a file whole, up to a bound; only a regular one: a pipe would keep us waiting.
pub(super) fn read_file(file: &Path) -> Result<Vec<u8>, ConfError> {
    let opened = path::open(file, OFlags::RDONLY | OFlags::NONBLOCK).map_err(ConfError::Read)?;
    if path::stat(&opened).map_err(ConfError::Read)?.kind != Kind::File {
        return Err(ConfError::Special);
    }
    let mut bytes = Vec::new();
    File::from(opened)
        .take(FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| ConfError::Read(KernelError::from_io("read", format!("{file:?}"), &error)))?;
    if bytes.len() as u64 > FILE_BYTES {
        return Err(ConfError::Large);
    }
    Ok(bytes)
}

fn load_file(dir: &Path, file: &Path) -> Result<Chain, ConfError> {
    let (mut chain, with_folder) = Chain::read(&read_file(file)?)?;
    if with_folder {
        for part in files(&plugin_dir(dir, &chain.name), &["conf"]).map_err(ConfError::Read)? {
            let read = || -> Result<Plugin, ConfError> {
                let conf = serde_json::from_slice(&read_file(&part)?).map_err(ConfError::Json)?;
                Plugin::read(conf, "")
            };
            chain.plugins.push(read().map_err(|error| {
                let why = crate::chain_text(&error);
                ConfError::Shape(format!("its part {}: {why}", part.display()))
            })?);
        }
    }
    let chain = chain.complete()?;
    // It becomes a part of every pod's record.
    if chain.to_text().len() as u64 > FILE_BYTES {
        return Err(ConfError::Large);
    }
    Ok(chain)
}

/// Files of these extensions, by name; none where there is no directory.
fn files(dir: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, KernelError> {
    let opened = match path::open_dir(dir) {
        Ok(opened) => opened,
        Err(error) if matches!(error.errno(), Errno::ENOENT | Errno::ENOTDIR) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let fits = |path: &Path| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| extensions.contains(&extension))
    };
    let mut files: Vec<PathBuf> = path::list_dir(opened, ENTRIES_MAX)?
        .into_iter()
        .filter(|(_, kind)| *kind != Kind::Directory)
        .map(|(name, _)| dir.join(name))
        .filter(|path| fits(path))
        .collect();
    files.sort();
    Ok(files)
}

/// The highest version that the file names and that we speak.
fn version(object: &Map<String, Value>) -> Result<Version, ConfError> {
    let mut named = Vec::new();
    match object.get("cniVersion") {
        Some(Value::String(version)) => named.push(version.as_str()),
        // As the first release of the specification had it.
        None | Some(Value::Null) => {}
        Some(_) => return shape("cniVersion is not a string"),
    }
    match object.get("cniVersions") {
        Some(Value::Array(versions)) => {
            for version in versions {
                match version {
                    Value::String(version) => named.push(version),
                    _ => return shape("cniVersions is not a list of strings"),
                }
            }
        }
        None | Some(Value::Null) => {}
        Some(_) => return shape("cniVersions is not a list of strings"),
    }
    if named.is_empty() {
        return Ok(Version::V010);
    }
    let known = named.iter().filter_map(|version| Version::parse(version)).max();
    known.ok_or_else(|| {
        let named: String = named.join(", ").chars().take(64).collect();
        let last = Version::V110.as_str();
        ConfError::Shape(format!(
            "cniVersion {named:?} is none that this release speaks, up to {last}"
        ))
    })
}

/// A flag; libraries of other runtimes take it as a word too.
fn flag(object: &Map<String, Value>, key: &str) -> Result<bool, ConfError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(Value::String(word)) if word.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(word)) if word.eq_ignore_ascii_case("false") => Ok(false),
        Some(_) => shape(format!("{key} is neither true nor false")),
    }
}

fn is_network_name(name: &str) -> bool {
    let rest = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let first = name
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    first && name.len() <= NAME_BYTES && name.bytes().all(rest)
}

fn shape<T>(what: impl Into<String>) -> Result<T, ConfError> {
    Err(ConfError::Shape(what.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Chain, String> {
        Chain::parse(text.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn lists_and_single_plugins_are_read() {
        let list = parse(
            r#"{"cniVersion":"0.4.0","cniVersions":["0.3.1","1.1.0","2.0.0"],"name":"net","disableCheck":"true",
                "plugins":[{"type":"bridge","x":[1,{"y":null}]},
                    {"type":"portmap","capabilities":{"portMappings":true}}]}"#,
        )
        .unwrap();
        assert_eq!((list.name.as_str(), list.version), ("net", Version::V110));
        assert!(list.disable_check && !list.disable_gc);
        assert!(list.declares("portMappings") && !list.declares("dns"));
        assert_eq!(list.plugins[0].conf["x"], json!([1, {"y": null}]));
        assert_eq!(parse(&list.to_text()).unwrap(), list, "the record says the same");

        let single = parse(r#"{"cniVersion":"0.3.1","name":"one","type":"ptp","mtu":1400}"#).unwrap();
        assert_eq!((single.version, single.plugins.len()), (Version::V031, 1));
        assert_eq!(single.plugins[0].conf["mtu"], 1400);
        assert_eq!(
            parse(r#"{"name":"old","type":"ptp"}"#).unwrap().version,
            Version::V010
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("", "JSON"),
            ("[]", "JSON"),
            (r#"{"type":"x"}"#, "no name"),
            (r#"{"name":7,"type":"x"}"#, "name"),
            (r#"{"name":"../x","type":"x"}"#, "name"),
            (r#"{"name":"n"}"#, "no plugins"),
            (r#"{"name":"n","plugins":[]}"#, "plugins is empty"),
            (r#"{"name":"n","plugins":{}}"#, "plugins is not a list"),
            (r#"{"name":"n","plugins":["x"]}"#, "plugins[0]"),
            (
                r#"{"name":"n","plugins":[{"type":"a"},{}]}"#,
                "plugins[1].type is missing",
            ),
            (
                r#"{"name":"n","type":"../../bin/sh"}"#,
                "not the name of a plugin",
            ),
            (r#"{"name":"n","type":".."}"#, "not the name of a plugin"),
            (r#"{"name":"n","type":""}"#, "not the name of a plugin"),
            (r#"{"name":"n","type":"a\u0000b"}"#, "not the name of a plugin"),
            (
                r#"{"name":"n","type":"x","capabilities":["dns"]}"#,
                "capabilities",
            ),
            (r#"{"name":"n","type":"x","cniVersion":"2.0.0"}"#, "2.0.0"),
            (r#"{"name":"n","type":"x","cniVersion":1}"#, "cniVersion"),
            (r#"{"name":"n","type":"x","disableGC":7}"#, "disableGC"),
            (
                r#"{"name":"n","loadOnlyInlinedPlugins":true}"#,
                "loadOnlyInlinedPlugins",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        let deep = format!(
            r#"{{"name":"n","type":"x","y":{}1{}}}"#,
            "[".repeat(9999),
            "]".repeat(9999)
        );
        assert!(parse(&deep).unwrap_err().contains("JSON"));
        let many = vec![json!({"type": "x"}); 65];
        let many = json!({"name": "n", "plugins": many}).to_string();
        assert!(parse(&many).unwrap_err().contains("more than 64"));
    }

    #[test]
    fn the_first_valid_file_by_name_is_the_network() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert!(load(dir.path()).unwrap().network.is_none());
        assert!(load(&dir.path().join("absent")).unwrap().network.is_none());

        write("50-b.conflist", r#"{"name":"b","plugins":[{"type":"x"}]}"#);
        write("00-ignored.txt", "nonsense");
        write("10-bad.conf", "nonsense");
        write("20-huge.json", &" ".repeat(2 << 20));
        std::fs::create_dir(dir.path().join("05-dir.conf")).unwrap();
        let fifo = path::open_dir(dir.path()).unwrap();
        path::make_node(fifo, "30-fifo.conf", path::Node::Fifo, 0o600).unwrap();
        std::os::unix::fs::symlink("/nonexistent", dir.path().join("40-link.conf")).unwrap();
        let loaded = load(dir.path()).unwrap();
        let (file, chain) = loaded.network.unwrap();
        assert_eq!(
            (file, chain.name.as_str()),
            (dir.path().join("50-b.conflist"), "b")
        );
        let bad: Vec<_> = loaded
            .bad
            .iter()
            .map(|(file, error)| (file.file_name().unwrap().to_str().unwrap(), error.to_string()))
            .collect();
        let bad: Vec<_> = bad.iter().map(|(name, why)| (*name, why.as_str())).collect();
        assert_eq!(
            bad,
            [
                ("10-bad.conf", "is not JSON"),
                ("20-huge.json", "is larger than 1048576 bytes"),
                ("30-fifo.conf", "is not a regular file"),
                ("40-link.conf", "cannot be read"),
            ]
        );
    }

    #[test]
    fn plugins_of_the_folder_belong_to_the_network() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        std::fs::create_dir(dir.path().join("net")).unwrap();
        write("net/20-b.conf", r#"{"type":"b"}"#);
        write("net/10-a.conf", r#"{"type":"a"}"#);
        write("net/30-c.conflist", r#"{"type":"c"}"#);
        let kinds = || {
            let chain = load(dir.path()).unwrap().network.unwrap().1;
            chain
                .plugins
                .into_iter()
                .map(|plugin| plugin.kind)
                .collect::<Vec<_>>()
        };
        write(
            "1.conflist",
            r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"first"}]}"#,
        );
        assert_eq!(kinds(), ["first", "a", "b"]);
        write("1.conflist", r#"{"cniVersion":"1.1.0","name":"net"}"#);
        assert_eq!(kinds(), ["a", "b"]);
        write(
            "1.conflist",
            r#"{"name":"net","loadOnlyInlinedPlugins":true,"plugins":[{"type":"first"}]}"#,
        );
        assert_eq!(kinds(), ["first"]);
        write("1.conflist", r#"{"name":"net"}"#);
        write("net/10-a.conf", r#"{"type":"/bin/sh"}"#);
        let loaded = load(dir.path()).unwrap();
        assert!(loaded.network.is_none());
        let why = loaded.bad[0].1.to_string();
        assert!(why.contains("net/10-a.conf: type \"/bin/sh\""), "{why}");
    }
}
