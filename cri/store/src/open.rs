//! Opening a database file: the schema check, corrupt files, files of a newer program.

use std::io;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Database, DatabaseError, ReadableDatabase, StorageError};

use crate::db::{CACHE_BYTES, Op, OpenError, Table, read, write};
use crate::record::{READABLE_BY, SCHEMA};

const SCHEMA_KEY: &str = "schema";

/// Why a file is not opened, before it is known whether that is an error.
pub(crate) enum Refusal {
    Corrupt(String),
    Newer { found: u32, readable_by: u32 },
    Other(redb::Error),
}

impl Refusal {
    pub(crate) fn into_error(self, path: &Path) -> OpenError {
        let path = path.to_owned();
        match self {
            Refusal::Newer { found, readable_by } => OpenError::Newer {
                path,
                found,
                readable_by,
            },
            Refusal::Other(redb::Error::DatabaseAlreadyOpen) => OpenError::InUse { path },
            other => OpenError::Database {
                path,
                source: Box::new(other.into_redb()),
            },
        }
    }

    pub(crate) fn into_redb(self) -> redb::Error {
        match self {
            Refusal::Corrupt(text) => redb::Error::Corrupted(text),
            Refusal::Newer { found, .. } => redb::Error::Corrupted(format!("schema {found} appeared")),
            Refusal::Other(error) => error,
        }
    }
}

/// The library is known to panic on some damaged files: that is a corrupt file too.
pub(crate) fn open_guarded(path: &Path) -> Result<Database, Refusal> {
    catch_unwind(|| open(path)).unwrap_or_else(|_| Err(Refusal::Corrupt("the library panicked on it".into())))
}

fn open(path: &Path) -> Result<Database, Refusal> {
    let exists = path.metadata().is_ok_and(|meta| meta.len() > 0);
    if exists {
        // Opening for writing may already write: look first. A file that was not closed cleanly cannot be
        // opened so; then the check comes after the library's own repair, which leaves the rows as they are.
        match Database::builder()
            .set_cache_size(CACHE_BYTES)
            .open_read_only(path)
        {
            Ok(db) => check_schema(&db)?,
            Err(DatabaseError::RepairAborted) => {}
            Err(error) => return Err(refusal(error.into())),
        }
    }
    let db = Database::builder()
        .set_cache_size(CACHE_BYTES)
        .create(path)
        .map_err(|error: DatabaseError| refusal(error.into()))?;
    check_schema(&db)?;
    stamp_schema(&db).map_err(refusal)?;
    Ok(db)
}

fn refusal(error: redb::Error) -> Refusal {
    match error {
        redb::Error::Corrupted(text) => Refusal::Corrupt(text),
        redb::Error::Io(error)
            if matches!(
                error.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
            ) =>
        {
            Refusal::Corrupt(error.to_string())
        }
        other => Refusal::Other(other),
    }
}

fn stored_schema(db: &impl ReadableDatabase) -> Result<Option<(u32, u32)>, redb::Error> {
    let rows = read(db, Table::Meta)?;
    let Some((_, value)) = rows.iter().find(|(key, _)| key == SCHEMA_KEY) else {
        return Ok(None);
    };
    let mut numbers = std::str::from_utf8(value)
        .unwrap_or_default()
        .split(' ')
        .map_while(|word| word.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(schema), Some(readable_by)) => Ok(Some((schema, readable_by))),
        _ => Err(StorageError::Corrupted("the schema entry is malformed".into()).into()),
    }
}

fn check_schema(db: &impl ReadableDatabase) -> Result<(), Refusal> {
    match stored_schema(db).map_err(refusal)? {
        Some((found, readable_by)) if readable_by > SCHEMA => Err(Refusal::Newer { found, readable_by }),
        _ => Ok(()),
    }
}

/// A file of an older or readable newer schema keeps the higher number: rows of the newer program are in it.
fn stamp_schema(db: &Database) -> Result<(), redb::Error> {
    if stored_schema(db)?.is_some_and(|(schema, _)| schema >= SCHEMA) {
        return Ok(());
    }
    let value = format!("{SCHEMA} {READABLE_BY}").into_bytes();
    write(
        db,
        [Op::Put {
            table: Table::Meta,
            key: SCHEMA_KEY.into(),
            value,
            frees: false,
        }]
        .iter(),
    )
}

pub(crate) fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |passed| passed.as_secs());
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".corrupt-{seconds}"));
    let aside = PathBuf::from(name);
    std::fs::rename(path, &aside)?;
    Ok(aside)
}
