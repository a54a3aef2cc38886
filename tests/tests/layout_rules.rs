//! Rules about the tree itself: who may depend on whom, where unsafe code and system calls are, how long files are,
//! what no committed file may say. They need no runtime, only the sources and `cargo metadata`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Crates of ours, and those of ours that each may name. An arrow that is not here goes up, or is new: then it belongs
/// into ARCHITECTURE.md too.
const ARROWS: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("kernel", &[]),
    ("spec", &[]),
    ("wire", &[]),
    ("store", &[]),
    ("seccomp", &["spec"]),
    ("cgroup", &["kernel", "spec"]),
    ("container", &["kernel", "spec", "seccomp", "cgroup"]),
    ("monitor", &["container", "cgroup", "kernel", "spec", "wire"]),
    (
        "cli",
        &["monitor", "container", "cgroup", "kernel", "spec", "seccomp"],
    ),
    ("snapshot", &["kernel"]),
    ("image", &["kernel", "snapshot"]),
    ("network", &["kernel", "cgroup"]),
    ("stream", &["kernel"]),
    (
        "engine",
        &[
            "kernel", "spec", "seccomp", "cgroup", "wire", "proto", "store", "image", "snapshot", "network",
        ],
    ),
    (
        "server",
        &[
            "engine", "stream", "proto", "store", "image", "snapshot", "network", "cgroup", "kernel",
        ],
    ),
    ("tests", &["kernel"]),
    ("integration", &["kernel", "proto", "seccomp"]),
];

/// What makes system calls; one crate of ours may name these.
const SYSTEM_CALL_CRATES: [&str; 5] = ["libc", "nix", "rustix", "linux-raw-sys", "syscalls"];

/// What belongs to the daemon and must not get into the tree of the runtime, even through others.
const NOT_IN_THE_RUNTIME: [&str; 6] = ["tokio", "hyper", "tonic", "rustls", "redb", "tracing"];

/// Lines of our own a file may have; tests at its end are not counted.
const MAX_LINES: usize = 500;

/// Files that are longer because a program wrote them, or that are one table.
const GENERATED: [&str; 2] = [
    "runtime/seccomp/src/arch/table.rs",
    "runtime/seccomp/src/default_profile.rs",
];

fn repository() -> PathBuf {
    // Cargo sets it for the run; what it was at build time may be another checkout.
    Path::new(&std::env::var_os("CARGO_MANIFEST_DIR").unwrap())
        .parent()
        .unwrap()
        .to_path_buf()
}

