//! One container's life through the command line, with a check at its end that nothing is left.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::host;
use crate::leaks;
use crate::runner::{Output, Running, Runtime};

/// A written bundle and the container that is, or may be, made of it.
///
/// Dropping it deletes the container and then fails the test if a process, mount, cgroup or file of it is left.
#[derive(Debug)]
pub struct Container {
    dir: Option<TempDir>,
    id: String,
    runtime: Runtime,
    /// The configuration that was written.
    pub config: Value,
}

impl Container {
    pub(crate) fn new(dir: TempDir, id: String, config: Value) -> Self {
        let runtime = Runtime::new(&dir.path().join("state"), &id);
        Self {
            dir: Some(dir),
            id,
            runtime,
            config,
        }
    }

    /// The container's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The runtime, with this container's own state directory.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// The bundle's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.as_ref().expect("taken in drop alone").path()
    }

    /// A file or directory inside the root filesystem, as the host sees it.
    #[must_use]
    pub fn inside(&self, path: &str) -> PathBuf {
        self.dir().join("rootfs").join(path.trim_start_matches('/'))
    }

    /// `RUNTIME --root R ARGS ID`.
    #[must_use]
    pub fn call(&self, args: &[&str]) -> Output {
        let mut all = args.to_vec();
        all.push(&self.id);
        self.runtime.call(&all)
    }

    /// `run`, to the end of the container.
    #[must_use]
    pub fn run(&self) -> Output {
        self.run_with(&[], None)
    }

    /// `run` with more flags and something on standard input.
    #[must_use]
    pub fn run_with(&self, flags: &[&str], stdin: Option<&str>) -> Output {
        let dir = self.dir().display().to_string();
        let args = [&["run", "--bundle", &dir], flags, &[&self.id]].concat();
        Running::start(self.runtime.command(&args), stdin).wait()
    }

    /// `run` in the background.
    #[must_use]
    pub fn run_in_background(&self) -> Running {
        let dir = self.dir().display().to_string();
        Running::start(self.runtime.command(&["run", "--bundle", &dir, &self.id]), None)
    }

    /// `create`; what the container writes later is found by [`Container::stdout`].
    #[must_use]
    pub fn create(&self) -> Output {
        self.create_with(&[])
    }

    /// `create` with more flags.
    ///
    /// # Panics
    /// When the output files cannot be made.
    #[must_use]
    pub fn create_with(&self, flags: &[&str]) -> Output {
        let dir = self.dir().display().to_string();
        let args = [&["create", "--bundle", &dir], flags, &[&self.id]].concat();
        let file = |name| {
            let path = self.dir().join(name);
            OpenOptions::new()
                .read(true)
                .append(true)
                .create(true)
                .open(path)
                .expect("output file")
        };
        Running::start_into(self.runtime.command(&args), None, file("stdout"), file("stderr")).wait()
    }

    /// `start`.
    #[must_use]
    pub fn start(&self) -> Output {
        self.call(&["start"])
    }

    /// `create` and `start`, which have to succeed.
    ///
    /// # Panics
    /// When they fail.
    #[track_caller]
    pub fn up(&self) -> &Self {
        self.create().ok();
        self.start().ok();
        self
    }

    /// `exec ID ARGS`.
    #[must_use]
    pub fn exec(&self, args: &[&str]) -> Output {
        self.exec_with(&[], args)
    }

    /// `exec FLAGS ID ARGS`.
    #[must_use]
    pub fn exec_with(&self, flags: &[&str], args: &[&str]) -> Output {
        self.runtime
            .call(&[&["exec"], flags, &[self.id.as_str()], args].concat())
    }

    /// `exec ID sh -c SCRIPT`.
    #[must_use]
    pub fn exec_sh(&self, script: &str) -> Output {
        self.exec(&["/bin/sh", "-c", script])
    }

    /// `kill ID SIGNAL`.
    #[must_use]
    pub fn kill(&self, signal: &str) -> Output {
        self.runtime.call(&["kill", &self.id, signal])
    }

    /// The state document.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    #[must_use]
    pub fn state(&self) -> Value {
        let out = self.call(&["state"]).ok();
        serde_json::from_str(&out.stdout).unwrap_or_else(|e| panic!("state is not JSON: {e}\n{out}"))
    }

    /// The init's process id, as the host sees it.
    ///
    /// # Panics
    /// When the state has none.
    #[must_use]
    pub fn pid(&self) -> u32 {
        let state = self.state();
        let pid = state["pid"].as_u64().and_then(|p| u32::try_from(p).ok());
        pid.unwrap_or_else(|| panic!("no pid in {state}"))
    }

    /// Wait until the state says this.
    pub fn wait_status(&self, status: &str) {
        host::wait_for(&format!("status {status} of {}", self.id), || {
            let out = self.call(&["state"]);
            let state: Option<Value> = serde_json::from_str(&out.stdout).ok();
            state.filter(|s| s["status"] == status)
        });
    }

    /// What the created container and the `create` call have written to standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        fs::read_to_string(self.dir().join("stdout")).unwrap_or_default()
    }

    /// The same for standard error.
    #[must_use]
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.dir().join("stderr")).unwrap_or_default()
    }

    /// Wait until the container has written this.
    pub fn wait_stdout(&self, text: &str) {
        host::wait_for(
            &format!("{text:?} in the output of {}: {:?}", self.id, self.stdout()),
            || self.stdout().contains(text).then_some(()),
        );
    }

    /// What the configuration says about the cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &str {
        self.config["linux"]["cgroupsPath"].as_str().unwrap_or_default()
    }

    /// A file of the container's cgroup, without the white space around it.
    ///
    /// # Panics
    /// When it cannot be read.
    #[track_caller]
    #[must_use]
    pub fn cgroup_file(&self, controller: &str, name: &str) -> String {
        let path = host::cgroup_dir(controller, self.cgroup()).join(name);
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.trim().to_owned()
    }

    /// Nothing of this container is there, without a `delete`.
    ///
    /// # Panics
    /// When something is.
    #[track_caller]
    pub fn assert_gone(&self) {
        let left = leaks::wait_gone(&self.id, self.runtime.root());
        assert!(left.is_empty(), "left behind: {left:#?}");
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let out = self.runtime.call(&["delete", "--force", &self.id]);
        let left = leaks::wait_gone(&self.id, self.runtime.root());
        if !left.is_empty() {
            leaks::sweep(&self.id);
        }
        if leaks::mounts(&self.id).is_empty() {
            drop(self.dir.take());
        } else if let Some(dir) = self.dir.take() {
            // removing a tree with a mount in it might remove what is mounted
            eprintln!("kept, something is mounted below: {}", dir.keep().display());
        }
        if !std::thread::panicking() {
            assert!(out.code == 0, "delete --force: {out}");
            assert!(left.is_empty(), "left behind after delete: {left:#?}");
        }
    }
}
