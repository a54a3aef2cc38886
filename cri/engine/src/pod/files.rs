//! The pod's files: `resolv.conf`, `hostname` and `hosts`, which each of its containers gets mounted unless its request
//! mounts something else there (a kubelet brings a `hosts` of its own).
//!
//! They are written below the pod's directory; the monitor copies them into a small file system of the pod's.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::path::Path;

use coracle_proto::cri::{DnsConfig, PodSandboxConfig};
use tracing::warn;

use super::PodHandle;
use crate::container::blocking;
use crate::core::Core;
use crate::error::{Context as _, Error, Result};
use crate::record::NetworkRecord;
use crate::view::is_host_network;

/// Such a file of a host is far below it.
const HOST_FILE_BYTES: u64 = 64 << 10;

/// Where systemd-resolved writes the servers that it asks itself, for those who cannot ask it.
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

/// What of `/etc/hosts` does not depend on the pod, as the kubelet writes it.
const LOCAL_NAMES: &str = "\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::\tip6-localnet
fe00::\tip6-mcastprefix
fe00::1\tip6-allnodes
fe00::2\tip6-allrouters
";

/// Writes what is known before there is a network.
pub(super) async fn write_names(pod: &PodHandle, config: &PodSandboxConfig) -> Result<()> {
    let core = pod.core();
    let dir = core.paths.pod(pod.id());
    let hostname = hostname(core, config);
    let resolv = config.dns_config.as_ref().map(resolv_conf).transpose()?;
    let on_host = is_host_network(config);
    blocking(move || -> io::Result<()> {
        let files = dir.join("files");
        for dir in [&dir.join("shm"), &files, &dir.join("containers")] {
            fs::create_dir_all(dir)?;
        }
        fs::write(files.join("hostname"), format!("{hostname}\n"))?;
        let of_host = || host_resolv_conf(Path::new("/etc/resolv.conf"), Path::new(UPSTREAM), on_host);
        fs::write(files.join("resolv.conf"), resolv.unwrap_or_else(of_host))
    })
    .await?
    .step("write the pod's files")
}

/// Writes `hosts`, which tells the pod's own addresses.
pub(super) async fn write_hosts(
    pod: &PodHandle,
    config: &PodSandboxConfig,
    network: Option<&NetworkRecord>,
) -> Result<()> {
    let path = pod.core().paths.pod(pod.id()).join("files/hosts");
    let hostname = hostname(pod.core(), config);
    let hosts = network.map(|network| hosts(&hostname, &network.ips));
    blocking(move || fs::write(path, hosts.unwrap_or_else(|| host_file(Path::new("/etc/hosts")))))
        .await?
        .step("write the pod's hosts file")
}

/// The pod's host name; the host's for a pod on its network.
pub(super) fn hostname(core: &Core, config: &PodSandboxConfig) -> String {
    if config.hostname.is_empty() {
        core.facts.hostname.clone()
    } else {
        config.hostname.clone()
    }
}

fn hosts(hostname: &str, ips: &[String]) -> String {
    let own = ips.iter().map(|ip| format!("{ip}\t{hostname}\n"));
    LOCAL_NAMES.to_owned() + &own.collect::<String>()
}

