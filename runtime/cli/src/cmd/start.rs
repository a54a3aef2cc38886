//! `start`: the word that a created container waits for.

use coracle_container::start_stored;

use super::entry;
use crate::globals::Globals;

/// Start the program of a created container
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name of the container
    id: String,
}

pub(crate) fn run(args: &Args, globals: &Globals) -> anyhow::Result<u8> {
    start_stored(&entry(globals, &args.id)?, None)?;
    Ok(0)
}
