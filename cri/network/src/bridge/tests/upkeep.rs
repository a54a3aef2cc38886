//! What crashes, other programs and configurations do to a bridge, and what is made of it.

use super::*;

#[test]
fn what_a_crash_leaves_of_ports_is_swept_and_living_pods_keep_theirs() {
    isolated(|| {
        let far = Machine::far();
        let book = Arc::new(Book::default());
        let first = network(&book);
        let living = attach(&first, "living", &[port(Protocol::Tcp, 8080, "")]);
        // Each as it is after one more step of its attach, or one less of its detach.
        attach(&first, "row-lost", &[port(Protocol::Tcp, 8081, "")]);
        lock(&book.rows).remove("row-lost");
        attach(&first, "pair-lost", &[port(Protocol::Tcp, 8082, "")]);
        rtnl()
            .unwrap()
            .delete_link(&pair_name(INSTANCE, "pair-lost"))
            .unwrap();
        attach(&first, "rules-lost", &[port(Protocol::Tcp, 8083, "")]);
        first.bridge.rules.close("rules-lost").unwrap();
        let lease = BridgeLease {
            address: [10, 123, 0, 99].into(),
            v6: Some("fd00:123::63".parse().unwrap()),
            ports: vec![port(Protocol::Tcp, 8084, "")],
        };
        lock(&book.rows).insert("row-alone".to_owned(), Wiring::Bridge(lease));
        drop(first);

        let second = network(&book);
        assert_eq!(
            inside(&far.namespace, || dial(&living.namespace, (HOST, 8080))).unwrap(),
            FAR,
            "the daemon is not needed for it"
        );
        second.sweep(|pod| pod == "living").unwrap();
        for (to, seen) in [(HOST, FAR), (HOST_V6, FAR_V6)] {
            let answer = inside(&far.namespace, || dial(&living.namespace, (to, 8080)));
            assert_eq!(answer.unwrap(), seen);
        }
        assert_eq!(dial(&living.namespace, ("127.0.0.1", 8080)).unwrap(), GATEWAY);
        assert_eq!(lock(&second.bridge.pool).forwards().len(), 2);
        assert_eq!(elements(&second), 2);
        let ports: Vec<_> = (8081..8085)
            .map(|number| port(Protocol::Tcp, number, ""))
            .collect();
        attach(&second, "new", &ports);
        assert_eq!(elements(&second), 10);
        second.sweep(|_| false).unwrap();
        assert!(!tables().contains("coracle"), "{}", tables());
    });
}

/// How many elements the tables have.
fn elements(network: &Network) -> usize {
    network.bridge.rules.count_elements().unwrap()
}

#[test]
fn a_table_that_somebody_removed_is_made_again() {
    isolated(|| {
        let far = Machine::far();
        let book = Arc::new(Book::default());
        let network = network(&book);
        let pod = attach(&network, "pod", &[port(Protocol::Tcp, 8080, "")]);
        let reached = || inside(&far.namespace, || dial(&pod.namespace, (HOST, 8080))).is_ok();
        assert!(reached());
        assert_eq!(findings(&network), "[]");

        // As `nft flush ruleset` does: the next status says so and repairs it.
        network.bridge.rules.remove().unwrap();
        assert!(!reached());
        let said = findings(&network);
        assert!(said.contains("table coracle-0a1b2c3d"), "{said}");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !reached() {
            assert!(Instant::now() < deadline, "{}", findings(&network));
        }
        assert_eq!(findings(&network), "[]");
        assert_eq!(dial(&pod.namespace, ("127.0.0.1", 8080)).unwrap(), GATEWAY);

        // As `nft flush map` and `nft flush chain` do: the next pod repairs it.
        network.bridge.rules.remove_elements(|_| true).unwrap();
        assert!(!reached());
        attach(&network, "next", &[]);
        assert!(reached());
        if nft(&["flush", "chain", "ip", "coracle-0a1b2c3d", "prerouting"]) {
            assert!(!reached());
            attach(&network, "one-more", &[port(Protocol::Tcp, 8081, "")]);
            assert!(reached());
        }

        // While no daemon runs: its next start repairs it.
        network.bridge.rules.remove().unwrap();
        drop(network);
        let network = self::network(&book);
        network.sweep(|_| true).unwrap();
        assert!(reached());
        network.detach("pod").unwrap();
        assert!(!reached());
    });
}

#[test]
fn who_repairs_a_table_after_the_last_pod_has_gone_makes_none() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let network = network(&book);
        attach(&network, "last", &[port(Protocol::Tcp, 8080, "")]);
        let made_for = lock(&network.bridge.state).plan.unwrap();
        network.detach("last").unwrap();
        assert!(
            network.bridge.rules.watch(made_for),
            "that they are gone is as it should be"
        );
        network.bridge.rules.ensure(made_for, false).unwrap();
        assert!(!tables().contains("coracle"), "{}", tables());
    });
}

