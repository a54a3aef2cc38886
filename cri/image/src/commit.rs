//! The commit step: what an unpack worker could not do, done by descriptor, and then the layer becomes whole.
//!
//! 1. Hard links whose target lies in a lower layer: the target is copied up, as overlayfs itself would.
//! 2. Directories that the archive does not mention get mode, owner, times and attributes of the lower ones, which they
//!    would otherwise hide.
//! 3. Opaque directories are marked (`trusted.overlay.opaque` needs a capability that no worker has).
//! 4. One syncfs for the whole layer, then its `meta`.
//!
//! The paths come from the worker, so they are resolved beneath the layer without following any link: a worker that was
//! taken over can spoil its own layer and nothing else.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use coracle_kernel::path::{self, Kind, Node, OFlags, Stat};
use coracle_kernel::{Errno, Error as KernelError, file};

use crate::digest::Digest;
use crate::error::ImageError;
use crate::layers::{Half, LayerKey, Meta, Pin};
use crate::report::{LayerPath, Report};
use crate::unpack::keeps_xattr;

/// Extended attribute of a directory that hides everything of the same name below.
const OPAQUE: &str = "trusted.overlay.opaque";

/// Makes a layer whole. `below` is the folder right below it and the roots of all lower layers, the highest first; a
/// layer that stands for itself needs none.
pub(crate) fn settle(
    half: Half,
    report: &Report,
    chain_id: &Digest,
    below: Option<(u64, &[OwnedFd])>,
) -> Result<Pin, ImageError> {
    let lowers = below.map_or(&[][..], |(_, lowers)| lowers);
    let mut layer = Settling {
        fs: half.fs.as_fd(),
        lowers,
        copied_bytes: 0,
        copied_inodes: 0,
    };
    let fail = |path: &LayerPath| {
        let path = String::from_utf8_lossy(&path.0).into_owned();
        move |source| ImageError::Settle { path, source }
    };
    // Links first: they make directories and change the times of those that are there.
    for (name, target) in &report.links {
        layer.link(name, target).map_err(fail(name))?;
    }
    for path in &report.implied {
        layer.take_attributes(path).map_err(fail(path))?;
    }
    for path in &report.opaque {
        layer.mark_opaque(path).map_err(fail(path))?;
    }
    let (bytes, inodes) = (
        report.bytes + layer.copied_bytes,
        report.inodes + layer.copied_inodes,
    );
    file::sync_filesystem(&half.fs).map_err(ImageError::Sync)?;
    let key = match report.is_self_contained() {
        true => LayerKey::Diff(report.diff_id.clone()),
        false => LayerKey::Chain(chain_id.clone()),
    };
    let mut meta = Meta::new(
        key,
        report.diff_id.clone(),
        below.map(|(parent, _)| parent),
        bytes,
        inodes,
    );
    meta.sets_root = report.sets_root;
    Ok(half.complete(meta)?)
}

/// A layer being settled.
struct Settling<'a, Fd: AsFd> {
    fs: Fd,
    /// Roots of the lower layers, highest first.
    lowers: &'a [OwnedFd],
    copied_bytes: u64,
    copied_inodes: u64,
}

/// What the lower layers have at a path.
enum Lower {
    Nothing,
    /// The directory that holds it, and what it is.
    Entry(OwnedFd, Stat),
}

