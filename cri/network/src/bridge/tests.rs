//! The bridge, its addresses and its ports of the host, in namespaces that each test makes: the tests' own thread is
//! the host, `Machine` is another one beside it.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Command;
use std::time::Instant;

use coracle_kernel::mount_old::{self, Flags};
use coracle_kernel::namespace::{self, Kind, Kinds};
use coracle_kernel::procfs::Procfs;

use super::*;
use crate::netns::inside;
use crate::tests::{Book, INSTANCE, isolated, links, pins, tables};
use crate::{Attachment, Mode, Network, PortMapping, Protocol};

const HOST: &str = "192.0.2.1";
const HOST_V6: &str = "fd00:9::1";
const FAR: &str = "192.0.2.2";
const FAR_V6: &str = "fd00:9::2";
const GATEWAY: &str = "10.123.0.1";
const GATEWAY_V6: &str = "fd00:123::1";

/// Another machine, whose loopback device is down: 127.0.0.1 is an address like others to it.
struct Machine {
    namespace: OwnedFd,
    rtnl: Rtnl,
    link: u32,
}

impl Machine {
    /// Beside the host, which forwards, and routes by its device whatever the machine sends to 127.0.0.1, as a host
    /// with kube-proxy does.
    fn far() -> Machine {
        let mut far = Machine::new("near");
        let mut rtnl = Rtnl::open().unwrap();
        let near = rtnl.link_index("near").unwrap().unwrap();
        for (address, peer, prefix) in [(HOST, FAR, 24), (HOST_V6, FAR_V6, 64)] {
            rtnl.add_address(near, ip(address), prefix).unwrap();
            far.rtnl.add_address(far.link, ip(peer), prefix).unwrap();
        }
        let events = LinkEvents::open().unwrap();
        let far_events = inside(&far.namespace, || LinkEvents::open().unwrap());
        rtnl.up(near).unwrap();
        far.rtnl.up(far.link).unwrap();
        rtnl.wait_operational(near, &events, CARRIER_TIME).unwrap();
        far.rtnl
            .wait_operational(far.link, &far_events, CARRIER_TIME)
            .unwrap();
        far.rtnl.add_default_route(ip(HOST), far.link).unwrap();
        for name in [
            "net.ipv4.ip_forward",
            "net.ipv6.conf.all.forwarding",
            "net.ipv4.conf.near.route_localnet",
        ] {
            sysctl(name, "1");
        }
        far
    }

    /// On the bridge, as a pod that does as it likes.
    fn on_the_bridge() -> Machine {
        let mut machine = Machine::new("rogue");
        let mut rtnl = Rtnl::open().unwrap();
        let bridge = rtnl.link_index("crc-0a1b2c3d").unwrap().unwrap();
        let port = rtnl.link_index("rogue").unwrap().unwrap();
        rtnl.up(port).unwrap();
        rtnl.set_bridge(port, bridge).unwrap();
        machine
            .rtnl
            .add_address(machine.link, ip("10.123.0.200"), 24)
            .unwrap();
        machine.rtnl.up(machine.link).unwrap();
        machine.rtnl.add_default_route(ip(GATEWAY), machine.link).unwrap();
        machine
    }

    fn new(near: &str) -> Machine {
        let thread = std::thread::spawn(|| {
            namespace::unshare(Kinds::NETWORK).unwrap();
            for name in [
                "net.ipv4.conf.all.route_localnet",
                "net.ipv4.conf.default.route_localnet",
            ] {
                sysctl(name, "1");
            }
            (namespace::open_own(Kind::Network).unwrap(), Rtnl::open().unwrap())
        });
        let (namespace, mut rtnl) = thread.join().unwrap();
        let pair = Pair {
            name: near,
            alias: "test".to_owned(),
            mtu: 1400,
            peer: "far",
            peer_namespace: namespace.as_fd(),
        };
        Rtnl::open().unwrap().create_pair(&pair).unwrap();
        let link = rtnl.link_index("far").unwrap().unwrap();
        Machine {
            namespace,
            rtnl,
            link,
        }
    }
}

fn dual(subnet: &str, subnet_v6: &str) -> Bridge {
    Bridge {
        subnet: subnet.parse().unwrap(),
        subnet_v6: Some(subnet_v6.parse().unwrap()),
        mtu: 0,
        masquerade: true,
    }
}

fn network(book: &Arc<Book>) -> Network {
    let bridge = dual("10.123.0.0/24", "fd00:123::/64");
    Network::new(INSTANCE, Mode::Bridge(bridge), book.clone()).unwrap()
}

fn attach(network: &Network, pod: &str, ports: &[PortMapping]) -> Attachment {
    network.attach(pod, &with(ports)).unwrap()
}

fn with(ports: &[PortMapping]) -> AttachOptions {
    AttachOptions {
        port_mappings: ports.to_vec(),
        ..AttachOptions::default()
    }
}

