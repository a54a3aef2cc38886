//! Lists of containers and their figures.

use crate::support::eventually;
use anyhow::{Context as _, Result, ensure};
use coracle_integration::{Node, Options, request};
use coracle_proto::cri::{
    ContainerFilter, ContainerState, ContainerStateValue, ContainerStatsRequest, ListContainerStatsRequest,
    ListContainersRequest,
};

crate::tests![stats, filters];

async fn stats() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("stats", &node.logs);
    let pod = node.run_pod(&config).await?;
    let busy = request::container(
        "busy",
        "dd if=/dev/zero of=/tmp/file bs=1M count=3; while true; do true; done",
    );
    let id = node.run_container(&pod, &busy, &config).await?;
    let stopped = node
        .create(&pod, &request::container("created", "true"), &config)
        .await?;
    eventually(async || {
        let all = node
            .runtime()
            .list_container_stats(ListContainerStatsRequest::default())
            .await?
            .into_inner()
            .stats;
        ensure!(all.len() == 1, "only running ones: {all:?}");
        let stats = &all[0];
        let attributes = stats.attributes.as_ref().context("no attributes")?;
        ensure!(
            attributes.id == id && attributes.id != stopped && attributes.labels == busy.labels,
            "{attributes:?}"
        );
        let cpu = stats.cpu.as_ref().context("no cpu")?;
        ensure!(
            cpu.timestamp > 0 && cpu.usage_core_nano_seconds.context("no usage")?.value > 10_000_000,
            "{cpu:?}"
        );
        let memory = stats.memory.as_ref().context("no memory")?;
        ensure!(
            memory.working_set_bytes.context("no working set")?.value > 0,
            "{memory:?}"
        );
        let layer = stats.writable_layer.as_ref().context("no writable layer")?;
        ensure!(layer.timestamp > 0 && layer.used_bytes.is_some(), "{layer:?}");
        Ok(())
    })
    .await?;
    let one = ContainerStatsRequest {
        container_id: id.clone(),
    };
    ensure!(
        node.runtime()
            .container_stats(one)
            .await?
            .into_inner()
            .stats
            .context("none")?
            .cpu
            .is_some(),
        "no cpu"
    );
    node.finish().await
}

async fn filters() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("filters", &node.logs);
    let pod = node.run_pod(&config).await?;
    let a = node
        .run_container(&pod, &request::container("a", "sleep 1000"), &config)
        .await?;
    let b = node
        .create(&pod, &request::container("b", "sleep 1000"), &config)
        .await?;
    let list = async |filter: ContainerFilter| -> Result<Vec<String>> {
        let request = ListContainersRequest { filter: Some(filter) };
        let found = node
            .runtime()
            .list_containers(request)
            .await?
            .into_inner()
            .containers;
        Ok(found.into_iter().map(|container| container.id).collect())
    };
    let state = Some(ContainerStateValue {
        state: ContainerState::ContainerRunning.into(),
    });
    ensure!(
        list(ContainerFilter {
            state,
            ..Default::default()
        })
        .await?
            == [a.clone()],
        "by state"
    );
    let labels = [("container".to_owned(), "b".to_owned())].into();
    ensure!(
        list(ContainerFilter {
            label_selector: labels,
            ..Default::default()
        })
        .await?
            == [b.clone()],
        "by label"
    );
    let of_pod = ContainerFilter {
        pod_sandbox_id: pod.clone(),
        ..Default::default()
    };
    ensure!(list(of_pod).await?.len() == 2, "by pod");
    ensure!(
        list(ContainerFilter {
            id: a[..9].into(),
            ..Default::default()
        })
        .await?
            == [a.clone()],
        "by id"
    );
    ensure!(node.status(&b[..12]).await?.id == b, "by short id");
    node.finish().await
}
