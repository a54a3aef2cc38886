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

    /// Pods that are due, the longest one first, and when the next other one is; without those that `busy` is true of.
    pub(crate) fn due(&self, now: Instant, busy: impl Fn(&str) -> bool) -> (Vec<String>, Option<Instant>) {
        let failures = lock(&self.0);
        let idle = failures.iter().filter(|(pod, _)| !busy(pod));
        let mut waiting: Vec<_> = idle.map(|(pod, failure)| (failure.due, pod)).collect();
        waiting.sort();
        let (due, later) = waiting.split_at(waiting.partition_point(|(due, _)| *due <= now));
        let due = due.iter().map(|(_, pod)| (*pod).clone()).collect();
        (due, later.first().map(|(due, _)| *due))
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
        let due = |now| failures.due(now, |_| false);
        assert_eq!(due(start), (vec!["pod".to_owned()], None));
        assert_eq!(failures.recent("pod", start), None);
        let mut pauses = Vec::new();
        for _ in 0..1000 {
            failures.failed("pod", start, &Error::NotReady("x".to_owned()));
            pauses.push((due(start).1.unwrap() - start).as_secs());
        }
        assert_eq!(pauses[..10], [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
        assert_eq!(pauses.last(), Some(&300));
        assert!(failures.recent("pod", start + Duration::from_secs(1)).is_some());
        assert_eq!(failures.recent("pod", start + Duration::from_secs(3)), None);
        assert_eq!(due(start + Duration::from_secs(299)).0, [""; 0]);
        assert!(failures.is_due("pod", start + Duration::from_secs(300)));
        failures.forget("pod");
        assert_eq!(due(start), (vec![], None));
    }

    #[test]
    fn the_pod_that_has_waited_longest_is_first_and_busy_ones_are_not_told_of() {
        let failures = Failures::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        for (pod, at) in [("c", 0), ("a", 2), ("b", 1), ("late", 60)] {
            failures.schedule(pod, after(at));
        }
        let due = |busy: &[&str]| failures.due(after(9), |pod| busy.contains(&pod));
        assert_eq!(due(&[]).0, ["c", "b", "a"]);
        assert_eq!(
            due(&["b"]),
            (vec!["c".to_owned(), "a".to_owned()], Some(after(60)))
        );
        assert_eq!(due(&["a", "b", "c", "late"]), (vec![], None));
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
