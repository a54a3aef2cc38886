//! Cgroups of plugins that run: whatever a plugin has started is found by them, also by the next daemon.
//!
//! Each run has a group below `/coracle/<instance>/plugins`, and that is removed at the run's end. What a plugin has left
//! in the background by then is meant to stay, and is moved to `/coracle/<instance>/helpers`. So what is below `plugins`
//! when a daemon starts belongs to runs that had not ended: it is killed before the daemon sends anything, or it would
//! go on making behind the back of a DEL what nobody takes down any more.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coracle_cgroup::{Host, Manager, Placement};
use coracle_kernel::clone::own_pid;

use crate::{chain_text, lock};

/// How long what is killed may take to be gone. After that it can do no more than end the system call that it is in.
const KILL_TIME: Duration = Duration::from_secs(5);

/// How long the last process of a run may take to be gone from the group: it has ended already.
const EMPTY_TIME: Duration = Duration::from_secs(1);

/// How often a group is looked through for what is to stay: what forks meanwhile is found the next time.
const MOVES: usize = 100;

/// Numbers the runs of this process.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// The groups of an instance's plugins.
pub(super) struct Groups {
    host: Host,
    instance: String,
    /// The group above those of the runs, once there was a run.
    plugins: Mutex<Option<Box<dyn Manager>>>,
    /// The group of what plugins have left in the background, once one did.
    helpers: Mutex<Option<Box<dyn Manager>>>,
}

/// The group of one run. Dropped at its end: what is in it still is let go, unless it was to be killed.
pub(super) struct Group<'a> {
    groups: &'a Groups,
    manager: Box<dyn Manager>,
    killed: Cell<bool>,
    /// The cgroup v2 directory that the plugin is born in.
    pub(super) cgroup: Option<OwnedFd>,
    /// `tasks` files of v1's hierarchies that it writes itself to.
    pub(super) cgroup_tasks: Vec<OwnedFd>,
}

impl Groups {
    /// Kills what the plugins of an earlier daemon of this instance are still doing. Blocks.
    pub(super) fn take_over(instance: &str) -> coracle_cgroup::Result<Groups> {
        let host = Host::detect()?;
        if !coracle_cgroup::end_plugins(&host, instance, KILL_TIME)? {
            tracing::warn!("CNI plugins of an earlier daemon are killed and do not end");
        }
        Ok(Groups {
            host,
            instance: instance.to_owned(),
            plugins: Mutex::default(),
            helpers: Mutex::default(),
        })
    }

    /// The group of a run that is about to begin; none where it cannot be made, which is told.
    pub(super) fn begin(&self) -> Option<Group<'_>> {
        // Unlike those of a daemon whose processes could not be killed.
        let name = format!("{}-{}", own_pid(), NEXT.fetch_add(1, Ordering::Relaxed));
        let made = self.make(&name).or_else(|_| {
            // Somebody may have removed the one above.
            *lock(&self.plugins) = None;
            self.make(&name)
        });
        made.unwrap_or_else(|error| {
            let error = chain_text(&error);
            tracing::warn!(error, "a CNI plugin runs in the daemon's own cgroup");
            None
        })
    }

    /// None: this host lets us have no group at all, which is told the first time.
    fn make(&self, name: &str) -> coracle_cgroup::Result<Option<Group<'_>>> {
        let mut plugins = lock(&self.plugins);
        let above = match &mut *plugins {
            Some(above) => above,
            none => {
                let above = coracle_cgroup::make_plugins(&self.host, &self.instance)?;
                if !above.exists() {
                    tracing::warn!("CNI plugins run in the daemon's own cgroup: it can have no other");
                }
                none.insert(above)
            }
        };
        if !above.exists() {
            return Ok(None);
        }
        let manager = above.sub_group(name)?;
        let (cgroup, cgroup_tasks) = match manager.place()? {
            Placement::Into(directory) => (Some(directory), Vec::new()),
            Placement::Itself(tasks) => (None, tasks),
        };
        Ok(Some(Group {
            groups: self,
            manager,
            killed: Cell::new(false),
            cgroup,
            cgroup_tasks,
        }))
    }
}

