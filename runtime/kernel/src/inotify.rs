//! inotify(7): to be told of changes in directories.

use std::ffi::{OsStr, OsString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};

use crate::{Errno, Error, Result};

/// Events taken at a time; more wait for the next call.
const EVENTS_MAX: usize = 1024;

/// An inotify instance, non-blocking: readable when something happened.
#[derive(Debug)]
pub struct Inotify(OwnedFd);

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The watch that it happened to, as [`Inotify::watch_dir`] numbered it; -1 where the kernel lost events.
    pub watch: i32,
    /// The name in that directory; none if it happened to the directory itself.
    pub name: Option<OsString>,
    /// The watch is no more: its directory was removed, or [`Inotify::unwatch`] was called.
    pub ended: bool,
}

impl Inotify {
    /// A new instance.
    pub fn new() -> Result<Inotify> {
        inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .map(Inotify)
            .map_err(|errno| Error::new("inotify_init1", "IN_CLOEXEC | IN_NONBLOCK", errno.into()))
    }

    /// Watches a directory: names that come, go, are written or get another mode, and the directory's own end. The
    /// number is the same for the same directory.
    pub fn watch_dir(&self, path: &Path) -> Result<i32> {
        let flags = WatchFlags::CLOSE_WRITE
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        inotify::add_watch(&self.0, path, flags)
            .map_err(|errno| Error::new("inotify_add_watch", format!("{path:?}"), errno.into()))
    }

    /// Stops watching; a watch that is no more is no error.
    pub fn unwatch(&self, watch: i32) -> Result<()> {
        match inotify::remove_watch(&self.0, watch) {
            Err(errno) if errno != rustix::io::Errno::INVAL => {
                Err(Error::new("inotify_rm_watch", watch.to_string(), errno.into()))
            }
            _ => Ok(()),
        }
    }

    /// What happened since the last call, up to a bound; nothing if nothing did.
    pub fn take(&self) -> Result<Vec<Event>> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(&self.0, &mut buffer);
        let mut events = Vec::new();
        while events.len() < EVENTS_MAX {
            match reader.next() {
                Ok(event) => events.push(Event {
                    watch: event.wd(),
                    name: event
                        .file_name()
                        .map(|name| OsStr::from_bytes(name.to_bytes()).to_owned()),
                    ended: event.events().contains(ReadFlags::IGNORED),
                }),
                Err(errno) if Errno::from(errno) == Errno::EAGAIN => break,
                Err(errno) => return Err(Error::new("read", "inotify", errno.into())),
            }
        }
        Ok(events)
    }
}

impl AsFd for Inotify {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Inotify {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_in_a_directory_is_told() {
        let dir = std::env::temp_dir().join(format!("coracle-inotify-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let inotify = Inotify::new().unwrap();
        assert_eq!(inotify.take().unwrap(), []);
        let watch = inotify.watch_dir(&dir).unwrap();
        assert_eq!(inotify.watch_dir(&dir).unwrap(), watch);

        std::fs::write(dir.join("a"), "text").unwrap();
        let events = inotify.take().unwrap();
        assert!(
            events
                .iter()
                .any(|event| event.watch == watch && event.name.as_deref() == Some("a".as_ref())),
            "{events:?}"
        );
        assert_eq!(inotify.take().unwrap(), []);

        std::fs::remove_dir_all(&dir).unwrap();
        let events = inotify.take().unwrap();
        assert!(events.iter().any(|event| event.name.is_none()), "{events:?}");
        assert!(events.iter().any(|event| event.ended), "{events:?}");
        inotify.unwatch(watch).unwrap();
        let error = inotify.watch_dir("/nonexistent".as_ref()).unwrap_err();
        assert_eq!(error.errno(), Errno::ENOENT);
    }
}
