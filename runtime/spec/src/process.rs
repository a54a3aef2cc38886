//! The `process` object: what `config.json` and `exec --process` say of one process.
//!
//! It is parsed by types of our own: the crate's refuse unknown capabilities and a missing `user`, misspell one
//! scheduler flag, and pull in a regular-expression engine.

use std::path::PathBuf;

use serde::Deserialize;

use crate::capability::{CapabilitySets, capability_mask};
use crate::validate::Finding;

/// A checked process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// A pseudo-terminal is attached.
    pub terminal: bool,
    /// Rows and columns of the terminal.
    pub console_size: Option<(u16, u16)>,
    /// Ids.
    pub user: User,
    /// Program and arguments; never empty.
    pub args: Vec<String>,
    /// `NAME=value` entries; of several with one name the last counts.
    pub env: Vec<String>,
    /// Working directory, absolute.
    pub cwd: PathBuf,
    /// Capability sets; all empty when the configuration has none.
    pub capabilities: CapabilitySets,
    /// Resource limits, each resource at most once.
    pub rlimits: Vec<Rlimit>,
    /// `execve` never grants privileges.
    pub no_new_privileges: bool,
    /// AppArmor profile.
    pub apparmor_profile: Option<String>,
    /// SELinux label.
    pub selinux_label: Option<String>,
    /// Score adjustment of the OOM killer; `None`: leave it alone.
    pub oom_score_adj: Option<i32>,
    /// Scheduling policy and its numbers.
    pub scheduler: Option<Scheduler>,
    /// I/O priority as `ioprio_set` takes it: class in the bits from 13 up, level below.
    pub io_priority: Option<u16>,
    /// CPU affinity of an exec'd process.
    pub exec_cpu_affinity: Option<ExecCpuAffinity>,
}

/// The ids of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    /// User id inside the container.
    pub uid: u32,
    /// Group id inside the container.
    pub gid: u32,
    /// File mode creation mask; `None`: the runtime's default.
    pub umask: Option<u32>,
    /// Supplementary groups.
    #[serde(deserialize_with = "null_is_default")]
    pub additional_gids: Vec<u32>,
}

/// One resource limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rlimit {
    /// `RLIMIT_*` number of the generic architecture, which all supported ones follow.
    pub resource: u32,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// Scheduling attributes, as `sched_setattr` takes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scheduler {
    /// `SCHED_*` number.
    pub policy: u32,
    /// `SCHED_FLAG_*` bits.
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Static priority.
    pub priority: u32,
    /// Runtime of the deadline policy, nanoseconds.
    pub runtime_ns: u64,
    /// Deadline of the deadline policy, nanoseconds.
    pub deadline_ns: u64,
    /// Period of the deadline policy, nanoseconds.
    pub period_ns: u64,
}

/// CPU affinity of an exec'd process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecCpuAffinity {
    /// CPUs while the process enters the container; empty: unset.
    pub initial: Vec<u32>,
    /// CPUs once it has entered; empty: unset.
    pub last: Vec<u32>,
}

/// The number of a resource by its name, such as `RLIMIT_NOFILE`.
#[must_use]
pub fn rlimit_number(name: &str) -> Option<u32> {
    const NAMES: [&str; 16] = [
        "RLIMIT_CPU",
        "RLIMIT_FSIZE",
        "RLIMIT_DATA",
        "RLIMIT_STACK",
        "RLIMIT_CORE",
        "RLIMIT_RSS",
        "RLIMIT_NPROC",
        "RLIMIT_NOFILE",
        "RLIMIT_MEMLOCK",
        "RLIMIT_AS",
        "RLIMIT_LOCKS",
        "RLIMIT_SIGPENDING",
        "RLIMIT_MSGQUEUE",
        "RLIMIT_NICE",
        "RLIMIT_RTPRIO",
        "RLIMIT_RTTIME",
    ];
    (0u32..)
        .zip(NAMES)
        .find(|(_, known)| *known == name)
        .map(|(number, _)| number)
}

