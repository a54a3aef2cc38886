//! The configuration: `config.toml`, then `config.d/*.toml` in order of their names, every key optional.
//!
//! An unknown key is an error that names file, line and the nearest known key. Sizes are read before they are
//! parsed: a file above 1 MiB is refused.

use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use coracle_network::SubnetV6;
use serde::{Deserialize, Serialize};
use toml::Table;
use toml::de::{DeTable, DeValue};

/// Where the configuration is looked for when `--config` does not say.
pub(crate) const DEFAULT_PATH: &str = "/etc/coracle/config.toml";

const FILE_LIMIT_BYTES: u64 = 1 << 20;

/// Everything that an operator may set; `coracled config --default` prints it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// The CRI socket.
    pub(crate) server: Server,
    /// How containers are run.
    pub(crate) runtime: Runtime,
    /// Where images come from and how they are kept.
    pub(crate) image: Image,
    /// Pod networks.
    pub(crate) network: Network,
    /// Sessions: exec, attach, port-forward.
    pub(crate) stream: Stream,
    /// What a request that leaves a field unset means.
    pub(crate) defaults: Defaults,
}

/// `[server]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Server {
    /// Path of the CRI socket.
    pub(crate) socket: PathBuf,
    /// Group that may connect (the socket is then 0660 instead of 0600): a name of /etc/group or a number.
    pub(crate) socket_group: String,
}

/// `[runtime]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Runtime {
    /// The `coracle` binary; empty: beside `coracled`'s own.
    pub(crate) binary: PathBuf,
    /// Who makes cgroups.
    pub(crate) cgroup_driver: CgroupDriver,
    /// How overlay file systems are mounted.
    pub(crate) mount_api: MountApi,
}

/// Who makes cgroups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CgroupDriver {
    /// `cgroupfs`.
    #[default]
    Auto,
    /// Directories below the cgroup mounts.
    Cgroupfs,
    /// Transient units of systemd: refused, not part of this release.
    Systemd,
}

/// How overlay file systems are mounted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum MountApi {
    /// The best way that the kernel has.
    #[default]
    Auto,
    /// mount(2) in a private namespace.
    Legacy,
}

/// `[image]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Image {
    /// User id of the processes that talk to registries.
    pub(crate) fetch_uid: u32,
    /// Directory of `<host>/hosts.toml`.
    pub(crate) certs_dir: PathBuf,
}

/// `[network]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Network {
    /// Who connects pods.
    pub(crate) mode: NetworkMode,
    /// Addresses of the built-in bridge's pods, `a.b.c.d/len`.
    pub(crate) subnet: String,
    /// IPv6 addresses beside them, a prefix of 64 to 120 bits with at least as many, best one of your own out of
    /// fd00::/8: `fd7a:9e3c:41b0::/64`. Empty for none.
    pub(crate) subnet_v6: String,
    /// MTU of the built-in bridge; 0 for that of the device of the host's default route. It lasts as long as the
    /// bridge, which goes with the last pod.
    pub(crate) mtu: u32,
    /// Directory of CNI configurations; the first valid one by name is the network.
    pub(crate) cni_conf_dir: PathBuf,
    /// Where CNI plugins are looked for, in this order.
    pub(crate) cni_bin_dirs: Vec<PathBuf>,
    /// How long the plugins of one pod may take for one operation, all together.
    pub(crate) cni_timeout_seconds: u32,
    /// Template of a CNI configuration, filled in with the kubelet's pod CIDR where there is no other; empty: none.
    pub(crate) cni_conf_template: PathBuf,
}

/// Who connects pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum NetworkMode {
    /// CNI plugins.
    #[default]
    Cni,
    /// The built-in bridge.
    Bridge,
}

/// `[stream]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Stream {
    /// Where sessions are served, an address of the node that its kubelet connects to: a loopback address unless there
    /// is a certificate; port 0 is any free one.
    pub(crate) address: SocketAddr,
    /// PEM file with the certificate for that address, and those that lead to its authority; empty: no TLS.
    pub(crate) tls_cert: PathBuf,
    /// PEM file with its private key, which not every user may open.
    pub(crate) tls_key: PathBuf,
}

/// `[defaults]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Defaults {
    /// What a container without a seccomp profile gets.
    pub(crate) unset_seccomp: UnsetSeccomp,
}

/// What a container without a seccomp profile gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum UnsetSeccomp {
    /// The runtime's default profile.
    #[default]
    Runtime,
    /// No filter.
    Unconfined,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            socket: "/run/coracle/coracle.sock".into(),
            socket_group: String::new(),
        }
    }
}

