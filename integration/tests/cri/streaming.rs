//! Exec over streaming URLs, driven as kubectl's libraries do: every protocol, a lot of data, clients that stop or go.

use std::fs::{self, File};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::stretched;

use crate::streams::{Stage, TRANSPORTS, ended, expect, line_with, lines_of, noise, run, sha256};
use crate::support::join_all;

crate::tests![
    output_errors_and_exit_code_over_every_protocol,
    input_has_an_end,
    a_terminal_has_sizes_and_one_output,
    a_hundred_megabytes_each_way,
    eight_at_once,
    children_that_hold_the_output_keep_it_two_seconds,
    what_was_written_before_the_exit_arrives,
    a_container_that_stops_ends_its_sessions,
    a_program_that_is_not_there_leaves_nothing,
    commands_that_cannot_be,
    sessions_and_calls_leave_nothing,
];

async fn output_errors_and_exit_code_over_every_protocol() -> Result<()> {
    let Some(stage) = Stage::start("protocols", "sleep 1000").await? else {
        return Ok(());
    };
    let [spdy, websocket] = TRANSPORTS;
    let protocols = [
        (spdy, ""),
        (spdy, "v4"),
        (spdy, "v3"),
        (spdy, "v2"),
        (spdy, "v1"),
        (websocket, ""),
        (websocket, "v5"),
        (websocket, "v4"),
    ];
    for (transport, protocol) in protocols {
        let chosen = format!("--protocol={protocol}");
        let exec = async |script: &str| -> Result<_> {
            let command = ["sh", "-c", script];
            run(&mut stage.exec(&[transport, &chosen], &command).await?, b"").await
        };
        let context = || format!("{transport} {protocol}");
        expect(&exec("echo out; echo err >&2").await?, "out\n", "err\n", 0).with_context(context)?;
        if protocol == "v1" {
            // Its clients end with the first stream that does, and may miss the error.
            continue;
        }
        let failed = exec("echo out; exit 3").await?;
        ensure!(failed.stdout == b"out\n", "{transport} {protocol}: {failed:?}");
        if matches!(protocol, "v2" | "v3") {
            // Those have no codes; a text tells.
            let text = String::from_utf8_lossy(&failed.stderr);
            ensure!(
                text.contains("exit status 3"),
                "{transport} {protocol}: {failed:?}"
            );
        } else {
            expect(&failed, "out\n", "", 3).with_context(context)?;
            expect(&exec("kill -9 $$").await?, "", "", 137).with_context(context)?;
        }
    }
    stage.node.finish().await
}

async fn input_has_an_end() -> Result<()> {
    let Some(stage) = Stage::start("input", "sleep 1000").await? else {
        return Ok(());
    };
    let [spdy, websocket] = TRANSPORTS;
    // The first version cannot tell of an end.
    for (transport, protocol) in [(spdy, "v2"), (spdy, "v3"), (spdy, "v4"), (websocket, "v5")] {
        let flags = [transport, "--protocol", protocol, "--stdin"];
        let context = || format!("{transport} {protocol}");
        let output = run(&mut stage.exec(&flags, &["cat"]).await?, b"one\ntwo\n").await?;
        expect(&output, "one\ntwo\n", "", 0).with_context(context)?;
        let output = run(&mut stage.exec(&flags, &["wc", "-c"]).await?, b"").await?;
        expect(&output, "0\n", "", 0).with_context(context)?;
        // One that takes only the beginning of a lot. The driver may say that it could not send the rest.
        let mut head = stage.exec(&flags, &["head", "-c", "3"]).await?;
        let output = run(&mut head, &vec![b'x'; 4 << 20]).await?;
        ensure!(
            output.stdout == b"xxx" && output.status.success(),
            "{transport} {protocol}: {output:?}"
        );
    }
    // Without input asked for, there is its end.
    let output = run(&mut stage.exec(&[spdy], &["cat"]).await?, b"").await?;
    expect(&output, "", "", 0)?;
    stage.node.finish().await
}

async fn a_terminal_has_sizes_and_one_output() -> Result<()> {
    let Some(stage) = Stage::start("terminal", "sleep 1000").await? else {
        return Ok(());
    };
    let script = "test -t 0 && test -t 1 && test -t 2 || exit 1\n\
        until [ \"$(stty size 2>/dev/null)\" = '37 91' ]; do sleep 0.05; done\n\
        echo $TERM; echo err >&2; exit 5";
    let command = ["timeout", "20", "sh", "-c", script];
    let [spdy, websocket] = TRANSPORTS;
    for (transport, protocol) in [(spdy, "v3"), (spdy, "v4"), (websocket, "v4"), (websocket, "v5")] {
        for sizes in ["91x37", "80x24,132x50,91x37"] {
            let flags = [transport, "--protocol", protocol, "--tty", "--size", sizes];
            let output = run(&mut stage.exec(&flags, &command).await?, b"").await?;
            let context = || format!("{transport} {protocol} {sizes}");
            if protocol == "v3" {
                ensure!(output.stdout == b"xterm\r\nerr\r\n", "{output:?}");
                continue;
            }
            expect(&output, "xterm\r\nerr\r\n", "", 5).with_context(context)?;
        }
        // What is typed: the terminal shows it, the shell runs it.
        let flags = [transport, "--protocol", protocol, "--tty", "--stdin"];
        let output = run(
            &mut stage.exec(&flags, &["sh"]).await?,
            b"echo $((6*7))\nexit 0\n",
        )
        .await?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            text.contains("\n42\r\n") && output.status.success(),
            "{transport} {protocol}: {output:?}"
        );
    }
    stage.node.finish().await
}

