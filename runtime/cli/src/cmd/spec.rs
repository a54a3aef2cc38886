//! `spec`: a configuration to begin with.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use anyhow::{Context, bail};
use coracle_kernel::creds;
use coracle_spec::{default_spec, rootless_spec};

use super::bundle;

/// Write a configuration to begin with
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory of the bundle, the current one by default
    #[arg(short, long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// For a container of a user without privileges
    #[arg(long)]
    rootless: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<u8> {
    let file = bundle(args.bundle.as_deref())?.join("config.json");
    let text = if args.rootless {
        rootless_spec(creds::effective_uid(), creds::effective_gid())
    } else {
        default_spec().to_owned()
    };
    match OpenOptions::new().write(true).create_new(true).open(&file) {
        Ok(mut file) => file.write_all(text.as_bytes())?,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            bail!("File config.json exists. Remove it first");
        }
        Err(error) => return Err(error).with_context(|| format!("cannot make {}", file.display())),
    }
    Ok(0)
}
