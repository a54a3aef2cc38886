//! Images made on the spot: OCI layouts with a root of Debian's busybox-static.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::cell::run;

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// An OCI layout in the making.
#[derive(Debug)]
pub struct Layout {
    dir: PathBuf,
    layers: Vec<Value>,
    diff_ids: Vec<String>,
}

/// An image of busybox with something of its own.
#[derive(Debug, Clone)]
pub struct ImageSpec {
    /// Name with tag that the archive gives it.
    pub name: String,
    /// `config` of the image's configuration: `Env`, `Cmd`, `User` …
    pub config: Value,
}

impl Layout {
    /// An empty layout in a directory that is not there yet.
    pub fn new(dir: &Path) -> Result<Layout> {
        fs::create_dir_all(dir.join("blobs/sha256")).with_context(|| format!("make {}", dir.display()))?;
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(Layout {
            dir: dir.to_owned(),
            layers: Vec::new(),
            diff_ids: Vec::new(),
        })
    }

    /// Adds a directory as the next layer.
    pub fn add_layer(&mut self, root: &Path, compression: Compression) -> Result<()> {
        let plain = self.dir.join("layer.tar");
        let mut tar = Command::new("tar");
        // busybox's tar, all that a guest without a disk has, knows none of these.
        if run(Command::new("tar").arg("--version")).is_ok_and(|text| text.contains("GNU")) {
            tar.args([
                "--sort=name",
                "--mtime=@0",
                "--owner=0",
                "--group=0",
                "--numeric-owner",
            ]);
        }
        run(tar.arg("-C").arg(root).arg("-cf").arg(&plain).arg("."))?;
        self.diff_ids.push(digest(&fs::read(&plain)?));
        let (packed, suffix) = match compression {
            Compression::None => (plain.clone(), ""),
            Compression::Gzip => {
                run(Command::new("gzip").args(["-n", "-1", "-f"]).arg(&plain))?;
                (self.dir.join("layer.tar.gz"), "+gzip")
            }
            Compression::Zstd => {
                run(Command::new("zstd").args(["-q", "-f", "--rm"]).arg(&plain))?;
                (self.dir.join("layer.tar.zst"), "+zstd")
            }
        };
        let bytes = fs::read(&packed)?;
        fs::remove_file(&packed)?;
        let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
        let layer = self.add_blob(&media_type, &bytes)?;
        self.layers.push(layer);
        Ok(())
    }

    /// Writes configuration, manifest and index under a name; gives the layout's directory.
    pub fn finish(self, reference: &str, config: &Value) -> Result<PathBuf> {
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": { "type": "layers", "diff_ids": self.diff_ids },
        });
        let config = self.add_blob(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().as_bytes(),
        )?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": self.layers,
        });
        let mut manifest = self.add_blob(
            "application/vnd.oci.image.manifest.v1+json",
            manifest.to_string().as_bytes(),
        )?;
        manifest["annotations"] = json!({
            "io.containerd.image.name": reference,
            "org.opencontainers.image.ref.name": reference,
        });
        let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
        fs::write(self.dir.join("index.json"), index.to_string())?;
        Ok(self.dir)
    }

    fn add_blob(&self, media_type: &str, bytes: &[u8]) -> Result<Value> {
        let digest = digest(bytes);
        fs::write(self.dir.join("blobs").join(digest.replace(':', "/")), bytes)?;
        Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
    }
}

impl ImageSpec {
    /// Busybox under this name.
    #[must_use]
    pub fn busybox(name: &str) -> ImageSpec {
        ImageSpec {
            name: name.to_owned(),
            config: json!({ "Env": ["PATH=/bin:/usr/bin"], "Cmd": ["/bin/sh"] }),
        }
    }

    /// The archive: a tar of an OCI layout.
    pub fn archive(&self) -> Result<Vec<u8>> {
        // Nearly every test wants the same one.
        static BUSYBOX: OnceLock<(Value, String, Vec<u8>)> = OnceLock::new();
        if let Some((config, name, bytes)) = BUSYBOX.get()
            && (config, name) == (&self.config, &self.name)
        {
            return Ok(bytes.clone());
        }
        let scratch = tempfile::tempdir()?;
        let root = scratch.path().join("root");
        busybox_root(&root)?;
        let mut layout = Layout::new(&scratch.path().join("layout"))?;
        layout.add_layer(&root, Compression::Gzip)?;
        let layout = layout.finish(&self.name, &self.config)?;
        let archive = scratch.path().join("image.tar");
        pack(&layout, &archive)?;
        let bytes = fs::read(archive)?;
        let _ = BUSYBOX.set((self.config.clone(), self.name.clone(), bytes.clone()));
        Ok(bytes)
    }
}

/// An OCI layout `<scratch>/<name>` of busybox that calls its image `reference`; gives its directory.
pub fn busybox_layout(scratch: &Path, name: &str, reference: &str) -> Result<PathBuf> {
    let root = scratch.join(format!("{name}-root"));
    busybox_root(&root)?;
    // Images of different names differ: one can be removed without the other.
    fs::write(root.join("etc/image"), format!("{name}\n"))?;
    let mut layout = Layout::new(&scratch.join(name))?;
    layout.add_layer(&root, Compression::Gzip)?;
    fs::remove_dir_all(&root)?;
    layout.finish(
        reference,
        &json!({ "Env": ["PATH=/bin:/usr/bin"], "Cmd": ["/bin/sh"] }),
    )
}

/// A root file system in a directory that is not there yet: busybox with a link for each of its programs.
pub fn busybox_root(dir: &Path) -> Result<()> {
    for name in [
        "bin", "etc", "tmp", "root", "proc", "sys", "dev", "var", "run", "usr/bin",
    ] {
        fs::create_dir_all(dir.join(name))?;
    }
    fs::set_permissions(dir.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    let candidates = ["/bin/busybox", "/usr/bin/busybox"];
    let busybox = candidates.iter().find(|path| Path::new(path).exists());
    let busybox = busybox.context("busybox is not installed (Debian: busybox-static)")?;
    fs::copy(busybox, dir.join("bin/busybox"))?;
    for applet in run(Command::new(busybox).arg("--list"))?
        .lines()
        .filter(|name| *name != "busybox")
    {
        symlink("busybox", dir.join("bin").join(applet))?;
    }
    let users =
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n";
    fs::write(dir.join("etc/passwd"), users)?;
    fs::write(
        dir.join("etc/group"),
        "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\nextra:x:5000:user\n",
    )?;
    Ok(())
}

/// Packs a layout into a tar.
pub fn pack(layout: &Path, archive: &Path) -> Result<()> {
    run(Command::new("tar")
        .arg("-C")
        .arg(layout)
        .arg("-cf")
        .arg(archive)
        .arg("."))?;
    Ok(())
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}