fn port(protocol: Protocol, host_port: u16, host_ip: &str) -> PortMapping {
    PortMapping {
        protocol,
        container_port: 80,
        host_port,
        host_ip: (!host_ip.is_empty()).then(|| ip(host_ip)),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn sysctl(name: &str, value: &str) {
    Procfs::visible().unwrap().sysctl(name, value).unwrap();
}

fn read_sysctl(name: &str) -> String {
    Procfs::visible().unwrap().read_sysctl(name).unwrap()
}

/// Whether packets that a bridge passes on are shown to the rules too: pods are reached the same way in both cases.
fn bridged_packets_are_filtered(yes: bool) {
    for family in ["ip", "ip6"] {
        let name = format!("net.bridge.bridge-nf-call-{family}tables");
        // A kernel without it is as one that has it off.
        let _ = Procfs::visible()
            .unwrap()
            .sysctl(&name, if yes { "1" } else { "0" });
    }
}

/// Dials `to`, while `server` listens on port 80 of all addresses: what it took the client's address for.
fn dial(server: &OwnedFd, to: (&str, u16)) -> io::Result<String> {
    let listener = inside(server, || TcpListener::bind((Ipv6Addr::UNSPECIFIED, 80)).unwrap());
    let thread = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        let seen = peer.ip().to_canonical().to_string();
        let _ = stream.write_all(seen.as_bytes());
    });
    let answer = || {
        let mut stream = TcpStream::connect_timeout(&(ip(to.0), to.1).into(), Duration::from_secs(2))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    let answer = answer();
    // So that the thread ends in every case.
    let _ = inside(server, || TcpStream::connect((Ipv6Addr::LOCALHOST, 80)));
    thread.join().unwrap();
    answer
}

/// The same by UDP, from `client`.
fn ask(server: &OwnedFd, client: &UdpSocket, to: (&str, u16)) -> io::Result<String> {
    let socket = inside(server, || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 80)).unwrap());
    ask_socket(&socket, client, to)
}

fn ask_socket(socket: &UdpSocket, client: &UdpSocket, to: (&str, u16)) -> io::Result<String> {
    socket.set_read_timeout(Some(Duration::from_millis(700)))?;
    client.set_read_timeout(Some(Duration::from_millis(700)))?;
    client.send_to(b"?", (ip(to.0), to.1))?;
    let (_, peer) = socket.recv_from(&mut [0; 8])?;
    socket.send_to(peer.ip().to_canonical().to_string().as_bytes(), peer)?;
    let mut answer = [0; 64];
    let (length, _) = client.recv_from(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

fn udp_socket(for_peer: &str) -> UdpSocket {
    let any: IpAddr = if ip(for_peer).is_ipv4() {
        ip("0.0.0.0")
    } else {
        ip("::")
    };
    UdpSocket::bind((any, 0)).unwrap()
}

fn findings(network: &Network) -> String {
    format!("{:?}", network.status().findings)
}

fn nft(arguments: &[&str]) -> bool {
    Command::new("nft")
        .args(arguments)
        .status()
        .is_ok_and(|status| status.success())
}

#[test]
fn names_fit_and_differ() {
    let pod = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    let name = pair_name("0a1b2c3d", pod);
    assert_eq!(name.len(), 15);
    assert_ne!(name, pair_name("0a1b2c3e", pod));
    assert_ne!(name, pair_name("0a1b2c3d", &pod[1..]));
    assert_eq!(name, pair_name("0a1b2c3d", pod));
    assert_eq!(hardware_address("0a1b2c3d")[0], 2);
}

#[test]
fn pods_of_two_families_are_reached_at_once_and_reach_the_world() {
    isolated(|| {
        let far = Machine::far();
        let book = Arc::new(Book::default());
        let network = network(&book);
        let one = attach(&network, "one", &[]);
        let two = attach(&network, "two", &[]);
        assert_eq!(one.ips, [ip("10.123.0.2"), ip("fd00:123::2")]);
        assert_eq!(two.ips, [ip("10.123.0.3"), ip("fd00:123::3")]);
        assert_eq!(network.attachment("one").unwrap().unwrap().ips, one.ips);

        let started = Instant::now();
        assert_eq!(dial(&one.namespace, ("fd00:123::2", 80)).unwrap(), GATEWAY_V6);
        let seen = inside(&two.namespace, || dial(&one.namespace, ("fd00:123::2", 80)));
        assert_eq!(
            seen.unwrap(),
            "fd00:123::3",
            "pods see each other's own addresses"
        );
        let seen = inside(&two.namespace, || dial(&far.namespace, (FAR_V6, 80)));
        assert_eq!(seen.unwrap(), HOST_V6);
        let seen = inside(&two.namespace, || dial(&far.namespace, (FAR, 80)));
        assert_eq!(seen.unwrap(), HOST);
        assert!(
            started.elapsed() < Duration::from_millis(900),
            "packets were lost, or addresses not usable: {:?}",
            started.elapsed()
        );
        assert_eq!(findings(&network), "[]");

        network.sweep(|_| false).unwrap();
        assert_eq!((links(), pins()), (vec!["near".to_owned()], vec![]));
        assert!(!tables().contains("coracle"), "{}", tables());
    });
}

#[test]
fn no_router_advertisement_is_listened_to() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let network = network(&book);
        let pod = attach(&network, "pod", &[]);
        let pair = links()
            .into_iter()
            .find(|name| name.starts_with(PAIR_PREFIX))
            .unwrap();
        assert_eq!(read_sysctl(&format!("net/ipv6/conf/{pair}/disable_ipv6")), "1");
        assert_eq!(read_sysctl("net/ipv6/conf/crc-0a1b2c3d/accept_ra"), "0");
        assert_eq!(read_sysctl("net/ipv6/conf/crc-0a1b2c3d/disable_ipv6"), "0");
        inside(&pod.namespace, || {
            assert_eq!(read_sysctl("net/ipv6/conf/eth0/accept_ra"), "0");
        });
        network.sweep(|_| false).unwrap();

        // Without IPv6 of their own, the same.
        let network = crate::tests::network(&book);
        let pod = attach(&network, "pod", &[]);
        assert_eq!(pod.ips.len(), 1);
        assert_eq!(read_sysctl("net/ipv6/conf/crc-0a1b2c3d/disable_ipv6"), "1");
        inside(&pod.namespace, || {
            assert_eq!(read_sysctl("net/ipv6/conf/eth0/accept_ra"), "0");
        });
        network.sweep(|_| false).unwrap();
    });
}

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
