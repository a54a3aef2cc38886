//! ExecSync.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use coracle_integration::{Node, Options, request, stretched};

use crate::support::{eventually, join_all};

crate::tests![
    output_and_exit_code,
    a_timeout_kills_the_whole_exec,
    a_client_that_hangs_up_ends_its_command,
    children_that_hold_the_pipe_keep_nobody,
    a_flood_is_cut_below_the_message_limit,
    a_program_that_is_not_there,
    not_in_a_container_that_does_not_run,
    many_at_once,
    it_is_no_more_than_the_container,
];

async fn running(name: &str, script: &str) -> Result<(Node, String)> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod(name, &node.logs);
    let pod = node.run_pod(&config).await?;
    let id = node
        .run_container(&pod, &request::container("main", script), &config)
        .await?;
    Ok((node, id))
}

async fn output_and_exit_code() -> Result<()> {
    let (node, id) = running("exec", "sleep 1000").await?;
    let answer = node
        .exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 3"], 10)
        .await?;
    ensure!(
        answer.stdout == b"out\n" && answer.stderr == b"err\n" && answer.exit_code == 3,
        "{answer:?}"
    );
    // No time limit, no output, standard input at its end.
    let answer = node.exec(&id, &["cat"], 0).await?;
    ensure!(answer.stdout.is_empty() && answer.exit_code == 0, "{answer:?}");
    let answer = node.exec(&id, &["sh", "-c", "kill -9 $$"], 10).await?;
    ensure!(answer.exit_code == 137, "{answer:?}");
    node.finish().await
}

async fn a_timeout_kills_the_whole_exec() -> Result<()> {
    let (node, id) = running("timeout", "sleep 1000").await?;
    let begun = Instant::now();
    let error = node
        .exec(
            &id,
            &["sh", "-c", "setsid sleep 5151 & trap '' TERM; sleep 5152"],
            1,
        )
        .await
        .unwrap_err();
    let took = begun.elapsed();
    ensure!(error.code() == tonic::Code::DeadlineExceeded, "{error}");
    ensure!(took < stretched(Duration::from_secs(3)), "{took:?}");
    eventually(async || {
        let seen = String::from_utf8(node.exec(&id, &["ps"], 10).await?.stdout)?;
        ensure!(!seen.contains("515"), "{seen}");
        Ok(())
    })
    .await?;
    node.finish().await
}

async fn a_client_that_hangs_up_ends_its_command() -> Result<()> {
    let (node, id) = running("hangup", "sleep 1000").await?;
    let processes =
        async || Ok::<_, anyhow::Error>(String::from_utf8(node.exec(&id, &["ps"], 10).await?.stdout)?);
    {
        let command = ["sh", "-c", "setsid sleep 7171 & sleep 7172"];
        let mut call = std::pin::pin!(node.exec(&id, &command, 0));
        let begun = async {
            eventually(async || {
                ensure!(processes().await?.contains("sleep 7172"), "it does not run");
                Ok(())
            })
            .await
        };
        tokio::select! {
            ended = &mut call => ensure!(false, "{ended:?}"),
            begun = begun => begun?,
        }
    }
    eventually(async || {
        let seen = processes().await?;
        ensure!(!seen.contains("sleep 717"), "{seen}");
        Ok(())
    })
    .await?;
    node.finish().await
}

async fn children_that_hold_the_pipe_keep_nobody() -> Result<()> {
    let (node, id) = running("holders", "sleep 1000").await?;
    let begun = Instant::now();
    let answer = node
        .exec(&id, &["sh", "-c", "(setsid sleep 6161) & echo done"], 30)
        .await?;
    let took = begun.elapsed();
    ensure!(answer.stdout == b"done\n" && answer.exit_code == 0, "{answer:?}");
    ensure!(took < stretched(Duration::from_secs(4)), "{took:?}");
    let seen = String::from_utf8(node.exec(&id, &["ps"], 10).await?.stdout)?;
    ensure!(
        !seen.contains("6161"),
        "what the exec left behind lives on: {seen}"
    );
    node.finish().await
}

