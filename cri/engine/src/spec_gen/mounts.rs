//! The mounts: kernel file systems, the pod's files, what the request names; a parent always before its children.

use coracle_proto::cri::{ContainerConfig, LinuxContainerSecurityContext, MountPropagation};
use serde_json::{Value, json};

use super::error::{Result, inside, invalid, known, unsupported};
use super::{HostMount, Inputs};

/// Most mounts of one container; a pod with more volumes does not pass the API server.
const MOUNTS_MAX: usize = 4096;

/// What a container sees mounted.
pub(super) struct Mounts {
    /// `mounts`.
    pub(super) mounts: Vec<Value>,
    /// `linux.rootfsPropagation`: as far out as the farthest mount asks; none where all are private.
    pub(super) propagation: Option<&'static str>,
}

/// One mount, and where.
struct Placed {
    destination: String,
    document: Value,
}

/// All mounts, in the order in which they are made.
pub(super) fn mounts(inputs: &Inputs<'_>, context: &LinuxContainerSecurityContext) -> Result<Mounts> {
    let requested = requested(inputs.container, inputs.mounts)?;
    let is_requested = |path: &str| requested.iter().any(|mount| mount.destination == path);
    // A whole /dev of the host brings what is below it along.
    let brings_dev = is_requested("/dev");

    let mut mounts: Vec<Placed> = kernel(context.privileged)
        .into_iter()
        .filter(|mount| !is_requested(&mount.destination))
        .filter(|mount| !(brings_dev && mount.destination.starts_with("/dev/")))
        .collect();
    let files = &inputs.files;
    // As writable as the root; they lie in a small file system of the pod's.
    let access = if context.readonly_rootfs { "ro" } else { "rw" };
    let of_pod = || vec!["bind", "rprivate", access, "nosuid", "nodev", "noexec"];
    for (destination, source, options) in [
        ("/etc/resolv.conf", &files.resolv_conf, of_pod()),
        ("/etc/hostname", &files.hostname, of_pod()),
        ("/etc/hosts", &files.hosts, of_pod()),
        (
            "/dev/shm",
            &files.shm,
            vec!["bind", "rprivate", "nosuid", "noexec", "nodev"],
        ),
    ] {
        // What the request mounts there itself wins.
        if let Some(source) = source
            && !is_requested(destination)
            && !(brings_dev && destination.starts_with("/dev/"))
        {
            mounts.push(Placed {
                destination: destination.to_owned(),
                document: json!({
                    "destination": destination, "type": "bind", "source": source, "options": options,
                }),
            });
        }
    }
    mounts.extend(requested);
    // Stable: of two on one place the later one stays on top.
    mounts.sort_by_key(|mount| mount.destination.bytes().filter(|byte| *byte == b'/').count());
    Ok(Mounts {
        mounts: mounts.into_iter().map(|mount| mount.document).collect(),
        propagation: root_propagation(inputs.container),
    })
}

fn root_propagation(container: &ContainerConfig) -> Option<&'static str> {
    let is = |wanted: MountPropagation| container.mounts.iter().any(|mount| mount.propagation() == wanted);
    if is(MountPropagation::PropagationBidirectional) {
        Some("rshared")
    } else if is(MountPropagation::PropagationHostToContainer) {
        Some("rslave")
    } else {
        None
    }
}

