//! Images and configurations that want out.

use super::*;

#[test]
fn a_proc_or_sys_that_is_a_link_is_refused() {
    for (name, fstype) in [("proc", "proc"), ("sys", "sysfs")] {
        let bundle = Bundle::new();
        fs::remove_dir(bundle.root(name)).unwrap();
        fs::create_dir(bundle.root("other")).unwrap();
        for to in [Path::new("other"), &bundle.outside()] {
            symlink(to, bundle.root(name)).unwrap();
            let destination = format!("/{name}");
            let refusal = bundle.refusal(
                json!({ "mounts": [{ "destination": destination, "type": fstype, "source": fstype }] }),
            );
            assert!(
                refusal.contains("must be mounted on ordinary directory"),
                "{refusal}"
            );
            fs::remove_file(bundle.root(name)).unwrap();
        }
        bundle.assert_outside_untouched();
    }
}

#[test]
fn nothing_covers_proc_but_a_procfs_and_a_few_of_its_files() {
    let bundle = Bundle::new();
    fs::write(bundle.base.join("fake"), "fake").unwrap();
    symlink("/proc", bundle.root("alias")).unwrap();
    symlink("/proc/cpuinfo", bundle.root("alias-file")).unwrap();
    let bind = |destination: &str, source: &str| json!({ "destination": destination, "source": source, "options": ["bind"] });
    for (destination, source) in [
        ("/proc", "outside"),
        ("/proc/../proc/.", "outside"),
        ("/alias", "outside"),
        ("/proc/self", "outside"),
        ("/proc/sys", "outside"),
        ("/alias/sys", "outside"),
        ("/proc/self/attr/exec", "fake"),
        ("/proc/version", "fake"),
        ("/alias-file", "fake"),
        ("/proc/none", "fake"),
    ] {
        let refusal = bundle.refusal(json!({ "mounts": [proc(), bind(destination, source)] }));
        assert!(
            refusal.contains("/proc") || refusal.contains("not of type proc"),
            "{destination}: {refusal}"
        );
        assert!(refusal.contains("cannot"), "{destination}: {refusal}");
        // Before the procfs is there, what is named /proc is refused as well.
        if destination.starts_with("/proc") {
            let refusal = bundle.refusal(json!({ "mounts": [bind(destination, source)] }));
            assert!(refusal.contains("cannot be mounted"), "{destination}: {refusal}");
        }
    }
    let tmpfs = json!({ "destination": "/proc/driver", "type": "tmpfs", "source": "tmpfs" });
    assert!(
        bundle
            .refusal(json!({ "mounts": [proc(), tmpfs] }))
            .contains("inside /proc")
    );
    let allowed = json!({ "mounts": [proc(), bind("/proc/cpuinfo", "fake"), bind("/proc/net/dev", "fake")] });
    let read = bundle
        .build(allowed, |_| {
            fs::read_to_string(bundle.root("proc/cpuinfo")).unwrap()
        })
        .unwrap();
    assert_eq!(read, "fake");
    let hosts = json!({ "mounts": [{ "destination": "/proc", "source": "/proc", "options": ["rbind"] }] });
    bundle
        .build(hosts, |_| assert!(bundle.root("proc/self").exists()))
        .unwrap();
}

#[test]
fn the_root_itself_is_not_covered() {
    let bundle = Bundle::new();
    symlink("/", bundle.root("top")).unwrap();
    for destination in ["/", "/..", "/top", "/etc/.."] {
        let mount = json!({ "destination": destination, "type": "tmpfs", "source": "tmpfs" });
        let refusal = bundle.refusal(json!({ "mounts": [mount] }));
        assert!(refusal.contains("the root itself"), "{destination}: {refusal}");
    }
}

#[test]
fn a_dev_that_is_a_link_is_refused_and_its_target_stays_as_it_is() {
    let bundle = Bundle::new();
    fs::write(bundle.outside().join("canary"), "untouched").unwrap();
    let inside = bundle.outside();
    let inside = bundle.root(inside.strip_prefix("/").unwrap().to_str().unwrap());
    fs::create_dir_all(&inside).unwrap();
    fs::write(inside.join("ptmx"), "mine").unwrap();
    fs::remove_dir(bundle.root("dev")).unwrap();
    symlink(bundle.outside(), bundle.root("dev")).unwrap();
    for mounts in [json!([]), json!([dev()])] {
        let refusal = bundle.refusal(json!({ "mounts": mounts }));
        assert!(
            refusal.contains("must be mounted on ordinary directory"),
            "{refusal}"
        );
    }
    assert_eq!(fs::read_to_string(inside.join("ptmx")).unwrap(), "mine");
    bundle.assert_outside_untouched();
}

