//! What the calls refuse, what the URLs refuse, and those who only make noise at the port: nobody else notices.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{Node, Options, request, stretched};
use coracle_proto::cri::{AttachRequest, ExecRequest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::Code;

use crate::streams::{Stage, TRANSPORTS, exec_url, expect, forward_url, line_with, lines_of, noise, run};
use crate::support::eventually;

crate::tests![
    calls_that_cannot_be,
    urls_are_good_once_and_for_their_purpose,
    a_pod_has_so_many_sessions,
    pods_that_take_all_they_can_leave_some_to_others,
    noise_at_the_port_disturbs_nobody,
];

/// What a SPDY client sends.
const SPDY: &str =
    "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n";

async fn running(name: &str) -> Result<(Node, String, String)> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod(name, &node.logs);
    let pod = node.run_pod(&config).await?;
    let container = request::container("main", "sleep 1000");
    let id = node.run_container(&pod, &container, &config).await?;
    Ok((node, pod, id))
}

async fn calls_that_cannot_be() -> Result<()> {
    let (node, pod, id) = running("refused").await?;
    let exec = ExecRequest {
        container_id: id.clone(),
        cmd: vec!["true".to_owned()],
        stdout: true,
        ..Default::default()
    };
    let attach = AttachRequest {
        container_id: id.clone(),
        stdout: true,
        ..Default::default()
    };
    let execs: [(&str, ExecRequest, Code); 6] = [
        (
            "a terminal with errors of its own",
            ExecRequest {
                tty: true,
                stderr: true,
                ..exec.clone()
            },
            Code::InvalidArgument,
        ),
        (
            "no stream",
            ExecRequest {
                stdout: false,
                ..exec.clone()
            },
            Code::InvalidArgument,
        ),
        (
            "no command",
            ExecRequest {
                cmd: Vec::new(),
                ..exec.clone()
            },
            Code::InvalidArgument,
        ),
        (
            "no id",
            ExecRequest {
                container_id: String::new(),
                ..exec.clone()
            },
            Code::NotFound,
        ),
        (
            "an unknown id",
            ExecRequest {
                container_id: "a".repeat(64),
                ..exec.clone()
            },
            Code::NotFound,
        ),
        (
            "a pod's id",
            ExecRequest {
                container_id: pod.clone(),
                ..exec.clone()
            },
            Code::NotFound,
        ),
    ];
    for (what, request, code) in execs {
        let error = node
            .runtime()
            .exec(request)
            .await
            .err()
            .with_context(|| what.to_owned())?;
        ensure!(
            error.code() == code && !error.message().is_empty(),
            "{what}: {error}"
        );
    }
    let attaches: [(&str, AttachRequest, Code); 3] = [
        (
            "a terminal with errors of its own",
            AttachRequest {
                tty: true,
                stderr: true,
                ..attach.clone()
            },
            Code::InvalidArgument,
        ),
        (
            "no stream",
            AttachRequest {
                stdout: false,
                ..attach.clone()
            },
            Code::InvalidArgument,
        ),
        (
            "an unknown id",
            AttachRequest {
                container_id: "a".repeat(64),
                ..attach.clone()
            },
            Code::NotFound,
        ),
    ];
    for (what, request, code) in attaches {
        let error = node
            .runtime()
            .attach(request)
            .await
            .err()
            .with_context(|| what.to_owned())?;
        ensure!(
            error.code() == code && !error.message().is_empty(),
            "{what}: {error}"
        );
    }
    for port in [0, 70_000, 65_536, -1, i32::MIN] {
        let error = forward_url(&node, &pod, &[80, port]).await.unwrap_err();
        ensure!(error.code() == Code::InvalidArgument, "{port}: {error}");
        ensure!(error.message().contains(&port.to_string()), "{port}: {error}");
    }
    let error = forward_url(&node, &"a".repeat(64), &[]).await.unwrap_err();
    ensure!(error.code() == Code::NotFound, "{error}");
    // One that was made and one that has ended.
    let config = request::pod("second", &node.logs);
    let second = node.run_pod(&config).await?;
    let created = node
        .create(&second, &request::container("created", "true"), &config)
        .await?;
    for _ in ["created", "exited"] {
        for error in [
            exec_url(&node, &created, &["true"], false, false)
                .await
                .unwrap_err(),
            node.runtime()
                .attach(AttachRequest {
                    container_id: created.clone(),
                    ..attach.clone()
                })
                .await
                .unwrap_err(),
        ] {
            ensure!(error.code() == Code::FailedPrecondition, "{error}");
            ensure!(error.message().contains("not running"), "{error}");
        }
        if node.start_container(&created).await.is_ok() {
            node.wait_exit(&created, Duration::from_secs(10)).await?;
        }
    }
    node.stop_pod(&second).await?;
    let error = forward_url(&node, &second, &[]).await.unwrap_err();
    ensure!(error.code() == Code::FailedPrecondition, "{error}");
    node.finish().await
}

