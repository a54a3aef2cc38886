//! The option words of a mount, split into what the kernel takes in different places.

use thiserror::Error;

/// `MOUNT_ATTR_*` bits, as `mount_setattr` and `fsmount` take them.
pub mod attr {
    /// Read-only.
    pub const RDONLY: u64 = 0x01;
    /// Set-user-id and file capabilities are ignored.
    pub const NOSUID: u64 = 0x02;
    /// Device files cannot be opened.
    pub const NODEV: u64 = 0x04;
    /// Nothing can be executed.
    pub const NOEXEC: u64 = 0x08;
    /// The field of the access-time modes; must be in the clear mask whenever one of them is set.
    pub const ATIME: u64 = 0x70;
    /// Access times are never updated.
    pub const NOATIME: u64 = 0x10;
    /// Access times are always updated.
    pub const STRICTATIME: u64 = 0x20;
    /// Access times of directories are never updated.
    pub const NODIRATIME: u64 = 0x80;
    /// Symbolic links are not followed.
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// `MS_*` bits, as `mount(2)` takes them.
pub mod ms {
    /// Read-only.
    pub const RDONLY: u64 = 0x1;
    /// Set-user-id and file capabilities are ignored.
    pub const NOSUID: u64 = 0x2;
    /// Device files cannot be opened.
    pub const NODEV: u64 = 0x4;
    /// Nothing can be executed.
    pub const NOEXEC: u64 = 0x8;
    /// Writes are synchronous.
    pub const SYNCHRONOUS: u64 = 0x10;
    /// Mandatory locks (no effect since Linux 5.15).
    pub const MANDLOCK: u64 = 0x40;
    /// Directory changes are synchronous.
    pub const DIRSYNC: u64 = 0x80;
    /// Symbolic links are not followed.
    pub const NOSYMFOLLOW: u64 = 0x100;
    /// Access times are never updated.
    pub const NOATIME: u64 = 0x400;
    /// Access times of directories are never updated.
    pub const NODIRATIME: u64 = 0x800;
    /// No kernel messages about the mount.
    pub const SILENT: u64 = 0x8000;
    /// Access times are updated now and then.
    pub const RELATIME: u64 = 0x20_0000;
    /// The inode version is counted.
    pub const I_VERSION: u64 = 0x80_0000;
    /// Access times are always updated.
    pub const STRICTATIME: u64 = 0x100_0000;
    /// Time stamps are kept in memory for a while.
    pub const LAZYTIME: u64 = 0x200_0000;
}

/// Attributes to set and to clear, ready for `mount_setattr`. Both zero: nothing was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attrs {
    /// Bits of [`attr`] to set.
    pub set: u64,
    /// Bits of [`attr`] to clear; holds all of [`attr::ATIME`] when an access-time mode was named.
    pub clear: u64,
}

impl Attrs {
    /// Whether no attribute was named.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.set == 0 && self.clear == 0
    }

    /// The same set of attributes as `mount(2)` flags.
    #[must_use]
    pub fn to_ms_flags(self) -> u64 {
        const PAIRS: [(u64, u64); 6] = [
            (attr::RDONLY, ms::RDONLY),
            (attr::NOSUID, ms::NOSUID),
            (attr::NODEV, ms::NODEV),
            (attr::NOEXEC, ms::NOEXEC),
            (attr::NODIRATIME, ms::NODIRATIME),
            (attr::NOSYMFOLLOW, ms::NOSYMFOLLOW),
        ];
        let flags = PAIRS
            .iter()
            .filter(|(a, _)| self.set & a != 0)
            .fold(0, |bits, (_, m)| bits | m);
        flags
            | match (self.clear & attr::ATIME, self.set & attr::ATIME) {
                (0, _) => 0,
                (_, attr::NOATIME) => ms::NOATIME,
                (_, attr::STRICTATIME) => ms::STRICTATIME,
                _ => ms::RELATIME,
            }
    }

    fn apply(&mut self, set: u64, clear: u64) {
        self.set = (self.set & !clear) | set;
        self.clear = (self.clear & !(set & !attr::ATIME)) | clear;
    }
}

/// Whether a mount is a bind of an existing tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bind {
    /// A file system of its own.
    #[default]
    No,
    /// One mount.
    Single,
    /// A mount and all below it.
    Recursive,
}

/// How mount events travel between a mount and its peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PropagationKind {
    /// Not at all.
    Private,
    /// Both ways.
    Shared,
    /// Towards this mount only.
    Slave,
    /// Not at all, and it cannot be bound elsewhere.
    Unbindable,
}

