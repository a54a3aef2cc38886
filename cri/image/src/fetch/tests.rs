//! The fetch worker against registries that fail in every way, on loopback.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::mpsc;

use tokio::net::unix::pipe;

use super::*;

/// What a test registry saw: the request line and the headers, lower-case.
type Seen = mpsc::Receiver<Vec<String>>;

/// A server that answers request `n` (from 0) with what `answer` gives, and closes the connection.
fn registry(answer: impl Fn(usize, &[String]) -> Vec<u8> + Send + 'static) -> (String, Seen) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sender, seen) = mpsc::channel();
    std::thread::spawn(move || {
        for (n, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            let request = read_head(&stream);
            stream.write_all(&answer(n, &request)).ok();
            if sender.send(request).is_err() {
                break;
            }
        }
    });
    (address, seen)
}

fn read_head(stream: &TcpStream) -> Vec<String> {
    let mut lines = Vec::new();
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_ascii_lowercase());
    }
    let length = lines
        .iter()
        .find_map(|l| l.strip_prefix("content-length: "))
        .and_then(|l| l.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).unwrap();
    if !body.is_empty() {
        lines.push(String::from_utf8_lossy(&body).into_owned());
    }
    lines
}

fn ok(headers: &str, body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn status(line: &str, headers: &str) -> Vec<u8> {
    format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\nConnection: close\r\n{headers}\r\n").into_bytes()
}

fn endpoint(authority: &str) -> Endpoint {
    Endpoint {
        scheme: Scheme::Http,
        authority: authority.to_owned(),
        authorities: String::new(),
        namespace: None,
        resolves_tags: true,
    }
}

/// Runs a request through a worker thread; gives the body and the outcome.
fn fetch(
    endpoints: Vec<Endpoint>,
    credentials: Credentials,
    request: Request,
) -> (Vec<u8>, Result<Head, FetchError>) {
    runtime().unwrap().block_on(async {
        let setup = Setup {
            endpoints,
            repository: "team/app".into(),
            credentials,
            resolv_conf: String::new(),
            hosts: "127.0.0.1 alias.test\n".into(),
            authorities: String::new(),
            uid: 65533,
        };
        let (ours, theirs) = scm::pair(scm::Kind::Seqpacket, scm::Mode::Blocking).unwrap();
        let worker = std::thread::spawn(move || {
            let setup = receive_setup(&theirs).unwrap();
            serve(&runtime().unwrap(), theirs, setup)
        });
        let fetcher = Fetcher::over(ours, None, &setup).unwrap();
        let (body, outcome) = fetcher.begin(request).await.unwrap().split();
        let bytes = drain(body).await;
        let outcome = outcome.await;
        drop(fetcher);
        // The reader task holds the socket until it is polled after its abort.
        tokio::task::yield_now().await;
        worker.join().unwrap().unwrap();
        (bytes, outcome)
    })
}

async fn drain(body: OwnedFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    pipe::Receiver::from_owned_fd(body)
        .unwrap()
        .read_to_end(&mut bytes)
        .await
        .unwrap();
    bytes
}

fn manifest(reference: &str) -> Request {
    Request::Manifest {
        reference: reference.into(),
    }
}

fn blob(size: u64) -> Request {
    Request::Blob {
        digest: "sha256:00".into(),
        size,
    }
}

fn kind(outcome: &Result<Head, FetchError>) -> FailureKind {
    match outcome {
        Err(FetchError::Failed(failure)) => failure.kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_manifest_comes_with_its_type_and_digest() {
    let (address, seen) = registry(|_, _| {
        ok(
            "Content-Type: application/vnd.oci.image.manifest.v1+json; charset=utf-8\r\nDocker-Content-Digest: sha256:ab\r\n",
            "{}",
        )
    });
    let (body, outcome) = fetch(vec![endpoint(&address)], Credentials::Anonymous, manifest("v1"));
    let head = outcome.unwrap();
    assert_eq!(body, b"{}");
    assert_eq!(head.media_type, "application/vnd.oci.image.manifest.v1+json");
    assert_eq!(head.digest.as_deref(), Some("sha256:ab"));
    let request = seen.recv().unwrap();
    assert_eq!(request[0], "get /v2/team/app/manifests/v1 http/1.1");
    assert!(
        request.contains(&"accept-encoding: identity".to_owned()),
        "{request:?}"
    );
    assert!(
        !request.iter().any(|h| h.starts_with("authorization")),
        "{request:?}"
    );
}

#[test]
fn a_blob_that_breaks_off_is_taken_up_by_range() {
    let (address, seen) = registry(|n, _| {
        match n {
        0 => b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123".to_vec(),
        1 => b"HTTP/1.1 206 Partial Content\r\nContent-Length: 6\r\nContent-Range: bytes 4-9/10\r\n\r\n45".to_vec(),
        _ => b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\nContent-Range: bytes 6-9/10\r\nConnection: close\r\n\r\n6789".to_vec(),
    }
    });
    let (body, outcome) = fetch(vec![endpoint(&address)], Credentials::Anonymous, blob(10));
    outcome.unwrap();
    assert_eq!(body, b"0123456789");
    seen.recv().unwrap();
    assert!(seen.recv().unwrap().contains(&"range: bytes=4-".to_owned()));
}

#[test]
fn a_server_without_ranges_is_read_again() {
    let (address, _seen) = registry(|n, _| match n {
        0 => b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123".to_vec(),
        _ => ok("", "0123456789"),
    });
    let (body, outcome) = fetch(vec![endpoint(&address)], Credentials::Anonymous, blob(10));
    outcome.unwrap();
    assert_eq!(body, b"0123456789");
}

#[test]
fn wrong_ranges_lengths_and_encodings_are_errors() {
    let wrong_range = |n: usize, _: &[String]| match n {
        0 => b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123".to_vec(),
        _ => {
            b"HTTP/1.1 206 Partial Content\r\nContent-Length: 6\r\nContent-Range: bytes 0-5/10\r\n\r\n456789"
                .to_vec()
        }
    };
    let (address, _seen) = registry(wrong_range);
    let (_, outcome) = fetch(vec![endpoint(&address)], Credentials::Anonymous, blob(10));
    assert_eq!(kind(&outcome), FailureKind::Protocol);
    let (address, _seen) = registry(|_, _| ok("", "0123456789-and-more"));
    let (body, outcome) = fetch(vec![endpoint(&address)], Credentials::Anonymous, blob(10));
    assert_eq!(kind(&outcome), FailureKind::Protocol);
    assert!(body.len() <= 10, "{body:?}");
    let (address, _seen) = registry(|_, _| ok("Content-Encoding: gzip\r\n", "x"));
    let (_, outcome) = fetch(vec![endpoint(&address)], Credentials::Anonymous, manifest("v1"));
    assert_eq!(kind(&outcome), FailureKind::Protocol);
    let (address, _seen) = registry(|_, _| ok("", &"x".repeat(5 << 20)));
    let (body, outcome) = fetch(vec![endpoint(&address)], Credentials::Anonymous, manifest("v1"));
    assert_eq!(kind(&outcome), FailureKind::Protocol);
    assert!(body.len() <= 4 << 20);
}

#[test]
fn statuses_become_kinds() {
    for (line, expected) in [
        ("404 Not Found", FailureKind::NotFound),
        ("403 Forbidden", FailureKind::Denied),
        ("401 Unauthorized", FailureKind::Denied),
        ("400 Bad Request", FailureKind::Protocol),
        ("204 No Content", FailureKind::Protocol),
    ] {
        let (address, _seen) = registry(move |_, _| status(line, ""));
        let (_, outcome) = fetch(vec![endpoint(&address)], Credentials::Anonymous, manifest("v1"));
        assert_eq!(kind(&outcome), expected, "{line}");
    }
}

#[test]
fn an_overloaded_server_is_asked_again_and_a_dead_mirror_is_passed_over() {
    let (address, seen) = registry(|n, _| {
        if n < 2 {
            status("503 Service Unavailable", "")
        } else {
            ok("", "{}")
        }
    });
    let (body, outcome) = fetch(vec![endpoint(&address)], Credentials::Anonymous, manifest("v1"));
    outcome.unwrap();
    assert_eq!(
        (body.as_slice(), seen.iter().take(3).count()),
        (b"{}".as_slice(), 3)
    );
    let (address, _seen) = registry(|_, _| ok("", "{}"));
    let gone = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let mirror_without_tags = Endpoint {
        resolves_tags: false,
        ..endpoint("192.0.2.1")
    };
    let (body, outcome) = fetch(
        vec![mirror_without_tags, endpoint(&gone), endpoint(&address)],
        Credentials::Anonymous,
        manifest("v1"),
    );
    outcome.unwrap();
    assert_eq!(body, b"{}");
}

#[test]
fn what_the_mirrors_said_is_told_behind_the_registry_s_own_answer() {
    let (mirror, _seen) = registry(|_, _| status("404 Not Found", ""));
    let (address, _seen) = registry(|_, _| status("403 Forbidden", ""));
    let servers = vec![endpoint(&mirror), endpoint(&address)];
    let (_, outcome) = fetch(servers, Credentials::Anonymous, manifest("v1"));
    assert_eq!(kind(&outcome), FailureKind::Denied);
    let text = outcome.unwrap_err().to_string();
    let of_registry = text.find(&format!("http://{address}/")).expect(&text);
    let of_mirror = text.find(&format!("http://{mirror}/")).expect(&text);
    assert!(of_registry < of_mirror, "{text}");
}

#[test]
fn a_token_is_fetched_with_the_password_and_sent_to_the_registry_alone() {
    let (other, other_seen) = registry(|_, _| ok("", "blob"));
    let (tokens, tokens_seen) = registry(|_, _| ok("", r#"{"token":"good"}"#));
    let (address, seen) = registry(move |_, request| {
        if request.contains(&"authorization: bearer good".to_owned()) {
            status(
                "307 Temporary Redirect",
                &format!("Location: http://{other}/elsewhere\r\n"),
            )
        } else {
            let challenge =
                format!("WWW-Authenticate: Bearer realm=\"http://{tokens}/token\",service=\"s\"\r\n");
            status("401 Unauthorized", &challenge)
        }
    });
    let credentials = Credentials::Basic {
        username: "user".into(),
        password: "word".into(),
    };
    let (body, outcome) = fetch(vec![endpoint(&address)], credentials, blob(4));
    outcome.unwrap();
    assert_eq!(body, b"blob");
    let asked = tokens_seen.recv().unwrap();
    assert!(
        asked[0].starts_with("get /token?service=s&scope=repository%3ateam%2fapp%3apull "),
        "{asked:?}"
    );
    assert!(
        asked.iter().any(|h| h.starts_with("authorization: basic ")),
        "{asked:?}"
    );
    assert!(
        !seen
            .recv()
            .unwrap()
            .iter()
            .any(|h| h.starts_with("authorization")),
        "sent before it was asked for"
    );
    let elsewhere = other_seen.recv().unwrap();
    assert!(
        !elsewhere.iter().any(|h| h.starts_with("authorization")),
        "credentials went elsewhere: {elsewhere:?}"
    );
}

#[test]
fn only_the_registry_itself_can_ask_for_credentials() {
    let basic = || Credentials::Basic {
        username: "user".into(),
        password: "secret".into(),
    };
    // Where the registry redirects to, somebody else answers.
    let (tokens, tokens_seen) = registry(|_, _| ok("", r#"{"token":"good"}"#));
    let challenge = format!("WWW-Authenticate: Bearer realm=\"http://{tokens}/token\"\r\n");
    let (other, _other_seen) = registry(move |_, _| status("401 Unauthorized", &challenge));
    let (address, _seen) = registry(move |_, _| {
        status(
            "307 Temporary Redirect",
            &format!("Location: http://{other}/elsewhere\r\n"),
        )
    });
    let (_, outcome) = fetch(vec![endpoint(&address)], basic(), blob(4));
    assert_eq!(kind(&outcome), FailureKind::Denied);
    assert!(tokens_seen.try_recv().is_err(), "the password went elsewhere");
    // A mirror asks, and is not the registry.
    let (address, seen) =
        registry(|_, _| status("401 Unauthorized", "WWW-Authenticate: Basic realm=\"x\"\r\n"));
    let mirror = Endpoint {
        namespace: Some("registry.example".into()),
        ..endpoint(&address)
    };
    let (_, outcome) = fetch(vec![mirror], basic(), blob(4));
    assert_eq!(kind(&outcome), FailureKind::Denied);
    assert!(
        seen.try_iter()
            .flatten()
            .all(|header| !header.starts_with("authorization")),
        "the password went to a mirror"
    );
}

#[test]
fn redirects_that_loop_or_leave_http_are_errors() {
    let (address, seen) = registry(|_, request| {
        let host = request
            .iter()
            .find_map(|h| h.strip_prefix("host: "))
            .unwrap_or_default()
            .to_owned();
        status("302 Found", &format!("Location: http://{host}/again\r\n"))
    });
    let (_, outcome) = fetch(vec![endpoint(&address)], Credentials::Anonymous, blob(4));
    assert_eq!(kind(&outcome), FailureKind::Protocol);
    drop(seen);
    for location in ["file:///etc/passwd", "ftp://x/", ""] {
        let (address, _seen) =
            registry(move |_, _| status("302 Found", &format!("Location: {location}\r\n")));
        let (_, outcome) = fetch(vec![endpoint(&address)], Credentials::Anonymous, blob(4));
        assert_eq!(kind(&outcome), FailureKind::Protocol, "{location}");
    }
}

#[test]
fn names_come_from_the_hosts_that_were_sent() {
    let (address, _seen) = registry(|_, _| ok("", "{}"));
    let port = address.rsplit(':').next().unwrap();
    let (body, outcome) = fetch(
        vec![endpoint(&format!("alias.test:{port}"))],
        Credentials::Anonymous,
        manifest("v1"),
    );
    outcome.unwrap();
    assert_eq!(body, b"{}");
}

#[test]
fn rubbish_instead_of_http_is_an_error() {
    for rubbish in [
        &b"\x16\x03\x01 not http"[..],
        b"",
        b"HTTP/1.1 999999 x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    ] {
        let rubbish = rubbish.to_vec();
        let (address, _seen) = registry(move |_, _| rubbish.clone());
        let (_, outcome) = fetch(vec![endpoint(&address)], Credentials::Anonymous, manifest("v1"));
        assert_eq!(kind(&outcome), FailureKind::Unavailable);
    }
}
