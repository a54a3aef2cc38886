//! Checks and errors that every section shares. An error names the field of the request, never a value of the
//! environment: those may be secrets.

use super::SpecError;

/// Result of this module.
pub(super) type Result<T> = std::result::Result<T, SpecError>;

pub(super) fn invalid(field: impl Into<String>, why: impl Into<String>) -> SpecError {
    SpecError::invalid(field, why)
}

/// `what` is a noun with its article.
pub(super) fn unsupported(field: impl Into<String>, what: &'static str) -> SpecError {
    SpecError::unsupported(field, what)
}

/// The value of an enum field; one that this version does not know is refused, never taken for the default.
pub(super) fn known<T: TryFrom<i32>>(field: &str, value: i32) -> Result<T> {
    T::try_from(value).map_err(|_| invalid(field, format!("{value} is not a known value")))
}

/// An absolute path inside the container, without empty, `.` and `..` parts: as its words are, whatever links the image
/// has. Where it leads is settled inside the root, by the runtime.
pub(super) fn inside(field: &str, path: &str) -> Result<String> {
    if !path.starts_with('/') {
        return Err(invalid(field, format!("{path:?} is not an absolute path")));
    }
    if path.contains('\0') {
        return Err(invalid(field, "holds a NUL byte"));
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            name => parts.push(name),
        }
    }
    Ok(format!("/{}", parts.join("/")))
}
