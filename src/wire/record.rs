//! Records of the local database: version byte, value, checksum.
//!
//! sled reports a flipped bit as a panic or not at all. Each record therefore has its own CRC-32, and a
//! damaged record yields an error instead of a wrong fact.

use std::{fmt, net::IpAddr};

use crate::model::{
    Addresses, Attachment, ClusterRecord, Forget, Mac, MemberRecord, NodeId, Pod, Run,
};

use super::{
    WireError,
    codec::{decode, decode_prefix, encode},
};

/// Version of the record format.
const RECORD_VERSION: u8 = 1;

/// The key of a record. Its text form is the key in the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// Number of starts of this agent.
    Starts,
    /// The cluster's record.
    Cluster,
    /// All runs of slots in this bucket.
    Slots(u8),
    /// The record of a member.
    Member(NodeId),
    /// The forget of a node.
    Forget(NodeId),
    /// The pod with this address as its first one.
    Pod(IpAddr),
}

/// The value of a record; each variant belongs to the [`Key`] of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Number of starts.
    Starts(u32),
    /// Cluster id and settings.
    Cluster(ClusterRecord),
    /// Runs of slots.
    Slots(Vec<Run>),
    /// A member record.
    Member(MemberRecord),
    /// A forget.
    Forget(Forget),
    /// A pod.
    Pod(Pod),
}

/// A database record that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("database record {key:?}: {why}")]
pub struct RecordError {
    /// The key in the database.
    pub key: String,
    /// The reason.
    pub why: String,
    /// Whether the record is intact, but in the format of a newer gossamer.
    pub newer: bool,
}

