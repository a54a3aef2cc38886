//! The store: what is brought in is there, whole, under its names, and what is removed is gone.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::support::{self, Built, Layer, MemoryRecords, Store, build, is_root};
use coracle_image::{Claim, Digest, ImageError, ImageStore, Limits, Names};
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
async fn wrong_content_leaves_nothing() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let built = build(&[Layer::new().file("f", &"text ".repeat(1000), 0o644).gzip()]);
    let bytes = built.layers[0].clone();
    let flipped = {
        let mut flipped = bytes.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 1;
        flipped
    };
    let other = Layer::new().file("f", "other", 0o644).gzip().bytes;
    for (what, source) in [
        ("short", bytes[..bytes.len() - 1].to_vec()),
        ("long", [bytes.clone(), vec![0]].concat()),
        ("flipped", flipped),
        ("empty", Vec::new()),
        ("other", other),
    ] {
        let error = store.unpack_one(&built, source).await.unwrap_err();
        let expected = matches!(error, ImageError::BlobSize { .. } | ImageError::BlobDigest { .. });
        assert!(expected, "{what}: {error}");
    }
    // The right blob of a layer whose diff-id the configuration has wrong.
    let mut lying = built.clone();
    lying.parsed.diff_ids = vec![Digest::sha256(b"something else")];
    let error = store.unpack_one(&lying, bytes.clone()).await.unwrap_err();
    assert!(matches!(error, ImageError::DiffId { .. }), "{error}");
    // A layer that cannot be unpacked, with the right digest.
    for bad in [
        Layer::new().file("a/../../etc/x", "", 0o644).plain(),
        Layer::raw(b"not an archive at all"),
    ] {
        let built = build(std::slice::from_ref(&bad));
        let error = store.unpack_one(&built, bad.bytes.clone()).await.unwrap_err();
        assert!(matches!(error, ImageError::Unpack { .. }), "{error}");
    }
    let mut fewer = built.clone();
    fewer.parsed.diff_ids.clear();
    assert!(matches!(
        store.begin(fewer.image()),
        Err(ImageError::LayerCount {
            manifest: 1,
            config: 0
        })
    ));
    let unfinished = store.begin(built.image()).unwrap();
    assert!(matches!(
        unfinished.finish(Names::default()).await,
        Err(ImageError::LayerMissing(0))
    ));
    store.settled(|| store.layer_folders() == 0).await;
    assert_eq!((store.list().len(), store.usage().bytes), (0, 0));
    // And then the right one.
    store.bring_in(&built, &["x"]).await.unwrap();
    assert_eq!(store.layer_folders(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bomb_is_stopped_and_cleaned_up() {
    if !is_root() {
        return;
    }
    let limits = Limits {
        bytes: 8 << 20,
        entries: 100,
        ratio: 200,
    };
    let store = Store::open_with(Arc::default(), limits).await;
    let large = build(&[Layer::new().file("zeros", &"\0".repeat(9 << 20), 0o644).gzip()]);
    let error = store.bring_in(&large, &["x"]).await.unwrap_err();
    assert!(error.to_string().contains("budget"), "{error}");
    let many = (0..101).fold(Layer::new(), |layer, number| {
        layer.file(&format!("f{number}"), "", 0o644)
    });
    let error = store.bring_in(&build(&[many.zstd()]), &["x"]).await.unwrap_err();
    assert!(error.to_string().contains("more than 100 entries"), "{error}");
    store.settled(|| store.layer_folders() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_that_want_the_same_layer_take_turns() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let built = build(&[Layer::new().file("f", "f", 0o644).gzip()]);
    let (first, second) = (
        store.begin(built.image()).unwrap(),
        store.begin(built.image()).unwrap(),
    );
    let Claim::Unpack(job) = first.claim(0).await else {
        panic!("not missing")
    };
    let waiting = {
        let second = second.clone();
        tokio::spawn(async move { matches!(second.claim(0).await, Claim::Present) })
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished(), "the second waits for the first");
    job.unpack(support::file(&built.layers[0])).await.unwrap();
    assert!(waiting.await.unwrap(), "and then needs nothing");
    let names = |name: &str| Names {
        tags: vec![name.parse().unwrap()],
        digests: Vec::new(),
    };
    let (a, b) = tokio::join!(first.finish(names("a")), second.finish(names("b")));
    assert_eq!(a.unwrap().id, b.unwrap().id);
    assert_eq!(store.resolve("a").unwrap().tags.len(), 2);
    assert_eq!(store.layer_folders(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_layer_leaves_nothing_and_others_go_on() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let built = build(&[Layer::new().file("f", "f", 0o644).gzip()]);
    let ingest = store.begin(built.image()).unwrap();
    let Claim::Unpack(job) = ingest.claim(0).await else {
        panic!("not missing")
    };
    let (reader, writer) = std::io::pipe().unwrap();
    let unpacking = tokio::spawn(job.unpack(OwnedFd::from(reader)));
    store.settled(|| store.layer_folders() == 1).await;
    unpacking.abort();
    assert!(unpacking.await.unwrap_err().is_cancelled());
    // The turn is free at once, even while the stream is still open.
    assert!(matches!(ingest.claim(0).await, Claim::Unpack(_)));
    drop(writer);
    store.settled(|| store.layer_folders() == 0).await;
    let image = store.bring_in(&built, &["x"]).await.unwrap();
    assert_eq!(image.layers.len(), 1);
}

/// What `/proc` says of a worker that waits for its stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_holds_only_what_its_work_takes() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let built = build(&[Layer::new().file("f", "f", 0o644).plain()]);
    let ingest = store.begin(built.image()).unwrap();
    let Claim::Unpack(job) = ingest.claim(0).await else {
        panic!("not missing")
    };
    let (reader, mut writer) = std::io::pipe().unwrap();
    let unpacking = tokio::spawn(job.unpack(OwnedFd::from(reader)));
    let folder = store.root().join("layers/1/fs");
    store.settled(|| folder.exists()).await;
    let field = |status: &str, name: &str| {
        let line = status
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_default();
        line.split_whitespace().nth(1).unwrap_or_default().to_owned()
    };
    // Other tests have workers too: ours is the one whose root is our layer. It is a thread here, because the harness
    // runs tests in threads; the daemon's program has no other.
    let layer = fs::metadata(folder).unwrap();
    let is_ours = |thread: &PathBuf| {
        let status = fs::read_to_string(thread.join("status")).unwrap_or_default();
        let root = fs::metadata(thread.join("root/."));
        let is_in_layer = root.is_ok_and(|root| root.ino() == layer.ino() && root.dev() == layer.dev());
        is_in_layer && field(&status, "Seccomp:") == "2"
    };
    let mut found = None;
    for _ in 0..1000 {
        found = support::threads_of_children().into_iter().find(is_ours);
        if found.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let worker = found.expect("a confined worker");
    let status = fs::read_to_string(worker.join("status")).unwrap();
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, MKNOD, SETFCAP.
    let capabilities = "000000008800001b";
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(field(&status, set), capabilities, "{set}");
    }
    for (name, value) in [
        ("CapAmb:", "0000000000000000"),
        ("CapInh:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
    ] {
        assert_eq!(field(&status, name), value, "{name}");
    }
    assert!(fs::read(worker.join("environ")).unwrap().is_empty());
    let mounts = fs::read_to_string(worker.join("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains("nosuid,nodev,noexec"), "{mounts}");
    let fds = fs::read_dir(worker.join("fd")).unwrap();
    let targets: Vec<_> = fds
        .map(|fd| {
            fs::read_link(fd.unwrap().path())
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    let files = targets
        .iter()
        .filter(|target| target.starts_with('/') && !target.starts_with("/dev/"));
    // Standard error goes to the daemon's log, wherever that is.
    let stderr = fs::read_link("/proc/self/fd/2").unwrap_or_default();
    let files: Vec<_> = files
        .filter(|target| **target != stderr.to_string_lossy())
        .collect();
    assert_eq!(files, ["/"], "of files, its root alone: {targets:?}");
    std::io::Write::write_all(&mut writer, &built.layers[0]).unwrap();
    drop(writer);
    unpacking.await.unwrap().unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_cannot_be_written_is_no_image() {
    if !is_root() {
        return;
    }
    let store = Store::open().await;
    let built = build(&[Layer::new().file("f", "f", 0o644).gzip()]);
    store.records.fail(true);
    let error = store.bring_in(&built, &["x"]).await.unwrap_err();
    assert!(matches!(error, ImageError::Records(_)), "{error}");
    assert!(store.list().is_empty());
    store.records.fail(false);
    store.bring_in(&built, &["x"]).await.unwrap();
    store.records.fail(true);
    assert!(store.remove("x", |_| false).await.is_err());
    assert!(
        store.resolve("x").is_some(),
        "what could not be removed is still there"
    );
    let store: &ImageStore = &store;
    assert_eq!(store.list().len(), 1);
}

/// Runs [`full_disk`] in a mount namespace of its own.
#[test]
fn a_full_disk_is_an_error_and_removal_still_works() {
    if !is_root() {
        return;
    }
    let output = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "store::full_disk", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "mounts: run in a namespace by the test above"]
async fn full_disk() {
    use coracle_kernel::{mount, mount_attr::Attr, path};
    let root = Arc::new(tempfile::tempdir().unwrap());
    let disk = mount::make("tmpfs", &[("size", c"2m"), ("nr_inodes", c"200")], Attr::empty()).unwrap();
    mount::attach(&disk, path::open_dir(root.path()).unwrap()).unwrap();
    drop(disk);
    let store = Store::open_at(Arc::clone(&root), Arc::default(), Limits::default()).await;
    let small = build(&[Layer::new().file("f", &"x".repeat(100_000), 0o644).plain()]);
    store.bring_in(&small, &["small"]).await.unwrap();
    let large = build(&[Layer::new().file("f", &"x".repeat(3 << 20), 0o644).gzip()]);
    let many = build(&[(0..300)
        .fold(Layer::new(), |layer, n| layer.file(&format!("f{n}"), "", 0o644))
        .gzip()]);
    for built in [large, many] {
        let error = store.bring_in(&built, &["x"]).await.unwrap_err();
        assert!(error.to_string().contains("No space left on device"), "{error}");
        store.settled(|| store.layer_folders() == 1).await;
    }
    assert!(store.resolve("x").is_none() && store.resolve("small").is_some());
    // Not a byte is free, and the image can still be removed.
    let mut filler = fs::File::create(root.path().join("filler")).unwrap();
    while std::io::Write::write_all(&mut filler, &[0; 4096]).is_ok() {}
    let error = store
        .remove("small", |_| false)
        .await
        .map_err(|error| format!("{error:?}"));
    assert_eq!(error, Ok(()));
    assert_eq!((store.layer_folders(), store.list().len()), (0, 0));
    drop(store);
    drop(filler);
    mount::detach(root.path()).unwrap();
}
