//! Archives of every kind, right and wrong.

use super::header::number;
use super::*;
use crate::test_archive::{Archive, Header, record};

fn read(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    // Pieces of a size that no block has, as they come from a decoder.
    let mut reader = Reader::new(io::BufReader::with_capacity(100, archive));
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut data = Vec::new();
        loop {
            let piece = reader.data()?;
            if piece.is_empty() {
                break;
            }
            data.extend_from_slice(piece);
            let count = piece.len();
            reader.consume(count);
        }
        entries.push((entry, data));
    }
    Ok(entries)
}

fn one(archive: &[u8]) -> Entry {
    let mut entries = read(archive).unwrap();
    assert_eq!(entries.len(), 1);
    entries.remove(0).0
}

fn refusal(archive: &[u8]) -> String {
    match read(archive) {
        Ok(entries) => panic!("taken: {entries:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn every_kind_of_entry_is_read() {
    let mut device = Header::new(b'3', b"dev/null");
    device.octal(329, 8, 1).octal(337, 8, 3).mode(0o666);
    let mut owned = Header::new(b'0', b"owned");
    owned.owner(1000, 100).mode(0o10_4755);
    let archive = Archive::new()
        .dir("./")
        .dir("etc/")
        .file("etc/passwd", &[b'x'; 700])
        .symlink("etc/mtab", "/proc/mounts")
        .hard_link("etc/shadow", "./etc/passwd")
        .header(&device)
        .header(&Header::new(b'6', b"pipe"))
        .entry(&owned, b"data")
        .end();
    let entries = read(&archive).unwrap();
    let kinds: Vec<_> = entries.iter().map(|(entry, _)| entry.kind.clone()).collect();
    assert_eq!(
        kinds,
        [
            Kind::Directory,
            Kind::Directory,
            Kind::File,
            Kind::Symlink(b"/proc/mounts".to_vec()),
            Kind::HardLink(Path(b"etc/passwd".to_vec())),
            Kind::CharDevice(1, 3),
            Kind::Fifo,
            Kind::File,
        ]
    );
    assert_eq!(entries[0].0.path, Path::default());
    assert_eq!(entries[2].1, [b'x'; 700]);
    let (entry, data) = &entries[7];
    assert_eq!(
        (entry.uid, entry.gid, entry.mode, entry.time.seconds),
        (1000, 100, 0o4755, 1000)
    );
    assert_eq!(data, b"data");
}

#[test]
fn paths_are_contained() {
    for (raw, path) in [
        (&b"/etc/x"[..], &b"etc/x"[..]),
        (b"./a/./b//c", b"a/b/c"),
        (b"a\\b", b"a\\b"),
        (b"\xff\xfe", b"\xff\xfe"),
        (b"...", b"..."),
    ] {
        assert_eq!(Path::parse(raw).unwrap().0, path);
    }
    for bad in [&b"../x"[..], b"a/../../x", b"a/..", b"..", b"/..", b"a\0b"] {
        assert!(Path::parse(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
    }
    Path::parse(&[b'n'; 255]).unwrap();
    Path::parse(&[b'n'; 256]).unwrap_err();
    Path::parse(&b"a/".repeat(2049)).unwrap_err();
    assert!(refusal(&Archive::new().file("./", b"x").end()).contains("slash"));
    assert!(refusal(&Archive::new().symlink(".", "x").end()).contains("root"));
}

#[test]
fn names_may_be_long_in_each_of_the_three_ways() {
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(90));
    let pax = Archive::new().pax(&[("path", &long)]).file("short", b"x").end();
    let mut gnu_name = Header::new(b'L', b"././@LongLink");
    gnu_name.put(257, b"ustar  \0");
    let gnu = Archive::new()
        .entry(&gnu_name, format!("{long}\0").as_bytes())
        .file("short", b"x")
        .end();
    let mut split = Header::new(b'0', "f".repeat(90).as_bytes());
    split.put(345, "d".repeat(120).as_bytes());
    let ustar = Archive::new().entry(&split, b"x").end();
    for archive in [pax, gnu, ustar] {
        assert_eq!(one(&archive).path.0, long.as_bytes());
    }
    let mut gnu_link = Header::new(b'K', b"././@LongLink");
    gnu_link.put(257, b"ustar  \0");
    let link = Archive::new()
        .entry(&gnu_link, format!("{long}\0").as_bytes())
        .symlink("s", "short")
        .end();
    assert_eq!(one(&link).kind, Kind::Symlink(long.clone().into_bytes()));
    // In a GNU header the prefix's place holds times.
    let mut gnu_header = Header::new(b'0', b"name");
    gnu_header.put(257, b"ustar  \0").put(345, b"00000001000\0");
    assert_eq!(one(&Archive::new().header(&gnu_header).end()).path.0, b"name");
}

#[test]
fn numbers_are_octal_or_base_256() {
    assert_eq!(number(b"0000644\0").unwrap(), 0o644);
    assert_eq!(number(b"   644 \0").unwrap(), 0o644);
    assert_eq!(number(b"77777777").unwrap(), 0o7777_7777);
    assert_eq!(number(b"\0\0\0\0\0\0\0\0").unwrap(), 0);
    assert_eq!(number(b"\x80\0\0\0\0\0\x01\0").unwrap(), 256);
    assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xff").unwrap(), -1);
    assert_eq!(
        number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe").unwrap(),
        -2
    );
    assert_eq!(
        number(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff").unwrap(),
        i64::MAX
    );
    for bad in [
        &b"0000648\0"[..],
        b"12 34\0\0\0",
        b"-1\0\0\0\0\0\0",
        b"0x10\0\0\0\0",
    ] {
        number(bad).unwrap_err();
    }
    assert!(number(b"\x80\0\0\x01\0\0\0\0\0\0\0\0").is_err(), "beyond 64 bits");
    number(b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff").unwrap_err();
    let mut id = Header::new(b'0', b"x");
    id.put(108, b"\x80\0\0\0\xff\xff\xff\xfe");
    assert_eq!(one(&Archive::new().header(&id).end()).uid, u32::MAX - 1);
    for bad in [
        *b"\x80\0\0\0\xff\xff\xff\xff",
        *b"\xff\xff\xff\xff\xff\xff\xff\xff",
        *b"\x80\0\0\x01\0\0\0\0",
    ] {
        id.put(108, &bad);
        assert!(refusal(&Archive::new().header(&id).end()).contains("owner"));
    }
    let mut size = Header::new(b'0', b"x");
    size.put(124, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff");
    assert!(refusal(&Archive::new().header(&size).end()).contains("negative size"));
    size.put(124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff");
    assert!(refusal(&Archive::new().header(&size).end()).contains("middle"));
}

#[test]
fn what_readers_disagree_about_is_refused() {
    let file = |size: u64| Header::new(b'0', b"f").size(size).clone();
    // CVE-2025-62518 and its like: one reader passes over 1024 bytes, the other over 0, and sees an entry in the data.
    let hidden = Archive::new().file("hidden", b"").0;
    let desync = Archive::new()
        .pax(&[("size", "1024")])
        .header(&file(0))
        .data(&hidden)
        .end();
    assert!(refusal(&desync).contains("two different sizes"));
    let other = Archive::new()
        .pax(&[("size", "0")])
        .header(&file(512))
        .data(&hidden)
        .end();
    assert!(refusal(&other).contains("two different sizes"));
    let same = Archive::new()
        .pax(&[("size", "5")])
        .header(&file(5))
        .data(b"12345")
        .end();
    assert_eq!(one(&same).size, 5);
    let pax = &[("path", "a")][..];
    let twice = Archive::new().pax(pax).pax(pax).file("f", b"").end();
    assert!(refusal(&twice).contains("two PAX headers"));
    let long_name = Archive::new().entry(&Header::new(b'L', b"x"), b"name\0");
    let mixed = Archive(
        Archive::new()
            .pax(pax)
            .0
            .into_iter()
            .chain(long_name.0.clone())
            .collect(),
    )
    .file("f", b"")
    .end();
    assert!(refusal(&mixed).contains("both PAX and GNU"));
    let mixed = Archive(long_name.0.clone()).pax(pax).file("f", b"").end();
    assert!(refusal(&mixed).contains("both PAX and GNU"));
    let names = Archive(long_name.0.iter().chain(&long_name.0).copied().collect())
        .file("f", b"")
        .end();
    assert!(refusal(&names).contains("two GNU long names"));
    for flag in [b'1', b'2', b'3', b'4', b'5', b'6'] {
        let mut header = Header::new(flag, b"d");
        header.link(b"t").size(512);
        assert!(
            refusal(&Archive::new().header(&header).data(&[0; 512]).end()).contains("no file"),
            "{flag}"
        );
    }
    let global = |records: &[u8]| {
        Archive::new()
            .entry(&Header::new(b'g', b"g"), records)
            .file("f", b"")
            .end()
    };
    assert_eq!(one(&global(&record("comment", "by git"))).path.0, b"f");
    for (key, value) in [
        ("path", "p"),
        ("size", "0"),
        ("uid", "0"),
        ("mtime", "1"),
        ("SCHILY.xattr.user.x", ""),
    ] {
        assert!(refusal(&global(&record(key, value))).contains("global"), "{key}");
    }
    assert!(refusal(&Archive::new().file("file/", b"x").end()).contains("slash"));
    let old_dir = Header::new(0, b"dir/");
    assert_eq!(one(&Archive::new().header(&old_dir).end()).kind, Kind::Directory);
}

#[test]
fn what_is_not_understood_is_refused() {
    for (flag, why) in [
        (b'S', "sparse"),
        (b'M', "volumes"),
        (b'V', "volumes"),
        (b'D', "unknown"),
        (b'X', "unknown"),
    ] {
        assert!(refusal(&Archive::new().header(&Header::new(flag, b"x")).end()).contains(why));
    }
    let sparse = Archive::new()
        .pax(&[("GNU.sparse.major", "1")])
        .file("f", b"")
        .end();
    assert!(refusal(&sparse).contains("sparse"));
    let mut star = Header::new(b'0', b"x");
    star.put(508, b"tar\0");
    assert!(refusal(&Archive::new().header(&star).end()).contains("star"));
    let mut magic = Header::new(b'0', b"x");
    magic.put(257, b"ustar\x0001");
    assert!(refusal(&Archive::new().header(&magic).end()).contains("magic"));
    let mut v7 = Header::new(b'0', b"x");
    v7.put(257, &[0; 8]).put(345, b"not a prefix");
    assert_eq!(one(&Archive::new().header(&v7).end()).path.0, b"x");
    let mut device = Header::new(b'3', b"x");
    device.octal(329, 8, 1 << 12);
    assert!(refusal(&Archive::new().header(&device).end()).contains("device number"));
    let large = Archive::new().header(Header::new(b'x', b"x").size(1 << 30)).end();
    assert!(refusal(&large).contains("extended header larger"));
    let large = Archive::new().header(Header::new(b'L', b"x").size(5000)).end();
    assert!(refusal(&large).contains("extended header larger"));
}

#[test]
fn damage_and_truncation_are_errors() {
    let good = Archive::new().file("a", &[1; 600]).dir("d/").end();
    let mut sum = good.clone();
    sum[0] ^= 1;
    assert!(refusal(&sum).contains("checksum"));
    // Without its end blocks an archive is still whole.
    let bare = &good[..good.len() - 1024];
    assert_eq!(read(bare).unwrap().len(), 2);
    for length in 1..bare.len() {
        let cut = read(&bare[..length]);
        // Only between two entries can it be cut unnoticed here; the compressed stream's own end notices that.
        assert_eq!(cut.is_ok(), length == 512 + 1024, "cut at {length}");
    }
    let garbage = [good.clone(), b"garbage".repeat(100)].concat();
    assert_eq!(
        read(&garbage).unwrap().len(),
        2,
        "what follows the end is not looked at"
    );
    let second = [good.clone(), good.clone()].concat();
    assert_eq!(read(&second).unwrap().len(), 2);
    let lone = Archive(bare.to_vec()).block([0; 512]).file("b", b"").end();
    assert!(refusal(&lone).contains("single block of zeros"));
    let nothing_after = Archive::new().pax(&[("path", "a")]).end();
    assert!(refusal(&nothing_after).contains("middle"));
}

#[test]
fn signed_checksums_of_old_writers_are_taken() {
    let mut header = Header::new(b'0', b"\xff\xfe");
    header.size(0);
    let mut block = header.sealed();
    block[148..156].fill(b' ');
    let signed: i64 = block.iter().map(|byte| i64::from(byte.cast_signed())).sum();
    block[148..156].copy_from_slice(format!("{signed:06o}\0 ").as_bytes());
    assert_eq!(one(&Archive::new().block(block).end()).path.0, b"\xff\xfe");
}

/// Whatever is done to an archive, reading it ends without a panic and within what it is long.
#[test]
fn mutated_archives_never_panic() {
    let mut owned = Header::new(b'0', b"owned");
    owned.put(108, b"\x80\0\0\0\0\0\x03\xe8");
    let seed = Archive::new()
        .dir("d/")
        .pax(&[("path", "d/long"), ("mtime", "1.5"), ("SCHILY.xattr.user.x", "y")])
        .file("x", b"some data")
        .entry(&Header::new(b'L', b"l"), b"d/gnu\0")
        .file("y", &[7; 1000])
        .hard_link("h", "d/long")
        .entry(&owned, b"1")
        .end();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random % below as u64).unwrap_or(0)
    };
    for _ in 0..20_000 {
        let mut archive = seed.clone();
        for _ in 0..=next(4) {
            let at = next(archive.len());
            match next(4) {
                0 => archive[at] = u8::try_from(next(256)).unwrap_or(0),
                1 => archive.truncate(at.max(1)),
                2 => archive[at] ^= 1 << next(8),
                _ => {
                    let from = next(archive.len()) / 512 * 512;
                    let block = archive[from..(from + 512).min(archive.len())].to_vec();
                    archive.splice(at / 512 * 512..at / 512 * 512, block);
                }
            }
        }
        // Half of them with checksums made right again, or nothing behind those would ever be reached.
        if next(2) == 0 {
            for block in archive
                .chunks_exact_mut(512)
                .filter(|block| &block[257..262] == b"ustar")
            {
                let header = Header(block.try_into().unwrap_or([0; 512]));
                block.copy_from_slice(&header.sealed());
            }
        }
        if let Ok(entries) = read(&archive) {
            let bytes: usize = entries.iter().map(|(_, data)| data.len()).sum();
            assert!(bytes <= archive.len());
        }
    }
}
