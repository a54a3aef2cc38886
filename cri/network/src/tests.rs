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
        let other_book: Arc<dyn super::Book> = Arc::new(Book::default());
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
        let second: Arc<dyn super::Book> = two.clone();
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