/// One propagation word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Propagation {
    /// The kind.
    pub kind: PropagationKind,
    /// For all mounts below as well.
    pub recursive: bool,
}

impl Propagation {
    /// The `MS_*` bit of the kind, as `mount_setattr` and `mount(2)` take it (`MS_REC` not included).
    #[must_use]
    pub const fn ms_flag(self) -> u64 {
        match self.kind {
            PropagationKind::Private => 1 << 18,
            PropagationKind::Slave => 1 << 19,
            PropagationKind::Shared => 1 << 20,
            PropagationKind::Unbindable => 1 << 17,
        }
    }

    /// Parses a word such as `rslave`.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        let (kind, recursive) = match word {
            "private" => (PropagationKind::Private, false),
            "rprivate" => (PropagationKind::Private, true),
            "shared" => (PropagationKind::Shared, false),
            "rshared" => (PropagationKind::Shared, true),
            "slave" => (PropagationKind::Slave, false),
            "rslave" => (PropagationKind::Slave, true),
            "unbindable" => (PropagationKind::Unbindable, false),
            "runbindable" => (PropagationKind::Unbindable, true),
            _ => return None,
        };
        Some(Self { kind, recursive })
    }
}

/// The options of one mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// Bind or not.
    pub bind: Bind,
    /// The word `remount` was given.
    pub remount: bool,
    /// Attributes of this mount.
    pub attrs: Attrs,
    /// Attributes of this mount and all below it (`rro`, `rnosuid` …).
    pub recursive_attrs: Attrs,
    /// Flags of the file system itself, as [`ms`] bits to set (`sync`, `dirsync`, `lazytime` …).
    pub fs_flags: u64,
    /// Propagation words, to be applied in order after the mount.
    pub propagation: Vec<Propagation>,
    /// The words that the file system itself must understand, in order.
    pub data: Vec<String>,
    /// Copy what the mount hides into it.
    pub tmpcopyup: bool,
}

impl MountOptions {
    /// The value of the last data word `name=value`.
    #[must_use]
    pub fn data_value(&self, name: &str) -> Option<&str> {
        self.data
            .iter()
            .rev()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    /// The data words as `mount(2)` takes them.
    #[must_use]
    pub fn data_string(&self) -> String {
        self.data.join(",")
    }

    /// The `mount(2)` flags of attributes and file system together.
    #[must_use]
    pub fn ms_flags(&self) -> u64 {
        self.attrs.to_ms_flags() | self.fs_flags
    }

    /// The flags of the file system by the names that `fsconfig` knows them by.
    pub fn fs_flag_names(&self) -> impl Iterator<Item = &'static str> {
        const NAMES: [(u64, &str); 6] = [
            (ms::SYNCHRONOUS, "sync"),
            (ms::DIRSYNC, "dirsync"),
            (ms::LAZYTIME, "lazytime"),
            (ms::MANDLOCK, "mand"),
            (ms::I_VERSION, "iversion"),
            (ms::SILENT, "silent"),
        ];
        let flags = self.fs_flags;
        NAMES
            .into_iter()
            .filter(move |(bit, _)| flags & bit != 0)
            .map(|(_, name)| name)
    }
}

/// Why an option word was refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum OptionError {
    /// The word asks for something that is not done yet.
    #[error("mount option {0:?} is not supported in this release")]
    Unsupported(String),
    /// The word cannot be handed to the kernel.
    #[error("mount option {0:?} holds a NUL byte")]
    Nul(String),
}

/// What one option word does.
#[derive(Clone, Copy)]
enum Effect {
    Nothing,
    Attr(u64, u64),
    RecursiveAttr(u64, u64),
    FsSet(u64),
    FsClear(u64),
    Bind(Bind),
    Remount,
    TmpCopyUp,
    Propagation,
    Unsupported,
}

use Effect::{Attr, FsClear, FsSet, RecursiveAttr};

