//! A client: the other half of SPDY and WebSocket, written from the specifications and not from our own reader.

use std::collections::HashMap;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::spdy::header::deflate::Deflater;
use crate::ws::frame::masked;

/// No answer of these tests takes longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Sends a request; the socket, the head of the answer, and whether it was 101.
pub(super) async fn request(method: &str, url: &str, lines: &[&str]) -> (TcpStream, String) {
    let rest = url.strip_prefix("http://").unwrap();
    let (host, path) = rest.split_once('/').unwrap();
    let mut socket = TcpStream::connect(host).await.unwrap();
    socket.set_nodelay(true).unwrap();
    let mut head = format!("{method} /{path} HTTP/1.1\r\nHost: {host}\r\n");
    for line in lines {
        head.push_str(line);
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let byte = tokio::time::timeout(PATIENCE, socket.read_u8()).await.unwrap();
        answer.push(byte.unwrap());
    }
    (socket, String::from_utf8(answer).unwrap().to_ascii_lowercase())
}

/// The status and the text of a refusal.
pub(super) async fn refused(method: &str, url: &str, lines: &[&str]) -> (String, String) {
    let (mut socket, head) = request(method, url, lines).await;
    let mut text = String::new();
    let read = socket.read_to_string(&mut text);
    tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap();
    (head, text)
}

pub(super) fn spdy_lines(protocol: &str) -> [String; 3] {
    [
        "Connection: Upgrade".to_owned(),
        "Upgrade: SPDY/3.1".to_owned(),
        format!("X-Stream-Protocol-Version: {protocol}"),
    ]
}

/// What a SPDY server has sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    Reply(u32),
    Data(u32, Vec<u8>, bool),
    Reset(u32),
    Ping(u32),
    GoAway,
}

/// A client of SPDY.
pub(super) struct Spdy {
    pub(super) socket: TcpStream,
    deflater: Deflater,
    next: u32,
    /// Frames that came while a reply was waited for.
    pub(super) early: Vec<Frame>,
}

/// What a session has brought, by stream.
#[derive(Debug, Default)]
pub(super) struct Result {
    pub(super) data: HashMap<u32, Vec<u8>>,
    pub(super) finished: Vec<u32>,
    pub(super) reset: Vec<u32>,
    pub(super) gone_away: bool,
}

impl Result {
    pub(super) fn text(&self, stream: u32) -> String {
        let bytes = self.data.get(&stream).cloned().unwrap_or_default();
        String::from_utf8(bytes).unwrap()
    }
}

impl Spdy {
    pub(super) async fn connect(url: &str, protocol: &str) -> Spdy {
        let lines = spdy_lines(protocol);
        let (socket, head) = request("POST", url, &lines.each_ref().map(String::as_str)).await;
        assert!(head.starts_with("http/1.1 101"), "{head}");
        assert!(head.contains("\r\nupgrade: spdy/3.1\r\n"), "{head}");
        assert!(head.contains("\r\nconnection: upgrade\r\n"), "{head}");
        assert!(
            head.contains(&format!("x-stream-protocol-version: {protocol}")),
            "{head}"
        );
        Spdy::over(socket)
    }

    pub(super) fn over(socket: TcpStream) -> Spdy {
        Spdy {
            socket,
            deflater: Deflater::new(),
            next: 1,
            early: Vec::new(),
        }
    }

    /// A SYN_STREAM frame for the next stream, and its number.
    pub(super) fn syn(&mut self, headers: &[(&str, &str)], flags: u8) -> (u32, Vec<u8>) {
        let stream = self.next;
        self.next += 2;
        let block = self.deflater.block(headers);
        let mut body = stream.to_be_bytes().to_vec();
        body.extend([0; 6]);
        body.extend(block);
        (stream, control(1, flags, &body))
    }

