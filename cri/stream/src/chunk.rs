//! Chunks: what a session sends, on its way to the client; and the pool that bounds how much of it there is.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coracle_kernel::error::Errno;
use coracle_kernel::fd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Room before the bytes of a chunk for every head that may come before them.
pub(crate) const HEADROOM: usize = 32;

/// Up to so much is copied where more goes through a pipe. Each of a pipe's 64 slots keeps a block of 32 KiB, if only one
/// byte of that is meant: who sends byte by byte would have thousands of times as much kept for it as it has sent.
const LITTLE: usize = 32 << 10;

/// Unused chunks whose memory a pool keeps. Pipes are kept all, with the little memory beside them: to make one takes
/// longer than to fill it.
const KEPT: usize = 2;

/// Chunks of one session for what it sends: as many as may be on their way at once, whatever the number of streams.
pub(crate) struct Pool {
    kind: Kind,
    size: usize,
    unused: Mutex<Vec<Store>>,
    turns: Arc<Semaphore>,
}

/// Where the chunks of a pool have their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// In memory, from where they can be put into any form.
    Memory,
    /// Where there is much, in a pipe: it goes there without being copied, and from there to a socket.
    Pipe,
}

/// Some bytes, in memory or in a pipe.
pub(crate) struct Chunk {
    store: Store,
    /// How many are in memory, behind the room for heads.
    length: usize,
    pool: Arc<Pool>,
    /// None only if the semaphore were closed, which nobody does.
    _turn: Option<OwnedSemaphorePermit>,
}

/// What a chunk has its bytes in, one after another the same.
struct Store {
    memory: Box<[u8]>,
    pipe: Option<Pipe>,
}

/// A pipe of our own: nobody else has an end of it.
pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// Bytes in it.
    holds: usize,
}

impl Pool {
    /// `count` chunks of `size` bytes, none of them made yet. Where no pipe can be had, everything is copied.
    pub(crate) fn new(kind: Kind, count: usize, size: usize) -> Arc<Pool> {
        Arc::new(Pool {
            kind,
            size,
            unused: Mutex::default(),
            turns: Arc::new(Semaphore::new(count)),
        })
    }

    /// Waits for an empty chunk; who asks first is served first.
    pub(crate) async fn take(self: &Arc<Pool>) -> Chunk {
        let turn = Arc::clone(&self.turns).acquire_owned().await.ok();
        let unused = self.lock().pop();
        Chunk {
            store: unused.unwrap_or_else(|| self.store()),
            length: 0,
            pool: Arc::clone(self),
            _turn: turn,
        }
    }