/// All words that are not passed on to the file system, sorted: `features` lists them in this order.
const WORDS: &[(&str, Effect)] = &[
    ("async", FsClear(ms::SYNCHRONOUS)),
    ("atime", Attr(0, attr::ATIME)),
    ("bind", Effect::Bind(Bind::Single)),
    ("defaults", Effect::Nothing),
    ("dev", Attr(0, attr::NODEV)),
    ("diratime", Attr(0, attr::NODIRATIME)),
    ("dirsync", FsSet(ms::DIRSYNC)),
    ("exec", Attr(0, attr::NOEXEC)),
    ("idmap", Effect::Unsupported),
    ("iversion", FsSet(ms::I_VERSION)),
    ("lazytime", FsSet(ms::LAZYTIME)),
    ("loud", FsClear(ms::SILENT)),
    ("mand", FsSet(ms::MANDLOCK)),
    ("noatime", Attr(attr::NOATIME, attr::ATIME)),
    ("nodev", Attr(attr::NODEV, 0)),
    ("nodiratime", Attr(attr::NODIRATIME, 0)),
    ("noexec", Attr(attr::NOEXEC, 0)),
    ("noiversion", FsClear(ms::I_VERSION)),
    ("nolazytime", FsClear(ms::LAZYTIME)),
    ("nomand", FsClear(ms::MANDLOCK)),
    ("norelatime", Effect::Nothing),
    ("nostrictatime", Attr(0, attr::ATIME)),
    ("nosuid", Attr(attr::NOSUID, 0)),
    ("nosymfollow", Attr(attr::NOSYMFOLLOW, 0)),
    ("private", Effect::Propagation),
    ("ratime", RecursiveAttr(0, attr::ATIME)),
    ("rbind", Effect::Bind(Bind::Recursive)),
    ("rdev", RecursiveAttr(0, attr::NODEV)),
    ("rdiratime", RecursiveAttr(0, attr::NODIRATIME)),
    ("relatime", Attr(0, attr::ATIME)),
    ("remount", Effect::Remount),
    ("rexec", RecursiveAttr(0, attr::NOEXEC)),
    ("ridmap", Effect::Unsupported),
    ("rnoatime", RecursiveAttr(attr::NOATIME, attr::ATIME)),
    ("rnodev", RecursiveAttr(attr::NODEV, 0)),
    ("rnodiratime", RecursiveAttr(attr::NODIRATIME, 0)),
    ("rnoexec", RecursiveAttr(attr::NOEXEC, 0)),
    ("rnorelatime", Effect::Nothing),
    ("rnostrictatime", RecursiveAttr(0, attr::ATIME)),
    ("rnosuid", RecursiveAttr(attr::NOSUID, 0)),
    ("rnosymfollow", RecursiveAttr(attr::NOSYMFOLLOW, 0)),
    ("ro", Attr(attr::RDONLY, 0)),
    ("rprivate", Effect::Propagation),
    ("rrelatime", RecursiveAttr(0, attr::ATIME)),
    ("rro", RecursiveAttr(attr::RDONLY, 0)),
    ("rrw", RecursiveAttr(0, attr::RDONLY)),
    ("rshared", Effect::Propagation),
    ("rslave", Effect::Propagation),
    ("rstrictatime", RecursiveAttr(attr::STRICTATIME, attr::ATIME)),
    ("rsuid", RecursiveAttr(0, attr::NOSUID)),
    ("rsymfollow", RecursiveAttr(0, attr::NOSYMFOLLOW)),
    ("runbindable", Effect::Propagation),
    ("rw", Attr(0, attr::RDONLY)),
    ("shared", Effect::Propagation),
    ("silent", FsSet(ms::SILENT)),
    ("slave", Effect::Propagation),
    ("strictatime", Attr(attr::STRICTATIME, attr::ATIME)),
    ("suid", Attr(0, attr::NOSUID)),
    ("symfollow", Attr(0, attr::NOSYMFOLLOW)),
    ("sync", FsSet(ms::SYNCHRONOUS)),
    ("tmpcopyup", Effect::TmpCopyUp),
    ("unbindable", Effect::Propagation),
];

