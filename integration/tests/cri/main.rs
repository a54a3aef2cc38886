//! The CRI suite: a client, a daemon, and nothing between them but the socket.
//!
//! It runs as root, in a network and a mount namespace of its own, one test after the other. Around each test the host
//! is looked at: what a test leaves behind fails it. Words on the command line choose tests by their names.

#![allow(clippy::unwrap_used, reason = "a call that should have failed fails the test")]

mod containers;
mod exec;
mod faults;
mod hostile;
mod kill9;
mod lists;
mod logs;
mod pods;
mod restart;
mod stop;
mod support;

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use coracle_integration::{Snapshot, node};
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
    run: Box<dyn Fn() -> Running>,
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
    pub(crate) fn new(name: impl Into<String>, run: impl Fn() -> Running + 'static) -> Test {
        Test {
            name: name.into(),
            run: Box::new(run),
        }
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let all = [
        pods::all(),
        containers::all(),
        stop::all(),
        lists::all(),
        exec::all(),
        logs::all(),
        hostile::all(),
        restart::all(),
        faults::all(),
        kill9::all(),
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
        println!("SKIPPED, all {} tests: {why}", wanted.len());
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
    let mut failed = Vec::new();
    let begun = Instant::now();
    for test in &wanted {
        let started = Instant::now();
        let passed = std::env::current_exe()
            .and_then(|own| Command::new(own).env(ONE, &test.name).status())
            .is_ok_and(|status| status.success());
        let word = if passed { "ok" } else { "FAILED" };
        println!(
            "test {} ... {word} ({:.2} s)",
            test.name,
            started.elapsed().as_secs_f64()
        );
        if !passed {
            failed.push(&test.name);
        }
    }
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

fn run(test: &Test) -> Result<()> {
    let before = Snapshot::take()?;
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
        let outcome = Snapshot::take()?.check_no_more_than(before);
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
    let Ok(now) = Snapshot::take() else { return };
    for process in &now.processes {
        if let Some(pid) = process.split(' ').next().and_then(|pid| pid.parse().ok()) {
            let _ = coracle_kernel::signal::kill(pid, coracle_kernel::signal::Signal::KILL);
        }
    }
    #[allow(clippy::disallowed_methods, reason = "after a failure alone")]
    std::thread::sleep(Duration::from_millis(200));
    for cgroup in now.cgroups.iter().rev() {
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
