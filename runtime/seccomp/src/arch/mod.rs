//! ABIs and their system-call numbers.

mod table;

use coracle_spec::oci::Arch;

/// An ABI whose system calls are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Abi {
    /// 64-bit x86.
    X86_64,
    /// 32-bit x86.
    X86,
    /// 32-bit pointers on 64-bit x86.
    X32,
    /// 64-bit ARM.
    Aarch64,
    /// 64-bit RISC-V.
    Riscv64,
    /// 32-bit ARM, EABI.
    Arm,
}

/// The bit that marks the numbers of x32.
pub(crate) const X32_BIT: u32 = 0x4000_0000;

/// The first number of 32-bit ARM's private calls.
pub(crate) const ARM_PRIVATE: u32 = 0x000f_0000;

impl Abi {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::X86_64,
        Self::X86,
        Self::X32,
        Self::Aarch64,
        Self::Riscv64,
        Self::Arm,
    ];

    /// The ABI that this program was built for.
    #[cfg(target_arch = "x86_64")]
    pub const NATIVE: Self = Self::X86_64;
    /// The ABI that this program was built for.
    #[cfg(target_arch = "aarch64")]
    pub const NATIVE: Self = Self::Aarch64;
    /// The ABI that this program was built for.
    #[cfg(target_arch = "riscv64")]
    pub const NATIVE: Self = Self::Riscv64;

    /// The word of the specification.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "SCMP_ARCH_X86_64",
            Self::X86 => "SCMP_ARCH_X86",
            Self::X32 => "SCMP_ARCH_X32",
            Self::Aarch64 => "SCMP_ARCH_AARCH64",
            Self::Riscv64 => "SCMP_ARCH_RISCV64",
            Self::Arm => "SCMP_ARCH_ARM",
        }
    }

    /// What the kernel calls it in `seccomp_data.arch`; x32 goes by the name of x86_64.
    #[must_use]
    pub const fn audit_arch(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
            Self::Aarch64 => 0xc000_00b7,
            Self::Riscv64 => 0xc000_00f3,
            Self::Arm => 0x4000_0028,
        }
    }

    /// The ABIs that a machine of this kind can run, itself first.
    #[must_use]
    pub const fn runs(self) -> &'static [Self] {
        match self {
            Self::X86_64 | Self::X32 => &[Self::X86_64, Self::X86, Self::X32],
            Self::X86 => &[Self::X86],
            Self::Aarch64 => &[Self::Aarch64, Self::Arm],
            Self::Riscv64 => &[Self::Riscv64],
            Self::Arm => &[Self::Arm],
        }
    }

    /// Whether all 64 bits of an argument count.
    pub(crate) const fn is_wide(self) -> bool {
        matches!(self, Self::X86_64 | Self::Aarch64 | Self::Riscv64)
    }

    pub(crate) const fn from_oci(arch: Arch) -> Option<Self> {
        match arch {
            Arch::ScmpArchX86_64 => Some(Self::X86_64),
            Arch::ScmpArchX86 => Some(Self::X86),
            Arch::ScmpArchX32 => Some(Self::X32),
            Arch::ScmpArchAarch64 => Some(Self::Aarch64),
            Arch::ScmpArchRiscv64 => Some(Self::Riscv64),
            Arch::ScmpArchArm => Some(Self::Arm),
            _ => None,
        }
    }
}

/// The numbers of one name on all ABIs.
#[derive(Clone, Copy)]
pub(crate) enum Numbers {
    /// In the order of [`Abi::ALL`].
    Row(&'static [u16; 6]),
    /// A private call of 32-bit ARM, whose numbers do not fit the table.
    ArmPrivate(u32),
}

impl Numbers {
    /// The numbers of a name, `None` where no ABI knows it.
    pub(crate) fn find(name: &str) -> Option<Self> {
        if let Ok(at) = table::ROWS.binary_search_by(|(known, _)| (*known).cmp(name)) {
            return Some(Self::Row(&table::ROWS[at].1));
        }
        const PRIVATE: [&str; 6] = ["breakpoint", "cacheflush", "usr26", "usr32", "set_tls", "get_tls"];
        let (number, _) = (ARM_PRIVATE + 1..)
            .zip(PRIVATE)
            .find(|(_, known)| *known == name)?;
        Some(Self::ArmPrivate(number))
    }

    /// The number on one ABI, with the marker bit of x32.
    pub(crate) fn on(self, abi: Abi) -> Option<u32> {
        let number = match self {
            Self::ArmPrivate(number) => return (abi == Abi::Arm).then_some(number),
            Self::Row(row) => match abi {
                Abi::X86_64 => row[0],
                Abi::X86 => row[1],
                Abi::X32 => row[2],
                Abi::Aarch64 => row[3],
                Abi::Riscv64 => row[4],
                Abi::Arm => row[5],
            },
        };
        let bit = if abi == Abi::X32 { X32_BIT } else { 0 };
        (number != table::N).then_some(u32::from(number) | bit)
    }
}

/// The number of a system call; `None` where this ABI does not have it.
#[must_use]
pub fn syscall_number(name: &str, abi: Abi) -> Option<u32> {
    Numbers::find(name)?.on(abi)
}

/// The names of all calls of the table.
#[cfg(test)]
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    table::ROWS.iter().map(|(name, _)| *name)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_table_is_sorted_and_no_number_stands_twice() {
        assert!(table::ROWS.is_sorted_by(|a, b| a.0 < b.0));
        for abi in Abi::ALL {
            let mut seen = HashSet::new();
            for name in names() {
                // Two names of one call.
                if matches!((abi, name), (Abi::Arm, "arm_sync_file_range")) {
                    continue;
                }
                if let Some(number) = syscall_number(name, abi) {
                    assert!(seen.insert(number), "{abi:?} {name} {number}");
                }
            }
            assert!(seen.len() > 300, "{abi:?}");
        }
    }

    #[test]
    fn known_numbers() {
        assert_eq!(syscall_number("read", Abi::X86_64), Some(0));
        assert_eq!(syscall_number("read", Abi::X86), Some(3));
        assert_eq!(syscall_number("read", Abi::X32), Some(0x4000_0000));
        assert_eq!(syscall_number("read", Abi::Aarch64), Some(63));
        assert_eq!(syscall_number("open", Abi::Aarch64), None);
        assert_eq!(syscall_number("execve", Abi::X32), Some(0x4000_0000 + 520));
        assert_eq!(syscall_number("set_tls", Abi::Arm), Some(0xf0005));
        assert_eq!(syscall_number("set_tls", Abi::X86_64), None);
        assert_eq!(syscall_number("teleport", Abi::X86_64), None);
        for abi in Abi::ALL {
            let marker = if abi == Abi::X32 { X32_BIT } else { 0 };
            assert_eq!(syscall_number("clone3", abi), Some(marker + 435), "{abi:?}");
            assert_eq!(syscall_number("file_setattr", abi), Some(marker + 469), "{abi:?}");
        }
    }
}
