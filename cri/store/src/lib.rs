//! Durable records: what the daemon must still know after it was killed.
//!
//! Two databases of this kind exist. The durable one (`meta.db` under the data root) holds what must
//! outlive the machine; the volatile one (`volatile.db` under the state directory, a tmpfs) what means
//! something within one boot alone. Both are written by one thread each, which commits whatever has
//! queued up since its last fsync in one transaction: concurrent callers share the price of a sync.
//!
//! - `record`: what a row holds – schema version, boot id, a typed body, the request's original bytes
//! - `db`: the handle, the writer thread, quarantine
//! - `open`: the file, its schema check, what happens to a corrupt one
//! - `reserve`: space for the day that the disk is full

mod db;
mod open;
mod record;
mod reserve;

pub use db::{BadRecord, Commit, CommitError, Loaded, Op, OpenError, Opened, Store, Table};
pub use record::{Record, RecordError, boot_id};
