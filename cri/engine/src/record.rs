//! What is written to the durable database about pods and containers.

use std::collections::BTreeMap;

use coracle_store::{Op, Record, Table};
use serde::{Deserialize, Serialize};

use crate::ident::{ContainerIdentity, PodIdentity};
use crate::spec_gen::PodNamespaces;

/// A sandbox, as the database knows it. Its request rides along in the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SandboxRecord {
    pub(crate) id: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) attempt: u32,
    /// Hash of the request.
    pub(crate) hash: String,
    pub(crate) phase: SandboxPhase,
    pub(crate) created_at: i64,
    /// None for a pod on the host's network.
    pub(crate) network: Option<NetworkRecord>,
    /// The monitor that was started for it.
    #[serde(default)]
    pub(crate) monitor: Option<MonitorRecord>,
    /// Why it is not ready, where that was not asked for.
    #[serde(default)]
    pub(crate) reason: String,
}

/// Where a sandbox stands; each phase is on the disk before its effects begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SandboxPhase {
    /// Being made; nobody was told of it, a restart undoes it.
    Creating,
    /// Ready.
    Ready,
    /// Being taken down; a restart completes that.
    Stopping,
    /// Everything is released, the record remains.
    NotReady,
    /// Being removed; a restart completes that.
    Removing,
}

/// A pod's own network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NetworkRecord {
    /// Which network made it, for its removal by a daemon of another configuration.
    pub(crate) mode: String,
    /// Path of the pinned namespace; empty until it is attached.
    pub(crate) netns: String,
    /// Addresses, the primary one first.
    pub(crate) ips: Vec<String>,
}

/// A monitor, named beyond doubt within one boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MonitorRecord {
    pub(crate) pid: i32,
    /// Field 22 of /proc/pid/stat: a pid alone may be somebody else's by now.
    pub(crate) start_time: u64,
    /// Namespaces of the pod that it holds, as paths.
    #[serde(default)]
    pub(crate) namespaces: PodNamespaces,
}

/// A container, as the database knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub(crate) id: String,
    pub(crate) pod: String,
    pub(crate) name: String,
    pub(crate) attempt: u32,
    /// Hash of the request.
    pub(crate) hash: String,
    pub(crate) phase: ContainerPhase,
    pub(crate) created_at: i64,
    pub(crate) started_at: i64,
    pub(crate) finished_at: i64,
    pub(crate) exit_code: i32,
    /// As the CRI words it: `Completed`, `Error`, `OOMKilled`, `StartError`, `MonitorLost`, `Unknown`.
    pub(crate) reason: String,
    pub(crate) message: String,
    /// Id of its image.
    pub(crate) image_id: String,
    /// A name of the image as it was at creation: tag, else what the request says.
    #[serde(default)]
    pub(crate) image_name: String,
    /// Digest reference of the image, else its id.
    #[serde(default)]
    pub(crate) image_ref: String,
    /// `linux.cgroupsPath` as it was written.
    pub(crate) cgroup: String,
    /// Where that led on this host, one entry a hierarchy.
    #[serde(default)]
    pub(crate) cgroup_location: BTreeMap<String, String>,
    /// Absolute path of the log; empty for none.
    pub(crate) log_path: String,
    pub(crate) pid: i32,
    /// When its init was born, as /proc/pid/stat counts it.
    #[serde(default)]
    pub(crate) pid_start: u64,
    /// Signal that stops it.
    pub(crate) stop_signal: i32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    /// Sources of the request's mounts as they were resolved, in its order.
    #[serde(default)]
    pub(crate) mount_sources: Vec<String>,
}

/// Where a container stands; each phase is on the disk before its effects begin, `Exited` before a client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ContainerPhase {
    /// Being made; nobody was told of it, a restart undoes it.
    Creating,
    /// Its init waits for the word.
    Created,
    /// The word is given, or about to be: the monitor knows which.
    Started,
    /// Its init is gone and the exit code known.
    Exited,
    /// Being removed; a restart completes that.
    Removing,
}

impl SandboxRecord {
    pub(crate) fn identity(&self) -> PodIdentity {
        PodIdentity {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            attempt: self.attempt,
        }
    }

    pub(crate) fn put(&self, boot: &str, request: &[u8]) -> Op {
        let frees = self.phase >= SandboxPhase::Stopping;
        put(Table::Sandboxes, &self.id, boot, self, request, frees)
    }

    pub(crate) fn delete(id: &str) -> Op {
        Op::Delete {
            table: Table::Sandboxes,
            key: id.to_owned(),
        }
    }
}

impl ContainerRecord {
    pub(crate) fn identity(&self) -> ContainerIdentity {
        ContainerIdentity {
            name: self.name.clone(),
            attempt: self.attempt,
        }
    }

    /// Whether its init may still be there.
    pub(crate) fn is_alive(&self) -> bool {
        matches!(
            self.phase,
            ContainerPhase::Creating | ContainerPhase::Created | ContainerPhase::Started
        )
    }

    pub(crate) fn put(&self, boot: &str, request: &[u8]) -> Op {
        put(Table::Containers, &self.id, boot, self, request, !self.is_alive())
    }

    pub(crate) fn delete(id: &str) -> Op {
        Op::Delete {
            table: Table::Containers,
            key: id.to_owned(),
        }
    }
}

fn put<T: Serialize + Clone>(
    table: Table,
    key: &str,
    boot: &str,
    body: &T,
    request: &[u8],
    frees: bool,
) -> Op {
    let record = Record {
        boot: boot.to_owned(),
        body: body.clone(),
        request: request.to_vec(),
    };
    Op::Put {
        table,
        key: key.to_owned(),
        value: record.encode(),
        frees,
    }
}
