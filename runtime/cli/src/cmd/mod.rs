//! The commands, one a file: arguments, one call, one print.

mod create;
mod delete;
mod exec;
mod features;
mod kill;
mod list;
mod monitor;
mod run;
mod spec;
mod start;
mod state;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::error::ErrorKind;
use clap::{ArgMatches, Args as _, FromArgMatches, Subcommand};
use coracle_container::{Entry, Error, Store};
use coracle_kernel::{path, scm};

use crate::globals::Globals;
use crate::log::Log;

/// Exit code of a failed call.
pub(crate) const FAILED: u8 = 1;
/// Exit code of an exec that failed before there was a process with one of its own.
const EXEC_FAILED: u8 = 255;

/// What to do.
#[derive(Debug)]
pub(crate) enum Command {
    /// Create a container
    Create(create::Args),
    /// Start the program of a created container
    Start(start::Args),
    /// Create a container and start its program
    Run(run::Args),
    /// Execute one more process in a running container
    Exec(Box<exec::Args>),
    /// Print the state of a container
    State(state::Args),
    /// Send a signal to the init of a container (SIGTERM where none is given)
    Kill(kill::Args),
    /// Delete a container and what belongs to it
    Delete(delete::Args),
    /// List containers
    List(list::Args),
    /// Write a configuration to begin with
    Spec(spec::Args),
    /// Print what this runtime can do
    Features(features::Args),
    /// Stay with a pod
    Monitor(monitor::Args),
}

/// Written out, and not derived, for one reason: the flags of a command are put together only where it is the one that
/// is called. All of them together cost more than `state` or `start` does.
impl Subcommand for Command {
    fn augment_subcommands(parser: clap::Command) -> clap::Command {
        // The line for the list of commands; the command's own help has it from its flags.
        let command = |name, about, flags: fn(clap::Command) -> clap::Command| {
            clap::Command::new(name).about(about).defer(flags)
        };
        parser.subcommands([
            command("create", "Create a container", create::Args::augment_args),
            command(
                "start",
                "Start the program of a created container",
                start::Args::augment_args,
            ),
            command(
                "run",
                "Create a container and start its program",
                run::Args::augment_args,
            ),
            command(
                "exec",
                "Execute one more process in a running container",
                exec::Args::augment_args,
            ),
            command(
                "state",
                "Print the state of a container",
                state::Args::augment_args,
            ),
            command(
                "kill",
                "Send a signal to the init of a container (SIGTERM where none is given)",
                kill::Args::augment_args,
            ),
            command(
                "delete",
                "Delete a container and what belongs to it",
                delete::Args::augment_args,
            ),
            command("list", "List containers", list::Args::augment_args),
            command(
                "spec",
                "Write a configuration to begin with",
                spec::Args::augment_args,
            ),
            command(
                "features",
                "Print what this runtime can do",
                features::Args::augment_args,
            ),
            command("monitor", "Stay with a pod", monitor::Args::augment_args).hide(true),
        ])
    }

    fn augment_subcommands_for_update(parser: clap::Command) -> clap::Command {
        Self::augment_subcommands(parser)
    }

    fn has_subcommand(name: &str) -> bool {
        Self::augment_subcommands(clap::Command::new(""))
            .find_subcommand(name)
            .is_some()
    }
}

