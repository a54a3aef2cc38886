//! Space that is kept back beside a database, so that a full disk does not keep rows from being removed, nor what they
//! stand for: a database that is written page by page needs new pages for that too.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Far more than what a commit that removes rows writes.
const RESERVE_BYTES: usize = 512 << 10;

/// How long a disk that was full is left alone before space is taken from it again.
const LEFT_ALONE: Duration = Duration::from_secs(10);

/// The file `<database>.reserve`, while the disk has room for it.
#[derive(Debug)]
pub(crate) struct Reserve {
    path: PathBuf,
    kept: bool,
    /// When it was given away, or could not be made.
    full_at: Option<Instant>,
}

impl Reserve {
    /// The reserve of a database; takes the space if it can.
    pub(crate) fn beside(database: &Path) -> Reserve {
        let mut path = database.as_os_str().to_owned();
        path.push(".reserve");
        let path = PathBuf::from(path);
        let kept = fs::metadata(&path).is_ok_and(|meta| meta.len() == RESERVE_BYTES as u64);
        let mut reserve = Reserve {
            path,
            kept,
            full_at: None,
        };
        reserve.refill();
        reserve
    }

    /// Gives the space away; whether there was any.
    pub(crate) fn give(&mut self) -> bool {
        self.full_at = Some(Instant::now());
        std::mem::take(&mut self.kept) && fs::remove_file(&self.path).is_ok()
    }

    /// Takes the space again, unless the disk was full a moment ago.
    pub(crate) fn refill(&mut self) {
        if self.kept || self.full_at.is_some_and(|since| since.elapsed() < LEFT_ALONE) {
            return;
        }
        match self.write() {
            Ok(()) => self.kept = true,
            Err(_) => {
                // Half of it would be kept from everybody and be of no use.
                let _ = fs::remove_file(&self.path);
                self.full_at = Some(Instant::now());
            }
        }
    }

    /// Not zeros, which some file systems keep without space.
    fn write(&self) -> io::Result<()> {
        File::create(&self.path)?.write_all(&vec![0xc5; RESERVE_BYTES])
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_given_once_and_taken_again_later() {
        let dir = tempfile::tempdir().unwrap();
        let database = dir.path().join("meta.db");
        let file = dir.path().join("meta.db.reserve");
        let mut reserve = Reserve::beside(&database);
        assert_eq!(fs::metadata(&file).unwrap().len(), RESERVE_BYTES as u64);
        assert!(reserve.give() && !file.exists());
        assert!(!reserve.give());
        reserve.refill();
        assert!(!file.exists(), "the disk was full a moment ago");
        reserve.full_at = None;
        reserve.refill();
        assert!(file.exists());
        // Found again by the next daemon.
        assert!(Reserve::beside(&database).give());
    }

    #[test]
    fn what_cannot_be_made_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!Reserve::beside(&dir.path().join("no/meta.db")).give());
    }
}
