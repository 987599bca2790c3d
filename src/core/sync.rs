//! Comparing states with one peer at a time, so that whatever was missed is found.
//!
//! A round sends three hashes to a random member, one that gossip holds as down included, or to a seed
//! that is not in view: islands and healed partitions find together this way, for ever. Only what
//! differs is exchanged; where nothing does, a round costs its hashes.

use std::{collections::BTreeSet, time::Duration};

use rand::prelude::IndexedRandom as _;

use crate::{
    model::{MemberRecord, NodeId, Time},
    wire::{Buckets, Facts, Request, Response, Roots},
};

use super::{
    Answer, CallError, Node, Purpose, Target,
    learn::Learned,
    malformed::Kind,
    partners::Partners,
    planted::{Bug, planted},
    rank::state_hash,
};

/// Between rounds when the last one found no difference.
const CALM: Duration = Duration::from_secs(10);
/// Between rounds while something has changed, or differed, since: doubling from the first to the last.
const BUSY_FIRST: Duration = Duration::from_millis(200);
const BUSY_LAST: Duration = Duration::from_secs(1);
/// Between rounds right after the start, and while this node's own memory is in doubt.
const FIRST: Duration = Duration::from_millis(250);
const FIRST_ROUNDS: u64 = 64;
/// In clusters up to this size; in larger ones members get to know each other more slowly, for most of them
/// have to be connected to first. At most as slowly as they compare for ever.
const COMPARED_EACH_SECOND: u32 = 100;
/// The view is re-created when one in so many of those heard are new to it, or after so many rounds.
const VIEW_SHARE: usize = 16;
const VIEW_ROUNDS: u64 = 16;

/// Whether this node's own memory may lack records that it wrote, and who can tell. While in doubt it
/// writes no new ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    None,
    /// After a restart: members that owned slots before it. A joiner that knows the cluster through this
    /// node alone owns none and proves nothing.
    AnyOf(BTreeSet<NodeId>),
    /// After the loss of the database: everybody who was there when this node came back.
    AllOf(BTreeSet<NodeId>),
}

pub(super) struct SyncRound {
    due: Time,
    /// Whether a comparison is under way with a member, and with a seed: one that is silent for long must not
    /// hold up the other.
    open: Open,
    /// A peer's state equalled ours after our last change, but for what cannot be taken over.
    settled: bool,
    /// That was so at some time since the start.
    settled_once: bool,
    /// And was the same without exception: that peer holds the same members as alive.
    agreed: bool,
    /// The present pause between rounds, while not settled.
    busy: Duration,
    doubt: Doubt,
    /// Members compared with since the start: what the table says of their slots was true at that moment.
    heard: BTreeSet<NodeId>,
    /// Those among them whom the view does not reflect yet.
    newly_confirmed: usize,
    /// How many members are active.
    others: u32,
    /// There are active members among those who were not heard.
    curious: bool,
    rounds: u64,
    /// Which node answers at each seed, once known.
    seeds: Vec<Option<NodeId>>,
    pub(super) partners: Partners,
}

#[derive(Clone, Copy, Default)]
struct Open {
    member: bool,
    seed: bool,
}

impl Open {
    const fn with(&mut self, partner: Target) -> &mut bool {
        match partner {
            Target::Member { .. } => &mut self.member,
            Target::Seed(_) => &mut self.seed,
        }
    }
}

impl SyncRound {
    pub(super) fn new(now: Time, seeds: usize, doubt: Doubt) -> Self {
        Self {
            doubt,
            heard: BTreeSet::new(),
            newly_confirmed: 0,
            others: 0,
            curious: true,
            due: now,
            open: Open::default(),
            settled: false,
            settled_once: false,
            agreed: false,
            busy: BUSY_FIRST,
            rounds: 0,
            seeds: vec![None; seeds],
            partners: Partners::default(),
        }
    }

    pub(super) fn due(&self) -> Time {
        self.due
    }

    /// This node's memory of what it wrote itself is beyond doubt.
    pub(super) fn synced(&self) -> bool {
        self.doubt == Doubt::None
    }

    pub(super) fn heard(&self, node: NodeId) -> bool {
        self.heard.contains(&node)
    }

    /// Some member was compared with since the start.
    pub(super) fn has_confirmed(&self) -> bool {
        !self.heard.is_empty()
    }

