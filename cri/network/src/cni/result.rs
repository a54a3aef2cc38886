//! What plugins answer to ADD, in every version of the specification.

use std::net::IpAddr;

use serde_json::{Map, Value};

use super::conf::Version;

/// Most addresses and most interfaces of one pod.
const ENTRIES_MAX: usize = 1024;

/// Reads an answer and brings it to the version that the network speaks, as the next plugin needs it.
pub(super) fn parse(answer: &[u8], version: Version) -> Result<Value, String> {
    if answer.iter().all(u8::is_ascii_whitespace) {
        return Err("it is empty".to_owned());
    }
    let mut result: Map<String, Value> =
        serde_json::from_slice(answer).map_err(|error| format!("it is no JSON object: {error}"))?;
    let own = match result.get("cniVersion") {
        Some(Value::String(text)) => {
            let short: String = text.chars().take(32).collect();
            Version::parse(text).ok_or(format!("its cniVersion is {short:?}"))?
        }
        // Plugins of the first days do not say.
        None | Some(Value::Null) => version,
        Some(_) => return Err("its cniVersion is not a string".to_owned()),
    };
    if (own < Version::V030) != (version < Version::V030) {
        return Err(format!(
            "its cniVersion is {}, the network's is {}",
            own.as_str(),
            version.as_str()
        ));
    }
    result.insert("cniVersion".to_owned(), version.as_str().into());
    for key in ["ips", "interfaces"] {
        match result.get(key) {
            None | Some(Value::Null) => {}
            Some(Value::Array(entries)) if entries.len() <= ENTRIES_MAX => {}
            Some(Value::Array(_)) => return Err(format!("it has more than {ENTRIES_MAX} {key}")),
            Some(_) => return Err(format!("its {key} are not a list")),
        }
    }
    if own != version {
        name_families(&mut result, version);
    }
    Ok(Value::Object(result))
}

/// The pod's addresses: those of its interface `interface`, the first IPv4 one first, the others in their order. Other
/// interfaces that plugins may make are secondary networks: their addresses are not the pod's.
pub(super) fn addresses(result: &Value, version: Version, interface: &str) -> Result<Vec<IpAddr>, String> {
    let mut found = if version < Version::V030 {
        let texts = ["ip4", "ip6"].into_iter().filter_map(|key| result[key].get("ip"));
        texts.map(address).collect::<Result<Vec<_>, _>>()?
    } else {
        let none = Vec::new();
        let interfaces = result["interfaces"].as_array().unwrap_or(&none);
        let mut found = Vec::new();
        for ip in result["ips"].as_array().unwrap_or(&none) {
            let of = match ip.get("interface") {
                // A plugin with one interface need not say.
                None | Some(Value::Null) => Some(interface),
                Some(index) => {
                    let entry = index.as_u64().and_then(|index| usize::try_from(index).ok());
                    let entry = entry.and_then(|index| interfaces.get(index));
                    let entry = entry.ok_or("an address is of an interface that it does not list")?;
                    entry["name"].as_str()
                }
            };
            let address = address(&ip["address"])?;
            if of == Some(interface) {
                found.push(address);
            }
        }
        found
    };
    let first = found.iter().position(IpAddr::is_ipv4).unwrap_or_default();
    if let Some(primary) = found.get(first).copied() {
        found.remove(first);
        found.insert(0, primary);
    }
    Ok(found)
}

/// An address with the length of its prefix.
fn address(text: &Value) -> Result<IpAddr, String> {
    let refused = || {
        let short: String = text.to_string().chars().take(64).collect();
        format!("{short} is not an address with a prefix")
    };
    let (address, prefix) = text
        .as_str()
        .and_then(|text| text.split_once('/'))
        .ok_or_else(refused)?;
    let address: IpAddr = address.parse().map_err(|_| refused())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    match prefix.parse::<u8>() {
        Ok(prefix) if prefix <= longest => Ok(address),
        _ => Err(refused()),
    }
}

