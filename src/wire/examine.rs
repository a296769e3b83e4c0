//! What one agent asks the other before a pair is relied on, and what it answers: facts about its host, none of them secret.
//!
//! A file is named by the asker and described by size, owner, mode and build-id; never is any of its content sent.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::check::{self, Illegal, PATH_LEN_MAX, make_printable, require};
use crate::{ha::Arbiter, workload::spec::Vip};

/// Most files in one question.
pub const FILES_MAX: usize = 256;
/// Most bytes of the paths of one question, so that it fits a message.
pub const PATHS_LEN_MAX: usize = 192 << 10;
/// Most users, and most groups, in one question.
pub const IDS_MAX: usize = 512;
/// Most bytes of a build-id; the GNU linker writes 20.
pub const BUILD_ID_LEN_MAX: usize = 64;
/// Most answers of CPUID.
pub const CPU_LEAVES_MAX: usize = 32;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// What the clocks say; answered at once.
    Clock,
    /// What the host is.
    Host {
        /// Addresses that it may have to serve.
        vips: Vec<Vip>,
    },
    /// What the host has at these paths.
    Files(Vec<FileQuestion>),
    /// Who these are there.
    Users {
        /// Numbers of users.
        uids: Vec<u32>,
        /// Numbers of groups.
        gids: Vec<u32>,
    },
}

/// A file that a workload uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileQuestion {
    /// Where it is: absolute, without `.` and `..`.
    pub path: Vec<u8>,
    /// It has no build-id where it is asked from: a digest is wanted instead.
    pub digest: bool,
}

/// The answer to a [`Question`] of the same name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The clocks.
    Clock(ClockFacts),
    /// The host.
    Host(Box<HostFacts>),
    /// One for each file, in the same order.
    Files(Vec<FileFacts>),
    /// Names, in the order of the numbers; none where nobody has the number.
    Users {
        /// Of the users.
        users: Vec<Option<String>>,
        /// Of the groups.
        groups: Vec<Option<String>>,
    },
}

/// Two clocks, read one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockFacts {
    /// The wall clock, since 1970.
    pub wall: Duration,
    /// CLOCK_BOOTTIME, by which leases are kept.
    pub boot: Duration,
}

/// What a host is, as far as a restore or a takeover there depends on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Release of the agent.
    pub release: String,
    /// Release of the kernel.
    pub kernel: String,
    /// Version of CRIU.
    pub criu: (u32, u32, u32),
    /// How pages that were written are found; none if that cannot be done.
    pub tracker: Option<String>,
    /// Who decides.
    pub arbiter: Arbiter,
    /// Time between two renewals of a lease.
    pub heartbeat: Duration,
    /// How long a lease lasts.
    pub lease: Duration,
    /// What the primary's guard keeps of it.
    pub fence_margin: Duration,
    /// What two clocks may differ by within a lease.
    pub drift: Duration,
    /// The processor.
    pub cpu: CpuFacts,
    /// Memory that programs could have.
    pub memory_available: u64,
    /// What its images could still have.
    pub store_free: u64,
    /// Whether they are kept in memory.
    pub store_in_memory: bool,
    /// Largest packet that its routes let go to the asker.
    pub mtu: Option<u32>,
    /// One for each address that was asked about.
    pub vips: Vec<VipFacts>,
}

/// What a process sees of a processor: CPUID is answered by the processor (or hypervisor) and not filtered by the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFacts {
    /// Who made it: `GenuineIntel`.
    pub vendor: String,
    /// Its name.
    pub model: String,
    /// What CPUID answers.
    pub leaves: Vec<CpuLeaf>,
    /// XCR0: the parts of the processor's state that the kernel keeps for a process.
    pub state_parts: u64,
    /// Bytes of that state, as it lies in the frame of a signal that is being handled.
    pub state_bytes: u32,
}

/// One answer of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuLeaf {
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question.
    pub subleaf: u32,
    /// EAX, EBX, ECX, EDX of the answer.
    pub registers: [u32; 4],
}

/// Whether a host could serve an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VipFacts {
    /// Why it could not.
    pub trouble: Option<String>,
    /// Largest packet of the device.
    pub mtu: Option<u32>,
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileFacts {
    /// Nothing.
    Missing,
    /// Something that is no regular file of a disk or of memory.
    NotAFile,
    /// It cannot be looked at, and why.
    Unreadable(String),
    /// A file.
    Regular(RegularFile),
}

/// A regular file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegularFile {
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// What the linker has put into it to tell one build from another; empty if it has none.
    pub build_id: Vec<u8>,
    /// BLAKE3 of all of it, if that was asked for, everybody may read the file, and it is not too much.
    pub digest: Option<[u8; 32]>,
}

/// The rules of a question.
pub(super) fn question(question: &Question) -> Result<(), Illegal> {
    match question {
        Question::Clock => Ok(()),
        Question::Host { vips } => check::vips(vips),
        Question::Files(files) => {
            require(files.len() <= FILES_MAX, || format!("{} files, at most {FILES_MAX}", files.len()))?;
            let len: usize = files.iter().map(|file| file.path.len()).sum();
            require(len <= PATHS_LEN_MAX, || format!("{len} bytes of paths, at most {PATHS_LEN_MAX}"))?;
            files.iter().try_for_each(|file| path(&file.path))
        }
        Question::Users { uids, gids } => {
            let fits = uids.len() <= IDS_MAX && gids.len() <= IDS_MAX;
            require(fits, || format!("more than {IDS_MAX} users or groups"))
        }
    }
}

