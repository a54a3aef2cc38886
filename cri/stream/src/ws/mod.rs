//! WebSocket (RFC 6455), the server's half, without IO: frames, and the channels of Kubernetes in their messages.

pub(crate) mod channel;
pub(crate) mod frame;

pub(crate) use channel::Channels;
pub(crate) use frame::Decoder;

/// Why a connection cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error("frame with reserved bits {0:#04x}")]
    Reserved(u8),
    #[error("frame of unknown type {0}")]
    Opcode(u8),
    #[error("frame without a mask")]
    Unmasked,
    #[error("control frame that is fragmented or longer than 125 bytes")]
    Control,
    #[error("frame of {0} bytes")]
    Length(u64),
    #[error("a continuation of no message, or a message inside another")]
    Fragment,
    #[error("message that is not base64")]
    Base64,
    #[error("close signal that names no channel")]
    CloseSignal,
}
