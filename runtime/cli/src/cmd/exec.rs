//! `exec`: one more process in a running container.

use std::path::PathBuf;

use anyhow::{Context, bail};
use coracle_container::{Console, StoredExec, exec_stored};
use coracle_spec::{Process, capability_number, load_process};

use super::{connect, entry, passed_fds};
use crate::foreground::Foreground;
use crate::globals::Globals;
use crate::log::Log;

/// Execute one more process in a running container
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Unix socket that takes the master of the terminal
    #[arg(long, value_name = "PATH")]
    console_socket: Option<PathBuf>,
    /// Unix socket that takes the pidfd of the process
    #[arg(long, value_name = "PATH")]
    pidfd_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Set a variable
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Attach a terminal
    #[arg(short, long)]
    tty: bool,
    /// User, by numbers
    #[arg(short, long, value_name = "UID[:GID]")]
    user: Option<String>,
    /// More supplementary groups, by number
    #[arg(short = 'g', long, value_name = "GID")]
    additional_gids: Vec<u32>,
    /// File with the process as JSON, instead of the other flags
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Return when the program has been started
    #[arg(short, long)]
    detach: bool,
    /// File that the pid of the process is written to
    #[arg(long, value_name = "PATH")]
    pid_file: Option<PathBuf>,
    /// SELinux label of the process
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// AppArmor profile of the process
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// No execve gives new privileges
    #[arg(long)]
    no_new_privs: bool,
    /// Add a capability
    #[arg(short, long, value_name = "CAP")]
    cap: Vec<String>,
    /// Pass N more descriptors to the process, from 3 on
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u16,
    /// Run in a sub-cgroup of the container's
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<String>,
    /// Execute although the container is paused
    #[arg(long)]
    ignore_paused: bool,
    /// Name of the container
    id: String,
    /// Program and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub(crate) fn run(args: &Args, globals: &Globals, log: &Log) -> anyhow::Result<u8> {
    let entry = entry(globals, &args.id)?;
    let config = entry.config()?;
    let process = process(args, &config.process, log)?;
    let sub_cgroup = sub_cgroup(&args.cgroup)?;
    if process.terminal && args.detach && args.console_socket.is_none() {
        bail!("cannot allocate tty if runc will detach without setting console socket");
    }
    if args.console_socket.is_some() && !process.terminal {
        bail!("cannot use console socket if runc will not detach or allocate tty");
    }
    let (preserve_fds, listen_fds) = passed_fds(args.preserve_fds)?;
    let console = match args.console_socket.as_deref() {
        Some(socket) => Some(Console::Socket(connect(socket)?)),
        None => Some(Console::Return),
    };
    let foreground = if args.detach {
        None
    } else {
        Some(Foreground::begin()?)
    };
    let options = StoredExec {
        process: &process,
        console,
        pid_file: args.pid_file.as_deref(),
        pidfd_socket: args.pidfd_socket.as_deref().map(connect).transpose()?,
        preserve_fds,
        listen_fds,
        ignore_paused: args.ignore_paused,
        sub_cgroup: sub_cgroup.as_deref(),
    };
    let mut executed = exec_stored(&entry, &config, options)?;
    drop(entry);
    executed.warnings().iter().for_each(|warning| log.warn(warning));
    let terminal = executed.take_terminal();
    let pidfd = executed.recorded()?;
    match foreground {
        None => Ok(0),
        Some(mut foreground) => foreground.wait(&pidfd, terminal.as_ref()),
    }
}

/// The process: a whole document, or that of the container with what the flags change.
fn process(args: &Args, container: &Process, log: &Log) -> anyhow::Result<Process> {
    if let Some(file) = &args.process {
        let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let (process, warnings) = load_process(&bytes)?;
        warnings.iter().for_each(|warning| log.warn(&warning.to_string()));
        return Ok(process);
    }
    if args.command.is_empty() {
        bail!("process args cannot be empty");
    }
    let mut process = Process {
        args: args.command.clone(),
        terminal: args.tty,
        ..container.clone()
    };
    if let Some(cwd) = &args.cwd {
        process.cwd.clone_from(cwd);
    }
    if let Some(label) = &args.process_label {
        process.selinux_label = Some(label.clone());
    }
    if let Some(profile) = &args.apparmor {
        process.apparmor_profile = Some(profile.clone());
    }
    process.no_new_privileges |= args.no_new_privs;
    for variable in &args.env {
        match variable.split_once('=') {
            Some((name, _)) if !name.is_empty() && !variable.contains('\0') => {
                process.env.push(variable.clone());
            }
            _ => bail!("invalid environment variable {variable:?}: it is not NAME=VALUE"),
        }
    }
    if let Some(user) = &args.user {
        let (uid, gid) = user_ids(user)?;
        process.user.uid = uid;
        if let Some(gid) = gid {
            process.user.gid = gid;
        }
    }
    process.user.additional_gids.extend(&args.additional_gids);
    for name in &args.cap {
        let number = capability_number(name).with_context(|| format!("unknown capability {name:?}"))?;
        let caps = &mut process.capabilities;
        for set in [&mut caps.bounding, &mut caps.effective, &mut caps.permitted] {
            *set |= 1 << number;
        }
    }
    Ok(process)
}

/// `uid[:gid]`, decimal digits alone: what is not a number is an error and never a name.
fn user_ids(text: &str) -> anyhow::Result<(u32, Option<u32>)> {
    let id = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // The last id means "leave it" to the kernel.
        digits
            .then(|| text.parse::<u32>().ok())
            .flatten()
            .filter(|id| *id != u32::MAX)
    };
    let (uid, gid) = match text.split_once(':') {
        Some((uid, gid)) => (id(uid), Some(id(gid))),
        None => (id(text), None),
    };
    match (uid, gid) {
        (Some(uid), None) => Ok((uid, None)),
        (Some(uid), Some(Some(gid))) => Ok((uid, Some(gid))),
        _ => bail!("user {text:?} is not UID or UID:GID"),
    }
}

/// The one sub-cgroup that the unified hierarchy has.
fn sub_cgroup(named: &[String]) -> anyhow::Result<Option<String>> {
    match named {
        [] => Ok(None),
        [path] if !path.contains(':') => Ok(Some(path.clone())),
        _ => bail!(
            "--cgroup: one path of the unified hierarchy is supported in this release, not lists by controller"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::user_ids;

    #[test]
    fn users_are_numbers_and_nothing_else() {
        assert_eq!(user_ids("0").unwrap(), (0, None));
        assert_eq!(user_ids("1000:5").unwrap(), (1000, Some(5)));
        assert_eq!(user_ids("4294967294").unwrap(), (4_294_967_294, None));
        for text in [
            "",
            "root",
            "-1",
            "+1",
            " 1",
            "1 ",
            "0x0",
            "1:",
            ":1",
            "1:2:3",
            "4294967295",
            "4294967296",
            "١",
        ] {
            assert!(user_ids(text).is_err(), "{text:?}");
        }
    }
}
