//! What nodes say to each other beside SWIM: pushed facts, and questions with answers.
//!
//! Enums are only ever appended to; a published struct never changes its fields.

use std::{net::IpAddr, ops::RangeInclusive};

use serde::{Deserialize, Serialize};

use crate::model::{
    ClusterId, ClusterRecord, Difference, Forget, Identity, Incarnation, MemberRecord, NodeId,
    Quorum, Run, SettingsWish, Suspicion, Text, bounded,
};

use super::{
    Inquiry, Report, WireError,
    codec::{decode, encode},
};

/// Replicated state, or a part of it. Merging it twice, or in another order, changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    #[serde(deserialize_with = "bounded::members")]
    pub members: Vec<MemberRecord>,
    #[serde(deserialize_with = "bounded::runs")]
    pub slots: Vec<Run>,
    /// Members that the sender holds as alive, in the incarnation it knows.
    #[serde(deserialize_with = "bounded::members")]
    pub active: Vec<Identity>,
    #[serde(deserialize_with = "bounded::members")]
    pub forgets: Vec<Forget>,
}

impl Facts {
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
            && self.slots.is_empty()
            && self.active.is_empty()
            && self.forgets.is_empty()
    }
}

/// Facts that were new to the sender, told at once to those who may not have them yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Push {
    pub facts: Facts,
}

/// Asked on a stream of its own; each gets exactly one [`Response`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// "Let me in": from a node that knows no cluster record yet.
    Hello(Hello),
    /// "Is your state the same as mine?"
    Compare(Roots),
    /// "Here is mine in these buckets; what do you have beyond it?"
    Exchange { buckets: u32, identity: Identity, facts: Facts },
    /// "Give me a slot of yours."
    Grant(GrantWish),
    /// "I am leaving; would you take my slots?"
    BeMySuccessor,
    /// "I have left; these are the records of it. Say that you have them."
    Handover(Facts),
    /// "You did not answer me. If you are alive, refute that."
    AreYouThere(Suspicion),
    /// "These nodes are gone and I am their successor. Make that durable, and tell me what I lack."
    Acknowledge {
        #[serde(deserialize_with = "bounded::members")]
        forgets: Vec<Forget>,
        buckets: Box<Buckets>,
    },
    /// "This is our rule. Have you missed that member for so long yourself?"
    HaveYouMissed { node: NodeId, quorum: Quorum },
    /// An operator's question, or order.
    Inquire(Inquiry),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    Welcome(Box<Welcome>),
    /// States are equal.
    Same,
    /// They are not; these are mine.
    Differ(Box<Buckets>),
    /// What the asker lacked; members that it holds as alive and the asked one as down. If the asker itself
    /// is not held as alive, also the newest incarnation that is known of it, or the first possible one: it
    /// must go above that to be believed.
    Facts {
        facts: Facts,
        #[serde(deserialize_with = "bounded::members")]
        down: Vec<Suspicion>,
        down_as: Option<Incarnation>,
    },
    /// The asker owns these slots now (also when it asked before). Flushed at the granter.
    Granted(Facts),
    Accepted,
    Refused(Refusal),
    /// The asked one is alive, under this count of refutations.
    Here(Suspicion),
    /// It is durable; this is what the asker lacked.
    Acknowledged(Facts),
    Vote(Vote),
    Report(Box<Report>),
}

/// What a voter has seen of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Vote {
    /// Nothing for as long as the rule says.
    Missed,
    Seen,
    /// The asked one is no voter, or by another rule.
    OtherRule,
}

/// A joiner's introduction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub member: MemberRecord,
    pub identity: Identity,
    pub settings: SettingsWish,
    pub grant: GrantWish,
}

/// Which slot a node would like. Asking again for the same reason gets the same slot: the granter
/// sees in its table that the asker owns one already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantWish {
    /// First address of the subnet it would prefer.
    pub prefer: Option<IpAddr>,
}

/// Everything a joiner needs, its own slot included if this node had one free.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    pub cluster: ClusterRecord,
    pub facts: Facts,
    /// The joiner has been here before, as another process: it has lost its memory.
    pub returning: bool,
    /// Why `facts` holds no slot for the joiner, if it does not.
    pub no_slot: Option<Refusal>,
}

/// One hash per kind of fact: all there is to say when nothing differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Roots {
    pub members: u64,
    pub slots: u64,
    pub active: u64,
}

/// One hash per bucket and kind of fact: members fall into a bucket by id, slots by number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buckets {
    pub members: [u64; Self::COUNT],
    pub slots: [u64; Self::COUNT],
    pub active: [u64; Self::COUNT],
}

impl Buckets {
    pub const COUNT: usize = 32;

    /// The buckets in which two states differ, as a bit mask.
    pub fn differing(&self, other: &Self) -> u32 {
        (0..Self::COUNT)
            .filter(|&i| {
                self.members[i] != other.members[i]
                    || self.slots[i] != other.slots[i]
                    || self.active[i] != other.active[i]
            })
            .fold(0, |mask, i| mask | 1 << i)
    }

