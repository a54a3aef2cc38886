//! What a sandbox's request says about its network.

use std::net::IpAddr;

use coracle_network::{AttachOptions, Dns, PodIdentity, PortMapping, Protocol};
use coracle_proto::cri::{NamespaceMode, PodSandboxConfig, Protocol as CriProtocol};

use super::SpecError;
use super::error::{Result, invalid, known};
use super::namespaces;

/// Most ports of the host that one pod may ask for; each is a rule of the kernel's.
const PORTS_MAX: usize = 4096;

/// What the pod's network is to be made with; a pod on the host's network asks for nothing.
///
/// # Errors
/// A port, protocol, address or resolver setting is none.
pub fn network(pod: &PodSandboxConfig) -> std::result::Result<AttachOptions, SpecError> {
    if namespaces::options_of(pod).network() == NamespaceMode::Node {
        return Ok(AttachOptions::default());
    }
    let metadata = pod.metadata.clone().unwrap_or_default();
    let sysctls = super::sysctls(pod)?.into_iter();
    let cgroup_parent = pod.linux.as_ref().map(|linux| linux.cgroup_parent.clone());
    Ok(AttachOptions {
        sysctls: sysctls.filter(|(name, _)| name.starts_with("net.")).collect(),
        identity: PodIdentity {
            namespace: metadata.namespace,
            name: metadata.name,
            uid: metadata.uid,
        },
        annotations: pod.annotations.clone(),
        dns: pod.dns_config.clone().map(|dns| Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        port_mappings: port_mappings(pod)?,
        cgroup_parent: cgroup_parent.filter(|parent| !parent.is_empty()),
    })
}

/// Ports of the host that lead to the pod. Kubelets list every port of every container; those without one of the host
/// need nothing.
fn port_mappings(pod: &PodSandboxConfig) -> Result<Vec<PortMapping>> {
    let mut mappings = Vec::new();
    for (i, asked) in pod.port_mappings.iter().enumerate() {
        if asked.host_port == 0 {
            continue;
        }
        let field = |name: &str| format!("config.port_mappings[{i}].{name}");
        let port = |name: &str, number: i32| match u16::try_from(number) {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(invalid(field(name), format!("{number} is not a port"))),
        };
        let host_ip = match asked.host_ip.as_str() {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_| {
                let short: String = text.chars().take(64).collect();
                invalid(field("host_ip"), format!("{short:?} is not an address"))
            })?),
        };
        mappings.push(PortMapping {
            protocol: match known(&field("protocol"), asked.protocol)? {
                CriProtocol::Tcp => Protocol::Tcp,
                CriProtocol::Udp => Protocol::Udp,
                CriProtocol::Sctp => Protocol::Sctp,
            },
            container_port: port("container_port", asked.container_port)?,
            host_port: port("host_port", asked.host_port)?,
            host_ip,
        });
    }
    if mappings.len() > PORTS_MAX {
        return Err(invalid(
            "config.port_mappings",
            format!("asks for more than {PORTS_MAX} ports of the host"),
        ));
    }
    Ok(mappings)
}

#[cfg(test)]
mod tests {
    use coracle_proto::cri::{
        DnsConfig, LinuxPodSandboxConfig, NamespaceOption, PodSandboxMetadata, PortMapping as CriMapping,
    };

    use super::*;

    fn with(mapping: CriMapping) -> std::result::Result<AttachOptions, String> {
        let pod = PodSandboxConfig {
            port_mappings: vec![CriMapping::default(), mapping],
            ..Default::default()
        };
        network(&pod).map_err(|error| error.to_string())
    }

    #[test]
    fn what_the_request_says_is_passed_on() {
        let mut pod = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: "web".into(),
                uid: "1-2".into(),
                namespace: "default".into(),
                attempt: 1,
            }),
            dns_config: Some(DnsConfig {
                servers: vec!["10.0.0.10".into()],
                ..Default::default()
            }),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/x".into(),
                ..Default::default()
            }),
            port_mappings: vec![
                CriMapping {
                    container_port: 53,
                    ..Default::default()
                },
                CriMapping {
                    protocol: CriProtocol::Udp.into(),
                    container_port: 53,
                    host_port: 5353,
                    host_ip: "::1".into(),
                },
            ],
            ..Default::default()
        };
        let options = network(&pod).unwrap();
        assert_eq!(
            options.port_mappings,
            [PortMapping {
                protocol: Protocol::Udp,
                container_port: 53,
                host_port: 5353,
                host_ip: Some("::1".parse().unwrap()),
            }]
        );
        assert_eq!(
            (options.identity.name.as_str(), options.identity.uid.as_str()),
            ("web", "1-2")
        );
        assert_eq!(options.dns.unwrap().servers, ["10.0.0.10"]);
        assert_eq!(options.cgroup_parent.as_deref(), Some("/kubepods/x"));

        let host = NamespaceOption {
            network: NamespaceMode::Node.into(),
            ..Default::default()
        };
        pod.linux = Some(LinuxPodSandboxConfig {
            security_context: Some(coracle_proto::cri::LinuxSandboxSecurityContext {
                namespace_options: Some(host),
                ..Default::default()
            }),
            ..Default::default()
        });
        assert_eq!(network(&pod).unwrap(), AttachOptions::default());
    }

    #[test]
    fn ports_that_are_none_are_refused_by_name() {
        let mapping = CriMapping {
            container_port: 80,
            host_port: 8080,
            ..Default::default()
        };
        assert_eq!(with(mapping.clone()).unwrap().port_mappings.len(), 1);
        for (field, bad) in [
            (
                "host_port",
                CriMapping {
                    host_port: -1,
                    ..mapping.clone()
                },
            ),
            (
                "host_port",
                CriMapping {
                    host_port: 65536,
                    ..mapping.clone()
                },
            ),
            (
                "container_port",
                CriMapping {
                    container_port: 0,
                    ..mapping.clone()
                },
            ),
            (
                "container_port",
                CriMapping {
                    container_port: 70000,
                    ..mapping.clone()
                },
            ),
            (
                "protocol",
                CriMapping {
                    protocol: 9,
                    ..mapping.clone()
                },
            ),
            (
                "host_ip",
                CriMapping {
                    host_ip: "localhost".into(),
                    ..mapping.clone()
                },
            ),
            (
                "host_ip",
                CriMapping {
                    host_ip: "10.0.0.1/8".into(),
                    ..mapping.clone()
                },
            ),
        ] {
            let error = with(bad).unwrap_err();
            assert!(
                error.starts_with(&format!("config.port_mappings[1].{field}")),
                "{error}"
            );
        }
        let many = PodSandboxConfig {
            port_mappings: vec![mapping; 5000],
            ..Default::default()
        };
        assert!(network(&many).unwrap_err().to_string().contains("more than 4096"));
    }
}
