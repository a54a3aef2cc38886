//! Paths below a root descriptor: opened, made and read without ever leaving that root.
//!
//! Everything goes through openat2(2) with `RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS`, so a symlink of the image, a `..`
//! or a rename at the wrong moment ends inside the root or in an error, and what comes back is a descriptor: callers
//! act on it and never resolve the same name twice.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path};

use rustix::fs::{AtFlags, FileType, Gid, RawDir, ResolveFlags, Uid};

pub use rustix::fs::OFlags;

pub use crate::inode::{Kind, MountPlace, Stat, filesystem_magic, mount_place, stat, stat_at};

use crate::fd::show;
pub(crate) use crate::inode::kind_of;
use crate::{Errno, Error, Result};

/// How often a resolution that raced with a rename (`EAGAIN`) is tried again before the error stands.
const RACE_RETRIES: u32 = 128;
/// Symlinks followed in one walk: the kernel's own limit.
const MAX_SYMLINKS: u32 = 40;
/// Names in one path: `PATH_MAX / 2`, what the kernel would take at most.
const MAX_COMPONENTS: usize = 2048;
/// Through no symlink, onto no other file system, never outside.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// A directory that nothing opened through it can leave.
#[derive(Clone, Copy, Debug)]
pub struct Root<'fd>(BorrowedFd<'fd>);

/// Nodes that [`make_node`] makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// A character device with major and minor number.
    Char(u32, u32),
    /// A block device with major and minor number.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// What [`Root::ensure`] makes where nothing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaf {
    /// A directory of this mode.
    Directory(u32),
    /// An empty regular file of this mode.
    File(u32),
}

impl<'fd> Root<'fd> {
    /// Takes a directory as root. Any descriptor of it will do, `O_PATH` too.
    pub fn new(fd: &'fd (impl AsFd + ?Sized)) -> Root<'fd> {
        Root(fd.as_fd())
    }

    /// Opens `path`, symlinks followed inside the root (add `NOFOLLOW` against the last one). Never creates.
    pub fn open(self, path: impl AsRef<Path>, flags: OFlags) -> Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        open_how(self.0, path.as_ref(), flags, 0, resolve)
    }

    /// As [`Root::open`]; `None` where nothing of that name is, or a part of it is no directory.
    ///
    /// For names that often are not there: no error is put into words only to be thrown away.
    pub fn find(self, path: impl AsRef<Path>, flags: OFlags) -> Result<Option<OwnedFd>> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let path = path.as_ref();
        match try_open(self.0, path, flags, 0, resolve) {
            Ok(fd) => Ok(Some(fd)),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(at("openat2", &self.0, path, errno)),
        }
    }

    /// Opens `path` as a mere place (`O_PATH`), symlinks followed inside the root.
    pub fn open_path(self, path: impl AsRef<Path>) -> Result<OwnedFd> {
        self.open(path, OFlags::PATH)
    }

    /// Opens `path` where no part of it is a symlink, the last not and none before (`ELOOP`).
    pub fn open_real(self, path: impl AsRef<Path>, flags: OFlags) -> Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
        open_how(self.0, path.as_ref(), flags, 0, resolve)
    }

    /// Opens the directory `path`, making what is missing of it, one component at a time.
    pub fn mkdir_all(self, path: impl AsRef<Path>, mode: u32) -> Result<OwnedFd> {
        self.ensure(path, Leaf::Directory(mode))
    }

    /// Opens `path` (`O_PATH`, symlinks followed inside the root), making it and its parents (mode 0755) where missing.
    ///
    /// A symlink that points at nothing is followed too, and its target made inside the root: images carry
    /// `/var/run -> /run` or `/etc/resolv.conf -> ../run/…`, and a mount is wanted at what they name. What exists is
    /// returned whatever its kind; the caller looks at it.
    pub fn ensure(self, path: impl AsRef<Path>, leaf: Leaf) -> Result<OwnedFd> {
        let path = path.as_ref();
        match self.find(path, OFlags::PATH)? {
            Some(fd) => Ok(fd),
            None => walk(self, path, leaf),
        }
    }

    /// Creates the regular file `path` for writing; parents are made. `EEXIST` where anything is there, symlinks too.
    pub fn create_file(self, path: impl AsRef<Path>, mode: u32) -> Result<OwnedFd> {
        let (parent, name) = self.parent_of(path.as_ref())?;
        create_file_at(&parent, &name, mode)
    }

    /// Opens the parent directory of `path` (made where missing) and returns it with the last name.
    ///
    /// `EINVAL` where the path does not end in a plain name.
    pub fn parent_of(self, path: &Path) -> Result<(OwnedFd, OsString)> {
        let invalid = || Error::new("openat2", format!("{}, {path:?}", show(self.0)), Errno::EINVAL);
        let name = path.file_name().ok_or_else(invalid)?;
        let parent = path.parent().unwrap_or(Path::new(""));
        Ok((self.mkdir_all(parent, 0o755)?, name.to_owned()))
    }

    /// Reads the regular file `path` whole, at most `limit` bytes (`EFBIG` above).
    ///
    /// Symlinks are followed inside the root. A device node, FIFO or socket of that name is refused (`EINVAL`) before it
    /// is opened for reading: opening one can block or have effects.
    pub fn read_file(self, path: impl AsRef<Path>, limit: usize) -> Result<Vec<u8>> {
        let path = path.as_ref();
        let args = || format!("{}, {path:?}", show(self.0));
        let seen = stat(self.open_path(path)?)?;
        if seen.kind != Kind::File {
            return Err(Error::new("read", args(), Errno::EINVAL));
        }
        let fd = self.open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?;
        let opened = stat(&fd)?;
        // Another inode than the one looked at: somebody swaps files while we read.
        if (opened.dev, opened.ino, opened.kind) != (seen.dev, seen.ino, seen.kind) {
            return Err(Error::new("read", args(), Errno::EAGAIN));
        }
        read_limited(fd, limit).map_err(|errno| Error::new("read", args(), errno))
    }
}

