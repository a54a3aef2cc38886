//! The log of a container as the CRI wants it: `<time> <stream> <P|F> <text>` lines, appended.
//!
//! A log that cannot be written never stops the container: its output is read and dropped, the bytes are counted, and
//! once writing works again a line says how many they were. A write that went through in part is taken back to the end
//! of its last whole line.

use std::fs::File;
use std::io::IoSlice;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use coracle_kernel::path::OFlags;
use coracle_kernel::{Errno, Error, fd};

/// Longest piece of a line in one entry; a longer line becomes several, all but the last marked `P`.
pub(crate) const PIECE: usize = 16 << 10;

/// How long nothing is tried after a write that failed.
const PATIENCE_NS: u64 = 200_000_000;

/// Entries in one write.
const BATCH: usize = 64;

/// Slices of an entry: head of the line, text kept from before, text, end of line.
const SLICES: usize = 4;

/// Which output it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A log file.
#[derive(Debug)]
pub(crate) struct Log {
    path: String,
    file: File,
    /// Bytes that no file holds, since the container was made.
    lost: u64,
    gap: Option<Gap>,
}

/// Output is being dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    /// How much so far.
    pub(crate) bytes: u64,
    /// Why.
    pub(crate) errno: Errno,
    /// When to try again, by the monotonic clock.
    pub(crate) retry_ns: u64,
    /// Whether the file ends within a line, because not even taking it back worked.
    pub(crate) torn: bool,
}

/// The two clocks at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    /// Nanoseconds since 1970.
    pub(crate) wall_ns: u64,
    /// Nanoseconds of the monotonic clock.
    pub(crate) monotonic_ns: u64,
}

impl Log {
    /// Opens (and where it is missing makes) the file. Its directory must exist.
    pub(crate) fn open(path: String) -> Result<Log, Error> {
        let file = open(&path)?;
        Ok(Log {
            path,
            file,
            lost: 0,
            gap: None,
        })
    }

    /// The same log after an upgrade.
    pub(crate) fn resume(path: String, file: File, lost: u64, gap: Option<Gap>) -> Log {
        Log {
            path,
            file,
            lost,
            gap,
        }
    }

    /// Goes on in a new file of the same name. After an error no new file is there, and the old one stays in use.
    pub(crate) fn reopen(&mut self, now: Now) -> Result<(), Error> {
        self.file = open(&self.path)?;
        if let Some(gap) = &mut self.gap {
            gap.torn = false;
            gap.retry_ns = 0;
        }
        self.heal(now);
        Ok(())
    }

    /// Its path.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Its file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Bytes that no file holds, since the container was made.
    pub(crate) fn lost(&self) -> u64 {
        self.lost
    }

    /// The loss that is going on.
    pub(crate) fn gap(&self) -> Option<Gap> {
        self.gap
    }

    /// Appends what came out of a stream. `pending` keeps a line's beginning until its end comes.
    pub(crate) fn append(&mut self, stream: Stream, pending: &mut Vec<u8>, mut text: &[u8], now: Now) {
        let heads = Heads::new(stream, now.wall_ns);
        let mut kept = std::mem::take(pending);
        let mut batch = Batch::new(&heads);
        let mut first: &[u8] = &kept;
        while !text.is_empty() {
            let room = PIECE - first.len();
            let window = text.get(..=room).unwrap_or(text);
            let (full, len) = match window.iter().position(|byte| *byte == b'\n') {
                Some(len) => (true, len),
                None if window.len() > room => (false, room),
                None => break,
            };
            let (piece, rest) = text.split_at(len);
            batch.push(Entry {
                full,
                kept: first,
                text: piece,
            });
            text = rest.get(usize::from(full)..).unwrap_or_default();
            first = &[];
            if batch.is_full() {
                self.write(&mut batch, now);
            }
        }
        let used = first.is_empty();
        self.write(&mut batch, now);
        // What is left has no end yet. Its buffer is kept while there is something in it, and given back otherwise.
        if used {
            kept.clear();
        }
        kept.extend_from_slice(text);
        if !kept.is_empty() {
            *pending = kept;
        }
    }

