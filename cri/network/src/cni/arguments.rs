//! What a pod's request says to the plugins: `CNI_ARGS`, and values of the capabilities that plugins declare.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::CniError;
use crate::{AttachOptions, PodIdentity, Protocol};

/// Annotations of a pod that become capabilities. A plugin gets them only where the network's configuration declares
/// the capability: that is where an operator allows pods to choose.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
const MAC: &str = "cni.coracle/mac";
const IPS: &str = "cni.coracle/ips";
const INFINIBAND_GUID: &str = "cni.coracle/infiniband-guid";

/// Bandwidths that make sense, in bits a second.
const BANDWIDTHS: std::ops::RangeInclusive<u128> = 1000..=1_000_000_000_000_000;
/// Bits that may go at once; the most that the plugin takes.
const BURST: u32 = u32::MAX;
/// Longest value of an argument.
const ARGUMENT_BYTES: usize = 1024;

/// `CNI_ARGS` of a pod.
pub(super) fn arguments(pod: &str, identity: &PodIdentity) -> Result<Vec<(String, String)>, CniError> {
    let mut arguments = vec![("IgnoreUnknown".to_owned(), "1".to_owned())];
    for (name, value) in [
        ("K8S_POD_NAMESPACE", identity.namespace.as_str()),
        ("K8S_POD_NAME", &identity.name),
        ("K8S_POD_INFRA_CONTAINER_ID", pod),
        ("K8S_POD_UID", &identity.uid),
    ] {
        // Plugins split the list at these; there is no way to quote them.
        let breaks = |c: char| c == ';' || c == '=' || c.is_control();
        if value.len() > ARGUMENT_BYTES || value.contains(breaks) {
            return Err(CniError::Argument {
                name,
                why: "is too long, or holds ';', '=' or a control character".to_owned(),
            });
        }
        arguments.push((name.to_owned(), value.to_owned()));
    }
    Ok(arguments)
}

/// The list as plugins read it.
pub(super) fn arguments_text(arguments: &[(String, String)]) -> String {
    let pairs: Vec<_> = arguments
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    pairs.join(";")
}

/// Values of all capabilities that the request has something for. `pod_cidrs` are the node's.
pub(super) fn capabilities(
    options: &AttachOptions,
    pod_cidrs: &[String],
) -> Result<Map<String, Value>, CniError> {
    let mut values = Map::new();
    if !options.port_mappings.is_empty() {
        let mappings = options.port_mappings.iter().map(|mapping| {
            json!({
                "hostPort": mapping.host_port,
                "containerPort": mapping.container_port,
                "protocol": match mapping.protocol {
                    Protocol::Tcp => "tcp",
                    Protocol::Udp => "udp",
                    Protocol::Sctp => "sctp",
                },
                "hostIP": mapping.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            })
        });
        values.insert("portMappings".to_owned(), mappings.collect());
    }
    if let Some(dns) = &options.dns {
        let dns = json!({"servers": dns.servers, "searches": dns.searches, "options": dns.options});
        values.insert("dns".to_owned(), dns);
    }
    if let Some(bandwidth) = bandwidth(&options.annotations)? {
        values.insert("bandwidth".to_owned(), bandwidth);
    }
    if !pod_cidrs.is_empty() {
        let ranges = pod_cidrs.iter().map(|cidr| json!([{"subnet": cidr}]));
        values.insert("ipRanges".to_owned(), ranges.collect());
    }
    if let Some(mac) = octets(&options.annotations, MAC, 6)? {
        values.insert("mac".to_owned(), mac);
    }
    if let Some(guid) = octets(&options.annotations, INFINIBAND_GUID, 8)? {
        values.insert("infinibandGUID".to_owned(), guid);
    }
    if let Some(text) = options.annotations.get(IPS) {
        values.insert("ips".to_owned(), ips(text)?);
    }
    if let Some(parent) = &options.cgroup_parent {
        values.insert("cgroupPath".to_owned(), parent.as_str().into());
    }
    // The name is containerd's; plugins that read annotations know it by that.
    values.insert(
        "io.kubernetes.cri.pod-annotations".to_owned(),
        json!(options.annotations),
    );
    Ok(values)
}

