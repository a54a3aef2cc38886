//! The limits.

use std::collections::BTreeMap;

use coracle_proto::cri::{LinuxContainerResources, LinuxContainerSecurityContext};
use serde_json::{Map, Value, json};

use super::error::{Result, invalid, unsupported};
use super::{HostFacts, Inputs, devices};

const FIELD: &str = "config.linux.resources";

/// `linux.resources`.
pub(super) fn resources(inputs: &Inputs<'_>, context: &LinuxContainerSecurityContext) -> Result<Value> {
    let mut document = Map::new();
    document.insert(
        "devices".into(),
        devices::rules(inputs.devices, context.privileged)?.into(),
    );
    let asked = inputs
        .container
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref());
    if let Some(asked) = asked {
        for (name, part) in [("cpu", cpu(asked)?), ("memory", memory(asked, inputs.host)?)] {
            if !part.is_empty() {
                document.insert(name.into(), part.into());
            }
        }
        let pages = hugepages(asked, inputs.host)?;
        if !pages.is_empty() {
            document.insert("hugepageLimits".into(), pages.into());
        }
        if !asked.unified.is_empty() {
            document.insert("unified".into(), json!(unified(&asked.unified, inputs.host)?));
        }
    }
    Ok(document.into())
}

fn cpu(asked: &LinuxContainerResources) -> Result<Map<String, Value>> {
    let mut cpu = Map::new();
    // The kernel clamps what is out of its range; negative is nothing at all.
    if asked.cpu_shares != 0 {
        cpu.insert(
            "shares".into(),
            json!(not_negative("cpu_shares", asked.cpu_shares)?),
        );
    }
    if asked.cpu_quota != 0 {
        if asked.cpu_quota != -1 && asked.cpu_quota < 1_000 {
            let why = format!("{} is neither -1 nor at least 1000 microseconds", asked.cpu_quota);
            return Err(invalid(format!("{FIELD}.cpu_quota"), why));
        }
        cpu.insert("quota".into(), json!(asked.cpu_quota));
    }
    if asked.cpu_period != 0 {
        if !(1_000..=1_000_000).contains(&asked.cpu_period) {
            let why = format!(
                "{} is not between 1000 and 1000000 microseconds",
                asked.cpu_period
            );
            return Err(invalid(format!("{FIELD}.cpu_period"), why));
        }
        cpu.insert("period".into(), json!(asked.cpu_period));
    }
    for (field, name, list) in [
        ("cpuset_cpus", "cpus", &asked.cpuset_cpus),
        ("cpuset_mems", "mems", &asked.cpuset_mems),
    ] {
        if list.is_empty() {
            continue;
        }
        if !is_number_list(list) {
            return Err(invalid(
                format!("{FIELD}.{field}"),
                format!("{list:?} is not a list of numbers"),
            ));
        }
        cpu.insert(name.into(), json!(list));
    }
    Ok(cpu)
}

/// `0-3,7`; the kernel says whether it has them.
fn is_number_list(list: &str) -> bool {
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u16>().ok()).flatten()
    };
    list.len() <= 8192
        && list.split(',').all(|part| match part.split_once('-') {
            None => number(part).is_some(),
            Some((first, last)) => number(first)
                .zip(number(last))
                .is_some_and(|(first, last)| first <= last),
        })
}

fn memory(asked: &LinuxContainerResources, host: &HostFacts) -> Result<Map<String, Value>> {
    let (limit, swap) = (asked.memory_limit_in_bytes, asked.memory_swap_limit_in_bytes);
    for (name, bytes) in [
        ("memory_limit_in_bytes", limit),
        ("memory_swap_limit_in_bytes", swap),
    ] {
        if bytes < -1 {
            return Err(invalid(
                format!("{FIELD}.{name}"),
                format!("{bytes} is negative, and not -1 for unlimited"),
            ));
        }
    }
    let mut memory = Map::new();
    if limit != 0 {
        memory.insert("limit".into(), json!(limit));
    }
    // Without accounting there is nothing to write to, and what was asked for holds on other nodes.
    if host.swap_accounting {
        // Who limits memory does not want the rest in swap.
        let swap = if swap == 0 { limit } else { swap };
        if swap != 0 {
            memory.insert("swap".into(), json!(swap));
        }
    }
    Ok(memory)
}

