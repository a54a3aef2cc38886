//! Container logs, as the kubelet reads and rotates them.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{Node, Options, request};
use coracle_proto::cri::ReopenContainerLogRequest;

crate::tests![
    format_of_the_lines,
    a_directory_that_nobody_made_is_made,
    rotation_under_a_writer_loses_no_line,
    reopen_of_an_exited_container_makes_no_file
];

async fn format_of_the_lines() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("logs", &node.logs);
    let pod = node.run_pod(&config).await?;
    let script =
        "echo one; echo two >&2; printf three; head -c 40000 /dev/zero | tr '\\0' x; echo; echo; printf last";
    let id = node
        .run_container(&pod, &request::container("main", script), &config)
        .await?;
    let status = node.wait_exit(&id, Duration::from_secs(10)).await?;
    let log = std::fs::read_to_string(&status.log_path)?;
    let mut stdout = String::new();
    let mut stderr = String::new();
    for line in log.lines() {
        let mut words = line.splitn(4, ' ');
        let time = words.next().context("no time")?;
        ensure!(
            time.len() >= 20 && time.contains('T') && (time.ends_with('Z') || time.contains('+')),
            "{time:?}"
        );
        let stream = words.next().context("no stream")?;
        let tag = words.next().context("no tag")?;
        let text = words.next().unwrap_or_default();
        ensure!(tag == "F" || tag == "P", "{tag:?}");
        let into = if stream == "stdout" {
            &mut stdout
        } else {
            &mut stderr
        };
        into.push_str(text);
        if tag == "F" {
            into.push('\n');
        }
    }
    let long = "x".repeat(40_000);
    ensure!(
        stdout.trim_end_matches('\n') == format!("one\nthree{long}\n\nlast"),
        "{} bytes: {:.40}",
        stdout.len(),
        stdout
    );
    ensure!(stderr == "two\n", "{stderr:?}");
    node.finish().await
}

async fn a_directory_that_nobody_made_is_made() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("by-hand", &node.logs);
    let answer = node.runtime().run_pod_sandbox(request::run(&config)).await?;
    let pod = answer.into_inner().pod_sandbox_id;
    let mut container = request::container("main", "echo begun");
    container.log_path = "main/0.log".into();
    let answer = node
        .runtime()
        .create_container(request::create(&pod, &container, &config))
        .await?;
    let id = answer.into_inner().container_id;
    node.start_container(&id).await?;
    let status = node.wait_exit(&id, Duration::from_secs(10)).await?;
    let log = std::fs::read_to_string(&status.log_path)?;
    ensure!(log.ends_with("begun\n"), "{log:?}");
    node.finish().await
}

async fn rotation_under_a_writer_loses_no_line() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("rotation", &node.logs);
    let pod = node.run_pod(&config).await?;
    const LINES: usize = 200_000;
    let id = node
        .run_container(
            &pod,
            &request::container("main", &format!("seq 1 {LINES}")),
            &config,
        )
        .await?;
    let status = node.status(&id).await?;
    let mut files = Vec::new();
    for number in 0.. {
        let rotated = format!("{}.{number}", status.log_path);
        if std::fs::rename(&status.log_path, &rotated).is_ok() {
            files.push(rotated);
        }
        let request = ReopenContainerLogRequest {
            container_id: id.clone(),
        };
        if node.runtime().reopen_container_log(request).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    node.wait_exit(&id, Duration::from_secs(60)).await?;
    files.push(status.log_path.clone());
    let mut next = 1;
    for file in &files {
        for line in std::fs::read_to_string(file).unwrap_or_default().lines() {
            let text = line.rsplit(' ').next().unwrap_or_default();
            ensure!(text == next.to_string(), "{file}: {text:?} instead of {next}");
            next += 1;
        }
    }
    ensure!(
        next == LINES + 1,
        "{} of {LINES} lines in {} files",
        next - 1,
        files.len()
    );
    ensure!(files.len() > 2, "the writer was too fast to be rotated");
    node.finish().await
}

async fn reopen_of_an_exited_container_makes_no_file() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("late", &node.logs);
    let pod = node.run_pod(&config).await?;
    let id = node
        .run_container(&pod, &request::container("main", "true"), &config)
        .await?;
    let status = node.wait_exit(&id, Duration::from_secs(10)).await?;
    std::fs::rename(&status.log_path, format!("{}.old", status.log_path))?;
    let request = ReopenContainerLogRequest {
        container_id: id.clone(),
    };
    ensure!(
        node.runtime().reopen_container_log(request).await.is_err(),
        "it was reopened"
    );
    ensure!(
        !std::path::Path::new(&status.log_path).exists(),
        "a new file was made"
    );
    node.finish().await
}
