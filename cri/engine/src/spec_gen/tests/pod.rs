//! Requests for sandboxes.

use coracle_proto::cri::{
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PortMapping,
};

use super::super::{check_pod, sysctls};
use super::{number, pid_mode};

/// What `check_pod` says of a sandbox; empty: nothing.
fn checked(
    edit: impl FnOnce(&mut PodSandboxConfig, &mut LinuxSandboxSecurityContext, &mut LinuxPodSandboxConfig),
) -> String {
    let mut pod = PodSandboxConfig {
        hostname: "p".to_owned(),
        ..Default::default()
    };
    let mut context = LinuxSandboxSecurityContext::default();
    let mut linux = LinuxPodSandboxConfig::default();
    edit(&mut pod, &mut context, &mut linux);
    linux.security_context = Some(context);
    pod.linux = Some(linux);
    check_pod(&pod).map_or_else(|error| error.to_string(), |()| String::new())
}

fn host_namespaces() -> Option<NamespaceOption> {
    Some(NamespaceOption {
        network: NamespaceMode::Node.into(),
        ipc: NamespaceMode::Node.into(),
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    })
}

#[test]
fn sandboxes_are_checked_before_anything_is_made() {
    assert_eq!(checked(|_, _, _| {}), "");
    assert_eq!(
        checked(|_, context, _| context.namespace_options = host_namespaces()),
        ""
    );
    for name in ["a b", "a\n127.0.0.1 evil", "x/y", &"x".repeat(65)] {
        let error = checked(|pod, _, _| pod.hostname = name.to_owned());
        assert!(error.starts_with("config.hostname"), "{name:?}");
    }
    let target = checked(|_, context, _| context.namespace_options = pid_mode(NamespaceMode::Target));
    assert!(target.contains("namespace_options.pid"), "{target}");
    let group = checked(|_, context, _| context.run_as_group = number(1));
    assert!(group.contains("run_as_group"), "{group}");
    let mapped = checked(|pod, _, _| {
        pod.port_mappings = vec![
            PortMapping::default(),
            PortMapping {
                host_port: 80,
                ..Default::default()
            },
        ];
    });
    assert!(
        mapped.starts_with("config.port_mappings[1].container_port"),
        "{mapped}"
    );
}

#[test]
fn only_kernel_parameters_of_the_pods_own_namespaces_are_taken() {
    let sysctl = |name: &str, value: &str, options: Option<NamespaceOption>| {
        checked(|_, context, linux| {
            context.namespace_options = options;
            linux.sysctls = [(name.to_owned(), value.to_owned())].into();
        })
    };
    assert_eq!(sysctl("net.ipv4.tcp_syncookies", "1", None), "");
    assert_eq!(sysctl("kernel.shm_rmid_forced", "1", None), "");
    let hostile = [
        "kernel.core_pattern",
        "vm.swappiness",
        "net..x",
        "kernel.shmmax+kernel.core_pattern",
        "net/../kernel/core_pattern",
        "user.max_user_namespaces",
        "",
    ];
    for name in hostile {
        assert!(
            sysctl(name, "1", None).starts_with("config.linux.sysctls"),
            "{name}"
        );
    }
    assert!(sysctl("net.core.somaxconn", "1\n2", None).contains("line break"));
    let network = sysctl("net.core.somaxconn", "1", host_namespaces());
    assert!(
        network.contains("is not allowed without a network namespace"),
        "{network}"
    );
    let ipc = sysctl("kernel.msgmax", "1", host_namespaces());
    assert!(ipc.contains("is not allowed without an IPC namespace"), "{ipc}");
}

#[test]
fn sysctls_come_out_with_dots() {
    let pod = PodSandboxConfig {
        linux: Some(LinuxPodSandboxConfig {
            sysctls: [("net/ipv4/conf/eth0.1/forwarding".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let expected = ("net.ipv4.conf.eth0/1.forwarding".to_owned(), "1".to_owned());
    assert_eq!(sysctls(&pod).unwrap(), [expected]);
}
