//! A plugin that misbehaves in each way: what is left behind, what is said, and that it heals.

use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command as Shell, Stdio};
use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::tests::{Book, INSTANCE, isolated, links, pins};
use crate::{Error, Mode, Network, PodIdentity, PortMapping, Protocol};

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

/// Tries again until everything is taken down, each pod when it is due.
#[allow(clippy::disallowed_methods, reason = "the pause is what the network asks for")]
fn retry_until_done(network: &Network) {
    while let Some(next) = network.retry_due().next {
        std::thread::sleep(next);
    }
}

#[test]
fn plugins_are_run_as_the_specification_says() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        assert_eq!((network.mode(), network.status().not_ready), ("cni", None));
        let attached = network.attach("pod", &options()).unwrap();
        let ips: Vec<_> = attached.ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.9.0.2", "fd00::2"]);
        assert_eq!(host.calls(), ["one ADD", "two ADD"]);

        let first = host.request("one", "ADD");
        assert_eq!(
            first,
            json!({"cniVersion": "1.0.0", "name": "net", "type": "one", "keep": {"this": [1]}})
        );
        let second = host.request("two", "ADD");
        assert_eq!(second["prevResult"]["ips"][1]["address"], "10.9.0.2/24");
        assert_eq!(
            second["runtimeConfig"],
            json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""}]})
        );
        let variable = |name| host.variable("one", "ADD", name);
        for (name, value) in [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "pod"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/run/netns/coracle-0a1b2c3d-pod"),
        ] {
            assert_eq!(variable(name).as_deref(), Some(value), "{name}");
        }
        let arguments = variable("CNI_ARGS").unwrap();
        assert!(
            arguments.contains(";K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;"),
            "{arguments}"
        );
        let path = format!("{}:{}", host.path("absent").display(), host.path("bin").display());
        assert_eq!(variable("CNI_PATH"), Some(path));
        assert_eq!(
            variable("CARGO_MANIFEST_DIR"),
            None,
            "nothing of our own environment"
        );
        assert_eq!(host.read("one.cwd").trim(), "/");
        // Standard input, output, error, and the directory that ls has open.
        assert_eq!(host.read("one.fds").trim(), "4");

        network.check("pod").unwrap();
        assert_eq!(host.calls(), ["one CHECK", "two CHECK"]);
        assert_eq!(
            host.request("one", "CHECK")["prevResult"],
            attached.result.clone().unwrap()
        );
        assert_eq!(network.result("pod"), attached.result);

        // Everything that a later daemon knows comes from the row.
        drop(network);
        std::fs::remove_file(host.path("net.d/10-net.conflist")).unwrap();
        let network = host.network();
        let found = network.attachment("pod").unwrap().unwrap();
        assert_eq!((found.ips, found.result), (attached.ips, attached.result));
        network.detach("pod").unwrap();
        assert_eq!(host.calls(), ["two DEL", "one DEL"]);
        assert_eq!(host.request("one", "DEL")["prevResult"], second["prevResult"]);
        assert_eq!(
            host.request("two", "DEL")["runtimeConfig"],
            second["runtimeConfig"]
        );
        network.detach("pod").unwrap();
        assert_eq!(host.calls(), [""; 0]);
        host.nothing_is_left();
    });
}

#[test]
fn what_goes_wrong_at_add_is_said_and_undone() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        for (mode, said) in [
            (
                "refuse",
                "CNI plugin two refused ADD with code 11: not now: the reason",
            ),
            (
                "die",
                "CNI plugin two ended with status 3 at ADD, and said \"oops\"",
            ),
            ("kill", "was killed by signal 9"),
            ("rubbish", "no result: it is no JSON object"),
            ("empty", "no result: it is empty"),
            ("close", "no result: it is empty"),
            (
                "flood",
                "CNI plugin two answered more than 1 MiB to ADD and was killed",
            ),
            ("homeless", "CNI network net gave the pod no address on eth0"),
            ("late-death", "CNI plugin two ended with status 1"),
        ] {
            host.tell("two", "ADD", mode);
            let error = failure(network.attach("pod", &options()));
            assert!(error.contains(said), "{mode}: {error}");
            assert_eq!(
                host.calls(),
                ["one ADD", "two ADD", "two DEL", "one DEL"],
                "{mode}"
            );
            host.nothing_is_left();
        }
        // What is not wrong: much said beside the answer, and something left in the background with our pipes open.
        for mode in ["talk", "background"] {
            host.tell("two", "ADD", mode);
            network.attach("pod", &options()).unwrap();
            network.detach("pod").unwrap();
        }
        assert!(host.sleeper_is_alive());
        let pid: i32 = host.read("sleeper").trim().parse().unwrap();
        coracle_kernel::signal::kill(pid, coracle_kernel::signal::Signal::KILL).unwrap();
        host.nothing_is_left();
    });
}