/// Up to 0.4.0 each address named its family, from 1.0.0 on none does.
fn name_families(result: &mut Map<String, Value>, version: Version) {
    let Some(Value::Array(ips)) = result.get_mut("ips") else {
        return;
    };
    for ip in ips.iter_mut().filter_map(Value::as_object_mut) {
        if version >= Version::V100 {
            ip.remove("version");
        } else if !ip.contains_key("version") {
            let v6 = ip
                .get("address")
                .and_then(Value::as_str)
                .is_some_and(|text| text.contains(':'));
            ip.insert("version".to_owned(), if v6 { "6" } else { "4" }.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ips(result: &Value, version: Version) -> Result<Vec<String>, String> {
        let result = parse(result.to_string().as_bytes(), version)?;
        let found = addresses(&result, version, "eth0")?;
        Ok(found.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn every_version_is_understood() {
        let new = json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": "cni0"}, {"name": "veth1"},
                {"name": "eth0", "sandbox": "/run/netns/x"}, {"name": "net1", "sandbox": "/run/netns/x"},
            ],
            "ips": [
                {"address": "fd00::2/64", "interface": 2},
                {"address": "10.9.9.9/24", "interface": 3},
                {"address": "10.1.0.2/16", "gateway": "10.1.0.1", "interface": 2},
                {"address": "10.1.0.3/16"},
            ],
            "dns": {}, "unknown": [1],
        });
        assert_eq!(
            ips(&new, Version::V110).unwrap(),
            ["10.1.0.2", "fd00::2", "10.1.0.3"]
        );
        let parsed = parse(new.to_string().as_bytes(), Version::V110).unwrap();
        assert_eq!(parsed, new, "nothing is lost on the way to the next plugin");

        let old = json!({
            "cniVersion": "0.3.1",
            "interfaces": [{"name": "eth0", "sandbox": "x"}],
            "ips": [{"version": "6", "address": "fd00::2/64", "interface": 0}],
        });
        assert_eq!(ips(&old, Version::V031).unwrap(), ["fd00::2"]);
        let oldest = json!({"ip4": {"ip": "10.0.0.2/8"}, "ip6": {"ip": "fd00::1/64"}});
        assert_eq!(ips(&oldest, Version::V020).unwrap(), ["10.0.0.2", "fd00::1"]);
        assert_eq!(
            ips(&json!({"cniVersion": "1.0.0"}), Version::V100).unwrap(),
            [""; 0]
        );
    }

    #[test]
    fn an_answer_of_another_version_is_brought_to_the_networks() {
        let old = br#"{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.0.0.2/8"}]}"#;
        let parsed = parse(old, Version::V100).unwrap();
        assert_eq!(
            parsed,
            json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/8"}]})
        );
        let parsed = parse(parsed.to_string().as_bytes(), Version::V031).unwrap();
        assert_eq!(parsed["ips"][0]["version"], "4");
        let unstamped = parse(br#"{"ips":[]}"#, Version::V040).unwrap();
        assert_eq!(unstamped["cniVersion"], "0.4.0");
    }

    #[test]
    fn rubbish_is_told_from_answers() {
        for (answer, part) in [
            ("", "empty"),
            (" \n", "empty"),
            ("hello", "JSON"),
            ("[]", "JSON"),
            ("{\"ips\":[", "JSON"),
            (r#"{"cniVersion":"9.9.9"}"#, "cniVersion"),
            (r#"{"cniVersion":"0.2.0"}"#, "cniVersion"),
            (r#"{"cniVersion":3}"#, "cniVersion"),
            (r#"{"ips":{}}"#, "ips"),
            (r#"{"interfaces":"eth0"}"#, "interfaces"),
        ] {
            let error = parse(answer.as_bytes(), Version::V100).unwrap_err();
            assert!(error.contains(part), "{answer}: {error}");
        }
        let many = json!({"ips": vec![json!({"address": "10.0.0.1/8"}); 1025]}).to_string();
        assert!(
            parse(many.as_bytes(), Version::V100)
                .unwrap_err()
                .contains("more than 1024")
        );
        for bad in [
            json!({"ips": [{}]}),
            json!({"ips": [7]}),
            json!({"ips": [{"address": "10.0.0.1"}]}),
            json!({"ips": [{"address": "10.0.0.1/33"}]}),
            json!({"ips": [{"address": "x/8"}]}),
            json!({"ips": [{"address": "10.0.0.1/8", "interface": 0}]}),
            json!({"ips": [{"address": "10.0.0.1/8", "interface": -1}], "interfaces": [{"name": "eth0"}]}),
            json!({"ips": [{"address": "10.0.0.1/8", "interface": 9}], "interfaces": [{"name": "eth0"}]}),
        ] {
            ips(&bad, Version::V100).unwrap_err();
        }
    }
}
