//! The process that stays with a pod: one thread, one epoll loop.
//!
//! It holds the pod's namespaces by descriptor, is the parent of the pod's containers, writes their logs, reaps them and
//! keeps how they ended until the daemon says that it knows. It depends on the daemon for nothing: requests come
//! over a socket ([`coracle_wire`]), and with nobody at its other end everything goes on.
//!
//! It parses no configuration. Whatever needs one is done by a helper, a clone that ends when it is done and takes
//! its memory with it; the init that it makes is the monitor's own child all the same.
//!
//! ```text
//! monitor     the loop: descriptors that are ready, children that ended, deadlines
//! requests    what the daemon asks for, up to the helper that does it
//! outcomes    what comes of it: helpers' reports, starts, ends
//! helper work the clone, and what is done in it
//! container   a container's streams, log and end            log     the file that the kubelet reads
//! upgrade     the same pod, children and streams in another program
//! ```

mod attach;
mod connection;
mod container;
mod deadlines;
mod helper;
mod log;
mod monitor;
mod outcomes;
mod pod_init;
mod pod_mounts;
mod refusal;
mod requests;
mod state;
mod upgrade;
mod work;

use std::process::ExitCode;

use coracle_kernel::epoll::{self, Interest};

pub use monitor::MonitorError;

/// Runs a pod's monitor until it is told to end. Everything that it needs is at descriptor 3: a listening socket, or
/// the state of the monitor whose process this is, which has executed another program.
#[must_use]
pub fn run() -> ExitCode {
    match monitor::Monitor::begin().and_then(monitor::Monitor::serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(error) = source {
                text = format!("{text}: {error}");
                source = error.source();
            }
            say(&text);
            ExitCode::FAILURE
        }
    }
}

/// Says something on standard error, if that can be done without waiting: nobody may read there.
fn say(text: &str) {
    let stderr = std::io::stderr();
    let now = Some(std::time::Duration::ZERO);
    if epoll::wait_one(&stderr, Interest::WRITE, now).is_ok_and(|ready| ready == Interest::WRITE) {
        let line = format!("coracle monitor {}: {text}\n", std::process::id());
        let _ = coracle_kernel::fd::write(&stderr, line.as_bytes());
    }
}
