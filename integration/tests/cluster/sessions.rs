//! What people do with kubectl in running containers: exec, attach, port-forward, cp, logs, debug.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::cell::wait_for;
use coracle_integration::kubelet::{container_status, is_ready};
use coracle_kernel::epoll::{self, Interest};
use coracle_kernel::tty;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{Case, Scene};

pub(crate) const ALL: &[Case] = &[
    ("exec_without_a_terminal", exec_without_a_terminal),
    ("exec_with_a_terminal", exec_with_a_terminal),
    ("attach_and_run", attach_and_run),
    ("ports_are_forwarded", ports_are_forwarded),
    ("files_are_copied", files_are_copied),
    ("logs_are_followed", logs_are_followed),
    ("a_container_is_debugged", a_container_is_debugged),
];

const MINUTE: Duration = Duration::from_secs(60);

/// What goes through a session to see that nothing is lost: more than all buffers on the way hold.
const MUCH: usize = 24 << 20;

fn exec_without_a_terminal(scene: &mut Scene<'_>) -> Result<()> {
    start(scene, "plain", "exec sleep 3600")?;
    let exec = |command: &[&str]| {
        scene
            .cluster
            .kubectl(&[&["exec", "plain", "--"], command].concat())
    };
    let both = exec(&["sh", "-c", "echo out; echo err >&2; exit 42"]).output()?;
    ensure!(both.status.code() == Some(42), "{both:?}");
    ensure!(both.stdout == b"out\n", "{both:?}");
    ensure!(both.stderr.starts_with(b"err\n"), "{both:?}");
    let silent = exec(&["true"]).output()?;
    ensure!(
        silent.status.success() && silent.stdout.is_empty() && silent.stderr.is_empty(),
        "{silent:?}"
    );
    let missing = exec(&["/no/such/program"]).output()?;
    let text = String::from_utf8_lossy(&missing.stderr).into_owned();
    ensure!(
        !missing.status.success() && text.contains("/no/such/program"),
        "{text}"
    );
    // A child that keeps the streams open holds nobody up.
    let left = exec(&["sh", "-c", "sleep 60 & echo done"]).output()?;
    ensure!(left.stdout == b"done\n" && left.status.success(), "{left:?}");

    let much = noise(MUCH);
    let back = with_input(
        scene.cluster.kubectl(&["exec", "-i", "plain", "--", "cat"]),
        &much,
    )?;
    ensure!(
        back.status.success(),
        "{:?}",
        String::from_utf8_lossy(&back.stderr)
    );
    ensure!(
        back.stdout == much,
        "{} of {} bytes came back",
        back.stdout.len(),
        much.len()
    );
    let sum = with_input(
        scene.cluster.kubectl(&["exec", "-i", "plain", "--", "sha256sum"]),
        &much,
    )?;
    let expected: String = Sha256::digest(&much)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    ensure!(
        sum.stdout.starts_with(expected.as_bytes()),
        "the input's end was lost: {sum:?}"
    );
    // Over SPDY, as an older kubectl speaks it.
    let mut old = scene.cluster.kubectl(&["exec", "-i", "plain", "--", "cat"]);
    old.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "false");
    ensure!(with_input(old, &much)?.stdout == much, "lost over SPDY");
    Ok(())
}

fn exec_with_a_terminal(scene: &mut Scene<'_>) -> Result<()> {
    start(scene, "terminal", "exec sleep 3600")?;
    let mut session = Session::start(
        &scene.cluster.kubectl(&["exec", "-it", "terminal", "--", "sh"]),
        (31, 97),
    )?;
    session.type_in("stty size; echo $TERM\n")?;
    session.wait_for("31 97\r\nxterm\r\n")?;
    tty::set_size(
        &session.master,
        tty::Size {
            rows: 45,
            columns: 120,
        },
    )?;
    session.type_in("while [ \"$(stty size)\" != '45 120' ]; do sleep 0.1; done; echo re-sized\n")?;
    session.wait_for("\nre-sized\r\n")?;
    session.type_in("sh -c 'echo sle-eping; exec sleep 1000'\n")?;
    session.wait_for("\nsle-eping\r\n")?;
    session.type_in("\x03")?;
    session.type_in("echo inter-rupted; exit 7\n")?;
    session.wait_for("\ninter-rupted\r\n")?;
    let status = wait_for("kubectl to end", MINUTE, || Ok(session.child.try_wait()?))?;
    ensure!(status.code() == Some(7), "{status}");
    Ok(())
}

