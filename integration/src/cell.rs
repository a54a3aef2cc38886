//! A cell: mount and network namespaces of one test, with a scratch directory, held by one idle process.
//!
//! Inside, `/run` and `/var/log` are tmpfs, the six `/proc/sys` files that a kubelet writes are covered by copies,
//! and the scratch directory is a shared mount (volumes with HostToContainer propagation need one).

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// The files below `/proc/sys` that a kubelet writes at start.
pub const KUBELET_SYSCTLS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// The cell's own address, on a link that leads nowhere: a kubelet refuses loopback as node address.
pub const NODE_ADDRESS: &str = "192.0.2.10";

/// Namespaces and scratch directory of one test; everything started in it ends with it.
pub struct Cell {
    holder: Child,
    scratch: tempfile::TempDir,
    sysctls_before: Vec<String>,
    name: String,
}

/// A process that runs in a cell; killed when dropped.
pub struct Process {
    child: Child,
    name: String,
}

impl Cell {
    /// Makes the namespaces; `name` becomes part of the scratch directory's and the cgroups' names.
    pub fn new(name: &str) -> Result<Self> {
        let scratch = tempfile::Builder::new()
            .prefix(&format!("coracle-{name}-"))
            .tempdir_in("/var/tmp")
            .context("make the scratch directory")?;
        let sysctls_before = read_sysctls()?;
        let mut holder = Command::new("unshare")
            .args([
                "--mount",
                "--net",
                "--propagation",
                "private",
                "--",
                "sh",
                "-euc",
                SETUP,
                "cell",
            ])
            .arg(scratch.path())
            .args(KUBELET_SYSCTLS)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("run unshare (util-linux)")?;
        let mut line = String::new();
        let stdout = holder.stdout.take().context("the holder has a stdout")?;
        BufReader::new(stdout)
            .read_line(&mut line)
            .context("read from the cell's holder")?;
        ensure!(
            line == "ready\n",
            "the cell could not be set up: {:?}",
            holder.wait()
        );
        Ok(Self {
            holder,
            scratch,
            sysctls_before,
            name: name.to_owned(),
        })
    }

    /// The scratch directory: the same path inside and outside.
    pub fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// A directory below the scratch directory, made when absent.
    pub fn subdir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir().join(name);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(dir)
    }

    /// A cgroup path that no other test uses, `/coracle-test-<name>-<pid>`.
    pub fn cgroup(&self) -> String {
        format!("/coracle-test-{}-{}", self.name, std::process::id())
    }

    /// A command that will run inside the cell, with an empty environment but for `PATH` and `HOME`.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args([
                "--mount",
                "--net",
                "--target",
                &self.holder.id().to_string(),
                "--wd=/",
                "--",
            ])
            .arg(program.as_ref())
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", self.dir())
            .stdin(Stdio::null());
        command
    }

    /// Runs a shell script inside the cell and gives its standard output; a failure is an error with both streams.
    pub fn sh(&self, script: &str) -> Result<String> {
        let mut command = self.command("sh");
        command.args(["-euc", script]);
        run(&mut command).with_context(|| format!("in the cell: {script}"))
    }

    /// Starts a long-running program; its output goes to `<scratch>/<name>.log`, appended.
    pub fn spawn(&self, name: &str, command: &mut Command) -> Result<Process> {
        let path = self.log_path(name);
        let log = fs::OpenOptions::new().create(true).append(true).open(&path)?;
        let child = command
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {name}: {command:?}"))?;
        Ok(Process {
            child,
            name: name.to_owned(),
        })
    }

    /// Where [`Cell::spawn`] writes the output of `name`.
    pub fn log_path(&self, name: &str) -> PathBuf {
        self.dir().join(format!("{name}.log"))
    }

    /// A process in the cell's namespaces.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// Fails when a covered sysctl of the host has changed since the cell was made.
    pub fn check_host_sysctls(&self) -> Result<()> {
        let now = read_sysctls()?;
        ensure!(
            now == self.sysctls_before,
            "host sysctls changed: {:?} -> {now:?}",
            self.sysctls_before
        );
        Ok(())
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        if std::thread::panicking() {
            eprintln!("kept for inspection: {}", self.dir().display());
            self.scratch.disable_cleanup(true);
        }
    }
}

impl Process {
    /// The process id (nsenter replaces itself by the program).
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("kill {}", self.name))?;
        self.child
            .wait()
            .with_context(|| format!("wait for {}", self.name))?;
        Ok(())
    }

    /// SIGTERM, and waits for the end, for at most 20 s.
    pub fn terminate(mut self) -> Result<()> {
        run(Command::new("kill").arg(self.pid().to_string()))?;
        wait_for(&format!("{} to end", self.name), Duration::from_secs(20), || {
            Ok(self.child.try_wait()?.is_some().then_some(()))
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end; gives standard output, or an error that carries both streams.
pub fn run(command: &mut Command) -> Result<String> {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().with_context(|| format!("run {command:?}"))?;
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    ensure!(
        status.success(),
        "{command:?}: {status}\n{stdout}{}",
        String::from_utf8_lossy(&stderr)
    );
    Ok(stdout)
}

/// Asks `probe` until it gives a value or `limit` has passed; the last error is part of the message.
#[allow(
    clippy::disallowed_methods,
    reason = "what is waited for has no event that reaches the test"
)]
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let limit = crate::stretched(limit);
    let start = Instant::now();
    let mut last = String::from("not yet");
    let mut pause = Duration::from_millis(5);
    while start.elapsed() < limit {
        match probe() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(error) => last = format!("{error:#}"),
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
    bail!("waited {limit:?} for {what}: {last}")
}

fn read_sysctls() -> Result<Vec<String>> {
    KUBELET_SYSCTLS
        .iter()
        .map(|name| fs::read_to_string(format!("/proc/sys/{name}")).with_context(|| format!("read {name}")))
        .collect()
}

/// `$1` is the scratch directory, the rest are names below /proc/sys.
const SETUP: &str = r#"
scratch=$1; shift
mount --bind "$scratch" "$scratch"; mount --make-rshared "$scratch"
mount -t tmpfs -o mode=755 tmpfs /run; mount --make-rshared /run; mkdir -p /run/netns
mount -t tmpfs -o mode=755 tmpfs /var/log
mkdir -p "$scratch/sysctl"
for name in "$@"; do
    copy=$scratch/sysctl/$(echo "$name" | tr / .)
    cat "/proc/sys/$name" >"$copy"
    mount --bind "$copy" "/proc/sys/$name"
done
ip link set lo up
ip link add node0 type veth peer name node0p
ip addr add 192.0.2.10/24 dev node0
ip link set node0 up; ip link set node0p up
ip route add default via 192.0.2.1
echo ready
exec sleep infinity
"#;
