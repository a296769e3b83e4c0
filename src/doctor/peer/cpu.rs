//! The processor: what a process that was started on one host may rely on at another.
//!
//! A program asks CPUID when it starts (glibc chooses its `memcpy` so) and never again: restored on a processor that lacks
//! what it chose, it dies by SIGILL at any time later. So CPUID itself is compared, as programs see it. The flags of
//! /proc/cpuinfo are the kernel's view: two kernels name different ones for the same processor, and many are not for programs
//! at all. CRIU's `cpuinfo check` either wants all bits equal or knows no instruction after AVX-512VL (and not FMA): see its
//! `x86_ins_capability_mask`.

use std::fmt::Write as _;

use super::sys;
use crate::{
    doctor::{Check, Group},
    wire::examine::{CpuFacts, CpuLeaf},
};

/// Most names in one line.
const NAMES_MAX: usize = 24;
/// The parts of a processor's state by their bit in XCR0 (Intel SDM 1, 13.1).
const STATE_PARTS: [&str; 20] = [
    "x87",
    "SSE",
    "AVX",
    "MPX bounds",
    "MPX configuration",
    "AVX-512 masks",
    "AVX-512 upper halves",
    "AVX-512 registers 16 to 31",
    "PT",
    "protection keys",
    "PASID",
    "CET user",
    "CET supervisor",
    "HDC",
    "user interrupts",
    "LBR",
    "HWP",
    "AMX configuration",
    "AMX tiles",
    "APX",
];

