//! Figures of speed and memory, as ratios against the real peers in the same run: `cargo xtask bench` starts it.
//!
//! Programs come from the environment: `CORACLE`, `CORACLED`, `RUNC`, `CRUN`, `CONTAINERD`, `CTR`, `CNI_PLUGINS`; a
//! peer that is missing is said so, and its rows are left out.

mod cri;
mod memory;
mod oci;
mod sample;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .as_slice()
    {
        [] => {
            oci::run()?;
            cri::run()?;
            memory::run()
        }
        ["oci"] => oci::run(),
        [oci::INNER, scratch] => oci::measure(scratch.as_ref()),
        ["cri"] => cri::run(),
        ["memory"] => memory::run(),
        other => bail!("unknown arguments {other:?}: nothing, oci, cri or memory"),
    }
}