async fn a_flood_is_cut_below_the_message_limit() -> Result<()> {
    let (node, id) = running("flood", "sleep 1000").await?;
    let script = "dd if=/dev/zero bs=1M count=24; dd if=/dev/zero bs=1M count=24 >&2; echo end";
    let answer = node.exec(&id, &["sh", "-c", script], 60).await?;
    let total = answer.stdout.len() + answer.stderr.len();
    ensure!(answer.exit_code == 0, "{}", answer.exit_code);
    ensure!((15 << 20..16 << 20).contains(&total), "{total} bytes");
    node.finish().await
}

async fn a_program_that_is_not_there() -> Result<()> {
    let (node, id) = running("missing", "sleep 1000").await?;
    let error = node
        .exec(&id, &["/no/such/program"], 10)
        .await
        .unwrap_err()
        .to_string();
    ensure!(error.contains("/no/such/program"), "{error}");
    ensure!(
        node.exec(&id, &[], 10).await.is_err(),
        "an empty command was taken"
    );
    ensure!(
        node.exec(&id, &["true"], -1).await.is_err(),
        "a negative timeout was taken"
    );
    ensure!(
        node.exec(&id, &["true"], 10).await?.exit_code == 0,
        "it does not work any more"
    );
    node.finish().await
}

async fn not_in_a_container_that_does_not_run() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("not-running", &node.logs);
    let pod = node.run_pod(&config).await?;
    let created = node
        .create(&pod, &request::container("created", "sleep 1000"), &config)
        .await?;
    ensure!(
        node.exec(&created, &["true"], 10).await.is_err(),
        "in a created one"
    );
    let exited = node
        .run_container(&pod, &request::container("exited", "true"), &config)
        .await?;
    node.wait_exit(&exited, Duration::from_secs(10)).await?;
    ensure!(
        node.exec(&exited, &["true"], 10).await.is_err(),
        "in an exited one"
    );
    let error = node.exec(&"a".repeat(64), &["true"], 10).await.unwrap_err();
    ensure!(error.code() == tonic::Code::NotFound, "{error}");
    node.finish().await
}

async fn many_at_once() -> Result<()> {
    let (node, id) = running("many", "sleep 1000").await?;
    let begun = Instant::now();
    let all = (0..40).map(|number| {
        let (node, id) = (&node, &id);
        async move {
            let word = number.to_string();
            let answer = node.exec(id, &["echo", &word], 20).await?;
            ensure!(answer.stdout == format!("{word}\n").as_bytes(), "{answer:?}");
            Ok(())
        }
    });
    join_all(all.collect()).await?;
    println!(
        "    40 execs at once in {:.0} ms",
        begun.elapsed().as_secs_f64() * 1e3
    );
    // An exec in a container that ends meanwhile has an end too.
    let (exec, stopped) = tokio::join!(node.exec(&id, &["sleep", "100"], 60), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        node.stop_container(&id, 0).await
    });
    stopped?;
    ensure!(
        exec.map_or(true, |answer| answer.exit_code == 137),
        "it survived its container"
    );
    node.finish().await
}

async fn it_is_no_more_than_the_container() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("rights", &node.logs);
    let pod = node.run_pod(&config).await?;
    let mut container = request::container(
        "main",
        "grep -E 'Cap|NoNew|Seccomp|Groups|Uid' /proc/self/status; echo ready; sleep 1000",
    );
    if let Some(context) = container
        .linux
        .as_mut()
        .and_then(|linux| linux.security_context.as_mut())
    {
        context.run_as_user = Some(coracle_proto::cri::Int64Value { value: 1000 });
        context.no_new_privs = true;
    }
    let id = node.run_container(&pod, &container, &config).await?;
    let log = node
        .wait_log(&node.status(&id).await?, "ready", Duration::from_secs(5))
        .await?;
    let own: Vec<String> = log
        .lines()
        .filter_map(|line| line.split_once(" F ").map(|(_, text)| text.to_owned()))
        .filter(|line| line != "ready")
        .collect();
    let answer = node
        .exec(
            &id,
            &["grep", "-E", "Cap|NoNew|Seccomp|Groups|Uid", "/proc/self/status"],
            10,
        )
        .await?;
    let exec: Vec<String> = String::from_utf8(answer.stdout)?
        .lines()
        .map(str::to_owned)
        .collect();
    ensure!(own == exec, "container {own:#?}\nexec {exec:#?}");
    node.finish().await
}
