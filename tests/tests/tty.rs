//! Terminals: the console socket, the terminal inside, its size and owner, and what is refused.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use coracle_tests::runner::Running;
use coracle_tests::{Bundle, Console, Container, json};

fn with_terminal(script: &str) -> Bundle {
    Bundle::new().set("/process/terminal", json!(true)).sh(script)
}

/// The size of the caller's terminal may arrive a moment after the program has started.
const WAIT_FOR_SIZE: &str =
    "while [ \"$(stty size 2>/dev/null)\" != '33 77' ]; do sleep 0.02; done; stty size";

fn create_on(c: &Container, console: &Console) {
    c.create_with(&["--console-socket", &console.socket()]).ok();
}

#[test]
fn the_console_socket_gets_one_descriptor_with_a_name() {
    let c = with_terminal("echo hello from $(tty)").container();
    let console = Console::listen(c.dir(), "console");
    create_on(&c, &console);
    console.wait_output("fds=1");
    assert!(
        console.output().contains("name=/dev/ptmx") || console.output().contains("name=/dev/pts/"),
        "{}",
        console.output()
    );
    c.start().ok();
    console.wait_output("hello from /dev/");
}

#[test]
fn the_process_leads_a_session_on_its_terminal() {
    let c = with_terminal("exec probe tty").container();
    let console = Console::listen(c.dir(), "console");
    create_on(&c, &console);
    c.start().ok();
    console.wait_output("uid=");
    let seen = console.output();
    for word in ["isatty=111", "session=1", "foreground=1", "uid=0"] {
        assert!(seen.contains(word), "{word} in {seen}");
    }
    assert!(
        seen.contains("name=/dev/pts/0") || seen.contains("name=/dev/console"),
        "{seen}"
    );
}

#[test]
fn typing_reaches_the_process() {
    let c = with_terminal("read line; echo \"<$line>\"; sleep 600").container();
    let mut console = Console::listen(c.dir(), "console");
    create_on(&c, &console);
    c.start().ok();
    console.type_in("ahoy\n");
    console.wait_output("<ahoy>");
}

#[test]
fn control_c_interrupts() {
    let c = with_terminal("trap 'echo interrupted; exit 0' INT; echo up; while :; do sleep 0.05; done")
        .container();
    let mut console = Console::listen(c.dir(), "console");
    create_on(&c, &console);
    c.start().ok();
    console.wait_output("up");
    console.type_in("\x03");
    console.wait_output("interrupted");
}

#[test]
fn the_configured_size_is_set() {
    let c = with_terminal("stty size")
        .set("/process/consoleSize", json!({"height": 41, "width": 97}))
        .container();
    let console = Console::listen(c.dir(), "console");
    create_on(&c, &console);
    c.start().ok();
    console.wait_output("41 97");
}

#[test]
fn a_resize_is_seen() {
    let c =
        with_terminal("while [ \"$(stty size)\" != '12 34' ]; do sleep 0.05; done; echo resized; sleep 600")
            .container();
    let console = Console::listen_sized(c.dir(), "console", 12, 34);
    create_on(&c, &console);
    c.start().ok();
    console.wait_output("resized");
}

#[test]
fn dev_console_is_the_terminal() {
    let c = with_terminal("echo to-console > /dev/console; echo to-tty > /dev/tty").container();
    let console = Console::listen(c.dir(), "console");
    create_on(&c, &console);
    c.start().ok();
    console.wait_output("to-console");
    console.wait_output("to-tty");
}

#[test]
fn the_terminal_belongs_to_the_user() {
    let c = with_terminal("exec probe tty")
        .set("/process/user", json!({"uid": 1000, "gid": 1000}))
        .container();
    let console = Console::listen(c.dir(), "console");
    create_on(&c, &console);
    c.start().ok();
    console.wait_output("uid=1000");
}

#[test]
fn a_user_namespace_has_terminals_too() {
    let c = with_terminal("exec probe tty").userns().container();
    let console = Console::listen(c.dir(), "console");
    create_on(&c, &console);
    c.start().ok();
    console.wait_output("isatty=111");
    console.wait_output("uid=0");
}

#[test]
fn detached_run_uses_the_socket() {
    let c = with_terminal("echo hello; sleep 600").container();
    let console = Console::listen(c.dir(), "console");
    c.run_with(&["--detach", "--console-socket", &console.socket()], None)
        .ok();
    console.wait_output("hello");
}