impl AsFd for Root<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0
    }
}

/// Opens a directory of the caller's own choice (a bundle, a state directory) as a root. Symlinks are followed.
pub fn open_dir(path: impl AsRef<Path>) -> Result<OwnedFd> {
    open(path, OFlags::PATH | OFlags::DIRECTORY)
}

/// Opens a path of the host, `O_CLOEXEC`. Nothing is confined: only for paths that an operator or we ourselves chose.
pub fn open(path: impl AsRef<Path>, flags: OFlags) -> Result<OwnedFd> {
    open_how(rustix::fs::CWD, path.as_ref(), flags, 0, ResolveFlags::empty())
}

/// Opens the directory above one, crossing a mount's root where that lies between.
pub fn open_parent(dir: impl AsFd) -> Result<OwnedFd> {
    open_how(
        dir.as_fd(),
        Path::new(".."),
        OFlags::PATH | OFlags::DIRECTORY,
        0,
        ResolveFlags::empty(),
    )
}

/// Opens one name in a directory, never through a symlink.
pub fn open_at(dir: impl AsFd, name: impl AsRef<OsStr>, flags: OFlags) -> Result<OwnedFd> {
    let name = plain_name(&dir, name.as_ref())?;
    open_how(
        dir.as_fd(),
        name,
        flags | OFlags::NOFOLLOW,
        0,
        ResolveFlags::BENEATH,
    )
}

/// Opens a path of one or more names below a directory: through no symlink, onto no other file system, never outside.
/// What trees without symlinks (cgroups) are walked with.
pub fn open_beneath(dir: impl AsFd, path: impl AsRef<Path>, flags: OFlags) -> Result<OwnedFd> {
    open_how(dir.as_fd(), path.as_ref(), flags, 0, BENEATH)
}

/// The same; none where there is no such path, told without the cost of an error.
pub fn find_beneath(dir: impl AsFd, path: impl AsRef<Path>, flags: OFlags) -> Result<Option<OwnedFd>> {
    match try_open(dir.as_fd(), path.as_ref(), flags, 0, BENEATH) {
        Err(rustix::io::Errno::NOENT) => Ok(None),
        found => found.map(Some).map_err(|e| at("openat2", &dir, path.as_ref(), e)),
    }
}

