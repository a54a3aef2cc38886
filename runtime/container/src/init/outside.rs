//! What the parent does for the new process that this may not do itself: ids, cgroup, limits, oom score, hooks.

use std::os::fd::{AsFd, OwnedFd};

use coracle_cgroup::Manager;
use coracle_kernel::namespace::Kinds;
use coracle_kernel::procfs::Procfs;
use coracle_kernel::rlimit::{self, Resource};
use coracle_kernel::{Errno, idmap};
use coracle_spec::{Config, HookState, Process, Status};

use super::parent::{LaunchError, call};
use super::setup::{Init, Role, Setup};
use crate::hooks;

/// What is left with us of a setup that went into the child.
pub(super) struct Outside<'a> {
    process: &'a Process,
    rootless: bool,
    /// Of an init alone.
    pub(super) init: Option<Maps<'a>>,
}

/// The same of an init.
pub(super) struct Maps<'a> {
    id: &'a str,
    config: &'a Config,
    bundle: &'a std::path::Path,
    uids: Vec<idmap::Line>,
    gids: Vec<idmap::Line>,
}

impl<'a> Maps<'a> {
    fn of(init: &Init<'a>, setup: &Setup<'_>) -> Maps<'a> {
        let new = setup.namespaces.new.contains(Kinds::USER);
        let lines = |lines: &[idmap::Line]| if new { lines.to_vec() } else { Vec::new() };
        Maps {
            id: init.id,
            config: init.config,
            bundle: init.bundle,
            uids: lines(&init.uids),
            gids: lines(&init.gids),
        }
    }

    /// The hooks that run in our namespaces, with everything mounted in the container's.
    pub(super) fn run_hooks(&self, pid: i32, cwd: &OwnedFd) -> Result<(), hooks::Error> {
        let state = HookState::new(
            self.id,
            Status::Creating,
            pid,
            self.bundle,
            &self.config.annotations,
        );
        let place = |list| hooks::Place {
            list,
            cwd: cwd.as_fd(),
            default_env: &[],
        };
        hooks::run(&self.config.hooks.prestart, place("prestart"), &state)?;
        hooks::run(&self.config.hooks.create_runtime, place("createRuntime"), &state)
    }
}

impl<'a> Outside<'a> {
    /// To be called before the setup goes.
    pub(super) fn of(setup: &Setup<'a>, role: &Role<'a>) -> Outside<'a> {
        Outside {
            process: setup.process,
            rootless: setup.rootless,
            init: match role {
                Role::Init(init) => Some(Maps::of(init, setup)),
                Role::Exec => None,
            },
        }
    }

    /// Before its first step: ids, cgroup, limits, oom score.
    pub(super) fn prepare(
        &self,
        pid: i32,
        cgroup: Option<&dyn Manager>,
        warnings: &mut Vec<String>,
    ) -> Result<(), LaunchError> {
        if let Some(maps) = self.init.as_ref().filter(|maps| !maps.uids.is_empty()) {
            let map = || {
                let procfs = Procfs::visible()?;
                if self.rootless {
                    // Without privilege the kernel takes a gid map only from those who gave up setgroups.
                    idmap::deny_setgroups(&procfs, pid)?;
                }
                idmap::write_uid_map(&procfs, pid, &maps.uids)?;
                idmap::write_gid_map(&procfs, pid, &maps.gids)
            };
            map().map_err(|source| call("map the ids of the user namespace", source))?;
        }
        if let Some(cgroup) = cgroup {
            cgroup.add(pid)?;
        }
        self.raise_limits(pid)?;
        if let Some(score) = self.process.oom_score_adj {
            match set_oom_score_adj(pid, score) {
                Ok(()) => {}
                // A score below the present one is not ours to give: it stays where it is, the nearest there is.
                Err(error) if matches!(error.errno(), Errno::EACCES | Errno::EPERM) => {
                    warnings.push(format!(
                        "oom_score_adj {score} is not permitted here, it stays as it is"
                    ));
                }
                Err(source) => return Err(call("set oom_score_adj", source)),
            }
        }
        Ok(())
    }

    /// Raises the hard limits that the process may not raise itself. The limits as they are to be it takes on at the
    /// very end: a low one is meant for the program, not for what is done in its place.
    fn raise_limits(&self, pid: i32) -> Result<(), LaunchError> {
        let raise = || {
            for limit in &self.process.rlimits {
                let resource = Resource::from_number(limit.resource);
                let (soft, hard) = rlimit::get(0, resource)?;
                if limit.hard > hard {
                    rlimit::set(pid.unsigned_abs(), resource, soft, limit.hard)?;
                }
            }
            Ok(())
        };
        raise().map_err(|source| call("raise a resource limit", source))
    }
}

fn set_oom_score_adj(pid: i32, score: i32) -> coracle_kernel::Result<()> {
    let path = format!("/proc/{pid}/oom_score_adj");
    std::fs::write(&path, score.to_string())
        .map_err(|error| coracle_kernel::Error::from_io("write", path, &error))
}
