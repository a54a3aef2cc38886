//! One thing at a time for each pod, and what could not be taken down yet.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{Error, lock};

/// First and longest pause before a pod is tried again.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// How long a failure stands as the answer to those who ask again: whoever waited for its pod, or undoes what has just
/// failed, must not wait for a hanging plugin a second time.
const STANDS: Duration = Duration::from_secs(2);

/// Who is at work on which pod.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    busy: Mutex<BTreeSet<String>>,
    free: Condvar,
}

/// The right to work on a pod, until it is dropped.
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    pod: String,
}

/// Pods whose network could not be taken down.
#[derive(Debug, Default)]
pub(crate) struct Failures(Mutex<BTreeMap<String, Failure>>);

#[derive(Debug)]
struct Failure {
    attempts: u32,
    at: Option<Instant>,
    due: Instant,
    why: String,
}

impl Turns {
    /// Waits until nobody else works on the pod.
    pub(crate) fn take(&self, pod: &str) -> Turn<'_> {
        let mut busy = lock(&self.busy);
        while !busy.insert(pod.to_owned()) {
            busy = self.free.wait(busy).unwrap_or_else(PoisonError::into_inner);
        }
        Turn {
            turns: self,
            pod: pod.to_owned(),
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.turns.busy).remove(&self.pod);
        self.turns.free.notify_all();
    }
}

impl Failures {
    /// A pod that nobody has tried yet is tried at once.
    pub(crate) fn schedule(&self, pod: &str, now: Instant) {
        lock(&self.0).entry(pod.to_owned()).or_insert(Failure {
            attempts: 0,
            at: None,
            due: now,
            why: "not tried yet".to_owned(),
        });
    }

    /// The pod failed again: each pause is twice as long as the one before.
    pub(crate) fn failed(&self, pod: &str, now: Instant, error: &Error) {
        let mut failures = lock(&self.0);
        let attempts = failures.get(pod).map_or(0, |failure| failure.attempts);
        let factor = 2_u32.saturating_pow(attempts.min(16));
        let failure = Failure {
            attempts: attempts.saturating_add(1),
            at: Some(now),
            due: now + PAUSES.0.saturating_mul(factor).min(PAUSES.1),
            why: crate::chain_text(error),
        };
        failures.insert(pod.to_owned(), failure);
    }

    pub(crate) fn forget(&self, pod: &str) {
        lock(&self.0).remove(pod);
    }

    /// Why the pod failed a moment ago.
    pub(crate) fn recent(&self, pod: &str, now: Instant) -> Option<String> {
        let failures = lock(&self.0);
        let failure = failures.get(pod)?;
        let fresh = failure
            .at
            .is_some_and(|at| now.saturating_duration_since(at) < STANDS);
        fresh.then(|| failure.why.clone())
    }

    pub(crate) fn is_due(&self, pod: &str, now: Instant) -> bool {
        lock(&self.0).get(pod).is_some_and(|failure| failure.due <= now)
    }

    pub(crate) fn due(&self, now: Instant) -> Vec<String> {
        let failures = lock(&self.0);
        let due = failures.iter().filter(|(_, failure)| failure.due <= now);
        due.map(|(pod, _)| pod.clone()).collect()
    }

    /// When the next pod is due.
    pub(crate) fn next(&self) -> Option<Instant> {
        lock(&self.0).values().map(|failure| failure.due).min()
    }

    /// Each pod that has failed, how often, and why.
    pub(crate) fn all(&self) -> Vec<(String, u32, String)> {
        let failures = lock(&self.0);
        let tried = failures.iter().filter(|(_, failure)| failure.attempts > 0);
        tried
            .map(|(pod, failure)| (pod.clone(), failure.attempts, failure.why.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_five_minutes() {
        let failures = Failures::default();
        let start = Instant::now();
        failures.schedule("pod", start);
        assert_eq!(failures.due(start), ["pod"]);
        assert_eq!(failures.recent("pod", start), None);
        let mut pauses = Vec::new();
        for _ in 0..1000 {
            failures.failed("pod", start, &Error::NotReady("x".to_owned()));
            pauses.push((failures.next().unwrap() - start).as_secs());
        }
        assert_eq!(pauses[..10], [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
        assert_eq!(pauses.last(), Some(&300));
        assert!(failures.recent("pod", start + Duration::from_secs(1)).is_some());
        assert_eq!(failures.recent("pod", start + Duration::from_secs(3)), None);
        assert_eq!(failures.due(start + Duration::from_secs(299)), [""; 0]);
        assert!(failures.is_due("pod", start + Duration::from_secs(300)));
        failures.forget("pod");
        assert_eq!(failures.next(), None);
    }

    #[test]
    fn one_at_a_time_for_each_pod() {
        let turns = Turns::default();
        let inside = Mutex::new(0);
        std::thread::scope(|scope| {
            let other = turns.take("other");
            for _ in 0..8 {
                scope.spawn(|| {
                    let _turn = turns.take("pod");
                    let mut inside = inside.try_lock().unwrap();
                    std::thread::yield_now();
                    *inside += 1;
                });
            }
            drop(other);
        });
        assert_eq!(*inside.lock().unwrap(), 8);
    }
}
