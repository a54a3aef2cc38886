//! A pod, from nothing to nothing: what `cargo xtask demo` shows.
//!
//! Starts a coracled of its own in a scratch directory with the built-in bridge, brings an image in, runs a pod of two
//! containers, prints their log, an exec's answer and an answer over the network, with the time of each call, and shows
//! at the end that nothing is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use coracle_integration::cell::{run, wait_for};
use coracle_integration::client::Client;
use coracle_integration::daemon::Server;
use coracle_integration::image::{busybox_layout, pack};
use coracle_integration::leaks;
use coracle_integration::request::{container_config, pod_config};
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
    let mut server = Server::new(
        &coracled,
        scratch.path(),
        &format!("[network]\nsubnet = {SUBNET:?}\n"),
    )?;
    server.log_level = "info";
    let before = leaks::snapshot_here()?;

    let client = timed("start coracled", || {
        server.start(Command::new(&coracled))?;
        server.wait_serving()?;
        Client::connect(&server.socket())
    })?;
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
                    .arg(server.socket())
                    .arg(&tar);
                run(&mut command)
            };
            timed("import the image", import)?;
            IMAGE.to_owned()
        }
    };
    pod(&client, scratch.path(), &image)?;
    drop(client);
    server.terminate()?;
    leaks::check(&before, &leaks::snapshot_here()?)?;
    drop(server);
    scratch.close().context("remove the scratch directory")?;
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
