//! Layer application: an archive onto an empty directory, by descriptors alone.
//!
//! The directory is all there is: parents are opened beneath it and never through a name that could lead out, files are
//! made new and never opened by name again, and owner, mode, attributes and times are set on what was made. A parent
//! that is a symlink *of this layer* is followed inside the layer, as every peer does; lower layers are not known here.
//!
//! What the archive leaves open is reported, not guessed: see [`Applied`].

mod links;
mod parents;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::io::{BufRead, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::rc::Rc;

use coracle_kernel::file::Time;
use coracle_kernel::path::{self, Kind as Inode, Node, OFlags};
use coracle_kernel::{Errno, Error as KernelError, file};
use coracle_snapshot::tree;

use crate::report::LayerPath;
use crate::tar::{Entry, Kind, Reader, TarError, shown};
use crate::whiteout::{self, Meaning};

/// What files take on a disk is counted in blocks of this size.
const BLOCK_BYTES: u64 = 4096;

/// Why a layer cannot be applied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnpackError {
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error("{path:?}")]
    Entry { path: String, source: KernelError },
    #[error("{path:?} is refused: {why}")]
    Refused { path: String, why: &'static str },
    #[error("more than {0} entries")]
    TooMany(u64),
}

/// What a layer came to, but for its digest.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    pub(crate) sets_root: bool,
    pub(crate) opaque: Vec<LayerPath>,
    pub(crate) implied: Vec<LayerPath>,
    pub(crate) links: Vec<(LayerPath, LayerPath)>,
    pub(crate) skipped_xattrs: u64,
}

/// Applies all entries of an archive to the empty directory `root`. The umask must be 0.
pub(crate) fn apply<R: BufRead>(
    reader: &mut Reader<R>,
    root: BorrowedFd<'_>,
    max_entries: u64,
) -> Result<Applied, UnpackError> {
    let mut unpacker = Unpacker::new(root);
    let mut entries = 0;
    while let Some(entry) = reader.next_entry()? {
        entries += 1;
        if entries > max_entries {
            return Err(UnpackError::TooMany(max_entries));
        }
        unpacker
            .entry(&entry, reader)
            .map_err(|failure| failure.at(&entry.path.0))?;
    }
    unpacker.finish()
}

/// Whether an extended attribute of an archive or a lower layer is kept.
///
/// Labels of security modules are the node's to give, and `trusted.*` and overlayfs's own would act on the mount.
pub(crate) fn keeps_xattr(name: &[u8]) -> bool {
    let is = |prefix: &[u8]| name.starts_with(prefix);
    name == b"security.capability" || (is(b"user.") && !is(b"user.overlay.")) || is(b"system.posix_acl_")
}

/// A failure at one entry, before its path is put to it.
enum Failure {
    Tar(TarError),
    Kernel(KernelError),
    Refused(&'static str),
}

impl Failure {
    fn at(self, path: &[u8]) -> UnpackError {
        match self {
            Failure::Tar(error) => UnpackError::Tar(error),
            Failure::Kernel(source) => UnpackError::Entry {
                path: shown(path),
                source,
            },
            Failure::Refused(why) => UnpackError::Refused {
                path: shown(path),
                why,
            },
        }
    }
}

impl From<KernelError> for Failure {
    fn from(error: KernelError) -> Failure {
        Failure::Kernel(error)
    }
}

impl From<TarError> for Failure {
    fn from(error: TarError) -> Failure {
        Failure::Tar(error)
    }
}

/// An open directory of the layer.
#[derive(Clone)]
struct Dir {
    fd: Rc<OwnedFd>,
    /// Its path with all symlinks resolved.
    path: Rc<[u8]>,
    /// What is made here may get another group or mode than asked for: set-group-id, a default ACL, a group that the
    /// mount option `grpid` passes on.
    inherits: bool,
}

struct Unpacker<'a> {
    root: BorrowedFd<'a>,
    applied: Applied,
    /// Open directories by their path as archives write it.
    dirs: HashMap<Vec<u8>, Dir>,
    /// Directories that were made for what lies in them.
    implied: BTreeSet<Vec<u8>>,
    opaque: BTreeSet<Vec<u8>>,
    /// Where whiteouts were put.
    whiteouts: HashSet<Vec<u8>>,
    /// Hard links whose target is not there (yet).
    links: Vec<(Vec<u8>, Vec<u8>)>,
    /// Directories get their times at the end, when nothing is added to them any more.
    times: HashMap<Vec<u8>, Time>,
    has_default_acl: bool,
}

