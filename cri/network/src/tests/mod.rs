//! Everything here happens in namespaces that a test makes: the host's network and /run are not touched.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use coracle_kernel::mount_attr::Propagation;
use coracle_kernel::mount_old::{self, Flags};
use coracle_kernel::namespace::{self, Kind, Kinds};
use coracle_kernel::procfs::Procfs;
use coracle_kernel::{Errno, seccomp, syscall};

use super::*;
use crate::netns::inside;
use crate::rtnl::{Pair, Rtnl};

mod upkeep;

pub(crate) const INSTANCE: &str = "0a1b2c3d";

#[derive(Default)]
pub(crate) struct Book {
    pub(crate) rows: Mutex<BTreeMap<String, Wiring>>,
    fails: Mutex<bool>,
}

impl super::Book for Book {
    fn load(&self) -> Result<Vec<Row>, BookError> {
        Ok(lock(&self.rows)
            .iter()
            .map(|(pod, wiring)| Row {
                pod: pod.clone(),
                wiring: wiring.clone(),
            })
            .collect())
    }

    fn save(&self, row: &Row) -> Result<(), BookError> {
        if *lock(&self.fails) {
            return Err("the disk is full".into());
        }
        lock(&self.rows).insert(row.pod.clone(), row.wiring.clone());
        Ok(())
    }

    fn delete(&self, pod: &str) -> Result<(), BookError> {
        lock(&self.rows).remove(pod);
        Ok(())
    }
}

fn bridge(subnet: &str) -> Bridge {
    Bridge {
        subnet: subnet.parse().unwrap(),
        subnet_v6: None,
        mtu: 1450,
        masquerade: true,
    }
}

pub(crate) fn network(book: &Arc<Book>) -> Network {
    network_on(book, "10.123.0.0/24")
}

pub(crate) fn network_on(book: &Arc<Book>, subnet: &str) -> Network {
    let book: Arc<dyn super::Book> = book.clone();
    Network::new(INSTANCE, Mode::Bridge(bridge(subnet)), book).unwrap()
}

pub(crate) fn attach(network: &Network, pod: &str) -> Attachment {
    network.attach(pod, &AttachOptions::default()).unwrap()
}

/// Runs a test in a thread with a network and a /run of its own.
pub(crate) fn isolated(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        match namespace::unshare(Kinds::NETWORK | Kinds::MOUNT) {
            Err(error) if error.errno() == Errno::EPERM => {
                eprintln!("SKIPPED: no right to make a network namespace");
                return;
            }
            other => other.unwrap(),
        }
        mount_old::set_propagation("/".as_ref(), Propagation::Private, true).unwrap();
        mount_old::mount_at(c"tmpfs", "/run".as_ref(), c"tmpfs", Flags::empty(), c"").unwrap();
        Rtnl::open().unwrap().loopback_up().unwrap();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Names of all links here but loopback.
pub(crate) fn links() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let names = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim().to_owned());
    names.filter(|name| name != "lo").collect()
}

pub(crate) fn pins() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return Vec::new();
    };
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

pub(crate) fn mounts_below_run_netns() -> usize {
    std::fs::read_to_string("/proc/thread-self/mountinfo")
        .unwrap()
        .matches("/run/netns/")
        .count()
}

pub(crate) fn tables() -> String {
    let nft = std::process::Command::new("nft")
        .args(["list", "ruleset"])
        .output();
    nft.map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default()
}

/// Answers one client in `namespace` with the client's address, as the listener there saw it.
pub(crate) fn serve_once(namespace: &OwnedFd, address: &str) -> std::thread::JoinHandle<()> {
    let listener = inside(namespace, || TcpListener::bind(address).unwrap());
    std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        stream.write_all(peer.ip().to_string().as_bytes()).unwrap();
    })
}

/// Connects to `address`, a listener in `namespace`; the answer is the client's address as the listener saw it.
pub(crate) fn dial(namespace: &OwnedFd, address: IpAddr) -> String {
    let server = serve_once(namespace, "0.0.0.0:80");
    let mut stream = TcpStream::connect_timeout(&(address, 80).into(), Duration::from_secs(10)).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    server.join().unwrap();
    text
}

#[test]
fn a_pod_is_reached_from_the_host_and_from_a_pod_at_once() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let network = network(&book);
        assert_eq!(network.mode(), "bridge");
        let one = attach(&network, "pod-1");
        assert_eq!(one.netns, PathBuf::from("/run/netns/coracle-0a1b2c3d-pod-1"));
        assert_eq!(one.ips, ["10.123.0.2".parse::<IpAddr>().unwrap()]);
        let started = Instant::now();
        assert_eq!(dial(&one.namespace, one.ips[0]), "10.123.0.1");
        assert!(
            started.elapsed() < Duration::from_millis(800),
            "the first packet was lost: {:?}",
            started.elapsed()
        );

        let two = attach(&network, "pod-2");
        assert_ne!(one.ips, two.ips);
        let started = Instant::now();
        let seen = inside(&two.namespace, || dial(&one.namespace, one.ips[0]));
        assert_eq!(
            seen,
            two.ips[0].to_string(),
            "pods see each other's own addresses"
        );
        assert!(
            started.elapsed() < Duration::from_millis(800),
            "the first packet was lost: {:?}",
            started.elapsed()
        );
        assert_eq!(
            inside(&one.namespace, || dial(
                &one.namespace,
                "127.0.0.1".parse().unwrap()
            )),
            "127.0.0.1"
        );
        let sysctl = |name: &'static str| {
            inside(&one.namespace, || {
                Procfs::visible().unwrap().read_sysctl(name).unwrap()
            })
        };
        assert_eq!(sysctl("net.ipv4.ip_unprivileged_port_start"), "0");
        assert_eq!(
            sysctl("net.ipv4.ping_group_range")
                .split_whitespace()
                .collect::<Vec<_>>(),
            ["0", "2147483647"]
        );
        assert_eq!(mounts_below_run_netns(), 2);

        network.detach("pod-1").unwrap();
        assert_eq!(
            links().len(),
            2,
            "the other pod's pair and the bridge: {:?}",
            links()
        );
        network.detach("pod-2").unwrap();
        network.detach("pod-2").unwrap();
        network.detach("never-seen").unwrap();
        assert_eq!((links(), pins(), mounts_below_run_netns()), (vec![], vec![], 0));
        assert!(lock(&book.rows).is_empty());
        assert!(!tables().contains("coracle"), "{}", tables());
    });
}

