//! Identities: ids, what makes two requests the same, creation times.

use std::fs::File;
use std::io::{self, Read as _};
use std::time::{SystemTime, UNIX_EPOCH};

use coracle_proto::cri::{
    ContainerMetadata, CreateContainerRequest, PodSandboxMetadata, RunPodSandboxRequest,
};
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// Names, namespaces and uids of the API server end far below this.
const NAME_BYTES: usize = 1024;

/// What makes two RunPodSandbox calls calls for the same sandbox.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PodIdentity {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) attempt: u32,
}

/// What makes two CreateContainer calls in one pod calls for the same container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ContainerIdentity {
    pub(crate) name: String,
    pub(crate) attempt: u32,
}

impl PodIdentity {
    pub(crate) fn of(metadata: Option<&PodSandboxMetadata>) -> Result<PodIdentity> {
        let metadata = metadata.ok_or_else(|| Error::invalid("config.metadata", "is missing"))?;
        for (field, value) in [
            ("name", &metadata.name),
            ("namespace", &metadata.namespace),
            ("uid", &metadata.uid),
        ] {
            check_name(&format!("config.metadata.{field}"), value)?;
        }
        Ok(PodIdentity {
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
            uid: metadata.uid.clone(),
            attempt: metadata.attempt,
        })
    }
}

impl ContainerIdentity {
    pub(crate) fn of(metadata: Option<&ContainerMetadata>) -> Result<ContainerIdentity> {
        let metadata = metadata.ok_or_else(|| Error::invalid("config.metadata", "is missing"))?;
        check_name("config.metadata.name", &metadata.name)?;
        Ok(ContainerIdentity {
            name: metadata.name.clone(),
            attempt: metadata.attempt,
        })
    }
}

fn check_name(field: &str, value: &str) -> Result<()> {
    if value.is_empty() {
        return Err(Error::invalid(field, "is empty"));
    }
    if value.len() > NAME_BYTES {
        return Err(Error::invalid(
            field,
            format!("is longer than {NAME_BYTES} bytes"),
        ));
    }
    if value.chars().any(|c| c.is_control() || c == '/') {
        return Err(Error::invalid(field, "holds a control character or a slash"));
    }
    Ok(())
}

/// Two requests with the same identity are the same request if this is equal. The message is encoded anew with
/// its maps in order: a client may send the same map in another order each time.
pub(crate) fn run_hash(request: &RunPodSandboxRequest) -> String {
    hex(&Sha256::digest(request.encode_to_vec()))
}

/// The same for CreateContainer, without the copy of the sandbox's config that rides along.
pub(crate) fn create_hash(request: &CreateContainerRequest) -> String {
    let mut hash = Sha256::new();
    if let Some(config) = &request.config {
        hash.update(config.encode_to_vec());
    }
    hex(&hash.finalize())
}

/// A new id: 64 hex digits, as agents expect them in cgroup names.
pub(crate) fn new_id() -> io::Result<String> {
    let mut bytes = [0_u8; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(hex(&bytes))
}

/// Whether this can be one of our ids.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The next creation time of a series: never before the last one, whatever the clock does.
pub(crate) fn after(last: Option<i64>) -> i64 {
    let now = now_ns();
    last.map_or(now, |last| now.max(last.saturating_add(1)))
}

/// Wall-clock nanoseconds since 1970.
pub(crate) fn now_ns() -> i64 {
    let passed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(passed.as_nanos()).unwrap_or(i64::MAX)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]])
        .map(char::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_64_hex_digits_and_differ() {
        let (a, b) = (new_id().unwrap(), new_id().unwrap());
        assert!(is_id(&a) && is_id(&b) && a != b);
        for bad in ["", "../etc", &"g".repeat(64), &"A".repeat(64), &a[1..]] {
            assert!(!is_id(bad), "{bad}");
        }
    }

    #[test]
    fn creation_times_never_go_back() {
        let far = now_ns() + 1_000_000_000_000;
        assert_eq!(after(Some(far)), far + 1);
        assert!(after(Some(0)) > 0);
        assert!(after(None) > 0);
    }

    #[test]
    fn hostile_names_are_refused() {
        let good = PodSandboxMetadata {
            name: "web".into(),
            uid: "u".into(),
            namespace: "default".into(),
            attempt: 3,
        };
        assert_eq!(PodIdentity::of(Some(&good)).unwrap().attempt, 3);
        for name in ["", "a/b", "a\nb", "\0", &"x".repeat(2000)] {
            let bad = PodSandboxMetadata {
                name: name.into(),
                ..good.clone()
            };
            let error = PodIdentity::of(Some(&bad)).unwrap_err();
            assert!(error.to_string().starts_with("config.metadata.name: "), "{error}");
        }
        PodIdentity::of(None).unwrap_err();
    }

    #[test]
    fn the_hash_does_not_depend_on_the_order_of_a_map() {
        let request = |names: [&str; 3]| {
            let mut config = coracle_proto::cri::PodSandboxConfig::default();
            for name in names {
                config.labels.insert(name.into(), name.into());
            }
            run_hash(&RunPodSandboxRequest {
                config: Some(config),
                runtime_handler: String::new(),
            })
        };
        assert_eq!(request(["a", "b", "c"]), request(["c", "a", "b"]));
        assert_ne!(request(["a", "b", "c"]), request(["a", "b", "d"]));
    }
}
