//! Volumes: what is mounted below them, on which side it shows.
//!
//! Each kind of propagation with a source on a file system of its own, and with one on the file system of the state
//! directory, where the pods' own files are mounted too.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{Node, Options, request};
use coracle_kernel::mount;
use coracle_kernel::mount_attr::Propagation;
use coracle_kernel::mount_old::{self, Flags};
use coracle_proto::cri::{ContainerConfig, Mount, MountPropagation, PodSandboxConfig};

crate::tests![
    every_propagation_side_by_side,
    a_volume_that_follows_the_host_and_no_other,
];

/// Names of the volumes in the container, what they are asked to be.
const ALL: &[(&str, MountPropagation)] = &[
    ("both", MountPropagation::PropagationBidirectional),
    ("follows", MountPropagation::PropagationHostToContainer),
    ("private", MountPropagation::PropagationPrivate),
];

/// Where the sources lie: on a file system of their own, or on that of the state directory.
const PLACES: &[&str] = &["apart", "same"];

/// Everything that the test mounts, taken away with it.
struct Mounts(Vec<PathBuf>);

impl Mounts {
    fn tmpfs(&mut self, at: PathBuf) -> Result<()> {
        fs::create_dir_all(&at)?;
        mount_old::mount_at(c"tmpfs", &at, c"tmpfs", Flags::empty(), c"")?;
        self.0.push(at);
        Ok(())
    }

    /// Of what a container has mounted here, too.
    fn remove(mut self) -> Result<()> {
        while let Some(at) = self.0.pop() {
            mount::detach(at)?;
        }
        Ok(())
    }
}

fn privileged(
    mut pod: PodSandboxConfig,
    mut container: ContainerConfig,
) -> (PodSandboxConfig, ContainerConfig) {
    let of_pod = pod
        .linux
        .as_mut()
        .and_then(|linux| linux.security_context.as_mut());
    of_pod.into_iter().for_each(|context| context.privileged = true);
    let of_container = container
        .linux
        .as_mut()
        .and_then(|linux| linux.security_context.as_mut());
    of_container
        .into_iter()
        .for_each(|context| context.privileged = true);
    (pod, container)
}

fn source(node: &Node, place: &str, name: &str) -> PathBuf {
    node.dir.join(place).join(name)
}

/// A node, and a running container with these volumes at `/<place>/<name>`.
async fn running(volumes: &[(&str, MountPropagation)]) -> Result<(Node, Mounts, String)> {
    let node = Node::with_busybox(Options::default()).await?;
    let mut mounts = Mounts(Vec::new());
    mounts.tmpfs(node.dir.join("apart"))?;
    mount_old::set_propagation(&node.dir.join("apart"), Propagation::Shared, false)?;
    let (config, mut container) = privileged(
        request::pod("volumes", &node.logs),
        request::container("main", "echo ready; sleep 1000"),
    );
    for place in PLACES {
        for (name, propagation) in volumes {
            let source = source(&node, place, name);
            fs::create_dir_all(&source)?;
            container.mounts.push(Mount {
                container_path: format!("/{place}/{name}"),
                host_path: source.to_string_lossy().into_owned(),
                propagation: (*propagation).into(),
                ..Default::default()
            });
        }
    }
    let pod = node.run_pod(&config).await?;
    let id = node.run_container(&pod, &container, &config).await?;
    let status = node.status(&id).await?;
    node.wait_log(&status, "ready", Duration::from_secs(5)).await?;
    Ok((node, mounts, id))
}

/// Mounts on either side of every volume, and looks from the other.
async fn look(
    node: &Node,
    mounts: &mut Mounts,
    id: &str,
    volumes: &[(&str, MountPropagation)],
) -> Result<()> {
    let mut wrong = Vec::new();
    for place in PLACES {
        for (name, propagation) in volumes {
            let source = source(node, place, name);
            let inside = format!("/{place}/{name}");
            let script = format!(
                "mkdir {inside}/out && mount -t tmpfs tmpfs {inside}/out && echo word > {inside}/out/file"
            );
            let made = node.exec(id, &["sh", "-c", &script], 10).await?;
            ensure!(made.exit_code == 0, "{made:?}");
            let goes_out = source.join("out/file").exists();
            if goes_out {
                mounts.0.push(source.join("out"));
            }
            mounts.tmpfs(source.join("in"))?;
            fs::write(source.join("in/file"), "word")?;
            let seen = node.exec(id, &["cat", &format!("{inside}/in/file")], 10).await?;
            let comes_in = seen.exit_code == 0;
            let wanted = (
                *propagation == MountPropagation::PropagationBidirectional,
                *propagation != MountPropagation::PropagationPrivate,
            );
            if (goes_out, comes_in) != wanted {
                wrong.push(format!("{inside}: goes out {goes_out}, comes in {comes_in}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

/// Nothing of the pod's own has become a mount of the host.
fn host_is_clean(node: &Node) -> Result<()> {
    let state = node.state();
    let state = state.to_str().context("a path of ours is UTF-8")?;
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let ours: Vec<_> = table.lines().filter(|line| line.contains(state)).collect();
    ensure!(ours.is_empty(), "mounts of the host: {ours:#?}");
    Ok(())
}

async fn every_propagation_side_by_side() -> Result<()> {
    let (node, mut mounts, id) = running(ALL).await?;
    let looked = look(&node, &mut mounts, &id, ALL).await;
    host_is_clean(&node)?;
    finish(node, mounts, looked).await
}

/// Without a volume that goes out, the container's mounts are cut off from the host's in another way.
async fn a_volume_that_follows_the_host_and_no_other() -> Result<()> {
    let volumes = &ALL[1..];
    let (node, mut mounts, id) = running(volumes).await?;
    let looked = look(&node, &mut mounts, &id, volumes).await;
    host_is_clean(&node)?;
    finish(node, mounts, looked).await
}

async fn finish(node: Node, mounts: Mounts, looked: Result<()>) -> Result<()> {
    for pod in node.pod_ids().await? {
        node.remove_pod(&pod).await?;
    }
    mounts.remove()?;
    looked?;
    node.finish().await
}
