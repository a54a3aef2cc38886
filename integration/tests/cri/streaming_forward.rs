//! Port-forward over streaming URLs: to servers inside a pod, many, big, slow, gone.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{request, stretched};
use coracle_kernel::signal::Signal;
use coracle_proto::cri::NamespaceMode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::streams::{
    Stage, at_rest, converse, echo, ended, forward_url, line_with, lines_of, listen_in, netns, noise, sha256,
    signal,
};
use crate::support::{eventually, join_all, namespace_options};

crate::tests![
    a_hundred_megabytes_each_way,
    eight_at_once,
    two_hundred_connections,
    a_port_that_is_closed_is_named,
    a_client_that_does_not_read_stops_its_server_alone,
    either_end_ends_a_connection,
    a_server_that_ends_first_ends_one_connection,
    a_pod_of_the_hosts_network,
    a_pod_that_stops_ends_its_connections,
    other_ports_than_those_asked_for_are_refused,
];

/// SPDY alone, and SPDY inside a WebSocket.
const TRANSPORTS: [&str; 2] = ["--transport=spdy", "--transport=tunnel"];

/// A server that gives back what comes, in the pod; its port.
fn echoing(stage: &Stage) -> Result<u16> {
    let listener = listen_in(&netns(&stage.pod)?)?;
    let port = listener.local_addr()?.port();
    tokio::spawn(echo(listener));
    Ok(port)
}

async fn a_hundred_megabytes_each_way() -> Result<()> {
    let Some(stage) = Stage::start("bulk", "sleep 1000").await? else {
        return Ok(());
    };
    let port = echoing(&stage)?;
    let bytes = noise(100_000_000, 3);
    for transport in TRANSPORTS {
        let forward = stage.forward(transport, &[port]).await?;
        let begun = Instant::now();
        let back = converse(forward.addresses[0], &bytes).await?;
        ensure!(
            back.len() == bytes.len() && sha256(&back) == sha256(&bytes),
            "{transport}: {} bytes",
            back.len()
        );
        println!(
            "    100 MB there and back {transport}: {:.1} s",
            begun.elapsed().as_secs_f64()
        );
    }
    stage.node.finish().await
}

async fn eight_at_once() -> Result<()> {
    let Some(stage) = Stage::start("eight", "sleep 1000").await? else {
        return Ok(());
    };
    let port = echoing(&stage)?;
    let before = stage.cost().await?;
    let bytes = noise(12_500_000, 4);
    for transport in TRANSPORTS {
        // In one session, and in eight.
        let one = stage.forward(transport, &[port]).await?;
        let mut others = Vec::new();
        for _ in 0..8 {
            others.push(stage.forward(transport, &[port]).await?);
        }
        let addresses = others.iter().map(|forward| forward.addresses[0]);
        let all = addresses
            .chain([one.addresses[0]; 8])
            .map(|address| converse(address, &bytes));
        for back in join_all(all.collect()).await? {
            ensure!(back == bytes, "{transport}: something else came back");
        }
        drop((one, others));
        stage.settled(before).await?;
    }
    stage.node.finish().await
}

async fn two_hundred_connections() -> Result<()> {
    let Some(stage) = Stage::start("connections", "sleep 1000").await? else {
        return Ok(());
    };
    let port = echoing(&stage)?;
    for transport in TRANSPORTS {
        let before = stage.cost().await?;
        let mut forward = stage.forward(transport, &[port]).await?;
        let idle = stage.cost().await?;
        let address = forward.addresses[0];
        let mut sockets = Vec::new();
        for _ in 0..200 {
            sockets.push(TcpStream::connect(address).await?);
        }
        // All of them at once, and each its own bytes.
        for (number, socket) in sockets.iter_mut().enumerate() {
            socket
                .write_all(format!("connection {number}\n").as_bytes())
                .await?;
        }
        for (number, socket) in sockets.iter_mut().enumerate() {
            let wanted = format!("connection {number}\n");
            let mut got = vec![0; wanted.len()];
            let read = tokio::time::timeout(stretched(Duration::from_secs(20)), socket.read_exact(&mut got));
            read.await
                .with_context(|| format!("{transport}: {number} gave nothing"))??;
            ensure!(got == wanted.as_bytes(), "{transport}: {got:?}");
        }
        ensure!(
            stage.cost().await?.daemon_fds >= idle.daemon_fds + 200,
            "where are they?"
        );
        drop(sockets);
        stage.settled(idle).await?;
        // One after the other.
        for number in 0..200 {
            let wanted = format!("again {number}").into_bytes();
            ensure!(
                converse(address, &wanted).await? == wanted,
                "{transport}: {number}"
            );
        }
        forward.child.kill().await?;
        stage.settled(before).await?;
    }
    stage.node.finish().await
}

