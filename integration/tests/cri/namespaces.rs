//! Which namespaces are the host's: whatever the request says, in every combination.

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{Node, Options, request};
use coracle_proto::cri::NamespaceMode;

use crate::support::namespace_options;

crate::tests![the_hosts_namespaces_in_every_combination];

async fn the_hosts_namespaces_in_every_combination() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    for combination in 0..8 {
        let mode = |bit: u8, own: NamespaceMode| {
            if combination & bit != 0 {
                NamespaceMode::Node
            } else {
                own
            }
        };
        let (network, ipc) = (mode(1, NamespaceMode::Pod), mode(2, NamespaceMode::Pod));
        let pid = mode(4, NamespaceMode::Container);
        let mut config = request::pod(&format!("combination{combination}"), &node.logs);
        if network == NamespaceMode::Node {
            config.hostname.clear();
        }
        let options = namespace_options(&mut config)?;
        (options.network, options.ipc, options.pid) = (network.into(), ipc.into(), pid.into());
        let options = options.clone();
        let pod = node.run_pod(&config).await?;
        let mut container = request::container("c", "sleep 1000");
        container
            .linux
            .as_mut()
            .and_then(|linux| linux.security_context.as_mut())
            .context("no context")?
            .namespace_options = Some(options);
        let id = node.run_container(&pod, &container, &config).await?;
        // The host's UTS namespace comes with its network; /dev/shm with its IPC.
        for (name, mode) in [("net", network), ("ipc", ipc), ("pid", pid), ("uts", network)] {
            let link = format!("/proc/self/ns/{name}");
            let inside = node.exec(&id, &["readlink", &link], 10).await?;
            let here = std::fs::read_link(&link)?;
            let same = String::from_utf8_lossy(&inside.stdout).trim() == here.to_string_lossy();
            ensure!(
                same == (mode == NamespaceMode::Node),
                "{name} in combination {combination}: {inside:?}, here {here:?}"
            );
        }
        let shm = node
            .exec(
                &id,
                &["sh", "-c", "grep -c ' /dev/shm ' /proc/self/mountinfo"],
                10,
            )
            .await?;
        ensure!(shm.stdout == b"1\n", "combination {combination}: {shm:?}");
        node.stop_pod(&pod).await?;
        node.remove_pod(&pod).await?;
    }
    node.finish().await
}
