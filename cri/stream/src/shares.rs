//! Shares: how much of something that the node has once its pods may have, so that no number of them has all of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A pod may have this part of what is free, and one where that is less. The rest is for those that come later: of N pods
/// that take all they can each has the same, a little less than 1/(N + 8) of the whole, and one more finds almost as much.
const PART: usize = 8;

/// Something that pods share.
#[derive(Debug)]
pub(crate) struct Shares {
    what: &'static str,
    most: usize,
    most_of_one: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    of: HashMap<String, usize>,
}

/// What a pod has; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    shares: Arc<Shares>,
    pod: String,
    amount: usize,
}

/// Why a pod gets no more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pod {pod} has {has} {what} already, and may have {may} while {free} of {most} are free")]
pub struct Exhausted {
    pod: String,
    what: &'static str,
    has: usize,
    may: usize,
    free: usize,
    most: usize,
}

impl Shares {
    /// Of `most` in all, a pod never has more than `most_of_one`.
    pub(crate) fn new(what: &'static str, most: usize, most_of_one: usize) -> Arc<Shares> {
        Arc::new(Shares {
            what,
            most,
            most_of_one,
            taken: Mutex::default(),
        })
    }

    /// Takes some for a pod.
    pub(crate) fn take(self: &Arc<Shares>, pod: &str, amount: usize) -> Result<Share, Exhausted> {
        let mut taken = self.lock();
        let has = taken.of.get(pod).copied().unwrap_or_default();
        let free = self.most - taken.all;
        // of few there is one for each pod, until none is free
        let may = self.most_of_one.min((free / PART).max(1)).min(free);
        if amount > 0 && has.saturating_add(amount) > may {
            return Err(Exhausted {
                pod: pod.to_owned(),
                what: self.what,
                has,
                may,
                free,
                most: self.most,
            });
        }
        taken.all += amount;
        *taken.of.entry(pod.to_owned()).or_default() += amount;
        Ok(Share {
            shares: Arc::clone(self),
            pod: pod.to_owned(),
            amount,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.shares.lock();
        taken.all -= self.amount;
        if let Some(has) = taken.of.get_mut(&self.pod) {
            *has -= self.amount;
            if *has == 0 {
                taken.of.remove(&self.pod);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pods that take all they can, in turns; what the last round got for them.
    fn greedy(shares: &Arc<Shares>, pods: usize) -> Vec<Share> {
        let mut all = Vec::new();
        loop {
            let before = all.len();
            all.extend((0..pods).filter_map(|pod| shares.take(&pod.to_string(), 1).ok()));
            if all.len() == before {
                return all;
            }
        }
    }

    #[test]
    fn however_many_pods_take_all_they_can_one_more_gets_some() {
        for pods in [1, 16, 64, 110, 250, 500] {
            let shares = Shares::new("sessions", 1024, 64);
            let all = greedy(&shares, pods);
            // as much as there can be, and no pod much more than another
            assert!(
                all.len() >= (1024 * pods / (pods + 8)).min(64 * pods) - pods,
                "{pods}"
            );
            let late: Vec<_> = std::iter::from_fn(|| shares.take("late", 1).ok()).collect();
            let each = all.len() / pods;
            assert!(
                !late.is_empty() && (late.len() + 1) * 9 >= each * 8,
                "{pods}: {}",
                late.len()
            );
        }
    }

    #[test]
    fn of_few_a_pod_without_any_gets_one_while_one_is_free() {
        for most in 0..40 {
            let shares = Shares::new("sessions", most, 64);
            let all = greedy(&shares, 1);
            assert_eq!(all.len(), ((most + 1) / 9).max(1).min(most), "{most}");
            let late = (all.len()..most).map(|pod| shares.take(&format!("late {pod}"), 1).unwrap());
            let late: Vec<_> = late.collect();
            let full = shares.take("one more", 1).unwrap_err();
            assert_eq!((full.may, full.free), (0, 0), "{most}: {}", late.len());
        }
        // what is taken at once is not more for that
        let bytes = Shares::new("bytes", 32, 32);
        bytes.take("pod", 5).unwrap_err();
        bytes.take("pod", 4).unwrap();
        Shares::new("bytes", 7, 7).take("pod", 2).unwrap_err();
        // and a pod's own bound stays
        Shares::new("bytes", 7, 0).take("pod", 1).unwrap_err();
    }

    #[test]
    fn what_is_given_back_is_free_again() {
        let shares = Shares::new("sessions", 100, 4);
        let three = shares.take("pod", 3).unwrap();
        let full = shares.take("pod", 2).unwrap_err();
        assert_eq!(
            full.to_string(),
            "pod pod has 3 sessions already, and may have 4 while 97 of 100 are free"
        );
        shares.take("pod", 1).unwrap();
        shares.take("pod", usize::MAX).unwrap_err();
        shares.take("other", 4).unwrap();
        drop(three);
        assert_eq!(shares.lock().all, 0);
        assert!(shares.lock().of.is_empty());
        shares.take("pod", 4).unwrap();
    }
}
