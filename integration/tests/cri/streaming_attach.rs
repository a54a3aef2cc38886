//! Attach over streaming URLs: what a container writes from then on, and its input, if it has one.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{request, stretched};
use coracle_kernel::signal::Signal;
use coracle_proto::cri::{ContainerConfig, ContainerState};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines};

use crate::streams::{Stage, TRANSPORTS, ended, line_with, lines_of, run, signal};
use crate::support::{eventually, join_all};

crate::tests![
    what_is_written_from_then_on_is_seen_and_logged,
    the_input_of_a_container_that_takes_one_client,
    the_input_of_a_container_that_takes_many,
    a_terminal_is_resized,
    a_client_that_does_not_read_misses_lines_and_stops_nobody,
    what_is_missing_at_the_end_is_told,
    a_daemon_that_dies_ends_the_session_alone,
    coming_and_going_leaves_nothing,
];

/// Counts, for ever.
const TICKS: &str = "n=0; while :; do n=$((n+1)); echo tick $n; echo tock $n >&2; sleep 0.05; done";

/// A container with a standard input.
fn with_input(script: &str, once: bool) -> ContainerConfig {
    let mut config = request::container("main", script);
    config.stdin = true;
    config.stdin_once = once;
    config
}

/// The numbers of the next ticks: none is missing.
async fn ticks<R: AsyncRead + Unpin>(lines: &mut Lines<BufReader<R>>, count: u64) -> Result<u64> {
    let number = |line: &str| {
        line.rsplit(' ')
            .next()
            .and_then(|number| number.trim().parse::<u64>().ok())
    };
    let first = number(&line_with(lines, "tick ").await?).context("no number")?;
    for expected in first + 1..first + count {
        let next = number(&line_with(lines, "tick ").await?);
        ensure!(next == Some(expected), "{next:?} and not {expected}");
    }
    Ok(first)
}

async fn what_is_written_from_then_on_is_seen_and_logged() -> Result<()> {
    let Some(stage) = Stage::start("seen", TICKS).await? else {
        return Ok(());
    };
    let before = stage.cost().await?;
    let status = stage.node.status(&stage.id).await?;
    stage
        .node
        .wait_log(&status, "tick 3", Duration::from_secs(5))
        .await?;
    // Two at once, each with both streams.
    let mut sessions = Vec::new();
    for transport in TRANSPORTS {
        // Input for a container that has none goes nowhere.
        let (mut child, lines) = stage.attached(&[transport, "--stdin"]).await?;
        let input = child.stdin.as_mut().context("no input")?;
        input.write_all(&[b'x'; 100_000]).await?;
        let errors = lines_of(child.stderr.take())?;
        sessions.push((child, lines, errors));
    }
    for (_, lines, errors) in &mut sessions {
        let first = ticks(lines, 10).await?;
        ensure!(first > 3, "what was written before is shown: {first}");
        line_with(errors, "tock ").await?;
    }
    // One goes, the other stays.
    if let Some((mut child, ..)) = sessions.pop() {
        child.kill().await?;
    }
    if let Some((child, lines, _)) = sessions.last_mut() {
        let last = ticks(lines, 10).await? + 9;
        let text = format!("tick {last}\n");
        let log = stage
            .node
            .wait_log(&status, &text, Duration::from_secs(5))
            .await?;
        for number in 1..=last {
            ensure!(
                log.contains(&format!(" F tick {number}\n")),
                "tick {number} is not in the log"
            );
        }
        // The container's end is the session's, and no failure.
        stage.node.stop_container(&stage.id, 0).await?;
        let status = ended(child).await?;
        ensure!(status.success(), "{status}");
    }
    stage.settled(before).await?;
    stage.node.finish().await
}

