//! Sessions over TLS.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

use super::client::{Socket, Spdy, data, spdy_lines};
use super::fake::Fixture;
use super::forward::{echo, listen, pair, until_over};
use crate::{Limits, Tls};

const V4: &str = "v4.channel.k8s.io";

/// An authority of the test's own, and what it has signed.
struct Authority {
    dir: tempfile::TempDir,
}

impl Authority {
    fn new() -> Authority {
        let dir = tempfile::tempdir().unwrap();
        let script = "
            new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2'
            openssl req -x509 $new -subj /CN=authority -keyout ca.key -out ca.crt
            for name in server other; do
                openssl req -x509 $new -subj /CN=$name -CA ca.crt -CAkey ca.key -keyout $name.key -out $name.crt \\
                    -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE
            done";
        let made = Command::new("sh")
            .args(["-euc", script])
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        Authority { dir }
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.path().join(Path::new(name))).unwrap()
    }

    fn tls(&self) -> Tls {
        Tls::new(&self.read("server.crt"), &self.read("server.key")).unwrap()
    }

    fn connector(&self, versions: &[&'static rustls::SupportedProtocolVersion]) -> TlsConnector {
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(&self.read("ca.crt")).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        TlsConnector::from(Arc::new(config))
    }

    async fn connect(&self, address: SocketAddr) -> tokio_rustls::client::TlsStream<TcpStream> {
        let socket = TcpStream::connect(address).await.unwrap();
        let name = ServerName::from(address.ip());
        self.connector(rustls::ALL_VERSIONS)
            .connect(name, socket)
            .await
            .unwrap()
    }
}

