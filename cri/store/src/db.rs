//! The database: its handle, the writer thread, quarantine.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use crate::open::{Refusal, open_guarded, set_aside};
use crate::record::{Record, RecordError, SCHEMA};
use crate::reserve::{self, Reserve};

/// Memory for the pages of one database; the working set of a node is far below it.
pub(crate) const CACHE_BYTES: usize = 1 << 20;

/// Most jobs that share one transaction: bounds the time the first of them waits.
const GROUP: usize = 128;

/// A table of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// The schema version and other single facts about the database.
    Meta,
    /// Pod sandboxes by id.
    Sandboxes,
    /// Containers by id.
    Containers,
    /// Images by id, and names of images.
    Images,
    /// Layers by number.
    Layers,
    /// Leases of pod addresses.
    Addresses,
    /// Rows that could not be read, by `table/key`; kept for a person to look at.
    Quarantine,
}

impl Table {
    fn name(self) -> &'static str {
        match self {
            Table::Meta => "meta",
            Table::Sandboxes => "sandboxes",
            Table::Containers => "containers",
            Table::Images => "images",
            Table::Layers => "layers",
            Table::Addresses => "addresses",
            Table::Quarantine => "quarantine",
        }
    }

    fn definition(self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        TableDefinition::new(self.name())
    }
}

/// One change of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes a row, new or not.
    Put {
        /// Where.
        table: Table,
        /// Which row.
        key: String,
        /// Its bytes, as `Record::encode` makes them.
        value: Vec<u8>,
        /// Whether it tells of an end, so that something is about to be freed.
        frees: bool,
    },
    /// Removes a row if it is there.
    Delete {
        /// Where.
        table: Table,
        /// Which row.
        key: String,
    },
}

impl Op {
    /// Whether a full disk must not keep it from being written: the reserve is for these.
    fn frees(&self) -> bool {
        match self {
            Op::Put { frees, .. } => *frees,
            Op::Delete { .. } => true,
        }
    }
}

/// A database; clones share its writer thread, which ends when the last of them is dropped.
#[derive(Debug, Clone)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
}

/// A database that was opened, and what had to be put right on the way.
#[derive(Debug)]
pub struct Opened {
    /// The database.
    pub store: Store,
    /// One line each for the operator, such as a corrupt file that was set aside.
    pub findings: Vec<String>,
}

/// The typed rows of a table.
#[derive(Debug)]
pub struct Loaded<T> {
    /// Rows that could be read, in the order of their keys.
    pub rows: Vec<(String, Record<T>)>,
    /// Rows that could not; they have been moved to quarantine.
    pub bad: Vec<BadRecord>,
}

/// A row that was moved to quarantine.
#[derive(Debug)]
pub struct BadRecord {
    /// Its key.
    pub key: String,
    /// What was wrong with it.
    pub error: RecordError,
}

/// Why a database was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A newer program wrote it in a way that this one cannot read; it was not touched.
    #[error(
        "{path} has schema {found} (readable by {readable_by} and newer), this program knows up to {SCHEMA}"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Schema of the program that wrote it.
        found: u32,
        /// Oldest schema that can read it.
        readable_by: u32,
    },
    /// Another process has it open.
    #[error("{path} is in use by another process")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file system or the database library refuses.
    #[error("cannot open the database {path}")]
    Database {
        /// The file.
        path: PathBuf,
        /// What it said.
        #[source]
        source: Box<redb::Error>,
    },
    /// The writer thread could not be started, or the file not be set aside.
    #[error("cannot set up the database {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Why rows were not written or read. Nothing of a commit that failed is in the database.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommitError {
    /// The database refused; the next commit opens it anew.
    #[error("the database refused the transaction")]
    Database(#[source] Arc<redb::Error>),
    /// The database library panicked; the next commit opens it anew.
    #[error("the database library panicked")]
    Panicked,
    /// The writer thread is gone.
    #[error("the writer of the database has ended")]
    Ended,
}

/// The answer to a commit that has been queued: await it, or wait in a blocking thread.
#[derive(Debug)]
pub struct Commit(oneshot::Receiver<Result<(), CommitError>>);

pub(crate) type Rows = Vec<(String, Vec<u8>)>;

/// One commit that waits: its operations, and who is told.
type Write = (Vec<Op>, oneshot::Sender<Result<(), CommitError>>);

enum Job {
    Write {
        ops: Vec<Op>,
        reply: oneshot::Sender<Result<(), CommitError>>,
    },
    Read {
        table: Table,
        reply: oneshot::Sender<Result<Rows, CommitError>>,
    },
}

