//! Waiting for `cgroup.events`, and signals where cgroup.kill has no meaning.

use std::time::{Duration, Instant};

use coracle_kernel::Errno;
use coracle_kernel::epoll::{Interest, wait_one};

use crate::dir::{Dir, keyed};
use crate::{Error, Result};

/// Waits until `key` of `cgroup.events` is `value`; whether it came to be so. A directory that is gone is empty and
/// not frozen.
pub(crate) fn event(dir: &Dir, key: &str, value: u64, timeout: Duration) -> Result<bool> {
    let deadline = Instant::now() + timeout;
    let failed = |source| Error::Step {
        step: "watch",
        path: dir.path().to_owned(),
        source,
    };
    let Some(events) = dir.cache("cgroup.events")? else {
        return Ok(value == 0);
    };
    loop {
        // The kernel remembers a change since the last read of this descriptor, so none is missed in between.
        match events.read() {
            Ok(text) if keyed(&text, key) == Some(value) => return Ok(true),
            Ok(_) => {}
            Err(error) if error.errno() == Some(Errno::ENODEV) => return Ok(value == 0),
            Err(error) => return Err(error),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        wait_one(&events, Interest::PRIORITY, Some(left)).map_err(failed)?;
    }
}
