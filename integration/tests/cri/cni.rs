//! Pods that plugins connect: a plugin of our own that misbehaves, and the reference plugins.

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{Node, Options, leaks, request};
use coracle_kernel::rlimit::{self, Resource};
use coracle_kernel::signal::{self, Signal};
use coracle_proto::cri::{
    ContainerState, NetworkConfig, PodSandboxState, PortMapping, RuntimeConfig, StatusRequest,
    UpdateRuntimeConfigRequest,
};
use serde_json::json;

use crate::support::{eventually, info, monitor_of};

crate::tests![
    without_a_configuration_the_node_says_so_until_there_is_one,
    a_failing_del_keeps_the_address_and_nothing_else,
    what_a_crash_interrupts_is_taken_down_by_the_next_daemon,
    what_a_plugin_has_started_ends_with_its_run_or_is_left_alone,
    nobody_inherits_the_limit_of_open_files_that_the_daemon_has,
    the_reference_plugins_connect_pods,
];

/// Answers with an address that nobody has; DEL fails where there is a file `del`, ADD hangs where there is a `hang`, and
/// waits for a child that hangs where there is a `wait`. With `leave` it leaves something in the background.
const PLUGIN: &str = r#"#!/bin/sh
echo "$CNI_COMMAND" >> DIR/calls
ulimit -Sn > DIR/open-files
lives() { [ -e DIR/$1 ] && grep -q '^State:.[^Z]' /proc/$(cat DIR/$1)/status; }
[ "$CNI_COMMAND" = DEL ] && lives child && echo "a child lives" >> DIR/calls
[ "$CNI_COMMAND" = ADD ] && [ -e DIR/leave ] && { setsid sleep 1000 < /dev/null > /dev/null 2>&1 & echo $! > DIR/left; }
[ "$CNI_COMMAND" = ADD ] && [ -e DIR/wait ] && { setsid sleep 1000 & echo $! > DIR/child; wait; }
[ "$CNI_COMMAND" = ADD ] && [ -e DIR/hang ] && { echo $$ > DIR/hanging; exec sleep 1000; }
[ "$CNI_COMMAND" = DEL ] && [ -e DIR/del ] && { echo '{"code":11,"msg":"not now"}'; exit 1; }
[ "$CNI_COMMAND" = ADD ] && echo '{"cniVersion":"1.0.0","ips":[{"address":"10.9.0.2/24"},{"address":"fd09::2/64"}]}'
exit 0
"#;

/// Where the test's plugins and configurations are.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Result<Place> {
        let dir = PathBuf::from(format!("/tmp/coracle-it-cni-{}-{name}", std::process::id()));
        fs::create_dir_all(dir.join("net.d"))?;
        fs::create_dir_all(dir.join("bin"))?;
        Ok(Place(dir))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn options(&self, bin: &Path) -> Options {
        let template = self.path("template");
        Options {
            config: format!(
                "[network]\ncni_conf_dir = {:?}\ncni_bin_dirs = [{bin:?}]\ncni_conf_template = {template:?}\n",
                self.path("net.d")
            ),
            cni: true,
            ..Options::default()
        }
    }

    fn install(&self) -> Result<()> {
        let plugin = self.path("bin/plugin");
        fs::write(&plugin, PLUGIN.replace("DIR", &self.0.display().to_string()))?;
        fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755))?;
        let conf = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "plugin"}]});
        self.configure(&conf)
    }

    /// By a rename: nobody sees half of it.
    fn configure(&self, conf: &serde_json::Value) -> Result<()> {
        fs::write(self.path("new"), conf.to_string())?;
        Ok(fs::rename(self.path("new"), self.path("net.d/10-net.conflist"))?)
    }

    fn calls(&self, command: &str) -> usize {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        calls.lines().filter(|line| *line == command).count()
    }

    fn remove(self) -> Result<()> {
        Ok(fs::remove_dir_all(self.0)?)
    }
}