impl Default for Image {
    fn default() -> Self {
        Self {
            fetch_uid: 65533,
            certs_dir: "/etc/coracle/certs.d".into(),
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            mode: NetworkMode::default(),
            subnet: "10.244.0.0/16".into(),
            subnet_v6: String::new(),
            mtu: 1500,
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_bin_dirs: vec!["/opt/cni/bin".into()],
            cni_timeout_seconds: 90,
            cni_conf_template: PathBuf::new(),
        }
    }
}

impl Default for Stream {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            tls_cert: PathBuf::new(),
            tls_key: PathBuf::new(),
        }
    }
}

impl Config {
    /// Reads `path` and the drop-ins of the `config.d` beside it; an absent file is an error only when it was
    /// named by the operator.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self> {
        let main = path.unwrap_or(Path::new(DEFAULT_PATH));
        let mut merged = Table::new();
        if path.is_some() || main.exists() {
            merge(&mut merged, read_table(main)?);
        }
        for drop_in in drop_ins(main)? {
            merge(&mut merged, read_table(&drop_in)?);
        }
        let config: Self = merged.try_into().context("configuration")?;
        config.validate()?;
        Ok(config)
    }

    /// The address and prefix length of `[network] subnet`.
    pub(crate) fn subnet(&self) -> Result<(Ipv4Addr, u8)> {
        let text = &self.network.subnet;
        let (address, length) = text
            .split_once('/')
            .with_context(|| format!("[network] subnet {text:?} is not a.b.c.d/len"))?;
        let address: Ipv4Addr = address
            .parse()
            .with_context(|| format!("[network] subnet {text:?}"))?;
        let length: u8 = length
            .parse()
            .with_context(|| format!("[network] subnet {text:?}"))?;
        ensure!(
            (8..=29).contains(&length),
            "[network] subnet {text:?}: the prefix must be 8 to 29 bits long"
        );
        Ok((address, length))
    }

    /// `[network] subnet_v6`, if there is one.
    pub(crate) fn subnet_v6(&self) -> Result<Option<SubnetV6>> {
        if self.network.subnet_v6.is_empty() {
            return Ok(None);
        }
        let subnet: SubnetV6 = self.network.subnet_v6.parse().context("[network] subnet_v6")?;
        Ok(Some(subnet))
    }

    fn validate(&self) -> Result<()> {
        let (_, length) = self.subnet()?;
        if let Some(v6) = self.subnet_v6()? {
            ensure!(
                128 - v6.prefix() >= 32 - length,
                "[network] subnet_v6 {v6} has fewer addresses than [network] subnet {}",
                self.network.subnet
            );
        }
        let mtu = self.network.mtu;
        // IPv6 has no smaller links.
        let least = if self.network.subnet_v6.is_empty() {
            576
        } else {
            1280
        };
        ensure!(
            mtu == 0 || (least..=65535).contains(&mtu),
            "[network] mtu {mtu} is not 0, nor within {least} and 65535"
        );
        ensure!(
            (1..=3600).contains(&self.network.cni_timeout_seconds),
            "[network] cni_timeout_seconds {} is not within 1 and 3600",
            self.network.cni_timeout_seconds
        );
        // They become a list with colons for the plugins.
        let dirs = &self.network.cni_bin_dirs;
        ensure!(
            !dirs.is_empty() && !dirs.iter().any(|dir| dir.to_string_lossy().contains(':')),
            "[network] cni_bin_dirs is empty, or one of them has a colon in it"
        );
        ensure!(
            self.runtime.cgroup_driver != CgroupDriver::Systemd,
            "[runtime] cgroup_driver = \"systemd\" is not part of this release; use \"cgroupfs\", and the same in the kubelet"
        );
        let Stream {
            address,
            tls_cert,
            tls_key,
        } = &self.stream;
        let set = |path: &PathBuf| !path.as_os_str().is_empty();
        ensure!(
            set(tls_cert) == set(tls_key),
            "[stream] tls_cert and tls_key go together: one of them is not set"
        );
        ensure!(
            set(tls_cert) || address.ip().is_loopback(),
            "[stream] address {address}: without tls_cert and tls_key sessions are not encrypted, so they are served at \
             loopback addresses alone"
        );
        ensure!(
            !address.ip().is_unspecified(),
            "[stream] address {address}: it stands in the URLs that the kubelet connects to, so it must be one address"
        );
        ensure!(self.image.fetch_uid != 0, "[image] fetch_uid must not be root");
        let template = Some(&self.network.cni_conf_template).filter(|path| !path.as_os_str().is_empty());
        let cni = template
            .map(|path| ("[network] cni_conf_template", path))
            .into_iter();
        let tls = [("[stream] tls_cert", tls_cert), ("[stream] tls_key", tls_key)];
        let cni = cni.chain(tls.into_iter().filter(|(_, path)| set(path)));
        let cni = cni.chain(
            self.network
                .cni_bin_dirs
                .iter()
                .map(|dir| ("[network] cni_bin_dirs", dir)),
        );
        for (key, path) in [
            ("[server] socket", &self.server.socket),
            ("[image] certs_dir", &self.image.certs_dir),
            ("[network] cni_conf_dir", &self.network.cni_conf_dir),
        ]
        .into_iter()
        .chain(cni)
        {
            ensure!(
                path.is_absolute(),
                "{key} {} is not an absolute path",
                path.display()
            );
        }
        Ok(())
    }
}

