//! Roots are really built here, each in a thread with a mount namespace of its own that takes all mounts along at its end.

mod hostile;
mod kinds;
mod userns;
mod whole;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use coracle_kernel::mount_attr::{self, Attr, Propagation};
use coracle_kernel::mountinfo;
use coracle_kernel::namespace::{self, Kinds};
use coracle_kernel::path::{self, OFlags};
use coracle_kernel::procfs::Procfs;
use coracle_kernel::{Errno, mount, tty};
use coracle_spec::Config;
use serde_json::{Value, json};

use super::{Context, Entry, Error, Result, Rootfs, Source};

/// A bundle in a temporary directory: `rootfs/`, and `outside/canary` that nothing may touch.
struct Bundle {
    base: PathBuf,
}

impl Bundle {
    fn new() -> Bundle {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let base = std::env::temp_dir().join(format!("coracle-rootfs-{}-{number}", std::process::id()));
        for directory in ["rootfs/etc", "rootfs/proc", "rootfs/sys", "rootfs/dev", "outside"] {
            fs::create_dir_all(base.join(directory)).unwrap();
        }
        fs::write(base.join("outside/canary"), "untouched").unwrap();
        Bundle { base }
    }

    fn root(&self, name: &str) -> PathBuf {
        self.base.join("rootfs").join(name)
    }

    fn outside(&self) -> PathBuf {
        self.base.join("outside")
    }

    fn context(&self, entry: Entry) -> Context<'_> {
        // Leaked: tests are short, and the context borrows.
        let root = Box::leak(self.base.join("rootfs").into_boxed_path());
        Context {
            bundle: &self.base,
            root,
            source: Source::Path,
            lent: Vec::new(),
            entry,
        }
    }

    /// Runs `body` with the root attached, its mounts and devices made, in a namespace of its own.
    fn build<T: Send>(&self, config: Value, body: impl FnOnce(&mut Rootfs<'_>) -> T + Send) -> Result<T> {
        self.build_as(config, Entry::Pivot, body)
    }

    fn build_as<T: Send>(
        &self,
        config: Value,
        entry: Entry,
        body: impl FnOnce(&mut Rootfs<'_>) -> T + Send,
    ) -> Result<T> {
        let config = checked(config);
        in_namespace(|| {
            let mut rootfs = Rootfs::attach(&config, self.context(entry))?;
            rootfs.make_mounts()?;
            rootfs.make_devices()?;
            Ok(body(&mut rootfs))
        })
    }

    /// The text of the error with which building ends.
    fn refusal(&self, config: Value) -> String {
        let error = self
            .build(config, |rootfs| rootfs.seal())
            .and_then(|sealed| sealed)
            .unwrap_err();
        text(&error)
    }

    fn assert_outside_untouched(&self) {
        let names: Vec<_> = fs::read_dir(self.outside())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["canary"]);
        assert_eq!(
            fs::read_to_string(self.outside().join("canary")).unwrap(),
            "untouched"
        );
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.base);
    }
}

/// Runs in a new thread with its own private mount namespace.
fn in_namespace<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            namespace::unshare(Kinds::MOUNT).unwrap();
            body()
        });
        thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
    })
}

fn text(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn checked(mut config: Value) -> Config {
    config["ociVersion"] = json!("1.2.0");
    if config["root"].is_null() {
        config["root"] = json!({ "path": "rootfs" });
    }
    if config["linux"].is_null() {
        config["linux"] = json!({});
    }
    if config["linux"]["namespaces"].is_null() {
        config["linux"]["namespaces"] = json!([{ "type": "mount" }]);
    }
    config["process"] = json!({ "cwd": "/", "args": ["true"], "user": { "uid": 0, "gid": 0 } });
    Config::from_slice(&serde_json::to_vec(&config).unwrap()).unwrap()
}

fn proc() -> Value {
    json!({ "destination": "/proc", "type": "proc", "source": "proc" })
}

fn dev() -> Value {
    json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"] })
}

fn mount_of(destination: &str) -> Option<mountinfo::Mount> {
    let mounts = mountinfo::read_own(&Procfs::private().unwrap()).unwrap();
    mounts
        .into_iter()
        .rev()
        .find(|mount| mount.mount_point == Path::new(destination))
}
