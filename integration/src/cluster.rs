//! A stock control plane with one node in a cell: etcd, API server, controllers, scheduler, proxy, name server, kubelet,
//! and kubectl to talk to it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::cell::{Cell, NODE_ADDRESS, Process, run, wait_for};
use crate::daemon::{Daemon, program};
use crate::kubelet::{self, Kubelet};

/// Where the API server listens.
const SERVER: &str = "https://127.0.0.1:16443";

/// Everybody's token: the cell's network is nobody else's.
const TOKEN: &str = "admin-of-the-cell";

/// Addresses of services.
const SERVICES: &str = "10.96.0.0/16";

/// How long a part of the control plane may take to be there, with everything else starting on two cores.
const START: Duration = Duration::from_secs(180);

/// The programs.
#[derive(Debug)]
pub struct Programs {
    /// Folder of `kube-apiserver`, `kube-controller-manager`, `kube-scheduler`, `kube-proxy`, `kubectl`.
    pub kubernetes: PathBuf,
    /// The kubelet.
    pub kubelet: PathBuf,
    /// etcd.
    pub etcd: PathBuf,
    /// CoreDNS.
    pub coredns: PathBuf,
}

/// A running cluster; all of it ends when dropped.
pub struct Cluster<'a> {
    cell: &'a Cell,
    programs: &'a Programs,
    kubeconfig: PathBuf,
    kubelet: Option<Kubelet<'a>>,
    parts: Vec<Process>,
}

impl Programs {
    /// What the environment names; none, said loudly, where one is missing.
    #[must_use]
    pub fn find() -> Option<Programs> {
        Some(Programs {
            kubernetes: program("KUBERNETES_BIN")?,
            kubelet: program("KUBELET")?,
            etcd: program("ETCD")?,
            coredns: program("COREDNS")?,
        })
    }
}

impl<'a> Cluster<'a> {
    /// Starts all of it on the CRI server at a socket; returns when the node is ready.
    pub fn start(cell: &'a Cell, programs: &'a Programs, socket: &Path) -> Result<Cluster<'a>> {
        let mut cluster = Cluster {
            cell,
            programs,
            kubeconfig: cell.dir().join("admin.conf"),
            kubelet: None,
            parts: Vec::new(),
        };
        cluster.write_files()?;
        cluster.start_control_plane()?;
        let options = kubelet::Options {
            socket,
            config: json!({
                "address": "0.0.0.0",
                "clusterDNS": [NODE_ADDRESS], "clusterDomain": "cluster.local",
                "maxPods": 200, "serializeImagePulls": false,
                // Tests must not wait for the usual pace of a node.
                "nodeStatusUpdateFrequency": "2s", "syncFrequency": "5s",
                "kubeAPIQPS": 200, "kubeAPIBurst": 400, "registryPullQPS": 0, "eventRecordQPS": 0,
            }),
            by_flag: false,
            kubeconfig: Some(&cluster.kubeconfig),
        };
        cluster.kubelet = Some(Kubelet::start(cell, &programs.kubelet, &options)?);
        wait_for("the node to be ready", START, || {
            let node = cluster.get("node", "node1")?;
            let conditions = node["status"]["conditions"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            let ready = conditions
                .iter()
                .any(|one| one["type"] == "Ready" && one["status"] == "True");
            Ok(ready.then_some(()))
        })
        .with_context(|| cluster.tail("kubelet"))?;
        Ok(cluster)
    }