async fn a_port_that_is_closed_is_named() -> Result<()> {
    let Some(stage) = Stage::start("closed", "sleep 1000").await? else {
        return Ok(());
    };
    // Free a moment ago, and nobody else is in the pod.
    let closed = listen_in(&netns(&stage.pod)?)?.local_addr()?.port();
    let before = stage.cost().await?;
    for transport in TRANSPORTS {
        let mut forward = stage.forward(transport, &[closed]).await?;
        let back = converse(forward.addresses[0], b"anybody?").await;
        ensure!(back.as_ref().map_or(true, Vec::is_empty), "{transport}: {back:?}");
        // Clients of this version end with the first connection that is refused.
        let text = said(&mut forward.child).await?;
        let wanted = format!("error forwarding port {closed} to pod {}: ", stage.pod);
        ensure!(
            text.contains(&wanted) && text.contains("Connection refused"),
            "{transport}: {text}"
        );
    }
    stage.settled(before).await?;
    stage.node.finish().await
}

/// What a driver writes about what went wrong, up to the line that names a pod.
async fn said(child: &mut tokio::process::Child) -> Result<String> {
    let mut lines = lines_of(child.stderr.take())?;
    line_with(&mut lines, "error forwarding port").await
}

async fn a_client_that_does_not_read_stops_its_server_alone() -> Result<()> {
    let Some(stage) = Stage::start("unread", "sleep 1000").await? else {
        return Ok(());
    };
    let port = echoing(&stage)?;
    let source = listen_in(&netns(&stage.pod)?)?;
    let source_port = source.local_addr()?.port();
    let sent = std::rc::Rc::new(std::cell::Cell::new(0_u64));
    let counter = std::rc::Rc::clone(&sent);
    let flood = async move {
        while let Ok((mut socket, _)) = source.accept().await {
            while let Ok(count) = socket.write(&[0; 64 << 10]).await {
                counter.set(counter.get() + count as u64);
            }
        }
        Ok::<_, anyhow::Error>(())
    };
    let test = async {
        for transport in TRANSPORTS {
            let before = stage.cost().await?;
            let mut forward = stage.forward(transport, &[source_port]).await?;
            let other = stage.forward(transport, &[port]).await?;
            let begin = sent.get();
            let mut socket = TcpStream::connect(forward.addresses[0]).await?;
            let mut buffer = vec![0; 1 << 20];
            let mut got = 0;
            while got < 8 << 20 {
                got += socket.read(&mut buffer).await?;
            }
            signal(&forward.child, Signal::STOP)?;
            let stuck = at_rest(|| Ok(sent.get())).await?;
            let now = stage.cost().await?;
            ensure!(
                now.daemon_kib < before.daemon_kib + (32 << 10),
                "{transport}: {} bytes, before {before:?}, now {now:?}",
                stuck - begin
            );
            ensure!(
                converse(other.addresses[0], b"here").await? == b"here",
                "{transport}: others wait"
            );
            signal(&forward.child, Signal::CONT)?;
            while got < 64 << 20 {
                got += socket.read(&mut buffer).await?;
            }
            ensure!(sent.get() > stuck, "{transport}: it does not go on");
            drop((socket, other));
            forward.child.kill().await?;
            stage.settled(before).await?;
        }
        Ok(())
    };
    tokio::select! {
        ended = test => ended?,
        ended = flood => ended?,
    }
    stage.node.finish().await
}

