//! `list`: all containers of a state directory.

use std::io::Write;

use anyhow::bail;
use clap::ValueEnum;
use coracle_container::{Error, Store};
use coracle_spec::ContainerState;

use crate::globals::Globals;

/// List containers
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the list
    #[arg(short, long, value_enum, default_value = "table")]
    format: Format,
    /// Names alone
    #[arg(short, long)]
    quiet: bool,
}

/// How the list looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Columns
    Table,
    /// An array of state documents
    Json,
}

pub(crate) fn run(args: &Args, globals: &Globals) -> anyhow::Result<u8> {
    let root = globals.state_root()?;
    let store = match Store::open(&root.path)? {
        Some(store) => Some(store),
        None if root.explicit => bail!("{}: no such file or directory", root.path.display()),
        None => None,
    };
    let mut out = std::io::stdout().lock();
    let ids = store.as_ref().map_or_else(|| Ok(Vec::new()), Store::ids)?;
    if args.quiet {
        for id in &ids {
            writeln!(out, "{id}")?;
        }
        return Ok(0);
    }
    let mut documents = Vec::with_capacity(ids.len());
    if let Some(store) = &store {
        for id in &ids {
            documents.extend(document(store, id)?);
        }
    }
    match args.format {
        Format::Json if documents.is_empty() => writeln!(out, "null")?,
        Format::Json => writeln!(out, "{}", serde_json::to_string(&documents)?)?,
        Format::Table => table(&mut out, &documents)?,
    }
    Ok(0)
}

/// What is listed of one container; nothing of one that is gone meanwhile, or that has no record yet.
fn document(store: &Store, id: &str) -> anyhow::Result<Option<ContainerState>> {
    let read = || {
        let entry = store.entry(id)?;
        let Some(state) = entry.state()? else {
            return Ok(None);
        };
        let mut document = state.document(entry.full_status(&state)?);
        document.owner = owner(entry.owner()?);
        Ok(Some(document))
    };
    match read() {
        Err(Error::NotFound) => Ok(None),
        other => Ok(other?),
    }
}

fn table(out: &mut impl Write, documents: &[ContainerState]) -> std::io::Result<()> {
    let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
    rows.extend(documents.iter().map(|one| {
        [
            one.id.clone(),
            one.pid.to_string(),
            one.status.to_string(),
            one.bundle.clone(),
            one.created.clone(),
            one.owner.clone(),
        ]
    }));
    let mut widths = [11; 6];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        writeln!(out, "{}", cells.join(" ").trim_end())?;
    }
    Ok(())
}

/// The name of a user of the host, `#uid` where it has none. Not by the C library, which would load what the host
/// configures for it.
fn owner(uid: u32) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let wanted = uid.to_string();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == wanted).then(|| name.to_owned())
    });
    name.unwrap_or_else(|| format!("#{uid}"))
}
