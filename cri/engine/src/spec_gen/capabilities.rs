//! The capability sets.

use coracle_proto::cri::{Capability, LinuxContainerSecurityContext};
use coracle_spec::{CAPABILITY_NAMES, capability_number};
use serde_json::{Value, json};

use super::error::{Result, invalid};

/// What a container has that asks for nothing.
pub(super) const DEFAULT: [&str; 9] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_KILL",
];

/// Every capability that there is.
const ALL: u64 = (1 << CAPABILITY_NAMES.len()) - 1;

/// The sets of one container; bit `n` is capability number `n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sets {
    /// Bounding, effective and permitted.
    pub(super) held: u64,
    /// Ambient, and with it inheritable. Nothing else is inheritable: a file with such capabilities would hand them
    /// to a program that is not root.
    pub(super) ambient: u64,
}

/// Default, plus what is added, minus what is dropped.
pub(super) fn sets(context: &LinuxContainerSecurityContext) -> Result<Sets> {
    if context.privileged {
        return Ok(Sets {
            held: ALL,
            ambient: 0,
        });
    }
    let none = Capability::default();
    let asked = context.capabilities.as_ref().unwrap_or(&none);
    let (add_all, add) = mask("add_capabilities", &asked.add_capabilities)?;
    let (drop_all, drop) = mask("drop_capabilities", &asked.drop_capabilities)?;
    let (ambient_all, ambient) = mask("add_ambient_capabilities", &asked.add_ambient_capabilities)?;

    // "ALL" comes first, so that a single name can be an exception of it.
    let mut held = default_mask();
    let mut raised = 0;
    if add_all {
        held = ALL;
    }
    if ambient_all {
        (held, raised) = (ALL, ALL);
    }
    if drop_all {
        (held, raised) = (0, 0);
    }
    held = (held | add | ambient) & !drop;
    raised = (raised | ambient) & !drop;
    Ok(Sets {
        held,
        ambient: raised,
    })
}

/// `process.capabilities`.
pub(super) fn document(sets: Sets) -> Value {
    let (held, ambient) = (names(sets.held), names(sets.ambient));
    json!({
        "bounding": held,
        "effective": held,
        "permitted": held,
        "inheritable": ambient,
        "ambient": ambient,
    })
}

fn default_mask() -> u64 {
    DEFAULT
        .iter()
        .filter_map(|name| capability_number(name))
        .fold(0, |mask, number| mask | 1 << number)
}

/// Whether the list holds `ALL`, and the mask of the others.
fn mask(list: &str, names: &[String]) -> Result<(bool, u64)> {
    let (mut all, mut mask) = (false, 0);
    for (i, name) in names.iter().enumerate() {
        if name.eq_ignore_ascii_case("ALL") || name.eq_ignore_ascii_case("CAP_ALL") {
            all = true;
            continue;
        }
        let number = capability_number(name).ok_or_else(|| {
            let field = format!("config.linux.security_context.capabilities.{list}[{i}]");
            invalid(field, format!("unknown capability {name:?}"))
        })?;
        mask |= 1 << number;
    }
    Ok((all, mask))
}

fn names(mask: u64) -> Vec<&'static str> {
    (0u32..)
        .zip(CAPABILITY_NAMES)
        .filter(|(number, _)| mask & 1 << number != 0)
        .map(|(_, name)| name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(add: &[&str], drop: &[&str], ambient: &[&str]) -> Result<Sets> {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        sets(&LinuxContainerSecurityContext {
            capabilities: Some(Capability {
                add_capabilities: list(add),
                drop_capabilities: list(drop),
                add_ambient_capabilities: list(ambient),
            }),
            ..Default::default()
        })
    }

    fn bit(name: &str) -> u64 {
        1 << capability_number(name).unwrap()
    }

    #[test]
    fn the_default_is_nine_and_none_is_inheritable() {
        let default = sets(&Default::default()).unwrap();
        assert_eq!(default.held.count_ones(), 9);
        assert_eq!(
            default.held & (bit("MKNOD") | bit("NET_RAW") | bit("SYS_ADMIN")),
            0
        );
        let document = document(default);
        for empty in ["inheritable", "ambient"] {
            assert_eq!(document[empty], json!([]));
        }
        let mut names = DEFAULT.to_vec();
        names.sort_by_key(|name| capability_number(name));
        for full in ["bounding", "effective", "permitted"] {
            assert_eq!(document[full], json!(names));
        }
    }

    #[test]
    fn added_and_dropped_in_any_spelling() {
        let default = default_mask();
        assert_eq!(
            of(&["net_admin"], &["cap_chown"], &[]).unwrap().held,
            default & !bit("CHOWN") | bit("NET_ADMIN")
        );
        assert_eq!(of(&["All"], &[], &[]).unwrap().held, ALL);
        assert_eq!(of(&["ALL"], &["CHOWN"], &[]).unwrap().held, ALL & !bit("CHOWN"));
        assert_eq!(of(&["CAP_CHOWN"], &["all"], &[]).unwrap().held, bit("CHOWN"));
        assert_eq!(of(&["ALL"], &["ALL"], &[]).unwrap().held, 0);
        assert_eq!(of(&["SYS_TIME"], &["SYS_TIME"], &[]).unwrap().held, default);
    }

    #[test]
    fn ambient_ones_are_in_every_set_unless_dropped() {
        let made = of(&[], &["CHOWN"], &["NET_RAW", "CHOWN"]).unwrap();
        assert_eq!(made.ambient, bit("NET_RAW"));
        assert_eq!(made.held & (bit("NET_RAW") | bit("CHOWN")), bit("NET_RAW"));
        assert_eq!(document(made)["inheritable"], json!(["CAP_NET_RAW"]));
        assert_eq!(document(made)["ambient"], json!(["CAP_NET_RAW"]));
        assert_eq!(of(&[], &["ALL"], &["ALL"]).unwrap(), Sets { held: 0, ambient: 0 });
    }

    #[test]
    fn an_unknown_name_is_refused_in_every_list() {
        for bad in ["CAP_TELEPORT", "", "CAP_", "CAP_CAP_CHOWN", "CHOWN ", "0"] {
            for made in [of(&[bad], &[], &[]), of(&[], &[bad], &[]), of(&[], &[], &[bad])] {
                let error = made.unwrap_err().to_string();
                assert!(error.contains("capabilities[0]: "), "{error}");
            }
        }
    }

    #[test]
    fn privileged_is_everything() {
        let context = LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        };
        assert_eq!(
            sets(&context).unwrap(),
            Sets {
                held: ALL,
                ambient: 0
            }
        );
    }
}