#[test]
fn destinations_below_links_of_the_image_stay_inside() {
    let bundle = Bundle::new();
    fs::create_dir(bundle.base.join("volume")).unwrap();
    fs::write(bundle.base.join("volume/file"), "content").unwrap();
    symlink(bundle.outside(), bundle.root("absolute")).unwrap();
    symlink("../../../../../../../..", bundle.root("climbing")).unwrap();
    symlink(
        "../run/systemd/resolve/stub-resolv.conf",
        bundle.root("etc/resolv.conf"),
    )
    .unwrap();
    let bind = |source: &str, destination: &str| json!({ "destination": destination, "source": source, "options": ["bind"] });
    let config = json!({ "mounts": [
        bind("volume", "/absolute/a/b"),
        bind("volume", "/climbing/c"),
        bind("volume/file", "/absolute/new-file"),
        bind("volume/file", "/etc/resolv.conf"),
    ]});
    bundle
        .build(config, |rootfs| {
            rootfs.enter().unwrap();
            let inside = bundle.outside();
            for name in [
                inside.join("a/b/file"),
                "/c/file".into(),
                inside.join("new-file"),
                "/etc/resolv.conf".into(),
            ] {
                assert_eq!(fs::read_to_string(&name).unwrap(), "content", "{name:?}");
            }
        })
        .unwrap();
    assert!(bundle.root("run/systemd/resolve/stub-resolv.conf").is_file());
    bundle.assert_outside_untouched();
}

#[test]
fn a_false_null_device_masks_nothing() {
    let bundle = Bundle::new();
    fs::write(bundle.root("secret"), "secret").unwrap();
    for false_null in ["link", "file"] {
        let _ = fs::remove_file(bundle.root("dev/null"));
        match false_null {
            "link" => symlink("/outside", bundle.root("dev/null")).unwrap(),
            _ => fs::write(bundle.root("dev/null"), "").unwrap(),
        }
        let refusal = bundle.refusal(json!({ "linux": { "maskedPaths": ["/secret"] } }));
        assert!(refusal.contains("is not the null device"), "{refusal}");
    }
    bundle.assert_outside_untouched();
}

#[test]
fn masking_follows_links_of_the_image_inside_only() {
    let bundle = Bundle::new();
    symlink(bundle.outside(), bundle.root("mask-me")).unwrap();
    symlink("../../../../outside", bundle.root("mask-me-too")).unwrap();
    let masked: Vec<String> = (0..64).map(|cpu| format!("/cpu{cpu}")).collect();
    for directory in &masked {
        fs::create_dir(bundle.root(&directory[1..])).unwrap();
    }
    let mut all = masked.clone();
    all.extend([
        "/mask-me".into(),
        "/mask-me-too".into(),
        "/none/at/all".into(),
        "/etc/../cpu1".into(),
    ]);
    let config =
        json!({ "mounts": [dev()], "linux": { "maskedPaths": all, "readonlyPaths": ["/mask-me", "/etc"] } });
    bundle
        .build(config, |rootfs| {
            rootfs.seal().unwrap();
            assert_eq!(
                fs::read_to_string(bundle.outside().join("canary")).unwrap(),
                "untouched"
            );
            fs::write(bundle.outside().join("canary"), "untouched").unwrap();
            rootfs.enter().unwrap();
            let mounts = mountinfo::parse(&fs::read("/proc/self/mountinfo").unwrap_or_default()).unwrap();
            assert!(mounts.is_empty(), "no procfs was asked for");
            let device = mount_of("/cpu0").unwrap().device;
            assert!(masked.iter().all(|path| mount_of(path).unwrap().device == device));
            assert_eq!(
                fs::write("/etc/x", "").unwrap_err().raw_os_error(),
                Some(Errno::EROFS.raw())
            );
        })
        .unwrap();
    bundle.assert_outside_untouched();
}

/// One thread keeps changing where a part of the destinations leads, another builds roots: nothing is ever made or
/// mounted outside.
#[test]
fn swapping_a_destination_while_mounts_are_made_leads_nowhere_else() {
    /// A failing test must not leave the other thread running.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let bundle = Bundle::new();
    let shared = |name: &str| bundle.root("shared").join(name);
    fs::create_dir_all(shared("real/sub")).unwrap();
    symlink("real", shared("name")).unwrap();
    fs::create_dir(bundle.base.join("volume")).unwrap();
    fs::write(bundle.base.join("volume/file"), "mounted").unwrap();
    let stop = AtomicBool::new(false);
    let mut built = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let leads = [Path::new("real"), &bundle.outside(), Path::new("../../outside")];
            for to in leads
                .into_iter()
                .cycle()
                .take_while(|_| !stop.load(Ordering::Relaxed))
            {
                symlink(to, shared("next")).unwrap();
                fs::rename(shared("next"), shared("name")).unwrap();
            }
        });
        let _stop = Stop(&stop);
        for round in 0..300 {
            // New names each time, so that there is something to make.
            let config = json!({ "mounts": [
                { "destination": "/shared/name/sub", "source": "volume", "options": ["bind"] },
                // It is there outside as well, for a mount that goes by name.
                { "destination": "/shared/name/canary", "source": "volume/file", "options": ["bind"] },
                { "destination": format!("/shared/name/new-{round}/deep"), "type": "tmpfs", "source": "tmpfs" },
                { "destination": format!("/shared/name/file-{round}"), "source": "outside/canary", "options": ["bind", "ro"] },
            ]});
            let mounts = bundle.build(config, |_| {
                mountinfo::read_own(&Procfs::private().unwrap()).unwrap()
            });
            for mount in mounts.iter().flatten() {
                assert!(!mount.mount_point.starts_with(bundle.outside()), "{mount:?}");
            }
            built += usize::from(mounts.is_ok());
        }
    });
    assert!(built > 0, "not one root was built");
    bundle.assert_outside_untouched();
}
