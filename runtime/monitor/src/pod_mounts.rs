//! What the containers of a pod share of mounts: its /dev/shm, and the files that the daemon wrote for it.
//!
//! Both are file systems in memory with a size of their own, in a mount namespace that the monitor keeps: the host's
//! mount table does not grow with pods, and what containers write there fills neither the host's memory nor its /run.

use std::fs;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use coracle_container::Lent;
use coracle_kernel::mount::{self, Depth, Filesystem};
use coracle_kernel::mount_attr::{self, Attr, Propagation};
use coracle_kernel::namespace::{self, Kind};
use coracle_kernel::path::{self, OFlags};
use coracle_kernel::{Error, Result};
use coracle_wire::Failed;

use crate::refusal::kernel;

/// Size of a pod's /dev/shm where nothing is said, as container engines have it.
const SHM_BYTES: u64 = 64 << 20;

/// Size of the pod's files together: containers may write to them, and have no reason to write much.
const FILES_BYTES: u64 = 1 << 20;

/// Longest of them when the pod is set up.
const FILE_BYTES: u64 = 256 << 10;

/// Names below the pod's directory.
const SHM: &str = "shm";
const FILES: &str = "files";

/// The namespace in which the pod's mounts are.
#[derive(Debug)]
pub(crate) struct PodMounts {
    pub(crate) namespace: OwnedFd,
    /// Below which directory: there, and for containers.
    pub(crate) pod_dir: String,
    /// Whether it has a /dev/shm of its own.
    pub(crate) shm: bool,
}

/// Makes the mounts, in a mount namespace that is the caller's own by now: a slave, so that host mounts made later still
/// come in and nothing goes out. `shm_bytes`: none where the pod has the host's, 0 for the usual size.
pub(crate) fn make(pod_dir: &str, shm_bytes: Option<u64>) -> std::result::Result<(), Failed> {
    let failed = kernel("mount the pod's /dev/shm and files");
    let root = path::open_dir("/").map_err(&failed)?;
    mount_attr::set_propagation(&root, Propagation::Slave, true).map_err(&failed)?;
    if let Some(bytes) = shm_bytes {
        let bytes = if bytes == 0 { SHM_BYTES } else { bytes };
        tmpfs(pod_dir, SHM, bytes, "1777").map_err(&failed)?;
    }
    let written = read_files(&Path::new(pod_dir).join(FILES));
    let written = written.map_err(|error| failed(Error::from_io("read", "the pod's files", &error)))?;
    tmpfs(pod_dir, FILES, FILES_BYTES, "755").map_err(&failed)?;
    for (path, content) in written {
        let copied = fs::write(&path, content);
        copied.map_err(|error| failed(Error::from_io("write", path.display().to_string(), &error)))?;
    }
    Ok(())
}

impl PodMounts {
    /// Copies of the pod's mounts, for one of its containers: attached nowhere, with their places.
    ///
    /// Nothing is attached here, since that would show on the host, or would need a mount of the host's to be cut off on
    /// which volumes may lie: the container does it when it has taken those.
    pub(crate) fn lend(&self) -> Result<Vec<Lent>> {
        let names = [(SHM, self.shm), (FILES, true)];
        let host = namespace::open_own(Kind::Mount)?;
        namespace::enter(&self.namespace, Kind::Mount)?;
        let lent = names
            .into_iter()
            .filter(|(_, wanted)| *wanted)
            .map(|(name, _)| {
                Ok(Lent {
                    mount: mount::clone_tree(place(&self.pod_dir, name)?, Depth::Single)?,
                    at: Path::new(&self.pod_dir).join(name),
                })
            })
            .collect();
        namespace::enter(&host, Kind::Mount)?;
        lent
    }
}

fn tmpfs(pod_dir: &str, name: &str, bytes: u64, mode: &str) -> Result<()> {
    let files = Filesystem::open("tmpfs")?;
    files.string("mode", mode)?;
    files.string("size", bytes.to_string())?;
    files.string("source", name)?;
    files.create()?;
    let files = files.mount(Attr::NOSUID | Attr::NODEV | Attr::NOEXEC)?;
    mount::attach(&files, place(pod_dir, name)?)
}

/// Where one of them lies, below a directory of ours.
fn place(pod_dir: &str, name: &str) -> Result<OwnedFd> {
    path::open(
        Path::new(pod_dir).join(name),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW,
    )
}

/// What the daemon wrote for the pod, a handful of small files.
fn read_files(dir: &Path) -> io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let mut content = Vec::new();
        fs::File::open(&path)?
            .take(FILE_BYTES)
            .read_to_end(&mut content)?;
        files.push((path, content));
    }
    Ok(files)
}
