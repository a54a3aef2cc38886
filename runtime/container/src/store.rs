//! The state directory: `<root>/<id>/{state.json,config.json,start.sock}`.
//!
//! A directory is the claim on an id. `state.json` is replaced by rename, so a reader sees one whole record or the one
//! before; who changes a container holds the lock of its directory meanwhile.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_cgroup::{Host, Location, Manager, Options};
use coracle_kernel::path::{self, Kind, OFlags};
use coracle_kernel::{Errno, creds, file};
use coracle_spec::{Config, Status};

use crate::state::State;
use crate::{Error, Result};

/// The record.
const STATE: &str = "state.json";
/// A copy of the configuration as it was at create time.
const CONFIG: &str = "config.json";
/// Where the init waits for its start, as long as it does.
pub(crate) const START: &str = "start.sock";
/// Largest record that is read: annotations make up nearly all of it.
const MAX_STATE_BYTES: usize = 16 << 20;
/// Most containers that are listed.
const MAX_CONTAINERS: usize = 1 << 20;
/// Longest id, the kernel's limit of a directory's name.
const MAX_ID: usize = 255;

/// All containers of one root.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    dir: OwnedFd,
}

/// One container's directory.
#[derive(Debug)]
pub struct Entry {
    id: String,
    root: OwnedFd,
    dir: OwnedFd,
}

impl Store {
    /// Opens the root; `None` where there is none.
    pub fn open(root: &Path) -> Result<Option<Store>> {
        match path::open(root, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(dir) => Ok(Some(Store {
                root: root.to_path_buf(),
                dir,
            })),
            Err(error) if error.errno() == Errno::ENOENT => Ok(None),
            Err(source) => Err(Error::call("open the state directory", source)),
        }
    }

    /// Opens the root, made where missing.
    pub fn make(root: &Path) -> Result<Store> {
        use std::os::unix::fs::DirBuilderExt;
        if let Some(store) = Store::open(root)? {
            return Ok(store);
        }
        // Others may pass through (a user-namespaced container's root has its own id), not look.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(root)
            .map_err(|error| {
                Error::call(
                    "make the state directory",
                    coracle_kernel::Error::from_io("mkdir", format!("{root:?}"), &error),
                )
            })?;
        Store::open(root)?.ok_or(Error::NotFound)
    }

    /// Where it is.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// One container.
    pub fn entry(&self, id: &str) -> Result<Entry> {
        check_id(id)?;
        let dir = match path::open_at(&self.dir, id, OFlags::RDONLY | OFlags::DIRECTORY) {
            Err(error) if error.errno() == Errno::ENOENT => return Err(Error::NotFound),
            other => other.map_err(|source| Error::call("open the container's state", source))?,
        };
        self.of(id, dir)
    }

    /// Claims an id for a new container.
    pub(crate) fn reserve(&self, id: &str) -> Result<Entry> {
        check_id(id)?;
        match path::make_dir(&self.dir, id, 0o711) {
            Err(error) if error.errno() == Errno::EEXIST => return Err(Error::Exists),
            other => other.map_err(|source| Error::call("make the container's state", source))?,
        }
        let dir = path::open_at(&self.dir, id, OFlags::RDONLY | OFlags::DIRECTORY);
        self.of(
            id,
            dir.map_err(|source| Error::call("open the container's state", source))?,
        )
    }

    /// The ids of all containers, in order.
    pub fn ids(&self) -> Result<Vec<String>> {
        let entries = path::list_dir(&self.dir, MAX_CONTAINERS)
            .map_err(|source| Error::call("list the state directory", source))?;
        let directories = entries.into_iter().filter(|(_, kind)| *kind == Kind::Directory);
        let mut ids: Vec<String> = directories
            .filter_map(|(name, _)| name.into_string().ok())
            .collect();
        ids.retain(|id| check_id(id).is_ok());
        ids.sort();
        Ok(ids)
    }

