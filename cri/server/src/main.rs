//! `coracled`: a CRI v1 server.

mod args;
mod books;
mod check;
mod commands;
mod config;
mod notify;
mod serve;
mod service;
mod sessions;
mod startup;
mod status;
mod telemetry;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;
use coracle_image::{Role, worker_main};

use args::{Cli, Command, WorkerRole};
use config::Config;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            // The one place where an error is printed: the chain, in one line.
            // A standard error that takes nothing changes nothing of that.
            let _ = writeln!(std::io::stderr(), "coracled: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Writes a line of what a command answers; `println!` would panic where nobody reads on.
fn answer(line: std::fmt::Arguments<'_>) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").context("write to standard output")
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command.unwrap_or(Command::Serve(cli.serve)) {
        Command::Serve(flags) => {
            telemetry::init(flags.log_format, flags.log_level);
            let config = Config::load(flags.config.as_deref())?;
            serve::serve(&flags, &config)?;
        }
        Command::Check(flags) => return check::check(&flags),
        Command::Config(flags) => {
            let config = if flags.default {
                Config::default()
            } else {
                Config::load(flags.config.as_deref())?
            };
            answer(format_args!("{}", toml::to_string(&config)?.trim_end()))?;
        }
        Command::Image(command) => commands::image(command)?,
        #[cfg(feature = "failpoints")]
        Command::Failpoints => coracle_engine::failpoint::STEPS
            .iter()
            .for_each(|step| println!("{step}")),
        Command::Worker { role } => worker_main(match role {
            WorkerRole::Fetch => Role::Fetch,
            WorkerRole::Parse => Role::Parse,
            WorkerRole::Unpack => Role::Unpack,
        })?,
    }
    Ok(ExitCode::SUCCESS)
}