impl Store {
    /// Opens the database, or makes it.
    ///
    /// A file of a newer, unreadable schema is refused untouched. A corrupt file is renamed to
    /// `<name>.corrupt-<seconds>` and a new one begun, with a finding that says so.
    pub fn open(path: &Path) -> Result<Opened, OpenError> {
        let mut findings = Vec::new();
        let mut reserve = Reserve::beside(path);
        let opened = match open_guarded(path) {
            Err(Refusal::Other(error)) if reserve::is_full(&error) && reserve.give() => open_guarded(path),
            opened => opened,
        };
        let db = match opened {
            Ok(db) => db,
            Err(Refusal::Corrupt(text)) => {
                let aside = set_aside(path).map_err(|source| OpenError::Io {
                    path: path.into(),
                    source,
                })?;
                findings.push(format!(
                    "{} was corrupt ({text}); it is kept as {} and a new database was begun",
                    path.display(),
                    aside.display()
                ));
                open_guarded(path).map_err(|refusal| refusal.into_error(path))?
            }
            Err(refusal) => return Err(refusal.into_error(path)),
        };
        let reopen_path = path.to_owned();
        let reopen = move || open_guarded(&reopen_path).map_err(Refusal::into_redb);
        let store = Store::start(db, reopen, reserve).map_err(|source| OpenError::Io {
            path: path.into(),
            source,
        })?;
        Ok(Opened { store, findings })
    }

    /// Queues a commit; commits take effect in the order of these calls. Dropping the answer drops nothing
    /// else: the rows are written all the same.
    pub fn submit(&self, ops: Vec<Op>) -> Commit {
        let (reply, answer) = oneshot::channel();
        // A send fails only when the writer has ended; the dropped reply then says so.
        let _ = self.jobs.send(Job::Write { ops, reply });
        Commit(answer)
    }

    /// Writes all of `ops` or none; on the disk when it returns.
    pub async fn commit(&self, ops: Vec<Op>) -> Result<(), CommitError> {
        self.submit(ops).await
    }

    /// The same from a thread that may block.
    pub fn commit_blocking(&self, ops: Vec<Op>) -> Result<(), CommitError> {
        wait(self.submit(ops))
    }

    /// All rows of a table as bytes; blocks.
    pub fn rows(&self, table: Table) -> Result<Vec<(String, Vec<u8>)>, CommitError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.jobs.send(Job::Read { table, reply });
        wait(answer).unwrap_or(Err(CommitError::Ended))
    }

    /// All rows of a table, typed; what cannot be read is moved to quarantine. Blocks.
    pub fn load<T: DeserializeOwned>(&self, table: Table) -> Result<Loaded<T>, CommitError> {
        let mut loaded = Loaded {
            rows: Vec::new(),
            bad: Vec::new(),
        };
        let mut moves = Vec::new();
        for (key, value) in self.rows(table)? {
            match Record::decode(&value) {
                Ok(record) => loaded.rows.push((key, record)),
                Err(error) => {
                    moves.push(Op::Put {
                        table: Table::Quarantine,
                        key: format!("{}/{key}", table.name()),
                        value,
                        // A full disk keeps no daemon from starting.
                        frees: true,
                    });
                    moves.push(Op::Delete {
                        table,
                        key: key.clone(),
                    });
                    loaded.bad.push(BadRecord { key, error });
                }
            }
        }
        if !moves.is_empty() {
            self.commit_blocking(moves)?;
        }
        Ok(loaded)
    }

    fn start(
        db: Database,
        reopen: impl Fn() -> Result<Database, redb::Error> + Send + 'static,
        reserve: Reserve,
    ) -> io::Result<Store> {
        let (jobs, queue) = mpsc::channel();
        thread::Builder::new().name("store".into()).spawn(move || {
            Writer {
                db: Some(db),
                reopen: Box::new(reopen),
                reserve,
            }
            .run(&queue);
        })?;
        Ok(Store { jobs })
    }
}

impl Future for Commit {
    type Output = Result<(), CommitError>;

    /// Ready when the rows are on the disk.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0)
            .poll(context)
            .map(|answer| answer.unwrap_or(Err(CommitError::Ended)))
    }
}

/// Waits for an answer of the writer thread by sleeping: at the start of a daemon, or on a thread for such things.
fn wait<T>(answer: impl Future<Output = T>) -> T {
    struct Unpark(thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut answer = std::pin::pin!(answer);
    loop {
        match answer.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            // An unpark in between is remembered; one too many costs another look.
            Poll::Pending => thread::park(),
        }
    }
}

