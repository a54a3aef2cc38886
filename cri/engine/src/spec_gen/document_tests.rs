//! Whole documents: whatever comes out is one that the runtime takes.

use coracle_proto::cri::{
    Capability, CdiDevice, Int64Value, KeyValue, LinuxContainerResources, Mount, NamespaceMode,
    SecurityProfile,
};
use coracle_spec::{Config, NamespaceKind, load_process};
use serde_json::json;

use super::fixture::Fixture;
use super::*;

fn loaded(fixture: &Fixture) -> Config {
    let made = generate(&fixture.inputs()).unwrap();
    let config = Config::from_slice(made.config.to_string().as_bytes()).unwrap();
    assert_eq!(config.warnings, []);
    config
}

/// Changes that each leave a request that works.
type Change = (&'static str, fn(&mut Fixture));

const CHANGES: &[Change] = &[
    ("terminal", |f| f.container.tty = true),
    ("arguments", |f| {
        f.container.args = vec!["-x".into(), String::new()];
    }),
    ("environment", |f| {
        f.container.envs = vec![KeyValue {
            key: "A".into(),
            value: b"b\nc".to_vec(),
        }];
        f.image.env = vec!["PATH=/x".into()];
    }),
    ("user", |f| {
        f.context().run_as_user = Some(Int64Value { value: 1000 });
    }),
    ("user name", |f| f.image.user = "app:extra".into()),
    ("groups", |f| {
        f.context().supplemental_groups = vec![0, 4_294_967_294];
    }),
    ("no new privileges", |f| f.context().no_new_privs = true),
    ("read-only root", |f| f.context().readonly_rootfs = true),
    ("privileged", |f| {
        f.pod_context().privileged = true;
        f.context().privileged = true;
        f.devices = vec![device("/dev/kmsg"), device("/dev/ptmx")];
    }),
    ("devices", |f| f.devices = vec![device("/dev/fuse")]),
    ("all capabilities", |f| {
        f.context().capabilities = Some(Capability {
            add_capabilities: vec!["ALL".into()],
            ..Default::default()
        });
    }),
    ("ambient capabilities", |f| {
        f.context().capabilities = Some(Capability {
            add_ambient_capabilities: vec!["net_raw".into()],
            ..Default::default()
        });
    }),
    ("unconfined", |f| {
        f.context().seccomp = Some(SecurityProfile {
            profile_type: 1,
            ..Default::default()
        });
    }),
    ("host's pid namespace", |f| {
        f.pod_options().pid = NamespaceMode::Node.into();
        f.options().pid = NamespaceMode::Node.into();
    }),
    ("host's namespaces", |f| {
        f.pod_options().network = NamespaceMode::Node.into();
        f.pod_options().ipc = NamespaceMode::Node.into();
        f.namespaces = PodNamespaces::default();
    }),
    ("shared pid namespace", |f| {
        f.pod_options().pid = NamespaceMode::Pod.into();
        f.namespaces.pid = Some("/proc/7/fd/5".into());
    }),
    ("cgroup v1", |f| f.host.cgroup_v2 = false),
    ("limits", |f| {
        f.linux().resources = Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 2,
            memory_limit_in_bytes: 1 << 20,
            oom_score_adj: -997,
            cpuset_cpus: "0".into(),
            hugepage_limits: vec![coracle_proto::cri::HugepageLimit {
                page_size: "2MB".into(),
                limit: 2 << 20,
            }],
            ..Default::default()
        });
    }),
    ("mounts", |f| {
        let mount = |path: &str, propagation: i32, readonly: bool| Mount {
            container_path: path.into(),
            host_path: "/srv".into(),
            propagation,
            readonly,
            recursive_read_only: readonly,
            ..Default::default()
        };
        f.set_mounts(vec![
            mount("/data/x", 0, true),
            mount("/data", 2, false),
            mount("/etc/hosts", 0, false),
            mount("/dev/termination-log", 1, false),
        ]);
    }),
    ("paths", |f| {
        f.context().masked_paths = vec!["/proc/kcore".into()];
        f.context().readonly_paths = vec!["/proc/sys".into()];
    }),
];

fn device(path: &str) -> HostDevice {
    HostDevice {
        path: path.into(),
        kind: 'c',
        major: 10,
        minor: 229,
        mode: 0o666,
        uid: 0,
        gid: 0,
        access: "rwm".into(),
    }
}

