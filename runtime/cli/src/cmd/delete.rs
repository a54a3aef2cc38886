//! `delete`: a container and everything that belongs to it.

use coracle_container::{Error, Force, delete};

use super::entry;
use crate::globals::Globals;
use crate::log::Log;

/// Delete a container and what belongs to it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Kill it first where it runs; one that does not exist is no error
    #[arg(short, long)]
    force: bool,
    /// Name of the container
    id: String,
}

pub(crate) fn run(args: &Args, globals: &Globals, log: &Log) -> anyhow::Result<u8> {
    let force = if args.force { Force::Yes } else { Force::No };
    let deleted = entry(globals, &args.id).and_then(|entry| Ok(delete(&entry, force)?));
    match deleted {
        Ok(complaints) => complaints.iter().for_each(|complaint| log.warn(complaint)),
        Err(error) if args.force && matches!(error.downcast_ref(), Some(Error::NotFound)) => {}
        Err(error) => return Err(error),
    }
    Ok(0)
}