    /// Opens a stream as Go's client does: it waits for the reply.
    pub(super) async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let (stream, frame) = self.syn(headers, 0);
        self.send(&frame).await;
        loop {
            match self.read().await.unwrap() {
                Frame::Reply(number) if number == stream => return stream,
                Frame::Reset(number) if number == stream => panic!("{headers:?} was refused"),
                other => self.early.push(other),
            }
        }
    }

    pub(super) async fn open_kind(&mut self, kind: &str) -> u32 {
        self.open(&[("streamtype", kind)]).await
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).await.unwrap();
    }

    pub(super) async fn data(&mut self, stream: u32, bytes: &[u8], fin: bool) {
        self.send(&data(stream, bytes, fin)).await;
    }

    /// The next frame; `None` at the end.
    pub(super) async fn read(&mut self) -> Option<Frame> {
        tokio::time::timeout(PATIENCE, self.read_on())
            .await
            .expect("the server says nothing")
    }

    async fn read_on(&mut self) -> Option<Frame> {
        let mut head = [0; 8];
        self.socket.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
        let mut body = vec![0; length];
        self.socket.read_exact(&mut body).await.ok()?;
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes[..4].try_into().unwrap()) & 0x7fff_ffff;
        if head[0] & 0x80 == 0 {
            return Some(Frame::Data(word(&head), body, head[4] & 1 != 0));
        }
        assert_eq!(head[..2], [0x80, 3]);
        Some(match head[3] {
            2 => Frame::Reply(word(&body)),
            3 => Frame::Reset(word(&body)),
            6 => Frame::Ping(word(&body)),
            7 => Frame::GoAway,
            kind => panic!("frame of type {kind}"),
        })
    }

    /// Reads to the end of the connection.
    pub(super) async fn rest(&mut self) -> Result {
        let mut result = Result::default();
        let mut early = std::mem::take(&mut self.early).into_iter();
        loop {
            let frame = match early.next() {
                Some(frame) => Some(frame),
                None => self.read().await,
            };
            match frame {
                None => return result,
                Some(Frame::Data(stream, bytes, fin)) => {
                    assert!(
                        !result.finished.contains(&stream),
                        "data after the end of {stream}"
                    );
                    result.data.entry(stream).or_default().extend(bytes);
                    if fin {
                        result.finished.push(stream);
                    }
                }
                Some(Frame::Reset(stream)) => result.reset.push(stream),
                Some(Frame::GoAway) => result.gone_away = true,
                Some(Frame::Reply(_) | Frame::Ping(_)) => {}
            }
        }
    }
}

pub(super) fn data(stream: u32, bytes: &[u8], fin: bool) -> Vec<u8> {
    let mut frame = stream.to_be_bytes().to_vec();
    frame.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
    frame[4] = u8::from(fin);
    frame.extend(bytes);
    frame
}

pub(super) fn control(kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80, 3, 0, kind];
    frame.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
    frame[4] = flags;
    frame.extend(body);
    frame
}

/// A client of WebSocket.
pub(super) struct Socket {
    pub(super) socket: TcpStream,
}

impl Socket {
    pub(super) async fn connect(url: &str, protocol: &str) -> Socket {
        let name = format!("Sec-WebSocket-Protocol: {protocol}");
        let mut lines = vec![
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ];
        if !protocol.is_empty() {
            lines.push(&name);
        }
        let (socket, head) = request("GET", url, &lines).await;
        assert!(head.starts_with("http/1.1 101"), "{head}");
        assert!(head.contains("\r\nconnection: upgrade\r\n"), "{head}");
        assert!(
            head.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="),
            "{head}"
        );
        assert_eq!(head.contains("sec-websocket-protocol"), !protocol.is_empty());
        Socket { socket }
    }

    /// Sends a whole frame: 1 is text, 2 binary, 8 close, 9 ping.
    pub(super) async fn send(&mut self, opcode: u8, payload: &[u8]) {
        let frame = masked(0x80 | opcode, [0x12, 0x34, 0x56, 0x78], payload);
        self.socket.write_all(&frame).await.unwrap();
    }

    /// The next frame: its type and payload; `None` at the end.
    pub(super) async fn read(&mut self) -> Option<(u8, Vec<u8>)> {
        tokio::time::timeout(PATIENCE, self.read_on())
            .await
            .expect("the server says nothing")
    }

    async fn read_on(&mut self) -> Option<(u8, Vec<u8>)> {
        let first = self.socket.read_u8().await.ok()?;
        assert_eq!(first & 0xf0, 0x80, "one frame a message");
        let length = match self.socket.read_u8().await.ok()? {
            126 => u64::from(self.socket.read_u16().await.ok()?),
            127 => self.socket.read_u64().await.ok()?,
            short => u64::from(short),
        };
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        self.socket.read_exact(&mut payload).await.ok()?;
        Some((first & 0x0f, payload))
    }

    /// Reads to the end: bytes by channel, and the close status.
    pub(super) async fn rest(&mut self) -> (HashMap<u8, Vec<u8>>, Option<u16>) {
        let (mut channels, mut status) = (HashMap::<u8, Vec<u8>>::new(), None);
        while let Some((opcode, payload)) = self.read().await {
            match opcode {
                8 => status = Some(u16::from_be_bytes(payload[..2].try_into().unwrap())),
                1 | 2 => channels.entry(payload[0]).or_default().extend(&payload[1..]),
                _ => {}
            }
        }
        (channels, status)
    }
}
