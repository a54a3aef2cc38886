//! What an operation answers when it does not succeed.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use crate::spec_gen::SpecError;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A cause that can be told to everybody who waits for the same operation.
pub type Cause = Arc<dyn StdError + Send + Sync>;

/// Failure of an operation. The server maps each variant to one gRPC code.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// There is no such thing (any more).
    #[error("{what} {id:?} not found")]
    NotFound {
        /// `pod sandbox`, `container`, `image`.
        what: &'static str,
        /// As it was asked for.
        id: String,
    },
    /// A short id that fits more than one.
    #[error("{what} id {id:?} is ambiguous")]
    Ambiguous {
        /// `pod sandbox`, `container`.
        what: &'static str,
        /// As it was asked for.
        id: String,
    },
    /// A request that can never work.
    #[error("{field}: {why}")]
    Invalid {
        /// Path of the field in the request.
        field: String,
        /// What is wrong with it.
        why: String,
    },
    /// A request that does not fit the present state.
    #[error("{what} {id} {why}")]
    State {
        /// `pod sandbox`, `container`.
        what: &'static str,
        /// Its id.
        id: String,
        /// What stands in the way.
        why: String,
    },
    /// Something that this version does not do.
    #[error("{0}")]
    Unsupported(String),
    /// A step did not end in time.
    #[error("{step} did not end within {limit:?}")]
    Deadline {
        /// The step, a verb and its object.
        step: &'static str,
        /// How long it was given.
        limit: Duration,
    },
    /// A step of an operation failed.
    #[error("cannot {step}")]
    Step {
        /// The step, a verb and its object.
        step: &'static str,
        /// Why.
        #[source]
        cause: Cause,
    },
    /// The operation was given up because the pod is being taken down.
    #[error("pod sandbox {0} is being stopped")]
    Stopping(String),
    /// The daemon is going down.
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

impl Error {
    /// A step that failed, with what it said.
    pub fn step(step: &'static str, cause: impl StdError + Send + Sync + 'static) -> Error {
        Error::Step {
            step,
            cause: Arc::new(cause),
        }
    }

    /// A request that can never work.
    pub fn invalid(field: impl Into<String>, why: impl Into<String>) -> Error {
        Error::Invalid {
            field: field.into(),
            why: why.into(),
        }
    }

    /// The whole chain in one line, as a client gets to see it.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = StdError::source(self);
        while let Some(error) = cause {
            // Writing to a String cannot fail.
            let _ = write!(text, ": {error}");
            cause = error.source();
        }
        text
    }
}

impl From<SpecError> for Error {
    fn from(error: SpecError) -> Error {
        match error {
            SpecError::Invalid { field, why } => Error::Invalid { field, why },
            SpecError::Unsupported { .. } => Error::Unsupported(error.to_string()),
            SpecError::Refused(cause) => Error::step("generate the container's config", cause),
        }
    }
}

/// Shorthand for `map_err` on the many steps of an operation.
pub(crate) trait Context<T> {
    /// Names the step that failed.
    fn step(self, step: &'static str) -> Result<T>;
}

impl<T, E: StdError + Send + Sync + 'static> Context<T> for std::result::Result<T, E> {
    fn step(self, step: &'static str) -> Result<T> {
        self.map_err(|cause| Error::step(step, cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_names_every_cause_once() {
        let error = Error::step("write the record", std::io::Error::other("disk on fire"));
        assert_eq!(error.chain(), "cannot write the record: disk on fire");
    }
}