async fn either_end_ends_a_connection() -> Result<()> {
    let Some(stage) = Stage::start("ends", "sleep 1000").await? else {
        return Ok(());
    };
    let server = listen_in(&netns(&stage.pod)?)?;
    let port = server.local_addr()?.port();
    let before = stage.cost().await?;
    for transport in TRANSPORTS {
        let forward = stage.forward(transport, &[port]).await?;
        let connect = async || -> Result<(TcpStream, TcpStream)> {
            let client = TcpStream::connect(forward.addresses[0]).await?;
            Ok((client, accept(&server).await?))
        };
        // The client has no more to say; the server learns it, and answers at length.
        let (mut client, mut inside) = connect().await?;
        client.write_all(b"question").await?;
        client.shutdown().await?;
        ensure!(
            all_of(&mut inside).await? == b"question",
            "{transport}: not the question"
        );
        let answer = noise(3_000_000, 5);
        let (sent, got) = tokio::join!(
            async {
                inside.write_all(&answer).await?;
                inside.shutdown().await
            },
            all_of(&mut client)
        );
        sent?;
        ensure!(got? == answer, "{transport}: not the answer");
        // The server has no more to say: the client gets all of it and its end.
        let (mut client, mut inside) = connect().await?;
        inside.write_all(&answer).await?;
        drop(inside);
        ensure!(all_of(&mut client).await? == answer, "{transport}: not all");
        // The client goes altogether: so it is for the server.
        let (client, mut inside) = connect().await?;
        drop(client);
        ensure!(
            all_of(&mut inside).await?.is_empty(),
            "{transport}: it said something"
        );
        // The session goes.
        let (mut client, mut inside) = connect().await?;
        drop(forward);
        // A reset is an end too.
        let (inside, outside) = tokio::join!(all_of(&mut inside), all_of(&mut client));
        ensure!(
            inside.map_or(true, |bytes| bytes.is_empty()),
            "the server got something"
        );
        ensure!(
            outside.map_or(true, |bytes| bytes.is_empty()),
            "the client got something"
        );
    }
    stage.settled(before).await?;
    stage.node.finish().await
}

async fn a_server_that_ends_first_ends_one_connection() -> Result<()> {
    let Some(stage) = Stage::start("first", "sleep 1000").await? else {
        return Ok(());
    };
    let good = echoing(&stage)?;
    let server = listen_in(&netns(&stage.pod)?)?;
    let port = server.local_addr()?.port();
    let before = stage.cost().await?;
    let answer = noise(300_000, 6);
    for transport in TRANSPORTS {
        // Those of today reset their stream, those before wait for the end of the other.
        for flags in [&[transport][..], &[transport, "--old"]] {
            let context = || format!("{flags:?}");
            let url = forward_url(&stage.node, &stage.pod, &[]).await?;
            let mut forward = stage.forward_to(&url, flags, &[port, good]).await?;
            for how in ["closes", "resets", "is deaf"].repeat(4) {
                let mut client = TcpStream::connect(forward.addresses[0]).await?;
                client.write_all(b"question").await?;
                let mut inside = accept(&server).await?;
                let mut question = [0; 8];
                inside.read_exact(&mut question).await?;
                if how == "resets" {
                    inside.set_zero_linger()?;
                } else {
                    inside.write_all(&answer).await?;
                }
                // Deaf: it has no more to say, is there still, and takes nothing.
                inside.shutdown().await?;
                let held = Some(inside).filter(|_| how == "is deaf");
                // The client says nothing of an end of its own.
                let got = all_of(&mut client).await;
                let got = got.with_context(context).with_context(|| how.to_owned())?;
                let wanted: &[u8] = if how == "resets" { b"" } else { &answer };
                ensure!(got == wanted, "{flags:?}, {how}: {} bytes", got.len());
                ensure!(
                    converse(forward.addresses[1], b"here").await? == b"here",
                    "{flags:?}, {how}: the session does not go on"
                );
                drop(held);
            }
            let mut lines = lines_of(forward.child.stderr.take())?;
            drop(forward);
            while let Some(line) = lines.next_line().await? {
                ensure!(
                    !line.contains("error") && !line.contains("lost"),
                    "{flags:?}: {line}"
                );
            }
        }
    }
    stage.settled(before).await?;
    stage.node.finish().await
}

