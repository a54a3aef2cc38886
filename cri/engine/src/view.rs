//! What clients are shown: immutable snapshots that each pod's task publishes, and their CRI messages.
//!
//! Status and List read nothing else (a verbose status also reads the container's bundle). A snapshot is published
//! after what it shows is on the disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_proto::cri::{
    Container, ContainerConfig, ContainerFilter, ContainerMetadata, ContainerResources, ContainerState,
    ContainerStatus, ContainerUser, ImageSpec, LinuxContainerUser, LinuxPodSandboxStatus, Namespace,
    NamespaceMode, NamespaceOption, PodIp, PodSandbox, PodSandboxConfig, PodSandboxFilter,
    PodSandboxMetadata, PodSandboxNetworkStatus, PodSandboxState, PodSandboxStatus,
};

use crate::record::{ContainerPhase, ContainerRecord, SandboxPhase, SandboxRecord};

/// A pod as it stood after one change.
#[derive(Debug, Clone)]
pub(crate) struct PodView {
    pub(crate) record: SandboxRecord,
    pub(crate) config: Arc<PodSandboxConfig>,
    pub(crate) runtime_handler: Arc<str>,
    pub(crate) containers: BTreeMap<String, Arc<ContainerView>>,
}

/// A container as it stood after one change.
#[derive(Debug, Clone)]
pub(crate) struct ContainerView {
    pub(crate) record: ContainerRecord,
    pub(crate) config: Arc<ContainerConfig>,
    /// The monitor has said that its program runs.
    pub(crate) running: bool,
}

impl PodView {
    /// A sandbox that is being made, or that is being removed, is nobody's business yet or any more.
    pub(crate) fn is_listed(&self) -> bool {
        self.record.phase != SandboxPhase::Creating
    }

    pub(crate) fn state(&self) -> PodSandboxState {
        match self.record.phase {
            SandboxPhase::Ready => PodSandboxState::SandboxReady,
            SandboxPhase::Creating
            | SandboxPhase::Stopping
            | SandboxPhase::NotReady
            | SandboxPhase::Removing => PodSandboxState::SandboxNotready,
        }
    }

    pub(crate) fn to_list_item(&self) -> PodSandbox {
        PodSandbox {
            id: self.record.id.clone(),
            metadata: Some(self.metadata()),
            state: self.state().into(),
            created_at: self.record.created_at,
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            runtime_handler: self.runtime_handler.to_string(),
        }
    }

    pub(crate) fn to_status(&self) -> PodSandboxStatus {
        let options = namespace_options(&self.config);
        let mut ips = self
            .record
            .network
            .iter()
            .flat_map(|network| network.ips.iter().cloned());
        let ip = ips.next().unwrap_or_default();
        PodSandboxStatus {
            id: self.record.id.clone(),
            metadata: Some(self.metadata()),
            state: self.state().into(),
            created_at: self.record.created_at,
            network: Some(PodSandboxNetworkStatus {
                ip,
                additional_ips: ips.map(|ip| PodIp { ip }).collect(),
            }),
            linux: Some(LinuxPodSandboxStatus {
                namespaces: Some(Namespace {
                    options: Some(options),
                }),
            }),
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            runtime_handler: self.runtime_handler.to_string(),
        }
    }

    pub(crate) fn matches(&self, filter: Option<&PodSandboxFilter>) -> bool {
        let Some(filter) = filter else { return true };
        (filter.id.is_empty() || self.record.id.starts_with(&filter.id))
            && filter
                .state
                .is_none_or(|wanted| wanted.state == i32::from(self.state()))
            && has_labels(&self.config.labels, &filter.label_selector)
    }

    fn metadata(&self) -> PodSandboxMetadata {
        PodSandboxMetadata {
            name: self.record.name.clone(),
            uid: self.record.uid.clone(),
            namespace: self.record.namespace.clone(),
            attempt: self.record.attempt,
        }
    }
}

impl ContainerView {
    pub(crate) fn is_listed(&self) -> bool {
        self.record.phase != ContainerPhase::Creating
    }