/// Why the network is not ready; empty if it is.
async fn not_ready(node: &Node) -> Result<String> {
    let status = node
        .runtime()
        .status(StatusRequest { verbose: false })
        .await?
        .into_inner()
        .status
        .context("no status")?;
    let network = status
        .conditions
        .into_iter()
        .find(|condition| condition.r#type == "NetworkReady")
        .context("no NetworkReady")?;
    ensure!(network.status == network.message.is_empty(), "{network:?}");
    Ok(network.message)
}

async fn without_a_configuration_the_node_says_so_until_there_is_one() -> Result<()> {
    let place = Place::new("none")?;
    fs::remove_dir(place.path("net.d"))?;
    let node = Node::with_busybox(place.options(&place.path("bin"))).await?;
    let why = not_ready(&node).await?;
    ensure!(why.contains("no CNI configuration in"), "{why}");
    let config = request::pod("early", &node.logs);
    let error = node.run_pod(&config).await.unwrap_err();
    ensure!(error.message().contains("no CNI configuration in"), "{error}");
    ensure!(node.pod_ids().await?.is_empty(), "something was left");

    fs::create_dir(place.path("net.d"))?;
    place.install()?;
    eventually(async || {
        let why = not_ready(&node).await?;
        ensure!(why.is_empty(), "{why}");
        Ok(())
    })
    .await?;
    let pod = node.run_pod(&config).await?;
    let network = node.pod_status(&pod).await?.network.context("no network")?;
    let further: Vec<_> = network.additional_ips.iter().map(|ip| ip.ip.as_str()).collect();
    ensure!(
        (network.ip.as_str(), further.as_slice()) == ("10.9.0.2", &["fd09::2"]),
        "{network:?}"
    );
    let result = &info(&node, &pod).await?["cniResult"];
    ensure!(result["ips"][0]["address"] == "10.9.0.2/24", "{result}");
    node.remove_pod(&pod).await?;

    // The kubelet's addresses become a configuration where there is no other one.
    fs::remove_file(place.path("net.d/10-net.conflist"))?;
    let template = json!({"name": "rendered", "plugins": [{"type": "plugin", "subnet": "{{.PodCIDR}}"}]});
    fs::write(place.path("template"), template.to_string())?;
    let update = UpdateRuntimeConfigRequest {
        runtime_config: Some(RuntimeConfig {
            network_config: Some(NetworkConfig {
                pod_cidr: "10.7.0.0/24".into(),
            }),
        }),
    };
    node.runtime().update_runtime_config(update).await?;
    let text = fs::read_to_string(place.path("net.d/10-coracle-net.conflist"))?;
    ensure!(text.contains("10.7.0.0/24"), "{text}");
    ensure!(not_ready(&node).await?.is_empty(), "{}", not_ready(&node).await?);
    node.finish().await?;
    place.remove()
}

async fn a_failing_del_keeps_the_address_and_nothing_else() -> Result<()> {
    let place = Place::new("del")?;
    place.install()?;
    let mut node = Node::with_busybox(place.options(&place.path("bin"))).await?;
    let config = request::pod("stuck", &node.logs);
    let pod = node.run_pod(&config).await?;
    let container = node
        .run_container(&pod, &request::container("main", "sleep 1000"), &config)
        .await?;
    fs::write(place.path("del"), "")?;
    for _ in 0..2 {
        let error = node.stop_pod(&pod).await.unwrap_err();
        ensure!(error.message().contains("not now"), "{error}");
    }
    ensure!(
        node.status(&container).await?.state() == ContainerState::ContainerExited,
        "it runs"
    );
    ensure!(leaks::monitors()?.is_empty(), "the monitor runs");
    let state = node.pod_status(&pod).await?.state();
    ensure!(state == PodSandboxState::SandboxNotready, "{state:?}");
    let error = node.remove_pod(&pod).await.unwrap_err();
    ensure!(error.message().contains("not now"), "{error}");

    // A later daemon goes on with it, and nobody need ask.
    node.restart().await?;
    ensure!(
        node.pod_status(&pod).await?.state() == PodSandboxState::SandboxNotready,
        "it is ready"
    );
    fs::remove_file(place.path("del"))?;
    let before = place.calls("DEL");
    eventually(async || {
        ensure!(place.calls("DEL") > before, "it is not tried again");
        node.stop_pod(&pod).await?;
        Ok(())
    })
    .await?;
    node.remove_pod(&pod).await?;
    node.finish().await?;
    place.remove()
}

async fn what_a_crash_interrupts_is_taken_down_by_the_next_daemon() -> Result<()> {
    let place = Place::new("crash")?;
    place.install()?;
    let mut node = Node::with_busybox(Options {
        failpoint: Some("run.network=abort".to_owned()),
        ..place.options(&place.path("bin"))
    })
    .await?;
    let config = request::pod("crash", &node.logs);
    node.run_pod(&config).await.unwrap_err();
    node.wait_ended(Duration::from_secs(10)).await?;
    ensure!(
        (place.calls("ADD"), place.calls("DEL")) == (1, 0),
        "not where it should have ended"
    );
    node.options.failpoint = None;
    node.spawn().await?;
    eventually(async || {
        ensure!(place.calls("DEL") >= 1, "nobody took it down");
        ensure!(node.pod_ids().await?.is_empty(), "the pod is there");
        Ok(())
    })
    .await?;
    let pod = node.run_pod(&config).await?;
    node.remove_pod(&pod).await?;

    // An ADD that is under way does not go on behind the next daemon's DEL.
    fs::write(place.path("hang"), "")?;
    let hanging = eventually(async || {
        fs::metadata(place.path("hanging"))?;
        Ok(())
    });
    tokio::select! {
        answer = node.run_pod(&config) => anyhow::bail!("it did not hang: {answer:?}"),
        hangs = hanging => hangs?,
    }
    let calls = place.calls("DEL");
    node.restart().await?;
    let plugin = fs::read_to_string(place.path("hanging"))?;
    // The kernel kills it when the daemon is gone, and somebody else reaps it.
    eventually(async || {
        let status = fs::read_to_string(Path::new("/proc").join(plugin.trim()).join("status"));
        let ended = status.map_or(true, |status| status.contains("State:\tZ"));
        ensure!(ended, "the plugin runs on");
        Ok(())
    })
    .await?;
    eventually(async || {
        ensure!(place.calls("DEL") > calls, "nobody took it down");
        let left = leaks::pod_files(&node.dir);
        ensure!(left.is_empty(), "{left:?} {}", node.log());
        Ok(())
    })
    .await?;
    node.finish().await?;
    place.remove()
}

/// Whether the process lives whose number is in a file.
fn lives(pid_file: &Path) -> Result<bool> {
    let pid = fs::read_to_string(pid_file)?;
    let status = fs::read_to_string(Path::new("/proc").join(pid.trim()).join("status"));
    Ok(status.is_ok_and(|status| !status.contains("State:\tZ")))
}

/// What the IPAM plugin is to most others: a child that goes on when its parent and the daemon are gone.
async fn what_a_plugin_has_started_ends_with_its_run_or_is_left_alone() -> Result<()> {
    let place = Place::new("children")?;
    place.install()?;
    fs::write(place.path("leave"), "")?;
    let mut node = Node::with_busybox(place.options(&place.path("bin"))).await?;
    let kept = node.run_pod(&request::pod("kept", &node.logs)).await?;
    ensure!(
        lives(&place.path("left"))?,
        "what was left did not outlive its plugin"
    );
    fs::remove_file(place.path("leave"))?;

    fs::write(place.path("wait"), "")?;
    let config = request::pod("crash", &node.logs);
    let waiting = eventually(async || {
        ensure!(lives(&place.path("child"))?, "the plugin has no child yet");
        Ok(())
    });
    tokio::select! {
        answer = node.run_pod(&config) => anyhow::bail!("it did not wait: {answer:?}"),
        waits = waiting => waits?,
    }
    node.kill()?;
    ensure!(
        lives(&place.path("child"))?,
        "the child ended with the daemon: this tests nothing"
    );
    fs::remove_file(place.path("wait"))?;
    node.spawn().await?;
    eventually(async || {
        ensure!(place.calls("DEL") >= 1, "nobody took it down");
        ensure!(node.pod_ids().await?.len() == 1, "the pod is there");
        Ok(())
    })
    .await?;
    ensure!(
        place.calls("a child lives") == 0,
        "it went on behind the next daemon's DEL"
    );
    ensure!(!lives(&place.path("child"))?, "it goes on");
    // Of an operation that had ended.
    ensure!(lives(&place.path("left"))?, "what was left was killed");
    node.remove_pod(&kept).await?;
    let left = fs::read_to_string(place.path("left"))?.trim().parse()?;
    signal::kill(left, Signal::KILL)?;
    eventually(async || {
        ensure!(!lives(&place.path("left"))?, "it does not end");
        Ok(())
    })
    .await?;
    node.finish().await?;
    place.remove()
}

/// select(2) breaks beyond 1024: whoever wants more says so.
async fn nobody_inherits_the_limit_of_open_files_that_the_daemon_has() -> Result<()> {
    let (_, hard) = rlimit::get(0, Resource::NOFILE)?;
    ensure!(hard > 1000, "the hard limit here is {hard}");
    // The daemon's by inheritance; and this process runs this test alone.
    rlimit::set(0, Resource::NOFILE, 1000, hard)?;
    let limits = |pid: i32| -> Result<String> {
        let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
        let line = limits.lines().find(|line| line.starts_with("Max open files"));
        let words: Vec<_> = line
            .context("no such limit")?
            .split_whitespace()
            .skip(3)
            .collect();
        Ok(words[..2].join(" "))
    };
    let (raised, given) = (format!("{hard} {hard}"), format!("1000 {hard}"));
    let place = Place::new("open-files")?;
    place.install()?;
    let node = Node::with_busybox(place.options(&place.path("bin"))).await?;
    let daemon = limits(i32::try_from(node.pid().context("no daemon")?)?)?;
    ensure!(daemon == raised, "the daemon has {daemon}");
    let config = request::pod("limits", &node.logs);
    let pod = node.run_pod(&config).await?;
    let plugin = fs::read_to_string(place.path("open-files"))?;
    ensure!(plugin.trim() == "1000", "a plugin has {plugin}");
    let monitor = limits(monitor_of(&node, &pod).await?)?;
    ensure!(monitor == given, "a monitor has {monitor}");
    let main = request::container("main", "echo has $(ulimit -Sn) $(ulimit -Hn); sleep 1000");
    let id = node.run_container(&pod, &main, &config).await?;
    let status = node.status(&id).await?;
    let log = node.wait_log(&status, "has ", Duration::from_secs(5)).await?;
    ensure!(log.contains(&format!("has {given}\n")), "{log}");
    let exec = node
        .exec(&id, &["sh", "-c", "echo $(ulimit -Sn) $(ulimit -Hn)"], 10)
        .await?;
    ensure!(exec.stdout == format!("{given}\n").as_bytes(), "{exec:?}");
    node.finish().await?;
    place.remove()
}

async fn the_reference_plugins_connect_pods() -> Result<()> {
    let Some(bin) = std::env::var_os("CORACLE_CNI_BIN") else {
        coracle_integration::skipped(
            "the_reference_plugins_connect_pods: CORACLE_CNI_BIN does not say where they are",
        );
        return Ok(());
    };
    let place = Place::new("reference")?;
    let leases = place.path("leases");
    place.configure(&json!({"cniVersion": "1.1.0", "name": "net", "plugins": [
        {"type": "bridge", "bridge": "it-cni0", "isGateway": true, "hairpinMode": true, "ipMasq": true,
         "ipam": {"type": "host-local", "dataDir": leases, "ranges": [[{"subnet": "10.91.0.0/24"}]],
                  "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]}))?;
    let node = Node::with_busybox(place.options(Path::new(&bin))).await?;
    let mut config = request::pod("web", &node.logs);
    config.port_mappings = vec![PortMapping {
        container_port: 80,
        host_port: 18080,
        ..PortMapping::default()
    }];
    let pod = node.run_pod(&config).await?;
    let ip = node.pod_status(&pod).await?.network.context("no network")?.ip;
    ensure!(ip == "10.91.0.2", "{ip}");
    let server = request::container("server", "while true; do echo hello | nc -l -p 80; done");
    node.run_container(&pod, &server, &config).await?;
    for address in [(ip.as_str(), 80), ("10.91.0.1", 18080)] {
        eventually(async || {
            let mut stream = TcpStream::connect(address)?;
            let mut text = String::new();
            std::io::Read::read_to_string(&mut stream, &mut text)?;
            ensure!(text == "hello\n", "{address:?}: {text:?}");
            Ok(())
        })
        .await?;
    }
    node.remove_pod(&pod).await?;
    let held = fs::read_dir(leases.join("net"))?.filter_map(Result::ok);
    let held: Vec<_> = held
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("10."))
        .collect();
    ensure!(held.is_empty(), "addresses are still taken: {held:?}");
    let rules = Command::new("iptables-save").output()?;
    let rules = String::from_utf8_lossy(&rules.stdout).into_owned();
    ensure!(!rules.contains("18080") && !rules.contains(&pod), "{rules}");
    // The plugin's bridge is the operator's, and outlives all pods.
    let removed = Command::new("ip").args(["link", "delete", "it-cni0"]).status()?;
    ensure!(removed.success(), "there was no bridge");
    node.finish().await?;
    place.remove()
}
