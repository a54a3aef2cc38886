//! Fallbacks that no kernel of the test lanes takes: forced by a seccomp filter that says the kernel lacks a call.
//! Those that an older kernel takes by itself run on one (`cargo xtask test --only qemu`).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::process::Command;

use coracle_tests::runner::Running;
use coracle_tests::{Bundle, Container, Output, host};

/// `run` of the container on a kernel without this system call.
fn run_without(call: &str, container: &Container) -> Output {
    let runtime = container.runtime();
    let mut command = Command::new(host::probe());
    command
        .args(["without", call])
        .arg(runtime.program())
        .arg("--root")
        .arg(runtime.root());
    command
        .args(["run", "--bundle"])
        .arg(container.dir())
        .arg(container.id());
    command.env("CORACLE_TEST_MARK", container.id());
    Running::start(command, None).wait()
}

#[test]
fn a_kernel_without_keyrings_runs_containers() {
    let c = Bundle::new().sh("probe keyring; echo ran").container();
    let out = run_without("keyctl", &c).ok();
    assert!(out.stdout.contains("ran"), "{out}");
    assert!(
        out.stdout.contains("error:"),
        "the filter was not in force, nothing was tested: {out}"
    );
}