/// Clients send one entry for every page size, with 0 for those of which the container gets
/// none. Where the host has no such pages, none is what there is.
fn hugepages(asked: &LinuxContainerResources, host: &HostFacts) -> Result<Vec<Value>> {
    if host.hugepage_sizes.is_empty() {
        return Ok(Vec::new());
    }
    let mut limits: Vec<Value> = Vec::new();
    for (i, entry) in asked.hugepage_limits.iter().enumerate() {
        let field = format!("{FIELD}.hugepage_limits[{i}]");
        if !host.hugepage_sizes.contains(&entry.page_size) {
            if entry.limit == 0 {
                continue;
            }
            let why = format!("{:?} is not a page size of this host", entry.page_size);
            return Err(invalid(format!("{field}.page_size"), why));
        }
        let limit =
            i64::try_from(entry.limit).map_err(|_| invalid(format!("{field}.limit"), "is too large"))?;
        if limits
            .iter()
            .any(|known| known["pageSize"] == json!(entry.page_size))
        {
            return Err(invalid(
                format!("{field}.page_size"),
                format!("{:?} is given twice", entry.page_size),
            ));
        }
        limits.push(json!({ "pageSize": entry.page_size, "limit": limit }));
    }
    Ok(limits)
}

/// Files of the container's cgroup. Those that move processes or change what the group is are not limits.
fn unified<'a>(
    asked: &'a BTreeMap<String, String>,
    host: &HostFacts,
) -> Result<&'a BTreeMap<String, String>> {
    let field = format!("{FIELD}.unified");
    if !host.cgroup_v2 {
        return Err(unsupported(field, "a file of cgroup v2 on a host with v1"));
    }
    for (key, value) in asked {
        let well_formed = key.len() <= 256
            && key.contains('.')
            && !key.starts_with('.')
            && !key.contains("..")
            && key
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if !well_formed || key.starts_with("cgroup.") {
            return Err(invalid(field, format!("{key:?} is not a limit of a cgroup")));
        }
        if value.len() > 4096 || value.contains('\0') {
            return Err(invalid(field, format!("the value of {key:?} is no limit")));
        }
    }
    Ok(asked)
}

