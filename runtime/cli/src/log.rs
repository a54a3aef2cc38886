//! Log lines as callers parse them: containerd's shim reads the last JSON line with level error.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use coracle_spec::rfc3339_nanos;
use serde::Serialize;

use crate::globals::{Globals, LogFormat};

/// Where log lines go.
#[derive(Debug)]
pub(crate) struct Log {
    /// Standard error where there is none.
    file: Option<File>,
    format: LogFormat,
    debug: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    level: &'a str,
    msg: &'a str,
    time: String,
}

impl Log {
    /// Text on standard error: before the flags are known.
    pub(crate) fn stderr() -> Log {
        Log {
            file: None,
            format: LogFormat::Text,
            debug: false,
        }
    }

    /// As the flags say.
    pub(crate) fn open(globals: &Globals) -> anyhow::Result<Log> {
        let open = |path| OpenOptions::new().append(true).create(true).open(path);
        let file = match &globals.log {
            Some(path) => {
                Some(open(path).with_context(|| format!("cannot open log file {}", path.display()))?)
            }
            None => None,
        };
        Ok(Log {
            file,
            format: globals.log_format,
            debug: globals.debug,
        })
    }

    /// The error that ends the call: to the log, and plainly to standard error where the log is elsewhere.
    pub(crate) fn fatal(&self, msg: &str) {
        self.error(msg);
        if self.file.is_some() {
            let _ = writeln!(std::io::stderr(), "{msg}");
        }
    }

    /// An error.
    pub(crate) fn error(&self, msg: &str) {
        self.line("error", msg);
    }

    /// Something that was ignored or left out.
    pub(crate) fn warn(&self, msg: &str) {
        self.line("warning", msg);
    }

    /// What only `--debug` shows.
    pub(crate) fn debug(&self, msg: &str) {
        if self.debug {
            self.line("debug", msg);
        }
    }

    fn line(&self, level: &str, msg: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let secs = i64::try_from(now.as_secs()).unwrap_or(0);
        let line = match self.format {
            LogFormat::Json => {
                let line = Line {
                    level,
                    msg,
                    time: rfc3339_nanos(secs, now.subsec_nanos()),
                };
                serde_json::to_string(&line).unwrap_or_default()
            }
            LogFormat::Text => format!("time=\"{}\" level={level} msg={msg:?}", rfc3339_nanos(secs, 0)),
        };
        // In one write, so that lines of several calls do not mix; a log that cannot be written stops nothing.
        let line = format!("{line}\n");
        let _ = match &self.file {
            Some(file) => (&*file).write_all(line.as_bytes()),
            None => std::io::stderr().write_all(line.as_bytes()),
        };
    }
}
