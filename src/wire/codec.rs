//! Values to bytes and back: bincode's standard configuration, with a cap on both sides of it.
//!
//! On a stream a message is a little-endian `u32` length and that many bytes. A datagram has no prefix.

use serde::{Serialize, de::DeserializeOwned};

use super::{
    check::{self, Illegal},
    examine,
    message::{Datagram, EpochAnswer, Reply, Request},
};

/// Most bytes of an encoded message, prefix not counted.
pub const MESSAGE_LEN_MAX: usize = 320 * 1024;
/// Most bytes of an encoded datagram: fits the smallest packet that QUIC may be limited to.
pub const DATAGRAM_LEN_MAX: usize = 1000;
/// Bytes of a message's length prefix.
pub const PREFIX_LEN: usize = 4;

/// What bincode may claim for each byte of input. It counts the size in memory (8 for a `u64`) and not the
/// bytes consumed (1 for a small one), so its limit must be looser than ours; the slice is the tight one.
const CLAIM_FACTOR: usize = 8;

/// Why bytes are no message, or a value cannot become one.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// More bytes than the limit.
    #[error("a {what} of {len} bytes is over the limit of {max}; both agents must run the same release")]
    TooLong {
        /// What was to be encoded or decoded.
        what: &'static str,
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The value has no encoding (a path that is not UTF-8, say).
    #[error("cannot encode a {what}: {reason}")]
    Encode {
        /// What was to be encoded.
        what: &'static str,
        /// The encoder's words.
        reason: String,
    },
    /// The bytes are not of this type.
    #[error("received bytes are no {what} ({reason}); both agents must run the same release")]
    Decode {
        /// What was expected.
        what: &'static str,
        /// The decoder's words.
        reason: String,
    },
    /// The value is outside what the protocol allows.
    #[error("refused a {what}: {source}")]
    Illegal {
        /// What was encoded or decoded.
        what: &'static str,
        /// The rule it breaks.
        source: Illegal,
    },
}

/// A value that travels alone on a stream, behind a length prefix.
pub trait Message: Serialize + DeserializeOwned {
    /// Its name in errors.
    const WHAT: &'static str;

    /// The rules beyond its type; text for people is made harmless here.
    fn check(&mut self) -> Result<(), Illegal>;
}

impl Message for Request {
    const WHAT: &'static str = "request";

    fn check(&mut self) -> Result<(), Illegal> {
        check::request(self)
    }
}

impl Message for Reply {
    const WHAT: &'static str = "reply";

    fn check(&mut self) -> Result<(), Illegal> {
        match self {
            Self::Refused { reason, .. } => check::make_printable(reason),
            Self::Examined(answer) => examine::answer(answer)?,
            Self::Accepted { .. } | Self::Done | Self::Said(_) => {}
        }
        Ok(())
    }
}

impl Message for EpochAnswer {
    const WHAT: &'static str = "epoch answer";

    fn check(&mut self) -> Result<(), Illegal> {
        match self {
            Self::Committed { .. } => {}
            Self::NeedFull { reason, .. } | Self::Refused { reason, .. } => check::make_printable(reason),
        }
        Ok(())
    }
}

/// Encodes a message with its length prefix.
pub fn encode_message<T: Message>(message: &T) -> Result<Vec<u8>, CodecError> {
    let mut bytes = vec![0; PREFIX_LEN];
    append(&mut bytes, T::WHAT, message)?;
    let len = bytes.len() - PREFIX_LEN;
    if len > MESSAGE_LEN_MAX {
        return Err(CodecError::TooLong { what: T::WHAT, len, max: MESSAGE_LEN_MAX });
    }
    bytes[..PREFIX_LEN].copy_from_slice(&(len as u32).to_le_bytes());
    Ok(bytes)
}

/// The length that a prefix announces, within the limit.
pub fn message_len<T: Message>(prefix: [u8; PREFIX_LEN]) -> Result<usize, CodecError> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len > MESSAGE_LEN_MAX {
        return Err(CodecError::TooLong { what: T::WHAT, len, max: MESSAGE_LEN_MAX });
    }
    Ok(len)
}

/// Decodes a message from the bytes behind its prefix.
pub fn decode_message<T: Message>(bytes: &[u8]) -> Result<T, CodecError> {
    let mut message: T = decode::<T, MESSAGE_LEN_MAX>(T::WHAT, bytes)?;
    message.check().map_err(|source| CodecError::Illegal { what: T::WHAT, source })?;
    Ok(message)
}

