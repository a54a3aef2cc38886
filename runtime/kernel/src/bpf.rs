//! bpf(2) as far as device cgroups need it: load a device program, attach it to a cgroup, replace, list, detach.
//!
//! The kernel's own verifier judges the instructions; nothing here looks into them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::{Errno, Error, Result};

/// One eBPF instruction, in the kernel's layout (`struct bpf_insn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// Operation code.
    pub code: u8,
    /// Destination register in the low four bits, source register in the high four.
    pub registers: u8,
    /// Jump distance or memory offset.
    pub offset: i16,
    /// Immediate value.
    pub immediate: i32,
}

/// Identity of a loaded program, as the kernel counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProgramId(u32);

/// Programs that one cgroup is asked about at most; the kernel itself allows 64 of a kind.
const PROGRAMS_MAX: usize = 64;

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_DETACH: libc::c_long = 9;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_PROG_QUERY: libc::c_long = 16;

const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;
const BPF_F_REPLACE: u32 = 1 << 2;

/// The head of `union bpf_attr` for `BPF_PROG_LOAD`; what follows in newer kernels stays zero by being left out.
#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

/// `union bpf_attr` for `BPF_PROG_ATTACH` and `BPF_PROG_DETACH`.
#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

/// `union bpf_attr` for `BPF_PROG_QUERY`, whole: the kernel answers in it, and newer ones write `revision` whatever
/// length they were told. Older ones accept a longer attribute whose tail is zero.
#[repr(C)]
struct QueryAttr {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    padding: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// `union bpf_attr` for `BPF_PROG_GET_FD_BY_ID`.
#[repr(C)]
struct FdByIdAttr {
    prog_id: u32,
    next_id: u32,
    open_flags: u32,
}

/// Loads a program of type `BPF_PROG_TYPE_CGROUP_DEVICE`.
///
/// The licence field says nothing of GPL helpers, so none may be called; a device program needs none. Since 5.11 the
/// memory is charged to the caller's cgroup and RLIMIT_MEMLOCK plays no part.
pub fn load_device_program(instructions: &[Instruction]) -> Result<OwnedFd> {
    let count =
        u32::try_from(instructions.len()).map_err(|_| Error::new("bpf", "BPF_PROG_LOAD", Errno::E2BIG))?;
    let license = c"Apache-2.0";
    let mut name = [0; 16];
    name[..15].copy_from_slice(b"coracle_devices");
    let mut attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: count,
        insns: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: name,
    };
    // SAFETY: `insns` and `license` point to live memory of the lengths given for the whole call; the kernel copies
    // both before it returns.
    let fd = unsafe { bpf(BPF_PROG_LOAD, &mut attr) }
        .map_err(|errno| Error::new("bpf", format!("BPF_PROG_LOAD, {count} instructions"), errno))?;
    Ok(owned(fd))
}

/// Attaches `program` to `cgroup` beside what ancestors have, or in place of `replace` in one atomic step.
pub fn attach_device_program(
    cgroup: impl AsFd,
    program: BorrowedFd<'_>,
    replace: Option<BorrowedFd<'_>>,
) -> Result<()> {
    let mut attr = AttachAttr {
        target_fd: number(cgroup.as_fd()),
        attach_bpf_fd: number(program),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI | if replace.is_some() { BPF_F_REPLACE } else { 0 },
        replace_bpf_fd: replace.map_or(0, number),
    };
    // SAFETY: the attribute holds numbers of descriptors that are borrowed for the call, and no pointer.
    unsafe { bpf(BPF_PROG_ATTACH, &mut attr) }.map_err(|errno| {
        Error::new(
            "bpf",
            format!("BPF_PROG_ATTACH, replace: {}", replace.is_some()),
            errno,
        )
    })?;
    Ok(())
}

/// Detaches `program` from `cgroup`.
pub fn detach_device_program(cgroup: impl AsFd, program: BorrowedFd<'_>) -> Result<()> {
    let mut attr = AttachAttr {
        target_fd: number(cgroup.as_fd()),
        attach_bpf_fd: number(program),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: 0,
        replace_bpf_fd: 0,
    };
    // SAFETY: the attribute holds numbers of descriptors that are borrowed for the call, and no pointer.
    unsafe { bpf(BPF_PROG_DETACH, &mut attr) }
        .map_err(|errno| Error::new("bpf", "BPF_PROG_DETACH", errno))?;
    Ok(())
}

/// Device programs attached to `cgroup` itself, ancestors' not counted. `cgroup` must not be `O_PATH`.
pub fn device_programs(cgroup: impl AsFd) -> Result<Vec<ProgramId>> {
    let mut ids = [0u32; PROGRAMS_MAX];
    let mut attr = QueryAttr {
        target_fd: number(cgroup.as_fd()),
        attach_type: BPF_CGROUP_DEVICE,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: 64,
        padding: 0,
        prog_attach_flags: 0,
        link_ids: 0,
        link_attach_flags: 0,
        revision: 0,
    };
    // SAFETY: `prog_ids` points to PROGRAMS_MAX (64) integers that live across the call, and `prog_cnt` says so.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr) }.map_err(|errno| Error::new("bpf", "BPF_PROG_QUERY", errno))?;
    Ok(ids
        .iter()
        .take(attr.prog_cnt as usize)
        .map(|id| ProgramId(*id))
        .collect())
}

/// A descriptor of a loaded program.
pub fn program_by_id(id: ProgramId) -> Result<OwnedFd> {
    let mut attr = FdByIdAttr {
        prog_id: id.0,
        next_id: 0,
        open_flags: 0,
    };
    // SAFETY: the attribute holds no pointer.
    let fd = unsafe { bpf(BPF_PROG_GET_FD_BY_ID, &mut attr) }
        .map_err(|errno| Error::new("bpf", format!("BPF_PROG_GET_FD_BY_ID, {}", id.0), errno))?;
    Ok(owned(fd))
}

/// The call itself.
///
/// # Safety
///
/// `A` is the kernel's layout of the attribute for `command`, and every pointer in it is valid for what the command
/// reads and writes through it.
unsafe fn bpf<A>(command: libc::c_long, attr: &mut A) -> Result<libc::c_long, Errno> {
    // SAFETY: the attribute is live and as long as the third argument says; its content is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 {
        Err(Errno::last())
    } else {
        Ok(result)
    }
}

fn owned(fd: libc::c_long) -> OwnedFd {
    let fd = i32::try_from(fd).expect("the kernel returns descriptors as int");
    // SAFETY: the kernel has just made this descriptor (close-on-exec, as bpf always does) and no one else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    // A borrowed descriptor is never negative.
    fd.as_raw_fd().cast_unsigned()
}
