//! Space that is kept back beside a database, so that a full disk does not keep rows from telling of ends and from being
//! removed: a database that is written page by page needs new pages for that too.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::Arc;

/// Rows have some KiB, and a commit rewrites few pages beside them.
const WHOLE: u64 = 512 << 10;

/// What is given at a time.
const STEP: u64 = 64 << 10;

/// The file `<database>.reserve`.
#[derive(Debug)]
pub(crate) struct Reserve {
    /// None where no file can be made at all.
    file: Option<File>,
    bytes: u64,
    /// Why it is not whole, where that is for lack of space.
    full: Option<Arc<redb::Error>>,
}

impl Reserve {
    /// The reserve of a database; takes the space if it can.
    pub(crate) fn beside(database: &Path) -> Reserve {
        let mut path = database.as_os_str().to_owned();
        path.push(".reserve");
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let known = file.as_ref().ok().and_then(|file| file.metadata().ok());
        let mut reserve = Reserve {
            bytes: known.map_or(0, |meta| meta.len().min(WHOLE)),
            file: file.ok(),
            full: None,
        };
        reserve.refill();
        reserve
    }

    /// Gives a part of it away; false when nothing is left.
    pub(crate) fn give(&mut self) -> bool {
        let Some(file) = self.file.as_ref().filter(|_| self.bytes > 0) else {
            return false;
        };
        self.bytes = self.bytes.saturating_sub(STEP);
        file.set_len(self.bytes).is_ok()
    }

    /// Takes again what is missing, as far as there is space.
    pub(crate) fn refill(&mut self) {
        self.full = None;
        while let Some(file) = self.file.as_ref().filter(|_| self.bytes < WHOLE) {
            let wanted = STEP.min(WHOLE - self.bytes);
            match append(file, self.bytes, wanted) {
                Ok(()) => self.bytes += wanted,
                Err(error) => {
                    let _ = file.set_len(self.bytes);
                    let error = redb::Error::Io(error);
                    self.full = is_full(&error).then(|| Arc::new(error));
                    return;
                }
            }
        }
    }

    /// Why nothing may be written that takes space: some of the reserve is missing, and cannot be had.
    pub(crate) fn why_full(&mut self) -> Option<Arc<redb::Error>> {
        if self.bytes < WHOLE {
            self.refill();
        }
        self.full.clone()
    }
}

/// Whether the disk, or the quota on it, has no more space.
pub(crate) fn is_full(error: &redb::Error) -> bool {
    matches!(
        error,
        redb::Error::Io(error)
            if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    )
}

/// Bytes that no file system can keep in less space.
fn append(mut file: &File, from: u64, count: u64) -> io::Result<()> {
    file.seek(SeekFrom::Start(from))?;
    let random = File::open("/dev/urandom")?;
    io::copy(&mut random.take(count), &mut file).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_given_in_parts_and_taken_again() {
        let dir = tempfile::tempdir().unwrap();
        let database = dir.path().join("meta.db");
        let length = || dir.path().join("meta.db.reserve").metadata().unwrap().len();
        let mut reserve = Reserve::beside(&database);
        assert_eq!(length(), WHOLE);
        assert!(reserve.give());
        assert_eq!(length(), WHOLE - STEP);
        while reserve.give() {}
        assert_eq!(length(), 0);
        // The next daemon finds what there is.
        assert!(Reserve::beside(&database).why_full().is_none());
        assert_eq!(length(), WHOLE);
    }

    #[test]
    fn where_none_can_be_made_nothing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut none = Reserve::beside(&dir.path().join("no/meta.db"));
        assert!(!none.give() && none.why_full().is_none());
    }
}
