//! What must be true before the daemon serves; each refusal is one clear line.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use coracle_kernel::error::Errno;
use coracle_kernel::{file, path, probe, rlimit, scm};
use coracle_stream::Tls;

use crate::config::{Config, Stream};

/// The oldest kernel that has all the calls that are taken for granted.
pub(crate) const OLDEST_KERNEL: (u32, u32) = (5, 14);

/// Largest file of a certificate or a key.
const PEM_LIMIT_BYTES: u64 = 1 << 20;

/// The daemon's directories, held for as long as it runs.
pub(crate) struct Directories {
    /// The data root, as a canonical path.
    pub(crate) root: PathBuf,
    /// The state directory, as a canonical path.
    pub(crate) state: PathBuf,
    /// How many files the daemon may open.
    pub(crate) open_files: u64,
    // Held for its lock, which keeps a second daemon off.
    _lock: OwnedFd,
}

/// Checks the kernel, takes the descriptors that it may have, makes the directories and takes the root's lock.
pub(crate) fn prepare(root: &Path, state: &Path) -> Result<Directories> {
    check_kernel()?;
    // A pod takes a dozen of ours and a session eight; what runs on behalf of pods keeps the limit that we were given.
    let (_, open_files) = rlimit::raise_open_files()?;
    let root = make_dir(root)?;
    let state = make_dir(state)?;
    let lock = take_lock(&root)?;
    Ok(Directories {
        root,
        state,
        open_files,
        _lock: lock,
    })
}

/// What sessions are served with, if `[stream]` names it.
pub(crate) fn read_tls(stream: &Stream) -> Result<Option<Tls>> {
    let (certificate, key) = (&stream.tls_cert, &stream.tls_key);
    if certificate.as_os_str().is_empty() {
        return Ok(None);
    }
    let (certificates, _) = read_pem(certificate).context("[stream] tls_cert")?;
    let (private, mode) = read_pem(key).context("[stream] tls_key")?;
    ensure!(
        mode & 0o007 == 0,
        "[stream] tls_key {}: every user may open it (mode {:04o}); take that away: chmod o=",
        key.display(),
        mode & 0o7777
    );
    let tls = Tls::new(&certificates, &private).with_context(|| {
        format!(
            "[stream] tls_cert {} and tls_key {}",
            certificate.display(),
            key.display()
        )
    })?;
    Ok(Some(tls))
}

/// The content and the mode of a small file.
fn read_pem(path: &Path) -> Result<(Vec<u8>, u32)> {
    let mut bytes = Vec::new();
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let read = || format!("read {}", path.display());
    let mode = file.metadata().with_context(read)?.permissions().mode();
    file.take(PEM_LIMIT_BYTES + 1)
        .read_to_end(&mut bytes)
        .with_context(read)?;
    ensure!(
        bytes.len() as u64 <= PEM_LIMIT_BYTES,
        "{} is larger than 1 MiB",
        path.display()
    );
    Ok((bytes, mode))
}

/// The runtime binary: as configured, else beside our own; another version than ours is refused.
pub(crate) fn find_runtime(config: &Config) -> Result<PathBuf> {
    let binary = if config.runtime.binary.as_os_str().is_empty() {
        let own = std::env::current_exe().context("find our own binary")?;
        own.with_file_name("coracle")
    } else {
        config.runtime.binary.clone()
    };
    let output = Command::new(&binary)
        .arg("--version")
        .env_clear()
        .output()
        .with_context(|| {
            format!(
                "run {} --version ([runtime] binary names another place)",
                binary.display()
            )
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found = text
        .lines()
        .next()
        .and_then(|line| line.rsplit(' ').next())
        .unwrap_or_default();
    let ours = env!("CARGO_PKG_VERSION");
    ensure!(
        found == ours,
        "{} has version {found:?}, coracled is {ours}: install both from one release",
        binary.display()
    );
    Ok(binary)
}

/// Binds the CRI socket: 0600, or 0660 with the configured group, which then may also pass the state directory where
/// that is where it lies. A socket that nobody serves is replaced.
pub(crate) fn bind_socket(
    socket: &Path,
    group: &str,
    state: &Path,
) -> Result<std::os::unix::net::UnixListener> {
    let dir = socket
        .parent()
        .filter(|d| !d.as_os_str().is_empty())
        .context("the socket's path has no directory")?;
    let name = socket
        .file_name()
        .and_then(|n| n.to_str())
        .context("the socket's path has no name")?;
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let dir_fd = path::open_dir(dir)?;
    if scm::connect(&dir_fd, name, scm::Kind::Stream, scm::Mode::Blocking).is_ok() {
        bail!("{} is served by another process", socket.display());
    }
    match fs::remove_file(socket) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("replace {}", socket.display()));
        }
        _ => {}
    }
    // Bound under another name and renamed when its mode is right: nobody connects before.
    let hidden = format!(".{name}.new");
    let _ = fs::remove_file(dir.join(&hidden));
    let listener = scm::listen(&dir_fd, &hidden, scm::Kind::Stream, scm::Mode::Nonblocking)?;
    let hidden = dir.join(hidden);
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600))?;
    if !group.is_empty() {
        let gid = find_group(group)?;
        std::os::unix::fs::chown(&hidden, None, Some(gid))
            .with_context(|| format!("give the socket to group {group}"))?;
        if dir == state {
            std::os::unix::fs::chown(dir, None, Some(gid))
                .with_context(|| format!("let group {group} pass {}", dir.display()))?;
            fs::set_permissions(dir, fs::Permissions::from_mode(0o710))
                .with_context(|| format!("let group {group} pass {}", dir.display()))?;
        }
        fs::set_permissions(&hidden, fs::Permissions::from_mode(0o660))?;
    }
    fs::rename(&hidden, socket).with_context(|| format!("bind {}", socket.display()))?;
    Ok(listener.into())
}

