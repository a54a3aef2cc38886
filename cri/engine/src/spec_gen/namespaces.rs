//! The namespaces: the pod's by path, the container's own made afresh.

use coracle_proto::cri::{LinuxContainerSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig};
use serde_json::{Value, json};

use super::Inputs;
use super::error::{Result, invalid, known, unsupported};

/// `linux.namespaces`.
pub(super) fn namespaces(inputs: &Inputs<'_>, context: &LinuxContainerSecurityContext) -> Result<Vec<Value>> {
    let own = context.namespace_options.as_ref();
    let pod = options_of(inputs.pod);
    if let Some(own) = own {
        agree(own, &pod)?;
    }

    let mut list = vec![json!({ "type": "mount" })];
    let joined = inputs.namespaces;
    for (kind, path) in [
        ("network", &joined.network),
        ("ipc", &joined.ipc),
        ("uts", &joined.uts),
    ] {
        if let Some(path) = path {
            list.push(json!({ "type": kind, "path": path }));
        }
    }
    if joined.user.is_some() {
        return Err(unsupported(
            "config.linux.security_context.namespace_options.userns_options",
            "a user namespace of the pod",
        ));
    }
    list.extend(pid(inputs, own, &pod)?);
    // On v1 hosts a namespace would hide nothing that matters and confuse what reads the host's paths.
    if inputs.host.cgroup_v2 && !context.privileged {
        list.push(json!({ "type": "cgroup" }));
    }
    Ok(list)
}

/// The namespace options of a pod; all of the pod's own where it says nothing.
pub(super) fn options_of(pod: &PodSandboxConfig) -> NamespaceOption {
    pod.linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|context| context.namespace_options.clone())
        .unwrap_or_default()
}

/// User namespaces: the host's, which is what saying nothing means too.
pub(super) fn check_user(field: &str, options: &NamespaceOption) -> Result<()> {
    let field = format!("{field}.userns_options");
    let Some(user) = &options.userns_options else {
        return Ok(());
    };
    match known(&format!("{field}.mode"), user.mode)? {
        NamespaceMode::Node if user.uids.is_empty() && user.gids.is_empty() => Ok(()),
        NamespaceMode::Node => Err(invalid(field, "has id mappings and the mode NODE")),
        NamespaceMode::Pod => Err(unsupported(field, "a user namespace of the pod")),
        NamespaceMode::Container | NamespaceMode::Target => {
            Err(invalid(format!("{field}.mode"), "is neither POD nor NODE"))
        }
    }
}

/// What the container says must fit what its pod is.
fn agree(own: &NamespaceOption, pod: &NamespaceOption) -> Result<()> {
    let field = "config.linux.security_context.namespace_options";
    check_user(field, own)?;
    for (name, own, pod) in [("network", own.network, pod.network), ("ipc", own.ipc, pod.ipc)] {
        let field = format!("{field}.{name}");
        match known(&field, own)? {
            // The pod's is the host's where the pod says so.
            NamespaceMode::Pod => {}
            NamespaceMode::Node if pod == i32::from(NamespaceMode::Node) => {}
            NamespaceMode::Node => return Err(invalid(field, "is NODE, but not that of the pod")),
            NamespaceMode::Container | NamespaceMode::Target => {
                return Err(invalid(field, "is neither POD nor NODE"));
            }
        }
    }
    Ok(())
}

fn pid(inputs: &Inputs<'_>, own: Option<&NamespaceOption>, pod: &NamespaceOption) -> Result<Option<Value>> {
    let field = "config.linux.security_context.namespace_options.pid";
    let fresh = json!({ "type": "pid" });
    let joined = inputs
        .namespaces
        .pid
        .as_ref()
        .map(|path| json!({ "type": "pid", "path": path }));
    let of_pod = known("pod config.linux.security_context.namespace_options.pid", pod.pid)?;
    match known(field, own.map_or(0, |own| own.pid))? {
        NamespaceMode::Container => Ok(Some(fresh)),
        NamespaceMode::Node => Ok(None),
        NamespaceMode::Target => {
            let why = "is TARGET, and no container to join was found";
            joined.map(Some).ok_or_else(|| invalid(field, why))
        }
        NamespaceMode::Pod => match (joined, of_pod) {
            (Some(joined), _) => Ok(Some(joined)),
            (None, NamespaceMode::Node) => Ok(None),
            (None, NamespaceMode::Container) => Ok(Some(fresh)),
            (None, _) => Err(invalid(field, "the pod has none to share")),
        },
    }
}

#[cfg(test)]
mod tests {
    use coracle_proto::cri::UserNamespace;

