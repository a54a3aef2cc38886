//! A plugin of the tests' own, which misbehaves as it is told to, and the places that it works in.

mod network;
mod pods;

use std::process::{Command as Shell, Stdio};
use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::tests::{Book, INSTANCE, links, pins};
use crate::{Mode, Network, PodIdentity, PortMapping, Protocol};

/// What the plugin does by default, and what it does when told so by the file `<name>.<command>` beside its log.
const SCRIPT: &str = r#"#!/bin/sh
name=${0##*/}
echo "$name $CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS" >> DIR/calls
cat > DIR/$name.$CNI_COMMAND.request
env > DIR/$name.$CNI_COMMAND.env
pwd > DIR/$name.cwd
ls /proc/self/fd | wc -l > DIR/$name.fds
mode=
[ -e DIR/$name.$CNI_COMMAND ] && mode=$(cat DIR/$name.$CNI_COMMAND)
case "$mode" in
  refuse) echo '{"cniVersion":"1.0.0","code":11,"msg":"not now","details":"the reason"}'; exit 1 ;;
  unknown) echo '{"code":3,"msg":"never seen"}'; exit 1 ;;
  die) echo oops >&2; exit 3 ;;
  complain) echo oops; exit 3 ;;
  kill) kill -9 $$ ;;
  hang) sleep 1000 & echo $! > DIR/sleeper; wait ;;
  rubbish) echo hello; exit 0 ;;
  empty) exit 0 ;;
  flood) exec cat /dev/zero ;;
  close) exec >&- 2>&-; exit 0 ;;
  talk) head -c 3000000 /dev/zero | tr '\0' x >&2 ;;
  background) sleep 1000 & echo $! > DIR/sleeper ;;
  homeless) echo '{"cniVersion":"1.0.0"}'; exit 0 ;;
  late-death) echo '{"cniVersion":"1.0.0","ips":[{"address":"10.9.0.2/24"}]}'; exit 1 ;;
esac
[ "$CNI_COMMAND" = ADD ] && cat DIR/$name.answer
exit 0
"#;

/// Directories of one test, with the plugins `one` and `two`.
struct Host {
    dir: tempfile::TempDir,
    book: Arc<Book>,
}

impl Host {
    fn new() -> Host {
        let host = Host {
            dir: tempfile::tempdir().unwrap(),
            book: Arc::default(),
        };
        for dir in ["net.d", "bin"] {
            std::fs::create_dir(host.path(dir)).unwrap();
        }
        for plugin in ["one", "two"] {
            host.install(plugin);
        }
        let answer = |version: &str| {
            json!({
                "cniVersion": version,
                "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "x"}],
                "ips": [{"address": "fd00::2/64", "interface": 1}, {"address": "10.9.0.2/24", "interface": 1}],
            })
        };
        host.write("one.answer", &answer("1.0.0").to_string());
        host.write("two.answer", &answer("1.0.0").to_string());
        host.conf("1.0.0");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// Writes the plugin in a process of its own: a descriptor of it that another test's child had for a moment would
    /// keep it from being executed.
    fn install(&self, plugin: &str) {
        let text = SCRIPT.replace("DIR", self.dir.path().to_str().unwrap());
        let path = self.path("bin").join(plugin);
        let mut shell = Shell::new("sh")
            .args(["-c", "cat > \"$0\" && chmod 755 \"$0\""])
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut shell.stdin.take().unwrap(), text.as_bytes()).unwrap();
        assert!(shell.wait().unwrap().success());
    }

    fn conf(&self, version: &str) {
        let conf = json!({
            "cniVersion": version,
            "name": "net",
            "plugins": [
                {"type": "one", "keep": {"this": [1]}},
                {"type": "two", "capabilities": {"portMappings": true, "bandwidth": false}},
            ],
        });
        self.write("net.d/10-net.conflist", &conf.to_string());
    }

    fn config(&self) -> CniConfig {
        CniConfig {
            conf_dir: self.path("net.d"),
            bin_dirs: vec![self.path("absent"), self.path("bin")],
            timeout: Duration::from_secs(60),
            template: Some(self.path("template")),
            pod_cidr_file: Some(self.path("pod-cidr")),
        }
    }

    fn network(&self) -> Network {
        self.network_with(self.config())
    }

    fn network_with(&self, config: CniConfig) -> Network {
        let book: Arc<dyn crate::Book> = self.book.clone();
        Network::new(INSTANCE, Mode::Cni(config), book).unwrap()
    }

    /// Has a plugin misbehave from now on.
    fn tell(&self, plugin: &str, command: &str, mode: &str) {
        self.write(&format!("{plugin}.{command}"), mode);
    }

    fn heal(&self, plugin: &str, command: &str) {
        std::fs::remove_file(self.path(&format!("{plugin}.{command}"))).unwrap();
    }

    /// What was called since the last time, without the namespace.
    fn calls(&self) -> Vec<String> {
        let calls = std::fs::read_to_string(self.path("calls")).unwrap_or_default();
        let _ = std::fs::remove_file(self.path("calls"));
        let words = calls
            .lines()
            .map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" "));
        words.collect()
    }

    fn request(&self, plugin: &str, command: &str) -> Value {
        serde_json::from_str(&self.read(&format!("{plugin}.{command}.request"))).unwrap()
    }

    fn variable(&self, plugin: &str, command: &str, name: &str) -> Option<String> {
        let env = self.read(&format!("{plugin}.{command}.env"));
        let value = env
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name}=")));
        value.map(str::to_owned)
    }

    fn nothing_is_left(&self) {
        assert_eq!((links(), pins()), (vec![], vec![]));
        assert!(lock(&self.book.rows).is_empty());
    }

    /// Whether the process that the plugin left is there.
    fn sleeper_is_alive(&self) -> bool {
        let pid = self.read("sleeper");
        let status = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        !status.is_empty() && !status.contains(") Z ")
    }
}

fn options() -> AttachOptions {
    AttachOptions {
        identity: PodIdentity {
            namespace: "default".into(),
            name: "web".into(),
            uid: "1-2".into(),
        },
        port_mappings: vec![PortMapping {
            protocol: Protocol::Tcp,
            container_port: 80,
            host_port: 8080,
            host_ip: None,
        }],
        ..AttachOptions::default()
    }
}

fn failure(outcome: crate::Result<impl Sized>) -> String {
    crate::chain_text(&outcome.err().unwrap())
}

/// Tries again what is due; what is taken down.
fn retry_due(network: &Network) -> Vec<String> {
    let mut pods = network.due(|_| false).pods;
    pods.retain(|pod| network.retry(pod));
    pods
}

/// Tries again until everything is taken down, each pod when it is due.
#[allow(clippy::disallowed_methods, reason = "the pause is what the network asks for")]
pub(crate) fn retry_until_done(network: &Network) {
    loop {
        retry_due(network);
        let due = network.due(|_| false);
        match due.next {
            _ if !due.pods.is_empty() => {}
            Some(next) => std::thread::sleep(next),
            None => return,
        }
    }
}
