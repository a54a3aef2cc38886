//! A monitor driven over its socket, with real containers. Needs root and Debian's busybox-static.
//!
//! The test program is the monitor too: executed as `… monitor` it runs one.

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

mod attach;
mod bundle;
mod client;
mod faults;
mod life;
mod logs;
mod look;

use std::process::ExitCode;

/// A test by its name.
type Case = (&'static str, fn());

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "monitor") {
        return coracle_monitor::run();
    }
    let filters: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let all = life::ALL
        .iter()
        .chain(logs::ALL)
        .chain(attach::ALL)
        .chain(faults::ALL);
    let selected: Vec<_> = all
        .filter(|(name, _)| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())))
        .collect();
    if args.iter().any(|arg| arg == "--list") {
        selected.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if coracle_kernel::creds::effective_uid() != 0 || !std::path::Path::new("/bin/busybox").exists() {
        println!(
            "SKIPPED: {} tests of the monitor need root and /bin/busybox",
            selected.len()
        );
        return ExitCode::SUCCESS;
    }
    let mut failed = Vec::new();
    for (name, case) in selected {
        let begun = std::time::Instant::now();
        let good = std::panic::catch_unwind(case).is_ok();
        println!(
            "test {name} ... {} ({:?})",
            if good { "ok" } else { "FAILED" },
            begun.elapsed()
        );
        if !good {
            failed.push(name);
        }
    }
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        println!("failed: {failed:?}");
        ExitCode::FAILURE
    }
}
