//! `kill`: a signal to the init.

use anyhow::Context;
use coracle_container::kill;
use coracle_kernel::signal::Signal;

use super::entry;
use crate::globals::Globals;

/// Send a signal to the init of a container (SIGTERM where none is given)
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Accepted as callers pass it: an ended init is no error then
    #[arg(short, long, hide = true)]
    all: bool,
    /// Name of the container
    id: String,
    /// Number or name, with or without SIG
    #[arg(default_value = "SIGTERM", allow_hyphen_values = true)]
    signal: String,
}

pub(crate) fn run(args: &Args, globals: &Globals) -> anyhow::Result<u8> {
    let entry = entry(globals, &args.id)?;
    let signal = Signal::parse(&args.signal).with_context(|| format!("unknown signal {:?}", args.signal))?;
    kill(&entry, signal, args.all)?;
    Ok(0)
}
