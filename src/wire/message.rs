//! Messages between nodes besides SWIM: pushed facts, requests and responses.
//!
//! Enums only grow at the end; the fields of a published struct never change.

use std::{net::IpAddr, ops::RangeInclusive};

use serde::{Deserialize, Serialize};

use crate::model::{
    ClusterRecord, Forget, Identity, Incarnation, MemberRecord, NodeId, Quorum, Run, SettingsWish,
    Suspicion, bounded,
};

use super::{
    Inquiry, InquiryAnswer, Refusal, WireError,
    codec::{decode, encode},
};

/// Replicated state or a part of it. Merging facts is idempotent and independent of their order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Member records.
    #[serde(deserialize_with = "bounded::members")]
    pub members: Vec<MemberRecord>,
    /// Slot records.
    #[serde(deserialize_with = "bounded::runs")]
    pub slots: Vec<Run>,
    /// Members that the sender considers alive, with the incarnations it knows.
    #[serde(deserialize_with = "bounded::members")]
    pub active: Vec<Identity>,
    /// Forgets.
    #[serde(deserialize_with = "bounded::members")]
    pub forgets: Vec<Forget>,
}

impl Facts {
    /// Whether there is no fact.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
            && self.slots.is_empty()
            && self.active.is_empty()
            && self.forgets.is_empty()
    }
}

/// Facts that were new to the sender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Push {
    /// The facts.
    pub facts: Facts,
}

/// A request on its own stream; it gets exactly one [`Response`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Requests to join; the sender has no cluster record.
    Hello(Hello),
    /// Compares the hashes of all facts.
    Compare(Roots),
    /// Sends the facts in the differing buckets and requests the receiver's newer ones.
    Exchange {
        /// Bit mask of the buckets.
        buckets: u32,
        /// The sender's identity.
        identity: Identity,
        /// The sender's facts in these buckets.
        facts: Facts,
    },
    /// Requests a slot.
    Grant(GrantWish),
    /// Requests the receiver's consent to be the successor of the sender, which is about to leave.
    BeMySuccessor,
    /// Hands over the records of a completed leave, which the receiver must make durable.
    Handover(Facts),
    /// Informs a member that it is suspected. A live member refutes the suspicion.
    AreYouThere(Suspicion),
    /// Sends forgets whose successor is the sender. The receiver makes them durable and returns what the
    /// sender lacks.
    Acknowledge {
        /// The forgets.
        #[serde(deserialize_with = "bounded::members")]
        forgets: Vec<Forget>,
        /// Hashes of the sender's facts.
        buckets: Box<Buckets>,
    },
    /// Requests the observation of another voter: whether it has missed a member for as long as the rule
    /// requires.
    HaveYouMissed {
        /// The missed member.
        node: NodeId,
        /// The sender's rule.
        quorum: Quorum,
    },
    /// Requests free slots of a member that has many, for joiners that the sender will admit. Answered with
    /// [`Response::Granted`].
    Supply,
}

/// The response to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// Admits a joiner.
    Welcome(Box<Welcome>),
    /// The hashes are equal.
    Same,
    /// The hashes differ; these are the responder's.
    Differ(Box<Buckets>),
    /// The responder's part of an exchange.
    Facts {
        /// Facts that the requester lacks.
        facts: Facts,
        /// Members that the requester considers alive and the responder down.
        #[serde(deserialize_with = "bounded::members")]
        down: Vec<Suspicion>,
        /// Set if the responder does not hold the requester as alive: the newest incarnation it knows of the
        /// requester, or the lowest possible one. The requester must exceed it.
        down_as: Option<Incarnation>,
    },
    /// The slots that the requester owns, by this or an earlier grant. Durable at the granter.
    Granted(Facts),
    /// The receiver accepts.
    Accepted,
    /// The receiver refuses.
    Refused(Refusal),
    /// The receiver is alive; the suspicion is refuted under this identity and count of refutations.
    Here(Suspicion),
    /// The forgets are durable; these are the facts that the requester lacks.
    Acknowledged(Facts),
    /// A voter's observation.
    Vote(Vote),
}

