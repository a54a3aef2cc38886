//! Controllers on their way down to a leaf, and its type.

use coracle_kernel::Errno;

use crate::dir::Dir;
use crate::{Error, Result};

/// Enabled for every leaf where the host has them: limits may come later by `update`, and statistics need them.
const ALWAYS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// Controllers that a threaded group cannot have.
const DOMAIN: [&str; 4] = ["hugetlb", "io", "memory", "rdma"];

/// Makes the usual controllers and those in `asked` available in `leaf`, which lies at `path` below `root`.
///
/// What cannot be enabled is left: a limit that needs it says so, and names it.
pub(crate) fn enable(root: &Dir, path: &str, leaf: &Dir, asked: &[&str]) -> Result<()> {
    let has = |text: &str, controller: &str| text.split_whitespace().any(|word| word == controller);
    let Some(here) = leaf.try_read("cgroup.controllers")? else {
        return Ok(());
    };
    let mut missing: Vec<&str> = ALWAYS
        .into_iter()
        .filter(|controller| !has(&here, controller))
        .collect();
    missing.extend(
        asked
            .iter()
            .filter(|name| !ALWAYS.contains(name) && !has(&here, name)),
    );
    if missing.is_empty() {
        return Ok(());
    }
    let available = root.read("cgroup.controllers")?;
    missing.retain(|controller| has(&available, controller));
    if missing.is_empty() {
        return Ok(());
    }
    // From the root down to the leaf's parent.
    enable_in(root, &missing)?;
    for (end, _) in path.match_indices('/') {
        if let Some(dir) = root.find(&path[..end])? {
            enable_in(&dir, &missing)?;
        }
    }
    Ok(())
}

fn enable_in(dir: &Dir, controllers: &[&str]) -> Result<()> {
    let words: Vec<String> = controllers.iter().map(|name| format!("+{name}")).collect();
    if dir.write_raw("cgroup.subtree_control", &words.join(" ")).is_ok() {
        return Ok(());
    }
    // One that cannot be had (processes in this group, a realtime task in cpu) must not keep the others away.
    for word in words {
        match dir.write_raw("cgroup.subtree_control", &word) {
            Err(error)
                if !matches!(
                    error.errno(),
                    Errno::ENOENT
                        | Errno::EBUSY
                        | Errno::EINVAL
                        | Errno::EOPNOTSUPP
                        | Errno::EACCES
                        | Errno::EPERM
                ) =>
            {
                let (file, value) = ("cgroup.subtree_control".to_owned(), word);
                return Err(Error::Write {
                    file,
                    value,
                    path: dir.path().to_owned(),
                    source: error,
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// A group made below a threaded one is in no state to hold a process: it becomes threaded too, unless limits need
/// what threaded groups do not have.
pub(crate) fn settle_type(leaf: &Dir, asked: &[&str]) -> Result<()> {
    let Some(kind) = leaf.try_read("cgroup.type")? else {
        return Ok(());
    };
    let kind = kind.trim();
    if kind == "domain" || kind == "domain threaded" {
        return Ok(());
    }
    if let Some(controller) = asked.iter().find(|controller| DOMAIN.contains(controller)) {
        return Err(Error::Limit(format!(
            "cgroup {} is of type {kind:?}, which cannot have the {controller} controller",
            leaf.path()
        )));
    }
    if kind == "domain invalid" {
        leaf.write("cgroup.type", "threaded")?;
    }
    Ok(())
}