fn attach_and_run(scene: &mut Scene<'_>) -> Result<()> {
    let script =
        "echo begun; while read line; do echo \"got $line\"; echo \"err $line\" >&2; done; echo over";
    let mut reader = pod("reader", &scene.image, script);
    reader["spec"]["restartPolicy"] = json!("Never");
    let main = &mut reader["spec"]["containers"][0];
    (main["stdin"], main["stdinOnce"]) = (json!(true), json!(true));
    scene.cluster.apply(&[reader])?;
    scene.cluster.wait_pod("reader", "to run", is_ready)?;
    let attached = with_input(scene.cluster.kubectl(&["attach", "-i", "reader"]), b"one\ntwo\n")?;
    let text = String::from_utf8_lossy(&attached.stdout).into_owned();
    ensure!(text.ends_with("got one\ngot two\nover\n"), "{attached:?}");
    let errors = String::from_utf8_lossy(&attached.stderr).into_owned();
    ensure!(errors.contains("err one\nerr two\n"), "{errors}");
    // Its input ended with the session, so it ended; the log has it all.
    scene.cluster.wait_pod("reader", "to be done", |pod| {
        pod["status"]["phase"] == "Succeeded"
    })?;
    let log = scene.cluster.run(&["logs", "reader"])?;
    ensure!(log.contains("got two\n") && log.contains("err two\n"), "{log}");

    let words = [
        "run",
        "quick",
        "--image",
        &scene.image,
        "--image-pull-policy=Never",
        "--restart=Never",
        "-i",
        "--rm",
        "--quiet",
        "--",
        "sh",
        "-c",
        "cat; exit 3",
    ];
    let quick = with_input(scene.cluster.kubectl(&words), b"through and through\n")?;
    ensure!(
        quick.stdout.starts_with(b"through and through\n") && quick.status.code() == Some(3),
        "{quick:?}"
    );
    Ok(())
}

fn ports_are_forwarded(scene: &mut Scene<'_>) -> Result<()> {
    let script = "mkdir /tmp/www; dd if=/dev/urandom of=/tmp/www/much bs=1M count=24; \
                  (cd /tmp/www; sha256sum much >sum); exec httpd -f -p 127.0.0.1:8080 -h /tmp/www";
    let mut ports = pod("ports", &scene.image, script);
    let listens = ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:8080/sum"];
    ports["spec"]["containers"][0]["readinessProbe"] =
        json!({"exec": {"command": listens}, "periodSeconds": 1});
    scene.cluster.apply(&[ports])?;
    scene.cluster.wait_pod("ports", "to be ready", is_ready)?;
    for websockets in ["true", "false"] {
        let (_forward, port) = forward(scene, 8080, websockets)?;
        // Eight at once, each whole.
        let script = format!(
            "cd {dir}; curl -sf http://127.0.0.1:{port}/sum >sum; \
             for n in 1 2 3 4 5 6 7 8; do curl -sf http://127.0.0.1:{port}/much >much$n & done; wait; \
             for n in 1 2 3 4 5 6 7 8; do mv much$n much; sha256sum -c --quiet sum; done",
            dir = scene.cell.dir().display()
        );
        scene
            .cell
            .sh(&script)
            .with_context(|| format!("websockets: {websockets}"))?;
    }
    // Nobody listens there: the client is told.
    let (mut closed, port) = forward(scene, 9999, "true")?;
    scene
        .cell
        .sh(&format!("curl -s -m 20 http://127.0.0.1:{port}/ || true"))?;
    let mut errors = String::new();
    let status = wait_for("kubectl to give up", MINUTE, || Ok(closed.0.try_wait()?))?;
    closed
        .0
        .stderr
        .take()
        .context("it has a stderr")?
        .read_to_string(&mut errors)?;
    ensure!(
        errors.contains("connect to port 9999") && errors.contains("refused"),
        "{status}: {errors}"
    );
    Ok(())
}

