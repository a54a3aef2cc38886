//! Ports of the host: who reaches them, who wins them, who forgets them.

use super::*;

#[test]
fn a_port_of_the_host_is_reached_from_everywhere() {
    isolated(|| {
        let far = Machine::far();
        let book = Arc::new(Book::default());
        let network = network(&book);
        let ports = [port(Protocol::Tcp, 8080, ""), port(Protocol::Udp, 5353, "")];
        let pod = attach(&network, "pod", &ports);
        let other = attach(&network, "other", &[]);
        for filtered in [true, false] {
            bridged_packets_are_filtered(filtered);
            // From where (the host itself where nothing), to which address, seen by the pod as whom.
            for (from, to, seen) in [
                (Some(&far.namespace), HOST, FAR),
                (Some(&far.namespace), HOST_V6, FAR_V6),
                (None, HOST, HOST),
                (None, HOST_V6, HOST_V6),
                (None, GATEWAY, GATEWAY),
                (None, GATEWAY_V6, GATEWAY_V6),
                (None, "127.0.0.1", GATEWAY),
                (Some(&other.namespace), HOST, GATEWAY),
                (Some(&other.namespace), HOST_V6, GATEWAY_V6),
                (Some(&other.namespace), GATEWAY, GATEWAY),
                (Some(&pod.namespace), HOST, GATEWAY),
                (Some(&pod.namespace), HOST_V6, GATEWAY_V6),
                (Some(&pod.namespace), GATEWAY, GATEWAY),
            ] {
                let tcp = || dial(&pod.namespace, (to, 8080));
                let udp = || ask(&pod.namespace, &udp_socket(to), (to, 5353));
                let answers = match from {
                    Some(from) => inside(from, || (tcp(), udp())),
                    None => (tcp(), udp()),
                };
                assert_eq!(answers.0.unwrap(), seen, "TCP to {to}, {from:?}, {filtered}");
                assert_eq!(answers.1.unwrap(), seen, "UDP to {to}, {from:?}, {filtered}");
            }
        }
        // The kernel cannot: then at once.
        let refused = dial(&pod.namespace, ("::1", 8080)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        // Others' ports, and other ports, are as before.
        assert_eq!(dial(&far.namespace, (FAR, 80)).unwrap(), HOST);
        let refused = inside(&far.namespace, || dial(&pod.namespace, (HOST, 8081)));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);

        network.detach("pod").unwrap();
        for to in [HOST, HOST_V6, "127.0.0.1"] {
            let error = dial(&other.namespace, (to, 8080)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
        }
        assert_eq!(read_sysctl("net/ipv4/conf/crc-0a1b2c3d/route_localnet"), "0");
        network.detach("other").unwrap();
        assert!(!tables().contains("coracle"), "{}", tables());
    });
}

#[test]
fn a_port_of_one_address_is_reached_by_that_alone() {
    isolated(|| {
        let far = Machine::far();
        let book = Arc::new(Book::default());
        let network = network(&book);
        let ports = [
            port(Protocol::Tcp, 8081, HOST),
            port(Protocol::Tcp, 8082, "127.0.0.1"),
            port(Protocol::Tcp, 8083, HOST_V6),
            port(Protocol::Tcp, 8084, "0.0.0.0"),
            port(Protocol::Tcp, 8085, "::"),
            // Not an address of this host: packets that pass through are not caught.
            port(Protocol::Tcp, 80, FAR),
        ];
        let pod = attach(&network, "pod", &ports);
        let reached = |to| dial(&pod.namespace, to).is_ok();
        for (number, expected) in [
            (8081, [true, false, false, false]),
            (8082, [false, false, true, false]),
            (8083, [false, true, false, false]),
            (8084, [true, false, true, true]),
            (8085, [false, true, false, false]),
        ] {
            let found = [HOST, HOST_V6, "127.0.0.1", GATEWAY].map(|to| reached((to, number)));
            assert_eq!(found, expected, "port {number}");
        }
        inside(&far.namespace, || {
            assert!(reached((HOST, 8081)) && reached((HOST_V6, 8083)));
            for to in [HOST, "127.0.0.1"] {
                assert!(!reached((to, 8082)), "8082 is for this host alone: {to}");
            }
        });
        let seen = inside(&pod.namespace, || dial(&far.namespace, (FAR, 80)));
        assert_eq!(seen.unwrap(), HOST);
    });
}

#[test]
fn what_listens_on_127_0_0_1_is_reached_by_nobody_else() {
    isolated(|| {
        let far = Machine::far();
        let book = Arc::new(Book::default());
        let network = network(&book);
        attach(&network, "pod", &[port(Protocol::Tcp, 8080, "")]);
        assert_eq!(read_sysctl("net/ipv4/conf/crc-0a1b2c3d/route_localnet"), "1");
        let rogue = Machine::on_the_bridge();
        let _service = TcpListener::bind("127.0.0.1:9000").unwrap();
        let dial = |from: &OwnedFd| {
            inside(from, || {
                let to = SocketAddr::from(([127, 0, 0, 1], 9000));
                TcpStream::connect_timeout(&to, Duration::from_millis(700))
            })
        };
        for from in [&far, &rogue] {
            assert_eq!(dial(&from.namespace).unwrap_err().kind(), ErrorKind::TimedOut);
        }
        // Nor does anybody pass for the host itself.
        let service = UdpSocket::bind("0.0.0.0:9001").unwrap();
        service
            .set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        let spoof = |from: &mut Machine| {
            from.rtnl.add_address(from.link, ip("127.0.0.9"), 32).unwrap();
            inside(&from.namespace, || {
                let socket = UdpSocket::bind("127.0.0.9:0").unwrap();
                socket.send_to(b"?", (ip(GATEWAY), 9001)).unwrap();
            });
        };
        let mut rogue = rogue;
        spoof(&mut rogue);
        service.recv_from(&mut [0; 8]).unwrap_err();

        // The proof of the test: without the guard, both attacks work.
        if nft(&["flush", "chain", "ip", "coracle-0a1b2c3d", "guard"]) {
            dial(&far.namespace).unwrap();
            dial(&rogue.namespace).unwrap();
        }
    });
}

#[test]
fn sctp_is_translated_like_the_others() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let network = network(&book);
        attach(
            &network,
            "pod",
            &[port(Protocol::Sctp, 3868, ""), port(Protocol::Sctp, 3869, HOST)],
        );
        // Few kernels have SCTP sockets: the elements are what TCP's and UDP's are.
        let shown = tables();
        if shown.is_empty() {
            eprintln!("SKIPPED: no nft program to look with");
            return;
        }
        for part in [
            "sctp . 3868 comment \"pod pod\" : 10.123.0.2 . 80",
            "sctp . 3868 comment \"pod pod\" : fd00:123::2 . 80",
            "192.0.2.1 . sctp . 3869 comment \"pod pod\" : 10.123.0.2 . 80",
        ] {
            assert!(shown.contains(part), "{part} is not in {shown}");
        }
    });
}

