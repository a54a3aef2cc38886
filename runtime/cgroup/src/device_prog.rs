//! Device rules as an eBPF program, and its place on a v2 cgroup.
//!
//! The program walks the rules from the last to the first, since a later rule wins: one that denies any access bit
//! still open ends it with "no", one that allows closes its bits, and with none left open the answer is "yes". What
//! no rule speaks of is denied.

use std::os::fd::AsFd as _;

use coracle_kernel::Errno;
use coracle_kernel::bpf::{self, Instruction};
use coracle_kernel::path::{OFlags, open_beneath};

use crate::device_rules::{Access, DeviceRule, DeviceType};
use crate::dir::Dir;
use crate::{Error, Result};

/// Puts `rules` into force on `dir`, in place of what an earlier container left there unless it is `fresh`.
pub(crate) fn attach(dir: &Dir, rules: &[DeviceRule], fresh: bool) -> Result<()> {
    let failed = |step: &'static str| {
        let path = dir.path().to_owned();
        move |source| Error::Step { step, path, source }
    };
    let program = bpf::load_device_program(&compile(rules)).map_err(failed("load the device program of"))?;
    // bpf(2) takes no O_PATH descriptor on all kernels.
    let cgroup = open_beneath(dir, ".", OFlags::RDONLY | OFlags::DIRECTORY).map_err(failed("open"))?;
    let old = match fresh {
        true => Vec::new(),
        false => bpf::device_programs(&cgroup).map_err(failed("list the device programs of"))?,
    };
    let mut replaced = None;
    let mut others = Vec::new();
    for id in old {
        match bpf::program_by_id(id) {
            Ok(old) if replaced.is_none() => replaced = Some(old),
            Ok(old) => others.push(old),
            // Detached meanwhile.
            Err(error) if error.errno() == Errno::ENOENT => {}
            Err(source) => return Err(failed("find a device program of")(source)),
        }
    }
    let attach = |replace| bpf::attach_device_program(&cgroup, program.as_fd(), replace);
    match attach(replaced.as_ref().map(std::os::fd::AsFd::as_fd)) {
        Ok(()) => {}
        // It went away meanwhile.
        Err(error) if replaced.is_some() && error.errno() == Errno::ENOENT => {
            attach(None).map_err(failed("attach the device program of"))?;
        }
        Err(source) => return Err(failed("attach the device program of")(source)),
    }
    // All programs of a cgroup must say yes: an older one would go on denying.
    for old in others {
        match bpf::detach_device_program(&cgroup, old.as_fd()) {
            Err(error) if error.errno() != Errno::ENOENT => {
                return Err(failed("detach an older device program of")(error));
            }
            _ => {}
        }
    }
    Ok(())
}

// Registers: r1 the context and then scratch, r2 the type, r3 the access bits still open, r4 major, r5 minor.
const ALU64: u8 = 0x07;
const ALU: u8 = 0x04;
const JMP: u8 = 0x05;
const JMP32: u8 = 0x06;
const LDX_MEM_W: u8 = 0x61;
const MOV: u8 = 0xb0;
const AND: u8 = 0x50;
const RSH: u8 = 0x70;
const FROM_REGISTER: u8 = 0x08;
const JEQ: u8 = 0x10;
const JNE: u8 = 0x50;
const EXIT: u8 = 0x90;

const BLOCK: i32 = 1;
const CHAR: i32 = 2;

/// The program.
pub(crate) fn compile(rules: &[DeviceRule]) -> Vec<Instruction> {
    let mut program = Vec::with_capacity(8 + rules.len() * 6);
    // struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; }: type below, access in the upper half.
    program.push(load(2, 0));
    program.push(load(4, 4));
    program.push(load(5, 8));
    program.push(op(ALU64 | MOV | FROM_REGISTER, 3, 2, 0, 0));
    program.push(op(ALU | RSH, 3, 0, 0, 16));
    program.push(op(ALU | AND, 2, 0, 0, 0xffff));
    for rule in rules.iter().rev() {
        let mut block = Vec::with_capacity(6);
        match rule.kind {
            DeviceType::All => {}
            DeviceType::Block => block.push(op(JMP | JNE, 2, 0, SKIP, BLOCK)),
            DeviceType::Char => block.push(op(JMP | JNE, 2, 0, SKIP, CHAR)),
        }
        // 32-bit compares: an immediate of a 64-bit one would be sign-extended.
        if let Some(major) = rule.major {
            block.push(op(JMP32 | JNE, 4, 0, SKIP, major.cast_signed()));
        }
        if let Some(minor) = rule.minor {
            block.push(op(JMP32 | JNE, 5, 0, SKIP, minor.cast_signed()));
        }
        let bits = i32::from(rule.access.bits());
        if rule.access != Access::ALL {
            if rule.allow {
                block.push(op(ALU | AND, 3, 0, 0, !bits));
                block.push(op(JMP | JNE, 3, 0, SKIP, 0));
            } else {
                block.push(op(ALU | MOV | FROM_REGISTER, 1, 3, 0, 0));
                block.push(op(ALU | AND, 1, 0, 0, bits));
                block.push(op(JMP | JEQ, 1, 0, SKIP, 0));
            }
        }
        answer(&mut block, rule.allow);
        let length = block.len();
        let decides_all = length == 2;
        for (index, instruction) in block.iter_mut().enumerate() {
            if instruction.offset == SKIP {
                // A block has at most eight instructions.
                instruction.offset = i16::try_from(length - index - 1).unwrap_or(i16::MAX);
            }
        }
        program.append(&mut block);
        if decides_all {
            // What follows would be unreachable, which older verifiers refuse.
            return program;
        }
    }
    answer(&mut program, false);
    program
}

