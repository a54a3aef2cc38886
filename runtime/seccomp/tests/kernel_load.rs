//! The running kernel takes our programs and does what they say. Each filter is loaded into a thread of its own.

#![allow(
    clippy::unwrap_used,
    reason = "what cannot be unwrapped fails the test, in its helpers too"
)]

use coracle_kernel::namespace::{Kind, unshare};
use coracle_kernel::persona;
use coracle_kernel::seccomp::{FilterFlags, Instruction, load};
use coracle_kernel::{Errno, creds};
use coracle_seccomp::{Abi, Filter, compile, default_profile};
use coracle_spec::oci::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder, LinuxSeccompBuilder, LinuxSeccompOperator,
    LinuxSyscallBuilder,
};

/// Runs `check` in a thread that has the profile loaded.
fn under(profile: &LinuxSeccomp, check: impl FnOnce() + Send) {
    let Filter { program, flags, .. } = compile(profile, Abi::NATIVE).unwrap();
    let program: Vec<Instruction> = program
        .iter()
        .map(|i| Instruction {
            code: i.code,
            jt: i.jt,
            jf: i.jf,
            k: i.k,
        })
        .collect();
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            creds::set_no_new_privs().unwrap();
            load(&program, FilterFlags::from_bits(flags).unwrap()).unwrap();
            check();
        });
        thread.join().unwrap();
    });
}

#[test]
fn the_default_profile_carries_ordinary_work_and_refuses_the_rest() {
    under(&default_profile(0, Abi::NATIVE), || {
        // clone3 answers ENOSYS here, so the C library falls back to clone.
        std::thread::spawn(|| std::fs::read("/proc/self/status").unwrap())
            .join()
            .unwrap();
        std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(unshare(Kind::User.flag()).unwrap_err().errno(), Errno::EPERM);
        assert_eq!(
            persona::set_hostname("elsewhere").unwrap_err().errno(),
            Errno::EPERM
        );
    });
}

#[test]
fn arguments_are_compared_over_all_64_bits() {
    let profile = |value: u64| {
        let length = LinuxSeccompArgBuilder::default()
            .index(1usize)
            .value(value)
            .op(LinuxSeccompOperator::ScmpCmpEq);
        let rule = LinuxSyscallBuilder::default()
            .names(vec!["sethostname".to_owned()])
            .action(LinuxSeccompAction::ScmpActErrno)
            .errno_ret(95u32)
            .args(vec![length.build().unwrap()])
            .build()
            .unwrap();
        LinuxSeccompBuilder::default()
            .default_action(LinuxSeccompAction::ScmpActAllow)
            .syscalls(vec![rule])
            .build()
            .unwrap()
    };
    // A name longer than the kernel takes fails with EINVAL where the filter lets it pass.
    let name = "x".repeat(100);
    under(&profile(100), || {
        assert_eq!(
            persona::set_hostname(&name).unwrap_err().errno(),
            Errno::EOPNOTSUPP
        );
    });
    under(&profile(1 << 32 | 100), || {
        assert_ne!(
            persona::set_hostname(&name).unwrap_err().errno(),
            Errno::EOPNOTSUPP
        );
    });
}