    /// The bucket of a node, by the first bits of its id (a hash, so evenly spread).
    pub const fn of_node(node: NodeId) -> usize {
        (node.as_bytes()[0] >> 3) as usize
    }

    /// All nodes whose bucket this is.
    pub fn nodes(bucket: usize) -> RangeInclusive<NodeId> {
        let (mut first, mut last) = ([0; 8], [0xff; 8]);
        first[0] = (bucket << 3) as u8;
        last[0] = first[0] | 7;
        NodeId::from_bytes(first)..=NodeId::from_bytes(last)
    }
}

/// Why a node said no. Every variant is one sentence with its cause and, where there is one, the fix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    #[error(
        "the node belongs to cluster {theirs}, this one to {ours}: clusters never merge; \
         join with a token of cluster {theirs}, or remove the state directory first"
    )]
    OtherCluster { ours: ClusterId, theirs: ClusterId },
    #[error("{0}: change the joiner's setting or leave it out")]
    Settings(Difference),
    #[error("the node is not in a cluster yet itself")]
    NotReady,
    #[error(
        "the node has not compared its state with a peer since it started, so it grants nothing"
    )]
    NotSynced,
    #[error("all {total} subnets are leased: {leased} leased, none free; use a larger network")]
    Exhausted { total: u32, leased: u32 },
    #[error("the node has no free subnet: {free_elsewhere} are free at other nodes")]
    NoFreeSlotHere { free_elsewhere: u32 },
    #[error("this node has left the cluster for good, and can only join as a new one")]
    Left,
    #[error("the node is leaving the cluster itself")]
    Leaving,
    #[error("the cluster knows {limit} members, departed ones included, and records no more")]
    Full { limit: u32 },
    #[error("the request was not understood: {0}")]
    Unreadable(Text),
    #[error("this node was forgotten: its subnets belong to {successor} now")]
    Forgotten { successor: NodeId },
    #[error("another process runs with this node's key, so neither grants anything")]
    Cloned,
    #[error("what this node says about itself cannot be used: {0}: correct its settings")]
    Unfit(Text),
}

macro_rules! payload {
    ($($name:ident: $what:literal),+) => {$(
        impl $name {
            pub fn encode(&self) -> Vec<u8> {
                encode(self)
            }

            pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
                decode($what, bytes)
            }
        }
    )+};
}

payload!(Push: "push", Request: "request", Response: "response");

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
    fn messages_round_trip() {
        let request =
            Request::Exchange { buckets: 0xffff_0000, identity: facts().active[0], facts: facts() };
        assert_eq!(Request::decode(&request.encode()), Ok(request));
        let response = Response::Refused(Refusal::Exhausted { total: 255, leased: 255 });
        assert_eq!(Response::decode(&response.encode()), Ok(response));
        let push = Push { facts: facts() };
        assert_eq!(Push::decode(&push.encode()), Ok(push));
    }

    #[test]
    fn a_member_with_its_grant_fits_one_datagram_many_times_over() {
        let push = Push { facts: facts() };
        assert!(push.encode().len() < 200, "{}", push.encode().len());
    }

    #[test]
    fn cut_off_and_padded_messages_are_refused() {
        let bytes = Push { facts: facts() }.encode();
        for cut in 0..bytes.len() {
            assert!(Push::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        let padded = [&bytes[..], b"!"].concat();
        let error = Push::decode(&padded).expect_err("padded").to_string();
        assert!(error.contains("1 bytes are left over"), "{error}");
    }

    #[test]
    fn list_that_is_longer_than_any_cluster_needs_is_refused() {
        let named = |count| vec![facts().active[0]; count];
        let push = |count| Push { facts: Facts { active: named(count), ..Facts::default() } };
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
    fn text_of_a_refusal_obeys_no_terminal_once_it_is_decoded() {
        let text = format!("x\nERROR forged\u{1b}[2J\u{7}{}", "y".repeat(20_000));
        // Numbers of the variants Refused and Unreadable.
        let bytes = [&[6, 9], &encode(&text)[..]].concat();
        let Ok(Response::Refused(refusal)) = Response::decode(&bytes) else {
            panic!("not a refusal");
        };
        let said = refusal.to_string();
        assert!(said.len() < 3000 && !said.chars().any(char::is_control), "{said:?}");
    }

    #[test]
    fn a_huge_length_prefix_is_refused_without_allocating() {
        // varint marker for u64, then 2^60 members
        let mut bytes = vec![253];
        bytes.extend_from_slice(&(1_u64 << 60).to_le_bytes());
        assert!(Push::decode(&bytes).is_err());
    }

    #[test]
    fn differing_buckets_are_named() {
        let mut one = Buckets::default();
        let two = Buckets::default();
        assert_eq!(one.differing(&two), 0);
        one.members[0] = 1;
        one.slots[31] = 1;
        assert_eq!(one.differing(&two), 1 | 1 << 31);
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = Push::decode(&bytes);
            let _ = Request::decode(&bytes);
            let _ = Response::decode(&bytes);
        }
    }
}
