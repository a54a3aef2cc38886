//! Filters, labels, and what of `/proc` and `/sys` is hidden. What was asked for is done or refused, never dropped:
//! no container starts weaker than its request.

use coracle_proto::cri::{
    ContainerConfig, LinuxContainerSecurityContext, PodSandboxConfig, SeLinuxOption,
    security_profile::ProfileType,
};
use coracle_seccomp::{Abi, default_profile};
use coracle_spec::load_seccomp;
use serde_json::Value;

use super::capabilities::Sets;
use super::error::{Result, inside, invalid, known, unsupported};
use super::{Inputs, UnsetSeccomp, pod};

#[cfg(test)]
pub(super) use super::capabilities::DEFAULT;
pub(super) use super::capabilities::sets as capabilities;

const FIELD: &str = "config.linux.security_context";

/// Longest name of an AppArmor profile; the kernel takes a page.
const PROFILE_NAME_BYTES: usize = 1024;

/// Most masked or read-only paths: clients send two a processor.
const PATHS_MAX: usize = 16384;

/// Hidden where a request says nothing about security at all.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Read-only where a request says nothing about security at all.
const READONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// What is refused whatever the rest says.
pub(super) fn check(
    pod: &PodSandboxConfig,
    container: &ContainerConfig,
    context: &LinuxContainerSecurityContext,
) -> Result<()> {
    if container.windows.is_some() {
        return Err(unsupported("config.windows", "a Windows container"));
    }
    if !container.cdi_devices.is_empty() {
        return Err(unsupported("config.CDI_devices", "a CDI device"));
    }
    pod::check_privileged(pod, context.privileged)?;
    check_selinux(FIELD, context.privileged, context.selinux_options.as_ref())
}

/// `linux.seccomp` of a container with these capabilities in its bounding set; none: no filter.
#[expect(deprecated, reason = "older clients send the profile's path alone")]
pub(super) fn seccomp(
    inputs: &Inputs<'_>,
    context: &LinuxContainerSecurityContext,
    capabilities: &Sets,
) -> Result<Option<Value>> {
    if context.privileged {
        return Ok(None);
    }
    let field = format!("{FIELD}.seccomp");
    let runtime = || {
        let profile = default_profile(capabilities.held, Abi::NATIVE);
        serde_json::to_value(profile)
            .map(Some)
            .map_err(|error| invalid(&field, error.to_string()))
    };
    let Some(profile) = &context.seccomp else {
        return match (
            context.seccomp_profile_path.as_str(),
            inputs.defaults.unset_seccomp,
        ) {
            ("", UnsetSeccomp::Runtime) | ("runtime/default" | "docker/default", _) => runtime(),
            ("", UnsetSeccomp::Unconfined) | ("unconfined", _) => Ok(None),
            _ => Err(unsupported(
                format!("{FIELD}.seccomp_profile_path"),
                "a profile named in this deprecated field",
            )),
        };
    };
    match known(&format!("{field}.profile_type"), profile.profile_type)? {
        ProfileType::RuntimeDefault => runtime(),
        ProfileType::Unconfined => Ok(None),
        ProfileType::Localhost => {
            let bytes = inputs
                .seccomp_profile
                .filter(|bytes| !bytes.is_empty() && !profile.localhost_ref.is_empty())
                .ok_or_else(|| invalid(&field, "names no profile"))?;
            let read = load_seccomp(bytes)
                .map_err(|error| invalid(&field, format!("{}: {error}", profile.localhost_ref)))?;
            serde_json::to_value(read)
                .map(Some)
                .map_err(|error| invalid(&field, error.to_string()))
        }
    }
}

/// `process.apparmorProfile`. Whether the host has AppArmor, and the profile, is seen when the container is made.
#[expect(deprecated, reason = "older clients send the profile's name alone")]
pub(super) fn apparmor(context: &LinuxContainerSecurityContext) -> Result<Option<String>> {
    let Some(profile) = &context.apparmor else {
        return match context.apparmor_profile.as_str() {
            "" | "unconfined" => Ok(None),
            "runtime/default" => Err(unsupported(
                format!("{FIELD}.apparmor_profile"),
                "an AppArmor profile of the runtime's own",
            )),
            text => {
                let field = format!("{FIELD}.apparmor_profile");
                let name = text.strip_prefix("localhost/").unwrap_or_default();
                apparmor_name(&field, name).map(Some)
            }
        };
    };
    let field = format!("{FIELD}.apparmor");
    match known(&format!("{field}.profile_type"), profile.profile_type)? {
        ProfileType::Unconfined => Ok(None),
        ProfileType::RuntimeDefault if context.privileged => Ok(None),
        ProfileType::RuntimeDefault => Err(unsupported(field, "an AppArmor profile of the runtime's own")),
        ProfileType::Localhost => {
            apparmor_name(&format!("{field}.localhost_ref"), &profile.localhost_ref).map(Some)
        }
    }
}

