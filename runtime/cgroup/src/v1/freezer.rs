//! The freezer of v1, which has no event.

use std::time::{Duration, Instant};

use cgroups_rs::freezer::FreezerController;
use coracle_kernel::Errno;

use super::limits::{by_descriptor, through};
use crate::dir::Dir;
use crate::{Error, Result};

/// How long a thing without an event is left alone before the next look.
pub(super) const LOOK_AGAIN_MIN: Duration = Duration::from_micros(100);
pub(super) const LOOK_AGAIN_MAX: Duration = Duration::from_millis(10);

/// Asks for the freeze; it is done when `freezer.state` says so.
pub(crate) fn freeze(dir: &Dir) -> Result<()> {
    through(
        dir,
        "freezer.state",
        "FROZEN",
        FreezerController::new(by_descriptor(dir), false).freeze(),
    )
}

/// Ends it.
pub(crate) fn thaw(dir: &Dir) -> Result<()> {
    through(
        dir,
        "freezer.state",
        "THAWED",
        FreezerController::new(by_descriptor(dir), false).thaw(),
    )
}

/// Waits for `state` of the freezer, which has no event: the kernel even works it out only when asked.
pub(super) fn wait(dir: &Dir, frozen: bool, timeout: Duration) -> Result<bool> {
    let deadline = Instant::now() + timeout;
    let mut pause = LOOK_AGAIN_MIN;
    let wanted = if frozen { "FROZEN" } else { "THAWED" };
    loop {
        if dir.read("freezer.state")?.trim() == wanted {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        look_again(&mut pause);
        if frozen {
            // A task that was in an uninterruptible wait the first time is caught by the next request.
            freeze(dir)?;
        }
    }
}

/// Freezes for a kill, which goes on when that takes long. False: the group was removed meanwhile, and so was empty.
pub(super) fn hold_still(dir: &Dir) -> Result<bool> {
    match freeze(dir).and_then(|()| wait(dir, true, LOOK_AGAIN_MAX)) {
        Err(error) if matches!(error.errno(), Some(Errno::ENOENT | Errno::ENODEV)) => Ok(false),
        other => other.map(|_| true),
    }
}

/// Takes the group and what is below it out of the freezer.
pub(super) fn thaw_all(dir: &Dir) -> Result<()> {
    dir.for_each_below(|dir| match dir.write_raw("freezer.state", "THAWED") {
        Err(source) if !matches!(source.errno(), Errno::ENOENT | Errno::ENODEV) => Err(Error::Step {
            step: "thaw",
            path: dir.path().to_owned(),
            source,
        }),
        _ => Ok(()),
    })
}

/// Waits for something that has no event, longer each time.
#[expect(
    clippy::disallowed_methods,
    reason = "v1's freezer and a task's last moments have no event"
)]
pub(super) fn look_again(pause: &mut Duration) {
    std::thread::sleep(*pause);
    *pause = (*pause * 2).min(LOOK_AGAIN_MAX);
}
