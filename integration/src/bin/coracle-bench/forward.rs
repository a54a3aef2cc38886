//! Throughput of port forwarding: a file out of a pod, through kubectl's own client library on both sides.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::cell::{Cell, wait_for};
use coracle_integration::client::Client;
use coracle_integration::daemon::{Daemon, program};
use coracle_integration::image::busybox_layout;
use coracle_integration::request::{container_config, pod_config};

use crate::cri::{Containerd, IMAGE};
use crate::sample::{Row, Sample, print_rows};

const ROUNDS: usize = 10;

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
    let mut sessions = vec![("coracled", Session::start(&ours, &daemon.client()?, &streamer)?)];
    if let Some(peer) = &peer {
        let client = Client::connect(&peer.socket)?;
        sessions.push(("containerd+runc", Session::start(&theirs, &client, &streamer)?));
    }
    let mut row = Row {
        operation: "port-forward of 256 MiB",
        samples: sessions
            .iter()
            .map(|(name, _)| (*name, Sample::default()))
            .collect(),
        target: Some(0.5),
    };
    for round in 0..=ROUNDS {
        for ((_, session), (_, sample)) in sessions.iter().zip(&mut row.samples) {
            // The first round fills caches and is not counted.
            let mut warm_up = Sample::default();
            let sample = if round == 0 { &mut warm_up } else { sample };
            sample.time(|| session.transfer())?;
        }
    }
    print_rows(&[row]);
    let clients = [
        Some(daemon.client()?),
        peer.as_ref()
            .map(|peer| Client::connect(&peer.socket))
            .transpose()?,
    ];
    for ((_, session), client) in sessions.into_iter().zip(clients.into_iter().flatten()) {
        session.end(&client)?;
    }
    daemon.terminate()?;
    peer.map_or(Ok(()), Containerd::stop)
}

/// A pod with a web server, and a local port that leads to it.
struct Session<'a> {
    cell: &'a Cell,
    sandbox: String,
    forward: Child,
    port: String,
}

impl<'a> Session<'a> {
    fn start(cell: &'a Cell, client: &Client, streamer: &Path) -> Result<Session<'a>> {
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

    fn end(mut self, client: &Client) -> Result<()> {
        if let Some(mut stdin) = self.forward.stdin.take() {
            // Its end ends it.
            stdin.flush()?;
        }
        self.forward.wait()?;
        Ok(client.discard_pod(&self.sandbox)?)
    }
}