async fn a_hundred_megabytes_each_way() -> Result<()> {
    let Some(stage) = Stage::start("bulk", "sleep 1000").await? else {
        return Ok(());
    };
    let bytes = noise(100_000_000, 1);
    let digest = sha256(&bytes);
    let source = stage.node.dir.join("source");
    fs::write(&source, &bytes)?;
    drop(bytes);
    for transport in TRANSPORTS {
        let begun = Instant::now();
        let mut command = stage
            .exec(
                &[transport, "--stdin"],
                &["sh", "-c", "cat > /data; sha256sum < /data"],
            )
            .await?;
        let output = command
            .stdin(File::open(&source)?)
            .spawn()?
            .wait_with_output()
            .await?;
        expect(&output, &format!("{digest}  -\n"), "", 0).with_context(|| transport.to_owned())?;
        let up = begun.elapsed();
        through(&stage, transport, &["cat", "/data"], None, &digest).await?;
        let down = begun.elapsed() - up;
        // Both at once.
        through(&stage, transport, &["cat"], Some(&source), &digest).await?;
        println!(
            "    100 MB {transport}: up {:.1} s, down {:.1} s, both {:.1} s",
            up.as_secs_f64(),
            down.as_secs_f64(),
            (begun.elapsed() - up - down).as_secs_f64()
        );
    }
    stage.node.finish().await
}

/// Runs a command whose output has to have this digest; it goes through a file, as the driver would have it.
async fn through(
    stage: &Stage,
    transport: &str,
    words: &[&str],
    input: Option<&std::path::Path>,
    digest: &str,
) -> Result<()> {
    let target = tempfile::NamedTempFile::new_in(&stage.node.dir)?;
    let flags: &[&str] = match input {
        Some(_) => &[transport, "--stdin"],
        None => &[transport],
    };
    let mut command = stage.exec(flags, words).await?;
    if let Some(input) = input {
        command.stdin(File::open(input)?);
    }
    let output = command
        .stdout(target.reopen()?)
        .spawn()?
        .wait_with_output()
        .await?;
    expect(&output, "", "", 0).with_context(|| format!("{transport} {words:?}"))?;
    let got = sha256(&fs::read(target.path())?);
    ensure!(got == digest, "{transport} {words:?}: something else came");
    Ok(())
}

async fn eight_at_once() -> Result<()> {
    let Some(stage) = Stage::start("eight", "sleep 1000").await? else {
        return Ok(());
    };
    let source = stage.node.dir.join("source");
    let bytes = noise(12_500_000, 2);
    let digest = sha256(&bytes);
    fs::write(&source, bytes)?;
    for transport in TRANSPORTS {
        let all = (0..8).map(|_| through(&stage, transport, &["cat"], Some(&source), &digest));
        join_all(all.collect()).await?;
    }
    stage.node.finish().await
}

async fn children_that_hold_the_output_keep_it_two_seconds() -> Result<()> {
    let Some(stage) = Stage::start("holders", "sleep 1000").await? else {
        return Ok(());
    };
    let before = stage.cost().await?;
    // A session of its own, or the hangup of the terminal ends it.
    let script = "setsid sh -c 'while :; do echo more; sleep 0.1; done' & sleep 0.3; echo done; exit 4";
    for transport in TRANSPORTS {
        for flags in [&[transport][..], &[transport, "--tty"]] {
            let begun = Instant::now();
            let output = run(&mut stage.exec(flags, &["sh", "-c", script]).await?, b"").await?;
            let took = begun.elapsed();
            let text = String::from_utf8_lossy(&output.stdout);
            ensure!(
                text.contains("done") && output.status.code() == Some(4),
                "{flags:?}: {output:?}"
            );
            ensure!(
                (Duration::from_millis(2100)..stretched(Duration::from_millis(4000))).contains(&took),
                "{flags:?}: {took:?}"
            );
        }
    }
    stage.settled(before).await?;
    stage.node.finish().await
}

async fn what_was_written_before_the_exit_arrives() -> Result<()> {
    let Some(stage) = Stage::start("drain", "sleep 1000").await? else {
        return Ok(());
    };
    for transport in TRANSPORTS {
        for _ in 0..5 {
            let script =
                "head -c 1000000 /dev/zero | tr '\\0' x; head -c 60000 /dev/zero | tr '\\0' y >&2; exit 4";
            let output = run(&mut stage.exec(&[transport], &["sh", "-c", script]).await?, b"").await?;
            ensure!(
                output.stdout == vec![b'x'; 1_000_000]
                    && output.stderr == vec![b'y'; 60_000]
                    && output.status.code() == Some(4),
                "{transport}: {} and {} bytes, {}",
                output.stdout.len(),
                output.stderr.len(),
                output.status
            );
            let flags = [transport, "--tty"];
            let script = "yes | head -n 20000; exit 4";
            let output = run(&mut stage.exec(&flags, &["sh", "-c", script]).await?, b"").await?;
            ensure!(
                output.stdout == b"y\r\n".repeat(20_000) && output.status.code() == Some(4),
                "{transport} with a terminal: {} bytes, {}",
                output.stdout.len(),
                output.status
            );
        }
    }
    stage.node.finish().await
}

