//! Peers that break rules: they end their own session, and nothing else.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::client::{Frame, Socket, Spdy, control, data, refused, spdy_lines};
use super::fake::{Fixture, exec};
use crate::spdy::header::deflate::Deflater;
use crate::ws::frame::masked;
use crate::{Limits, StreamRequest};

const V4: &str = "v4.channel.k8s.io";

fn quick() -> Limits {
    Limits {
        handshake: Duration::from_millis(500),
        ..Limits::default()
    }
}

#[tokio::test]
async fn a_url_works_once_and_only_for_what_it_is() {
    let fixture = Fixture::start().await;
    let lines = spdy_lines(V4);
    let lines = lines.each_ref().map(String::as_str);
    let base = format!("http://{}", fixture.server.address());
    for wrong in [
        format!("{base}/"),
        format!("{base}/exec/short"),
        format!("{base}/exec/{}", "0".repeat(64)),
        fixture.exec("true", false, false) + "/more",
    ] {
        let (head, text) = refused("POST", &wrong, &lines).await;
        assert!(head.starts_with("http/1.1 404"), "{wrong}: {head}");
        assert!(text.contains("no such session"));
    }
    let url = fixture.exec("true", false, false);
    drop(Spdy::connect(&url, V4).await);
    let (head, _) = refused("POST", &url, &lines).await;
    assert!(head.starts_with("http/1.1 404"), "{head}");
}

#[tokio::test]
async fn a_request_that_is_refused_uses_its_url_up() {
    let fixture = Fixture::start().await;
    let lines = spdy_lines(V4);
    let lines = lines.each_ref().map(String::as_str);
    let other = [lines[0], lines[1], "X-Stream-Protocol-Version: v9"];
    for (method, kind, refused_lines, code, part) in [
        ("GET", "/exec/", &[][..], 400, "SPDY/3.1"),
        ("PUT", "/exec/", &lines[..], 400, "PUT"),
        ("POST", "/exec/", &other[..], 403, "v2.channel.k8s.io"),
        ("POST", "/attach/", &lines[..], 404, "no such session"),
    ] {
        let url = fixture.exec("true", false, false);
        let (head, text) = refused(method, &url.replace("/exec/", kind), refused_lines).await;
        assert!(
            head.starts_with(&format!("http/1.1 {code}")) && text.contains(part),
            "{head} {text}"
        );
        let (head, text) = refused("POST", &url, &lines).await;
        assert!(head.starts_with("http/1.1 404"), "{method} {kind}: {head} {text}");
    }
}

