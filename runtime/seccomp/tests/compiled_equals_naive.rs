//! A compiled program answers as a plain reading of the profile does, for random profiles and random calls.

#![allow(
    clippy::unwrap_used,
    reason = "what cannot be unwrapped fails the test, in its helpers too"
)]

use coracle_seccomp::eval::{Data, evaluate};
use coracle_seccomp::{Abi, compile, ret, syscall_number};
use coracle_spec::oci::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompBuilder, LinuxSeccompOperator as Op, LinuxSyscall, LinuxSyscallBuilder,
};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::test_runner::RngSeed;

const ENOSYS: u32 = ret::ERRNO | 38;

/// Old and new calls, calls of one ABI alone, multiplexed ones, and names that nobody knows.
const NAMES: [&str; 22] = [
    "read",
    "write",
    "open",
    "close",
    "clone",
    "clone3",
    "execve",
    "ptrace",
    "personality",
    "socket",
    "socketcall",
    "bind",
    "ipc",
    "semop",
    "semtimedop",
    "openat2",
    "set_tls",
    "arch_prctl",
    "waitpid",
    "file_setattr",
    "riscv_hwprobe",
    "teleport",
];

/// Values around every edge that a comparison has.
const VALUES: [u64; 14] = [
    0,
    1,
    2,
    3,
    0xff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x1_0000_0001,
    0x7e02_0000,
    0x8000_0000_0000_0000,
    u64::MAX - 1,
    u64::MAX,
];

/// What the profile says of one call, read off it without any of the compiler's ideas.
fn naive(profile: &LinuxSeccomp, native: Abi, data: &Data) -> u32 {
    let listed = |abi: Abi| {
        abi == native
            || (native.runs().contains(&abi)
                && profile
                    .architectures()
                    .iter()
                    .flatten()
                    .any(|arch| arch.to_string() == abi.name()))
    };
    let marked = data.arch == Abi::X86_64.audit_arch() && data.nr >= 0x4000_0000;
    let Some(abi) = Abi::ALL
        .into_iter()
        .find(|abi| abi.audit_arch() == data.arch && (*abi == Abi::X32) == marked)
        .filter(|abi| listed(*abi) || *abi == Abi::X32 && listed(Abi::X86_64))
    else {
        return ret::KILL_PROCESS;
    };
    if abi == Abi::X32 && !listed(Abi::X32) {
        return ENOSYS;
    }
    let default = value(profile.default_action(), profile.default_errno_ret());
    let rules: Vec<&LinuxSyscall> = profile.syscalls().iter().flatten().collect();
    let mut first_conditional = None;
    for rule in rules
        .iter()
        .filter(|rule| value(rule.action(), rule.errno_ret()) != default)
    {
        let ret = value(rule.action(), rule.errno_ret());
        let args = rule.args().clone().unwrap_or_default();
        let named = rule
            .names()
            .iter()
            .any(|name| syscall_number(name, abi) == Some(data.nr));
        let through = rule.names().iter().any(|name| multiplexed(name, abi, data));
        if args.is_empty() && named {
            return ret;
        }
        let repeats = args
            .iter()
            .any(|a| args.iter().filter(|b| a.index() == b.index()).count() > 1);
        let fits = if args.is_empty() {
            false
        } else if repeats {
            args.iter().any(|arg| holds(arg, abi, data))
        } else {
            args.iter().all(|arg| holds(arg, abi, data))
        };
        let blind = args.is_empty() || refuses(ret) && !refuses(default);
        if (named && fits) || (through && blind) {
            first_conditional.get_or_insert(ret);
        }
    }
    if let Some(ret) = first_conditional {
        return ret;
    }
    let named = rules
        .iter()
        .filter(|rule| value(rule.action(), rule.errno_ret()) != default)
        .flat_map(|rule| rule.names())
        .any(|name| syscall_number(name, abi) == Some(data.nr) || reaches(name, abi, data.nr));
    let newest = rules
        .iter()
        .flat_map(|rule| rule.names())
        .filter_map(|name| syscall_number(name, abi))
        .filter(|nr| !(abi == Abi::X32 && nr & 0x3fff_ffff >= 512 || abi == Abi::Arm && *nr >= 0xf0000))
        .max();
    let newer = newest.is_some_and(|newest| data.nr > newest) && !(abi == Abi::Arm && data.nr >= 0xf0000);
    if refuses(default) && newer && !named {
        ENOSYS
    } else {
        default
    }
}

fn refuses(value: u32) -> bool {
    matches!(
        value & ret::ACTION,
        ret::KILL_PROCESS | ret::KILL_THREAD | ret::TRAP | ret::ERRNO
    )
}

fn value(action: Action, errno: Option<u32>) -> u32 {
    match action {
        Action::ScmpActKill | Action::ScmpActKillThread => ret::KILL_THREAD,
        Action::ScmpActKillProcess => ret::KILL_PROCESS,
        Action::ScmpActTrap => ret::TRAP,
        Action::ScmpActErrno => ret::ERRNO + errno.unwrap_or(1),
        Action::ScmpActTrace => ret::TRACE + errno.unwrap_or(1),
        Action::ScmpActNotify => ret::NOTIFY,
        Action::ScmpActLog => ret::LOG,
        Action::ScmpActAllow => ret::ALLOW,
    }
}