/// Host and path of a URL.
fn parts(url: &str) -> Result<(&str, &str)> {
    let rest = url.strip_prefix("http://").context("another scheme")?;
    let slash = rest.find('/').context("no path")?;
    Ok(rest.split_at(slash))
}

/// Sends a request for an upgrade; the answer's head and what follows soon, and the connection.
async fn ask(url: &str, method: &str, headers: &str) -> Result<(String, TcpStream)> {
    let (host, path) = parts(url)?;
    let mut socket = TcpStream::connect(host).await?;
    let text = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n");
    socket.write_all(text.as_bytes()).await?;
    let mut answer = Vec::new();
    let read = async {
        // An upgrade ends with its head, everything else with the connection.
        while !(answer.starts_with(b"HTTP/1.1 101") && answer.ends_with(b"\r\n\r\n")) {
            if socket.read_buf(&mut answer).await? == 0 {
                break;
            }
        }
        Ok::<_, std::io::Error>(())
    };
    let read = tokio::time::timeout(stretched(Duration::from_secs(10)), read).await;
    read.context("no answer")??;
    Ok((String::from_utf8_lossy(&answer).into_owned(), socket))
}

async fn urls_are_good_once_and_for_their_purpose() -> Result<()> {
    let (node, pod, id) = running("urls").await?;
    let new = async || exec_url(&node, &id, &["true"], false, false).await;
    let expect = async |url: &str, method: &str, headers: &str, code: u16, text: &str| -> Result<()> {
        let (answer, _socket) = ask(url, method, headers).await?;
        ensure!(
            answer.starts_with(&format!("HTTP/1.1 {code} ")) && answer.contains(text),
            "{method} {headers}: {answer}"
        );
        Ok(())
    };
    let url = new().await?;
    let (host, path) = parts(&url)?;
    ensure!(
        host.starts_with("127.0.0.1:") && path.len() == "/exec/".len() + 64,
        "{url}"
    );
    // A URL is for one attempt, whatever comes of it.
    let upgrade = "Connection: Upgrade\r\n";
    let socket = format!("{upgrade}Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n");
    let unknown =
        format!("{socket}Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v9\r\n");
    for (method, headers, code, text) in [
        ("GET", String::new(), 400, "expected a POST or GET"),
        ("PUT", SPDY.to_owned(), 400, "got a PUT"),
        ("POST", format!("{upgrade}Upgrade: h2c\r\n"), 400, "h2c"),
        (
            "POST",
            format!("{upgrade}Upgrade: SPDY/3.1\r\n"),
            400,
            "names no protocol",
        ),
        (
            "POST",
            SPDY.replace("v4.channel", "v9.channel"),
            403,
            "server accepts v4.channel.k8s.io",
        ),
        ("GET", socket, 400, "sec-websocket-key"),
        ("GET", unknown, 403, "server accepts v5.channel.k8s.io"),
    ] {
        let url = new().await?;
        expect(&url, method, &headers, code, text).await?;
        expect(&url, "POST", SPDY, 404, "used already").await?;
    }
    // A little different: there is none.
    for other in [
        format!("{url}0"),
        url[..url.len() - 1].to_owned(),
        format!("http://{host}/exec/{}", "0".repeat(64)),
        format!("http://{host}/"),
        format!("http://{host}/exec/../{path}"),
    ] {
        expect(&other, "POST", SPDY, 404, "no such session").await?;
    }
    expect(&url, "POST", SPDY, 101, "v4.channel.k8s.io").await?;
    expect(&url, "POST", SPDY, 404, "used already").await?;
    // Of another kind.
    for kind in ["/attach/", "/portforward/"] {
        let url = new().await?.replace("/exec/", kind);
        expect(&url, "POST", SPDY, 404, "no such session").await?;
    }
    let url = forward_url(&node, &pod, &[]).await?;
    expect(&url, "POST", SPDY, 403, "server accepts portforward.k8s.io").await?;
    let url = forward_url(&node, &pod, &[]).await?;
    let forward = SPDY.replace("v4.channel.k8s.io", "portforward.k8s.io");
    expect(&url, "POST", &forward, 101, "portforward.k8s.io").await?;
    expect(&url, "POST", &forward, 404, "used already").await?;
    // Every URL is another one.
    ensure!(new().await? != new().await?, "two are the same");
    node.finish().await
}