/// `config.d/*.toml` beside the main file, by name.
fn drop_ins(main: &Path) -> Result<Vec<PathBuf>> {
    let dir = main.with_file_name("config.d");
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("list {}", dir.display())),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("list {}", dir.display()))?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn read_table(path: &Path) -> Result<Table> {
    let mut text = String::new();
    File::open(path)
        .with_context(|| format!("open {}", path.display()))?
        .take(FILE_LIMIT_BYTES + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("read {}", path.display()))?;
    ensure!(
        text.len() as u64 <= FILE_LIMIT_BYTES,
        "{} is larger than 1 MiB",
        path.display()
    );
    check_keys(path, &text)?;
    // By itself, for the line of a value that cannot be.
    toml::from_str::<Config>(&text).map_err(|error| in_one_line(path, &text, &error))?;
    toml::from_str(&text).map_err(|error| in_one_line(path, &text, &error))
}

/// The parser's own words come with a picture of the place.
fn in_one_line(path: &Path, text: &str, error: &toml::de::Error) -> anyhow::Error {
    let number = line(text, error.span().unwrap_or_default().start);
    let words: String = text
        .lines()
        .nth(number - 1)
        .unwrap_or_default()
        .chars()
        .take(80)
        .collect();
    let message = error.message().replace('\n', ", ");
    anyhow::anyhow!("{}:{number}: {:?}: {message}", path.display(), words.trim())
}

/// Names the first key that no section knows, with its line and the nearest known one.
fn check_keys(path: &Path, text: &str) -> Result<()> {
    let document = DeTable::parse(text).map_err(|error| in_one_line(path, text, &error))?;
    let known = known_keys();
    for (section, value) in document.get_ref() {
        let DeValue::Table(keys) = value.get_ref() else {
            bail!(
                "{}:{}: {:?} must be a section",
                path.display(),
                line(text, section.span().start),
                section.get_ref()
            );
        };
        let Some(Some(section_keys)) = known.get(section.get_ref().as_ref()).map(toml::Value::as_table)
        else {
            return Err(unknown(
                path,
                text,
                section.span().start,
                section.get_ref(),
                known.keys(),
            ));
        };
        for key in keys.keys() {
            if !section_keys.contains_key(key.get_ref().as_ref()) {
                return Err(unknown(
                    path,
                    text,
                    key.span().start,
                    key.get_ref(),
                    section_keys.keys(),
                ));
            }
        }
    }
    Ok(())
}

/// The default configuration has every key: what it serialises to is the list of known ones.
fn known_keys() -> Table {
    Table::try_from(Config::default()).unwrap_or_default()
}

fn unknown<'k>(
    path: &Path,
    text: &str,
    at: usize,
    key: &str,
    known: impl Iterator<Item = &'k String>,
) -> anyhow::Error {
    let nearest = known
        .min_by_key(|candidate| distance(key, candidate))
        .map_or("", String::as_str);
    anyhow::anyhow!(
        "{}:{}: unknown key {key:?}; did you mean {nearest:?}?",
        path.display(),
        line(text, at)
    )
}

fn line(text: &str, offset: usize) -> usize {
    1 + text
        .as_bytes()
        .iter()
        .take(offset)
        .filter(|byte| **byte == b'\n')
        .count()
}

