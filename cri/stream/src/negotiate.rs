//! The choice of a protocol from the headers of an upgrade request.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use http::{Method, StatusCode};
use sha1::{Digest as _, Sha1};

use crate::StreamRequest;
use crate::link::Wire;

/// Name of SPDY in an `Upgrade` header.
const SPDY: &str = "SPDY/3.1";
/// The only protocol of port-forward.
const PORT_FORWARD: &str = "portforward.k8s.io";
/// The same, inside a WebSocket.
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// Protocols of exec and attach over SPDY, best first.
const SPDY_PROTOCOLS: [&str; 4] = [
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
    "channel.k8s.io",
];
/// Protocols of exec and attach over WebSocket.
const CHANNEL_PROTOCOLS: [&str; 5] = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
];
/// Protocols of port-forward over WebSocket.
const FORWARD_PROTOCOLS: [&str; 3] = [TUNNEL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io"];
/// Most ports with two channels each; in base64 their numbers have to be ASCII characters.
const MOST_CHANNEL_PORTS: usize = 32;

const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_PROTOCOLS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");
const SOCKET_PROTOCOL: HeaderName = HeaderName::from_static("sec-websocket-protocol");
const SOCKET_KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const SOCKET_ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");
const SOCKET_VERSION: HeaderName = HeaderName::from_static("sec-websocket-version");

/// What client and server will speak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Protocol {
    /// The bytes on the socket.
    pub(crate) wire: Wire,
    /// Whether a terminal has a resize stream.
    pub(crate) resize: bool,
    /// Whether the end is told by a JSON status; otherwise by a text, and only if it is a failure.
    pub(crate) status: bool,
    /// Headers of the answer.
    pub(crate) headers: HeaderMap,
}

/// Why the request is not upgraded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) code: StatusCode,
    pub(crate) text: String,
    /// A header of the answer that says what would be accepted.
    pub(crate) accepted: Option<(HeaderName, &'static [&'static str])>,
}

/// Chooses a protocol, the first of the client's that we have.
pub(crate) fn negotiate(
    method: &Method,
    headers: &HeaderMap,
    request: &StreamRequest,
) -> Result<Protocol, Refusal> {
    let upgrades = values(headers, &CONNECTION).any(|value| value.eq_ignore_ascii_case("upgrade"));
    let asked: Vec<_> = values(headers, &UPGRADE).collect();
    let is = |name: &str| upgrades && asked.iter().any(|value| value.eq_ignore_ascii_case(name));
    if is("websocket") && method == Method::GET {
        web_socket(headers, request)
    } else if is(SPDY) && (method == Method::POST || method == Method::GET) {
        spdy(headers, request)
    } else {
        Err(bad(format!(
            "unable to upgrade: expected a POST or GET with \"Connection: Upgrade\" and \"Upgrade: {SPDY}\", or a \
             GET with \"Upgrade: websocket\", but got a {method} with \"Upgrade: {}\"",
            asked.join(", ")
        )))
    }
}

fn spdy(headers: &HeaderMap, request: &StreamRequest) -> Result<Protocol, Refusal> {
    let ours: &'static [&'static str] = match request {
        StreamRequest::PortForward(_) => &[PORT_FORWARD],
        StreamRequest::Exec(_) | StreamRequest::Attach(_) => &SPDY_PROTOCOLS,
    };
    let theirs: Vec<_> = values(headers, &STREAM_PROTOCOL).collect();
    if theirs.is_empty() {
        return Err(bad(format!(
            "unable to upgrade: the header {STREAM_PROTOCOL} names no protocol; expected one of {}",
            ours.join(", ")
        )));
    }
    let name = choose(&theirs, ours, ACCEPTED_PROTOCOLS)?;
    let mut answer = HeaderMap::new();
    answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(UPGRADE, HeaderValue::from_static(SPDY));
    answer.insert(STREAM_PROTOCOL, HeaderValue::from_static(name));
    Ok(Protocol {
        wire: Wire::Spdy,
        resize: matches!(name, "v4.channel.k8s.io" | "v3.channel.k8s.io"),
        status: name == "v4.channel.k8s.io",
        headers: answer,
    })
}

