//! A pod, from nothing to nothing: what `cargo xtask demo` shows.
//!
//! Starts a coracled of its own in a scratch directory with the built-in bridge, brings an image in, runs a pod of two
//! containers, prints their log, an exec's answer and an answer over the network, with the time of each call, and shows
//! at the end that nothing is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coracle_integration::cell::{run, wait_for};
use coracle_integration::client::{Client, container_config, pod_config};
use coracle_integration::image::{busybox_layout, pack};
use coracle_proto::cri::Mount;

/// Not a range that a node is likely to use, so that the demonstration gets in nobody's way.
const SUBNET: &str = "10.213.0.0/24";

const IMAGE: &str = "demo.example/busybox:1";

#[allow(clippy::print_stdout, reason = "this is what the program is for")]
fn main() -> Result<()> {
    let reference = std::env::args().nth(1);
    let coracled = std::env::var_os("CORACLED")
        .map(PathBuf::from)
        .context("CORACLED names the daemon")?;
    let scratch = tempfile::Builder::new()
        .prefix("coracle-demo-")
        .tempdir_in("/var/tmp")?;
    let instance = instance_of(&scratch.path().join("data"));
    let before = Host::look(scratch.path(), &instance)?;

    let mut daemon = Daemon::start(&coracled, scratch.path())?;
    let client = daemon.connect()?;
    let image = match reference {
        Some(reference) => {
            timed("pull the image", || Ok(client.pull(&reference)?))?;
            reference
        }
        None => {
            let layout = busybox_layout(scratch.path(), "busybox", IMAGE)?;
            let tar = scratch.path().join("busybox.tar");
            pack(&layout, &tar)?;
            let import = || {
                let mut command = Command::new(&coracled);
                command
                    .args(["image", "import", "--name", IMAGE, "--socket"])
                    .arg(daemon.socket())
                    .arg(&tar);
                run(&mut command)
            };
            timed("import the image", import)?;
            IMAGE.to_owned()
        }
    };
    pod(&client, scratch.path(), &image)?;
    drop(client);
    daemon.stop()?;
    let path = scratch.path().to_owned();
    drop(scratch);

    let left = Host::look(&path, &instance)?.minus(&before);
    ensure!(left.is_empty(), "left behind: {left:#?}");
    println!("\nNothing is left: no process, no mount, no network namespace, no link, no cgroup, no file.");
    Ok(())
}

/// Runs the pod and takes it away again.
#[allow(clippy::print_stdout, reason = "this is what the program is for")]
fn pod(client: &Client, scratch: &Path, image: &str) -> Result<()> {
    let logs = scratch.join("logs");
    let shared = scratch.join("shared");
    fs::create_dir_all(&logs)?;
    fs::create_dir_all(&shared)?;
    let pod = pod_config("demo", &logs);
    let sandbox = timed("RunPodSandbox", || Ok(client.run_pod(&pod)?))?;
    let address = client.pod_status(&sandbox)?.network.unwrap_or_default().ip;

    let serve = "echo 'hello from a pod' >/www/index.html; echo serving; exec httpd -f -p 8080 -h /www";
    let mut web = container_config("web", image, &["sh", "-c", serve]);
    web.mounts.push(Mount {
        container_path: "/www".into(),
        host_path: shared.display().to_string(),
        ..Default::default()
    });
    let web = timed("CreateContainer web", || Ok(client.create(&sandbox, &web, &pod)?))?;
    timed("StartContainer web", || Ok(client.start(&web)?))?;
    let ask = "until wget -q -O - http://127.0.0.1:8080/; do sleep 0.1; done; echo 'the neighbour answered'; exec sleep 3600";
    let neighbour = container_config("neighbour", image, &["sh", "-c", ask]);
    let neighbour = timed("CreateContainer neighbour", || {
        Ok(client.create(&sandbox, &neighbour, &pod)?)
    })?;
    timed("StartContainer neighbour", || Ok(client.start(&neighbour)?))?;

    let answer = wait_for("an answer over the network", Duration::from_secs(10), || {
        ask_web(&address).map(Some)
    })?;
    println!("\nhttp://{address}:8080/ says: {}", answer.trim());
    let exec = timed("ExecSync", || {
        Ok(client.exec(&web, &["sh", "-c", "id; hostname"], Duration::from_secs(10))?)
    })?;
    println!(
        "exec says: {}",
        String::from_utf8_lossy(&exec.stdout).trim().replace('\n', " ")
    );
    let log = wait_for("the neighbour's log", Duration::from_secs(10), || {
        let text = fs::read_to_string(logs.join("neighbour.log"))?;
        Ok(text.contains("answered").then_some(text))
    })?;
    print!(
        "log of web:\n{}log of neighbour:\n{log}\n",
        fs::read_to_string(logs.join("web.log"))?
    );

    timed("StopContainer web", || {
        Ok(client.stop(&web, Duration::from_secs(1))?)
    })?;
    timed("StopPodSandbox + RemovePodSandbox", || {
        Ok(client.discard_pod(&sandbox)?)
    })?;
    Ok(())
}

