//! A client's connection: TCP as it is, or TLS over it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio_rustls::server::TlsStream;

/// TLS over TCP.
type Sealed = Box<TlsStream<TcpStream>>;

/// A connection.
pub(crate) enum Socket {
    Plain(TcpStream),
    Tls(Sealed),
}

/// The side of it that is read.
pub(crate) enum Reading {
    Plain(OwnedReadHalf),
    Tls {
        half: ReadHalf<Sealed>,
        /// A descriptor of the same socket, for what TLS does not tell.
        below: TcpStream,
    },
}

/// The side of it that is written. What was written to TLS is on its way only when it was flushed.
pub(crate) enum Writing {
    Plain(OwnedWriteHalf),
    Tls(WriteHalf<Sealed>),
}

impl Socket {
    /// The two sides, each for an owner of its own.
    pub(crate) fn split(self) -> io::Result<(Reading, Writing)> {
        match self {
            Socket::Plain(socket) => {
                let (read, write) = socket.into_split();
                Ok((Reading::Plain(read), Writing::Plain(write)))
            }
            Socket::Tls(sealed) => {
                let below = coracle_kernel::fd::dup(sealed.get_ref().0)?;
                let below = TcpStream::from_std(below.into())?;
                let (half, write) = tokio::io::split(sealed);
                Ok((Reading::Tls { half, below }, Writing::Tls(write)))
            }
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

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Plain(socket) => Pin::new(socket).poll_read(context, buffer),
            Socket::Tls(sealed) => Pin::new(sealed).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Socket::Plain(socket) => Pin::new(socket).poll_write(context, bytes),
            Socket::Tls(sealed) => Pin::new(sealed).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Plain(socket) => Pin::new(socket).poll_flush(context),
            Socket::Tls(sealed) => Pin::new(sealed).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Plain(socket) => Pin::new(socket).poll_shutdown(context),
            Socket::Tls(sealed) => Pin::new(sealed).poll_shutdown(context),
        }
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

impl AsyncWrite for Writing {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Writing::Plain(half) => Pin::new(half).poll_write(context, bytes),
            Writing::Tls(half) => Pin::new(half).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Writing::Plain(half) => Pin::new(half).poll_write_vectored(context, slices),
            Writing::Tls(half) => Pin::new(half).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Writing::Plain(half) => half.is_write_vectored(),
            Writing::Tls(half) => half.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Writing::Plain(half) => Pin::new(half).poll_flush(context),
            Writing::Tls(half) => Pin::new(half).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Writing::Plain(half) => Pin::new(half).poll_shutdown(context),
            Writing::Tls(half) => Pin::new(half).poll_shutdown(context),
        }
    }
}
