//! `features`: what this runtime can do, as JSON.

use std::io::Write;

use coracle_spec::{Supported, features};

/// Print what this runtime can do
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> anyhow::Result<u8> {
    let supported = Supported {
        cgroup_v1: cfg!(feature = "cgroup-v1"),
        cgroup_systemd: false,
        seccomp_archs: &coracle_container::SECCOMP_ARCHS,
        seccomp_flags: &[
            "SECCOMP_FILTER_FLAG_TSYNC",
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
            "SECCOMP_FILTER_FLAG_LOG",
        ],
        version: env!("CARGO_PKG_VERSION"),
        commit: "",
    };
    writeln!(std::io::stdout(), "{}", features(&supported))?;
    Ok(0)
}