    pub(crate) fn state(&self) -> ContainerState {
        match self.record.phase {
            ContainerPhase::Started if self.running => ContainerState::ContainerRunning,
            ContainerPhase::Creating | ContainerPhase::Created | ContainerPhase::Started => {
                ContainerState::ContainerCreated
            }
            ContainerPhase::Exited | ContainerPhase::Removing => ContainerState::ContainerExited,
        }
    }

    pub(crate) fn to_list_item(&self) -> Container {
        Container {
            id: self.record.id.clone(),
            pod_sandbox_id: self.record.pod.clone(),
            metadata: Some(self.metadata()),
            image: Some(self.config.image.clone().unwrap_or_default()),
            image_ref: self.record.image_id.clone(),
            state: self.state().into(),
            created_at: self.record.created_at,
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            image_id: self.record.image_id.clone(),
        }
    }

    pub(crate) fn to_status(&self) -> ContainerStatus {
        let record = &self.record;
        let exited = self.state() == ContainerState::ContainerExited;
        let mut mounts = self.config.mounts.clone();
        for (mount, source) in mounts.iter_mut().zip(&record.mount_sources) {
            // The path after its symlinks were resolved is the one that is mounted.
            if !source.is_empty() {
                mount.host_path.clone_from(source);
            }
        }
        let groups = record.groups.iter().map(|gid| i64::from(*gid)).collect();
        ContainerStatus {
            id: record.id.clone(),
            metadata: Some(self.metadata()),
            state: self.state().into(),
            created_at: record.created_at,
            started_at: if self.running || exited {
                record.started_at
            } else {
                0
            },
            finished_at: if exited { record.finished_at } else { 0 },
            exit_code: if exited { record.exit_code } else { 0 },
            image: Some(ImageSpec {
                image: record.image_name.clone(),
                ..self.config.image.clone().unwrap_or_default()
            }),
            image_ref: record.image_ref.clone(),
            reason: if exited {
                record.reason.clone()
            } else {
                String::new()
            },
            message: if exited {
                record.message.clone()
            } else {
                String::new()
            },
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            mounts,
            log_path: record.log_path.clone(),
            resources: self
                .config
                .linux
                .as_ref()
                .and_then(|linux| linux.resources.clone())
                .map(|linux| ContainerResources {
                    linux: Some(linux),
                    windows: None,
                }),
            image_id: record.image_id.clone(),
            user: Some(ContainerUser {
                linux: Some(LinuxContainerUser {
                    uid: record.uid.into(),
                    gid: record.gid.into(),
                    supplemental_groups: groups,
                }),
            }),
            stop_signal: self.config.stop_signal,
        }
    }

    pub(crate) fn matches(&self, filter: Option<&ContainerFilter>) -> bool {
        let Some(filter) = filter else { return true };
        (filter.id.is_empty() || self.record.id.starts_with(&filter.id))
            && (filter.pod_sandbox_id.is_empty() || self.record.pod.starts_with(&filter.pod_sandbox_id))
            && filter
                .state
                .is_none_or(|wanted| wanted.state == i32::from(self.state()))
            && has_labels(&self.config.labels, &filter.label_selector)
    }

    pub(crate) fn metadata(&self) -> ContainerMetadata {
        ContainerMetadata {
            name: self.record.name.clone(),
            attempt: self.record.attempt,
        }
    }
}

/// The sandbox's namespace options as they were asked for; absent means POD for each.
pub(crate) fn namespace_options(config: &PodSandboxConfig) -> NamespaceOption {
    config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|context| context.namespace_options.clone())
        .unwrap_or_default()
}

/// Whether the pod lives on the host's network.
pub(crate) fn is_host_network(config: &PodSandboxConfig) -> bool {
    namespace_options(config).network() == NamespaceMode::Node
}

