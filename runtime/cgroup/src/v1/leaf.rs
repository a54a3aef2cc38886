//! A group's directory in one hierarchy.

use std::sync::Arc;
use std::time::Instant;

use coracle_kernel::Errno;

use super::freezer;
use crate::dir::Dir;
use crate::host::Hierarchy;
use crate::{Error, Result, signal};

/// The directory of a group in one hierarchy.
#[derive(Clone, Debug)]
pub(super) struct Leaf {
    /// Index into the host's list.
    pub(super) hierarchy: usize,
    pub(super) dir: Arc<Dir>,
    pub(super) fresh: bool,
}

impl Leaf {
    /// Removes it, at `path` of its hierarchy; whether that was possible in time.
    pub(super) fn remove(&self, hierarchy: &Hierarchy, path: &str, deadline: Instant) -> Result<bool> {
        let mut pause = freezer::LOOK_AGAIN_MIN;
        loop {
            match hierarchy.root.remove(path) {
                Ok(()) => return Ok(true),
                Err(error) if error.errno() == Errno::EBUSY => {}
                Err(source) => {
                    return Err(Error::Step {
                        step: "remove",
                        path: format!("/{path}"),
                        source,
                    });
                }
            }
            // Groups below, or processes that are still exiting.
            if self.dir.remove_below()? && hierarchy.root.remove(path).is_ok() {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !signal::wait_empty(&self.dir, left)? {
                return Ok(false);
            }
            // Empty, and yet busy: the last task is on its way out of the scheduler, which has no event.
            freezer::look_again(&mut pause);
        }
    }
}

/// What was there before must be empty and running.
pub(super) fn check_existing(hierarchy: &Hierarchy, dir: &Dir) -> Result<()> {
    let pids = dir.pids()?;
    if !pids.is_empty() {
        return Err(Error::NotEmpty(pids.len()));
    }
    if hierarchy.has("freezer")
        && dir
            .try_read("freezer.state")?
            .is_some_and(|state| state.trim() != "THAWED")
    {
        return Err(Error::Frozen);
    }
    Ok(())
}
