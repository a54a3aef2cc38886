//! A client's connection: TCP as it is, or TLS over it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, Interest, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;

/// TLS over TCP.
type Sealed = Box<TlsStream<TcpStream>>;

/// A connection: TCP, or TLS.
pub(crate) type Socket = Either<TcpStream, Sealed>;

/// The side of it that is written. What was written to TLS is on its way only when it was flushed.
pub(crate) type Writing = Either<OwnedWriteHalf, WriteHalf<Sealed>>;

/// The side of it that is read.
pub(crate) enum Reading {
    Plain(OwnedReadHalf),
    Tls {
        half: ReadHalf<Sealed>,
        /// A descriptor of the same socket, for what TLS does not tell.
        below: TcpStream,
    },
}

/// The two sides, each for an owner of its own.
pub(crate) fn split(socket: Socket) -> io::Result<(Reading, Writing)> {
    match socket {
        Either::Left(socket) => {
            let (read, write) = socket.into_split();
            Ok((Reading::Plain(read), Either::Left(write)))
        }
        Either::Right(sealed) => {
            let below = coracle_kernel::fd::dup(sealed.get_ref().0)?;
            let below = TcpStream::from_std(below.into())?;
            let (half, write) = tokio::io::split(sealed);
            Ok((Reading::Tls { half, below }, Either::Right(write)))
        }
    }
}

impl Reading {
    /// Returns when the peer has closed its side, read or not.
    pub(crate) async fn closed(&self) -> io::Result<()> {
        // priority readiness comes with the peer's end as well, and without data that waits
        let ready = match self {
            Reading::Plain(half) => half.ready(Interest::PRIORITY).await?,
            Reading::Tls { below, .. } => below.ready(Interest::PRIORITY).await?,
        };
        if !ready.is_read_closed() {
            std::future::pending::<()>().await;
        }
        Ok(())
    }
}

impl AsyncRead for Reading {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Reading::Plain(half) => Pin::new(half).poll_read(context, buffer),
            Reading::Tls { half, .. } => Pin::new(half).poll_read(context, buffer),
        }
    }
}
