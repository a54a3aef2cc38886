//! Checks of a process.

use crate::process::{ProcessDocument, cpu_list, rlimit_number};

use super::Report;

/// Checks one process; `path` is where it stands.
pub(crate) fn process(path: &str, process: &ProcessDocument, report: &mut Report) {
    args(path, process, report);
    env(path, process, report);
    cwd(path, process, report);
    user(path, process, report);
    console_size(path, process, report);
    rlimits(path, process, report);
    oom_score_adj(path, process, report);
    labels(path, process, report);
    scheduler(path, process, report);
    io_priority(path, process, report);
    exec_cpu_affinity(path, process, report);
}

fn args(path: &str, process: &ProcessDocument, report: &mut Report) {
    if process.args.is_empty() {
        report.error(format!("{path}.args"), "must not be empty");
    }
    for (i, arg) in process.args.iter().enumerate() {
        report.no_nul(&format!("{path}.args[{i}]"), arg);
    }
}

/// An entry without a name or without `=` is refused: other runtimes once took it for "inherit".
fn env(path: &str, process: &ProcessDocument, report: &mut Report) {
    for (i, entry) in process.env.iter().enumerate() {
        let field = || format!("{path}.env[{i}]");
        match entry.split_once('=') {
            None => report.error(field(), "invalid environment variable: missing '='"),
            Some(("", _)) => report.error(field(), "invalid environment variable: name cannot be empty"),
            Some(_) if entry.contains('\0') => report.error(field(), "holds a NUL byte"),
            Some(_) => {}
        }
    }
}

fn cwd(path: &str, process: &ProcessDocument, report: &mut Report) {
    let field = format!("{path}.cwd");
    if process.cwd.is_empty() {
        report.error(field, "missing");
    } else {
        report.absolute(&field, &process.cwd);
    }
}

/// The highest number means "leave it" to the kernel.
fn user(path: &str, process: &ProcessDocument, report: &mut Report) {
    let user = &process.user;
    for (name, id) in [("uid", user.uid), ("gid", user.gid)] {
        if id == u32::MAX {
            report.error(format!("{path}.user.{name}"), format!("{id} is not a valid id"));
        }
    }
    for (i, gid) in user.additional_gids.iter().enumerate() {
        if *gid == u32::MAX {
            report.error(
                format!("{path}.user.additionalGids[{i}]"),
                format!("{gid} is not a valid id"),
            );
        }
    }
    if user.umask.is_some_and(|umask| umask > 0o777) {
        report.error(format!("{path}.user.umask"), "is not a file mode mask");
    }
}

fn console_size(path: &str, process: &ProcessDocument, report: &mut Report) {
    let Some(size) = &process.console_size else { return };
    if size.cells().is_none() {
        report.error(format!("{path}.consoleSize"), "is larger than a terminal can be");
    } else if !process.terminal {
        report.warn(format!("{path}.consoleSize"), "is ignored without a terminal");
    }
}

fn rlimits(path: &str, process: &ProcessDocument, report: &mut Report) {
    for (i, limit) in process.rlimits.iter().enumerate() {
        let field = format!("{path}.rlimits[{i}]");
        if rlimit_number(&limit.kind).is_none() {
            report.error(
                format!("{field}.type"),
                format!("unknown resource {:?}", limit.kind),
            );
        } else if process.rlimits[..i]
            .iter()
            .any(|earlier| earlier.kind == limit.kind)
        {
            report.error(format!("{field}.type"), format!("{} is given twice", limit.kind));
        }
        if limit.soft > limit.hard {
            report.error(
                format!("{field}.soft"),
                format!("{} exceeds the hard limit {}", limit.soft, limit.hard),
            );
        }
    }
}

fn oom_score_adj(path: &str, process: &ProcessDocument, report: &mut Report) {
    if let Some(score) = process.oom_score_adj
        && !(-1000..=1000).contains(&score)
    {
        report.error(
            format!("{path}.oomScoreAdj"),
            format!("{score} is not between -1000 and 1000"),
        );
    }
}

fn labels(path: &str, process: &ProcessDocument, report: &mut Report) {
    let labels = [
        ("apparmorProfile", &process.apparmor_profile),
        ("selinuxLabel", &process.selinux_label),
    ];
    for (name, label) in labels {
        if let Some(label) = label {
            report.no_nul(&format!("{path}.{name}"), label);
        }
    }
}

fn scheduler(path: &str, process: &ProcessDocument, report: &mut Report) {
    if let Some(Err((field, problem))) = process.scheduler.as_ref().map(|scheduler| scheduler.attributes()) {
        report.error(format!("{path}.scheduler.{field}"), problem);
    }
}

fn io_priority(path: &str, process: &ProcessDocument, report: &mut Report) {
    let Some(priority) = &process.io_priority else {
        return;
    };
    if priority.class_number().is_none() {
        report.error(
            format!("{path}.ioPriority.class"),
            format!("unknown I/O priority class {:?}", priority.class),
        );
    } else if priority.number().is_none() {
        report.error(
            format!("{path}.ioPriority.priority"),
            format!("{} is not between 0 and 7", priority.priority),
        );
    }
}

fn exec_cpu_affinity(path: &str, process: &ProcessDocument, report: &mut Report) {
    let Some(affinity) = &process.exec_cpu_affinity else {
        return;
    };
    for (name, list) in [("initial", &affinity.initial), ("final", &affinity.last)] {
        if cpu_list(list).is_none() {
            report.error(
                format!("{path}.execCPUAffinity.{name}"),
                format!("{list:?} is not a list of CPUs"),
            );
        }
    }
}
