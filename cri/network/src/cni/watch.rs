//! Watched directories, also those that are not there yet.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};

use coracle_kernel::Error as KernelError;
use coracle_kernel::inotify::Inotify;

/// Tells of changes in the directories of the network's configuration and plugins. Readable when there may be some;
/// [`crate::Network::refresh`] takes them.
#[derive(Debug)]
pub struct Watch {
    inotify: Inotify,
    /// What matters in each watched directory; none for everything.
    watched: BTreeMap<i32, Option<BTreeSet<OsString>>>,
}

impl Watch {
    pub(super) fn new() -> Result<Watch, KernelError> {
        Ok(Watch {
            inotify: Inotify::new()?,
            watched: BTreeMap::new(),
        })
    }

    /// Watches these directories from now on, and of the directories above each the name that leads to it: so one that
    /// appears or is replaced is noticed.
    pub(super) fn arm(&mut self, dirs: &[PathBuf]) -> Result<(), KernelError> {
        let mut wanted: BTreeMap<i32, Option<BTreeSet<OsString>>> = BTreeMap::new();
        for dir in dirs {
            let mut below: Option<&Path> = None;
            for place in dir.ancestors() {
                let name = below.and_then(Path::file_name);
                below = Some(place);
                // What is not there yet is noticed in the directory above.
                let Ok(watch) = self.inotify.watch_dir(place) else {
                    continue;
                };
                match name {
                    None => drop(wanted.insert(watch, None)),
                    Some(name) => {
                        if let Some(names) = wanted.entry(watch).or_insert_with(|| Some(BTreeSet::new())) {
                            names.insert(name.to_owned());
                        }
                    }
                }
            }
        }
        for watch in self.watched.keys().filter(|watch| !wanted.contains_key(watch)) {
            self.inotify.unwatch(*watch)?;
        }
        self.watched = wanted;
        Ok(())
    }

    /// Whether anything that matters has changed since the last call.
    pub(super) fn take(&self) -> Result<bool, KernelError> {
        let mut changed = false;
        loop {
            let events = self.inotify.take()?;
            if events.is_empty() {
                return Ok(changed);
            }
            for event in events {
                changed |= match (self.watched.get(&event.watch), event.name) {
                    (Some(Some(names)), Some(name)) => names.contains(&name),
                    (Some(_), _) => true,
                    // The kernel lost events; or one of a directory that is not watched any more.
                    (None, _) => event.watch < 0,
                };
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.inotify.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_that_come_go_and_are_replaced_are_noticed() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("etc/cni/net.d");
        let dirs = [dir.clone()];
        let mut watch = Watch::new().unwrap();
        let mut changed = |act: &dyn Fn()| {
            watch.arm(&dirs).unwrap();
            watch.take().unwrap();
            act();
            watch.take().unwrap()
        };
        let write = |path: PathBuf| std::fs::write(path, "x").unwrap();
        assert!(!changed(&|| write(root.path().join("unrelated"))));
        assert!(changed(&|| std::fs::create_dir(root.path().join("etc")).unwrap()));
        assert!(changed(&|| std::fs::create_dir_all(&dir).unwrap()));
        assert!(!changed(&|| write(root.path().join("etc/cni/unrelated"))));
        assert!(changed(&|| write(dir.join("10-net.conf"))));
        assert!(changed(
            &|| std::fs::rename(&dir, root.path().join("old")).unwrap()
        ));
        assert!(changed(&|| std::fs::create_dir(&dir).unwrap()));
        assert!(
            !changed(&|| write(root.path().join("old/10-net.conf"))),
            "the old one matters no more"
        );
        assert!(changed(&|| write(dir.join("10-net.conf"))));
        assert!(changed(
            &|| std::fs::remove_dir_all(root.path().join("etc")).unwrap()
        ));
        assert!(changed(&|| std::os::unix::fs::symlink(
            "old",
            root.path().join("etc")
        )
        .unwrap()));
    }
}
