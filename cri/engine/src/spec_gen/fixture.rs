//! A request that works, for tests to change.

use coracle_proto::cri::{
    ContainerConfig, LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig,
};

use super::{
    Defaults, HostDevice, HostFacts, HostMount, ImageProcess, Inputs, PodFiles, PodNamespaces, UnsetSeccomp,
    UserFiles,
};

/// Everything that [`Inputs`] borrows.
pub(super) struct Fixture {
    pub(super) pod: PodSandboxConfig,
    pub(super) container: ContainerConfig,
    pub(super) image: ImageProcess,
    pub(super) users: UserFiles,
    pub(super) namespaces: PodNamespaces,
    pub(super) files: PodFiles,
    pub(super) mounts: Vec<HostMount>,
    pub(super) devices: Vec<HostDevice>,
    pub(super) seccomp_profile: Option<Vec<u8>>,
    pub(super) host: HostFacts,
    pub(super) defaults: Defaults,
}

/// A host that can do everything.
pub(super) fn host() -> HostFacts {
    HostFacts {
        cgroup_v2: true,
        swap_accounting: true,
        hugepage_sizes: vec!["2MB".into()],
        hostname: "node-1".into(),
    }
}

impl Default for Fixture {
    /// A pod that shares no process namespace, and a container that says nothing but its program.
    fn default() -> Fixture {
        let text = |text: &str| Some(text.to_owned());
        let mut fixture = Fixture {
            pod: PodSandboxConfig::default(),
            container: ContainerConfig::default(),
            image: ImageProcess {
                entrypoint: vec!["/bin/app".into()],
                ..Default::default()
            },
            users: UserFiles {
                passwd: b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/:\n".to_vec(),
                group: b"root:x:0:\napp:x:1001:\nextra:x:3000:app\n".to_vec(),
            },
            namespaces: PodNamespaces {
                network: text("/run/netns/x"),
                ipc: text("/proc/7/fd/3"),
                uts: text("/proc/7/fd/4"),
                pid: None,
                user: None,
            },
            files: PodFiles {
                resolv_conf: text("/run/pod/resolv.conf"),
                hostname: text("/run/pod/hostname"),
                hosts: text("/run/pod/hosts"),
                shm: text("/run/pod/shm"),
            },
            mounts: Vec::new(),
            devices: Vec::new(),
            seccomp_profile: None,
            host: host(),
            defaults: Defaults {
                unset_seccomp: UnsetSeccomp::Runtime,
            },
        };
        fixture.pod_options().pid = NamespaceMode::Container.into();
        fixture
    }
}

impl Fixture {
    pub(super) fn inputs(&self) -> Inputs<'_> {
        Inputs {
            sandbox_id: "sandbox",
            pod: &self.pod,
            container_id: "container",
            container: &self.container,
            image: &self.image,
            users: &self.users,
            cgroup_path: "/kubepods/pod1/container",
            namespaces: &self.namespaces,
            files: &self.files,
            mounts: &self.mounts,
            devices: &self.devices,
            seccomp_profile: self.seccomp_profile.as_deref(),
            host: &self.host,
            defaults: &self.defaults,
        }
    }

    pub(super) fn linux(&mut self) -> &mut LinuxContainerConfig {
        self.container.linux.get_or_insert_default()
    }

    pub(super) fn context(&mut self) -> &mut LinuxContainerSecurityContext {
        self.linux().security_context.get_or_insert_default()
    }

    pub(super) fn options(&mut self) -> &mut NamespaceOption {
        self.context().namespace_options.get_or_insert_default()
    }

    pub(super) fn pod_context(&mut self) -> &mut LinuxSandboxSecurityContext {
        let linux: &mut LinuxPodSandboxConfig = self.pod.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default()
    }

    pub(super) fn pod_options(&mut self) -> &mut NamespaceOption {
        self.pod_context().namespace_options.get_or_insert_default()
    }

    /// Requests mounts and resolves each source to itself.
    pub(super) fn set_mounts(&mut self, mounts: Vec<Mount>) {
        self.mounts = mounts
            .iter()
            .enumerate()
            .map(|(index, mount)| HostMount {
                index,
                source: mount.host_path.clone(),
            })
            .collect();
        self.container.mounts = mounts;
    }
}
