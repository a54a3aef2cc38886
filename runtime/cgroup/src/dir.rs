//! A held cgroup directory: its files by name, its children, its processes.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use coracle_kernel::path::{self, Kind, OFlags};
use coracle_kernel::{Errno, Error as KernelError};

use crate::{Error, Pid, Result};

/// Most that is read of one file. `cgroup.procs` of a group with a million processes is shorter.
const FILE_MAX: usize = 16 << 20;
/// Most entries of one directory: some eighty files, and groups that a container may have made.
const ENTRIES_MAX: usize = 1 << 17;
/// How often a directory is made that someone else removes.
const TRIES: u32 = 8;
/// A directory only as a place to start from.
const PLACE: OFlags = OFlags::PATH.union(OFlags::DIRECTORY);

/// A cgroup directory by descriptor (`O_PATH`), with its path below the hierarchy's root for messages.
#[derive(Debug)]
pub(crate) struct Dir {
    fd: OwnedFd,
    path: String,
}

/// An open file of a cgroup that is read again and again.
#[derive(Debug)]
pub(crate) struct CachedFile {
    fd: File,
    file: String,
    path: String,
}

impl Dir {
    pub(crate) fn new(fd: OwnedFd, path: String) -> Dir {
        Dir { fd, path }
    }

    /// The directory at `path` below this one; none if it is not there.
    pub(crate) fn find(&self, path: &str) -> Result<Option<Dir>> {
        let found = path::find_beneath(&self.fd, path, PLACE).map_err(|source| Error::Step {
            step: "open",
            path: join(&self.path, path),
            source,
        })?;
        Ok(found.map(|fd| Dir {
            fd,
            path: join(&self.path, path),
        }))
    }