#[test]
fn sysctls_of_the_pod_override_and_others_are_refused_without_a_trace() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let network = network(&book);
        let with = |name: &str, value: &str| AttachOptions {
            sysctls: BTreeMap::from([(name.to_owned(), value.to_owned())]),
            ..AttachOptions::default()
        };
        let pod = network
            .attach("pod", &with("net/ipv4/ip_unprivileged_port_start", "1000"))
            .unwrap();
        let value = inside(&pod.namespace, || {
            Procfs::visible()
                .unwrap()
                .read_sysctl("net.ipv4.ip_unprivileged_port_start")
                .unwrap()
        });
        assert_eq!(value, "1000");
        network.detach("pod").unwrap();
        for (name, value) in [
            ("kernel.hostname", "x"),
            ("net.nothing", "1"),
            ("net/../kernel/hostname", "x"),
        ] {
            network.attach("pod", &with(name, value)).unwrap_err();
            assert_eq!((links(), pins()), (vec![], vec![]), "{name}");
            assert!(lock(&book.rows).is_empty());
        }
    });
}

#[test]
fn without_nf_tables_pods_are_attached_and_the_status_says_what_is_missing() {
    isolated(|| {
        // AF_NETLINK sockets of the protocol NETLINK_NETFILTER (12) are what such a kernel refuses.
        let program = seccomp::lacking_program(syscall::SOCKET, Some((2, 12)), Errno::EPROTONOSUPPORT);
        seccomp::load(&program, seccomp::FilterFlags::empty()).unwrap();
        let book = Arc::new(Book::default());
        let network = network(&book);
        attach(&network, "pod");
        let status = network.status();
        assert_eq!(status.not_ready, None);
        let said = format!("{:?}", status.findings);
        assert!(
            said.contains("keep their own address") && said.contains("nf_tables"),
            "{said}"
        );
        let ports = AttachOptions {
            port_mappings: vec![PortMapping {
                protocol: Protocol::Tcp,
                container_port: 80,
                host_port: 8080,
                host_ip: None,
            }],
            ..AttachOptions::default()
        };
        let refused = network.attach("ports", &ports).unwrap_err();
        assert_eq!(refused.to_string(), "open the pod's ports of the host");
        assert!(!lock(&book.rows).contains_key("ports"));
        network.detach("pod").unwrap();
        assert_eq!((links(), pins()), (vec![], vec![]));
    });
}

#[test]
fn packets_that_leave_the_subnet_are_masqueraded() {
    isolated(|| {
        let book = Arc::new(Book::default());
        let network = network(&book);
        let pod = attach(&network, "pod");
        let status = network.status();
        assert_eq!(status.not_ready, None);
        assert!(
            status
                .findings
                .iter()
                .any(|finding| finding.what.contains("ip_forward")),
            "{status:?}"
        );
        // This test's own namespace forwards; the host's is not touched.
        Procfs::visible()
            .unwrap()
            .sysctl("net.ipv4.ip_forward", "1")
            .unwrap();
        assert!(
            !network
                .status()
                .findings
                .iter()
                .any(|finding| finding.what.contains("ip_forward"))
        );
        if !network.status().findings.is_empty() {
            eprintln!("SKIPPED: no nf_tables: {:?}", network.status());
            return;
        }

        // A host outside, which knows no way back to the pods' subnet.
        let far = std::thread::spawn(|| {
            namespace::unshare(Kinds::NETWORK).unwrap();
            (namespace::open_own(Kind::Network).unwrap(), Rtnl::open().unwrap())
        });
        let (far, mut far_rtnl) = far.join().unwrap();
        let mut rtnl = Rtnl::open().unwrap();
        let peer_namespace = std::os::fd::AsFd::as_fd(&far);
        let pair = Pair {
            name: "near",
            alias: "test".to_owned(),
            mtu: 1500,
            peer: "far",
            peer_namespace,
        };
        rtnl.create_pair(&pair).unwrap();
        let near_index = rtnl.link_index("near").unwrap().unwrap();
        let far_index = far_rtnl.link_index("far").unwrap().unwrap();
        rtnl.add_address(near_index, [192, 0, 2, 1].into(), 24).unwrap();
        far_rtnl
            .add_address(far_index, [192, 0, 2, 2].into(), 24)
            .unwrap();
        far_rtnl.up(far_index).unwrap();
        rtnl.up(near_index).unwrap();
        let seen = inside(&pod.namespace, || dial(&far, "192.0.2.2".parse().unwrap()));
        assert_eq!(seen, "192.0.2.1");
        network.detach("pod").unwrap();
    });
}