    /// Appends what is left at the end of a stream as a line of its own.
    pub(crate) fn end(&mut self, stream: Stream, pending: &mut Vec<u8>, now: Now) {
        let kept = std::mem::take(pending);
        if !kept.is_empty() {
            let heads = Heads::new(stream, now.wall_ns);
            let mut batch = Batch::new(&heads);
            batch.push(Entry {
                full: true,
                kept: &kept,
                text: &[],
            });
            self.write(&mut batch, now);
        }
    }

    /// If output was dropped and it is time: tries to write the line that says so, after which writing goes on.
    pub(crate) fn heal(&mut self, now: Now) {
        let Some(gap) = self.gap.filter(|gap| gap.retry_ns <= now.monotonic_ns) else {
            return;
        };
        let heads = Heads::new(Stream::Stderr, now.wall_ns);
        let text = format!(
            "coracle: {} bytes of output were not logged here: {}",
            gap.bytes, gap.errno
        );
        let end: &[u8] = if gap.torn { b"\n" } else { b"" };
        let line = [end, heads.full.as_bytes(), text.as_bytes(), b"\n"].concat();
        match self.write_slices(&mut [IoSlice::new(&line)]) {
            Ok(()) => self.gap = None,
            Err((written, errno)) => {
                // Its first byte ends the torn line; the rest of it is none.
                let torn = gap.torn && written == 0;
                let taken_back = self.take_back(written - usize::from(gap.torn && written > 0));
                let retry_ns = now.monotonic_ns + PATIENCE_NS;
                self.gap = Some(Gap {
                    errno,
                    retry_ns,
                    torn: torn || !taken_back,
                    ..gap
                });
            }
        }
    }

    /// Writes a batch and empties it.
    fn write(&mut self, batch: &mut Batch<'_>, now: Now) {
        if batch.len == 0 {
            return;
        }
        self.heal(now);
        if let Some(gap) = &mut self.gap {
            let bytes: u64 = batch.entries().iter().map(Entry::content).sum();
            gap.bytes += bytes;
            self.lost += bytes;
            batch.len = 0;
            return;
        }
        let mut slices = [IoSlice::new(&[]); BATCH * SLICES];
        let outcome = self.write_slices(batch.slices(&mut slices));
        if let Err((written, errno)) = outcome {
            let (mut whole, mut bytes) = (0, 0);
            for entry in batch.entries() {
                let end = whole + entry.size(batch.heads);
                if bytes == 0 && end <= written {
                    whole = end;
                } else {
                    bytes += entry.content();
                }
            }
            let torn = !self.take_back(written - whole);
            self.lost += bytes;
            self.gap = Some(Gap {
                bytes,
                errno,
                retry_ns: now.monotonic_ns + PATIENCE_NS,
                torn,
            });
        }
        batch.len = 0;
    }

    /// Writes everything, or says how much went and why no more.
    fn write_slices(&self, mut slices: &mut [IoSlice<'_>]) -> Result<(), (usize, Errno)> {
        let mut written = 0;
        while slices.iter().any(|slice| !slice.is_empty()) {
            match fd::write_vectored(&self.file, slices) {
                Ok(0) => return Err((written, Errno::EIO)),
                Ok(count) => {
                    written += count;
                    IoSlice::advance_slices(&mut slices, count);
                }
                Err(errno) => return Err((written, errno)),
            }
        }
        Ok(())
    }

    /// Cuts the last bytes off again; whether that worked. Nobody else writes to the file.
    fn take_back(&self, bytes: usize) -> bool {
        if bytes == 0 {
            return true;
        }
        let size = self.file.metadata().map(|metadata| metadata.len());
        size.and_then(|size| self.file.set_len(size.saturating_sub(bytes as u64)))
            .is_ok()
    }
}

/// The heads of entries of one stream and one moment.
struct Heads {
    partial: String,
    full: String,
}

impl Heads {
    fn new(stream: Stream, wall_ns: u64) -> Heads {
        let (seconds, nanoseconds) = (wall_ns / 1_000_000_000, wall_ns % 1_000_000_000);
        let time = coracle_spec::rfc3339_nanos(
            i64::try_from(seconds).unwrap_or_default(),
            u32::try_from(nanoseconds).unwrap_or_default(),
        );
        let name = match stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        };
        Heads {
            partial: format!("{time} {name} P "),
            full: format!("{time} {name} F "),
        }
    }
}

