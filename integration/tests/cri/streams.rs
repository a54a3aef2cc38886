//! What the streaming tests share: a container, the driver of URLs, and a look at what sessions cost.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use coracle_integration::{Node, Options, daemon, request, stretched};
use coracle_kernel::namespace::{self, Kind};
use coracle_kernel::signal::{self, Signal};
use coracle_proto::cri::{AttachRequest, ContainerConfig, ExecRequest, PortForwardRequest};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tonic::Status;

use crate::support::monitor_of;

/// The transports of exec and attach; what a kubectl of today speaks is the second.
pub(crate) const TRANSPORTS: [&str; 2] = ["--transport=spdy", "--transport=websocket"];

/// How long one step of a session may take.
const STEP: Duration = Duration::from_secs(60);

/// A node with one container, and the driver.
pub(crate) struct Stage {
    pub(crate) node: Node,
    pub(crate) pod: String,
    pub(crate) id: String,
    driver: PathBuf,
}

/// Ports that the driver forwards, in one session.
pub(crate) struct Forward {
    pub(crate) child: Child,
    pub(crate) addresses: Vec<SocketAddr>,
    // Its end is the driver's.
    _input: ChildStdin,
    // The driver writes a line for each connection, and dies where nobody would read it.
    _lines: Lines<BufReader<ChildStdout>>,
}

/// What sessions may have left in the daemon and in the pod's monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cost {
    pub(crate) daemon_fds: usize,
    pub(crate) monitor_fds: usize,
    pub(crate) daemon_kib: u64,
    pub(crate) monitor_kib: u64,
}

impl Stage {
    /// A container that runs a script. Without a driver there is none, which is said loudly.
    pub(crate) async fn start(name: &str, script: &str) -> Result<Option<Stage>> {
        Stage::with(name, &request::container("main", script)).await
    }

    /// The same with a container of the test's own.
    pub(crate) async fn with(name: &str, container: &ContainerConfig) -> Result<Option<Stage>> {
        Stage::on(name, container, Options::default()).await
    }

    /// The same on a node of the test's own.
    pub(crate) async fn on(
        name: &str,
        container: &ContainerConfig,
        options: Options,
    ) -> Result<Option<Stage>> {
        let Some(driver) = daemon::program("STREAMER") else {
            return Ok(None);
        };
        let node = Node::with_busybox(options).await?;
        let config = request::pod(name, &node.logs);
        let pod = node.run_pod(&config).await?;
        let id = node.run_container(&pod, container, &config).await?;
        Ok(Some(Stage {
            node,
            pod,
            id,
            driver,
        }))
    }

    /// The driver on a new URL for a command. Its flags decide what the request asks for.
    pub(crate) async fn exec(&self, flags: &[&str], command: &[&str]) -> Result<Command> {
        let tty = flags.contains(&"--tty");
        let url = exec_url(&self.node, &self.id, command, tty, flags.contains(&"--stdin")).await?;
        Ok(self.driver("exec", flags, &url))
    }

    /// The driver on a new URL for the container's own streams.
    pub(crate) async fn attach(&self, flags: &[&str]) -> Result<Command> {
        let tty = flags.contains(&"--tty");
        let request = AttachRequest {
            container_id: self.id.clone(),
            stdin: flags.contains(&"--stdin"),
            tty,
            stdout: true,
            stderr: !tty,
        };
        let url = self.node.runtime().attach(request).await?.into_inner().url;
        Ok(self.driver("attach", flags, &url))
    }

    /// The driver that attaches and runs on; its output is there to be read.
    pub(crate) async fn attached(&self, flags: &[&str]) -> Result<(Child, Lines<BufReader<ChildStdout>>)> {
        let mut child = self.attach(flags).await?.stdin(Stdio::piped()).spawn()?;
        let lines = lines_of(child.stdout.take())?;
        Ok((child, lines))
    }

    /// Forwards ports of the pod, in one session, from free ones of the host.
    pub(crate) async fn forward(&self, transport: &str, ports: &[u16]) -> Result<Forward> {
        let url = forward_url(&self.node, &self.pod, &[]).await?;
        self.forward_to(&url, &[transport], ports).await
    }

    /// The same on a URL that there is.
    pub(crate) async fn forward_to(&self, url: &str, flags: &[&str], ports: &[u16]) -> Result<Forward> {
        let mut command = self.driver("portforward", flags, url);
        command.args(ports.iter().map(|port| format!(":{port}")));
        let mut child = command.stdin(Stdio::piped()).spawn()?;
        let mut lines = lines_of(child.stdout.take())?;
        let mut addresses = Vec::new();
        for _ in ports {
            let line = line_with(&mut lines, "Forwarding from ").await?;
            let address = line.split(' ').nth(2).context("no address")?;
            addresses.push(address.parse()?);
        }
        Ok(Forward {
            _input: child.stdin.take().context("no input")?,
            child,
            addresses,
            _lines: lines,
        })
    }