fn metadata(more: &[&str]) -> Value {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(repository())
        .args(["metadata", "--format-version", "1"])
        .args(more);
    let out = command.output().unwrap();
    assert!(
        out.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Our packages: short name, folder, and the document.
fn ours(metadata: &Value) -> Vec<(String, PathBuf, &Value)> {
    let root = repository();
    let members = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|p| p["source"].is_null());
    members
        .map(|package| {
            let manifest = Path::new(package["manifest_path"].as_str().unwrap());
            let folder = manifest
                .parent()
                .unwrap()
                .strip_prefix(&root)
                .unwrap()
                .to_path_buf();
            let name = package["name"]
                .as_str()
                .unwrap()
                .trim_start_matches("coracle-")
                .to_owned();
            (name, folder, package)
        })
        .collect()
}

/// Every file of the tree with one of these endings.
fn files(endings: &[&str]) -> Vec<PathBuf> {
    fn walk(dir: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            if entry.file_type().unwrap().is_dir() {
                if name != "target" && name != ".git" && name != "dist" {
                    walk(&path, endings, found);
                }
            } else if endings.iter().any(|e| name.ends_with(e)) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&repository(), endings, &mut found);
    found.sort();
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(repository()).unwrap().display().to_string()
}

#[test]
fn arrows_go_down() {
    let metadata = metadata(&["--no-deps"]);
    let allowed: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let mut wrong = Vec::new();
    for (name, folder, package) in ours(&metadata) {
        if name == "xtask" {
            continue;
        }
        let Some(may) = allowed.get(name.as_str()) else {
            wrong.push(format!("{name} ({}) is in no list", folder.display()));
            continue;
        };
        for dependency in package["dependencies"].as_array().unwrap() {
            let Some(other) = dependency["name"].as_str().unwrap().strip_prefix("coracle-") else {
                continue;
            };
            // a test may look down further than the program does, but not up
            let is_test = dependency["kind"] == "dev";
            if !(may.contains(&other) || is_test && level(other) <= level(&name)) {
                wrong.push(format!("{name} -> {other}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// How far above the ground a crate stands: one more than the highest it may name.
fn level(name: &str) -> usize {
    let below = ARROWS
        .iter()
        .find(|(n, _)| *n == name)
        .map_or(&[][..], |(_, below)| below);
    below.iter().map(|other| level(other) + 1).max().unwrap_or(0)
}

#[test]
fn nothing_of_the_runtime_knows_the_daemon() {
    let metadata = metadata(&["--no-deps"]);
    let ours = ours(&metadata);
    let folder_of = |name: &str| {
        ours.iter()
            .find(|(n, _, _)| n == name)
            .map(|(_, folder, _)| folder.clone())
    };
    for (name, folder, package) in &ours {
        if !folder.starts_with("runtime") {
            continue;
        }
        for dependency in package["dependencies"].as_array().unwrap() {
            let other = dependency["name"]
                .as_str()
                .unwrap()
                .trim_start_matches("coracle-");
            let up = folder_of(other).is_some_and(|f| f.starts_with("cri"));
            assert!(!up, "{name} -> {other}");
        }
    }
}

#[test]
fn system_call_crates_are_named_in_the_kernel_crate_alone() {
    let metadata = metadata(&["--no-deps"]);
    for (name, _, package) in ours(&metadata) {
        for dependency in package["dependencies"].as_array().unwrap() {
            let other = dependency["name"].as_str().unwrap();
            assert!(
                name == "kernel" || !SYSTEM_CALL_CRATES.contains(&other),
                "{name} -> {other}"
            );
        }
    }
}

#[test]
fn unsafe_code_is_in_the_kernel_crate_alone() {
    let metadata = metadata(&["--no-deps"]);
    for (name, folder, _) in ours(&metadata) {
        let manifest = fs::read_to_string(repository().join(&folder).join("Cargo.toml")).unwrap();
        assert!(
            name == "kernel" || manifest.contains("[lints]\nworkspace = true"),
            "{name} has lints of its own"
        );
    }
    let all = fs::read_to_string(repository().join("Cargo.toml")).unwrap();
    assert!(all.contains("unsafe_code = \"forbid\""));
    for file in files(&[".rs"]) {
        let name = relative(&file);
        if name.starts_with("runtime/kernel/") || name.ends_with("layout_rules.rs") {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        let found = text
            .lines()
            .find(|l| l.trim_start().starts_with("unsafe ") || l.contains(" unsafe {"));
        assert!(found.is_none(), "{name}: {found:?}");
    }
}

#[test]
fn the_runtime_carries_nothing_of_the_daemon() {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let metadata = metadata(&["--filter-platform", &target]);
    let mut below: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in metadata["resolve"]["nodes"].as_array().unwrap() {
        let normal = node["deps"].as_array().unwrap().iter().filter(|dep| {
            dep["dep_kinds"]
                .as_array()
                .unwrap()
                .iter()
                .any(|kind| kind["kind"].is_null())
        });
        let ids = normal.map(|dep| dep["pkg"].as_str().unwrap()).collect();
        below.insert(node["id"].as_str().unwrap(), ids);
    }
    let names: BTreeMap<&str, &str> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| (p["id"].as_str().unwrap(), p["name"].as_str().unwrap()))
        .collect();
    for (name, folder, package) in ours(&metadata) {
        if !folder.starts_with("runtime") {
            continue;
        }
        let (mut seen, mut next) = (BTreeSet::new(), vec![package["id"].as_str().unwrap()]);
        while let Some(id) = next.pop() {
            if seen.insert(id) {
                next.extend(below.get(id).into_iter().flatten().copied());
            }
        }
        let bad: Vec<_> = seen
            .iter()
            .map(|id| names[id])
            .filter(|n| NOT_IN_THE_RUNTIME.contains(n))
            .collect();
        assert!(bad.is_empty(), "{name} carries {bad:?}");
    }
}

#[test]
fn no_file_is_longer_than_a_person_reads_at_once() {
    let mut long = Vec::new();
    for file in files(&[".rs"]) {
        let name = relative(&file);
        let text = fs::read_to_string(&file).unwrap();
        let lines = own_lines(&text);
        if lines > MAX_LINES && !GENERATED.contains(&name.as_str()) {
            long.push(format!("{name}: {lines}"));
        }
    }
    assert!(long.is_empty(), "more than {MAX_LINES} own lines: {long:#?}");
}

/// All lines up to the inline test module.
fn own_lines(text: &str) -> usize {
    let lines: Vec<_> = text.lines().collect();
    let tests = lines
        .windows(2)
        .rposition(|pair| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod "));
    tests.unwrap_or(lines.len())
}

#[test]
fn every_file_says_what_it_is() {
    for file in files(&[".rs"]) {
        let text = fs::read_to_string(&file).unwrap();
        assert!(
            text.starts_with("//!"),
            "{} has no //! at its top",
            relative(&file)
        );
    }
}

#[test]
fn no_file_is_half_done() {
    for file in files(&[".rs"]) {
        let name = relative(&file);
        if name.ends_with("layout_rules.rs") {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        for word in ["TODO", "FIXME", "XXX", "todo!(", "unimplemented!("] {
            let found = text.lines().position(|l| l.contains(word));
            assert!(found.is_none(), "{name}:{}: {word}", found.unwrap_or(0) + 1);
        }
    }
}

#[test]
fn no_file_names_a_place_of_one_machine() {
    // taken apart, or this file would break its own rule
    let words = [
        concat!("/work/", "main"),
        concat!("/work/", "shared"),
        concat!("/work/", "scratch"),
        concat!("/ho", "me/runner"),
        concat!("static.cr", "ates.io"),
    ];
    for file in files(&[".rs", ".toml", ".md", ".sh", ".c", "run", "vmrun"]) {
        let text = fs::read_to_string(&file).unwrap();
        for word in words {
            assert!(!text.contains(word), "{}: {word}", relative(&file));
        }
    }
}

#[test]
fn doubled_crates_are_listed_with_who_forces_them() {
    let lock = fs::read_to_string(repository().join("Cargo.lock")).unwrap();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for block in lock.split("[[package]]").skip(1) {
        let field = |name: &str| {
            block
                .lines()
                .find_map(|l| l.strip_prefix(name))
                .map(|v| v.trim_matches('"'))
        };
        if let (Some(name), Some(version)) = (field("name = "), field("version = ")) {
            versions.entry(name).or_default().push(version);
        }
    }
    let deny = fs::read_to_string(repository().join("deny.toml")).unwrap();
    for (name, all) in versions.iter().filter(|(_, all)| all.len() > 1) {
        // of each name all versions but one stand in the list
        let listed = all
            .iter()
            .filter(|v| deny.contains(&format!("\"{name}@{v}\"")))
            .count();
        assert!(listed + 1 >= all.len(), "{name} {all:?} is not in deny.toml");
    }
}

#[test]
fn the_rules_can_fail() {
    assert_eq!(own_lines("a\nb\n#[cfg(test)]\nmod tests {\n}\n"), 2);
    assert_eq!(own_lines("a\n#[cfg(test)]\nfn helper() {}\nb\n"), 4);
    assert!(level("server") > level("engine") && level("engine") > level("kernel"));
}
