//! Hard links: to what this layer has, to what comes later in the archive, and to what only a lower layer may have.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use coracle_kernel::path::{self, Kind as Inode};
use coracle_kernel::{Errno, file};

use super::{Dir, Failure, UnpackError, Unpacker, joined};
use crate::tar::Path;

/// How often a hard link may be to a hard link that comes later: archivers name the first name of a file.
const MAX_CHAIN: usize = 32;

/// Hard links whose targets are not there yet. Each takes a look at all others: more would take for ever.
const MAX_PENDING: usize = 8 << 10;

impl Unpacker<'_> {
    /// Makes a further name of what an earlier entry made.
    pub(super) fn hard_link(
        &mut self,
        dir: &Dir,
        name: &OsStr,
        place: Vec<u8>,
        target: &Path,
    ) -> Result<(), Failure> {
        let Some((target_dir, target_name)) = target.split() else {
            return Err(Failure::Refused("it is a hard link to the root"));
        };
        let Some(target_dir) = self.find_dir(target_dir)? else {
            return self.link_later(dir, name, place, target);
        };
        if joined(&target_dir.path, target_name) == place {
            return Err(Failure::Refused("it is a hard link to itself"));
        }
        let target_name = OsStr::from_bytes(target_name);
        match path::stat_at(&target_dir.fd, target_name) {
            Err(error) if error.errno() == Errno::ENOENT => return self.link_later(dir, name, place, target),
            Err(error) => return Err(error.into()),
            Ok(stat) if stat.kind == Inode::Directory => {
                return Err(Failure::Refused("it is a hard link to a directory"));
            }
            Ok(stat) if stat.kind == Inode::CharDevice && stat.rdev == (0, 0) => {
                return Err(Failure::Refused("it is a hard link to a deleted file"));
            }
            Ok(_) => {}
        }
        self.make(dir, name, &place, || {
            file::link(&target_dir.fd, target_name, &dir.fd, name)
        })
    }

    /// The target may come later in the archive, or lie in a lower layer.
    fn link_later(&mut self, dir: &Dir, name: &OsStr, place: Vec<u8>, target: &Path) -> Result<(), Failure> {
        match path::stat_at(&dir.fd, name) {
            Err(error) if error.errno() == Errno::ENOENT => {}
            Err(error) => return Err(error.into()),
            Ok(_) => self.remove(dir, name, &place)?,
        }
        self.links.retain(|(link, _)| *link != place);
        if self.links.len() >= MAX_PENDING {
            return Err(Failure::Refused("too many hard links have no target yet"));
        }
        self.links.push((place, target.0.clone()));
        Ok(())
    }

    /// Makes the hard links whose targets came after them, links to such links included.
    pub(super) fn link_forward(&mut self) -> Result<(), UnpackError> {
        for _ in 0..MAX_CHAIN {
            let mut waiting = std::mem::take(&mut self.links).into_iter();
            let before = waiting.len();
            for (link, target) in waiting.by_ref() {
                let at = link.clone();
                let path = Path(link.clone());
                let (dir, name) = path.split().unwrap_or_default();
                let retry = || {
                    let dir = self.dir(dir)?;
                    self.hard_link(&dir, OsStr::from_bytes(name), link, &Path(target))
                };
                retry().map_err(|failure: Failure| failure.at(&at))?;
            }
            // Each round makes at least one, or the rest wait for lower layers.
            if self.links.len() == before || self.links.is_empty() {
                return Ok(());
            }
        }
        let (link, _) = self.links.first().cloned().unwrap_or_default();
        Err(Failure::Refused("hard links to hard links that come later go on for too long").at(&link))
    }
}
