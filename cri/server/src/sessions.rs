//! The engine as the streaming server has it: what a session copies from and to.

use coracle_engine::{Engine, Streams, Wanted};
use coracle_stream::{AttachRequest, ExecRequest, Process, SessionError, Sessions};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

/// The sessions of the engine's containers and pods.
pub(crate) struct EngineSessions(pub(crate) Engine);

impl Sessions for EngineSessions {
    async fn exec(&self, request: &ExecRequest) -> Result<Process, SessionError> {
        let wanted = Wanted {
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let streams = self
            .0
            .exec(&request.container, request.command.clone(), wanted)
            .await?;
        Ok(process(streams))
    }

    async fn attach(&self, request: &AttachRequest) -> Result<Process, SessionError> {
        let wanted = Wanted {
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        Ok(process(self.0.attach(&request.container, wanted).await?))
    }

    async fn dial(&self, pod: &str, port: u16) -> Result<TcpStream, SessionError> {
        Ok(self.0.dial(pod, port).await?)
    }
}

fn process(streams: Streams) -> Process {
    let exit = streams.exit.map(|exit| {
        let (sender, receiver) = oneshot::channel();
        tokio::spawn(async move {
            // A session that has gone waits for nothing.
            let mut sender = sender;
            tokio::select! {
                code = exit => if let Ok(code) = code { let _ = sender.send(code); },
                () = sender.closed() => {}
            }
        });
        receiver
    });
    Process {
        stdin: streams.stdin,
        stdout: streams.stdout,
        stderr: streams.stderr,
        tty: streams.terminal,
        exit,
        guard: Box::new(()),
    }
}