    pub(super) fn doubt(&mut self, doubt: Doubt) {
        self.doubt = doubt;
    }

    pub(super) fn settled(&self) -> bool {
        self.settled
    }

    pub(super) fn settled_once(&self) -> bool {
        self.settled_once
    }

    /// Whether the last comparison found no difference at all.
    pub(super) fn agreed(&self) -> bool {
        self.agreed
    }

    pub(super) fn note_seed(&mut self, seed: usize, node: NodeId) {
        // One that is none any more may still have answered.
        if let Some(known) = self.seeds.get_mut(seed) {
            *known = Some(node);
        }
    }

    pub(super) fn set_seeds(&mut self, seeds: usize) {
        self.seeds = vec![None; seeds];
        self.open.seed = false;
    }

    /// Something changed: compare soon.
    pub(super) fn unsettle(&mut self, now: Time) {
        self.agreed = false;
        if std::mem::replace(&mut self.settled, false) {
            self.busy = BUSY_FIRST;
        }
        self.due = self.due.min(now + self.busy);
    }

    /// A peer told of what is not known here: compare within the pace of a change.
    pub(super) fn suggest(&mut self, now: Time) {
        self.due = self.due.min(now + BUSY_FIRST.max(self.busy));
    }

    /// Compare now.
    pub(super) fn hasten(&mut self, now: Time) {
        self.due = self.due.min(now);
    }

    /// We have all that `peer` had.
    pub(super) fn witness(&mut self, peer: NodeId) {
        let settled = match &mut self.doubt {
            Doubt::None => return,
            Doubt::AnyOf(peers) => peers.contains(&peer),
            Doubt::AllOf(peers) => {
                peers.remove(&peer);
                peers.is_empty()
            }
        };
        if settled {
            self.doubt = Doubt::None;
        }
    }

    pub(super) fn lose_witness(&mut self, node: NodeId, others: BTreeSet<NodeId>) {
        let (Doubt::AnyOf(witnesses) | Doubt::AllOf(witnesses)) = &mut self.doubt else { return };
        witnesses.remove(&node);
        if witnesses.is_empty() {
            self.doubt = match &self.doubt {
                Doubt::AnyOf(_) if !others.is_empty() => Doubt::AllOf(others),
                _ => Doubt::None,
            };
        }
    }

    /// Whom to ask first.
    fn witnesses(&self) -> Option<&BTreeSet<NodeId>> {
        match &self.doubt {
            Doubt::None => None,
            Doubt::AnyOf(peers) | Doubt::AllOf(peers) => Some(peers),
        }
    }

    /// Until the next round.
    fn pause(&self) -> Duration {
        match self.settled {
            _ if self.is_new() => FIRST,
            true if self.curious => {
                (BUSY_LAST * (self.others / COMPARED_EACH_SECOND).max(1)).min(CALM)
            }
            true => CALM,
            false => self.busy,
        }
    }

    /// This node is not sure of its own memory yet, or has only just begun to hear the others.
    fn is_new(&self) -> bool {
        !self.synced() || self.curious && self.rounds < FIRST_ROUNDS
    }

    fn complete(&mut self, now: Time, peer: NodeId, same: bool) {
        self.witness(peer);
        self.agreed = false;
        self.settled = same;
        self.settled_once |= same;
        self.due = now + self.pause();
    }
}

impl Node {
    pub(super) fn step_sync(&mut self, now: Time) {
        self.clear_duplicate(now);
        if self.home.is_none() || now < self.sync.due {
            return;
        }
        let base = self.sync.pause();
        self.sync.busy = (self.sync.busy * 2).min(BUSY_LAST);
        self.sync.due = now + self.jittered(base);
        let unconfirmed = |node: NodeId| !self.sync.heard(node) && !self.is_gone(node);
        // Without a creator everybody begins alone, and finds the others by its seeds.
        let is_lonely = self.config.assigned.is_some() && self.is_alone();
        self.sync.curious = is_lonely || self.membership.others().any(unconfirmed);
        self.sync.others = self.membership.others().count() as u32;
        let directory = &self.directory;
        self.sync.partners.keep_only(|node| directory.get(node).is_some());
        if self.is_alone() {
            (self.sync.settled, self.sync.settled_once, self.sync.agreed) = (true, true, true);
        }
        let partner = self.choose_partner(now, self.sync.rounds + 1);
        // A round in which no member could be asked is none.
        self.sync.rounds += u64::from(partner.is_some());
        let is_turn = !self.sync.curious || self.sync.rounds.is_multiple_of(VIEW_ROUNDS);
        self.view_stale |= is_turn && std::mem::take(&mut self.sync.newly_confirmed) > 0;
        let Some(partner) = partner else { return };
        *self.sync.open.with(partner) = true;
        let request = Request::Compare(self.buckets().roots());
        self.call(partner, Purpose::Compare { partner }, &request);
    }