    fn store(&self) -> Store {
        let (room, pipe) = match self.kind {
            Kind::Memory => (self.size, None),
            Kind::Pipe => (self.size.min(LITTLE), Pipe::new(self.size).ok()),
        };
        Store {
            memory: vec![0; HEADROOM + room].into_boxed_slice(),
            pipe,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Store>> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Chunk {
    /// Fills an empty chunk with what one read of `source` gives, `most` bytes at most; 0 at its end. Waits only if the
    /// source does.
    pub(crate) fn fill(&mut self, source: impl AsFd, most: usize) -> io::Result<usize> {
        let (memory, source) = (&mut self.store.memory[HEADROOM..], source.as_fd());
        if let Some(pipe) = &mut self.store.pipe {
            match pipe.fill(source, self.pool.size.min(most)) {
                Ok(moved) if moved > memory.len() => return Ok(moved),
                Ok(1..) => {
                    self.length = pipe.read(memory)?;
                    return Ok(self.length);
                }
                // No more than what splice(2) is able to say: of a TCP socket it gives nothing from an urgent byte on,
                // before the end or at it, and sandboxes refuse it altogether. read(2) has the last word.
                Ok(0) | Err(Errno::EAGAIN | Errno::EINVAL | Errno::ENOSYS | Errno::EPERM) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let room = memory.len().min(most);
        self.length = fd::read(source, &mut memory[..room])?;
        Ok(self.length)
    }

    pub(crate) fn len(&self) -> usize {
        self.length + self.store.pipe.as_ref().map_or(0, |pipe| pipe.holds)
    }

    /// The pipe, if the bytes are in it.
    pub(crate) fn pipe(&mut self) -> Option<&mut Pipe> {
        self.store.pipe.as_mut().filter(|pipe| pipe.holds > 0)
    }

    /// Room for heads and the bytes behind it, if they are in memory.
    pub(crate) fn memory(&mut self) -> &mut [u8] {
        &mut self.store.memory[..HEADROOM + self.length]
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // What was not sent is of a connection that is over: the next one must not see it. And who has no pipe is to try
        // for one again.
        let pipe = self.store.pipe.take().filter(|pipe| pipe.holds == 0);
        let memory = std::mem::take(&mut self.store.memory);
        let mut unused = self.pool.lock();
        let kept = match self.pool.kind {
            Kind::Memory => unused.len() < KEPT,
            Kind::Pipe => pipe.is_some(),
        };
        if kept {
            unused.push(Store { memory, pipe });
        }
    }
}

impl Pipe {
    fn new(size: usize) -> Result<Pipe, coracle_kernel::error::Error> {
        let (read, write) = fd::pipe()?;
        // one that stays smaller only makes more work
        if fd::pipe_size(&write)? < size {
            let _ = fd::set_pipe_size(&write, size);
        }
        Ok(Pipe {
            read,
            write,
            holds: 0,
        })
    }

    fn fill(&mut self, source: impl AsFd, most: usize) -> Result<usize, Errno> {
        let moved = fd::splice(source, &self.write, most)?;
        self.holds += moved;
        Ok(moved)
    }

    /// Reads all that is in it to the beginning of `memory`, which is large enough.
    fn read(&mut self, memory: &mut [u8]) -> Result<usize, Errno> {
        let mut length = 0;
        while self.holds > 0 {
            let read = fd::read(&self.read, &mut memory[length..])?;
            self.holds -= read;
            length += read;
        }
        Ok(length)
    }

    pub(crate) fn holds(&self) -> usize {
        self.holds
    }

    /// Moves some of what is in it on to a socket, which must not wait.
    pub(crate) fn empty(&mut self, target: impl AsFd) -> Result<usize, Errno> {
        let moved = fd::splice(&self.read, target, self.holds)?;
        self.holds -= moved;
        Ok(moved)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use coracle_kernel::{creds, seccomp, syscall};

    use super::*;

    const SIZE: usize = 256 << 10;

    async fn chunk_with(pool: &Arc<Pool>, bytes: &[u8]) -> Chunk {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(bytes).unwrap();
        let mut chunk = pool.take().await;
        assert_eq!(chunk.fill(&there, SIZE).unwrap(), bytes.len());
        assert_eq!(chunk.len(), bytes.len());
        chunk
    }

    /// What a chunk has, as its receiver gets it.
    fn sent(mut chunk: Chunk) -> Vec<u8> {
        let (mut here, there) = UnixStream::pair().unwrap();
        match chunk.pipe() {
            Some(pipe) => {
                pipe.empty(&there).unwrap();
                assert_eq!(pipe.holds(), 0);
            }
            None => (&there).write_all(&chunk.memory()[HEADROOM..]).unwrap(),
        }
        drop(there);
        let mut bytes = Vec::new();
        here.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[tokio::test]
    async fn much_goes_through_a_pipe_and_what_is_little_is_copied() {
        let pool = Pool::new(Kind::Pipe, 1, SIZE);
        for (length, in_pipe) in [(1, false), (LITTLE, false), (LITTLE + 1, true), (100_000, true)] {
            let mut chunk = chunk_with(&pool, &vec![7; length]).await;
            assert_eq!(chunk.pipe().is_some(), in_pipe, "{length}");
            assert_eq!(sent(chunk), vec![7; length]);
        }
        // no more than is asked for
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(&[7; 100_000]).unwrap();
        for most in [1, 50_000] {
            let mut chunk = pool.take().await;
            assert_eq!(chunk.fill(&there, most).unwrap(), most);
        }
    }

    #[tokio::test]
    async fn a_chunk_is_used_again_without_what_was_in_it() {
        for (kind, length) in [(Kind::Memory, 1000), (Kind::Pipe, 1000), (Kind::Pipe, 100_000)] {
            let pool = Pool::new(kind, 3, SIZE);
            let bytes = |byte| vec![byte; length];
            assert_eq!(sent(chunk_with(&pool, &bytes(1)).await), bytes(1));
            assert_eq!(pool.lock().len(), 1, "{kind:?}");
            // never sent: its connection has ended
            drop(chunk_with(&pool, &bytes(2)).await);
            let several = [
                chunk_with(&pool, &bytes(3)).await,
                chunk_with(&pool, &bytes(4)).await,
                chunk_with(&pool, &bytes(5)).await,
            ];
            assert_eq!(several.map(sent), [3, 4, 5].map(bytes), "{kind:?}");
            let kept = if kind == Kind::Memory { KEPT } else { 3 };
            assert_eq!(pool.lock().len(), kept, "{kind:?}");
        }
    }

    #[tokio::test]
    async fn nothing_to_read_is_no_wait_and_the_end_is_none() {
        for kind in [Kind::Memory, Kind::Pipe] {
            let pool = Pool::new(kind, 1, SIZE);
            let (here, there) = UnixStream::pair().unwrap();
            there.set_nonblocking(true).unwrap();
            let mut chunk = pool.take().await;
            let error = chunk.fill(&there, SIZE).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{kind:?}");
            drop(here);
            assert_eq!(chunk.fill(&there, SIZE).unwrap(), 0, "{kind:?}");
        }
    }

    #[tokio::test]
    async fn without_a_pipe_everything_is_copied() {
        let pool = Pool::new(Kind::Pipe, 1, SIZE);
        let mut chunk = pool.take().await;
        chunk.store.pipe = None;
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(&[7; 100_000]).unwrap();
        assert_eq!(chunk.fill(&there, SIZE).unwrap(), LITTLE);
        assert_eq!(sent(chunk), [7; LITTLE]);
        // the next one looks for one again
        assert!(pool.take().await.store.pipe.is_some());
    }

    #[test]
    fn where_splice_is_denied_everything_is_copied() {
        for errno in [Errno::EPERM, Errno::ENOSYS, Errno::EINVAL] {
            let denied = std::thread::spawn(move || {
                let pool = Pool::new(Kind::Pipe, 1, SIZE);
                let mut chunk = tokio::runtime::Builder::new_current_thread()
                    .build()
                    .unwrap()
                    .block_on(pool.take());
                let (mut here, there) = UnixStream::pair().unwrap();
                here.write_all(&[7; 100_000]).unwrap();
                let program = seccomp::lacking_program(syscall::SPLICE, None, errno);
                creds::set_no_new_privs().unwrap();
                seccomp::load(&program, seccomp::FilterFlags::empty()).unwrap();
                assert_eq!(chunk.fill(&there, SIZE).unwrap(), LITTLE, "{errno:?}");
                assert_eq!(sent(chunk), [7; LITTLE]);
            });
            denied.join().unwrap();
        }
    }
}
