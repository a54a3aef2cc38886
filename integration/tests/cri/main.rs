//! The CRI suite: a client, a daemon, and nothing between them but the socket.
//!
//! It runs as root, in a network and a mount namespace of its own, one test after the other. Around each test the host
//! is looked at: what a test leaves behind fails it. Words on the command line choose tests by their names.

#![allow(clippy::unwrap_used, reason = "a call that should have failed fails the test")]

mod cni;
mod containers;
mod crictl;
mod exec;
mod faults;
mod full_disk;
mod hostile;
mod kill9;
mod lists;
mod logs;
mod monitors;
mod mutations;
mod namespaces;
mod network;
mod oracle;
mod pods;
mod reconnect;
mod refused;
mod restart;
mod single;
mod stop;
mod streaming;
mod streaming_attach;
mod streaming_clients;
mod streaming_forward;
mod streaming_refused;
mod streaming_tls;
mod streams;
mod support;
mod volumes;

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use coracle_integration::leaks::{self, Snapshot};
use coracle_integration::node;
use coracle_kernel::mount_attr::Propagation;
use coracle_kernel::mount_old::{self, Flags};
use coracle_kernel::namespace::{self, Kinds};

/// Names the one test that this process runs.
const ONE: &str = "CORACLE_IT_ONE";

/// A test on its way.
type Running = Pin<Box<dyn Future<Output = Result<()>>>>;

/// A test: what it leaves behind is looked for afterwards.
pub(crate) struct Test {
    name: String,
    /// It may run side by side with others: it measures no time.
    beside: bool,
    // Called in the one process that runs it; the runner's threads want the names alone.
    run: Box<dyn Fn() -> Running + Sync>,
}

/// A list of tests out of async functions.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        /// The tests of this file.
        pub(crate) fn all() -> Vec<crate::Test> {
            vec![$(crate::Test::new(concat!(module_path!(), "::", stringify!($name)), || Box::pin($name()))),*]
        }
    };
}
pub(crate) use tests;

impl Test {
    /// A test of this name.
    pub(crate) fn new(name: impl Into<String>, run: impl Fn() -> Running + Sync + 'static) -> Test {
        Test {
            name: name.into(),
            beside: false,
            run: Box::new(run),
        }
    }

