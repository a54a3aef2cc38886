//! v1 and hybrid hosts: one directory in each hierarchy that is needed.

mod devices;
mod freezer;
mod leaf;
mod limits;
mod stats;

use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_kernel::epoll::Wakeup;
use coracle_kernel::{Errno, Error as KernelError, fd};
use coracle_spec::oci::LinuxResources;

use self::leaf::Leaf;
use crate::dir::Dir;
use crate::host::{Hierarchy, Host};
use crate::{
    Change, DevicePolicy, Error, Location, Manager, OomWatch, Options, Pid, Placement, Result, Stats,
    device_rules, none, signal,
};

/// One group: its leaves.
#[derive(Debug)]
pub(crate) struct Group {
    host: Host,
    location: Location,
    options: Options,
    /// Directories of the group itself.
    leaves: Vec<Leaf>,
    /// For hierarchies in which the group has no directory: the nearest one above it, where that is another than the
    /// caller's own. A sub-group has its container's here.
    around: Vec<Arc<Dir>>,
    /// Made by [`Manager::sub_group`].
    is_sub: bool,
    /// Why there is no leaf at all, where nothing was asked of one.
    forgone: Option<String>,
    readers: stats::Readers,
}

impl Group {
    pub(crate) fn new(host: Host, location: Location, options: Options) -> Result<Group> {
        let mut group = Group {
            host,
            location,
            options,
            leaves: Vec::new(),
            around: Vec::new(),
            is_sub: false,
            forgone: None,
            readers: stats::Readers::default(),
        };
        let mut without = Vec::new();
        for (index, hierarchy) in group.host.v1().iter().enumerate() {
            match hierarchy.root.find(group.location.within(hierarchy.name()))? {
                Some(dir) => group.leaves.push(Leaf {
                    hierarchy: index,
                    dir: Arc::new(dir),
                    fresh: false,
                }),
                None => without.push(index),
            }
        }
        // Nothing is there yet: `create` will decide.
        if !group.leaves.is_empty() {
            for index in without {
                let hierarchy = &group.host.v1()[index];
                let nearest = group.nearest(hierarchy)?;
                if nearest != group.host.own_in(hierarchy)? {
                    let path = if nearest.is_empty() { "." } else { nearest };
                    group.around.extend(hierarchy.root.find(path)?.map(Arc::new));
                }
            }
        }
        Ok(group)
    }

    /// The nearest directory above the group in `hierarchy`; empty for the root.
    fn nearest(&self, hierarchy: &Hierarchy) -> Result<&str> {
        let above = |path: &'_ str| path.rfind('/').unwrap_or(0);
        let path = self.location.within(hierarchy.name());
        let mut nearest = &path[..above(path)];
        while !nearest.is_empty() && hierarchy.root.find(nearest)?.is_none() {
            nearest = &nearest[..above(nearest)];
        }
        Ok(nearest)
    }

    /// The leaf in the hierarchy of `controller`.
    fn leaf(&self, controller: &str) -> Option<&Leaf> {
        self.leaves
            .iter()
            .find(|leaf| self.host.v1()[leaf.hierarchy].has(controller))
    }

    /// The leaf that tells which processes there are: the freezer's, which every group has where it is mounted.
    fn tracker(&self) -> Result<&Dir> {
        match (self.leaf("freezer").or(self.leaves.first()), &self.forgone) {
            (Some(leaf), _) => Ok(&leaf.dir),
            (None, Some(why)) => Err(Error::NoCgroup {
                wanted: "a group of its own",
                why: why.clone(),
            }),
            (None, None) => Err(gone(&self.location)),
        }
    }

    /// Every directory that a process of the group is in.
    fn directories(&self) -> Result<impl Iterator<Item = &Dir>> {
        if self.forgone.is_none() && self.leaves.is_empty() {
            return Err(gone(&self.location));
        }
        let own = self.leaves.iter().map(|leaf| &leaf.dir);
        Ok(own.chain(&self.around).map(|dir| &**dir))
    }

    fn freezer(&self) -> Result<&Dir> {
        match self.leaf("freezer") {
            Some(leaf) => Ok(&leaf.dir),
            None => Err(Error::NoController {
                controller: "freezer".to_owned(),
                file: "freezer.state".to_owned(),
                path: self.location.path(),
            }),
        }
    }

    /// Whether the group needs a leaf in `hierarchy`.
    ///
    /// It does without one where nothing is asked of it and staying where the creator is puts the same limits on its
    /// processes as the leaf's parent would.
    fn needs(&self, hierarchy: &Hierarchy, asked: &[&str]) -> Result<bool> {
        let accounts = ["cpu", "cpuacct", "memory", "pids"];
        if hierarchy.has("freezer")
            || asked.iter().any(|controller| hierarchy.has(controller))
            || self.options.accounting && accounts.iter().any(|controller| hierarchy.has(controller))
        {
            return Ok(true);
        }
        Ok(self.nearest(hierarchy)? != self.host.own_in(hierarchy)?)
    }