    fn driver(&self, word: &str, flags: &[&str], url: &str) -> Command {
        let mut command = Command::new(&self.driver);
        command.arg(word).args(flags).arg(url).kill_on_drop(true);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// What the daemon and the monitor hold now.
    pub(crate) async fn cost(&self) -> Result<Cost> {
        let daemon = i32::try_from(self.node.pid().context("no daemon")?)?;
        let monitor = monitor_of(&self.node, &self.pod).await?;
        Ok(Cost {
            daemon_fds: descriptors(daemon)?,
            monitor_fds: descriptors(monitor)?,
            daemon_kib: anonymous_kib(daemon)?,
            monitor_kib: anonymous_kib(monitor)?,
        })
    }

    /// Waits until there are no more descriptors than before.
    pub(crate) async fn settled(&self, before: Cost) -> Result<()> {
        crate::support::eventually(async || {
            let now = self.cost().await?;
            if now.daemon_fds > before.daemon_fds || now.monitor_fds > before.monitor_fds {
                let monitor = monitor_of(&self.node, &self.pod).await?;
                bail!(
                    "before {before:?}, now {now:?}; the monitor: {:?}",
                    open_in(monitor)?
                );
            }
            Ok(())
        })
        .await
    }

    /// The same, and memory is what it was, but for what an allocator keeps.
    pub(crate) async fn unchanged(&self, before: Cost) -> Result<()> {
        self.settled(before).await?;
        let now = self.cost().await?;
        ensure!(
            now.daemon_kib < before.daemon_kib + (2 << 10) && now.monitor_kib <= before.monitor_kib + 16,
            "before {before:?}, now {now:?}"
        );
        Ok(())
    }

    /// What a command in the container writes, without a streaming session.
    pub(crate) async fn ask(&self, script: &str) -> Result<String> {
        let answer = self.node.exec(&self.id, &["sh", "-c", script], 20).await?;
        Ok(String::from_utf8(answer.stdout)?)
    }

    /// Waits until a command in the container writes this.
    pub(crate) async fn says(&self, script: &str, wanted: &str) -> Result<()> {
        crate::support::eventually(async || {
            let said = self.ask(script).await?;
            ensure!(said.trim() == wanted, "{script}: {said:?}, not {wanted:?}");
            Ok(())
        })
        .await
    }
}

/// The URL for a command.
pub(crate) async fn exec_url(
    node: &Node,
    id: &str,
    command: &[&str],
    tty: bool,
    stdin: bool,
) -> Result<String, Status> {
    let request = ExecRequest {
        container_id: id.to_owned(),
        cmd: command.iter().map(|&word| word.to_owned()).collect(),
        tty,
        stdin,
        stdout: true,
        stderr: !tty,
    };
    Ok(node.runtime().exec(request).await?.into_inner().url)
}

/// The URL for ports of a pod.
pub(crate) async fn forward_url(node: &Node, pod: &str, ports: &[i32]) -> Result<String, Status> {
    let request = PortForwardRequest {
        pod_sandbox_id: pod.to_owned(),
        port: ports.to_vec(),
    };
    Ok(node.runtime().port_forward(request).await?.into_inner().url)
}

/// Runs the driver to its end with this input.
pub(crate) async fn run(command: &mut Command, input: &[u8]) -> Result<Output> {
    let mut child = command.stdin(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("no input")?;
    let feed = async move {
        // One that ended before it took all is no failure of its own.
        let _ = stdin.write_all(input).await;
    };
    let both = async { tokio::join!(feed, child.wait_with_output()).1 };
    let output = tokio::time::timeout(stretched(STEP), both).await;
    Ok(output.with_context(|| format!("{command:?} did not end"))??)
}

/// Checks what the driver wrote and how it ended.
pub(crate) fn expect(output: &Output, stdout: &str, stderr: &str, code: i32) -> Result<()> {
    let as_wanted = output.stdout == stdout.as_bytes()
        && output.stderr == stderr.as_bytes()
        && output.status.code() == Some(code);
    let beginning = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(400)]).into_owned();
    ensure!(
        as_wanted,
        "{}, {} bytes {:?}, {} bytes of errors {:?}",
        output.status,
        output.stdout.len(),
        beginning(&output.stdout),
        output.stderr.len(),
        beginning(&output.stderr)
    );
    Ok(())
}

/// What a driver writes, by lines.
pub(crate) fn lines_of<R: AsyncRead>(output: Option<R>) -> Result<Lines<BufReader<R>>> {
    Ok(BufReader::new(output.context("no such output")?).lines())
}

