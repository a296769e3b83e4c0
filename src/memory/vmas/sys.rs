//! The bpf(2) calls: loading an iterator's program, aiming it at a task, reading it.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

const BPF_PROG_LOAD: i64 = 5;
const BPF_LINK_CREATE: i64 = 28;
const BPF_ITER_CREATE: i64 = 33;
const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_TRACE_ITER: u32 = 28;
const BPF_FUNC_SEQ_WRITE: i32 = 127;
/// `bpf_seq_write` is for programs that say that they may be linked with the GPL, as this project's licence allows.
const LICENSE: &std::ffi::CStr = c"Dual MIT/GPL";

/// Offsets in the kernel's structures.
pub(super) struct Layout {
    pub(super) meta: i16,
    pub(super) vma: i16,
    pub(super) seq: i16,
    pub(super) start: i16,
    pub(super) end: i16,
    pub(super) flags: i16,
}

/// One instruction (struct bpf_insn).
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// `union bpf_attr` as BPF_PROG_LOAD takes it.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    instructions: u32,
    program: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
    btf: u32,
    function_size: u32,
    functions: u64,
    function_count: u32,
    line_size: u32,
    lines: u64,
    line_count: u32,
    attach_to: u32,
    attach_program: u32,
    reserved: u32,
}

/// The same of BPF_LINK_CREATE.
#[repr(C)]
#[derive(Default)]
struct Link {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    info: u64,
    info_size: u32,
    reserved: u32,
}

/// `union bpf_iter_link_info` of an iterator over a task's things.
#[repr(C)]
#[derive(Default)]
struct TaskInfo {
    tid: u32,
    pid: u32,
    pid_fd: u32,
    reserved: u32,
}

/// The same of BPF_ITER_CREATE.
#[repr(C)]
#[derive(Default)]
struct Iterate {
    link: u32,
    flags: u32,
}

/// Writes start, end and flags of each mapping to the iterator's output.
pub(super) fn program(layout: &Layout) -> Vec<Instruction> {
    const LOAD: u8 = 0x79; // *(u64 *)
    const STORE: u8 = 0x7b;
    const MOVE: u8 = 0xbf;
    const SET: u8 = 0xb7;
    const ADD: u8 = 0x07;
    const IF_ZERO: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const STACK: u8 = 10;
    const META: u8 = 6;
    const VMA: u8 = 7;
    let insn = |code, to: u8, from: u8, offset, immediate| Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    };
    vec![
        insn(LOAD, VMA, 1, layout.vma, 0),
        insn(LOAD, META, 1, layout.meta, 0),
        // The end is told by a call without a mapping.
        insn(IF_ZERO, VMA, 0, 11, 0),
        insn(LOAD, 1, VMA, layout.start, 0),
        insn(STORE, STACK, 1, -24, 0),
        insn(LOAD, 1, VMA, layout.end, 0),
        insn(STORE, STACK, 1, -16, 0),
        insn(LOAD, 1, VMA, layout.flags, 0),
        insn(STORE, STACK, 1, -8, 0),
        insn(LOAD, 1, META, layout.seq, 0),
        insn(MOVE, 2, STACK, 0, 0),
        insn(ADD, 2, 0, 0, -24),
        insn(SET, 3, 0, 0, 24),
        insn(CALL, 0, 0, 0, BPF_FUNC_SEQ_WRITE),
        // What does not fit is asked for again.
        insn(SET, 0, 0, 0, 0),
        insn(EXIT, 0, 0, 0, 0),
    ]
}

fn bpf<T>(command: i64, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes behind the pointer, all of which are initialised: the structures
    // have no padding. What they point to lives until the call returns. These commands write nothing.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the commands of this file return a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Loads a program for the iterator whose function has this number in the kernel's types.
pub(super) fn load_iterator(program: &[Instruction], attach_to: u32) -> io::Result<OwnedFd> {
    bpf(
        BPF_PROG_LOAD,
        &Load {
            kind: BPF_PROG_TYPE_TRACING,
            instructions: program.len() as u32,
            program: program.as_ptr() as u64,
            license: LICENSE.as_ptr() as u64,
            name: *b"standin_vmas\0\0\0\0",
            attach_type: BPF_TRACE_ITER,
            attach_to,
            ..Load::default()
        },
    )
}

/// Aims the program at one task, by its pid here.
pub(super) fn link_to_task(program: BorrowedFd<'_>, pid: i32) -> io::Result<OwnedFd> {
    let info = TaskInfo { tid: pid.unsigned_abs(), ..TaskInfo::default() };
    bpf(
        BPF_LINK_CREATE,
        &Link {
            program: program.as_raw_fd().unsigned_abs(),
            attach_type: BPF_TRACE_ITER,
            info: std::ptr::from_ref(&info) as u64,
            // Older kernels know it without what is reserved here.
            info_size: 12,
            ..Link::default()
        },
    )
}

/// Starts a walk; it is read as a file.
pub(super) fn iterator(link: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    bpf(BPF_ITER_CREATE, &Iterate { link: link.as_raw_fd().unsigned_abs(), flags: 0 })
}

/// A page with a flag, for a trial; unmapped when dropped.
pub(super) struct Page {
    address: *mut libc::c_void,
}

impl Page {
    /// Maps a page, with a page to each side that cannot be used, so that it is a mapping of its own.
    pub(super) fn map(flags: i32) -> io::Result<Self> {
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping is made where the kernel finds room.
        let room = unsafe {
            libc::mmap(std::ptr::null_mut(), 3 * PAGE, libc::PROT_NONE, private | libc::MAP_NORESERVE, -1, 0)
        };
        if room == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapped = Self { address: room };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // MAP_DROPPABLE is a kind of its own, in the place of MAP_PRIVATE.
        let kind = if flags & libc::MAP_TYPE == 0 { private } else { libc::MAP_ANONYMOUS };
        // SAFETY: the page replaces a part of the room, which nobody else knows.
        let page =
            unsafe { libc::mmap(room.byte_add(PAGE), PAGE, access, kind | flags | libc::MAP_FIXED, -1, 0) };
        if page == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped) }
    }

    /// Gives it a flag by madvise(2).
    pub(super) fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the page is ours and holds nothing.
        check(unsafe { libc::madvise(self.address.byte_add(PAGE), PAGE, advice) })
    }

    /// Locks it in memory.
    pub(super) fn lock(&self) -> io::Result<()> {
        // SAFETY: as above.
        check(unsafe { libc::mlock(self.address.byte_add(PAGE), PAGE) })
    }

    pub(super) fn start(&self) -> u64 {
        self.address as u64 + PAGE as u64
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the room is ours, and nothing points into it. Locked pages are unlocked by it.
        unsafe { libc::munmap(self.address, 3 * PAGE) };
    }
}

const PAGE: usize = crate::model::PAGE_SIZE as usize;

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