/// Creates one regular file in a directory for writing; `EEXIST` where anything of that name is there.
pub fn create_file_at(dir: impl AsFd, name: impl AsRef<OsStr>, mode: u32) -> Result<OwnedFd> {
    let name = plain_name(&dir, name.as_ref())?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    open_how(dir.as_fd(), name, flags, mode, ResolveFlags::BENEATH)
}

/// Makes one directory in a directory.
pub fn make_dir(dir: impl AsFd, name: impl AsRef<OsStr>, mode: u32) -> Result<()> {
    let name = plain_name(&dir, name.as_ref())?;
    rustix::fs::mkdirat(&dir, name, mode.into()).map_err(|e| at("mkdirat", &dir, name, e))
}

/// Makes a device node or FIFO in a directory, and returns it (`O_PATH`) after looking that it is that very node.
///
/// `mode` passes through the umask, as mknod(2) has it.
pub fn make_node(dir: impl AsFd, name: impl AsRef<OsStr>, node: Node, mode: u32) -> Result<OwnedFd> {
    let name = plain_name(&dir, name.as_ref())?;
    let (file_type, kind, rdev) = match node {
        Node::Char(major, minor) => (FileType::CharacterDevice, Kind::CharDevice, (major, minor)),
        Node::Block(major, minor) => (FileType::BlockDevice, Kind::BlockDevice, (major, minor)),
        Node::Fifo => (FileType::Fifo, Kind::Fifo, (0, 0)),
    };
    let device = rustix::fs::makedev(rdev.0, rdev.1);
    rustix::fs::mknodat(&dir, name, file_type, mode.into(), device)
        .map_err(|e| at("mknodat", &dir, name, e))?;
    let fd = open_at(&dir, name.as_os_str(), OFlags::PATH)?;
    let made = stat(&fd)?;
    if made.kind != kind || (kind != Kind::Fifo && made.rdev != rdev) {
        return Err(Error::new(
            "mknodat",
            format!("{}, {name:?}", show(&dir)),
            Errno::ESTALE,
        ));
    }
    Ok(fd)
}

/// Makes a symlink in a directory.
pub fn make_symlink(target: impl AsRef<Path>, dir: impl AsFd, name: impl AsRef<OsStr>) -> Result<()> {
    let name = plain_name(&dir, name.as_ref())?;
    rustix::fs::symlinkat(target.as_ref(), &dir, name).map_err(|e| at("symlinkat", &dir, name, e))
}

/// The target of a symlink, given an `O_PATH | O_NOFOLLOW` descriptor of it.
pub fn read_link(link: impl AsFd) -> Result<OsString> {
    match rustix::fs::readlinkat(&link, "", Vec::new()) {
        Ok(target) => Ok(OsString::from_vec(target.into_bytes())),
        Err(errno) => Err(on("readlinkat", &link, errno)),
    }
}

/// The target of the symlink `name` in a directory.
pub fn read_link_at(dir: impl AsFd, name: impl AsRef<OsStr>) -> Result<OsString> {
    let name = plain_name(&dir, name.as_ref())?;
    match rustix::fs::readlinkat(&dir, name, Vec::new()) {
        Ok(target) => Ok(OsString::from_vec(target.into_bytes())),
        Err(errno) => Err(at("readlinkat", &dir, name, errno)),
    }
}

/// Removes one name that is not a directory.
pub fn unlink(dir: impl AsFd, name: impl AsRef<OsStr>) -> Result<()> {
    let name = plain_name(&dir, name.as_ref())?;
    rustix::fs::unlinkat(&dir, name, AtFlags::empty()).map_err(|e| at("unlinkat", &dir, name, e))
}

/// Removes one empty directory.
pub fn remove_dir(dir: impl AsFd, name: impl AsRef<OsStr>) -> Result<()> {
    let name = plain_name(&dir, name.as_ref())?;
    rustix::fs::unlinkat(&dir, name, AtFlags::REMOVEDIR).map_err(|e| at("unlinkat", &dir, name, e))
}

