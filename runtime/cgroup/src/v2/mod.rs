//! The unified hierarchy.

mod delegate;
mod limits;
mod stats;
mod wait;

use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_kernel::{Errno, Error as KernelError};
use coracle_spec::oci::LinuxResources;

use crate::dir::{Dir, keyed};
use crate::{
    Change, DevicePolicy, Error, Location, Manager, OomWatch, Options, Pid, Placement, Result, Stats,
    device_prog, device_rules, none, signal,
};

/// One group of the unified hierarchy.
#[derive(Debug)]
pub(crate) struct Group {
    root: Arc<Dir>,
    location: Location,
    options: Options,
    leaf: Leaf,
    /// Made by [`Manager::sub_group`].
    is_sub: bool,
    readers: stats::Readers,
}

/// The directory of a group.
#[derive(Debug)]
enum Leaf {
    /// Made here, or found.
    There { dir: Dir, fresh: bool },
    /// Not made yet, or removed.
    Absent,
    /// Cannot be made, for this reason, and nothing was asked of it.
    Forgone(String),
}

impl Group {
    pub(crate) fn new(root: Arc<Dir>, location: Location, options: Options) -> Result<Group> {
        let leaf = match root.find(location.within(""))? {
            Some(dir) => Leaf::There { dir, fresh: false },
            None => Leaf::Absent,
        };
        Ok(Group {
            root,
            location,
            options,
            leaf,
            is_sub: false,
            readers: stats::Readers::default(),
        })
    }

    fn dir(&self) -> Result<&Dir> {
        match &self.leaf {
            Leaf::There { dir, .. } => Ok(dir),
            Leaf::Absent => Err(gone(&self.location)),
            Leaf::Forgone(why) => Err(Error::NoCgroup {
                wanted: "a group of its own",
                why: why.clone(),
            }),
        }
    }

    /// What was there before must be empty and running.
    fn check_existing(dir: &Dir) -> Result<()> {
        // A directory of fixtures, or a kernel's root group, has no such file.
        let Some(events) = dir.try_read("cgroup.events")? else {
            return Ok(());
        };
        if keyed(&events, "populated") == Some(1) {
            // At least one, even if it went between the two looks.
            return Err(Error::NotEmpty(dir.pids()?.len().max(1)));
        }
        if keyed(&events, "frozen") == Some(1) {
            return Err(Error::Frozen);
        }
        Ok(())
    }
}

impl Manager for Group {
    fn location(&self) -> &Location {
        &self.location
    }

    fn exists(&self) -> bool {
        matches!(self.leaf, Leaf::There { .. })
    }

    fn create(&mut self, resources: &LinuxResources) -> Result<()> {
        if self.is_sub {
            return Ok(());
        }
        let path = self.location.within("");
        let (dir, fresh) = match self.root.make_all(path) {
            Ok(made) => made,
            // No right to make one: fine for whoever asks nothing of it.
            Err(Error::Step { source, .. })
                if matches!(source.errno(), Errno::EACCES | Errno::EPERM | Errno::EROFS) =>
            {
                let why = source.to_string();
                return match none::first_limit(resources, self.options.devices) {
                    Some(wanted) => Err(Error::NoCgroup { wanted, why }),
                    None => {
                        self.leaf = Leaf::Forgone(why);
                        Ok(())
                    }
                };
            }
            Err(error) => return Err(error),
        };
        if !fresh {
            Group::check_existing(&dir)?;
        }
        delegate::enable(&self.root, path, &dir, &limits::controllers(resources))?;
        delegate::settle_type(&dir, &limits::controllers(resources))?;
        self.leaf = Leaf::There { dir, fresh };
        Ok(())
    }

    fn apply(&mut self, resources: &LinuxResources, change: Change) -> Result<()> {
        let (dir, fresh) = match &self.leaf {
            Leaf::There { dir, fresh } => (dir, *fresh),
            Leaf::Forgone(why) => {
                return match none::first_limit(resources, self.options.devices) {
                    Some(wanted) => Err(Error::NoCgroup {
                        wanted,
                        why: why.clone(),
                    }),
                    None => Ok(()),
                };
            }
            Leaf::Absent => return Err(gone(&self.location)),
        };
        if change == Change::Update {
            limits::check_before_update(dir, resources)?;
        }
        let fresh = fresh && change == Change::First;
        let mut later = None;
        for setting in limits::settings(resources)? {
            match setting.write(dir, fresh) {
                Err(error) if setting.is_burst() && error.errno() == Some(Errno::EINVAL) => {
                    later = Some(setting);
                }
                other => other?,
            }
        }
        if let Some(setting) = later {
            setting.write(dir, fresh)?;
        }
        if change == Change::First {
            let rules = device_rules::complete(resources)?;
            match device_prog::attach(dir, &rules, fresh) {
                Err(error)
                    if self.options.devices == DevicePolicy::BestEffort
                        && matches!(error.errno(), Some(Errno::EPERM | Errno::EACCES | Errno::EINVAL)) => {}
                other => other?,
            }
        }
        Ok(())
    }

