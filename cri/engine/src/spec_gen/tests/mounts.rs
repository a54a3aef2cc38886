//! Mounts and namespaces.

use coracle_proto::cri::{Mount, MountPropagation, NamespaceMode};
use coracle_spec::{Namespace, NamespaceKind};
use serde_json::Value;

use super::{Request, pid_mode};

#[test]
fn the_pid_namespace_is_the_pods_the_containers_or_the_hosts() {
    let namespace = |mode| {
        let request = Request::with(|request| request.context.namespace_options = pid_mode(mode));
        request.config().namespaces.get(NamespaceKind::Pid).cloned()
    };
    assert_eq!(
        namespace(NamespaceMode::Pod),
        Some(Namespace::Join("/proc/9/fd/7".into()))
    );
    assert_eq!(
        namespace(NamespaceMode::Target),
        Some(Namespace::Join("/proc/9/fd/7".into()))
    );
    assert_eq!(namespace(NamespaceMode::Container), Some(Namespace::New));
    assert_eq!(namespace(NamespaceMode::Node), None);
    let lost = Request::with(|request| request.namespaces.pid = None);
    assert!(
        lost.error()
            .contains("namespace_options.pid: the pod has none to share")
    );
}

#[test]
fn cgroup_namespaces_are_for_the_unified_hierarchy() {
    assert!(
        Request::default()
            .config()
            .namespaces
            .is_new(NamespaceKind::Cgroup)
    );
    let v1 = Request::with(|request| request.host.cgroup_v2 = false);
    assert!(!v1.config().namespaces.contains(NamespaceKind::Cgroup));
}

#[test]
fn mounts_replace_what_would_be_there_and_parents_come_first() {
    let mount = |path: &str| Mount {
        container_path: path.to_owned(),
        host_path: "/h".to_owned(),
        ..Default::default()
    };
    let request = Request::with(|request| {
        let paths = ["/a/b/c", "/etc/hostname", "/a", "/x/../a/./b/", "/dev"];
        request.container.mounts = paths.map(mount).to_vec();
    });
    let config = request.config();
    let find = |place: &str| {
        let same = |mount: &&coracle_spec::Mount| mount.destination.as_os_str() == place;
        assert_eq!(config.mounts.iter().filter(same).count(), 1, "{place}");
        config.mounts.iter().position(|mount| same(&mount)).unwrap()
    };
    let source = |place: &str| {
        config.mounts[find(place)]
            .source
            .as_ref()
            .unwrap()
            .to_str()
            .unwrap()
    };
    assert!(find("/a") < find("/a/b") && find("/a/b") < find("/a/b/c"));
    assert_eq!(
        (source("/etc/hostname"), source("/a/b"), source("/dev")),
        ("/host/1", "/host/3", "/host/4")
    );
    assert!(
        !config
            .mounts
            .iter()
            .any(|mount| mount.destination.starts_with("/dev/shm"))
    );

    for bad in ["relative", "", "/", "/..", "/a/.."] {
        let request = Request::with(|request| request.container.mounts = vec![mount(bad)]);
        assert!(
            request.error().starts_with("config.mounts[0].container_path"),
            "{bad}"
        );
    }
}

#[test]
fn access_and_propagation_of_mounts() {
    let with = |edit: &dyn Fn(&mut Mount)| {
        let mut mount = Mount {
            container_path: "/data".to_owned(),
            host_path: "/h".to_owned(),
            ..Default::default()
        };
        edit(&mut mount);
        Request::with(|request| request.container.mounts = vec![mount])
    };
    let options = |edit: &dyn Fn(&mut Mount)| {
        let generated = with(edit).generate().unwrap();
        let mounts = generated.config["mounts"].as_array().unwrap().clone();
        let mount = mounts
            .into_iter()
            .find(|mount| mount["destination"] == "/data")
            .unwrap();
        (
            mount["options"].to_string(),
            generated.config["linux"]["rootfsPropagation"].clone(),
        )
    };
    assert_eq!(
        options(&|_| {}),
        (r#"["rbind","rprivate","rw"]"#.to_owned(), Value::Null)
    );
    assert_eq!(
        options(&|mount| mount.readonly = true).0,
        r#"["rbind","rprivate","ro"]"#
    );
    let recursive = options(&|mount| (mount.readonly, mount.recursive_read_only) = (true, true)).0;
    assert_eq!(recursive, r#"["rbind","rprivate","rro"]"#);
    let slave = options(&|mount| mount.set_propagation(MountPropagation::PropagationHostToContainer));
    assert_eq!(slave, (r#"["rbind","rslave","rw"]"#.to_owned(), "rslave".into()));
    let shared = options(&|mount| mount.set_propagation(MountPropagation::PropagationBidirectional));
    assert_eq!(
        shared,
        (r#"["rbind","rshared","rw"]"#.to_owned(), "rshared".into())
    );

    let writable = with(&|mount| mount.recursive_read_only = true);
    assert!(writable.error().contains("recursive_read_only: needs readonly"));
    let travelling = with(&|mount| {
        (mount.readonly, mount.recursive_read_only) = (true, true);
        mount.set_propagation(MountPropagation::PropagationHostToContainer);
    });
    assert!(
        travelling
            .error()
            .contains("recursive_read_only: needs the propagation PRIVATE")
    );
    assert!(
        with(&|mount| mount.propagation = 9)
            .error()
            .contains("mounts[0].propagation")
    );
    let mapped = with(&|mount| mount.uid_mappings = vec![Default::default()]);
    assert!(
        mapped
            .error()
            .contains("an id-mapped mount is not supported in this release")
    );
}
