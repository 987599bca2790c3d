//! Comparison of states with one peer at a time, which finds every missed fact.
//!
//! A round sends three hashes to a random member, also one considered down, or to a seed that is not an
//! active member. So a partition that has healed is always noticed. Only the differing buckets are exchanged;
//! without a difference a round costs three hashes.

use std::collections::{BTreeMap, BTreeSet};

use rand::prelude::IndexedRandom as _;

use crate::{
    model::{Identity, MemberRecord, NodeId, Time},
    wire::{Buckets, Facts, Request, Response, Roots},
};

use super::{
    Answer, CallError, Node, Purpose, Target, comparisons::MAX_UNSETTLED_INTERVAL,
    learn::MergeResult, malformed::Kind, membership::Membership, outbox::Outbox, rank::state_hash,
    replica::Replica,
};

/// Every so many rounds the partner is a random active member instead of a neighbor.
const RANDOM_PARTNER_ROUNDS: u64 = 16;
/// Which of these rounds: one in which neither a useful member nor one that is down has a turn.
const RANDOM_PARTNER_ROUND: u64 = 2;

impl Replica {
    /// Confirms a peer: the known records of its slots are its own statement. Kernel entries for them can be
    /// checked from then on.
    pub(super) fn confirm(&mut self, outbox: &mut Outbox, peer: NodeId) {
        if self.sync.confirmed.contains(&peer) {
            return;
        }
        let is_awaited = self.sync.retained.is_none() || self.awaited_owners().contains(&peer);
        self.sync.confirmed.insert(peer);
        if is_awaited {
            outbox.invalidate_view();
        }
    }

    /// Returns the owners whose confirmation decides about kernel entries of no known member.
    pub(super) fn awaited_owners(&self) -> BTreeSet<NodeId> {
        let Some(cluster_state) = &self.cluster_state else { return BTreeSet::new() };
        let records = self.sync.retained.iter().flatten();
        let owners = records.filter(|slot| !self.reassigned.contains(slot));
        let owners = owners.filter_map(|slot| cluster_state.slots.record(*slot));
        let owners = owners.map(|record| record.owner);
        let is_awaited = |owner: &NodeId| {
            *owner != self.me.node && !self.sync.is_confirmed(*owner) && !self.is_gone(*owner)
        };
        owners.filter(is_awaited).collect()
    }

    /// Notes a successful comparison with `peer`; `same` if it found no difference.
    pub(super) fn note_comparison(
        &mut self,
        outbox: &mut Outbox,
        now: Time,
        peer: NodeId,
        same: bool,
    ) {
        self.confirm(outbox, peer);
        self.sync.partners.note_answer(peer);
        self.sync.complete(now, peer, same);
    }

    /// Returns the hashes of this node's state, by bucket.
    pub(super) fn buckets(&self, membership: &Membership) -> Buckets {
        let active = membership.identities();
        // Gossip may hold a member as active for a while after it has left or was forgotten.
        let active = if self.directory.gone_count() < active.len() {
            membership.hashes(self.directory.gone().filter_map(|node| membership.active_as(node)))
        } else {
            membership.hashes(active.values().filter(|member| self.is_gone(member.node)).copied())
        };
        Buckets { active, ..self.buckets_with_gone(membership) }
    }

    /// Returns the same with the active members that are gone. If two results are equal, so are those of
    /// [`Self::buckets`], whose time grows with the number of members.
    fn buckets_with_gone(&self, membership: &Membership) -> Buckets {
        Buckets {
            members: self.directory.hashes(),
            slots: self
                .cluster_state
                .as_ref()
                .map_or([0; Buckets::COUNT], |cluster_state| cluster_state.slots.hashes()),
            active: membership.hashes(std::iter::empty()),
        }
    }

    /// Returns this node's facts in the buckets of a bit mask, with the members of `active` in them.
    pub(super) fn facts_in(&self, mask: u32, active: BTreeMap<NodeId, Identity>) -> Facts {
        let wanted = |bucket: &usize| mask & (1 << bucket) != 0;
        let buckets: Vec<usize> = (0..Buckets::COUNT).filter(wanted).collect();
        let members = buckets.iter().flat_map(|b| self.directory.bucket(*b).cloned()).collect();
        let forgets = buckets.iter().flat_map(|b| self.directory.forgets_in(*b).copied()).collect();
        let slots = self
            .cluster_state
            .iter()
            .flat_map(|cluster_state| {
                buckets.iter().flat_map(|bucket| cluster_state.slots.bucket(*bucket))
            })
            .collect();
        let active = active
            .into_values()
            .filter(|identity| wanted(&Buckets::of_node(identity.node)))
            .collect();
        Facts { members, slots, active, forgets }
    }
}

