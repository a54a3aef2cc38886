//! Checks of the seccomp profile: what only the whole profile can tell, its words are checked by their types.

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction as Action};

use super::Report;

const MAX_ERRNO: u32 = 4095;

/// Checks the profile; `path` is where it stands.
pub(crate) fn seccomp(path: &str, profile: &LinuxSeccomp, report: &mut Report) {
    action(
        path,
        profile.default_action(),
        profile.default_errno_ret(),
        "defaultErrnoRet",
        report,
    );
    for (i, rule) in profile.syscalls().iter().flatten().enumerate() {
        let field = format!("{path}.syscalls[{i}]");
        if rule.names().is_empty() {
            report.error(format!("{field}.names"), "must not be empty");
        }
        action(&field, rule.action(), rule.errno_ret(), "errnoRet", report);
        for (j, arg) in rule.args().iter().flatten().enumerate() {
            if arg.index() > 5 {
                report.error(
                    format!("{field}.args[{j}].index"),
                    format!("{} is not between 0 and 5", arg.index()),
                );
            }
        }
    }
}

fn action(field: &str, action: Action, errno: Option<u32>, errno_field: &str, report: &mut Report) {
    // A listener agent is needed for it, and a field to name its socket.
    if action == Action::ScmpActNotify {
        report.error(
            field,
            "the action SCMP_ACT_NOTIFY is not supported in this release",
        );
    }
    let Some(errno) = errno else { return };
    match action {
        Action::ScmpActErrno if errno > MAX_ERRNO => {
            report.error(
                format!("{field}.{errno_field}"),
                format!("{errno} is larger than {MAX_ERRNO}"),
            );
        }
        Action::ScmpActTrace if errno > u32::from(u16::MAX) => {
            report.error(
                format!("{field}.{errno_field}"),
                format!("{errno} does not fit 16 bits"),
            );
        }
        Action::ScmpActErrno | Action::ScmpActTrace => {}
        // Docker's default profile carries a 1 beside SCMP_ACT_ALLOW in no version that is known, a zero in some.
        _ if errno == 0 => {}
        _ => report.error(format!("{field}.{errno_field}"), "the action takes no errno"),
    }
}
