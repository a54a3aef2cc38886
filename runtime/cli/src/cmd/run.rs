//! `run`: create, start, wait, delete.

use coracle_container::{Console, Force, Store, StoredOptions, create_stored, delete, start_stored};
use coracle_kernel::creds;

use super::create::Shared;
use super::{bundle, connect, passed_fds};
use crate::foreground::Foreground;
use crate::globals::Globals;
use crate::log::Log;

/// Create a container and start its program
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    shared: Shared,
    /// Return when the program has been started
    #[arg(short, long)]
    detach: bool,
    /// Keep the container when its program has ended
    #[arg(long)]
    keep: bool,
    /// Do not become the parent of orphans
    #[arg(long)]
    no_subreaper: bool,
    /// Name of the container
    id: String,
}

pub(crate) fn run(args: &Args, globals: &Globals, log: &Log) -> anyhow::Result<u8> {
    let store = Store::make(&globals.state_root()?.path)?;
    let shared = &args.shared;
    let bundle = bundle(shared.bundle.as_deref())?;
    let (preserve_fds, listen_fds) = passed_fds(shared.preserve_fds)?;
    let console = match shared.console_socket.as_deref() {
        Some(socket) => Some(Console::Socket(connect(socket)?)),
        None if args.detach => None,
        None => Some(Console::Return),
    };
    // Before the clone: a signal that comes while the container is made waits until there is somebody to pass it to.
    let mut foreground = if args.detach {
        None
    } else {
        Some(Foreground::begin()?)
    };
    if !args.detach && !args.no_subreaper {
        creds::set_child_subreaper(true)?;
    }
    let options = StoredOptions {
        id: &args.id,
        bundle: &bundle,
        console,
        pid_file: shared.pid_file.as_deref(),
        pidfd_socket: shared.pidfd_socket.as_deref().map(connect).transpose()?,
        preserve_fds,
        listen_fds,
        no_pivot: shared.no_pivot,
        no_new_keyring: shared.no_new_keyring,
        own_start: true,
    };
    let created = create_stored(&store, options)?;
    created.warnings.iter().for_each(|warning| log.warn(warning));
    let outcome = (|| {
        start_stored(&created.entry, created.start)?;
        match &mut foreground {
            None => Ok(0),
            Some(foreground) => foreground.wait(&created.pidfd, created.terminal.as_ref()),
        }
    })();
    if outcome.is_ok() && (args.detach || args.keep) {
        return outcome;
    }
    drop(foreground);
    let complaints = delete(&created.entry, Force::Yes);
    // The program's code, or why there was no program, is what the caller asked for.
    match complaints {
        Ok(complaints) => complaints.iter().for_each(|complaint| log.warn(complaint)),
        Err(error) => log.error(&format!("{:#}", anyhow::Error::from(error))),
    }
    outcome
}
