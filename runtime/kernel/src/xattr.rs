//! Extended attributes of what a descriptor refers to.
//!
//! `O_PATH` descriptors and symlinks are reached through `/proc/self/fd`, since the f*xattr calls refuse them.

use std::os::fd::AsFd;

use rustix::fs::XattrFlags;

use crate::fd::{proc_path, show};
use crate::{Errno, Error, Result};

/// The largest value of an attribute (`XATTR_SIZE_MAX`).
pub const MAX_VALUE_BYTES: usize = 64 * 1024;

/// Reads an attribute; `None` where it is not there or the filesystem has none.
pub fn get(fd: impl AsFd, name: &str) -> Result<Option<Vec<u8>>> {
    let path = proc_path(&fd);
    let mut value = vec![0; 256];
    loop {
        match rustix::fs::getxattr(path.as_c_str(), name, &mut value[..]) {
            Ok(length) => {
                value.truncate(length);
                return Ok(Some(value));
            }
            Err(rustix::io::Errno::RANGE) if value.len() < MAX_VALUE_BYTES => {
                value.resize(MAX_VALUE_BYTES, 0);
            }
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => return Ok(None),
            Err(errno) => return Err(failed("getxattr", &fd, name, errno)),
        }
    }
}

/// Sets an attribute, made or replaced.
pub fn set(fd: impl AsFd, name: &str, value: &[u8]) -> Result<()> {
    let path = proc_path(&fd);
    rustix::fs::setxattr(path.as_c_str(), name, value, XattrFlags::empty())
        .map_err(|errno| failed("setxattr", &fd, name, errno))
}

/// Removes an attribute; one that is not there is fine.
pub fn remove(fd: impl AsFd, name: &str) -> Result<()> {
    let path = proc_path(&fd);
    match rustix::fs::removexattr(path.as_c_str(), name) {
        Err(rustix::io::Errno::NODATA) => Ok(()),
        other => other.map_err(|errno| failed("removexattr", &fd, name, errno)),
    }
}

/// The names of all attributes.
pub fn list(fd: impl AsFd) -> Result<Vec<String>> {
    let path = proc_path(&fd);
    let mut names = vec![0; MAX_VALUE_BYTES];
    let length = rustix::fs::listxattr(path.as_c_str(), &mut names[..])
        .map_err(|errno| Error::new("listxattr", show(&fd), errno.into()))?;
    names.truncate(length);
    Ok(names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect())
}

fn failed(call: &'static str, fd: &impl AsFd, name: &str, errno: rustix::io::Errno) -> Error {
    Error::new(call, format!("{}, {name}", show(fd)), Errno::from(errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_set_read_listed_and_removed() {
        let dir = crate::path::open(
            "/var/tmp",
            crate::path::OFlags::TMPFILE | crate::path::OFlags::RDWR,
        )
        .unwrap();
        // A tmpfs before Linux 6.6 knows no attributes of users.
        let name = if crate::creds::effective_uid() == 0 {
            "trusted.coracle"
        } else {
            "user.coracle"
        };
        assert_eq!(get(&dir, name).unwrap(), None);
        set(&dir, name, &[7; 1000]).unwrap();
        assert_eq!(get(&dir, name).unwrap(), Some(vec![7; 1000]));
        assert_eq!(list(&dir).unwrap(), [name]);
        remove(&dir, name).unwrap();
        remove(&dir, name).unwrap();
        assert_eq!(get(&dir, name).unwrap(), None);
    }
}
