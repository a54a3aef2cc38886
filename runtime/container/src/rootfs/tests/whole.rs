//! Whole roots: built, entered, sealed.

use super::*;

#[test]
fn a_whole_container_root() {
    let bundle = Bundle::new();
    fs::create_dir(bundle.root("scratch")).unwrap();
    fs::set_permissions(bundle.root("scratch"), fs::Permissions::from_mode(0o1750)).unwrap();
    fs::create_dir(bundle.base.join("volume")).unwrap();
    fs::write(bundle.base.join("volume/file"), "content").unwrap();
    fs::write(bundle.base.join("resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
    let config = json!({
        "root": { "path": "rootfs", "readonly": true },
        "mounts": [
            proc(),
            dev(),
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=64k"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
            { "destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["ro"] },
            { "destination": "/data/deep", "source": "volume", "options": ["rbind", "rprivate", "ro", "noexec"] },
            { "destination": "/etc/resolv.conf", "source": "resolv.conf", "options": ["bind"] },
        ],
        "linux": {
            "devices": [{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 3, "gid": 4 }],
            "maskedPaths": ["/proc/version", "/proc/keys", "/proc/acpi", "/proc/driver", "/proc/fs", "/proc/keys", "/proc/none"],
            "readonlyPaths": ["/proc/sys", "/proc/bus", "/proc/none"],
        },
    });
    bundle
        .build(config, |rootfs| {
            // Hooks of the host see the finished tree below the bundle.
            assert_eq!(
                fs::read_to_string(bundle.root("data/deep/file")).unwrap(),
                "content"
            );
            rootfs.enter().unwrap();
            rootfs.make_directory(Path::new("/work/dir")).unwrap();
            rootfs.seal().unwrap();

            assert!(!bundle.base.exists(), "the host's tree is still there");
            assert_eq!(mount_of("/proc").unwrap().kind, "proc");
            assert_eq!(mount_of("/").unwrap().shared, None);
            for (name, rdev) in [("null", 0x103), ("zero", 0x105), ("tty", 0x500), ("fuse", 0x0ae5)] {
                let node = fs::metadata(Path::new("/dev").join(name)).unwrap();
                assert!(node.file_type().is_char_device());
                assert_eq!(node.rdev(), rdev, "{name}");
            }
            let fuse = fs::metadata("/dev/fuse").unwrap();
            assert_eq!((fuse.mode() & 0o7777, fuse.uid(), fuse.gid()), (0o640, 3, 4));
            assert_eq!(fs::metadata("/dev/null").unwrap().mode() & 0o7777, 0o666);
            assert_eq!(fs::read_link("/dev/ptmx").unwrap(), Path::new("pts/ptmx"));
            assert_eq!(
                fs::read_link("/dev/stdout").unwrap(),
                Path::new("/proc/self/fd/1")
            );
            assert!(
                mount_of("/dev/pts")
                    .unwrap()
                    .super_options
                    .contains("ptmxmode=666")
            );

            // A tmpfs takes the mode of what it covers, and ro is honoured.
            assert_eq!(fs::metadata("/scratch").unwrap().mode() & 0o7777, 0o1750);
            assert_eq!(fs::metadata("/dev/shm").unwrap().mode() & 0o7777, 0o1777);
            let data = mount_of("/data/deep").unwrap();
            assert!(data.has_option("ro") && data.has_option("noexec"), "{data:?}");
            assert_eq!(
                fs::read_to_string("/etc/resolv.conf").unwrap(),
                "nameserver 192.0.2.1\n"
            );
            assert!(mount_of("/sys").unwrap().has_option("ro"));
            assert!(mount_of("/sys/fs/cgroup").unwrap().has_option("ro"));
            assert!(fs::read_dir("/sys/fs/cgroup").unwrap().count() > 0);
            for read_only in [
                "/work/x",
                "/scratch/x",
                "/data/deep/x",
                "/proc/sys/kernel/domainname",
                "/sys/fs/cgroup/x",
            ] {
                let error = fs::write(read_only, "x").unwrap_err();
                assert_eq!(error.raw_os_error(), Some(Errno::EROFS.raw()), "{read_only}");
            }

            assert_eq!(fs::read("/proc/version").unwrap(), b"");
            assert_eq!(fs::read("/proc/keys").unwrap(), b"");
            let chmod = fs::set_permissions("/proc/keys", fs::Permissions::from_mode(0o000));
            assert_eq!(chmod.unwrap_err().raw_os_error(), Some(Errno::EROFS.raw()));
            let masked = mount_of("/proc/fs").unwrap();
            assert!(masked.kind == "tmpfs" && masked.has_option("ro"), "{masked:?}");
            assert_eq!(
                mount_of("/proc/driver").unwrap().device,
                masked.device,
                "one tmpfs for all"
            );
            assert_eq!(fs::read_dir("/proc/fs").unwrap().count(), 0);
        })
        .unwrap();
    // Seen from outside nothing was mounted, and only mount points were made.
    assert!(mount_of(bundle.root("proc").to_str().unwrap()).is_none());
    assert_eq!(fs::read_dir(bundle.root("dev")).unwrap().count(), 0);
    assert_eq!(
        fs::metadata(bundle.root("data/deep")).unwrap().mode() & 0o7777,
        0o755
    );
}

#[test]
fn a_detached_mount_becomes_the_root() {
    let bundle = Bundle::new();
    let config = checked(json!({ "mounts": [proc(), dev()] }));
    in_namespace(|| {
        let source = mount::make("tmpfs", &[("mode", c"755")], Attr::NODEV).unwrap();
        path::make_dir(&source, "marker", 0o755).unwrap();
        let context = Context {
            source: Source::Detached(source),
            ..bundle.context(Entry::Pivot)
        };
        let mut rootfs = Rootfs::attach(&config, context).unwrap();
        assert!(bundle.root("marker").is_dir());
        rootfs.make_mounts().unwrap();
        rootfs.make_devices().unwrap();
        rootfs.enter().unwrap();
        rootfs.seal().unwrap();
        assert!(Path::new("/marker").is_dir() && !Path::new("/etc").exists());
        assert!(mount_of("/").unwrap().has_option("nodev"));
    });
}

#[test]
fn without_pivot_no_proc_of_the_host_stays() {
    let bundle = Bundle::new();
    let config = json!({ "mounts": [proc(), dev()] });
    bundle
        .build_as(config, Entry::Move, |rootfs| {
            rootfs.enter().unwrap();
            rootfs.seal().unwrap();
            assert!(Path::new("/proc/self").exists() && !bundle.base.exists());
            assert_eq!(mount_of("/proc").unwrap().kind, "proc");
            // The old tree is still below; whoever gets there finds no procfs and no sysfs.
            let below = path::Root::new(&rootfs.old_root);
            for gone in ["proc/self", "sys/kernel"] {
                assert_eq!(
                    below.open_path(gone).unwrap_err().errno(),
                    Errno::ENOENT,
                    "{gone}"
                );
            }
        })
        .unwrap();
    let private = json!({ "linux": { "rootfsPropagation": "private" } });
    let refusal = bundle.build_as(private, Entry::Move, |_| ()).unwrap_err();
    assert!(
        refusal.to_string().contains("impossible without pivot_root"),
        "{refusal}"
    );
}

#[test]
fn mounts_never_reach_the_host_whatever_the_propagation() {
    for propagation in [
        None,
        Some("shared"),
        Some("rshared"),
        Some("private"),
        Some("slave"),
        Some("unbindable"),
    ] {
        let bundle = Bundle::new();
        let mut config = json!({ "mounts": [proc(), dev()], "linux": {} });
        if let Some(propagation) = propagation {
            config["linux"]["rootfsPropagation"] = json!(propagation);
        }
        // A host with shared mounts, as systemd makes it; the container is a thread below.
        in_namespace(|| {
            let root = path::open_dir("/").unwrap();
            mount_attr::set_propagation(&root, Propagation::Private, true).unwrap();
            let host =
                mount::clone_tree(path::open_dir(&bundle.base).unwrap(), mount::Depth::Single).unwrap();
            mount::attach(&host, path::open_dir(&bundle.base).unwrap()).unwrap();
            mount_attr::set_propagation(&root, Propagation::Shared, true).unwrap();
            let before = mountinfo::read_own(&Procfs::private().unwrap()).unwrap();
            bundle
                .build(config, |rootfs| {
                    let entered = rootfs.enter();
                    assert!(entered.is_ok(), "{propagation:?}: {entered:?}");
                    rootfs.seal().unwrap();
                    let shared = mount_of("/").unwrap().shared.is_some();
                    assert_eq!(
                        shared,
                        propagation.is_some_and(|word| word.ends_with("shared")),
                        "{propagation:?}"
                    );
                    assert_eq!(
                        mount_of("/").unwrap().unbindable,
                        propagation == Some("unbindable")
                    );
                })
                .unwrap();
            let after = mountinfo::read_own(&Procfs::private().unwrap()).unwrap();
            assert_eq!(before, after, "{propagation:?}");
        });
    }
}

/// The names of the host's own mount table must not matter either: what is attached is a descriptor.
#[test]
fn a_root_that_is_a_link_is_refused() {
    let bundle = Bundle::new();
    let config = checked(json!({}));
    symlink("rootfs", bundle.base.join("link")).unwrap();
    let link = bundle.base.join("link");
    let context = Context {
        root: &link,
        ..bundle.context(Entry::Pivot)
    };
    let error = in_namespace(|| Rootfs::attach(&config, context).map(drop)).unwrap_err();
    assert!(text(&error).ends_with("Not a directory"), "{error}");
}
