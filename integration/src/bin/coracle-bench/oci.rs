//! create + start + delete, run and exec of the OCI runtimes.
//!
//! All of them run in one mount namespace in which cgroup2 alone is at `/sys/fs/cgroup`: Debian's crun refuses
//! hybrid hosts, and so nobody has limits to write.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use coracle_integration::cell::run as run_command;
use coracle_integration::daemon::program;
use coracle_integration::image::busybox_root;
use coracle_kernel::caps::Capability;
use serde_json::{Value, json};

use crate::sample::{Row, Sample, print_rows};

/// The argument under which the bench starts itself in the namespace.
pub(crate) const INNER: &str = "oci-in-namespace";

const ROUNDS: usize = 60;

struct Runtime {
    name: &'static str,
    program: PathBuf,
    globals: Vec<String>,
    bundle: PathBuf,
}

/// Starts [`measure`] in a mount namespace of its own.
pub(crate) fn run() -> Result<()> {
    let scratch = tempfile::Builder::new()
        .prefix("coracle-bench-")
        .tempdir_in("/var/tmp")?;
    // The state of containers is in memory, as it is where they are used: below /run.
    let script = "mount -t cgroup2 cgroup2 /sys/fs/cgroup; mount -t tmpfs state /run; exec \"$@\"";
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-euc", script, "sh"])
        .arg(std::env::current_exe()?)
        .arg(INNER)
        .arg(scratch.path())
        .status()
        .context("run unshare")?;
    ensure!(status.success(), "the measurement failed: {status}");
    Ok(())
}

/// Takes the figures; the scratch directory is the caller's to remove.
pub(crate) fn measure(scratch: &Path) -> Result<()> {
    let runtimes = runtimes(scratch)?;
    let measured = take_turns(&runtimes);
    // Whatever has happened, the containers that stay would stay for good.
    for runtime in &runtimes {
        runtime.call(&["delete", "--force", &runtime.long()], &[])?;
    }
    print_rows(&measured?);
    Ok(())
}

fn take_turns(runtimes: &[Runtime]) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> = [
        ("create + start + delete", Some(0.5)),
        ("create", None),
        ("start", None),
        ("delete", None),
        ("run", Some(0.5)),
        ("exec", Some(0.5)),
    ]
    .map(|(operation, target)| Row {
        operation,
        samples: runtimes.iter().map(|r| (r.name, Sample::default())).collect(),
        target,
    })
    .into();
    for runtime in runtimes {
        runtime.call(&["run", "-d", &runtime.long()], &["--bundle", "long"])?;
    }
    for round in 0..=ROUNDS {
        for (n, runtime) in runtimes.iter().enumerate() {
            let id = format!("bench-{}-{round}", runtime.name);
            // The first round fills caches and is not counted.
            let mut warm_up: Vec<Sample> = vec![Sample::default(); rows.len()];
            let mut samples: Vec<&mut Sample> = if round == 0 {
                warm_up.iter_mut().collect()
            } else {
                rows.iter_mut().map(|row| &mut row.samples[n].1).collect()
            };
            let [lifecycle, create, start, delete, run, exec] = samples.as_mut_slice() else {
                continue;
            };
            lifecycle.time(|| {
                create.time(|| runtime.call(&["create", &id], &["--bundle", "short"]))?;
                start.time(|| runtime.call(&["start", &id], &[]))?;
                delete.time(|| runtime.call(&["delete", "--force", &id], &[]))
            })?;
            run.time(|| runtime.call(&["run", &id], &["--bundle", "short"]))?;
            exec.time(|| runtime.call(&["exec", &runtime.long(), "/bin/true"], &[]))?;
        }
    }
    Ok(rows)
}

fn runtimes(scratch: &Path) -> Result<Vec<Runtime>> {
    let root = scratch.join("rootfs");
    busybox_root(&root)?;
    let spec = default_spec()?;
    let profile = default_profile(&spec)?;
    let mut found = Vec::new();
    for (name, variable) in [("coracle", "CORACLE"), ("crun", "CRUN"), ("runc", "RUNC")] {
        let Some(program) = program(variable) else {
            continue;
        };
        let bundle = scratch.join(name);
        for (kind, args) in [
            ("short", json!(["/bin/true"])),
            ("long", json!(["/bin/sleep", "3600"])),
        ] {
            let dir = bundle.join(kind);
            fs::create_dir_all(&dir)?;
            let config = config(&spec, &profile, &root, &args, name == "crun")?;
            fs::write(dir.join("config.json"), config.to_string())?;
        }
        let mut globals = vec!["--root".to_owned(), format!("/run/bench/{name}")];
        if name == "crun" {
            globals.push("--cgroup-manager=disabled".into());
        }
        found.push(Runtime {
            name,
            program,
            globals,
            bundle,
        });
    }
    ensure!(
        found.first().is_some_and(|r| r.name == "coracle"),
        "CORACLE names our own program"
    );
    Ok(found)
}

/// What our `spec` writes. All three run the same: theirs differ from it in the host name, and ours has one mount more.
fn default_spec() -> Result<Value> {
    let program = program("CORACLE").context("CORACLE names our own program")?;
    let dir = tempfile::tempdir()?;
    run_command(Command::new(program).arg("spec").current_dir(dir.path()))?;
    Ok(serde_json::from_str(&fs::read_to_string(
        dir.path().join("config.json"),
    )?)?)
}

/// The profile that a pod of ours gets by default, for the capabilities of the configuration.
fn default_profile(spec: &Value) -> Result<Value> {
    let bounding = spec["process"]["capabilities"]["bounding"].as_array();
    let names = bounding.context("the configuration has capabilities")?.iter();
    let capabilities = names
        .filter_map(|name| Capability::from_name(name.as_str()?))
        .fold(0, |set, one| set | 1 << one.number());
    let profile = coracle_seccomp::default_profile(capabilities, coracle_seccomp::Abi::NATIVE);
    Ok(serde_json::to_value(profile)?)
}

/// The configuration with a command, the shared root and the seccomp profile.
fn config(spec: &Value, profile: &Value, root: &Path, args: &Value, old: bool) -> Result<Value> {
    let mut config = spec.clone();
    config["process"]["args"] = args.clone();
    config["process"]["terminal"] = json!(false);
    config["root"]["path"] = json!(root);
    config["linux"]["seccomp"] = profile.clone();
    // The bare cgroup2 mount has no controllers: nobody sets limits or a device filter here.
    config["linux"]
        .as_object_mut()
        .context("linux section")?
        .remove("resources");
    if old {
        config["ociVersion"] = json!("1.0.2");
    }
    Ok(config)
}

impl Runtime {
    /// The container that stays; its cgroup has its name, and no two runtimes take the same.
    fn long(&self) -> String {
        format!("bench-{}-long", self.name)
    }

    /// One command to its end; a failure carries what it printed.
    fn call(&self, arguments: &[&str], options: &[&str]) -> Result<()> {
        let log = self.bundle.join("log");
        let output = File::create(&log)?;
        let mut command = Command::new(&self.program);
        command.arg0(self.name).args(&self.globals).arg(arguments[0]);
        if let ["--bundle", kind] = options {
            command.arg("--bundle").arg(self.bundle.join(kind));
        }
        command
            .args(&arguments[1..])
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let status = command.status().with_context(|| format!("run {command:?}"))?;
        ensure!(
            status.success(),
            "{command:?}: {status}: {}",
            fs::read_to_string(&log).unwrap_or_default()
        );
        Ok(())
    }
}
