//! The one table from domain errors to gRPC codes.

use coracle_engine::Error as EngineError;
use coracle_image::{FailureKind, FetchError, ImageError, PullError};
use tonic::{Code, Status};

/// What a client gets for an operation of the engine that failed.
pub(crate) fn of_engine(error: &EngineError) -> Status {
    let code = match error {
        EngineError::NotFound { .. } => Code::NotFound,
        EngineError::Ambiguous { .. } | EngineError::Invalid { .. } => Code::InvalidArgument,
        EngineError::State { .. } | EngineError::Stopping(_) => Code::FailedPrecondition,
        EngineError::Unsupported(_) => Code::Unimplemented,
        EngineError::Deadline { .. } => Code::DeadlineExceeded,
        EngineError::ShuttingDown => Code::Unavailable,
        EngineError::Step { .. } => Code::Unknown,
    };
    Status::new(code, error.chain())
}

/// What a client gets for a pull that failed. A kubelet knows an unreachable registry by the message's first word.
pub(crate) fn of_pull(error: &PullError) -> Status {
    let text = chain(error);
    match error {
        PullError::Fetch {
            source: FetchError::Failed(failure),
            ..
        } => match failure.kind {
            FailureKind::Unavailable => Status::unknown(format!("RegistryUnavailable: {text}")),
            FailureKind::NotFound => Status::not_found(text),
            FailureKind::Denied => Status::permission_denied(text),
            FailureKind::Protocol => Status::unknown(text),
        },
        PullError::Platform { .. } => Status::not_found(text),
        PullError::Store(error) => of_image(error),
        _ => Status::unknown(text),
    }
}

/// What a client gets for an operation of the image store that failed.
pub(crate) fn of_image(error: &ImageError) -> Status {
    match error {
        ImageError::InUse(_) => Status::failed_precondition(chain(error)),
        _ => Status::unknown(chain(error)),
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