type Reopen = Box<dyn Fn() -> Result<Database, redb::Error> + Send>;

struct Writer {
    /// None after a failed transaction: the library refuses all further work on that handle.
    db: Option<Database>,
    reopen: Reopen,
    reserve: Reserve,
}

impl Writer {
    fn run(mut self, queue: &mpsc::Receiver<Job>) {
        while let Ok(job) = queue.recv() {
            let mut writes = Vec::new();
            let mut next = Some(job);
            while let Some(job) = next {
                match job {
                    Job::Write { ops, reply } => writes.push((ops, reply)),
                    Job::Read { table, reply } => {
                        // What was queued before the read is seen by it.
                        self.write_group(std::mem::take(&mut writes));
                        let _ = reply.send(self.attempt(|db| read(db, table)));
                    }
                }
                next = if writes.len() < GROUP {
                    queue.try_recv().ok()
                } else {
                    None
                };
            }
            self.write_group(writes);
        }
    }

    fn write_group(&mut self, mut group: Vec<Write>) {
        if let Some(full) = self.reserve.why_full() {
            refuse_takers(&mut group, &CommitError::Database(full));
        }
        if group.is_empty() {
            return;
        }
        let mut result = self.attempt(|db| write(db, operations(&group)));
        if is_full(&result)
            && let Err(error) = &result
        {
            let mut is_lighter = refuse_takers(&mut group, error);
            if group.is_empty() {
                return;
            }
            while is_full(&result) && (std::mem::take(&mut is_lighter) || self.reserve.give()) {
                result = self.attempt(|db| write(db, operations(&group)));
            }
        }
        for (_, reply) in group {
            let _ = reply.send(result.clone());
        }
        self.reserve.refill();
    }

    fn attempt<T>(
        &mut self,
        act: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, CommitError> {
        let db = match self.db.take() {
            Some(db) => db,
            None => (self.reopen)().map_err(|error| CommitError::Database(Arc::new(error)))?,
        };
        // The handle goes into the closure and only a success gives it back: after a failure or a panic it
        // is dropped, and the next job opens the file anew.
        match catch_unwind(AssertUnwindSafe(move || act(&db).map(|value| (value, db)))) {
            Ok(Ok((value, db))) => {
                self.db = Some(db);
                Ok(value)
            }
            Ok(Err(error)) => Err(CommitError::Database(Arc::new(error))),
            Err(_panic) => Err(CommitError::Panicked),
        }
    }
}

/// Answers those that would take space from what frees some, and removes them; whether there were any.
fn refuse_takers(group: &mut Vec<Write>, error: &CommitError) -> bool {
    let all = group.len();
    for (_, reply) in group.extract_if(.., |(ops, _)| !ops.iter().all(Op::frees)) {
        let _ = reply.send(Err(error.clone()));
    }
    group.len() < all
}

fn operations(group: &[Write]) -> impl Iterator<Item = &Op> {
    group.iter().flat_map(|(ops, _)| ops)
}

fn is_full(result: &Result<(), CommitError>) -> bool {
    matches!(result, Err(CommitError::Database(error)) if reserve::is_full(error))
}

pub(crate) fn write<'a>(db: &Database, ops: impl Iterator<Item = &'a Op>) -> Result<(), redb::Error> {
    let transaction = db.begin_write()?;
    for op in ops {
        match op {
            Op::Put {
                table, key, value, ..
            } => {
                transaction
                    .open_table(table.definition())?
                    .insert(key.as_str(), value.as_slice())?;
            }
            Op::Delete { table, key } => {
                transaction.open_table(table.definition())?.remove(key.as_str())?;
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

pub(crate) fn read(db: &impl ReadableDatabase, table: Table) -> Result<Rows, redb::Error> {
    let transaction = db.begin_read()?;
    let open = match transaction.open_table(table.definition()) {
        Ok(open) => open,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut rows = Vec::new();
    for row in open.iter()? {
        let (key, value) = row?;
        rows.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok(rows)
}

/// A store over any backend, for the crash tests: what a power cut leaves is modelled there.
#[cfg(test)]
fn open_backend(backend: impl redb::StorageBackend) -> Result<Store, redb::Error> {
    let db = Database::builder()
        .set_cache_size(CACHE_BYTES)
        .create_with_backend(backend)?;
    let none = Reserve::beside(Path::new("/nowhere/meta.db"));
    Ok(Store::start(db, || Err(redb::Error::DatabaseClosed), none).expect("a thread starts"))
}

#[cfg(test)]
#[path = "db_tests.rs"]
mod tests;