fn web_socket(headers: &HeaderMap, request: &StreamRequest) -> Result<Protocol, Refusal> {
    if !values(headers, &SOCKET_VERSION).any(|version| version == "13") {
        let mut refusal = bad(format!("unable to upgrade: expected \"{SOCKET_VERSION}: 13\""));
        refusal.accepted = Some((SOCKET_VERSION, &["13"]));
        return Err(refusal);
    }
    let key = values(headers, &SOCKET_KEY).next().unwrap_or_default();
    if BASE64.decode(key).map(|bytes| bytes.len()) != Ok(16) {
        return Err(bad(format!(
            "unable to upgrade: expected sixteen bytes of base64 as {SOCKET_KEY}"
        )));
    }
    let theirs: Vec<_> = values(headers, &SOCKET_PROTOCOL).collect();
    let ours: &'static [&'static str] = match request {
        StreamRequest::PortForward(_) => &FORWARD_PROTOCOLS,
        StreamRequest::Exec(_) | StreamRequest::Attach(_) => &CHANNEL_PROTOCOLS,
    };
    // a client that names none speaks the oldest one of binary channels
    let name = match theirs.is_empty() {
        true => None,
        false => Some(choose(&theirs, ours, SOCKET_PROTOCOL)?),
    };
    if let StreamRequest::PortForward(request) = request
        && name != Some(TUNNEL)
        && !(1..=MOST_CHANNEL_PORTS).contains(&request.ports.len())
    {
        return Err(bad(format!(
            "unable to upgrade: channels need 1 to {MOST_CHANNEL_PORTS} ports in the request, which has {}; expected \
             the protocol {TUNNEL}",
            request.ports.len()
        )));
    }
    let mut answer = HeaderMap::new();
    answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(UPGRADE, HeaderValue::from_static("websocket"));
    if let Ok(accept) = HeaderValue::try_from(accept_key(key)) {
        answer.insert(SOCKET_ACCEPT, accept);
    }
    if let Some(name) = name {
        answer.insert(SOCKET_PROTOCOL, HeaderValue::from_static(name));
    }
    let name = name.unwrap_or_default();
    let wire = match name {
        TUNNEL => Wire::Tunnel,
        _ => Wire::Channels {
            base64: name.contains("base64"),
            half_close: name.starts_with("v5."),
        },
    };
    Ok(Protocol {
        wire,
        resize: true,
        status: name.starts_with("v4.") || name.starts_with("v5."),
        headers: answer,
    })
}

/// The first of the client's protocols that is one of ours.
fn choose(
    theirs: &[&str],
    ours: &'static [&'static str],
    header: HeaderName,
) -> Result<&'static str, Refusal> {
    let common = theirs
        .iter()
        .find_map(|name| ours.iter().find(|ours| *ours == name));
    common.copied().ok_or_else(|| Refusal {
        code: StatusCode::FORBIDDEN,
        text: format!(
            "unable to upgrade: unable to negotiate protocol: client supports {}, server accepts {}",
            theirs.join(", "),
            ours.join(", ")
        ),
        accepted: Some((header, ours)),
    })
}

/// The values of a header that may stand several times and hold lists.
fn values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

/// The proof that we know what a WebSocket is (RFC 6455, section 4.2.2).
fn accept_key(key: &str) -> String {
    let proof = Sha1::new()
        .chain_update(key)
        .chain_update("258EAFA5-E914-47DA-95CA-C5AB0DC85B11")
        .finalize();
    BASE64.encode(proof)
}

