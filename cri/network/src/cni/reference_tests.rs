//! The reference plugins of the CNI project, from the directory that `CORACLE_CNI_BIN` names.

use std::io::Read as _;
use std::net::{IpAddr, TcpStream};
use std::process::Command as Shell;
use std::sync::Arc;

use coracle_kernel::namespace::{self, Kind, Kinds};
use coracle_kernel::procfs::Procfs;
use serde_json::json;

use super::*;
use crate::netns::inside;
use crate::rtnl::{Pair, Rtnl};
use crate::tests::{Book, INSTANCE, dial, isolated, links, pins, serve_once};
use crate::{Mode, Network, PortMapping, Protocol};

struct Host {
    dir: tempfile::TempDir,
    book: Arc<Book>,
    network: Network,
}

/// A network of these plugins, in a namespace of the test's own; where there are no plugins the test is skipped.
fn with_plugins(plugins: impl Fn(&Path) -> Value + Send + 'static, test: impl FnOnce(Host) + Send + 'static) {
    let Some(bin) = std::env::var_os("CORACLE_CNI_BIN") else {
        eprintln!("SKIPPED: CORACLE_CNI_BIN does not say where the reference plugins are");
        return;
    };
    isolated(move || {
        let dir = tempfile::tempdir().unwrap();
        let conf = json!({"cniVersion": "1.1.0", "name": "net", "plugins": plugins(dir.path())});
        std::fs::create_dir(dir.path().join("net.d")).unwrap();
        std::fs::write(dir.path().join("net.d/10-net.conflist"), conf.to_string()).unwrap();
        let book = Arc::new(Book::default());
        let config = CniConfig {
            conf_dir: dir.path().join("net.d"),
            bin_dirs: vec![bin.into()],
            ..CniConfig::default()
        };
        let rows: Arc<dyn crate::Book> = book.clone();
        let network = Network::new(INSTANCE, Mode::Cni(config), rows).unwrap();
        assert_eq!(network.status().not_ready, None);
        test(Host { dir, book, network });
    });
}

fn host_local(dir: &Path, subnets: &[&str]) -> Value {
    let ranges: Vec<_> = subnets.iter().map(|subnet| json!([{"subnet": subnet}])).collect();
    json!({"type": "host-local", "dataDir": dir.join("leases"), "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]})
}

impl Host {
    /// Addresses that host-local holds.
    fn leases(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.dir.path().join("leases/net")) else {
            return Vec::new();
        };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| !name.starts_with("l")).collect();
        names.sort();
        names
    }

    fn no_pod_is_left(&self, links_left: &[&str]) {
        assert_eq!(links(), links_left);
        assert_eq!((pins(), self.leases()), (vec![], vec![]));
        assert!(lock(&self.book.rows).is_empty());
    }
}

fn iptables() -> String {
    let rules = Shell::new("iptables-save").output().unwrap();
    assert!(rules.status.success());
    String::from_utf8(rules.stdout).unwrap()
}

