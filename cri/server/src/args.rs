//! The command line of `coracled`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::NetworkMode;

/// `coracled [flags] [command]`.
#[derive(Debug, Parser)]
#[command(
    name = "coracled",
    version,
    about = "A CRI v1 server: pods, containers and images for a stock kubelet and crictl",
    args_conflicts_with_subcommands = true
)]
pub(crate) struct Cli {
    /// What to do; `serve` when nothing is said.
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    /// Flags of `serve`.
    #[command(flatten)]
    pub(crate) serve: Serve,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve the CRI (the default)
    Serve(Serve),
    /// Say whether this host can run coracled: one line a finding, with the cure
    Check(Serve),
    /// Print the configuration in force
    Config(Config),
    /// Images of a running daemon
    #[command(subcommand)]
    Image(Image),
    /// Print the steps at which a test can make the daemon die
    #[cfg(feature = "failpoints")]
    #[command(hide = true)]
    Failpoints,
    /// One of the confined image processes (started by the daemon)
    #[command(hide = true)]
    Worker {
        /// Which one.
        role: WorkerRole,
    },
}

/// Flags of `serve` and `check`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Serve {
    /// Configuration file [default: /etc/coracle/config.toml, if there is one]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Data: database, images, writable layers
    #[arg(long, value_name = "DIR", default_value = "/var/lib/coracle")]
    pub(crate) root: PathBuf,
    /// What lasts until the next boot: sockets, pod files
    #[arg(long, value_name = "DIR", default_value = "/run/coracle")]
    pub(crate) state: PathBuf,
    /// CRI socket [default: as configured]
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Who connects pods [default: as configured]
    #[arg(long, value_name = "MODE")]
    pub(crate) network: Option<NetworkMode>,
    /// How the log is written [default: text on a terminal, else json]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) log_format: Option<LogFormat>,
    /// What is logged: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub(crate) log_level: tracing::Level,
}

/// `config`.
#[derive(Debug, Args)]
pub(crate) struct Config {
    /// Configuration file [default: /etc/coracle/config.toml, if there is one]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Print the defaults instead
    #[arg(long)]
    pub(crate) default: bool,
}

/// `image …`.
#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// Bring images in from a tar of an OCI layout or of `docker save`
    Import {
        /// Where the daemon listens.
        #[command(flatten)]
        target: Target,
        /// Name for an archive that does not name its image
        #[arg(long, value_name = "REFERENCE")]
        name: Option<String>,
        /// The archive; `-` is standard input
        archive: PathBuf,
    },
    /// Pull an image
    Pull {
        /// Where the daemon listens.
        #[command(flatten)]
        target: Target,
        /// What to pull
        reference: String,
    },
    /// List images
    Ls {
        /// Where the daemon listens.
        #[command(flatten)]
        target: Target,
    },
    /// Remove an image
    Rm {
        /// Where the daemon listens.
        #[command(flatten)]
        target: Target,
        /// Which one
        reference: String,
    },
}

/// Where the daemon listens.
#[derive(Clone, Debug, Args)]
pub(crate) struct Target {
    /// The daemon's socket
    #[arg(long, value_name = "PATH", default_value = "/run/coracle/coracle.sock")]
    pub(crate) socket: PathBuf,
}

/// The confined image processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WorkerRole {
    /// Talks to registries.
    Fetch,
    /// Parses manifests and configurations.
    Parse,
    /// Unpacks one layer.
    Unpack,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}
