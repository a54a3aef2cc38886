//! Bundles with Debian's static busybox.

use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_cgroup::{Host, Location, Manager, Options};
use serde_json::{Value, json};

/// The cgroup above all of this run's containers.
fn cgroup() -> String {
    format!("/monitor-test-{}", std::process::id())
}

/// A bundle whose program is `sh -c <script>`, its configuration changed by `edit`.
pub(crate) fn bundle_with(dir: &Path, id: &str, script: &str, edit: impl FnOnce(&mut Value)) -> PathBuf {
    let bundle = dir.join("bundles").join(id);
    for path in ["bin", "proc", "dev", "sys", "tmp", "etc"] {
        std::fs::create_dir_all(bundle.join("rootfs").join(path)).unwrap();
    }
    let busybox = bundle.join("rootfs/bin/busybox");
    if std::fs::hard_link(dir.join("busybox"), &busybox).is_err() {
        std::fs::copy("/bin/busybox", dir.join("busybox")).unwrap();
        std::fs::hard_link(dir.join("busybox"), &busybox).unwrap();
    }
    for name in [
        "sh", "true", "cat", "sleep", "seq", "yes", "head", "hostname", "tail", "dd", "tty", "kill",
    ] {
        std::os::unix::fs::symlink("busybox", bundle.join("rootfs/bin").join(name)).unwrap();
    }
    let mut config = json!({
        "ociVersion": "1.2.0",
        "process": process(&["/bin/sh", "-c", script]),
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "alone",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
        ],
        "linux": {
            "cgroupsPath": format!("{}/{id}", cgroup()),
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "network"}],
        },
    });
    edit(&mut config);
    std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
    bundle
}

pub(crate) fn bundle(dir: &Path, id: &str, script: &str) -> PathBuf {
    bundle_with(dir, id, script, |_| {})
}

/// A process document.
pub(crate) fn process(args: &[&str]) -> Value {
    json!({
        "terminal": false,
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/bin"],
        "cwd": "/",
        "noNewPrivileges": true,
    })
}

/// Makes a sub-group of a container's cgroup.
pub(crate) fn sub_group(id: &str, name: &str) -> Box<dyn Manager> {
    let host = Host::detect().unwrap();
    let location = Location::absolute(&format!("{}/{id}", cgroup())).unwrap();
    let leaf = host
        .manager(
            &location,
            Options {
                accounting: true,
                ..Options::default()
            },
        )
        .unwrap();
    let mut group = leaf.sub_group(name).unwrap();
    group
        .create(&coracle_spec::oci::LinuxResources::default())
        .unwrap();
    group
}

/// Makes a cgroup beside those of the containers.
pub(crate) fn group(name: &str) -> Box<dyn Manager> {
    let location = Location::absolute(&format!("{}/{name}", cgroup())).unwrap();
    let mut group = Host::detect()
        .unwrap()
        .manager(&location, Options::default())
        .unwrap();
    group
        .create(&coracle_spec::oci::LinuxResources::default())
        .unwrap();
    group
}

/// Kills what is left and removes its cgroups.
pub(crate) fn remove_cgroups() {
    let host = Host::detect().unwrap();
    let location = Location::absolute(&cgroup()).unwrap();
    let mut manager = host.manager(&location, Options::default()).unwrap();
    if manager.exists() {
        let _ = manager.kill(Duration::from_secs(10));
        let _ = manager.wait_empty(Duration::from_secs(10));
        if let Err(error) = manager.remove(Duration::from_secs(10)) {
            eprintln!("cgroup is left: {error}");
        }
    }
}
