//! Port-forward, in its three forms.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::client::{Frame, Socket, Spdy, data};
use super::fake::{Fixture, Local};
use crate::link::{Link, Wire};
use crate::portforward::{Room, serve};
use crate::shares::Shares;
use crate::{Limits, PortForwardRequest};

const PROTOCOL: &str = "portforward.k8s.io";

/// A listener whose connections are given to a function.
pub(super) async fn listen<F, R>(serve: F) -> u16
where
    F: Fn(TcpStream) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(serve(socket));
        }
    });
    port
}

pub(super) async fn echo(mut socket: TcpStream) {
    let (mut read, mut write) = socket.split();
    let _ = tokio::io::copy(&mut read, &mut write).await;
    let _ = write.shutdown().await;
}

/// Opens the pair of one connection: (error, data).
pub(super) async fn pair(client: &mut Spdy, port: u16, id: u32) -> (u32, u32) {
    let (port, id) = (port.to_string(), id.to_string());
    let headers = |kind| {
        [
            ("streamtype", kind),
            ("port", port.as_str()),
            ("requestid", id.as_str()),
        ]
    };
    let error = client.open(&headers("error")).await;
    client.data(error, b"", true).await;
    (error, client.open(&headers("data")).await)
}

/// Reads frames until these streams are over; the data of each.
pub(super) async fn until_over(client: &mut Spdy, streams: &[u32]) -> Vec<Vec<u8>> {
    let mut got = vec![Vec::new(); streams.len()];
    let mut over = vec![false; streams.len()];
    let mut early = std::mem::take(&mut client.early).into_iter();
    while over.contains(&false) {
        let frame = match early.next() {
            Some(frame) => frame,
            None => client.read().await.unwrap(),
        };
        let (stream, bytes, last) = match frame {
            Frame::Data(stream, bytes, last) => (stream, bytes, last),
            Frame::Reset(stream) => (stream, Vec::new(), true),
            _ => continue,
        };
        let at = streams.iter().position(|s| *s == stream).unwrap();
        got[at].extend(bytes);
        over[at] |= last;
    }
    got
}

#[tokio::test]
async fn connections_are_pairs_and_each_side_closes_its_own() {
    let fixture = Fixture::start().await;
    let port = listen(echo).await;
    let mut client = Spdy::connect(&fixture.forward(&[]), PROTOCOL).await;
    // answers after the client's end: half-close
    let (first_error, first) = pair(&mut client, port, 0).await;
    let (second_error, second) = pair(&mut client, port, 1).await;
    client.data(second, b"two", false).await;
    client.data(first, b"one", true).await;
    client.data(second, b" and more", true).await;
    let got = until_over(&mut client, &[first, first_error, second, second_error]).await;
    assert_eq!(got, [&b"one"[..], b"", b"two and more", b""]);
}

#[tokio::test]
async fn a_target_that_closes_first_is_told_and_the_session_goes_on() {
    let fixture = Fixture::start().await;
    let port = listen(|mut socket| async move {
        let _ = socket.write_all(b"bye").await;
    })
    .await;
    let mut client = Spdy::connect(&fixture.forward(&[port]), PROTOCOL).await;
    for id in 0..3 {
        let (error, stream) = pair(&mut client, port, id).await;
        assert_eq!(until_over(&mut client, &[stream]).await, [b"bye"]);
        // as Go's client does once it has read everything
        let reset = [stream.to_be_bytes(), 5u32.to_be_bytes()].concat();
        client.send(&super::client::control(3, 0, &reset)).await;
        assert_eq!(until_over(&mut client, &[error]).await, [b""]);
    }
}

