//! The schedule of comparisons with peers, and what they have confirmed. `sync` carries them out.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    model::{NodeId, Slot, Time},
    wire::Roots,
};

use super::{Target, partners::Partners};

/// Interval of rounds while settled.
const SETTLED_INTERVAL: Duration = Duration::from_secs(10);
/// Interval of rounds while not settled; doubles from the first to the last.
const MIN_UNSETTLED_INTERVAL: Duration = Duration::from_millis(200);
pub(super) const MAX_UNSETTLED_INTERVAL: Duration = Duration::from_secs(1);
/// Interval of the first rounds after the start, and of all rounds while memory is unverified.
const STARTUP_INTERVAL: Duration = Duration::from_millis(250);
const STARTUP_ROUNDS: u64 = 64;

/// The peers that must confirm this node's memory, because it may lack records that the node wrote. While any
/// confirmation is missing, memory is unverified and the node writes no new ownership records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NeededWitnesses {
    /// Memory is verified.
    None,
    /// After a restart: one of the members that owned slots before it. Members that own none may know the
    /// cluster through this node alone.
    AnyOf(BTreeSet<NodeId>),
    /// After the loss of the database: all members that were active when this node returned.
    AllOf(BTreeSet<NodeId>),
}

/// The schedule and the results of comparisons.
pub(super) struct SyncRound {
    pub(super) due: Time,
    /// Unanswered comparisons, for members and seeds separately, so that a silent one does not delay the
    /// other.
    pub(super) open: Open,
    /// Since this node's last change a peer had the same state, apart from facts that cannot be exchanged.
    pub(super) settled: bool,
    /// Whether `settled` was true at any time since the start.
    pub(super) settled_once: bool,
    /// Like `settled`, but without exception: the peer also holds the same members as alive.
    pub(super) agreed: bool,
    /// The present interval of rounds while not settled.
    pub(super) unsettled_interval: Duration,
    pub(super) needed_witnesses: NeededWitnesses,
    /// Members whose state was compared with this node's since the start.
    pub(super) confirmed: BTreeSet<NodeId>,
    /// The slots with kernel entries of no known member; `None` until the kernel was read.
    pub(super) retained: Option<BTreeSet<Slot>>,
    /// Whether kernel entries wait for the confirmation of a slot's owner, or a node that started alone
    /// searches for the others.
    pub(super) is_hurried: bool,
    pub(super) rounds: u64,
    /// The node that answers at each seed, once known.
    pub(super) seeds: Vec<Option<NodeId>>,
    pub(super) partners: Partners,
    /// The last hashes of neighbors that differ from this node's.
    pub(super) differing: BTreeMap<NodeId, Roots>,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Open {
    pub(super) member: bool,
    pub(super) seed: bool,
}

impl Open {
    pub(super) const fn with(&mut self, partner: Target) -> &mut bool {
        match partner {
            Target::Member { .. } => &mut self.member,
            Target::Seed(_) => &mut self.seed,
        }
    }
}

impl SyncRound {
    pub(super) fn new(now: Time, seeds: usize, needed_witnesses: NeededWitnesses) -> Self {
        Self {
            needed_witnesses,
            confirmed: BTreeSet::new(),
            retained: None,
            is_hurried: true,
            due: now,
            open: Open::default(),
            settled: false,
            settled_once: false,
            agreed: false,
            unsettled_interval: MIN_UNSETTLED_INTERVAL,
            rounds: 0,
            seeds: vec![None; seeds],
            partners: Partners::default(),
            differing: BTreeMap::new(),
        }
    }

    /// Returns when the next round is due.
    pub(super) fn due(&self) -> Time {
        self.due
    }

    /// Returns whether this node's memory is verified.
    pub(super) fn synced(&self) -> bool {
        self.needed_witnesses == NeededWitnesses::None
    }

    /// Returns whether this node has compared its state with `node` since the start.
    pub(super) fn is_confirmed(&self, node: NodeId) -> bool {
        self.confirmed.contains(&node)
    }

    /// Returns whether this node has compared its state with any member since the start.
    pub(super) fn has_confirmed(&self) -> bool {
        !self.confirmed.is_empty()
    }

    pub(super) fn require_witnesses(&mut self, needed: NeededWitnesses) {
        self.needed_witnesses = needed;
    }

    pub(super) fn settled(&self) -> bool {
        self.settled
    }

    pub(super) fn settled_once(&self) -> bool {
        self.settled_once
    }