impl Node {
    /// Returns the hashes of all state that members agree on.
    pub(super) fn present_roots(&mut self) -> Roots {
        let buckets = self.replica.buckets_with_gone(&self.membership);
        if let Some((_, roots)) = self.last_roots.as_ref().filter(|(last, _)| *last == buckets) {
            debug_assert_eq!(*roots, self.roots(), "equal buckets have equal roots");
            return *roots;
        }
        let roots = self.roots();
        self.last_roots = Some((buckets, roots));
        roots
    }

    pub(super) fn step_sync(&mut self, now: Time) {
        self.clear_duplicate(now);
        if self.replica.cluster_state.is_none() || now < self.replica.sync.due {
            return;
        }
        let base = self.replica.sync.interval();
        self.replica.sync.unsettled_interval =
            (self.replica.sync.unsettled_interval * 2).min(MAX_UNSETTLED_INTERVAL);
        self.replica.sync.due = now + self.jittered(base);
        // Without a creator each node starts alone and finds the others through its seeds.
        let is_lonely = self.config.assigned.is_some() && self.is_alone();
        let awaited = self.replica.awaited_owners();
        self.replica.sync.is_hurried = is_lonely || !awaited.is_empty();
        let directory = &self.replica.directory;
        self.replica.sync.partners.retain(|node| directory.get(node).is_some());
        let neighbors = self.membership.neighbors();
        self.replica.sync.differing.retain(|node, _| neighbors.contains(node));
        if self.is_alone() {
            (self.replica.sync.settled, self.replica.sync.settled_once, self.replica.sync.agreed) =
                (true, true, true);
        }
        let partner = self.choose_partner(now, self.replica.sync.rounds + 1, &awaited);
        // Rounds without a partner do not count.
        self.replica.sync.rounds += u64::from(partner.is_some());
        let Some(partner) = partner else { return };
        *self.replica.sync.open.with(partner) = true;
        let request = Request::Compare(self.present_roots());
        self.call(partner, Purpose::Compare { partner }, &request);
    }

    /// Chooses the partner of a round. Two of four rounds prefer members that can verify memory, or else the
    /// owners whose confirmation kernel entries wait for (`awaited`). The other two do not, because the
    /// preferred ones may be unreachable for long: they take a neighbor, rarely any active member, and every
    /// fourth round takes a member considered down, if there is one. Every second round takes a seed, if one
    /// is not an active member.
    fn choose_partner(
        &mut self,
        now: Time,
        rounds: u64,
        awaited: &BTreeSet<NodeId>,
    ) -> Option<Target> {
        let me = self.replica.me.node;
        let ours = self.present_roots();
        let absent_seeds: Vec<usize> = (0..self.replica.sync.seeds.len())
            .filter(|&seed| {
                self.replica.sync.seeds[seed]
                    .is_none_or(|node| node != me && !self.membership.is_active(node))
            })
            .collect();
        let useful = self.replica.sync.witnesses().unwrap_or(awaited);
        let peers: Vec<&MemberRecord> = self.replica.directory.peers(me).collect();
        let may_compare = |record: &&&MemberRecord| {
            self.replica.sync.partners.may_compare(now, record.node, peers.len() == 1)
        };
        let all: Vec<&MemberRecord> = peers.iter().filter(may_compare).copied().collect();
        let is_active = |node: NodeId| self.membership.is_active(node);
        let is_neighbor = |node: NodeId| self.membership.neighbors().contains(&node);
        let differing = &self.replica.sync.differing;
        let is_differing = |node: NodeId| {
            is_neighbor(node) && differing.get(&node).is_some_and(|theirs| *theirs != ours)
        };
        let of = |wanted: &dyn Fn(NodeId) -> bool| -> Vec<&MemberRecord> {
            all.iter().filter(|record| wanted(record.node)).copied().collect()
        };
        let is_useful = |node: NodeId| useful.contains(&node);
        let mut preferred = match rounds % 4 {
            0 => of(&is_useful),
            1 => of(&|node| is_useful(node) && is_active(node)),
            _ => Vec::new(),
        };
        let mut or_else = |is_turn: bool, wanted: &dyn Fn(NodeId) -> bool| {
            if is_turn && preferred.is_empty() {
                preferred = of(wanted);
            }
        };
        or_else(rounds.is_multiple_of(4), &|node| !is_active(node));
        or_else(rounds % RANDOM_PARTNER_ROUNDS == RANDOM_PARTNER_ROUND, &is_active);
        or_else(true, &is_differing);
        or_else(true, &is_neighbor);
        let from = if preferred.is_empty() { &all } else { &preferred };
        let peer = from
            .choose(&mut self.rng)
            .filter(|_| !self.replica.sync.open.member)
            .map(|record| Target::Member { node: record.node, address: record.address });
        let turn = (rounds / 2) as usize;
        if !absent_seeds.is_empty()
            && !self.replica.sync.open.seed
            && (!rounds.is_multiple_of(2) || peer.is_none())
        {
            return Some(Target::Seed(absent_seeds[turn % absent_seeds.len()]));
        }
        peer
    }

