//! Namespaces that live on without a process: bind-mounted onto files below `/run/netns`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread::JoinHandle;

use coracle_kernel::mount;
use coracle_kernel::mount_attr::Propagation;
use coracle_kernel::mount_old;
use coracle_kernel::mountinfo;
use coracle_kernel::namespace::{self, Kind, Kinds};
use coracle_kernel::path;
use coracle_kernel::procfs::Procfs;
use coracle_kernel::{Errno, Error as KernelError};

use crate::rtnl::{LinkEvents, Rtnl};
use crate::{AttachOptions, Error, Result, check_pod, lock, step};

/// Most entries of the directory; every pod of every runtime on the host has one.
const ENTRIES_MAX: usize = 1 << 16;
/// Most mounts on one file; more than one there is only by someone's mistake.
const MOUNTS_MAX: usize = 16;

/// The pinned namespaces of one instance.
#[derive(Debug)]
pub(crate) struct Pins {
    dir: PathBuf,
    prefix: String,
    /// Whether the directory was looked over in this life of the daemon. Held meanwhile: nothing may be pinned before.
    ready: Mutex<bool>,
}

/// A new namespace, and route sockets in it.
pub(crate) struct Fresh {
    pub(crate) namespace: OwnedFd,
    pub(crate) rtnl: Rtnl,
    pub(crate) events: LinkEvents,
}

/// A namespace on its way, in a thread of its own. Nobody knows of it yet: dropped, it leaves nothing.
pub(crate) struct Making(io::Result<JoinHandle<Result<Fresh, KernelError>>>);

/// What every pod's namespace gets unless told otherwise: ports below 1024 and ping without capabilities.
#[must_use]
pub fn default_sysctls() -> BTreeMap<String, String> {
    [
        ("net.ipv4.ip_unprivileged_port_start", "0"),
        ("net.ipv4.ping_group_range", "0 2147483647"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

impl Pins {
    pub(crate) fn new(dir: impl Into<PathBuf>, instance: &str) -> Pins {
        Pins {
            dir: dir.into(),
            prefix: format!("coracle-{instance}-"),
            ready: Mutex::default(),
        }
    }

    /// Where the namespace of `pod` is pinned.
    pub(crate) fn path(&self, pod: &str) -> PathBuf {
        self.dir.join(self.name(pod))
    }

    /// Pins a new namespace, with its loopback up.
    pub(crate) fn keep(&self, pod: &str, making: Making) -> Result<Fresh> {
        let fresh = making
            .finish()
            .map_err(step("make the pod's network namespace"))?;
        self.pin(pod, &fresh.namespace)
            .map_err(step("pin the pod's network namespace"))?;
        Ok(fresh)
    }

    /// The pinned namespace of `pod`; none if there is no file, or nothing on it.
    pub(crate) fn open(&self, pod: &str) -> Result<Option<OwnedFd>> {
        match namespace::open(self.path(pod), Kind::Network) {
            Ok(namespace) => Ok(Some(namespace)),
            Err(error) if matches!(error.errno(), Errno::ENOENT | Errno::EINVAL) => Ok(None),
            Err(error) => Err(step("open the pod's network namespace")(error)),
        }
    }

    /// Unpins the namespace of `pod`; it goes with its last process.
    pub(crate) fn remove(&self, pod: &str) -> Result<()> {
        let failed = step("unpin the pod's network namespace");
        self.unpin(pod).map_err(failed)
    }

    /// Pods of this instance that have a file.
    pub(crate) fn list(&self) -> Result<Vec<String>> {
        let failed = step("list pinned network namespaces");
        let dir = match path::open_dir(&self.dir) {
            Ok(dir) => dir,
            Err(error) if error.errno() == Errno::ENOENT => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let entries = path::list_dir(dir, ENTRIES_MAX).map_err(failed)?;
        // A name that no pod can have is somebody else's file.
        let pod = |name: &str| {
            let pod = name.strip_prefix(&self.prefix)?;
            check_pod(pod).is_ok().then(|| pod.to_owned())
        };
        Ok(entries
            .iter()
            .filter_map(|(name, _)| pod(name.to_str()?))
            .collect())
    }

    fn name(&self, pod: &str) -> String {
        format!("{}{pod}", self.prefix)
    }

    fn pin(&self, pod: &str, namespace: &OwnedFd) -> Result<(), KernelError> {
        self.make_dir()?;
        let dir = path::open_dir(&self.dir)?;
        let file = path::create_file_at(dir, self.name(pod), 0o444)?;
        mount_old::bind(namespace, file, false)
    }

    /// Makes the directory where it is missing, and a shared mount of it, as ip-netns(8) and the CNI library do. They
    /// would do so later, and hide what is pinned in it by then under their mount: it could not be removed any more.
    fn make_dir(&self) -> Result<(), KernelError> {
        let mut ready = lock(&self.ready);
        let dir = match path::open_dir(&self.dir) {
            Ok(_) if *ready => return Ok(()),
            Err(error) if error.errno() == Errno::ENOENT => {
                std::fs::create_dir_all(&self.dir)
                    .map_err(|error| KernelError::from_io("mkdir", format!("{:?}", self.dir), &error))?;
                path::open_dir(&self.dir)?
            }
            other => other?,
        };
        // What others have pinned already would be hidden by ours. On a shared mount, as /run is under systemd, theirs
        // would take ours along, and take it away again.
        if !path::mount_place(&dir)?.is_root
            && !self.is_shared()?
            && path::list_dir(&dir, ENTRIES_MAX)?.is_empty()
        {
            let made = mount_old::bind(&dir, &dir, false)
                .and_then(|()| mount_old::set_propagation(&self.dir, Propagation::Shared, false));
            if let Err(error) = made {
                tracing::warn!(%error, "pinned network namespaces may be hidden by a later ip netns add");
            }
        }
        *ready = true;
        Ok(())
    }

    /// Whether the mount that the directory lies on tells others of changes.
    fn is_shared(&self) -> Result<bool, KernelError> {
        let mounts = mountinfo::read_own(&Procfs::visible()?)?;
        let holder = mounts
            .iter()
            .filter(|mount| self.dir.starts_with(&mount.mount_point))
            .max_by_key(|mount| mount.mount_point.components().count());
        Ok(holder.is_some_and(|mount| mount.shared.is_some()))
    }

    fn unpin(&self, pod: &str) -> Result<(), KernelError> {
        let file = self.path(pod);
        for _ in 0..MOUNTS_MAX {
            match mount::detach(&file) {
                Ok(()) => {}
                // Nothing is mounted on it, or there is no file.
                Err(error) if matches!(error.errno(), Errno::EINVAL | Errno::ENOENT) => break,
                Err(error) => return Err(error),
            }
        }
        let dir = match path::open_dir(&self.dir) {
            Ok(dir) => dir,
            Err(error) if error.errno() == Errno::ENOENT => return Ok(()),
            Err(error) => return Err(error),
        };
        match path::unlink(dir, self.name(pod)) {
            Err(error) if error.errno() != Errno::ENOENT => Err(error),
            _ => Ok(()),
        }
    }
}

/// The sysctls of a pod's namespace.
pub(crate) fn pod_sysctls(options: &AttachOptions) -> Result<BTreeMap<String, String>> {
    let mut sysctls = default_sysctls();
    for (name, value) in &options.sysctls {
        // Only these are the namespace's; any other one would change the host.
        if !name.starts_with("net.") && !name.starts_with("net/") {
            let source = KernelError::new("sysctl", format!("{name:?}"), Errno::EINVAL);
            return Err(Error::Step {
                step: "set a sysctl of the pod's network".to_owned(),
                source,
            });
        }
        sysctls.insert(name.replace('/', "."), value.clone());
    }
    Ok(sysctls)
}

/// Runs `act` in a thread of its own that is in `namespace`: a thread that changed its namespace is of no use to
/// anybody afterwards.
#[cfg(test)]
pub(crate) fn inside<T: Send>(namespace: &OwnedFd, act: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            namespace::enter(namespace, Kind::Network).unwrap();
            act()
        });
        thread.join().unwrap()
    })
}