/// File systems of the kernel. A privileged container may write to those of the host too.
fn kernel(privileged: bool) -> Vec<Placed> {
    let access = if privileged { "rw" } else { "ro" };
    [
        ("/proc", "proc", vec!["nosuid", "noexec", "nodev"]),
        (
            "/dev",
            "tmpfs",
            vec!["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        (
            "/dev/pts",
            "devpts",
            vec![
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        ("/dev/mqueue", "mqueue", vec!["nosuid", "noexec", "nodev"]),
        ("/sys", "sysfs", vec!["nosuid", "noexec", "nodev", access]),
        (
            "/sys/fs/cgroup",
            "cgroup",
            vec!["nosuid", "noexec", "nodev", "relatime", access],
        ),
    ]
    .into_iter()
    .map(|(destination, kind, options)| Placed {
        destination: destination.to_owned(),
        document: json!({ "destination": destination, "type": kind, "source": kind, "options": options }),
    })
    .collect()
}

/// What of the request's mounts is refused, wherever they come from.
pub(super) fn check(container: &ContainerConfig) -> Result<()> {
    if container.mounts.len() > MOUNTS_MAX {
        return Err(invalid("config.mounts", format!("are more than {MOUNTS_MAX}")));
    }
    for (i, mount) in container.mounts.iter().enumerate() {
        let field = |name: &str| format!("config.mounts[{i}].{name}");
        if mount.image.is_some() {
            return Err(unsupported(field("image"), "an image volume"));
        }
        if !mount.image_sub_path.is_empty() {
            return Err(invalid(field("image_sub_path"), "is given without an image"));
        }
        if !mount.uid_mappings.is_empty() {
            return Err(unsupported(field("uid_mappings"), "an id-mapped mount"));
        }
        if !mount.gid_mappings.is_empty() {
            return Err(unsupported(field("gid_mappings"), "an id-mapped mount"));
        }
        let destination = inside(&field("container_path"), &mount.container_path)?;
        if destination == "/" {
            return Err(invalid(field("container_path"), "is the root of the container"));
        }
    }
    Ok(())
}

/// The request's mounts, with the sources that were looked up.
fn requested(container: &ContainerConfig, resolved: &[HostMount]) -> Result<Vec<Placed>> {
    let mut placed = Vec::with_capacity(container.mounts.len());
    for (i, mount) in container.mounts.iter().enumerate() {
        let field = |name: &str| format!("config.mounts[{i}].{name}");
        // Not refused: clients ask to relabel on hosts that have no labels, and no container of ours has one that
        // would keep it from what is not relabelled.
        let _ = mount.selinux_relabel;

        let destination = inside(&field("container_path"), &mount.container_path)?;
        let source = resolved
            .iter()
            .find(|resolved| resolved.index == i)
            .ok_or_else(|| invalid(field("host_path"), "was not resolved"))?;
        let propagation = known(&field("propagation"), mount.propagation)?;
        if mount.recursive_read_only {
            // Clients tell this error by its first word.
            let refused = |why| invalid(format!("RROUnsupported: {}", field("recursive_read_only")), why);
            if !mount.readonly {
                return Err(refused("needs readonly"));
            }
            if propagation != MountPropagation::PropagationPrivate {
                return Err(refused("needs the propagation PRIVATE"));
            }
        }
        let access = match (mount.readonly, mount.recursive_read_only) {
            (_, true) => "rro",
            (true, false) => "ro",
            (false, false) => "rw",
        };
        let options = ["rbind", propagation_word(propagation), access];
        let document = json!({
            "destination": &destination, "type": "bind", "source": source.source, "options": options,
        });
        placed.push(Placed {
            destination,
            document,
        });
    }
    Ok(placed)
}

fn propagation_word(propagation: MountPropagation) -> &'static str {
    match propagation {
        MountPropagation::PropagationPrivate => "rprivate",
        MountPropagation::PropagationHostToContainer => "rslave",
        MountPropagation::PropagationBidirectional => "rshared",
    }
}

#[cfg(test)]
mod tests {
    use coracle_proto::cri::{IdMapping, ImageSpec, Mount};

    use super::super::fixture::Fixture;
    use super::*;

    fn mount(path: &str) -> Mount {
        Mount {
            container_path: path.into(),
            host_path: format!("/host{path}"),
            ..Default::default()
        }
    }

    fn of(fixture: &Fixture, privileged: bool, readonly_rootfs: bool) -> Result<Vec<Value>> {
        let context = LinuxContainerSecurityContext {
            privileged,
            readonly_rootfs,
            ..Default::default()
        };
        mounts(&fixture.inputs(), &context).map(|made| made.mounts)
    }

    fn made(mounts: Vec<Mount>) -> Result<Vec<Value>> {
        let mut fixture = Fixture::default();
        fixture.set_mounts(mounts);
        check(&fixture.container)?;
        of(&fixture, false, false)
    }

    fn find<'a>(mounts: &'a [Value], destination: &str) -> Vec<&'a Value> {
        mounts
            .iter()
            .filter(|mount| mount["destination"] == destination)
            .collect()
    }

    #[test]
    fn parents_come_first() {
        let mounts = made(vec![
            mount("/a/b/c"),
            mount("/a"),
            mount("/dev/shm/x"),
            mount("/a/b"),
        ])
        .unwrap();
        let place = |path: &str| {
            mounts
                .iter()
                .position(|mount| mount["destination"] == path)
                .unwrap()
        };
        assert!(place("/a") < place("/a/b") && place("/a/b") < place("/a/b/c"));
        assert!(place("/dev") < place("/dev/shm") && place("/dev/shm") < place("/dev/shm/x"));
        assert!(place("/sys") < place("/sys/fs/cgroup"));
    }

    #[test]
    fn the_request_wins_over_the_defaults() {
        let mounts = made(vec![
            mount("/etc/hosts"),
            mount("/etc/resolv.conf/"),
            mount("/sys"),
            mount("//dev"),
        ])
        .unwrap();
        for path in ["/etc/hosts", "/etc/resolv.conf", "/sys", "/dev"] {
            let found = find(&mounts, path);
            assert_eq!(found.len(), 1, "{path}");
            assert_eq!(found[0]["type"], "bind", "{path}");
        }
        assert!(find(&mounts, "/dev/pts").is_empty());
        assert!(find(&mounts, "/dev/shm").is_empty());
        assert_eq!(find(&mounts, "/etc/hostname").len(), 1);
    }

    #[test]
    fn the_kernels_file_systems_are_read_only_unless_privileged() {
        let fixture = Fixture::default();
        for (privileged, word) in [(false, "ro"), (true, "rw")] {
            let mounts = of(&fixture, privileged, false).unwrap();
            for path in ["/sys", "/sys/fs/cgroup"] {
                let options = &find(&mounts, path)[0]["options"];
                assert!(options.as_array().unwrap().contains(&json!(word)), "{path}");
            }
        }
    }

    #[test]
    fn the_pods_files_are_as_writable_as_the_root() {
        let fixture = Fixture::default();
        for (readonly, word) in [(false, "rw"), (true, "ro")] {
            let mounts = of(&fixture, false, readonly).unwrap();
            for path in ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"] {
                let options = &find(&mounts, path)[0]["options"];
                assert!(options.as_array().unwrap().contains(&json!(word)), "{path}");
            }
        }
    }

    #[test]
    fn options_follow_the_request() {
        let options = |change: &dyn Fn(&mut Mount)| {
            let mut one = mount("/data");
            change(&mut one);
            let mounts = made(vec![one])?;
            Ok::<_, super::super::SpecError>(find(&mounts, "/data")[0]["options"].clone())
        };
        assert_eq!(options(&|_| {}).unwrap(), json!(["rbind", "rprivate", "rw"]));
        assert_eq!(
            options(&|m| m.readonly = true).unwrap(),
            json!(["rbind", "rprivate", "ro"])
        );
        assert_eq!(
            options(&|m| m.propagation = 1).unwrap(),
            json!(["rbind", "rslave", "rw"])
        );
        assert_eq!(
            options(&|m| m.propagation = 2).unwrap(),
            json!(["rbind", "rshared", "rw"])
        );
        let recursive = |m: &mut Mount| (m.readonly, m.recursive_read_only) = (true, true);
        assert_eq!(options(&recursive).unwrap(), json!(["rbind", "rprivate", "rro"]));
        for bad in [(false, 0), (true, 1), (true, 2)] {
            let error =
                options(&|m| (m.recursive_read_only, m.readonly, m.propagation) = (true, bad.0, bad.1));
            assert!(
                error.unwrap_err().to_string().starts_with("RROUnsupported"),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn what_cannot_be_done_names_its_field() {
        type Case<'a> = (&'a str, &'a dyn Fn(&mut Mount));
        let cases: [Case<'_>; 9] = [
            ("container_path", &|m| m.container_path = "relative".into()),
            ("container_path", &|m| m.container_path = "/a/../..".into()),
            ("container_path", &|m| m.container_path = "//./".into()),
            ("container_path", &|m| m.container_path = "/a\0b".into()),
            ("image", &|m| m.image = Some(ImageSpec::default())),
            ("image_sub_path", &|m| m.image_sub_path = "x".into()),
            ("uid_mappings", &|m| m.uid_mappings = vec![IdMapping::default()]),
            ("gid_mappings", &|m| m.gid_mappings = vec![IdMapping::default()]),
            ("propagation", &|m| m.propagation = 9),
        ];
        for (field, change) in cases {
            let mut one = mount("/data");
            change(&mut one);
            let error = made(vec![mount("/first"), one]).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("config.mounts[1].{field}: ")),
                "{error}"
            );
        }
    }

    #[test]
    fn the_root_propagates_as_far_as_a_mount_asks() {
        let of = |wanted: &[i32]| {
            root_propagation(&ContainerConfig {
                mounts: wanted
                    .iter()
                    .map(|p| Mount {
                        propagation: *p,
                        ..Default::default()
                    })
                    .collect(),
                ..Default::default()
            })
        };
        assert_eq!(of(&[0, 0]), None);
        assert_eq!(of(&[0, 1]), Some("rslave"));
        assert_eq!(of(&[2, 1]), Some("rshared"));
    }
}