/// A client before Kubernetes 1.32: it lets go of its own side only when both of our streams have ended.
#[tokio::test]
async fn a_target_that_ends_first_ends_the_connection_of_old_clients_too() {
    let fixture = Fixture::start().await;
    let closes = listen(|mut socket| async move {
        let _ = socket.write_all(b"bye").await;
    })
    .await;
    // it says that it has no more to say, and never listens
    let deaf = listen(|mut socket| async move {
        let _ = socket.write_all(b"bye").await;
        let _ = socket.shutdown().await;
        std::future::pending::<()>().await;
    })
    .await;
    let resets = listen(|socket| async move {
        let _ = socket.set_zero_linger();
    })
    .await;
    let mut client = Spdy::connect(&fixture.forward(&[]), PROTOCOL).await;
    for (id, port, said) in [(0, closes, &b"bye"[..]), (1, deaf, b"bye"), (2, resets, b"")] {
        let (error, stream) = pair(&mut client, port, id).await;
        // no text: older clients end with the first one
        assert_eq!(until_over(&mut client, &[stream, error]).await, [said, b""]);
        client.data(stream, b"", true).await;
    }
    // what it has sent before is still given to the target
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let listens = listen(move |mut socket| {
        let told = told.clone();
        async move {
            let _ = socket.shutdown().await;
            let mut bytes = Vec::new();
            let _ = socket.read_to_end(&mut bytes).await;
            let _ = told.send(bytes);
        }
    })
    .await;
    let (error, stream) = pair(&mut client, listens, 3).await;
    client.data(stream, b"last words", false).await;
    assert_eq!(until_over(&mut client, &[stream, error]).await, [b"", b""]);
    client.data(stream, b"", true).await;
    assert_eq!(heard.recv().await.unwrap(), b"last words");
}

#[tokio::test]
async fn a_target_that_ends_and_does_not_listen_holds_up_no_other() {
    let fixture = Fixture::with(Limits {
        drain: Duration::from_millis(200),
        ..Limits::default()
    })
    .await;
    let deaf = listen(|mut socket| async move {
        let _ = socket.shutdown().await;
        std::future::pending::<()>().await;
    })
    .await;
    let good = listen(echo).await;
    let mut client = Spdy::connect(&fixture.forward(&[]), PROTOCOL).await;
    let (error, stream) = pair(&mut client, deaf, 0).await;
    assert_eq!(until_over(&mut client, &[stream, error]).await, [b"", b""]);
    // more than waits for a target, and than the socket to it takes
    let chunk = vec![0; 1 << 20];
    for _ in 0..24 {
        client.data(stream, &chunk, false).await;
    }
    let (_, stream) = pair(&mut client, good, 1).await;
    client.data(stream, b"still", true).await;
    assert_eq!(until_over(&mut client, &[stream]).await, [b"still"]);
}

