//! Clients of exec that stop reading, or go: what they ran is held up or ends, and nobody else notices.

use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use coracle_kernel::signal::Signal;

use crate::streams::{
    Stage, TRANSPORTS, anonymous_kib, at_rest, ended, expect, line_with, lines_of, process, run, signal,
    taken, written,
};
use crate::support::eventually;

crate::tests![
    a_client_that_does_not_read_stops_its_process_alone,
    a_process_that_does_not_read_stops_its_client_alone,
    a_client_that_goes_is_the_end_of_input,
    a_client_that_goes_hangs_the_terminal_up,
    clients_that_go_at_any_moment_leave_nothing,
];

/// What a stuck session may hold in the daemon.
const STUCK_KIB: u64 = 32 << 10;

async fn a_client_that_does_not_read_stops_its_process_alone() -> Result<()> {
    let Some(stage) = Stage::start("unread", "sleep 1000").await? else {
        return Ok(());
    };
    let daemon = i32::try_from(stage.node.pid().context("no daemon")?)?;
    for transport in TRANSPORTS {
        let before = stage.cost().await?;
        let words = ["yes", "a line that nobody reads"];
        let mut driver = stage
            .exec(&[transport], &words)
            .await?
            .stdout(Stdio::null())
            .spawn()?;
        let mut yes = 0;
        eventually(async || {
            yes = process(&words)?.context("it does not run")?;
            ensure!(written(yes)? > 8 << 20, "it does not flow");
            Ok(())
        })
        .await?;
        signal(&driver, Signal::STOP)?;
        let stuck = at_rest(|| written(yes)).await?;
        let held = anonymous_kib(daemon)?;
        ensure!(
            held < before.daemon_kib + STUCK_KIB,
            "{transport}: before {before:?}, now {held} KiB"
        );
        // Others are served.
        let output = run(&mut stage.exec(&[transport], &["echo", "here"]).await?, b"").await?;
        expect(&output, "here\n", "", 0)?;
        ensure!(written(yes)? == stuck, "it goes on");
        signal(&driver, Signal::CONT)?;
        eventually(async || {
            ensure!(
                written(yes)? > stuck + (8 << 20),
                "{transport}: it does not go on"
            );
            Ok(())
        })
        .await?;
        driver.kill().await?;
        eventually(async || {
            ensure!(process(&words)?.is_none(), "{transport}: it outlives its client");
            Ok(())
        })
        .await?;
        stage.settled(before).await?;
    }
    stage.node.finish().await
}

async fn a_process_that_does_not_read_stops_its_client_alone() -> Result<()> {
    let Some(stage) = Stage::start("untaken", "sleep 1000").await? else {
        return Ok(());
    };
    let daemon = i32::try_from(stage.node.pid().context("no daemon")?)?;
    for transport in TRANSPORTS {
        let before = stage.cost().await?;
        let script = "until [ -e /tmp/go ]; do sleep 0.1; done; rm /tmp/go; exec wc -c";
        let source = tempfile::NamedTempFile::new_in(&stage.node.dir)?;
        source.as_file().set_len(64 << 20)?;
        let mut driver = stage
            .exec(&[transport, "--stdin"], &["sh", "-c", script])
            .await?
            .stdin(source.reopen()?)
            .spawn()?;
        let pid = i32::try_from(driver.id().context("no driver")?)?;
        let read = || taken(pid);
        eventually(async || {
            ensure!(read()? > 1 << 20, "it does not flow");
            Ok(())
        })
        .await?;
        let stuck = at_rest(read).await?;
        ensure!(stuck < 48 << 20, "{transport}: {stuck} bytes were taken");
        let held = anonymous_kib(daemon)?;
        ensure!(
            held < before.daemon_kib + STUCK_KIB,
            "{transport}: before {before:?}, now {held} KiB"
        );
        stage.ask("touch /tmp/go").await?;
        let mut stdout = driver.stdout.take().context("no output")?;
        let status = ended(&mut driver).await?;
        let mut text = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut stdout, &mut text).await?;
        ensure!(
            status.success() && text.trim() == (64 << 20).to_string(),
            "{transport}: {status} {text}"
        );
        stage.settled(before).await?;
    }
    stage.node.finish().await
}

async fn a_client_that_goes_is_the_end_of_input() -> Result<()> {
    let Some(stage) = Stage::start("goes", "sleep 1000").await? else {
        return Ok(());
    };
    let before = stage.cost().await?;
    for transport in TRANSPORTS {
        let script = "echo here; cat > /dev/null; echo gone > /tmp/gone";
        // By itself.
        let flags = [transport, "--stdin", "--disconnect=300ms"];
        let mut driver = stage
            .exec(&flags, &["sh", "-c", script])
            .await?
            .stdin(Stdio::piped())
            .spawn()?;
        ensure!(ended(&mut driver).await?.success(), "it did not leave");
        stage
            .says("cat /tmp/gone; rm -f /tmp/gone", "gone")
            .await
            .context(transport)?;
        // Killed.
        let mut driver = stage
            .exec(&[transport, "--stdin"], &["sh", "-c", script])
            .await?
            .stdin(Stdio::piped())
            .spawn()?;
        let mut lines = lines_of(driver.stdout.take())?;
        line_with(&mut lines, "here").await?;
        driver.kill().await?;
        stage
            .says("cat /tmp/gone; rm -f /tmp/gone", "gone")
            .await
            .context(transport)?;
    }
    stage.settled(before).await?;
    stage.node.finish().await
}

async fn a_client_that_goes_hangs_the_terminal_up() -> Result<()> {
    let Some(stage) = Stage::start("hangup", "sleep 1000").await? else {
        return Ok(());
    };
    let before = stage.cost().await?;
    let script = "trap 'echo hup > /tmp/hup; exit' HUP; echo here; while :; do sleep 0.1; done";
    for transport in TRANSPORTS {
        let flags = [transport, "--tty", "--stdin"];
        let mut driver = stage
            .exec(&flags, &["sh", "-c", script])
            .await?
            .stdin(Stdio::piped())
            .spawn()?;
        let mut lines = lines_of(driver.stdout.take())?;
        line_with(&mut lines, "here").await?;
        driver.kill().await?;
        stage
            .says("cat /tmp/hup; rm -f /tmp/hup", "hup")
            .await
            .context(transport)?;
    }
    stage.settled(before).await?;
    stage.node.finish().await
}

async fn clients_that_go_at_any_moment_leave_nothing() -> Result<()> {
    let Some(stage) = Stage::start("moments", "sleep 1000").await? else {
        return Ok(());
    };
    let rounds = async |count: usize| -> Result<()> {
        for number in 0..count {
            let transport = TRANSPORTS[number % 2];
            let mut drivers = Vec::new();
            for milliseconds in 0..10 {
                let leave = format!("--disconnect={}ms", milliseconds * 4 + number % 4);
                let flags = [transport, &leave, "--stdin", "--tty"];
                let flags = &flags[..if milliseconds % 2 == 0 { 3 } else { 4 }];
                let mut command = stage.exec(flags, &["cat"]).await?;
                drivers.push(command.stdin(Stdio::piped()).spawn()?);
            }
            for driver in &mut drivers {
                ended(driver).await?;
            }
        }
        stage.says("ps | grep -c '[c]at'", "0").await
    };
    rounds(4).await?;
    let before = stage.cost().await?;
    rounds(30).await?;
    stage.unchanged(before).await?;
    stage.node.finish().await
}