impl FromArgMatches for Command {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let Some((name, args)) = matches.subcommand() else {
            return Err(clap::Error::new(ErrorKind::MissingSubcommand));
        };
        Ok(match name {
            "create" => Command::Create(create::Args::from_arg_matches(args)?),
            "start" => Command::Start(start::Args::from_arg_matches(args)?),
            "run" => Command::Run(run::Args::from_arg_matches(args)?),
            "exec" => Command::Exec(Box::new(exec::Args::from_arg_matches(args)?)),
            "state" => Command::State(state::Args::from_arg_matches(args)?),
            "kill" => Command::Kill(kill::Args::from_arg_matches(args)?),
            "delete" => Command::Delete(delete::Args::from_arg_matches(args)?),
            "list" => Command::List(list::Args::from_arg_matches(args)?),
            "spec" => Command::Spec(spec::Args::from_arg_matches(args)?),
            "features" => Command::Features(features::Args::from_arg_matches(args)?),
            "monitor" => Command::Monitor(monitor::Args::from_arg_matches(args)?),
            _ => return Err(clap::Error::new(ErrorKind::InvalidSubcommand)),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// A call that failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: anyhow::Error,
    pub(crate) code: u8,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure {
            error: error.into(),
            code: FAILED,
        }
    }
}

/// The exit code of the call, or why it failed.
pub(crate) fn run(command: Command, globals: &Globals, log: &Log) -> Result<u8, Failure> {
    log.debug(concat!("coracle ", env!("CARGO_PKG_VERSION")));
    if globals.systemd_cgroup {
        return Err(anyhow::anyhow!(
            "--systemd-cgroup: the systemd cgroup driver is not supported in this release"
        )
        .into());
    }
    match command {
        Command::Create(args) => create::run(&args, globals, log)
            .context("coracle create failed")
            .map_err(Into::into),
        Command::Start(args) => start::run(&args, globals).map_err(Into::into),
        Command::Run(args) => run::run(&args, globals, log)
            .context("coracle run failed")
            .map_err(Into::into),
        Command::Exec(args) => exec::run(&args, globals, log)
            .context("exec failed")
            .map_err(|error| Failure {
                error,
                code: EXEC_FAILED,
            }),
        Command::State(args) => state::run(&args, globals).map_err(Into::into),
        Command::Kill(args) => kill::run(&args, globals).map_err(Into::into),
        Command::Delete(args) => delete::run(&args, globals, log).map_err(Into::into),
        Command::List(args) => list::run(&args, globals).map_err(Into::into),
        Command::Spec(args) => spec::run(&args).map_err(Into::into),
        Command::Features(args) => features::run(&args).map_err(Into::into),
        Command::Monitor(args) => monitor::run(&args).map_err(Into::into),
    }
}

/// An existing container.
fn entry(globals: &Globals, id: &str) -> anyhow::Result<Entry> {
    let store = Store::open(&globals.state_root()?.path)?.ok_or(Error::NotFound);
    // An id that cannot be one is told before a directory that is not there.
    match store {
        Ok(store) => Ok(store.entry(id)?),
        Err(_) if id.is_empty() => Err(Error::EmptyId.into()),
        Err(error) => Err(error.into()),
    }
}

/// The bundle's directory, absolute; the current one where none is named.
fn bundle(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    match named {
        Some(path) if !path.as_os_str().is_empty() => Ok(std::path::absolute(path)?),
        _ => Ok(std::env::current_dir()?),
    }
}

/// Connects to a socket of a caller's, of any length of path.
fn connect(path: &Path) -> anyhow::Result<OwnedFd> {
    let connect = || {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let dir = path::open_dir(parent)?;
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        scm::connect(&dir, name, scm::Kind::Stream, scm::Mode::Blocking)
    };
    connect().with_context(|| format!("cannot connect to {}", path.display()))
}

/// How many descriptors of ours go on to the container: those of socket activation first, then those asked for. The
/// second number counts the former.
fn passed_fds(preserve: u16) -> anyhow::Result<(i32, i32)> {
    let listen = std::env::var("LISTEN_FDS")
        .ok()
        .and_then(|count| count.parse::<u16>().ok())
        .unwrap_or(0);
    let listen = i32::from(listen);
    let count = listen + i32::from(preserve);
    for number in 3 + listen..3 + count {
        if std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_err() {
            anyhow::bail!("please check that preserved-fd {number} (of {preserve}) is present");
        }
    }
    Ok((count, listen))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_commands_says_what_each_ones_help_says() {
        let parser = Command::augment_subcommands(clap::Command::new("coracle"));
        let mut seen = 0;
        for listed in parser.get_subcommands() {
            // Only building it puts its flags together, and its own words with them.
            let mut own = listed.clone();
            own.build();
            let of = |command: &clap::Command| command.get_about().map(ToString::to_string);
            assert_eq!(of(listed), of(&own), "{}", listed.get_name());
            seen += 1;
        }
        assert!(seen >= 10, "{seen} commands");
    }
}
