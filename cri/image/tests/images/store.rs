//! The store: what is brought in is there, whole, under its names, and what is removed is gone.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::PathBuf;

use crate::support::{Built, Layer, MemoryRecords, Store, build, is_root};
use coracle_image::ImageError;
use coracle_snapshot::{Durability, MountApi, Snapshotter};

/// An image as others build them: a base, a change of it, a layer that mentions no directory.
fn three_layers() -> Built {
    let base = Layer::new()
        .dir("etc", 0o755)
        .file("etc/passwd", "root:x:0:0", 0o644)
        .dir("secret", 0o700)
        .file("secret/key", "k", 0o600)
        .dir("cache", 0o755)
        .file("cache/old", "old", 0o644)
        .dir("usr", 0o755)
        .file("usr/tool", "tool", 0o4755)
        .symlink("bin", "usr");
    let change = Layer::new()
        .dir("etc", 0o750)
        .file("etc/group", "root:x:0:", 0o644)
        .file("etc/.wh.passwd", "", 0o644)
        .dir("cache", 0o755)
        .file("cache/.wh..wh..opq", "", 0o644)
        .file("cache/new", "new", 0o644);
    let implied = Layer::new()
        .file("secret/second", "s", 0o600)
        .hard_link("usr/again", "usr/tool");
    build(&[base.gzip(), change.zstd(), implied.plain()])
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_what_its_layers_say() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let built = three_layers();
    let image = store.bring_in(&built, &["busybox:1.36"]).await.unwrap();
    assert_eq!(image.layers.len(), 3);
    assert_eq!(image.config.cmd, ["sh"]);

    let snapshotter = Snapshotter::open(store.root(), MountApi::Auto).unwrap();
    let plan = snapshotter
        .prepare("c", &image.layers, Durability::Volatile)
        .unwrap();
    let mount = snapshotter.mount(&plan).unwrap();
    let root = PathBuf::from(format!("/proc/self/fd/{}", coracle_kernel::fd::number(&mount)));
    let stat =
        |name: &str| fs::symlink_metadata(root.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let names = |name: &str| {
        let mut names: Vec<_> = fs::read_dir(root.join(name))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("etc"), ["group"], "a whiteout hides passwd");
    assert_eq!(names("cache"), ["new"], "an opaque directory hides what is below");
    assert_eq!(names("secret"), ["key", "second"]);
    assert_eq!(
        stat("secret").mode() & 0o7777,
        0o700,
        "an implied directory keeps its lower mode"
    );
    assert_eq!(stat("secret").mtime(), 1_000_000, "and its lower time");
    assert_eq!(stat("etc").mode() & 0o7777, 0o750);
    assert_eq!(stat("usr/tool").mode() & 0o7777, 0o4755);
    assert_eq!(
        (stat("usr/again").ino(), stat("usr/again").nlink()),
        (stat("usr/tool").ino(), 2)
    );
    assert_eq!(fs::read_to_string(root.join("bin/again")).unwrap(), "tool");
    assert_eq!(stat("").mode() & 0o7777, 0o755);
    assert!(!stat("etc").file_type().is_char_device());
}

/// A directory that a layer does not mention takes the attributes of what is visible below, and of nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn implied_directories_are_those_that_are_visible() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let base = Layer::new()
        .dir("kept", 0o711)
        .dir("deleted", 0o711)
        .dir("emptied", 0o711)
        .dir("emptied/below", 0o711)
        .dir("renewed", 0o711)
        .file("file", "f", 0o644)
        .symlink("link", "kept");
    let middle = Layer::new()
        .file(".wh.deleted", "", 0)
        .dir("emptied", 0o750)
        .file("emptied/.wh..wh..opq", "", 0)
        .dir("renewed", 0o701);
    let names = [
        "kept",
        "deleted",
        "emptied",
        "emptied/below",
        "renewed",
        "file",
        "link",
        "new",
    ];
    let top = names.iter().fold(Layer::new(), |layer, name| {
        layer.file(&format!("{name}/x"), "x", 0o644)
    });
    let image = store
        .bring_in(&build(&[base.plain(), middle.plain(), top.plain()]), &["x"])
        .await
        .unwrap();
    let fs_of_top = store.root().join(format!("layers/{}/fs", image.layers[2].number));
    let modes: Vec<_> = names
        .iter()
        .map(|name| {
            let stat = fs::symlink_metadata(fs_of_top.join(name)).unwrap();
            assert!(stat.is_dir(), "{name}");
            stat.mode() & 0o7777
        })
        .collect();
    assert_eq!(modes, [0o711, 0o755, 0o750, 0o755, 0o701, 0o755, 0o755, 0o755]);
    // A hard link takes its target up from where it is visible, and not from behind a deletion.
    for (target, works) in [
        ("file", true),
        ("deleted/x", false),
        ("nowhere", false),
        ("kept", false),
    ] {
        let base = Layer::new()
            .dir("deleted", 0o711)
            .file("deleted/x", "x", 0o640)
            .dir("kept", 0o711)
            .file("file", "f", 0o640);
        let middle = Layer::new().file(".wh.deleted", "", 0);
        let top = Layer::new().hard_link("again", target);
        let result = store
            .bring_in(&build(&[base.plain(), middle.plain(), top.plain()]), &["y"])
            .await;
        assert_eq!(result.is_ok(), works, "{target}: {result:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_found_by_each_of_its_names() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let built = three_layers();
    let image = store
        .bring_in(&built, &["busybox:1.36", "quay.io/a/b"])
        .await
        .unwrap();
    let id = image.id.hex().to_owned();
    let digest = built.manifest.digest().to_string();
    for name in [
        "busybox:1.36",
        "docker.io/library/busybox:1.36",
        "quay.io/a/b",
        &format!("quay.io/a/b:ignored@{digest}"),
        &image.id.to_string(),
        &id,
        &id[..12],
        &format!("sha256:{}", &id[..12]),
    ] {
        assert_eq!(
            store.resolve(name).map(|image| image.id.clone()),
            Some(image.id.clone()),
            "{name}"
        );
    }
    for name in [
        "busybox",
        "busybox:2",
        "",
        "x",
        &id[..2],
        &"a".repeat(5000),
        "sha256:xyz",
        "../x",
    ] {
        assert!(store.resolve(name).is_none(), "{name:?}");
    }
    // Another image takes a tag over; the first keeps its other names and can still be found.
    let other = build(&[Layer::new().file("other", "o", 0o644).plain()]);
    let newer = store.bring_in(&other, &["busybox:1.36"]).await.unwrap();
    assert_eq!(store.resolve("busybox:1.36").unwrap().id, newer.id);
    assert_eq!(store.resolve("quay.io/a/b").unwrap().id, image.id);
    assert_eq!(store.list().len(), 2);
    // The same again changes nothing.
    let again = store.bring_in(&other, &["busybox:1.36"]).await.unwrap();
    assert_eq!((again, store.list().len()), (newer, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_takes_what_nobody_else_has() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let shared = Layer::new().file("shared", "s", 0o644).gzip();
    let first = build(&[shared.clone(), Layer::new().file("a", "a", 0o644).gzip()]);
    let second = build(&[shared, Layer::new().file("b", "b", 0o644).gzip()]);
    store.bring_in(&first, &["first", "also-first"]).await.unwrap();
    store.bring_in(&second, &["second"]).await.unwrap();
    assert_eq!(store.layer_folders(), 3, "the shared layer is there once");
    let before = store.usage();
    assert!(before.bytes > 0 && before.inodes >= 6, "{before:?}");

    let error = store.remove("first", |_| true).await.unwrap_err();
    assert!(matches!(error, ImageError::InUse(_)));
    assert!(store.resolve("first").is_some());
    store.remove("also-first", |_| false).await.unwrap();
    store.remove("also-first", |_| false).await.unwrap();
    assert!(store.resolve("first").is_none(), "all its names went");
    assert_eq!(store.layer_folders(), 2);
    assert!(store.resolve("second").is_some() && store.usage().bytes < before.bytes);
    store.remove("second", |_| false).await.unwrap();
    assert_eq!(
        (store.layer_folders(), store.usage().bytes, store.content_blobs()),
        (0, 0, 0)
    );
    assert!(store.records.rows().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_layers_is_one() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let image = store.bring_in(&build(&[]), &["empty"]).await.unwrap();
    assert!(image.layers.is_empty());
    assert_eq!(store.resolve("empty").unwrap().id, image.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_layer_twice_is_there_once() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let layer = Layer::new().file("f", "f", 0o644).gzip();
    let image = store
        .bring_in(&build(&[layer.clone(), layer]), &["twice"])
        .await
        .unwrap();
    assert_eq!(image.layers[0], image.layers[1]);
    store.settled(|| store.layer_folders() == 1).await;
    // One that depends on what is below is another layer in each place.
    let implied = Layer::new().file("d/f", "f", 0o644).plain();
    let image = store
        .bring_in(&build(&[implied.clone(), implied]), &["implied"])
        .await
        .unwrap();
    assert_ne!(image.layers[0], image.layers[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_what_was_whole() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let built = three_layers();
    let image = store
        .bring_in(&built, &["busybox", "quay.io/a/b:c"])
        .await
        .unwrap();
    // As a kill at any moment leaves them.
    let layers = store.root().join("layers");
    fs::create_dir_all(layers.join("77/fs/half")).unwrap();
    fs::write(layers.join("77/meta.new"), "{}").unwrap();
    fs::create_dir_all(layers.join("78")).unwrap();
    fs::create_dir_all(store.root().join("content/ingest/5/blobs")).unwrap();
    let store = store.reopen().await;
    assert_eq!(store.resolve("busybox").unwrap(), image);
    store.settled(|| store.layer_folders() == 3).await;
    assert_eq!(
        fs::read_dir(store.root().join("content/ingest")).unwrap().count(),
        0
    );
    let next = store
        .bring_in(&build(&[Layer::new().file("n", "n", 0o644).plain()]), &["n"])
        .await
        .unwrap();
    assert_eq!(next.layers[0].number, 79, "numbers are not used again");

    // The database is lost: everything comes back from the folders.
    let store = store.reopen_with(MemoryRecords::default()).await;
    let back = store.resolve("quay.io/a/b:c").expect("rebuilt");
    assert_eq!(
        (&back.id, &back.layers, &back.config, &back.tags),
        (&image.id, &image.layers, &image.config, &image.tags)
    );
    assert_eq!(store.records.rows().len(), 2);

    // A layer is lost: its image is forgotten, the other stays, and a pull brings only the missing layer.
    let lost = image.layers[1].number;
    fs::remove_file(layers.join(lost.to_string()).join("meta")).unwrap();
    let records = store.records.copy();
    let store = store.reopen_with(records).await;
    assert!(store.resolve("busybox").is_none() && store.resolve("n").is_some());

    // The database and the list of what was there are lost: layers are kept for the next pull.
    fs::write(store.root().join("content/index.json"), "{damaged").unwrap();
    let store = store.reopen_with(MemoryRecords::default()).await;
    assert!(store.list().is_empty() && store.layer_folders() > 0);
    store.bring_in(&built, &["busybox"]).await.unwrap();
}