/// A voter's observation of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Vote {
    /// The voter has missed the member for as long as the rule requires.
    Missed,
    /// The voter has seen the member.
    Seen,
    /// The receiver is not a voter, or has another rule.
    OtherRule,
}

/// A join request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The joiner's member record.
    pub member: MemberRecord,
    /// The joiner's identity.
    pub identity: Identity,
    /// Cluster settings that the joiner's configuration requires.
    pub settings: SettingsWish,
    /// The slot that the joiner prefers.
    pub grant: GrantWish,
}

/// The slot that a node prefers. A repeated request gets the same slot: the granter finds in its table that
/// the requester already owns one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantWish {
    /// First address of the preferred subnet.
    pub prefer: Option<IpAddr>,
}

/// What a joiner needs to become a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The cluster's record.
    pub cluster: ClusterRecord,
    /// All facts, including a slot for the joiner if the sender had a free one.
    pub facts: Facts,
    /// Whether the joiner was a member before: it has lost its records.
    pub returning: bool,
    /// Why `facts` contains no slot for the joiner.
    pub no_slot: Option<Refusal>,
}

/// One hash over all facts of each kind. Equal hashes end a comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Roots {
    /// Over members and forgets.
    pub members: u64,
    /// Over slots.
    pub slots: u64,
    /// Over active members.
    pub active: u64,
}

/// One hash for each bucket and kind of fact. Members are assigned to buckets by id, slots by number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buckets {
    /// Over members and forgets, by bucket.
    pub members: [u64; Self::COUNT],
    /// Over slots, by bucket.
    pub slots: [u64; Self::COUNT],
    /// Over active members, by bucket.
    pub active: [u64; Self::COUNT],
}

impl Buckets {
    /// Number of buckets.
    pub const COUNT: usize = 32;

    /// Returns the buckets in which two states differ, as a bit mask.
    pub fn differing(&self, other: &Self) -> u32 {
        (0..Self::COUNT)
            .filter(|&i| {
                self.members[i] != other.members[i]
                    || self.slots[i] != other.slots[i]
                    || self.active[i] != other.active[i]
            })
            .fold(0, |mask, i| mask | 1 << i)
    }

    /// Returns the bucket of a node: the first five bits of its id, which is a hash and thus evenly
    /// distributed.
    pub const fn of_node(node: NodeId) -> usize {
        (node.as_bytes()[0] >> 3) as usize
    }

    /// Returns the range of node ids in a bucket.
    pub fn nodes(bucket: usize) -> RangeInclusive<NodeId> {
        let (mut first, mut last) = ([0; 8], [0xff; 8]);
        first[0] = (bucket << 3) as u8;
        last[0] = first[0] | 7;
        NodeId::from_bytes(first)..=NodeId::from_bytes(last)
    }
}

macro_rules! payload {
    ($($name:ident: $what:literal),+) => {$(
        impl $name {
            /// Encodes the message.
            pub fn encode(&self) -> Vec<u8> {
                encode(self)
            }

            /// Decodes the message.
            ///
            /// # Errors
            /// If `bytes` is truncated, too long or malformed, or has trailing bytes.
            pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
                decode($what, bytes)
            }
        }
    )+};
}

