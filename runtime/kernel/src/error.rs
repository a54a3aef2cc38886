//! The error of every wrapper in this crate: the call, its arguments and the errno.

use std::borrow::Cow;
use std::fmt;

/// Result of a system call wrapper.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed system call: `openat2(3</run/x>, "etc/passwd"): No such file or directory`.
#[derive(Clone, PartialEq, Eq)]
pub struct Error {
    call: &'static str,
    args: Cow<'static, str>,
    errno: Errno,
}

/// An error number of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Errno(i32);

macro_rules! errnos {
    ($($name:ident),* $(,)?) => {
        impl Errno {
            $(
                #[doc = concat!("`", stringify!($name), "`")]
                pub const $name: Errno = Errno(libc::$name);
            )*

            /// The symbolic name, `ENOENT`, where it is one that this crate knows.
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                // Several names share a number (EAGAIN, EWOULDBLOCK), so this is a chain and not a match.
                $(if self.0 == libc::$name {
                    return Some(stringify!($name));
                })*
                None
            }
        }
    };
}

errnos! {
    EPERM, ENOENT, ESRCH, EINTR, EIO, ENXIO, E2BIG, ENOEXEC, EBADF, ECHILD, EAGAIN, ENOMEM, EACCES, EFAULT, ENOTBLK,
    EBUSY, EEXIST, EXDEV, ENODEV, ENOTDIR, EISDIR, EINVAL, ENFILE, EMFILE, ENOTTY, ETXTBSY, EFBIG, ENOSPC, ESPIPE,
    EROFS, EMLINK, EPIPE, EDOM, ERANGE, EDEADLK, ENAMETOOLONG, ENOLCK, ENOSYS, ENOTEMPTY, ELOOP, ENODATA, ETIME,
    EPROTO, EBADMSG, EOVERFLOW, ENOTUNIQ, EUSERS, ENOTSOCK, EDESTADDRREQ, EMSGSIZE, EPROTOTYPE, ENOPROTOOPT,
    EPROTONOSUPPORT, ESOCKTNOSUPPORT, EOPNOTSUPP, EPFNOSUPPORT, EAFNOSUPPORT, EADDRINUSE, EADDRNOTAVAIL, ENETDOWN,
    ENETUNREACH, ENETRESET, ECONNABORTED, ECONNRESET, ENOBUFS, EISCONN, ENOTCONN, ETOOMANYREFS, ETIMEDOUT,
    ECONNREFUSED, EHOSTDOWN, EHOSTUNREACH, EALREADY, EINPROGRESS, ESTALE, EDQUOT, EMEDIUMTYPE, ECANCELED, ENOKEY,
    EKEYEXPIRED, EKEYREVOKED, EKEYREJECTED, EOWNERDEAD, ENOTRECOVERABLE,
}

impl Errno {
    /// The calling thread's `errno`: meaningful only right after a failed call.
    #[must_use]
    pub fn last() -> Errno {
        Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }

    /// An errno from its number, as it comes from a handshake or a netlink answer.
    #[must_use]
    pub const fn from_raw(raw: i32) -> Errno {
        Errno(raw)
    }

    /// The number.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0
    }

    /// The standard library's kind of this errno.
    #[must_use]
    pub fn kind(self) -> std::io::ErrorKind {
        std::io::Error::from_raw_os_error(self.0).kind()
    }

    /// The kernel does not have the call, or not this form of it: the caller may take its fallback.
    ///
    /// Seccomp profiles of outer containers answer `EPERM` for calls they do not know, so that one is left to the
    /// caller's judgement.
    #[must_use]
    pub fn is_unsupported(self) -> bool {
        matches!(
            self,
            Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::E2BIG
        )
    }
}

impl Error {
    /// An error of `call` with its arguments as text.
    pub fn new(call: &'static str, args: impl Into<Cow<'static, str>>, errno: Errno) -> Error {
        Error {
            call,
            args: args.into(),
            errno,
        }
    }

    /// The error of the call that has just failed in this thread.
    ///
    /// Take [`Errno::last`] first where making `args` may itself call the kernel.
    pub fn last(call: &'static str, args: impl Into<Cow<'static, str>>) -> Error {
        let errno = Errno::last();
        Error::new(call, args, errno)
    }

    /// The same from an error of the standard library (calls made through `std::fs` and the like).
    pub fn from_io(call: &'static str, args: impl Into<Cow<'static, str>>, error: &std::io::Error) -> Error {
        let errno = match error.raw_os_error() {
            Some(raw) => Errno(raw),
            None => match error.kind() {
                std::io::ErrorKind::UnexpectedEof => Errno::ENODATA,
                std::io::ErrorKind::WriteZero => Errno::ENOSPC,
                std::io::ErrorKind::InvalidInput => Errno::EINVAL,
                _ => Errno::EIO,
            },
        };
        Error::new(call, args, errno)
    }

    /// The name of the call.
    #[must_use]
    pub fn call(&self) -> &'static str {
        self.call
    }

    /// The arguments as shown.
    #[must_use]
    pub fn args(&self) -> &str {
        &self.args
    }

    /// The error number.
    #[must_use]
    pub fn errno(&self) -> Errno {
        self.errno
    }

    /// The standard library's kind of the error number.
    #[must_use]
    pub fn kind(&self) -> std::io::ErrorKind {
        self.errno.kind()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({}): {}", self.call, self.args, self.errno)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = std::io::Error::from_raw_os_error(self.0).to_string();
        // The standard library adds " (os error 2)"; the number says nothing that the text does not.
        f.write_str(
            text.rsplit_once(" (os error")
                .map_or(text.as_str(), |(head, _)| head),
        )
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl std::error::Error for Errno {}

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> std::io::Error {
        std::io::Error::from_raw_os_error(errno.0)
    }
}

impl From<Error> for std::io::Error {
    /// Keeps the kind and, as inner error, the whole text.
    fn from(error: Error) -> std::io::Error {
        std::io::Error::new(error.kind(), error)
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(errno: rustix::io::Errno) -> Errno {
        Errno(errno.raw_os_error())
    }
}

impl From<nix::errno::Errno> for Errno {
    fn from(errno: nix::errno::Errno) -> Errno {
        Errno(errno as i32)
    }
}

/// Formats into a fixed buffer, cut at its end; the bytes written. For places that may not allocate.
pub(crate) fn format_into(buffer: &mut [u8], text: fmt::Arguments<'_>) -> usize {
    let mut cursor = std::io::Cursor::new(buffer);
    // A full buffer is the cut that we want.
    let _ = std::io::Write::write_fmt(&mut cursor, text);
    usize::try_from(cursor.position()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_shows_call_arguments_and_reason_once() {
        let error = Error::new("openat2", "3</run/x>, \"etc/passwd\"", Errno::ENOENT);
        assert_eq!(
            error.to_string(),
            "openat2(3</run/x>, \"etc/passwd\"): No such file or directory"
        );
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
        assert_eq!(format!("{:?}", Errno::EAGAIN), "EAGAIN");
        assert_eq!(format!("{:?}", Errno::from_raw(4095)), "errno 4095");
    }
}
