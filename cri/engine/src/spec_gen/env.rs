//! The environment: built from nothing, an entry without a name or a value is never "inherit".

use super::error::{Result, invalid};
use super::{HostFacts, ImageProcess};
use coracle_proto::cri::{ContainerConfig, PodSandboxConfig};

/// Where programs are looked for unless the image or the request says.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// `NAME=value` entries, each name once. Later sources win: defaults, image, request.
pub(super) fn env(
    container: &ContainerConfig,
    pod: &PodSandboxConfig,
    image: &ImageProcess,
    host: &HostFacts,
    own_names: bool,
) -> Result<Vec<String>> {
    let mut env = Env::default();
    env.set("PATH", PATH);
    if container.tty {
        env.set("TERM", "xterm");
    }
    // A pod without a name space for names of its own is on the host.
    let hostname = if pod.hostname.is_empty() || !own_names {
        &host.hostname
    } else {
        &pod.hostname
    };
    check("config.hostname", hostname)?;
    env.set("HOSTNAME", hostname);
    for (i, entry) in image.env.iter().enumerate() {
        let field = format!("image.config.env[{i}]");
        // The entry itself is not told: it may be a value whose name was lost.
        let (name, value) = entry
            .split_once('=')
            .ok_or_else(|| invalid(&field, "is not NAME=value"))?;
        check_name(&field, name)?;
        check(&field, value)?;
        env.set(name, value);
    }
    for (i, entry) in container.envs.iter().enumerate() {
        let field = format!("config.envs[{i}]");
        check_name(&format!("{field}.key"), &entry.key)?;
        // The config is JSON, which carries text alone.
        let value = std::str::from_utf8(&entry.value).map_err(|_| {
            invalid(
                format!("{field}.value"),
                format!("of {:?} is not UTF-8", entry.key),
            )
        })?;
        check(&format!("{field}.value"), value)?;
        env.set(&entry.key, value);
    }
    Ok(env.entries)
}

#[derive(Default)]
struct Env {
    entries: Vec<String>,
    places: std::collections::HashMap<String, usize>,
}

impl Env {
    fn set(&mut self, name: &str, value: &str) {
        let entry = format!("{name}={value}");
        match self.places.get(name) {
            Some(place) => self.entries[*place] = entry,
            None => {
                self.places.insert(name.to_owned(), self.entries.len());
                self.entries.push(entry);
            }
        }
    }
}

fn check_name(field: &str, name: &str) -> Result<()> {
    if name.is_empty() {
        return Err(invalid(field, "has no name"));
    }
    if name.contains('=') {
        return Err(invalid(field, "has a name with \"=\""));
    }
    check(field, name)
}

fn check(field: &str, text: &str) -> Result<()> {
    if text.contains('\0') {
        return Err(invalid(field, "holds a NUL byte"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use coracle_proto::cri::KeyValue;

    use super::super::fixture;
    use super::*;

    fn build(image: &[&str], request: &[(&str, &[u8])], tty: bool) -> Result<Vec<String>> {
        let container = ContainerConfig {
            envs: request
                .iter()
                .map(|(key, value)| KeyValue {
                    key: (*key).to_owned(),
                    value: value.to_vec(),
                })
                .collect(),
            tty,
            ..Default::default()
        };
        let image = ImageProcess {
            env: image.iter().map(|entry| (*entry).to_owned()).collect(),
            ..Default::default()
        };
        env(
            &container,
            &PodSandboxConfig::default(),
            &image,
            &fixture::host(),
            true,
        )
    }

    #[test]
    fn later_sources_win_and_every_name_stands_once() {
        let made = build(
            &["PATH=/image", "A=image", "B="],
            &[("A", b"one"), ("C", b"x=y\nz"), ("A", b"two")],
            true,
        );
        let expected = [
            "PATH=/image",
            "TERM=xterm",
            "HOSTNAME=node-1",
            "A=two",
            "B=",
            "C=x=y\nz",
        ];
        assert_eq!(made.unwrap(), expected);
        assert_eq!(
            build(&[], &[], false).unwrap(),
            [&format!("PATH={PATH}"), "HOSTNAME=node-1"]
        );
    }

    #[test]
    fn an_entry_that_could_mean_inherit_is_refused() {
        for bad in ["SECRET", "=x", "", "A\0=x", "A=\0"] {
            assert!(build(&[bad], &[], false).is_err(), "{bad:?}");
        }
        for bad in ["", "A=B", "A\0"] {
            assert!(build(&[], &[(bad, b"x")], false).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_bad_value_is_refused_without_being_told() {
        for bad in [b"hunter2\xff".as_slice(), b"hunter2\0"] {
            let error = build(&[], &[("TOKEN", bad)], false).unwrap_err().to_string();
            assert!(error.starts_with("config.envs[0].value"), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let error = build(&["hunter2"], &[], false).unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
    }
}
