//! Pod sandboxes: their life, their identity, what a client sees of them.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{Node, Options, request};
use coracle_proto::cri::{
    DnsConfig, ListPodSandboxRequest, NamespaceMode, PodSandboxFilter, PodSandboxState, PodSandboxStateValue,
    RunPodSandboxRequest, RuntimeConfigRequest, StatusRequest, UpdateRuntimeConfigRequest, VersionRequest,
};

use crate::support::{eventually, join_all, namespace_options};

crate::tests![
    version_and_status,
    life_of_a_pod,
    filters_and_short_ids,
    the_same_request_joins_or_gets_the_result,
    another_request_of_the_same_identity_undoes_the_first,
    a_newer_attempt_is_created_later,
    stop_and_remove_are_idempotent,
    host_network,
    files_and_names,
    the_pods_files_are_its_own,
    containers_share_ipc_and_network,
    the_pod_is_reached_over_the_network,
    containers_share_a_pid_namespace_where_asked,
    many_pods_at_once,
];

async fn version_and_status() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let mut runtime = node.runtime();
    let version = runtime.version(VersionRequest::default()).await?.into_inner();
    ensure!(
        version.runtime_name == "coracle" && version.runtime_api_version == "v1",
        "{version:?}"
    );
    ensure!(
        !version.version.is_empty() && version.runtime_version.split('.').count() >= 3,
        "{version:?}"
    );
    let status = runtime
        .status(StatusRequest { verbose: true })
        .await?
        .into_inner();
    let conditions = status.status.context("no status")?.conditions;
    for name in ["RuntimeReady", "NetworkReady"] {
        let condition = conditions
            .iter()
            .find(|condition| condition.r#type == name)
            .context(name)?;
        ensure!(condition.status, "{condition:?}");
    }
    ensure!(
        status
            .runtime_handlers
            .iter()
            .any(|handler| handler.name.is_empty()),
        "no handler of the empty name"
    );
    runtime
        .update_runtime_config(UpdateRuntimeConfigRequest::default())
        .await?;
    runtime.runtime_config(RuntimeConfigRequest::default()).await?;
    node.image()
        .image_fs_info(coracle_proto::cri::ImageFsInfoRequest::default())
        .await?;
    node.finish().await
}

async fn life_of_a_pod() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let config = request::pod("life", &node.logs);
    let id = node.run_pod(&config).await?;
    ensure!(id.len() == 64, "{id}");
    let status = node.pod_status(&id).await?;
    ensure!(status.state() == PodSandboxState::SandboxReady, "{status:?}");
    ensure!(status.metadata == config.metadata, "{status:?}");
    ensure!(
        status.labels == config.labels && status.annotations == config.annotations,
        "{status:?}"
    );
    ensure!(status.created_at > 0, "{status:?}");
    let ip = status.network.clone().context("no network")?.ip;
    ensure!(ip.parse::<std::net::IpAddr>().is_ok(), "address {ip:?}");
    let options = status
        .linux
        .context("no linux")?
        .namespaces
        .context("no namespaces")?
        .options
        .context("no options")?;
    ensure!(
        options.network() == NamespaceMode::Pod && options.pid() == NamespaceMode::Container,
        "{options:?}"
    );

    node.stop_pod(&id).await?;
    let stopped = node.pod_status(&id).await?;
    ensure!(stopped.state() == PodSandboxState::SandboxNotready, "{stopped:?}");
    node.remove_pod(&id).await?;
    let gone = node.pod_status(&id).await.unwrap_err();
    ensure!(gone.code() == tonic::Code::NotFound, "{gone}");
    ensure!(node.pod_ids().await?.is_empty(), "it is listed still");
    node.finish().await
}

