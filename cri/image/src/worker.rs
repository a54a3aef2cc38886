//! What a worker process does, from its first line to its exit. The daemon's program calls [`worker_main`] when it is
//! started as `coracled worker <role>`.
//!
//! | role | descriptor 3 | 4 | 5 |
//! | --- | --- | --- | --- |
//! | fetch | its socket | | |
//! | parse | requests | answers | |
//! | unpack | limits, then the compressed layer | the layer's directory | the answer |

use std::io::{self, BufRead, Read, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use coracle_kernel::{Error as KernelError, creds, fd};

use crate::confine::{Keep, confine};
use crate::decompress::Decompressor;
use crate::digest::{Algorithm, Digest};
use crate::fetch;
use crate::parser;
use crate::report::{LIMITS_BYTES, Limits, Outcome, Report};
use crate::tar::Reader;
use crate::unpack;
use crate::workers::Role;

/// Bytes of one chunk between the thread that inflates and the one that writes files.
const CHUNK_BYTES: usize = 128 << 10;
/// Chunks that may be on their way.
const CHUNKS: usize = 8;

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A descriptor that it should have been given is not there.
    #[error("worker without its descriptors")]
    Descriptors(#[source] KernelError),
    /// It could not be confined, so it did nothing.
    #[error("worker could not be confined")]
    Confine(#[source] KernelError),
    /// The daemon's end.
    #[error("worker cannot speak to the daemon")]
    Daemon(#[source] io::Error),
    /// The fetch worker's own words.
    #[error("{0}")]
    Fetch(String),
}

/// Runs a worker on the calling thread, which must be the only one, and returns when its work is done.
pub fn worker_main(role: Role) -> Result<(), WorkerError> {
    match role {
        Role::Fetch => fetch_main(),
        Role::Parse => parse_main(),
        Role::Unpack => unpack_main(),
    }
}

fn fetch_main() -> Result<(), WorkerError> {
    let socket = fd::inherited(3).map_err(WorkerError::Descriptors)?;
    let setup = fetch::receive_setup(&socket).map_err(|error| WorkerError::Fetch(error.to_string()))?;
    let runtime = fetch::runtime().map_err(WorkerError::Daemon)?;
    confine(Keep::Network(setup.uid)).map_err(WorkerError::Confine)?;
    fetch::serve(&runtime, socket, setup).map_err(|error| WorkerError::Fetch(error.to_string()))
}

fn parse_main() -> Result<(), WorkerError> {
    let requests = fd::inherited(3).map_err(WorkerError::Descriptors)?;
    let answers = fd::inherited(4).map_err(WorkerError::Descriptors)?;
    confine(Keep::Nothing).map_err(WorkerError::Confine)?;
    let requests = io::BufReader::new(std::fs::File::from(requests));
    parser::serve(requests, std::fs::File::from(answers)).map_err(WorkerError::Daemon)
}

fn unpack_main() -> Result<(), WorkerError> {
    let input = fd::inherited(3).map_err(WorkerError::Descriptors)?;
    let layer = fd::inherited(4).map_err(WorkerError::Descriptors)?;
    let answer = fd::inherited(5).map_err(WorkerError::Descriptors)?;
    let root = confine(Keep::Layer(layer.as_fd())).map_err(WorkerError::Confine)?;
    // The daemon's directory has a way up; the one in the new root has none.
    drop(layer);
    // Files get exactly the mode that the archive says.
    creds::set_umask(0);
    let outcome = match unpack(input, root.as_fd()) {
        Ok(report) => Outcome::Done(report),
        Err(error) => Outcome::Failed(chain(error.as_ref())),
    };
    let json = serde_json::to_vec(&outcome).map_err(|error| WorkerError::Daemon(error.into()))?;
    std::fs::File::from(answer)
        .write_all(&json)
        .map_err(WorkerError::Daemon)
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Unpacks the stream behind `input` into `root`: one thread inflates and hashes, this one writes files.
pub(crate) fn unpack(input: OwnedFd, root: BorrowedFd<'_>) -> Result<Report, BoxError> {
    let mut input = std::fs::File::from(input);
    let mut limits = [0; LIMITS_BYTES];
    input.read_exact(&mut limits)?;
    unpack_stream(input, root, Limits::from_bytes(limits))
}

fn unpack_stream(input: impl Read + Send, root: BorrowedFd<'_>, limits: Limits) -> Result<Report, BoxError> {
    let (filled, chunks) = sync_channel(CHUNKS);
    let (spent, empty) = channel();
    std::thread::scope(|scope| {
        let inflater = scope.spawn(move || inflate(input, limits, &filled, &empty));
        let mut reader = Reader::new(Chunks {
            chunks,
            spent,
            current: Vec::new(),
            at: 0,
            ended: false,
        });
        let applied = unpack::apply(&mut reader, root, limits.entries);
        let mut rest = reader.into_inner();
        if applied.is_ok() {
            // What comes behind the archive's end belongs to the diff-id too.
            rest.drain()?;
        }
        // Tells the other thread to stop, where it has not come to the end.
        drop(rest);
        let applied = applied?;
        let diff_id = inflater.join().map_err(|_| "the inflating thread panicked")??;
        let (opaque, implied, links) = (applied.opaque, applied.implied, applied.links);
        let (bytes, inodes, sets_root, skipped_xattrs) = (
            applied.bytes,
            applied.inodes,
            applied.sets_root,
            applied.skipped_xattrs,
        );
        Ok(Report {
            diff_id,
            bytes,
            inodes,
            sets_root,
            opaque,
            implied,
            links,
            skipped_xattrs,
        })
    })
}

/// Decompresses and hashes, chunk by chunk, until the end or until nobody wants more.
fn inflate(
    input: impl Read,
    limits: Limits,
    filled: &SyncSender<io::Result<Vec<u8>>>,
    empty: &Receiver<Vec<u8>>,
) -> io::Result<Digest> {
    let mut hasher = Algorithm::Sha256.hasher();
    let mut stream = Decompressor::new(input, limits).map_err(|error| told(error, filled))?;
    loop {
        let mut chunk = empty.try_recv().unwrap_or_default();
        chunk.resize(CHUNK_BYTES, 0);
        let mut length = 0;
        // Full chunks: a decoder's own pieces may be small, and every handover wakes a thread.
        while length < CHUNK_BYTES {
            match stream.read(&mut chunk[length..]) {
                Ok(0) => break,
                Ok(count) => length += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(told(error, filled)),
            }
        }
        if length == 0 {
            return Ok(hasher.finish());
        }
        chunk.truncate(length);
        hasher.update(&chunk);
        if filled.send(Ok(chunk)).is_err() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
}

/// Tells the reader of the chunks the reason as well.
fn told(error: io::Error, filled: &SyncSender<io::Result<Vec<u8>>>) -> io::Error {
    let copy = io::Error::new(error.kind(), error.to_string());
    let _ = filled.send(Err(copy));
    error
}

/// The chunks as one stream.
struct Chunks {
    chunks: Receiver<io::Result<Vec<u8>>>,
    /// Used buffers go back, so that none is allotted after the first few.
    spent: Sender<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Chunks {
    fn drain(&mut self) -> io::Result<()> {
        loop {
            let count = self.fill_buf()?.len();
            if count == 0 {
                return Ok(());
            }
            self.consume(count);
        }
    }
}

impl BufRead for Chunks {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.current.len() && !self.ended {
            match self.chunks.recv() {
                Ok(chunk) => {
                    let spent = std::mem::replace(&mut self.current, chunk?);
                    self.at = 0;
                    // Its owner may have finished already.
                    let _ = self.spent.send(spent);
                }
                // The other thread has dropped its end.
                Err(_) => self.ended = true,
            }
        }
        Ok(&self.current[self.at..])
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

/// An error with its reasons, for the daemon's log and the client.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
