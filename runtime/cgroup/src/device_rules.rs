//! Device rules: from the configuration, with the list that every container may use behind them, to what v1 can hold.

use coracle_spec::oci::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use crate::{Error, Result};

/// Rules taken from one configuration at most; a privileged pod has one a device node of its host.
const RULES_MAX: usize = 8192;

/// Which nodes a rule speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceType {
    /// Every device, whatever number and access the rule names: the kernel reads an `a` rule so.
    All,
    /// Block devices.
    Block,
    /// Character devices.
    Char,
}

/// What a rule allows or denies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Access(u8);

impl Access {
    /// mknod.
    pub const MKNOD: Access = Access(1);
    /// Reading.
    pub const READ: Access = Access(2);
    /// Writing.
    pub const WRITE: Access = Access(4);
    /// All three.
    pub const ALL: Access = Access(7);

    /// From letters out of `rwm`; none for anything else and for no letter.
    #[must_use]
    pub fn parse(text: &str) -> Option<Access> {
        let mut bits = 0;
        for letter in text.bytes() {
            bits |= match letter {
                b'm' => 1,
                b'r' => 2,
                b'w' => 4,
                _ => return None,
            };
        }
        (bits != 0).then_some(Access(bits))
    }

    /// The kernel's bits (`BPF_DEVCG_ACC_*`).
    #[must_use]
    pub fn bits(self) -> u8 {
        self.0
    }

    #[cfg(test)]
    pub(crate) fn from_bits(bits: u8) -> Option<Access> {
        (bits != 0 && bits <= 7).then_some(Access(bits))
    }
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (bit, letter) in [(2, "r"), (4, "w"), (1, "m")] {
            if self.0 & bit != 0 {
                f.write_str(letter)?;
            }
        }
        Ok(())
    }
}

/// One rule; a number that is none stands for every one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRule {
    /// Allowed or denied.
    pub allow: bool,
    /// Which nodes.
    pub kind: DeviceType,
    /// Major number.
    pub major: Option<u32>,
    /// Minor number.
    pub minor: Option<u32>,
    /// What of it.
    pub access: Access,
}

/// What every container may use, whatever its rules say: mknod of anything (opening it is another matter), the nodes
/// of a default /dev, ptys, and /dev/net/tun.
const ALWAYS: [(DeviceType, Option<u32>, Option<u32>, Access); 11] = [
    (DeviceType::Char, None, None, Access::MKNOD),
    (DeviceType::Block, None, None, Access::MKNOD),
    (DeviceType::Char, Some(1), Some(3), Access::ALL),
    (DeviceType::Char, Some(1), Some(5), Access::ALL),
    (DeviceType::Char, Some(1), Some(7), Access::ALL),
    (DeviceType::Char, Some(1), Some(8), Access::ALL),
    (DeviceType::Char, Some(1), Some(9), Access::ALL),
    (DeviceType::Char, Some(5), Some(0), Access::ALL),
    (DeviceType::Char, Some(5), Some(2), Access::ALL),
    (DeviceType::Char, Some(136), None, Access::ALL),
    (DeviceType::Char, Some(10), Some(200), Access::ALL),
];

/// The rules of a container in order: everything denied, then the configuration's, then what is always allowed. A
/// later rule wins.
pub(crate) fn complete(resources: &LinuxResources) -> Result<Vec<DeviceRule>> {
    let given = resources.devices().as_deref().unwrap_or_default();
    if given.len() > RULES_MAX {
        return Err(Error::Limit(format!(
            "linux.resources.devices has more than {RULES_MAX} rules"
        )));
    }
    let mut rules = Vec::with_capacity(given.len() + ALWAYS.len());
    for (index, rule) in given.iter().enumerate() {
        let rule = convert(rule, index)?;
        if rule.kind == DeviceType::All {
            // It decides for everything before it.
            rules.clear();
        }
        rules.push(rule);
    }
    let open = |rule: &DeviceRule| rule.kind == DeviceType::All && rule.allow;
    if rules.len() == 1 && rules.iter().all(open) {
        return Ok(rules);
    }
    rules.extend(ALWAYS.map(|(kind, major, minor, access)| DeviceRule {
        allow: true,
        kind,
        major,
        minor,
        access,
    }));
    Ok(rules)
}

