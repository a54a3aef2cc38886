//! The daemon's handle of a parse worker: bytes in, typed and bounded answers out.
//!
//! The worker gets requests at descriptor 3 (`kind`, length, bytes) and answers at 4 (length, JSON). One serves a whole
//! pull. The calls here block, at most [`DEADLINE`]; a worker that is silent for longer is killed.

use std::io::{self, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use coracle_kernel::epoll::{self, Interest};
use serde::{Deserialize, Serialize};

use crate::manifest::{self, ArchiveImage, Document, DocumentError, ImageConfig};
use crate::workers::{Role, Worker, Workers};

/// How long one document may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// The longest answer that is read.
const MAX_ANSWER_BYTES: u32 = 16 << 20;

/// What a pipe passes on as a whole (`PIPE_BUF`).
const PIECE_BYTES: usize = 4096;

/// A running parse worker.
#[derive(Debug)]
pub struct Parser {
    worker: Worker,
    requests: PipeWriter,
    answers: PipeReader,
}

/// Why a document was not parsed.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// The worker could not be started.
    #[error("parse worker did not start")]
    Start(#[source] io::Error),
    /// The worker died or hung on this document.
    #[error("parse worker failed on {0}")]
    Worker(&'static str, #[source] io::Error),
    /// The document is not acceptable.
    #[error(transparent)]
    Document(#[from] DocumentError),
}

/// What is to be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Document = 1,
    Config = 2,
    Archive = 3,
}

/// The worker's answer to one request.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Document(Document),
    Config(Box<ImageConfig>),
    Archive(Vec<ArchiveImage>),
    Refused(DocumentError),
}

impl Parser {
    /// Starts a worker.
    pub fn start(workers: &Workers) -> Result<Parser, ParseError> {
        let (request_end, requests) = io::pipe().map_err(ParseError::Start)?;
        let (answers, answer_end) = io::pipe().map_err(ParseError::Start)?;
        let worker = workers
            .start(Role::Parse, &[request_end.as_fd(), answer_end.as_fd()])
            .map_err(|error| ParseError::Start(error.into()))?;
        Ok(Parser {
            worker,
            requests,
            answers,
        })
    }

    /// Parses an index or manifest that was announced with this media type.
    pub fn document(&mut self, bytes: &[u8], announced: Option<&str>) -> Result<Document, ParseError> {
        if bytes.len() > manifest::MAX_MANIFEST_BYTES {
            let (document, limit) = ("manifest".into(), manifest::MAX_MANIFEST_BYTES);
            return Err(DocumentError::TooLarge { document, limit }.into());
        }
        match self.ask(Kind::Document, announced.unwrap_or_default(), bytes)? {
            Answer::Document(document) => {
                document.check()?;
                Ok(document)
            }
            other => Err(other.unexpected("manifest")),
        }
    }

    /// Parses an image configuration.
    pub fn config(&mut self, bytes: &[u8]) -> Result<ImageConfig, ParseError> {
        if bytes.len() > manifest::MAX_CONFIG_BYTES {
            let (document, limit) = ("image configuration".into(), manifest::MAX_CONFIG_BYTES);
            return Err(DocumentError::TooLarge { document, limit }.into());
        }
        match self.ask(Kind::Config, "", bytes)? {
            Answer::Config(config) => {
                config.check()?;
                Ok(*config)
            }
            other => Err(other.unexpected("image configuration")),
        }
    }

    /// Parses the `manifest.json` of a docker archive.
    pub fn archive(&mut self, bytes: &[u8]) -> Result<Vec<ArchiveImage>, ParseError> {
        if bytes.len() > manifest::MAX_MANIFEST_BYTES {
            let (document, limit) = ("manifest.json".into(), manifest::MAX_MANIFEST_BYTES);
            return Err(DocumentError::TooLarge { document, limit }.into());
        }
        match self.ask(Kind::Archive, "", bytes)? {
            Answer::Archive(images) => {
                manifest::check_archive(&images)?;
                Ok(images)
            }
            other => Err(other.unexpected("manifest.json")),
        }
    }

    fn ask(&mut self, kind: Kind, announced: &str, bytes: &[u8]) -> Result<Answer, ParseError> {
        let fail = |error| ParseError::Worker(kind.name(), error);
        let request = encode_request(kind, announced, bytes).map_err(fail)?;
        // A pipe that is ready takes this much without blocking.
        for piece in request.chunks(PIECE_BYTES) {
            self.wait(self.requests.as_fd(), Interest::WRITE).map_err(fail)?;
            self.requests.write_all(piece).map_err(fail)?;
        }
        let mut length = [0; 4];
        self.wait(self.answers.as_fd(), Interest::READ).map_err(fail)?;
        self.answers.read_exact(&mut length).map_err(fail)?;
        let length = u32::from_le_bytes(length);
        if length > MAX_ANSWER_BYTES {
            return Err(fail(io::Error::new(
                io::ErrorKind::InvalidData,
                "its answer is too long",
            )));
        }
        let mut answer = Vec::new();
        // In pieces, so that each can be waited for, and a false length costs no memory.
        while answer.len() < length as usize {
            let mut piece = [0; PIECE_BYTES];
            let most = piece.len().min(length as usize - answer.len());
            self.wait(self.answers.as_fd(), Interest::READ).map_err(fail)?;
            match self.answers.read(&mut piece[..most]).map_err(fail)? {
                0 => return Err(fail(io::ErrorKind::UnexpectedEof.into())),
                count => answer.extend_from_slice(&piece[..count]),
            }
        }
        serde_json::from_slice(&answer).map_err(|error| fail(error.into()))
    }

    fn wait(&self, fd: BorrowedFd<'_>, interest: Interest) -> io::Result<()> {
        if !epoll::wait_one(fd, interest, Some(DEADLINE))?.is_empty() {
            return Ok(());
        }
        self.worker.kill();
        Err(io::ErrorKind::TimedOut.into())
    }
}

impl Answer {
    fn unexpected(self, document: &'static str) -> ParseError {
        match self {
            Answer::Refused(error) => ParseError::Document(error),
            _ => ParseError::Worker(
                document,
                io::Error::new(io::ErrorKind::InvalidData, "it answered something else"),
            ),
        }
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Document => "manifest",
            Kind::Config => "image configuration",
            Kind::Archive => "manifest.json",
        }
    }
}

