//! Broken configurations: an error that names the field, whatever is broken, and never a panic.

#![allow(
    clippy::unwrap_used,
    reason = "what cannot be unwrapped fails the test, in its helpers too"
)]

use coracle_spec::{Config, LoadError, MAX_CONFIG_BYTES, load_process, load_resources, load_seccomp};

const GOOD: &str = include_str!("corpus/crio.json");

/// The error of the good configuration with one value, found by its JSON pointer, put there.
fn broken(pointer: &str, value: &str) -> String {
    let mut json: serde_json::Value = serde_json::from_str(GOOD).unwrap();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    let parent = json.pointer_mut(parent).unwrap_or_else(|| panic!("{pointer}"));
    let value = serde_json::from_str(value).unwrap();
    match parent {
        serde_json::Value::Object(object) => {
            object.insert(name.replace("~1", "/"), value);
        }
        serde_json::Value::Array(array) => array[name.parse::<usize>().unwrap()] = value,
        _ => panic!("{pointer}"),
    }
    match Config::from_slice(json.to_string().as_bytes()) {
        Ok(_) => panic!("{pointer} is accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn every_error_names_its_field() {
    // Pointer, value, and what the error must hold.
    let cases = [
        (
            "/ociVersion",
            "\"2.0.0\"",
            "ociVersion: version \"2.0.0\" is not supported",
        ),
        ("/ociVersion", "\"\"", "ociVersion: missing"),
        ("/ociVersion", "5", "ociVersion: invalid type"),
        ("/root", "null", "root: missing"),
        ("/root", "{}", "root.path: missing"),
        ("/root/readonly", "\"yes\"", "root.readonly: invalid type"),
        ("/process", "null", "process: missing"),
        ("/process/args", "[]", "process.args: must not be empty"),
        (
            "/process/args",
            "[\"a\\u0000b\"]",
            "process.args[0]: holds a NUL byte",
        ),
        ("/process/args", "[7]", "process.args[0]: invalid type"),
        (
            "/process/env",
            "[\"A=b\",\"LONELY\"]",
            "process.env[1]: invalid environment variable: missing '='",
        ),
        (
            "/process/env",
            "[\"=b\"]",
            "process.env[0]: invalid environment variable: name cannot be empty",
        ),
        (
            "/process/cwd",
            "\"relative\"",
            "process.cwd: \"relative\" is not an absolute path",
        ),
        ("/process/cwd", "\"\"", "process.cwd: missing"),
        (
            "/process/user/uid",
            "4294967295",
            "process.user.uid: 4294967295 is not a valid id",
        ),
        (
            "/process/user/uid",
            "4294967296",
            "process.user.uid: invalid value",
        ),
        ("/process/user/uid", "-1", "process.user.uid: invalid value"),
        ("/process/user/umask", "4096", "process.user.umask"),
        ("/process/capabilities", "[\"CAP_KILL\"]", "process.capabilities"),
        (
            "/process/rlimits",
            r#"[{"type":"RLIMIT_NOPE","hard":1,"soft":1}]"#,
            "rlimits[0].type: unknown resource \"RLIMIT_NOPE\"",
        ),
        (
            "/process/rlimits",
            r#"[{"type":"RLIMIT_AS","hard":1,"soft":1},{"type":"RLIMIT_AS","hard":1,"soft":1}]"#,
            "rlimits[1].type: RLIMIT_AS is given twice",
        ),
        (
            "/process/rlimits",
            r#"[{"type":"RLIMIT_AS","soft":1}]"#,
            "process.rlimits[0]: missing field `hard`",
        ),
        (
            "/process/rlimits",
            r#"[{"type":"RLIMIT_AS","hard":1,"soft":2}]"#,
            "rlimits[0].soft: 2 exceeds the hard limit 1",
        ),
        (
            "/process/oomScoreAdj",
            "1001",
            "process.oomScoreAdj: 1001 is not between",
        ),
        (
            "/process/scheduler/policy",
            "\"SCHED_NOPE\"",
            "process.scheduler.policy: unknown scheduling policy \"SCHED_NOPE\"",
        ),
        (
            "/process/scheduler/flags",
            "[\"X\"]",
            "process.scheduler.flags: unknown scheduling flag \"X\"",
        ),
        (
            "/process/ioPriority/class",
            "\"X\"",
            "process.ioPriority.class: unknown I/O priority class \"X\"",
        ),
        (
            "/process/ioPriority/priority",
            "9",
            "process.ioPriority.priority: 9 is not between 0 and 7",
        ),
        (
            "/process/execCPUAffinity/final",
            "\"1-\"",
            "process.execCPUAffinity.final: \"1-\" is not a list of CPUs",
        ),
        (
            "/process/consoleSize",
            r#"{"height":70000,"width":1}"#,
            "process.consoleSize",
        ),
        ("/hostname", "\"a\\u0000\"", "hostname: holds a NUL byte"),
        ("/mounts/3", "{}", "mounts[3]: missing field `destination`"),
        ("/mounts/3/destination", "\"\"", "mounts[3].destination: missing"),
        (
            "/mounts/6/source",
            "null",
            "mounts[6].source: missing for a bind mount",
        ),
        (
            "/mounts/6/options",
            "[\"bind\",\"mode=755\"]",
            "mounts[6].options: bind mounts cannot have any filesystem-specific options",
        ),
        (
            "/mounts/6/options",
            "[\"ro\"]",
            "mounts[6].type: a mount of type \"bind\" needs the option bind or rbind",
        ),
        (
            "/mounts/6/options",
            "[\"bind\",\"idmap\"]",
            "mounts[6].options: mount option \"idmap\" is not supported in this release",
        ),
        ("/mounts/0/type", "null", "mounts[0].type: missing"),
        (
            "/mounts/0/options",
            "[\"tmpcopyup\"]",
            "mounts[0].options: tmpcopyup is for tmpfs mounts",
        ),
        (
            "/mounts/6/uidMappings",
            r#"[{"containerID":0,"hostID":0,"size":1}]"#,
            "mounts[6].uidMappings: not supported in this release",
        ),
        (
            "/hooks/createRuntime",
            r#"[{"path":"hook"}]"#,
            "hooks.createRuntime[0].path: \"hook\" is not an absolute path",
        ),
        (
            "/hooks/poststart",
            r#"[{"path":"/hook","timeout":0}]"#,
            "hooks.poststart[0].timeout: 0 is not greater than zero",
        ),
        (
            "/hooks/poststart",
            "[{}]",
            "hooks.poststart[0]: missing field `path`",
        ),
        ("/annotations", r#"{"":"x"}"#, "annotations: holds an empty key"),
        ("/annotations", r#"{"a":5}"#, "annotations.a: invalid type"),
        ("/linux", "null", "linux: missing"),
        (
            "/linux/namespaces/0/type",
            "\"nope\"",
            "linux.namespaces[0].type: unknown variant `nope`",
        ),
        (
            "/linux/namespaces/1/type",
            "\"pid\"",
            "linux.namespaces[1].type: duplicated namespace Pid",
        ),
        (
            "/linux/namespaces/1/path",
            "\"run/x\"",
            "linux.namespaces[1].path: \"run/x\" is not an absolute path",
        ),
        (
            "/linux/namespaces",
            r#"[{"type":"pid"}]"#,
            "linux.namespaces: a mount namespace is required",
        ),
        (
            "/linux/namespaces/3/type",
            "\"time\"",
            "hostname: unable to set hostname without a private UTS namespace",
        ),
        (
            "/linux/namespaces/6/type",
            "\"time\"",
            "linux.uidMappings: user namespace mappings specified, but no user namespace",
        ),
        (
            "/linux/uidMappings",
            "[]",
            "linux.uidMappings: user namespaces enabled, but no uidMappings found",
        ),
        (
            "/linux/timeOffsets",
            r#"{"monotonic":{"secs":1}}"#,
            "linux.timeOffsets: time namespace is not enabled",
        ),
        (
            "/linux/sysctl",
            r#"{"kernel.core_pattern":"x"}"#,
            "linux.sysctl.kernel.core_pattern: is not in a separate kernel namespace",
        ),
        (
            "/linux/sysctl",
            r#"{"kernel.hostname":"x"}"#,
            "linux.sysctl.kernel.hostname: conflicts with the hostname field",
        ),
        (
            "/linux/sysctl",
            r#"{"net.ipv4.x":"1\n2"}"#,
            "linux.sysctl.net.ipv4.x: has a value with a line break",
        ),
        (
            "/linux/sysctl",
            r#"{"net/../kernel/core_pattern":"x"}"#,
            "is not the name of a kernel parameter",
        ),
        ("/linux/devices/0/type", "\"a\"", "linux.devices[0].type"),
        (
            "/linux/devices/0/type",
            "\"q\"",
            "linux.devices[0].type: unknown variant `q`",
        ),
        (
            "/linux/devices/0/minor",
            "-5",
            "linux.devices[0].minor: -5 is no minor number",
        ),
        (
            "/linux/devices/0/path",
            "\"dev/fuse\"",
            "linux.devices[0].path: \"dev/fuse\" is not an absolute path",
        ),
        (
            "/linux/rootfsPropagation",
            "\"sideways\"",
            "linux.rootfsPropagation: unknown propagation \"sideways\"",
        ),
        (
            "/linux/maskedPaths/2",
            "\"proc\"",
            "linux.maskedPaths[2]: \"proc\" is not an absolute path",
        ),
        (
            "/linux/netDevices",
            r#"{"eth0":{}}"#,
            "linux.netDevices: not supported in this release",
        ),
        (
            "/linux/intelRdt",
            r#"{"closID":"a"}"#,
            "linux.intelRdt: not supported in this release",
        ),
        (
            "/linux/memoryPolicy",
            r#"{"mode":"MPOL_BIND","nodes":"0"}"#,
            "linux.memoryPolicy: not supported in this release",
        ),
        (
            "/linux/personality",
            r#"{"domain":"PLAN9"}"#,
            "linux.personality.domain: unknown variant `PLAN9`",
        ),
        (
            "/linux/resources/memory",
            r#"{"limit":10,"swap":5}"#,
            "linux.resources.memory.swap: memory+swap limit should be >= memory limit",
        ),
        (
            "/linux/resources/memory",
            r#"{"swap":5}"#,
            "linux.resources.memory.swap: unable to set swap limit without memory limit",
        ),
        (
            "/linux/resources/memory",
            r#"{"limit":-2}"#,
            "linux.resources.memory.limit",
        ),
        (
            "/linux/resources/cpu",
            r#"{"cpus":"a"}"#,
            "linux.resources.cpu.cpus: \"a\" is not a list of numbers",
        ),
        (
            "/linux/resources/cpu",
            r#"{"idle":2}"#,
            "linux.resources.cpu.idle",
        ),
        (
            "/linux/resources/unified",
            r#"{"../x.y":"1"}"#,
            "linux.resources.unified: \"../x.y\" is not a file name of a cgroup",
        ),
        (
            "/linux/resources/devices/0/access",
            "\"rwx\"",
            "linux.resources.devices[0].access",
        ),
        (
            "/linux/resources/hugepageLimits",
            r#"[{"pageSize":"../2MB","limit":1}]"#,
            "hugepageLimits[0].pageSize",
        ),
        (
            "/linux/seccomp",
            "{}",
            "linux.seccomp: missing field `defaultAction`",
        ),
        (
            "/linux/seccomp",
            r#"{"defaultAction":"SCMP_ACT_NOPE"}"#,
            "linux.seccomp.defaultAction: unknown variant `SCMP_ACT_NOPE`",
        ),
        (
            "/linux/seccomp",
            r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_NOPE"]}"#,
            "linux.seccomp.flags[0]: unknown variant `SECCOMP_NOPE`",
        ),
        (
            "/linux/seccomp",
            r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_NOPE"]}"#,
            "linux.seccomp.architectures[0]: unknown variant `SCMP_ARCH_NOPE`",
        ),
        (
            "/linux/seccomp",
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":[],"action":"SCMP_ACT_KILL"}]}"#,
            "linux.seccomp.syscalls[0].names: must not be empty",
        ),
        (
            "/linux/seccomp",
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_KILL","errnoRet":5}]}"#,
            "linux.seccomp.syscalls[0].errnoRet: the action takes no errno",
        ),
        (
            "/linux/seccomp",
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_KILL","args":[{"index":6,"value":1,"op":"SCMP_CMP_EQ"}]}]}"#,
            "linux.seccomp.syscalls[0].args[0].index: 6 is not between 0 and 5",
        ),
        (
            "/linux/seccomp",
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_NOTIFY"}],"listenerPath":"/x"}"#,
            "linux.seccomp.syscalls[0]: the action SCMP_ACT_NOTIFY is not supported in this release",
        ),
    ];
    for (pointer, value, expected) in cases {
        let error = broken(pointer, value);
        assert!(
            error.contains(expected),
            "{pointer} = {value}:\n  {error}\n  lacks {expected:?}"
        );
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn all_findings_come_at_once() {
    let text = r#"{"ociVersion":"1.0.0","root":{"path":"r"},"process":{"args":[],"cwd":"x"},
        "linux":{"namespaces":[{"type":"mount"}],"netDevices":{"a":{}}}}"#;
    let Err(LoadError::Invalid(findings)) = Config::from_slice(text.as_bytes()) else {
        panic!()
    };
    let paths: Vec<_> = findings.iter().map(|finding| finding.path.as_str()).collect();
    assert_eq!(paths, ["process.args", "process.cwd", "linux.netDevices"]);
}

#[test]
fn text_that_is_no_configuration() {
    for text in [
        "",
        "null",
        "[]",
        "7",
        "\"x\"",
        "{",
        "{}",
        "{\"ociVersion\":\"1.0.0\"}x",
        "\u{feff}{}",
    ] {
        assert!(Config::from_slice(text.as_bytes()).is_err(), "{text:?}");
    }
    Config::from_slice(b"\xff\xfe{}").unwrap_err();
    // Nesting in a part that nobody reads must not exhaust the stack.
    let deep = format!(
        "{{\"ociVersion\":\"1.0.0\",\"x\":{}{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let refused = Config::from_slice(deep.as_bytes()).unwrap_err();
    assert!(matches!(refused, LoadError::Invalid(_)), "{refused}");
}

#[test]
fn endless_input_is_cut_off() {
    let endless = std::io::repeat(b' ');
    assert!(matches!(Config::from_reader(endless), Err(LoadError::TooLarge)));
    let mut padded = GOOD.trim_end().to_owned();
    let padding = usize::try_from(MAX_CONFIG_BYTES).unwrap() - padded.len();
    padded.push_str(&" ".repeat(padding));
    Config::from_slice(padded.as_bytes()).unwrap();
    padded.push(' ');
    assert!(matches!(
        Config::from_slice(padded.as_bytes()),
        Err(LoadError::TooLarge)
    ));
}

#[test]
fn a_process_document_is_checked_alike() {
    let (process, warnings) =
        load_process(br#"{"args":["a"],"cwd":"/","capabilities":{"bounding":["CAP_X"]}}"#).unwrap();
    assert_eq!(process.args, ["a"]);
    assert_eq!(warnings[0].path, "process.capabilities.bounding[0]");
    let error = load_process(br#"{"args":["a"]}"#).unwrap_err();
    assert_eq!(error.to_string(), "invalid configuration: process.cwd: missing");
}

#[test]
fn a_resources_document_is_checked_alike() {
    assert!(load_resources(br#"{"pids":{}}"#).unwrap().pids().is_none());
    assert_eq!(
        load_resources(br#"{"pids":{"limit":0}}"#)
            .unwrap()
            .pids()
            .as_ref()
            .unwrap()
            .limit(),
        0
    );
    let error = load_resources(br#"{"cpu":{"period":5}}"#).unwrap_err();
    assert!(error.to_string().contains("resources.cpu.period"), "{error}");
}

#[test]
fn a_seccomp_document_is_checked_alike() {
    let plain =
        br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_KILL"}]}"#;
    assert_eq!(load_seccomp(plain).unwrap().syscalls().as_ref().unwrap().len(), 1);
    for (text, expected) in [
        ("", "EOF"),
        ("{}", "missing field `defaultAction`"),
        (
            r#"{"defaultAction":"SCMP_ACT_NOPE"}"#,
            "defaultAction: unknown variant",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}}]}"#,
            "seccomp.syscalls[0]: has conditions",
        ),
    ] {
        let error = load_seccomp(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}
