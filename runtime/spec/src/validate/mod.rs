//! The checks of a configuration: one check a function, every finding collected with the path of its field.
//!
//! What needs the system (is AppArmor on, does this path exist) is not checked here.

mod hooks;
mod linux;
mod mounts;
mod namespaces;
mod process;
mod resources;
mod seccomp;

use std::fmt;

use crate::load::Document;

pub use namespaces::{sysctl_path, sysctl_problem};
pub(crate) use process::process;
pub(crate) use resources::resources;
pub(crate) use seccomp::seccomp;

/// One thing that is wrong with, or ignored of, a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The field, such as `mounts[3].options`.
    pub path: String,
    /// What about it.
    pub problem: String,
}

impl Finding {
    pub(crate) fn new(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            problem: problem.into(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.problem)
    }
}

/// The findings so far.
#[derive(Debug, Default)]
pub(crate) struct Report {
    errors: Vec<Finding>,
    warnings: Vec<Finding>,
}

impl Report {
    /// Findings kept of one document: a hostile one could have millions.
    const MAX: usize = 64;

    pub(crate) fn error(&mut self, path: impl Into<String>, problem: impl Into<String>) {
        if self.errors.len() < Self::MAX {
            self.errors.push(Finding::new(path, problem));
        }
    }

    pub(crate) fn warn(&mut self, path: impl Into<String>, problem: impl Into<String>) {
        if self.warnings.len() < Self::MAX {
            self.warnings.push(Finding::new(path, problem));
        }
    }

    /// A field of the specification that this release does not carry out.
    pub(crate) fn unsupported(&mut self, path: impl Into<String>) {
        self.error(path, "not supported in this release");
    }

    /// Text that goes to the kernel must not hold a NUL byte.
    pub(crate) fn no_nul(&mut self, path: &str, text: &str) {
        if text.contains('\0') {
            self.error(path, "holds a NUL byte");
        }
    }

    /// A path that must be absolute, and without NUL bytes.
    pub(crate) fn absolute(&mut self, path: &str, value: &str) {
        self.no_nul(path, value);
        if !value.starts_with('/') {
            self.error(path, format!("{value:?} is not an absolute path"));
        }
    }

    /// The warnings, or the errors where there are any.
    pub(crate) fn into_result(self) -> Result<Vec<Finding>, Vec<Finding>> {
        if self.errors.is_empty() {
            Ok(self.warnings)
        } else {
            Err(self.errors)
        }
    }
}

/// Checks a whole `config.json`.
pub(crate) fn config(document: &Document, report: &mut Report) {
    oci_version(&document.oci_version, report);
    root(document, report);
    match &document.process {
        Some(document) => process("process", document, report),
        None => report.error("process", "missing"),
    }
    annotations(document, report);
    mounts::mounts(&document.mounts, report);
    hooks::hooks(&document.hooks, report);
    namespaces::names(document, report);
    match &document.linux {
        Some(document) => linux::linux(document, report),
        None => report.error("linux", "missing"),
    }
}

/// Any 1.x is accepted: a runtime that refused the next minor broke every container of its users.
fn oci_version(version: &str, report: &mut Report) {
    if version.is_empty() {
        report.error("ociVersion", "missing");
        return;
    }
    let mut parts = version.splitn(3, '.');
    let number = |part: Option<&str>| {
        part.is_some_and(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let major = parts.next();
    let well_formed = number(major)
        && number(parts.next())
        && number(
            parts
                .next()
                .map(|rest| rest.split(['-', '+']).next().unwrap_or_default()),
        );
    if !well_formed {
        report.error("ociVersion", format!("{version:?} is not a semantic version"));
    } else if major != Some("1") {
        report.error(
            "ociVersion",
            format!("version {version:?} is not supported, only 1.x is"),
        );
    }
}

fn root(document: &Document, report: &mut Report) {
    let Some(root) = &document.root else {
        report.error("root", "missing");
        return;
    };
    let path = root.path().to_string_lossy();
    if path.is_empty() {
        report.error("root.path", "missing");
    }
    report.no_nul("root.path", &path);
}

fn annotations(document: &Document, report: &mut Report) {
    if document.annotations.contains_key("") {
        report.error("annotations", "holds an empty key");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let check = |version: &str| {
            let mut report = Report::default();
            oci_version(version, &mut report);
            report.into_result().is_ok()
        };
        for good in ["1.0.0", "1.0.2-dev", "1.3.0", "1.99.0", "1.2.3-rc.1+build"] {
            assert!(check(good), "{good}");
        }
        for bad in [
            "", "1", "1.0", "2.0.0", "0.9.0", "one", "1.x.0", "v1.0.0", "1.0.", "1..0",
        ] {
            assert!(!check(bad), "{bad}");
        }
    }

    #[test]
    fn the_number_of_findings_is_bounded() {
        let mut report = Report::default();
        for i in 0..1000 {
            report.error(format!("a[{i}]"), "wrong");
            report.warn(format!("a[{i}]"), "odd");
        }
        assert_eq!(report.warnings.len(), Report::MAX);
        assert_eq!(report.into_result().unwrap_err().len(), Report::MAX);
    }
}