/// Renames within or between directories; what is there is replaced.
pub fn rename(
    from_dir: impl AsFd,
    from: impl AsRef<OsStr>,
    to_dir: impl AsFd,
    to: impl AsRef<OsStr>,
) -> Result<()> {
    let from = plain_name(&from_dir, from.as_ref())?;
    let to = plain_name(&to_dir, to.as_ref())?;
    rustix::fs::renameat(&from_dir, from, &to_dir, to).map_err(|e| at("renameat", &from_dir, from, e))
}

/// The names in a directory but `.` and `..`, at most `limit` of them (`E2BIG` above). The descriptor is reopened, so
/// any of the directory will do.
pub fn list_dir(dir: impl AsFd, limit: usize) -> Result<Vec<(OsString, Kind)>> {
    let fd = open_how(
        dir.as_fd(),
        Path::new("."),
        OFlags::RDONLY | OFlags::DIRECTORY,
        0,
        ResolveFlags::empty(),
    )?;
    let mut buffer = Vec::with_capacity(8192);
    let mut entries = RawDir::new(&fd, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(|errno| on("getdents64", &dir, errno))?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        if names.len() == limit {
            return Err(Error::new("getdents64", show(&dir), Errno::E2BIG));
        }
        names.push((OsStr::from_bytes(name).to_owned(), kind_of(entry.file_type())));
    }
    Ok(names)
}

/// Opens what a descriptor refers to once more with other flags, through `/proc/self/fd`.
pub fn reopen(fd: impl AsFd, flags: OFlags) -> Result<OwnedFd> {
    let path = crate::fd::proc_path(&fd);
    let path = OsStr::from_bytes(path.to_bytes());
    open_how(rustix::fs::CWD, Path::new(path), flags, 0, ResolveFlags::empty())
}

/// Changes owner and group of what a descriptor refers to, `O_PATH` ones and symlinks too.
pub fn chown(fd: impl AsFd, uid: u32, gid: u32) -> Result<()> {
    let (owner, group) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    rustix::fs::chownat(&fd, "", owner, group, AtFlags::EMPTY_PATH)
        .map_err(|errno| Error::new("fchownat", format!("{}, {uid}, {gid}", show(&fd)), errno.into()))
}

/// Changes the permission bits of what a descriptor refers to, `O_PATH` ones too (those through `/proc/self/fd`).
pub fn chmod(fd: impl AsFd, mode: u32) -> Result<()> {
    let fail =
        |errno: rustix::io::Errno| Error::new("fchmod", format!("{}, {mode:o}", show(&fd)), errno.into());
    match rustix::fs::fchmod(&fd, mode.into()) {
        Err(rustix::io::Errno::BADF) => {
            rustix::fs::chmod(crate::fd::proc_path(&fd), mode.into()).map_err(fail)
        }
        other => other.map_err(fail),
    }
}

/// Makes a directory the current one.
pub fn change_dir(dir: impl AsFd) -> Result<()> {
    rustix::process::fchdir(&dir).map_err(|errno| on("fchdir", &dir, errno))
}

/// Makes a directory the process's root, and its current directory too: a chroot alone leaves the old one reachable.
pub fn change_root(dir: impl AsFd) -> Result<()> {
    change_dir(&dir)?;
    rustix::process::chroot(".").map_err(|errno| on("chroot", &dir, errno))
}

/// Reads a descriptor to its end, at most `limit` bytes (`EFBIG` above).
pub(crate) fn read_limited(fd: OwnedFd, limit: usize) -> std::result::Result<Vec<u8>, Errno> {
    // Begun with nothing, the reads would be as many as it takes to double 32 bytes until all has room.
    let mut content = Vec::with_capacity(limit.min(8 << 10));
    let bound = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    let read = std::fs::File::from(fd).take(bound).read_to_end(&mut content);
    match read {
        Ok(_) if content.len() > limit => Err(Errno::EFBIG),
        Ok(_) => Ok(content),
        Err(error) => Err(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)),
    }
}

/// openat2(2) with an error that says what was opened.
pub(crate) fn open_how(
    dir: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    mode: u32,
    resolve: ResolveFlags,
) -> Result<OwnedFd> {
    try_open(dir, path, flags, mode, resolve).map_err(|errno| at("openat2", &dir, path, errno))
}

