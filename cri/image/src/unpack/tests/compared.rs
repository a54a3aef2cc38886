//! Against GNU tar, and against archives changed at random.

use super::*;

/// GNU tar makes the same tree from the same archive.
#[test]
fn gnu_tar_unpacks_the_same() {
    if !is_root() {
        return;
    }
    let mut owned = Header::new(b'0', b"dir/owned");
    owned.mode(0o2640).owner(11, 12).octal(136, 12, 4242);
    let mut ugly = Header::new(b'5', b"dir/sub/");
    ugly.mode(0o1731).owner(13, 14).octal(136, 12, 4243);
    let archive = Archive::new()
        .dir("dir/")
        .entry(&owned, &[9; 5000])
        .header(&ugly)
        .file("dir/sub/empty", b"")
        .symlink("dir/link", "sub/empty")
        .hard_link("dir/again", "dir/owned")
        .pax(&[("mtime", "5.25"), ("path", "dir/long-name-from-a-header")])
        .file("short", b"text")
        .header(Header::new(b'6', b"dir/pipe").mode(0o600))
        .header(
            Header::new(b'3', b"dir/device")
                .mode(0o640)
                .octal(329, 8, 5)
                .octal(337, 8, 1),
        )
        .end();
    let ours = good(&archive);
    let theirs = tempfile::tempdir().unwrap();
    fs::write(theirs.path().join("layer.tar"), &archive).unwrap();
    let status = std::process::Command::new("tar")
        .args([
            "--numeric-owner",
            "--same-permissions",
            "--same-owner",
            "-xf",
            "layer.tar",
            "-C",
        ])
        .arg(theirs.path())
        .current_dir(theirs.path())
        .status();
    if !status.is_ok_and(|status| status.success()) {
        panic!("GNU tar could not unpack it");
    }
    let tree = |root: &StdPath| {
        let mut entries = Vec::new();
        walk(root, &mut |path| {
            let stat = path.symlink_metadata().unwrap();
            let content = if stat.is_file() {
                fs::read(path).unwrap()
            } else {
                Vec::new()
            };
            let target = fs::read_link(path).unwrap_or_default();
            let name = path.strip_prefix(root).unwrap().to_owned();
            let device = if stat.file_type().is_char_device() {
                stat.rdev()
            } else {
                0
            };
            let links = if stat.is_dir() { 0 } else { stat.nlink() };
            let time = (stat.mtime(), stat.mtime_nsec());
            entries.push((
                name,
                stat.mode(),
                stat.uid(),
                stat.gid(),
                time,
                device,
                links,
                content,
                target,
            ));
        });
        entries.sort();
        entries
    };
    assert_eq!(tree(&ours.path("dir")), tree(&theirs.path().join("dir")));
}

/// Whatever is done to an archive: no panic, nothing outside, and an error or a layer.
#[test]
fn mutated_archives_stay_inside() {
    if !is_root() {
        return;
    }
    let seed = Archive::new()
        .dir("d/")
        .symlink("d/up", "../..")
        .file("d/up/x", b"x")
        .symlink("l", "/")
        .dir("l/e/")
        .hard_link("h", "d/up/x")
        .file("d/.wh.gone", b"")
        .file("d/.wh..wh..opq", b"")
        .pax(&[("path", "l/long/er"), ("SCHILY.xattr.user.x", "y")])
        .file("f", b"text")
        .hard_link("later", "end")
        .file("end", b"")
        .end();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random % below as u64).unwrap_or(0)
    };
    let names: [&[u8]; 12] = [
        b"..",
        b"d",
        b"l",
        b"l/..",
        b"/",
        b"h",
        b".wh.d",
        b"d/up",
        b"d/up/d",
        b"x/y",
        b".wh..wh..opq",
        b"sentinel",
    ];
    let mut unpacked = 0;
    for _ in 0..1000 {
        let mut archive = seed.clone();
        let headers = archive.len() / 512;
        for _ in 0..=next(3) {
            let block = next(headers) * 512;
            if &archive[block + 257..block + 262] != b"ustar" {
                continue;
            }
            match next(4) {
                // Another name, another target, another type, or two entries changing places.
                field @ (0 | 1) => {
                    let (at, name) = (block + [0, 157][field], names[next(names.len())]);
                    archive[at..at + 100].fill(0);
                    archive[at..at + name.len()].copy_from_slice(name);
                }
                2 => archive[block + 156] = b"01235"[next(5)],
                _ => {
                    let other = next(headers) * 512;
                    let moved = archive[other..other + 512].to_vec();
                    archive.splice(block..block, moved);
                }
            }
        }
        for block in archive
            .chunks_exact_mut(512)
            .filter(|block| &block[257..262] == b"ustar")
        {
            let header = Header(block.try_into().unwrap_or([0; 512]));
            block.copy_from_slice(&header.sealed());
        }
        unpacked += usize::from(unpack(&archive).is_ok());
    }
    assert!(
        unpacked > 100,
        "only {unpacked} were unpacked: the mutations are too rough to test anything"
    );
}
