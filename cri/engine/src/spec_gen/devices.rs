//! Device nodes, and which of them the container may use.

use serde_json::{Value, json};

use super::HostDevice;
use super::error::{Result, inside, invalid};

/// Nodes that every container has of its own: the host's would be those of another terminal.
const OWN: [&str; 2] = ["/dev/ptmx", "/dev/console"];

/// `linux.devices`.
pub(super) fn nodes(devices: &[HostDevice]) -> Result<Vec<Value>> {
    let mut nodes = Vec::with_capacity(devices.len());
    for device in devices {
        let path = inside("config.devices", &device.path)?;
        if OWN.contains(&path.as_str()) {
            continue;
        }
        nodes.push(json!({
            "path": path,
            "type": kind(device)?,
            "major": device.major,
            "minor": device.minor,
            "fileMode": device.mode & 0o777,
            "uid": device.uid,
            "gid": device.gid,
        }));
    }
    Ok(nodes)
}

/// `linux.resources.devices`: nothing, then what was asked for. The nodes that every container has are allowed by the
/// device controller's own list.
pub(super) fn rules(devices: &[HostDevice], privileged: bool) -> Result<Vec<Value>> {
    if privileged {
        return Ok(vec![json!({ "allow": true, "access": "rwm" })]);
    }
    let mut rules = vec![json!({ "allow": false, "access": "rwm" })];
    for device in devices {
        let well_formed =
            !device.access.is_empty() && device.access.bytes().all(|byte| b"rwm".contains(&byte));
        if !well_formed {
            let why = format!(
                "permissions {:?} of {} are not of rwm",
                device.access, device.path
            );
            return Err(invalid("config.devices", why));
        }
        rules.push(json!({
            "allow": true,
            "type": kind(device)?,
            "major": device.major,
            "minor": device.minor,
            "access": device.access,
        }));
    }
    Ok(rules)
}

fn kind(device: &HostDevice) -> Result<&'static str> {
    match device.kind {
        'c' => Ok("c"),
        'b' => Ok("b"),
        other => Err(invalid(
            "config.devices",
            format!("{} is of type {other:?}", device.path),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(path: &str, access: &str) -> HostDevice {
        HostDevice {
            path: path.into(),
            kind: 'c',
            major: 10,
            minor: 229,
            mode: 0o660,
            uid: 0,
            gid: 44,
            access: access.into(),
        }
    }

    #[test]
    fn a_device_is_a_node_and_a_rule() {
        let devices = [device("/dev/fuse", "rw")];
        let node = json!({
            "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o660, "uid": 0, "gid": 44,
        });
        assert_eq!(nodes(&devices).unwrap(), [node]);
        let expected = [
            json!({ "allow": false, "access": "rwm" }),
            json!({ "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw" }),
        ];
        assert_eq!(rules(&devices, false).unwrap(), expected);
    }

    #[test]
    fn privileged_may_use_all_but_keeps_its_own_terminals() {
        let devices = ["/dev/ptmx", "/dev/console", "/dev/kmsg"].map(|path| device(path, "rwm"));
        assert_eq!(
            rules(&devices, true).unwrap(),
            [json!({ "allow": true, "access": "rwm" })]
        );
        let nodes = nodes(&devices).unwrap();
        assert_eq!(nodes.len(), 1);
        assert_eq!(nodes[0]["path"], "/dev/kmsg");
    }

    #[test]
    fn hostile_devices_are_refused() {
        for path in ["dev/x", "/dev/\0"] {
            assert!(nodes(&[device(path, "r")]).is_err(), "{path:?}");
        }
        for access in ["", "x", "rwx", "r w"] {
            assert!(rules(&[device("/dev/x", access)], false).is_err(), "{access:?}");
        }
        let mut fifo = device("/dev/x", "r");
        fifo.kind = 'p';
        nodes(std::slice::from_ref(&fifo)).unwrap_err();
        rules(&[fifo], false).unwrap_err();
    }
}
