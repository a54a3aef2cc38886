//! What goes wrong: wrong content, bombs, cancelled and competing pulls, a full disk.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::support::{self, Layer, Store, build, is_root};
use coracle_image::{Claim, Digest, ImageError, ImageStore, Limits, Names};

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
        .args(["--exact", "faults::full_disk", "--ignored", "--nocapture"])
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