    use super::super::fixture::Fixture;
    use super::*;

    const POD: i32 = 0;
    const CONTAINER: i32 = 1;
    const NODE: i32 = 2;
    const TARGET: i32 = 3;

    fn kinds(list: &[Value]) -> Vec<(&str, Option<&str>)> {
        list.iter()
            .map(|one| (one["type"].as_str().unwrap(), one["path"].as_str()))
            .collect()
    }

    fn made(fixture: &Fixture, privileged: bool) -> Result<Vec<Value>> {
        let linux = fixture.container.linux.clone().unwrap_or_default();
        let context = LinuxContainerSecurityContext {
            privileged,
            ..linux.security_context.unwrap_or_default()
        };
        namespaces(&fixture.inputs(), &context)
    }

    fn pid_of(fixture: &Fixture) -> Result<Option<Option<String>>> {
        let list = made(fixture, false)?;
        let found = list.iter().find(|one| one["type"] == "pid");
        Ok(found.map(|one| one["path"].as_str().map(str::to_owned)))
    }

    #[test]
    fn the_pods_are_joined_and_the_rest_is_new() {
        let mut fixture = Fixture::default();
        fixture.options().pid = CONTAINER;
        let expected = [
            ("mount", None),
            ("network", Some("/run/netns/x")),
            ("ipc", Some("/proc/7/fd/3")),
            ("uts", Some("/proc/7/fd/4")),
            ("pid", None),
            ("cgroup", None),
        ];
        assert_eq!(kinds(&made(&fixture, false).unwrap()), expected);
        assert_eq!(kinds(&made(&fixture, true).unwrap()), expected[..5]);
        fixture.host.cgroup_v2 = false;
        assert_eq!(kinds(&made(&fixture, false).unwrap()), expected[..5]);
        fixture.namespaces = Default::default();
        assert_eq!(
            kinds(&made(&fixture, false).unwrap()),
            [("mount", None), ("pid", None)]
        );
    }

    #[test]
    fn the_process_namespace_in_every_mode() {
        let path = || Some("/proc/7/fd/5".to_owned());
        // (the pod's, the container's, path to join) and what comes out.
        for (pod, own, joined, expected) in [
            (POD, CONTAINER, None, Some(None)),
            (POD, POD, path(), Some(path())),
            (NODE, NODE, None, None),
            (NODE, POD, None, None),
            (CONTAINER, POD, None, Some(None)),
            (CONTAINER, CONTAINER, None, Some(None)),
            (CONTAINER, TARGET, path(), Some(path())),
        ] {
            let mut fixture = Fixture::default();
            fixture.pod_options().pid = pod;
            fixture.options().pid = own;
            fixture.namespaces.pid = joined;
            assert_eq!(pid_of(&fixture).unwrap(), expected, "{pod} {own}");
        }
        for (pod, own) in [(POD, POD), (CONTAINER, TARGET), (POD, 9), (9, POD)] {
            let mut fixture = Fixture::default();
            fixture.pod_options().pid = pod;
            fixture.options().pid = own;
            pid_of(&fixture).unwrap_err();
        }
    }

    #[test]
    fn a_container_does_not_leave_its_pod() {
        for (network, ipc) in [
            (NODE, POD),
            (POD, NODE),
            (CONTAINER, POD),
            (POD, TARGET),
            (POD, -1),
        ] {
            let mut fixture = Fixture::default();
            fixture.options().pid = CONTAINER;
            (fixture.options().network, fixture.options().ipc) = (network, ipc);
            made(&fixture, false).unwrap_err();
        }
        let mut fixture = Fixture::default();
        fixture.options().pid = CONTAINER;
        (fixture.options().network, fixture.options().ipc) = (NODE, NODE);
        (fixture.pod_options().network, fixture.pod_options().ipc) = (NODE, NODE);
        made(&fixture, false).unwrap();
    }

    #[test]
    fn user_namespaces_are_refused_by_name() {
        for mode in [POD, CONTAINER, TARGET, 9] {
            let mut fixture = Fixture::default();
            fixture.options().pid = CONTAINER;
            fixture.options().userns_options = Some(UserNamespace {
                mode,
                ..Default::default()
            });
            let error = made(&fixture, false).unwrap_err().to_string();
            assert!(error.contains("userns_options"), "{error}");
        }
        let mut fixture = Fixture::default();
        fixture.options().pid = CONTAINER;
        fixture.options().userns_options = Some(UserNamespace {
            mode: NODE,
            ..Default::default()
        });
        made(&fixture, false).unwrap();
    }
}