/// openat2(2), repeated while a concurrent rename or mount makes the kernel unsure of a `..` (`EAGAIN`).
fn try_open(
    dir: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    mode: u32,
    resolve: ResolveFlags,
) -> rustix::io::Result<OwnedFd> {
    let name = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let flags = flags | OFlags::CLOEXEC;
    let mut tries = 0;
    loop {
        match rustix::fs::openat2(dir, name, flags, mode.into(), resolve) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) if tries < RACE_RETRIES => tries += 1,
            other => return other,
        }
    }
}

/// Resolves `path` by hand, one component at a time on descriptors, making what is missing.
///
/// Each step opens one name without following it, so what a racing process puts there is either the directory that we
/// then stand in or an error. `..` is resolved by the kernel again from the names already passed.
fn walk(root: Root<'_>, path: &Path, leaf: Leaf) -> Result<OwnedFd> {
    let fail = |errno: Errno| Error::new("openat2", format!("{}, {path:?}", show(root.0)), errno);
    let mut rest: VecDeque<OsString> = names_of(path);
    let mut passed: Vec<OsString> = Vec::new();
    let mut current = root.open(".", OFlags::PATH | OFlags::DIRECTORY)?;
    let mut symlinks = 0;
    while let Some(name) = rest.pop_front() {
        if rest.len() + passed.len() > MAX_COMPONENTS {
            return Err(fail(Errno::ENAMETOOLONG));
        }
        if name == ".." {
            passed.pop();
            let so_far: std::path::PathBuf = passed.iter().collect();
            current = root.open(so_far, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW)?;
            continue;
        }
        let last = rest.is_empty();
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let next = match try_open(current.as_fd(), Path::new(&name), flags, 0, ResolveFlags::BENEATH) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT) => {
                make(&current, &name, if last { leaf } else { Leaf::Directory(0o755) })?
            }
            Err(errno) => return Err(at("openat2", &current, Path::new(&name), errno)),
        };
        match stat(&next)?.kind {
            Kind::Symlink => {
                symlinks += 1;
                if symlinks > MAX_SYMLINKS {
                    return Err(fail(Errno::ELOOP));
                }
                let target = read_link(&next)?;
                let target = Path::new(&target);
                if target.is_absolute() {
                    passed.clear();
                    current = root.open(".", OFlags::PATH | OFlags::DIRECTORY)?;
                }
                for component in names_of(target).into_iter().rev() {
                    rest.push_front(component);
                }
            }
            Kind::Directory => {
                passed.push(name);
                current = next;
            }
            _ if last => return Ok(next),
            _ => return Err(fail(Errno::ENOTDIR)),
        }
    }
    Ok(current)
}

/// Makes one directory or file and opens it. What somebody else made in the meantime is taken as it is.
fn make(dir: &OwnedFd, name: &OsStr, leaf: Leaf) -> Result<OwnedFd> {
    let made = match leaf {
        Leaf::Directory(mode) => make_dir(dir, name, mode),
        Leaf::File(mode) => create_file_at(dir, name, mode).map(drop),
    };
    match made {
        Err(error) if error.errno() != Errno::EEXIST => Err(error),
        _ => open_at(dir, name, OFlags::PATH),
    }
}

/// The names of a path, `..` among them.
fn names_of(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsString::from("..")),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

/// Refuses what is not one name: the calls above promise to stay in the directory.
pub(crate) fn plain_name<'a>(dir: &impl AsFd, name: &'a OsStr) -> Result<&'a Path> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(Error::new(
            "openat2",
            format!("{}, {name:?}", show(dir)),
            Errno::EINVAL,
        ));
    }
    Ok(Path::new(name))
}

pub(crate) fn at(call: &'static str, dir: &impl AsFd, name: &Path, errno: rustix::io::Errno) -> Error {
    Error::new(call, format!("{}, {name:?}", show(dir)), errno.into())
}