#[test]
fn a_plugin_that_hangs_is_killed_with_everything_that_it_started() {
    isolated(|| {
        let host = Host::new();
        let network = host.network_with(CniConfig {
            timeout: Duration::from_secs(1),
            ..host.config()
        });
        host.tell("one", "ADD", "hang");
        let error = failure(network.attach("pod", &options()));
        assert!(
            error.contains("CNI plugin one did not end ADD within 1s and was killed"),
            "{error}"
        );
        assert!(!host.sleeper_is_alive());
        assert_eq!(
            host.calls(),
            ["one ADD", "two DEL", "one DEL"],
            "DEL has a time of its own"
        );
        host.nothing_is_left();
    });
}

#[test]
fn a_pod_that_cannot_be_taken_down_is_tried_again_until_it_can() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        network.attach("pod", &options()).unwrap();
        host.calls();
        for mode in ["refuse", "die", "kill", "flood"] {
            host.tell("two", "DEL", mode);
            let error = failure(network.detach("pod"));
            assert!(error.contains("CNI plugin two"), "{mode}: {error}");
            assert_eq!(host.calls(), ["two DEL"], "{mode}");
            assert_eq!((pins().len(), lock(&host.book.rows).len()), (1, 1));
            let again = network.detach("pod");
            assert!(matches!(again, Err(Error::Pending { .. })), "asked again at once");
            assert_eq!(host.calls(), [""; 0], "and not tried again at once");
            let text = format!("{:?}", network.status().findings);
            assert!(text.contains("could not be taken down"), "{text}");
            network.failures.forget("pod");
        }

        failure(network.detach("pod"));
        assert_eq!(network.retry_due().done, [""; 0], "not due yet");
        host.calls();
        host.heal("two", "DEL");
        retry_until_done(&network);
        assert_eq!(host.calls(), ["two DEL", "one DEL"]);
        assert_eq!(network.status().findings, []);
        assert_eq!(network.retry_due(), crate::Retried::default());
        network.detach("pod").unwrap();
        host.nothing_is_left();

        // A plugin that knows nothing of the pod has nothing to take down.
        network.attach("pod", &options()).unwrap();
        host.tell("one", "DEL", "unknown");
        network.detach("pod").unwrap();
        host.nothing_is_left();
    });
}

#[test]
fn a_failed_attach_whose_undoing_fails_stays_on_its_row() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        host.tell("two", "ADD", "refuse");
        host.tell("one", "DEL", "die");
        let error = failure(network.attach("pod", &options()));
        assert!(
            error.contains("not now"),
            "the first failure is the one that is told: {error}"
        );
        assert_eq!(lock(&host.book.rows).len(), 1);
        host.heal("one", "DEL");
        retry_until_done(&network);
        host.nothing_is_left();
    });
}

#[test]
fn after_a_crash_or_a_reboot_del_is_sent_for_what_nobody_knows_and_only_for_that() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        for pod in ["alive", "dead", "rebooted"] {
            network.attach(pod, &options()).unwrap();
        }
        network.pins.remove("rebooted").unwrap();
        host.calls();
        drop(network);

        let network = host.network();
        assert_eq!(network.sweep(|pod| pod == "alive").unwrap(), 2);
        assert_eq!(
            host.calls(),
            [""; 0],
            "the start of the daemon waits for no plugin"
        );
        host.tell("one", "DEL", "die");
        assert_eq!(network.retry_due().done, [""; 0]);
        host.heal("one", "DEL");
        retry_until_done(&network);
        assert_eq!(lock(&host.book.rows).keys().collect::<Vec<_>>(), ["alive"]);
        let calls = std::fs::read_to_string(host.path("calls")).unwrap();
        assert!(calls.contains("one DEL rebooted \n"), "no namespace: {calls}");
        assert!(
            calls.contains("one DEL dead /run/netns/coracle-0a1b2c3d-dead\n"),
            "{calls}"
        );
        assert!(!calls.contains("alive"), "{calls}");
        network.detach("alive").unwrap();
        host.nothing_is_left();
    });
}