async fn accept(server: &TcpListener) -> Result<TcpStream> {
    let accepted = tokio::time::timeout(stretched(Duration::from_secs(10)), server.accept()).await;
    Ok(accepted.context("nobody connects")??.0)
}

async fn all_of(socket: &mut TcpStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(stretched(Duration::from_secs(20)), socket.read_to_end(&mut bytes)).await;
    read.context("it does not end")??;
    Ok(bytes)
}

async fn a_pod_of_the_hosts_network() -> Result<()> {
    let Some(mut stage) = Stage::start("other", "sleep 1000").await? else {
        return Ok(());
    };
    let mut config = request::pod("host", &stage.node.logs);
    namespace_options(&mut config)?.network = NamespaceMode::Node.into();
    stage.pod = stage.node.run_pod(&config).await?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(echo(listener));
    for transport in TRANSPORTS {
        let forward = stage.forward(transport, &[port]).await?;
        ensure!(
            converse(forward.addresses[0], b"here").await? == b"here",
            "{transport}"
        );
    }
    stage.node.finish().await
}

async fn a_pod_that_stops_ends_its_connections() -> Result<()> {
    let script = "while :; do nc -l -p 8080 -e sh -c 'echo here; exec cat'; done";
    for transport in TRANSPORTS {
        let Some(stage) = Stage::start("stops", script).await? else {
            return Ok(());
        };
        let before = stage.cost().await?;
        let mut forward = None;
        let mut socket = None;
        // The server may not be there yet, and the client ends where it is not.
        eventually(async || {
            let new = stage.forward(transport, &[8080]).await?;
            socket = Some(greeted(new.addresses[0]).await?);
            forward = Some(new);
            Ok(())
        })
        .await?;
        let (mut forward, mut socket) = (forward.context("no session")?, socket.context("no connection")?);
        stage.node.stop_pod(&stage.pod).await?;
        let end = all_of(&mut socket).await;
        ensure!(end.as_ref().map_or(true, Vec::is_empty), "{transport}: {end:?}");
        // The next connection finds no pod, and the driver tells.
        let late = converse(forward.addresses[0], b"anybody?").await;
        ensure!(late.as_ref().map_or(true, Vec::is_empty), "{transport}: {late:?}");
        let text = said(&mut forward.child).await?;
        ensure!(text.contains("is not ready"), "{transport}: {text}");
        ended(&mut forward.child).await?;
        drop(forward);
        eventually(async || {
            let daemon = i32::try_from(stage.node.pid().context("no daemon")?)?;
            let now = std::fs::read_dir(format!("/proc/{daemon}/fd"))?.count();
            ensure!(
                now <= before.daemon_fds,
                "{now} descriptors, {} before",
                before.daemon_fds
            );
            Ok(())
        })
        .await?;
        let refused = forward_url(&stage.node, &stage.pod, &[]).await.unwrap_err();
        ensure!(refused.code() == tonic::Code::FailedPrecondition, "{refused}");
        stage.node.finish().await?;
    }
    Ok(())
}

/// A connection to a server that says something first.
async fn greeted(address: SocketAddr) -> Result<TcpStream> {
    let mut socket = TcpStream::connect(address).await?;
    let mut word = [0; 5];
    let read = tokio::time::timeout(stretched(Duration::from_secs(2)), socket.read_exact(&mut word));
    read.await.context("no greeting")??;
    ensure!(&word == b"here\n", "{word:?}");
    Ok(socket)
}

async fn other_ports_than_those_asked_for_are_refused() -> Result<()> {
    let Some(stage) = Stage::start("ports", "sleep 1000").await? else {
        return Ok(());
    };
    let port = echoing(&stage)?;
    for transport in TRANSPORTS {
        for (allowed, served) in [(port, true), (port ^ 1, false)] {
            let url = forward_url(&stage.node, &stage.pod, &[i32::from(allowed)]).await?;
            let mut forward = stage.forward_to(&url, &[transport], &[port]).await?;
            let back = converse(forward.addresses[0], b"here").await;
            ensure!(back.is_ok_and(|back| back == b"here") == served, "{transport}");
            if !served {
                let text = said(&mut forward.child).await?;
                ensure!(text.contains("not one of the request's"), "{transport}: {text}");
            }
        }
    }
    stage.node.finish().await
}