#[test]
fn foreground_run_relays_its_own_terminal() {
    let c = with_terminal(&format!("probe tty; {WAIT_FOR_SIZE}; exit 3")).container();
    let mut command = std::process::Command::new(coracle_tests::host::probe());
    command
        .arg("pty")
        .arg(c.runtime().program())
        .arg("--root")
        .arg(c.runtime().root());
    command.args(["run", "--bundle"]).arg(c.dir()).arg(c.id());
    let out = Running::start(command, None).wait();
    assert_eq!(out.code, 3, "{out}");
    assert!(out.stdout.contains("isatty=111"), "{out}");
    assert!(
        out.stdout.contains("33 77"),
        "the size of the caller's terminal: {out}"
    );
}

#[test]
fn a_terminal_without_a_socket_is_refused_when_nobody_stays() {
    let c = with_terminal("true").container();
    c.create().refused(&[
        "cannot allocate tty if runc will detach without setting console socket",
        "console socket",
        "console-socket",
    ]);
    c.run_with(&["--detach"], None)
        .refused(&["console socket", "console-socket"]);
    c.assert_gone();
}

#[test]
fn a_socket_without_a_terminal_is_refused() {
    let c = Bundle::new().container();
    let console = Console::listen(c.dir(), "console");
    c.create_with(&["--console-socket", &console.socket()]).refused(&[
        "console socket",
        "console-socket",
        "tty",
    ]);
    c.assert_gone();
}

#[test]
fn a_socket_that_nobody_listens_on_is_refused() {
    let c = with_terminal("true").container();
    let out = c.create_with(&["--console-socket", "/nonexistent/socket"]);
    assert_eq!(out.code, 1, "{out}");
    c.assert_gone();
    // a file is no socket
    let file = c.dir().join("config.json").display().to_string();
    let out = c.create_with(&["--console-socket", &file]);
    assert_eq!(out.code, 1, "{out}");
    c.assert_gone();
}

#[test]
fn exec_gets_a_terminal_too() {
    let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
    c.up();
    let console = Console::listen(c.dir(), "exec-console");
    let socket = console.socket();
    c.exec_with(
        &["--tty", "--detach", "--console-socket", &socket],
        &["probe", "tty"],
    )
    .ok();
    console.wait_output("isatty=111");
    console.wait_output("session=1 foreground=1");
}

#[test]
fn exec_in_the_foreground_relays_its_own_terminal() {
    let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
    c.up();
    let mut command = std::process::Command::new(coracle_tests::host::probe());
    command
        .arg("pty")
        .arg(c.runtime().program())
        .arg("--root")
        .arg(c.runtime().root());
    command.args([
        "exec",
        "-t",
        c.id(),
        "sh",
        "-c",
        &format!("probe tty; {WAIT_FOR_SIZE}; exit 8"),
    ]);
    let out = Running::start(command, None).wait();
    assert_eq!(out.code, 8, "{out}");
    assert!(
        out.stdout.contains("isatty=111") && out.stdout.contains("33 77"),
        "{out}"
    );
}

#[test]
fn a_process_document_may_ask_for_a_terminal() {
    let c = Bundle::new().args(&["/bin/sleep", "600"]).container();
    c.up();
    let process = json!({"terminal": true, "consoleSize": {"height": 22, "width": 44}, "user": {"uid": 0, "gid": 0},
        "args": ["/bin/stty", "size"], "cwd": "/", "env": ["PATH=/bin"]});
    let file = c.dir().join("process.json");
    std::fs::write(&file, process.to_string()).unwrap();
    let console = Console::listen(c.dir(), "exec-console");
    let args = [
        "exec",
        "--detach",
        "--process",
        &file.display().to_string(),
        "--console-socket",
        &console.socket(),
        c.id(),
    ];
    c.runtime().call(&args).ok();
    console.wait_output("22 44");
}

#[test]
fn the_terminal_ends_with_the_container() {
    let c = with_terminal("echo up; sleep 600").container();
    let console = Console::listen(c.dir(), "console");
    create_on(&c, &console);
    c.start().ok();
    console.wait_output("up");
    c.kill("KILL").ok();
    c.wait_status("stopped");
    assert_eq!(c.state()["status"], "stopped");
}
