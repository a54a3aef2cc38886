//! The command line: runc's global flags in their places, and the commands.

use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};
use coracle_kernel::creds;

use crate::cmd::Command;

/// What `--version` prints after the name: callers parse the first line and the one with `spec:`.
const VERSION: &str = concat!("version ", env!("CARGO_PKG_VERSION"), "\nspec: 1.3.0");

/// An OCI runtime with the command line of runc.
#[derive(Debug, Parser)]
#[command(name = "coracle", about, version = VERSION, disable_version_flag = true, args_override_self = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print the version
    #[arg(short = 'v', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
}

/// Flags before the command. Each may be repeated, the last one counts: callers stack them.
#[derive(Debug, Args)]
pub(crate) struct Globals {
    /// Directory for the state of containers
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// File for log lines, instead of standard error
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Format of log lines
    #[arg(long, value_enum, default_value = "text", value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
    /// Log more
    #[arg(long)]
    pub(crate) debug: bool,
    /// Manage cgroups through systemd (not supported in this release)
    #[arg(long)]
    pub(crate) systemd_cgroup: bool,
    /// Ignore cgroup permission errors: true, false or auto
    #[arg(long, value_name = "VALUE", value_parser = ["true", "false", "auto"])]
    rootless: Option<String>,
    /// Accepted and ignored, as callers of older runtimes pass it
    #[arg(long, hide = true)]
    criu: Option<String>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// `time="…" level=… msg="…"`
    Text,
    /// One object a line
    Json,
}

/// Where the state of containers is.
#[derive(Debug)]
pub(crate) struct StateRoot {
    /// The directory, absolute.
    pub(crate) path: PathBuf,
    /// The caller named it.
    pub(crate) explicit: bool,
}

impl Globals {
    /// The state directory, or why it cannot be that.
    pub(crate) fn state_root(&self) -> anyhow::Result<StateRoot> {
        let (path, explicit) = match &self.root {
            Some(path) => (path.clone(), true),
            None => (default_root(), false),
        };
        let path = std::path::absolute(&path)?;
        if path
            .components()
            .all(|part| matches!(part, std::path::Component::RootDir))
        {
            anyhow::bail!("the root of the file system cannot be the state directory (--root)");
        }
        Ok(StateRoot { path, explicit })
    }
}

fn default_root() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if creds::effective_uid() != 0 && !dir.is_empty() => PathBuf::from(dir).join("coracle"),
        _ => PathBuf::from("/run/coracle/oci"),
    }
}
