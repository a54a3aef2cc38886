//! The limit of open files: a program of its own, since the limit is the whole process's.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::CString;

use coracle_kernel::exec::{Program, Spawn};
use coracle_kernel::rlimit::{self, Resource};
use coracle_kernel::wait::{Id, Status, wait};

#[test]
fn a_raised_limit_is_not_passed_on() {
    let (_, hard) = rlimit::get(0, Resource::NOFILE).unwrap();
    let low = hard.min(200);
    rlimit::set(0, Resource::NOFILE, low, hard).unwrap();
    assert_eq!(rlimit::raise_open_files().unwrap(), (low, hard));
    assert_eq!(rlimit::get(0, Resource::NOFILE).unwrap(), (hard, hard));
    // A second time there is nothing to raise, and what was before stays known.
    assert_eq!(rlimit::raise_open_files().unwrap(), (low, hard));
    let script = format!("test $(ulimit -Sn) = {low} && test $(ulimit -Hn) = {hard}");
    let args = ["sh", "-c", &script].map(|arg| CString::new(arg).unwrap());
    let child = Spawn::new(Program::Path(c"/bin/sh"), &args).spawn().unwrap();
    assert_eq!(wait(Id::Process(child.pid)).unwrap().status, Status::Exited(0));
}