#[test]
fn a_daemon_without_cni_takes_pods_down_by_their_records() {
    isolated(|| {
        let host = Host::new();
        host.network().attach("pod", &options()).unwrap();
        host.calls();
        let bridge = crate::Bridge {
            subnet: "10.123.0.0/24".parse().unwrap(),
            mtu: 1500,
            masquerade: false,
        };
        let book: Arc<dyn crate::Book> = host.book.clone();
        let network = Network::new(INSTANCE, Mode::Bridge(bridge), book).unwrap();
        assert_eq!(network.attachment("pod").unwrap().unwrap().ips.len(), 2);
        network.detach("pod").unwrap();
        assert_eq!(host.calls(), ["two DEL", "one DEL"]);
        host.nothing_is_left();
    });
}

#[test]
fn the_status_names_file_and_cure_and_follows_the_directories() {
    isolated(|| {
        let host = Host::new();
        std::fs::remove_dir_all(host.path("net.d")).unwrap();
        let network = host.network();
        let mut watch = network.watch().unwrap().unwrap();
        let mut not_ready = || {
            network.refresh(&mut watch).unwrap();
            network.status().not_ready.unwrap_or_default()
        };
        let nothing = not_ready();
        assert!(
            nothing.contains("no CNI configuration in") && nothing.contains("net.d: put one there"),
            "{nothing}"
        );
        let error = failure(network.attach("pod", &options()));
        assert!(error.contains(&nothing), "{error}");
        host.nothing_is_left();

        std::fs::create_dir(host.path("net.d")).unwrap();
        host.write("net.d/05-bad.conf", r#"{"name":"x","type":"../../bin/sh"}"#);
        let bad = not_ready();
        assert!(
            bad.contains("05-bad.conf: type \"../../bin/sh\" is not the name of a plugin"),
            "{bad}"
        );
        host.conf("1.0.0");
        assert_eq!(not_ready(), "");
        assert!(format!("{:?}", network.status().findings).contains("05-bad.conf"));

        std::fs::remove_file(host.path("bin/two")).unwrap();
        let missing = not_ready();
        assert!(
            missing.contains("10-net.conflist: CNI plugin \"two\" is not in"),
            "{missing}"
        );
        let error = failure(network.attach("pod", &options()));
        assert!(error.contains("CNI plugin \"two\" is not in"), "{error}");
        assert_eq!(
            host.calls(),
            [""; 0],
            "the first plugin is not begun without the second"
        );
        host.nothing_is_left();
        host.install("two");
        assert_eq!(not_ready(), "");
        std::fs::set_permissions(host.path("bin/two"), std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(not_ready().contains("CNI plugin \"two\" is not in"));
        std::fs::set_permissions(host.path("bin/two"), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(not_ready(), "");

        // The directory is replaced as a whole.
        std::fs::rename(host.path("net.d"), host.path("old")).unwrap();
        std::fs::create_dir(host.path("net.d")).unwrap();
        assert_eq!(not_ready(), nothing);
        host.conf("1.0.0");
        assert_eq!(not_ready(), "");
        network.attach("pod", &options()).unwrap();
        network.detach("pod").unwrap();
    });
}

#[test]
fn plugins_are_asked_for_their_status_and_told_which_pods_there_are() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        network.attach("pod", &options()).unwrap();
        let mut watch = network.watch().unwrap().unwrap();
        let mut refresh = || {
            host.calls();
            network.refresh(&mut watch).unwrap();
            host.calls()
        };
        assert_eq!(refresh(), [""; 0], "1.0.0 knows of neither");
        host.conf("1.1.0");
        assert_eq!(refresh(), ["one STATUS", "two STATUS", "one GC", "two GC"]);
        assert_eq!(
            host.request("two", "GC")["cni.dev/valid-attachments"],
            json!([{"containerID": "pod", "ifname": "eth0"}])
        );
        assert_eq!(host.variable("two", "GC", "CNI_CONTAINERID"), None);
        assert_eq!(refresh(), [""; 0], "nothing has changed");

        host.tell("two", "STATUS", "refuse");
        host.write("net.d/zz.conf", "");
        assert_eq!(
            refresh(),
            ["one STATUS", "two STATUS"],
            "the same network is not collected twice"
        );
        let why = network.status().not_ready.unwrap();
        assert!(
            why.contains("10-net.conflist is not ready: CNI plugin two refused STATUS with code 11"),
            "{why}"
        );
        host.calls();
        network.attach("other", &options()).unwrap();
        assert_eq!(
            host.calls(),
            ["one ADD", "two ADD"],
            "who asks all the same is served"
        );
        host.heal("two", "STATUS");
        host.write("net.d/zz.conf", " ");
        refresh();
        assert_eq!(network.status().not_ready, None);

        host.tell("one", "GC", "die");
        let conf =
            json!({"cniVersion": "1.1.0", "name": "other", "plugins": [{"type": "one"}, {"type": "two"}]});
        host.write("net.d/10-net.conflist", &conf.to_string());
        assert_eq!(
            refresh(),
            ["one STATUS", "two STATUS", "one GC", "two GC"],
            "one that fails keeps none"
        );
        assert_eq!(host.request("two", "GC")["cni.dev/valid-attachments"], json!([]));
        let conf =
            json!({"cniVersion": "1.1.0", "name": "third", "disableGC": true, "plugins": [{"type": "one"}]});
        host.write("net.d/10-net.conflist", &conf.to_string());
        assert_eq!(refresh(), ["one STATUS"]);
        for pod in ["pod", "other"] {
            network.detach(pod).unwrap();
        }
        host.nothing_is_left();
    });
}

