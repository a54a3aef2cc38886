//! The state documents: what `state` prints, and what hooks read on their standard input.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::load::OCI_VERSION;

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being set up.
    Creating,
    /// Set up; its program has not been started.
    Created,
    /// Its program runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its process is gone.
    Stopped,
}

impl Status {
    /// The word of the specification.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What `state` prints. Callers read it by field name, some by eye: runc's fields in runc's order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerState {
    /// Version of the specification.
    pub oci_version: String,
    /// Name of the container.
    pub id: String,
    /// Process id as the runtime sees it, 0 when there is none.
    pub pid: i32,
    /// Where the container is in its life.
    pub status: Status,
    /// Directory of the bundle.
    pub bundle: String,
    /// Directory of the root file system.
    pub rootfs: String,
    /// When it was created, RFC 3339 with nanoseconds.
    pub created: String,
    /// Annotations of the configuration.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Who created it; empty where it is not known.
    pub owner: String,
}

impl ContainerState {
    /// Pretty-printed with two spaces, without a line break at the end.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Only maps with keys that are no strings, and failing writers, make this fail.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}

/// What a hook reads on its standard input.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HookState<'a> {
    oci_version: &'static str,
    id: &'a str,
    status: Status,
    #[serde(skip_serializing_if = "is_zero")]
    pid: i32,
    bundle: &'a Path,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

impl<'a> HookState<'a> {
    /// The state of a container at one moment; `pid` 0: no process.
    #[must_use]
    pub fn new(
        id: &'a str,
        status: Status,
        pid: i32,
        bundle: &'a Path,
        annotations: &'a BTreeMap<String, String>,
    ) -> Self {
        Self {
            oci_version: OCI_VERSION,
            id,
            status,
            pid,
            bundle,
            annotations,
        }
    }

    /// One line of JSON. A bundle whose path is not UTF-8 gives an empty text.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// A point in time as RFC 3339 in UTC, with as many digits of the nanoseconds as it has.
#[must_use]
pub fn rfc3339_nanos(unix_secs: i64, nanos: u32) -> String {
    let (year, month, day) = civil_from_days(unix_secs.div_euclid(86_400));
    let second = unix_secs.rem_euclid(86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if nanos != 0 {
        let fraction = format!(".{nanos:09}");
        text.push_str(fraction.trim_end_matches('0'));
    }
    text.push('Z');
    text
}

/// The date of a day counted from 1970-01-01, in the proleptic Gregorian calendar: years are counted from March, in
/// eras of 400 years of 146097 days.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

// The signature is serde's.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &i32) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_document_has_the_known_fields_in_the_known_order() {
        let mut state = ContainerState {
            oci_version: OCI_VERSION.to_owned(),
            id: "c1".to_owned(),
            pid: 0,
            status: Status::Stopped,
            bundle: "/b".to_owned(),
            rootfs: "/b/rootfs".to_owned(),
            created: rfc3339_nanos(0, 0),
            annotations: BTreeMap::new(),
            owner: String::new(),
        };
        let expected = "{\n  \"ociVersion\": \"1.3.0\",\n  \"id\": \"c1\",\n  \"pid\": 0,\n  \"status\": \"stopped\",\n  \
                        \"bundle\": \"/b\",\n  \"rootfs\": \"/b/rootfs\",\n  \"created\": \"1970-01-01T00:00:00Z\",\n  \
                        \"owner\": \"\"\n}";
        assert_eq!(state.to_json(), expected);
        state.annotations.insert("k".to_owned(), "v".to_owned());
        assert!(
            state
                .to_json()
                .contains("\"annotations\": {\n    \"k\": \"v\"\n  },\n  \"owner\"")
        );
    }

    #[test]
    fn hooks_see_no_pid_where_there_is_none() {
        let annotations = BTreeMap::new();
        let json = |pid| HookState::new("c1", Status::Creating, pid, Path::new("/b"), &annotations).to_json();
        assert_eq!(
            json(0),
            r#"{"ociVersion":"1.3.0","id":"c1","status":"creating","bundle":"/b"}"#
        );
        assert_eq!(
            json(7),
            r#"{"ociVersion":"1.3.0","id":"c1","status":"creating","pid":7,"bundle":"/b"}"#
        );
    }

    #[test]
    fn times() {
        assert_eq!(
            rfc3339_nanos(1_709_210_096, 120_000_000),
            "2024-02-29T12:34:56.12Z"
        );
        assert_eq!(rfc3339_nanos(951_782_400, 1), "2000-02-29T00:00:00.000000001Z");
        assert_eq!(rfc3339_nanos(4_107_542_400, 0), "2100-03-01T00:00:00Z");
        assert_eq!(rfc3339_nanos(-1, 0), "1969-12-31T23:59:59Z");
    }
}