impl Making {
    /// Begins. The thread ends with its work: one that changed its namespace is of no use to anybody afterwards.
    pub(crate) fn begin(sysctls: BTreeMap<String, String>) -> Making {
        let thread = std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn(move || make(&sysctls));
        Making(thread)
    }

    /// Waits for it.
    fn finish(self) -> Result<Fresh, KernelError> {
        let thread = self.0;
        let thread = thread.map_err(|error| KernelError::from_io("clone", "netns thread", &error))?;
        match thread.join() {
            Ok(made) => made,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Moves this thread to a new namespace. The sockets stay in it: they belong to the namespace of the thread that opened
/// them.
fn make(sysctls: &BTreeMap<String, String>) -> Result<Fresh, KernelError> {
    namespace::unshare(Kinds::NETWORK)?;
    let namespace = namespace::open_own(Kind::Network)?;
    // /proc/sys/net is that of the thread that looks.
    let proc = Procfs::visible()?;
    for (name, value) in sysctls {
        proc.sysctl(name, value)?;
    }
    let mut rtnl = Rtnl::open()?;
    rtnl.loopback_up()?;
    Ok(Fresh {
        namespace,
        rtnl,
        events: LinkEvents::open()?,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::tests::{Book, INSTANCE};
    use crate::{AttachOptions, CniConfig, Error, Mode, Network};

    fn mode() -> Mode {
        Mode::Cni(CniConfig::default())
    }

    #[test]
    fn names_that_could_leave_their_place_are_refused() {
        let book: Arc<dyn crate::Book> = Arc::new(Book::default());
        for instance in ["", "../x", "012345678", "xyz"] {
            assert!(matches!(
                Network::new(instance, mode(), book.clone()),
                Err(Error::Name(_))
            ));
        }
        let network = Network::new(INSTANCE, mode(), book).unwrap();
        let long = "a".repeat(129);
        for pod in [
            "",
            "..",
            ".hidden",
            "a/b",
            "../../etc/passwd",
            "a\0b",
            "ä",
            long.as_str(),
        ] {
            assert!(
                matches!(
                    network.attach(pod, &AttachOptions::default()),
                    Err(Error::Name(_))
                ),
                "{pod:?}"
            );
            assert!(matches!(network.detach(pod), Err(Error::Name(_))), "{pod:?}");
        }
    }
}
