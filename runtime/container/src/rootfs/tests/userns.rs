//! A root built by the root of a user namespace: nodes cannot be made there, and the host's flags must hold.

use std::process::Command;

use coracle_kernel::mount_attr::Change;

use super::*;

/// Path of a mount that the host has made read-only and nosuid; set in the copy of this program that runs inside.
const LOCKED: &str = "CORACLE_TEST_LOCKED_MOUNT";

#[test]
fn flags_of_the_host_hold_and_devices_are_bound() {
    if let Some(locked) = std::env::var_os(LOCKED) {
        return inside(Path::new(&locked));
    }
    let bundle = Bundle::new();
    let locked = bundle.base.join("locked");
    fs::create_dir(&locked).unwrap();
    let name = format!("{}::flags_of_the_host_hold_and_devices_are_bound", module_path!());
    let (_, name) = name.split_once("::").unwrap();
    // unshare(1), since a threaded program cannot make a user namespace for itself.
    let output = in_namespace(|| {
        let root = path::open_dir("/").unwrap();
        mount_attr::set_propagation(root, Propagation::Private, true).unwrap();
        let source = mount::make("tmpfs", &[("mode", c"755")], Attr::RDONLY | Attr::NOSUID).unwrap();
        mount::attach(source, path::open_dir(&locked).unwrap()).unwrap();
        Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "--net", "--pid", "--fork"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(LOCKED, &locked)
            .output()
            .unwrap()
    });
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

fn inside(locked: &Path) {
    let bundle = Bundle::new();
    let bind = |options: &[&str]| json!({ "destination": "/locked", "source": locked, "options": options });
    let linux = json!({
        "namespaces": [{ "type": "mount" }, { "type": "user" }, { "type": "network" }],
        "uidMappings": [{ "containerID": 0, "hostID": 0, "size": 1 }],
        "gidMappings": [{ "containerID": 0, "hostID": 0, "size": 1 }],
        "maskedPaths": ["/proc/keys", "/proc/fs"],
        "readonlyPaths": ["/proc/sys"],
    });
    let sys = json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] });
    let config = |options: &[&str]| json!({ "mounts": [proc(), dev(), sys.clone(), bind(options)], "linux": linux.clone() });

    let refusal = bundle.refusal(config(&["bind", "rw"]));
    assert!(
        refusal.contains("set the flags of the bind") && refusal.contains("not permitted"),
        "{refusal}"
    );
    bundle
        .build(config(&["bind", "noexec"]), |rootfs| {
            rootfs.enter().unwrap();
            rootfs.seal().unwrap();
            let mount = mount_of("/locked").unwrap();
            assert!(
                ["ro", "nosuid", "noexec"]
                    .iter()
                    .all(|word| mount.has_option(word)),
                "{mount:?}"
            );
            let top = path::open_dir("/locked").unwrap();
            for flag in [Attr::RDONLY, Attr::NOSUID] {
                let cleared = mount_attr::set(
                    &top,
                    &Change {
                        clear: flag,
                        ..Change::default()
                    },
                );
                assert_eq!(cleared.unwrap_err().errno(), Errno::EPERM, "{flag:?}");
            }
            assert_eq!(fs::metadata("/dev/null").unwrap().rdev(), 0x103);
            assert!(mount_of("/dev/null").is_some(), "made and not bound");
            assert_eq!(fs::read("/proc/keys").unwrap(), b"");
        })
        .unwrap();
}