async fn a_pod_has_so_many_sessions() -> Result<()> {
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("many", &node.logs);
    let pod = node.run_pod(&config).await?;
    let run = async |name| {
        let container = request::container(name, "sleep 1000");
        node.run_container(&pod, &container, &config).await
    };
    let (id, second) = (run("main").await?, run("second").await?);
    let mut sessions = Vec::new();
    // Those of all of its containers, and URLs that wait.
    for number in 0..60 {
        let id = [&id, &second][number % 2];
        let url = exec_url(&node, id, &["sleep", "1000"], false, false).await?;
        let (answer, socket) = ask(&url, "POST", SPDY).await?;
        ensure!(answer.starts_with("HTTP/1.1 101 "), "{number}: {answer}");
        sessions.push(socket);
    }
    let mut urls = Vec::new();
    for _ in 0..4 {
        urls.push(forward_url(&node, &pod, &[]).await?);
    }
    for refused in [
        exec_url(&node, &second, &["true"], false, false).await,
        forward_url(&node, &pod, &[]).await,
    ] {
        let refused = refused.unwrap_err();
        ensure!(refused.code() == Code::ResourceExhausted, "{refused}");
        let text = format!("pod {pod} has 64 streaming sessions already");
        ensure!(refused.message().contains(&text), "{refused}");
    }
    // Others have their own.
    let config = request::pod("other", &node.logs);
    let other = node.run_pod(&config).await?;
    forward_url(&node, &other, &[]).await?;
    // One goes, and there is room for one; what waits is served.
    sessions.pop();
    eventually(async || {
        exec_url(&node, &id, &["true"], false, false).await?;
        Ok(())
    })
    .await?;
    let forward = SPDY.replace("v4.channel.k8s.io", "portforward.k8s.io");
    for url in &urls {
        let (answer, _socket) = ask(url, "POST", &forward).await?;
        ensure!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    }
    node.finish().await
}

async fn pods_that_take_all_they_can_leave_some_to_others() -> Result<()> {
    let (node, first, id) = running("greedy").await?;
    let mut pods = vec![first];
    for number in 0..19 {
        let config = request::pod(&format!("greedy{number}"), &node.logs);
        pods.push(node.run_pod(&config).await?);
    }
    let last = pods.pop().context("no pods")?;
    let mut taken = 0;
    for _ in 0..64 {
        for pod in &pods[1..] {
            taken += usize::from(forward_url(&node, pod, &[]).await.is_ok());
        }
    }
    ensure!((600..1000).contains(&taken), "{taken}");
    let refused = forward_url(&node, &pods[1], &[]).await.unwrap_err();
    ensure!(refused.code() == Code::ResourceExhausted, "{refused}");
    // A pod that has none has as many as each of them.
    for _ in 0..20 {
        forward_url(&node, &last, &[]).await?;
    }
    let url = exec_url(&node, &id, &["true"], false, false).await?;
    let (answer, _) = ask(&url, "POST", SPDY).await?;
    ensure!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    node.finish().await
}