/// One line of the file.
#[derive(Clone, Copy)]
struct Entry<'a> {
    full: bool,
    kept: &'a [u8],
    text: &'a [u8],
}

impl Entry<'_> {
    /// Bytes of the container's in it.
    fn content(&self) -> u64 {
        (self.kept.len() + self.text.len() + usize::from(self.full)) as u64
    }

    /// Bytes of the line.
    fn size(&self, heads: &Heads) -> usize {
        let head = if self.full { &heads.full } else { &heads.partial };
        head.len() + self.kept.len() + self.text.len() + 1
    }
}

/// Entries on their way into one write.
struct Batch<'a> {
    heads: &'a Heads,
    entries: [Entry<'a>; BATCH],
    len: usize,
}

impl<'a> Batch<'a> {
    fn new(heads: &'a Heads) -> Batch<'a> {
        Batch {
            heads,
            entries: [Entry {
                full: true,
                kept: &[],
                text: &[],
            }; BATCH],
            len: 0,
        }
    }

    fn push(&mut self, entry: Entry<'a>) {
        if let Some(slot) = self.entries.get_mut(self.len) {
            *slot = entry;
            self.len += 1;
        }
    }

    fn is_full(&self) -> bool {
        self.len == BATCH
    }

    fn entries(&self) -> &[Entry<'a>] {
        self.entries.get(..self.len).unwrap_or_default()
    }

    fn slices<'b>(&self, slices: &'b mut [IoSlice<'a>; BATCH * SLICES]) -> &'b mut [IoSlice<'a>] {
        for (entry, slices) in self.entries().iter().zip(slices.chunks_exact_mut(SLICES)) {
            let head = if entry.full {
                &self.heads.full
            } else {
                &self.heads.partial
            };
            let parts = [head.as_bytes(), entry.kept, entry.text, b"\n"];
            for (slice, part) in slices.iter_mut().zip(parts) {
                *slice = IoSlice::new(part);
            }
        }
        slices.get_mut(..self.len * SLICES).unwrap_or_default()
    }
}

fn open(path: &str) -> Result<File, Error> {
    // Never through a symlink, and never waiting for the reader of a FIFO that somebody put there.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits();
    File::options()
        .append(true)
        .create(true)
        .mode(0o640)
        .custom_flags(flags.cast_signed())
        .open(Path::new(path))
        .map_err(|error| Error::from_io("open", format!("{path:?}, O_APPEND|O_CREAT"), &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Now = Now {
        wall_ns: 1_700_000_000_123_456_789,
        monotonic_ns: 1,
    };
    const TIME: &str = "2023-11-14T22:13:20.123456789Z";

    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let dir = std::env::temp_dir().join(format!("coracle-log-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            Scratch(dir)
        }

        fn path(&self) -> String {
            self.0.join("0.log").to_str().unwrap().to_owned()
        }

        fn lines(&self) -> Vec<String> {
            let text = std::fs::read_to_string(self.path()).unwrap();
            assert!(text.is_empty() || text.ends_with('\n'), "ends within a line");
            text.lines().map(|line| line.replacen(TIME, "T", 1)).collect()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// What a reader of the log puts together again.
    fn joined(lines: &[String]) -> String {
        let mut text = String::new();
        for line in lines {
            let (tag, content) = line.strip_prefix("T stdout ").unwrap().split_at(2);
            text.push_str(content);
            if tag == "F " {
                text.push('\n');
            }
        }
        text
    }

    #[test]
    fn lines_are_written_with_time_stream_and_tag() {
        let scratch = Scratch::new("lines");
        let mut log = Log::open(scratch.path()).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        log.append(Stream::Stdout, &mut out, b"one\ntw", NOW);
        log.append(Stream::Stderr, &mut err, b"\n", NOW);
        log.append(Stream::Stdout, &mut out, b"o\nthree", NOW);
        assert_eq!((out.as_slice(), err.capacity()), (&b"three"[..], 0));
        log.end(Stream::Stdout, &mut out, NOW);
        log.end(Stream::Stdout, &mut out, NOW);
        assert_eq!(
            scratch.lines(),
            [
                "T stdout F one",
                "T stderr F ",
                "T stdout F two",
                "T stdout F three"
            ]
        );
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(
            std::fs::metadata(scratch.path()).unwrap().permissions().mode() & 0o777,
            0o640
        );
    }

    #[test]
    fn long_lines_are_split_and_can_be_joined_again() {
        for length in [PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7] {
            for chunk in [1000, PIECE - 1, PIECE, PIECE + 1, 64 << 10] {
                let scratch = Scratch::new("split");
                let mut log = Log::open(scratch.path()).unwrap();
                let text = format!("{}\nend\n", "x".repeat(length));
                let mut pending = Vec::new();
                for part in text.as_bytes().chunks(chunk) {
                    log.append(Stream::Stdout, &mut pending, part, NOW);
                    assert!(pending.len() <= PIECE);
                }
                let lines = scratch.lines();
                assert!(lines.iter().all(|line| line.len() <= PIECE + "T stdout P ".len()));
                assert_eq!(joined(&lines), text, "{length} in chunks of {chunk}");
                // A line that just fits is one entry.
                assert_eq!(
                    lines.len(),
                    1 + length.div_ceil(PIECE),
                    "{length} in chunks of {chunk}"
                );
            }
        }
    }

    #[test]
    fn many_short_lines_need_several_writes() {
        let scratch = Scratch::new("many");
        let mut log = Log::open(scratch.path()).unwrap();
        let text: String = (0..5000).map(|n| format!("{n}\n")).collect();
        log.append(Stream::Stdout, &mut Vec::new(), text.as_bytes(), NOW);
        assert_eq!(joined(&scratch.lines()), text);
    }

    #[test]
    fn reopening_goes_on_in_a_new_file_or_stays_in_the_old() {
        let scratch = Scratch::new("reopen");
        let mut log = Log::open(scratch.path()).unwrap();
        let mut pending = Vec::new();
        log.append(Stream::Stdout, &mut pending, b"old\n", NOW);
        std::fs::rename(scratch.path(), scratch.0.join("1.log")).unwrap();
        log.append(Stream::Stdout, &mut pending, b"late\nhal", NOW);
        log.reopen(NOW).unwrap();
        log.append(Stream::Stdout, &mut pending, b"f\n", NOW);
        assert_eq!(scratch.lines(), ["T stdout F half"]);
        let old = std::fs::read_to_string(scratch.0.join("1.log")).unwrap();
        assert_eq!(old.replace(TIME, "T"), "T stdout F old\nT stdout F late\n");

        std::fs::rename(&scratch.0, scratch.0.with_extension("moved")).unwrap();
        assert_eq!(log.reopen(NOW).unwrap_err().errno(), Errno::ENOENT);
        std::fs::rename(scratch.0.with_extension("moved"), &scratch.0).unwrap();
        log.append(Stream::Stdout, &mut pending, b"more\n", NOW);
        assert_eq!(scratch.lines(), ["T stdout F half", "T stdout F more"]);
    }

    #[test]
    fn a_symlink_is_not_followed() {
        let scratch = Scratch::new("symlink");
        std::os::unix::fs::symlink("/nonexistent", scratch.path()).unwrap();
        assert_eq!(Log::open(scratch.path()).unwrap_err().errno(), Errno::ELOOP);
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_told() {
        let scratch = Scratch::new("full");
        // Always ENOSPC; opened behind the log's back, which insists on files of its own.
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut log = Log::resume(scratch.path(), full, 0, None);
        let mut pending = Vec::new();
        log.append(Stream::Stdout, &mut pending, b"0123\n56\nrest", NOW);
        assert_eq!((log.lost(), log.gap().unwrap().errno), (8, Errno::ENOSPC));
        log.append(Stream::Stdout, &mut pending, b"\n", NOW);
        assert_eq!(log.lost(), 13);
        // Space is back: at once it is not tried, later it is.
        log.file = open(&scratch.path()).unwrap();
        log.append(Stream::Stdout, &mut pending, b"x\n", NOW);
        assert_eq!((log.lost(), scratch.lines().len()), (15, 0));
        let later = Now {
            monotonic_ns: NOW.monotonic_ns + PATIENCE_NS,
            ..NOW
        };
        log.append(Stream::Stdout, &mut pending, b"y\n", later);
        assert_eq!(log.gap(), None);
        let told = "T stderr F coracle: 15 bytes of output were not logged here: No space left on device";
        assert_eq!(scratch.lines(), [told, "T stdout F y"]);
    }
}
