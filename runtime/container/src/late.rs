//! Hooks that run outside of any operation of ours: a pod's monitor runs them when it knows that their time has come.

use std::os::fd::AsFd as _;
use std::path::Path;

use coracle_kernel::path;
use coracle_spec::{HookState, Status};

use crate::create::load_config;
use crate::{Error, Result, hooks};

/// Which hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LateHooks {
    /// After the program has begun to run. The first that fails is an error, and the container is to be stopped.
    Poststart,
    /// After the init has ended. All run, whatever becomes of each.
    Poststop,
}

/// Runs the hooks of a bundle; what poststop hooks had to complain about. `pid` is the init's, 0 once it has ended.
pub fn run_late_hooks(which: LateHooks, id: &str, bundle: &Path, pid: i32) -> Result<Vec<String>> {
    let (config, _) = load_config(bundle)?;
    let cwd = path::open_dir(bundle).map_err(|source| Error::call("open the bundle", source))?;
    let place = |list| hooks::Place {
        list,
        cwd: cwd.as_fd(),
        default_env: &[],
    };
    let state = |status| HookState::new(id, status, pid, bundle, &config.annotations);
    match which {
        LateHooks::Poststart => {
            hooks::run(
                &config.hooks.poststart,
                place("poststart"),
                &state(Status::Running),
            )?;
            Ok(Vec::new())
        }
        LateHooks::Poststop => {
            let complaints =
                hooks::run_all(&config.hooks.poststop, place("poststop"), &state(Status::Stopped));
            Ok(complaints.iter().map(ToString::to_string).collect())
        }
    }
}