#[test]
fn a_host_without_ipv6_connects_pods_by_ipv4_and_says_so() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let network = network(&book);
        let check = |pod: &str| {
            let attached = attach(&network, pod, &[port(Protocol::Tcp, 8080, "")]);
            assert_eq!(attached.ips.len(), 1);
            let said = findings(&network);
            assert!(said.contains("IPv6 switched off"), "{said}");
            assert_eq!(dial(&attached.namespace, ("127.0.0.1", 8080)).unwrap(), GATEWAY);
            let error = network
                .attach("refused", &with(&[port(Protocol::Tcp, 1, HOST_V6)]))
                .unwrap_err();
            assert!(error.to_string().contains("no IPv6 address"), "{error}");
            network.detach(pod).unwrap();
        };
        sysctl("net.ipv6.conf.all.disable_ipv6", "1");
        check("switched-off");
        sysctl("net.ipv6.conf.all.disable_ipv6", "0");
        // What a kernel with ipv6.disable=1 shows.
        mount_old::mount_at(
            c"tmpfs",
            "/proc/sys/net/ipv6".as_ref(),
            c"tmpfs",
            Flags::empty(),
            c"",
        )
        .unwrap();
        check("not-there");
        assert_eq!(links(), Vec::<String>::new());
    });
}

#[test]
fn ipv6_comes_and_goes_with_the_configuration() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let without = crate::tests::network(&book);
        let old = without.attach("old", &AttachOptions::default()).unwrap();
        drop(without);
        let with_v6 = network(&book);
        with_v6.sweep(|_| true).unwrap();
        let new = attach(&with_v6, "new", &[]);
        assert_eq!((old.ips.len(), new.ips.len()), (1, 2));
        assert_eq!(dial(&new.namespace, ("fd00:123::3", 80)).unwrap(), GATEWAY_V6);
        assert_eq!(dial(&old.namespace, ("10.123.0.2", 80)).unwrap(), GATEWAY);
        drop(with_v6);
        let without = crate::tests::network(&book);
        without.sweep(|_| true).unwrap();
        let said = findings(&without);
        assert!(said.contains("1 pods have addresses outside"), "{said}");
        without.sweep(|_| false).unwrap();
        assert!(!tables().contains("coracle"), "{}", tables());
        assert_eq!(links(), Vec::<String>::new());

        let small = dual("10.123.0.0/16", "fd00:123::/120");
        let Err(error) = Network::new(INSTANCE, Mode::Bridge(small), book.clone()) else {
            panic!("a subnet_v6 that is too small is accepted");
        };
        assert!(error.to_string().contains("fewer addresses"), "{error}");
    });
}

#[test]
fn instances_beside_each_other_have_subnets_and_tables_of_their_own() {
    isolated(|| {
        let far = Machine::far();
        let (one, two) = (Arc::new(Book::default()), Arc::new(Book::default()));
        let first = network(&one);
        let pod = attach(&first, "pod", &[port(Protocol::Tcp, 8080, "")]);
        let beside = |bridge| Network::new("ffffffff", Mode::Bridge(bridge), two.clone()).unwrap();
        for (bridge, text) in [
            (
                dual("10.123.0.0/16", "fd00:124::/64"),
                "subnet 10.123.0.0/16 overlaps the host's route to 10.123.0.0/24 by crc-0a1b2c3d: \
                 set another [network] subnet",
            ),
            (
                dual("10.124.0.0/16", "fd00:123::/64"),
                "subnet fd00:123::/64 overlaps the host's route to fd00:123::/64 by crc-0a1b2c3d: \
                 set another [network] subnet_v6",
            ),
        ] {
            let error = beside(bridge)
                .attach("pod", &AttachOptions::default())
                .unwrap_err();
            assert_eq!(error.to_string(), text);
        }
        let second = beside(dual("10.124.0.0/16", "fd00:124::/64"));
        let other = attach(&second, "pod", &[port(Protocol::Tcp, 8081, "")]);
        inside(&far.namespace, || {
            assert_eq!(dial(&pod.namespace, (HOST, 8080)).unwrap(), FAR);
            assert_eq!(dial(&other.namespace, (HOST, 8081)).unwrap(), FAR);
        });
        second.sweep(|_| false).unwrap();
        inside(&far.namespace, || {
            assert_eq!(dial(&pod.namespace, (HOST, 8080)).unwrap(), FAR);
            dial(&pod.namespace, (HOST, 8081)).unwrap_err();
        });
        assert_eq!(findings(&first), "[]");
    });
}