payload!(
    Push: "push", Request: "request", Response: "response", Inquiry: "inquiry",
    InquiryAnswer: "answer"
);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::model::{
        BootId, Incarnation, Mac, NodeName, Slot, SlotRecord, SlotState, Version, Vtep,
        bounded::MAX_MEMBERS,
    };

    use super::*;

    fn node(seed: u8) -> NodeId {
        NodeId::of_public_key(&[seed; 32])
    }

    fn member(seed: u8) -> MemberRecord {
        MemberRecord {
            node: node(seed),
            version: Version { starts: 3, change: 1 },
            boot: BootId::from_bytes([seed; 8]),
            name: "edge-1".parse::<NodeName>().expect("name"),
            address: "192.0.2.1:8473".parse().expect("address"),
            vtep: Vtep { mac: Mac::of_node(node(seed)), underlay: [192, 0, 2, 1].into() },
            left_to: None,
        }
    }

    fn facts() -> Facts {
        let record =
            SlotRecord { epoch: 4, owner: node(1), state: SlotState::Free, granter: node(2) };
        Facts {
            members: vec![member(1), member(2)],
            slots: vec![Run { start: Slot(1), len: 254, record }],
            active: vec![Identity { node: node(1), incarnation: Incarnation::default() }],
            forgets: Vec::new(),
        }
    }

    #[test]
    fn message_round_trips() {
        let request =
            Request::Exchange { buckets: 0xffff_0000, identity: facts().active[0], facts: facts() };
        assert_eq!(Request::decode(&request.encode()), Ok(request));
        let response = Response::Refused(Refusal::Exhausted { total: 255, leased: 255 });
        assert_eq!(Response::decode(&response.encode()), Ok(response));
        let push = Push { facts: facts() };
        assert_eq!(Push::decode(&push.encode()), Ok(push));
    }

    #[test]
    fn push_of_a_member_with_its_slots_takes_less_than_200_bytes() {
        let push = Push { facts: facts() };
        assert!(push.encode().len() < 200, "{}", push.encode().len());
    }

    #[test]
    fn truncated_or_padded_message_is_refused() {
        let bytes = Push { facts: facts() }.encode();
        for cut in 0..bytes.len() {
            assert!(Push::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        let padded = [&bytes[..], b"!"].concat();
        let error = Push::decode(&padded).expect_err("padded").to_string();
        assert!(error.contains("1 trailing bytes"), "{error}");
    }

    #[test]
    fn list_above_its_limit_is_refused() {
        let active = |count| vec![facts().active[0]; count];
        let push = |count| Push { facts: Facts { active: active(count), ..Facts::default() } };
        assert!(Push::decode(&push(MAX_MEMBERS).encode()).is_ok());
        let error = Push::decode(&push(MAX_MEMBERS + 1).encode()).expect_err("too many");
        assert!(error.to_string().contains("at most 16384"), "{error}");
        let forgets = vec![
            Forget { node: node(1), round: 1, forced: false, successor: node(2) };
            MAX_MEMBERS + 1
        ];
        let request = Request::Acknowledge { forgets, buckets: Box::default() };
        assert!(Request::decode(&request.encode()).is_err());
        let suspicion = Suspicion { identity: facts().active[0], refutation: 0 };
        let down = vec![suspicion; MAX_MEMBERS + 1];
        let response = Response::Facts { facts: Facts::default(), down, down_as: None };
        assert!(Response::decode(&response.encode()).is_err());
    }

    #[test]
    fn decoded_refusal_is_bounded_and_has_no_control_characters() {
        let text = format!("x\nERROR forged\u{1b}[2J\u{7}{}", "y".repeat(20_000));
        // Indices of the variants Refused and Malformed.
        let bytes = [&[6, 9], &encode(&text)[..]].concat();
        let Ok(Response::Refused(refusal)) = Response::decode(&bytes) else {
            panic!("not a refusal");
        };
        let text = refusal.to_string();
        assert!(text.len() < 3000 && !text.chars().any(char::is_control), "{text:?}");
    }

    #[test]
    fn huge_length_prefix_is_refused() {
        // Marker of a 64-bit varint, then 2^60 members.
        let mut bytes = vec![253];
        bytes.extend_from_slice(&(1_u64 << 60).to_le_bytes());
        assert!(Push::decode(&bytes).is_err());
    }

    #[test]
    fn differing_returns_the_mask_of_differing_buckets() {
        let mut one = Buckets::default();
        let two = Buckets::default();
        assert_eq!(one.differing(&two), 0);
        one.members[0] = 1;
        one.slots[31] = 1;
        assert_eq!(one.differing(&two), 1 | 1 << 31);
    }

    proptest! {
        #[test]
        fn decoding_random_bytes_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = Push::decode(&bytes);
            let _ = Request::decode(&bytes);
            let _ = Response::decode(&bytes);
        }
    }
}
