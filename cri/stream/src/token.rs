//! Tokens: 256 random bits in a URL that stand for one request, once, for a minute.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use crate::StreamRequest;
use crate::shares::Share;

/// Characters of a token.
pub(crate) const LENGTH: usize = 64;

/// Requests whose URL was not used yet, by the SHA-256 of their token: how long a look-up takes tells at most something
/// about the digest of a guess, from which no better guess can be made. How many there are is the business of their
/// places.
pub(crate) struct Tokens {
    life: Duration,
    waiting: Mutex<HashMap<[u8; 32], Waiting>>,
}

/// What a token stands for.
#[derive(Debug)]
pub(crate) struct Granted {
    pub(crate) request: StreamRequest,
    /// The session that it may have, and the memory of the request.
    pub(crate) place: [Share; 2],
}

struct Waiting {
    granted: Granted,
    until: Instant,
}

impl Tokens {
    pub(crate) fn new(life: Duration) -> Tokens {
        Tokens {
            life,
            waiting: Mutex::default(),
        }
    }

    /// A new token.
    pub(crate) fn issue(&self, granted: Granted, now: Instant) -> io::Result<String> {
        let mut random = [0; 32];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let until = now + self.life;
        self.lock().insert(digest(&token), Waiting { granted, until });
        Ok(token)
    }

    /// Gives back what those have whose time is over.
    pub(crate) fn expire(&self, now: Instant) {
        self.lock().retain(|_, waiting| waiting.until > now);
    }

    /// Uses a token up.
    pub(crate) fn take(&self, token: &str, now: Instant) -> Option<Granted> {
        let found = self.lock().remove(&digest(token))?;
        (found.until > now).then_some(found.granted)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PortForwardRequest;
    use crate::shares::Shares;

    #[test]
    fn a_token_is_good_once_and_for_its_life() {
        let (life, now) = (Duration::from_secs(60), Instant::now());
        let (tokens, shares) = (Tokens::new(life), Shares::new("sessions", 80, 4));
        let issue = || {
            let place = [shares.take("p", 1).ok()?, shares.take("p", 1).ok()?];
            let request = StreamRequest::PortForward(PortForwardRequest {
                pod: "p".to_owned(),
                ports: Vec::new(),
            });
            Some(tokens.issue(Granted { request, place }, now).unwrap())
        };
        let (first, second) = (issue().unwrap(), issue().unwrap());
        assert_eq!(first.len(), LENGTH);
        assert_ne!(first, second);
        assert_eq!(issue(), None);

        assert!(tokens.take(&first, now).is_some());
        assert!(tokens.take(&first, now).is_none());
        assert!(tokens.take(&second, now + life).is_none());
        // those that are over make room
        issue().unwrap();
        issue().unwrap();
        assert_eq!(issue(), None);
        tokens.expire(now + life);
        issue().unwrap();
    }
}