/// Every wanted label is there with its value.
pub(crate) fn has_labels(labels: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
pub(crate) mod tests {
    use coracle_proto::cri::{ContainerStateValue, Mount, PodSandboxStateValue};

    use super::*;
    use crate::record::NetworkRecord;

    pub(crate) fn pod(id: &str, phase: SandboxPhase) -> PodView {
        let mut config = PodSandboxConfig::default();
        config.labels.insert("app".into(), "web".into());
        PodView {
            record: SandboxRecord {
                id: id.into(),
                namespace: "ns".into(),
                name: "pod".into(),
                uid: "u".into(),
                attempt: 1,
                hash: String::new(),
                phase,
                created_at: 7,
                network: Some(NetworkRecord {
                    mode: "bridge".into(),
                    netns: "/run/netns/x".into(),
                    ips: vec!["10.0.0.2".into(), "fd00::2".into()],
                }),
                monitor: None,
                reason: String::new(),
            },
            config: Arc::new(config),
            runtime_handler: "".into(),
            containers: BTreeMap::new(),
        }
    }

    pub(crate) fn container(id: &str, phase: ContainerPhase) -> ContainerView {
        let mut config = ContainerConfig::default();
        config.labels.insert("c".into(), "1".into());
        config.mounts.push(Mount {
            host_path: "/link".into(),
            container_path: "/m".into(),
            ..Default::default()
        });
        ContainerView {
            record: ContainerRecord {
                id: id.into(),
                pod: "p1".into(),
                name: "main".into(),
                attempt: 0,
                hash: String::new(),
                phase,
                created_at: 1,
                started_at: 2,
                finished_at: 3,
                exit_code: 42,
                reason: "Error".into(),
                message: String::new(),
                image_id: "sha256:1".into(),
                image_name: "busybox:latest".into(),
                image_ref: "busybox@sha256:2".into(),
                cgroup: String::new(),
                cgroup_location: BTreeMap::new(),
                log_path: "/var/log/pods/x/0.log".into(),
                pid: 0,
                pid_start: 0,
                stop_signal: 15,
                uid: 0,
                gid: 0,
                groups: vec![1],
                mount_sources: vec!["/real".into()],
            },
            config: Arc::new(config),
            running: true,
        }
    }

    #[test]
    fn a_filter_is_a_conjunction() {
        let view = pod("abc", SandboxPhase::Ready);
        let label = |value: &str| [("app".to_owned(), value.to_owned())].into();
        let filter = |id: &str, state: Option<PodSandboxState>, value: &str| PodSandboxFilter {
            id: id.into(),
            state: state.map(|state| PodSandboxStateValue { state: state.into() }),
            label_selector: label(value),
        };
        assert!(view.matches(None));
        assert!(view.matches(Some(&filter("ab", Some(PodSandboxState::SandboxReady), "web"))));
        assert!(!view.matches(Some(&filter("b", None, "web"))));
        assert!(!view.matches(Some(&filter(
            "abc",
            Some(PodSandboxState::SandboxNotready),
            "web"
        ))));
        assert!(!view.matches(Some(&filter("abc", None, "db"))));
        let view = container("c1", ContainerPhase::Exited);
        let state = ContainerStateValue {
            state: ContainerState::ContainerRunning.into(),
        };
        assert!(!view.matches(Some(&ContainerFilter {
            state: Some(state),
            ..Default::default()
        })));
        assert!(view.matches(Some(&ContainerFilter {
            pod_sandbox_id: "p1".into(),
            ..Default::default()
        })));
    }

    #[test]
    fn the_exit_shows_only_once_it_happened() {
        let running = container("c1", ContainerPhase::Started).to_status();
        assert_eq!(running.state(), ContainerState::ContainerRunning);
        assert_eq!(
            (running.exit_code, running.finished_at, running.reason.as_str()),
            (0, 0, "")
        );
        let exited = container("c1", ContainerPhase::Exited).to_status();
        assert_eq!(
            (exited.exit_code, exited.finished_at, exited.reason.as_str()),
            (42, 3, "Error")
        );
        assert_eq!(exited.mounts[0].host_path, "/real");
        let mut starting = container("c1", ContainerPhase::Started);
        starting.running = false;
        assert_eq!(starting.to_status().state(), ContainerState::ContainerCreated);
        assert_eq!(starting.to_status().started_at, 0);
    }

    #[test]
    fn the_status_of_a_sandbox_carries_addresses_and_namespaces() {
        let status = pod("abc", SandboxPhase::Ready).to_status();
        let network = status.network.unwrap();
        assert_eq!(
            (network.ip.as_str(), network.additional_ips.len()),
            ("10.0.0.2", 1)
        );
        assert_eq!(
            status
                .linux
                .unwrap()
                .namespaces
                .unwrap()
                .options
                .unwrap()
                .network(),
            NamespaceMode::Pod
        );
    }
}
