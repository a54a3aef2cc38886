//! One request for each rule of the generator.

mod mounts;
mod pod;
mod process;
mod security;

use coracle_proto::cri::{
    ContainerConfig, HugepageLimit, Int64Value, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig, SeLinuxOption,
    UserNamespace,
};
use coracle_spec::Config;

use super::*;

const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1001::/home/app:/bin/sh\n";
const GROUP: &[u8] = b"root:x:0:\nstaff:x:50:app,other\nvideo:x:44:app\n# no entry\nappgroup:x:1001:\n";

/// A request with everything that inputs are borrowed from.
struct Request {
    pod: PodSandboxConfig,
    container: ContainerConfig,
    context: LinuxContainerSecurityContext,
    resources: Option<LinuxContainerResources>,
    image: ImageProcess,
    users: UserFiles,
    namespaces: PodNamespaces,
    files: PodFiles,
    devices: Vec<HostDevice>,
    seccomp_profile: Option<Vec<u8>>,
    host: HostFacts,
    defaults: Defaults,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            pod: PodSandboxConfig {
                hostname: "pod-0".to_owned(),
                ..Default::default()
            },
            container: ContainerConfig::default(),
            context: LinuxContainerSecurityContext::default(),
            resources: None,
            image: ImageProcess {
                cmd: words(&["/bin/server"]),
                ..Default::default()
            },
            users: UserFiles {
                passwd: PASSWD.to_vec(),
                group: GROUP.to_vec(),
            },
            namespaces: PodNamespaces {
                network: Some("/run/netns/n".to_owned()),
                ipc: Some("/proc/9/fd/5".to_owned()),
                uts: Some("/proc/9/fd/6".to_owned()),
                pid: Some("/proc/9/fd/7".to_owned()),
                user: None,
            },
            files: PodFiles {
                resolv_conf: Some("/run/p/resolv.conf".to_owned()),
                hostname: Some("/run/p/hostname".to_owned()),
                hosts: Some("/run/p/hosts".to_owned()),
                shm: Some("/run/p/shm".to_owned()),
            },
            devices: Vec::new(),
            seccomp_profile: None,
            host: HostFacts {
                cgroup_v2: true,
                swap_accounting: true,
                hugepage_sizes: words(&["2MB"]),
                hostname: "node".to_owned(),
            },
            defaults: Defaults {
                unset_seccomp: UnsetSeccomp::Runtime,
            },
        }
    }
}

impl Request {
    fn with(edit: impl FnOnce(&mut Self)) -> Self {
        let mut request = Self::default();
        edit(&mut request);
        request
    }

    fn generate(&self) -> Result<Generated, SpecError> {
        let mut container = self.container.clone();
        container.linux = Some(LinuxContainerConfig {
            resources: self.resources.clone(),
            security_context: Some(self.context.clone()),
        });
        let mounts: Vec<_> = (0..container.mounts.len())
            .map(|index| HostMount {
                index,
                source: format!("/host/{index}"),
            })
            .collect();
        generate(&Inputs {
            sandbox_id: "s",
            pod: &self.pod,
            container_id: "c",
            container: &container,
            image: &self.image,
            users: &self.users,
            cgroup_path: "/kubepods/pod/c",
            namespaces: &self.namespaces,
            files: &self.files,
            mounts: &mounts,
            devices: &self.devices,
            seccomp_profile: self.seccomp_profile.as_deref(),
            host: &self.host,
            defaults: &self.defaults,
        })
    }

    fn config(&self) -> Config {
        let generated = self.generate().unwrap_or_else(|error| panic!("{error}"));
        Config::from_slice(generated.config.to_string().as_bytes()).unwrap()
    }

