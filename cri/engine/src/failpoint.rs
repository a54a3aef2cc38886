//! Named steps at which a test build can be made to die, fail or wait.
//!
//! `CORACLE_FAILPOINT=<step>=<abort|error|delay:<ms>>[,…]` arms them when the cargo feature `failpoints` is on.
//! Without the feature `reach` is nothing.

/// Every step, in the order in which a pod's life passes them: the crash tests walk this list.
pub const STEPS: &[&str] = &[
    "run.intent",
    "run.files",
    "run.network",
    "run.monitor",
    "run.setup",
    "run.ready",
    "create.intent",
    "create.rootfs",
    "create.bundle",
    "create.monitor",
    "create.done",
    "start.intent",
    "start.monitor",
    "start.done",
    "exit.record",
    "stop.signal",
    "stop.kill",
    "remove.intent",
    "remove.monitor",
    "remove.files",
    "remove.done",
    "stop-pod.intent",
    "stop-pod.containers",
    "stop-pod.network",
    "stop-pod.monitor",
    "stop-pod.done",
    "remove-pod.intent",
    "remove-pod.containers",
    "remove-pod.files",
    "remove-pod.done",
];

/// Called right after the named step took effect.
#[cfg(not(feature = "failpoints"))]
#[allow(clippy::unused_async)]
pub(crate) async fn reach(_step: &'static str) -> crate::error::Result<()> {
    Ok(())
}

/// Called right after the named step took effect.
#[cfg(feature = "failpoints")]
pub(crate) async fn reach(step: &'static str) -> crate::error::Result<()> {
    debug_assert!(
        STEPS.contains(&step),
        "{step} is not in the list that the crash tests walk"
    );
    match armed(step).as_deref() {
        Some("abort") => std::process::abort(),
        Some("error") => Err(crate::error::Error::step(
            step,
            std::io::Error::other("injected failure"),
        )),
        Some(action) => {
            let delay = action
                .strip_prefix("delay:")
                .and_then(|ms| ms.parse().ok())
                .unwrap_or(0);
            tokio::time::sleep(std::time::Duration::from_millis(delay)).await;
            Ok(())
        }
        None => Ok(()),
    }
}

#[cfg(feature = "failpoints")]
fn armed(step: &str) -> Option<String> {
    let list = std::env::var("CORACLE_FAILPOINT").ok()?;
    list.split(',')
        .find_map(|entry| entry.strip_prefix(step)?.strip_prefix('=').map(str::to_owned))
}
