//! Removal and measuring of whole directory trees that containers and images have written.
//!
//! Names are hostile and depth is unlimited: everything goes by descriptor and one component, links are never followed,
//! and neither stack nor descriptors grow with the tree.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use coracle_kernel::path::{self, Kind, OFlags};
use coracle_kernel::{Errno, Error, Result, file};

/// Directories that are open at once while walking; what lies deeper is moved up first.
const MAX_DEPTH: usize = 64;
/// Entries after which a tree is counted no further.
const MAX_COUNTED: u64 = 2_000_000;
/// Bytes of the names of directories that are still to be counted.
const MAX_KNOWN_BYTES: usize = 16 << 20;
/// Names read from a directory at once.
const BATCH: usize = 4096;

/// What a tree takes on its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of blocks.
    pub bytes: u64,
    /// Files, directories, links and nodes; an inode with several names counts for each.
    pub inodes: u64,
}

/// Removes `name` in `dir` with everything below it. What is not there is removed already.
///
/// Needs no free space but, for trees deeper than 64 directories, a name in `dir`.
pub fn remove(dir: impl AsFd, name: &OsStr) -> Result<()> {
    let mut moved = 0;
    let mut pending = vec![name.to_owned()];
    while let Some(name) = pending.pop() {
        remove_one(dir.as_fd(), &name, &mut moved, &mut pending)?;
    }
    Ok(())
}

/// Counts what `dir` and everything below it take.
///
/// Whoever writes there decides how much there is to count: after [`MAX_COUNTED`] entries the figures so far are given,
/// and what is known of the tree at any time takes [`MAX_KNOWN_BYTES`] at most.
pub fn usage(dir: impl AsFd) -> Result<Usage> {
    usage_within(dir, MAX_COUNTED, MAX_KNOWN_BYTES)
}

fn usage_within(dir: impl AsFd, max_counted: u64, max_known_bytes: usize) -> Result<Usage> {
    let mut usage = Usage {
        bytes: file::allocated_bytes(&dir)?,
        inodes: 1,
    };
    let mut pending = vec![PathBuf::from(".")];
    let mut known_bytes = 0;
    while let Some(place) = pending.pop() {
        known_bytes -= place.as_os_str().len().min(known_bytes);
        // A running container adds and removes files meanwhile; an estimate at most a minute old is what is wanted.
        let Ok(fd) = path::Root::new(&dir).open_real(&place, OFlags::RDONLY | OFlags::DIRECTORY) else {
            continue;
        };
        let each = |name: &OsStr, kind| {
            if let Ok(bytes) = file::allocated_bytes_at(&fd, name) {
                usage.bytes += bytes;
                usage.inodes += 1;
            }
            if kind == Kind::Directory && known_bytes < max_known_bytes {
                let below = place.join(name);
                known_bytes += below.as_os_str().len();
                pending.push(below);
            }
            usage.inodes < max_counted
        };
        // One that went away in between has nothing to count.
        if !file::each_entry(&fd, each).unwrap_or(true) {
            break;
        }
    }
    Ok(usage)
}

