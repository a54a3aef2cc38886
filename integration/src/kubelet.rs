//! A stock kubelet in a cell: fed by static pods, or part of a cluster.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cell::{Cell, NODE_ADDRESS, Process, wait_for};
use crate::registry::{CREDENTIALS, Registry};

const PORT: u16 = 20250;

/// What a test chooses of the kubelet's configuration.
pub struct Options<'a> {
    /// The CRI socket.
    pub socket: &'a Path,
    /// Keys that are added to (or replace those of) the configuration.
    pub config: Value,
    /// Whether the socket is named by a flag, as k3s does it, and not in the configuration.
    pub by_flag: bool,
    /// How to reach an API server; none for static pods alone.
    pub kubeconfig: Option<&'a Path>,
}

/// A running kubelet.
pub struct Kubelet<'a> {
    cell: &'a Cell,
    process: Process,
    manifests: PathBuf,
}

impl<'a> Kubelet<'a> {
    /// Starts the kubelet found at `program`; returns when it is healthy.
    pub fn start(cell: &'a Cell, program: &Path, options: &Options<'_>) -> Result<Self> {
        let manifests = cell.subdir("manifests")?;
        let root = cell.subdir("kubelet")?;
        let cgroup = cell.cgroup();
        cell.sh(&format!("for c in /sys/fs/cgroup/*/; do [ -e $c/cgroup.procs ] && mkdir -p $c{cgroup}; done; [ ! -e /sys/fs/cgroup/cgroup.procs ] || mkdir -p /sys/fs/cgroup{cgroup}"))?;
        let mut config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "staticPodPath": manifests,
            "podLogsDir": cell.subdir("pods")?,
            "volumePluginDir": cell.subdir("plugins")?,
            "cgroupRoot": cgroup,
            "failCgroupV1": false,
            "failSwapOn": false,
            "address": "127.0.0.1",
            "port": PORT,
            "healthzPort": 20248,
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            "makeIPTablesUtilChains": false,
            "resolvConf": "",
            "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%", "nodefs.inodesFree": "0%"},
        });
        let endpoint = format!("unix://{}", options.socket.display());
        if !options.by_flag {
            config["containerRuntimeEndpoint"] = json!(endpoint);
        }
        if let (Some(config), Some(more)) = (config.as_object_mut(), options.config.as_object()) {
            config.extend(more.clone());
        }
        let path = cell.dir().join("kubelet.yaml");
        fs::write(&path, config.to_string())?;
        write_credentials(&root)?;
        let mut command = cell.command(program);
        command
            .arg("--config")
            .arg(&path)
            .arg("--root-dir")
            .arg(&root)
            .arg("--cert-dir")
            .arg(root.join("pki"))
            .args(["--hostname-override", "node1", "--node-ip", NODE_ADDRESS]);
        if options.by_flag {
            command.args(["--container-runtime-endpoint", &endpoint]);
        }
        if let Some(kubeconfig) = options.kubeconfig {
            command.arg("--kubeconfig").arg(kubeconfig);
        }
        let process = cell.spawn("kubelet", &mut command)?;
        let kubelet = Self {
            cell,
            process,
            manifests,
        };
        wait_for("a healthy kubelet", Duration::from_secs(120), || {
            Ok((kubelet.get("/healthz")? == "ok").then_some(()))
        })?;
        Ok(kubelet)
    }

    /// Writes a static pod's manifest (by rename, so that it is never read half).
    pub fn apply(&self, pod: &Value) -> Result<()> {
        let name = pod["metadata"]["name"].as_str().context("the pod has a name")?;
        let hidden = self.cell.dir().join(format!("{name}.manifest"));
        fs::write(&hidden, pod.to_string())?;
        fs::rename(&hidden, self.manifests.join(format!("{name}.json")))?;
        Ok(())
    }

    /// Takes a static pod's manifest away.
    pub fn delete(&self, name: &str) -> Result<()> {
        fs::remove_file(self.manifests.join(format!("{name}.json")))
            .with_context(|| format!("delete pod {name}"))
    }

    /// GET of the kubelet's own API.
    pub fn get(&self, path: &str) -> Result<String> {
        self.cell
            .sh(&format!("curl -sfk 'https://127.0.0.1:{PORT}{path}'"))
    }

    /// Runs a command in a container through the kubelet (ExecSync), `cmd` already URL-encoded.
    pub fn run(&self, pod: &str, container: &str, cmd: &str) -> Result<String> {
        self.cell.sh(&format!(
            "curl -sfk -X POST 'https://127.0.0.1:{PORT}/run/default/{pod}-node1/{container}?cmd={cmd}'"
        ))
    }

    /// The pod as the kubelet sees it, `None` when it does not know it.
    pub fn pod(&self, name: &str) -> Result<Option<Value>> {
        let list: Value = serde_json::from_str(&self.get("/pods")?).context("parse /pods")?;
        let name = format!("{name}-node1");
        let items = list["items"].as_array().cloned().unwrap_or_default();
        Ok(items
            .into_iter()
            .find(|pod| pod["metadata"]["name"] == name.as_str()))
    }

    /// Waits until the pod satisfies `condition`; gives the pod.
    pub fn wait_pod(
        &self,
        name: &str,
        what: &str,
        limit: Duration,
        condition: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let mut last = Value::Null;
        wait_for(&format!("pod {name} {what}"), limit, || {
            let pod = self.pod(name)?.unwrap_or(Value::Null);
            last = pod["status"].clone();
            Ok(condition(&pod).then_some(pod))
        })
        .with_context(|| format!("status of {name}: {last:#}"))
    }

    /// SIGKILL.
    pub fn kill(self) -> Result<()> {
        self.process.kill()
    }

    /// SIGTERM.
    pub fn terminate(self) -> Result<()> {
        self.process.terminate()
    }
}

/// The status of one container of a pod, init containers included.
pub fn container_status<'v>(pod: &'v Value, name: &str) -> &'v Value {
    ["containerStatuses", "initContainerStatuses"]
        .iter()
        .filter_map(|list| pod["status"][list].as_array())
        .flatten()
        .find(|status| status["name"] == name)
        .unwrap_or(&Value::Null)
}

/// True when every container of the pod is ready.
pub fn is_ready(pod: &Value) -> bool {
    pod["status"]["containerStatuses"]
        .as_array()
        .is_some_and(|list| !list.is_empty() && list.iter().all(|status| status["ready"] == true))
}

/// Credentials of the test registry, where a kubelet looks for them.
fn write_credentials(root: &Path) -> Result<()> {
    let (user, password) = CREDENTIALS;
    let config = json!({"auths": {Registry::ADDRESS: {"username": user, "password": password, "auth": base64(format!("{user}:{password}").as_bytes())}}});
    fs::write(root.join("config.json"), config.to_string())?;
    Ok(())
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk
            .iter()
            .fold(0_usize, |word, byte| word << 8 | usize::from(*byte))
            << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let symbol = ALPHABET[word >> (18 - 6 * i) & 63];
            out.push(if i <= chunk.len() { char::from(symbol) } else { '=' });
        }
    }
    out
}