impl Record {
    /// Encodes the record.
    pub fn encode(&self) -> Vec<u8> {
        let value = match self {
            Self::Starts(starts) => encode(starts),
            Self::Cluster(cluster) => encode(cluster),
            Self::Slots(runs) => encode(runs),
            Self::Member(member) => encode(member),
            Self::Forget(forget) => encode(forget),
            Self::Pod(pod) => encode_pod(pod),
        };
        let mut bytes = vec![RECORD_VERSION];
        bytes.extend_from_slice(&value);
        let checksum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Decodes a database record.
    ///
    /// # Errors
    /// If the checksum does not match, the version or the key is unknown, or the value is malformed.
    pub fn decode(key: &[u8], bytes: &[u8]) -> Result<(Key, Self), RecordError> {
        let name = || String::from_utf8_lossy(key).into_owned();
        let newer = |why: String| RecordError { key: name(), why, newer: true };
        let fail = |why: String| RecordError { key: name(), why, newer: false };
        let (version, value) = checked(bytes).map_err(|why| fail(why.to_owned()))?;
        if version != RECORD_VERSION {
            return Err(newer(format!(
                "its version is {version}, this build reads {RECORD_VERSION}"
            )));
        }
        let parsed =
            Key::parse(key).ok_or_else(|| newer("an unknown kind of record".to_owned()))?;
        let record = match parsed {
            Key::Starts => decode("starts", value).map(Self::Starts),
            Key::Cluster => decode("cluster", value).map(Self::Cluster),
            Key::Slots(_) => decode("slots", value).map(Self::Slots),
            Key::Member(_) => decode("member", value).map(Self::Member),
            Key::Forget(_) => decode("forget", value).map(Self::Forget),
            Key::Pod(_) => decode_pod(value).map(Self::Pod),
        };
        record.map(|record| (parsed, record)).map_err(|error: WireError| fail(error.to_string()))
    }

    /// Returns the part of an encoded record that `me` needs to keep its identity and its subnets: of runs of
    /// slots its own, of other records all. Empty if no such part is left; `None` if the record has none with
    /// any value.
    pub fn essential_part(me: NodeId, key: Key, value: &[u8]) -> Option<Vec<u8>> {
        if !key.is_essential(me) {
            return None;
        }
        if !matches!(key, Key::Slots(_)) {
            return Some(value.to_vec());
        }
        let Ok((_, Self::Slots(mut runs))) = Self::decode(key.to_string().as_bytes(), value) else {
            return Some(Vec::new());
        };
        runs.retain(|run| run.record.owner == me);
        Some(if runs.is_empty() { Vec::new() } else { Self::Slots(runs).encode() })
    }
}

/// The encoded fields of a pod. Its MAC follows if it is set: records without one thus have the same form as
/// those of earlier versions, which had no such field.
type PodFields = (Attachment, String, Addresses, String);

fn encode_pod(pod: &Pod) -> Vec<u8> {
    let mut bytes = encode(&(&pod.attachment, &pod.owner, pod.addresses, &pod.netns));
    bytes.extend(pod.mac.iter().flat_map(|mac| mac.as_bytes()));
    bytes
}

fn decode_pod(bytes: &[u8]) -> Result<Pod, WireError> {
    let ((attachment, owner, addresses, netns), used): (PodFields, _) =
        decode_prefix("pod", bytes)?;
    let mac = match &bytes[used..] {
        [] => None,
        mac => {
            let why = || format!("{} bytes instead of a MAC", mac.len());
            let malformed = |_| WireError::Malformed { what: "pod", why: why() };
            Some(Mac::from_bytes(mac.try_into().map_err(malformed)?))
        }
    };
    Ok(Pod { attachment, owner, addresses, netns, mac })
}

impl Key {
    /// Returns whether `me` needs a part of this record to keep its identity and its subnets.
    pub fn is_essential(self, me: NodeId) -> bool {
        match self {
            Self::Cluster | Self::Starts | Self::Pod(_) | Self::Slots(_) => true,
            Self::Member(node) => node == me,
            Self::Forget(_) => false,
        }
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        match text.split_once('/') {
            None if text == "starts" => Some(Self::Starts),
            None if text == "cluster" => Some(Self::Cluster),
            Some(("slots", bucket)) => bucket.parse().ok().map(Self::Slots),
            Some(("member", node)) => node.parse().ok().map(Self::Member),
            Some(("forget", node)) => node.parse().ok().map(Self::Forget),
            Some(("pod", address)) => address.parse().ok().map(Self::Pod),
            _ => None,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starts => f.write_str("starts"),
            Self::Cluster => f.write_str("cluster"),
            Self::Slots(bucket) => write!(f, "slots/{bucket:02}"),
            Self::Member(node) => write!(f, "member/{node}"),
            Self::Forget(node) => write!(f, "forget/{node}"),
            Self::Pod(address) => write!(f, "pod/{address}"),
        }
    }
}

/// Returns version and value of a record, if its checksum matches.
fn checked(bytes: &[u8]) -> Result<(u8, &[u8]), &'static str> {
    let (body, checksum) = bytes.split_last_chunk::<4>().ok_or("truncated")?;
    if crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
        return Err("checksum does not match");
    }
    let (version, value) = body.split_first().ok_or("empty")?;
    Ok((*version, value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Slot, SlotRecord, SlotState};

    #[test]
    fn key_round_trips_through_its_text() {
        let node = NodeId::of_public_key(&[3; 32]);
        let pods =
            ["10.42.7.2", "fd42:0:0:7::2"].map(|ip| Key::Pod(ip.parse().expect("an address")));
        let others = [Key::Starts, Key::Cluster, Key::Slots(0), Key::Slots(31), Key::Member(node)];
        for key in pods.into_iter().chain(others) {
            assert_eq!(Key::parse(key.to_string().as_bytes()), Some(key));
        }
        assert_eq!(Key::parse(b"member/xyz"), None);
        assert_eq!(Key::parse(&[0xff]), None);
    }

    #[test]
    fn pod_record_round_trips_with_and_without_a_mac() {
        let first: IpAddr = [10, 42, 7, 2].into();
        let key = Key::Pod(first);
        let decode = |bytes: &[u8]| Record::decode(key.to_string().as_bytes(), bytes);
        let pod = Pod {
            attachment: Attachment::new("web", "eth0").expect("a name"),
            owner: "docker".to_owned(),
            addresses: Addresses { first, second: None },
            netns: String::new(),
            mac: Some(Mac::from_bytes([2, 0x42, 0, 0, 0, 1])),
        };
        for mac in [pod.mac, None] {
            let record = Record::Pod(Pod { mac, ..pod.clone() });
            assert_eq!(decode(&record.encode()), Ok((key, record)));
        }
        let mut cut = vec![RECORD_VERSION];
        cut.extend(encode_pod(&pod));
        cut.pop();
        cut.extend(crc32fast::hash(&cut).to_le_bytes());
        let error = decode(&cut).expect_err("five bytes of a MAC");
        assert!(error.why.contains("5 bytes instead of a MAC"), "{error}");
    }

    #[test]
    fn essential_part_has_own_slots_and_records_of_this_node_only() {
        let (me, other) = (NodeId::from_bytes([1; 8]), NodeId::from_bytes([2; 8]));
        let run = |start: u32, owner| {
            let record = SlotRecord { epoch: 0, owner, state: SlotState::Leased, granter: owner };
            Run { start: Slot(start), len: 1, record }
        };
        let part = |key, value: &[u8]| Record::essential_part(me, key, value);
        let slots = |runs: &[Run]| Record::Slots(runs.to_vec()).encode();
        let both = slots(&[run(1, me), run(2, other)]);
        assert_eq!(part(Key::Slots(0), &both), Some(slots(&[run(1, me)])));
        assert_eq!(part(Key::Slots(0), &slots(&[run(2, other)])), Some(Vec::new()));
        assert_eq!(part(Key::Member(me), b"any"), Some(b"any".to_vec()));
        assert_eq!(part(Key::Member(other), b"any"), None);
        assert_eq!(part(Key::Forget(me), b"any"), None);
    }

    #[test]
    fn flipped_bit_is_detected_and_the_error_names_the_key() {
        let bytes = Record::Starts(77).encode();
        let key = Key::Starts.to_string();
        assert_eq!(Record::decode(key.as_bytes(), &bytes), Ok((Key::Starts, Record::Starts(77))));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let error = Record::decode(key.as_bytes(), &damaged).expect_err("damaged");
            assert!(!error.newer);
            assert!(error.to_string().contains("starts"), "{error}");
        }
    }

    #[test]
    fn record_of_unknown_version_or_kind_is_reported_as_newer() {
        let mut body = vec![9, 1];
        let checksum = crc32fast::hash(&body);
        body.extend_from_slice(&checksum.to_le_bytes());
        let error = Record::decode(b"starts", &body).expect_err("newer");
        assert!(error.newer && error.to_string().contains("version is 9"), "{error}");
        let unknown = Record::decode(b"pods/1", &Record::Starts(1).encode()).expect_err("unknown");
        assert!(unknown.newer);
    }
}
