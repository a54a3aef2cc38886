//! Names to numbers, rules to what each number of each ABI does.

use std::ops::Range;

use coracle_spec::oci::{
    LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompOperator, LinuxSyscall,
};

use crate::arch::{ARM_PRIVATE, Abi, Numbers, X32_BIT};
use crate::{CompileError, ret};

/// Errno values that the rules themselves need; the same on all ABIs.
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// Rules over all numbers: far above any program that the kernel takes, far below what fills the memory.
const MAX_RULES: usize = 65_536;

/// One comparison of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Compare {
    pub(crate) arg: u8,
    pub(crate) op: Op,
    pub(crate) value: u64,
    /// The value of a masked comparison, whose mask is `value`.
    pub(crate) two: u64,
}

/// The seven operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Op {
    Ne,
    Lt,
    Le,
    Eq,
    Ge,
    Gt,
    MaskedEq,
}

/// A return value and all the comparisons that must hold for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) compares: Vec<Compare>,
    pub(crate) ret: u32,
}

/// What a number does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// One answer whatever the arguments are.
    Ret(u32),
    /// The first rule that fits, else `otherwise`.
    Rules {
        rules: Vec<Rule>,
        otherwise: u32,
        wide: bool,
    },
}

/// All numbers of one audit architecture: each entry holds from its number up to the next entry's. The first is 0.
pub(crate) struct Space {
    pub(crate) audit_arch: u32,
    pub(crate) bodies: Vec<(u32, Body)>,
}

/// Lowers a profile; the space of `native` comes first.
pub(crate) fn lower(profile: &LinuxSeccomp, native: Abi) -> Result<Vec<Space>, CompileError> {
    let abis = abis(profile, native);
    let default = ret_value(profile.default_action(), profile.default_errno_ret());
    let mut table = Table::default();
    for syscall in profile.syscalls().iter().flatten() {
        table.add(syscall, default, &abis)?;
    }
    // Stable: what one number does stays in the profile's order.
    table.entries.sort_by_key(|entry| (entry.abi, entry.number));
    let mut spaces: Vec<Space> = Vec::new();
    for &abi in native.runs() {
        // x32 lives in the space of x86_64.
        if abi != Abi::X32 && abis.contains(&abi) {
            spaces.push(table.space(abi, default, &abis));
        }
    }
    Ok(spaces)
}

/// The ABIs of a profile that this machine can run, its own always among them.
fn abis(profile: &LinuxSeccomp, native: Abi) -> Vec<Abi> {
    let listed = |abi: Abi| {
        profile
            .architectures()
            .iter()
            .flatten()
            .any(|arch| Abi::from_oci(*arch) == Some(abi))
    };
    native
        .runs()
        .iter()
        .copied()
        .filter(|&abi| abi == native || listed(abi))
        .collect()
}

/// The value that a filter returns for an action.
pub(crate) fn ret_value(action: Action, errno: Option<u32>) -> u32 {
    let data = errno.unwrap_or(EPERM) & 0xffff;
    match action {
        Action::ScmpActKill | Action::ScmpActKillThread => ret::KILL_THREAD,
        Action::ScmpActKillProcess => ret::KILL_PROCESS,
        Action::ScmpActTrap => ret::TRAP,
        Action::ScmpActErrno => ret::ERRNO | data,
        Action::ScmpActTrace => ret::TRACE | data,
        Action::ScmpActNotify => ret::NOTIFY,
        Action::ScmpActLog => ret::LOG,
        Action::ScmpActAllow => ret::ALLOW,
    }
}

/// Whether calls that nobody could name yet should seem not to exist, instead of the default.
fn refuses(default: u32) -> bool {
    matches!(
        default & ret::ACTION,
        ret::KILL_PROCESS | ret::KILL_THREAD | ret::TRAP | ret::ERRNO
    )
}

/// Whether rules for a call count for `socketcall` and `ipc` too, where its arguments cannot be seen: without
/// arguments always; with arguments only to refuse, lest the refusal be walked around.
fn reaches_through(rules: &[Rule], ret: u32, default: u32) -> bool {
    rules.iter().any(|rule| rule.compares.is_empty()) || refuses(ret) && !refuses(default)
}

/// Rules of one number.
struct Entry {
    abi: Abi,
    number: u32,
    /// Which ones, in [`Table::rules`].
    rules: Range<usize>,
}

/// A list that is sorted once costs a tenth of a map: this runs before every process of a container.
#[derive(Default)]
struct Table {
    rules: Vec<Rule>,
    entries: Vec<Entry>,
    /// The newest call that the profile names.
    newest: Vec<(Abi, u32)>,
    count: usize,
}

