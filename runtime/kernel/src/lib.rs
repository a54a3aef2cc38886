//! Typed, descriptor-based wrappers of Linux system calls: the only unsafe code of Coracle, and no policy.
//!
//! Descriptors go in as `AsFd` and come out as `OwnedFd`, always close-on-exec. Every failure is an [`Error`] that
//! carries the call, its arguments and the [`Errno`]; nothing above this crate names `libc`.

pub mod bpf;
pub mod caps;
pub mod clone;
pub mod creds;
pub mod epoll;
pub mod error;
pub mod exec;
pub mod fd;
pub mod file;
pub mod heap;
pub mod idmap;
mod inode;
pub mod inotify;
pub mod keyring;
pub mod landlock;
pub mod link;
pub mod lsm;
pub mod mount;
pub mod mount_attr;
pub mod mount_old;
pub mod mountinfo;
pub mod namespace;
pub mod path;
pub mod persona;
pub mod pidfd;
pub mod pivot;
pub mod probe;
pub mod procfs;
pub mod rlimit;
pub mod sched;
pub mod scm;
pub mod seccomp;
pub mod signal;
pub mod syscall;
pub mod tcp;
pub mod time;
pub mod tty;
pub mod wait;
pub mod xattr;

pub use error::{Errno, Error, Result};
