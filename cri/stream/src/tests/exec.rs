//! Exec and attach over SPDY.

use std::time::Duration;

use super::client::{Frame, Spdy, control};
use super::fake::Fixture;
use crate::{AttachRequest, ExecRequest, Limits, StreamRequest};

/// The streams of an exec without terminal: error 1, then those that are asked for.
async fn open(url: &str, protocol: &str, kinds: &[&str]) -> Spdy {
    let mut client = Spdy::connect(url, protocol).await;
    for kind in kinds {
        client.open_kind(kind).await;
    }
    client
}

const V4: &str = "v4.channel.k8s.io";
const SUCCESS: &str = r#"{"status":"Success"}"#;

#[tokio::test]
async fn output_and_exit_code_arrive_in_order() {
    let fixture = Fixture::start().await;
    let url = fixture.exec("echo out; echo err >&2; exit 7", false, false);
    let mut client = open(&url, V4, &["error", "stdout", "stderr"]).await;
    let result = client.rest().await;
    assert_eq!(
        (result.text(3), result.text(5)),
        ("out\n".to_owned(), "err\n".to_owned())
    );
    assert!(
        result
            .text(1)
            .contains(r#""causes":[{"reason":"ExitCode","message":"7"}]"#)
    );
    // output is over before the status is
    assert_eq!(result.finished, [3, 5, 1]);
    assert!(result.gone_away);
    fixture.local.all_gone().await;
}

#[tokio::test]
async fn input_is_copied_until_its_end() {
    let fixture = Fixture::start().await;
    let url = fixture.exec("cat; echo end", false, true);
    let mut client = open(&url, V4, &["error", "stdin", "stdout", "stderr"]).await;
    client.data(3, b"hello ", false).await;
    client.data(3, b"world\n", true).await;
    let result = client.rest().await;
    assert_eq!(result.text(5), "hello world\nend\n");
    assert_eq!(result.text(1), SUCCESS);
    assert_eq!(result.finished, [5, 7, 1, 3]);
}

#[tokio::test]
async fn every_version_tells_failures_in_its_way() {
    let fixture = Fixture::start().await;
    for version in ["channel.k8s.io", "v2.channel.k8s.io", "v3.channel.k8s.io"] {
        let url = fixture.exec("echo out; exit 3", false, false);
        let mut client = open(&url, version, &["error", "stdout", "stderr"]).await;
        let result = client.rest().await;
        assert_eq!(result.text(3), "out\n");
        assert_eq!(
            result.text(1),
            "command terminated with non-zero exit code: exit status 3"
        );
        let url = fixture.exec("true", false, false);
        let mut client = open(&url, version, &["error", "stdout", "stderr"]).await;
        assert_eq!(client.rest().await.text(1), "");
    }
    for (version, resize) in [("v2.channel.k8s.io", false), ("v3.channel.k8s.io", true)] {
        let url = fixture.exec("stty size", true, false);
        let mut client = open(&url, version, &["error", "stdout"]).await;
        if resize {
            client.open_kind("resize").await;
        }
        assert!(client.rest().await.text(3).ends_with("\r\n"));
    }
}

#[tokio::test]
async fn a_terminal_is_resized_and_carries_both_ways() {
    let fixture = Fixture::start().await;
    let url = fixture.exec("read x; stty size; echo got $x", true, true);
    let mut client = open(&url, V4, &["error", "stdin", "stdout", "resize"]).await;
    client.data(7, b"{\"Width\":132,\"Height\":43}\n", false).await;
    // the size and the input go different ways: the prompt shows that the first one was taken
    client.data(3, b"line\n", false).await;
    let text = client.rest().await.text(5);
    assert!(text.contains("43 132") && text.contains("got line"), "{text:?}");
    fixture.local.all_gone().await;
}

#[tokio::test]
async fn a_failed_start_is_told_on_the_error_stream() {
    let fixture = Fixture::start().await;
    let request = ExecRequest {
        container: "c".to_owned(),
        command: vec!["/no/such/program".to_owned()],
        stdout: true,
        ..ExecRequest::default()
    };
    let url = fixture.url(StreamRequest::Exec(request));
    let mut client = open(&url, V4, &["error", "stdout"]).await;
    let status = client.rest().await.text(1);
    let expected = "Internal error occurred: error executing command in container: exec";
    assert!(
        status.contains(expected) && status.contains("\"code\":500"),
        "{status}"
    );
}

#[tokio::test]
async fn what_was_written_before_the_exit_is_not_lost() {
    let fixture = Fixture::start().await;
    // the pipe is full when the process is gone, and a child keeps it open
    let url = fixture.exec("sleep 100 & head -c 60000 /dev/zero; exit 5", false, false);
    let mut client = open(&url, V4, &["error", "stdout", "stderr"]).await;
    let result = client.rest().await;
    assert_eq!(result.data[&3].len(), 60000);
    assert!(result.text(1).contains("exit status 5"));
    fixture.local.all_gone().await;
}

#[tokio::test]
async fn what_a_child_writes_soon_after_the_exit_is_waited_for() {
    let fixture = Fixture::start().await;
    let url = fixture.exec("(sleep 0.3; echo late) & exit 0", false, false);
    let mut client = open(&url, V4, &["error", "stdout", "stderr"]).await;
    let result = client.rest().await;
    assert_eq!(
        (result.text(3), result.text(1)),
        ("late\n".to_owned(), SUCCESS.to_owned())
    );
}

#[tokio::test]
async fn one_who_keeps_writing_after_the_exit_does_not_keep_the_session() {
    let fixture = Fixture::with(Limits {
        drain: Duration::from_millis(100),
        ..Limits::default()
    })
    .await;
    // what it writes itself arrives, whatever the other one does then
    let url = fixture.exec("yes | head -c 2097152; yes & exit 0", false, false);
    let mut client = open(&url, V4, &["error", "stdout", "stderr"]).await;
    // so slow a reader that the pipe is never empty
    let (mut bytes, mut status) = (0, Vec::new());
    while status.is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
        match client.read().await.unwrap() {
            Frame::Data(3, data, _) => bytes += data.len(),
            Frame::Data(1, data, _) => status = data,
            _ => {}
        }
        assert!(bytes < 64 << 20, "no end after {bytes} bytes");
    }
    assert_eq!(status, SUCCESS.as_bytes());
    assert!(bytes >= 2 << 20, "{bytes} bytes");
}

