//! Where the kernel keeps things, by its own type information (BTF; Documentation/bpf/btf.rst).

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_FUNCTION: u32 = 12;
/// The part that all types have: name, info, size or type.
const COMMON_BYTES: usize = 12;
/// Unnamed structures and unions nest in each other.
const NESTING_MAX: u32 = 8;

/// All types of a kernel.
pub(super) struct Btf {
    bytes: Vec<u8>,
    /// Where each type begins; the first has the number 1.
    types: Vec<usize>,
    strings: usize,
}

struct Type {
    at: usize,
    name: u32,
    kind: u32,
    members: u32,
    /// Offsets of members hold the size of bit fields too.
    bit_fields: bool,
}

impl Btf {
    /// None if the bytes are no such information, or have a kind of type that is not known.
    pub(super) fn parse(bytes: Vec<u8>) -> Option<Self> {
        let header = Words(&bytes);
        if header.word(0)? & 0xffff != u32::from(MAGIC) {
            return None;
        }
        let head = header.word(4)? as usize;
        let begin = head.checked_add(header.word(8)? as usize)?;
        let end = begin.checked_add(header.word(12)? as usize)?;
        let strings = head.checked_add(header.word(16)? as usize)?;
        let mut btf = Self { bytes, types: Vec::new(), strings };
        let mut at = begin;
        while at < end {
            btf.types.push(at);
            let found = btf.type_at(at)?;
            at = at.checked_add(COMMON_BYTES + extra_bytes(found.kind, found.members as usize)?)?;
        }
        Some(btf)
    }

    /// The number of the type of a function.
    pub(super) fn function(&self, name: &str) -> Option<u32> {
        let found = self.find(KIND_FUNCTION, name)?;
        self.types.binary_search(&found.at).ok().map(|index| index as u32 + 1)
    }

    /// How many bytes from the start of a structure on a member lies, also one of an unnamed part.
    pub(super) fn offset(&self, structure: &str, member: &str) -> Option<u32> {
        self.offset_in(&self.find(KIND_STRUCT, structure)?, member, 0)
    }

    fn offset_in(&self, found: &Type, member: &str, depth: u32) -> Option<u32> {
        if depth > NESTING_MAX {
            return None;
        }
        (0..found.members as usize).find_map(|index| {
            let at = found.at + COMMON_BYTES + 12 * index;
            let (name, number, place) = (self.word(at)?, self.word(at + 4)?, self.word(at + 8)?);
            let bits = if found.bit_fields { place & 0x00ff_ffff } else { place };
            if self.is_named(name, member) {
                return bits.is_multiple_of(8).then_some(bits / 8);
            }
            let inner = self.type_at(*self.types.get((number as usize).checked_sub(1)?)?)?;
            let unnamed = self.is_named(name, "") && matches!(inner.kind, KIND_STRUCT | KIND_UNION);
            let offset = unnamed.then(|| self.offset_in(&inner, member, depth + 1))??;
            Some(bits / 8 + offset)
        })
    }

    fn find(&self, kind: u32, name: &str) -> Option<Type> {
        let types = self.types.iter().filter_map(|at| self.type_at(*at));
        types.into_iter().find(|found| found.kind == kind && self.is_named(found.name, name))
    }

    fn type_at(&self, at: usize) -> Option<Type> {
        let (name, info) = (self.word(at)?, self.word(at + 4)?);
        Some(Type { at, name, kind: info >> 24 & 31, members: info & 0xffff, bit_fields: info >> 31 != 0 })
    }

    fn is_named(&self, name: u32, wanted: &str) -> bool {
        let rest = self.strings.checked_add(name as usize).and_then(|at| self.bytes.get(at..));
        rest.and_then(|rest| rest.strip_prefix(wanted.as_bytes())).and_then(<[u8]>::first) == Some(&0)
    }

    fn word(&self, at: usize) -> Option<u32> {
        Words(&self.bytes).word(at)
    }
}

struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn word(&self, at: usize) -> Option<u32> {
        let bytes = self.0.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }
}

/// What follows the common part of a type.
fn extra_bytes(kind: u32, members: usize) -> Option<usize> {
    Some(match kind {
        // Pointers, forward declarations, typedefs, qualifiers, functions, floats, type tags.
        2 | 7..=12 | 16 | 18 => 0,
        // Integers, variables, declaration tags.
        1 | 14 | 17 => 4,
        // Arrays.
        3 => 12,
        // Structures, unions, data sections, wide enumerations.
        4 | 5 | 15 | 19 => 12 * members,
        // Enumerations, prototypes.
        6 | 13 => 8 * members,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// `struct outer { int a; union { int b; }; }` and the function `call`.
    fn sample() -> Vec<u8> {
        let types = words(&[
            1,
            1 << 24,
            4,
            32, // 1: int
            0,
            5 << 24 | 1,
            4,
            5,
            1,
            0, // 2: union { int b }
            7,
            4 << 24 | 2,
            8,
            3,
            1,
            0,
            0,
            2,
            32, // 3: struct outer
            13,
            12 << 24,
            1, // 4: call
        ]);
        let strings = b"\0i\0a\0b\0outer\0call\0";
        let mut bytes =
            words(&[0x0001_eb9f, 24, 0, types.len() as u32, types.len() as u32, strings.len() as u32]);
        bytes.extend(types);
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn members_of_unnamed_parts_are_found() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(btf.offset("outer", "a"), Some(0));
        assert_eq!(btf.offset("outer", "b"), Some(4));
        assert_eq!(btf.offset("outer", "c"), None);
        assert_eq!(btf.offset("out", "a"), None);
        assert_eq!(btf.function("call"), Some(4));
        assert_eq!(btf.function("outer"), None);
    }

    #[test]
    fn a_part_or_a_damaged_copy_never_panics() {
        let whole = sample();
        for len in 0..whole.len() {
            if let Some(btf) = Btf::parse(whole[..len].to_vec()) {
                let _ = (btf.offset("outer", "b"), btf.function("call"));
            }
            for byte in [0, 0x7f, 0xff] {
                let mut damaged = whole.clone();
                damaged[len] = byte;
                if let Some(btf) = Btf::parse(damaged) {
                    let _ = (btf.offset("outer", "b"), btf.function("call"));
                }
            }
        }
    }
}