    /// Makes the directory `name` in this one; false if it was there.
    pub(crate) fn make(&self, name: &str) -> Result<bool> {
        match path::make_dir(&self.fd, name, 0o755) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Errno::EEXIST => Ok(false),
            Err(source) => Err(Error::Step {
                step: "make",
                path: join(&self.path, name),
                source,
            }),
        }
    }

    /// The directory at `path`, made with all its parents where they are missing; true if the last one is new.
    pub(crate) fn make_all(&self, path: &str) -> Result<(Dir, bool)> {
        let (parent, name) = path
            .rsplit_once('/')
            .map_or((None, path), |(parent, name)| (Some(parent), name));
        let mut tries = 0;
        loop {
            tries += 1;
            let made;
            let parent = match parent {
                None => self,
                Some(parent) => {
                    made = match self.find(parent)? {
                        Some(dir) => dir,
                        None => self.make_all(parent)?.0,
                    };
                    &made
                }
            };
            let new = parent.make(name);
            match new.and_then(|new| Ok((parent.find(name)?, new))) {
                Ok((Some(dir), new)) => {
                    return Ok((
                        Dir {
                            fd: dir.fd,
                            path: join(&self.path, path),
                        },
                        new,
                    ));
                }
                // Someone removes empty groups (another instance its last one) at this very moment.
                Ok((None, _)) if tries < TRIES => {}
                Err(error) if tries < TRIES && error.errno() == Some(Errno::ENOENT) => {}
                Ok((None, _)) => {
                    let source = KernelError::new("openat2", "removed at once", Errno::ENOENT);
                    return Err(Error::Step {
                        step: "make",
                        path: join(&self.path, path),
                        source,
                    });
                }
                Err(error) => return Err(error),
            }
        }
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Text of `file`.
    pub(crate) fn read(&self, file: &str) -> Result<String> {
        self.try_read(file)?.ok_or_else(|| Error::Step {
            step: "read",
            path: self.path.clone(),
            source: KernelError::new("openat2", format!("{file:?}"), Errno::ENOENT),
        })
    }

    /// Text of `file`; none if there is no such file.
    pub(crate) fn try_read(&self, file: &str) -> Result<Option<String>> {
        match self.read_raw(file) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.errno() == Errno::ENOENT => Ok(None),
            Err(source) => Err(Error::Step {
                step: "read a file of",
                path: self.path.clone(),
                source,
            }),
        }
    }

    /// Writes `value` to `file` by one write(2), as cgroup files want it.
    pub(crate) fn write(&self, file: &str, value: &str) -> Result<()> {
        self.write_raw(file, value).map_err(|source| Error::Write {
            file: file.to_owned(),
            value: value.to_owned(),
            path: self.path.clone(),
            source,
        })
    }

    /// The same with the kernel's error, for callers that look at it.
    pub(crate) fn write_raw(&self, file: &str, value: &str) -> Result<(), KernelError> {
        let fd = path::open_beneath(&self.fd, file, OFlags::WRONLY)?;
        write_once(fd, file, value)
    }

    /// `tasks` of v1, open to be written.
    #[cfg(feature = "cgroup-v1")]
    pub(crate) fn tasks(&self) -> Result<OwnedFd> {
        path::open_beneath(&self.fd, "tasks", OFlags::WRONLY).map_err(|source| Error::Step {
            step: "open the task list of",
            path: self.path.clone(),
            source,
        })
    }

    /// Opens `file` to be read again and again; none if there is no such file.
    pub(crate) fn cache(&self, file: &str) -> Result<Option<CachedFile>> {
        match path::open_beneath(&self.fd, file, OFlags::RDONLY) {
            Ok(fd) => Ok(Some(CachedFile {
                fd: fd.into(),
                file: file.to_owned(),
                path: self.path.clone(),
            })),
            Err(error) if error.errno() == Errno::ENOENT => Ok(None),
            Err(source) => Err(Error::Step {
                step: "open a file of",
                path: self.path.clone(),
                source,
            }),
        }
    }

    /// Processes of this directory and of all below it.
    pub(crate) fn pids(&self) -> Result<Vec<Pid>> {
        let mut pids = Vec::new();
        self.for_each_below(|dir| {
            let text = match dir.read_raw("cgroup.procs") {
                // A threaded group: the threads that lead a process stand for it.
                Err(error) if error.errno() == Errno::EOPNOTSUPP => dir.read_raw("cgroup.threads"),
                other => other,
            };
            let text = match text {
                // Removed between listing and reading.
                Err(error) if matches!(error.errno(), Errno::ENOENT | Errno::ENODEV) => return Ok(()),
                other => other.map_err(|source| Error::Step {
                    step: "list the processes of",
                    path: dir.path.clone(),
                    source,
                })?,
            };
            for line in text.lines() {
                let pid: Pid = line.parse().map_err(|_| Error::Content {
                    file: "cgroup.procs".to_owned(),
                    path: dir.path.clone(),
                    text: line.to_owned(),
                })?;
                // 0 stands for a process that this pid namespace cannot see.
                if pid > 0 {
                    pids.push(pid);
                }
            }
            Ok(())
        })?;
        Ok(pids)
    }

    /// Calls `act` for this directory and for every one below it, parents first.
    pub(crate) fn for_each_below(&self, mut act: impl FnMut(&Dir) -> Result<()>) -> Result<()> {
        // Paths, not descriptors, wait for their turn: a container may have made thousands of groups.
        let mut waiting = vec![PathBuf::from(".")];
        while let Some(relative) = waiting.pop() {
            let fd = match path::open_beneath(&self.fd, &relative, PLACE) {
                Ok(fd) => fd,
                Err(error) if error.errno() == Errno::ENOENT => continue,
                Err(source) => {
                    return Err(Error::Step {
                        step: "list",
                        path: self.shown(&relative),
                        source,
                    });
                }
            };
            let dir = Dir {
                fd,
                path: self.shown(&relative),
            };
            act(&dir)?;
            waiting.extend(dir.children()?.into_iter().map(|name| relative.join(name)));
        }
        Ok(())
    }

    /// Removes everything below this directory that holds no process; whether nothing is left below.
    pub(crate) fn remove_below(&self) -> Result<bool> {
        // Descends along what refuses to go and starts again at the top while that helps: two descriptors, however
        // deep a container nested its groups.
        loop {
            let mut removed = 0;
            let mut below: Option<Dir> = None;
            loop {
                let current = below.as_ref().unwrap_or(self);
                let mut stuck = None;
                for name in current.children()? {
                    match path::remove_dir(&current.fd, &name) {
                        Ok(()) => removed += 1,
                        Err(error) if error.errno() == Errno::ENOENT => {}
                        Err(error) if error.errno() == Errno::EBUSY => stuck = stuck.or(Some(name)),
                        Err(source) => {
                            return Err(Error::Step {
                                step: "remove",
                                path: current.shown(Path::new(&name)),
                                source,
                            });
                        }
                    }
                }
                let Some(name) = stuck else { break };
                match path::open_beneath(&current.fd, &name, PLACE) {
                    Ok(fd) => {
                        below = Some(Dir {
                            fd,
                            path: current.shown(Path::new(&name)),
                        });
                    }
                    Err(error) if error.errno() == Errno::ENOENT => break,
                    Err(source) => {
                        return Err(Error::Step {
                            step: "open",
                            path: current.shown(Path::new(&name)),
                            source,
                        });
                    }
                }
            }
            if below.is_none() {
                return Ok(true);
            }
            if removed == 0 {
                return Ok(false);
            }
        }
    }

    /// Removes the empty directory at `path` below this one; what is not there is no error. The kernel's answer
    /// otherwise.
    pub(crate) fn remove(&self, path: &str) -> Result<(), KernelError> {
        let gone = |error: &KernelError| error.errno() == Errno::ENOENT;
        let result = match path.rsplit_once('/') {
            None => path::remove_dir(&self.fd, path),
            Some((parent, name)) => match path::open_beneath(&self.fd, parent, PLACE) {
                Ok(parent) => path::remove_dir(parent, name),
                Err(error) => Err(error),
            },
        };
        match result {
            Err(error) if !gone(&error) => Err(error),
            _ => Ok(()),
        }
    }

    fn children(&self) -> Result<Vec<std::ffi::OsString>> {
        match path::list_dir(&self.fd, ENTRIES_MAX) {
            Ok(entries) => {
                let groups = entries.into_iter().filter(|(_, kind)| *kind == Kind::Directory);
                Ok(groups.map(|(name, _)| name).collect())
            }
            // Removed while it was listed.
            Err(error) if matches!(error.errno(), Errno::ENOENT | Errno::ENODEV) => Ok(Vec::new()),
            Err(source) => Err(Error::Step {
                step: "list",
                path: self.path.clone(),
                source,
            }),
        }
    }

    fn read_raw(&self, file: &str) -> Result<String, KernelError> {
        read_whole(&path::open_beneath(&self.fd, file, OFlags::RDONLY)?.into(), file)
    }

    fn shown(&self, relative: &Path) -> String {
        if relative == Path::new(".") {
            return self.path.clone();
        }
        let relative = relative.to_string_lossy();
        join(&self.path, relative.strip_prefix("./").unwrap_or(&relative))
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl CachedFile {
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// What the file says now.
    pub(crate) fn read(&self) -> Result<String> {
        read_whole(&self.fd, &self.file).map_err(|source| Error::Step {
            step: "read a file of",
            path: self.path.clone(),
            source,
        })
    }

    /// The number behind `key` in a flat keyed file.
    pub(crate) fn keyed(&self, key: &str) -> Result<Option<u64>> {
        Ok(keyed(&self.read()?, key))
    }
}

impl AsFd for CachedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The number behind `key` in the text of a flat keyed file: `oom_kill 3`.
pub(crate) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// A path below a path, both without a leading `/`; the root is the empty one.
fn join(parent: &str, child: &str) -> String {
    if parent.is_empty() {
        child.to_owned()
    } else {
        format!("{parent}/{child}")
    }
}

/// The whole text of a kernfs file, from its beginning.
fn read_whole(reader: &File, file: &str) -> Result<String, KernelError> {
    let failed = |error: &std::io::Error| KernelError::from_io("pread64", format!("{file:?}"), error);
    let mut bytes = vec![0; 1024];
    let mut length = 0;
    loop {
        let count = match reader.read_at(&mut bytes[length..], length as u64) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            other => other.map_err(|error| failed(&error))?,
        };
        length += count;
        if count == 0 {
            break;
        }
        if length == bytes.len() {
            if length >= FILE_MAX {
                return Err(KernelError::new("read", format!("{file:?}"), Errno::EFBIG));
            }
            bytes.resize(length * 2, 0);
        }
    }
    bytes.truncate(length);
    String::from_utf8(bytes)
        .map_err(|_| KernelError::new("read", format!("{file:?}, not text"), Errno::EBADMSG))
}

fn write_once(fd: OwnedFd, file: &str, value: &str) -> Result<(), KernelError> {
    use std::io::Write as _;
    let mut writer = File::from(fd);
    // An empty value would be a write of no byte, which no cgroup file notices; a line break makes it one.
    let bytes = if value.is_empty() { b"\n" } else { value.as_bytes() };
    loop {
        match writer.write(bytes) {
            Ok(count) if count == bytes.len() => return Ok(()),
            Ok(_) => {
                return Err(KernelError::new(
                    "write",
                    format!("{file:?}, {value:?}, short"),
                    Errno::EIO,
                ));
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                return Err(KernelError::from_io(
                    "write",
                    format!("{file:?}, {value:?}"),
                    &error,
                ));
            }
        }
    }
}