/// A register of an answer whose bits are features.
struct Word {
    leaf: u32,
    subleaf: u32,
    register: usize,
    /// Instructions, and what programs may take for granted with them.
    used: &'static [(u32, &'static str)],
    /// Of the kernel, of the machine, or a matter of speed alone: a program that was started runs on without.
    other: u32,
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Intel SDM 2A, CPUID; AMD APM 3, appendix E.
const WORDS: [Word; 11] = [
    Word {
        leaf: 1,
        subleaf: 0,
        register: ECX,
        used: &[
            (0, "sse3"),
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (27, "osxsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
        other: 0x8126_cdfc,
    },
    Word {
        leaf: 1,
        subleaf: 0,
        register: EDX,
        used: &[
            (0, "fpu"),
            (4, "tsc"),
            (8, "cx8"),
            (15, "cmov"),
            (19, "clflush"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
        ],
        other: !0x0788_8111,
    },
    Word {
        leaf: 7,
        subleaf: 0,
        register: EBX,
        used: &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (5, "avx2"),
            (8, "bmi2"),
            (11, "rtm"),
            (14, "mpx"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (26, "avx512pf"),
            (27, "avx512er"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
        other: 0x0250_b6d6,
    },
    Word {
        leaf: 7,
        subleaf: 0,
        register: ECX,
        used: &[
            (1, "avx512vbmi"),
            (4, "ospke"),
            (5, "waitpkg"),
            (6, "avx512_vbmi2"),
            (7, "shadow stacks"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (22, "rdpid"),
            (23, "key locker"),
            (27, "movdiri"),
            (28, "movdir64b"),
            (29, "enqcmd"),
        ],
        other: 0xc33f_200d,
    },
    Word {
        leaf: 7,
        subleaf: 0,
        register: EDX,
        used: &[
            (2, "avx512_4vnniw"),
            (3, "avx512_4fmaps"),
            (5, "user interrupts"),
            (8, "avx512_vp2intersect"),
            (14, "serialize"),
            (16, "tsxldtrk"),
            (20, "ibt"),
            (22, "amx_bf16"),
            (23, "avx512_fp16"),
            (24, "amx_tile"),
            (25, "amx_int8"),
        ],
        other: 0xfc0c_ae12,
    },
    Word {
        leaf: 7,
        subleaf: 1,
        register: EAX,
        used: &[
            (0, "sha512"),
            (1, "sm3"),
            (2, "sm4"),
            (3, "rao_int"),
            (4, "avx_vnni"),
            (5, "avx512_bf16"),
            (7, "cmpccxadd"),
            (21, "amx_fp16"),
            (23, "avx_ifma"),
            (26, "lam"),
            (31, "movrs"),
        ],
        other: 0x485e_1d40,
    },
    Word {
        leaf: 7,
        subleaf: 1,
        register: EDX,
        used: &[
            (4, "avx_vnni_int8"),
            (5, "avx_ne_convert"),
            (8, "amx_complex"),
            (10, "avx_vnni_int16"),
            (15, "user_msr"),
            (19, "avx10"),
            (21, "apx_f"),
        ],
        other: 0x0086_4000,
    },
    Word {
        leaf: 0xd,
        subleaf: 1,
        register: EAX,
        used: &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1")],
        other: 0x18,
    },
    Word {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: ECX,
        used: &[
            (0, "lahf_lm"),
            (5, "abm"),
            (6, "sse4a"),
            (7, "misalignsse"),
            (11, "xop"),
            (15, "lwp"),
            (16, "fma4"),
            (21, "tbm"),
            (29, "mwaitx"),
        ],
        other: 0x5dca_371e,
    },
    Word {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: EDX,
        used: &[(22, "mmxext"), (27, "rdtscp"), (30, "3dnowext"), (31, "3dnow")],
        other: !0xc840_0000,
    },
    Word {
        leaf: 0x8000_0008,
        subleaf: 0,
        register: EBX,
        used: &[(0, "clzero"), (4, "rdpru"), (8, "mcommit")],
        other: !0x111,
    },
];

/// This host's processor.
pub(super) fn facts() -> CpuFacts {
    let mut asked: Vec<(u32, u32)> = WORDS.iter().map(|word| (word.leaf, word.subleaf)).collect();
    asked.extend([(0xd, 0), (0x24, 0)]);
    asked.dedup();
    let text = |leaves: &[u32], order: &[usize]| {
        let registers = leaves.iter().filter_map(|leaf| sys::cpuid(*leaf, 0)).map(|leaf| leaf.registers);
        let bytes: Vec<u8> = registers
            .flat_map(|all| order.iter().flat_map(move |i| all[*i].to_le_bytes()).collect::<Vec<_>>())
            .collect();
        String::from_utf8_lossy(&bytes).trim_matches(['\0', ' ']).to_owned()
    };
    CpuFacts {
        vendor: text(&[0], &[EBX, EDX, ECX]),
        model: text(&[0x8000_0002, 0x8000_0003, 0x8000_0004], &[EAX, EBX, ECX, EDX]),
        // Where the answer depends on the processor that gives it (its APIC's number), it is in a register that is not read.
        leaves: asked.into_iter().filter_map(|(leaf, subleaf)| sys::cpuid(leaf, subleaf)).collect(),
        state_parts: sys::state_parts(),
        state_bytes: sys::cpuid(0xd, 0).map_or(0, |leaf| leaf.registers[EBX]),
    }
}

fn register(facts: &CpuFacts, leaf: u32, subleaf: u32, register: usize) -> u32 {
    let answers = |answer: &&CpuLeaf| answer.leaf == leaf && answer.subleaf == subleaf;
    facts.leaves.iter().find(answers).map_or(0, |answer| answer.registers[register])
}

/// What one has and the other lacks: by name, and how many bits that this release does not know.
fn lacking(has: &CpuFacts, lacks: &CpuFacts) -> (Vec<&'static str>, u32) {
    let (mut names, mut unknown) = (Vec::new(), 0);
    for word in &WORDS {
        let of = |facts| register(facts, word.leaf, word.subleaf, word.register);
        let missing = of(has) & !of(lacks);
        names.extend(word.used.iter().filter(|(bit, _)| missing >> bit & 1 == 1).map(|(_, name)| *name));
        let known = word.used.iter().fold(word.other, |known, (bit, _)| known | 1 << bit);
        unknown += (missing & !known).count_ones();
    }
    // CPUID 0x24: the version of AVX10, which has no bits.
    if register(has, 0x24, 0, EBX) & 0xff > register(lacks, 0x24, 0, EBX) & 0xff {
        names.push("a newer avx10");
    }
    (names, unknown)
}

fn list(names: &[&str]) -> String {
    let mut text = names.iter().take(NAMES_MAX).copied().collect::<Vec<_>>().join(", ");
    if names.len() > NAMES_MAX {
        let _ = write!(text, " and {} more", names.len() - NAMES_MAX);
    }
    text
}

/// Whether what runs on the one can go on at the other, `there`.
pub(super) fn compare(here: &CpuFacts, there: &CpuFacts, peer: &str) -> Vec<Check> {
    let mut checks = vec![model(here, there, peer)];
    let (missing, unknown) = lacking(here, there);
    let id = "cpu-features";
    checks.push(if missing.is_empty() {
        Check::ok(Group::Cpu, id, format!("{peer} has every instruction that programs may use here"))
    } else {
        Check::fail(
            Group::Cpu,
            id,
            format!("{peer} lacks what programs may use here: {}", list(&missing)),
            "use two hosts of the same processor, or, of virtual ones, give both the same CPU model (of the older host); then \
             start the workload anew, since it has chosen already",
        )
    });
    if unknown > 0 {
        let found = format!(
            "{peer} lacks {unknown} features of this host's processor that this release does not know"
        );
        let remedy = "use a newer release, or two hosts of the same processor";
        checks.push(Check::warn(Group::Cpu, "cpu-unknown-features", found, remedy));
    }
    let (more, _) = lacking(there, here);
    if !more.is_empty() {
        let found = format!(
            "{peer} has more than this host: {}; what is started there may use it and cannot come here then",
            list(&more)
        );
        checks.push(Check::note(Group::Cpu, "cpu-more-there", found));
    }
    checks.push(state(here, there, peer));
    checks
}

fn model(here: &CpuFacts, there: &CpuFacts, peer: &str) -> Check {
    let id = "cpu-model";
    if here.vendor != there.vendor {
        let found = format!("{} here, {} on {peer}", here.vendor, there.vendor);
        let remedy = "prefer two hosts of one maker: what CPUID does not tell (timings, errata, sizes of caches that programs \
                      have noted) differs";
        return Check::warn(Group::Cpu, id, found, remedy);
    }
    if here.model != there.model {
        return Check::note(Group::Cpu, id, format!("{} here, {} on {peer}", here.model, there.model));
    }
    Check::ok(Group::Cpu, id, here.model.clone())
}

/// The state that the kernel keeps for a process is in CRIU's image, and on the process's own stack while it handles a signal:
/// what a kernel does not know it cannot put back, and from a frame larger than its own it takes the FPU's part alone
/// (`check_xstate_in_sigframe`).
fn state(here: &CpuFacts, there: &CpuFacts, peer: &str) -> Check {
    let id = "cpu-state";
    let missing = here.state_parts & !there.state_parts;
    let remedy =
        "boot both kernels with the same settings for it (clearcpuid=, noxsave, pku), on the same CPU model";
    if missing != 0 {
        let named: Vec<String> = (0..64)
            .filter(|bit| missing >> bit & 1 == 1)
            .map(|bit| STATE_PARTS.get(bit).map_or_else(|| format!("part {bit}"), |name| (*name).to_owned()))
            .collect();
        let found = format!("the kernel of {peer} keeps less of a process's registers: {}", named.join(", "));
        return Check::fail(Group::Cpu, id, found, remedy);
    }
    if here.state_bytes > there.state_bytes {
        let found = format!(
            "a process's registers take {} bytes here and {} on {peer}: one that handles a signal could not be restored",
            here.state_bytes, there.state_bytes
        );
        return Check::fail(Group::Cpu, id, found, remedy);
    }
    if here.state_bytes < there.state_bytes {
        let found = format!(
            "a process's registers take {} bytes here and {} on {peer}: what is started there may not fit here",
            here.state_bytes, there.state_bytes
        );
        return Check::note(Group::Cpu, id, found);
    }
    Check::ok(Group::Cpu, id, format!("the same registers, {} bytes", here.state_bytes))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::doctor::State;

    fn without(facts: &CpuFacts, leaf: u32, register: usize, bit: u32) -> CpuFacts {
        let mut facts = facts.clone();
        for answer in facts.leaves.iter_mut().filter(|answer| answer.leaf == leaf && answer.subleaf == 0) {
            answer.registers[register] &= !(1 << bit);
        }
        facts
    }

    fn states(checks: &[Check]) -> Vec<(&str, State)> {
        checks
            .iter()
            .filter(|check| check.state != State::Ok)
            .map(|check| (check.id.as_ref(), check.state))
            .collect()
    }

    #[test]
    fn no_bit_is_both_for_programs_and_not() {
        for word in &WORDS {
            for (bit, name) in word.used {
                assert_eq!(word.other >> bit & 1, 0, "{name}");
            }
        }
    }

    /// What the kernel calls a feature is what CPUID says of it, on whatever processor this runs.
    #[test]
    fn the_processor_is_read_as_the_kernel_reads_it() {
        let facts = facts();
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let field = |name: &str| cpuinfo.lines().find_map(|line| line.strip_prefix(name)?.split_once(": "));
        assert_eq!(field("vendor_id").unwrap().1, facts.vendor);
        assert_eq!(field("model name").unwrap().1.trim(), facts.model);
        let flags: BTreeSet<&str> = field("flags").unwrap().1.split(' ').collect();
        let (here, _) = lacking(&facts, &CpuFacts::default());
        assert!(here.len() > 10 && here.contains(&"sse2"), "{here:?}");
        for name in WORDS.iter().flat_map(|word| word.used).map(|(_, name)| *name) {
            let kernel_says = flags.contains(if name == "sse3" { "pni" } else { name });
            assert!(!kernel_says || here.contains(&name), "{name}");
        }
        assert!(facts.state_parts & 3 == 3 && facts.state_bytes >= 576, "{facts:?}");
    }

    #[test]
    fn what_the_peer_lacks_breaks_a_restore_and_what_it_has_more_does_not() {
        let whole = facts();
        assert!(states(&compare(&whole, &whole, "b")).is_empty());
        let poor = without(&without(&whole, 1, ECX, 23), 1, EDX, 26);
        let checks = compare(&whole, &poor, "b");
        assert_eq!(states(&checks), [("cpu-features", State::Fail)]);
        assert!(checks.iter().any(|check| check.found.contains("popcnt, sse2")), "{checks:?}");
        assert_eq!(states(&compare(&poor, &whole, "b")), [("cpu-more-there", State::Note)]);
        // Of the kernel: nobody's program has it.
        assert!(states(&compare(&whole, &without(&whole, 7, EBX, 7), "b")).is_empty());
    }

    #[test]
    fn a_kernel_that_keeps_less_state_cannot_restore() {
        let here = CpuFacts { state_parts: 0x2e7, state_bytes: 2696, ..facts() };
        let there = CpuFacts { state_parts: 7, state_bytes: 832, ..here.clone() };
        let checks = compare(&here, &there, "b");
        assert_eq!(states(&checks), [("cpu-state", State::Fail)]);
        assert!(checks.last().unwrap().found.contains("protection keys"), "{checks:?}");
        assert_eq!(states(&compare(&there, &here, "b")), [("cpu-state", State::Note)]);
        let smaller = CpuFacts { state_bytes: 2000, ..here.clone() };
        assert_eq!(states(&compare(&here, &smaller, "b")), [("cpu-state", State::Fail)]);
    }
}
