//! Import of archives that other tools have written, and of hostile ones.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{self, Built, Layer, Store, build, file, is_root};
use coracle_image::{Digest, ImageError};
use coracle_snapshot::{Durability, MountApi, Snapshotter};

fn two_layers() -> Built {
    let base = Layer::new().dir("etc", 0o755).file("etc/name", "base", 0o644);
    build(&[base.gzip(), Layer::new().file("etc/more", "more", 0o600).plain()])
}

/// A tar of these files, in this order.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn blob(bytes: &[u8]) -> String {
    format!("blobs/sha256/{}", Digest::sha256(bytes).hex())
}

/// The OCI layout of an image as the list of its files, index last: layers come before anything says what they are.
fn layout(built: &Built, annotation: &str) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = built
        .layers
        .iter()
        .rev()
        .map(|layer| (blob(layer), layer.clone()))
        .collect();
    files.push((blob(built.config.bytes()), built.config.bytes().to_vec()));
    files.push((blob(built.manifest.bytes()), built.manifest.bytes().to_vec()));
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": built.manifest.digest(), "size": built.manifest.bytes().len(),
        "annotations": { "org.opencontainers.image.ref.name": annotation },
    }]});
    files.push(("index.json".into(), index.to_string().into_bytes()));
    files.push(("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
    files
}

fn packed(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    archive(
        &files
            .iter()
            .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
            .collect::<Vec<_>>(),
    )
}

/// A docker archive whose second layer is a symlink into another folder, as older versions shared them.
fn docker_archive(built: &Built) -> Vec<u8> {
    let plain = Layer::new()
        .dir("etc", 0o755)
        .file("etc/name", "base", 0o644)
        .plain()
        .bytes;
    let manifest = serde_json::json!([{
        "Config": "config.json", "RepoTags": ["example/app:v1", "not a reference"],
        "Layers": ["one/layer.tar", "two/layer.tar"],
    }]);
    let mut builder = tar::Builder::new(Vec::new());
    let second = &built.layers[1];
    for (name, bytes) in [("one/layer.tar", &plain), ("shared/layer.tar", second)] {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    let mut link = tar::Header::new_ustar();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    builder
        .append_link(&mut link, "two/layer.tar", "../shared/layer.tar")
        .unwrap();
    for (name, bytes) in [
        ("config.json", built.config.bytes()),
        ("manifest.json", manifest.to_string().as_bytes()),
    ] {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oci_layout_comes_in_whatever_its_order() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let built = two_layers();
    let mut files = layout(&built, "example/app:v1");
    for _ in 0..2 {
        let images = store.import(file(&packed(&files)), None).await.unwrap();
        assert_eq!(images.len(), 1);
        assert_eq!(images[0].id, *built.config.digest());
        assert_eq!(images[0].tags[0].to_string(), "docker.io/example/app:v1");
        assert_eq!(images[0].digests[0].digest(), Some(built.manifest.digest()));
        store.remove("example/app:v1", |_| false).await.unwrap();
        files.reverse();
    }
    // Compressed as a whole, from a pipe, with a name of the caller's and one that is only a tag.
    let packed = packed(&layout(&built, "latest"));
    let (reader, writer) = std::io::pipe().unwrap();
    let writing = std::thread::spawn(move || {
        let mut encoder = flate2::write::GzEncoder::new(writer, flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, &packed).unwrap();
    });
    let images = store
        .import(reader.into(), Some("mine:1".parse().unwrap()))
        .await
        .unwrap();
    writing.join().unwrap();
    let tags: Vec<_> = images[0].tags.iter().map(ToString::to_string).collect();
    assert_eq!(tags, ["docker.io/library/mine:1"]);
    store
        .settled(|| fs::read_dir(store.root().join("content/ingest")).unwrap().count() == 0)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_docker_archive_comes_in() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let built = two_layers();
    let images = store.import(file(&docker_archive(&built)), None).await.unwrap();
    assert_eq!(images[0].id, *built.config.digest());
    assert_eq!(store.resolve("example/app:v1").unwrap().id, images[0].id);
    let top = images[0].layers[1].number;
    assert_eq!(
        fs::read_to_string(store.root().join(format!("layers/{top}/fs/etc/more"))).unwrap(),
        "more"
    );
    // The image is the same that an OCI layout brings, and so are its layers.
    let same = store
        .import(file(&packed(&layout(&built, "x/y:z"))), None)
        .await
        .unwrap();
    assert_eq!((&same[0].id, &same[0].layers), (&images[0].id, &images[0].layers));
    // The manifest that was written for it is whole: the store can be rebuilt from it.
    let store = store.reopen_with(support::MemoryRecords::default()).await;
    assert!(store.resolve("example/app:v1").is_some() && store.resolve("x/y:z").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_archives_are_refused_and_leave_nothing() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let built = two_layers();
    let good = layout(&built, "a/b:c");
    let without = |name: &str| {
        good.iter()
            .filter(|(other, _)| other != name)
            .cloned()
            .collect::<Vec<_>>()
    };
    let with = |name: &str, bytes: &[u8]| {
        let mut files = without(name);
        files.push((name.to_owned(), bytes.to_vec()));
        packed(&files)
    };
    let link = |name: &str, target: &str, kind| {
        // Behind the rest, in place of its end.
        let mut bytes = packed(&without(name));
        bytes.truncate(bytes.len() - 1024);
        let mut builder = tar::Builder::new(bytes);
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(0);
        builder.append_link(&mut header, name, target).unwrap();
        builder.into_inner().unwrap()
    };
    let layer = blob(&built.layers[0]);
    let index = "index.json";
    let nested = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"{}","size":2}}]}}"#,
        Digest::sha256(b"{}")
    );
    let foreign = good.iter().find(|(name, _)| name == index).map(|(_, bytes)| {
        String::from_utf8_lossy(bytes).replacen(
            "\"digest\"",
            r#""platform":{"os":"plan9","architecture":"mips"},"digest""#,
            1,
        )
    });
    for (archive, why) in [
        (Vec::new(), "empty"),
        (b"garbage".repeat(1000), "header"),
        (archive(&[("file", b"x")]), "neither index.json nor manifest.json"),
        (
            Layer::new().file("../index.json", "x", 0o644).plain().bytes,
            "\"..\"",
        ),
        (packed(&without(&layer)), "lacks"),
        (packed(&without(&blob(built.config.bytes()))), "lacks"),
        (with(&layer, b"other content"), "bytes instead of"),
        (
            with(
                &blob(built.manifest.bytes()),
                &built.manifest.bytes().to_ascii_uppercase(),
            ),
            "does not match",
        ),
        (with(index, b"{}"), "schema version"),
        (with(index, built.manifest.bytes()), "is a manifest"),
        (with(index, nested.as_bytes()), "lacks"),
        (with(index, foreign.unwrap().as_bytes()), "no image for linux"),
        (link(index, "/etc/passwd", tar::EntryType::Symlink), "neither"),
        (link(index, "blobs", tar::EntryType::Symlink), "not a file"),
        (link(index, "/etc/passwd", tar::EntryType::Link), "neither"),
        (link(index, "x", tar::EntryType::Fifo), "not a file"),
        (
            archive(&[(
                "manifest.json",
                br#"[{"Config":"../../../etc/passwd","Layers":[]}]"#,
            )]),
            "lacks",
        ),
    ] {
        let error = match store.import(file(&archive), None).await {
            Ok(images) => panic!("{why}: taken as {images:?}"),
            Err(error) => error,
        };
        let mut text = error.to_string();
        if let Some(source) = std::error::Error::source(&error) {
            text.push_str(&source.to_string());
        }
        assert!(text.contains(why), "{why:?} is not in {text:?}");
    }
    assert!(store.list().is_empty());
    store
        .settled(|| fs::read_dir(store.root().join("content/ingest")).unwrap().count() == 0)
        .await;
    let interrupted = {
        let bytes = packed(&good);
        bytes[..bytes.len() / 2].to_vec()
    };
    assert!(matches!(
        store.import(file(&interrupted), None).await,
        Err(ImageError::Archive(_))
    ));
}

