//! The daemon's log: standard error, text on a terminal and JSON otherwise.

use std::io::IsTerminal;

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt;

use crate::args::LogFormat;

/// Installs the log for the whole process; called once, before anything is logged.
pub(crate) fn init(format: Option<LogFormat>, level: tracing::Level) {
    let terminal = std::io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal {
        LogFormat::Text
    } else {
        LogFormat::Json
    });
    let builder = fmt()
        .with_writer(std::io::stderr)
        // It would be told on standard error too, with a panic where that is on a full disk.
        .log_internal_errors(false)
        .with_max_level(LevelFilter::from_level(level))
        .with_target(false);
    match format {
        LogFormat::Text => builder.with_ansi(terminal).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}
