//! What went wrong while the root was built.

use thiserror::Error;

/// Result of a step.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// A step that failed, or one that was refused before it did harm.
#[derive(Debug, Error)]
pub(crate) enum Error {
    /// The kernel refused a call.
    #[error("cannot {doing} {what}")]
    Failed {
        /// What was being done: `bind the root`.
        doing: &'static str,
        /// To what.
        what: String,
        /// The call that failed.
        #[source]
        source: coracle_kernel::Error,
    },
    /// The configuration or the image asks for something unsafe or impossible.
    #[error("{what} {reason}")]
    Refused {
        /// What was asked for: `"/proc/self"`.
        what: String,
        /// Why it is refused.
        reason: String,
    },
}

impl Error {
    /// A refusal.
    pub(crate) fn refused(what: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Refused {
            what: what.into(),
            reason: reason.into(),
        }
    }
}

/// Says what a failing call was made for.
pub(crate) trait Doing<T> {
    /// Wraps the kernel's error: `cannot <doing> <what>`.
    fn doing(self, doing: &'static str, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for coracle_kernel::Result<T> {
    fn doing(self, doing: &'static str, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Failed {
            doing,
            what: what(),
            source,
        })
    }
}
