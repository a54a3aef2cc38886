//! Much data out of a pod, in every form that a client can ask for.

use std::time::{Duration, Instant};

use base64::Engine as _;
use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::client::{Frame, Socket, Spdy, control};
use super::fake::Fixture;
use super::forward::{listen, pair, until_over};
use crate::Limits;
use crate::chunk::Kind;
use crate::link::{Link, Wire};

const PROTOCOL: &str = "portforward.k8s.io";

/// Bytes of which no two neighbourhoods are the same.
fn much() -> Vec<u8> {
    (0..1_200_000u32).flat_map(u32::to_be_bytes).collect()
}

/// A target that sends all of it, in pieces of many sizes, and ends.
async fn target() -> u16 {
    listen(|mut socket| async move {
        let bytes = much();
        let (mut rest, mut size) = (&bytes[..], 1);
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(size.min(rest.len()));
            socket.write_all(piece).await.unwrap();
            rest = after;
            size = size * 7 % 300_007;
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_bring_everything() {
    let fixture = Fixture::start().await;
    let port = target().await;
    let mut client = Spdy::connect(&fixture.forward(&[]), PROTOCOL).await;
    let mut streams = Vec::new();
    for id in 0..4 {
        let (error, stream) = pair(&mut client, port, id).await;
        streams.extend([stream, error]);
    }
    let much = much();
    for got in until_over(&mut client, &streams).await.iter().step_by(2) {
        assert!(*got == much, "{} of {} bytes", got.len(), much.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_bring_everything() {
    let fixture = Fixture::start().await;
    let port = target().await;
    let much = [&port.to_le_bytes()[..], &much()].concat();
    let mut client = Socket::connect(&fixture.forward(&[port]), "v4.channel.k8s.io").await;
    let (mut channels, status) = client.rest().await;
    assert!(channels.remove(&0).unwrap() == much);
    assert_eq!(status, Some(1000));
    let mut client = Socket::connect(&fixture.forward(&[port]), "v4.base64.channel.k8s.io").await;
    let mut got = Vec::new();
    while let Some((opcode, payload)) = client.read().await {
        if let (1, Some((b'0', text))) = (opcode, payload.split_first()) {
            got.extend(base64::engine::general_purpose::STANDARD.decode(text).unwrap());
        }
    }
    assert!(got == much, "{} of {} bytes", got.len(), much.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tunnel_brings_everything() {
    let fixture = Fixture::start().await;
    let port = target().await.to_string();
    let mut socket = Socket::connect(&fixture.forward(&[]), "SPDY/3.1+portforward.k8s.io").await;
    let mut frames = Spdy::over(TcpStream::connect(fixture.server.address()).await.unwrap());
    for kind in ["error", "data"] {
        let headers = [("streamtype", kind), ("port", &port), ("requestid", "1")];
        socket.send(2, &frames.syn(&headers, 0).1).await;
    }
    let (mut inner, mut got, mut over) = (Vec::new(), Vec::new(), false);
    while !over {
        let (opcode, payload) = socket.read().await.unwrap();
        assert_eq!(opcode, 2);
        inner.extend(payload);
        while let Some((head, rest)) = inner.split_first_chunk::<8>() {
            let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
            let Some(body) = rest.get(..length) else { break };
            // the stream of data is the third
            if head[..4] == [0, 0, 0, 3] {
                got.extend_from_slice(body);
                over |= head[4] == 1;
            }
            inner.drain(..8 + length);
        }
    }
    assert!(got == much(), "{} bytes", got.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_given_up_does_not_mix_with_others() {
    let fixture = Fixture::start().await;
    let endless = listen(|mut socket| async move {
        let bytes = vec![b'a'; 100_000];
        while socket.write_all(&bytes).await.is_ok() {}
    })
    .await;
    let port = target().await;
    let mut client = Spdy::connect(&fixture.forward(&[]), PROTOCOL).await;
    let much = much();
    for round in 0..5 {
        let (_, left) = pair(&mut client, endless, 2 * round).await;
        // everything between the two is full now
        tokio::time::sleep(Duration::from_millis(100)).await;
        let reset = [left.to_be_bytes(), 5u32.to_be_bytes()].concat();
        client.send(&control(3, 0, &reset)).await;
        let (_, stream) = pair(&mut client, port, 2 * round + 1).await;
        let mut got = Vec::new();
        loop {
            match client.read().await.unwrap() {
                Frame::Data(from, bytes, _) if from == left => {
                    assert!(bytes.iter().all(|byte| *byte == b'a'));
                }
                Frame::Data(from, bytes, last) if from == stream => {
                    got.extend(bytes);
                    if last {
                        break;
                    }
                }
                _ => {}
            }
        }
        assert!(got == much, "{} of {} bytes", got.len(), much.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn urgent_data_is_left_out_and_stops_nothing() {
    let fixture = Fixture::start().await;
    let port = listen(|mut socket| async move {
        let urgent = |socket: &TcpStream| SockRef::from(socket).send_out_of_band(b"!").unwrap();
        for piece in [&b"abc"[..], &[b'd'; 100_000]] {
            socket.write_all(piece).await.unwrap();
            urgent(&socket);
            socket.write_all(piece).await.unwrap();
            // one that was not passed yet would be like any other when the next one comes
            socket.read_u8().await.unwrap();
        }
        urgent(&socket);
    })
    .await;
    let mut client = Spdy::connect(&fixture.forward(&[]), PROTOCOL).await;
    let (error, stream) = pair(&mut client, port, 0).await;
    let mut got = Vec::new();
    for length in [6, 200_006] {
        while got.len() < length {
            match client.read().await.unwrap() {
                Frame::Data(from, bytes, false) if from == stream => got.extend(bytes),
                other => panic!("{other:?} after {} bytes", got.len()),
            }
        }
        client.data(stream, b"?", false).await;
    }
    let expected = [b"abcabc", &[b'd'; 200_000][..]].concat();
    assert!(got == expected, "{} of {} bytes", got.len(), expected.len());
    assert_eq!(until_over(&mut client, &[stream, error]).await, [b"", b""]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_little_at_a_time_is_not_idle() {
    let idle = Duration::from_millis(400);
    let fixture = Fixture::with(Limits {
        idle,
        ..Limits::default()
    })
    .await;
    let port = listen(|mut socket| async move {
        let bytes = vec![b'a'; 1 << 20];
        while socket.write_all(&bytes).await.is_ok() {}
    })
    .await;
    let mut client = Spdy::connect(&fixture.forward(&[]), PROTOCOL).await;
    pair(&mut client, port, 0).await;
    let (start, mut buffer) = (Instant::now(), vec![0; 256 << 10]);
    let mut pauses = tokio::time::interval(idle / 8);
    while start.elapsed() < idle * 4 {
        pauses.tick().await;
        client.socket.read_exact(&mut buffer).await.unwrap();
    }
    // who takes nothing is
    tokio::time::sleep(idle * 3).await;
    let rest = async { while client.socket.read(&mut buffer).await.unwrap_or(0) > 0 {} };
    let ended = tokio::time::timeout(Duration::from_secs(30), rest).await;
    assert!(ended.is_ok(), "it is still served");
}

#[tokio::test]
async fn only_what_goes_out_as_it_came_is_not_copied() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let channels = |base64| Wire::Channels {
        base64,
        half_close: false,
    };
    for (wire, kind) in [
        (Wire::Spdy, Kind::Pipe),
        (Wire::Tunnel, Kind::Pipe),
        (channels(false), Kind::Pipe),
        (channels(true), Kind::Memory),
    ] {
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (served, _) = listener.accept().await.unwrap();
        let served_too = std::fs::File::from(coracle_kernel::fd::dup(&served).unwrap());
        let link = Link::new(crate::transport::Socket::Left(served), &[], wire, 16).unwrap();
        assert_eq!(link.writer.kind(), kind, "{wire:?}");
        let kept = || SockRef::from(&served_too).send_buffer_size().unwrap();
        let before = kept();
        link.writer.keep_little();
        assert!(kept() < before, "{before} before, {} after", kept());
    }
}