async fn filters_and_short_ids() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let a = node.run_pod(&request::pod("a", &node.logs)).await?;
    let b = node.run_pod(&request::pod("b", &node.logs)).await?;
    node.stop_pod(&b).await?;
    let list = async |filter| -> Result<Vec<String>> {
        let request = ListPodSandboxRequest { filter: Some(filter) };
        let items = node.runtime().list_pod_sandbox(request).await?.into_inner().items;
        Ok(items.into_iter().map(|pod| pod.id).collect())
    };
    let state = |state: PodSandboxState| Some(PodSandboxStateValue { state: state.into() });
    ensure!(
        list(PodSandboxFilter {
            id: a[..12].into(),
            ..Default::default()
        })
        .await?
            == [a.clone()],
        "by id"
    );
    let ready = PodSandboxFilter {
        state: state(PodSandboxState::SandboxReady),
        ..Default::default()
    };
    ensure!(list(ready).await? == [a.clone()], "by state");
    let label = |value: &str| [("app".to_owned(), value.to_owned())].into();
    ensure!(
        list(PodSandboxFilter {
            label_selector: label("b"),
            ..Default::default()
        })
        .await?
            == [b.clone()],
        "by label"
    );
    let both = PodSandboxFilter {
        state: state(PodSandboxState::SandboxReady),
        label_selector: label("b"),
        ..Default::default()
    };
    ensure!(list(both).await?.is_empty(), "a filter is a conjunction");
    ensure!(node.pod_status(&a[..10]).await?.id == a, "by short id");
    node.finish().await
}

async fn the_same_request_joins_or_gets_the_result() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let config = request::pod("retry", &node.logs);
    std::fs::create_dir_all(&config.log_directory)?;
    let calls = (0..5).map(|_| {
        let (mut runtime, config) = (node.runtime(), config.clone());
        tokio::spawn(async move {
            let answer = runtime.run_pod_sandbox(request::run(&config)).await?;
            Ok::<_, anyhow::Error>(answer.into_inner().pod_sandbox_id)
        })
    });
    let mut ids = BTreeSet::new();
    for call in calls.collect::<Vec<_>>() {
        ids.insert(call.await??);
    }
    ids.insert(node.run_pod(&config).await?);
    ensure!(ids.len() == 1, "{ids:?}");
    ensure!(node.pod_ids().await?.len() == 1, "more than one pod");
    node.finish().await
}

async fn another_request_of_the_same_identity_undoes_the_first() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let mut config = request::pod("changed", &node.logs);
    let first = node.run_pod(&config).await?;
    config.hostname = "other".into();
    let second = node.run_pod(&config).await?;
    ensure!(
        first != second && node.pod_ids().await? == [second.clone()],
        "{first} {second}"
    );
    // A stopped one of the same identity is not ready: it cannot be the answer either.
    node.stop_pod(&second).await?;
    let third = node.run_pod(&config).await?;
    ensure!(
        third != second && node.pod_ids().await? == [third],
        "the stopped one was returned"
    );
    node.finish().await
}

async fn a_newer_attempt_is_created_later() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let mut config = request::pod("attempts", &node.logs);
    let mut last = 0;
    for attempt in 0..3 {
        config.metadata.as_mut().context("no metadata")?.attempt = attempt;
        let id = node.run_pod(&config).await?;
        let created = node.pod_status(&id).await?.created_at;
        ensure!(created > last, "{created} is not after {last}");
        last = created;
        node.stop_pod(&id).await?;
    }
    node.finish().await
}

async fn stop_and_remove_are_idempotent() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let unknown = "f".repeat(64);
    node.stop_pod(&unknown).await?;
    node.remove_pod(&unknown).await?;
    node.stop_container(&unknown, 0).await?;
    node.remove_container(&unknown).await?;
    let id = node.run_pod(&request::pod("twice", &node.logs)).await?;
    node.stop_pod(&id).await?;
    node.stop_pod(&id).await?;
    node.remove_pod(&id).await?;
    node.remove_pod(&id).await?;
    // Without a stop before it.
    let id = node.run_pod(&request::pod("direct", &node.logs)).await?;
    node.remove_pod(&id).await?;
    let handler = RunPodSandboxRequest {
        runtime_handler: "nonsense".into(),
        ..request::run(&request::pod("h", &node.logs))
    };
    ensure!(
        node.runtime().run_pod_sandbox(handler).await.is_err(),
        "an unknown handler was taken"
    );
    node.finish().await
}

async fn host_network() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let mut config = request::pod("host", &node.logs);
    config.hostname.clear();
    let options = namespace_options(&mut config)?;
    options.network = NamespaceMode::Node.into();
    let pod = node.run_pod(&config).await?;
    let status = node.pod_status(&pod).await?;
    let seen = status
        .linux
        .context("no linux")?
        .namespaces
        .context("no namespaces")?
        .options
        .context("no options")?;
    ensure!(seen.network() == NamespaceMode::Node, "{seen:?}");
    let mut container = request::container("c", "sleep 1000");
    let context = container
        .linux
        .as_mut()
        .and_then(|linux| linux.security_context.as_mut())
        .context("no context")?;
    context.namespace_options.as_mut().context("no options")?.network = NamespaceMode::Node.into();
    let id = node.run_container(&pod, &container, &config).await?;
    let inside = node.exec(&id, &["readlink", "/proc/self/ns/net"], 10).await?;
    let here = std::fs::read_link("/proc/self/ns/net")?;
    ensure!(
        String::from_utf8_lossy(&inside.stdout).trim() == here.to_string_lossy(),
        "{inside:?} {here:?}"
    );
    node.finish().await
}

