//! Sessions over real sockets, with a client of our own and real processes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bulk;
mod by_hand;
mod client;
mod exec;
mod fake;
mod forward;
mod hostile;
mod properties;
mod socket;
mod tls;