async fn the_input_of_a_container_that_takes_one_client() -> Result<()> {
    for transport in TRANSPORTS {
        let config = with_input(
            "cat; echo input over; while :; do echo tick; sleep 0.1; done",
            true,
        );
        let Some(stage) = Stage::with("once", &config).await? else {
            return Ok(());
        };
        let (mut child, mut lines) = stage.attached(&[transport, "--stdin"]).await?;
        let mut input = child.stdin.take().context("no input")?;
        input.write_all(b"hello\n").await?;
        line_with(&mut lines, "hello").await?;
        // A second client comes meanwhile; its input goes nowhere.
        let (mut second, mut seconds) = stage.attached(&[transport, "--stdin"]).await?;
        second
            .stdin
            .take()
            .context("no input")?
            .write_all(b"lost\n")
            .await?;
        drop(input);
        line_with(&mut lines, "input over").await?;
        line_with(&mut lines, "tick").await?;
        line_with(&mut seconds, "tick").await?;
        child.kill().await?;
        second.kill().await?;
        let log = fs::read_to_string(stage.node.status(&stage.id).await?.log_path)?;
        ensure!(log.contains(" F hello\n") && !log.contains("lost"), "{log}");
        stage.node.finish().await?;

        // A client that is killed ends it as well.
        let Some(stage) = Stage::with("once", &with_input("cat; exit 7", true)).await? else {
            return Ok(());
        };
        let (mut child, mut lines) = stage.attached(&[transport, "--stdin"]).await?;
        child
            .stdin
            .as_mut()
            .context("no input")?
            .write_all(b"hello\n")
            .await?;
        line_with(&mut lines, "hello").await?;
        child.kill().await?;
        let status = stage.node.wait_exit(&stage.id, Duration::from_secs(10)).await?;
        ensure!(status.exit_code == 7, "{status:?}");
        stage.node.finish().await?;
    }
    Ok(())
}

async fn the_input_of_a_container_that_takes_many() -> Result<()> {
    let config = with_input("while read line; do echo got $line; done; echo over", false);
    let Some(stage) = Stage::with("many", &config).await? else {
        return Ok(());
    };
    let before = stage.cost().await?;
    for number in 0..6 {
        let (mut child, mut lines) = stage.attached(&[TRANSPORTS[number % 2], "--stdin"]).await?;
        let mut input = child.stdin.take().context("no input")?;
        input.write_all(format!("{number}\n").as_bytes()).await?;
        line_with(&mut lines, &format!("got {number}")).await?;
        if number % 3 == 0 {
            drop(input);
        }
        child.kill().await?;
    }
    stage.settled(before).await?;
    let status = stage.node.status(&stage.id).await?;
    ensure!(status.state() == ContainerState::ContainerRunning, "{status:?}");
    // A lot, through one session.
    let (mut child, mut lines) = stage.attached(&[TRANSPORTS[0], "--stdin"]).await?;
    let mut input = child.stdin.take().context("no input")?;
    for number in 0..2000 {
        input.write_all(format!("line {number}\n").as_bytes()).await?;
    }
    line_with(&mut lines, "got line 1999").await?;
    child.kill().await?;
    stage.node.finish().await
}

async fn a_terminal_is_resized() -> Result<()> {
    let mut config = with_input(
        "while :; do stty size; read -t 0.1 line && echo got $line; done",
        false,
    );
    config.tty = true;
    config.command[2].insert_str(0, "test -t 0 || exit 9; ");
    let Some(stage) = Stage::with("tty", &config).await? else {
        return Ok(());
    };
    let before = stage.cost().await?;
    for (transport, size, seen) in [
        (TRANSPORTS[0], "91x37", "37 91"),
        (TRANSPORTS[1], "80x24,132x50", "50 132"),
    ] {
        let (mut child, mut lines) = stage
            .attached(&[transport, "--tty", "--stdin", "--size", size])
            .await?;
        line_with(&mut lines, seen).await?;
        child
            .stdin
            .as_mut()
            .context("no input")?
            .write_all(b"typed\n")
            .await?;
        line_with(&mut lines, "got typed").await?;
        child.kill().await?;
    }
    stage.settled(before).await?;
    stage.node.finish().await
}