    fn no_limits(&self, resources: &LinuxResources, why: &str) -> Result<()> {
        match none::first_limit(resources, self.options.devices) {
            Some(wanted) => Err(Error::NoCgroup {
                wanted,
                why: why.to_owned(),
            }),
            None => Ok(()),
        }
    }
}

impl Manager for Group {
    fn location(&self) -> &Location {
        &self.location
    }

    fn exists(&self) -> bool {
        !self.leaves.is_empty()
    }

    fn create(&mut self, resources: &LinuxResources) -> Result<()> {
        if self.is_sub {
            return Ok(());
        }
        limits::check(resources)?;
        let asked = limits::controllers(resources, self.options.devices);
        let mut leaves = Vec::new();
        let mut denied = None;
        for (index, hierarchy) in self.host.v1().iter().enumerate() {
            let known = self.leaves.iter().any(|leaf| leaf.hierarchy == index);
            if !known && !self.needs(hierarchy, &asked)? {
                continue;
            }
            let path = self.location.within(hierarchy.name());
            let (dir, fresh) = match hierarchy.root.make_all(path) {
                Ok(made) => made,
                // No right to make one: fine for whoever asks nothing of it.
                Err(Error::Step { source, .. })
                    if matches!(source.errno(), Errno::EACCES | Errno::EPERM | Errno::EROFS) =>
                {
                    if asked.iter().any(|controller| hierarchy.has(controller)) {
                        self.no_limits(resources, &source.to_string())?;
                    }
                    denied = Some(source.to_string());
                    continue;
                }
                Err(error) => return Err(error),
            };
            if !fresh {
                leaf::check_existing(hierarchy, &dir)?;
            }
            if hierarchy.has("cpuset") {
                // A new one has no processor and no memory node, and takes no process.
                limits::inherit_cpuset(&hierarchy.root, path)?;
            }
            leaves.push(Leaf {
                hierarchy: index,
                dir: Arc::new(dir),
                fresh,
            });
        }
        if leaves.is_empty() {
            let why = denied.unwrap_or_else(|| "no hierarchy is mounted".to_owned());
            self.no_limits(resources, &why)?;
            self.forgone = Some(why);
        }
        self.leaves = leaves;
        Ok(())
    }

    fn apply(&mut self, resources: &LinuxResources, change: Change) -> Result<()> {
        limits::check(resources)?;
        if let Some(why) = &self.forgone {
            return self.no_limits(resources, why);
        }
        if self.leaves.is_empty() {
            return Err(gone(&self.location));
        }
        let leaf = |controller: &str| self.leaf(controller).map(|leaf| &*leaf.dir);
        limits::apply(resources, &leaf, &self.location.path())?;
        if change == Change::First {
            let rules = device_rules::exceptions(&device_rules::complete(resources)?)?;
            let fresh = self.leaf("devices").is_some_and(|leaf| leaf.fresh);
            match leaf("devices").map(|dir| devices::apply(dir, &rules, fresh)) {
                None if self.options.devices == DevicePolicy::Enforce && !rules.allow_all => {
                    return Err(Error::NoController {
                        controller: "devices".to_owned(),
                        file: "devices.deny".to_owned(),
                        path: self.location.path(),
                    });
                }
                None => {}
                Some(Err(error))
                    if self.options.devices == DevicePolicy::BestEffort
                        && matches!(error.errno(), Some(Errno::EPERM | Errno::EACCES)) => {}
                Some(result) => result?,
            }
        }
        Ok(())
    }

    fn place(&self) -> Result<Placement> {
        let tasks: Result<_> = self.directories()?.map(Dir::tasks).collect();
        Ok(Placement::Itself(tasks?))
    }

    fn add(&self, pid: Pid) -> Result<()> {
        let pid = pid.to_string();
        self.directories()?
            .try_for_each(|dir| dir.write("cgroup.procs", &pid))
    }

    fn pids(&self) -> Result<Vec<Pid>> {
        if self.leaves.is_empty() && self.forgone.is_none() {
            Ok(Vec::new())
        } else {
            self.tracker()?.pids()
        }
    }

    fn freeze(&self, timeout: Duration) -> Result<()> {
        let dir = self.freezer()?;
        freezer::freeze(dir)?;
        if freezer::wait(dir, true, timeout)? {
            return Ok(());
        }
        // Half a freeze is nobody's state.
        freezer::thaw(dir)?;
        Err(Error::Deadline {
            path: self.location.path(),
            what: "freeze",
            limit: timeout,
        })
    }

    fn thaw(&self, timeout: Duration) -> Result<()> {
        let dir = self.freezer()?;
        freezer::thaw(dir)?;
        if freezer::wait(dir, false, timeout)? {
            return Ok(());
        }
        Err(Error::Deadline {
            path: self.location.path(),
            what: "thaw",
            limit: timeout,
        })
    }