    fn of(&self, id: &str, dir: OwnedFd) -> Result<Entry> {
        let root = coracle_kernel::fd::dup(&self.dir)
            .map_err(|source| Error::call("open the state directory", source))?;
        Ok(Entry {
            id: id.to_owned(),
            root,
            dir,
        })
    }
}

impl Entry {
    /// The container's name.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Waits until nobody else changes the container. The lock ends with the entry.
    pub(crate) fn lock(&self) -> Result<()> {
        file::lock(&self.dir).map_err(|source| Error::call("lock the container's state", source))?;
        // It may have been removed, and made anew, while we waited.
        let there = path::stat_at(&self.root, &self.id).is_ok_and(|there| {
            path::stat(&self.dir).is_ok_and(|ours| (ours.dev, ours.ino) == (there.dev, there.ino))
        });
        if there { Ok(()) } else { Err(Error::NotFound) }
    }

    /// Whether somebody else changes the container now.
    fn is_locked(&self) -> bool {
        // A new open file: locks belong to those, and ours must not be given up by looking.
        let other = path::open_at(&self.root, &self.id, OFlags::RDONLY | OFlags::DIRECTORY);
        other.is_ok_and(|other| file::try_lock(&other).is_err())
    }

    /// The record; none where a create was killed before it had written one.
    pub fn state(&self) -> Result<Option<State>> {
        let Some(bytes) = self.read(STATE, MAX_STATE_BYTES)? else {
            return Ok(None);
        };
        let state: State =
            serde_json::from_slice(&bytes).map_err(|error| Error::Record(error.to_string()))?;
        if !state.is_known() || state.id != self.id {
            return Err(Error::Record("of another program or container".to_owned()));
        }
        Ok(Some(state))
    }

    /// The configuration as it was at create time.
    pub fn config(&self) -> Result<Config> {
        let limit = usize::try_from(coracle_spec::MAX_CONFIG_BYTES).unwrap_or(usize::MAX);
        let bytes = self.read(CONFIG, limit)?.ok_or(Error::NotFound)?;
        Config::from_slice(&bytes).map_err(Error::Config)
    }

    /// Where the container is in its life.
    #[must_use]
    pub fn status(&self, state: &State) -> Status {
        if state.pid == 0 {
            return if self.is_locked() {
                Status::Creating
            } else {
                Status::Stopped
            };
        }
        if !state.init_runs() {
            return Status::Stopped;
        }
        if path::stat_at(&self.dir, START).is_ok() {
            Status::Created
        } else {
            Status::Running
        }
    }

    /// The same, looking also whether its processes are frozen.
    pub fn full_status(&self, state: &State) -> Result<Status> {
        match self.status(state) {
            Status::Running if manager(state)?.is_some_and(|cgroup| cgroup.frozen().unwrap_or(false)) => {
                Ok(Status::Paused)
            }
            status => Ok(status),
        }
    }

    /// The owner of the directory: who made the container.
    pub fn owner(&self) -> Result<u32> {
        let seen =
            path::stat(&self.dir).map_err(|source| Error::call("look at the container's state", source))?;
        Ok(seen.uid)
    }

    pub(crate) fn write_state(&self, state: &State) -> Result<()> {
        let bytes = serde_json::to_vec(state).map_err(|error| Error::Record(error.to_string()))?;
        self.replace(STATE, &bytes)
    }

    pub(crate) fn write_config(&self, bytes: &[u8]) -> Result<()> {
        self.replace(CONFIG, bytes)
    }

    /// The directory, for the socket in it.
    pub(crate) fn dir(&self) -> &OwnedFd {
        &self.dir
    }

    /// Removes the directory with everything in it, and so gives up the id.
    pub(crate) fn remove(&self) -> Result<()> {
        let failed = |source| Error::call("remove the container's state", source);
        for (name, _) in path::list_dir(&self.dir, MAX_CONTAINERS).map_err(failed)? {
            gone(path::unlink(&self.dir, &name)).map_err(failed)?;
        }
        gone(path::remove_dir(&self.root, &self.id)).map_err(failed)
    }

