//! One kind of mount or device each.

use super::*;

#[test]
fn mounts_see_what_was_mounted_before_them() {
    let bundle = Bundle::new();
    let shm = bundle.root("a/inner");
    let config = json!({ "mounts": [
        { "destination": "/a", "type": "tmpfs", "source": "tmpfs", "options": ["mode=700"] },
        { "destination": "/a/inner", "type": "tmpfs", "source": "tmpfs", "options": ["mode=711"] },
        { "destination": "/b", "source": shm, "options": ["bind"] },
    ]});
    bundle
        .build(config, |_| {
            assert_eq!(fs::metadata(bundle.root("b")).unwrap().mode() & 0o7777, 0o711);
        })
        .unwrap();
    assert_eq!(fs::read_dir(bundle.root("a")).unwrap().count(), 0);
}

#[test]
fn flags_of_a_bind_replace_those_of_its_source() {
    let bundle = Bundle::new();
    let source = json!({ "destination": "/source", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "noexec", "noatime"] });
    let bind = |destination: &str, options: &[&str]| json!({ "destination": destination, "source": bundle.root("source"), "options": options });
    let config = json!({ "mounts": [
        source,
        { "destination": "/source/below", "type": "tmpfs", "source": "tmpfs" },
        bind("/plain", &["bind"]),
        bind("/ro", &["bind", "ro"]),
        bind("/rw", &["rbind", "rw", "nodev"]),
        bind("/rro", &["rbind", "rro", "rnoexec"]),
        bind("/single", &["bind"]),
        { "destination": "/single", "options": ["bind", "remount", "ro"], "source": "none" },
        { "destination": "/plain", "options": ["rshared"] },
    ]});
    bundle
        .build(config, |rootfs| {
            rootfs.enter().unwrap();
            let has = |at: &str, wanted: &[&str], not: &[&str]| {
                let mount = mount_of(at).unwrap();
                assert!(wanted.iter().all(|word| mount.has_option(word)), "{mount:?}");
                assert!(!not.iter().any(|word| mount.has_option(word)), "{mount:?}");
            };
            has("/plain", &["rw", "nosuid", "noexec", "noatime"], &[]);
            has("/ro", &["ro", "noatime"], &["nosuid", "noexec"]);
            has("/rw", &["rw", "nodev"], &["nosuid", "noexec"]);
            has("/rro", &["ro", "noexec", "nosuid"], &[]);
            has("/rro/below", &["ro", "noexec"], &[]);
            has("/single", &["ro"], &["nosuid"]);
            assert!(mount_of("/single/below").is_none());
            assert!(mount_of("/plain").unwrap().shared.is_some());
        })
        .unwrap();
}

#[test]
fn a_mount_that_does_not_fit_says_which_and_why() {
    let bundle = Bundle::new();
    let refusal = |mount: Value| bundle.refusal(json!({ "mounts": [mount] }));
    let missing = refusal(json!({ "destination": "/x", "source": "/no/such", "options": ["bind"] }));
    assert!(
        missing.contains("\"/no/such\"") && missing.contains("No such file"),
        "{missing}"
    );
    let unknown = refusal(json!({ "destination": "/x", "type": "nosuchfs", "source": "x" }));
    assert!(unknown.contains("nosuchfs at \"/x\""), "{unknown}");
    let option =
        refusal(json!({ "destination": "/x", "type": "tmpfs", "source": "x", "options": ["size=lots"] }));
    assert!(option.contains("Bad value for 'size'"), "{option}");
    fs::write(bundle.root("file"), "").unwrap();
    let below = refusal(json!({ "destination": "/file/x", "type": "tmpfs", "source": "x" }));
    assert!(
        below.contains("\"/file/x\"") && below.contains("Not a directory"),
        "{below}"
    );
}

#[test]
fn long_options_go_through_the_old_interface() {
    let bundle = Bundle::new();
    let deep = format!(
        "outside/{}/{}/{}",
        "a".repeat(100),
        "b".repeat(100),
        "c".repeat(100)
    );
    for name in ["lower", "lower2"] {
        fs::create_dir_all(bundle.base.join(&deep).join(name)).unwrap();
    }
    fs::write(bundle.base.join(&deep).join("lower/file"), "content").unwrap();
    let at = bundle.base.join(&deep);
    let lower = format!("lowerdir={0}/lower:{0}/lower2", at.display());
    let config = json!({ "mounts": [{ "destination": "/o", "type": "overlay", "source": "overlay", "options": ["ro", lower, "rslave"] }] });
    bundle
        .build(config, |_| {
            assert_eq!(fs::read_to_string(bundle.root("o/file")).unwrap(), "content");
        })
        .unwrap();
}

#[test]
fn cgroups_are_the_container_s_own_in_a_namespace_and_the_host_s_without() {
    for own in [false, true] {
        let bundle = Bundle::new();
        let mut namespaces = vec![json!({ "type": "mount" })];
        namespaces.extend(own.then(|| json!({ "type": "cgroup" })));
        let mount = json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "ro"] });
        let config = checked(json!({ "mounts": [mount], "linux": { "namespaces": namespaces } }));
        let host = fs::read_dir("/sys/fs/cgroup").unwrap().count();
        in_namespace(|| {
            if own {
                namespace::unshare(Kinds::CGROUP).unwrap();
            }
            let mut rootfs = Rootfs::attach(&config, bundle.context(Entry::Pivot)).unwrap();
            rootfs.make_mounts().unwrap();
            rootfs.enter().unwrap();
            rootfs.seal().unwrap();
            let mounts = mountinfo::read_own(&Procfs::private().unwrap()).unwrap();
            let views: Vec<_> = mounts
                .iter()
                .filter(|mount| mount.kind.starts_with("cgroup"))
                .collect();
            assert!(!views.is_empty() && fs::read_dir("/sys/fs/cgroup").unwrap().count() >= host.min(2));
            for view in views {
                assert!(view.has_option("ro") && view.has_option("nosuid"), "{view:?}");
                assert!(view.mount_point.join("cgroup.procs").exists(), "{view:?}");
            }
            let error = fs::create_dir("/sys/fs/cgroup/x").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::EROFS.raw()));
        });
    }
}