async fn files_and_names() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let mut config = request::pod("names", &node.logs);
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.9.8.7".into()],
        searches: vec!["svc.test".into()],
        options: vec!["ndots:5".into()],
    });
    let pod = node.run_pod(&config).await?;
    let script = "hostname; echo $HOSTNAME; cat /etc/hostname /etc/resolv.conf";
    let id = node
        .run_container(&pod, &request::container("c", script), &config)
        .await?;
    let status = node.wait_exit(&id, Duration::from_secs(10)).await?;
    let log = node.wait_log(&status, "ndots:5", Duration::from_secs(5)).await?;
    let lines: Vec<&str> = log
        .lines()
        .filter_map(|line| {
            line.split(' ')
                .nth(3)
                .map(|_| &line[line.find(" F ").unwrap_or(0) + 3..])
        })
        .collect();
    ensure!(
        lines
            == [
                "names",
                "names",
                "names",
                "search svc.test",
                "nameserver 10.9.8.7",
                "options ndots:5"
            ],
        "{lines:?}"
    );
    node.finish().await
}

/// Written by one container, read by the next one, and no larger than they may be.
async fn the_pods_files_are_its_own() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("files", &node.logs);
    let pod = node.run_pod(&config).await?;
    let first = node
        .run_container(&pod, &request::container("first", "sleep 1000"), &config)
        .await?;
    let address = node.pod_status(&pod).await?.network.context("no network")?.ip;
    let hosts = node.exec(&first, &["cat", "/etc/hosts"], 10).await?;
    let hosts = String::from_utf8_lossy(&hosts.stdout).into_owned();
    ensure!(
        hosts.starts_with("127.0.0.1\tlocalhost\n") && hosts.ends_with(&format!("\n{address}\tfiles\n")),
        "{hosts:?}"
    );
    let script = "echo 192.0.2.77 added >>/etc/hosts";
    let written = node.exec(&first, &["sh", "-c", script], 10).await?;
    ensure!(written.exit_code == 0, "{written:?}");
    let mut locked = request::container("locked", "sleep 1000");
    locked
        .linux
        .as_mut()
        .and_then(|linux| linux.security_context.as_mut())
        .context("no context")?
        .readonly_rootfs = true;
    let second = node.run_container(&pod, &locked, &config).await?;
    let seen = node.exec(&second, &["grep", "added", "/etc/hosts"], 10).await?;
    ensure!(seen.stdout == b"192.0.2.77 added\n", "{seen:?}");
    let refused = node.exec(&second, &["sh", "-c", script], 10).await?;
    ensure!(refused.exit_code != 0, "a read-only container wrote: {refused:?}");
    let flood = ["dd", "if=/dev/zero", "of=/etc/resolv.conf", "bs=1M", "count=64"];
    let flood = node.exec(&first, &flood, 30).await?;
    let text = String::from_utf8_lossy(&flood.stderr).into_owned();
    ensure!(flood.exit_code != 0 && text.contains("No space left"), "{text}");
    // On the host there is only what the daemon wrote.
    let files = node.state().join("pods").join(&pod).join("files");
    for name in ["hosts", "hostname", "resolv.conf"] {
        let size = std::fs::metadata(files.join(name))?.len();
        ensure!(size < 4096, "{name} has {size} bytes");
    }
    node.finish().await
}

