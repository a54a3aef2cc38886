//! `create`: a container that waits for its start.

use std::path::PathBuf;

use coracle_container::{Console, Store, StoredOptions, create_stored};

use super::{bundle, connect, passed_fds};
use crate::globals::Globals;
use crate::log::Log;

/// Flags that `create` and `run` share.
#[derive(Debug, clap::Args)]
pub(crate) struct Shared {
    /// Directory of the bundle, the current one by default
    #[arg(short, long, value_name = "DIR")]
    pub(super) bundle: Option<PathBuf>,
    /// Unix socket that takes the master of the terminal
    #[arg(long, value_name = "PATH")]
    pub(super) console_socket: Option<PathBuf>,
    /// Unix socket that takes the pidfd of the init
    #[arg(long, value_name = "PATH")]
    pub(super) pidfd_socket: Option<PathBuf>,
    /// File that the pid of the init is written to
    #[arg(long, value_name = "PATH")]
    pub(super) pid_file: Option<PathBuf>,
    /// Enter the root without pivot_root, where the host's root is a ramdisk
    #[arg(long)]
    pub(super) no_pivot: bool,
    /// Keep the caller's session keyring
    #[arg(long)]
    pub(super) no_new_keyring: bool,
    /// Pass N more descriptors to the container, from 3 on
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) preserve_fds: u16,
}

/// Create a container
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    shared: Shared,
    /// Name of the container
    id: String,
}

pub(crate) fn run(args: &Args, globals: &Globals, log: &Log) -> anyhow::Result<u8> {
    let store = Store::make(&globals.state_root()?.path)?;
    let shared = &args.shared;
    let bundle = bundle(shared.bundle.as_deref())?;
    let (preserve_fds, listen_fds) = passed_fds(shared.preserve_fds)?;
    let options = StoredOptions {
        id: &args.id,
        bundle: &bundle,
        console: shared
            .console_socket
            .as_deref()
            .map(connect)
            .transpose()?
            .map(Console::Socket),
        pid_file: shared.pid_file.as_deref(),
        pidfd_socket: shared.pidfd_socket.as_deref().map(connect).transpose()?,
        preserve_fds,
        listen_fds,
        no_pivot: shared.no_pivot,
        no_new_keyring: shared.no_new_keyring,
        own_start: false,
    };
    let created = create_stored(&store, options)?;
    created.warnings.iter().for_each(|warning| log.warn(warning));
    Ok(0)
}