async fn a_container_that_stops_ends_its_sessions() -> Result<()> {
    let Some(stage) = Stage::start("stops", "sleep 1000").await? else {
        return Ok(());
    };
    let before = stage.cost().await?;
    let mut drivers = Vec::new();
    for transport in TRANSPORTS {
        for flags in [&[transport][..], &[transport, "--tty", "--stdin"]] {
            let mut command = stage.exec(flags, &["sh", "-c", "echo here; sleep 1000"]).await?;
            let mut driver = command.stdin(Stdio::piped()).spawn()?;
            let mut lines = lines_of(driver.stdout.take())?;
            line_with(&mut lines, "here").await?;
            drivers.push((driver, lines));
        }
    }
    stage.node.stop_container(&stage.id, 0).await?;
    for (driver, _) in &mut drivers {
        let status = ended(driver).await?;
        ensure!(status.code() == Some(137), "{status}");
    }
    stage.settled(before).await?;
    stage.node.finish().await
}

async fn a_program_that_is_not_there_leaves_nothing() -> Result<()> {
    let Some(stage) = Stage::start("missing", "sleep 1000").await? else {
        return Ok(());
    };
    let failing = async |count: usize| -> Result<()> {
        for number in (0..count).step_by(10) {
            let transport = TRANSPORTS[(number / 10) % 2];
            let one = async || -> Result<()> {
                let mut command = stage
                    .exec(&[transport, "--tty", "--stdin"], &["/no/such/program"])
                    .await?;
                let output = run(&mut command, b"").await?;
                let text = String::from_utf8_lossy(&output.stderr);
                ensure!(text.contains("/no/such/program"), "{transport}: {output:?}");
                Ok(())
            };
            join_all((0..10).map(|_| one()).collect()).await?;
        }
        Ok(())
    };
    failing(40).await?;
    let before = stage.cost().await?;
    failing(300).await?;
    stage.unchanged(before).await?;
    stage.node.finish().await
}

async fn commands_that_cannot_be() -> Result<()> {
    let Some(stage) = Stage::start("commands", "sleep 1000").await? else {
        return Ok(());
    };
    let before = stage.cost().await?;
    let long = "x".repeat(300 << 10);
    let many = vec!["word"; 60_000];
    let commands: [&[&str]; 6] = [
        &["echo", "a\0b"],
        &["echo", &long],
        &[""],
        &["/"],
        &["/etc/passwd/x"],
        &[&["true"], &many[..]].concat(),
    ];
    for (number, command) in commands.into_iter().enumerate() {
        for transport in TRANSPORTS {
            // What cannot be run is refused by the call or by the session, with a text.
            let output = match stage.exec(&[transport], command).await {
                Ok(mut command) => run(&mut command, b"").await?,
                Err(_) => continue,
            };
            let code = output.status.code();
            let as_wanted = match number {
                5 => matches!(code, Some(0 | 125)),
                _ => code == Some(125) && !output.stderr.is_empty(),
            };
            let text = String::from_utf8_lossy(&output.stderr);
            ensure!(as_wanted, "{number} {transport}: {code:?} {text}");
        }
    }
    let output = run(&mut stage.exec(&[TRANSPORTS[0]], &["echo", "here"]).await?, b"").await?;
    expect(&output, "here\n", "", 0)?;
    stage.settled(before).await?;
    stage.node.finish().await
}

async fn sessions_and_calls_leave_nothing() -> Result<()> {
    let Some(stage) = Stage::start("growth", "sleep 1000").await? else {
        return Ok(());
    };
    let both = async |count: usize| -> Result<()> {
        for number in 0..count {
            let flags = [
                &[TRANSPORTS[0]][..],
                &[TRANSPORTS[1]],
                &[TRANSPORTS[0], "--tty"],
                &[TRANSPORTS[1], "--tty"],
            ][number % 4];
            let output = run(&mut stage.exec(flags, &["echo", "here"]).await?, b"").await?;
            ensure!(
                output.status.success() && output.stdout.starts_with(b"here"),
                "{output:?}"
            );
            let answer = stage.node.exec(&stage.id, &["echo", "here"], 10).await?;
            ensure!(answer.stdout == b"here\n", "{answer:?}");
        }
        Ok(())
    };
    both(50).await?;
    let before = stage.cost().await?;
    both(if std::env::var_os("CORACLE_LONG").is_some() {
        1000
    } else {
        100
    })
    .await?;
    stage.unchanged(before).await?;
    stage.node.finish().await
}
