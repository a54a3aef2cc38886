//! `tmpcopyup`: what a tmpfs is about to hide is copied into it.

use std::fs::File;
use std::os::fd::OwnedFd;

use coracle_kernel::path::{self, Kind, Node, OFlags, Stat};
use coracle_kernel::{Errno, Error, Result};

/// Directories inside each other that are copied; deeper is an error, since each level holds two descriptors.
const MAX_DEPTH: usize = 64;
/// Entries of one directory that are copied.
const MAX_ENTRIES: usize = 100_000;

/// Copies the content of one directory into another, with modes, owners and links. The tmpfs's size bounds the bytes.
pub(super) fn copy(from: &OwnedFd, to: &OwnedFd) -> Result<()> {
    copy_directory(from, to, 0)
}

fn copy_directory(from: &OwnedFd, to: &OwnedFd, depth: usize) -> Result<()> {
    if depth == MAX_DEPTH {
        return Err(Error::new(
            "copy",
            format!("{MAX_DEPTH} directories deep"),
            Errno::ELOOP,
        ));
    }
    for (name, _) in path::list_dir(from, MAX_ENTRIES)? {
        let source = path::open_at(from, &name, OFlags::PATH)?;
        let stat = path::stat(&source)?;
        match stat.kind {
            Kind::Directory => {
                path::make_dir(to, &name, 0o700)?;
                let made = path::open_at(to, &name, OFlags::RDONLY | OFlags::DIRECTORY)?;
                copy_directory(&source, &made, depth + 1)?;
                give(&made, stat)?;
            }
            Kind::File => {
                // Opened by name once more: `source` cannot be read. It is an ordinary file or an error.
                let reading = path::open_at(from, &name, OFlags::RDONLY | OFlags::NONBLOCK)?;
                let made = File::from(path::create_file_at(to, &name, 0o600)?);
                std::io::copy(&mut File::from(reading), &mut &made)
                    .map_err(|error| Error::from_io("copy", format!("{name:?}"), &error))?;
                give(&made.into(), stat)?;
            }
            Kind::Symlink => {
                path::make_symlink(path::read_link(&source)?, to, &name)?;
                let made = path::open_at(to, &name, OFlags::PATH)?;
                path::chown(made, stat.uid, stat.gid)?;
            }
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                let node = match stat.kind {
                    Kind::CharDevice => Node::Char(stat.rdev.0, stat.rdev.1),
                    Kind::BlockDevice => Node::Block(stat.rdev.0, stat.rdev.1),
                    _ => Node::Fifo,
                };
                let made = path::make_node(to, &name, node, stat.mode)?;
                path::chown(made, stat.uid, stat.gid)?;
            }
            // A socket without the process behind it is nothing.
            Kind::Socket | Kind::Unknown => {}
        }
    }
    Ok(())
}

/// Owner first: changing it clears set-id bits.
fn give(made: &OwnedFd, stat: Stat) -> Result<()> {
    path::chown(made, stat.uid, stat.gid)?;
    path::chmod(made, stat.mode)
}
