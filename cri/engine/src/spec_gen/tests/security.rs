//! Capabilities, privilege, filters, profiles.

use coracle_proto::cri::security_profile::ProfileType;
use coracle_proto::cri::{Capability, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, SecurityProfile};
use coracle_spec::{NamespaceKind, attr, capability_number};

use super::super::{HostDevice, UnsetSeccomp, security};
use super::{Request, words};

fn mask(names: &[&str]) -> u64 {
    names
        .iter()
        .fold(0, |mask, name| mask | 1 << capability_number(name).unwrap())
}

#[test]
fn capabilities_start_from_nine_and_follow_the_lists() {
    let sets = |add: &[&str], drop: &[&str], ambient: &[&str]| {
        let request = Request::with(|request| {
            request.context.capabilities = Some(Capability {
                add_capabilities: words(add),
                drop_capabilities: words(drop),
                add_ambient_capabilities: words(ambient),
            });
        });
        request.config().process.capabilities
    };
    let nine = mask(&security::DEFAULT);
    let all = (1 << 41) - 1;
    let plain = sets(&[], &[], &[]);
    assert_eq!(
        (plain.bounding, plain.effective, plain.permitted),
        (nine, nine, nine)
    );
    assert_eq!((plain.inheritable, plain.ambient), (0, 0));
    assert_eq!(sets(&["ALL"], &[], &[]).effective, all);
    assert_eq!(
        sets(&["all"], &["CAP_SYS_ADMIN"], &[]).effective,
        all & !mask(&["SYS_ADMIN"])
    );
    assert_eq!(sets(&["net_raw"], &["ALL"], &[]).effective, mask(&["NET_RAW"]));
    assert_eq!(sets(&[], &["cap_kill"], &[]).effective, nine & !mask(&["KILL"]));
    assert_eq!(sets(&["NET_RAW"], &["NET_RAW"], &[]).effective, nine);
    let low_ports = sets(&[], &["ALL"], &["NET_BIND_SERVICE"]);
    let bind = mask(&["NET_BIND_SERVICE"]);
    assert_eq!((low_ports.ambient, low_ports.inheritable), (bind, bind));
    assert_eq!((low_ports.permitted, low_ports.bounding), (bind, bind));

    let unknown = Request::with(|request| {
        request.context.capabilities = Some(Capability {
            add_capabilities: words(&["KILL", "TELEPORT"]),
            ..Default::default()
        });
    });
    assert!(
        unknown
            .error()
            .contains("capabilities.add_capabilities[1]: unknown capability \"TELEPORT\"")
    );
}

#[test]
fn privileged_means_all_of_it_and_needs_a_privileged_sandbox() {
    let mut request = Request::with(|request| {
        request.context.privileged = true;
        request.context.masked_paths = words(&["/proc/kcore"]);
        request.devices = vec![HostDevice {
            path: "/dev/fuse".into(),
            kind: 'c',
            major: 10,
            minor: 229,
            mode: 0o666,
            uid: 0,
            gid: 0,
            access: "rwm".into(),
        }];
    });
    assert!(
        request
            .error()
            .contains("privileged: is not allowed in a sandbox that is not privileged")
    );
    request.pod.linux = Some(LinuxPodSandboxConfig {
        security_context: Some(LinuxSandboxSecurityContext {
            privileged: true,
            ..Default::default()
        }),
        ..Default::default()
    });
    let config = request.config();
    assert_eq!(config.process.capabilities.effective, (1 << 41) - 1);
    assert!(config.seccomp.is_none());
    assert!(config.masked_paths.is_empty());
    assert!(!config.namespaces.contains(NamespaceKind::Cgroup));
    assert_eq!(config.devices.len(), 1);
    let resources = config.resources.unwrap();
    assert!(
        resources
            .devices()
            .as_ref()
            .unwrap()
            .iter()
            .all(coracle_spec::oci::LinuxDeviceCgroup::allow)
    );
    for place in ["/sys", "/sys/fs/cgroup"] {
        let mount = config
            .mounts
            .iter()
            .find(|mount| mount.destination.as_os_str() == place)
            .unwrap();
        assert_eq!(mount.options.attrs.set & attr::RDONLY, 0);
    }
}