/// Removes one tree; directories too deep for it are renamed into `top` and left in `pending`.
fn remove_one(top: impl AsFd, name: &OsStr, moved: &mut u64, pending: &mut Vec<OsString>) -> Result<()> {
    if unlink(&top, name)? {
        return Ok(());
    }
    let mut levels = match open_dir(&top, name) {
        Ok(fd) => vec![Emptying {
            fd,
            name: name.to_owned(),
            directories: Vec::new(),
            unread: true,
        }],
        Err(error) if error.errno() == Errno::ENOENT => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut depth = levels.len();
    while let Some(level) = levels.last_mut() {
        if let Some(child) = level.directories.pop() {
            if depth < MAX_DEPTH {
                let fd = open_dir(&level.fd, &child)?;
                levels.push(Emptying {
                    fd,
                    name: child,
                    directories: Vec::new(),
                    unread: true,
                });
            } else {
                let place = free_name(&top, moved);
                path::rename(&level.fd, &child, &top, &place)?;
                pending.push(place);
            }
        } else if level.unread {
            level.remove_files()?;
        } else if let Some(Emptying { name, .. }) = levels.pop() {
            match levels.last() {
                Some(parent) => remove_dir(&parent.fd, &name)?,
                None => remove_dir(&top, &name)?,
            }
        }
        depth = levels.len();
    }
    Ok(())
}

/// A directory on its way to being empty.
struct Emptying {
    fd: OwnedFd,
    name: OsString,
    /// Those of the last names read that have to be emptied themselves.
    directories: Vec<OsString>,
    /// There may be more names than were read.
    unread: bool,
}

impl Emptying {
    /// Removes the files among the next names, and remembers the directories.
    fn remove_files(&mut self) -> Result<()> {
        let (entries, more) = file::some_entries(&self.fd, BATCH)?;
        self.unread = more;
        for (name, kind) in entries {
            if kind == Kind::Directory || !unlink(&self.fd, &name)? {
                self.directories.push(name);
            }
        }
        Ok(())
    }
}

/// A name that nothing in `dir` has.
fn free_name(dir: impl AsFd, counter: &mut u64) -> OsString {
    loop {
        *counter += 1;
        let name = OsString::from(format!(".deep-{counter}"));
        if path::stat_at(&dir, &name).is_err() {
            return name;
        }
    }
}

/// Unlinks; `false` where it is a directory.
fn unlink(dir: impl AsFd, name: &OsStr) -> Result<bool> {
    match path::unlink(dir, name) {
        Err(error) if error.errno() == Errno::EISDIR => Ok(false),
        Err(error) if error.errno() == Errno::ENOENT => Ok(true),
        Err(error) => Err(error),
        Ok(()) => Ok(true),
    }
}

fn remove_dir(dir: impl AsFd, name: &OsStr) -> Result<()> {
    match path::remove_dir(dir, name) {
        Err(error) if error.errno() == Errno::ENOENT => Ok(()),
        other => other,
    }
}

fn open_dir(dir: impl AsFd, name: &OsStr) -> Result<OwnedFd, Error> {
    path::open_at(dir, name, OFlags::RDONLY | OFlags::DIRECTORY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt as _;

    #[test]
    fn everything_below_goes_and_nothing_beside() {
        let root = tempfile::tempdir().unwrap();
        let keep = root.path().join("keep");
        std::fs::create_dir(&keep).unwrap();
        std::fs::write(keep.join("file"), b"x").unwrap();
        let tree = root.path().join("tree");
        std::fs::create_dir_all(tree.join("a/b/c")).unwrap();
        std::os::unix::fs::symlink(&keep, tree.join("a/link")).unwrap();
        std::fs::write(tree.join(OsStr::from_bytes(b"\xff\n")), b"x").unwrap();
        for number in 0..5000 {
            std::fs::write(tree.join("a/b").join(number.to_string()), b"").unwrap();
        }
        let dir = path::open_dir(root.path()).unwrap();
        let usage = usage(path::open_dir(&tree).unwrap()).unwrap();
        assert_eq!(usage.inodes, 4 + 1 + 1 + 5000);
        remove(&dir, OsStr::new("tree")).unwrap();
        remove(&dir, OsStr::new("tree")).unwrap();
        assert!(!tree.exists() && keep.join("file").exists());
    }

    #[test]
    fn whoever_writes_decides_not_how_long_it_is_counted() {
        let root = tempfile::tempdir().unwrap();
        for number in 0..100 {
            std::fs::create_dir_all(root.path().join(format!("{number}/below"))).unwrap();
        }
        let counted = |max_counted, max_known_bytes| {
            let dir = path::open_dir(root.path()).unwrap();
            usage_within(dir, max_counted, max_known_bytes).unwrap().inodes
        };
        assert_eq!(counted(MAX_COUNTED, MAX_KNOWN_BYTES), 201);
        assert_eq!(counted(50, MAX_KNOWN_BYTES), 50);
        // The names of ten directories or so are known at a time: the others count, and not what is below them.
        let few = counted(MAX_COUNTED, 30);
        assert!((101..150).contains(&few), "{few}");
    }

    #[test]
    fn a_tree_deeper_than_any_path_goes() {
        let root = tempfile::tempdir().unwrap();
        let dir = path::open_dir(root.path()).unwrap();
        path::make_dir(&dir, "tree", 0o700).unwrap();
        let mut fd = open_dir(&dir, OsStr::new("tree")).unwrap();
        for _ in 0..5000 {
            path::make_dir(&fd, "directory", 0o700).unwrap();
            fd = open_dir(&fd, OsStr::new("directory")).unwrap();
        }
        let counted = usage(path::open_dir(root.path()).unwrap()).unwrap().inodes;
        assert!(
            (100..5000).contains(&counted),
            "{counted}: as deep as a path goes"
        );
        remove(&dir, OsStr::new("tree")).unwrap();
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