    /// Returns whether the last comparison found no difference at all.
    pub(super) fn agreed(&self) -> bool {
        self.agreed
    }

    pub(super) fn note_seed(&mut self, seed: usize, node: NodeId) {
        // The seed may have been removed before it answered.
        if let Some(known) = self.seeds.get_mut(seed) {
            *known = Some(node);
        }
    }

    pub(super) fn set_seeds(&mut self, seeds: usize) {
        self.seeds = vec![None; seeds];
        self.open.seed = false;
    }

    /// Notes a change, so that the next comparison comes soon.
    pub(super) fn unsettle(&mut self, now: Time) {
        self.agreed = false;
        if std::mem::replace(&mut self.settled, false) {
            // Until the first agreement something may wait for it. Later ones come with a neighbor's packets.
            self.unsettled_interval =
                if self.settled_once { MAX_UNSETTLED_INTERVAL } else { MIN_UNSETTLED_INTERVAL };
        }
        self.due = self.due.min(now + self.unsettled_interval);
    }

    /// Schedules a comparison soon, because a peer knows something that this node does not.
    pub(super) fn suggest(&mut self, now: Time) {
        self.due = self.due.min(now + MIN_UNSETTLED_INTERVAL.max(self.unsettled_interval));
    }

    /// Makes the next comparison due now.
    pub(super) fn hasten(&mut self, now: Time) {
        self.due = self.due.min(now);
    }

    /// Notes that this node has all facts of `peer`, which may verify its memory.
    pub(super) fn verify_memory(&mut self, peer: NodeId) {
        let settled = match &mut self.needed_witnesses {
            NeededWitnesses::None => return,
            NeededWitnesses::AnyOf(peers) => peers.contains(&peer),
            NeededWitnesses::AllOf(peers) => {
                peers.remove(&peer);
                peers.is_empty()
            }
        };
        if settled {
            self.needed_witnesses = NeededWitnesses::None;
        }
    }

    /// Removes a departed witness. Returns whether it was the last of several alternatives: all other members
    /// have to confirm then, because one of them has received the facts of the departed one.
    pub(super) fn drop_witness(&mut self, node: NodeId) -> bool {
        let (NeededWitnesses::AnyOf(witnesses) | NeededWitnesses::AllOf(witnesses)) =
            &mut self.needed_witnesses
        else {
            return false;
        };
        witnesses.remove(&node);
        if !witnesses.is_empty() {
            return false;
        }
        let was_alternative = matches!(self.needed_witnesses, NeededWitnesses::AnyOf(_));
        self.needed_witnesses = NeededWitnesses::None;
        was_alternative
    }

    /// Requires that all other members confirm, if there are any.
    pub(super) fn require_others(&mut self, others: BTreeSet<NodeId>) {
        if !others.is_empty() {
            self.needed_witnesses = NeededWitnesses::AllOf(others);
        }
    }

    /// Returns the peers that can help to verify memory.
    pub(super) fn witnesses(&self) -> Option<&BTreeSet<NodeId>> {
        match &self.needed_witnesses {
            NeededWitnesses::None => None,
            NeededWitnesses::AnyOf(peers) | NeededWitnesses::AllOf(peers) => Some(peers),
        }
    }

    /// Returns the interval to the next round.
    pub(super) fn interval(&self) -> Duration {
        match self.settled {
            _ if self.is_starting() => STARTUP_INTERVAL,
            true if self.is_hurried => MAX_UNSETTLED_INTERVAL,
            true => SETTLED_INTERVAL,
            false => self.unsettled_interval,
        }
    }

    /// Returns whether memory is unverified, or the start is recent and something waits for comparisons.
    pub(super) fn is_starting(&self) -> bool {
        !self.synced() || self.is_hurried && self.rounds < STARTUP_ROUNDS
    }

    /// Notes that a neighbor's packet has shown the same state. Returns whether the last comparison or packet
    /// had shown another one.
    pub(super) fn note_equal_roots(&mut self, now: Time, peer: NodeId) -> bool {
        self.verify_memory(peer);
        self.differing.remove(&peer);
        let was_settled = std::mem::replace(&mut self.settled, true);
        self.settled_once = true;
        if !was_settled {
            self.due = now + self.interval();
        }
        !std::mem::replace(&mut self.agreed, true)
    }

    pub(super) fn complete(&mut self, now: Time, peer: NodeId, same: bool) {
        self.verify_memory(peer);
        self.agreed = false;
        self.settled = same;
        self.settled_once |= same;
        self.due = now + self.interval();
    }
}