    /// Forgets where the init waits: nobody else can start it from here on.
    pub(crate) fn remove_start(&self) -> Result<()> {
        gone(path::unlink(&self.dir, START)).map_err(|source| Error::call("remove the start socket", source))
    }

    fn read(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>> {
        match path::Root::new(&self.dir).read_file(name, limit) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.errno() == Errno::ENOENT => Ok(None),
            Err(source) => Err(Error::call("read the container's state", source)),
        }
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let new = format!(".{name}");
        let write = || {
            let file = match path::create_file_at(&self.dir, &new, 0o600) {
                // Of a call that was killed before its rename.
                Err(error) if error.errno() == Errno::EEXIST => {
                    gone(path::unlink(&self.dir, &new))?;
                    path::create_file_at(&self.dir, &new, 0o600)?
                }
                other => other?,
            };
            let mut rest = bytes;
            while !rest.is_empty() {
                let written = coracle_kernel::fd::write(&file, rest)
                    .map_err(|errno| coracle_kernel::Error::new("write", new.clone(), errno))?;
                rest = rest.get(written..).unwrap_or_default();
            }
            path::rename(&self.dir, &new, &self.dir, name)
        };
        write().map_err(|source| Error::call("write the container's state", source))
    }
}

impl AsFd for Entry {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// The cgroup of a recorded container; none where the record has none yet.
pub(crate) fn manager(state: &State) -> Result<Option<Box<dyn Manager>>> {
    if state.cgroup.is_empty() {
        return Ok(None);
    }
    let location = Location::from_map(&state.cgroup)?;
    Ok(Some(Host::detect()?.manager(&location, Options::default())?))
}

/// Whether we act without root's privileges.
pub(crate) fn rootless() -> bool {
    creds::effective_uid() != 0
}

/// `[A-Za-z0-9_+.-]+`, and no name of a directory itself.
fn check_id(id: &str) -> Result<()> {
    if id.is_empty() {
        return Err(Error::EmptyId);
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+.-".contains(&byte);
    if id == "." || id == ".." || id.len() > MAX_ID || !id.bytes().all(allowed) {
        return Err(Error::BadId);
    }
    Ok(())
}

fn gone(result: coracle_kernel::Result<()>) -> coracle_kernel::Result<()> {
    match result {
        Err(error) if error.errno() == Errno::ENOENT => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_and_nothing_else() {
        for id in ["a", "A-1_b+c.d", "..a", "a..", &"x".repeat(255)] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "a b", "é", "a\0", "a\n", &"x".repeat(256)] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn an_id_is_claimed_once_and_given_back() {
        let root = std::env::temp_dir().join(format!("coracle-store-{}", std::process::id()));
        assert!(Store::open(&root).unwrap().is_none());
        let store = Store::make(&root).unwrap();
        let entry = store.reserve("x").unwrap();
        assert!(matches!(store.reserve("x"), Err(Error::Exists)));
        entry.lock().unwrap();
        let state = State::new("x", &Config::default(), "/b".into(), "/b/rootfs".into());
        assert!(entry.state().unwrap().is_none(), "nothing written yet");
        entry.write_state(&state).unwrap();
        entry.write_state(&state).unwrap();
        assert_eq!(store.entry("x").unwrap().state().unwrap(), Some(state.clone()));
        assert_eq!(store.entry("x").unwrap().status(&state), Status::Creating);
        assert_eq!(store.ids().unwrap(), ["x"]);
        entry.remove().unwrap();
        assert!(matches!(store.entry("x"), Err(Error::NotFound)));
        assert!(
            matches!(entry.lock(), Err(Error::NotFound)),
            "the lock of a removed container is worth nothing"
        );
        std::fs::remove_dir(&root).unwrap();
    }
}