    fn frozen(&self) -> Result<bool> {
        match self.leaf("freezer") {
            Some(leaf) => Ok(leaf.dir.read("freezer.state")?.trim() != "THAWED"),
            None => Ok(false),
        }
    }

    fn kill(&self, timeout: Duration) -> Result<()> {
        if self.leaves.is_empty() {
            return Ok(());
        }
        let deadline = Instant::now() + timeout;
        let dir = self.tracker()?;
        let freezer = self.leaf("freezer").map(|leaf| &leaf.dir);
        let mut pause = freezer::LOOK_AGAIN_MIN;
        for round in 0u32.. {
            // Most groups are gone after a first round that freezes nothing. Frozen, nothing in it forks while it is
            // gone through; a freeze that does not come to an end (a task in a long wait) must not keep the others
            // alive: the next round finds what was forked meanwhile.
            if let Some(freezer) = freezer
                && round > 0
                && !freezer::hold_still(freezer)?
            {
                return Ok(());
            }
            let found = signal::kill_all(dir)?;
            if let Some(freezer) = freezer {
                // A frozen task takes no signal.
                freezer::thaw_all(freezer)?;
            }
            if found == 0 {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if signal::wait_empty(dir, freezer::LOOK_AGAIN_MAX.min(left))? {
                return Ok(());
            }
            if left.is_zero() {
                break;
            }
            freezer::look_again(&mut pause);
        }
        Err(Error::Deadline {
            path: self.location.path(),
            what: "die",
            limit: timeout,
        })
    }

    fn wait_empty(&self, timeout: Duration) -> Result<bool> {
        if self.leaves.is_empty() {
            Ok(true)
        } else {
            signal::wait_empty(self.tracker()?, timeout)
        }
    }

    fn stats(&mut self) -> Result<Stats> {
        let leaves = &self.leaves;
        let host = &self.host;
        let leaf = |controller: &str| {
            leaves
                .iter()
                .find(|leaf| host.v1()[leaf.hierarchy].has(controller))
                .map(|leaf| &*leaf.dir)
        };
        self.readers.read(&leaf)
    }

    fn watch_oom(&self) -> Result<Option<OomWatch>> {
        let Some(leaf) = self.leaf("memory") else {
            return Ok(None);
        };
        let Some(counter) = leaf.dir.cache("memory.oom_control")? else {
            return Ok(None);
        };
        let failed = |source| Error::Step {
            step: "watch memory of",
            path: self.location.path(),
            source,
        };
        let notice = Wakeup::new().map_err(failed)?;
        // The numbers are of descriptors of this process, and read within the write.
        let line = format!("{} {}", fd::number(&notice), fd::number(&counter));
        leaf.dir.write("cgroup.event_control", &line)?;
        Ok(Some(OomWatch {
            notice: Some(notice),
            counter,
        }))
    }

    fn sub_group(&self, name: &str) -> Result<Box<dyn Manager>> {
        let location = self.location.child(name)?;
        let mut group = Group {
            host: self.host.clone(),
            location,
            options: self.options,
            leaves: Vec::new(),
            around: Vec::new(),
            is_sub: true,
            forgone: self.forgone.clone(),
            readers: stats::Readers::default(),
        };
        if self.forgone.is_some() {
            return Ok(Box::new(group));
        }
        // Found and killed through the freezer, limited with the container in all other hierarchies.
        let tracker = self
            .leaf("freezer")
            .or(self.leaves.first())
            .ok_or_else(|| gone(&self.location))?;
        let fresh = tracker.dir.make(name)?;
        let dir = tracker.dir.find(name)?.ok_or_else(|| gone(&group.location))?;
        let others = self
            .leaves
            .iter()
            .filter(|leaf| leaf.hierarchy != tracker.hierarchy);
        group.around.extend(
            others
                .map(|leaf| Arc::clone(&leaf.dir))
                .chain(self.around.iter().cloned()),
        );
        group.leaves.push(Leaf {
            hierarchy: tracker.hierarchy,
            dir: Arc::new(dir),
            fresh,
        });
        Ok(Box::new(group))
    }

    fn remove(&mut self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut failed = Ok(());
        // One that cannot be removed must not keep the others.
        for leaf in std::mem::take(&mut self.leaves) {
            let hierarchy = &self.host.v1()[leaf.hierarchy];
            match leaf.remove(hierarchy, self.location.within(hierarchy.name()), deadline) {
                Ok(true) => continue,
                Ok(false) => {
                    let what = "lose its processes";
                    failed = Err(Error::Deadline {
                        path: self.location.path(),
                        what,
                        limit: timeout,
                    });
                }
                Err(error) => failed = Err(error),
            }
            self.leaves.push(leaf);
        }
        self.readers = stats::Readers::default();
        failed
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
mod tests;