/// Whether a path may be asked about.
pub fn path(path: &[u8]) -> Result<(), Illegal> {
    let part_fits = |part: &[u8]| !part.is_empty() && part != b"." && part != b".." && !part.contains(&0);
    let fits = path.len() < PATH_LEN_MAX
        && path
            .split_first()
            .is_some_and(|(first, rest)| *first == b'/' && rest.split(|b| *b == b'/').all(part_fits));
    require(fits, || format!("{:?} is no plain absolute path", path.escape_ascii().to_string()))
}

/// The rules of an answer; what is for people is made harmless.
pub(super) fn answer(answer: &mut Answer) -> Result<(), Illegal> {
    match answer {
        Answer::Clock(_) => Ok(()),
        Answer::Host(host) => {
            for text in [&mut host.release, &mut host.kernel, &mut host.cpu.vendor, &mut host.cpu.model] {
                make_printable(text);
            }
            let troubles = host.vips.iter_mut().filter_map(|vip| vip.trouble.as_mut());
            host.tracker.iter_mut().chain(troubles).for_each(make_printable);
            let (leaves, vips) = (host.cpu.leaves.len(), host.vips.len());
            require(leaves <= CPU_LEAVES_MAX, || format!("{leaves} answers of CPUID"))?;
            require(vips <= check::ADDRESSES_MAX, || format!("{vips} addresses"))
        }
        Answer::Files(files) => {
            require(files.len() <= FILES_MAX, || format!("{} files, at most {FILES_MAX}", files.len()))?;
            files.iter_mut().try_for_each(|file| match file {
                FileFacts::Missing | FileFacts::NotAFile => Ok(()),
                FileFacts::Unreadable(reason) => {
                    make_printable(reason);
                    Ok(())
                }
                FileFacts::Regular(file) => {
                    let len = file.build_id.len();
                    require(len <= BUILD_ID_LEN_MAX, || format!("a build-id of {len} bytes"))
                }
            })
        }
        Answer::Users { users, groups } => {
            let fits = users.len() <= IDS_MAX && groups.len() <= IDS_MAX;
            users.iter_mut().chain(groups).flatten().for_each(make_printable);
            require(fits, || format!("more than {IDS_MAX} users or groups"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{
        codec::{CodecError, PREFIX_LEN, decode_message, encode_message},
        message::{Reply, Request},
    };

    fn arrives(question: Question) -> bool {
        let bytes = encode_message(&Request::Examine(question)).unwrap();
        match decode_message::<Request>(&bytes[PREFIX_LEN..]) {
            Ok(_) => true,
            Err(CodecError::Illegal { .. }) => false,
            Err(error) => panic!("{error}"),
        }
    }

    fn file(path: &str) -> FileQuestion {
        FileQuestion { path: path.into(), digest: true }
    }

    #[test]
    fn only_so_many_plain_paths_can_be_asked_about() {
        assert!(arrives(Question::Files(vec![file("/usr/bin/redis-server"); FILES_MAX])));
        assert!(!arrives(Question::Files(vec![file("/usr/bin/redis-server"); FILES_MAX + 1])));
        for wrong in ["", "/", "usr", "/usr/../etc/shadow", "/usr//bin", "/usr/.", "/usr/", "/a\0b"] {
            assert!(!arrives(Question::Files(vec![file(wrong)])), "{wrong:?}");
        }
        let long = format!("/{}", "a".repeat(1000));
        assert!(!arrives(Question::Files(vec![file(&long); 200])));
        assert!(!arrives(Question::Files(vec![file(&"/a".repeat(PATH_LEN_MAX))])));
        assert!(!arrives(Question::Users { uids: vec![0; IDS_MAX + 1], gids: Vec::new() }));
    }

    #[test]
    fn the_largest_question_and_answer_fit_a_message() {
        let path = format!("/{}", "a".repeat(PATHS_LEN_MAX / FILES_MAX - 1));
        assert!(arrives(Question::Files(vec![file(&path); FILES_MAX])));
        let (size, build_id, digest) = (u64::MAX, vec![255; BUILD_ID_LEN_MAX], Some([255; 32]));
        let regular = RegularFile { size, mode: u32::MAX, uid: u32::MAX, gid: u32::MAX, build_id, digest };
        let reply = Reply::Examined(Answer::Files(vec![FileFacts::Regular(regular); FILES_MAX]));
        let bytes = encode_message(&reply).unwrap();
        assert_eq!(decode_message::<Reply>(&bytes[PREFIX_LEN..]).unwrap(), reply);
    }

    #[test]
    fn what_a_peer_calls_its_users_cannot_drive_a_terminal() {
        let users = vec![Some("\x1b[2Jroot".to_owned()), None];
        let bytes = encode_message(&Reply::Examined(Answer::Users { users, groups: Vec::new() })).unwrap();
        let Reply::Examined(Answer::Users { users, .. }) = decode_message(&bytes[PREFIX_LEN..]).unwrap()
        else {
            unreachable!()
        };
        assert_eq!(users, [Some(" [2Jroot".to_owned()), None]);
    }
}