async fn noise_at_the_port_disturbs_nobody() -> Result<()> {
    let script = "n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.05; done";
    let Some(stage) = Stage::start("noise", "sleep 1000").await? else {
        return Ok(());
    };
    let before = stage.cost().await?;
    let url = exec_url(&stage.node, &stage.id, &["true"], false, false).await?;
    let (host, path) = parts(&url)?;
    let mut session = stage
        .exec(&[TRANSPORTS[1]], &["sh", "-c", script])
        .await?
        .spawn()?;
    let mut lines = lines_of(session.stdout.take())?;
    line_with(&mut lines, "tick 1").await?;
    let mut open = Vec::new();
    // More of them than may wait: those that say nothing, half a request, and bytes.
    for number in 0..300 {
        let mut socket = TcpStream::connect(host).await?;
        let bytes = match number % 3 {
            0 => Vec::new(),
            1 => format!("POST {path} HTTP/1.1\r\nHost: x\r\nConn").into_bytes(),
            _ => noise(4096, number + 1),
        };
        // It may be thrown out already.
        let _ = socket.write_all(&bytes).await;
        open.push(socket);
        if number % 50 == 0 {
            works(&stage).await?;
        }
    }
    let now = stage.cost().await?;
    ensure!(
        now.daemon_fds < before.daemon_fds + 160,
        "before {before:?}, now {now:?}"
    );
    // A head without end.
    let mut socket = TcpStream::connect(host).await?;
    let _ = socket
        .write_all(format!("POST {path} HTTP/1.1\r\nX: ").as_bytes())
        .await;
    let mut sent = 0;
    while sent < 10 << 20 && socket.write_all(&[b'x'; 64 << 10]).await.is_ok() {
        sent += 64 << 10;
    }
    ensure!(sent < 10 << 20, "all of it was taken");
    // Ten thousand headers.
    let headers: String = (0..10_000).map(|number| format!("X-{number}: y\r\n")).collect();
    if let Ok((answer, _)) = ask(&url, "POST", &headers).await {
        ensure!(!answer.starts_with("HTTP/1.1 101"), "{answer}");
    }
    works(&stage).await?;
    // Upgraded, and then bytes that are no frames, in great number.
    for number in 0..20 {
        let url = exec_url(&stage.node, &stage.id, &["cat"], false, true).await?;
        let (answer, mut socket) = ask(&url, "POST", SPDY).await?;
        ensure!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        let _ = socket.write_all(&noise(1 << 20, number + 99)).await;
        open.push(socket);
    }
    works(&stage).await?;
    let first = line_with(&mut lines, "tick").await?;
    let later = line_with(&mut lines, "tick").await?;
    ensure!(first != later, "it stands still");
    // The URL that all of it was thrown at is good still.
    let (answer, _) = ask(&url, "POST", SPDY).await?;
    ensure!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    drop(open);
    session.kill().await?;
    stage.settled(before).await?;
    let now = stage.cost().await?;
    ensure!(
        now.daemon_kib < before.daemon_kib + (8 << 10),
        "before {before:?}, now {now:?}"
    );
    stage.node.finish().await
}

async fn works(stage: &Stage) -> Result<()> {
    for transport in TRANSPORTS {
        let output = run(&mut stage.exec(&[transport], &["echo", "here"]).await?, b"").await?;
        expect(&output, "here\n", "", 0).with_context(|| transport.to_owned())?;
    }
    Ok(())
}