async fn a_client_that_does_not_read_misses_lines_and_stops_nobody() -> Result<()> {
    // Lines of about a kilobyte: 24 MB, and then more, slowly.
    let script = "until [ -e /tmp/go ]; do echo wait; sleep 0.1; done; l=$(head -c 1000 /dev/zero | tr '\\0' x); n=0; \
        while [ $n -lt 24000 ]; do n=$((n+1)); echo $n $l; done; touch /tmp/done; while :; do echo tick; sleep 0.1; done";
    for transport in TRANSPORTS {
        let Some(stage) = Stage::start("unread", script).await? else {
            return Ok(());
        };
        let before = stage.cost().await?;
        let (mut child, mut lines) = stage.attached(&[transport]).await?;
        line_with(&mut lines, "wait").await?;
        signal(&child, Signal::STOP)?;
        stage.ask("touch /tmp/go").await?;
        stage.says("ls /tmp/done", "/tmp/done").await?;
        let status = stage.node.status(&stage.id).await?;
        let log = stage
            .node
            .wait_log(&status, " F 24000 ", Duration::from_secs(20))
            .await?;
        let logged = log.lines().filter(|line| line.ends_with("xxxx")).count();
        ensure!(logged == 24_000, "{logged} lines are in the log");
        let now = stage.cost().await?;
        ensure!(
            now.daemon_kib < before.daemon_kib + (8 << 10) && now.monitor_kib < before.monitor_kib + 128,
            "before {before:?}, now {now:?}"
        );
        signal(&child, Signal::CONT)?;
        let mut output = lines.into_inner();
        let mut bytes = Vec::new();
        let note = "bytes of output are not shown here\r\n";
        let caught_up = async {
            let seen = |bytes: &[u8]| {
                let end = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(4096)..]).into_owned();
                end.rsplit_once(note)
                    .is_some_and(|(_, rest)| rest.contains("tick\n"))
            };
            while !seen(&bytes) {
                ensure!(output.read_buf(&mut bytes).await? > 0, "the session ended");
            }
            Ok(())
        };
        let caught_up = tokio::time::timeout(stretched(Duration::from_secs(60)), caught_up).await;
        caught_up.context("no note")??;
        stage.node.stop_container(&stage.id, 0).await?;
        output.read_to_end(&mut bytes).await?;
        ensure!(
            ended(&mut child).await?.success(),
            "the end was told as a failure"
        );
        // What came and what the notes count is all that there was.
        let text = String::from_utf8(bytes)?.replace("wait\n", "");
        let (mut shown, mut dropped) = (0, 0);
        for part in text.split("\r\ncoracle: ") {
            let counted = part.split_once(note).and_then(|(before, rest)| {
                let number: usize = before.trim_end().parse().ok()?;
                Some((number, rest.len()))
            });
            let (more, rest) = counted.unwrap_or((0, part.len()));
            (shown, dropped) = (shown + rest, dropped + more);
        }
        let log = fs::read_to_string(&status.log_path)?;
        let logged = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
        let logged: usize = logged
            .filter(|line| *line != "wait")
            .map(|line| line.len() + 1)
            .sum();
        println!("    {transport}: {logged} bytes, {shown} came, {dropped} are told of");
        ensure!(
            dropped > 0 && shown + dropped == logged,
            "not all is accounted for"
        );
        stage.settled(before).await?;
        stage.node.finish().await?;
    }
    Ok(())
}

async fn what_is_missing_at_the_end_is_told() -> Result<()> {
    for transport in TRANSPORTS {
        for (bytes, reads) in [(150_000, true), (12_000_000, false)] {
            let script = format!(
                "until [ -e /tmp/go ]; do echo wait; sleep 0.1; done; head -c {bytes} /dev/zero | tr '\\0' x; exit 3"
            );
            let Some(stage) = Stage::start("end", &script).await? else {
                return Ok(());
            };
            let (child, mut lines) = stage.attached(&[transport]).await?;
            line_with(&mut lines, "wait").await?;
            if !reads {
                signal(&child, Signal::STOP)?;
            }
            stage.ask("touch /tmp/go").await?;
            stage.node.wait_exit(&stage.id, Duration::from_secs(10)).await?;
            if !reads {
                signal(&child, Signal::CONT)?;
            }
            let mut text = String::new();
            let rest = async {
                while let Some(line) = lines.next_line().await? {
                    text = line;
                    if text.contains("not shown") {
                        break;
                    }
                }
                Ok::<_, anyhow::Error>(())
            };
            let over = tokio::time::timeout(stretched(Duration::from_secs(20)), rest).await;
            over.context("the session does not end")??;
            if reads {
                ensure!(
                    text.len() == bytes,
                    "{transport}: {} of {bytes} bytes",
                    text.len()
                );
            } else {
                ensure!(
                    text.starts_with("coracle: ") && text.ends_with(" bytes of output are not shown here"),
                    "{transport}: {} bytes and no note",
                    text.len()
                );
            }
            stage.node.finish().await?;
        }
    }
    Ok(())
}