/// Encodes a datagram.
pub fn encode_datagram(datagram: &Datagram) -> Result<Vec<u8>, CodecError> {
    check::datagram(datagram).map_err(|source| CodecError::Illegal { what: "datagram", source })?;
    let mut bytes = Vec::with_capacity(96);
    append(&mut bytes, "datagram", datagram)?;
    if bytes.len() > DATAGRAM_LEN_MAX {
        return Err(CodecError::TooLong { what: "datagram", len: bytes.len(), max: DATAGRAM_LEN_MAX });
    }
    Ok(bytes)
}

/// Decodes a datagram.
pub fn decode_datagram(bytes: &[u8]) -> Result<Datagram, CodecError> {
    let datagram = decode::<Datagram, DATAGRAM_LEN_MAX>("datagram", bytes)?;
    check::datagram(&datagram).map_err(|source| CodecError::Illegal { what: "datagram", source })?;
    Ok(datagram)
}

/// Appends the encoding of `value`; the caller checks the length.
pub(super) fn append<T: Serialize>(
    bytes: &mut Vec<u8>,
    what: &'static str,
    value: &T,
) -> Result<(), CodecError> {
    bincode::serde::encode_into_std_write(value, bytes, bincode::config::standard())
        .map(|_| ())
        .map_err(|e| CodecError::Encode { what, reason: e.to_string() })
}

