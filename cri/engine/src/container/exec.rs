//! ExecSync: the daemon makes the pipes and drains them; the monitor runs the command and tells how it ended.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use coracle_cgroup::{Location, Manager};
use coracle_kernel::fd;
use coracle_proto::cri::ExecSyncResponse;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::warn;

use super::{Hold, KILL_TIME, blocking};
use crate::error::{Context as _, Error, Result};
use crate::monitor::{ExecCall, Monitor};
use crate::pod::PodHandle;
use crate::spec_gen;

/// Both streams together: the kubelet takes messages of 16 MiB, and the answer has a frame.
const OUTPUT_BYTES: usize = (16 << 20) - (64 << 10);

/// What every command may write whatever the others do: answers of probes are far below it.
const OWN_BYTES: usize = 64 << 10;

/// What all commands together may have written beyond that and not been answered yet; the rest is dropped, as beyond the
/// other limit.
const SHARED_BYTES: usize = 48 << 20;

/// What of [`SHARED_BYTES`] is left.
static SHARED_LEFT: AtomicUsize = AtomicUsize::new(SHARED_BYTES);

/// How long the pipes may stay open after the command's end, held by children that it left behind.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// How long the command may run where the request sets no limit: as long as it likes.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Runs `command` in the container; returns when it ended or had its time. It ends too when its caller goes away.
pub(crate) async fn exec_sync(
    pod: PodHandle,
    id: String,
    command: Vec<String>,
    timeout_seconds: i64,
) -> Result<ExecSyncResponse> {
    let limit = match u64::try_from(timeout_seconds) {
        Ok(0) => FOREVER,
        Ok(seconds) => Duration::from_secs(seconds).min(FOREVER),
        Err(_) => return Err(Error::invalid("timeout", "is negative")),
    };
    let (hold, monitor) = running(&pod, &id)?;
    let process = process(&pod, &id, command, false).await?;

    // A task of its own: a client that hangs up drops the call, but neither the command nor its group may stay.
    let (caller, caller_gone) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        let group = ExecGroup::make(&hold).await?;
        let outcome = tokio::select! {
            outcome = run(&monitor, &id, &group, process, limit) => outcome,
            _ = caller_gone => Err(Error::step("run the command", CallerGone)),
        };
        // Children that the command left behind go with it, in every case.
        group.end().await;
        outcome
    });
    let outcome = task.await.step("run the command")?;
    drop(caller);
    outcome
}

/// What is held of a container, which has to run, and its monitor.
pub(super) fn running(pod: &PodHandle, id: &str) -> Result<(Arc<Hold>, Monitor)> {
    let view = pod.container(id)?;
    match (pod.hold(id), pod.monitor()) {
        (Some(hold), Some(monitor)) if view.running && view.record.is_alive() => Ok((hold, monitor)),
        _ => Err(Error::State {
            what: "container",
            id: id.to_owned(),
            why: "is not running".to_owned(),
        }),
    }
}

/// The document of a process that runs `command` as the container's own program runs.
pub(super) async fn process(
    pod: &PodHandle,
    id: &str,
    command: Vec<String>,
    terminal: bool,
) -> Result<Vec<u8>> {
    if command.is_empty() {
        return Err(Error::invalid("cmd", "is empty"));
    }
    let bundle = pod.core().paths.bundle(pod.id(), id).join("config.json");
    blocking(move || {
        let stored = std::fs::read(bundle).step("read the container's config")?;
        let stored = serde_json::from_slice(&stored).step("parse the container's config")?;
        let process = spec_gen::exec_process(&stored, &command, terminal)?;
        Ok::<_, Error>(process.to_string().into_bytes())
    })
    .await?
}

/// The client hung up.
#[derive(Debug, thiserror::Error)]
#[error("nobody waits for it any more")]
struct CallerGone;