async fn a_daemon_that_dies_ends_the_session_alone() -> Result<()> {
    let Some(mut stage) = Stage::start("dies", TICKS).await? else {
        return Ok(());
    };
    let (mut exec, mut execs) = {
        let mut child = stage
            .exec(&[TRANSPORTS[1]], &["sh", "-c", TICKS])
            .await?
            .spawn()?;
        let lines = lines_of(child.stdout.take())?;
        (child, lines)
    };
    line_with(&mut execs, "tick").await?;
    let mut sessions = Vec::new();
    for transport in TRANSPORTS {
        let (child, mut lines) = stage.attached(&[transport]).await?;
        line_with(&mut lines, "tick").await?;
        sessions.push((child, lines));
    }
    // One that does not notice: the next daemon ends it, for nobody has its streams any more.
    let mut deaf = stage.exec(&[TRANSPORTS[0]], &["sleep", "777"]).await?.spawn()?;
    stage.says("ps | grep -c '[s]leep 777'", "1").await?;
    stage.node.kill()?;
    for (child, _) in &mut sessions {
        ended(child).await?;
    }
    ended(&mut deaf).await?;
    ended(&mut exec).await?;
    stage.node.spawn().await?;
    stage.says("ps | grep -c '[s]leep 777'", "0").await?;
    let before = stage.cost().await?;
    let status = stage.node.status(&stage.id).await?;
    ensure!(status.state() == ContainerState::ContainerRunning, "{status:?}");
    for transport in TRANSPORTS {
        let (mut child, mut lines) = stage.attached(&[transport]).await?;
        ticks(&mut lines, 5).await?;
        child.kill().await?;
    }
    let log = fs::read_to_string(&status.log_path)?;
    for number in 1..log.matches(" F tick ").count() {
        ensure!(
            log.contains(&format!(" F tick {number}\n")),
            "tick {number} is not in the log"
        );
    }
    stage.settled(before).await?;
    // A daemon that ends as it should ends its sessions too.
    let (mut child, mut lines) = stage.attached(&[TRANSPORTS[0]]).await?;
    ticks(&mut lines, 2).await?;
    stage.node.terminate().await?;
    ended(&mut child).await?;
    stage.node.spawn().await?;
    stage.node.finish().await
}

async fn coming_and_going_leaves_nothing() -> Result<()> {
    // Silent: nothing but the session's end tells the monitor that nobody looks on any more.
    let Some(stage) = Stage::with("silent", &with_input("sleep 1000", false)).await? else {
        return Ok(());
    };
    let attach = async |count: usize| -> Result<()> {
        for number in (0..count).step_by(10) {
            let transport = TRANSPORTS[(number / 10) % 2];
            let before = stage.cost().await?;
            let one = async || -> Result<_> { stage.attached(&[transport, "--stdin"]).await };
            let sessions = join_all((0..10).map(|_| one()).collect()).await?;
            eventually(async || {
                let now = stage.cost().await?;
                ensure!(
                    now.monitor_fds >= before.monitor_fds + 15,
                    "they are not attached: {now:?}"
                );
                Ok(())
            })
            .await?;
            for (mut child, _) in sessions {
                child.kill().await?;
            }
            stage.settled(before).await?;
        }
        Ok(())
    };
    attach(20).await?;
    let before = stage.cost().await?;
    attach(200).await?;
    stage.unchanged(before).await?;
    // By its own will.
    let output = run(
        &mut stage.attach(&[TRANSPORTS[1], "--disconnect=100ms"]).await?,
        b"",
    )
    .await?;
    ensure!(output.status.success(), "{output:?}");
    stage.settled(before).await?;
    stage.node.finish().await
}
