//! The repository's own tasks: `cargo xtask demo`, `test`, `bench`, `vm`, `dist`.

mod bench;
mod build;
mod demo;
mod dist;
mod install;
mod run;
mod test;
mod tools;
mod vm;
mod vm_stage;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "xtask", about = "The tasks of this repository")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// A pod, from nothing to nothing, with every call's time
    Demo {
        /// Image to pull; without one a busybox image is made on the spot
        reference: Option<String>,
    },
    /// Everything that CI runs
    Test(TestFlags),
    /// Figures as ratios against runc, crun and containerd, measured in one run
    Bench {
        /// One part alone: oci, cri, forward, memory or cluster
        part: Option<String>,
    },
    /// The suites in the cgroup v2 guest
    Vm {
        /// The long counts, runc before coracle, and kubectl; builds the guest's kernel where there is none
        #[arg(long)]
        long: bool,
        /// A group (oci, cri, kubelet, cluster), or tests whose names contain this
        filter: Option<String>,
    },
    /// Both programs, static, with their checksums, in dist/
    Dist,
}

/// Flags of `test`.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct TestFlags {
    /// The long counts: ten times as many mutations, and what takes minutes to build
    #[arg(long)]
    pub(crate) long: bool,
    /// One stage alone (repeatable)
    #[arg(long, value_name = "STAGE")]
    pub(crate) only: Vec<String>,
    /// Past this many minutes the slow stages that are left are skipped, loudly
    #[arg(long, value_name = "MINUTES", default_value_t = 24 * 60)]
    pub(crate) limit_minutes: u64,
    /// Tests whose names contain this
    pub(crate) filter: Option<String>,
}

/// Where things are.
pub(crate) struct Places {
    /// The checkout.
    pub(crate) repository: PathBuf,
    /// What is dear to build and outlives the checkout.
    pub(crate) cache: PathBuf,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
}

fn main() -> ExitCode {
    match run_task() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_task() -> Result<bool> {
    let places = Places::find()?;
    match Cli::parse().task {
        Task::Demo { reference } => demo::demo(&places, reference.as_deref()).map(|()| true),
        Task::Test(flags) => test::test(&places, &flags),
        Task::Bench { part } => bench::bench(&places, part.as_deref()).map(|()| true),
        Task::Vm { long, filter } => {
            let flags = TestFlags {
                only: vec!["vm".into()],
                filter,
                long,
                limit_minutes: 24 * 60,
            };
            test::test(&places, &flags)
        }
        Task::Dist => dist::dist(&places).map(|()| true),
    }
}

impl Places {
    fn find() -> Result<Self> {
        // Asked for while it runs: a target folder that several checkouts use may hold a program built in another.
        let manifest =
            PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").context("run this as cargo xtask")?);
        let repository = manifest
            .parent()
            .context("xtask lies in the checkout")?
            .to_owned();
        let from = |name| std::env::var_os(name).map(PathBuf::from);
        let cache = from("CORACLE_CACHE")
            .or_else(|| from("XDG_CACHE_HOME").map(|dir| dir.join("coracle")))
            .or_else(|| from("HOME").map(|dir| dir.join(".cache/coracle")))
            .context("neither CORACLE_CACHE nor HOME is set")?;
        let target = from("CARGO_TARGET_DIR").unwrap_or_else(|| repository.join("target"));
        Ok(Self {
            repository,
            cache,
            target,
        })
    }
}
