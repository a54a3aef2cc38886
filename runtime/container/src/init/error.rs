//! What an init says when it fails: which step, what kind of failure, the errno, and the context as text.
//!
//! It crosses a process border as a few bytes, and is never taken apart again by looking at words.

use std::fmt;

use coracle_kernel::Errno;

/// Longest context that travels.
const MAX_TEXT: usize = 4096;

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A step on the way from the clone to the program.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        #[allow(missing_docs, reason = "each name is explained where the step is taken, in `steps`")]
        pub enum Step {
            $($name,)*
        }

        impl Step {
            const ALL: &'static [Step] = &[$(Step::$name),*];

            const fn text(self) -> &'static str {
                match self {
                    $(Step::$name => $text,)*
                }
            }
        }
    };
}

steps! {
    Handshake = "talk to the runtime",
    Cgroup = "enter the cgroup",
    JoinNamespaces = "join namespaces",
    CreateNamespaces = "create namespaces",
    BecomeRoot = "become root of the user namespace",
    Session = "start a session",
    Keyring = "join a session keyring",
    Loopback = "take the loopback device up",
    Hostname = "set the host name",
    Domainname = "set the domain name",
    Rootfs = "prepare the root file system",
    CreateContainerHooks = "run createContainer hooks",
    Pivot = "enter the root file system",
    Console = "set up the console",
    Stdio = "set up standard input, output and error",
    FinishRootfs = "finish the root file system",
    Sysctl = "set kernel parameters",
    Label = "set the label of the program",
    Personality = "set the personality",
    Scheduler = "set the scheduler",
    IoPriority = "set the io priority",
    Affinity = "set the cpu affinity",
    Cwd = "change to the working directory",
    NoNewPrivileges = "set no_new_privs",
    Bounding = "limit the capability bounding set",
    Groups = "set supplementary groups",
    User = "set user and group",
    Capabilities = "set capabilities",
    FindProgram = "find the program",
    Barrier = "wait for the start",
    Limits = "set resource limits",
    Seccomp = "load the seccomp filter",
    StartContainerHooks = "run startContainer hooks",
    Descriptors = "prepare descriptors",
    Execute = "execute the program",
}

/// What kind of failure it is, for callers that decide by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A system call failed.
    Call,
    /// The program is not there or may not be executed; the text is complete.
    Program,
    /// A hook failed or took too long; the text is complete.
    Hook,
    /// The configuration cannot be carried out on this host; the text is complete.
    Refused,
}

/// Why an init ended before its program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Where.
    pub step: Step,
    /// What kind.
    pub kind: Kind,
    /// The errno of the call, where there was one.
    pub errno: Option<Errno>,
    /// Call and arguments, or the whole text.
    pub text: String,
}

impl Failure {
    /// A failed step, from any error: its chain becomes the text, and the errno is that of the system call below.
    pub(crate) fn new(step: Step, error: &(dyn std::error::Error + 'static)) -> Failure {
        let (mut text, mut errno) = (error.to_string(), errno_of(error));
        let mut source = error.source();
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            errno = errno.or_else(|| errno_of(error));
            source = error.source();
        }
        Failure {
            step,
            kind: Kind::Call,
            errno,
            text,
        }
    }

    /// A failure whose text says everything.
    pub(crate) fn said(step: Step, kind: Kind, text: impl Into<String>) -> Failure {
        Failure {
            step,
            kind,
            errno: None,
            text: text.into(),
        }
    }

    /// The bytes that travel.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut end = self.text.len().min(MAX_TEXT);
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        let errno = self.errno.map_or(0, Errno::raw);
        let mut bytes = vec![self.step as u8, self.kind as u8];
        bytes.extend_from_slice(&errno.to_le_bytes());
        bytes.extend_from_slice(self.text.get(..end).unwrap_or_default().as_bytes());
        bytes
    }

    /// Back from bytes; `None` where no init of ours can have sent them.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Failure> {
        let (head, text) = bytes.split_at_checked(6)?;
        let (step, kind) = (*head.first()?, *head.get(1)?);
        let errno = i32::from_le_bytes(head.get(2..6)?.try_into().ok()?);
        let kinds = [Kind::Call, Kind::Program, Kind::Hook, Kind::Refused];
        Some(Failure {
            step: *Step::ALL.get(usize::from(step))?,
            kind: *kinds.get(usize::from(kind))?,
            errno: (errno != 0).then_some(Errno::from_raw(errno)),
            text: String::from_utf8_lossy(text.get(..text.len().min(MAX_TEXT))?).into_owned(),
        })
    }
}

/// Turns an error into the failure of a step.
pub(crate) trait At<T> {
    /// Names the step at which it happened.
    fn at(self, step: Step) -> Result<T, Failure>;
}

impl<T, E: std::error::Error + 'static> At<T> for Result<T, E> {
    fn at(self, step: Step) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(step, &error))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Call => write!(f, "{}: {}", self.step, self.text),
            Kind::Program | Kind::Hook | Kind::Refused => f.write_str(&self.text),
        }
    }
}

impl std::error::Error for Failure {}

fn errno_of(error: &(dyn std::error::Error + 'static)) -> Option<Errno> {
    if let Some(error) = error.downcast_ref::<coracle_kernel::Error>() {
        return Some(error.errno());
    }
    let raw = error.downcast_ref::<std::io::Error>()?.raw_os_error()?;
    Some(Errno::from_raw(raw))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_survives_the_border() {
        let error = coracle_kernel::Error::new("sethostname", "\"x\"", Errno::EPERM);
        let failure = Failure::new(Step::Hostname, &error);
        assert_eq!(
            failure.to_string(),
            "set the host name: sethostname(\"x\"): Operation not permitted"
        );
        assert_eq!(Failure::decode(&failure.encode()), Some(failure));
        let said = Failure::said(Step::FindProgram, Kind::Program, "exec: \"x\": permission denied");
        assert_eq!(said.to_string(), "exec: \"x\": permission denied");
        assert_eq!(Failure::decode(&said.encode()), Some(said));
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let said = Failure::said(Step::Execute, Kind::Hook, "é".repeat(5000));
        let back = Failure::decode(&said.encode()).unwrap();
        assert!(back.text.len() <= MAX_TEXT && back.text.chars().all(|c| c == 'é'));
    }

    #[test]
    fn foreign_bytes_are_refused() {
        for bytes in [&[][..], &[0, 0, 0], &[255, 0, 0, 0, 0, 0], &[0, 9, 0, 0, 0, 0]] {
            assert_eq!(Failure::decode(bytes), None);
        }
    }
}