#[test]
fn udp_flows_follow_the_port_to_its_pod() {
    isolated(|| {
        let far = Machine::far();
        let book = Arc::new(Book::default());
        let network = network(&book);
        let keep = attach(&network, "keep", &[]);
        for (to, client) in [(HOST, FAR), (HOST_V6, FAR_V6)] {
            let client = inside(&far.namespace, || UdpSocket::bind((ip(client), 4000)).unwrap());
            // First to a process of the host, then to one pod after the other: always the same flow.
            let process = UdpSocket::bind((ip(to), 5353)).unwrap();
            ask_socket(&process, &client, (to, 5353)).unwrap();
            for pod in ["one", "two"] {
                let attached = attach(&network, pod, &[port(Protocol::Udp, 5353, "")]);
                assert_eq!(
                    ask(&attached.namespace, &client, (to, 5353)).unwrap(),
                    client.local_addr().unwrap().ip().to_string(),
                    "{pod}"
                );
                network.detach(pod).unwrap();
            }
            // And back.
            ask_socket(&process, &client, (to, 5353)).unwrap();
        }
        drop(keep);
    });
}

#[test]
fn a_pod_wins_its_port_of_the_host_from_processes_and_no_other_pod_wins_it() {
    isolated(|| {
        let far = Machine::far();
        let book = Arc::new(Book::default());
        let network = network(&book);
        let _process = TcpListener::bind("0.0.0.0:8080").unwrap();
        let reached = || {
            inside(&far.namespace, || {
                TcpStream::connect_timeout(&(ip(HOST), 8080).into(), Duration::from_secs(2))
            })
        };
        let pod = attach(&network, "pod", &[port(Protocol::Tcp, 8080, HOST)]);
        assert_eq!(
            inside(&far.namespace, || dial(&pod.namespace, (HOST, 8080))).unwrap(),
            FAR
        );

        let refused = network.attach("late", &with(&[port(Protocol::Tcp, 8080, "")]));
        assert_eq!(
            refused.unwrap_err().to_string(),
            "host port 8080/tcp is taken by pod pod"
        );
        assert!(!lock(&book.rows).contains_key("late"));
        for (mapping, why) in [
            (port(Protocol::Tcp, 1, "::1"), "::1"),
            (port(Protocol::Tcp, 0, ""), "no port"),
        ] {
            let error = network.attach("late", &with(&[mapping])).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert_eq!(
            inside(&far.namespace, || dial(&pod.namespace, (HOST, 8080))).unwrap(),
            FAR
        );

        network.detach("pod").unwrap();
        reached().expect("the process has it back");
        attach(&network, "late", &[port(Protocol::Tcp, 8080, "")]);
    });
}
