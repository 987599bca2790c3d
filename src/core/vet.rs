//! What of a peer's facts and packets is looked at further; the rest is refused by name.
//!
//! The form of a message is checked where it is decoded; here is what depends on the cluster: addresses that
//! no member can have, counters beyond their horizon, identities of nodes without a record. Every node judges
//! alike, so what is refused here is refused everywhere, and members go on agreeing on the rest.

use crate::{
    model::{Forget, Identity, MemberRecord, NodeId, Run, Suspicion, Time},
    wire::SwimPacket,
};

use super::{
    Node,
    membership::UNSENT_REFUTATIONS,
    planted::{Bug, planted},
};

/// What was refused of one message: how much, and why the first of it.
#[derive(Default)]
pub(super) struct Refused {
    count: u64,
    why: String,
}

impl Refused {
    fn add(&mut self, why: impl FnOnce() -> String) {
        if self.count == 0 {
            self.why = why();
        }
        self.count += 1;
    }
}

impl Node {
    /// Whether a member record can be true. One of this node itself is only looked at for its version.
    pub(super) fn can_be(
        &mut self,
        now: Time,
        record: &MemberRecord,
        refused: &mut Refused,
    ) -> bool {
        let is_me = record.node == self.me.node;
        let known = if is_me { Some(&self.me) } else { self.directory.get(record.node) };
        if known == Some(record) {
            return true;
        }
        let pool = self.home.as_ref().map(|home| &home.cluster.settings.pool);
        let unfit = pool.filter(|_| !is_me && !planted(Bug::TakeUnfitRecords));
        if let Some(unfit) = unfit.and_then(|pool| record.why_unusable(pool)) {
            refused.add(|| format!("the record of {} ({}): {unfit}", record.name, record.node));
            return false;
        }
        let reaches = self.horizons.reach_member(now, record, known);
        if !reaches {
            let version = record.version;
            refused.add(|| {
                let (name, node) = (&record.name, record.node);
                format!("the record of {name} ({node}): a jump to {version:?}")
            });
        }
        reaches
    }

    /// Runs whose epochs can have come about.
    pub(super) fn possible(&mut self, now: Time, runs: &[Run], refused: &mut Refused) -> Vec<Run> {
        let Some(home) = &self.home else { return Vec::new() };
        let mut possible = Vec::with_capacity(runs.len());
        for run in runs {
            let known = home.slots.record(run.start).map(|record| record.epoch);
            if self.horizons.reach_epoch(now, run.record.epoch, known) {
                possible.push(*run);
            } else {
                let (start, epoch) = (run.start, run.record.epoch);
                refused.add(|| format!("{start:?}: a jump to epoch {epoch:#x}"));
            }
        }
        possible
    }

    /// Whether the word that a node is gone can have come about.
    pub(super) fn can_be_gone(
        &mut self,
        now: Time,
        forget: &Forget,
        refused: &mut Refused,
    ) -> bool {
        let known = self.directory.forgotten(forget.node);
        let reaches = self.horizons.reach_round(now, forget, known);
        if !reaches {
            refused
                .add(|| format!("{} is forgotten: a jump to round {}", forget.node, forget.round));
        }
        reaches
    }

    /// Whether gossip may hear of this identity: one of a member that is known and there.
    fn is_credible(&mut self, now: Time, identity: Identity) -> bool {
        if planted(Bug::TakeAnyIdentity) {
            return true;
        }
        let Identity { node, incarnation } = identity;
        let record = if node == self.me.node { Some(&self.me) } else { self.directory.get(node) };
        record.is_some() && self.horizons.reach_incarnation(now, incarnation, record)
    }

    /// Members that a peer holds as alive, without those that are known to be, are gone, or have no record.
    pub(super) fn credible(&mut self, now: Time, identities: &[Identity]) -> Vec<Identity> {
        let news = identities
            .iter()
            .filter(|identity| self.membership.is_news(identity) && !self.is_gone(identity.node));
        let news: Vec<Identity> = news.copied().collect();
        news.into_iter().filter(|identity| self.is_credible(now, *identity)).collect()
    }

    /// Members that a peer holds as down, of those that this node holds as alive in that incarnation.
    pub(super) fn doubted(&mut self, now: Time, down: &[Suspicion]) -> Vec<Suspicion> {
        let doubted =
            down.iter().filter(|suspicion| self.membership.holds_alive(&suspicion.identity));
        let doubted: Vec<Suspicion> = doubted.copied().collect();
        doubted.into_iter().filter(|doubt| self.is_credible(now, doubt.identity)).collect()
    }

    /// A SWIM packet: its sender speaks for itself alone, and of members that are known.
    pub(super) fn on_swim(&mut self, now: Time, from: NodeId, bytes: &[u8]) {
        let mut packet = match SwimPacket::decode(bytes) {
            Ok(packet) => packet,
            Err(error) => return self.note_malformed(from, &error),
        };
        let sender = packet.header.src;
        if sender.node != from && !planted(Bug::TakeAnySender) {
            return self.note_malformed(from, &"a gossip packet in the name of another node");
        }
        if !self.is_credible(now, sender) {
            // Its record is on its way, or it cannot be as it says: nothing can be answered in either case.
            return self.sync.suggest(now);
        }
        let (me, sent) = (self.membership.identity(), self.membership.refutation());
        let before = packet.members.len();
        let mut unknown = false;
        packet.members.retain(|member| {
            let is_own = *member.id() == me;
            let impossible =
                is_own && member.incarnation() > sent.saturating_add(UNSENT_REFUTATIONS);
            let credible = !impossible && self.is_credible(now, *member.id());
            unknown |= !credible && self.directory.get(member.id().node).is_none();
            credible
        });
        if unknown {
            self.sync.suggest(now);
        }
        match packet.members.len() == before {
            true => self.membership.handle_packet(now, bytes),
            false => self.membership.handle_packet(now, &packet.encode()),
        }
    }

    /// Names what was refused of a peer's message; says whether anything was.
    pub(super) fn name_refused(&mut self, peer: NodeId, refused: &Refused) -> bool {
        if refused.count > 0 {
            self.note_refused(peer, refused.count, &refused.why);
        }
        refused.count > 0
    }
}