async fn run(
    monitor: &Monitor,
    id: &str,
    group: &ExecGroup,
    process: Vec<u8>,
    limit: Duration,
) -> Result<ExecSyncResponse> {
    let (stdout, stdout_end) = fd::pipe().step("make a pipe")?;
    let (stderr, stderr_end) = fd::pipe().step("make a pipe")?;
    let budget = Arc::new(Budget::new(&SHARED_LEFT));
    let (stdout, stderr) = (drain(stdout, &budget)?, drain(stderr, &budget)?);
    let call = ExecCall {
        container: id.to_owned(),
        // Unique in the pod, as the monitor asks.
        exec: format!("{id}/{}", group.name),
        process,
        stdio: [None, Some(stdout_end), Some(stderr_end)],
        tty: false,
        cgroup: Some(group.location.clone()),
    };
    // The time of the request counts from here: a monitor that does not answer is part of it.
    let whole = async {
        let started = monitor.exec(call).await?;
        started.exit.await
    };
    let exit_code = match timeout(limit, whole).await {
        Ok(outcome) => outcome?,
        Err(_) => {
            group.kill().await;
            return Err(Error::Deadline {
                step: "run the command",
                limit,
            });
        }
    };
    let (stdout, stderr) = finish(group, stdout, stderr).await;
    Ok(ExecSyncResponse {
        stdout,
        stderr,
        exit_code,
    })
}

/// What both pipes gave: at their end, or when those who hold them open had their time and were killed.
async fn finish(group: &ExecGroup, mut stdout: Drain, mut stderr: Drain) -> (Vec<u8>, Vec<u8>) {
    let both = async { (stdout.ended().await, stderr.ended().await) };
    if timeout(DRAIN_TIME, both).await.is_err() {
        group.kill().await;
        // Somebody outside the group may hold a pipe still: it is not waited for.
        let both = async { (stdout.ended().await, stderr.ended().await) };
        let _ = timeout(Duration::from_millis(100), both).await;
    }
    (stdout.take(), stderr.take())
}

/// A pipe that is being read by a task of its own.
struct Drain {
    task: JoinHandle<()>,
    bytes: Arc<std::sync::Mutex<Vec<u8>>>,
}

impl Drop for Drain {
    fn drop(&mut self) {
        // Somebody outside the command's group may hold the pipe for ever.
        self.task.abort();
    }
}

/// What both pipes of a command may still bring.
struct Budget {
    own_left: AtomicUsize,
    whole_left: AtomicUsize,
    shared_left: &'static AtomicUsize,
    /// Taken of what is shared: given back with the budget, when the answer is made.
    shared_drawn: AtomicUsize,
}

impl Budget {
    fn new(shared_left: &'static AtomicUsize) -> Budget {
        Budget {
            own_left: AtomicUsize::new(OWN_BYTES),
            whole_left: AtomicUsize::new(OUTPUT_BYTES),
            shared_left,
            shared_drawn: AtomicUsize::new(0),
        }
    }

    /// How much of `count` bytes may be kept.
    fn draw(&self, count: usize) -> usize {
        let wanted = draw(&self.whole_left, count);
        let own = draw(&self.own_left, wanted);
        let shared = draw(self.shared_left, wanted - own);
        self.shared_drawn.fetch_add(shared, Ordering::Relaxed);
        own + shared
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        self.shared_left
            .fetch_add(self.shared_drawn.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl Drain {
    async fn ended(&mut self) {
        let _ = (&mut self.task).await;
    }

    fn take(self) -> Vec<u8> {
        let mut bytes = self
            .bytes
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        std::mem::take(&mut *bytes)
    }
}

/// Takes at most `wanted` of what is left; how much it was.
fn draw(left: &AtomicUsize, wanted: usize) -> usize {
    let mut drawn = 0;
    let _ = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
        drawn = wanted.min(left);
        Some(left - drawn)
    });
    drawn
}

fn drain(pipe: OwnedFd, budget: &Arc<Budget>) -> Result<Drain> {
    fd::set_nonblocking(&pipe, true).step("set up a pipe")?;
    let mut pipe = Receiver::from_owned_fd(pipe).step("watch a pipe")?;
    let bytes = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (budget, sink) = (budget.clone(), bytes.clone());
    let task = tokio::spawn(async move {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
            // Beyond the budget everything is read and dropped, so that the command never blocks on us.
            let kept = budget.draw(count);
            let mut sink = sink.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            sink.extend_from_slice(&buffer[..kept]);
        }
    });
    Ok(Drain { task, bytes })
}