    /// The same, and it may run side by side with others.
    pub(crate) fn beside(self) -> Test {
        Test { beside: true, ..self }
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let all = [
        pods::all(),
        namespaces::all(),
        containers::all(),
        stop::all(),
        lists::all(),
        exec::all(),
        crictl::all(),
        logs::all(),
        hostile::all(),
        mutations::all(),
        refused::all(),
        restart::all(),
        faults::all(),
        full_disk::all(),
        single::all(),
        oracle::all(),
        reconnect::all(),
        volumes::all(),
        monitors::all(),
        kill9::all(),
        cni::all(),
        network::all(),
        streaming::all(),
        streaming_attach::all(),
        streaming_clients::all(),
        streaming_forward::all(),
        streaming_refused::all(),
        streaming_tls::all(),
    ];
    let wanted: Vec<Test> = all
        .into_iter()
        .flatten()
        .filter(|test| words.is_empty() || words.iter().any(|word| test.name.contains(word.as_str())))
        .collect();
    if std::env::args().any(|word| word == "--list") {
        wanted.iter().for_each(|test| println!("{}: test", test.name));
        return ExitCode::SUCCESS;
    }
    if let Some(why) = impossible() {
        coracle_integration::skipped(&format!("all {} tests of the CRI suite: {why}", wanted.len()));
        return ExitCode::SUCCESS;
    }
    // Each test in a process of its own, and so in namespaces of its own: none finds a link or route of another.
    if let Ok(name) = std::env::var(ONE) {
        let Some(test) = wanted.iter().find(|test| test.name == name) else {
            return ExitCode::FAILURE;
        };
        return match isolate().and_then(|()| run(test)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                println!("    {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let (shard, shards) = shard();
    let wanted: Vec<Test> = wanted.into_iter().skip(shard).step_by(shards).collect();
    let begun = Instant::now();
    let (beside, alone): (Vec<&Test>, Vec<&Test>) = wanted.iter().partition(|test| test.beside);
    let mut failed = run_all(&alone, 1);
    failed.extend(run_all(&beside, jobs()));
    let passed = wanted.len() - failed.len();
    println!(
        "\ntest result: {}. {passed} passed; {} failed; finished in {:.0} s",
        if failed.is_empty() { "ok" } else { "FAILED" },
        failed.len(),
        begun.elapsed().as_secs_f64()
    );
    failed.iter().for_each(|name| println!("    {name}"));
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// `CORACLE_TEST_SHARD=i/n`: every n-th test from the i-th on, for several machines that share the suite.
fn shard() -> (usize, usize) {
    let Ok(text) = std::env::var("CORACLE_TEST_SHARD") else {
        return (0, 1);
    };
    let parts = text
        .split_once('/')
        .and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parts
        .filter(|(i, n)| i < n)
        .unwrap_or_else(|| panic!("CORACLE_TEST_SHARD={text}: not i/n with i below n"))
}

/// Tests that wait for disks and for nothing else are run several at a time.
fn jobs() -> usize {
    match std::thread::available_parallelism().map_or(1, std::num::NonZero::get) {
        1 => 1,
        processors => (2 * processors).min(8),
    }
}

/// Runs the tests, `jobs` at a time; the names of those that failed.
fn run_all(tests: &[&Test], jobs: usize) -> Vec<String> {
    let queue = Mutex::new(tests.iter().map(|test| test.name.as_str()));
    let failed = Mutex::new(Vec::new());
    // A panic in one of the threads ends the run when the scope does.
    let next = || queue.lock().ok()?.next();
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(name) = next() {
                    let started = Instant::now();
                    let output = std::env::current_exe()
                        .and_then(|own| Command::new(own).env(ONE, name).stderr(Stdio::inherit()).output());
                    let passed = output.as_ref().is_ok_and(|output| output.status.success());
                    let word = if passed { "ok" } else { "FAILED" };
                    let said = output.map_or_else(
                        |error| format!("    {error}\n"),
                        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
                    );
                    let took = started.elapsed().as_secs_f64();
                    println!("{said}test {name} ... {word} ({took:.2} s)");
                    if let (false, Ok(mut failed)) = (passed, failed.lock()) {
                        failed.push(name.to_owned());
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_default()
}

fn run(test: &Test) -> Result<()> {
    let before = leaks::snapshot_here()?;
    // A runtime of its own: no task of one test lives on in the next.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let limit = coracle_integration::stretched(Duration::from_secs(300));
    let outcome = runtime.block_on(async {
        match tokio::time::timeout(limit, (test.run)()).await {
            Ok(outcome) => outcome,
            Err(_) => bail!("not over after {limit:?}"),
        }
    });
    runtime.shutdown_background();
    outcome.inspect_err(|_| sweep())?;
    settle(&before).inspect_err(|_| sweep())
}

/// What is still going away is waited for, what stays is a leak.
fn settle(before: &Snapshot) -> Result<()> {
    let begun = Instant::now();
    loop {
        let outcome = leaks::check(before, &leaks::snapshot_here()?);
        if outcome.is_ok() || begun.elapsed() > coracle_integration::stretched(Duration::from_secs(3)) {
            return outcome;
        }
        #[allow(
            clippy::disallowed_methods,
            reason = "the kernel tells nobody when the last mount of a namespace is gone"
        )]
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A test that failed must not spoil the next ones: what its daemons left is killed and removed.
fn sweep() {
    let Ok(now) = leaks::snapshot_here() else { return };
    for process in now.of("process") {
        if let Some(pid) = process.split(' ').next().and_then(|pid| pid.parse().ok()) {
            let _ = coracle_kernel::signal::kill(pid, coracle_kernel::signal::Signal::KILL);
        }
    }
    #[allow(clippy::disallowed_methods, reason = "after a failure alone")]
    std::thread::sleep(Duration::from_millis(200));
    for cgroup in now.of("cgroup").iter().rev() {
        let _ = std::fs::remove_dir(cgroup);
    }
}

fn impossible() -> Option<String> {
    if coracle_kernel::creds::effective_uid() != 0 {
        return Some("they need root".to_owned());
    }
    for program in ["coracled", "coracle"] {
        let path = node::binary(program);
        if !path.exists() {
            return Some(format!("{} is not built", path.display()));
        }
    }
    None
}

/// Namespaces of the tests' own, before there is a second thread.
fn isolate() -> Result<()> {
    namespace::unshare(Kinds::NETWORK | Kinds::MOUNT)?;
    // Shared below, as a node's root is, and cut off from the real host.
    mount_old::set_propagation(Path::new("/"), Propagation::Slave, true)?;
    mount_old::set_propagation(Path::new("/"), Propagation::Shared, true)?;
    std::fs::create_dir_all("/run/netns")?;
    mount_old::mount_at(c"tmpfs", Path::new("/run/netns"), c"tmpfs", Flags::empty(), c"")?;
    mount_old::set_propagation(Path::new("/run/netns"), Propagation::Shared, false)?;
    let status = Command::new("busybox")
        .args(["ip", "link", "set", "lo", "up"])
        .status()
        .context("run busybox")?;
    if !status.success() {
        bail!("the loopback interface does not come up");
    }
    Ok(())
}