#[test]
fn the_mtu_is_that_of_the_way_out_unless_told() {
    isolated(|| {
        let mtu = |namespace: &OwnedFd| {
            inside(namespace, || {
                let mut rtnl = Rtnl::open().unwrap();
                let index = rtnl.link_index(INSIDE).unwrap().unwrap();
                rtnl.link(index).unwrap().unwrap().1
            })
        };
        let book = Arc::new(Book::default());
        let network = network(&book);
        assert_eq!(mtu(&attach(&network, "no-way-out", &[]).namespace), 1500);
        network.detach("no-way-out").unwrap();
        let _far = Machine::far();
        let mut rtnl = Rtnl::open().unwrap();
        let near = rtnl.link_index("near").unwrap().unwrap();
        rtnl.add_default_route(ip(FAR), near).unwrap();
        assert_eq!(mtu(&attach(&network, "pod", &[]).namespace), 1400);
        // The bridge that is there says what pods get.
        drop(network);
        let told = crate::tests::network(&book);
        assert_eq!(mtu(&attach(&told, "late", &[]).namespace), 1400);
        told.sweep(|_| false).unwrap();
        assert_eq!(mtu(&attach(&told, "anew", &[]).namespace), 1450);
        told.sweep(|_| false).unwrap();
    });
}

#[test]
fn many_pods_with_ports_come_and_go_in_good_time() {
    isolated(|| {
        let far = Machine::far();
        let book = Arc::new(Book::default());
        let network = network(&book);
        let started = Instant::now();
        std::thread::scope(|scope| {
            for first in 0..4 {
                let network = &network;
                scope.spawn(move || {
                    for number in (first..60).step_by(4) {
                        let ports = [
                            port(Protocol::Tcp, 9000 + number, ""),
                            port(Protocol::Udp, 9000 + number, HOST),
                        ];
                        attach(network, &format!("pod-{number}"), &ports);
                    }
                });
            }
        });
        let attached = started.elapsed();
        assert_eq!(elements(&network), 180);
        assert_eq!(findings(&network), "[]");
        let last = network.attachment("pod-59").unwrap().unwrap();
        assert_eq!(
            inside(&far.namespace, || dial(&last.namespace, (HOST, 9059))).unwrap(),
            FAR
        );
        let started = Instant::now();
        std::thread::scope(|scope| {
            for first in 0..4 {
                let network = &network;
                scope.spawn(move || {
                    for number in (first..60).step_by(4) {
                        network.detach(&format!("pod-{number}")).unwrap();
                    }
                });
            }
        });
        eprintln!(
            "60 pods: attached in {attached:?}, detached in {:?}",
            started.elapsed()
        );
        assert!(attached + started.elapsed() < Duration::from_secs(60));
        assert_eq!((links(), pins()), (vec!["near".to_owned()], vec![]));
        assert!(!tables().contains("coracle"), "{}", tables());
    });
}

#[test]
fn as_many_ports_as_a_pod_may_have_are_opened_and_made_again() {
    isolated(|| {
        let far = Machine::far();
        let book = Arc::new(Book::default());
        let first = network(&book);
        // As long as real ones are: the id is a part of each element.
        let id = "f".repeat(64);
        let ports: Vec<_> = (1..=4096).map(|number| port(Protocol::Tcp, number, "")).collect();
        let pod = attach(&first, &id, &ports);
        let reached = || inside(&far.namespace, || dial(&pod.namespace, (HOST, 4096)));
        assert_eq!(reached().unwrap(), FAR);
        assert_eq!(elements(&first), 8192);
        assert_eq!(findings(&first), "[]");
        drop(first);

        let second = network(&book);
        second.bridge.rules.remove().unwrap();
        second.sweep(|_| true).unwrap();
        assert_eq!(findings(&second), "[]");
        assert_eq!(reached().unwrap(), FAR);
        second.detach(&id).unwrap();
        assert!(!tables().contains("coracle"), "{}", tables());
    });
}

#[test]
fn udp_flows_of_many_ports_are_forgotten_in_good_time() {
    isolated(|| {
        let far = Machine::far();
        let book = Arc::new(Book::default());
        let network = network(&book);
        let keep = attach(&network, "keep", &[]);
        let ports: Vec<_> = (1000..5096)
            .map(|number| port(Protocol::Udp, number, ""))
            .collect();
        let client = inside(&far.namespace, || UdpSocket::bind((ip(FAR), 4000)).unwrap());
        let started = Instant::now();
        for pod in ["one", "two"] {
            let attached = attach(&network, pod, &ports);
            for to in [1000, 5095] {
                assert_eq!(
                    ask(&attached.namespace, &client, (HOST, to)).unwrap(),
                    FAR,
                    "{pod}"
                );
            }
            network.detach(pod).unwrap();
        }
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "{:?}",
            started.elapsed()
        );
        drop(keep);
    });
}
