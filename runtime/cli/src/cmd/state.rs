//! `state`: one container as JSON.

use std::io::Write;

use coracle_container::Error;

use super::entry;
use crate::globals::Globals;

/// Print the state of a container
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name of the container
    id: String,
}

pub(crate) fn run(args: &Args, globals: &Globals) -> anyhow::Result<u8> {
    let entry = entry(globals, &args.id)?;
    let state = entry.state()?.ok_or(Error::NotFound)?;
    let document = state.document(entry.full_status(&state)?);
    std::io::stdout().write_all(document.to_json().as_bytes())?;
    Ok(0)
}
