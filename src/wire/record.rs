//! Records of the local database: a version byte, the value, a checksum.
//!
//! sled reports a flipped bit as a panic or not at all, so each record carries its own CRC-32 and a
//! record that fails it is an error here, never a wrong fact.

use std::{fmt, net::IpAddr};

use crate::model::{
    Addresses, Attachment, ClusterRecord, Forget, Mac, MemberRecord, NodeId, Pod, Run,
};

use super::{
    WireError,
    codec::{decode, decode_prefix, encode},
};

const RECORD_VERSION: u8 = 1;

/// Where a record is kept. The text form is the key in the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// How often this agent has started.
    Starts,
    Cluster,
    /// All runs of slots whose bucket this is.
    Slots(u8),
    Member(NodeId),
    Forget(NodeId),
    /// The pod with this address, the first of its addresses.
    Pod(IpAddr),
}

/// What is kept there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    Starts(u32),
    Cluster(ClusterRecord),
    Slots(Vec<Run>),
    Member(MemberRecord),
    Forget(Forget),
    Pod(Pod),
}

/// A database entry that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("database record {key:?}: {why}")]
pub struct RecordError {
    pub key: String,
    pub why: String,
    /// It is sound, but a newer gossamer wrote it.
    pub newer: bool,
}

impl Record {
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

    /// Reads one database entry.
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
}

/// A pod as it is kept: its MAC follows where it has one of its own, so that records without one are as
/// earlier programs wrote them.
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
            let why = || format!("{} bytes in the place of a MAC", mac.len());
            let malformed = |_| WireError::Malformed { what: "pod", why: why() };
            Some(Mac::from_bytes(mac.try_into().map_err(malformed)?))
        }
    };
    Ok(Pod { attachment, owner, addresses, netns, mac })
}

impl Key {
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

/// Version and value of a record whose checksum is right.
fn checked(bytes: &[u8]) -> Result<(u8, &[u8]), &'static str> {
    let (body, checksum) = bytes.split_last_chunk::<4>().ok_or("cut off")?;
    if crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
        return Err("checksum does not match");
    }
    let (version, value) = body.split_first().ok_or("empty")?;
    Ok((*version, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_round_trip_through_their_text() {
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
    fn pod_record_keeps_its_mac_and_is_read_without_one() {
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
        assert!(error.why.contains("5 bytes in the place of a MAC"), "{error}");
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
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
    fn a_newer_version_says_so() {
        let mut body = vec![9, 1];
        let checksum = crc32fast::hash(&body);
        body.extend_from_slice(&checksum.to_le_bytes());
        let error = Record::decode(b"starts", &body).expect_err("newer");
        assert!(error.newer && error.to_string().contains("version is 9"), "{error}");
        let unknown = Record::decode(b"pods/1", &Record::Starts(1).encode()).expect_err("unknown");
        assert!(unknown.newer);
    }
}
