//! Restarts, sweeps and failures.

use super::*;

#[test]
fn a_pod_keeps_its_address_over_a_restart_and_a_second_attach() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let first = network(&book);
        attach(&first, "a");
        let before = attach(&first, "b").ips;
        drop(first);

        let second = network(&book);
        let found = second.attachment("b").unwrap().unwrap();
        assert_eq!(found.ips, before);
        assert_eq!(dial(&found.namespace, found.ips[0]), "10.123.0.1");
        assert!(second.attachment("c").unwrap().is_none());
        assert_eq!(attach(&second, "b").ips, before);
        assert_ne!(attach(&second, "c").ips, before);
        assert_eq!(pins().len(), 3);
        for pod in ["a", "b", "c"] {
            second.detach(pod).unwrap();
        }
        assert_eq!((links(), pins()), (vec![], vec![]));
    });
}

#[test]
fn a_sweep_removes_what_no_living_pod_has_and_nothing_of_others() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let first = network(&book);
        let living = attach(&first, "living");
        attach(&first, "dead");
        attach(&first, "row-lost");
        lock(&book.rows).remove("row-lost");
        attach(&first, "pin-lost");
        first.pins.remove("pin-lost").unwrap();
        attach(&first, "pair-left");
        first.pins.remove("pair-left").unwrap();
        lock(&book.rows).remove("pair-left");
        let lease = BridgeLease {
            address: [10, 123, 0, 99].into(),
            v6: None,
            ports: Vec::new(),
        };
        lock(&book.rows).insert("row-alone".to_owned(), Wiring::Bridge(lease));
        std::fs::write("/run/netns/coracle-0a1b2c3d-file-alone", "").unwrap();
        std::fs::write("/run/netns/coracle-ffffffff-other", "").unwrap();
        std::fs::write("/run/netns/cni-1", "").unwrap();
        drop(first);

        let second = network(&book);
        assert!(second.sweep(|pod| pod == "living").unwrap() >= 5);
        let mut left = pins();
        left.sort();
        assert_eq!(
            left,
            ["cni-1", "coracle-0a1b2c3d-living", "coracle-ffffffff-other"]
        );
        assert_eq!(lock(&book.rows).keys().collect::<Vec<_>>(), ["living"]);
        assert_eq!(links().len(), 2, "{:?}", links());
        assert_eq!(dial(&living.namespace, living.ips[0]), "10.123.0.1");

        assert_eq!(second.sweep(|_| false).unwrap(), 1);
        assert_eq!(second.sweep(|_| false).unwrap(), 0);
        assert_eq!(links(), Vec::<String>::new());
        assert_eq!(pins().len(), 2);
    });
}

#[test]
fn a_bridge_that_a_crash_left_goes_with_the_sweep() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let first = network(&book);
        attach(&first, "pod");
        first.take_down("pod").unwrap();
        lock(&book.rows).clear();
        drop(first);
        assert_eq!(links(), ["crc-0a1b2c3d"]);
        network(&book).sweep(|_| false).unwrap();
        assert_eq!(links(), Vec::<String>::new());
        assert!(!tables().contains("coracle"), "{}", tables());
    });
}

#[test]
fn pins_are_removed_also_after_ip_netns_has_made_a_mount_of_their_directory() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let network = network(&book);
        std::thread::scope(|scope| {
            for pod in ["a", "b", "c", "d"] {
                let network = &network;
                scope.spawn(move || attach(network, pod));
            }
        });
        // What `ip netns add` does: a shared mount of the directory, and first a mount of it where there is none.
        let dir = std::path::Path::new("/run/netns");
        if mount_old::set_propagation(dir, Propagation::Shared, true).is_err() {
            let opened = coracle_kernel::path::open_dir(dir).unwrap();
            mount_old::bind(&opened, &opened, true).unwrap();
            mount_old::set_propagation(dir, Propagation::Shared, true).unwrap();
        }
        for pod in ["a", "b", "c", "d"] {
            network.detach(pod).unwrap();
        }
        assert_eq!((links(), pins(), mounts_below_run_netns()), (vec![], vec![], 0));
    });
}

