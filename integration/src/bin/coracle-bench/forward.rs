//! Throughput of port forwarding: a file out of a pod, through kubectl's own client library on both sides; and to a client
//! that only counts, which leaves the server to be measured.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::cell::{Cell, run as run_command, wait_for};
use coracle_integration::client::Client;
use coracle_integration::daemon::{Daemon, program};
use coracle_integration::image::busybox_layout;
use coracle_integration::request::{container_config, pod_config};

use crate::cri::{Containerd, IMAGE};
use crate::sample::{Row, Sample, print_rows};

const ROUNDS: usize = 20;

/// What one transfer moves.
const MEBIBYTES: usize = 256;

/// Takes and prints the figures.
pub(crate) fn run() -> Result<()> {
    let Some(streamer) = program("STREAMER") else {
        return Ok(());
    };
    let ours = Cell::new("bench-forward")?;
    let layout = busybox_layout(ours.dir(), "busybox", IMAGE)?;
    let daemon = Daemon::start(&ours, None)?;
    daemon.import(&ours, &layout, IMAGE)?;
    let theirs = Cell::new("bench-forward-peer")?;
    let peer = Containerd::start(&theirs, &layout)?;
    let mut sessions = vec![("coracled", Session::start(&ours, daemon.client()?, &streamer)?)];
    if let Some(peer) = &peer {
        let client = Client::connect(&peer.socket)?;
        sessions.push(("containerd+runc", Session::start(&theirs, client, &streamer)?));
    }
    let row = |operation, target| Row {
        operation,
        samples: sessions
            .iter()
            .map(|(name, _)| (*name, Sample::default()))
            .collect(),
        target,
    };
    let mut rows = [
        row("port-forward of 256 MiB", Some(0.5)),
        row("port-forward of 256 MiB to a client that only counts", None),
    ];
    for round in 0..=ROUNDS {
        for (n, (_, session)) in sessions.iter().enumerate() {
            // The first round fills caches and is not counted.
            let mut warm_up = [Sample::default(), Sample::default()];
            let [whole, counted] = &mut rows;
            let [whole, counted] = match round {
                0 => warm_up.each_mut(),
                _ => [&mut whole.samples[n].1, &mut counted.samples[n].1],
            };
            whole.time(|| session.transfer())?;
            counted.time(|| session.count())?;
        }
    }
    print_rows(&rows);
    for (_, session) in sessions {
        session.end()?;
    }
    daemon.terminate()?;
    peer.map_or(Ok(()), Containerd::stop)
}

/// A pod with a web server, and a local port that leads to it.
struct Session<'a> {
    cell: &'a Cell,
    client: Client,
    streamer: &'a Path,
    sandbox: String,
    forward: Child,
    port: String,
}

impl<'a> Session<'a> {
    fn start(cell: &'a Cell, client: Client, streamer: &'a Path) -> Result<Session<'a>> {
        let pod = pod_config("forward", &cell.subdir("logs")?);
        let sandbox = client.run_pod(&pod)?;
        let script = format!(
            "mkdir /tmp/www; dd if=/dev/zero of=/tmp/www/much bs=1M count={MEBIBYTES}; exec httpd -f -p 8080 -h /tmp/www"
        );
        let container = client.create(
            &sandbox,
            &container_config("web", IMAGE, &["sh", "-c", &script]),
            &pod,
        )?;
        client.start(&container)?;
        let listens = ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:8080/much"];
        wait_for("the web server", Duration::from_secs(60), || {
            let answer = client.exec(&container, &listens, Duration::from_secs(20))?;
            Ok((answer.exit_code == 0).then_some(()))
        })?;
        let url = client.port_forward(&sandbox)?;
        let mut command = cell.command(streamer);
        let mut forward = command
            .args(["portforward", &url, ":8080"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let mut stdout = BufReader::new(forward.stdout.take().context("it has a stdout")?);
        stdout.read_line(&mut line)?;
        // It tells of each connection, and ends where nobody takes that.
        std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        let port = line
            .split_once("127.0.0.1:")
            .and_then(|(_, rest)| rest.split_whitespace().next())
            .with_context(|| format!("no port in {line:?}"))?
            .to_owned();
        Ok(Session {
            cell,
            client,
            streamer,
            sandbox,
            forward,
            port,
        })
    }

    fn transfer(&self) -> Result<()> {
        let url = format!("http://127.0.0.1:{}/much", self.port);
        let size = self
            .cell
            .sh(&format!("curl -sf -o /dev/null -w '%{{size_download}}' {url}"))?;
        ensure!(size.trim().parse() == Ok(MEBIBYTES << 20), "{size} bytes came");
        Ok(())
    }

    fn count(&self) -> Result<()> {
        let url = self.client.port_forward(&self.sandbox)?;
        let mut command = self.cell.command(self.streamer);
        let wanted = (MEBIBYTES << 20).to_string();
        let size = run_command(command.args(["count", &url, "8080", "/much", &wanted]))?;
        ensure!(
            size.trim()
                .parse()
                .is_ok_and(|size: usize| size >= MEBIBYTES << 20),
            "{size} bytes came"
        );
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        if let Some(mut stdin) = self.forward.stdin.take() {
            // Its end ends it.
            stdin.flush()?;
        }
        self.forward.wait()?;
        Ok(self.client.discard_pod(&self.sandbox)?)
    }
}