#[tokio::test]
async fn a_client_that_leaves_takes_everything_with_it() {
    let fixture = Fixture::start().await;
    let all = ["error", "stdin", "stdout", "stderr"];
    // waiting; with input that nobody takes; with output that nobody takes; while it starts
    for script in [
        "sleep 1000",
        "exec sleep 1000 < /dev/null",
        "yes",
        "sleep 1000 <&-",
    ] {
        let url = fixture.exec(script, false, true);
        let mut client = open(&url, V4, &all).await;
        // more than what may wait for the process, and not so much that our end stays in the socket's buffers
        client.data(3, &vec![0; 640 << 10], false).await;
        drop(client);
        fixture.local.all_gone().await;
    }
    let mut request = ExecRequest {
        container: "c".to_owned(),
        command: vec!["never".to_owned()],
        stdin: true,
        ..ExecRequest::default()
    };
    request.stdout = true;
    let url = fixture.url(StreamRequest::Exec(request));
    drop(open(&url, V4, &["error", "stdin", "stdout"]).await);
    fixture.local.all_gone().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_process() {
    let fixture = Fixture::start().await;
    let directory = std::env::temp_dir().join(format!("coracle-stream-{}", std::process::id()));
    let path = directory.to_str().unwrap();
    // counts what it could write, in a file
    let script =
        format!("i=0; while [ $i -lt 3000 ]; do head -c 65536 /dev/zero; i=$((i+1)); echo $i > {path}; done");
    let url = fixture.exec(&script, false, false);
    let mut client = open(&url, V4, &["error", "stdout", "stderr"]).await;
    let count = || {
        std::fs::read_to_string(&directory)
            .ok()
            .and_then(|t| t.trim().parse::<u32>().ok())
    };
    let mut last = None;
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = count();
        if now.is_some() && now == last {
            break;
        }
        last = now;
    }
    // what the sockets' buffers and ours take, of 196 MB
    assert!(last.unwrap() < 300, "{last:?}");
    let result = client.rest().await;
    assert_eq!(result.data[&3].len(), 3000 * 65536);
    std::fs::remove_file(&directory).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_megabytes_go_through_each_way() {
    let fixture = Fixture::start().await;
    let url = fixture.exec("cat", false, true);
    let client = open(&url, V4, &["error", "stdin", "stdout", "stderr"]).await;
    let bytes: Vec<u8> = (0..100u32 << 20)
        .map(|i| (i ^ (i >> 8) ^ (i >> 16)).to_le_bytes()[0])
        .collect();
    let (read, mut write) = client.socket.into_split();
    let sent = bytes.clone();
    let sending = tokio::spawn(async move {
        use tokio::io::AsyncWriteExt as _;
        let chunks = sent.chunks(70_001).collect::<Vec<_>>();
        for (at, chunk) in chunks.iter().enumerate() {
            let frame = super::client::data(3, chunk, at + 1 == chunks.len());
            write.write_all(&frame).await.unwrap();
        }
        write
    });
    let mut got = Vec::with_capacity(bytes.len());
    let mut read = tokio::io::BufReader::with_capacity(1 << 20, read);
    loop {
        use tokio::io::AsyncReadExt as _;
        let head: u64 = read.read_u64().await.unwrap();
        let (stream, length) = ((head >> 32) as u32, (head & 0xff_ffff) as usize);
        let at = got.len();
        if stream == 5 {
            got.resize(at + length, 0);
            read.read_exact(&mut got[at..]).await.unwrap();
            if head >> 24 & 1 == 1 {
                break;
            }
        } else {
            read.read_exact(&mut vec![0; length]).await.unwrap();
        }
    }
    assert!(got == bytes, "{} bytes came back, or others", got.len());
    drop(sending.await.unwrap());
    fixture.local.all_gone().await;
}

#[tokio::test]
async fn attachments_end_with_their_output() {
    let fixture = Fixture::start().await;
    let attach = |script: &str, tty, stdin, output| {
        fixture.url(StreamRequest::Attach(AttachRequest {
            pod: "pod".to_owned(),
            container: script.to_owned(),
            tty,
            stdin,
            stdout: output,
            stderr: output && !tty,
        }))
    };
    let url = attach("read x; echo got $x; exit 9", false, true, true);
    let mut client = open(&url, V4, &["error", "stdin", "stdout", "stderr"]).await;
    client.data(3, b"it\n", false).await;
    let result = client.rest().await;
    // the container's exit code is no business of an attachment
    assert_eq!(
        (result.text(5), result.text(1)),
        ("got it\n".to_owned(), SUCCESS.to_owned())
    );
    // a terminal whose output comes another way
    let url = attach("echo from the monitor", true, true, true);
    let mut client = open(&url, V4, &["error", "stdin", "stdout", "resize"]).await;
    client.data(3, b"typed", false).await;
    assert_eq!(client.rest().await.text(5), "from the monitor\n");
    fixture.local.all_gone().await;
}

#[tokio::test]
async fn pings_are_answered_and_strange_frames_ignored() {
    let fixture = Fixture::start().await;
    let url = fixture.exec("cat", false, true);
    let mut client = open(&url, V4, &["error", "stdin", "stdout", "stderr"]).await;
    client.send(&control(6, 0, &[0, 0, 0, 9])).await;
    assert_eq!(client.read().await, Some(Frame::Ping(9)));
    // an answer to a question that nobody asked, settings, a window, credentials, data of no stream
    client.send(&control(6, 0, &[0, 0, 0, 8])).await;
    client
        .send(&control(4, 0, &[0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 1, 0]))
        .await;
    client.send(&control(9, 0, &[0, 0, 0, 3, 0, 1, 0, 0])).await;
    client.send(&control(10, 0, &[1, 2, 3])).await;
    client.data(99, b"lost", true).await;
    client.data(3, b"through\n", true).await;
    assert_eq!(client.rest().await.text(5), "through\n");
}

#[tokio::test]
async fn output_that_the_client_resets_is_closed() {
    let fixture = Fixture::start().await;
    let url = fixture.exec(
        "trap '' PIPE; while echo x; do :; done 2>/dev/null; exit 4",
        false,
        false,
    );
    let mut client = open(&url, V4, &["error", "stdout", "stderr"]).await;
    client.send(&control(3, 0, &[0, 0, 0, 3, 0, 0, 0, 5])).await;
    assert!(client.rest().await.text(1).contains("exit status 4"));
}

#[tokio::test]
async fn idle_sessions_end() {
    let fixture = Fixture::with(Limits {
        idle: Duration::from_millis(300),
        ..Limits::default()
    })
    .await;
    let url = fixture.exec("sleep 1000", false, false);
    let mut client = open(&url, V4, &["error", "stdout", "stderr"]).await;
    let result = client.rest().await;
    assert!(result.data.is_empty() && result.finished.is_empty());
    fixture.local.all_gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once() {
    let fixture = Fixture::start().await;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..40 {
        let url = fixture.exec(&format!("cat; exit {number}"), false, true);
        tasks.spawn(async move {
            let mut client = open(&url, V4, &["error", "stdin", "stdout", "stderr"]).await;
            client.data(3, &vec![b'x'; 100_000], true).await;
            let result = client.rest().await;
            assert_eq!(result.data[&5].len(), 100_000);
            assert!(number == 0 || result.text(1).contains(&format!("exit status {number}\"")));
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    fixture.local.all_gone().await;
}
