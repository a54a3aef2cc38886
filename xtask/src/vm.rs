//! The cgroup v2 guest: Debian 12 with systemd under a user-mode Linux kernel.
//!
//! Its disk is made once by mmdebstrap and kept in the cache under a hash of what it is made from. The kernel is a
//! binary that this repository does not carry: it comes from `CORACLE_UML`, from the cache, from a `shared/vm` folder
//! beside the checkout, or is built (`--long`, about ten minutes); without one the stage is skipped, and says so.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

/// A guest that can be booted.
pub(crate) struct Guest {
    scripts: PathBuf,
    kernel: PathBuf,
    disk: PathBuf,
}

/// What a command in the guest printed and how it ended.
pub(crate) struct Outcome {
    /// Standard output and standard error.
    pub(crate) output: String,
    /// Its exit status; 124 is a time-out, 125 a guest that died.
    pub(crate) status: i32,
}

impl Guest {
    /// Finds the kernel and makes the disk where the cache has none; `None` where there is no kernel to be had.
    pub(crate) fn prepare(repository: &Path, cache: &Path, build_kernel: bool) -> Result<Option<Self>> {
        let scripts = repository.join("integration/vm");
        let cache = cache.join("vm");
        fs::create_dir_all(&cache).with_context(|| format!("make {}", cache.display()))?;
        let Some(kernel) = find_kernel(repository, &cache, &scripts, build_kernel)? else {
            return Ok(None);
        };
        let disk = cache.join(format!("disk-{}.img", hash_of(&scripts)?));
        if !disk.exists() {
            make_disk(&scripts, &disk)?;
        }
        Ok(Some(Self {
            scripts,
            kernel,
            disk,
        }))
    }

    /// Boots on this one of the host's processors, runs `script` as root with `share` at `/mnt/share`, powers off.
    pub(crate) fn run(
        &self,
        share: &Path,
        script: &str,
        memory_mib: u32,
        limit_seconds: u32,
        cpu: u32,
    ) -> Result<Outcome> {
        let output = Command::new("bash")
            .env("CPU", cpu.to_string())
            .arg(self.scripts.join("vmrun"))
            .args([
                "-b",
                "uml",
                "-c",
                "1",
                "-m",
                &memory_mib.to_string(),
                "-t",
                &limit_seconds.to_string(),
            ])
            .arg("-k")
            .arg(&self.kernel)
            .arg("-d")
            .arg(&self.disk)
            .arg("-s")
            .arg(share)
            .arg("--")
            .arg(script)
            .output()
            .context("run integration/vm/vmrun")?;
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        Ok(Outcome {
            output: text,
            status: output.status.code().unwrap_or(125),
        })
    }
}

fn find_kernel(repository: &Path, cache: &Path, scripts: &Path, build: bool) -> Result<Option<PathBuf>> {
    let cached = cache.join("linux.uml");
    let named = std::env::var_os("CORACLE_UML").map(PathBuf::from);
    let beside = repository.parent().map(|dir| dir.join("shared/vm/linux.uml"));
    if let Some(found) = named
        .into_iter()
        .chain([cached.clone()])
        .chain(beside)
        .find(|path| path.exists())
    {
        return Ok(Some(found));
    }
    if !build {
        return Ok(None);
    }
    let source = cache.join("linux-source.tar.xz");
    let script = "set -e; cd \"$1\"; bash \"$2/fetch.sh\" .; BUILD=\"$1/uml-src\" bash \"$2/build-uml.sh\" \"$3\" \"$4\"";
    let status = Command::new("bash")
        .args(["-c", script, "bash"])
        .arg(cache)
        .arg(scripts)
        .arg(&source)
        .arg(&cached)
        .status()
        .context("build the guest's kernel")?;
    ensure!(status.success(), "integration/vm/build-uml.sh: {status}");
    Ok(Some(cached))
}

/// Made under another name and renamed: an interrupted run leaves no half disk.
fn make_disk(scripts: &Path, disk: &Path) -> Result<()> {
    let half = disk.with_extension("half");
    let status = Command::new("bash")
        .arg(scripts.join("mkroot.sh"))
        .args(["-s", "bookworm", "-p"])
        .arg(scripts.join("packages.txt"))
        .arg("-o")
        .arg(&half)
        .status()
        .context("run integration/vm/mkroot.sh")?;
    ensure!(status.success(), "integration/vm/mkroot.sh: {status}");
    let _ = fs::remove_file(half.with_extension("half.tar"));
    fs::rename(&half, disk).with_context(|| format!("name the disk {}", disk.display()))
}

/// Of everything that the disk is made from.
fn hash_of(scripts: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    for file in [
        "mkroot.sh",
        "packages.txt",
        "guest/vm-agent",
        "guest/vm-agent.service",
    ] {
        let path = scripts.join(file);
        hasher.update(fs::read(&path).with_context(|| format!("read {}", path.display()))?);
    }
    Ok(hasher
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect())
}
