//! Limits in the words of cgroup v1, as the specification has them, turned into those of cgroup v2.

use thiserror::Error;

/// A pair of memory limits that contradicts itself.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SwapError {
    /// Swap is counted on top of memory, so it needs a memory limit.
    #[error("unable to set swap limit without memory limit")]
    WithoutLimit,
    /// The sum of memory and swap is below memory alone.
    #[error("memory+swap limit should be >= memory limit")]
    BelowLimit,
}

/// `cpu.weight` for `cpu.shares`; `None`: leave it alone.
///
/// The curve goes through 2 → 1, 1024 → 100 and 262144 → 10000: the default of one is the default of the other.
/// Monitoring tools invert it, so it matches the other runtimes' digit for digit.
#[must_use]
pub fn cpu_weight(shares: u64) -> Option<u64> {
    match shares {
        0 => None,
        1..=2 => Some(1),
        262_144.. => Some(10_000),
        shares => {
            #[expect(clippy::cast_precision_loss, reason = "below 2^18")]
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 1 and 10000"
            )]
            let weight = 10f64.powf(exponent).ceil() as u64;
            Some(weight)
        }
    }
}

/// `memory.swap.max` for a v1 pair of memory and memory-plus-swap limits; `None`: leave it alone, `Some(-1)`: no limit.
///
/// # Errors
/// The pair contradicts itself.
pub fn memory_swap(limit: Option<i64>, swap: Option<i64>) -> Result<Option<i64>, SwapError> {
    let limit = limit.unwrap_or(0);
    match swap.unwrap_or(0) {
        // Memory without limit means swap without limit, unless told otherwise.
        0 if limit == -1 => Ok(Some(-1)),
        0 => Ok(None),
        -1 => Ok(Some(-1)),
        _ if limit == 0 || limit == -1 => Err(SwapError::WithoutLimit),
        swap if swap < limit => Err(SwapError::BelowLimit),
        swap => Ok(Some(swap - limit)),
    }
}

/// `io.weight` for `blkio.weight` (10 to 1000 becomes 1 to 10000); `None`: leave it alone.
#[must_use]
pub fn io_weight(weight: u16) -> Option<u64> {
    match weight {
        0 => None,
        weight => Some(1 + u64::from(weight.clamp(10, 1000) - 10) * 9999 / 990),
    }
}

/// What to write to a v2 file whose limit is `-1` or a number: `max`, or the number.
#[must_use]
pub fn limit_text(limit: i64) -> String {
    if limit < 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

/// `pids.max` for `pids.limit`. A limit of 0 becomes 1: systemd refuses 0, and the first process is there already.
#[must_use]
pub fn pids_max(limit: i64) -> String {
    if limit == 0 {
        "1".to_owned()
    } else {
        limit_text(limit)
    }
}

/// `cpu.max` for quota and period. A quota of 0 or less is none; where only one is given the other keeps its value,
/// which the caller passes as `current` (quota text and period of the file as it is).
#[must_use]
pub fn cpu_max(quota: Option<i64>, period: Option<u64>, current: (&str, u64)) -> Option<String> {
    let period = period.filter(|period| *period != 0);
    let quota = quota.filter(|quota| *quota != 0);
    if quota.is_none() && period.is_none() {
        return None;
    }
    let quota_text = quota.map_or_else(|| current.0.to_owned(), limit_text);
    Some(format!("{quota_text} {}", period.unwrap_or(current.1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_shares_follow_the_published_curve() {
        let pairs = [
            (0, None),
            (1, Some(1)),
            (2, Some(1)),
            (102, Some(17)),
            (512, Some(59)),
            (1024, Some(100)),
            (2048, Some(174)),
            (262_144, Some(10_000)),
            (u64::MAX, Some(10_000)),
        ];
        for (shares, weight) in pairs {
            assert_eq!(cpu_weight(shares), weight, "{shares}");
        }
        let weights: Vec<_> = (2..=262_144).map(|shares| cpu_weight(shares).unwrap()).collect();
        assert!(weights.is_sorted());
        assert!(weights.iter().all(|weight| (1..=10_000).contains(weight)));
    }

    #[test]
    fn swap_is_what_goes_beyond_memory() {
        assert_eq!(memory_swap(None, None), Ok(None));
        assert_eq!(memory_swap(Some(100), None), Ok(None));
        assert_eq!(memory_swap(Some(-1), None), Ok(Some(-1)));
        assert_eq!(memory_swap(Some(-1), Some(-1)), Ok(Some(-1)));
        assert_eq!(memory_swap(Some(100), Some(-1)), Ok(Some(-1)));
        assert_eq!(memory_swap(Some(100), Some(100)), Ok(Some(0)));
        assert_eq!(memory_swap(Some(100), Some(150)), Ok(Some(50)));
        assert_eq!(memory_swap(Some(100), Some(99)), Err(SwapError::BelowLimit));
        assert_eq!(memory_swap(None, Some(100)), Err(SwapError::WithoutLimit));
        assert_eq!(memory_swap(Some(-1), Some(100)), Err(SwapError::WithoutLimit));
    }

    #[test]
    fn io_weights_keep_both_ends() {
        assert_eq!(io_weight(0), None);
        assert_eq!(io_weight(10), Some(1));
        assert_eq!(io_weight(1000), Some(10_000));
        assert_eq!(io_weight(500), Some(4950));
    }

    #[test]
    fn limits_as_text() {
        assert_eq!(pids_max(0), "1");
        assert_eq!(pids_max(-1), "max");
        assert_eq!(pids_max(64), "64");
        assert_eq!(
            cpu_max(Some(50_000), None, ("max", 100_000)).as_deref(),
            Some("50000 100000")
        );
        assert_eq!(
            cpu_max(None, Some(20_000), ("50000", 100_000)).as_deref(),
            Some("50000 20000")
        );
        assert_eq!(
            cpu_max(Some(-1), Some(20_000), ("50000", 100_000)).as_deref(),
            Some("max 20000")
        );
        assert_eq!(cpu_max(None, None, ("max", 100_000)), None);
        assert_eq!(cpu_max(Some(0), Some(0), ("max", 100_000)), None);
    }
}
