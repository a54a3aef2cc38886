//! The container's root: built in its own mount namespace by the init, step by step, through descriptors alone.
//!
//! ```text
//! attach          propagation of the old tree; what is lent and the root mount at their places
//! make_mounts     the mounts of the configuration, in their order
//! make_devices    nodes and links below /dev
//!                 … createRuntime and createContainer hooks run here …
//! enter           pivot_root, or MS_MOVE and chroot
//! bind_console    the terminal as /dev/console
//! make_directory  the working directory, where missing
//! seal            what is read-only becomes so, what is hidden gets covered
//! ```
//!
//! A path of the image or of the configuration is resolved once, below the root's descriptor
//! ([`coracle_kernel::path::Root`]); what came out is checked, and then mounted upon or written to as that descriptor.
//! So a symlink of the image leads nowhere else, and swapping one at the right moment changes nothing.

mod bind;
mod cgroupfs;
mod copyup;
mod devices;
mod error;
mod finish;
mod mask;
mod mounts;
mod special;
mod stage;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_kernel::creds;
use coracle_kernel::mount::{self, Depth};
use coracle_kernel::mount_attr::{self, Propagation};
use coracle_kernel::path::{self, OFlags, Root, Stat};
use coracle_spec::{Config, PropagationKind};

use error::Doing;
pub(crate) use error::{Error, Result};
pub(crate) use stage::gather;

/// Where the root filesystem comes from.
#[derive(Debug)]
pub(crate) enum Source {
    /// It lies at this absolute path of the host.
    Path,
    /// A mount that is attached nowhere yet; it is attached at the path.
    Detached(OwnedFd),
    /// It was gathered with the sources of binds by [`gather`], and we stand there.
    Staged,
}

/// A mount that is attached nowhere, and where in the host's tree the container's binds find it.
#[derive(Debug)]
pub struct Lent {
    /// The mount.
    pub mount: OwnedFd,
    /// A directory, absolute.
    pub at: PathBuf,
}

/// How the init makes the root its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// pivot_root(2): nothing of the host's tree stays.
    Pivot,
    /// MS_MOVE and chroot(2), where the host's root is an initramfs.
    Move,
}

/// What the steps need beyond the configuration.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    /// The bundle, absolute: relative sources of binds lie below it.
    pub(crate) bundle: &'a Path,
    /// The root's place in the host's tree, absolute.
    pub(crate) root: &'a Path,
    /// What is put there.
    pub(crate) source: Source,
    /// What the container's binds find besides the host's mounts.
    pub(crate) lent: Vec<Lent>,
    /// How it is entered.
    pub(crate) entry: Entry,
}

/// A root under construction. Lives in the init, from the moment it has its namespaces until execve.
#[derive(Debug)]
pub(crate) struct Rootfs<'a> {
    config: &'a Config,
    bundle: &'a Path,
    entry: Entry,
    /// `/` of the host, for leaving it.
    old_root: OwnedFd,
    /// No mount of the old tree passes an unmount on to the host.
    is_cut_off: bool,
    /// The mount that becomes `/`.
    root: OwnedFd,
    /// What that is, to know it again.
    root_stat: Stat,
    /// Where the sources of binds were gathered.
    stage: Option<OwnedFd>,
    /// Binds that were taken before the tree was cut off from the host's, by their index.
    taken: BTreeMap<usize, OwnedFd>,
    /// Mounts that are filled first and made read-only by [`Rootfs::seal`].
    read_only_later: Vec<OwnedFd>,
}

