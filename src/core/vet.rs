//! Refuses facts and gossip of a peer that cannot be true.
//!
//! Decoding checks the form of a message. This module checks what depends on the cluster: addresses that no
//! member can have, counters beyond their horizon, identities of nodes without a record. All nodes check
//! alike, so what one refuses all refuse, and members still agree on the rest.

use crate::{
    model::{Forget, Identity, MemberRecord, NodeId, Run, Suspicion, Time},
    wire::SwimPacket,
};

use super::{Node, membership::UNSENT_REFUTATIONS, replica::Replica};

/// The entries of one message that were refused: their number, and the reason of the first.
#[derive(Default)]
pub(super) struct Refusals {
    count: u64,
    why: String,
}

impl Refusals {
    fn add(&mut self, why: impl FnOnce() -> String) {
        if self.count == 0 {
            self.why = why();
        }
        self.count += 1;
    }
}

impl Replica {
    /// Returns whether a member record can be true. Of a record of this node only the version is checked.
    pub(super) fn is_possible_member(
        &mut self,
        now: Time,
        record: &MemberRecord,
        refused: &mut Refusals,
    ) -> bool {
        let is_me = record.node == self.me.node;
        let known = if is_me { Some(&self.me) } else { self.directory.get(record.node) };
        if known == Some(record) {
            return true;
        }
        let pool =
            self.cluster_state.as_ref().map(|cluster_state| &cluster_state.cluster.settings.pool);
        let unfit = pool.filter(|_| !is_me);
        if let Some(unfit) = unfit.and_then(|pool| record.why_unusable(pool)) {
            refused.add(|| format!("the record of {} ({}): {unfit}", record.name, record.node));
            return false;
        }
        let reaches = self.horizons.allows_member(now, record, known);
        if !reaches {
            let version = record.version;
            refused.add(|| {
                let (name, node) = (&record.name, record.node);
                format!("the record of {name} ({node}): a jump to {version:?}")
            });
        }
        reaches
    }

    /// Returns the runs whose epochs are possible.
    pub(super) fn possible_runs(
        &mut self,
        now: Time,
        runs: &[Run],
        refused: &mut Refusals,
    ) -> Vec<Run> {
        let Some(cluster_state) = &self.cluster_state else { return Vec::new() };
        let mut possible_runs = Vec::with_capacity(runs.len());
        for run in runs {
            let known = cluster_state.slots.record(run.start).map(|record| record.epoch);
            if self.horizons.allows_epoch(now, run.record.epoch, known) {
                possible_runs.push(*run);
            } else {
                let (start, epoch) = (run.start, run.record.epoch);
                refused.add(|| format!("{start:?}: a jump to epoch {epoch:#x}"));
            }
        }
        possible_runs
    }

    /// Returns whether a forget record can be true.
    pub(super) fn is_possible_forget(
        &mut self,
        now: Time,
        forget: &Forget,
        refused: &mut Refusals,
    ) -> bool {
        let known = self.directory.forgotten(forget.node);
        let reaches = self.horizons.allows_round(now, forget, known);
        if !reaches {
            refused
                .add(|| format!("{} is forgotten: a jump to round {}", forget.node, forget.round));
        }
        reaches
    }

    /// Returns whether gossip may use this identity: the node has a record, and the incarnation is possible.
    pub(super) fn is_credible(&mut self, now: Time, identity: Identity) -> bool {
        let Identity { node, incarnation } = identity;
        let record = if node == self.me.node { Some(&self.me) } else { self.directory.get(node) };
        record.is_some() && self.horizons.allows_incarnation(now, incarnation, record)
    }
}

impl Node {
    /// Returns which members that a peer considers alive are to be added to gossip: those that are not active
    /// here, not gone, and credible.
    pub(super) fn credible_identities(
        &mut self,
        now: Time,
        identities: &[Identity],
    ) -> Vec<Identity> {
        let news = identities.iter().filter(|identity| {
            self.membership.is_new(identity) && !self.replica.is_gone(identity.node)
        });
        let news: Vec<Identity> = news.copied().collect();
        news.into_iter().filter(|identity| self.replica.is_credible(now, *identity)).collect()
    }

    /// Returns which members that a peer considers down are to be suspected: those that are active here in
    /// the same incarnation, and credible.
    pub(super) fn credible_suspicions(&mut self, now: Time, down: &[Suspicion]) -> Vec<Suspicion> {
        let credible_suspicions =
            down.iter().filter(|suspicion| self.membership.holds_alive(&suspicion.identity));
        let credible_suspicions: Vec<Suspicion> = credible_suspicions.copied().collect();
        credible_suspicions
            .into_iter()
            .filter(|suspicion| self.replica.is_credible(now, suspicion.identity))
            .collect()
    }

    /// Handles a SWIM packet. A peer may send packets only in its own name, and about known members.
    pub(super) fn handle_swim_packet(&mut self, now: Time, from: NodeId, bytes: &[u8]) {
        let mut packet = match SwimPacket::decode(bytes) {
            Ok(packet) => packet,
            Err(error) => return self.note_malformed(from, &error),
        };
        let sender = packet.header.src;
        if sender.node != from {
            return self.note_malformed(from, &"a gossip packet with the identity of another node");
        }
        if !self.replica.is_credible(now, sender) {
            // Its record has not arrived yet, or its incarnation is impossible. No answer is possible.
            return self.replica.sync.suggest(now);
        }
        let (me, sent) = (self.membership.identity(), self.membership.refutation());
        let before = packet.members.len();
        let mut unknown = false;
        packet.members.retain(|member| {
            let is_own = *member.id() == me;
            let impossible =
                is_own && member.incarnation() > sent.saturating_add(UNSENT_REFUTATIONS);
            let credible = !impossible && self.replica.is_credible(now, *member.id());
            unknown |= !credible && self.replica.directory.get(member.id().node).is_none();
            credible
        });
        if unknown {
            self.replica.sync.suggest(now);
        }
        match packet.members.len() == before {
            true => self.membership.handle_packet(now, bytes),
            false => self.membership.handle_packet(now, &packet.encode()),
        }
    }

    /// Notes the refused entries of a peer's message. Returns whether there are any.
    pub(super) fn report_refused(&mut self, peer: NodeId, refused: &Refusals) -> bool {
        if refused.count > 0 {
            self.note_refused(peer, refused.count, &refused.why);
        }
        refused.count > 0
    }
}
