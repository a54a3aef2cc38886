//! Device rules on v1, through the cgroups-rs crate.

use cgroups_rs::devices::{DevicePermissions, DeviceType as CrateDeviceType, DevicesController};

use super::limits::{by_descriptor, through};
use crate::device_rules::{Access, DeviceRule, DeviceType, Exceptions};
use crate::dir::Dir;
use crate::{Error, Result};

/// Puts device rules into force.
pub(crate) fn apply(dir: &Dir, rules: &Exceptions, fresh: bool) -> Result<()> {
    let controller = DevicesController::new(by_descriptor(dir));
    let write = |allow: bool, rule: &DeviceRule| {
        let kind = match rule.kind {
            DeviceType::All => CrateDeviceType::All,
            DeviceType::Block => CrateDeviceType::Block,
            DeviceType::Char => CrateDeviceType::Char,
        };
        let number = |number: Option<u32>| number.map_or(-1, i64::from);
        let (major, minor, access) = (number(rule.major), number(rule.minor), permissions(rule.access));
        let (file, set) = if allow {
            (
                "devices.allow",
                controller.allow_device(kind, major, minor, &access),
            )
        } else {
            (
                "devices.deny",
                controller.deny_device(kind, major, minor, &access),
            )
        };
        through(dir, file, &format!("{rule:?}"), set)
    };
    // A new group has its parent's list, which is open only where the parent's is; allowing everything below a parent
    // that does not is refused, so it is asked for only where something says otherwise.
    let open = || Ok::<bool, Error>(dir.read("devices.list")?.trim() == "a *:* rwm");
    if !(rules.allow_all && fresh && open()?) {
        let all = DeviceRule {
            allow: true,
            kind: DeviceType::All,
            major: None,
            minor: None,
            access: Access::ALL,
        };
        write(rules.allow_all, &all)?;
    }
    rules
        .rules
        .iter()
        .try_for_each(|rule| write(!rules.allow_all, rule))
}

fn permissions(access: Access) -> Vec<DevicePermissions> {
    [
        (Access::READ, DevicePermissions::Read),
        (Access::WRITE, DevicePermissions::Write),
        (Access::MKNOD, DevicePermissions::MkNod),
    ]
    .into_iter()
    .filter_map(|(bit, permission)| (access.bits() & bit.bits() != 0).then_some(permission))
    .collect()
}