fn bad(text: String) -> Refusal {
    Refusal {
        code: StatusCode::BAD_REQUEST,
        text,
        accepted: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ExecRequest, PortForwardRequest};

    const KEY: (&str, &str) = ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");

    fn ask(
        method: &Method,
        lines: &[(&'static str, &str)],
        request: &StreamRequest,
    ) -> Result<Protocol, Refusal> {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        negotiate(method, &headers, request)
    }

    fn exec() -> StreamRequest {
        StreamRequest::Exec(ExecRequest::default())
    }

    fn forward(ports: Vec<u16>) -> StreamRequest {
        StreamRequest::PortForward(PortForwardRequest {
            pod: "p".to_owned(),
            ports,
        })
    }

    #[test]
    fn spdy_takes_the_first_protocol_that_both_have() {
        let lines = |versions| {
            [
                ("connection", "Upgrade"),
                ("upgrade", "SPDY/3.1"),
                ("x-stream-protocol-version", versions),
            ]
        };
        let all = "v5.channel.k8s.io, v4.channel.k8s.io,v3.channel.k8s.io";
        let chosen = ask(&Method::POST, &lines(all), &exec()).unwrap();
        assert_eq!(
            (chosen.wire, chosen.resize, chosen.status),
            (Wire::Spdy, true, true)
        );
        assert_eq!(chosen.headers["x-stream-protocol-version"], "v4.channel.k8s.io");
        let v1 = ask(&Method::GET, &lines("channel.k8s.io"), &exec()).unwrap();
        assert_eq!((v1.resize, v1.status), (false, false));

        let refusal = ask(&Method::POST, &lines("v9.channel.k8s.io"), &exec()).unwrap_err();
        assert_eq!(refusal.code, StatusCode::FORBIDDEN);
        assert_eq!(refusal.accepted.unwrap().1.len(), 4);
        let refusal = ask(&Method::POST, &lines(" ,"), &exec()).unwrap_err();
        assert_eq!(refusal.code, StatusCode::BAD_REQUEST);
        ask(&Method::POST, &lines(PORT_FORWARD), &forward(vec![])).unwrap();
    }

    #[test]
    fn websocket_takes_channels_tunnel_or_nothing() {
        let lines = |protocols| {
            [
                ("connection", "keep-alive, Upgrade"),
                ("upgrade", "WebSocket"),
                ("sec-websocket-version", "13"),
                KEY,
                ("sec-websocket-protocol", protocols),
            ]
        };
        let chosen = ask(&Method::GET, &lines("v5.channel.k8s.io"), &exec()).unwrap();
        assert_eq!(
            chosen.wire,
            Wire::Channels {
                base64: false,
                half_close: true
            }
        );
        // the example of the RFC
        assert_eq!(
            chosen.headers["sec-websocket-accept"],
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
        let none = ask(&Method::GET, &lines("")[..4], &exec()).unwrap();
        assert!(!none.status && none.headers.get("sec-websocket-protocol").is_none());
        let old = ask(&Method::GET, &lines("base64.channel.k8s.io"), &exec()).unwrap();
        assert!(!old.status);
        let refusal = ask(&Method::GET, &lines(TUNNEL), &exec()).unwrap_err();
        assert_eq!(refusal.code, StatusCode::FORBIDDEN);
        assert_eq!(
            ask(&Method::GET, &lines(TUNNEL), &forward(vec![])).unwrap().wire,
            Wire::Tunnel
        );
        let refusal = ask(&Method::GET, &lines("v4.channel.k8s.io"), &forward(vec![])).unwrap_err();
        assert!(refusal.text.contains("1 to 32 ports"), "{}", refusal.text);
        ask(&Method::GET, &lines("v4.channel.k8s.io"), &forward(vec![80])).unwrap();
    }

    #[test]
    fn what_is_no_upgrade_is_told_what_was_expected() {
        let plain = ask(&Method::GET, &[], &exec()).unwrap_err();
        assert_eq!(plain.code, StatusCode::BAD_REQUEST);
        assert!(plain.text.contains("expected"), "{}", plain.text);
        let half = [
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v4.channel.k8s.io"),
        ];
        ask(&Method::POST, &half, &exec()).unwrap_err();
        let put = [("connection", "upgrade"), half[0], half[1]];
        ask(&Method::PUT, &put, &exec()).unwrap_err();
        let version = [("connection", "upgrade"), ("upgrade", "websocket"), KEY];
        let refusal = ask(&Method::GET, &version, &exec()).unwrap_err();
        assert_eq!(refusal.accepted, Some((SOCKET_VERSION, &["13"][..])));
        let key = [
            version[0],
            version[1],
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "short"),
        ];
        assert!(
            ask(&Method::GET, &key, &exec())
                .unwrap_err()
                .text
                .contains("sixteen")
        );
    }
}
