//! Sessions over TLS, driven as kubectl's libraries do with an authority that they are told of.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use coracle_integration::{Options, request};

use crate::streams::{Stage, TRANSPORTS, converse, echo, forward_url, listen_in, netns, noise, run};

crate::tests![commands_and_ports_over_tls];

/// `ca.crt`, and `server.crt` with `server.key` for 127.0.0.1.
fn make_certificates(dir: &Path) -> Result<()> {
    let script = "
        new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2'
        openssl req -x509 $new -subj /CN=authority -keyout ca.key -out ca.crt
        openssl req -x509 $new -subj /CN=server -CA ca.crt -CAkey ca.key -keyout server.key -out server.crt \\
            -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE
        chmod 600 server.key";
    let mut command = Command::new("sh");
    let made = command.args(["-euc", script]).current_dir(dir).output()?;
    ensure!(made.status.success(), "{made:?}");
    Ok(())
}

async fn commands_and_ports_over_tls() -> Result<()> {
    let dir = tempfile::tempdir()?;
    make_certificates(dir.path())?;
    let options = Options {
        config: format!(
            "[stream]\ntls_cert = \"{dir}/server.crt\"\ntls_key = \"{dir}/server.key\"\n",
            dir = dir.path().display()
        ),
        ..Options::default()
    };
    let container = request::container("main", "sleep 1000");
    let Some(stage) = Stage::on("tls", &container, options).await? else {
        return Ok(());
    };
    let authority = format!("--ca={}", dir.path().join("ca.crt").display());
    let input = noise(3_000_000, 7);
    for transport in TRANSPORTS {
        let flags = [transport, "--stdin", &authority];
        let output = run(
            &mut stage.exec(&flags, &["sh", "-c", "cat; exit 3"]).await?,
            &input,
        )
        .await?;
        ensure!(
            output.stdout == input && output.status.code() == Some(3),
            "{transport}: {} bytes, {}",
            output.stdout.len(),
            output.status
        );
        // Who does not know the authority does not go on.
        let output = run(&mut stage.exec(&[transport], &["true"]).await?, b"").await?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(125) && text.contains("certificate"),
            "{transport}: {output:?}"
        );
    }
    let listener = listen_in(&netns(&stage.pod)?)?;
    let port = listener.local_addr()?.port();
    tokio::spawn(echo(listener));
    for transport in ["--transport=spdy", "--transport=tunnel"] {
        let url = forward_url(&stage.node, &stage.pod, &[]).await?;
        ensure!(url.starts_with("https://127.0.0.1:"), "{url}");
        let forward = stage.forward_to(&url, &[transport, &authority], &[port]).await?;
        let back = converse(forward.addresses[0], &input).await?;
        ensure!(back == input, "{transport}: {} bytes", back.len());
    }
    stage.node.finish().await
}