    /// Starts the proxy and the name server too, so that services have addresses and names.
    pub fn start_services(&mut self) -> Result<()> {
        self.filter_bridged()?;
        let proxy = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "mode": "nftables", "hostnameOverride": "node1", "clusterCIDR": "10.222.0.0/16",
            "clientConnection": {"kubeconfig": self.kubeconfig, "qps": 100, "burst": 200},
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "nftables": {"minSyncPeriod": "0s"},
        });
        let path = self.cell.dir().join("proxy.yaml");
        fs::write(&path, proxy.to_string())?;
        let mut command = self.kubernetes("kube-proxy");
        self.spawn("kube-proxy", command.arg("--config").arg(&path))?;
        let names = format!(
            "cluster.local {{\n bind {NODE_ADDRESS}\n errors\n ready 127.0.0.1:8181\n kubernetes cluster.local {{\n  kubeconfig {}\n  ttl 1\n }}\n}}\n",
            self.kubeconfig.display()
        );
        let path = self.cell.dir().join("Corefile");
        fs::write(&path, names)?;
        let mut command = self.cell.command(&self.programs.coredns);
        self.spawn("coredns", command.arg("-conf").arg(&path))?;
        wait_for("the name server", START, || {
            self.cell
                .sh("curl -sf http://127.0.0.1:8181/ready")
                .map(|text| (text == "OK").then_some(()))
        })
        .with_context(|| self.tail("coredns"))
    }

    /// Starts the controller that enforces network policies, and nothing else of it: pods are connected already.
    pub fn start_policies(&mut self, kube_router: &Path) -> Result<()> {
        self.filter_bridged()?;
        let mut command = self.cell.command(kube_router);
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args([
                "--hostname-override=node1",
                "--service-cluster-ip-range",
                SERVICES,
            ])
            .args([
                "--run-firewall=true",
                "--run-router=false",
                "--run-service-proxy=false",
                "--run-loadbalancer=false",
                "--enable-cni=false",
                "--v=1",
            ]);
        self.spawn("kube-router", &mut command)?;
        wait_for("the policy controller", START, || {
            // Healthy from the start; the port is there when it has read what there is.
            self.cell
                .sh("curl -sf http://127.0.0.1:20244/healthz")
                .map(|text| (text == "OK\n").then_some(()))
        })
        .with_context(|| self.tail("kube-router"))
    }

    /// kubectl with these words, in the cell.
    #[must_use]
    pub fn kubectl(&self, words: &[&str]) -> Command {
        let mut command = self.kubernetes("kubectl");
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(words);
        command
    }

    /// What kubectl prints; a failure is an error with both streams.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        run(&mut self.kubectl(words))
    }

    /// An object; an error if it is not there.
    pub fn get(&self, kind: &str, name: &str) -> Result<Value> {
        let text = self.run(&["get", kind, name, "-o", "json"])?;
        serde_json::from_str(&text).context("parse kubectl's answer")
    }

    /// Creates or changes objects.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        let path = self.cell.dir().join("objects.json");
        fs::write(&path, list.to_string())?;
        let path = path.to_str().context("the cell's path is UTF-8")?;
        self.run(&["apply", "-f", path]).map(drop)
    }

    /// Waits until a pod satisfies `condition`; gives it.
    pub fn wait_pod(&self, name: &str, what: &str, condition: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = Value::Null;
        wait_for(&format!("pod {name} {what}"), START, || {
            let pod = self.get("pod", name)?;
            last = pod["status"].clone();
            Ok(condition(&pod).then_some(pod))
        })
        .with_context(|| format!("status of {name}: {last:#}"))
    }

    /// Deletes everything that users have, and waits until the node has none of it.
    pub fn clear(&self, daemon: &Daemon) -> Result<()> {
        self.run(&[
            "delete",
            "deployments,replicasets,pods,services,networkpolicies",
            "--all",
            "--grace-period=1",
            "--wait=false",
            "--ignore-not-found",
        ])?;
        wait_for("the pods to be gone", START, || {
            // A kubelet removes those that are stopped once a minute: that is waited for at the end.
            let sandboxes = daemon.sandboxes(self.cell)?;
            Ok(sandboxes.iter().all(|one| !one.ready).then_some(()))
        })
    }

    /// Ends all of it, the kubelet first.
    pub fn stop(mut self) -> Result<()> {
        if let Some(kubelet) = self.kubelet.take() {
            kubelet.terminate()?;
        }
        for part in self.parts.drain(..).rev() {
            part.kill()?;
        }
        Ok(())
    }

    /// The end of a part's log.
    #[must_use]
    pub fn tail(&self, name: &str) -> String {
        let log = fs::read(self.cell.log_path(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&log).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        format!("{name}: {}", lines[lines.len().saturating_sub(20)..].join("\n"))
    }

    /// Packets that a bridge passes between its own ports must meet the rules of proxies and controllers too.
    fn filter_bridged(&self) -> Result<()> {
        self.cell
            .sh("sysctl -qw net.ipv4.ip_forward=1 net.bridge.bridge-nf-call-iptables=1")
            .map(drop)
    }

    fn kubernetes(&self, program: &str) -> Command {
        self.cell.command(self.programs.kubernetes.join(program))
    }

    fn spawn(&mut self, name: &str, command: &mut Command) -> Result<()> {
        let part = self.cell.spawn(name, command)?;
        self.parts.push(part);
        Ok(())
    }

    fn write_files(&self) -> Result<()> {
        let pki = self.cell.subdir("pki")?;
        fs::write(
            self.cell.dir().join("tokens.csv"),
            format!("{TOKEN},admin,admin,system:masters\n"),
        )?;
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "cell",
            "clusters": [{"name": "cell", "cluster": {"server": SERVER, "insecure-skip-tls-verify": true}}],
            "users": [{"name": "admin", "user": {"token": TOKEN}}],
            "contexts": [{"name": "cell", "context": {"cluster": "cell", "user": "admin"}}],
        });
        fs::write(&self.kubeconfig, config.to_string())?;
        let (private, public) = (pki.join("sa.key"), pki.join("sa.pub"));
        run(Command::new("openssl").args(["genrsa", "-out"]).arg(&private))?;
        run(Command::new("openssl")
            .args(["rsa", "-pubout", "-in"])
            .arg(&private)
            .arg("-out")
            .arg(&public))
        .map(drop)
    }

    fn start_control_plane(&mut self) -> Result<()> {
        let dir = self.cell.dir().to_owned();
        let pki = dir.join("pki");
        let path = |path: &Path| path.display().to_string();
        let mut command = self.cell.command(&self.programs.etcd);
        command
            .args(["--unsafe-no-fsync", "--data-dir", &path(&dir.join("etcd"))])
            .args([
                "--listen-client-urls=http://127.0.0.1:12379",
                "--advertise-client-urls=http://127.0.0.1:12379",
                "--listen-peer-urls=http://127.0.0.1:12380",
                "--initial-advertise-peer-urls=http://127.0.0.1:12380",
                "--initial-cluster=default=http://127.0.0.1:12380",
            ]);
        self.spawn("etcd", &mut command)?;
        let mut command = self.kubernetes("kube-apiserver");
        command
            .args([
                "--etcd-servers=http://127.0.0.1:12379",
                "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1",
                "--secure-port=16443",
                "--service-account-issuer=https://kubernetes.default.svc",
                "--authorization-mode=AlwaysAllow",
                "--allow-privileged",
                "--endpoint-reconciler-type=none",
                "--kubelet-preferred-address-types=InternalIP",
            ])
            .args(["--service-cluster-ip-range", SERVICES])
            .args(["--cert-dir", &path(&pki)])
            .args(["--service-account-key-file", &path(&pki.join("sa.pub"))])
            .args(["--service-account-signing-key-file", &path(&pki.join("sa.key"))])
            .args(["--token-auth-file", &path(&dir.join("tokens.csv"))]);
        self.spawn("kube-apiserver", &mut command)?;
        wait_for("the API server", START, || {
            let ready = format!("curl -sk -H 'Authorization: Bearer {TOKEN}' {SERVER}/readyz");
            Ok((self.cell.sh(&ready)? == "ok").then_some(()))
        })
        .with_context(|| self.tail("kube-apiserver"))?;
        let kubeconfig = path(&self.kubeconfig);
        let mut command = self.kubernetes("kube-controller-manager");
        command
            .args(["--kubeconfig", &kubeconfig])
            .args(["--service-account-private-key-file", &path(&pki.join("sa.key"))])
            .args(["--root-ca-file", &path(&pki.join("apiserver.crt"))])
            .args([
                "--use-service-account-credentials=false",
                "--leader-elect=false",
                "--bind-address=127.0.0.1",
                "--kube-api-qps=200",
                "--kube-api-burst=400",
            ]);
        self.spawn("kube-controller-manager", &mut command)?;
        let mut command = self.kubernetes("kube-scheduler");
        command
            .args(["--kubeconfig", &kubeconfig])
            .args(["--leader-elect=false", "--bind-address=127.0.0.1"]);
        self.spawn("kube-scheduler", &mut command)?;
        // Pods are refused until their namespace has an account to run under.
        wait_for("the namespace's service account", START, || {
            let account = self.get("serviceaccount", "default")?;
            ensure!(account["metadata"]["name"] == "default", "{account}");
            Ok(Some(()))
        })
        .with_context(|| self.tail("kube-controller-manager"))
    }
}
