//! `cargo xtask dist`: both programs, static, in `dist/`, with their checksums.

use std::fs;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::Places;
use crate::build::{self, Daemon};
use crate::install::{self, Want};

/// Builds and copies; overwrites what an earlier call left.
pub(crate) fn dist(places: &Places) -> Result<()> {
    install::install(Want::Demo)?;
    let dir = places.repository.join("dist");
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    let mut sums = String::new();
    for (name, built) in [
        ("coracle", build::runtime(places)?),
        ("coracled", build::daemon(places, Daemon::Release)?),
    ] {
        let bytes = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
        let sum: String = Sha256::digest(&bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        fs::copy(&built, dir.join(name))?;
        println!("{sum}  {name}  {} bytes", bytes.len());
        sums.push_str(&format!("{sum}  {name}\n"));
    }
    fs::write(dir.join("SHA256SUMS"), sums)?;
    Ok(())
}