impl<'a> Unpacker<'a> {
    fn new(root: BorrowedFd<'a>) -> Unpacker<'a> {
        Unpacker {
            root,
            applied: Applied {
                inodes: 1,
                ..Applied::default()
            },
            dirs: HashMap::new(),
            implied: BTreeSet::new(),
            opaque: BTreeSet::new(),
            whiteouts: HashSet::new(),
            links: Vec::new(),
            times: HashMap::new(),
            has_default_acl: false,
        }
    }

    fn entry<R: BufRead>(&mut self, entry: &Entry, reader: &mut Reader<R>) -> Result<(), Failure> {
        let Some((dir, name)) = entry.path.split() else {
            return self.root_entry(entry);
        };
        match whiteout::meaning(name) {
            Meaning::Entry => {}
            Meaning::Ignored => return Ok(()),
            Meaning::Malformed => return Err(Failure::Refused("it deletes nothing")),
            Meaning::Opaque => return self.make_opaque(dir),
            Meaning::Deletes(name) => return self.delete(dir, name),
        }
        let dir = self.dir(dir)?;
        let place = joined(&dir.path, name);
        let name = OsStr::from_bytes(name);
        match &entry.kind {
            Kind::Directory => return self.directory(entry, &dir, name, place),
            Kind::HardLink(target) => return self.hard_link(&dir, name, place, target),
            Kind::File => self.file(entry, &dir, name, &place, reader)?,
            Kind::Symlink(target) => {
                self.make(&dir, name, &place, || {
                    path::make_symlink(OsStr::from_bytes(target), &dir.fd, name)
                })?;
                self.finish_by_name(entry, &dir, name)?;
            }
            Kind::CharDevice(0, 0) => return Err(Failure::Refused("a device 0:0 would act as a deletion")),
            Kind::CharDevice(major, minor) => {
                self.node(entry, &dir, name, &place, Node::Char(*major, *minor))?;
            }
            Kind::BlockDevice(major, minor) => {
                self.node(entry, &dir, name, &place, Node::Block(*major, *minor))?;
            }
            Kind::Fifo => self.node(entry, &dir, name, &place, Node::Fifo)?,
        }
        self.applied.inodes += 1;
        Ok(())
    }

    fn root_entry(&mut self, entry: &Entry) -> Result<(), Failure> {
        self.applied.sets_root = true;
        let root = file::open_dir_beneath(self.root, OsStr::new("."))?;
        self.finish_directory(entry, &root, Vec::new())?;
        // The root may have been opened before with another group.
        self.dirs.clear();
        Ok(())
    }

    fn file<R: BufRead>(
        &mut self,
        entry: &Entry,
        dir: &Dir,
        name: &OsStr,
        place: &[u8],
        reader: &mut Reader<R>,
    ) -> Result<(), Failure> {
        let fd = self.make(dir, name, place, || {
            path::create_file_at(&dir.fd, name, entry.mode & 0o777)
        })?;
        let mut out = std::fs::File::from(fd);
        loop {
            let piece = reader.data()?;
            if piece.is_empty() {
                break;
            }
            let count = piece.len();
            out.write_all(piece)
                .map_err(|error| KernelError::from_io("write", "", &error))?;
            reader.consume(count);
        }
        let inherits = dir.inherits || self.has_default_acl;
        if inherits || entry.uid != 0 || entry.gid != 0 {
            path::chown(&out, entry.uid, entry.gid)?;
        }
        // After the owner, whose change clears set-id bits.
        if inherits || entry.mode & 0o7000 != 0 {
            path::chmod(&out, entry.mode)?;
        }
        self.set_xattrs(entry, &out)?;
        file::set_times(&out, entry.time)?;
        self.applied.bytes += entry.size.next_multiple_of(BLOCK_BYTES);
        Ok(())
    }

    fn directory(&mut self, entry: &Entry, dir: &Dir, name: &OsStr, place: Vec<u8>) -> Result<(), Failure> {
        let made = match path::make_dir(&dir.fd, name, entry.mode & 0o777) {
            Ok(()) => true,
            Err(error) if error.errno() != Errno::EEXIST => return Err(error.into()),
            Err(_) if path::stat_at(&dir.fd, name)?.kind == Inode::Directory => false,
            Err(_) => {
                // What was there deleted all of lower layers; a directory in its place must still do so.
                if self.whiteouts.contains(&place) {
                    self.opaque.insert(place.clone());
                }
                self.remove(dir, name, &place)?;
                path::make_dir(&dir.fd, name, entry.mode & 0o777)?;
                true
            }
        };
        if made {
            self.applied.inodes += 1;
            self.applied.bytes += BLOCK_BYTES;
        }
        self.implied.remove(&place);
        self.links.retain(|(link, _)| *link != place);
        let fd = open_dir(&dir.fd, name)?;
        self.finish_directory(entry, &fd, place.clone())?;
        let opened = self.opened(fd, place)?;
        self.keep(entry.path.0.clone(), opened);
        Ok(())
    }

    fn finish_directory(&mut self, entry: &Entry, fd: &OwnedFd, place: Vec<u8>) -> Result<(), Failure> {
        path::chown(fd, entry.uid, entry.gid)?;
        path::chmod(fd, entry.mode)?;
        self.set_xattrs(entry, fd)?;
        self.times.insert(place, entry.time);
        Ok(())
    }

    fn node(
        &mut self,
        entry: &Entry,
        dir: &Dir,
        name: &OsStr,
        place: &[u8],
        node: Node,
    ) -> Result<(), Failure> {
        let node = self.make(dir, name, place, || {
            path::make_node(&dir.fd, name, node, entry.mode & 0o777)
        })?;
        path::chown(&node, entry.uid, entry.gid)?;
        file::set_times_at(&dir.fd, name, entry.time)?;
        self.applied.skipped_xattrs += entry.xattrs.len() as u64;
        Ok(())
    }

    /// Owner and times of a symlink, which cannot be opened.
    fn finish_by_name(&mut self, entry: &Entry, dir: &Dir, name: &OsStr) -> Result<(), Failure> {
        file::set_owner_at(&dir.fd, name, entry.uid, entry.gid)?;
        file::set_times_at(&dir.fd, name, entry.time)?;
        self.applied.skipped_xattrs += entry.xattrs.len() as u64;
        Ok(())
    }

    fn make_opaque(&mut self, dir: &[u8]) -> Result<(), Failure> {
        let dir = self.dir(dir)?;
        if dir.path.is_empty() {
            return Err(Failure::Refused(
                "a layer that deletes all layers below is not supported",
            ));
        }
        self.opaque.insert(dir.path.to_vec());
        Ok(())
    }

    /// Deletes `name` of lower layers. What this layer itself has there stays: deletions act on lower layers alone.
    fn delete(&mut self, dir: &[u8], name: &[u8]) -> Result<(), Failure> {
        let dir = self.dir(dir)?;
        let place = joined(&dir.path, name);
        let name = OsStr::from_bytes(name);
        match path::stat_at(&dir.fd, name) {
            Err(error) if error.errno() == Errno::ENOENT => {}
            Err(error) => return Err(error.into()),
            Ok(stat) if stat.kind == Inode::Directory => {
                self.opaque.insert(place);
                return Ok(());
            }
            // It hides what is below already.
            Ok(_) => return Ok(()),
        }
        if self.links.iter().any(|(link, _)| *link == place) {
            return Ok(());
        }
        path::make_node(&dir.fd, name, Node::Char(0, 0), 0)?;
        self.applied.inodes += 1;
        self.whiteouts.insert(place);
        Ok(())
    }

    /// Makes something new; what an earlier entry put there goes first.
    fn make<T>(
        &mut self,
        dir: &Dir,
        name: &OsStr,
        place: &[u8],
        mut make: impl FnMut() -> Result<T, KernelError>,
    ) -> Result<T, Failure> {
        if !self.links.is_empty() {
            self.links.retain(|(link, _)| link != place);
        }
        match make() {
            Err(error) if error.errno() == Errno::EEXIST => {
                self.remove(dir, name, place)?;
                Ok(make()?)
            }
            other => Ok(other?),
        }
    }

    /// Removes what an earlier entry made, with everything below and everything remembered about it.
    fn remove(&mut self, dir: &Dir, name: &OsStr, place: &[u8]) -> Result<(), Failure> {
        let is_below = |path: &[u8]| {
            path.strip_prefix(place)
                .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
        };
        match path::unlink(&dir.fd, name) {
            Err(error) if error.errno() == Errno::EISDIR => {
                tree::remove(&dir.fd, name)?;
                self.implied.retain(|path| !is_below(path));
                self.opaque.retain(|path| !is_below(path));
                self.whiteouts.retain(|path| !is_below(path));
                self.times.retain(|path, _| !is_below(path));
                self.links.retain(|(link, _)| !is_below(link));
            }
            other => {
                other?;
                self.whiteouts.remove(place);
            }
        }
        // Any path may have led through it.
        self.dirs.clear();
        Ok(())
    }

    fn set_xattrs(&mut self, entry: &Entry, fd: impl AsFd) -> Result<(), Failure> {
        for (name, value) in &entry.xattrs {
            if !keeps_xattr(name) {
                self.applied.skipped_xattrs += 1;
                continue;
            }
            match file::set_xattr(&fd, OsStr::from_bytes(name), value) {
                // Not on this file system.
                Err(error) if error.errno() == Errno::EOPNOTSUPP => self.applied.skipped_xattrs += 1,
                other => other?,
            }
            self.has_default_acl |= name == b"system.posix_acl_default";
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Applied, UnpackError> {
        self.link_forward()?;
        let untold = self.implied.iter().map(|path| (path.as_slice(), Time::default()));
        for (path, time) in self
            .times
            .iter()
            .map(|(path, time)| (path.as_slice(), *time))
            .chain(untold)
        {
            let set = |path| {
                file::set_times(
                    file::open_dir_beneath(self.root, OsStr::from_bytes(or_here(path)))?,
                    time,
                )
            };
            set(path).map_err(|source| UnpackError::Entry {
                path: shown(path),
                source,
            })?;
        }
        let paths = |set: BTreeSet<Vec<u8>>| set.into_iter().map(LayerPath).collect();
        let links = self
            .links
            .into_iter()
            .map(|(link, target)| (LayerPath(link), LayerPath(target)));
        Ok(Applied {
            opaque: paths(self.opaque),
            implied: paths(self.implied),
            links: links.collect(),
            ..self.applied
        })
    }
}

fn joined(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() {
        name.to_vec()
    } else {
        [dir, name].join(&b'/')
    }
}

fn or_here(path: &[u8]) -> &[u8] {
    if path.is_empty() { b"." } else { path }
}

fn open_dir(dir: impl AsFd, name: &OsStr) -> Result<OwnedFd, KernelError> {
    path::open_at(dir, name, OFlags::RDONLY | OFlags::DIRECTORY)
}

#[cfg(test)]
mod tests;
