//! Times of one operation under several programs, taken in turns, and the table of them.

use std::time::{Duration, Instant};

use anyhow::Result;

/// The times of one operation by one program.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample(Vec<Duration>);

/// One line of a table: an operation, and a sample for each program; ours is the first.
pub(crate) struct Row {
    /// What was done.
    pub(crate) operation: &'static str,
    /// Program and times.
    pub(crate) samples: Vec<(&'static str, Sample)>,
}

impl Sample {
    /// Adds the time that `work` takes.
    pub(crate) fn time<T>(&mut self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let value = work()?;
        self.0.push(start.elapsed());
        Ok(value)
    }

    fn sorted(&self) -> Vec<Duration> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        sorted
    }

    fn min(&self) -> Duration {
        self.sorted().first().copied().unwrap_or_default()
    }

    fn median(&self) -> Duration {
        let sorted = self.sorted();
        sorted.get(sorted.len() / 2).copied().unwrap_or_default()
    }
}

/// Prints rows as a Markdown table: milliseconds (min, p50) and the ratios ours / peer.
#[allow(clippy::print_stdout, reason = "this is what the program is for")]
pub(crate) fn print_table(title: &str, rounds: usize, rows: &[Row]) {
    println!("\n### {title} ({rounds} rounds, in turns)\n");
    println!("| operation | program | min ms | p50 ms | ours / peer, min | ours / peer, p50 |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for row in rows {
        let Some((_, ours)) = row.samples.first() else {
            continue;
        };
        for (program, sample) in &row.samples {
            let ms = |d: Duration| d.as_secs_f64() * 1e3;
            let ratio = |a: Duration, b: Duration| {
                if b.is_zero() {
                    "–".to_owned()
                } else {
                    format!("{:.2}", a.as_secs_f64() / b.as_secs_f64())
                }
            };
            println!(
                "| {} | {program} | {:.2} | {:.2} | {} | {} |",
                row.operation,
                ms(sample.min()),
                ms(sample.median()),
                ratio(ours.min(), sample.min()),
                ratio(ours.median(), sample.median()),
            );
        }
    }
}
