//! Configurations as five engines write them: each is accepted, and means what its engine meant.

#![allow(
    clippy::unwrap_used,
    reason = "what cannot be unwrapped fails the test, in its helpers too"
)]

use coracle_spec::oci::LinuxSeccompOperator;
use coracle_spec::{
    Attrs, Bind, CapabilitySets, Config, Device, Namespace, NamespaceKind, Rlimit, Scheduler, attr,
    capability_number,
};

fn load(text: &str) -> Config {
    Config::from_slice(text.as_bytes()).unwrap_or_else(|error| panic!("{error}"))
}

fn mask(names: &[&str]) -> u64 {
    names
        .iter()
        .fold(0, |mask, name| mask | 1 << capability_number(name).unwrap())
}

#[test]
fn docker() {
    let config = load(include_str!("corpus/docker.json"));
    assert_eq!(config.warnings, []);
    assert!(config.process.terminal);
    assert_eq!(config.process.console_size, Some((48, 180)));
    assert_eq!(config.process.capabilities.effective, 0xa804_25fb);
    assert_eq!(config.process.capabilities.inheritable, 0);
    assert_eq!(config.process.oom_score_adj, Some(0));
    assert_eq!(config.hooks.prestart.len(), 1);
    assert_eq!(config.hooks.prestart[0].env, None);
    // An empty object is no limit, not the limit 0.
    assert!(config.resources.as_ref().unwrap().pids().is_none());
    assert_eq!(
        config
            .cgroups_path
            .as_deref()
            .map(|path| path.matches(':').count()),
        Some(2)
    );
    assert_eq!(config.sysctl["net/ipv4/ip_unprivileged_port_start"], "0");
    let seccomp = config.seccomp.unwrap();
    let rule = &seccomp.syscalls().as_ref().unwrap()[5];
    assert_eq!(
        rule.args().as_ref().unwrap()[0].op(),
        LinuxSeccompOperator::ScmpCmpMaskedEq
    );
    assert!(seccomp.flags().is_none());
}

#[test]
fn podman() {
    let config = load(include_str!("corpus/podman.json"));
    assert_eq!(config.warnings, []);
    assert_eq!(config.process.user.umask, Some(0o022));
    assert_eq!(
        config.process.rlimits[0],
        Rlimit {
            resource: 7,
            soft: 1_048_576,
            hard: 1_048_576
        }
    );
    assert_eq!(
        config.namespaces.get(NamespaceKind::Network),
        Some(&Namespace::Join("/run/netns/netns-1f2e3d4c".into()))
    );
    let data = config
        .mounts
        .iter()
        .find(|mount| mount.destination.ends_with("data"))
        .unwrap();
    assert_eq!(data.options.bind, Bind::Recursive);
    assert_eq!(
        data.options.attrs,
        Attrs {
            set: attr::RDONLY,
            clear: 0
        }
    );
    let tmp = config
        .mounts
        .iter()
        .find(|mount| mount.destination.ends_with("tmp"))
        .unwrap();
    assert!(tmp.options.tmpcopyup);
    assert!(tmp.options.data.is_empty());
    assert_eq!(config.hooks.create_runtime[0].timeout_secs, Some(5));
    assert_eq!(config.resources.unwrap().pids().as_ref().unwrap().limit(), 2048);
    assert!(config.process.env.iter().any(|entry| entry == "MULTI=a\nb"));
}

#[test]
fn containerd() {
    let config = load(include_str!("corpus/containerd-cri.json"));
    assert_eq!(config.warnings, []);
    assert!(config.root_readonly);
    assert!(config.process.no_new_privileges);
    assert_eq!(config.process.user.additional_gids, [65534, 2000]);
    assert_eq!(config.namespaces.clone_flags(), 0x2202_0000);
    let secret = config.mounts.last().unwrap();
    assert_eq!(
        secret.options.recursive_attrs,
        Attrs {
            set: attr::RDONLY,
            clear: 0
        }
    );
    assert!(secret.options.attrs.is_empty());
    // Here the 0 was written, so it is a limit.
    assert_eq!(config.resources.unwrap().pids().as_ref().unwrap().limit(), 0);
}

#[test]
fn crio() {
    let config = load(include_str!("corpus/crio.json"));
    assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
    assert_eq!(config.warnings[0].path, "process.capabilities.bounding[9]");
    let nine = mask(&[
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "KILL",
    ]);
    assert_eq!(
        config.process.capabilities,
        CapabilitySets {
            bounding: nine,
            effective: nine,
            permitted: nine,
            inheritable: 0,
            ambient: 0
        }
    );
    assert_eq!(config.process.io_priority, Some(2 << 13 | 4));
    assert_eq!(
        config.process.scheduler,
        Some(Scheduler {
            policy: 3,
            flags: 1,
            nice: 5,
            ..Scheduler::default()
        })
    );
    let affinity = config.process.exec_cpu_affinity.unwrap();
    assert_eq!((affinity.initial, affinity.last), (vec![0, 1], vec![2]));
    assert_eq!(
        config.devices,
        [Device {
            path: "/dev/fuse".into(),
            file_type: 0o020_000,
            major: 10,
            minor: 229,
            mode: Some(0o666),
            uid: Some(0),
            gid: Some(0)
        }]
    );
    assert_eq!(config.uid_mappings[0].host_id, 100_000);
    assert!(config.resources.unwrap().pids().is_none());
    assert!(config.hooks.poststop.is_empty());
}

#[test]
fn the_oldest_template() {
    let config = load(include_str!("corpus/runc-1.0.json"));
    assert_eq!(config.warnings, []);
    assert_eq!(
        config.process.capabilities.ambient,
        mask(&["AUDIT_WRITE", "KILL", "NET_BIND_SERVICE"])
    );
    assert!(!config.namespaces.contains(NamespaceKind::Cgroup));
}
