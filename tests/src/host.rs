//! What the suite knows of the machine it runs on: settings, deadlines, helper programs, cgroups, skipped tests.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The programs that every root filesystem gets as links to busybox.
pub const APPLETS: &[&str] = &[
    "awk",
    "cat",
    "chmod",
    "chown",
    "cut",
    "dd",
    "df",
    "echo",
    "env",
    "false",
    "grep",
    "head",
    "hostname",
    "id",
    "ionice",
    "ip",
    "kill",
    "ln",
    "ls",
    "mkdir",
    "mkfifo",
    "mknod",
    "mount",
    "mountpoint",
    "mv",
    "nproc",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "rm",
    "sed",
    "seq",
    "setsid",
    "sh",
    "sleep",
    "sort",
    "stat",
    "stty",
    "sync",
    "tail",
    "tee",
    "test",
    "touch",
    "tr",
    "true",
    "truncate",
    "tty",
    "umount",
    "uname",
    "unshare",
    "wc",
    "yes",
];

/// `RUNTIME`, as an absolute path.
///
/// # Panics
/// When it is not set or names nothing: nothing can be tested then.
#[must_use]
pub fn runtime_path() -> PathBuf {
    let path = std::env::var_os("RUNTIME").expect("set RUNTIME to the path of the runtime to test");
    fs::canonicalize(&path).unwrap_or_else(|e| panic!("RUNTIME={}: {e}", Path::new(&path).display()))
}

/// `runc`, `crun`, `coracle`: the file name of [`runtime_path`].
#[must_use]
pub fn runtime_name() -> String {
    runtime_path()
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// A time limit for something that should take no time, stretched on slow machines.
#[must_use]
pub fn deadline(seconds: u64) -> Duration {
    static SLOW: OnceLock<u64> = OnceLock::new();
    let slow = SLOW.get_or_init(|| {
        std::env::var("CORACLE_TEST_SLOW")
            .ok()
            .and_then(|v| v.parse().ok())
            .filter(|n| *n > 0)
            .unwrap_or(1)
    });
    Duration::from_secs(seconds * slow)
}

/// How often a searching test tries: the given number, fewer on a slow machine, ten times as many in a long run.
#[must_use]
pub fn rounds(usual: u32) -> u32 {
    if std::env::var_os("CORACLE_TEST_LONG").is_some() {
        usual * 10
    } else if deadline(1).as_secs() > 1 {
        usual.div_ceil(5)
    } else {
        usual
    }
}

/// Ask again until there is an answer.
///
/// # Panics
/// When there is none within twenty (stretched) seconds.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + deadline(20);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        #[allow(
            clippy::disallowed_methods,
            reason = "the runtime is a black box: nothing tells when to ask again"
        )]
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// True, after a loud line, when the runtime under test is `name`: the test does not apply to it, and says why.
#[must_use]
pub fn skip_on(name: &str, reason: &str) -> bool {
    let here = runtime_name();
    here == name && skip(&format!("on {name}: {reason}"))
}

/// True, after a loud line, when this machine lacks what the test needs.
#[must_use]
pub fn skip_unless(have: bool, reason: &str) -> bool {
    !have && skip(&format!("here: {reason}"))
}

fn skip(why: &str) -> bool {
    let thread = std::thread::current();
    let line = format!("SKIPPED {} {why}\n", thread.name().unwrap_or("?"));
    // straight to the descriptor: the test harness swallows what the print macros write
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("CORACLE_TEST_SKIPS") {
        let file = fs::OpenOptions::new().append(true).create(true).open(path);
        let _ = file.and_then(|mut f| f.write_all(line.as_bytes()));
    }
    true
}

/// The directory below which bundles are made.
#[must_use]
pub fn scratch() -> PathBuf {
    std::env::var_os("CORACLE_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from)
}

/// A copy of Debian's static busybox that bundles may link to.
#[must_use]
pub fn busybox() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let from = ["/bin/busybox", "/usr/bin/busybox"]
            .iter()
            .map(Path::new)
            .find(|p| p.exists());
        let from = from.expect("the package busybox-static is needed");
        tool(
            "busybox",
            &fs::metadata(from).map(|m| m.len()).unwrap_or(0).to_string(),
            |to| fs::copy(from, to).map(drop).map_err(|e| e.to_string()),
        )
    })
}

/// The helper program `probe`, compiled from `programs/probe.c` unless `CORACLE_TEST_PROBE` names it.
#[must_use]
pub fn probe() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("CORACLE_TEST_PROBE") {
            return PathBuf::from(path);
        }
        let source = include_str!("../programs/probe.c");
        let hash = source.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        tool("probe", &format!("{hash:016x}"), |to| {
            let input = to.with_extension("c");
            fs::write(&input, source).map_err(|e| e.to_string())?;
            let mut why = String::new();
            for compiler in ["musl-gcc", "gcc", "cc"] {
                let run = Command::new(compiler)
                    .args(["-O1", "-static", "-o"])
                    .arg(to)
                    .arg(&input)
                    .output();
                match run {
                    Ok(out) if out.status.success() => {
                        let _ = fs::remove_file(&input);
                        return Ok(());
                    }
                    Ok(out) => why = format!("{why}{compiler}: {}\n", String::from_utf8_lossy(&out.stderr)),
                    Err(e) => why = format!("{why}{compiler}: {e}\n"),
                }
            }
            Err(why)
        })
    })
}

/// A file shared by all test programs, made once under another name and renamed into place.
fn tool(name: &str, version: &str, make: impl FnOnce(&Path) -> Result<(), String>) -> PathBuf {
    let dir = scratch().join("coracle-test-tools");
    let path = dir.join(format!("{name}-{version}"));
    if !path.exists() {
        fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let draft = dir.join(format!("{name}-{version}.{}", std::process::id()));
        make(&draft).unwrap_or_else(|e| panic!("making {}: {e}", path.display()));
        fs::rename(&draft, &path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
    path
}

/// Whether the whole machine is on cgroup v2.
#[must_use]
pub fn cgroup_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// Whether limits of this controller can be set here.
#[must_use]
pub fn has_controller(name: &str) -> bool {
    if cgroup_v2() {
        let all = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
        all.split_whitespace().any(|c| c == name)
    } else {
        Path::new("/sys/fs/cgroup").join(name).exists()
    }
}

/// The directory of a cgroup path in the hierarchy of this controller (on v2 there is one for all).
#[must_use]
pub fn cgroup_dir(controller: &str, path: &str) -> PathBuf {
    let top = Path::new("/sys/fs/cgroup");
    let top = if cgroup_v2() {
        top.to_path_buf()
    } else {
        top.join(controller)
    };
    top.join(path.trim_start_matches('/'))
}

/// Whether this process holds the capability with that number in its effective set.
#[must_use]
pub fn has_capability(number: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .unwrap_or("0");
    u64::from_str_radix(line.trim(), 16).is_ok_and(|set| set >> number & 1 == 1)
}

/// End a process by number, through the `kill` of busybox (the suite itself makes no system calls).
pub fn signal(pid: u32, name: &str) -> bool {
    let run = Command::new(busybox())
        .args(["kill", &format!("-{name}"), &pid.to_string()])
        .output();
    run.is_ok_and(|out| out.status.success())
}
