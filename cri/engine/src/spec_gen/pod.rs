//! What a sandbox's request says: refused before anything is made where it cannot be done.

use std::collections::BTreeMap;

use coracle_proto::cri::{NamespaceMode, PodSandboxConfig};
use coracle_spec::{NamespaceKind, sysctl_path, sysctl_problem};

use super::SpecError;
use super::error::{Result, invalid, known, unsupported};
use super::{namespaces, security};

const CONTEXT: &str = "config.linux.security_context";

/// Longest value of a kernel parameter; lists of reserved ports are the longest.
const VALUE_BYTES: usize = 1024;

/// Checks a sandbox's request. What concerns a process of the sandbox alone (its user, its filter) has no effect:
/// there is none.
///
/// # Errors
/// The request asks for what cannot be, or for what this release does not do.
pub fn check_pod(pod: &PodSandboxConfig) -> std::result::Result<(), SpecError> {
    if pod.windows.is_some() {
        return Err(unsupported("config.windows", "a Windows sandbox"));
    }
    check_hostname(&pod.hostname)?;
    let options = namespaces::options_of(pod);
    let field = format!("{CONTEXT}.namespace_options");
    for (name, value) in [
        ("network", options.network),
        ("ipc", options.ipc),
        ("pid", options.pid),
    ] {
        let field = format!("{field}.{name}");
        match known(&field, value)? {
            NamespaceMode::Pod | NamespaceMode::Node => {}
            NamespaceMode::Container if name == "pid" => {}
            _ => return Err(invalid(field, "is not a mode of a pod")),
        }
    }
    namespaces::check_user(&field, &options)?;
    if let Some(context) = pod
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
    {
        if context.run_as_group.is_some() && context.run_as_user.is_none() {
            return Err(invalid(
                format!("{CONTEXT}.run_as_group"),
                "is given without run_as_user",
            ));
        }
        security::check_selinux(CONTEXT, context.privileged, context.selinux_options.as_ref())?;
    }
    super::network(pod)?;
    sysctls(pod).map(|_| ())
}

/// The kernel parameters of a pod, by their dotted names, each once. Only those of a namespace that the pod has for
/// itself: the others are the host's.
///
/// # Errors
/// A name is none, is the host's, or is given in two spellings; a value holds what no parameter's does.
pub fn sysctls(pod: &PodSandboxConfig) -> std::result::Result<Vec<(String, String)>, SpecError> {
    let options = namespaces::options_of(pod);
    let own = |kind: NamespaceKind| match kind {
        NamespaceKind::Network => options.network() == NamespaceMode::Pod,
        NamespaceKind::Ipc => options.ipc() == NamespaceMode::Pod,
        _ => false,
    };
    let empty = BTreeMap::new();
    let asked = pod.linux.as_ref().map_or(&empty, |linux| &linux.sysctls);
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in asked {
        let field = || {
            format!(
                "config.linux.sysctls[{:?}]",
                name.chars().take(64).collect::<String>()
            )
        };
        let path =
            sysctl_path(name).ok_or_else(|| invalid(field(), "is not the name of a kernel parameter"))?;
        if path.starts_with("user/") || path == "kernel/domainname" {
            return Err(unsupported(field(), "setting it"));
        }
        if let Some(problem) = sysctl_problem(name, value, own) {
            return Err(invalid(field(), problem));
        }
        check_value(value).map_err(|why| invalid(field(), why))?;
        if found.insert(dotted(&path), value.clone()).is_some() {
            return Err(invalid(field(), "is given twice"));
        }
    }
    Ok(found.into_iter().collect())
}

/// It becomes a line of a file and the value of a variable.
fn check_hostname(name: &str) -> Result<()> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if name.len() > 64 || !name.bytes().all(known) {
        let short: String = name.chars().take(80).collect();
        return Err(invalid(
            "config.hostname",
            format!("{short:?} is not a host name"),
        ));
    }
    Ok(())
}

/// Numbers, words and lists of them; nothing that could end the value or begin another.
fn check_value(value: &str) -> std::result::Result<(), &'static str> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b" \t,.:/_-".contains(&byte);
    if value.is_empty() || value.len() > VALUE_BYTES {
        return Err("has a value that is empty or too long");
    }
    if !value.bytes().all(allowed) {
        return Err("has a value with characters that no kernel parameter needs");
    }
    Ok(())
}

fn dotted(path: &str) -> String {
    let swap = |c| match c {
        '/' => '.',
        '.' => '/',
        c => c,
    };
    path.chars().map(swap).collect()
}

