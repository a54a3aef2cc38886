//! Making bundles: a root filesystem of busybox, and a configuration that a test changes field by field.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::container::Container;
use crate::host;

/// A bundle that is still being described.
#[derive(Debug)]
pub struct Bundle {
    dir: TempDir,
    id: String,
    /// The configuration as it will be written.
    pub config: Value,
}

impl Bundle {
    /// A bundle whose container does nothing and succeeds: every namespace but user and time, the usual mounts, three
    /// capabilities, a writable root.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        let id = new_id();
        let dir = tempfile::Builder::new()
            .prefix(&format!("{id}-"))
            .tempdir_in(host::scratch())
            .expect("scratch");
        // user namespaced containers have to reach their root
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        make_root(&dir.path().join("rootfs"));
        let config = plain_config(&id);
        Self { dir, id, config }
    }

    /// The id of the container, which is also its mark.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bundle's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The root filesystem.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.dir().join("rootfs")
    }

    /// A file or directory inside the root filesystem, as the host sees it.
    #[must_use]
    pub fn inside(&self, path: &str) -> PathBuf {
        self.rootfs().join(path.trim_start_matches('/'))
    }

    /// Set the program and its arguments.
    #[must_use]
    pub fn args(self, args: &[&str]) -> Self {
        self.set("/process/args", json!(args))
    }

    /// Run a shell script.
    #[must_use]
    pub fn sh(self, script: &str) -> Self {
        self.args(&["/bin/sh", "-c", script])
    }

    /// Set the field at a JSON pointer; objects on the way are made.
    ///
    /// # Panics
    /// When something on the way is not an object, or an index lies outside its array.
    #[must_use]
    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        *self.field(pointer) = value;
        self
    }

    /// Append to the array at a JSON pointer, which is made when missing.
    ///
    /// # Panics
    /// When there is something else.
    #[must_use]
    pub fn push(mut self, pointer: &str, value: Value) -> Self {
        let field = self.field(pointer);
        if field.is_null() {
            *field = json!([]);
        }
        field
            .as_array_mut()
            .unwrap_or_else(|| panic!("{pointer} is no array"))
            .push(value);
        self
    }

    /// Remove the field at a JSON pointer.
    ///
    /// # Panics
    /// When its parent is missing.
    #[must_use]
    pub fn remove(mut self, pointer: &str) -> Self {
        let (parent, key) = pointer.rsplit_once('/').expect("pointer");
        let object = self.field(parent).as_object_mut();
        object
            .unwrap_or_else(|| panic!("{parent} is no object"))
            .remove(key);
        self
    }

    /// Append a mount.
    #[must_use]
    pub fn mount(self, destination: &str, kind: &str, source: &str, options: &[&str]) -> Self {
        let mount = json!({"destination": destination, "type": kind, "source": source, "options": options});
        self.push("/mounts", mount)
    }

    /// Take away the mounts at these places.
    #[must_use]
    pub fn without_mounts(mut self, places: &[&str]) -> Self {
        if let Some(mounts) = self.field("/mounts").as_array_mut() {
            mounts.retain(|m| !places.iter().any(|p| m["destination"] == *p));
        }
        self
    }

    /// Take away everything that is mounted on or below /dev.
    #[must_use]
    pub fn without_dev(self) -> Self {
        self.without_mounts(&["/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"])
    }

    /// Append a bind mount of a host path.
    #[must_use]
    pub fn bind(self, source: &Path, destination: &str, options: &[&str]) -> Self {
        self.mount(destination, "bind", &source.display().to_string(), options)
    }

    /// Add a new namespace of this type.
    #[must_use]
    pub fn namespace(self, kind: &str) -> Self {
        self.push("/linux/namespaces", json!({"type": kind}))
    }

    /// Take the namespace of this type away: the host's is used.
    #[must_use]
    pub fn without_namespace(mut self, kind: &str) -> Self {
        if let Some(list) = self.field("/linux/namespaces").as_array_mut() {
            list.retain(|n| n["type"] != kind);
        }
        self
    }

    /// Join the namespace at this path instead of making a new one.
    #[must_use]
    pub fn join(self, kind: &str, path: &str) -> Self {
        self.without_namespace(kind)
            .push("/linux/namespaces", json!({"type": kind, "path": path}))
    }

    /// A user namespace in which 0..65536 are the host's 100000..165536, who own the root filesystem.
    #[must_use]
    pub fn userns(self) -> Self {
        let owner =
            |path: &Path| std::os::unix::fs::lchown(path, Some(100_000), Some(100_000)).expect("chown");
        owner(&self.rootfs());
        for entry in fs::read_dir(self.rootfs()).expect("rootfs").flatten() {
            owner(&entry.path());
        }
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        self.namespace("user")
            .set("/linux/uidMappings", map.clone())
            .set("/linux/gidMappings", map)
    }

    /// Give the process these capabilities in the bounding, effective and permitted sets.
    #[must_use]
    pub fn capabilities(self, names: &[&str]) -> Self {
        let set = json!({"bounding": names, "effective": names, "permitted": names});
        self.set("/process/capabilities", set)
    }

    /// Write the configuration and hand over to the container's life.
    ///
    /// # Panics
    /// When the file cannot be written.
    #[must_use]
    pub fn container(self) -> Container {
        let text = serde_json::to_vec_pretty(&self.config).expect("json");
        self.container_of(&text)
    }

    /// The same with a configuration that is not necessarily JSON.
    ///
    /// # Panics
    /// When the file cannot be written.
    #[must_use]
    pub fn container_of(self, config: &[u8]) -> Container {
        fs::write(self.dir().join("config.json"), config).expect("config.json");
        Container::new(self.dir, self.id, self.config)
    }

    fn field(&mut self, pointer: &str) -> &mut Value {
        let mut at = &mut self.config;
        for key in pointer.split('/').skip(1) {
            at = match at {
                Value::Array(list) => {
                    let index: usize = key.parse().unwrap_or_else(|_| panic!("{key} of {pointer}"));
                    list.get_mut(index)
                        .unwrap_or_else(|| panic!("{key} of {pointer}"))
                }
                Value::Null => {
                    *at = json!({});
                    &mut at[key]
                }
                other => &mut other[key],
            };
        }
        at
    }
}

