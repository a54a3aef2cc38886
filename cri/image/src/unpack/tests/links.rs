//! Hard links of every kind.

use super::*;

#[test]
fn hard_links_stay_in_the_layer() {
    if !is_root() {
        return;
    }
    let layer = good(
        &Archive::new()
            .hard_link("forward", "a")
            .hard_link("chained", "forward")
            .file("a", b"a")
            .hard_link("b", "/a")
            .symlink("s", "/etc/passwd")
            .hard_link("t", "s")
            .hard_link("lower", "usr/bin/tool")
            .end(),
    );
    let ino = |name: &str| fs::symlink_metadata(layer.path(name)).unwrap().ino();
    assert_eq!([ino("b"), ino("forward"), ino("chained")], [ino("a"); 3]);
    assert_eq!(ino("t"), ino("s"), "the link itself, not what it points at");
    let links = &layer.applied.links;
    assert_eq!(links.len(), 1);
    assert_eq!(
        (links[0].0.0.as_slice(), links[0].1.0.as_slice()),
        (&b"lower"[..], &b"usr/bin/tool"[..])
    );
    for (archive, why) in [
        (Archive::new().hard_link("x", "../sentinel"), "\"..\""),
        (Archive::new().dir("d/").hard_link("x", "d"), "to a directory"),
        (Archive::new().file("x", b"").hard_link("x", "x"), "to itself"),
        (Archive::new().hard_link("x", "/"), "to the root"),
        (Archive::new().file(".wh.f", b"").hard_link("x", "f"), "deleted"),
    ] {
        let text = refusal(&archive.end());
        assert!(text.contains(why), "{text}");
    }
    // Each round makes one link of a chain that runs the wrong way, and looks at all others.
    let mut chain = Archive::new();
    for n in 0..50 {
        chain = chain.hard_link(&format!("l{n}"), &format!("l{}", n + 1));
    }
    let text = refusal(&chain.file("l50", b"").end());
    assert!(text.contains("go on for too long"), "{text}");
    let mut many = Archive::new();
    for n in 0..=8 << 10 {
        many = many.hard_link(&format!("l{n}"), "absent");
    }
    let text = refusal(&many.end());
    assert!(text.contains("too many hard links"), "{text}");
    // Through a symlink that leads out, the target is looked for inside.
    let layer = good(
        &Archive::new()
            .symlink("d", "..")
            .hard_link("x", "d/sentinel")
            .end(),
    );
    assert_eq!(layer.applied.links.len(), 1);
    assert!(!layer.path("x").exists());
}
