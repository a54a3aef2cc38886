//! Deletions: how a layer says that something below is gone.
//!
//! In an archive it is a name, `.wh.x` for `x` and `.wh..wh..opq` for everything in a directory (the aufs form that the
//! OCI image specification took over). On the disk it is what overlayfs reads: a character device 0:0, and an
//! extended attribute of the directory.

/// What precedes the name that is deleted.
const PREFIX: &[u8] = b".wh.";
/// What precedes names of aufs's own.
const AUFS: &[u8] = b".wh..wh.";
/// The entry that hides everything of lower layers in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What the last component of an entry's path means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning<'a> {
    /// An entry like any other.
    Entry,
    /// This name, of lower layers, is deleted.
    Deletes(&'a [u8]),
    /// All of lower layers in this directory is deleted.
    Opaque,
    /// Bookkeeping of aufs that no image should carry.
    Ignored,
    /// A deletion of nothing, of `.` or of `..`.
    Malformed,
}

/// What a name means, whatever the type of its entry.
pub(crate) fn meaning(name: &[u8]) -> Meaning<'_> {
    match name.strip_prefix(PREFIX) {
        None => Meaning::Entry,
        Some(_) if name == OPAQUE => Meaning::Opaque,
        Some(_) if name.starts_with(AUFS) => Meaning::Ignored,
        Some(b"" | b"." | b"..") => Meaning::Malformed,
        Some(deleted) => Meaning::Deletes(deleted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_the_specification_says() {
        assert_eq!(meaning(b"file"), Meaning::Entry);
        assert_eq!(meaning(b".whx"), Meaning::Entry);
        assert_eq!(meaning(b".wh.file"), Meaning::Deletes(b"file"));
        assert_eq!(meaning(b".wh..hidden"), Meaning::Deletes(b".hidden"));
        assert_eq!(meaning(b".wh..wh..opq"), Meaning::Opaque);
        for ignored in [
            &b".wh..wh.aufs"[..],
            b".wh..wh.plnk",
            b".wh..wh.orph",
            b".wh..wh.",
        ] {
            assert_eq!(meaning(ignored), Meaning::Ignored);
        }
        for malformed in [&b".wh."[..], b".wh..", b".wh..."] {
            assert_eq!(meaning(malformed), Meaning::Malformed);
        }
    }
}
