//! `/proc/<pid>/mountinfo`, parsed. Not for the hot path: one read costs as much as dozens of mounts.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use crate::procfs::Procfs;
use crate::{Errno, Error, Result};

/// The longest mountinfo that is read: some 100,000 mounts, the kernel's limit for one namespace.
const MAX_BYTES: usize = 64 * 1024 * 1024;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its id.
    pub id: u64,
    /// The id of the mount that it lies on.
    pub parent: u64,
    /// Major and minor number of the filesystem.
    pub device: (u32, u32),
    /// The directory of the filesystem that is mounted.
    pub root: PathBuf,
    /// Where, seen from the process's root.
    pub mount_point: PathBuf,
    /// Options of the mount: `rw,nosuid`.
    pub options: String,
    /// The peer group that it shares with.
    pub shared: Option<u32>,
    /// The peer group that it receives from.
    pub master: Option<u32>,
    /// It cannot be bound.
    pub unbindable: bool,
    /// The type of the filesystem.
    pub kind: String,
    /// Its source.
    pub source: OsString,
    /// Options of the filesystem.
    pub super_options: String,
}

impl Mount {
    /// Whether the options of the mount hold this word.
    #[must_use]
    pub fn has_option(&self, option: &str) -> bool {
        self.options.split(',').any(|word| word == option)
    }
}

/// The mounts of this process's namespace.
pub fn read_own(proc: &Procfs) -> Result<Vec<Mount>> {
    read(proc, "thread-self/mountinfo")
}

/// The mounts that a process sees.
pub fn read_of(proc: &Procfs, pid: i32) -> Result<Vec<Mount>> {
    read(proc, &format!("{pid}/mountinfo"))
}

/// Parses the text of a mountinfo file; a line that is none is an error that shows it.
pub fn parse(text: &[u8]) -> Result<Vec<Mount>> {
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            parse_line(line).ok_or_else(|| {
                Error::new(
                    "parse mountinfo",
                    String::from_utf8_lossy(line).into_owned(),
                    Errno::EINVAL,
                )
            })
        })
        .collect()
}

fn read(proc: &Procfs, name: &str) -> Result<Vec<Mount>> {
    parse(&proc.read(name, MAX_BYTES)?)
}

/// `36 35 98:0 /root /point rw,noatime shared:1 - ext4 /dev/sda rw`, with any number of tags before the dash.
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut next = || fields.next();
    let id = number(next()?)?;
    let parent = number(next()?)?;
    let device = std::str::from_utf8(next()?).ok()?.split_once(':')?;
    let device = (device.0.parse().ok()?, device.1.parse().ok()?);
    let root = PathBuf::from(unescape(next()?));
    let mount_point = PathBuf::from(unescape(next()?));
    let options = text(next()?);
    let (mut shared, mut master, mut unbindable) = (None, None, false);
    loop {
        let tag = std::str::from_utf8(next()?).ok()?;
        match tag.split_once(':') {
            Some(("shared", group)) => shared = Some(group.parse().ok()?),
            Some(("master", group)) => master = Some(group.parse().ok()?),
            None if tag == "unbindable" => unbindable = true,
            None if tag == "-" => break,
            // propagate_from, and what later kernels add.
            _ => {}
        }
    }
    let kind = text(next()?);
    let source = unescape(next()?);
    // Some filesystems show an empty option list.
    let super_options = text(next().unwrap_or_default());
    Some(Mount {
        id,
        parent,
        device,
        root,
        mount_point,
        options,
        shared,
        master,
        unbindable,
        kind,
        source,
        super_options,
    })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn text(field: &[u8]) -> String {
    unescape(field).to_string_lossy().into_owned()
}

/// Undoes the kernel's `\040` for space, tab, newline, backslash and hash.
fn unescape(field: &[u8]) -> OsString {
    if !field.contains(&b'\\') {
        return OsStr::from_bytes(field).to_owned();
    }
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        match rest {
            [
                b'\\',
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                tail @ ..,
            ] => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_every_field() {
        let line = br"36 35 98:0 /a\040b /mnt/x\134y rw,noatime shared:1 master:2 propagate_from:3 - ext3 /dev/root rw,errors=continue";
        let mount = &parse(line).unwrap()[0];
        assert_eq!((mount.id, mount.parent, mount.device), (36, 35, (98, 0)));
        assert_eq!(mount.root, PathBuf::from("/a b"));
        assert_eq!(mount.mount_point, PathBuf::from("/mnt/x\\y"));
        assert_eq!(
            (mount.shared, mount.master, mount.unbindable),
            (Some(1), Some(2), false)
        );
        assert_eq!(
            (mount.kind.as_str(), mount.super_options.as_str()),
            ("ext3", "rw,errors=continue")
        );
        assert!(mount.has_option("noatime") && !mount.has_option("no"));
    }

    #[test]
    fn what_is_no_mountinfo_is_an_error_that_shows_it() {
        for bad in [
            "garbage",
            "1 2 3:4 / /x rw",
            "1 2 34 / /x rw - ext4 a b",
            "x 2 3:4 / /x rw - ext4 a b",
        ] {
            let error = parse(bad.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(bad), "{error}");
        }
        assert_eq!(parse(b"").unwrap(), []);
    }

    #[test]
    fn our_own_has_a_root_and_a_proc() {
        let mounts = read_own(&Procfs::open().unwrap()).unwrap();
        assert!(mounts.iter().any(|mount| mount.mount_point.as_os_str() == "/"));
        assert!(mounts.iter().any(|mount| mount.kind == "proc"));
    }
}
