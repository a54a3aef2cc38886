//! What happens because time passes: deadlines of helpers and starts, logs that are tried again; and the search for
//! what a dead helper may have left.

use std::time::Duration;

use coracle_kernel::clone::own_pid;
use coracle_kernel::signal::{self, Signal};
use coracle_kernel::time;

use crate::container::now;
use crate::monitor::Monitor;
use crate::say;

impl Monitor {
    /// How long the loop may wait.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        let helpers = self.helpers.iter().map(|helper| helper.deadline_ns);
        let starts = self
            .containers
            .iter()
            .filter_map(|c| c.starting.as_ref().map(|s| s.deadline_ns));
        let gaps = self
            .containers
            .iter()
            .filter_map(|c| c.log.as_ref()?.gap().map(|gap| gap.retry_ns));
        let next = helpers.chain(starts).chain(gaps).min()?;
        Some(Duration::from_nanos(next.saturating_sub(time::monotonic_ns())))
    }

    /// Ends what has had its time, and tries again what is due.
    pub(crate) fn pass_deadlines(&mut self) {
        let now = now();
        while let Some(index) = self
            .helpers
            .iter()
            .position(|helper| helper.deadline_ns <= now.monotonic_ns)
        {
            let helper = self.helpers.remove(index);
            self.helper_late(helper);
        }
        let mut index = 0;
        while let Some(container) = self.containers.get_mut(index) {
            index += 1;
            let serial = container.serial;
            if let Some(log) = &mut container.log
                && log.gap().is_some_and(|gap| gap.retry_ns <= now.monotonic_ns)
            {
                log.heal(now);
                let done = container.exit.is_some() && container.outputs.iter().all(Option::is_none);
                self.tell_of_loss(serial);
                if done {
                    self.close_log(serial);
                }
            }
            self.start_late(serial, now.monotonic_ns);
        }
    }

    /// Ends children that dead helpers have left: inits that nobody can start any more. They end by themselves when
    /// their helper's socket closes, unless they hang. They are known by their exit signal, which is none until a
    /// program is executed; processes of containers that came to us because their parents ended have one.
    pub(crate) fn kill_lost_children(&mut self) {
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return;
        };
        for entry in entries.flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok())
            else {
                continue;
            };
            let of_pod = self.sandbox.as_ref().and_then(|sandbox| sandbox.init.as_ref());
            let known = self.containers.iter().any(|container| container.pid == pid)
                || self.execs.iter().any(|exec| exec.pid == pid)
                || of_pod.is_some_and(|init| init.pid == pid);
            if known || !is_lost_child(pid) {
                continue;
            }
            say(&format!("killing process {pid}, which a helper left behind"));
            // It is our child and not reaped, so the number is its own.
            let _ = signal::kill(pid, Signal::KILL);
        }
    }
}

/// The clock's value at a deadline this far from now; 0 means two minutes.
pub(crate) fn deadline(milliseconds: u64) -> u64 {
    let milliseconds = if milliseconds == 0 { 120_000 } else { milliseconds };
    time::monotonic_ns().saturating_add(milliseconds.saturating_mul(1_000_000))
}

/// Whether a process is a child of ours without an exit signal.
fn is_lost_child(pid: i32) -> bool {
    let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // The name may hold anything, a parenthesis too.
    let Some((_, rest)) = text.rsplit_once(") ") else {
        return false;
    };
    let field = |number: usize| {
        rest.split(' ')
            .nth(number - 3)
            .and_then(|word| word.parse::<i32>().ok())
    };
    field(4) == Some(own_pid()) && field(38) == Some(0)
}
