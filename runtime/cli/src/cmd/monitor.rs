//! `monitor`, a role and no command for people: everything it needs to know arrives on descriptor 3.

use std::process::ExitCode;

/// Stay with a pod
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> anyhow::Result<u8> {
    Ok(u8::from(coracle_monitor::run() != ExitCode::SUCCESS))
}
