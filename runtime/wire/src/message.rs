//! The frame, and which messages it can hold. Numbers of fields and bodies are never used twice.

use prost::{Message, Oneof};

use crate::answer::{
    Attached, Created, Done, ExecExited, ExecStarted, Exited, Failed, Listed, LogLost, Oom, Sandbox, Welcome,
};
use crate::request::{
    Adopt, Attach, Create, Exec, Forget, Hello, List, ReopenLog, SetupSandbox, Shutdown, Start, Upgrade,
};

/// One packet.
#[derive(Clone, PartialEq, Message)]
pub struct Frame {
    /// The request's id, or the id of the request that this answers; 0 for events.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// How many descriptors belong to it.
    #[prost(uint32, tag = "2")]
    pub fds: u32,
    /// What it says.
    #[prost(
        oneof = "Body",
        tags = "10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 40, 41, 42, 43, 44, 45, 46, 47, 60, 61, 62, 63"
    )]
    pub body: Option<Body>,
}

macro_rules! bodies {
    ($($(#[$doc:meta])* $variant:ident = $tag:literal),* $(,)?) => {
        /// What a frame says.
        #[derive(Clone, PartialEq, Oneof)]
        pub enum Body {
            $(
                $(#[$doc])*
                #[prost(message, tag = $tag)]
                $variant($variant),
            )*
        }

        impl Body {
            /// The message's name.
            #[must_use]
            pub fn name(&self) -> &'static str {
                match self {
                    $(Body::$variant(_) => stringify!($variant),)*
                }
            }
        }

        $(
            impl From<$variant> for Body {
                fn from(message: $variant) -> Body {
                    Body::$variant(message)
                }
            }
        )*
    };
}

bodies! {
    /// First request. Answer: [`Welcome`].
    Hello = 10,
    /// Makes the pod's namespaces; once a monitor. Answer: [`Sandbox`].
    SetupSandbox = 11,
    /// Makes a container up to the point where its init waits. Answer: [`Created`].
    Create = 12,
    /// Lets a created container run its program. Answer: [`Done`] when the program runs (also if it did before).
    Start = 13,
    /// Runs a process in a running container. Answer: [`ExecStarted`].
    Exec = 14,
    /// Opens the log file anew, after somebody moved the old one. Answer: [`Done`].
    ReopenLog = 15,
    /// Runs the poststop hooks of an exited container and drops its record. Answer: [`Done`], also if it is not known.
    Forget = 16,
    /// Asks for all that events tell of. Answer: [`Listed`].
    List = 17,
    /// Asks for the descriptor of a container's init. Answer: [`Created`].
    Adopt = 18,
    /// Replaces the monitor's program. Answer: [`Done`], from the new program on the same connection.
    Upgrade = 19,
    /// Ends a monitor without containers. Answer: [`Done`], then end of file.
    Shutdown = 20,
    /// Joins the streams of a running container. Answer: [`Attached`].
    Attach = 21,
    /// Answer to [`Hello`].
    Welcome = 40,
    /// Answer of requests that have nothing to tell.
    Done = 41,
    /// Answer of any request that failed.
    Failed = 42,
    /// Answer to [`SetupSandbox`].
    Sandbox = 43,
    /// Answer to [`Create`] and [`Adopt`].
    Created = 44,
    /// Answer to [`Exec`].
    ExecStarted = 45,
    /// Answer to [`List`].
    Listed = 46,
    /// Answer to [`Attach`].
    Attached = 47,
    /// A container's init ended.
    Exited = 60,
    /// A process of [`Exec`] ended.
    ExecExited = 61,
    /// The kernel killed processes of a container for want of memory.
    Oom = 62,
    /// Output of a container could not be written to its log, or can be again.
    LogLost = 63,
}

impl Body {
    /// How many descriptors the message wants, given its fields.
    #[must_use]
    pub fn fds(&self) -> usize {
        match self {
            Body::SetupSandbox(setup) => usize::from(setup.netns),
            Body::Create(create) => usize::from(create.rootfs),
            Body::Exec(exec) => {
                1 + usize::from(exec.stdin) + usize::from(exec.stdout) + usize::from(exec.stderr)
            }
            Body::Upgrade(_) | Body::Created(_) => 1,
            Body::ExecStarted(started) => 1 + usize::from(started.tty),
            Body::Attach(attach) => usize::from(attach.stdout) + usize::from(attach.stderr),
            Body::Attached(attached) => usize::from(attached.stdin || attached.tty),
            _ => 0,
        }
    }

    /// Whether a daemon sends it.
    #[must_use]
    pub fn is_request(&self) -> bool {
        self.answer_name().is_some()
    }

    /// Whether a monitor sends it unasked.
    #[must_use]
    pub fn is_event(&self) -> bool {
        matches!(
            self,
            Body::Exited(_) | Body::ExecExited(_) | Body::Oom(_) | Body::LogLost(_)
        )
    }

    /// The name of the message that answers this request when it succeeds.
    pub(crate) fn answer_name(&self) -> Option<&'static str> {
        Some(match self {
            Body::Hello(_) => "Welcome",
            Body::SetupSandbox(_) => "Sandbox",
            Body::Create(_) | Body::Adopt(_) => "Created",
            Body::Exec(_) => "ExecStarted",
            Body::List(_) => "Listed",
            Body::Attach(_) => "Attached",
            Body::Start(_) | Body::ReopenLog(_) | Body::Forget(_) | Body::Upgrade(_) | Body::Shutdown(_) => {
                "Done"
            }
            _ => return None,
        })
    }
}
