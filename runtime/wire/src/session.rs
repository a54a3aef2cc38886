//! The two sides of a session: what may come when, and which answer belongs to which request.

use std::collections::BTreeMap;

use crate::answer::{FailKind, Failed, Welcome};
use crate::message::{Body, Frame};
use crate::request::Hello;
use crate::{MAX_PENDING, OLDEST_VERSION, VERSION, WireError, decode, encode};

/// The daemon's side.
#[derive(Debug, Default)]
pub struct Client {
    version: Option<u32>,
    last_id: u64,
    /// The name of the answer that each open request wants.
    pending: BTreeMap<u64, &'static str>,
}

/// What a daemon receives.
#[derive(Clone, Debug, PartialEq)]
pub enum Incoming {
    /// The answer to an open request, [`Failed`] included.
    Answer {
        /// The request's id.
        id: u64,
        /// The answer.
        body: Body,
    },
    /// An event.
    Event(Body),
    /// Something of a newer monitor that may be left unread.
    Ignored,
}

/// The monitor's side. It can be kept over an upgrade: see [`Server::resume`].
#[derive(Debug, Default)]
pub struct Server {
    version: Option<u32>,
    last_id: u64,
    pending: usize,
}

impl Client {
    /// A session that begins with the frame given: [`Hello`], with id 1.
    pub fn begin() -> Result<(Client, Vec<u8>), WireError> {
        let mut client = Client::default();
        let (_, bytes) = client.request(Body::Hello(Hello {
            min: OLDEST_VERSION,
            max: VERSION,
        }))?;
        Ok((client, bytes))
    }

    /// The version that holds, once the monitor has answered.
    #[must_use]
    pub fn version(&self) -> Option<u32> {
        self.version
    }

    /// A request's id and bytes. The caller sends with it the descriptors that the message names.
    ///
    /// Nothing but [`Hello`] goes before its answer has come: [`WireError::OutOfTurn`].
    pub fn request(&mut self, body: Body) -> Result<(u64, Vec<u8>), WireError> {
        let first = matches!(body, Body::Hello(_));
        let (Some(answer), true) = (body.answer_name(), first == (self.last_id == 0)) else {
            return Err(WireError::OutOfTurn(body.name()));
        };
        if !first && self.version.is_none() {
            return Err(WireError::OutOfTurn(body.name()));
        }
        if self.pending.len() >= MAX_PENDING {
            return Err(WireError::TooManyPending);
        }
        let id = self.last_id + 1;
        let bytes = encode(&frame(id, body))?;
        self.last_id = id;
        self.pending.insert(id, answer);
        Ok((id, bytes))
    }

    /// Takes a packet.
    pub fn receive(&mut self, bytes: &[u8], fds: usize) -> Result<Incoming, WireError> {
        let frame = decode(bytes, fds)?;
        let Some(body) = frame.body else {
            // An event or an answer of a kind that only newer versions have; an answer still closes its request.
            return match frame.id {
                0 => Ok(Incoming::Ignored),
                id => match self.pending.remove(&id) {
                    Some(_) => Err(WireError::WrongAnswer {
                        id,
                        answer: "unknown message",
                    }),
                    None => Err(WireError::NotAsked(id)),
                },
            };
        };
        if frame.id == 0 {
            if body.is_event() && self.version.is_some() {
                return Ok(Incoming::Event(body));
            }
            return Err(WireError::OutOfTurn(body.name()));
        }
        let Some(wanted) = self.pending.remove(&frame.id) else {
            return Err(WireError::NotAsked(frame.id));
        };
        if body.name() != wanted && !matches!(body, Body::Failed(_)) {
            return Err(WireError::WrongAnswer {
                id: frame.id,
                answer: body.name(),
            });
        }
        if let Body::Welcome(Welcome { version, .. }) = body {
            if !(OLDEST_VERSION..=VERSION).contains(&version) {
                return Err(WireError::Version(version));
            }
            self.version = Some(version);
        }
        Ok(Incoming::Answer { id: frame.id, body })
    }
}

/// What a monitor does with a packet.
#[derive(Clone, Debug, PartialEq)]
pub enum Taken {
    /// Serve the request and answer under this id.
    ///
    /// A [`Hello`] comes with both bounds set to the version that was chosen; the answer is what the monitor knows
    /// of itself.
    Serve(u64, Body),
    /// Send this answer.
    Refuse(u64, Failed),
}

impl Server {
    /// A session in the middle, as [`Server::position`] told it.
    #[must_use]
    pub fn resume(version: u32, last_id: u64, pending: usize) -> Server {
        Server {
            version: (version != 0).then_some(version),
            last_id,
            pending,
        }
    }

    /// Where the session is: version (0 before [`Hello`]), last id, open requests.
    #[must_use]
    pub fn position(&self) -> (u32, u64, usize) {
        (self.version.unwrap_or(0), self.last_id, self.pending)
    }

