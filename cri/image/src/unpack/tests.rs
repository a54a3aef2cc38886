//! Layers of every kind, right and wrong, unpacked beside something that must stay as it is.

mod compared;
mod links;

use super::*;
use crate::test_archive::{Archive, Header};
use coracle_kernel::{Errno, creds, seccomp, syscall};
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path as StdPath, PathBuf};

/// A layer unpacked into a directory that has a sentinel beside it.
struct Layer {
    top: tempfile::TempDir,
    applied: Applied,
}

impl Layer {
    fn path(&self, name: &str) -> PathBuf {
        self.top.path().join("fs").join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        walk(&self.path(""), &mut |path| {
            names.push(
                path.strip_prefix(self.path(""))
                    .unwrap()
                    .to_string_lossy()
                    .into_owned(),
            );
        });
        names.sort();
        names
    }

    fn paths(list: &[LayerPath]) -> Vec<String> {
        list.iter()
            .map(|path| String::from_utf8_lossy(&path.0).into_owned())
            .collect()
    }

    fn is_whiteout(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path(name))
            .is_ok_and(|stat| stat.file_type().is_char_device() && stat.rdev() == 0)
    }
}

fn walk(dir: &StdPath, visit: &mut dyn FnMut(&StdPath)) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        visit(&path);
        if path.symlink_metadata().unwrap().is_dir() {
            walk(&path, visit);
        }
    }
}

/// Owners and nodes need root; a skipped test says so.
fn is_root() -> bool {
    let root = creds::effective_uid() == 0;
    if !root {
        eprintln!("skipped: unpacking needs root");
    }
    root
}