/// The exec's own cgroup, a child of the container's leaf: what is in it was started by this exec.
struct ExecGroup {
    name: String,
    location: Location,
    manager: Arc<std::sync::Mutex<Box<dyn Manager>>>,
}

impl ExecGroup {
    async fn make(hold: &Arc<Hold>) -> Result<ExecGroup> {
        let name = format!("exec-{}", hold.next_exec.fetch_add(1, Ordering::Relaxed));
        let (hold, child) = (hold.clone(), name.clone());
        let manager = blocking(move || {
            let mut group = hold.with_cgroup(|cgroup| cgroup.sub_group(&child))?;
            group.create(&coracle_spec::oci::LinuxResources::default())?;
            Ok::<_, coracle_cgroup::Error>(group)
        })
        .await?
        .step("make the exec's cgroup")?;
        let location = manager.location().clone();
        Ok(ExecGroup {
            name,
            location,
            manager: Arc::new(std::sync::Mutex::new(manager)),
        })
    }

    async fn kill(&self) {
        self.act("kill what is left of an exec", |group| group.kill(KILL_TIME))
            .await;
    }

    /// Removes the group with whatever is in it.
    async fn end(self) {
        self.act("remove an exec's cgroup", |group| {
            group.kill(KILL_TIME)?;
            group.remove(KILL_TIME)
        })
        .await;
    }

    async fn act(
        &self,
        what: &'static str,
        act: impl FnOnce(&mut dyn Manager) -> coracle_cgroup::Result<()> + Send + 'static,
    ) {
        let manager = self.manager.clone();
        let outcome =
            blocking(move || act(&mut **manager.lock().unwrap_or_else(std::sync::PoisonError::into_inner)));
        let error = match outcome.await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => Error::step(what, error),
            Err(error) => error,
        };
        warn!(
            group = self.name,
            error = error.chain(),
            "the group of an exec goes with its container's at the latest"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    static AMPLE: AtomicUsize = AtomicUsize::new(SHARED_BYTES);

    /// What is kept of a million bytes on each of two pipes.
    async fn kept(budget: &Arc<Budget>) -> usize {
        let mut drains = Vec::new();
        let mut writers = Vec::new();
        for _ in 0..2 {
            let (read, write) = fd::pipe().unwrap();
            drains.push(drain(read, budget).unwrap());
            writers.push(std::thread::spawn(move || {
                std::fs::File::from(write).write_all(&[b'x'; 1_000_000]).unwrap();
            }));
        }
        let mut kept = 0;
        for mut drain in drains {
            drain.ended().await;
            kept += drain.take().len();
        }
        for writer in writers {
            writer.join().unwrap();
        }
        kept
    }

    #[tokio::test]
    async fn both_streams_share_one_budget_and_are_read_to_their_end() {
        let mut budget = Budget::new(&AMPLE);
        budget.whole_left = AtomicUsize::new(100_000);
        assert_eq!(kept(&Arc::new(budget)).await, 100_000);
    }

    #[tokio::test]
    async fn what_others_keep_leaves_each_command_its_own_share() {
        static LEFT: AtomicUsize = AtomicUsize::new(1_000);
        let budget = Arc::new(Budget::new(&LEFT));
        assert_eq!(kept(&budget).await, OWN_BYTES + 1_000);
        assert_eq!(LEFT.load(Ordering::Relaxed), 0);
        // The tasks that read hold it a moment longer.
        while Arc::strong_count(&budget) > 1 {
            tokio::task::yield_now().await;
        }
        drop(budget);
        assert_eq!(LEFT.load(Ordering::Relaxed), 1_000, "it was not given back");
    }

    #[tokio::test]
    async fn a_pipe_that_stays_open_keeps_nobody() {
        let (read, write) = fd::pipe().unwrap();
        let mut file = std::fs::File::from(write);
        file.write_all(b"early").unwrap();
        let mut drained = drain(read, &Arc::new(Budget::new(&AMPLE))).unwrap();
        assert!(timeout(Duration::from_millis(50), drained.ended()).await.is_err());
        assert_eq!(drained.take(), b"early");
    }
}
