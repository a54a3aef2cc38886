//! Bytes in, checked model out: the bounds and the parse.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Read};

use oci_spec::runtime::{Hooks, Linux, LinuxResources, LinuxSeccomp, Mount, Root};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use thiserror::Error;

use crate::config::Config;
use crate::objects::Objects;
use crate::process::{Process, ProcessDocument, null_is_default};
use crate::validate::{self, Finding};

/// The specification that this crate follows.
pub const OCI_VERSION: &str = "1.3.0";

/// The largest document that is read. Real ones are below 100 KiB; one mount a secret makes them a few times larger.
pub const MAX_CONFIG_BYTES: u64 = 8 << 20;

/// Why a document was refused.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The descriptor could not be read.
    #[error("cannot read the configuration")]
    Read(#[source] io::Error),
    /// More than [`MAX_CONFIG_BYTES`].
    #[error("configuration is larger than {MAX_CONFIG_BYTES} bytes")]
    TooLarge,
    /// Not JSON, or a value of the wrong type: `path` is the field, `.` where there is none.
    #[error("invalid configuration at {path}: {problem}")]
    Parse {
        /// The path of the value.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// It parses, but says what cannot be done.
    #[error("invalid configuration: {}", join(.0))]
    Invalid(Vec<Finding>),
}

/// `config.json`, as it stands. What other platforms own is not looked at.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Document {
    pub(crate) oci_version: String,
    pub(crate) root: Option<Root>,
    pub(crate) process: Option<ProcessDocument>,
    pub(crate) hostname: Option<String>,
    pub(crate) domainname: Option<String>,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) mounts: Vec<Mount>,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) hooks: Hooks,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) linux: Option<Linux>,
}

impl Config {
    /// Reads a `config.json` from an open file.
    ///
    /// # Errors
    /// The file cannot be read, is too large, is not JSON, or says what cannot be done.
    pub fn from_reader(reader: impl Read) -> Result<Self, LoadError> {
        Self::from_slice(&read_bounded(reader)?)
    }

    /// Parses and checks a `config.json`.
    ///
    /// # Errors
    /// As for [`Config::from_reader`].
    pub fn from_slice(bytes: &[u8]) -> Result<Self, LoadError> {
        let mut document: Document = parse(bytes)?;
        if let Some(resources) = document
            .linux
            .as_mut()
            .and_then(|linux| linux.resources_mut().as_mut())
        {
            drop_unset_pids(resources, || {
                parse::<ConfigProbe>(bytes).is_ok_and(|probe| probe.linux.resources.sets_limit())
            });
        }
        let mut report = validate::Report::default();
        validate::config(&document, &mut report);
        let warnings = report.into_result().map_err(LoadError::Invalid)?;
        Ok(Self::from_document(document, warnings))
    }
}

/// Parses and checks the process of an exec. The second value are warnings.
///
/// # Errors
/// The document is too large, is not JSON, or says what cannot be done.
pub fn load_process(bytes: &[u8]) -> Result<(Process, Vec<Finding>), LoadError> {
    let document: ProcessDocument = parse(bytes)?;
    let mut report = validate::Report::default();
    validate::process("process", &document, &mut report);
    let mut warnings = report.into_result().map_err(LoadError::Invalid)?;
    let process = document.into_process("process", &mut warnings);
    Ok((process, warnings))
}

/// Parses and checks the resources of an update.
///
/// # Errors
/// The document is too large, is not JSON, or says what cannot be done.
pub fn load_resources(bytes: &[u8]) -> Result<LinuxResources, LoadError> {
    let mut resources: LinuxResources = parse(bytes)?;
    drop_unset_pids(&mut resources, || {
        parse::<PidsProbe>(bytes).is_ok_and(|probe| probe.sets_limit())
    });
    let mut report = validate::Report::default();
    validate::resources("resources", &resources, &mut report);
    report.into_result().map_err(LoadError::Invalid)?;
    Ok(resources)
}

/// Parses and checks a seccomp profile that stands in a file of its own.
///
/// # Errors
/// The document is too large, is not JSON, or says what cannot be done. Profiles whose rules depend on conditions
/// (`includes`, `excludes`), as container engines keep them before they fill them in, are refused: a reader that
/// passed the conditions over would allow what they forbid.
pub fn load_seccomp(bytes: &[u8]) -> Result<LinuxSeccomp, LoadError> {
    let profile = parse(bytes)?;
    let conditions: ConditionsProbe = parse(bytes)?;
    let mut report = validate::Report::default();
    for (i, rule) in conditions.syscalls.iter().enumerate() {
        if !rule.includes.is_empty() || !rule.excludes.is_empty() {
            report.error(
                format!("seccomp.syscalls[{i}]"),
                "has conditions, which no OCI profile has",
            );
        }
    }
    validate::seccomp("seccomp", &profile, &mut report);
    report.into_result().map_err(LoadError::Invalid)?;
    Ok(profile)
}

fn read_bounded(reader: impl Read) -> Result<Vec<u8>, LoadError> {
    let mut bytes = Vec::new();
    reader
        .take(MAX_CONFIG_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(LoadError::Read)?;
    Ok(bytes)
}

/// Nesting is harmless: serde_json skips what nobody asked for without recursion, and the types that are asked for
/// have a fixed depth.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, LoadError> {
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        return Err(LoadError::TooLarge);
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(Objects(&mut json)).map_err(|error| LoadError::Parse {
        path: error.path().to_string(),
        problem: error.inner().to_string(),
    })?;
    json.end().map_err(|error| LoadError::Parse {
        path: ".".to_owned(),
        problem: error.to_string(),
    })?;
    Ok(value)
}

/// `pids: {}` means "leave it alone", but the crate's type turns it into the limit 0, which means something else. Only
/// where it says 0 is the document looked at again.
fn drop_unset_pids(resources: &mut LinuxResources, sets_limit: impl FnOnce() -> bool) {
    if resources.pids().as_ref().is_some_and(|pids| pids.limit() == 0) && !sets_limit() {
        resources.set_pids(None);
    }
}

#[derive(Deserialize)]
struct ConfigProbe {
    linux: LinuxProbe,
}

#[derive(Deserialize)]
struct LinuxProbe {
    resources: PidsProbe,
}

#[derive(Deserialize)]
struct PidsProbe {
    pids: Option<LimitProbe>,
}

#[derive(Deserialize)]
struct LimitProbe {
    limit: Option<i64>,
}

#[derive(Deserialize)]
struct ConditionsProbe {
    #[serde(default, deserialize_with = "null_is_default")]
    syscalls: Vec<RuleProbe>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RuleProbe {
    #[serde(deserialize_with = "null_is_default")]
    includes: BTreeMap<String, IgnoredAny>,
    #[serde(deserialize_with = "null_is_default")]
    excludes: BTreeMap<String, IgnoredAny>,
}

impl PidsProbe {
    fn sets_limit(&self) -> bool {
        self.pids.as_ref().is_some_and(|pids| pids.limit.is_some())
    }
}

fn join(findings: &[Finding]) -> String {
    let mut text = String::new();
    for (i, finding) in findings.iter().enumerate() {
        let separator = if i == 0 { "" } else { "; " };
        // Writing to a string cannot fail.
        let _ = write!(text, "{separator}{finding}");
    }
    text
}