/// Limits of the pod's traffic.
fn bandwidth(annotations: &BTreeMap<String, String>) -> Result<Option<Value>, CniError> {
    let mut limits = Map::new();
    for (annotation, rate, burst) in [
        (INGRESS, "ingressRate", "ingressBurst"),
        (EGRESS, "egressRate", "egressBurst"),
    ] {
        let Some(text) = annotations.get(annotation) else {
            continue;
        };
        let bits = quantity(text).filter(|bits| BANDWIDTHS.contains(bits));
        let bits = bits.and_then(|bits| u64::try_from(bits).ok());
        let bits = bits.ok_or_else(|| refused(annotation, text, "is not a quantity from 1k to 1P"))?;
        limits.insert(rate.to_owned(), bits.into());
        limits.insert(burst.to_owned(), BURST.into());
    }
    Ok((!limits.is_empty()).then_some(Value::Object(limits)))
}

/// A quantity as Kubernetes writes them, rounded up to a whole number: `1.5M`, `10Ki`, `2e6`.
fn quantity(text: &str) -> Option<u128> {
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at_checked(digits_end)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if number.len() > 20 || fraction.contains('.') || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let mantissa: u128 = format!("{whole}{fraction}").parse().ok()?;
    let mut divisor = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let factor = match suffix {
        "" => 1,
        "m" | "u" | "n" => {
            let power = match suffix {
                "m" => 3,
                "u" => 6,
                _ => 9,
            };
            divisor = divisor.checked_mul(10_u128.pow(power))?;
            1
        }
        "k" => 1000,
        "M" => 1000_u128.pow(2),
        "G" => 1000_u128.pow(3),
        "T" => 1000_u128.pow(4),
        "P" => 1000_u128.pow(5),
        "E" => 1000_u128.pow(6),
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        "Ei" => 1 << 60,
        exponent => {
            let exponent: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10_u128.pow(exponent.unsigned_abs().min(30));
            if exponent < 0 {
                divisor = divisor.checked_mul(power)?;
                1
            } else {
                power
            }
        }
    };
    Some(mantissa.checked_mul(factor)?.div_ceil(divisor))
}

/// An address of a card: so many pairs of hex digits with colons.
fn octets(
    annotations: &BTreeMap<String, String>,
    name: &'static str,
    count: usize,
) -> Result<Option<Value>, CniError> {
    let Some(text) = annotations.get(name) else {
        return Ok(None);
    };
    let is_octet = |part: &str| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    if text.split(':').count() != count || !text.split(':').all(is_octet) {
        return Err(refused(name, text, "is not an address of a card"));
    }
    Ok(Some(text.as_str().into()))
}

/// Addresses with or without prefix, separated by commas.
fn ips(text: &str) -> Result<Value, CniError> {
    let valid = |part: &&str| {
        let (address, prefix) = part.split_once('/').unwrap_or((part, "0"));
        address.parse::<IpAddr>().is_ok() && prefix.parse::<u8>().is_ok_and(|prefix| prefix <= 128)
    };
    let parts: Vec<_> = text.split(',').map(str::trim).collect();
    if parts.len() > 16 || !parts.iter().all(valid) {
        return Err(refused(IPS, text, "is not a list of addresses"));
    }
    Ok(json!(parts))
}