fn check_kernel() -> Result<()> {
    let (major, minor) = probe::kernel_version()?;
    let (need_major, need_minor) = OLDEST_KERNEL;
    ensure!(
        (major, minor) >= OLDEST_KERNEL,
        "Linux {major}.{minor} is too old: {need_major}.{need_minor} or newer is needed"
    );
    if let Some(call) = probe::missing_call() {
        bail!(
            "this kernel lacks the system call {call}, or a filter denies it: \
             all of Linux {need_major}.{need_minor} is needed"
        );
    }
    Ok(())
}

/// Makes a directory that only root enters, and proves that it can be written.
fn make_dir(dir: &Path) -> Result<PathBuf> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("make {}", dir.display()))?;
    let dir = dir
        .canonicalize()
        .with_context(|| format!("resolve {}", dir.display()))?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("close {} to others", dir.display()))?;
    let probe = dir.join(".writable");
    fs::write(&probe, b"").with_context(|| format!("{} cannot be written", dir.display()))?;
    fs::remove_file(&probe).with_context(|| format!("{} cannot be written", dir.display()))?;
    Ok(dir)
}

fn take_lock(root: &Path) -> Result<OwnedFd> {
    let path = root.join("lock");
    let lock = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let lock = OwnedFd::from(lock.with_context(|| format!("open {}", path.display()))?);
    match file::try_lock(&lock) {
        Ok(()) => Ok(lock),
        Err(error) if error.errno() == Errno::EAGAIN => {
            bail!(
                "another coracled serves {}: end it first, or give this one another --root",
                root.display()
            )
        }
        Err(error) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

/// A group by number or by its name in /etc/group (the binary is static: there is no other source).
fn find_group(group: &str) -> Result<u32> {
    if let Ok(gid) = group.parse() {
        return Ok(gid);
    }
    let text = fs::read_to_string("/etc/group").context("read /etc/group")?;
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(group))
                .then(|| fields.nth(1)?.parse().ok())
                .flatten()
        })
        .next()
        .with_context(|| format!("[server] socket_group: no group {group:?} in /etc/group"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_on_the_same_root_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (root, state) = (dir.path().join("root"), dir.path().join("state"));
        let first = prepare(&root, &state).unwrap();
        let refusal = prepare(&root, &state).err().unwrap().to_string();
        assert!(refusal.contains("another coracled serves"), "{refusal}");
        drop(first);
        prepare(&root, &state).unwrap();
    }

    #[test]
    fn a_certificate_that_cannot_be_served_is_refused_by_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let (tls_cert, tls_key) = (dir.path().join("cert"), dir.path().join("key"));
        let stream = Stream {
            tls_cert: tls_cert.clone(),
            tls_key: tls_key.clone(),
            ..Stream::default()
        };
        assert!(read_tls(&Stream::default()).unwrap().is_none());
        let refusal = || format!("{:#}", read_tls(&stream).unwrap_err());
        assert!(refusal().contains("[stream] tls_cert: open "), "{}", refusal());
        fs::write(&tls_cert, "no certificate").unwrap();
        fs::write(&tls_key, "no key").unwrap();
        fs::set_permissions(&tls_key, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(
            refusal().contains("every user may open it (mode 0644)"),
            "{}",
            refusal()
        );
        fs::set_permissions(&tls_key, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(refusal().contains("/cert and tls_key "), "{}", refusal());
        File::create(&tls_cert).unwrap().set_len(2 << 20).unwrap();
        assert!(refusal().contains("larger than 1 MiB"), "{}", refusal());
    }

    #[test]
    fn a_root_that_cannot_be_made_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), b"").unwrap();
        let refusal = format!(
            "{:#}",
            prepare(&dir.path().join("file/root"), dir.path()).err().unwrap()
        );
        assert!(refusal.contains("file/root"), "{refusal}");
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_served_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("deep/er/coracle.sock");
        drop(bind_socket(&socket, "", dir.path()).unwrap());
        let served = bind_socket(&socket, "0", dir.path()).unwrap();
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
        let refusal = bind_socket(&socket, "", dir.path()).unwrap_err().to_string();
        assert!(refusal.contains("served by another process"), "{refusal}");
        drop(served);
        bind_socket(&socket, "no-such-group", dir.path()).unwrap_err();
    }

    #[test]
    fn a_group_that_may_connect_may_pass_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        let mode = || fs::metadata(state).unwrap().permissions().mode() & 0o777;
        fs::set_permissions(state, fs::Permissions::from_mode(0o700)).unwrap();
        drop(bind_socket(&state.join("coracle.sock"), "", state).unwrap());
        assert_eq!(mode(), 0o700);
        drop(bind_socket(&state.join("coracle.sock"), "0", state).unwrap());
        assert_eq!(mode(), 0o710);
    }
}