    /// In every second round one who can end a doubt or was not heard yet; it may be out of reach for long,
    /// so in the others any member. Mostly active ones; every fourth round anybody; a seed that is not in
    /// view every other one.
    fn choose_partner(&mut self, now: Time, rounds: u64) -> Option<Target> {
        let me = self.me.node;
        let missing: Vec<usize> = (0..self.sync.seeds.len())
            .filter(|&seed| {
                self.sync.seeds[seed]
                    .is_none_or(|node| node != me && !self.membership.is_active(node))
            })
            .collect();
        let witness = |node: &NodeId| match self.sync.witnesses() {
            Some(witnesses) => witnesses.contains(node),
            None => !self.sync.heard.contains(node),
        };
        let any = rounds.is_multiple_of(4) && !planted(Bug::NoAnnounceAfterHeal);
        let choosy = rounds % 4 < 2;
        let everybody: Vec<&MemberRecord> = self.directory.peers(me).collect();
        let may_ask = |record: &&&MemberRecord| {
            self.sync.partners.may_ask(now, record.node, everybody.len() == 1)
                || planted(Bug::SilentTwice)
        };
        let all: Vec<&MemberRecord> = everybody.iter().filter(may_ask).copied().collect();
        let wanted = |record: &&&MemberRecord| {
            (any || self.membership.is_active(record.node)) && (!choosy || witness(&record.node))
        };
        let preferred: Vec<&MemberRecord> = all.iter().filter(wanted).copied().collect();
        let from = match preferred.is_empty() {
            true if planted(Bug::NoAnnounceAfterHeal) => &preferred,
            true => &all,
            false => &preferred,
        };
        let peer = from
            .choose(&mut self.rng)
            .filter(|_| !self.sync.open.member)
            .map(|record| Target::Member { node: record.node, address: record.address });
        let turn = (rounds / 2) as usize;
        let missing = if planted(Bug::NoAnnounceAfterHeal) { Vec::new() } else { missing };
        if !missing.is_empty()
            && !self.sync.open.seed
            && (!rounds.is_multiple_of(2) || peer.is_none())
        {
            return Some(Target::Seed(missing[turn % missing.len()]));
        }
        peer
    }

    /// A comparison with `peer` succeeded; `same` if it found no difference.
    pub(super) fn compared(&mut self, now: Time, peer: NodeId, same: bool) {
        self.hear(peer);
        self.sync.partners.note_answer(peer);
        self.sync.complete(now, peer, same);
    }

    /// What is known of a peer's slots is its own word. Entries in the kernel may be judged by that now; in a
    /// large cluster not after each of them, for that takes a look at all.
    fn hear(&mut self, peer: NodeId) {
        let SyncRound { heard, newly_confirmed, .. } = &mut self.sync;
        *newly_confirmed += usize::from(heard.insert(peer));
        if *newly_confirmed * VIEW_SHARE >= heard.len() {
            self.view_stale |= std::mem::take(newly_confirmed) > 0;
        }
    }