/// Stands for "past this rule" until the length is known.
const SKIP: i16 = i16::MIN;

fn answer(program: &mut Vec<Instruction>, allow: bool) {
    program.push(op(ALU64 | MOV, 0, 0, 0, i32::from(allow)));
    program.push(op(JMP | EXIT, 0, 0, 0, 0));
}

fn load(register: u8, offset: i16) -> Instruction {
    op(LDX_MEM_W, register, 1, offset, 0)
}

fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: destination | source << 4,
        offset,
        immediate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the program is to answer: each access bit by the last rule that speaks of it.
    fn allowed(rules: &[DeviceRule], kind: DeviceType, major: u32, minor: u32, access: u8) -> bool {
        [1, 2, 4].into_iter().filter(|bit| access & bit != 0).all(|bit| {
            let last = rules.iter().rev().find(|rule| {
                (rule.kind == DeviceType::All || rule.kind == kind)
                    && rule.major.is_none_or(|number| number == major)
                    && rule.minor.is_none_or(|number| number == minor)
                    && rule.access.bits() & bit != 0
            });
            last.is_some_and(|rule| rule.allow)
        })
    }

    /// Runs a program as the kernel does: 64-bit registers, 32-bit operations clear the upper half.
    fn run(program: &[Instruction], kind: DeviceType, major: u32, minor: u32, access: u8) -> bool {
        let kind = if kind == DeviceType::Block { 1 } else { 2 };
        let context = [u32::from(access) << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0usize;
        loop {
            let instruction = program[at];
            let destination = usize::from(instruction.registers & 15);
            let source = registers[usize::from(instruction.registers >> 4)];
            let signed = i64::from(instruction.immediate).cast_unsigned();
            let low = u64::from(instruction.immediate.cast_unsigned());
            at += 1;
            let skip = usize::try_from(instruction.offset).unwrap_or(0);
            match instruction.code {
                LDX_MEM_W => registers[destination] = context[skip / 4].into(),
                0xbf => registers[destination] = source,
                0xb7 => registers[destination] = signed,
                0xbc => registers[destination] = source & 0xffff_ffff,
                0x74 => registers[destination] = (registers[destination] & 0xffff_ffff) >> low,
                0x54 => registers[destination] &= low,
                0x55 if registers[destination] != signed => at += skip,
                0x15 if registers[destination] == signed => at += skip,
                0x56 if registers[destination] & 0xffff_ffff != low => at += skip,
                0x55 | 0x15 | 0x56 => {}
                0x95 => return registers[0] == 1,
                other => panic!("no such instruction: {other:#x}"),
            }
        }
    }

    fn rule() -> impl Strategy<Value = DeviceRule> {
        let kind = prop_oneof![
            Just(DeviceType::Block),
            Just(DeviceType::Char),
            Just(DeviceType::All)
        ];
        let number = || prop_oneof![Just(None), (0u32..3).prop_map(Some), Just(Some(u32::MAX))];
        (any::<bool>(), kind, number(), number(), 1u8..8).prop_map(|(allow, kind, major, minor, access)| {
            let all = kind == DeviceType::All;
            DeviceRule {
                allow,
                kind,
                major: major.filter(|_| !all),
                minor: minor.filter(|_| !all),
                access: if all {
                    Access::ALL
                } else {
                    Access::from_bits(access).unwrap()
                },
            }
        })
    }

    proptest! {
        #[test]
        fn the_program_says_what_the_rules_say(rules in prop::collection::vec(rule(), 0..12)) {
            let program = compile(&rules);
            for kind in [DeviceType::Block, DeviceType::Char] {
                for major in [0, 1, 2, 7, u32::MAX] {
                    for minor in [0, 1, 2, 7, u32::MAX] {
                        for access in 1..8 {
                            prop_assert_eq!(
                                run(&program, kind, major, minor, access),
                                allowed(&rules, kind, major, minor, access),
                                "{:?} {} {} {}", kind, major, minor, access
                            );
                        }
                    }
                }
            }
        }
    }
}