#[test]
fn content_is_copied_up_into_a_tmpfs() {
    let bundle = Bundle::new();
    fs::create_dir_all(bundle.root("etc/sub")).unwrap();
    fs::write(bundle.root("etc/sub/file"), "content").unwrap();
    fs::set_permissions(bundle.root("etc/sub/file"), fs::Permissions::from_mode(0o4711)).unwrap();
    std::os::unix::fs::chown(bundle.root("etc/sub/file"), Some(5), Some(6)).unwrap();
    fs::set_permissions(bundle.root("etc/sub/file"), fs::Permissions::from_mode(0o4711)).unwrap();
    symlink(bundle.outside().join("canary"), bundle.root("etc/link")).unwrap();
    let config = json!({ "mounts": [
        { "destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "ro"] },
    ]});
    bundle
        .build(config, |rootfs| {
            rootfs.seal().unwrap();
            let copied = fs::metadata(bundle.root("etc/sub/file")).unwrap();
            assert_eq!(
                (copied.mode() & 0o7777, copied.uid(), copied.gid()),
                (0o4711, 5, 6)
            );
            assert_eq!(
                fs::read_to_string(bundle.root("etc/sub/file")).unwrap(),
                "content"
            );
            assert_eq!(
                fs::read_link(bundle.root("etc/link")).unwrap(),
                bundle.outside().join("canary")
            );
            let error = fs::write(bundle.root("etc/new"), "x").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::EROFS.raw()));
        })
        .unwrap();
}

#[test]
fn devices_of_the_configuration_come_before_the_default_ones() {
    let bundle = Bundle::new();
    let device = |path: &str, kind: &str, major: u32, minor: u32, mode: u32| json!({ "path": path, "type": kind, "major": major, "minor": minor, "fileMode": mode });
    let config = json!({ "mounts": [dev()], "linux": { "devices": [
        device("/dev/null", "c", 1, 3, 0o020_600),
        device("/dev/sub/block", "b", 7, 0, 0o660),
        device("/opt/pipe", "p", 0, 0, 0o622),
    ]}});
    bundle
        .build(config, |_| {
            let null = fs::metadata(bundle.root("dev/null")).unwrap();
            assert_eq!((null.rdev(), null.mode()), (0x103, 0o020_600));
            assert!(
                fs::metadata(bundle.root("dev/sub/block"))
                    .unwrap()
                    .file_type()
                    .is_block_device()
            );
            let pipe = fs::metadata(bundle.root("opt/pipe")).unwrap();
            assert!(pipe.file_type().is_fifo() && pipe.mode() & 0o7777 == 0o622);
        })
        .unwrap();
}

#[test]
fn a_dev_that_is_bound_is_left_alone() {
    let bundle = Bundle::new();
    fs::create_dir(bundle.base.join("dev")).unwrap();
    let config = json!({ "mounts": [{ "destination": "/dev/", "source": "dev", "options": ["bind"] }] });
    bundle
        .build(config, |_| {
            assert_eq!(fs::read_dir(bundle.root("dev")).unwrap().count(), 0);
        })
        .unwrap();
}

#[test]
fn the_console_is_the_terminal_and_nothing_else() {
    let bundle = Bundle::new();
    let devpts = json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"] });
    let config = json!({ "mounts": [proc(), dev(), devpts] });
    bundle
        .build(config.clone(), |rootfs| {
            rootfs.enter().unwrap();
            let ptmx = path::open("/dev/ptmx", OFlags::RDWR | OFlags::NOCTTY).unwrap();
            let slave = slave_of(&ptmx);
            rootfs.bind_console(&slave).unwrap();
            assert_eq!(fs::metadata("/dev/console").unwrap().rdev(), path_rdev(&slave));
            let null = path::open("/dev/null", OFlags::RDWR).unwrap();
            assert!(
                rootfs
                    .bind_console(&null)
                    .unwrap_err()
                    .to_string()
                    .contains("no terminal")
            );
            fs::remove_file("/dev/console").unwrap_err();
        })
        .unwrap();
    // In an image's own /dev the name may be anything.
    symlink(bundle.outside().join("canary"), bundle.root("dev/console")).unwrap();
    let config = json!({ "mounts": [proc(), { "destination": "/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"] }] });
    let refusal = bundle
        .build(config, |rootfs| {
            let ptmx = path::open(bundle.root("pts/ptmx"), OFlags::RDWR | OFlags::NOCTTY).unwrap();
            let slave = slave_of(&ptmx);
            rootfs.bind_console(&slave).unwrap_err().to_string()
        })
        .unwrap();
    assert!(refusal.contains("Symlink"), "{refusal}");
    bundle.assert_outside_untouched();
}

fn slave_of(ptmx: &OwnedFd) -> OwnedFd {
    tty::unlock(ptmx).unwrap();
    tty::open_slave(ptmx).unwrap()
}

fn path_rdev(fd: &impl std::os::fd::AsFd) -> u64 {
    let (major, minor) = path::stat(fd).unwrap().rdev;
    u64::from(major << 8 | minor)
}