fn refused(name: &'static str, text: &str, why: &str) -> CniError {
    let short: String = text.chars().take(64).collect();
    CniError::Argument {
        name,
        why: format!("{short:?} {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dns, PortMapping};

    fn annotated(pairs: &[(&str, &str)]) -> AttachOptions {
        AttachOptions {
            annotations: pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            ..AttachOptions::default()
        }
    }

    #[test]
    fn nothing_breaks_out_of_the_arguments() {
        let identity = PodIdentity {
            namespace: "default".into(),
            name: "web-0".into(),
            uid: "1-2-3".into(),
        };
        assert_eq!(
            arguments_text(&arguments("pod1", &identity).unwrap()),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;\
             K8S_POD_INFRA_CONTAINER_ID=pod1;K8S_POD_UID=1-2-3"
        );
        for bad in ["a;IP=10.0.0.1", "a=b", "a\nb", &"x".repeat(2000)] {
            let mut other = identity.clone();
            other.name = bad.to_owned();
            let error = arguments("pod1", &other).unwrap_err().to_string();
            assert!(error.contains("K8S_POD_NAME"), "{error}");
        }
    }

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, value) in [
            ("1000", Some(1000)),
            ("10M", Some(10_000_000)),
            ("1.5k", Some(1500)),
            ("1.0001k", Some(1001)),
            ("1Ki", Some(1024)),
            ("2e6", Some(2_000_000)),
            ("2E3", Some(2000)),
            ("1E", Some(1_000_000_000_000_000_000)),
            ("5000m", Some(5)),
            ("1500u", Some(1)),
            ("3000000000n", Some(3)),
            ("2500e-2", Some(25)),
            (".5k", Some(500)),
            ("", None),
            (".", None),
            ("k", None),
            ("-1", None),
            ("1.2.3", None),
            ("1kk", None),
            ("1e", None),
            ("1e99", Some(10_u128.pow(30))),
            ("99999999999999999999999", None),
            ("1ä", None),
        ] {
            assert_eq!(quantity(text), value, "{text}");
        }
    }

    #[test]
    fn capabilities_come_from_the_request_and_its_annotations() {
        let mut options = annotated(&[
            ("kubernetes.io/ingress-bandwidth", "10M"),
            ("cni.coracle/mac", "c2:11:22:33:44:55"),
            ("cni.coracle/infiniband-guid", "c2:11:22:33:44:55:66:77"),
            ("cni.coracle/ips", "10.1.0.9/16, fd00::9"),
        ]);
        options.dns = Some(Dns {
            servers: vec!["10.0.0.10".into()],
            ..Dns::default()
        });
        options.port_mappings = vec![PortMapping {
            protocol: Protocol::Udp,
            container_port: 53,
            host_port: 5353,
            host_ip: Some("::1".parse().unwrap()),
        }];
        options.cgroup_parent = Some("/kubepods/x".into());
        let cidrs = ["10.1.0.0/16".to_owned(), "fd00::/64".to_owned()];
        let values = Value::Object(capabilities(&options, &cidrs).unwrap());
        assert_eq!(
            values["portMappings"],
            json!([{"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "::1"}])
        );
        assert_eq!(
            values["bandwidth"],
            json!({"ingressRate": 10_000_000, "ingressBurst": u32::MAX})
        );
        assert_eq!(
            values["ipRanges"],
            json!([[{"subnet": "10.1.0.0/16"}], [{"subnet": "fd00::/64"}]])
        );
        assert_eq!(values["mac"], "c2:11:22:33:44:55");
        assert_eq!(values["infinibandGUID"], "c2:11:22:33:44:55:66:77");
        assert_eq!(values["ips"], json!(["10.1.0.9/16", "fd00::9"]));
        assert_eq!(values["dns"]["servers"], json!(["10.0.0.10"]));
        assert_eq!(values["cgroupPath"], "/kubepods/x");
        assert_eq!(
            values["io.kubernetes.cri.pod-annotations"]["cni.coracle/mac"],
            "c2:11:22:33:44:55"
        );
        let none = capabilities(&AttachOptions::default(), &[]).unwrap();
        assert_eq!(
            none.keys().collect::<Vec<_>>(),
            ["io.kubernetes.cri.pod-annotations"]
        );
    }

    #[test]
    fn annotations_that_are_none_are_refused_by_name() {
        for (name, value) in [
            ("kubernetes.io/ingress-bandwidth", "1"),
            ("kubernetes.io/egress-bandwidth", "2P"),
            ("kubernetes.io/egress-bandwidth", "fast"),
            ("cni.coracle/mac", "c2:11:22:33:44"),
            ("cni.coracle/mac", "c2:11:22:33:44:5g"),
            ("cni.coracle/infiniband-guid", "c2:11:22:33:44:55"),
            ("cni.coracle/ips", ""),
            ("cni.coracle/ips", "10.0.0.1/999"),
            ("cni.coracle/ips", "host"),
        ] {
            let error = capabilities(&annotated(&[(name, value)]), &[])
                .unwrap_err()
                .to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