impl Table {
    fn add(&mut self, syscall: &LinuxSyscall, default: u32, abis: &[Abi]) -> Result<(), CompileError> {
        let ret = ret_value(syscall.action(), syscall.errno_ret());
        let rules = if ret == default {
            0..0
        } else {
            self.add_rules(syscall.args().iter().flatten(), ret)?
        };
        for name in syscall.names() {
            let Some(numbers) = Numbers::find(name) else {
                continue;
            };
            for &abi in abis {
                if let Some(number) = numbers.on(abi) {
                    self.note_newest(abi, number);
                    if ret != default {
                        self.attach(abi, number, rules.clone())?;
                    }
                }
                if abi == Abi::X86
                    && ret != default
                    && reaches_through(&self.rules[rules.clone()], ret, default)
                {
                    self.attach_multiplexed(name, ret)?;
                }
            }
        }
        Ok(())
    }

    /// Stores the rules that one entry stands for and gives their indices.
    fn add_rules<'a>(
        &mut self,
        args: impl Iterator<Item = &'a LinuxSeccompArg>,
        ret: u32,
    ) -> Result<Range<usize>, CompileError> {
        let compares = args.map(compare).collect::<Result<Vec<_>, _>>()?;
        let repeats = (0..6).any(|arg| compares.iter().filter(|compare| compare.arg == arg).count() > 1);
        let start = self.rules.len();
        if repeats {
            self.rules.extend(compares.into_iter().map(|compare| Rule {
                compares: vec![compare],
                ret,
            }));
        } else {
            self.rules.push(Rule { compares, ret });
        }
        Ok(start..self.rules.len())
    }

    fn attach(&mut self, abi: Abi, number: u32, rules: Range<usize>) -> Result<(), CompileError> {
        self.count += rules.len();
        if self.count > MAX_RULES {
            return Err(CompileError::TooLong);
        }
        self.entries.push(Entry { abi, number, rules });
        Ok(())
    }

    /// On x86 a call on a socket or a System V object can also be made through `socketcall` or `ipc`, whose first
    /// argument says which one is meant. Their other arguments lie in memory, out of a filter's reach.
    fn attach_multiplexed(&mut self, name: &str, ret: u32) -> Result<(), CompileError> {
        const SOCKETCALL: [&str; 20] = [
            "socket",
            "bind",
            "connect",
            "listen",
            "accept",
            "getsockname",
            "getpeername",
            "socketpair",
            "send",
            "recv",
            "sendto",
            "recvfrom",
            "shutdown",
            "setsockopt",
            "getsockopt",
            "sendmsg",
            "recvmsg",
            "accept4",
            "recvmmsg",
            "sendmmsg",
        ];
        const IPC: [(&str, u64); 12] = [
            ("semop", 1),
            ("semget", 2),
            ("semctl", 3),
            ("semtimedop", 4),
            ("msgsnd", 11),
            ("msgrcv", 12),
            ("msgget", 13),
            ("msgctl", 14),
            ("shmat", 21),
            ("shmdt", 22),
            ("shmget", 23),
            ("shmctl", 24),
        ];
        let socket = (1..)
            .zip(SOCKETCALL)
            .find(|(_, known)| *known == name)
            .map(|(which, _)| {
                (
                    "socketcall",
                    Compare {
                        arg: 0,
                        op: Op::Eq,
                        value: which,
                        two: 0,
                    },
                )
            });
        let ipc = IPC.iter().find(|(known, _)| *known == name).map(|(_, which)| {
            // The upper half is a version of the interface.
            (
                "ipc",
                Compare {
                    arg: 0,
                    op: Op::MaskedEq,
                    value: 0xffff,
                    two: *which,
                },
            )
        });
        let Some((through, compare)) = socket.or(ipc) else {
            return Ok(());
        };
        let Some(number) = Numbers::find(through).and_then(|numbers| numbers.on(Abi::X86)) else {
            return Ok(());
        };
        let index = self.rules.len();
        self.rules.push(Rule {
            compares: vec![compare],
            ret,
        });
        self.attach(Abi::X86, number, index..index + 1)
    }

    fn note_newest(&mut self, abi: Abi, number: u32) {
        // Two blocks of numbers do not grow with time.
        let old_block = match abi {
            Abi::X32 => number >= X32_BIT + 512,
            Abi::Arm => number >= ARM_PRIVATE,
            _ => false,
        };
        if !old_block {
            match self.newest.iter_mut().find(|(known, _)| *known == abi) {
                Some((_, newest)) => *newest = number.max(*newest),
                None => self.newest.push((abi, number)),
            }
        }
    }

    fn space(&self, abi: Abi, default: u32, abis: &[Abi]) -> Space {
        let mut bodies = Bodies::default();
        // (first number, number after the last one) of this ABI's part.
        let end = if abi == Abi::X86_64 { X32_BIT } else { u32::MAX };
        self.part(abi, 0, end, default, &mut bodies);
        if abi == Abi::X86_64 {
            if abis.contains(&Abi::X32) {
                self.part(Abi::X32, X32_BIT, u32::MAX, default, &mut bodies);
            } else {
                bodies.set(X32_BIT, Body::Ret(ret::ERRNO | ENOSYS));
            }
        }
        Space {
            audit_arch: abi.audit_arch(),
            bodies: bodies.list,
        }
    }

    fn part(&self, abi: Abi, start: u32, end: u32, default: u32, bodies: &mut Bodies) {
        let newest = self.newest.iter().find(|(known, _)| *known == abi);
        let newest = newest.map(|(_, newest)| *newest).filter(|_| refuses(default));
        let unnamed = |number: u32| match newest {
            Some(newest) if number > newest && !(abi == Abi::Arm && number >= ARM_PRIVATE) => {
                Body::Ret(ret::ERRNO | ENOSYS)
            }
            _ => Body::Ret(default),
        };
        let first = self.entries.partition_point(|entry| entry.abi < abi);
        let last = self.entries.partition_point(|entry| entry.abi <= abi);
        let mut named = self.entries[first..last]
            .chunk_by(|a, b| a.number == b.number)
            .peekable();
        // Every other place where what happens may change: the start, and where ENOSYS starts and stops.
        let mut others = vec![start];
        others.extend(newest.map(|newest| newest + 1));
        others.extend((abi == Abi::Arm).then_some(ARM_PRIVATE));
        others.sort_unstable();
        let mut others = others.into_iter().peekable();
        // And after each named call. The next place is the smallest of the three.
        let mut after = None;
        loop {
            let call = named.peek().map(|call| call[0].number);
            let Some(place) = [call, others.peek().copied(), after].into_iter().flatten().min() else {
                return;
            };
            others.next_if_eq(&place);
            let body = match named.next_if(|_| call == Some(place)) {
                Some(call) => {
                    after = place.checked_add(1);
                    self.body(call, default, abi.is_wide())
                }
                None => {
                    after = after.filter(|after| *after != place);
                    unnamed(place)
                }
            };
            if (start..end).contains(&place) {
                bodies.set(place, body);
            }
        }
    }

    /// What the entries of one number come to.
    fn body(&self, call: &[Entry], default: u32, wide: bool) -> Body {
        let rules = || call.iter().flat_map(|entry| &self.rules[entry.rules.clone()]);
        // The first one without comparisons decides alone.
        match rules().find(|rule| rule.compares.is_empty()) {
            Some(always) => Body::Ret(always.ret),
            None => Body::Rules {
                rules: rules().cloned().collect(),
                otherwise: default,
                wide,
            },
        }
    }
}