/// kubectl port-forward to a port of the pod, and the local port.
fn forward(scene: &Scene<'_>, remote: u16, websockets: &str) -> Result<(Background, u16)> {
    let mut command = scene
        .cluster
        .kubectl(&["port-forward", "pod/ports", &format!(":{remote}")]);
    command
        .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websockets)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut forward = Background(command.spawn()?);
    let mut stdout = BufReader::new(forward.0.stdout.take().context("it has a stdout")?);
    let mut line = String::new();
    while !line.contains("127.0.0.1:") {
        line.clear();
        ensure!(stdout.read_line(&mut line)? > 0, "port-forward ended");
    }
    let number = line
        .split_once("127.0.0.1:")
        .and_then(|(_, rest)| rest.split_whitespace().next());
    let port = number.context("no port")?.parse().context("a port")?;
    // What else it prints nobody waits for; without a reader it would fail.
    std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
    Ok((forward, port))
}

fn files_are_copied(scene: &mut Scene<'_>) -> Result<()> {
    start(scene, "files", "exec sleep 3600")?;
    let (here, back) = (scene.cell.subdir("copied")?, scene.cell.dir().join("came-back"));
    fs::write(here.join("much"), noise(MUCH))?;
    fs::write(here.join("little"), "little\n")?;
    let (from, to) = (here.display().to_string(), back.display().to_string());
    scene.cluster.run(&["cp", &from, "files:/tmp/there"])?;
    scene.cluster.run(&["cp", "files:/tmp/there", &to])?;
    for name in ["much", "little"] {
        ensure!(
            fs::read(back.join(name))? == fs::read(here.join(name))?,
            "{name} is another one"
        );
    }
    Ok(())
}

/// From the first line, while more come, to the last one; and again as the log of the run before.
fn logs_are_followed(scene: &mut Scene<'_>) -> Result<()> {
    // The second run stays: a kubelet keeps the log of one run that has ended, and that is then the first.
    let script = "[ ! -e /state/ran ] || exec sleep 3600; touch /state/ran; \
                  echo begun; until [ -e /state/go ]; do sleep 0.1; done; \
                  n=0; while [ $n -lt 2000 ]; do echo line $n; n=$((n+1)); [ $((n % 100)) = 0 ] && sleep 0.1; done; exit 9";
    let mut talker = pod("talker", &scene.image, script);
    talker["spec"]["volumes"] = json!([{"name": "state", "emptyDir": {}}]);
    talker["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "state", "mountPath": "/state"}]);
    scene.cluster.apply(&[talker])?;
    scene.cluster.wait_pod("talker", "to run", is_ready)?;
    let mut command = scene.cluster.kubectl(&["logs", "-f", "talker"]);
    let mut follower = Background(command.stdout(Stdio::piped()).spawn()?);
    let mut stdout = BufReader::new(follower.0.stdout.take().context("it has a stdout")?);
    let mut followed = String::new();
    stdout.read_line(&mut followed)?;
    ensure!(followed == "begun\n", "{followed:?}");
    scene
        .cluster
        .run(&["exec", "talker", "--", "touch", "/state/go"])?;
    stdout.read_to_string(&mut followed)?;
    let status = follower.0.wait()?;
    let expected: String = std::iter::once("begun\n".to_owned())
        .chain((0..2000).map(|n| format!("line {n}\n")))
        .collect();
    ensure!(
        status.success() && followed == expected,
        "{status}, {} bytes of {}",
        followed.len(),
        expected.len()
    );
    scene.cluster.wait_pod("talker", "to be restarted", |pod| {
        container_status(pod, "main")["restartCount"] == 1 && is_ready(pod)
    })?;
    let previous = scene.cluster.run(&["logs", "--previous", "talker"])?;
    ensure!(
        previous == expected,
        "{} bytes of {}",
        previous.len(),
        expected.len()
    );
    Ok(())
}

fn a_container_is_debugged(scene: &mut Scene<'_>) -> Result<()> {
    start(scene, "patient", "exec sleep 3601")?;
    let words = [
        "debug",
        "patient",
        "--image",
        &scene.image,
        "--image-pull-policy=Never",
        "--target=main",
        "-i",
        "--quiet",
        "--profile=general",
        "--",
        "sh",
        "-c",
        "read word; echo \"$word $(ps | grep -c 'sleep 360[1]')\"",
    ];
    let debugged = with_input(scene.cluster.kubectl(&words), b"sees\n")?;
    let text = String::from_utf8_lossy(&debugged.stdout).into_owned();
    ensure!(text.contains("sees 1"), "{debugged:?}");
    Ok(())
}

/// A pod of one container, ready.
fn start(scene: &Scene<'_>, name: &str, script: &str) -> Result<()> {
    scene.cluster.apply(&[pod(name, &scene.image, script)])?;
    scene.cluster.wait_pod(name, "to be ready", is_ready).map(drop)
}

fn pod(name: &str, image: &str, script: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main", "image": image, "imagePullPolicy": "Never", "command": ["sh", "-c", script],
            }],
        },
    })
}