    fn error(&self) -> String {
        match self.generate() {
            Ok(generated) => panic!("accepted: {}", generated.config),
            Err(error) => error.to_string(),
        }
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn number(value: i64) -> Option<Int64Value> {
    Some(Int64Value { value })
}

fn pid_mode(mode: NamespaceMode) -> Option<NamespaceOption> {
    Some(NamespaceOption {
        pid: mode.into(),
        ..Default::default()
    })
}

#[test]
fn a_plain_request_gives_a_config_that_the_runtime_accepts() {
    let config = Request::default().config();
    assert_eq!(config.warnings, []);
    assert_eq!(config.process.args, ["/bin/server"]);
    assert_eq!(config.process.env[1..], ["HOSTNAME=pod-0"]);
    assert_eq!(config.process.cwd, std::path::Path::new("/"));
    assert_eq!(config.root_path, std::path::Path::new("rootfs"));
    assert_eq!(config.hostname, None);
    let places: Vec<_> = config
        .mounts
        .iter()
        .map(|mount| mount.destination.to_str().unwrap())
        .collect();
    let expected = [
        "/proc",
        "/dev",
        "/sys",
        "/dev/pts",
        "/dev/mqueue",
        "/etc/resolv.conf",
        "/etc/hostname",
        "/etc/hosts",
        "/dev/shm",
        "/sys/fs/cgroup",
    ];
    assert_eq!(places, expected);
    assert!(config.seccomp.is_some());
    assert_eq!(config.resources.unwrap().devices().as_ref().unwrap().len(), 1);
}

#[test]
fn devices_are_made_and_allowed_alike() {
    let request = Request::with(|request| {
        request.devices = vec![HostDevice {
            path: "/dev/x".into(),
            kind: 'b',
            major: 8,
            minor: 1,
            mode: 0o660,
            uid: 1,
            gid: 6,
            access: "r".into(),
        }];
    });
    let generated = request.generate().unwrap().config;
    let rules = &generated["linux"]["resources"]["devices"];
    let allowed = json!({"allow": true, "type": "b", "major": 8, "minor": 1, "access": "r"});
    assert_eq!(*rules, json!([{"allow": false, "access": "rwm"}, allowed]));
    let node = &request.config().devices[0];
    assert_eq!((node.mode, node.uid, node.gid), (Some(0o660), Some(1), Some(6)));
}

#[test]
fn limits_follow_the_request() {
    let limits = |resources: LinuxContainerResources| {
        let request = Request::with(|request| request.resources = Some(resources));
        request.generate().map(|generated| generated.config)
    };
    let hugepages = |size: &str, limit| HugepageLimit {
        page_size: size.to_owned(),
        limit,
    };
    let config = limits(LinuxContainerResources {
        cpu_shares: 512,
        cpu_quota: -1,
        cpu_period: 100_000,
        cpuset_cpus: "0-1".to_owned(),
        memory_limit_in_bytes: 1 << 20,
        oom_score_adj: -997,
        hugepage_limits: vec![hugepages("2MB", 0), hugepages("1GB", 0)],
        unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    })
    .unwrap();
    let resources = &config["linux"]["resources"];
    assert_eq!(
        resources["cpu"],
        json!({"shares": 512, "quota": -1, "period": 100_000, "cpus": "0-1"})
    );
    assert_eq!(resources["memory"], json!({"limit": 1 << 20, "swap": 1 << 20}));
    assert_eq!(
        resources["hugepageLimits"],
        json!([{"pageSize": "2MB", "limit": 0}])
    );
    assert_eq!(resources["unified"], json!({"memory.oom.group": "1"}));
    assert_eq!(config["process"]["oomScoreAdj"], -997);

    let empty = limits(LinuxContainerResources::default()).unwrap();
    assert_eq!(empty["linux"]["resources"].as_object().unwrap().len(), 1);
    let missing = LinuxContainerResources {
        hugepage_limits: vec![hugepages("1GB", 5)],
        ..Default::default()
    };
    assert!(
        limits(missing)
            .unwrap_err()
            .to_string()
            .contains("hugepage_limits[0]")
    );
    let negative = LinuxContainerResources {
        cpu_shares: -1,
        ..Default::default()
    };
    assert!(
        limits(negative)
            .unwrap_err()
            .to_string()
            .contains("cpu_shares: -1 is negative")
    );
    let contradiction = LinuxContainerResources {
        memory_limit_in_bytes: 10,
        memory_swap_limit_in_bytes: 5,
        ..Default::default()
    };
    let error = limits(contradiction).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("linux.resources.memory.swap"), "{cause}");
}

#[test]
fn what_is_not_done_is_refused_by_name() {
    let selinux = Request::with(|request| {
        request.context.selinux_options = Some(SeLinuxOption {
            level: "s0:c1".into(),
            ..Default::default()
        });
    });
    assert!(
        selinux
            .error()
            .contains("selinux_options: an SELinux label is not supported in this release")
    );
    let cdi = Request::with(|request| request.container.cdi_devices = vec![Default::default()]);
    assert!(cdi.error().contains("config.CDI_devices"));
    let userns = Request::with(|request| {
        let userns_options = Some(UserNamespace::default());
        request.context.namespace_options = Some(NamespaceOption {
            userns_options,
            ..Default::default()
        });
    });
    assert!(
        userns
            .error()
            .contains("userns_options: a user namespace of the pod is not supported")
    );
}

#[test]
fn annotations_of_pods_and_containers_do_not_reach_the_runtime() {
    let request = Request::with(|request| {
        let hostile = [("run.oci.handler".to_owned(), "wasm".to_owned())];
        request.pod.annotations = hostile.clone().into();
        request.container.annotations = hostile.into();
    });
    let annotations = request.config().annotations;
    assert!(
        annotations
            .keys()
            .all(|key| key.starts_with("io.kubernetes.cri.")),
        "{annotations:?}"
    );
    assert_eq!(annotations["io.kubernetes.cri.sandbox-id"], "s");
}