impl<'a> Rootfs<'a> {
    /// Cuts the mount namespace off from the host's and attaches the root at its place.
    ///
    /// The umask is 0 from here on, since modes are meant as given; the init sets the process's own afterwards.
    pub(crate) fn attach(config: &'a Config, context: Context<'a>) -> Result<Rootfs<'a>> {
        creds::set_umask(0);
        let stage = match context.source {
            Source::Staged => Some(stage::open()?),
            Source::Path | Source::Detached(_) => None,
        };
        let old_root = path::open_dir("/").doing("open the root of the host", || "/".into())?;
        let wanted = config.rootfs_propagation.unwrap_or(coracle_spec::Propagation {
            kind: PropagationKind::Slave,
            recursive: true,
        });
        if wanted.kind == PropagationKind::Private && context.entry == Entry::Move {
            return Err(Error::refused(
                "rootfsPropagation",
                "private is impossible without pivot_root",
            ));
        }
        mount_attr::set_propagation(&old_root, convert(wanted.kind), wanted.recursive)
            .doing("set the propagation of", || "/".into())?;
        let place = match &stage {
            Some(stage) => coracle_kernel::fd::dup(stage).doing("open the root", || show(context.root))?,
            None => open_place(context.root, "open the root")?,
        };
        // "/" alone, or shared: then mounts of the host's tree may still have peers outside.
        let is_cut_off = wanted.recursive && wanted.kind != PropagationKind::Shared;
        let taken = if is_cut_off || stage.is_some() {
            BTreeMap::new()
        } else {
            bind::take(config, &context)?
        };
        if !is_cut_off {
            // pivot_root refuses a shared parent, and what is mounted below would appear on the host.
            make_parent_private(&place, context.root)?;
        }
        attach_lent(&context.lent, is_cut_off)?;
        let root = match (context.source, &stage) {
            (Source::Detached(mount), None) => mount,
            (_, Some(stage)) => stage::root(stage)?,
            (Source::Path | Source::Staged, None) => {
                mount::clone_tree(&place, Depth::Recursive).doing("bind the root", || show(context.root))?
            }
        };
        mount::attach(&root, &place).doing("attach the root at", || show(context.root))?;
        let root_stat = path::stat(&root).doing("look at the root", || show(context.root))?;
        Ok(Rootfs {
            config,
            bundle: context.bundle,
            entry: context.entry,
            old_root,
            is_cut_off,
            root,
            root_stat,
            stage,
            taken,
            read_only_later: Vec::new(),
        })
    }

    /// Makes the mounts of the configuration, each seeing what the ones before it made.
    pub(crate) fn make_mounts(&mut self) -> Result<()> {
        let config = self.config;
        config
            .mounts
            .iter()
            .try_for_each(|entry| mounts::make(self, entry))
    }

    /// Makes nodes and links below `/dev`, unless the configuration binds a `/dev` of its own choice.
    pub(crate) fn make_devices(&self) -> Result<()> {
        devices::make(self)
    }

    /// Binds the terminal as `/dev/console`. `slave` comes from the container's own devpts.
    pub(crate) fn bind_console(&self, slave: impl AsFd) -> Result<()> {
        devices::bind_console(self, slave)
    }

    /// Makes the root this process's `/`, with `/` as current directory.
    pub(crate) fn enter(&self) -> Result<()> {
        finish::enter(self)
    }

    /// Makes a directory and its parents, mode 0755, where missing: the working directory.
    pub(crate) fn make_directory(&self, directory: &Path) -> Result<()> {
        self.root()
            .mkdir_all(directory, 0o755)
            .doing("make the directory", || show(directory))
            .map(drop)
    }

    /// Read-only mounts and paths, masked paths, and last the read-only root.
    pub(crate) fn seal(&self) -> Result<()> {
        finish::seal(self)
    }

    /// The root mount.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// For resolving paths inside.
    fn root(&self) -> Root<'_> {
        Root::new(&self.root)
    }
}

/// A place in the host's tree where something is attached; the bundle must not choose another one by a symlink.
fn open_place(place: &Path, step: &'static str) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    path::open(place, flags).doing(step, || show(place))
}

/// Attaches what is lent at its places, for this namespace alone.
fn attach_lent(lent: &[Lent], is_cut_off: bool) -> Result<()> {
    for Lent { mount, at } in lent {
        let place = open_place(at, "open the place of a pod's mount")?;
        if !is_cut_off {
            make_parent_private(&place, at)?;
        }
        mount::attach(mount, &place).doing("attach at", || show(at))?;
    }
    Ok(())
}

/// Makes the mount that `place` lies on private: nothing made on it leaves this namespace.
fn make_parent_private(place: &OwnedFd, shown: &Path) -> Result<()> {
    let failed = |result: coracle_kernel::Result<OwnedFd>| result.doing("walk up from", || show(shown));
    let mut directory = failed(coracle_kernel::fd::dup(place))?;
    loop {
        let here = path::mount_place(&directory).doing("find the mount of", || show(shown))?;
        if here.is_root {
            return mount_attr::set_propagation(&directory, Propagation::Private, false)
                .doing("make private the mount of", || show(shown));
        }
        directory = failed(path::open_parent(&directory))?;
    }
}

fn convert(kind: PropagationKind) -> Propagation {
    match kind {
        PropagationKind::Private => Propagation::Private,
        PropagationKind::Shared => Propagation::Shared,
        PropagationKind::Slave => Propagation::Slave,
        PropagationKind::Unbindable => Propagation::Unbindable,
    }
}

fn show(path: &Path) -> String {
    format!("{path:?}")
}