/// Levenshtein distance of two short words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(files: &[(&str, &str)]) -> Result<Config> {
        let dir = tempfile::tempdir()?;
        std::fs::create_dir(dir.path().join("config.d"))?;
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text)?;
        }
        Config::load(Some(&dir.path().join("config.toml")))
    }

    #[test]
    fn the_printed_default_is_accepted() {
        let text = toml::to_string(&Config::default()).unwrap();
        assert_eq!(load(&[("config.toml", &text)]).unwrap(), Config::default());
    }

    #[test]
    fn drop_ins_override_in_order() {
        let config = load(&[
            ("config.toml", "[network]\nmode = \"bridge\"\nmtu = 1400\n"),
            ("config.d/20-b.toml", "[network]\nmtu = 9000\n"),
            ("config.d/10-a.toml", "[network]\nmtu = 1300\n"),
            ("config.d/ignored.txt", "nonsense"),
        ])
        .unwrap();
        assert_eq!(
            (config.network.mode, config.network.mtu),
            (NetworkMode::Bridge, 9000)
        );
    }

    #[test]
    fn unknown_keys_name_file_line_and_the_nearest_key() {
        for (text, line, key, nearest) in [
            (
                "[server]\nsocket = \"/x\"\nsocketgroup = \"a\"\n",
                3,
                "socketgroup",
                "socket_group",
            ),
            ("\n[netwrok]\nmtu = 1\n", 2, "netwrok", "network"),
            ("[image]\nfetch_iud = 3\n", 2, "fetch_iud", "fetch_uid"),
        ] {
            let error = format!("{:#}", load(&[("config.toml", text)]).unwrap_err());
            assert!(error.contains(&format!("config.toml:{line}: ")), "{error}");
            assert!(error.contains(key) && error.contains(nearest), "{error}");
        }
    }

    #[test]
    fn sessions_leave_the_loopback_only_with_a_certificate() {
        let pair = "tls_cert = \"/x/cert\"\ntls_key = \"/x/key\"\n";
        for (text, part) in [
            ("address = \"192.0.2.1:0\"", "not encrypted"),
            ("tls_cert = \"/x/cert\"", "go together"),
            ("tls_key = \"/x/key\"", "go together"),
            (
                "tls_cert = \"cert\"\ntls_key = \"/x/key\"",
                "tls_cert cert is not",
            ),
            (&format!("address = \"0.0.0.0:1\"\n{pair}"), "must be one address"),
        ] {
            let text = format!("[stream]\n{text}\n");
            let error = load(&[("config.toml", &text)]).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let text = format!("[stream]\naddress = \"192.0.2.1:0\"\n{pair}");
        let config = load(&[("config.toml", &text)]).unwrap();
        assert_eq!(config.stream.tls_key, Path::new("/x/key"));
    }

    #[test]
    fn bad_values_name_the_key() {
        for (text, part) in [
            ("[network]\nsubnet = \"10.0.0.0\"\n", "subnet"),
            ("[network]\nsubnet = \"10.0.0.0/31\"\n", "subnet"),
            ("[network]\nmtu = 5\n", "mtu"),
            ("[network]\nsubnet_v6 = \"10.0.0.0/16\"\n", "subnet_v6"),
            ("[network]\nsubnet_v6 = \"fd00::/48\"\n", "subnet_v6"),
            ("[network]\nsubnet_v6 = \"fd00::/120\"\n", "subnet_v6"),
            ("[network]\nsubnet_v6 = \"fd00::/64\"\nmtu = 1000\n", "mtu"),
            ("[network]\nmode = \"vlan\"\n", "mode"),
            ("[network]\ncni_bin_dirs = []\n", "cni_bin_dirs"),
            ("[network]\ncni_bin_dirs = [\"bin\"]\n", "cni_bin_dirs"),
            ("[network]\ncni_bin_dirs = [\"/a:/b\"]\n", "cni_bin_dirs"),
            ("[network]\ncni_conf_template = \"x\"\n", "cni_conf_template"),
            ("[network]\ncni_timeout_seconds = 0\n", "cni_timeout_seconds"),
            ("[runtime]\ncgroup_driver = \"systemd\"\n", "cgroup_driver"),
            ("[image]\nfetch_uid = 0\n", "fetch_uid"),
            ("[server]\nsocket = \"run/x\"\n", "socket"),
            ("server = 3\n", "section"),
            ("[server\n", "config.toml"),
        ] {
            let error = format!("{:#}", load(&[("config.toml", text)]).unwrap_err());
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_huge_file_is_refused_unparsed() {
        let error = load(&[("config.toml", &"#".repeat(2 << 20))])
            .unwrap_err()
            .to_string();
        assert!(error.contains("larger than 1 MiB"), "{error}");
    }
}