/// Whether the configuration's own rules deny anything, so that leaving them out would be noticed.
pub(crate) fn restrict(resources: &LinuxResources) -> bool {
    resources
        .devices()
        .as_deref()
        .unwrap_or_default()
        .iter()
        .any(|rule| !rule.allow())
}

fn convert(rule: &LinuxDeviceCgroup, index: usize) -> Result<DeviceRule> {
    let refused = |why: &str| Error::Limit(format!("linux.resources.devices[{index}]: {why}"));
    let kind = match rule.typ() {
        None | Some(LinuxDeviceType::A) => DeviceType::All,
        Some(LinuxDeviceType::B) => DeviceType::Block,
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => DeviceType::Char,
        Some(LinuxDeviceType::P) => return Err(refused("a fifo is not a device")),
    };
    // The kernel takes an "a" rule for every device and every access, whatever else it says.
    if kind == DeviceType::All {
        return Ok(DeviceRule {
            allow: rule.allow(),
            kind,
            major: None,
            minor: None,
            access: Access::ALL,
        });
    }
    let access = match rule.access() {
        None => return Err(refused("access cannot be empty")),
        Some(access) => Access::parse(access).ok_or_else(|| refused("access is not made of r, w and m"))?,
    };
    let number = |value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value)
            .map(Some)
            .map_err(|_| refused("a device number is out of range")),
    };
    Ok(DeviceRule {
        allow: rule.allow(),
        kind,
        major: number(rule.major())?,
        minor: number(rule.minor())?,
        access,
    })
}

/// Rules as v1 holds them: one answer for all devices, and exceptions from it.
#[cfg(feature = "cgroup-v1")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Exceptions {
    pub(crate) allow_all: bool,
    /// Each says the opposite of `allow_all`.
    pub(crate) rules: Vec<DeviceRule>,
}

/// Brings ordered rules into v1's form. What that form cannot say (an exception from an exception) is an error: the
/// kernel would take the writes without a word and allow or deny something else.
#[cfg(feature = "cgroup-v1")]
pub(crate) fn exceptions(rules: &[DeviceRule]) -> Result<Exceptions> {
    let mut state = Exceptions {
        allow_all: false,
        rules: Vec::new(),
    };
    for rule in rules {
        if rule.kind == DeviceType::All {
            state = Exceptions {
                allow_all: rule.allow,
                rules: Vec::new(),
            };
            continue;
        }
        let same = |other: &DeviceRule| {
            (other.kind, other.major, other.minor) == (rule.kind, rule.major, rule.minor)
        };
        if rule.allow != state.allow_all {
            match state.rules.iter_mut().find(|other| same(other)) {
                Some(other) => other.access = Access(other.access.0 | rule.access.0),
                None => state.rules.push(*rule),
            }
            continue;
        }
        // The rule takes back what exceptions said: whole ones, or access bits of its very numbers.
        for other in &mut state.rules {
            let bits = other.access.0 & rule.access.0;
            if bits == 0 || !overlap(rule, other) {
                continue;
            }
            if !covers(rule, other) {
                return Err(Error::Limit(format!(
                    "cgroup v1 cannot hold a device rule that takes back a part of an earlier one: {rule:?}"
                )));
            }
            other.access = Access(other.access.0 & !bits);
        }
        state.rules.retain(|rule| rule.access.0 != 0);
    }
    Ok(state)
}

#[cfg(feature = "cgroup-v1")]
fn covers(wide: &DeviceRule, narrow: &DeviceRule) -> bool {
    let number = |wide: Option<u32>, narrow: Option<u32>| wide.is_none() || wide == narrow;
    wide.kind == narrow.kind && number(wide.major, narrow.major) && number(wide.minor, narrow.minor)
}