    /// Whether versions are agreed on: events may go.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.version.is_some()
    }

    /// Takes a packet. An error means that the peer does not keep to the protocol: close.
    pub fn receive(&mut self, bytes: &[u8], fds: usize) -> Result<Taken, WireError> {
        let frame = decode(bytes, fds)?;
        let name = frame.body.as_ref().map_or("unknown message", Body::name);
        if frame.id <= self.last_id {
            return Err(WireError::StaleId(frame.id));
        }
        if self.pending >= MAX_PENDING {
            return Err(WireError::TooManyPending);
        }
        if matches!(frame.body, Some(Body::Hello(_))) == self.version.is_some()
            || frame.body.as_ref().is_some_and(|body| !body.is_request())
        {
            return Err(WireError::OutOfTurn(name));
        }
        self.last_id = frame.id;
        self.pending += 1;
        match frame.body {
            None => {
                let text = "this monitor does not know the request";
                Ok(Taken::Refuse(frame.id, failed(FailKind::Unsupported, text)))
            }
            Some(Body::Hello(hello)) => {
                let version = hello.max.min(VERSION);
                if hello.min > hello.max || version < hello.min.max(OLDEST_VERSION) {
                    let text = format!(
                        "protocol versions {} to {} were offered, {OLDEST_VERSION} to {VERSION} are known",
                        hello.min, hello.max
                    );
                    return Ok(Taken::Refuse(frame.id, failed(FailKind::Unsupported, &text)));
                }
                self.version = Some(version);
                Ok(Taken::Serve(
                    frame.id,
                    Body::Hello(Hello {
                        min: version,
                        max: version,
                    }),
                ))
            }
            Some(body) => Ok(Taken::Serve(frame.id, body)),
        }
    }
    /// The bytes of an answer. One that would be too long becomes a failure that says so.
    pub fn answer(&mut self, id: u64, body: Body) -> Vec<u8> {
        self.pending = self.pending.saturating_sub(1);
        encode(&frame(id, body)).unwrap_or_else(|error| {
            let failed = failed(FailKind::Other, &format!("answer not sent: {error}"));
            encode(&frame(id, failed.into())).unwrap_or_default()
        })
    }

    /// The bytes of an event; none before the session is open.
    #[must_use]
    pub fn event(&self, body: Body) -> Option<Vec<u8>> {
        self.version?;
        encode(&frame(0, body)).ok()
    }
}

fn frame(id: u64, body: Body) -> Frame {
    Frame {
        id,
        fds: u32::try_from(body.fds()).unwrap_or(u32::MAX),
        body: Some(body),
    }
}

