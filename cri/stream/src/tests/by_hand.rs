//! A server for other clients: run it, write requests on its input, take URLs from its output.
//!
//! `cargo test -p coracle-stream -- --ignored --nocapture serve_by_hand`, then lines like `exec -ti sh`, where the
//! letters ask for a terminal and input, `attach -i cat`, `portforward 8080`.

use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::fake::Fixture;
use crate::{AttachRequest, ExecRequest, PortForwardRequest, StreamRequest};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "serves until its input ends"]
async fn serve_by_hand() {
    let fixture = Fixture::start().await;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await.unwrap() {
        let (kind, rest) = line.split_once(' ').unwrap_or((line.as_str(), ""));
        let (flags, script) = match rest.strip_prefix('-').and_then(|rest| rest.split_once(' ')) {
            Some((flags, script)) => (flags, script),
            None => ("", rest),
        };
        let (tty, stdin) = (flags.contains('t'), flags.contains('i'));
        let request = match kind {
            "exec" => StreamRequest::Exec(ExecRequest {
                pod: "pod".to_owned(),
                container: "container".to_owned(),
                command: ["sh", "-c", script].map(str::to_owned).to_vec(),
                tty,
                stdin,
                stdout: true,
                stderr: !tty,
            }),
            "attach" => StreamRequest::Attach(AttachRequest {
                pod: "pod".to_owned(),
                container: script.to_owned(),
                tty,
                stdin,
                stdout: true,
                stderr: !tty,
            }),
            _ => StreamRequest::PortForward(PortForwardRequest {
                pod: "pod".to_owned(),
                ports: rest
                    .split_whitespace()
                    .filter_map(|port| port.parse().ok())
                    .collect(),
            }),
        };
        println!("{}", fixture.url(request));
    }
}