#[cfg(feature = "cgroup-v1")]
fn overlap(one: &DeviceRule, other: &DeviceRule) -> bool {
    let number = |one: Option<u32>, other: Option<u32>| one.is_none() || other.is_none() || one == other;
    one.kind == other.kind && number(one.major, other.major) && number(one.minor, other.minor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use coracle_spec::oci::{LinuxDeviceCgroupBuilder, LinuxResourcesBuilder};

    fn given(
        allow: bool,
        typ: LinuxDeviceType,
        numbers: (Option<i64>, Option<i64>),
        access: &str,
    ) -> LinuxResources {
        let mut rule = LinuxDeviceCgroupBuilder::default()
            .allow(allow)
            .typ(typ)
            .access(access);
        if let Some(major) = numbers.0 {
            rule = rule.major(major);
        }
        if let Some(minor) = numbers.1 {
            rule = rule.minor(minor);
        }
        LinuxResourcesBuilder::default()
            .devices(vec![rule.build().unwrap()])
            .build()
            .unwrap()
    }

    #[test]
    fn rules_are_followed_by_what_is_always_allowed() {
        let rules = complete(&LinuxResources::default()).unwrap();
        assert_eq!(rules.len(), ALWAYS.len());

        let rules = complete(&given(false, LinuxDeviceType::A, (Some(8), Some(0)), "r")).unwrap();
        assert_eq!(rules.len(), ALWAYS.len() + 1);
        assert_eq!(
            (rules[0].major, rules[0].access),
            (None, Access::ALL),
            "an a rule is for everything"
        );

        let rules = complete(&given(true, LinuxDeviceType::A, (None, None), "rwm")).unwrap();
        assert_eq!(rules.len(), 1, "nothing needs to be added to everything");
    }

    #[test]
    fn rules_that_mean_nothing_are_refused_by_their_index() {
        for (resources, why) in [
            (given(true, LinuxDeviceType::P, (None, None), "r"), "fifo"),
            (given(true, LinuxDeviceType::C, (None, None), ""), "access"),
            (given(true, LinuxDeviceType::C, (None, None), "rx"), "access"),
            (
                given(true, LinuxDeviceType::B, (Some(1 << 40), None), "r"),
                "range",
            ),
            (given(true, LinuxDeviceType::B, (Some(-2), None), "r"), "range"),
        ] {
            let text = complete(&resources).unwrap_err().to_string();
            assert!(text.contains("devices[0]") && text.contains(why), "{text}");
        }
        let many = vec![LinuxDeviceCgroupBuilder::default().allow(true).build().unwrap(); RULES_MAX + 1];
        complete(&LinuxResourcesBuilder::default().devices(many).build().unwrap()).unwrap_err();
    }

    #[cfg(feature = "cgroup-v1")]
    #[test]
    fn v1_gets_one_answer_and_its_exceptions() {
        let rule = |allow, major, minor, access: &str| DeviceRule {
            allow,
            kind: DeviceType::Char,
            major,
            minor,
            access: Access::parse(access).unwrap(),
        };
        let all = |allow| DeviceRule {
            allow,
            kind: DeviceType::All,
            major: None,
            minor: None,
            access: Access::ALL,
        };

        let state = exceptions(&[
            all(false),
            rule(true, Some(1), Some(3), "r"),
            rule(true, Some(1), Some(3), "w"),
        ]);
        assert_eq!(state.unwrap().rules, [rule(true, Some(1), Some(3), "rw")]);

        let state = exceptions(&[
            rule(true, Some(1), Some(3), "rwm"),
            rule(false, Some(1), None, "w"),
        ])
        .unwrap();
        assert_eq!(
            state,
            Exceptions {
                allow_all: false,
                rules: vec![rule(true, Some(1), Some(3), "rm")]
            }
        );

        let state = exceptions(&[all(true), rule(false, Some(1), Some(5), "rwm")]).unwrap();
        assert_eq!(
            state,
            Exceptions {
                allow_all: true,
                rules: vec![rule(false, Some(1), Some(5), "rwm")]
            }
        );

        exceptions(&[rule(true, Some(1), None, "r"), rule(false, Some(1), Some(3), "r")]).unwrap_err();
    }
}
