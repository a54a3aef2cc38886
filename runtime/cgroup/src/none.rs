//! A group that is not there: hosts without cgroups, and users who may make none.

use std::time::Duration;

use coracle_spec::oci::LinuxResources;

use crate::{
    Change, DevicePolicy, Error, Location, Manager, OomWatch, Options, Pid, Placement, Result, Stats,
    device_rules,
};

/// Holds no limit, and says so when one is asked for.
#[derive(Debug)]
pub(crate) struct NoGroup {
    location: Location,
    options: Options,
    why: String,
}

impl NoGroup {
    pub(crate) fn new(location: Location, options: Options, why: impl Into<String>) -> NoGroup {
        NoGroup {
            location,
            options,
            why: why.into(),
        }
    }

    fn refuse(&self, resources: &LinuxResources) -> Result<()> {
        match first_limit(resources, self.options.devices) {
            Some(wanted) => Err(Error::NoCgroup {
                wanted,
                why: self.why.clone(),
            }),
            None => Ok(()),
        }
    }
}

/// The first limit that `resources` asks for, as the field's name.
pub(crate) fn first_limit(resources: &LinuxResources, devices: DevicePolicy) -> Option<&'static str> {
    let memory = resources.memory().as_ref();
    let cpu = resources.cpu().as_ref();
    let set = |value: Option<i64>| value.is_some_and(|value| value > 0);
    let asked = [
        (memory.is_some_and(|memory| set(memory.limit())), "memory.limit"),
        (
            memory.is_some_and(|memory| set(memory.reservation())),
            "memory.reservation",
        ),
        (memory.is_some_and(|memory| set(memory.swap())), "memory.swap"),
        (
            cpu.is_some_and(|cpu| cpu.shares().is_some_and(|shares| shares > 0)),
            "cpu.shares",
        ),
        (cpu.is_some_and(|cpu| set(cpu.quota())), "cpu.quota"),
        (cpu.is_some_and(|cpu| cpu.idle().is_some()), "cpu.idle"),
        (
            cpu.is_some_and(|cpu| cpu.cpus().as_ref().is_some_and(|cpus| !cpus.is_empty())),
            "cpu.cpus",
        ),
        (
            cpu.is_some_and(|cpu| cpu.mems().as_ref().is_some_and(|mems| !mems.is_empty())),
            "cpu.mems",
        ),
        (
            resources.pids().as_ref().is_some_and(|pids| pids.limit() >= 0),
            "pids.limit",
        ),
        (resources.block_io().is_some(), "blockIO"),
        (
            resources
                .hugepage_limits()
                .as_ref()
                .is_some_and(|limits| !limits.is_empty()),
            "hugepageLimits",
        ),
        (
            resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()),
            "rdma",
        ),
        (
            resources
                .unified()
                .as_ref()
                .is_some_and(|unified| !unified.is_empty()),
            "unified",
        ),
        (
            devices == DevicePolicy::Enforce && device_rules::restrict(resources),
            "devices",
        ),
    ];
    asked.into_iter().find_map(|(asked, name)| asked.then_some(name))
}

impl Manager for NoGroup {
    fn location(&self) -> &Location {
        &self.location
    }

    fn exists(&self) -> bool {
        false
    }

    fn create(&mut self, resources: &LinuxResources) -> Result<()> {
        self.refuse(resources)
    }

    fn apply(&mut self, resources: &LinuxResources, _: Change) -> Result<()> {
        self.refuse(resources)
    }

    fn place(&self) -> Result<Placement> {
        Ok(Placement::Itself(Vec::new()))
    }

    fn add(&self, _: Pid) -> Result<()> {
        Ok(())
    }

    fn pids(&self) -> Result<Vec<Pid>> {
        Err(self.nothing("list"))
    }

    fn freeze(&self, _: Duration) -> Result<()> {
        Err(self.nothing("freeze"))
    }

    fn thaw(&self, _: Duration) -> Result<()> {
        Err(self.nothing("thaw"))
    }

    fn frozen(&self) -> Result<bool> {
        Ok(false)
    }

    fn kill(&self, _: Duration) -> Result<()> {
        // Nothing is in it: the caller kills what it knows by other means.
        Ok(())
    }

    fn wait_empty(&self, _: Duration) -> Result<bool> {
        Ok(true)
    }

    fn stats(&mut self) -> Result<Stats> {
        Ok(Stats::default())
    }

    fn watch_oom(&self) -> Result<Option<OomWatch>> {
        Ok(None)
    }

    fn sub_group(&self, name: &str) -> Result<Box<dyn Manager>> {
        Ok(Box::new(NoGroup::new(
            self.location.child(name)?,
            self.options,
            self.why.clone(),
        )))
    }

    fn remove(&mut self, _: Duration) -> Result<()> {
        Ok(())
    }
}

impl NoGroup {
    fn nothing(&self, wanted: &'static str) -> Error {
        Error::NoCgroup {
            wanted,
            why: self.why.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Host;
    use crate::testing::{Cleanup, place};

    const PATIENCE: Duration = Duration::from_secs(5);

    fn limits(json: &str) -> LinuxResources {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn nothing_asked_is_nothing_missed() {
        let location = Location::absolute("/x").unwrap();
        let mut group = NoGroup::new(location, Options::default(), "nothing is mounted");
        for json in [
            "{}",
            r#"{"memory": {"limit": -1}, "pids": {"limit": -1}, "cpu": {"quota": -1, "shares": 0}}"#,
        ] {
            group.create(&limits(json)).unwrap();
            group.apply(&limits(json), Change::First).unwrap();
        }
        assert!(matches!(group.place().unwrap(), Placement::Itself(tasks) if tasks.is_empty()));
        group.add(1).unwrap();
        group.kill(PATIENCE).unwrap();
        group.remove(PATIENCE).unwrap();
        for (json, name) in [
            (r#"{"memory": {"limit": 1}}"#, "memory.limit"),
            (r#"{"pids": {"limit": 0}}"#, "pids.limit"),
            (r#"{"devices": [{"allow": false, "access": "rwm"}]}"#, "devices"),
            (r#"{"unified": {"memory.high": "1"}}"#, "unified"),
        ] {
            let text = group.create(&limits(json)).unwrap_err().to_string();
            assert!(
                text.contains(name) && text.contains("nothing is mounted"),
                "{text}"
            );
        }
    }

    #[test]
    fn without_the_right_to_make_a_group_only_limits_are_an_error() {
        let host = Host::detect().unwrap();
        let location = place();
        let options = Options {
            devices: DevicePolicy::BestEffort,
            accounting: true,
        };
        let mut group = host.manager(&location, options).unwrap();
        match group.create(&limits(r#"{"memory": {"limit": 1000000}}"#)) {
            Ok(()) => {
                eprintln!("SKIPPED: this user may make groups");
                drop(Cleanup(&host, location));
            }
            Err(error) => {
                assert!(
                    matches!(
                        error,
                        Error::NoCgroup {
                            wanted: "memory.limit",
                            ..
                        }
                    ),
                    "{error}"
                );
                let none = limits(r#"{"devices": [{"allow": false, "access": "rwm"}]}"#);
                group.create(&none).unwrap();
                group.apply(&none, Change::First).unwrap();
                assert!(!group.exists());
                assert!(matches!(group.place().unwrap(), Placement::Itself(tasks) if tasks.is_empty()));
                group.add(1).unwrap();
                group.remove(PATIENCE).unwrap();
            }
        }
    }
}
