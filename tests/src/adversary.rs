//! What an attacker has: links in the image, a directory of the host's to aim at, and a volume that is shared with the
//! container being made, in which two names are swapped as fast as the kernel lets it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use crate::bundle::Bundle;
use crate::host;

/// A directory of the host's that must not change: beside the bundle's root, with well-known names in it. Its files
/// hold the words `host's` and their name.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn canary(bundle: &Bundle) -> PathBuf {
    let dir = bundle.dir().join("canary");
    fs::create_dir(&dir).expect("canary");
    for name in [
        "file",
        "ptmx",
        "null",
        "console",
        "hostname",
        "passwd",
        "mtab",
        "resolv.conf",
        "secret",
    ] {
        fs::write(dir.join(name), format!("host's {name}")).expect("canary");
    }
    for name in ["pts", "shm", "self", "sys"] {
        fs::create_dir(dir.join(name)).expect("canary");
    }
    dir
}

/// Put a symbolic link where the image has something else, or nothing.
///
/// # Panics
/// When it cannot be made.
pub fn link(bundle: &Bundle, name: &str, target: &Path) {
    let path = bundle.inside(name);
    let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
    std::os::unix::fs::symlink(target, &path).expect("link");
}

/// A relative target with enough `..` in front to leave any root.
///
/// # Panics
/// When `target` is not absolute.
#[must_use]
pub fn upwards(target: &Path) -> PathBuf {
    Path::new("../../../../../../../..").join(target.strip_prefix("/").expect("absolute"))
}

/// Two names that are being exchanged until this is dropped.
#[derive(Debug)]
pub struct Exchange {
    child: Child,
}

impl Exchange {
    /// Start exchanging `a` and `b`; `dir` takes a small file with the attacker's report.
    ///
    /// # Panics
    /// When the attacker cannot start.
    #[must_use]
    pub fn start(dir: &Path, a: &Path, b: &Path) -> Self {
        let report = dir.join("attacker.out");
        let out = File::create(&report).expect("report");
        let child = Command::new(host::probe())
            .arg("exchange")
            .args([a, b])
            .stdout(out)
            .spawn()
            .expect("probe");
        host::wait_for("the attacker", || {
            fs::read_to_string(&report).ok().filter(|t| t.contains("ready"))
        });
        Self { child }
    }

    /// Whether the attacker is still at it: a race that nobody runs proves nothing.
    #[must_use]
    pub fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
