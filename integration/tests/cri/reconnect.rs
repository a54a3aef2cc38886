//! The daemon's connection to a monitor breaks while commands are on their way: each of them ends as it did.
//!
//! A monitor serves one connection, the last one that was made. So whoever connects takes the daemon's away; and if he
//! does not keep to the protocol, he is shown out himself, and the daemon comes again.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{Node, Options, leaks, request, stretched};
use coracle_kernel::path;
use coracle_kernel::pidfd;
use coracle_kernel::scm::{self, Kind, Mode};
use coracle_kernel::signal::{self, Signal};

use crate::streams::{Stage, TRANSPORTS, expect, process, run};
use crate::support::{eventually, monitor_of};

crate::tests![
    a_command_that_waits_for_the_connection_has_its_exit_code,
    a_session_that_waits_for_the_connection_has_its_exit_code,
    a_command_that_runs_meanwhile_has_its_exit_code,
    a_command_that_ends_meanwhile_has_its_exit_code,
];

/// A pod, its running container, its monitor.
struct Place {
    node: Node,
    pod: String,
    container: String,
    monitor: i32,
}

impl Place {
    async fn new(name: &str) -> Result<Place> {
        let node = Node::with_busybox(Options::default()).await?;
        let config = request::pod(name, &node.logs);
        let pod = node.run_pod(&config).await?;
        let main = request::container("main", "sleep 1000");
        let container = node.run_container(&pod, &main, &config).await?;
        let monitor = monitor_of(&node, &pod).await?;
        Ok(Place {
            node,
            pod,
            container,
            monitor,
        })
    }

    /// A connection of our own to the monitor.
    fn rival(&self) -> Result<Rival> {
        let dir = path::open_dir(self.node.state().join("monitors"))?;
        let name = format!("{}.sock", self.pod);
        Ok(Rival(scm::connect(&dir, &name, Kind::Seqpacket, Mode::Blocking)?))
    }

    /// Waits until an ExecSync has come as far as its cgroup, which is made right before it is asked for.
    async fn asked(&self) -> Result<()> {
        eventually(async || {
            let groups = leaks::snapshot_here()?.of("cgroup");
            let there = groups.iter().any(|group| group.contains("/exec-"));
            ensure!(there, "no exec was begun: {groups:?}");
            Ok(())
        })
        .await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(signal::kill(self.monitor, signal)?)
    }

    async fn has_reconnected(&self) -> Result<()> {
        eventually(async || {
            let told = self.node.log().contains("the connection to the monitor broke");
            ensure!(told, "the daemon did not notice");
            Ok(())
        })
        .await
    }
}

/// Who took the daemon's place.
struct Rival(std::os::fd::OwnedFd);

impl Rival {
    /// Says what is no frame. When this returns, the monitor has no connection at all.
    fn be_shown_out(self) -> Result<()> {
        scm::send(&self.0, b"nonsense", &[])?;
        let received = scm::recv(&self.0, &mut [0; 64])?;
        ensure!(received.len == 0, "the monitor answered");
        Ok(())
    }
}

/// Whether the kernel keeps how a process ended for holders of its descriptor (Linux 6.15).
fn kernel_tells() -> Result<bool> {
    let mut child = Command::new("true").spawn()?;
    let held = pidfd::open(i32::try_from(child.id())?)?;
    child.wait()?;
    Ok(pidfd::info(&held).is_ok_and(|info| info.exit.is_some()))
}

async fn a_command_that_waits_for_the_connection_has_its_exit_code() -> Result<()> {
    let place = Place::new("queued").await?;
    place.rival()?.be_shown_out()?;
    // Whatever the daemon asks from here on waits until there is a connection again.
    place.signal(Signal::STOP)?;
    let (answer, asked) = tokio::join!(
        place
            .node
            .exec(&place.container, &["sh", "-c", "echo said; exit 7"], 30),
        async {
            let asked = place.asked().await;
            place.signal(Signal::CONT).and(asked)
        }
    );
    asked?;
    let answer = answer?;
    ensure!(
        answer.exit_code == 7 && answer.stdout == b"said\n",
        "{answer:?}\n{}",
        place.node.log()
    );
    place.node.finish().await
}

async fn a_session_that_waits_for_the_connection_has_its_exit_code() -> Result<()> {
    let Some(stage) = Stage::start("session", "sleep 1000").await? else {
        return Ok(());
    };
    let mut session = stage
        .exec(&[TRANSPORTS[1]], &["sh", "-c", "echo said; exit 9"])
        .await?;
    let monitor = monitor_of(&stage.node, &stage.pod).await?;
    let place = Place {
        node: stage.node,
        pod: stage.pod,
        container: stage.id,
        monitor,
    };
    place.rival()?.be_shown_out()?;
    place.signal(Signal::STOP)?;
    let (output, woken) = tokio::join!(run(&mut session, b""), async {
        // Nothing tells that it has come as far as the request.
        tokio::time::sleep(stretched(Duration::from_secs(1))).await;
        place.signal(Signal::CONT)
    });
    woken?;
    expect(&output?, "said\n", "", 9)?;
    place.node.finish().await
}

async fn a_command_that_runs_meanwhile_has_its_exit_code() -> Result<()> {
    let place = Place::new("running").await?;
    let script = "until [ -e /go ]; do sleep 0.02; done; exit 8";
    let command = ["sh", "-c", script];
    let (answer, broken) = tokio::join!(place.node.exec(&place.container, &command, 30), async {
        place.asked().await?;
        place.rival()?.be_shown_out()?;
        place.has_reconnected().await?;
        // Goes over the new connection, so that is there when the other one ends.
        let go = place.node.exec(&place.container, &["touch", "/go"], 10).await?;
        ensure!(go.exit_code == 0, "{go:?}");
        Ok(())
    });
    broken?;
    let answer = answer?;
    ensure!(answer.exit_code == 8, "{answer:?}");
    place.node.finish().await
}

async fn a_command_that_ends_meanwhile_has_its_exit_code() -> Result<()> {
    let place = Place::new("ended").await?;
    let (answer, broken) = tokio::join!(
        place
            .node
            .exec(&place.container, &["sh", "-c", "exec sleep 7171"], 30),
        async {
            let mut command = 0;
            eventually(async || {
                command = process(&["sleep", "7171"])?.context("it does not run yet")?;
                Ok(())
            })
            .await?;
            // The monitor meets us first and the end of the command then, which it tells to us.
            place.signal(Signal::STOP)?;
            let rival = place.rival()?;
            signal::kill(command, Signal::TERM)?;
            place.signal(Signal::CONT)?;
            eventually(async || {
                let gone = fs::metadata(format!("/proc/{command}")).is_err();
                ensure!(gone, "the command is there still");
                Ok(())
            })
            .await?;
            // The daemon may have taken its place back by now.
            drop(rival);
            place.has_reconnected().await
        }
    );
    broken?;
    match answer {
        Ok(answer) => ensure!(answer.exit_code == 143, "{answer:?}"),
        // An older kernel keeps it from us, and the daemon says so.
        Err(error) => ensure!(!kernel_tells()?, "{error}"),
    }
    place.node.finish().await
}