/// The next line with this text.
pub(crate) async fn line_with<R: AsyncRead + Unpin>(
    lines: &mut Lines<BufReader<R>>,
    text: &str,
) -> Result<String> {
    let search = async {
        while let Some(line) = lines.next_line().await? {
            if line.contains(text) {
                return Ok(line);
            }
        }
        bail!("the output ended before {text:?}")
    };
    let found = tokio::time::timeout(stretched(Duration::from_secs(20)), search).await;
    found.with_context(|| format!("{text:?} did not come"))?
}

/// Waits for the end of a driver.
pub(crate) async fn ended(child: &mut Child) -> Result<std::process::ExitStatus> {
    let status = tokio::time::timeout(stretched(Duration::from_secs(20)), child.wait()).await;
    Ok(status.context("the driver did not end")??)
}

/// Sends a driver a signal.
pub(crate) fn signal(child: &Child, signal: Signal) -> Result<()> {
    let pid = i32::try_from(child.id().context("it ended already")?)?;
    Ok(signal::kill(pid, signal)?)
}

/// A process with exactly these arguments, as the host sees it.
pub(crate) fn process(arguments: &[&str]) -> Result<Option<i32>> {
    let wanted: String = arguments.iter().map(|argument| format!("{argument}\0")).collect();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        if fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == wanted.as_bytes()) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// Bytes that a process has written so far.
pub(crate) fn written(pid: i32) -> Result<u64> {
    field(&format!("/proc/{pid}/io"), "wchar:")
}

/// Bytes that a process has read so far.
pub(crate) fn taken(pid: i32) -> Result<u64> {
    field(&format!("/proc/{pid}/io"), "rchar:")
}

/// A server on a free port of the loopback interface of another network namespace.
pub(crate) fn listen_in(netns: &Path) -> Result<TcpListener> {
    let netns = netns.to_owned();
    // A thread of its own: the test stays where it is.
    let thread = std::thread::spawn(move || -> Result<std::net::TcpListener> {
        namespace::enter(namespace::open(netns, Kind::Network)?, Kind::Network)?;
        Ok(std::net::TcpListener::bind("127.0.0.1:0")?)
    });
    let listener = thread.join().map_err(|_| anyhow::anyhow!("the thread died"))??;
    listener.set_nonblocking(true)?;
    Ok(TcpListener::from_std(listener)?)
}

/// The network namespace of a pod.
pub(crate) fn netns(pod: &str) -> Result<PathBuf> {
    for entry in fs::read_dir("/run/netns")? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().ends_with(pod) {
            return Ok(entry.path());
        }
    }
    bail!("pod {pod} has no network namespace")
}

/// Gives back what comes on each connection, and says that there is no more when the other side has.
pub(crate) async fn echo(listener: TcpListener) {
    while let Ok((mut socket, _)) = listener.accept().await {
        tokio::spawn(async move {
            let (mut read, mut write) = socket.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        });
    }
}

/// Sends bytes and the end of them; what comes back until its end.
pub(crate) async fn converse(address: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut socket = TcpStream::connect(address).await?;
    let (mut read, mut write) = socket.split();
    let mut answer = Vec::with_capacity(bytes.len());
    let send = async {
        write.write_all(bytes).await?;
        write.shutdown().await
    };
    let both = async { tokio::try_join!(send, read.read_to_end(&mut answer)) };
    tokio::time::timeout(stretched(STEP), both)
        .await
        .context("the conversation did not end")??;
    Ok(answer)
}

/// Bytes without a pattern that a lost or doubled block would keep.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Samples that a flow is at rest: the same number for half a second, within ten.
pub(crate) async fn at_rest(mut sample: impl FnMut() -> Result<u64>) -> Result<u64> {
    let begun = Instant::now();
    let mut last = sample()?;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = sample()?;
        if now == last {
            return Ok(now);
        }
        ensure!(
            begun.elapsed() < stretched(Duration::from_secs(10)),
            "it goes on and on: {now}"
        );
        last = now;
    }
}

/// What a process has open, and its children.
fn open_in(pid: i32) -> Result<Vec<String>> {
    let mut open = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let target = fs::read_link(entry?.path());
        open.extend(target.map(|target| target.display().to_string()));
    }
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    for child in children.split_whitespace() {
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        let place = fs::read_to_string(format!("/proc/{child}/wchan")).unwrap_or_default();
        open.push(format!(
            "child {} at {place}",
            stat.chars().take(40).collect::<String>()
        ));
    }
    Ok(open)
}

fn descriptors(pid: i32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

pub(crate) fn anonymous_kib(pid: i32) -> Result<u64> {
    field(&format!("/proc/{pid}/smaps_rollup"), "Anonymous:")
}

fn field(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    Ok(number.with_context(|| format!("{path} has no {name}"))?.parse()?)
}