#[test]
fn what_cannot_be_swept_keeps_neither_the_rest_nor_the_daemon() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let first = network(&book);
        attach(&first, "dead");
        drop(first);
        let strange = format!("/run/netns/coracle-{INSTANCE}-a b");
        std::fs::write(&strange, "").unwrap();
        let stuck = format!("/run/netns/coracle-{INSTANCE}-a");
        std::fs::create_dir(&stuck).unwrap();

        let second = network(&book);
        assert_eq!(second.sweep(|_| false).unwrap(), 1, "the pod");
        assert_eq!(links(), Vec::<String>::new());
        let findings = format!("{:?}", second.status().findings);
        assert!(
            findings.contains("the network of pod a could not be taken down"),
            "{findings}"
        );
        std::fs::remove_dir(&stuck).unwrap();
        cni::tests::retry_until_done(&second);
        assert_eq!(pins(), [format!("coracle-{INSTANCE}-a b")]);
    });
}

#[test]
fn the_bridge_comes_back_if_someone_removes_it() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let network = network(&book);
        attach(&network, "a");
        Rtnl::open().unwrap().delete_link("crc-0a1b2c3d").unwrap();
        let pod = attach(&network, "b");
        assert_eq!(dial(&pod.namespace, pod.ips[0]), "10.123.0.1");
        network.sweep(|_| false).unwrap();
        assert_eq!(links(), Vec::<String>::new());
    });
}

#[test]
fn an_exhausted_pool_a_failing_book_and_a_taken_subnet_leave_nothing() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let small = network_on(&book, "10.123.0.0/29");
        for number in 0..5 {
            attach(&small, &format!("pod-{number}"));
        }
        let text = small
            .attach("one-more", &AttachOptions::default())
            .unwrap_err()
            .to_string();
        assert!(text.contains("no free address in 10.123.0.0/29"), "{text}");
        assert_eq!((links().len(), pins().len()), (6, 5));
        small.detach("pod-3").unwrap();
        attach(&small, "one-more");
        small.sweep(|_| false).unwrap();
        assert_eq!((links(), pins()), (vec![], vec![]));

        *lock(&book.fails) = true;
        let error = small.attach("pod", &AttachOptions::default()).unwrap_err();
        assert!(matches!(error, Error::Book { .. }), "{error}");
        *lock(&book.fails) = false;
        assert_eq!((links(), pins()), (vec![], vec![]));

        attach(&small, "pod");
        // Another instance with a subnet that contains the first one's.
        let other_book: Arc<dyn crate::Book> = Arc::new(Book::default());
        let other = Network::new("ffffffff", Mode::Bridge(bridge("10.123.0.0/16")), other_book).unwrap();
        let text = other
            .attach("pod", &AttachOptions::default())
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("10.123.0.0/16 overlaps the host's route to 10.123.0.0/29"),
            "{text}"
        );
        assert_eq!((links().len(), pins().len()), (2, 1));
        small.detach("pod").unwrap();
    });
}

#[test]
fn two_instances_and_many_pods_at_once_do_not_meet() {
    isolated(|| {
        let (one, two) = (Arc::new(Book::default()), Arc::new(Book::default()));
        let second: Arc<dyn crate::Book> = two.clone();
        let first = network(&one);
        let second = Network::new("ffffffff", Mode::Bridge(bridge("10.124.0.0/24")), second).unwrap();
        std::thread::scope(|scope| {
            for number in 0..12 {
                let network = if number % 2 == 0 { &first } else { &second };
                scope.spawn(move || {
                    for round in 0..3 {
                        let pod = format!("pod-{number}-{round}");
                        let attached = attach(network, &pod);
                        assert!(inside(&attached.namespace, links).contains(&"eth0".to_owned()));
                        network.detach(&pod).unwrap();
                    }
                });
            }
        });
        assert_eq!((links(), pins(), mounts_below_run_netns()), (vec![], vec![], 0));
    });
}
