//! The `coracle` command: arguments, one call, one print.

mod cmd;
mod foreground;
mod globals;
mod log;
mod own_binary;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use globals::Cli;
use log::Log;

/// One thread, and most calls are over in a millisecond.
#[global_allocator]
static HEAP: coracle_kernel::heap::Heap = coracle_kernel::heap::Heap::new();

fn main() -> ExitCode {
    // A role and no command: the memory that a parser of commands takes would stay with every pod.
    if std::env::args_os().nth(1).is_some_and(|arg| arg == "monitor") {
        return coracle_monitor::run();
    }
    // First of all: what enters a container is not to be the file that others run.
    if let Err(error) = own_binary::protect() {
        Log::stderr().error(&format!("{error:#}"));
        return ExitCode::from(cmd::FAILED);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let log = match Log::open(&cli.globals) {
        Ok(log) => log,
        Err(error) => {
            Log::stderr().error(&format!("{error:#}"));
            return ExitCode::from(cmd::FAILED);
        }
    };
    match cmd::run(cli.command, &cli.globals, &log) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            log.fatal(&format!("{:#}", failure.error));
            ExitCode::from(failure.code)
        }
    }
}

/// Help and version go to standard output and are no errors; the rest is told in runc's words.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            print!("{error}");
            ExitCode::SUCCESS
        }
        _ => {
            let _ = writeln!(std::io::stderr(), "Incorrect Usage.\n\n{error}");
            ExitCode::from(cmd::FAILED)
        }
    }
}
