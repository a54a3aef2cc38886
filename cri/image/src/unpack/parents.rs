//! The way to an entry's directory: opened beneath the layer, made where it is missing, followed where it is a symlink of
//! this layer.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::rc::Rc;

use coracle_kernel::path::{self, Kind as Inode};
use coracle_kernel::{Errno, Error as KernelError, file};

use super::{BLOCK_BYTES, Dir, Failure, Unpacker, joined, open_dir, or_here};

/// Directories that are kept open.
const MAX_OPEN_DIRS: usize = 256;
/// Symlinks followed on the way to one parent: the kernel's own limit.
const MAX_SYMLINKS: u32 = 40;

impl Unpacker<'_> {
    /// The directory of that path, made where it is missing.
    pub(super) fn dir(&mut self, path: &[u8]) -> Result<Dir, Failure> {
        if let Some(dir) = self.dirs.get(path) {
            return Ok(dir.clone());
        }
        let dir = match file::open_dir_beneath(self.root, OsStr::from_bytes(or_here(path))) {
            Ok(fd) => self.opened(fd, path.to_vec())?,
            Err(_) => match self.walk(path, true)? {
                Some(dir) => dir,
                None => return Err(Failure::Refused("its parent cannot be made")),
            },
        };
        self.keep(path.to_vec(), dir.clone());
        Ok(dir)
    }

    /// The directory of that path, if there is one.
    pub(super) fn find_dir(&mut self, path: &[u8]) -> Result<Option<Dir>, Failure> {
        if let Some(dir) = self.dirs.get(path) {
            return Ok(Some(dir.clone()));
        }
        match file::open_dir_beneath(self.root, OsStr::from_bytes(or_here(path))) {
            Ok(fd) => Ok(Some(self.opened(fd, path.to_vec())?)),
            Err(_) => self.walk(path, false),
        }
    }

    /// Walks one component at a time, following symlinks of this layer inside of it.
    fn walk(&mut self, path: &[u8], make: bool) -> Result<Option<Dir>, Failure> {
        let root = self.opened(file::open_dir_beneath(self.root, OsStr::new("."))?, Vec::new())?;
        let mut stack = vec![root];
        let mut todo: VecDeque<Vec<u8>> = components(path).collect();
        let mut symlinks = 0;
        while let (Some(name), Some(dir)) = (todo.pop_front(), stack.last().cloned()) {
            if name == b".." {
                // Of a symlink's target; above the root is the root.
                if stack.len() > 1 {
                    stack.pop();
                }
                continue;
            }
            let place = joined(&dir.path, &name);
            let os_name = OsStr::from_bytes(&name);
            let fd = match open_dir(&dir.fd, os_name) {
                Ok(fd) => fd,
                Err(error) if error.errno() == Errno::ENOENT && !make => return Ok(None),
                Err(error) if error.errno() == Errno::ENOENT => {
                    self.make_implied(&dir, os_name, &place)?;
                    open_dir(&dir.fd, os_name)?
                }
                Err(error) if !matches!(error.errno(), Errno::ENOTDIR | Errno::ELOOP) => {
                    return Err(error.into());
                }
                Err(_) if path::stat_at(&dir.fd, os_name)?.kind == Inode::Symlink => {
                    symlinks += 1;
                    if symlinks > MAX_SYMLINKS {
                        return Err(Failure::Refused("too many symlinks lead to it"));
                    }
                    let target = path::read_link_at(&dir.fd, os_name)?;
                    if target.as_bytes().starts_with(b"/") {
                        stack.truncate(1);
                    }
                    components(target.as_bytes())
                        .rev()
                        .for_each(|name| todo.push_front(name));
                    continue;
                }
                Err(_) if self.whiteouts.contains(&place) && make => {
                    // Deleted below and made anew here.
                    self.remove(&dir, os_name, &place)?;
                    path::make_dir(&dir.fd, os_name, 0o755)?;
                    self.opaque.insert(place.clone());
                    open_dir(&dir.fd, os_name)?
                }
                Err(_) if make => return Err(Failure::Refused("its parent is not a directory")),
                Err(_) => return Ok(None),
            };
            stack.push(self.opened(fd, place)?);
        }
        Ok(stack.pop())
    }

    fn make_implied(&mut self, dir: &Dir, name: &OsStr, place: &[u8]) -> Result<(), Failure> {
        self.links.retain(|(link, _)| link != place);
        path::make_dir(&dir.fd, name, 0o755)?;
        self.implied.insert(place.to_vec());
        self.applied.inodes += 1;
        self.applied.bytes += BLOCK_BYTES;
        if dir.inherits || self.has_default_acl {
            let fd = open_dir(&dir.fd, name)?;
            path::chown(&fd, 0, 0)?;
            path::chmod(&fd, 0o755)?;
        }
        Ok(())
    }

    pub(super) fn opened(&self, fd: OwnedFd, path: Vec<u8>) -> Result<Dir, KernelError> {
        let stat = path::stat(&fd)?;
        let inherits = stat.mode & 0o2000 != 0 || stat.gid != 0;
        Ok(Dir {
            fd: Rc::new(fd),
            path: path.into(),
            inherits,
        })
    }

    pub(super) fn keep(&mut self, path: Vec<u8>, dir: Dir) {
        if self.dirs.len() >= MAX_OPEN_DIRS {
            self.dirs.clear();
        }
        self.dirs.insert(path, dir);
    }
}

fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> {
    let names = path
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".");
    names.map(<[u8]>::to_vec)
}
