//! Checks of the hooks.

use oci_spec::runtime::{Hook, Hooks};

use super::Report;

/// Checks all hooks.
pub(super) fn hooks(hooks: &Hooks, report: &mut Report) {
    let prestart = hooks.prestart();
    let lists = [
        ("prestart", prestart),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, list) in lists {
        for (i, one) in list.iter().flatten().enumerate() {
            hook(&format!("hooks.{name}[{i}]"), one, report);
        }
    }
}

fn hook(path: &str, hook: &Hook, report: &mut Report) {
    report.absolute(&format!("{path}.path"), &hook.path().to_string_lossy());
    if let Some(secs) = hook.timeout()
        && secs <= 0
    {
        report.error(
            format!("{path}.timeout"),
            format!("{secs} is not greater than zero"),
        );
    }
    for (name, texts) in [("args", hook.args()), ("env", hook.env())] {
        for (i, text) in texts.iter().flatten().enumerate() {
            report.no_nul(&format!("{path}.{name}[{i}]"), text);
        }
    }
}