    /// Handles the hashes in a packet of a member. Equal ones are as good as a comparison.
    pub(super) fn note_roots(&mut self, now: Time, from: NodeId, theirs: Roots) {
        if self.replica.cluster_state.is_none() || self.replica.directory.get(from).is_none() {
            return;
        }
        if self.present_roots() == theirs {
            self.replica.sync.partners.note_agreement(from);
            self.replica.confirm(&mut self.outbox, from);
            if self.replica.sync.note_equal_roots(now, from) {
                self.notes.clear_refused(from);
                self.recheck_forgets(now);
                self.replace_predecessor(now);
            }
        } else if !self.replica.sync.partners.is_irreconcilable(from) {
            self.replica.sync.differing.insert(from, theirs);
            self.replica.sync.suggest(now);
        }
    }

    pub(super) fn handle_compare_answer(&mut self, now: Time, partner: Target, answer: Answer) {
        *self.replica.sync.open.with(partner) = false;
        if let (Target::Seed(seed), Ok((from, _))) = (partner, &answer) {
            self.replica.sync.note_seed(seed, *from);
        }
        match answer {
            Ok((from, Response::Same)) => {
                self.counters.syncs_same += 1;
                self.replica.sync.partners.note_agreement(from);
                self.notes.clear_refused(from);
                self.replica.note_comparison(&mut self.outbox, now, from, true);
                self.replica.sync.agreed = true;
                self.recheck_forgets(now);
                self.replace_predecessor(now);
            }
            Ok((from, Response::Differ(theirs))) => {
                self.counters.syncs_different += 1;
                let buckets = self.replica.buckets(&self.membership).differing(&theirs);
                let facts = self.replica.facts_in(buckets, self.active());
                let identity = self.membership.identity();
                let request = Request::Exchange { buckets, identity, facts };
                // To the same target: the known address of a member that has moved may be outdated.
                *self.replica.sync.open.with(partner) = true;
                self.call(partner, Purpose::Exchange { partner, with: from }, &request);
            }
            Ok((from, Response::Refused(refusal))) => {
                self.replica.sync.partners.note_silence(now, from);
                if let Some(count) = self.note(from, Kind::RefusesComparison, 1, "") {
                    tracing::warn!(peer = %from, count, %refusal, "comparison refused");
                }
                self.stop_if_expelled(&refusal);
            }
            Ok((from, _)) => {
                self.replica.sync.partners.note_silence(now, from);
                self.note_malformed(from, &"unexpected response to a comparison");
            }
            Err(error) => {
                if let (Target::Seed(seed), CallError::Myself) = (partner, &error) {
                    self.replica.sync.note_seed(seed, self.replica.me.node);
                }
                if let Target::Member { node, .. } = partner {
                    self.replica.sync.partners.note_silence(now, node);
                }
                tracing::debug!(?partner, %error, "comparison failed");
            }
        }
    }

    pub(super) fn handle_exchange_answer(
        &mut self,
        now: Time,
        partner: Target,
        with: NodeId,
        answer: Answer,
    ) {
        *self.replica.sync.open.with(partner) = false;
        match answer {
            Ok((from, Response::Facts { facts, down, down_as })) => {
                let MergeResult { new, refused } = self.learn(now, &facts, Some(from));
                let credible_suspicions = self.credible_suspicions(now, &down);
                let has_news = new || !credible_suspicions.is_empty() || down_as.is_some();
                self.suspect(now, credible_suspicions);
                tracing::debug!(peer = %from, has_news, refused, "exchanged");
                // Facts are accepted from any node, but only the compared node is confirmed by them.
                if from == with {
                    // Facts that cannot be exchanged do not count as a difference: the member has all facts
                    // of this node now, and this node has all of the member's that can be true.
                    let is_irreconcilable =
                        self.replica.sync.partners.count_fruitless(from, has_news)
                            || refused && !has_news;
                    if !refused {
                        self.notes.clear_refused(from);
                    }
                    self.replica.note_comparison(&mut self.outbox, now, from, is_irreconcilable);
                    if is_irreconcilable {
                        self.recheck_forgets(now);
                    }
                }
                if let Some(incarnation) = down_as {
                    self.exceed_incarnation(now, incarnation);
                    self.replica.sync.hasten(now);
                }
            }
            Ok((from, other)) => {
                self.note_unexpected(from, &other, "unexpected response to an exchange");
            }
            Err(error) => {
                if let Target::Member { node, .. } = partner {
                    self.replica.sync.partners.note_silence(now, node);
                }
                tracing::debug!(%error, "exchange failed");
            }
        }
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