fn apparmor_name(field: &str, name: &str) -> Result<String> {
    let well_formed = !name.is_empty()
        && name.len() <= PROFILE_NAME_BYTES
        && name != "unconfined"
        && !name.chars().any(|c| c.is_control() || c.is_whitespace());
    if !well_formed {
        return Err(invalid(
            field,
            format!(
                "{:?} is not the name of a profile",
                name.get(..64).unwrap_or(name)
            ),
        ));
    }
    Ok(name.to_owned())
}

/// SELinux contexts are not set: a container that asks for one must not run without it. A privileged one has none.
pub(super) fn check_selinux(field: &str, privileged: bool, options: Option<&SeLinuxOption>) -> Result<()> {
    match options {
        Some(options) if *options != SeLinuxOption::default() && !privileged => Err(unsupported(
            format!("{field}.selinux_options"),
            "an SELinux label",
        )),
        _ => Ok(()),
    }
}

/// `linux.maskedPaths` and `linux.readonlyPaths`. The lists of a request hold as they are, empty ones too.
pub(super) fn restricted_paths(
    inputs: &Inputs<'_>,
    context: &LinuxContainerSecurityContext,
) -> Result<(Vec<String>, Vec<String>)> {
    if context.privileged {
        return Ok(Default::default());
    }
    let says_something = inputs
        .container
        .linux
        .as_ref()
        .is_some_and(|linux| linux.security_context.is_some());
    if !says_something {
        let owned = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect();
        return Ok((owned(&MASKED), owned(&READONLY)));
    }
    Ok((
        paths("masked_paths", &context.masked_paths)?,
        paths("readonly_paths", &context.readonly_paths)?,
    ))
}

fn paths(name: &str, paths: &[String]) -> Result<Vec<String>> {
    if paths.len() > PATHS_MAX {
        return Err(invalid(
            format!("{FIELD}.{name}"),
            format!("are more than {PATHS_MAX}"),
        ));
    }
    let path = |(i, path): (usize, &String)| inside(&format!("{FIELD}.{name}[{i}]"), path);
    paths.iter().enumerate().map(path).collect()
}

#[cfg(test)]
#[expect(deprecated, reason = "the old fields are under test")]
mod tests {
    use coracle_proto::cri::SecurityProfile;
    use serde_json::json;

    use super::super::fixture::Fixture;
    use super::*;

    fn profile(kind: i32, name: &str) -> Option<SecurityProfile> {
        Some(SecurityProfile {
            profile_type: kind,
            localhost_ref: name.into(),
        })
    }

    const RUNTIME: i32 = 0;
    const UNCONFINED: i32 = 1;
    const LOCALHOST: i32 = 2;

    fn filter(fixture: &mut Fixture) -> Result<Option<Value>> {
        let context = fixture.context().clone();
        seccomp(&fixture.inputs(), &context, &Sets { held: 0, ambient: 0 })
    }

    #[test]
    fn the_configuration_speaks_for_a_nil_profile_alone() {
        for (unset, asked, filtered) in [
            (UnsetSeccomp::Runtime, None, true),
            (UnsetSeccomp::Unconfined, None, false),
            (UnsetSeccomp::Runtime, profile(UNCONFINED, ""), false),
            (UnsetSeccomp::Unconfined, profile(RUNTIME, ""), true),
        ] {
            let mut fixture = Fixture::default();
            fixture.defaults.unset_seccomp = unset;
            fixture.context().seccomp = asked;
            assert_eq!(filter(&mut fixture).unwrap().is_some(), filtered, "{unset:?}");
        }
        let mut fixture = Fixture::default();
        fixture.context().privileged = true;
        fixture.context().seccomp = profile(RUNTIME, "");
        assert_eq!(filter(&mut fixture).unwrap(), None);
    }

    #[test]
    fn the_deprecated_field_speaks_where_the_new_one_is_silent() {
        for (text, filtered) in [
            ("runtime/default", Some(true)),
            ("unconfined", Some(false)),
            ("localhost//x", None),
        ] {
            let mut fixture = Fixture::default();
            fixture.context().seccomp_profile_path = text.into();
            assert_eq!(
                filter(&mut fixture).ok().map(|made| made.is_some()),
                filtered,
                "{text}"
            );
        }
    }