/// Splits option words. Of words that contradict each other the last wins; a word that is not known here is data
/// for the file system.
///
/// # Errors
/// A word that is known but not done in this release, or one with a NUL byte.
pub fn parse_mount_options<'a>(
    words: impl IntoIterator<Item = &'a str>,
) -> Result<MountOptions, OptionError> {
    let mut options = MountOptions::default();
    for word in words {
        if word.contains('\0') {
            return Err(OptionError::Nul(word.to_owned()));
        }
        let Ok(at) = WORDS.binary_search_by(|(known, _)| (*known).cmp(word)) else {
            // Both forms of the id-mapped option carry a value after "=" in one dialect.
            if word.starts_with("idmap=") || word.starts_with("ridmap=") {
                return Err(OptionError::Unsupported(word.to_owned()));
            }
            if !word.is_empty() {
                options.data.push(word.to_owned());
            }
            continue;
        };
        match WORDS[at].1 {
            Effect::Nothing => {}
            Attr(set, clear) => options.attrs.apply(set, clear),
            RecursiveAttr(set, clear) => options.recursive_attrs.apply(set, clear),
            FsSet(bit) => options.fs_flags |= bit,
            FsClear(bit) => options.fs_flags &= !bit,
            Effect::Bind(bind) => options.bind = bind,
            Effect::Remount => options.remount = true,
            Effect::TmpCopyUp => options.tmpcopyup = true,
            Effect::Propagation => options.propagation.extend(Propagation::parse(word)),
            Effect::Unsupported => return Err(OptionError::Unsupported(word.to_owned())),
        }
    }
    Ok(options)
}

/// The words that are understood and done, sorted.
pub fn supported_mount_options() -> impl Iterator<Item = &'static str> {
    WORDS
        .iter()
        .filter(|(_, effect)| !matches!(effect, Effect::Unsupported))
        .map(|(word, _)| *word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> MountOptions {
        parse_mount_options(words.iter().copied()).unwrap()
    }

    #[test]
    fn the_table_is_sorted_and_every_propagation_word_parses() {
        assert!(WORDS.is_sorted_by_key(|(word, _)| *word));
        for (word, effect) in WORDS {
            assert_eq!(
                Propagation::parse(word).is_some(),
                matches!(effect, Effect::Propagation),
                "{word}"
            );
        }
    }

    #[test]
    fn words_go_where_they_belong() {
        let options = parse(&[
            "nosuid",
            "strictatime",
            "mode=755",
            "size=65536k",
            "rslave",
            "sync",
        ]);
        assert_eq!(
            options.attrs,
            Attrs {
                set: attr::NOSUID | attr::STRICTATIME,
                clear: attr::ATIME
            }
        );
        assert_eq!(options.ms_flags(), ms::NOSUID | ms::STRICTATIME | ms::SYNCHRONOUS);
        assert_eq!(options.data, ["mode=755", "size=65536k"]);
        assert_eq!(options.data_value("mode"), Some("755"));
        assert_eq!(options.data_value("mod"), None);
        assert_eq!(options.data_string(), "mode=755,size=65536k");
        assert_eq!(options.fs_flag_names().collect::<Vec<_>>(), ["sync"]);
        assert_eq!(
            options.propagation,
            [Propagation {
                kind: PropagationKind::Slave,
                recursive: true
            }]
        );
        assert_eq!(options.bind, Bind::No);
    }

    #[test]
    fn the_last_of_two_contradicting_words_wins() {
        assert_eq!(
            parse(&["ro", "rw"]).attrs,
            Attrs {
                set: 0,
                clear: attr::RDONLY
            }
        );
        assert_eq!(
            parse(&["rw", "ro"]).attrs,
            Attrs {
                set: attr::RDONLY,
                clear: 0
            }
        );
        assert_eq!(
            parse(&["noatime", "strictatime"]).attrs.to_ms_flags(),
            ms::STRICTATIME
        );
        assert_eq!(
            parse(&["noatime", "relatime"]).attrs,
            Attrs {
                set: 0,
                clear: attr::ATIME
            }
        );
        assert_eq!(parse(&["noatime", "relatime"]).attrs.to_ms_flags(), ms::RELATIME);
        assert_eq!(parse(&["sync", "async"]).fs_flags, 0);
    }

    #[test]
    fn recursive_words_do_not_touch_the_plain_attributes() {
        let options = parse(&["rbind", "rro", "rnosuid", "rnoatime"]);
        assert_eq!(options.bind, Bind::Recursive);
        assert!(options.attrs.is_empty());
        assert_eq!(
            options.recursive_attrs,
            Attrs {
                set: attr::RDONLY | attr::NOSUID | attr::NOATIME,
                clear: attr::ATIME
            }
        );
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        for word in ["idmap", "ridmap", "idmap=uids=0-1000-1"] {
            assert_eq!(
                parse_mount_options([word]),
                Err(OptionError::Unsupported(word.to_owned()))
            );
        }
        assert!(!supported_mount_options().any(|word| word.contains("idmap")));
        assert_eq!(
            parse_mount_options(["a\0b"]),
            Err(OptionError::Nul("a\0b".to_owned()))
        );
    }
}
