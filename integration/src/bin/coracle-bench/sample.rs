//! Times of one operation under several programs, taken in turns, and the one table of all figures.

use std::time::{Duration, Instant};

use anyhow::Result;

/// The times of one operation by one program.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample(Vec<Duration>);

/// An operation, and a sample for each program; ours is the first.
pub(crate) struct Row {
    /// What was done.
    pub(crate) operation: &'static str,
    /// Program and times.
    pub(crate) samples: Vec<(&'static str, Sample)>,
    /// What we want to be at most, as a part of the first peer's time.
    pub(crate) target: Option<f64>,
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

/// Prints the head of the table.
#[allow(clippy::print_stdout, reason = "this is what the program is for")]
pub(crate) fn print_head() {
    println!(
        "| figure | Coracle min | p50 | peer | peer min | p50 | ratio min | p50 | target |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
}

/// Prints a line of the table for each peer, or one without peers where there is none.
#[allow(clippy::print_stdout, reason = "this is what the program is for")]
pub(crate) fn print_rows(rows: &[Row]) {
    let shown = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1e3);
    let ratio = |ours: Duration, peer: Duration| format!("{:.2}", ours.as_secs_f64() / peer.as_secs_f64());
    for row in rows {
        let Some(((_, ours), peers)) = row.samples.split_first() else {
            continue;
        };
        let (min, median) = (ours.min(), ours.median());
        let head = format!("| {} | {} | {}", row.operation, shown(min), shown(median));
        if peers.is_empty() {
            println!("{head} | | | | | | |");
        }
        for (n, (name, peer)) in peers.iter().enumerate() {
            let target = row
                .target
                .filter(|_| n == 0)
                .map_or_else(String::new, |t| format!("≤ {t}"));
            println!(
                "{head} | {name} | {} | {} | {} | {} | {target} |",
                shown(peer.min()),
                shown(peer.median()),
                ratio(min, peer.min()),
                ratio(median, peer.median()),
            );
        }
    }
}

/// Prints a line of the table for a size that was taken once of each program; ours is the first.
#[allow(clippy::print_stdout, reason = "this is what the program is for")]
#[allow(clippy::cast_precision_loss, reason = "sizes of programs")]
pub(crate) fn print_size_once(figure: &str, sizes: &[(&str, u64)]) {
    let Some(((_, ours), peers)) = sizes.split_first() else {
        return;
    };
    let head = format!("| {figure} | {ours} KiB | {ours} KiB");
    if peers.is_empty() {
        println!("{head} | | | | | | |");
    }
    for (name, peer) in peers {
        let ratio = *ours as f64 / *peer as f64;
        println!("{head} | {name} | {peer} KiB | {peer} KiB | {ratio:.2} | {ratio:.2} |  |");
    }
}

/// Prints a line of the table for a size, smallest and middle one.
#[allow(clippy::print_stdout, reason = "this is what the program is for")]
pub(crate) fn print_size(figure: &str, min_kib: u64, median_kib: u64, target: &str) {
    println!("| {figure} | {min_kib} KiB | {median_kib} KiB | | | | | | {target} |");
}
