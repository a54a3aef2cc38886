//! crictl, where it is on the PATH: what an operator types.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{Node, Options, request};

crate::tests![what_an_operator_types];

async fn what_an_operator_types() -> Result<()> {
    if Command::new("crictl").arg("--version").output().is_err() {
        coracle_integration::skipped("what_an_operator_types: crictl is not on the PATH");
        return Ok(());
    }
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("typed", &node.logs);
    let pod = node.run_pod(&config).await?;
    let script = "mkdir -p /tmp/www; echo from-the-pod >/tmp/www/index.html; httpd -p 127.0.0.1:8080 -h /tmp/www; \
                  echo begun; while read line; do echo \"got $line\"; done; sleep 1000";
    let mut container = request::container("c", script);
    container.stdin = true;
    let id = node.run_container(&pod, &container, &config).await?;
    node.wait_log(&node.status(&id).await?, "begun", Duration::from_secs(10))
        .await?;
    let socket = format!("unix://{}", node.socket().display());
    let crictl = |words: &[&str]| {
        let mut command = Command::new("crictl");
        command
            .args([
                "--runtime-endpoint",
                &socket,
                "--image-endpoint",
                &socket,
                "--timeout",
                "30s",
            ])
            .args(words);
        command
    };
    for transport in ["sync", "spdy", "websocket"] {
        let words = [
            &["exec"],
            words_of(transport),
            &[&id, "sh", "-c", "echo out; echo err >&2"],
        ]
        .concat();
        let Output {
            stdout,
            stderr,
            status,
        } = crictl(&words).output()?;
        // It prints both to its output when it has them as a whole.
        let lines = [stdout, stderr].concat();
        let lines = String::from_utf8_lossy(&lines).into_owned();
        ensure!(
            status.success() && lines.contains("out\n") && lines.contains("err\n"),
            "{transport}: {status}, {lines:?}"
        );
        let words = [&["exec"], words_of(transport), &[&id, "sh", "-c", "exit 3"]].concat();
        let failed = crictl(&words).output()?;
        let text = String::from_utf8_lossy(&failed.stderr).into_owned();
        ensure!(
            !failed.status.success() && text.contains('3'),
            "{transport}: {text}"
        );
    }
    let mut attached = crictl(&["attach", "-i", &id])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    std::io::Write::write_all(attached.stdin.as_mut().context("it has a stdin")?, b"word\n")?;
    let mut line = String::new();
    BufReader::new(attached.stdout.take().context("it has a stdout")?).read_line(&mut line)?;
    attached.kill()?;
    attached.wait()?;
    ensure!(line == "got word\n", "{line:?}");
    for transport in ["spdy", "websocket"] {
        let mut forward = crictl(&["port-forward", "--transport", transport, &pod, "0:8080"])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut stdout = BufReader::new(forward.stdout.take().context("it has a stdout")?);
        let mut line = String::new();
        while !line.contains("127.0.0.1:") {
            line.clear();
            ensure!(stdout.read_line(&mut line)? > 0, "{transport}: it ended");
        }
        let port = line
            .split_once("127.0.0.1:")
            .and_then(|(_, rest)| rest.split_whitespace().next())
            .context("no port")?;
        let answer = Command::new("busybox")
            .args(["wget", "-q", "-O", "-", &format!("http://127.0.0.1:{port}/")])
            .output()?;
        forward.kill()?;
        forward.wait()?;
        ensure!(answer.stdout == b"from-the-pod\n", "{transport}: {answer:?}");
    }
    node.finish().await
}

/// The flags of `crictl exec` for a transport.
fn words_of(transport: &str) -> &'static [&'static str] {
    match transport {
        "sync" => &["-s"],
        "websocket" => &["--transport", "websocket"],
        _ => &[],
    }
}
