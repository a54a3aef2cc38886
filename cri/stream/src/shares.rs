//! Shares: how much of something that the node has once its pods may have, so that no number of them has all of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A pod may have this part of what is free. The rest is for those that come later: of N pods that take all they can
/// each has the same, a little less than 1/(N + 8) of the whole, and one more finds almost as much.
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
        let may = self.most_of_one.min(free / PART);
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