/// A list of bodies in ascending order in which neighbours differ.
#[derive(Default)]
struct Bodies {
    list: Vec<(u32, Body)>,
}

impl Bodies {
    fn set(&mut self, number: u32, body: Body) {
        if self.list.last().is_none_or(|(_, last)| *last != body) {
            self.list.push((number, body));
        }
    }
}

fn compare(arg: &LinuxSeccompArg) -> Result<Compare, CompileError> {
    let index = arg.index();
    let op = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => Op::Ne,
        LinuxSeccompOperator::ScmpCmpLt => Op::Lt,
        LinuxSeccompOperator::ScmpCmpLe => Op::Le,
        LinuxSeccompOperator::ScmpCmpEq => Op::Eq,
        LinuxSeccompOperator::ScmpCmpGe => Op::Ge,
        LinuxSeccompOperator::ScmpCmpGt => Op::Gt,
        LinuxSeccompOperator::ScmpCmpMaskedEq => Op::MaskedEq,
    };
    let number = u8::try_from(index).ok().filter(|number| *number < 6);
    let arg_number = number.ok_or(CompileError::ArgumentIndex(index))?;
    Ok(Compare {
        arg: arg_number,
        op,
        value: arg.value(),
        two: arg.value_two().unwrap_or(0),
    })
}