/// A resolver file of what the request says; nothing in it may start a line of its own.
fn resolv_conf(dns: &DnsConfig) -> Result<String> {
    let fields = [
        ("servers", &dns.servers),
        ("searches", &dns.searches),
        ("options", &dns.options),
    ];
    for (field, values) in fields {
        if values
            .iter()
            .any(|value| value.chars().any(|c| c.is_control() || c.is_whitespace()))
        {
            return Err(Error::invalid(
                format!("config.dns_config.{field}"),
                "holds white space",
            ));
        }
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    Ok(text)
}

/// The host's resolver file. One that names nothing but a server at the host's loopback address (the stub of
/// systemd-resolved) is of no use in another network: its place takes the file with the servers behind that.
fn host_resolv_conf(path: &Path, upstream: &Path, on_host: bool) -> String {
    let text = host_file(path);
    if on_host || !names_only_loopback(&text) {
        return text;
    }
    let behind = host_file(upstream);
    if names_only_loopback(&behind) || behind.is_empty() {
        warn!(
            path = %path.display(),
            "it names nothing but servers at the host's loopback address: pods cannot ask them"
        );
        return text;
    }
    behind
}

/// Whether it names servers, and all of them are the host's own.
fn names_only_loopback(text: &str) -> bool {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver"))
            .then(|| words.next())
            .flatten()
    });
    let mut servers = servers.map(|server| {
        let address: Result<IpAddr, _> = server.parse();
        address.is_ok_and(|address| address.is_loopback())
    });
    servers
        .next()
        .is_some_and(|first| first && servers.all(|loopback| loopback))
}

/// A small file of the host; a host without one has nothing to offer, neither has its pod.
fn host_file(path: &Path) -> String {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(HOST_FILE_BYTES + 1).read_to_string(&mut text));
    match read {
        Ok(length) if length as u64 <= HOST_FILE_BYTES => text,
        Ok(_) => {
            warn!(path = %path.display(), "larger than {HOST_FILE_BYTES} bytes: pods get an empty one");
            String::new()
        }
        Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resolver_file_says_what_the_request_says() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.10".into(), "fd00::a".into()],
            searches: vec!["default.svc.cluster.local".into(), "cluster.local".into()],
            options: vec!["ndots:5".into()],
        };
        let expected = "search default.svc.cluster.local cluster.local\n\
                        nameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n";
        assert_eq!(resolv_conf(&dns).unwrap(), expected);
        assert_eq!(resolv_conf(&DnsConfig::default()).unwrap(), "");
    }

    #[test]
    fn nothing_in_it_starts_a_line_of_its_own() {
        for bad in ["10.0.0.1\nnameserver 6.6.6.6", "a b", "x\r", "\0"] {
            let dns = DnsConfig {
                servers: vec![bad.into()],
                ..Default::default()
            };
            assert!(resolv_conf(&dns).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_huge_or_absent_file_of_the_host_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        assert_eq!(host_file(&path), "");
        fs::write(&path, "#".repeat(100_000)).unwrap();
        assert_eq!(host_file(&path), "");
        fs::write(&path, "nameserver 1.1.1.1\n").unwrap();
        assert_eq!(host_file(&path), "nameserver 1.1.1.1\n");
    }

    #[test]
    fn a_stub_at_the_hosts_loopback_is_replaced_by_what_is_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, upstream) = (dir.path().join("resolv.conf"), dir.path().join("upstream"));
        let made = |text: &str, on_host| {
            fs::write(&path, text).unwrap();
            host_resolv_conf(&path, &upstream, on_host)
        };
        let (stub, real) = ("nameserver 127.0.0.53\noptions edns0\n", "nameserver 192.0.2.1\n");
        assert_eq!(made(stub, false), stub, "there is nothing else");
        fs::write(&upstream, real).unwrap();
        assert_eq!(made(stub, false), real);
        assert_eq!(made(stub, true), stub, "the host itself can ask it");
        assert_eq!(made("nameserver ::1\n", false), real);
        let mixed = "nameserver 127.0.0.1\nnameserver 192.0.2.7\n";
        assert_eq!(made(mixed, false), mixed);
        assert_eq!(made("search x\n", false), "search x\n");
    }

    #[test]
    fn a_pod_knows_its_own_name() {
        let text = hosts("web", &["10.88.0.5".to_owned(), "fd00::5".to_owned()]);
        assert!(
            text.starts_with("127.0.0.1\tlocalhost\n::1\tlocalhost "),
            "{text}"
        );
        assert!(text.ends_with("\n10.88.0.5\tweb\nfd00::5\tweb\n"), "{text}");
    }
}
