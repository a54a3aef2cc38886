//! The image store with its real workers: this test program is also the program that they run.
//!
//! Layers are unpacked by confined processes, so all of it needs root; without, each test says that it was skipped.

// The helpers are test code too, outside of any test function.
#![allow(clippy::unwrap_used)]

mod faults;
mod import;
mod store;
mod support;

use coracle_image::{Role, worker_main};

/// Runs as a process of its own, started by the store.
#[test]
#[ignore = "a worker process"]
fn unpack() {
    worker_main(Role::Unpack).unwrap();
}

/// Runs as a process of its own, started by the store.
#[test]
#[ignore = "a worker process"]
fn parse() {
    worker_main(Role::Parse).unwrap();
}