impl Default for Bundle {
    fn default() -> Self {
        Self::new()
    }
}

/// A root filesystem in `root`: busybox under many names, the probe, a few files.
///
/// # Panics
/// When it cannot be made.
pub fn make_root(root: &Path) {
    for dir in ["bin", "proc", "sys", "dev", "etc", "tmp", "mnt", "run"] {
        fs::create_dir_all(root.join(dir)).expect("rootfs");
    }
    for (from, name) in [(host::busybox(), "busybox"), (host::probe(), "probe")] {
        let to = root.join("bin").join(name);
        // a link saves two megabytes a bundle; across file systems it has to be a copy
        if fs::hard_link(from, &to).is_err() {
            fs::copy(from, &to).expect("copy");
        }
    }
    for applet in host::APPLETS {
        symlink("busybox", root.join("bin").join(applet)).expect("link");
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).expect("chmod");
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )
    .expect("passwd");
    fs::write(
        root.join("etc/group"),
        "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n",
    )
    .expect("group");
}

fn new_id() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!(
        "ct-{}-{count}-{:05x}",
        std::process::id(),
        now.subsec_nanos() & 0xf_ffff
    )
}

fn plain_config(id: &str) -> Value {
    let caps = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/true"],
            "env": ["PATH=/bin:/usr/bin:/sbin", format!("CORACLE_TEST_MARK={id}")],
            "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "boat",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]}
        ],
        "linux": {
            "cgroupsPath": format!("/{id}"),
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}
            ],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}
