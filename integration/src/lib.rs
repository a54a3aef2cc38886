//! Black-box tests of `coracled` over its socket: what they share.
//!
//! - `daemon`: a daemon's process and places
//! - `client`, `request`: calls to it, and the messages of a kubelet with little in them
//! - `leaks`: what is on the host; whatever is there after a test and was not before is a leak
//! - `image`: images made on the spot from Debian's busybox-static
//! - `node`: a daemon in the test's own namespaces, its crashes and restarts
//! - `cell`: namespaces of one test, held by a process, for the real callers
//! - `kubelet`, `cluster`, `registry`: the real callers, and where their images come from

pub mod cell;
pub mod client;
pub mod cluster;
pub mod daemon;
pub mod image;
pub mod kubelet;
pub mod leaks;
pub mod node;
pub mod registry;
pub mod request;

pub use node::{Node, Options};

/// How long something may take here: `CORACLE_TEST_SLOW` says how many times slower this machine is than a usual one.
#[must_use]
pub fn stretched(limit: std::time::Duration) -> std::time::Duration {
    static SLOW: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    let slow = SLOW.get_or_init(|| {
        let value = std::env::var("CORACLE_TEST_SLOW").ok();
        value
            .and_then(|text| text.parse().ok())
            .filter(|n| *n > 0)
            .unwrap_or(1)
    });
    limit * *slow
}

/// Says loudly what is not tested and why; `cargo xtask test` counts it where it names a file for that.
#[allow(clippy::print_stderr, reason = "a skipped test says so")]
pub fn skipped(what: &str) {
    use std::io::Write as _;
    let thread = std::thread::current();
    let line = format!("SKIPPED {} {what}", thread.name().unwrap_or("?"));
    eprintln!("{line}");
    if let Some(path) = std::env::var_os("CORACLE_TEST_SKIPS") {
        let file = std::fs::File::options().create(true).append(true).open(path);
        if let Err(error) = file.and_then(|mut file| writeln!(file, "{line}")) {
            eprintln!("the skip is not counted: {error}");
        }
    }
}
