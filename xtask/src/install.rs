//! What a fresh Debian or Ubuntu machine lacks: installed, and said so.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::run::quiet;

/// Debian packages, each with a file or program that shows that it is there.
const PACKAGES: [(&str, &str); 27] = [
    ("musl-tools", "/usr/bin/musl-gcc"),
    ("gcc", "/usr/bin/gcc"),
    ("libc6-dev", "/usr/include/stdlib.h"),
    ("busybox-static", "/bin/busybox"),
    ("gcc-aarch64-linux-gnu", "/usr/bin/aarch64-linux-gnu-gcc"),
    // Its C library, which the compiler only recommends.
    ("libc6-dev-arm64-cross", "/usr/aarch64-linux-gnu/include/stdint.h"),
    ("iproute2", "/sbin/ip"),
    ("nftables", "/usr/sbin/nft"),
    ("iptables", "/usr/sbin/iptables"),
    ("ipset", "/usr/sbin/ipset"),
    ("curl", "/usr/bin/curl"),
    ("openssl", "/usr/bin/openssl"),
    ("apache2-utils", "/usr/bin/htpasswd"),
    ("docker-registry", "/usr/bin/docker-registry"),
    ("skopeo", "/usr/bin/skopeo"),
    ("crun", "/usr/bin/crun"),
    ("libseccomp-dev", "/usr/include/seccomp.h"),
    ("zstd", "/usr/bin/zstd"),
    ("util-linux", "/usr/bin/nsenter"),
    ("procps", "/usr/bin/ps"),
    ("strace", "/usr/bin/strace"),
    ("mmdebstrap", "/usr/bin/mmdebstrap"),
    ("e2fsprogs", "/sbin/mkfs.ext4"),
    ("kmod", "/sbin/depmod"),
    ("cpio", "/usr/bin/cpio"),
    ("vdeplug", "/usr/bin/vde_plug"),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
];

/// Packages that dpkg is asked for, since they have no program of their own: a guest's network, and what a private Go
/// is installed with.
const LIBRARIES: [&str; 2] = ["libvdeplug-slirp", "python3-venv"];

/// Rust targets: what is shipped, and what must at least compile.
pub(crate) const MUSL: &str = "x86_64-unknown-linux-musl";
/// The other architecture.
pub(crate) const AARCH64: &str = "aarch64-unknown-linux-musl";

/// What a task wants to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// Static builds and a busybox.
    Demo,
    /// All of it.
    Everything,
}

/// Installs what is missing; a package that cannot be had is named in the answer.
pub(crate) fn install(want: Want) -> Result<Vec<String>> {
    let mut missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|(package, _)| {
            want == Want::Everything
                || ["musl-tools", "gcc", "libc6-dev", "busybox-static", "iproute2"].contains(package)
        })
        .filter(|(_, file)| !Path::new(file).exists())
        .map(|(package, _)| *package)
        .collect();
    if want == Want::Everything {
        missing.extend(LIBRARIES.iter().filter(|package| !is_installed(package)));
    }
    let mut unavailable = Vec::new();
    if !missing.is_empty() {
        println!("installing {}", missing.join(" "));
        let apt = |words: &[&str]| {
            let mut command = Command::new("apt-get");
            command
                .env("DEBIAN_FRONTEND", "noninteractive")
                .args(["-qq", "-y", "--no-install-recommends"])
                .args(words);
            quiet(&mut command)
        };
        if let Err(error) = apt(&["update"]) {
            println!("apt-get update: {error:#}");
        }
        let mut all = vec!["install"];
        all.extend(&missing);
        // One by one where they cannot all be had, to learn which.
        if apt(&all).is_err() {
            for package in missing {
                if apt(&["install", package]).is_err() {
                    unavailable.push(package.to_owned());
                }
            }
        }
    }
    add_target(MUSL)?;
    if want == Want::Everything
        && let Err(error) = add_target(AARCH64)
    {
        unavailable.push(format!("{AARCH64} ({error:#})"));
    }
    Ok(unavailable)
}

fn is_installed(package: &str) -> bool {
    let status = quiet(Command::new("dpkg-query").args(["-W", "-f", "${Status}", package]));
    status.is_ok_and(|text| text.contains("install ok installed"))
}

fn add_target(target: &str) -> Result<()> {
    let installed =
        quiet(Command::new("rustup").args(["target", "list", "--installed"])).context("rustup")?;
    if !installed.lines().any(|line| line == target) {
        println!("installing the Rust target {target}");
        quiet(Command::new("rustup").args(["target", "add", target]))?;
    }
    Ok(())
}