    #[test]
    fn a_profile_of_the_node_is_taken_as_it_is() {
        let text = br#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],
            "syscalls":[{"names":["chmod"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}"#;
        let mut fixture = Fixture {
            seccomp_profile: Some(text.to_vec()),
            ..Default::default()
        };
        fixture.context().seccomp = profile(LOCALHOST, "/p.json");
        let made = filter(&mut fixture).unwrap().unwrap();
        assert_eq!(made["defaultAction"], "SCMP_ACT_ALLOW");
        assert_eq!(made["syscalls"][0]["names"], json!(["chmod"]));
        assert_eq!(made["syscalls"][0]["errnoRet"], 13);
    }

    #[test]
    fn no_bad_profile_starts_unconfined() {
        let bad: [(&str, Option<&[u8]>); 8] = [
            ("/p.json", None),
            ("/p.json", Some(b"")),
            ("/p.json", Some(b"{}")),
            ("/p.json", Some(b"not json")),
            ("/p.json", Some(br#"{"defaultAction":"SCMP_ACT_WHATEVER"}"#)),
            (
                "/p.json",
                Some(br#"{"defaultAction":"SCMP_ACT_ERRNO","flags":["SECCOMP_FILTER_FLAG_NOPE"]}"#),
            ),
            ("/p.json", Some(br#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#)),
            ("", Some(br#"{"defaultAction":"SCMP_ACT_ALLOW"}"#)),
        ];
        for (name, bytes) in bad {
            let mut fixture = Fixture {
                seccomp_profile: bytes.map(<[u8]>::to_vec),
                ..Default::default()
            };
            fixture.context().seccomp = profile(LOCALHOST, name);
            let error = filter(&mut fixture).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{FIELD}.seccomp: ")), "{error}");
        }
        let mut fixture = Fixture::default();
        fixture.context().seccomp = profile(7, "");
        filter(&mut fixture).unwrap_err();
    }

    #[test]
    fn apparmor_profiles_are_set_or_refused() {
        let of = |asked: Option<SecurityProfile>, old: &str, privileged: bool| {
            apparmor(&LinuxContainerSecurityContext {
                apparmor: asked,
                apparmor_profile: old.into(),
                privileged,
                ..Default::default()
            })
        };
        for nothing in ["", "unconfined"] {
            assert_eq!(of(None, nothing, false).unwrap(), None);
        }
        assert_eq!(
            of(None, "localhost/mine", false).unwrap().as_deref(),
            Some("mine")
        );
        assert_eq!(
            of(profile(LOCALHOST, "mine"), "unconfined", false)
                .unwrap()
                .as_deref(),
            Some("mine")
        );
        assert_eq!(
            of(profile(LOCALHOST, "mine"), "", true).unwrap().as_deref(),
            Some("mine")
        );
        assert_eq!(
            of(profile(UNCONFINED, ""), "localhost/mine", false).unwrap(),
            None
        );
        assert_eq!(of(profile(RUNTIME, ""), "", true).unwrap(), None);
        of(profile(RUNTIME, ""), "", false).unwrap_err();
        for bad in ["", "a b", "a\n", "unconfined"] {
            assert!(of(profile(LOCALHOST, bad), "", false).is_err(), "{bad:?}");
        }
        for bad in ["localhost/", "mine", "runtime/default", "runtime/other"] {
            assert!(of(None, bad, false).is_err(), "{bad:?}");
        }
        of(profile(5, "x"), "", false).unwrap_err();
    }

    #[test]
    fn an_selinux_context_is_refused() {
        let level = SeLinuxOption {
            level: "s0:c1,c2".into(),
            ..Default::default()
        };
        check_selinux("f", false, Some(&level)).unwrap_err();
        check_selinux("f", true, Some(&level)).unwrap();
        check_selinux("f", false, Some(&Default::default())).unwrap();
        check_selinux("f", false, None).unwrap();
    }

    #[test]
    fn paths_are_the_requests_and_empty_means_none() {
        let restricted = |fixture: &Fixture| {
            let context = fixture
                .container
                .linux
                .clone()
                .and_then(|linux| linux.security_context)
                .unwrap_or_default();
            restricted_paths(&fixture.inputs(), &context)
        };
        let silent = Fixture::default();
        let (masked, readonly) = restricted(&silent).unwrap();
        assert!(masked.contains(&"/proc/kcore".to_owned()) && readonly.contains(&"/proc/sys".to_owned()));

        let mut fixture = Fixture::default();
        fixture.context();
        assert_eq!(restricted(&fixture).unwrap(), (vec![], vec![]));
        fixture.context().masked_paths = vec!["/proc//x/".into()];
        assert_eq!(
            restricted(&fixture).unwrap(),
            (vec!["/proc/x".to_owned()], vec![])
        );
        fixture.context().readonly_paths = vec!["proc".into()];
        restricted(&fixture).unwrap_err();
        fixture.context().privileged = true;
        assert_eq!(restricted(&fixture).unwrap(), (vec![], vec![]));
    }
}
