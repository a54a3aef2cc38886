//! SPDY/3.1, the server's half, without IO: bytes in, events and frames out.
//!
//! What is spoken is what Go's `spdystream` speaks, which is behind every client of the CRI: it neither sends nor
//! honours windows, so back-pressure is that of the TCP connection, and WINDOW_UPDATE is read and forgotten.

pub(crate) mod conn;
mod dict;
pub(crate) mod frame;
pub(crate) mod header;

pub(crate) use conn::Connection;
pub(crate) use header::Headers;

/// Why a connection cannot go on. Its compression contexts and stream numbers mean nothing after one of these.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error("SPDY version {0}, not 3")]
    Version(u16),
    #[error("control frame of type {kind} with {length} bytes")]
    Length { kind: u16, length: usize },
    #[error("header block: {0}")]
    Headers(&'static str),
    #[error("frame of type {0} on stream 0")]
    StreamZero(u16),
}