    pub(super) fn on_compare_answer(&mut self, now: Time, partner: Target, answer: Answer) {
        *self.sync.open.with(partner) = false;
        if let (Target::Seed(seed), Ok((from, _))) = (partner, &answer) {
            self.sync.note_seed(seed, *from);
        }
        match answer {
            Ok((from, Response::Same)) => {
                self.counters.syncs_same += 1;
                self.sync.partners.note_agreement(from);
                self.notes.forgive(from);
                self.compared(now, from, true);
                self.sync.agreed = true;
                self.recheck_forgets(now);
                self.replace_predecessor(now);
            }
            Ok((from, Response::Differ(theirs))) => {
                self.counters.syncs_different += 1;
                let buckets = self.buckets().differing(&theirs);
                let facts = self.facts_in(buckets);
                let identity = self.membership.identity();
                let request = Request::Exchange { buckets, identity, facts };
                // To the same place: of a member that has moved our record may be old.
                *self.sync.open.with(partner) = true;
                self.call(partner, Purpose::Exchange { partner, with: from }, &request);
            }
            Ok((from, Response::Refused(refusal))) => {
                self.sync.partners.note_silence(now, from);
                if let Some(count) = self.note(from, Kind::RefusesComparison, 1, "") {
                    tracing::warn!(peer = %from, count, %refusal, "comparison refused");
                }
                self.on_expulsion(&refusal);
            }
            Ok((from, _)) => {
                self.sync.partners.note_silence(now, from);
                self.note_malformed(from, &"no answer to a comparison");
            }
            Err(error) => {
                if let (Target::Seed(seed), CallError::Myself) = (partner, &error) {
                    self.sync.note_seed(seed, self.me.node);
                }
                if let Target::Member { node, .. } = partner {
                    self.sync.partners.note_silence(now, node);
                }
                tracing::debug!(?partner, %error, "no comparison");
            }
        }
    }

    pub(super) fn on_exchange_answer(
        &mut self,
        now: Time,
        partner: Target,
        with: NodeId,
        answer: Answer,
    ) {
        *self.sync.open.with(partner) = false;
        match answer {
            Ok((from, Response::Facts { facts, down, down_as })) => {
                let Learned { new, refused } = self.learn(now, &facts, Some(from));
                let doubted = self.doubted(now, &down);
                let has_told = new || !doubted.is_empty() || down_as.is_some();
                self.suspect(now, doubted);
                tracing::debug!(peer = %from, has_told, refused, "exchanged");
                // Facts are facts from anybody, but only whoever was compared with has told all it had.
                if from == with {
                    // Of what cannot be taken over nothing else follows: the member has all of ours now, and
                    // this node all of its that can be true.
                    let is_odd =
                        self.sync.partners.is_fruitless(from, has_told) || refused && !has_told;
                    if !refused {
                        self.notes.forgive(from);
                    }
                    let is_settled = is_odd && !planted(Bug::OddPeersUnsettle);
                    self.compared(now, from, is_settled);
                    if is_settled {
                        self.recheck_forgets(now);
                    }
                }
                if let Some(incarnation) = down_as {
                    self.rise_above(now, incarnation);
                    self.sync.hasten(now);
                }
            }
            Ok((from, other)) => self.note_unexpected(from, &other, "no answer to an exchange"),
            Err(error) => {
                if let Target::Member { node, .. } = partner {
                    self.sync.partners.note_silence(now, node);
                }
                tracing::debug!(%error, "exchange cut off");
            }
        }
    }

    pub(super) fn buckets(&self) -> Buckets {
        Buckets {
            members: self.directory.hashes(),
            slots: self.home.as_ref().map_or([0; Buckets::COUNT], |home| home.slots.hashes()),
            active: self.membership.hashes(self.directory.gone()),
        }
    }

    /// Our facts in the buckets of a mask.
    pub(super) fn facts_in(&self, mask: u32) -> Facts {
        let wanted = |bucket: &usize| mask & (1 << bucket) != 0;
        let buckets: Vec<usize> = (0..Buckets::COUNT).filter(wanted).collect();
        let members = buckets.iter().flat_map(|b| self.directory.bucket(*b).cloned()).collect();
        let forgets = buckets.iter().flat_map(|b| self.directory.forgets_in(*b).copied()).collect();
        let slots = self
            .home
            .iter()
            .filter(|_| !planted(Bug::NeverExchangeSlots))
            .flat_map(|home| buckets.iter().flat_map(|bucket| home.slots.bucket(*bucket)))
            .collect();
        let active = self
            .active()
            .into_values()
            .filter(|identity| wanted(&Buckets::of_node(identity.node)))
            .collect();
        Facts { members, slots, active, forgets }
    }
}

impl Buckets {
    pub(super) fn roots(&self) -> Roots {
        let root = |hashes: &[u64; Self::COUNT]| {
            state_hash(&hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect::<Vec<_>>())
        };
        Roots { members: root(&self.members), slots: root(&self.slots), active: root(&self.active) }
    }
}
