//! Black-box tests of `coracled` over its socket: what they share.
//!
//! - `node`: a daemon in a scratch directory, its clients, its crashes and restarts
//! - `oracle`: what is on the host; whatever is there after a test and was not before is a leak
//! - `request`: the messages of a kubelet, with little in them
//! - `image`: images made on the spot from Debian's busybox-static
//! - `cell`, `daemon`, `client`, `leaks`: namespaces of one test with a daemon in them, for the real callers
//! - `kubelet`, `registry`: the real callers, and where their images come from

pub mod cell;
pub mod client;
pub mod daemon;
pub mod image;
pub mod kubelet;
pub mod leaks;
pub mod node;
pub mod oracle;
pub mod registry;
pub mod request;

pub use node::{Node, Options};
pub use oracle::Snapshot;

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