fn holds(arg: &LinuxSeccompArg, abi: Abi, data: &Data) -> bool {
    let wide = matches!(abi, Abi::X86_64 | Abi::Aarch64 | Abi::Riscv64);
    let cut = |value: u64| if wide { value } else { value & 0xffff_ffff };
    let (have, want) = (cut(data.args[arg.index()]), cut(arg.value()));
    match arg.op() {
        Op::ScmpCmpNe => have != want,
        Op::ScmpCmpLt => have < want,
        Op::ScmpCmpLe => have <= want,
        Op::ScmpCmpEq => have == want,
        Op::ScmpCmpGe => have >= want,
        Op::ScmpCmpGt => have > want,
        Op::ScmpCmpMaskedEq => have & want == cut(arg.value_two().unwrap_or(0)) & want,
    }
}

fn reaches(name: &str, abi: Abi, nr: u32) -> bool {
    abi == Abi::X86
        && match name {
            "socket" | "bind" => nr == 102,
            "semop" | "semtimedop" => nr == 117,
            _ => false,
        }
}

fn multiplexed(name: &str, abi: Abi, data: &Data) -> bool {
    let which = data.args[0] & 0xffff_ffff;
    reaches(name, abi, data.nr)
        && match name {
            "socket" => which == 1,
            "bind" => which == 2,
            "semop" => which & 0xffff == 1,
            "semtimedop" => which & 0xffff == 4,
            _ => false,
        }
}

fn action() -> impl Strategy<Value = Action> {
    select(vec![
        Action::ScmpActKill,
        Action::ScmpActKillProcess,
        Action::ScmpActKillThread,
        Action::ScmpActTrap,
        Action::ScmpActErrno,
        Action::ScmpActTrace,
        Action::ScmpActAllow,
        Action::ScmpActLog,
        Action::ScmpActNotify,
    ])
}

fn argument() -> impl Strategy<Value = LinuxSeccompArg> {
    let op = select(vec![
        Op::ScmpCmpNe,
        Op::ScmpCmpLt,
        Op::ScmpCmpLe,
        Op::ScmpCmpEq,
        Op::ScmpCmpGe,
        Op::ScmpCmpGt,
        Op::ScmpCmpMaskedEq,
    ]);
    // Few indices, so that repeats are common.
    (
        select(vec![0usize, 1, 5]),
        select(VALUES.to_vec()),
        select(VALUES.to_vec()),
        op,
    )
        .prop_map(|(index, value, two, op)| {
            LinuxSeccompArgBuilder::default()
                .index(index)
                .value(value)
                .value_two(two)
                .op(op)
                .build()
                .unwrap()
        })
}

fn rule() -> impl Strategy<Value = LinuxSyscall> {
    let errno = prop::option::of(select(vec![0u32, 1, 38, 95]));
    let args = prop_oneof![Just(Vec::new()), prop::collection::vec(argument(), 1..4)];
    (subsequence(NAMES.to_vec(), 1..6), action(), errno, args).prop_map(|(names, action, errno, args)| {
        let names = names.into_iter().map(str::to_owned).collect::<Vec<_>>();
        let mut builder = LinuxSyscallBuilder::default().names(names).action(action);
        if let Some(errno) = errno {
            builder = builder.errno_ret(errno);
        }
        if !args.is_empty() {
            builder = builder.args(args);
        }
        builder.build().unwrap()
    })
}

fn profile() -> impl Strategy<Value = LinuxSeccomp> {
    let archs = vec![
        Arch::ScmpArchX86_64,
        Arch::ScmpArchX86,
        Arch::ScmpArchX32,
        Arch::ScmpArchArm,
        Arch::ScmpArchS390x,
    ];
    let rules = prop::collection::vec(rule(), 0..12);
    (
        action(),
        prop::option::of(select(vec![1u32, 38])),
        subsequence(archs, 0..=5),
        rules,
    )
        .prop_map(|(action, errno, archs, rules)| {
            let mut builder = LinuxSeccompBuilder::default()
                .default_action(action)
                .syscalls(rules);
            if !archs.is_empty() {
                builder = builder.architectures(archs);
            }
            if let Some(errno) = errno {
                builder = builder.default_errno_ret(errno);
            }
            builder.build().unwrap()
        })
}

fn call() -> impl Strategy<Value = Data> {
    let abi = select(Abi::ALL.to_vec());
    let near = (abi, select(NAMES.to_vec()), -1i64..=1).prop_map(|(abi, name, step)| {
        let nr = i64::from(syscall_number(name, abi).unwrap_or(0)) + step;
        (abi.audit_arch(), u32::try_from(nr).unwrap_or(u32::MAX))
    });
    let edge = select(vec![
        0u32,
        0x3fff_ffff,
        0x4000_0000,
        0x4000_0200,
        0xf0000,
        0xf0005,
        u32::MAX,
    ]);
    let wild = (
        select(Abi::ALL.to_vec()),
        prop_oneof![any::<u32>(), 0..600u32, edge],
    )
        .prop_map(|(abi, nr)| (abi.audit_arch(), nr));
    let args = prop::array::uniform6((select(VALUES.to_vec()), 0u64..3));
    (prop_oneof![4 => near, 1 => wild], args).prop_map(|((arch, nr), args)| Data {
        nr,
        arch,
        instruction_pointer: 0,
        args: args.map(|(value, step)| value.wrapping_add(step).wrapping_sub(1)),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

    #[test]
    fn a_program_answers_as_its_profile_reads(
        profile in profile(),
        native in select(vec![Abi::X86_64, Abi::Aarch64, Abi::Riscv64]),
        calls in prop::collection::vec(call(), 32),
    ) {
        let filter = compile(&profile, native).unwrap();
        for data in calls {
            let want = naive(&profile, native, &data);
            prop_assert_eq!(
                evaluate(&filter.program, &data),
                Ok(want),
                "{:?} on {:?}: want {:#x}\n{:?}",
                &data, native, want, &filter.program
            );
        }
    }
}