/// Serves requests until the daemon closes its end.
pub(crate) fn serve(mut requests: impl io::Read, mut answers: impl io::Write) -> io::Result<()> {
    while let Some((kind, announced, bytes)) = read_request(&mut requests)? {
        let announced = (!announced.is_empty()).then_some(announced.as_str());
        let answer = match kind {
            Kind::Document => manifest::parse_document(&bytes, announced).map(Answer::Document),
            Kind::Config => manifest::parse_config(&bytes).map(|config| Answer::Config(Box::new(config))),
            Kind::Archive => manifest::parse_archive(&bytes).map(Answer::Archive),
        };
        let json = serde_json::to_vec(&answer.unwrap_or_else(Answer::Refused))?;
        let length = u32::try_from(json.len()).map_err(|_| io::ErrorKind::InvalidData)?;
        answers.write_all(&length.to_le_bytes())?;
        answers.write_all(&json)?;
    }
    Ok(())
}

fn encode_request(kind: Kind, announced: &str, bytes: &[u8]) -> io::Result<Vec<u8>> {
    // A media type longer than this is none.
    let too_long = || io::Error::new(io::ErrorKind::InvalidInput, "its media type is too long");
    let announced_length = u8::try_from(announced.len()).map_err(|_| too_long())?;
    let length = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut request = vec![kind as u8, announced_length];
    request.extend_from_slice(&length.to_le_bytes());
    request.extend_from_slice(announced.as_bytes());
    request.extend_from_slice(bytes);
    Ok(request)
}

fn read_request(requests: &mut impl io::Read) -> io::Result<Option<(Kind, String, Vec<u8>)>> {
    let mut first = [0; 1];
    if requests.read(&mut first)? == 0 {
        return Ok(None);
    }
    let kind = match first[0] {
        1 => Kind::Document,
        2 => Kind::Config,
        3 => Kind::Archive,
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    let mut rest = [0; 5];
    requests.read_exact(&mut rest)?;
    let [announced_length, length @ ..] = rest;
    let mut announced = vec![0; usize::from(announced_length)];
    requests.read_exact(&mut announced)?;
    let length = u32::from_le_bytes(length) as usize;
    let mut bytes = vec![0; length.min(manifest::MAX_CONFIG_BYTES)];
    requests.read_exact(&mut bytes)?;
    let announced = String::from_utf8(announced).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(Some((kind, announced, bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_answered_in_order() {
        let mut requests = encode_request(Kind::Config, "", br#"{"rootfs":{}}"#).unwrap();
        requests.extend(encode_request(Kind::Document, manifest::OCI_INDEX, b"[]").unwrap());
        let mut answers = Vec::new();
        serve(requests.as_slice(), &mut answers).unwrap();
        let mut rest = answers.as_slice();
        let mut next = || {
            let (length, tail) = rest.split_at(4);
            let length = u32::from_le_bytes(length.try_into().unwrap()) as usize;
            let (json, tail) = tail.split_at(length);
            rest = tail;
            serde_json::from_slice::<Answer>(json).unwrap()
        };
        assert!(matches!(next(), Answer::Config(config) if *config == ImageConfig::default()));
        assert!(matches!(next(), Answer::Refused(DocumentError::Malformed { .. })));
        assert!(rest.is_empty());
        serve(&b"\x09"[..], io::sink()).unwrap_err();
        serve(&b"\x01\x00\xff"[..], io::sink()).unwrap_err();
    }
}