#[test]
fn checks_and_results_keep_to_the_version() {
    isolated(|| {
        let host = Host::new();
        host.conf("0.3.1");
        let network = host.network();
        let attached = network.attach("pod", &options()).unwrap();
        assert_eq!(attached.result.unwrap()["cniVersion"], "0.3.1");
        host.calls();
        network.check("pod").unwrap();
        assert_eq!(host.calls(), [""; 0], "there is no CHECK before 0.4.0");
        network.detach("pod").unwrap();
        assert_eq!(host.request("one", "DEL")["prevResult"], Value::Null);

        host.conf("0.4.0");
        let network = host.network();
        network.attach("pod", &options()).unwrap();
        host.tell("two", "CHECK", "refuse");
        let error = failure(network.check("pod"));
        assert!(error.contains("refused CHECK"), "{error}");
        network.detach("pod").unwrap();
        host.nothing_is_left();
    });
}

#[test]
fn names_that_break_out_are_refused_before_anything_is_done() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        let mut evil = options();
        evil.identity.name = "web;IP=10.0.0.1".to_owned();
        let error = failure(network.attach("pod", &evil));
        assert!(error.starts_with("K8S_POD_NAME"), "{error}");
        let mut evil = options();
        evil.annotations = [("kubernetes.io/ingress-bandwidth".to_owned(), "much".to_owned())].into();
        let error = failure(network.attach("pod", &evil));
        assert!(error.contains("ingress-bandwidth"), "{error}");
        assert_eq!(host.calls(), [""; 0]);
        host.nothing_is_left();
    });
}

#[test]
fn the_kubelets_addresses_become_a_network_where_there_is_none() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        host.write(
            "template",
            r#"{"cniVersion":"1.0.0","name":"rendered","plugins":[{"type":"one","capabilities":{"ipRanges":true},
                "ipam":{"ranges":[{{range $i, $range := .PodCIDRRanges}}
                    {{- if $i}}, {{end}}[{"subnet":"{{$range}}"}]{{end}}]}}]}"#,
        );
        let rendered = host.path("net.d/10-coracle-net.conflist");
        network.set_pod_cidr("10.7.0.0/24").unwrap();
        assert!(!rendered.exists(), "somebody else has brought one");
        std::fs::remove_file(host.path("net.d/10-net.conflist")).unwrap();
        for cidrs in ["10.7.0.0/24,fd07::/64", "10.8.0.0/24"] {
            network.set_pod_cidr(cidrs).unwrap();
            let text = std::fs::read_to_string(&rendered).unwrap();
            assert!(cidrs.split(',').all(|cidr| text.contains(cidr)), "{text}");
        }
        // The node's addresses are told once, and known to later daemons.
        let network = host.network();
        network.attach("pod", &options()).unwrap();
        let ranges = &host.request("one", "ADD")["runtimeConfig"]["ipRanges"];
        assert_eq!(ranges, &json!([[{"subnet": "10.8.0.0/24"}]]));
        network.detach("pod").unwrap();
        std::fs::remove_file(&rendered).unwrap();

        failure(network.set_pod_cidr("10.8.0.0"));
        host.write("template", "{{.Nothing}}");
        let error = failure(network.set_pod_cidr("10.7.0.0/24"));
        assert!(
            error.contains("template: {{.Nothing}} is not understood"),
            "{error}"
        );
        host.write("template", "{}");
        let error = failure(network.set_pod_cidr("10.7.0.0/24"));
        assert!(error.contains("what it makes has no name"), "{error}");
        assert!(!rendered.exists());
    });
}

#[test]
fn many_pods_at_once_and_one_operation_at_a_time_for_each() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        std::thread::scope(|scope| {
            for number in 0..8 {
                let network = &network;
                scope.spawn(move || {
                    let pod = format!("pod-{}", number % 4);
                    network.attach(&pod, &options()).unwrap();
                    network.detach(&pod).unwrap();
                });
            }
        });
        host.nothing_is_left();
    });
}