async fn containers_share_ipc_and_network() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("shared", &node.logs);
    let pod = node.run_pod(&config).await?;
    let writer = "echo hello > /dev/shm/word; (echo over tcp | nc -l -p 7000) & sleep 1000";
    let a = node
        .run_container(&pod, &request::container("a", writer), &config)
        .await?;
    let b = node
        .run_container(&pod, &request::container("b", "sleep 1000"), &config)
        .await?;
    eventually(async || {
        let word = node.exec(&b, &["cat", "/dev/shm/word"], 10).await?;
        ensure!(word.stdout == b"hello\n", "{word:?}");
        Ok(())
    })
    .await?;
    eventually(async || {
        let tcp = node.exec(&b, &["nc", "127.0.0.1", "7000"], 10).await?;
        ensure!(tcp.stdout == b"over tcp\n", "{tcp:?}");
        Ok(())
    })
    .await?;
    for namespace in ["ipc", "uts", "net"] {
        let path = format!("/proc/self/ns/{namespace}");
        let of = async |id: &str| {
            node.exec(id, &["readlink", &path], 10)
                .await
                .map(|answer| answer.stdout)
        };
        ensure!(of(&a).await? == of(&b).await?, "{namespace} is not shared");
    }
    let pid = async |id: &str| {
        node.exec(id, &["readlink", "/proc/1/ns/pid"], 10)
            .await
            .map(|answer| answer.stdout)
    };
    ensure!(pid(&a).await? != pid(&b).await?, "pid is shared");
    node.finish().await
}

async fn the_pod_is_reached_over_the_network() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("web", &node.logs);
    let pod = node.run_pod(&config).await?;
    let ip = node.pod_status(&pod).await?.network.context("no network")?.ip;
    let script = "mkdir /tmp/www; echo found it > /tmp/www/index.html; exec httpd -f -p 80 -h /tmp/www";
    let mut container = request::container("web", script);
    container.command[1] = "-ec".into();
    node.run_container(&pod, &container, &config).await?;
    eventually(async || {
        let output = Command::new("busybox")
            .args(["wget", "-q", "-O", "-", &format!("http://{ip}/")])
            .output()?;
        ensure!(output.stdout == b"found it\n", "{output:?}");
        Ok(())
    })
    .await?;
    let other_config = request::pod("client", &node.logs);
    let other = node.run_pod(&other_config).await?;
    let client = node
        .run_container(&other, &request::container("c", "sleep 1000"), &other_config)
        .await?;
    let answer = node
        .exec(&client, &["wget", "-q", "-O", "-", &format!("http://{ip}/")], 10)
        .await?;
    ensure!(answer.stdout == b"found it\n", "from another pod: {answer:?}");
    node.finish().await
}

async fn containers_share_a_pid_namespace_where_asked() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let mut config = request::pod("pids", &node.logs);
    namespace_options(&mut config)?.pid = NamespaceMode::Pod.into();
    let pod = node.run_pod(&config).await?;
    let shared = |name: &str, script: &str| {
        let mut container = request::container(name, script);
        let context = container
            .linux
            .as_mut()
            .and_then(|linux| linux.security_context.as_mut());
        if let Some(options) = context.and_then(|context| context.namespace_options.as_mut()) {
            options.pid = NamespaceMode::Pod.into();
        }
        container
    };
    let a = node
        .run_container(&pod, &shared("a", "exec sleep 4242"), &config)
        .await?;
    let b = node
        .run_container(&pod, &shared("b", "exec sleep 1000"), &config)
        .await?;
    let seen = node.exec(&b, &["ps"], 10).await?;
    ensure!(
        String::from_utf8_lossy(&seen.stdout).contains("sleep 4242"),
        "{seen:?}"
    );
    // The end of one takes nothing of the other along.
    node.stop_container(&a, 0).await?;
    ensure!(
        node.exec(&b, &["true"], 10).await?.exit_code == 0,
        "the other container is gone"
    );
    node.finish().await
}

async fn many_pods_at_once() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let begun = Instant::now();
    let all = (0..8).map(|number| {
        let config = request::pod(&format!("many-{number}"), &node.logs);
        let node = &node;
        async move {
            let pod = node.run_pod(&config).await?;
            let id = node
                .run_container(
                    &pod,
                    &request::container("c", "echo hi; exec sleep 1000"),
                    &config,
                )
                .await?;
            node.exec(&id, &["true"], 10).await?;
            Ok::<_, anyhow::Error>(pod)
        }
    });
    let ids = join_all(all.collect()).await?;
    ensure!(ids.iter().collect::<BTreeSet<_>>().len() == 8, "{ids:?}");
    let mut addresses = BTreeSet::new();
    for id in &ids {
        addresses.insert(node.pod_status(id).await?.network.context("no network")?.ip);
    }
    ensure!(addresses.len() == 8, "{addresses:?}");
    println!(
        "    8 pods with a container each in {:.0} ms",
        begun.elapsed().as_secs_f64() * 1e3
    );
    node.finish().await
}
