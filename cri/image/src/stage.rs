//! The hash stage and the unpack worker behind it: one stream into one directory.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use coracle_kernel::signal::Signal;
use coracle_kernel::{fd, pidfd};

use crate::error::ImageError;
use crate::manifest::Descriptor;
use crate::report::{Limits, MAX_REPORT_BYTES, Outcome, Report};
use crate::workers::{Role, Worker, Workers};

/// Bytes that the hash stage reads at once.
const CHUNK_BYTES: usize = 256 << 10;
/// Room in the pipe to a worker, so that neither side waits for the other at every chunk.
const PIPE_BYTES: usize = 1 << 20;

/// An unpack worker that waits for its stream.
#[derive(Debug)]
pub(crate) struct Unpacking {
    worker: Worker,
    sink: io::PipeWriter,
    answer: io::PipeReader,
}

/// Kills a process when the future that waits for it is dropped.
#[derive(Debug)]
pub(crate) struct KillOnDrop(OwnedFd);

impl Unpacking {
    /// Starts a worker that unpacks into the empty directory `dir`.
    pub(crate) fn start(workers: &Workers, limits: Limits, dir: &OwnedFd) -> Result<Unpacking, ImageError> {
        let pipes = || Ok((io::pipe()?, io::pipe()?));
        let ((input, mut sink), (answer, answer_end)) =
            pipes().map_err(|error: io::Error| ImageError::Pipe(error))?;
        // An unprivileged limit may be smaller; then it is slower.
        let _ = fd::set_pipe_size(&sink, PIPE_BYTES);
        let fds = [input.as_fd(), dir.as_fd(), answer_end.as_fd()];
        let worker = workers.start(Role::Unpack, &fds).map_err(ImageError::Worker)?;
        sink.write_all(&limits.to_bytes()).map_err(ImageError::Pipe)?;
        Ok(Unpacking { worker, sink, answer })
    }

    /// Ends the worker if the guard is dropped before it has ended by itself.
    pub(crate) fn kill_on_drop(&self) -> Result<KillOnDrop, ImageError> {
        fd::dup(self.worker.pidfd())
            .map(KillOnDrop)
            .map_err(ImageError::Worker)
    }

    /// Passes a blob through; whether it was the right one, and what the worker made of it.
    pub(crate) fn run(
        self,
        source: OwnedFd,
        descriptor: &Descriptor,
        progress: &AtomicU64,
    ) -> (Result<(), ImageError>, Result<Report, String>) {
        let Unpacking { worker, sink, answer } = self;
        let hashed = hash_stage(source, sink, descriptor, progress);
        (hashed, finish(worker, answer))
    }

    /// Passes on whatever comes: an archive that nobody has announced.
    pub(crate) fn run_unchecked(self, source: OwnedFd) -> (io::Result<()>, Result<Report, String>) {
        let Unpacking {
            worker,
            mut sink,
            answer,
        } = self;
        let copied = match io::copy(&mut File::from(source), &mut sink) {
            // It has given up, and says why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other.map(drop),
        };
        drop(sink);
        (copied, finish(worker, answer))
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        // It has been reaped already where all went well, which the kernel answers with ESRCH.
        let _ = pidfd::send_signal(&self.0, Signal::KILL);
    }
}

/// Passes the blob on to the worker and tells whether it was the right one.
///
/// A worker that has given up closes its pipe; the rest is still hashed, because "wrong content" is another error, with
/// another cure, than "right content that cannot be unpacked".
fn hash_stage(
    source: OwnedFd,
    sink: io::PipeWriter,
    descriptor: &Descriptor,
    progress: &AtomicU64,
) -> Result<(), ImageError> {
    let digest = || descriptor.digest.clone();
    let wrong_size = |actual| ImageError::BlobSize {
        digest: digest(),
        expected: descriptor.size,
        actual,
    };
    let mut source = File::from(source);
    let mut sink = Some(sink);
    let mut hasher = descriptor.digest.algorithm().hasher();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut total = 0_u64;
    loop {
        let count = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => {
                return Err(ImageError::Source {
                    digest: digest(),
                    source,
                });
            }
        };
        total += count as u64;
        if total > descriptor.size {
            return Err(wrong_size(total));
        }
        let chunk = &buffer[..count];
        hasher.update(chunk);
        if let Some(pipe) = &mut sink
            && pipe.write_all(chunk).is_err()
        {
            sink = None;
        }
        progress.store(total, Ordering::Relaxed);
    }
    if total != descriptor.size {
        return Err(wrong_size(total));
    }
    if hasher.finish() != descriptor.digest {
        return Err(ImageError::BlobDigest { digest: digest() });
    }
    Ok(())
}

/// The worker's answer, once it has ended.
fn finish(worker: Worker, answer: io::PipeReader) -> Result<Report, String> {
    let mut text = Vec::new();
    let read = answer.take(MAX_REPORT_BYTES).read_to_end(&mut text);
    let status = worker.wait();
    let outcome = read.and_then(|_| Ok(serde_json::from_slice::<Outcome>(&text)?));
    match (outcome, status) {
        (Ok(Outcome::Done(report)), _) => Ok(report),
        (Ok(Outcome::Failed(reason)), _) => Err(reason),
        (Err(error), Ok(status)) => Err(format!(
            "unpack worker ended with {status:?} and no answer: {error}"
        )),
        (Err(_), Err(error)) => Err(format!("unpack worker was lost: {error}")),
    }
}