/// Bytes that no compression makes fewer, the same each time.
fn noise(bytes: usize) -> Vec<u8> {
    let mut block = Sha256::digest(b"noise").to_vec();
    let mut all = Vec::with_capacity(bytes + block.len());
    while all.len() < bytes {
        all.extend_from_slice(&block);
        block = Sha256::digest(&block).to_vec();
    }
    all.truncate(bytes);
    all
}

/// Runs a command on an input that ends; what it gave.
fn with_input(mut command: Command, input: &[u8]) -> Result<Output> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdin = child.stdin.take().context("it has a stdin")?;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut stdin: ChildStdin = stdin;
            // One that ends early has its reason.
            let _ = stdin.write_all(input);
        });
        Ok(child.wait_with_output()?)
    })
}

/// A command in the background, ended with the test.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A command at a terminal of its own.
struct Session {
    child: Child,
    master: File,
    seen: String,
}

impl Session {
    fn start(command: &Command, (rows, columns): (u16, u16)) -> Result<Session> {
        let master = tty::open_master()?;
        tty::unlock(&master)?;
        let slave = tty::open_slave(&master)?;
        tty::set_size(&master, tty::Size { rows, columns })?;
        // Changes of the size are told to the processes of the session whose terminal it is.
        let mut session = Command::new("setsid");
        session
            .args(["--ctty", "--wait"])
            .arg(command.get_program())
            .args(command.get_args())
            .env_clear()
            .envs(
                command
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .env("TERM", "xterm")
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave);
        let child = session.spawn()?;
        Ok(Session {
            child,
            master: master.into(),
            seen: String::new(),
        })
    }

    fn type_in(&mut self, text: &str) -> Result<()> {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    /// Reads until the terminal has shown this.
    fn wait_for(&mut self, wanted: &str) -> Result<()> {
        let mut buffer = [0; 4096];
        while !self.seen.contains(wanted) {
            let ready = epoll::wait_one(&self.master, Interest::READ, Some(MINUTE))?;
            ensure!(!ready.is_empty(), "nothing more came: {:?}", self.seen);
            let count = self
                .master
                .read(&mut buffer)
                .with_context(|| format!("seen so far: {:?}", self.seen))?;
            ensure!(count > 0, "the session ended: {:?}", self.seen);
            self.seen += &String::from_utf8_lossy(&buffer[..count]);
        }
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
