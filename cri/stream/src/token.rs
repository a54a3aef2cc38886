//! Tokens: 256 random bits in a URL that stand for one request, once, for a minute.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use crate::StreamRequest;

/// Characters of a token.
pub(crate) const LENGTH: usize = 64;

/// Requests whose URL was not used yet, by the SHA-256 of their token: how long a look-up takes tells at most something
/// about the digest of a guess, from which no better guess can be made.
pub(crate) struct Tokens {
    most: usize,
    life: Duration,
    waiting: Mutex<HashMap<[u8; 32], Waiting>>,
}

struct Waiting {
    request: Arc<StreamRequest>,
    until: Instant,
}

impl Tokens {
    pub(crate) fn new(most: usize, life: Duration) -> Tokens {
        Tokens {
            most,
            life,
            waiting: Mutex::default(),
        }
    }

    /// A new token for a request; `None` if too many wait.
    pub(crate) fn issue(&self, request: StreamRequest, now: Instant) -> io::Result<Option<String>> {
        let mut random = [0; 32];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut waiting = self.lock();
        waiting.retain(|_, waiting| waiting.until > now);
        if waiting.len() >= self.most {
            return Ok(None);
        }
        waiting.insert(
            digest(&token),
            Waiting {
                request: Arc::new(request),
                until: now + self.life,
            },
        );
        Ok(Some(token))
    }

    /// The request of a token that is good, which it stays.
    pub(crate) fn look(&self, token: &str, now: Instant) -> Option<Arc<StreamRequest>> {
        let waiting = self.lock();
        let found = waiting.get(&digest(token))?;
        (found.until > now).then(|| Arc::clone(&found.request))
    }

    /// Uses a token up.
    pub(crate) fn take(&self, token: &str, now: Instant) -> Option<Arc<StreamRequest>> {
        let found = self.lock().remove(&digest(token))?;
        (found.until > now).then_some(found.request)
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

    fn request() -> StreamRequest {
        StreamRequest::PortForward(PortForwardRequest {
            pod: "p".to_owned(),
            ports: Vec::new(),
        })
    }

    #[test]
    fn a_token_is_good_once_and_for_its_life() {
        let (life, now) = (Duration::from_secs(60), Instant::now());
        let tokens = Tokens::new(2, life);
        let first = tokens.issue(request(), now).unwrap().unwrap();
        let second = tokens.issue(request(), now).unwrap().unwrap();
        assert_eq!(first.len(), LENGTH);
        assert_ne!(first, second);
        assert_eq!(tokens.issue(request(), now).unwrap(), None);

        assert!(tokens.look(&first, now).is_some());
        assert!(tokens.take(&first, now).is_some());
        assert!(tokens.look(&first, now).is_none());
        assert!(tokens.take(&first, now).is_none());
        assert!(tokens.look(&second, now + life).is_none());
        assert!(tokens.take(&second, now + life).is_none());

        let third = tokens.issue(request(), now).unwrap().unwrap();
        // those that are over make room
        assert!(tokens.issue(request(), now + life).unwrap().is_some());
        assert!(tokens.issue(request(), now + life).unwrap().is_some());
        assert!(tokens.look(&third, now).is_none());
    }
}