/// What a container's request asks of its pod.
pub(super) fn check_privileged(pod: &PodSandboxConfig, privileged: bool) -> Result<()> {
    let context = pod
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    if privileged && !context.is_some_and(|context| context.privileged) {
        return Err(invalid(
            format!("{CONTEXT}.privileged"),
            "is not allowed in a sandbox that is not privileged",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use coracle_proto::cri::{
        Int64Value, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption, SeLinuxOption,
        UserNamespace,
    };

    use super::*;

    fn pod(options: NamespaceOption, parameters: &[(&str, &str)]) -> PodSandboxConfig {
        PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                sysctls: parameters
                    .iter()
                    .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
                    .collect(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn parameters_of_the_pods_own_namespaces_are_set_by_one_spelling() {
        let asked = [
            ("net.ipv4.ip_local_reserved_ports", "80,443-445"),
            ("net/ipv4/conf/eth0.1/forwarding", "1"),
            ("kernel.shm_rmid_forced", "1"),
            ("fs.mqueue.msg_max", "10"),
            ("kernel.sem", "250 32000\t32 128"),
        ];
        let made = sysctls(&pod(Default::default(), &asked)).unwrap();
        let names: Vec<&str> = made.iter().map(|(name, _)| name.as_str()).collect();
        let expected = [
            "fs.mqueue.msg_max",
            "kernel.sem",
            "kernel.shm_rmid_forced",
            "net.ipv4.conf.eth0/1.forwarding",
            "net.ipv4.ip_local_reserved_ports",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn the_hosts_parameters_are_out_of_reach() {
        let names = [
            "kernel.core_pattern",
            "kernel/core_pattern",
            "kernel.hostname",
            "kernel.domainname",
            "vm.swappiness",
            "fs.file-max",
            "fs.mqueuex.a",
            "user.max_user_namespaces",
            "net",
            "",
            ".",
            "net..x",
            "net/../kernel/x",
            "net.ipv4.x+kernel.core_pattern",
            "net.ipv4.x\nkernel.core_pattern",
            " net.ipv4.x",
            "kernel.shm_rmid_forced ",
            "/net/x",
            "net.ipv4.\0",
            "kernel",
            "kernel.sem.x",
            "Net.ipv4.x",
            "kernel.shmmax/../core_pattern",
        ];
        for name in names {
            let asked = pod(Default::default(), &[(name, "1")]);
            assert!(sysctls(&asked).is_err(), "{name:?}");
            assert!(check_pod(&asked).is_err(), "{name:?}");
        }
        for value in [
            "",
            "1\n",
            "1+kernel.core_pattern=|/evil",
            "a=b",
            "|/x",
            "\0",
            "1;2",
            &"1".repeat(2000),
        ] {
            assert!(
                sysctls(&pod(Default::default(), &[("net.ipv4.x", value)])).is_err(),
                "{value:?}"
            );
        }
        let twice = [("net.ipv4.x", "1"), ("net/ipv4/x", "2")];
        sysctls(&pod(Default::default(), &twice)).unwrap_err();
    }

    #[test]
    fn a_pod_in_the_hosts_namespaces_sets_none_of_theirs() {
        let node = i32::from(NamespaceMode::Node);
        let on_host_network = NamespaceOption {
            network: node,
            ..Default::default()
        };
        let on_host_ipc = NamespaceOption {
            ipc: node,
            ..Default::default()
        };
        let (net, ipc) = (("net.ipv4.x", "1"), ("kernel.shmmax", "1"));
        sysctls(&pod(on_host_network.clone(), &[net])).unwrap_err();
        sysctls(&pod(on_host_network, &[ipc])).unwrap();
        sysctls(&pod(on_host_ipc.clone(), &[ipc])).unwrap_err();
        sysctls(&pod(on_host_ipc, &[net])).unwrap();
    }

    #[test]
    fn what_a_pod_cannot_have_names_its_field() {
        check_pod(&PodSandboxConfig::default()).unwrap();
        let context = |change: &dyn Fn(&mut LinuxSandboxSecurityContext)| {
            let mut pod = pod(Default::default(), &[]);
            change(pod.linux.as_mut().unwrap().security_context.as_mut().unwrap());
            check_pod(&pod).map_err(|error| error.to_string())
        };
        let options = |change: &dyn Fn(&mut NamespaceOption)| {
            context(&|context| change(context.namespace_options.as_mut().unwrap()))
        };
        for (field, made) in [
            (
                "run_as_group",
                context(&|c| c.run_as_group = Some(Int64Value { value: 1 })),
            ),
            (
                "selinux_options",
                context(&|c| {
                    c.selinux_options = Some(SeLinuxOption {
                        level: "s0".into(),
                        ..Default::default()
                    });
                }),
            ),
            ("namespace_options.network", options(&|o| o.network = 1)),
            ("namespace_options.network", options(&|o| o.network = 9)),
            ("namespace_options.ipc", options(&|o| o.ipc = 3)),
            ("namespace_options.pid", options(&|o| o.pid = 3)),
            (
                "namespace_options.userns_options",
                options(&|o| o.userns_options = Some(UserNamespace::default())),
            ),
        ] {
            let error = made.unwrap_err();
            assert!(error.starts_with(&format!("{CONTEXT}.{field}")), "{error}");
        }
        options(&|o| o.pid = 1).unwrap();
    }
}