    fn place(&self) -> Result<Placement> {
        if matches!(self.leaf, Leaf::Forgone(_)) {
            return Ok(Placement::Itself(Vec::new()));
        }
        let dir = self.dir()?;
        let fd = coracle_kernel::fd::dup(dir).map_err(|source| Error::Step {
            step: "place a process in",
            path: self.location.path(),
            source,
        })?;
        Ok(Placement::Into(fd))
    }

    fn add(&self, pid: Pid) -> Result<()> {
        if matches!(self.leaf, Leaf::Forgone(_)) {
            return Ok(());
        }
        self.dir()?.write("cgroup.procs", &pid.to_string())
    }

    fn pids(&self) -> Result<Vec<Pid>> {
        match &self.leaf {
            Leaf::Absent => Ok(Vec::new()),
            _ => self.dir()?.pids(),
        }
    }

    fn freeze(&self, timeout: Duration) -> Result<()> {
        let dir = self.dir()?;
        dir.write("cgroup.freeze", "1")?;
        if wait::event(dir, "frozen", 1, timeout)? {
            return Ok(());
        }
        // Half a freeze is nobody's state.
        dir.write("cgroup.freeze", "0")?;
        Err(Error::Deadline {
            path: self.location.path(),
            what: "freeze",
            limit: timeout,
        })
    }

    fn thaw(&self, timeout: Duration) -> Result<()> {
        let dir = self.dir()?;
        dir.write("cgroup.freeze", "0")?;
        if wait::event(dir, "frozen", 0, timeout)? {
            return Ok(());
        }
        Err(Error::Deadline {
            path: self.location.path(),
            what: "thaw",
            limit: timeout,
        })
    }

    fn frozen(&self) -> Result<bool> {
        match &self.leaf {
            Leaf::There { dir, .. } => Ok(dir.read("cgroup.freeze")?.trim() == "1"
                || keyed(&dir.read("cgroup.events")?, "frozen") == Some(1)),
            _ => Ok(false),
        }
    }

    fn kill(&self, _: Duration) -> Result<()> {
        let Leaf::There { dir, .. } = &self.leaf else {
            return Ok(());
        };
        match dir.write_raw("cgroup.kill", "1") {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.errno(), Errno::ENOENT | Errno::ENODEV) => Ok(()),
            // A threaded group has no processes to kill but its domain's: one by one.
            Err(error) if error.errno() == Errno::EOPNOTSUPP => signal::kill_all(dir).map(|_| ()),
            Err(source) => Err(Error::Step {
                step: "kill the processes of",
                path: dir.path().to_owned(),
                source,
            }),
        }
    }

    fn wait_empty(&self, timeout: Duration) -> Result<bool> {
        match &self.leaf {
            Leaf::There { dir, .. } => wait::event(dir, "populated", 0, timeout),
            _ => Ok(true),
        }
    }

    fn stats(&mut self) -> Result<Stats> {
        let Leaf::There { dir, .. } = &self.leaf else {
            return Ok(Stats::default());
        };
        self.readers.read(dir)
    }

    fn watch_oom(&self) -> Result<Option<OomWatch>> {
        match &self.leaf {
            Leaf::There { dir, .. } => Ok(dir.cache("memory.events")?.map(|counter| OomWatch {
                notice: None,
                counter,
            })),
            _ => Ok(None),
        }
    }

    fn sub_group(&self, name: &str) -> Result<Box<dyn Manager>> {
        let location = self.location.child(name)?;
        let leaf = match &self.leaf {
            Leaf::There { dir, .. } => {
                let fresh = dir.make(name)?;
                let dir = dir.find(name)?.ok_or_else(|| gone(&location))?;
                // A threaded container can have threaded children alone.
                delegate::settle_type(&dir, &[])?;
                Leaf::There { dir, fresh }
            }
            Leaf::Absent => return Err(gone(&location)),
            Leaf::Forgone(why) => Leaf::Forgone(why.clone()),
        };
        Ok(Box::new(Group {
            root: Arc::clone(&self.root),
            location,
            options: self.options,
            leaf,
            is_sub: true,
            readers: stats::Readers::default(),
        }))
    }

    fn remove(&mut self, timeout: Duration) -> Result<()> {
        let Leaf::There { dir, .. } = &self.leaf else {
            return Ok(());
        };
        let deadline = Instant::now() + timeout;
        loop {
            match self.root.remove(self.location.within("")) {
                Ok(()) => break,
                Err(error) if error.errno() == Errno::EBUSY => {}
                Err(source) => {
                    return Err(Error::Step {
                        step: "remove",
                        path: self.location.path(),
                        source,
                    });
                }
            }
            // Groups below, or processes that are still exiting.
            if dir.remove_below()? && self.root.remove(self.location.within("")).is_ok() {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !wait::event(dir, "populated", 0, left)? {
                let what = "lose its processes";
                return Err(Error::Deadline {
                    path: self.location.path(),
                    what,
                    limit: timeout,
                });
            }
        }
        self.leaf = Leaf::Absent;
        self.readers = stats::Readers::default();
        Ok(())
    }
}

fn gone(location: &Location) -> Error {
    Error::Step {
        step: "find",
        path: location.path(),
        source: KernelError::new("openat2", "", Errno::ENOENT),
    }
}

#[cfg(test)]
mod fixture_tests;
#[cfg(test)]
mod tests;