#[tokio::test]
async fn sessions_and_urls_of_a_pod_are_counted_together() {
    let fixture = Fixture::with(Limits {
        sessions_of_one: 3,
        ..Limits::default()
    })
    .await;
    let session = |pod: &str, container: &str| {
        let mut request = exec("sleep 1000", false, false);
        if let StreamRequest::Exec(exec) = &mut request {
            (exec.pod, exec.container) = (pod.to_owned(), container.to_owned());
        }
        fixture.server.url(request)
    };
    let first = Spdy::connect(&session("pod", "one").unwrap(), V4).await;
    let _second = session("pod", "two").unwrap();
    let refused_url = fixture.forward(&[]);
    let full = session("pod", "one").unwrap_err().to_string();
    assert!(
        full.contains("pod pod has 3 streaming sessions already"),
        "{full}"
    );
    session("other", "one").unwrap();
    // what an attempt that fails had is free again
    refused("GET", &refused_url, &[]).await;
    session("pod", "three").unwrap();
    session("pod", "three").unwrap_err();
    drop(first);
    // the place is free when the server has seen it
    while session("pod", "four").is_err() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn the_commands_of_waiting_requests_have_bounds() {
    let fixture = Fixture::start().await;
    let command = |pod: &str, bytes: usize| {
        let mut request = exec(&"x".repeat(bytes), false, false);
        if let StreamRequest::Exec(exec) = &mut request {
            exec.pod = pod.to_owned();
        }
        fixture.server.url(request)
    };
    command("pod", 5 << 20).unwrap_err();
    let urls = (0..60).map_while(|_| command("pod", 1 << 20).ok());
    assert_eq!(urls.count(), 3);
    command("other", 1 << 20).unwrap();
    // an attachment keeps nothing
    fixture.forward(&[]);
}

#[tokio::test]
async fn those_who_only_connect_are_closed_when_they_are_many_or_slow() {
    let fixture = Fixture::with(Limits {
        pending: 4,
        handshake: Duration::from_secs(20),
        ..Limits::default()
    })
    .await;
    let mut idle = Vec::new();
    for _ in 0..5 {
        idle.push(TcpStream::connect(fixture.server.address()).await.unwrap());
    }
    // the oldest
    let mut buffer = [0; 8];
    let end = tokio::time::timeout(Duration::from_secs(5), idle[0].read(&mut buffer));
    assert_eq!(end.await.expect("the oldest is kept").unwrap_or(0), 0);
    let url = fixture.exec("echo in", false, false);
    let mut client = Spdy::connect(&url, V4).await;
    for kind in ["error", "stdout", "stderr"] {
        client.open_kind(kind).await;
    }
    assert_eq!(client.rest().await.text(3), "in\n");

    let fixture = Fixture::with(quick()).await;
    let mut slow = TcpStream::connect(fixture.server.address()).await.unwrap();
    slow.write_all(b"POST /exec/").await.unwrap();
    assert_eq!(slow.read(&mut [0; 8]).await.unwrap_or(0), 0);
    // and those who open half of their streams
    let url = fixture.exec("true", false, false);
    let mut client = Spdy::connect(&url, V4).await;
    client.open_kind("error").await;
    assert_eq!(client.rest().await.data.len(), 0);
    let huge = format!("X-Rubbish: {}", "x".repeat(100_000));
    let mut socket = TcpStream::connect(fixture.server.address()).await.unwrap();
    let _ = socket
        .write_all(format!("GET / HTTP/1.1\r\n{huge}\r\n\r\n").as_bytes())
        .await;
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP/1.1 101"));
}

/// Runs hostile bytes beside a session that has to go on.
async fn ends_alone(fixture: &Fixture, hostile: &[u8], name: &str) {
    let all = ["error", "stdin", "stdout", "stderr"];
    let mut good = Spdy::connect(&fixture.exec("cat", false, true), V4).await;
    let mut bad = Spdy::connect(&fixture.exec("cat", false, true), V4).await;
    for kind in all {
        good.open_kind(kind).await;
        bad.open_kind(kind).await;
    }
    let _ = bad.socket.write_all(hostile).await;
    let end = tokio::time::timeout(Duration::from_secs(5), async {
        while bad.read().await.is_some() {}
    });
    assert!(end.await.is_ok(), "{name} goes on");
    good.data(3, b"fine", true).await;
    assert_eq!(good.rest().await.text(5), "fine", "{name}");
    fixture.local.all_gone().await;
}

#[tokio::test]
async fn frames_that_break_the_rules_end_their_session() {
    let fixture = Fixture::start().await;
    let bomb = Deflater::new().raw(&vec![0; 300_000]);
    let syn = |block: &[u8]| control(1, 0, &[&[0, 0, 0, 99, 0, 0, 0, 0, 0, 0][..], block].concat());
    let mut version = control(6, 0, &[0, 0, 0, 1]);
    version[1] = 2;
    let cases = [
        ("a version", version),
        ("a bomb", syn(&bomb)),
        ("a block that is not compressed", syn(b"plain text")),
        (
            "a long control frame",
            [0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff].to_vec(),
        ),
        ("stream 0", data(0, b"x", false)),
        ("a short reset", control(3, 0, &[0, 0, 0, 1])),
        ("settings that lie", control(4, 0, &[0, 0, 0, 9, 1])),
        ("a ping without a number", control(6, 0, &[])),
    ];
    for (name, bytes) in cases {
        ends_alone(&fixture, &bytes, name).await;
    }
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused() {
    let fixture = Fixture::start().await;
    let mut client = Spdy::connect(&fixture.exec("sleep 1000", false, false), V4).await;
    let mut reset = 0;
    for number in 0..2000 {
        let kind = format!("kind {number}");
        let (stream, frame) = client.syn(&[("streamtype", &kind)], 0);
        client.send(&frame).await;
        reset += u32::from(client.read().await == Some(Frame::Reset(stream)));
    }
    assert_eq!(reset, 2000);
    let even = control(
        1,
        0,
        &[&[0, 0, 0, 2, 0, 0, 0, 0, 0, 0][..], &Deflater::new().block(&[])].concat(),
    );
    drop(client);
    let mut client = Spdy::connect(&fixture.exec("true", false, false), V4).await;
    client.send(&even).await;
    assert_eq!(client.read().await, Some(Frame::Reset(2)));

    // streams of port-forward stay open, so they are counted
    let mut client = Spdy::connect(&fixture.forward(&[]), "portforward.k8s.io").await;
    for number in 0..600 {
        let id = number.to_string();
        let (stream, frame) = client.syn(&[("streamtype", "error"), ("port", "1"), ("requestid", &id)], 0);
        client.send(&frame).await;
        let expected = match number < crate::portforward::MOST_STREAMS {
            true => Frame::Reply(stream),
            false => Frame::Reset(stream),
        };
        assert_eq!(client.read().await, Some(expected));
    }
}

#[tokio::test]
async fn websocket_frames_that_break_the_rules_end_their_session() {
    let fixture = Fixture::start().await;
    let cases: [(&str, Vec<u8>); 8] = [
        ("no mask", vec![0x82, 2, 0, b'x']),
        ("reserved bits", masked(0xf2, [0; 4], b"\0x")),
        ("an unknown type", masked(0x85, [0; 4], b"\0x")),
        ("a long ping", masked(0x89, [0; 4], &[0; 200])),
        ("a continuation of nothing", masked(0x80, [0; 4], b"\0x")),
        (
            "a length of 2^63",
            [&[0x82, 0xff, 0x80][..], &[0; 7], &[0; 4]].concat(),
        ),
        ("a close signal for nothing", masked(0x82, [0; 4], b"\xff")),
        ("a close signal for two", masked(0x82, [0; 4], b"\xff\0\0")),
    ];
    for (name, bytes) in cases {
        let mut client = Socket::connect(&fixture.exec("cat", false, true), "v5.channel.k8s.io").await;
        client.socket.write_all(&bytes).await.unwrap();
        let end = tokio::time::timeout(Duration::from_secs(5), async {
            while client.read().await.is_some() {}
        });
        assert!(end.await.is_ok(), "{name} goes on");
        fixture.local.all_gone().await;
    }
    let mut client = Socket::connect(&fixture.exec("cat", false, true), "base64.channel.k8s.io").await;
    client.send(1, b"0not base64").await;
    while client.read().await.is_some() {}
    fixture.local.all_gone().await;
}

#[tokio::test]
async fn a_message_without_end_is_only_passed_on() {
    let fixture = Fixture::start().await;
    let url = fixture.exec("head -c 50000000 | wc -c", false, true);
    let mut client = Socket::connect(&url, "v5.channel.k8s.io").await;
    // a frame that says it has 2^62 bytes
    let head = [&[0x82, 0xff, 0x40][..], &[0; 7], &[0; 4], b"\0"].concat();
    client.socket.write_all(&head).await.unwrap();
    let chunk = vec![0; 1 << 20];
    for _ in 0..50 {
        if client.socket.write_all(&chunk).await.is_err() {
            break;
        }
    }
    let (channels, _) = client.rest().await;
    assert_eq!(channels[&1], b"50000000\n");
}