fn ask_web(address: &str) -> Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect((address, 8080))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    body.filter(|body| !body.is_empty())
        .context("no body in the answer")
}

#[allow(clippy::print_stdout, reason = "this is what the program is for")]
fn timed<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let value = work().with_context(|| what.to_owned())?;
    println!("{what:<36} {:>9.2} ms", start.elapsed().as_secs_f64() * 1e3);
    Ok(value)
}

/// A daemon of the demonstration's own.
struct Daemon {
    child: Child,
    scratch: PathBuf,
}

impl Daemon {
    fn start(program: &Path, scratch: &Path) -> Result<Self> {
        let config = scratch.join("config.toml");
        fs::write(&config, format!("[network]\nsubnet = {SUBNET:?}\n"))?;
        let log = fs::File::create(scratch.join("coracled.log"))?;
        let child = Command::new(program)
            .args(["serve", "--network", "bridge", "--config"])
            .arg(&config)
            .arg("--root")
            .arg(scratch.join("data"))
            .arg("--state")
            .arg(scratch.join("state"))
            .arg("--socket")
            .arg(scratch.join("coracle.sock"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Self {
            child,
            scratch: scratch.to_owned(),
        })
    }

    fn socket(&self) -> PathBuf {
        self.scratch.join("coracle.sock")
    }

    fn connect(&mut self) -> Result<Client> {
        let log = self.scratch.join("coracled.log");
        timed("start coracled", || {
            wait_for("coracled", Duration::from_secs(20), || {
                ensure!(
                    self.child.try_wait()?.is_none(),
                    "it ended: {}",
                    fs::read_to_string(&log)?
                );
                Client::connect(&self.scratch.join("coracle.sock")).map(Some)
            })
        })
    }

    fn stop(&mut self) -> Result<()> {
        run(Command::new("kill").arg(self.child.id().to_string()))?;
        let status = self.child.wait()?;
        ensure!(status.success(), "coracled ended with {status}");
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What pods may leave on a host.
struct Host(Vec<String>);

impl Host {
    /// Everything that carries the mark of this demonstration, its directory or its instance; and every mount and link.
    fn look(scratch: &Path, instance: &str) -> Result<Self> {
        let scratch = scratch.display().to_string();
        let mut seen = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            if pid.bytes().all(|b| b.is_ascii_digit()) && pid != std::process::id().to_string() {
                let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                let command = String::from_utf8_lossy(&command).replace('\0', " ");
                let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
                if command.contains(&scratch) || groups.contains(instance) {
                    seen.push(format!("process {pid} {command}"));
                }
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        seen.extend(
            points
                .filter(|p| p.contains(instance) || p.contains(&scratch))
                .map(|point| format!("mount {point}")),
        );
        for (kind, dir) in [
            ("network namespace", "/run/netns"),
            ("link", "/sys/class/net"),
            ("file", "/var/tmp"),
        ] {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            seen.extend(
                names
                    .filter(|n| n.contains(instance) || scratch.ends_with(n.as_str()))
                    .map(|name| format!("{kind} {name}")),
            );
        }
        let pattern = format!("*coracle/{instance}*");
        let groups = run(Command::new("find").args(["/sys/fs/cgroup", "-type", "d", "-path", &pattern]))
            .unwrap_or_default();
        seen.extend(groups.lines().map(|path| format!("cgroup {path}")));
        Ok(Self(seen))
    }

    fn minus(&self, before: &Self) -> Vec<String> {
        self.0
            .iter()
            .filter(|item| !before.0.contains(item))
            .cloned()
            .collect()
    }
}

/// How the daemon marks what is its own: by its data root.
fn instance_of(root: &Path) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(root.as_os_str().as_encoded_bytes())
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