#[tokio::test]
async fn connections_into_a_pod_have_a_bound_over_all_its_sessions() {
    let fixture = Fixture::with(Limits {
        forwards_of_one: 2,
        ..Limits::default()
    })
    .await;
    let port = listen(echo).await;
    let mut first = Spdy::connect(&fixture.forward(&[]), PROTOCOL).await;
    let mut second = Spdy::connect(&fixture.forward(&[]), PROTOCOL).await;
    let (_, one) = pair(&mut first, port, 0).await;
    let (_, two) = pair(&mut second, port, 0).await;
    for (client, stream) in [(&mut first, one), (&mut second, two)] {
        client.data(stream, b"here", false).await;
        assert_eq!(
            client.read().await,
            Some(Frame::Data(stream, b"here".to_vec(), false))
        );
    }
    let (error, stream) = pair(&mut second, port, 1).await;
    let got = until_over(&mut second, &[error, stream]).await;
    let text = String::from_utf8_lossy(&got[0]);
    assert!(
        text.contains("pod pod has 2 forwarded connections already"),
        "{text}"
    );
    // one ends, and there is room
    first.data(one, b"", true).await;
    until_over(&mut first, &[one]).await;
    let mut id = 2;
    loop {
        let (error, stream) = pair(&mut second, port, id).await;
        second.data(stream, b"here", true).await;
        let got = until_over(&mut second, &[error, stream]).await;
        if got[1] == b"here" {
            break;
        }
        id += 1;
    }
    let small = Limits::within(1024);
    assert_eq!((small.sessions, small.forwards, small.pending), (64, 256, 64));
    assert_eq!(Limits::within(u64::MAX), Limits::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_without_a_share_of_memory_goes_on_with_little() {
    let fixture = Fixture::with(Limits {
        memory_of_one: 0,
        ..Limits::default()
    })
    .await;
    let port = listen(echo).await;
    let url = fixture.forward(&[]);
    let mut client = Spdy::connect(&url, PROTOCOL).await;
    let mut streams = Vec::new();
    for id in 0..10 {
        let (error, stream) = pair(&mut client, port, id).await;
        streams.extend([stream, error]);
    }
    let piece = vec![5; 100_000];
    for stream in streams.iter().step_by(2) {
        client.data(*stream, &piece, true).await;
    }
    let got = until_over(&mut client, &streams).await;
    assert!(got.iter().step_by(2).all(|bytes| *bytes == piece));
}

#[tokio::test]
async fn a_share_of_memory_is_kept_to_the_end_of_the_session() {
    let memory = Shares::new("bytes", 80 << 20, 6 << 20);
    let room = Room {
        connections: Shares::new("connections", 80, 8),
        memory: Arc::clone(&memory),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (served, _) = listener.accept().await.unwrap();
    let link = Link::new(crate::transport::Socket::Left(served), &[], Wire::Spdy, 16).unwrap();
    let session = tokio::spawn(async move {
        let request = PortForwardRequest {
            pod: "pod".to_owned(),
            ports: Vec::new(),
        };
        serve(link, &request, Local::new(), &room, &Limits::default()).await
    });
    let port = listen(echo).await;
    let mut client = Spdy::over(socket);
    let (error, stream) = pair(&mut client, port, 0).await;
    client.data(stream, b"here", true).await;
    assert_eq!(
        until_over(&mut client, &[stream, error]).await,
        [&b"here"[..], b""]
    );
    // it has 4.75 MiB
    memory.take("pod", 1536 << 10).unwrap_err();
    memory.take("pod", 1 << 20).unwrap();
    drop(client);
    session.await.unwrap().unwrap_err();
    memory.take("pod", 6 << 20).unwrap();
}

#[tokio::test]
async fn a_refused_port_is_an_error_text_and_not_the_end() {
    let fixture = Fixture::start().await;
    let free = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().port()
    };
    let good = listen(echo).await;
    let mut client = Spdy::connect(&fixture.forward(&[free, good]), PROTOCOL).await;
    let (error, stream) = pair(&mut client, free, 0).await;
    let got = until_over(&mut client, &[error, stream]).await;
    let text = String::from_utf8(got[0].clone()).unwrap();
    assert!(
        text.starts_with(&format!("error forwarding port {free} to pod pod: connect")),
        "{text}"
    );
    assert!(text.contains("refused"), "{text}");
    let (error, stream) = pair(&mut client, 1, 1).await;
    let got = until_over(&mut client, &[error, stream]).await;
    assert!(String::from_utf8_lossy(&got[0]).contains("not one of the request's"));
    let (error, stream) = pair(&mut client, good, 2).await;
    client.data(stream, b"still", true).await;
    assert_eq!(until_over(&mut client, &[error, stream]).await[1], b"still");
}

#[tokio::test]
async fn streams_that_make_no_pair_are_refused_or_expire() {
    let fixture = Fixture::with(Limits {
        handshake: Duration::from_millis(300),
        ..Limits::default()
    })
    .await;
    let mut client = Spdy::connect(&fixture.forward(&[]), PROTOCOL).await;
    for headers in [
        &[("streamtype", "data")][..],
        &[("streamtype", "data"), ("port", "0")],
        &[("streamtype", "data"), ("port", "70000")],
        &[("streamtype", "stdin"), ("port", "80")],
    ] {
        let (stream, frame) = client.syn(headers, 0);
        client.send(&frame).await;
        assert_eq!(client.read().await, Some(Frame::Reset(stream)));
    }
    let error = client
        .open(&[("streamtype", "error"), ("port", "80"), ("requestid", "5")])
        .await;
    let twice = client.syn(&[("streamtype", "error"), ("port", "80"), ("requestid", "5")], 0);
    client.send(&twice.1).await;
    assert_eq!(client.read().await, Some(Frame::Reset(twice.0)));
    let got = until_over(&mut client, &[error]).await;
    assert_eq!(got[0], b"timed out waiting for the data stream of request 5");
    // the session is still there; and old clients give no request id
    let port = listen(echo).await.to_string();
    let error = client.open(&[("streamtype", "error"), ("port", &port)]).await;
    let stream = client.open(&[("streamtype", "data"), ("port", &port)]).await;
    client.data(stream, b"old", true).await;
    assert_eq!(until_over(&mut client, &[stream, error]).await[0], b"old");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_connections_at_once() {
    let fixture = Fixture::start().await;
    let port = listen(echo).await;
    let mut client = Spdy::connect(&fixture.forward(&[]), PROTOCOL).await;
    let mut streams = Vec::new();
    for id in 0..100 {
        streams.push(pair(&mut client, port, id).await.1);
    }
    for (at, stream) in streams.iter().enumerate() {
        client
            .data(*stream, &vec![u8::try_from(at).unwrap(); 10_000], true)
            .await;
    }
    let mut got = vec![0; 100];
    while got.iter().any(|n| *n < 10_000) {
        if let Frame::Data(stream, bytes, _) = client.read().await.unwrap()
            && let Some(at) = streams.iter().position(|s| *s == stream)
        {
            assert!(bytes.iter().all(|byte| usize::from(*byte) == at));
            got[at] += bytes.len();
        }
    }
}

#[tokio::test]
async fn a_target_that_does_not_read_stops_the_client_and_not_the_memory() {
    let fixture = Fixture::start().await;
    let port = listen(|socket| async move {
        std::future::pending::<()>().await;
        drop(socket);
    })
    .await;
    let mut client = Spdy::connect(&fixture.forward(&[]), PROTOCOL).await;
    let (_, stream) = pair(&mut client, port, 0).await;
    let chunk = vec![0; 1 << 20];
    let mut sent = 0;
    while tokio::time::timeout(Duration::from_millis(500), client.data(stream, &chunk, false))
        .await
        .is_ok()
    {
        sent += 1;
        assert!(sent < 60, "{sent} MiB and no end");
    }
    // others are not served now, but the end of the client is seen
    drop(client);
    let dialled = || fixture.local.dialled.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(dialled(), 1);
}

#[tokio::test]
async fn channels_begin_with_their_port() {
    let fixture = Fixture::start().await;
    let (port, other) = (listen(echo).await, listen(echo).await);
    let mut client = Socket::connect(&fixture.forward(&[port, other]), "v4.channel.k8s.io").await;
    for (channel, port) in [(0, port), (1, port), (2, other), (3, other)] {
        let expected = [&[channel][..], &port.to_le_bytes()].concat();
        assert_eq!(client.read().await, Some((2, expected)));
    }
    client.send(2, b"\x02two").await;
    assert_eq!(client.read().await, Some((2, b"\x02two".to_vec())));
    client.send(2, b"\x00one").await;
    assert_eq!(client.read().await, Some((2, b"\x00one".to_vec())));
    client.send(8, &1000u16.to_be_bytes()).await;
    assert_eq!(client.rest().await.1, Some(1000));
}

#[tokio::test]
async fn channels_in_base64_end_with_their_last_connection() {
    let fixture = Fixture::start().await;
    let port = listen(|mut socket| async move {
        let mut bytes = [0; 4];
        let _ = socket.read_exact(&mut bytes).await;
        let _ = socket.write_all(b"pong").await;
    })
    .await;
    let mut client = Socket::connect(&fixture.forward(&[port]), "v4.base64.channel.k8s.io").await;
    client.send(1, b"0cGluZw==").await;
    let (channels, status) = client.rest().await;
    assert!(channels[&b'0'].ends_with(b"cG9uZw=="), "{channels:?}");
    assert_eq!(status, Some(1000));
}

#[tokio::test]
async fn spdy_goes_through_a_websocket() {
    let fixture = Fixture::start().await;
    let port = listen(echo).await.to_string();
    let mut socket = Socket::connect(&fixture.forward(&[]), "SPDY/3.1+portforward.k8s.io").await;
    let mut frames = Spdy::over(TcpStream::connect(fixture.server.address()).await.unwrap());
    let (error, first) = frames.syn(&[("streamtype", "error"), ("port", &port), ("requestid", "1")], 0);
    let (stream, second) = frames.syn(&[("streamtype", "data"), ("port", &port), ("requestid", "1")], 0);
    // cut where no frame ends
    let all = [first, second, data(stream, b"through", true)].concat();
    for part in all.chunks(7) {
        socket.send(2, part).await;
    }
    let mut got = Vec::new();
    let expected = [
        data(stream, b"through", false),
        data(stream, b"", true),
        data(error, b"", true),
    ]
    .concat();
    while !got.ends_with(&expected) {
        let (opcode, payload) = socket.read().await.unwrap();
        assert_eq!(opcode, 2);
        got.extend(payload);
    }
    socket.send(9, b"still there?").await;
    assert_eq!(socket.read().await, Some((10, b"still there?".to_vec())));
}