pub(crate) fn on(call: &'static str, fd: &impl AsFd, errno: rustix::io::Errno) -> Error {
    Error::new(call, show(fd), errno.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    /// A directory `base/root` to confine, with `base/outside` beside it that must stay as it is.
    struct Tree {
        base: PathBuf,
        root: OwnedFd,
    }

    impl Tree {
        fn new() -> Tree {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let base = std::env::temp_dir().join(format!("coracle-path-{}-{number}", std::process::id()));
            fs::create_dir_all(base.join("root")).unwrap();
            fs::create_dir_all(base.join("outside")).unwrap();
            fs::write(base.join("outside/canary"), "untouched").unwrap();
            let root = open_dir(base.join("root")).unwrap();
            Tree { base, root }
        }

        fn at(&self, name: &str) -> PathBuf {
            self.base.join("root").join(name)
        }

        fn assert_outside_untouched(&self) {
            let names: Vec<_> = fs::read_dir(self.base.join("outside")).unwrap().collect();
            assert_eq!(names.len(), 1);
            assert_eq!(
                fs::read_to_string(self.base.join("outside/canary")).unwrap(),
                "untouched"
            );
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.base);
        }
    }

    #[test]
    fn directories_are_made_below_absolute_relative_and_dangling_links() {
        let tree = Tree::new();
        let root = Root::new(&tree.root);
        symlink(tree.base.join("outside"), tree.at("absolute")).unwrap();
        symlink("../../outside", tree.at("relative")).unwrap();
        symlink("/run", tree.at("dangling")).unwrap();
        for link in ["absolute", "relative", "dangling"] {
            let made = root.mkdir_all(format!("/{link}/a/../b/c"), 0o700).unwrap();
            let seen = stat(&made).unwrap();
            assert_eq!((seen.kind, seen.mode & 0o077), (Kind::Directory, 0));
        }
        // The links are read from the root: an absolute one names a path inside, and `..` stops at the top.
        let inside = tree.base.join("outside/b/c");
        let inside = inside.strip_prefix("/").unwrap();
        assert!(tree.at(inside.to_str().unwrap()).is_dir());
        assert!(tree.at("outside/b/c").is_dir());
        assert!(tree.at("run/b/c").is_dir());
        tree.assert_outside_untouched();
    }

    #[test]
    fn a_file_is_made_at_the_end_of_a_dangling_link() {
        let tree = Tree::new();
        fs::create_dir(tree.at("etc")).unwrap();
        symlink(
            "../run/systemd/resolve/stub-resolv.conf",
            tree.at("etc/resolv.conf"),
        )
        .unwrap();
        let made = Root::new(&tree.root)
            .ensure("/etc/resolv.conf", Leaf::File(0o644))
            .unwrap();
        assert_eq!(stat(&made).unwrap().kind, Kind::File);
        assert!(tree.at("run/systemd/resolve/stub-resolv.conf").is_file());
    }

    #[test]
    fn a_loop_of_links_and_a_file_in_the_way_are_errors() {
        let tree = Tree::new();
        let root = Root::new(&tree.root);
        symlink("loop", tree.at("loop")).unwrap();
        fs::write(tree.at("file"), "").unwrap();
        assert_eq!(root.mkdir_all("loop/x", 0o755).unwrap_err().errno(), Errno::ELOOP);
        assert_eq!(
            root.mkdir_all("file/x", 0o755).unwrap_err().errno(),
            Errno::ENOTDIR
        );
        // A link that grows with each step ends at the bound and not in memory.
        symlink("grow/".repeat(500) + "x", tree.at("grow")).unwrap();
        root.mkdir_all("grow/y", 0o755).unwrap_err();
    }

    #[test]
    fn new_files_are_never_made_through_links() {
        let tree = Tree::new();
        let root = Root::new(&tree.root);
        symlink("../outside/new", tree.at("link")).unwrap();
        assert_eq!(
            root.create_file("link", 0o644).unwrap_err().errno(),
            Errno::EEXIST
        );
        assert_eq!(
            create_file_at(&tree.root, "../outside/new", 0o644)
                .unwrap_err()
                .errno(),
            Errno::EINVAL
        );
        root.create_file("sub/new", 0o600).unwrap();
        assert_eq!(
            stat_at(open_dir(tree.at("sub")).unwrap(), "new").unwrap().kind,
            Kind::File
        );
        tree.assert_outside_untouched();
    }

    #[test]
    fn only_regular_files_within_the_limit_are_read() {
        let tree = Tree::new();
        let root = Root::new(&tree.root);
        fs::write(tree.at("file"), "12345").unwrap();
        symlink("file", tree.at("link")).unwrap();
        symlink(tree.base.join("outside/canary"), tree.at("escape")).unwrap();
        drop(make_node(&tree.root, "fifo", Node::Fifo, 0o600).unwrap());
        drop(make_node(&tree.root, "full", Node::Char(1, 7), 0o600).unwrap());
        assert_eq!(root.read_file("link", 5).unwrap(), b"12345");
        assert_eq!(root.read_file("file", 4).unwrap_err().errno(), Errno::EFBIG);
        assert_eq!(root.read_file("escape", 100).unwrap_err().errno(), Errno::ENOENT);
        for node in ["fifo", "full", "."] {
            assert_eq!(
                root.read_file(node, 100).unwrap_err().errno(),
                Errno::EINVAL,
                "{node}"
            );
        }
    }

    #[test]
    fn magic_links_are_not_followed() {
        let proc = open_dir("/proc").unwrap();
        assert_eq!(
            Root::new(&proc).open_path("self/root").unwrap_err().errno(),
            Errno::ELOOP
        );
        assert_eq!(
            Root::new(&proc).open_path("self/fd/0").unwrap_err().errno(),
            Errno::ELOOP
        );
    }

    #[test]
    fn nodes_are_what_was_asked() {
        let tree = Tree::new();
        let node = make_node(&tree.root, "null", Node::Char(1, 3), 0o666).unwrap();
        assert_eq!(stat(&node).unwrap().rdev, (1, 3));
        chmod(&node, 0o622).unwrap();
        chown(&node, 7, 8).unwrap();
        let seen = stat_at(&tree.root, "null").unwrap();
        assert_eq!((seen.mode, seen.uid, seen.gid), (0o622, 7, 8));
        let again = make_node(&tree.root, "null", Node::Char(1, 3), 0o666);
        assert_eq!(again.unwrap_err().errno(), Errno::EEXIST);
    }

    #[test]
    fn a_listing_has_a_bound() {
        let tree = Tree::new();
        for name in ["a", "b", "c"] {
            make_dir(&tree.root, name, 0o755).unwrap();
        }
        assert_eq!(list_dir(&tree.root, 3).unwrap().len(), 3);
        assert_eq!(list_dir(&tree.root, 2).unwrap_err().errno(), Errno::E2BIG);
    }

    /// One thread swaps a parent directory for a link that points outside while another makes directories and files
    /// below it: nothing may ever appear outside.
    #[test]
    fn swapping_parents_never_leads_outside() {
        let tree = Tree::new();
        let stop = AtomicBool::new(false);
        fs::create_dir(tree.at("real")).unwrap();
        symlink(tree.base.join("outside"), tree.at("trap")).unwrap();
        symlink("../outside", tree.at("trap2")).unwrap();
        let (mut made, mut failed) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let dir = open_dir(tree.at(".")).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    for trap in ["trap", "trap2"] {
                        let _ = rustix::fs::renameat_with(
                            &dir,
                            "real",
                            &dir,
                            trap,
                            rustix::fs::RenameFlags::EXCHANGE,
                        );
                        let _ = rustix::fs::renameat_with(
                            &dir,
                            "real",
                            &dir,
                            trap,
                            rustix::fs::RenameFlags::EXCHANGE,
                        );
                    }
                }
            });
            for round in 0..300 {
                let root = Root::new(&tree.root);
                let results = [
                    root.mkdir_all(format!("real/d{round}/x/../y"), 0o755).is_ok(),
                    root.ensure(format!("real/e{round}/file"), Leaf::File(0o644))
                        .is_ok(),
                    root.create_file(format!("real/f{round}/file"), 0o644).is_ok(),
                ];
                made += results.iter().filter(|ok| **ok).count();
                failed += results.iter().filter(|ok| !**ok).count();
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(made > 0, "nothing was made in {failed} tries");
        tree.assert_outside_untouched();
    }
}