impl Group<'_> {
    /// Kills everything that the run has started. What survives that is the next daemon's to kill.
    pub(super) fn kill(&self) {
        self.killed.set(true);
        if let Err(error) = self.manager.kill(KILL_TIME) {
            let error = chain_text(&error);
            tracing::warn!(error, "cannot kill what a CNI plugin has started");
        }
    }

    fn end(&mut self) -> coracle_cgroup::Result<()> {
        if !self.killed.get() && !self.manager.pids()?.is_empty() {
            self.let_go()?;
        }
        self.manager.remove(EMPTY_TIME)
    }

    /// Moves what is in it to the group of helpers. A number that is another's between the list and the write moves
    /// that one: a cgroup takes no better name.
    fn let_go(&self) -> coracle_cgroup::Result<()> {
        let mut helpers = lock(&self.groups.helpers);
        for _ in 0..MOVES {
            let to = match &mut *helpers {
                Some(to) => to,
                none => {
                    let (host, instance) = (&self.groups.host, &self.groups.instance);
                    none.insert(coracle_cgroup::make_helpers(host, instance)?)
                }
            };
            let left = self.manager.pids()?;
            if left.is_empty() {
                break;
            }
            let moved: coracle_cgroup::Result<()> = left.into_iter().try_for_each(|pid| to.add(pid));
            if moved.is_err() {
                // It has ended meanwhile, or somebody has removed the group.
                *helpers = None;
            }
        }
        Ok(())
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            let error = chain_text(&error);
            tracing::warn!(error, "the cgroup of a CNI plugin stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    struct Instance(String);

    impl Instance {
        fn new() -> Instance {
            static UNIQUE: AtomicU64 = AtomicU64::new(0);
            let number = UNIQUE.fetch_add(1, Ordering::Relaxed);
            Instance(format!("coracle-test-{}-{number}", own_pid()))
        }
    }

    impl Drop for Instance {
        fn drop(&mut self) {
            let host = Host::detect().unwrap();
            assert!(coracle_cgroup::remove_own(&host, &self.0).unwrap());
        }
    }

    fn begun(groups: &Groups) -> Option<Group<'_>> {
        let group = groups.begin().filter(|group| group.manager.exists());
        if group.is_none() {
            eprintln!("SKIPPED: no cgroups here, or no right to make one");
        }
        group
    }

    fn sleeper(group: &Group<'_>) -> Child {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        group.manager.add(child.id().cast_signed()).unwrap();
        child
    }

    fn ended(mut child: Child) {
        // Killed already, or this would be what ends it.
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn what_had_not_ended_is_killed_by_the_next_daemon_and_what_was_left_is_not() {
        let instance = Instance::new();
        let groups = Groups::take_over(&instance.0).unwrap();
        let Some(over) = begun(&groups) else { return };
        let mut helper = sleeper(&over);
        drop(over);
        let running = groups.begin().unwrap();
        let (first, second) = (sleeper(&running), sleeper(&running));
        // A daemon that dies drops nothing.
        std::mem::forget(running);
        let next = Groups::take_over(&instance.0).unwrap();
        ended(first);
        ended(second);
        assert!(helper.try_wait().unwrap().is_none(), "the helper was killed");
        drop(next.begin().unwrap());
        helper.kill().unwrap();
        helper.wait().unwrap();
    }

    #[test]
    fn what_many_leave_at_a_time_all_stays() {
        let instance = Instance::new();
        let groups = Groups::take_over(&instance.0).unwrap();
        let Some(first) = begun(&groups) else { return };
        drop(first);
        let barrier = std::sync::Barrier::new(8);
        let mut helpers: Vec<Child> = std::thread::scope(|scope| {
            let left = || {
                let run = groups.begin().unwrap();
                let helper = sleeper(&run);
                barrier.wait();
                drop(run);
                helper
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(left)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        Groups::take_over(&instance.0).unwrap();
        for helper in &mut helpers {
            assert!(helper.try_wait().unwrap().is_none(), "a helper was killed");
            helper.kill().unwrap();
            helper.wait().unwrap();
        }
    }

    #[test]
    fn groups_that_somebody_removes_are_made_anew() {
        let instance = Instance::new();
        let groups = Groups::take_over(&instance.0).unwrap();
        let Some(run) = begun(&groups) else { return };
        drop(run);
        coracle_cgroup::remove_own(&Host::detect().unwrap(), &instance.0).unwrap();
        let run = groups.begin().unwrap();
        let child = sleeper(&run);
        run.kill();
        ended(child);
    }
}