impl<Fd: AsFd> Settling<'_, Fd> {
    /// Gives an implied directory the attributes of the lower one.
    fn take_attributes(&self, path: &LayerPath) -> Result<(), KernelError> {
        let dir = file::open_dir_beneath(&self.fs, os(&path.0))?;
        match self.find(path)? {
            Lower::Entry(parent, stat) if stat.kind == Kind::Directory => {
                let lower = path::open_at(&parent, os(last(path)), OFlags::RDONLY | OFlags::DIRECTORY)?;
                copy_attributes(&lower, &stat, &dir)
            }
            // Nothing below, or something else that this directory replaces: what it was made with stands.
            _ => Ok(()),
        }
    }

    fn mark_opaque(&self, path: &LayerPath) -> Result<(), KernelError> {
        let dir = file::open_dir_beneath(&self.fs, os(&path.0))?;
        file::set_xattr(&dir, OsStr::new(OPAQUE), b"y")
    }

    /// Links `name` to `target`, which is copied up first where only a lower layer has it.
    fn link(&mut self, name: &LayerPath, target: &LayerPath) -> Result<(), KernelError> {
        let target_dir = self.parent_of(target)?;
        let found = match path::stat_at(&target_dir, os(last(target))) {
            Err(error) if error.errno() == Errno::ENOENT => {
                self.copy_up(target, &target_dir)?;
                path::stat_at(&target_dir, os(last(target)))?
            }
            other => other?,
        };
        let refuse = |errno| Err(KernelError::new("linkat", format!("{:?}", os(&target.0)), errno));
        if found.kind == Kind::Directory {
            return refuse(Errno::EISDIR);
        }
        if is_whiteout(&found) {
            return refuse(Errno::ENOENT);
        }
        let dir = self.parent_of(name)?;
        let time = file::modified(&dir)?;
        file::link(&target_dir, os(last(target)), &dir, os(last(name)))?;
        file::set_times(&dir, time)
    }

    /// The directory of a path in this layer; where it is missing, it is made like the lower one.
    fn parent_of(&mut self, path: &LayerPath) -> Result<OwnedFd, KernelError> {
        let mut dir = file::open_dir_beneath(&self.fs, OsStr::new("."))?;
        let names: Vec<&[u8]> = path.components().collect();
        for depth in 1..names.len() {
            let name = os(names[depth - 1]);
            let time = match path::stat_at(&dir, name) {
                Err(error) if error.errno() == Errno::ENOENT => Some(file::modified(&dir)?),
                _ => None,
            };
            if let Some(time) = time {
                path::make_dir(&dir, name, 0o755)?;
                file::set_times(&dir, time)?;
                self.copied_inodes += 1;
                self.take_attributes(&LayerPath(names[..depth].join(&b'/')))?;
            }
            dir = path::open_at(&dir, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
        }
        Ok(dir)
    }

    /// Copies a file, symlink or node of a lower layer into `dir` of this one, under its own name.
    fn copy_up(&mut self, path: &LayerPath, dir: &OwnedFd) -> Result<(), KernelError> {
        let name = os(last(path));
        let Lower::Entry(parent, stat) = self.find(path)? else {
            let args = format!("{:?}, in no layer", os(&path.0));
            return Err(KernelError::new("linkat", args, Errno::ENOENT));
        };
        let dir_time = file::modified(dir)?;
        let time = file::modified_at(&parent, name)?;
        let mode = stat.mode & 0o777;
        match stat.kind {
            Kind::File => {
                let from = path::open_at(&parent, name, OFlags::RDONLY)?;
                let to = path::create_file_at(dir, name, 0o600)?;
                let mut to = std::fs::File::from(to);
                let mut from = std::fs::File::from(from);
                io::copy(&mut from, &mut to)
                    .map_err(|error| KernelError::from_io("copy", format!("{:?}", os(&path.0)), &error))?;
                copy_attributes(&OwnedFd::from(from), &stat, &OwnedFd::from(to))?;
            }
            Kind::Symlink => {
                let target = path::read_link_at(&parent, name)?;
                path::make_symlink(target, dir, name)?;
            }
            Kind::CharDevice => drop(path::make_node(
                dir,
                name,
                Node::Char(stat.rdev.0, stat.rdev.1),
                mode,
            )?),
            Kind::BlockDevice => drop(path::make_node(
                dir,
                name,
                Node::Block(stat.rdev.0, stat.rdev.1),
                mode,
            )?),
            Kind::Fifo => drop(path::make_node(dir, name, Node::Fifo, mode)?),
            // A hard link to a directory is refused by the caller; sockets are never unpacked.
            Kind::Directory | Kind::Socket | Kind::Unknown => {
                return Err(KernelError::new(
                    "linkat",
                    format!("{:?}", os(&path.0)),
                    Errno::EISDIR,
                ));
            }
        }
        if stat.kind != Kind::File {
            file::set_owner_at(dir, name, stat.uid, stat.gid)?;
            file::set_times_at(dir, name, time)?;
        }
        self.copied_bytes += stat.size.next_multiple_of(4096);
        self.copied_inodes += 1;
        file::set_times(dir, dir_time)
    }

    /// Looks a path up in the lower layers as overlayfs would: from the highest, stopping at what hides the rest.
    fn find(&self, path: &LayerPath) -> Result<Lower, KernelError> {
        let names: Vec<&[u8]> = path.components().collect();
        for lower in self.lowers {
            let mut dir = file::open_dir_beneath(lower, OsStr::new("."))?;
            let mut opaque = false;
            for (depth, name) in names.iter().enumerate() {
                let stat = match path::stat_at(&dir, os(name)) {
                    Ok(stat) => stat,
                    Err(error) if error.errno() == Errno::ENOENT => break,
                    Err(error) => return Err(error),
                };
                if is_whiteout(&stat) {
                    return Ok(Lower::Nothing);
                }
                if depth + 1 == names.len() {
                    return Ok(Lower::Entry(dir, stat));
                }
                if stat.kind != Kind::Directory {
                    return Ok(Lower::Nothing);
                }
                dir = path::open_at(&dir, os(name), OFlags::RDONLY | OFlags::DIRECTORY)?;
                opaque |= file::get_xattr(&dir, OsStr::new(OPAQUE))?.is_some();
            }
            if opaque {
                return Ok(Lower::Nothing);
            }
        }
        Ok(Lower::Nothing)
    }
}

/// Owner, mode, attributes and times of one open file or directory to another.
fn copy_attributes(from: &OwnedFd, stat: &Stat, to: &OwnedFd) -> Result<(), KernelError> {
    path::chown(to, stat.uid, stat.gid)?;
    path::chmod(to, stat.mode)?;
    for name in file::list_xattrs(from)? {
        if keeps_xattr(&name)
            && let Some(value) = file::get_xattr(from, os(&name))?
        {
            file::set_xattr(to, os(&name), &value)?;
        }
    }
    file::set_times(to, file::modified(from)?)
}

fn is_whiteout(stat: &Stat) -> bool {
    stat.kind == Kind::CharDevice && stat.rdev == (0, 0)
}

fn last(path: &LayerPath) -> &[u8] {
    path.components().last().unwrap_or_default()
}

fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}