/// What skopeo writes is what we read, in each of its forms.
#[tokio::test(flavor = "multi_thread")]
async fn archives_of_skopeo_come_in() {
    if !is_root() {
        return;
    }
    let has_skopeo = Command::new("skopeo")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    if !has_skopeo {
        eprintln!("skipped: skopeo is not installed");
        return;
    }
    let top = tempfile::tempdir().unwrap();
    let built = two_layers();
    let source = top.path().join("layout");
    for (name, bytes) in layout(&built, "v1") {
        let path = source.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let copy = |form: &str| {
        let path = top.path().join("out.tar");
        let _ = fs::remove_file(&path);
        let output = Command::new("skopeo")
            .args(["copy", "--insecure-policy", "--tmpdir"])
            .arg(top.path())
            .arg(format!("oci:{}:v1", source.display()))
            .arg(format!("{form}:{}:example/app:v2", path.display()))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        path
    };
    for form in ["oci-archive", "docker-archive"] {
        let store = Store::open().await;
        let images = store
            .import(fs::File::open(copy(form)).unwrap().into(), None)
            .await
            .unwrap();
        assert!(store.resolve("example/app:v2").is_some(), "{form}");
        let layer = |position: usize, name: &str| {
            let number = images[0].layers[position].number;
            fs::read_to_string(Path::new(store.root()).join(format!("layers/{number}/fs/{name}"))).unwrap()
        };
        assert_eq!(
            [layer(0, "etc/name"), layer(1, "etc/more")],
            ["base", "more"],
            "{form}"
        );
    }
}

/// umoci makes the same root out of the same layout as an overlay of our layers.
#[tokio::test(flavor = "multi_thread")]
async fn umoci_sees_the_same_root() {
    if !is_root() {
        return;
    }
    if !Command::new("umoci")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
    {
        eprintln!("skipped: umoci is not installed");
        return;
    }
    let base = Layer::new()
        .dir("etc", 0o755)
        .file("etc/passwd", "root", 0o644)
        .file("etc/shadow", "secret", 0o600)
        .dir("var", 0o755)
        .dir("var/cache", 0o1777)
        .file("var/cache/a", "a", 0o644)
        .file("var/cache/b", "b", 0o644)
        .dir("usr", 0o755)
        .file("usr/tool", "tool", 0o6755)
        .hard_link("usr/same", "usr/tool")
        .symlink("bin", "usr")
        .file("replaced-by-dir", "", 0o644)
        .dir("replaced-by-file", 0o700)
        .file("replaced-by-file/x", "", 0o644);
    let change = Layer::new()
        .file("etc/.wh.shadow", "", 0)
        .file("etc/group", "group", 0o640)
        .dir("var/cache", 0o755)
        .file("var/cache/.wh..wh..opq", "", 0)
        .file("var/cache/c", "c", 0o644)
        .dir("replaced-by-dir", 0o711)
        .file("replaced-by-dir/y", "y", 0o644)
        .file("replaced-by-file", "file", 0o644);
    let more = Layer::new()
        .file("etc/.wh.passwd", "", 0)
        .dir("new", 0o750)
        .symlink("new/link", "../etc/group");
    let built = build(&[base.gzip(), change.gzip(), more.gzip()]);
    let top = tempfile::tempdir().unwrap();
    let source = top.path().join("layout");
    for (name, bytes) in layout(&built, "v1") {
        let path = source.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let bundle = top.path().join("bundle");
    let image = format!("{}:v1", source.display());
    let output = Command::new("umoci")
        .args(["unpack", "--image", &image])
        .arg(&bundle)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    let store = Store::open().await;
    let image = &store
        .import(file(&packed(&layout(&built, "a/b:c"))), None)
        .await
        .unwrap()[0];
    let snapshotter = Snapshotter::open(store.root(), MountApi::Auto).unwrap();
    let plan = snapshotter
        .prepare("c", &image.layers, Durability::Volatile)
        .unwrap();
    let mount = snapshotter.mount(&plan).unwrap();
    let ours = PathBuf::from(format!("/proc/self/fd/{}", coracle_kernel::fd::number(&mount)));
    assert_eq!(tree(&ours), tree(&bundle.join("rootfs")));
}

/// A file: name, kind and mode, owner, time where it is no directory, device, content or target.
type Node = (String, u32, (u32, u32), i64, u64, Vec<u8>);

/// Everything below a directory.
fn tree(root: &Path) -> Vec<Node> {
    let mut entries = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let stat = path.symlink_metadata().unwrap();
            let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            let kind = stat.file_type();
            let content = match () {
                () if kind.is_file() => fs::read(&path).unwrap(),
                () if kind.is_symlink() => fs::read_link(&path)
                    .unwrap()
                    .to_string_lossy()
                    .into_owned()
                    .into_bytes(),
                () => Vec::new(),
            };
            let device = if kind.is_char_device() || kind.is_block_device() {
                stat.rdev()
            } else {
                0
            };
            // A directory's time changes with each layer that touches it, in ways that differ between tools.
            let time = if kind.is_dir() { 0 } else { stat.mtime() };
            entries.push((name, stat.mode(), (stat.uid(), stat.gid()), time, device, content));
            if kind.is_dir() {
                dirs.push(path);
            }
        }
    }
    entries.sort();
    entries
}