fn unpack(archive: &[u8]) -> Result<Layer, String> {
    creds::set_umask(0);
    // In memory where there is such a place: thousands of layers are unpacked here.
    let top = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    fs::write(top.path().join("sentinel"), b"untouched").unwrap();
    fs::set_permissions(top.path().join("sentinel"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(top.path().join("fs")).unwrap();
    fs::set_permissions(top.path().join("fs"), fs::Permissions::from_mode(0o755)).unwrap();
    let root = path::open(top.path().join("fs"), OFlags::RDONLY | OFlags::DIRECTORY).unwrap();
    let mut reader = Reader::new(archive);
    let result = apply(&mut reader, root.as_fd(), 10_000);
    // Whatever the archive says, what lies beside stays as it is.
    assert_eq!(fs::read(top.path().join("sentinel")).unwrap(), b"untouched");
    assert_eq!(
        fs::metadata(top.path().join("sentinel")).unwrap().mode() & 0o7777,
        0o600
    );
    let mut beside: Vec<_> = fs::read_dir(top.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    beside.sort();
    assert_eq!(beside, ["fs", "sentinel"]);
    match result {
        Ok(applied) => Ok(Layer { top, applied }),
        Err(error) => {
            let source = std::error::Error::source(&error)
                .map(|source| format!(": {source}"))
                .unwrap_or_default();
            Err(format!("{error}{source}"))
        }
    }
}

fn good(archive: &[u8]) -> Layer {
    unpack(archive).unwrap_or_else(|error| panic!("{error}"))
}

fn refusal(archive: &[u8]) -> String {
    match unpack(archive) {
        Ok(layer) => panic!("taken: {:?}", layer.names()),
        Err(error) => error,
    }
}

#[test]
fn files_get_all_that_the_archive_says() {
    if !is_root() {
        return;
    }
    let mut program = Header::new(b'0', b"bin/su");
    program.mode(0o4755).owner(7, 8).octal(136, 12, 12345);
    let mut device = Header::new(b'3', b"dev/null");
    device.mode(0o666).octal(329, 8, 1).octal(337, 8, 3);
    let mut block = Header::new(b'4', b"dev/sda");
    block.mode(0o660).owner(0, 6).octal(329, 8, 8);
    let mut pipe = Header::new(b'6', b"pipe");
    pipe.mode(0o622);
    let mut link = Header::new(b'2', b"link");
    link.owner(9, 9).link(b"/etc/passwd").octal(136, 12, 54321);
    let mut sticky = Header::new(b'5', b"tmp/");
    sticky.mode(0o1777).owner(1, 2).octal(136, 12, 777);
    let layer = good(
        &Archive::new()
            .dir("bin/")
            .entry(&program, b"elf")
            .dir("dev/")
            .header(&device)
            .header(&block)
            .header(&pipe)
            .header(&link)
            .header(&sticky)
            .file("tmp/x", b"x")
            .pax(&[
                ("mtime", "99.5"),
                ("SCHILY.xattr.user.color", "blue"),
                ("uid", "4000000000"),
            ])
            .file("attributes", b"")
            .end(),
    );
    let stat = |name: &str| fs::symlink_metadata(layer.path(name)).unwrap();
    let su = stat("bin/su");
    assert_eq!(
        (su.mode() & 0o7777, su.uid(), su.gid(), su.mtime(), su.size()),
        (0o4755, 7, 8, 12345, 3)
    );
    let null = stat("dev/null");
    assert_eq!((null.mode() & 0o7777, null.rdev()), (0o666, 0x103));
    let disk = stat("dev/sda");
    assert!(disk.file_type().is_block_device() && (disk.gid(), disk.rdev()) == (6, 0x800));
    assert_eq!(stat("pipe").mode() & 0o7777, 0o622);
    let link = stat("link");
    assert_eq!((link.uid(), link.mtime()), (9, 54321));
    let tmp = stat("tmp");
    assert_eq!(
        (tmp.mode() & 0o7777, tmp.uid(), tmp.gid(), tmp.mtime()),
        (0o1777, 1, 2, 777),
        "time is set at the end"
    );
    let file = stat("attributes");
    assert_eq!(
        (file.uid(), file.mtime(), file.mtime_nsec()),
        (4_000_000_000, 99, 500_000_000)
    );
    let fd = path::open(layer.path("attributes"), OFlags::RDONLY).unwrap();
    assert_eq!(
        file::get_xattr(&fd, OsStr::new("user.color")).unwrap().unwrap(),
        b"blue"
    );
    assert!(layer.applied.implied.is_empty() && layer.applied.links.is_empty());
    assert!(!layer.applied.sets_root);
}

#[test]
fn a_parent_that_is_a_symlink_stays_inside() {
    if !is_root() {
        return;
    }
    for target in ["..", "/", "../..", "/..", "../../../../../../../..", "."] {
        let layer = good(&Archive::new().symlink("d", target).file("d/x", b"inside").end());
        assert_eq!(layer.text("x"), "inside", "{target}");
    }
    let layer = good(
        &Archive::new()
            .dir("usr/")
            .symlink("lib", "usr/lib")
            .file("lib/libc.so", b"c")
            .symlink("usr/alias", "/usr/lib")
            .file("usr/alias/libm.so", b"m")
            .hard_link("lib/again", "lib/libc.so")
            .file("lib/.wh.gone", b"")
            .end(),
    );
    assert_eq!(
        [layer.text("usr/lib/libc.so"), layer.text("usr/lib/libm.so")],
        ["c", "m"]
    );
    assert_eq!(fs::metadata(layer.path("usr/lib/again")).unwrap().nlink(), 2);
    assert!(layer.is_whiteout("usr/lib/gone"));
    assert_eq!(
        Layer::paths(&layer.applied.implied),
        ["usr/lib"],
        "reported by its real path"
    );
    let loop_ = Archive::new()
        .symlink("a", "b")
        .symlink("b", "a")
        .file("a/x", b"")
        .end();
    assert!(refusal(&loop_).contains("too many symlinks"));
    let sentinel = Archive::new()
        .symlink("d", "../sentinel")
        .file("d", b"overwritten")
        .end();
    assert_eq!(
        good(&sentinel).text("d"),
        "overwritten",
        "the link itself is replaced"
    );
    let under_file = Archive::new().file("f", b"").file("f/x", b"").end();
    assert!(refusal(&under_file).contains("parent is not a directory"));
}

#[test]
fn a_symlink_gives_way_to_a_directory_and_its_target_is_left_alone() {
    if !is_root() {
        return;
    }
    // CVE-2026-33056: the directory's mode must not reach the link's target.
    let mut dir = Header::new(b'5', b"d");
    dir.mode(0o777);
    let layer = good(
        &Archive::new()
            .dir("target/")
            .symlink("d", "target")
            .header(&dir)
            .file("d/x", b"x")
            .symlink("e", "../sentinel")
            .dir("e/")
            .end(),
    );
    assert!(fs::symlink_metadata(layer.path("d")).unwrap().is_dir());
    assert_eq!(fs::metadata(layer.path("target")).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(fs::read_dir(layer.path("target")).unwrap().count(), 0);
}

#[test]
fn deletions_become_whiteouts_of_overlayfs() {
    if !is_root() {
        return;
    }
    let layer = good(
        &Archive::new()
            .dir("d/")
            .file("d/.wh.gone", b"")
            .file("d/.wh..wh..opq", b"")
            .file("d/after", b"")
            .file(".wh.replaced", b"")
            .file("replaced", b"new")
            .file("kept", b"kept")
            .file(".wh.kept", b"")
            .file(".wh.renewed", b"")
            .dir("renewed/")
            .dir("emptied/")
            .file(".wh.emptied", b"")
            .file(".wh.deep", b"")
            .file("deep/er/x", b"")
            .file(".wh..wh.aufs", b"ignored")
            .dir(".wh.also/")
            .end(),
    );
    assert!(layer.is_whiteout("d/gone") && layer.is_whiteout("also"));
    assert_eq!([layer.text("replaced"), layer.text("kept")], ["new", "kept"]);
    assert_eq!(
        Layer::paths(&layer.applied.opaque),
        ["d", "deep", "emptied", "renewed"]
    );
    assert_eq!(Layer::paths(&layer.applied.implied), ["deep/er"]);
    assert!(!layer.names().iter().any(|name| name.contains(".wh.")));
    for bad in [".wh.", ".wh..", ".wh...", "d/.wh."] {
        assert!(
            refusal(&Archive::new().file(bad, b"").end()).contains("deletes nothing"),
            "{bad}"
        );
    }
    assert!(refusal(&Archive::new().file(".wh..wh..opq", b"").end()).contains("all layers below"));
    let device = Header::new(b'3', b"d");
    assert!(refusal(&Archive::new().header(&device).end()).contains("0:0"));
}

#[test]
fn the_last_of_several_entries_wins() {
    if !is_root() {
        return;
    }
    let mut private = Header::new(b'5', b"dir");
    private.mode(0o700).owner(3, 4);
    let layer = good(
        &Archive::new()
            .file("file", b"a long first text")
            .file("./file", b"second")
            .dir("becomes-file/")
            .file("becomes-file/child", b"")
            .dir("becomes-file/.wh.x/")
            .file("becomes-file", b"now a file")
            .file("becomes-dir", b"")
            .dir("becomes-dir/")
            .dir("dir/")
            .file("dir/stays", b"stays")
            .header(&private)
            .hard_link("link", "nowhere")
            .file("link", b"a file after all")
            .symlink("s", "file")
            .file("s", b"not through the link")
            .end(),
    );
    assert_eq!(layer.text("file"), "second");
    assert_eq!(layer.text("becomes-file"), "now a file");
    assert!(layer.path("becomes-dir").is_dir());
    assert_eq!(layer.text("dir/stays"), "stays");
    let dir = fs::metadata(layer.path("dir")).unwrap();
    assert_eq!((dir.mode() & 0o7777, dir.uid()), (0o700, 3));
    assert_eq!(layer.text("link"), "a file after all");
    assert_eq!(layer.text("s"), "not through the link");
    assert!(layer.applied.links.is_empty() && layer.applied.opaque.is_empty());
}

#[test]
fn what_a_directory_passes_on_does_not_show() {
    if !is_root() {
        return;
    }
    let mut shared = Header::new(b'5', b"shared/");
    shared.mode(0o2775).owner(0, 50);
    let layer = good(
        &Archive::new()
            .header(&shared)
            .file("shared/x", b"")
            .file("shared/made/y", b"")
            .end(),
    );
    let stat = |name: &str| fs::metadata(layer.path(name)).unwrap();
    assert_eq!(
        (stat("shared").mode() & 0o7777, stat("shared").gid()),
        (0o2775, 50)
    );
    assert_eq!(
        (stat("shared/x").gid(), stat("shared/x").mode() & 0o7777),
        (0, 0o644)
    );
    assert_eq!(
        (stat("shared/made").gid(), stat("shared/made").mode() & 0o7777),
        (0, 0o755)
    );
}

#[test]
fn attributes_that_act_on_the_node_are_left_out() {
    if !is_root() {
        return;
    }
    let capability = "\u{1}\0\0\u{2}\0\u{4}\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let layer = good(
        &Archive::new()
            .pax(&[
                ("SCHILY.xattr.security.capability", capability),
                ("SCHILY.xattr.trusted.overlay.opaque", "y"),
                ("SCHILY.xattr.user.overlay.opaque", "y"),
                ("SCHILY.xattr.security.selinux", "label"),
                ("SCHILY.xattr.user.kept", "yes"),
            ])
            .entry(Header::new(b'0', b"f").owner(5, 5), b"")
            .pax(&[("SCHILY.xattr.user.x", "on a symlink")])
            .symlink("s", "f")
            .end(),
    );
    let fd = path::open(layer.path("f"), OFlags::RDONLY).unwrap();
    let mut names = file::list_xattrs(&fd).unwrap();
    names.sort();
    assert_eq!(
        names,
        [b"security.capability".to_vec(), b"user.kept".to_vec()],
        "the capability survives the owner"
    );
    assert_eq!(layer.applied.skipped_xattrs, 4);
}

#[test]
fn attributes_that_the_file_system_cannot_hold_are_counted() {
    if !is_root() {
        return;
    }
    let thread = std::thread::spawn(|| {
        let missing = seccomp::lacking_program(syscall::FSETXATTR, None, Errno::EOPNOTSUPP);
        seccomp::load(&missing, seccomp::FilterFlags::empty()).unwrap();
        let archive = Archive::new()
            .pax(&[("SCHILY.xattr.user.kept", "yes")])
            .entry(&Header::new(b'0', b"f"), b"");
        good(&archive.end()).applied.skipped_xattrs
    });
    assert_eq!(thread.join().unwrap(), 1);
}

#[test]
fn what_the_archive_leaves_out_is_reported() {
    if !is_root() {
        return;
    }
    let layer = good(
        &Archive::new()
            .file("a/b/c", b"")
            .dir("a/")
            .file("d/e", b"")
            .dir("./")
            .end(),
    );
    assert_eq!(Layer::paths(&layer.applied.implied), ["a/b", "d"]);
    assert!(layer.applied.sets_root);
    assert_eq!(fs::metadata(layer.path("a/b")).unwrap().mtime(), 0);
    assert_eq!(layer.applied.inodes, 6);
}

#[test]
fn paths_of_any_depth_and_bytes_are_made() {
    if !is_root() {
        return;
    }
    let deep = format!("{}x", "d/".repeat(2000));
    let layer = good(&Archive::new().pax(&[("path", &deep)]).file("x", b"deep").end());
    assert_eq!(layer.applied.implied.len(), 2000);
    let name = b"\xff\x01\n'\\";
    let layer = good(&Archive::new().entry(&Header::new(b'0', name), b"odd").end());
    let path = layer.path("").join(OsStr::from_bytes(name));
    assert_eq!(fs::read(path).unwrap(), b"odd");
    let many: Archive = (0..10_001).fold(Archive::new(), |archive, _| archive.file("x", b""));
    assert!(refusal(&many.end()).contains("more than 10000 entries"));
}