/// The object as it stands in the document.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ProcessDocument {
    pub(crate) terminal: bool,
    pub(crate) console_size: Option<ConsoleSizeDocument>,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) user: User,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) args: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) env: Vec<String>,
    pub(crate) cwd: String,
    pub(crate) capabilities: Option<CapabilitiesDocument>,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) rlimits: Vec<RlimitDocument>,
    pub(crate) no_new_privileges: bool,
    pub(crate) apparmor_profile: Option<String>,
    pub(crate) oom_score_adj: Option<i32>,
    pub(crate) selinux_label: Option<String>,
    pub(crate) io_priority: Option<IoPriorityDocument>,
    pub(crate) scheduler: Option<SchedulerDocument>,
    #[serde(rename = "execCPUAffinity")]
    pub(crate) exec_cpu_affinity: Option<AffinityDocument>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ConsoleSizeDocument {
    pub(crate) height: u64,
    pub(crate) width: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct CapabilitiesDocument {
    #[serde(deserialize_with = "null_is_default")]
    bounding: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    effective: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    inheritable: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    permitted: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    ambient: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RlimitDocument {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) hard: u64,
    pub(crate) soft: u64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct IoPriorityDocument {
    pub(crate) class: String,
    #[serde(default)]
    pub(crate) priority: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SchedulerDocument {
    pub(crate) policy: String,
    pub(crate) nice: i32,
    pub(crate) priority: i32,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) flags: Vec<String>,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct AffinityDocument {
    pub(crate) initial: String,
    #[serde(rename = "final")]
    pub(crate) last: String,
}

impl ProcessDocument {
    /// The model of a document in which validation found nothing; words that it would have refused are left out.
    pub(crate) fn into_process(self, path: &str, warnings: &mut Vec<Finding>) -> Process {
        let mut mask = |name: &str, names: &[String]| {
            capability_mask(&format!("{path}.capabilities.{name}"), names, warnings)
        };
        let capabilities = self
            .capabilities
            .map_or_else(CapabilitySets::default, |sets| CapabilitySets {
                bounding: mask("bounding", &sets.bounding),
                effective: mask("effective", &sets.effective),
                inheritable: mask("inheritable", &sets.inheritable),
                permitted: mask("permitted", &sets.permitted),
                ambient: mask("ambient", &sets.ambient),
            });
        Process {
            terminal: self.terminal,
            console_size: self.console_size.and_then(|size| size.cells()),
            user: self.user,
            args: self.args,
            env: self.env,
            cwd: self.cwd.into(),
            capabilities,
            rlimits: self.rlimits.iter().filter_map(RlimitDocument::limit).collect(),
            no_new_privileges: self.no_new_privileges,
            apparmor_profile: self.apparmor_profile.filter(|name| !name.is_empty()),
            selinux_label: self.selinux_label.filter(|label| !label.is_empty()),
            oom_score_adj: self.oom_score_adj,
            scheduler: self.scheduler.and_then(|scheduler| scheduler.attributes().ok()),
            io_priority: self.io_priority.and_then(|priority| priority.number()),
            exec_cpu_affinity: self.exec_cpu_affinity.map(|affinity| ExecCpuAffinity {
                initial: cpu_list(&affinity.initial).unwrap_or_default(),
                last: cpu_list(&affinity.last).unwrap_or_default(),
            }),
        }
    }
}

impl ConsoleSizeDocument {
    /// Rows and columns, where the kernel's 16 bits hold them.
    pub(crate) fn cells(&self) -> Option<(u16, u16)> {
        Some((u16::try_from(self.height).ok()?, u16::try_from(self.width).ok()?))
    }
}

impl RlimitDocument {
    fn limit(&self) -> Option<Rlimit> {
        Some(Rlimit {
            resource: rlimit_number(&self.kind)?,
            soft: self.soft,
            hard: self.hard,
        })
    }
}

impl IoPriorityDocument {
    pub(crate) fn class_number(&self) -> Option<u16> {
        match self.class.as_str() {
            "IOPRIO_CLASS_RT" => Some(1),
            "IOPRIO_CLASS_BE" => Some(2),
            "IOPRIO_CLASS_IDLE" => Some(3),
            _ => None,
        }
    }

    /// The number for `ioprio_set`.
    pub(crate) fn number(&self) -> Option<u16> {
        let level = u16::try_from(self.priority).ok().filter(|level| *level <= 7)?;
        Some(self.class_number()? << 13 | level)
    }
}

impl SchedulerDocument {
    /// The numbers for `sched_setattr`, or the problem and the name of the field that has it.
    pub(crate) fn attributes(&self) -> Result<Scheduler, (&'static str, String)> {
        let policy = match self.policy.as_str() {
            "SCHED_OTHER" => 0,
            "SCHED_FIFO" => 1,
            "SCHED_RR" => 2,
            "SCHED_BATCH" => 3,
            "SCHED_ISO" => 4,
            "SCHED_IDLE" => 5,
            "SCHED_DEADLINE" => 6,
            "SCHED_EXT" => 7,
            other => return Err(("policy", format!("unknown scheduling policy {other:?}"))),
        };
        let mut flags = 0;
        for word in &self.flags {
            flags |= match word.as_str() {
                "SCHED_FLAG_RESET_ON_FORK" => 0x01,
                "SCHED_FLAG_RECLAIM" => 0x02,
                "SCHED_FLAG_DL_OVERRUN" => 0x04,
                "SCHED_FLAG_KEEP_POLICY" => 0x08,
                "SCHED_FLAG_KEEP_PARAMS" => 0x10,
                "SCHED_FLAG_UTIL_CLAMP_MIN" => 0x20,
                "SCHED_FLAG_UTIL_CLAMP_MAX" => 0x40,
                other => return Err(("flags", format!("unknown scheduling flag {other:?}"))),
            };
        }
        let realtime = matches!(policy, 1 | 2);
        if self.nice != 0 && !matches!(policy, 0 | 3) {
            return Err((
                "nice",
                "only SCHED_OTHER and SCHED_BATCH take a nice value".to_owned(),
            ));
        }
        if !(-20..=19).contains(&self.nice) {
            return Err(("nice", format!("{} is not between -20 and 19", self.nice)));
        }
        if self.priority != 0 && !realtime {
            return Err((
                "priority",
                "only SCHED_FIFO and SCHED_RR take a priority".to_owned(),
            ));
        }
        let Ok(priority) = u32::try_from(self.priority) else {
            return Err(("priority", format!("{} is negative", self.priority)));
        };
        if policy != 6 && (self.runtime, self.deadline, self.period) != (0, 0, 0) {
            return Err((
                "runtime",
                "only SCHED_DEADLINE takes runtime, deadline and period".to_owned(),
            ));
        }
        Ok(Scheduler {
            policy,
            flags,
            nice: self.nice,
            priority,
            runtime_ns: self.runtime,
            deadline_ns: self.deadline,
            period_ns: self.period,
        })
    }
}

/// The CPUs of a list such as `0-3,7`; `None` where it is none. An empty list is an empty answer.
pub(crate) fn cpu_list(text: &str) -> Option<Vec<u32>> {
    /// Far above any machine, far below what would fill the memory.
    const MAX_CPUS: u32 = 65_536;
    let mut cpus = Vec::new();
    if text.trim().is_empty() {
        return Some(cpus);
    }
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: u32 = decimal(first)?;
        let last: u32 = decimal(last)?;
        if first > last || last >= MAX_CPUS {
            return None;
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Some(cpus)
}

// `str::parse` takes a sign, which no list of CPUs has.
fn decimal(text: &str) -> Option<u32> {
    let text = text.trim();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// Writers in Go leave `null` where a list or object is empty.
pub(crate) fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list("0-3,7"), Some(vec![0, 1, 2, 3, 7]));
        assert_eq!(cpu_list("7, 1-2,2"), Some(vec![1, 2, 7]));
        assert_eq!(cpu_list(""), Some(vec![]));
        for bad in ["a", "1-", "-1", "3-1", "1,,2", "0-4294967295", "+1", "1-2-3"] {
            assert_eq!(cpu_list(bad), None, "{bad}");
        }
    }

    #[test]
    fn io_priorities() {
        let number = |class: &str, priority| {
            IoPriorityDocument {
                class: class.to_owned(),
                priority,
            }
            .number()
        };
        assert_eq!(number("IOPRIO_CLASS_RT", 0), Some(1 << 13));
        assert_eq!(number("IOPRIO_CLASS_BE", 7), Some(2 << 13 | 7));
        assert_eq!(number("IOPRIO_CLASS_BE", 8), None);
        assert_eq!(number("IOPRIO_CLASS_BE", -1), None);
        assert_eq!(number("IOPRIO_CLASS_NONE", 0), None);
    }

    #[test]
    fn scheduler_words_and_numbers() {
        let document = |text: &str| {
            serde_json::from_str::<SchedulerDocument>(text)
                .unwrap()
                .attributes()
        };
        let overrun =
            document(r#"{"policy":"SCHED_DEADLINE","flags":["SCHED_FLAG_DL_OVERRUN"],"runtime":1}"#);
        assert_eq!(overrun.map(|s| (s.policy, s.flags, s.runtime_ns)), Ok((6, 4, 1)));
        assert_eq!(
            document(r#"{"policy":"SCHED_FIFO","nice":1}"#).unwrap_err().0,
            "nice"
        );
        assert_eq!(
            document(r#"{"policy":"SCHED_OTHER","nice":20}"#).unwrap_err().0,
            "nice"
        );
        assert_eq!(
            document(r#"{"policy":"SCHED_OTHER","priority":1}"#)
                .unwrap_err()
                .0,
            "priority"
        );
        assert_eq!(
            document(r#"{"policy":"SCHED_RR","priority":-1}"#).unwrap_err().0,
            "priority"
        );
        assert_eq!(
            document(r#"{"policy":"SCHED_RR","period":1}"#).unwrap_err().0,
            "runtime"
        );
        assert_eq!(document(r#"{"policy":"SCHED_NOPE"}"#).unwrap_err().0, "policy");
        assert_eq!(document("{}").unwrap_err().0, "policy");
    }
}
