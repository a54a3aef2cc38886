//! What several files of the suite use.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use coracle_integration::{Node, stretched};
use coracle_proto::cri::PodSandboxStatusRequest;

/// The namespace options of a pod's config.
pub(crate) fn namespace_options(
    config: &mut coracle_proto::cri::PodSandboxConfig,
) -> Result<&mut coracle_proto::cri::NamespaceOption> {
    let context = config
        .linux
        .as_mut()
        .and_then(|linux| linux.security_context.as_mut());
    context
        .and_then(|context| context.namespace_options.as_mut())
        .context("no namespace options")
}

/// Tries until it works, for five seconds.
pub(crate) async fn eventually(mut attempt: impl AsyncFnMut() -> Result<()>) -> Result<()> {
    let begun = Instant::now();
    loop {
        match attempt().await {
            Ok(()) => return Ok(()),
            Err(error) if begun.elapsed() > stretched(Duration::from_secs(5)) => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Runs all side by side; the first failure counts.
pub(crate) async fn join_all<T, E>(futures: Vec<impl Future<Output = Result<T, E>>>) -> Result<Vec<T>, E> {
    let mut pinned: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let mut done: Vec<Option<T>> = pinned.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        let mut pending = false;
        for (future, slot) in pinned.iter_mut().zip(&mut done) {
            if slot.is_some() {
                continue;
            }
            match future.as_mut().poll(context) {
                std::task::Poll::Ready(Ok(value)) => *slot = Some(value),
                std::task::Poll::Ready(Err(error)) => return std::task::Poll::Ready(Err(error)),
                std::task::Poll::Pending => pending = true,
            }
        }
        if pending {
            std::task::Poll::Pending
        } else {
            std::task::Poll::Ready(Ok(()))
        }
    })
    .await?;
    Ok(done.into_iter().flatten().collect())
}

/// A verbose status is JSON with the keys that tools look for.
#[allow(dead_code, reason = "used by tests of other files")]
pub(crate) async fn info(node: &Node, pod: &str) -> Result<serde_json::Value> {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.into(),
        verbose: true,
    };
    let info = node
        .runtime()
        .pod_sandbox_status(request)
        .await?
        .into_inner()
        .info;
    Ok(serde_json::from_str(info.get("info").context("no info")?)?)
}

pub(crate) async fn monitor_of(node: &Node, pod: &str) -> Result<i32> {
    let pid = info(node, pod).await?["pid"].as_i64().context("no pid")?;
    Ok(i32::try_from(pid)?)
}