/// A fixture with TLS, and what makes a URL of it one that a client without TLS can use.
async fn start(
    authority: &Authority,
    limits: Limits,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> (Fixture, impl Fn(String) -> String + use<>) {
    let fixture = Fixture::over(limits, Some(authority.tls())).await;
    let (address, connector) = (fixture.server.address(), authority.connector(versions));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let outside = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut plain, _)) = listener.accept().await {
            let connector = connector.clone();
            tokio::spawn(async move {
                let socket = TcpStream::connect(address).await.unwrap();
                let name = ServerName::from(address.ip());
                let mut sealed = connector.connect(name, socket).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut plain, &mut sealed).await;
            });
        }
    });
    let through = move |url: String| {
        let inside = format!("https://{address}/");
        assert!(url.starts_with(&inside), "{url}");
        url.replace(&inside, &format!("http://{outside}/"))
    };
    (fixture, through)
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_the_same_over_tls() {
    let authority = Authority::new();
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let (fixture, through) = start(&authority, Limits::default(), &[version]).await;
        let script = "cat | wc -c; head -c 3000000 /dev/zero; exit 4";
        let mut client = Spdy::connect(&through(fixture.exec(script, false, true)), V4).await;
        for kind in ["error", "stdin", "stdout", "stderr"] {
            client.open_kind(kind).await;
        }
        for _ in 0..30 {
            client.data(3, &[0; 100_000], false).await;
        }
        client.data(3, b"", true).await;
        let result = client.rest().await;
        assert_eq!(result.data[&5].len(), 8 + 3_000_000);
        assert!(result.data[&5].starts_with(b"3000000\n"));
        assert!(result.text(1).contains(r#""message":"4""#), "{result:?}");
        assert!(result.gone_away);

        let url = through(fixture.exec("cat; exit 6", false, true));
        let mut client = Socket::connect(&url, "v5.channel.k8s.io").await;
        client.send(2, b"\0input").await;
        client.send(2, b"\xff\0").await;
        let (channels, status) = client.rest().await;
        assert_eq!((&channels[&1][..], status), (&b"input"[..], Some(1000)));

        let port = listen(echo).await;
        let mut client = Spdy::connect(&through(fixture.forward(&[])), "portforward.k8s.io").await;
        let (error, stream) = pair(&mut client, port, 0).await;
        // a little is not held back, and a lot comes whole
        client.data(stream, b"a", false).await;
        let echoed = client.read().await;
        assert_eq!(
            echoed,
            Some(super::client::Frame::Data(stream, b"a".to_vec(), false))
        );
        let bytes = vec![7; 1 << 20];
        client.data(stream, &bytes, true).await;
        assert_eq!(until_over(&mut client, &[stream, error]).await[0], bytes);
        fixture.local.all_gone().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_is_seen_though_nothing_is_read() {
    let authority = Authority::new();
    let fixture = Fixture::over(Limits::default(), Some(authority.tls())).await;
    for abrupt in [false, true] {
        // takes no input and writes nothing
        let url = fixture.exec("exec sleep 1000", false, true);
        let path = url.rsplit_once(":").unwrap().1.split_once('/').unwrap().1;
        let mut sealed = authority.connect(fixture.server.address()).await;
        let head = format!(
            "POST /{path} HTTP/1.1\r\nHost: x\r\n{}\r\n\r\n",
            spdy_lines(V4).join("\r\n")
        );
        sealed.write_all(head.as_bytes()).await.unwrap();
        // only for its frames
        let mut frames = Spdy::over(TcpStream::connect(fixture.server.address()).await.unwrap());
        for kind in ["error", "stdin", "stdout", "stderr"] {
            let frame = frames.syn(&[("streamtype", kind)], 0).1;
            sealed.write_all(&frame).await.unwrap();
        }
        let input = data(3, &vec![0; 1 << 20], false);
        let stuck = async { while sealed.write_all(&input).await.is_ok() {} };
        let stuck = tokio::time::timeout(Duration::from_millis(700), stuck).await;
        assert!(stuck.is_err(), "it was cut off");
        if abrupt {
            sealed.get_ref().0.set_zero_linger().unwrap();
        }
        drop(sealed);
        fixture.local.all_gone().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_speaks_no_tls_ends_alone() {
    let authority = Authority::new();
    let limits = Limits {
        handshake: Duration::from_millis(500),
        ..Limits::default()
    };
    let (fixture, through) = start(&authority, limits, rustls::ALL_VERSIONS).await;
    let mut good = Spdy::connect(&through(fixture.exec("cat", false, true)), V4).await;
    for kind in ["error", "stdin", "stdout", "stderr"] {
        good.open_kind(kind).await;
    }
    // a record that says it is longer than any, one that never comes whole, and one of another version
    let hello = [&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3][..], &[0; 40]].concat();
    let cases = [
        b"POST /exec/0 HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0xff; 100_000],
        vec![22, 3, 1, 0xff, 0xff],
        [&[22, 3, 1, 0x40, 0][..], &[1, 0xff, 0xff, 0xff], &[0; 50_000]].concat(),
        hello,
        vec![22],
        Vec::new(),
    ];
    for (number, bytes) in cases.iter().enumerate() {
        let mut socket = TcpStream::connect(fixture.server.address()).await.unwrap();
        let _ = socket.write_all(bytes).await;
        let mut answer = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(5), socket.read_to_end(&mut answer));
        assert!(end.await.is_ok(), "case {number} is kept");
        assert!(!answer.starts_with(b"HTTP"), "case {number}");
    }
    good.data(3, b"fine", true).await;
    assert_eq!(good.rest().await.text(5), "fine");
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_that_never_end_are_given_up_for_later_ones() {
    let authority = Authority::new();
    let limits = Limits {
        // none ends by time
        handshake: Duration::from_secs(3600),
        pending: 8,
        ..Limits::default()
    };
    let (fixture, through) = start(&authority, limits, rustls::ALL_VERSIONS).await;
    let mut idle = Vec::new();
    for number in 0..20 {
        let mut socket = TcpStream::connect(fixture.server.address()).await.unwrap();
        // some have begun
        let _ = socket.write_all(&[22, 3, 1][..number % 4]).await;
        idle.push(socket);
    }
    for (number, socket) in idle[..12].iter_mut().enumerate() {
        let mut answer = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(20), socket.read_to_end(&mut answer));
        assert!(end.await.is_ok(), "{number} is kept");
    }
    // and those that are left hold nobody up
    let mut good = Spdy::connect(&through(fixture.exec("cat", false, true)), V4).await;
    for kind in ["error", "stdin", "stdout", "stderr"] {
        good.open_kind(kind).await;
    }
    good.data(3, b"fine", true).await;
    assert_eq!(good.rest().await.text(5), "fine");
}

#[tokio::test]
async fn what_is_encrypted_comes_from_memory() {
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async {
        let (served, _) = listener.accept().await.unwrap();
        authority.tls().accept(served).await.unwrap()
    };
    let (_client, served) = tokio::join!(authority.connect(address), serve);
    let socket = crate::transport::Socket::Right(Box::new(served));
    let link = crate::link::Link::new(socket, &[], crate::link::Wire::Spdy, 16).unwrap();
    assert_eq!(link.writer.kind(), crate::chunk::Kind::Memory);
}

#[test]
fn a_certificate_and_its_key() {
    let authority = Authority::new();
    let error = |certificate: &[u8], key: &[u8]| {
        let error = Tls::new(certificate, key).unwrap_err();
        crate::chain(&error.into())
    };
    let (certificate, key) = (authority.read("server.crt"), authority.read("server.key"));
    assert!(error(b"", &key).starts_with("certificate: "));
    assert!(error(&key, &key).starts_with("certificate: "));
    assert!(error(&certificate, &certificate).starts_with("private key: "));
    let other = error(&certificate, &authority.read("other.key"));
    assert!(other.starts_with("certificate and private key: "), "{other}");
    // with those that lead to the authority
    Tls::new(&[certificate, authority.read("ca.crt")].concat(), &key).unwrap();
}
