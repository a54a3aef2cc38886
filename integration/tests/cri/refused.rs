//! What a daemon does not start with: each is told in one clear line, and nothing is left.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::daemon::Server;
use coracle_integration::node::binary;
use coracle_integration::{Node, Options, leaks, stretched};
use coracle_kernel::mount_old::{self, Flags};
use coracle_kernel::{Errno, creds, mount, seccomp, syscall};

crate::tests![
    a_root_that_cannot_be_written,
    a_configuration_that_is_wrong,
    a_runtime_that_is_another,
    a_kernel_that_lacks_a_call,
    what_another_daemon_has,
];

/// A daemon that is not started yet.
fn daemon(name: &str, config: &str) -> Result<Server> {
    let dir = PathBuf::from(format!("/tmp/coracle-it-{}-{name}", std::process::id()));
    Server::new(&binary("coracled"), &dir, config)
}

/// The one line in which a daemon said why it does not start.
async fn refusal(server: &Server, mut child: Child) -> Result<String> {
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begun.elapsed() > stretched(Duration::from_secs(10)) {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("it runs:\n{}", server.log());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let log = server.log();
    ensure!(status.code() == Some(1), "{status}: {log}");
    let lines: Vec<&str> = log.lines().collect();
    ensure!(
        lines.len() == 1 && lines[0].starts_with("coracled: ") && lines[0].len() < 400,
        "not one clear line:\n{log}"
    );
    let left = leaks::pod_files(server.dir());
    ensure!(left.is_empty(), "{left:?}");
    Ok(lines[0].to_owned())
}

/// Starts the daemon, has it refused, and takes its places away.
async fn refused(server: Server, words: &[&str]) -> Result<()> {
    let line = refusal(&server, server.launch(Command::new(server.program()))?).await?;
    let missing: Vec<_> = words.iter().filter(|word| !line.contains(**word)).collect();
    ensure!(missing.is_empty(), "{missing:?} is not in {line:?}");
    std::fs::remove_dir_all(server.dir())?;
    Ok(())
}

async fn a_root_that_cannot_be_written() -> Result<()> {
    let server = daemon("readonly", "")?;
    mount_old::mount_at(c"tmpfs", &server.root(), c"tmpfs", Flags::RDONLY, c"")?;
    let child = server.launch(Command::new(server.program()))?;
    let line = refusal(&server, child).await;
    mount::detach(server.root())?;
    let line = line?;
    let root = server.root().display().to_string();
    ensure!(
        line.contains(&root) && line.to_lowercase().contains("read-only"),
        "{line}"
    );
    std::fs::remove_dir_all(server.dir())?;

    let server = daemon("file", "")?;
    std::fs::remove_dir(server.root())?;
    std::fs::write(server.root(), "")?;
    let root = server.root().display().to_string();
    refused(server, &[&root]).await?;

    let server = daemon("state", "")?;
    std::fs::write(server.state(), "")?;
    let state = server.state().display().to_string();
    refused(server, &[&state]).await
}

async fn a_configuration_that_is_wrong() -> Result<()> {
    for (name, config, words) in [
        (
            "unknown-key",
            "[server]\nsocketgroup = \"x\"\n",
            &["config.toml:2:", "socketgroup", "socket_group"][..],
        ),
        ("unknown-table", "[servers]\n", &["config.toml:1:", "servers"]),
        ("type", "[network]\nmtu = \"many\"\n", &["config.toml:2:", "u32"]),
        ("range", "[network]\nmtu = 7\n", &["mtu", "7"]),
        (
            "subnet",
            "[network]\nsubnet = \"10.0.0.0/33\"\n",
            &["subnet", "10.0.0.0/33"],
        ),
        (
            "value",
            "[runtime]\nmount_api = \"newest\"\n",
            &["config.toml:2:", "newest"],
        ),
        ("no-toml", "[server\n", &["config.toml:1:"]),
        (
            "group",
            "[server]\nsocket_group = \"no-such-group\"\n",
            &["no-such-group"],
        ),
    ] {
        refused(daemon(name, config)?, words).await.context(name)?;
    }
    let huge = daemon("huge", &"#".repeat(2 << 20))?;
    refused(huge, &["config.toml"]).await?;
    let absent = daemon("absent", "")?;
    std::fs::remove_file(absent.dir().join("config.toml"))?;
    refused(absent, &["config.toml"]).await
}

async fn a_runtime_that_is_another() -> Result<()> {
    let server = daemon("no-runtime", "[runtime]\nbinary = \"/no/such/coracle\"\n")?;
    refused(server, &["/no/such/coracle"]).await?;
    let server = daemon("other-runtime", "")?;
    let other = server.dir().join("other");
    std::fs::write(&other, "#!/bin/sh\necho coracle version 0.0.0-other\n")?;
    std::fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    std::fs::write(
        server.dir().join("config.toml"),
        format!("[runtime]\nbinary = {other:?}\n"),
    )?;
    refused(server, &["0.0.0-other", "coracled is"]).await
}

async fn a_kernel_that_lacks_a_call() -> Result<()> {
    for (name, call) in [
        ("openat2", syscall::OPENAT2),
        ("clone3", syscall::CLONE3),
        ("pidfd_open", syscall::PIDFD_OPEN),
        ("mount_setattr", syscall::MOUNT_SETATTR),
        ("fsopen", syscall::FSOPEN),
        ("open_tree", syscall::OPEN_TREE),
        ("move_mount", syscall::MOVE_MOUNT),
        ("close_range", syscall::CLOSE_RANGE),
    ] {
        let server = daemon(name, "")?;
        // A thread's filter is inherited by the process that it starts, and by nobody else.
        let child = std::thread::scope(|scope| {
            let lacking = scope.spawn(|| {
                creds::set_no_new_privs()?;
                let program = seccomp::lacking_program(call, None, Errno::ENOSYS);
                seccomp::load(&program, seccomp::FilterFlags::empty())?;
                server.launch(Command::new(server.program()))
            });
            lacking.join().unwrap()
        });
        let line = refusal(&server, child?).await.context(name)?;
        ensure!(line.contains(name) && line.contains("5.14"), "{line}");
        std::fs::remove_dir_all(server.dir())?;
    }
    Ok(())
}

async fn what_another_daemon_has() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let before = node.log().len();
    // The same places.
    let mut second = node.launch()?;
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = second.try_wait()? {
            break status;
        }
        ensure!(
            begun.elapsed() < stretched(Duration::from_secs(10)),
            "the second one runs"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let said = node.log()[before..].to_owned();
    ensure!(
        status.code() == Some(1)
            && said.lines().filter(|line| line.starts_with("coracled: ")).count() == 1
            && said.contains(&node.root().display().to_string()),
        "{status}: {said}"
    );
    node.pod_ids().await?;

    // A root of its own, and the state or the socket of the other.
    let server = daemon("state-of-another", "")?;
    std::os::unix::fs::symlink(node.state(), server.state())?;
    refused(server, &["state"]).await?;
    let server = daemon("socket-of-another", "")?;
    std::os::unix::fs::symlink(node.socket(), server.socket())?;
    refused(server, &["coracle.sock", "served by another process"]).await?;
    node.pod_ids().await?;
    node.finish().await?;

    let server = daemon("socket-of-somebody", "")?;
    let _listener = UnixListener::bind(server.socket())?;
    refused(server, &["coracle.sock", "served by another process"]).await
}