#[test]
fn the_request_decides_what_is_masked_and_an_empty_list_means_nothing() {
    assert!(Request::default().config().masked_paths.is_empty());
    let request = Request::with(|request| {
        request.context.masked_paths = words(&["/proc/kcore"]);
        request.context.readonly_paths = words(&["/proc/sys"]);
        request.context.no_new_privs = true;
        request.context.readonly_rootfs = true;
    });
    let config = request.config();
    assert_eq!(config.masked_paths, ["/proc/kcore"]);
    assert_eq!(config.readonly_paths, ["/proc/sys"]);
    assert!(config.process.no_new_privileges && config.root_readonly);
    let hostname = config
        .mounts
        .iter()
        .find(|mount| mount.destination.ends_with("hostname"))
        .unwrap();
    assert_eq!(
        hostname.options.attrs.set,
        attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC
    );
}

#[test]
fn seccomp_is_what_was_asked_for_and_the_default_where_nothing_was() {
    let with = |kind: Option<ProfileType>, bytes: Option<&str>, unset| {
        Request::with(|request| {
            request.context.seccomp = kind.map(|kind| SecurityProfile {
                profile_type: kind.into(),
                localhost_ref: "/p.json".to_owned(),
            });
            request.seccomp_profile = bytes.map(|text| text.as_bytes().to_vec());
            request.defaults.unset_seccomp = unset;
        })
    };
    let present = |kind, unset| with(kind, None, unset).config().seccomp.is_some();
    assert!(present(None, UnsetSeccomp::Runtime));
    assert!(!present(None, UnsetSeccomp::Unconfined));
    assert!(present(
        Some(ProfileType::RuntimeDefault),
        UnsetSeccomp::Unconfined
    ));
    assert!(!present(Some(ProfileType::Unconfined), UnsetSeccomp::Runtime));
    let local = r#"{"defaultAction":"SCMP_ACT_ALLOW",
        "syscalls":[{"names":["kexec_load"],"action":"SCMP_ACT_ERRNO"}]}"#;
    let profile = with(Some(ProfileType::Localhost), Some(local), UnsetSeccomp::Runtime)
        .config()
        .seccomp;
    assert_eq!(
        profile.unwrap().syscalls().as_ref().unwrap()[0].names(),
        &["kexec_load"]
    );
    // A profile that says nothing is an error, never no filter.
    for broken in [None, Some(""), Some("{}"), Some("null"), Some("[]")] {
        let error = with(Some(ProfileType::Localhost), broken, UnsetSeccomp::Unconfined).error();
        assert!(
            error.starts_with("config.linux.security_context.seccomp: "),
            "{broken:?}: {error}"
        );
    }
}

#[test]
fn apparmor_profiles_by_either_field() {
    let with = |new: Option<(ProfileType, &str)>, old: &str| {
        Request::with(|request| {
            request.context.apparmor = new.map(|(kind, name)| SecurityProfile {
                profile_type: kind.into(),
                localhost_ref: name.to_owned(),
            });
            #[expect(deprecated, reason = "it is under test")]
            old.clone_into(&mut request.context.apparmor_profile);
        })
    };
    let profile = |request: Request| request.config().process.apparmor_profile;
    assert_eq!(profile(with(None, "")), None);
    assert_eq!(profile(with(None, "unconfined")), None);
    assert_eq!(profile(with(None, "localhost/p")).as_deref(), Some("p"));
    assert_eq!(
        profile(with(Some((ProfileType::Localhost, "q")), "localhost/p")).as_deref(),
        Some("q")
    );
    assert_eq!(
        profile(with(Some((ProfileType::Unconfined, "")), "localhost/p")),
        None
    );
    assert!(
        with(Some((ProfileType::Localhost, "")), "")
            .error()
            .contains("apparmor.localhost_ref")
    );
    assert!(
        with(None, "runtime/default")
            .error()
            .contains("not supported in this release")
    );
}