#[test]
fn the_runtime_takes_every_document() {
    loaded(&Fixture::default());
    for (i, (first, change)) in CHANGES.iter().enumerate() {
        let mut one = Fixture::default();
        change(&mut one);
        println!("{first}");
        loaded(&one);
        for (second, other) in &CHANGES[i + 1..] {
            let mut two = Fixture::default();
            change(&mut two);
            other(&mut two);
            // Some pairs contradict each other; those that do not must load.
            println!("{first} and {second}");
            if let Ok(made) = generate(&two.inputs()) {
                Config::from_slice(made.config.to_string().as_bytes()).unwrap();
                let exec = exec_process(&made.config, &["ls".to_owned()], false).unwrap();
                load_process(exec.to_string().as_bytes()).unwrap();
            }
        }
    }
}

#[test]
fn a_silent_request_is_a_confined_container() {
    let config = loaded(&Fixture::default());
    assert_eq!(config.process.capabilities.effective.count_ones(), 9);
    assert_eq!(config.process.capabilities.inheritable, 0);
    assert_eq!(config.process.oom_score_adj, Some(0));
    assert!(config.seccomp.is_some());
    assert!(!config.masked_paths.is_empty() && !config.readonly_paths.is_empty());
    for own in [NamespaceKind::Mount, NamespaceKind::Pid, NamespaceKind::Cgroup] {
        assert!(config.namespaces.is_new(own), "{own:?}");
    }
    assert_eq!(config.cgroups_path.as_deref(), Some("/kubepods/pod1/container"));
}

#[test]
fn privileged_is_unconfined_in_a_pod_that_says_so() {
    let mut fixture = Fixture::default();
    fixture.context().privileged = true;
    let error = generate(&fixture.inputs()).unwrap_err().to_string();
    assert!(error.contains("privileged"), "{error}");
    fixture.pod_context().privileged = true;
    let config = loaded(&fixture);
    assert_eq!(config.process.capabilities.bounding.count_ones(), 41);
    assert!(config.seccomp.is_none() && config.masked_paths.is_empty() && config.readonly_paths.is_empty());
    assert!(!config.namespaces.contains(NamespaceKind::Cgroup));
}

#[test]
fn words_of_users_do_not_reach_the_runtime() {
    let plain = generate(&Fixture::default().inputs()).unwrap();
    let mut fixture = Fixture::default();
    let hostile = [
        "org.systemd.property.ExecStop",
        "run.oci.handler",
        "org.criu.config",
        "io.kubernetes.cri.sandbox-id",
        "io.kubernetes.cri-o.UnifiedCgroup.c",
        "io.podman.annotations.privileged",
        "bundle",
        "module.wasm.image/variant",
    ];
    for key in hostile {
        for map in [
            &mut fixture.pod.annotations,
            &mut fixture.pod.labels,
            &mut fixture.container.annotations,
            &mut fixture.container.labels,
        ] {
            map.insert(key.to_owned(), "evil".to_owned());
        }
    }
    assert_eq!(generate(&fixture.inputs()).unwrap(), plain);
}

#[test]
fn ids_are_told_for_the_status() {
    let mut fixture = Fixture::default();
    fixture.image.user = "app".into();
    let made = generate(&fixture.inputs()).unwrap();
    assert_eq!((made.uid, made.gid, made.groups), (1000, 1001, vec![1001, 3000]));
    let user = json!({ "uid": 1000, "gid": 1001, "additionalGids": [1001, 3000] });
    assert_eq!(made.config["process"]["user"], user);
}

#[test]
fn what_is_not_done_is_refused() {
    let mut fixture = Fixture::default();
    fixture.container.cdi_devices = vec![CdiDevice {
        name: "vendor.com/gpu=0".into(),
    }];
    let error = generate(&fixture.inputs()).unwrap_err().to_string();
    assert!(error.starts_with("config.CDI_devices: "), "{error}");
    let mut fixture = Fixture::default();
    fixture.container.windows = Some(Default::default());
    generate(&fixture.inputs()).unwrap_err();
    let mut fixture = Fixture::default();
    fixture.linux().resources = Some(LinuxContainerResources {
        oom_score_adj: 1001,
        ..Default::default()
    });
    generate(&fixture.inputs()).unwrap_err();
}