fn not_negative(name: &str, value: i64) -> Result<i64> {
    if value < 0 {
        return Err(invalid(format!("{FIELD}.{name}"), format!("{value} is negative")));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use coracle_proto::cri::HugepageLimit;

    use super::super::fixture::{self, Fixture};
    use super::*;

    fn made_on(host: HostFacts, asked: LinuxContainerResources) -> Result<Value> {
        let mut fixture = Fixture {
            host,
            ..Default::default()
        };
        fixture.linux().resources = Some(asked);
        resources(&fixture.inputs(), &Default::default())
    }

    fn made(asked: LinuxContainerResources) -> Result<Value> {
        made_on(fixture::host(), asked)
    }

    #[test]
    fn what_is_not_said_is_not_written() {
        let nothing = json!({ "devices": [{ "allow": false, "access": "rwm" }] });
        assert_eq!(made(Default::default()).unwrap(), nothing);
        assert_eq!(
            resources(&Fixture::default().inputs(), &Default::default()).unwrap(),
            nothing
        );
    }

    #[test]
    fn limits_are_copied() {
        let made = made(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: -1,
            cpu_shares: 512,
            memory_limit_in_bytes: 1 << 30,
            memory_swap_limit_in_bytes: 2 << 30,
            cpuset_cpus: "0-1,3".into(),
            cpuset_mems: "0".into(),
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        })
        .unwrap();
        let cpu = json!({ "shares": 512, "quota": -1, "period": 100_000, "cpus": "0-1,3", "mems": "0" });
        assert_eq!(made["cpu"], cpu);
        assert_eq!(made["memory"], json!({ "limit": 1i64 << 30, "swap": 2i64 << 30 }));
        assert_eq!(made["unified"], json!({ "memory.oom.group": "1" }));
    }

    #[test]
    fn swap_follows_memory_and_the_host() {
        let memory = |limit: i64, swap: i64, accounting: bool| {
            let host = HostFacts {
                swap_accounting: accounting,
                ..fixture::host()
            };
            let asked = LinuxContainerResources {
                memory_limit_in_bytes: limit,
                memory_swap_limit_in_bytes: swap,
                ..Default::default()
            };
            made_on(host, asked).map(|made| made["memory"].clone())
        };
        assert_eq!(
            memory(100, 0, true).unwrap(),
            json!({ "limit": 100, "swap": 100 })
        );
        assert_eq!(
            memory(100, -1, true).unwrap(),
            json!({ "limit": 100, "swap": -1 })
        );
        assert_eq!(memory(-1, 0, true).unwrap(), json!({ "limit": -1, "swap": -1 }));
        assert_eq!(memory(100, 200, false).unwrap(), json!({ "limit": 100 }));
        for (limit, swap) in [(-2, 0), (0, -2), (i64::MIN, 0)] {
            assert!(memory(limit, swap, true).is_err(), "{limit} {swap}");
        }
    }

    #[test]
    fn huge_pages_are_limited_where_the_host_can() {
        let page = |size: &str, limit: u64| HugepageLimit {
            page_size: size.into(),
            limit,
        };
        let of = |sizes: &[&str], pages: Vec<HugepageLimit>| {
            let host = HostFacts {
                hugepage_sizes: sizes.iter().map(|size| (*size).to_owned()).collect(),
                ..fixture::host()
            };
            let asked = LinuxContainerResources {
                hugepage_limits: pages,
                ..Default::default()
            };
            made_on(host, asked).map(|made| made["hugepageLimits"].clone())
        };
        let both = || vec![page("2MB", 4 << 20), page("1GB", 0), page("16GB", 0)];
        assert_eq!(
            of(&["2MB", "1GB"], both()).unwrap(),
            json!([{ "pageSize": "2MB", "limit": 4 << 20 }, { "pageSize": "1GB", "limit": 0 }])
        );
        assert_eq!(of(&[], both()).unwrap(), Value::Null);
        for bad in [page("3MB", 1), page("../x", 1), page("2MB", u64::MAX)] {
            assert!(of(&["2MB"], vec![bad.clone()]).is_err(), "{bad:?}");
        }
        of(&["2MB"], vec![page("2MB", 1), page("2MB", 2)]).unwrap_err();
    }

    #[test]
    fn only_limits_are_unified_keys() {
        let of = |v2: bool, key: &str, value: &str| {
            let host = HostFacts {
                cgroup_v2: v2,
                ..fixture::host()
            };
            let unified = [(key.to_owned(), value.to_owned())].into();
            made_on(
                host,
                LinuxContainerResources {
                    unified,
                    ..Default::default()
                },
            )
        };
        of(true, "memory.high", "1").unwrap();
        assert!(
            of(false, "memory.high", "1")
                .unwrap_err()
                .to_string()
                .contains("unified")
        );
        for bad in [
            "cgroup.procs",
            "cgroup.kill",
            "../x.y",
            "a/b.c",
            "x",
            "",
            ".a",
            "a..b",
            "a.b\n",
        ] {
            assert!(of(true, bad, "1").is_err(), "{bad:?}");
        }
        of(true, "memory.high", "1\0").unwrap_err();
    }

    #[test]
    fn numbers_out_of_range_name_their_field() {
        let base = LinuxContainerResources::default;
        for (field, asked) in [
            (
                "cpu_shares",
                LinuxContainerResources {
                    cpu_shares: -1,
                    ..base()
                },
            ),
            (
                "cpu_quota",
                LinuxContainerResources {
                    cpu_quota: -2,
                    ..base()
                },
            ),
            (
                "cpu_quota",
                LinuxContainerResources {
                    cpu_quota: 999,
                    ..base()
                },
            ),
            (
                "cpu_period",
                LinuxContainerResources {
                    cpu_period: 999,
                    ..base()
                },
            ),
            (
                "cpu_period",
                LinuxContainerResources {
                    cpu_period: i64::MAX,
                    ..base()
                },
            ),
            (
                "cpuset_cpus",
                LinuxContainerResources {
                    cpuset_cpus: "0-".into(),
                    ..base()
                },
            ),
            (
                "cpuset_cpus",
                LinuxContainerResources {
                    cpuset_cpus: "3-1".into(),
                    ..base()
                },
            ),
            (
                "cpuset_mems",
                LinuxContainerResources {
                    cpuset_mems: "0\n1".into(),
                    ..base()
                },
            ),
        ] {
            let error = made(asked).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{FIELD}.{field}: ")), "{error}");
        }
    }
}
