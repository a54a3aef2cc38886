//! Running commands: output shown as it comes, test results counted, failures with the command's name.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// What cargo's test programs said of themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Tests that passed.
    pub(crate) passed: u64,
    /// Tests that failed.
    pub(crate) failed: u64,
}

/// Runs a command whose output is of no interest unless it fails.
pub(crate) fn quiet(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{stdout}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(stdout)
}

/// Runs a command with its output shown; counts the lines `test result: … N passed; N failed`.
pub(crate) fn shown(command: &mut Command) -> Result<(bool, Counts)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {command:?}"))?;
    let mut counts = Counts::default();
    let stdout = child.stdout.take().context("the child has a stdout")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("read the command's output")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        counts.add(parse_result(&line));
    }
    let status = child.wait().with_context(|| format!("wait for {command:?}"))?;
    if !status.success() {
        println!("FAILED: {command:?}: {status}");
    }
    Ok((status.success(), counts))
}

impl Counts {
    /// Adds another program's counts.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// The counts of one line of output; none for any other line.
pub(crate) fn parse_result(line: &str) -> Counts {
    let Some(rest) = line.trim().strip_prefix("test result: ") else {
        return Counts::default();
    };
    let number = |word: &str| {
        let before = rest.split(&format!(" {word}")).next()?;
        before.rsplit([' ', '.']).next()?.parse().ok()
    };
    Counts {
        passed: number("passed").unwrap_or(0),
        failed: number("failed").unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let line = "test result: FAILED. 20 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 45.10s";
        assert_eq!(
            parse_result(line),
            Counts {
                passed: 20,
                failed: 1
            }
        );
        assert_eq!(parse_result("test a::b ... ok"), Counts::default());
    }
}