fn said(command: &[&str]) -> String {
    let output = Shell::new(command[0]).args(&command[1..]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn options() -> AttachOptions {
    AttachOptions {
        annotations: [
            ("kubernetes.io/ingress-bandwidth", "10M"),
            ("kubernetes.io/egress-bandwidth", "20M"),
            ("cni.coracle/mac", "c2:11:22:33:44:55"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into(),
        port_mappings: vec![PortMapping {
            protocol: Protocol::Tcp,
            container_port: 80,
            host_port: 8080,
            host_ip: None,
        }],
        ..AttachOptions::default()
    }
}

#[test]
fn the_whole_chain_connects_a_pod_and_leaves_nothing() {
    let plugins = |dir: &Path| {
        json!([
            {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
             "ipam": host_local(dir, &["10.77.0.0/24", "fd77::/64"])},
            {"type": "tuning", "capabilities": {"mac": true}, "sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1"}},
            {"type": "bandwidth", "capabilities": {"bandwidth": true}},
            {"type": "firewall"},
            {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
        ])
    };
    with_plugins(plugins, |host| {
        let network = &host.network;
        let mut watch = network.watch().unwrap().unwrap();
        network.refresh(&mut watch).unwrap();
        assert_eq!(
            network.status().not_ready,
            None,
            "STATUS and GC are answered, if only as done"
        );

        let pod = network.attach("pod", &options()).unwrap();
        let ips: Vec<_> = pod.ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.77.0.2", "fd77::2"]);
        assert_eq!(dial(&pod.namespace, pod.ips[0]), "10.77.0.1");
        let inside_of =
            |path: &'static str| inside(&pod.namespace, || std::fs::read_to_string(path).unwrap());
        assert!(inside_of("/proc/thread-self/net/if_inet6").contains("fd770000000000000000000000000002"));
        let filter = inside(&pod.namespace, || {
            Procfs::visible()
                .unwrap()
                .read_sysctl("net.ipv4.conf.eth0.arp_filter")
                .unwrap()
        });
        assert_eq!(filter, "1");
        let mac = inside(&pod.namespace, || said(&["ip", "-o", "link", "show", "eth0"]));
        assert!(mac.contains("c2:11:22:33:44:55"), "{mac}");
        let limits = said(&["tc", "qdisc", "show"]);
        assert!(limits.contains("10Mbit") && limits.contains("20Mbit"), "{limits}");

        // The host's port leads to the pod.
        let server = serve_once(&pod.namespace, "10.77.0.2:80");
        let mut stream = TcpStream::connect(("10.77.0.1", 8080)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(!text.is_empty());
        server.join().unwrap();
        assert!(iptables().contains("8080"));

        network.check("pod").unwrap();
        let other = network.attach("other", &AttachOptions::default()).unwrap();
        let seen = inside(&other.namespace, || dial(&pod.namespace, pod.ips[0]));
        assert_eq!(seen, other.ips[0].to_string());

        inside(&pod.namespace, || {
            said(&["ip", "address", "del", "10.77.0.2/24", "dev", "eth0"])
        });
        let error = crate::chain_text(&network.check("pod").unwrap_err());
        assert!(error.contains("refused CHECK"), "{error}");

        network.detach("pod").unwrap();
        assert_eq!(host.leases(), ["10.77.0.3", "fd77::3"]);
        assert!(!iptables().contains("8080"));
        // The namespace went without us, as in a reboot.
        network.pins.remove("other").unwrap();
        drop(other);
        network.detach("other").unwrap();
        host.no_pod_is_left(&["cni0"]);
        assert!(!iptables().contains("10.77.0"), "{}", iptables());
        assert!(!said(&["tc", "qdisc", "show"]).contains("Mbit"));
    });
}

#[test]
fn point_to_point_links_work() {
    let plugins = |dir: &Path| {
        json!([
            {"type": "ptp", "ipam": host_local(dir, &["10.78.0.0/24"])},
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ])
    };
    with_plugins(plugins, |host| {
        let pod = host.network.attach("pod", &options()).unwrap();
        assert_eq!(pod.ips, ["10.78.0.2".parse::<IpAddr>().unwrap()]);
        assert_eq!(dial(&pod.namespace, pod.ips[0]), "10.78.0.1");
        host.network.detach("pod").unwrap();
        host.no_pod_is_left(&[]);
    });
}

#[test]
fn macvlan_gives_the_pod_a_place_on_the_wire() {
    let plugins = |dir: &Path| {
        let ipam = host_local(dir, &["10.79.0.0/24"]);
        json!([{"type": "macvlan", "master": "wire", "mode": "bridge", "ipam": ipam}])
    };
    with_plugins(plugins, |host| {
        // The other end of the wire is another host.
        let far = std::thread::spawn(|| {
            namespace::unshare(Kinds::NETWORK).unwrap();
            (namespace::open_own(Kind::Network).unwrap(), Rtnl::open().unwrap())
        });
        let (far, mut far_rtnl) = far.join().unwrap();
        let mut rtnl = Rtnl::open().unwrap();
        let pair = Pair {
            name: "wire",
            alias: "test".to_owned(),
            mtu: 1500,
            peer: "far",
            peer_namespace: std::os::fd::AsFd::as_fd(&far),
        };
        rtnl.create_pair(&pair).unwrap();
        let far_index = far_rtnl.link_index("far").unwrap().unwrap();
        far_rtnl
            .add_address(far_index, [10, 79, 0, 99].into(), 24)
            .unwrap();
        far_rtnl.up(far_index).unwrap();
        let near_index = rtnl.link_index("wire").unwrap().unwrap();
        rtnl.up(near_index).unwrap();

        let pod = host.network.attach("pod", &AttachOptions::default()).unwrap();
        let seen = inside(&far, || dial(&pod.namespace, pod.ips[0]));
        assert_eq!(seen, "10.79.0.99");
        host.network.detach("pod").unwrap();
        host.no_pod_is_left(&["wire"]);
    });
}
