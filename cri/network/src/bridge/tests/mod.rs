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

mod ports;
mod upkeep;

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
    let socket = inside(server, || bind_again((Ipv6Addr::UNSPECIFIED, 80)));
    ask_socket(&socket, client, to)
}

/// Binds a port that another socket had a moment ago: a child of another test holds that too, until it executes its
/// program.
fn bind_again(address: (Ipv6Addr, u16)) -> UdpSocket {
    let begun = Instant::now();
    loop {
        match UdpSocket::bind(address) {
            Err(error)
                if error.kind() == ErrorKind::AddrInUse && begun.elapsed() < Duration::from_secs(10) =>
            {
                std::thread::yield_now();
            }
            bound => return bound.unwrap(),
        }
    }
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
