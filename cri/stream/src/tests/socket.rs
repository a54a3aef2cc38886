//! Exec over WebSocket.

use tokio::io::AsyncWriteExt as _;

use super::client::Socket;
use super::fake::Fixture;

#[tokio::test]
async fn v5_closes_input_by_a_signal() {
    let fixture = Fixture::start().await;
    let url = fixture.exec("cat; echo err >&2; exit 6", false, true);
    let mut client = Socket::connect(&url, "v5.channel.k8s.io").await;
    // the connection stands
    assert_eq!(client.read().await, Some((2, vec![1])));
    client.send(2, b"\0some ").await;
    client.send(9, b"ping").await;
    client.send(2, b"\0input").await;
    client.send(2, b"\xff\0").await;
    let (channels, status) = client.rest().await;
    assert_eq!(channels[&1], b"some input");
    assert_eq!(channels[&2], b"err\n");
    let text = String::from_utf8(channels[&3].clone()).unwrap();
    assert!(text.contains(r#""reason":"ExitCode","message":"6""#), "{text}");
    assert_eq!(status, Some(1000));
    fixture.local.all_gone().await;
}

#[tokio::test]
async fn v4_has_a_status_and_a_terminal() {
    let fixture = Fixture::start().await;
    // together, so that one read brings both: the size is there before what was typed after it
    let mask = [1, 2, 3, 4];
    let both = [
        crate::ws::frame::masked(0x82, mask, b"\x04{\"Width\":90,\"Height\":30}"),
        crate::ws::frame::masked(0x82, mask, b"\0go\n"),
    ]
    .concat();
    for _ in 0..10 {
        let url = fixture.exec("read x; stty size", true, true);
        let mut client = Socket::connect(&url, "v4.channel.k8s.io").await;
        client.socket.write_all(&both).await.unwrap();
        let (channels, _) = client.rest().await;
        let text = String::from_utf8(channels[&1].clone()).unwrap();
        assert!(text.contains("30 90"), "{text:?}");
        assert_eq!(channels[&3], br#"{"status":"Success"}"#);
    }
}

#[tokio::test]
async fn base64_is_text_both_ways() {
    let fixture = Fixture::start().await;
    let url = fixture.exec("read x; echo got $x; exit 2", false, true);
    let mut client = Socket::connect(&url, "v4.base64.channel.k8s.io").await;
    assert_eq!(client.read().await, Some((1, b"1".to_vec())));
    client.send(1, b"0aXQK").await;
    assert_eq!(client.read().await, Some((1, b"1Z290IGl0Cg==".to_vec())));
    let (channels, _) = client.rest().await;
    assert!(
        channels[&b'3'].starts_with(b"eyJzdGF0dXMiOiJGYWlsdXJlIi"),
        "{channels:?}"
    );
}

#[tokio::test]
async fn the_oldest_protocols_tell_failures_as_text() {
    let fixture = Fixture::start().await;
    for protocol in ["", "channel.k8s.io"] {
        let url = fixture.exec("echo out; exit 3", false, false);
        let (channels, _) = Socket::connect(&url, protocol).await.rest().await;
        assert_eq!(channels[&1], b"out\n");
        assert_eq!(
            channels[&3],
            b"command terminated with non-zero exit code: exit status 3"
        );
        let url = fixture.exec("true", false, false);
        let (channels, _) = Socket::connect(&url, protocol).await.rest().await;
        assert!(!channels.contains_key(&3), "{channels:?}");
    }
    let url = fixture.exec("echo out", false, false);
    let (channels, _) = Socket::connect(&url, "base64.channel.k8s.io").await.rest().await;
    assert_eq!(channels[&b'1'], b"b3V0Cg==");
}

#[tokio::test]
async fn fragments_and_a_close_handshake() {
    let fixture = Fixture::start().await;
    let url = fixture.exec("cat", false, true);
    let mut client = Socket::connect(&url, "v5.channel.k8s.io").await;
    let mask = [9, 8, 7, 6];
    let frames = [
        crate::ws::frame::masked(0x02, mask, b"\0in "),
        crate::ws::frame::masked(0x89, mask, b"?"),
        crate::ws::frame::masked(0x80, mask, b"pieces"),
    ]
    .concat();
    for byte in frames {
        client.socket.write_all(&[byte]).await.unwrap();
    }
    let (mut text, mut ponged) = (Vec::<u8>::new(), false);
    while text != b"in pieces" {
        match client.read().await.unwrap() {
            (2, payload) => text.extend(&payload[1..]),
            (10, payload) => ponged = payload == b"?",
            other => panic!("{other:?}"),
        }
    }
    assert!(ponged);
    client.send(8, &1001u16.to_be_bytes()).await;
    assert_eq!(client.rest().await.1, Some(1001));
    fixture.local.all_gone().await;
}
