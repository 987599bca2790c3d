//! What the kernel must know: the converged state, boiled down to tunnels and subnets.

use std::{collections::BTreeMap, ops::Range};

use crate::model::{ClusterSettings, MemberRecord, NodeId, Slot, SlotState, Subnets, Vtep};

use super::{
    Asked, Home, Node, Output,
    leave::Leaving,
    planted::{Bug, planted},
};

/// One node's picture of the overlay. Equal views mean equal kernel tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub settings: ClusterSettings,
    pub own: Own,
    /// Every member with a lease, whether it is alive or not: being down is an opinion.
    pub peers: BTreeMap<NodeId, Peer>,
    /// Slots whose entries must stay although they are in no peer's name: nobody was heard since the start
    /// who can know of them. A process that was killed may have programmed more than its disk remembers,
    /// and removing that would cut off a member that works.
    pub unconfirmed: Vec<Range<u32>>,
}

/// This node's end of the tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    pub subnets: Subnets,
    pub vtep: Vtep,
}

/// A peer's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub vtep: Vtep,
    /// Its leases, lowest slot first; more than one only for moments.
    pub leases: Vec<(Slot, Subnets)>,
}

impl Node {
    /// Asks for the kernel to be made equal to the view, if the view changed. What this node says it
    /// owns is used only once that is on its own disk.
    pub(super) fn program(&mut self) {
        if !std::mem::take(&mut self.view_stale) {
            return;
        }
        let Some(view) = self.view() else {
            let goes = self.leaving.as_ref().is_some_and(Leaving::withdraws);
            if goes && self.asked == Asked::Nothing || matches!(self.asked, Asked::Overlay(_)) {
                self.asked = Asked::Withdraw;
                self.outputs.push_back(Output::Withdraw);
            }
            return;
        };
        let asked = Asked::Overlay(view.clone());
        if self.asked != asked {
            self.asked = asked;
            self.outputs.push_back(Output::Program { view, after: self.lease_write });
        }
    }

    /// The subnets in use; none without a lease, or when it is about to be handed over.
    pub(super) fn own_subnets(&self) -> Option<Subnets> {
        if self.leaving.as_ref().is_some_and(Leaving::withdraws) {
            return None;
        }
        let Home { cluster, slots, search } = self.home.as_ref()?;
        Some(cluster.settings.pool.subnets(search.own_slot(slots, self.me.node)?))
    }

    /// None without a subnet to use: there is no lease, or it is about to be handed over.
    pub(super) fn view(&self) -> Option<View> {
        let me = self.me.node;
        let subnets = self.own_subnets()?;
        let Home { cluster, slots, .. } = self.home.as_ref()?;
        let pool = cluster.settings.pool;
        let mut leases: BTreeMap<NodeId, Vec<(Slot, Subnets)>> = BTreeMap::new();
        for run in slots.runs().iter().filter(|run| run.record.state == SlotState::Leased) {
            let subnets = run.slots().map(|slot| (slot, pool.subnets(slot)));
            leases.entry(run.record.owner).or_default().extend(subnets);
        }
        let peer = |record: &MemberRecord| {
            let leases = leases.get(&record.node)?.clone();
            Some((record.node, Peer { vtep: record.vtep, leases }))
        };
        Some(View {
            settings: cluster.settings,
            own: Own { subnets, vtep: self.me.vtep },
            peers: self.directory.peers(me).filter_map(peer).collect(),
            unconfirmed: if planted(Bug::SweepAtOnce) { Vec::new() } else { self.unconfirmed() },
        })
    }

    /// A slot's owner is the only one who can have leased it to somebody else. So what the table says of it
    /// is the last word if the owner has been compared with, or if this node has seen it change hands
    /// itself.
    fn unconfirmed(&self) -> Vec<Range<u32>> {
        let Some(home) = &self.home else { return Vec::new() };
        let pool = home.cluster.settings.pool;
        let mut unconfirmed: Vec<Range<u32>> = Vec::new();
        let mut next = *pool.slots().start();
        // Where nobody owns what is not leased there is nobody to hear of it.
        let ownerless = self.config.assigned.is_some() && self.sync.synced();
        let mut add = |range: Range<u32>| match unconfirmed.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if last.end == range.start => last.end = range.end,
            _ => unconfirmed.push(range),
        };
        for run in home.slots.runs() {
            // No record, so nobody was heard.
            if !ownerless {
                add(next..run.start.0);
            }
            next = run.end();
            let owner = run.record.owner;
            if owner == self.me.node || self.sync.heard(owner) {
                continue;
            }
            let mut from = run.start.0;
            for moved in self.moved.range(run.start..Slot(run.end())) {
                add(from..moved.0);
                from = moved.0 + 1;
            }
            add(from..run.end());
        }
        if !ownerless {
            add(next..pool.slots().end() + 1);
        }
        unconfirmed
    }
}