/// Decodes exactly `bytes`, which may be at most `MAX` long.
pub(super) fn decode<T: DeserializeOwned, const MAX: usize>(
    what: &'static str,
    bytes: &[u8],
) -> Result<T, CodecError> {
    if bytes.len() > MAX {
        return Err(CodecError::TooLong { what, len: bytes.len(), max: MAX });
    }
    // bincode's own limit only has to stop a length that lies; one const for all sizes of MAX would let a
    // short input claim as much as the longest, so there are two.
    let decoded = if MAX <= MESSAGE_LEN_MAX {
        let config = bincode::config::standard().with_limit::<{ MESSAGE_LEN_MAX * CLAIM_FACTOR }>();
        bincode::serde::decode_from_slice(bytes, config)
    } else {
        let config =
            bincode::config::standard().with_limit::<{ super::frame::MANIFEST_LEN_MAX * CLAIM_FACTOR }>();
        bincode::serde::decode_from_slice(bytes, config)
    };
    let (value, used) = decoded.map_err(|e| CodecError::Decode { what, reason: e.to_string() })?;
    if used != bytes.len() {
        let reason = format!("{} bytes are left over", bytes.len() - used);
        return Err(CodecError::Decode { what, reason });
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ha,
        model::{Epoch, EpochId, Term},
        workload::spec::{
            Commit, ContainerSpec, ContainerTree, ContainerTreeKind, Engine, Lent, Net, PaceMode, PaceSpec,
            PlaceSpec, Runtime, SandboxSpec, Vip, WorkloadSpec,
        },
    };

    fn offer() -> Request {
        let sandbox = SandboxSpec {
            name: "db".parse().unwrap(),
            net: Net::Own { ips: vec!["10.0.0.5/24".parse().unwrap()] },
            paths: vec!["/srv/db".into()],
            hostname: "db.example".into(),
        };
        let vips = vec!["10.0.0.5/24@eth0".parse().unwrap()];
        let spec = WorkloadSpec {
            place: PlaceSpec::Sandbox(sandbox),
            vips,
            pace: PaceSpec::default(),
            arbiter: ha::Arbiter::Store,
            commit: Commit::Output,
        };
        Request::Offer { spec: Box::new(spec), term: Term(3), resident_bytes: 1 << 33 }
    }

    fn decode_stream<T: Message>(bytes: &[u8]) -> Result<T, CodecError> {
        let (prefix, rest) = bytes.split_first_chunk().unwrap();
        assert_eq!(message_len::<T>(*prefix)?, rest.len());
        decode_message(rest)
    }

    #[test]
    fn messages_and_datagrams_read_back_as_written() {
        let request = offer();
        assert_eq!(decode_stream::<Request>(&encode_message(&request).unwrap()).unwrap(), request);
        let answer = EpochAnswer::Committed { id: EpochId { term: Term(1), epoch: Epoch(9) }, busy_us: 5 };
        assert_eq!(decode_stream::<EpochAnswer>(&encode_message(&answer).unwrap()).unwrap(), answer);
        let sent_at = std::time::Duration::from_nanos(u64::MAX);
        let message = ha::Message::Heartbeat { term: Term(1), seq: 4, sent_at };
        let mut beat = Datagram { name: "db".parse().unwrap(), message };
        assert_eq!(decode_datagram(&encode_datagram(&beat).unwrap()).unwrap(), beat);
        beat.message = ha::Message::Inquire { term: Term(1) };
        assert!(encode_datagram(&beat).is_err());
    }

    #[test]
    fn left_over_bytes_and_cut_messages_are_refused() {
        let bytes = encode_message(&offer()).unwrap();
        for end in PREFIX_LEN..bytes.len() {
            assert!(decode_message::<Request>(&bytes[PREFIX_LEN..end]).is_err());
        }
        let mut longer = bytes[PREFIX_LEN..].to_vec();
        longer.push(0);
        assert!(matches!(decode_message::<Request>(&longer), Err(CodecError::Decode { .. })));
    }

    #[test]
    fn a_prefix_over_the_limit_is_refused() {
        assert!(matches!(message_len::<Reply>(u32::MAX.to_le_bytes()), Err(CodecError::TooLong { .. })));
        assert!(decode_datagram(&vec![0; DATAGRAM_LEN_MAX + 1]).is_err());
    }

    #[test]
    fn a_spec_that_could_reach_outside_its_place_is_refused() {
        fn sandbox(spec: &mut WorkloadSpec) -> &mut SandboxSpec {
            let PlaceSpec::Sandbox(sandbox) = &mut spec.place else { unreachable!() };
            sandbox
        }
        fn container(id: &str, inside: &str) -> PlaceSpec {
            let (id, config) = (id.to_owned(), "{}".to_owned());
            let engine = Engine::Oci { runtime: Runtime::Crun, state: None, id, config };
            let trees = vec![ContainerTree { inside: inside.into(), kind: ContainerTreeKind::Root }];
            PlaceSpec::Container(ContainerSpec {
                way: crate::workload::spec::Way::Whole,
                name: "db".parse().unwrap(),
                engine,
                ips: Vec::new(),
                trees,
                left: Vec::new(),
                lent: Vec::new(),
            })
        }
        fn lent(inside: &str, digest: &str) -> PlaceSpec {
            let mut place = container("db", "/");
            let PlaceSpec::Container(spec) = &mut place else { unreachable!() };
            spec.lent = vec![Lent { inside: inside.into(), digest: digest.into(), is_file: false }];
            place
        }
        let edits: [fn(&mut WorkloadSpec); 12] = [
            |spec| sandbox(spec).paths = vec!["relative".into()],
            |spec| sandbox(spec).paths = vec!["/a/../b".into()],
            |spec| sandbox(spec).hostname = "a b".into(),
            |spec| spec.place = container("../a", "/"),
            |spec| spec.place = container("--force", "/"),
            |spec| spec.place = container("", "/"),
            |spec| spec.place = container("db", "/data/../.."),
            |spec| spec.place = lent("/conf", "../../../etc"),
            |spec| spec.place = lent("conf", &"0".repeat(64)),
            |spec| spec.pace.mode = PaceMode::EveryMs(0),
            |spec| {
                spec.vips =
                    vec![Vip { cidr: "10.0.0.5/24".parse().unwrap(), device: "-x".into(), own_mac: false }];
            },
            |spec| {
                spec.vips =
                    vec![Vip { cidr: "10.0.0.5/24".parse().unwrap(), device: "a/b".into(), own_mac: true }];
            },
        ];
        for edit in edits {
            let mut request = offer();
            let Request::Offer { spec, .. } = &mut request else { unreachable!() };
            edit(spec);
            let bytes = encode_message(&request).unwrap();
            assert!(
                matches!(decode_stream::<Request>(&bytes), Err(CodecError::Illegal { .. })),
                "{request:?}"
            );
        }
    }

    #[test]
    fn a_reason_cannot_drive_a_terminal() {
        let reply = Reply::Refused { term: Term(1), reason: format!("\x1b[2Jno\n{}", "ä".repeat(3000)) };
        let Reply::Refused { reason, .. } = decode_stream(&encode_message(&reply).unwrap()).unwrap() else {
            unreachable!()
        };
        assert!(reason.starts_with(" [2Jno ") && reason.len() <= check::REASON_LEN_MAX);
    }
}