fn failed(kind: FailKind, message: &str) -> Failed {
    Failed {
        kind: kind.into(),
        errno: 0,
        step: String::new(),
        message: message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::{Created, Done, Exit, Exited, Listed};
    use crate::request::{Create, List, Start};

    /// A session after the greeting.
    fn open() -> (Client, Server) {
        let (mut client, hello) = Client::begin().unwrap();
        let mut server = Server::default();
        assert!(
            server.event(Body::Exited(Exited::default())).is_none(),
            "an event before the greeting"
        );
        let Ok(Taken::Serve(1, Body::Hello(hello))) = server.receive(&hello, 0) else {
            panic!("no greeting")
        };
        assert_eq!((hello.min, hello.max), (VERSION, VERSION));
        let welcome = server.answer(
            1,
            Welcome {
                version: hello.max,
                ..Welcome::default()
            }
            .into(),
        );
        assert!(matches!(
            client.receive(&welcome, 0),
            Ok(Incoming::Answer {
                id: 1,
                body: Body::Welcome(_)
            })
        ));
        assert_eq!(client.version(), Some(VERSION));
        (client, server)
    }

    fn raw(id: u64, body: impl Into<Body>) -> Vec<u8> {
        encode(&frame(id, body.into())).unwrap()
    }

    #[test]
    fn requests_are_answered_in_any_order() {
        let (mut client, mut server) = open();
        let create = Create {
            container_id: "a".into(),
            rootfs: true,
            ..Create::default()
        };
        let (create_id, create) = client.request(create.into()).unwrap();
        let (list_id, list) = client.request(List::default().into()).unwrap();
        assert!(
            matches!(server.receive(&create, 1), Ok(Taken::Serve(id, Body::Create(_))) if id == create_id)
        );
        assert!(matches!(server.receive(&list, 0), Ok(Taken::Serve(id, Body::List(_))) if id == list_id));
        let listed = server.answer(list_id, Listed::default().into());
        assert!(matches!(client.receive(&listed, 0), Ok(Incoming::Answer { id, .. }) if id == list_id));
        let event = server
            .event(
                Exited {
                    container_id: "b".into(),
                    exit: Exit::default(),
                }
                .into(),
            )
            .unwrap();
        assert!(matches!(
            client.receive(&event, 0),
            Ok(Incoming::Event(Body::Exited(_)))
        ));
        let created = server.answer(create_id, Created { pid: 7 }.into());
        assert!(matches!(client.receive(&created, 1), Ok(Incoming::Answer { id, .. }) if id == create_id));
        assert_eq!(client.receive(&created, 1), Err(WireError::NotAsked(create_id)));
    }

    #[test]
    fn versions_are_negotiated_or_refused() {
        for (min, max, chosen) in [
            (0, 9, Some(1)),
            (1, 1, Some(1)),
            (2, 9, None),
            (0, 0, None),
            (1, 0, None),
        ] {
            let mut server = Server::default();
            match server.receive(&raw(1, Hello { min, max }), 0).unwrap() {
                Taken::Serve(1, Body::Hello(hello)) => assert_eq!(Some(hello.max), chosen, "{min} to {max}"),
                Taken::Refuse(1, failed) => {
                    assert_eq!(failed.kind(), FailKind::Unsupported);
                    assert_eq!(chosen, None, "{min} to {max}: {}", failed.message);
                    assert!(!server.is_open());
                }
                other => panic!("{other:?}"),
            }
        }
        let (mut client, _) = Client::begin().unwrap();
        let welcome = raw(
            1,
            Welcome {
                version: 9,
                ..Welcome::default()
            },
        );
        assert_eq!(client.receive(&welcome, 0), Err(WireError::Version(9)));
    }

    #[test]
    fn what_is_out_of_turn_ends_the_session() {
        let mut server = Server::default();
        assert_eq!(
            server.receive(&raw(1, List::default()), 0),
            Err(WireError::OutOfTurn("List"))
        );
        let (mut client, mut server) = open();
        let hello = raw(2, Hello { min: 1, max: 1 });
        assert_eq!(server.receive(&hello, 0), Err(WireError::OutOfTurn("Hello")));
        assert_eq!(
            server.receive(&raw(2, Done {}), 0),
            Err(WireError::OutOfTurn("Done"))
        );
        assert_eq!(
            server.receive(&raw(1, List::default()), 0),
            Err(WireError::StaleId(1))
        );
        assert_eq!(
            client.receive(&raw(0, Done {}), 0),
            Err(WireError::OutOfTurn("Done"))
        );
        assert_eq!(client.receive(&raw(5, Done {}), 0), Err(WireError::NotAsked(5)));
        let (id, _) = client.request(List::default().into()).unwrap();
        let wrong = WireError::WrongAnswer { id, answer: "Done" };
        assert_eq!(client.receive(&raw(id, Done {}), 0), Err(wrong));
        assert_eq!(client.request(Done {}.into()), Err(WireError::OutOfTurn("Done")));
        let (mut client, _) = Client::begin().unwrap();
        assert_eq!(
            client.request(List::default().into()),
            Err(WireError::OutOfTurn("List"))
        );
    }

    #[test]
    fn open_requests_are_bounded_on_both_sides() {
        let (mut client, mut server) = open();
        for _ in 0..MAX_PENDING {
            let (_, start) = client.request(Start::default().into()).unwrap();
            server.receive(&start, 0).unwrap();
        }
        assert_eq!(
            client.request(List::default().into()),
            Err(WireError::TooManyPending)
        );
        assert_eq!(
            server.receive(&raw(9999, List::default()), 0),
            Err(WireError::TooManyPending)
        );
        let (version, last, pending) = server.position();
        let mut server = Server::resume(version, last, pending);
        assert_eq!(
            server.receive(&raw(9999, List::default()), 0),
            Err(WireError::TooManyPending)
        );
        server.answer(2, Done {}.into());
        assert!(matches!(
            server.receive(&raw(9999, List::default()), 0),
            Ok(Taken::Serve(9999, _))
        ));
    }

    #[test]
    fn an_unknown_request_is_refused_and_an_unknown_event_ignored() {
        let (mut client, mut server) = open();
        // Field 39, length-delimited, empty: a body of a later version.
        let mut request = vec![0x08, 9];
        request.extend([0xba, 0x02, 0]);
        let Ok(Taken::Refuse(9, failed)) = server.receive(&request, 0) else {
            panic!("served the unknown")
        };
        assert_eq!(failed.kind(), FailKind::Unsupported);
        assert_eq!(client.receive(&[0xba, 0x02, 0], 0), Ok(Incoming::Ignored));
    }

    #[test]
    fn an_answer_that_is_too_long_is_a_failure() {
        let (mut client, mut server) = open();
        let (id, list) = client.request(List::default().into()).unwrap();
        server.receive(&list, 0).unwrap();
        let container = crate::Container {
            container_id: "x".repeat(1000),
            ..Default::default()
        };
        let listed = Listed {
            containers: vec![container; 100],
            ..Listed::default()
        };
        let answer = server.answer(id, listed.into());
        let Ok(Incoming::Answer {
            body: Body::Failed(failed),
            ..
        }) = client.receive(&answer, 0)
        else {
            panic!("not a failure")
        };
        assert!(failed.message.contains("frame of"), "{}", failed.message);
    }
}
