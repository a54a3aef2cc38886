//! The look for what is left behind must see what is left behind: one of each kind, made on purpose.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use coracle_integration::cell::run;
use coracle_integration::leaks::{self, Snapshot};
use coracle_integration::{Node, Options, request};
use coracle_kernel::mount_old::{self, Flags};
use coracle_kernel::{fd, mount};

crate::tests![
    one_of_each_is_seen,
    a_living_pod_is_seen_in_every_kind,
    files_are_seen_at_the_end_of_a_node,
];

/// Fails unless there is something more of this kind now, and of no other.
fn seen(before: &Snapshot, kind: &str, name: &str) -> Result<()> {
    let now = leaks::snapshot_here()?;
    for (found, names) in leaks::difference(before, &now) {
        let expected = found == kind;
        ensure!(
            names.is_empty() != expected,
            "{kind} {name} was left, and of {found} are seen: {names:?}"
        );
        ensure!(
            !expected || names.iter().any(|found| found.contains(name)),
            "{name} is not among {names:?}"
        );
    }
    let Err(complaint) = leaks::check(before, &now) else {
        bail!("{kind} {name} was left, and the check is content");
    };
    let complaint = complaint.to_string();
    ensure!(
        complaint.contains(kind) && complaint.contains(name),
        "it is not named: {complaint}"
    );
    Ok(())
}

async fn one_of_each_is_seen() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let before = leaks::snapshot_here()?;

    let marker = node.dir.join("marker");
    fs::write(&marker, "")?;
    let mut process = Command::new("tail")
        .arg("-f")
        .arg(&marker)
        .stdout(Stdio::null())
        .spawn()?;
    let outcome = seen(&before, "process", "marker");
    process.kill()?;
    process.wait()?;
    outcome?;

    // Without a word of ours on its command line: by its cgroup.
    let group = before
        .of("cgroup")
        .iter()
        .find(|path| path.ends_with("/workers"))
        .cloned();
    let group = PathBuf::from(group.context("the daemon has no cgroup")?);
    let mut process = Command::new("sleep").arg("1000").spawn()?;
    fs::write(group.join("cgroup.procs"), process.id().to_string())?;
    let outcome = seen(&before, "process", "sleep 1000");
    process.kill()?;
    process.wait()?;
    outcome?;

    // In no cgroup of ours: by the program that monitors run from.
    let program = fs::File::open("/bin/busybox").or_else(|_| fs::File::open("/usr/bin/busybox"))?;
    let sealed = fd::sealed_program(c"coracle", &program)?;
    let path = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        std::os::fd::AsRawFd::as_raw_fd(&sealed)
    );
    let mut process = {
        use std::os::unix::process::CommandExt as _;
        Command::new(path).arg0("sleep").arg("1000").spawn()?
    };
    let outcome = seen(&before, "process", "sleep 1000");
    process.kill()?;
    process.wait()?;
    outcome?;

    let point = node.dir.join("mount");
    fs::create_dir(&point)?;
    let tmpfs = || mount_old::mount_at(c"tmpfs", &point, c"tmpfs", Flags::empty(), c"");
    tmpfs()?;
    let outcome = seen(&before, "mount", "/mount (tmpfs)");
    // One that is covered by another of its kind counts.
    let covered = leaks::snapshot_here()?;
    tmpfs()?;
    let outcome = outcome.and_then(|()| seen(&covered, "mount", "/mount (tmpfs) #2"));
    mount::detach(&point)?;
    mount::detach(&point)?;
    outcome?;

    run(Command::new("busybox").args(["ip", "link", "add", "left0", "type", "bridge"]))?;
    let outcome = seen(&before, "link", "left0");
    run(Command::new("busybox").args(["ip", "link", "del", "left0"]))?;
    outcome?;

    let name = Path::new("/run/netns/coracle-00000000-left");
    fs::write(name, "")?;
    let outcome = seen(&before, "network namespace", "coracle-00000000-left");
    fs::remove_file(name)?;
    outcome?;

    fs::create_dir(group.with_file_name("left"))?;
    let outcome = seen(&before, "cgroup", "/left");
    fs::remove_dir(group.with_file_name("left"))?;
    outcome?;

    for place in [
        "root/containers",
        "root/content/ingest",
        "state/pods",
        "state/monitors",
    ] {
        fs::write(node.dir.join(place).join("left"), "")?;
        let outcome = seen(&before, "file", &format!("{place}/left"));
        fs::remove_file(node.dir.join(place).join("left"))?;
        outcome?;
    }
    leaks::check(&before, &leaks::snapshot_here()?)?;
    node.finish().await
}

async fn a_living_pod_is_seen_in_every_kind() -> Result<()> {
    let before = leaks::snapshot_here()?;
    let node = Node::with_busybox(Options::default()).await?;
    let config = request::pod("alive", &node.logs);
    let pod = node.run_pod(&config).await?;
    node.run_container(&pod, &request::container("main", "sleep 1000"), &config)
        .await?;
    for (kind, found) in leaks::difference(&before, &leaks::snapshot_here()?) {
        ensure!(!found.is_empty(), "of a living pod no {kind} is seen");
    }
    node.finish().await
}

async fn files_are_seen_at_the_end_of_a_node() -> Result<()> {
    let node = Node::start(Options::default()).await?;
    let (dir, left) = (node.dir.clone(), node.dir.join("state/pods/left"));
    fs::create_dir(&left)?;
    let Err(complaint) = node.finish().await else {
        bail!("a pod's folder was left, and nobody complains");
    };
    ensure!(complaint.to_string().contains("state/pods/left"), "{complaint}");
    fs::remove_dir_all(&dir)?;
    // The daemon was not asked to end: its groups are taken away here.
    for group in leaks::snapshot_here()?.of("cgroup").iter().rev() {
        fs::remove_dir(group)?;
    }
    Ok(())
}
