//! Computes the view, and queues it for the kernel when it has changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use crate::model::{MemberRecord, NodeId, Own, Peer, Slot, SlotState, Subnets, Time, View};

use super::{ClusterState, Node, SlotTable, push::batch_delay, replica::Replica};

impl Replica {
    /// Returns the slot ranges of unconfirmed owners. Only its owner can have leased a slot to another node.
    /// So a known record is current if its owner is confirmed, or if this node has received the change since
    /// its start.
    fn unconfirmed(&self, is_assigned: bool) -> Vec<Range<u32>> {
        let Some(cluster_state) = &self.cluster_state else { return Vec::new() };
        if let Some(retained) = &self.sync.retained {
            return self.unconfirmed_among(&cluster_state.slots, retained, is_assigned);
        }
        let pool = cluster_state.cluster.settings.pool;
        let mut unconfirmed: Vec<Range<u32>> = Vec::new();
        let mut next = *pool.slots().start();
        // With assigned subnets, slots without a record have no owner that could confirm them.
        let has_no_owners = is_assigned && self.sync.synced();
        let mut add = |range: Range<u32>| match unconfirmed.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if last.end == range.start => last.end = range.end,
            _ => unconfirmed.push(range),
        };
        for run in cluster_state.slots.runs() {
            // A slot without a record has no known owner.
            if !has_no_owners {
                add(next..run.start.0);
            }
            next = run.end();
            let owner = run.record.owner;
            if owner == self.me.node || self.sync.is_confirmed(owner) {
                continue;
            }
            let mut from = run.start.0;
            for slot in self.reassigned.range(run.start..Slot(run.end())) {
                add(from..slot.0);
                from = slot.0 + 1;
            }
            add(from..run.end());
        }
        if !has_no_owners {
            add(next..pool.slots().end() + 1);
        }
        unconfirmed
    }

    /// Returns those of `retained`, the slots with kernel entries of no known member, whose owner is
    /// unconfirmed. No other entry depends on a confirmation.
    fn unconfirmed_among(
        &self,
        slots: &SlotTable,
        retained: &BTreeSet<Slot>,
        is_assigned: bool,
    ) -> Vec<Range<u32>> {
        let is_unconfirmed = |slot: &&Slot| match slots.record(**slot).map(|record| record.owner) {
            Some(owner) => {
                owner != self.me.node
                    && !self.sync.is_confirmed(owner)
                    && !self.reassigned.contains(*slot)
            }
            None => !(is_assigned && self.sync.synced()),
        };
        let unconfirmed = retained.iter().filter(is_unconfirmed);
        unconfirmed.map(|slot| slot.0..slot.0 + 1).collect()
    }
}

impl Node {
    /// Handles the kernel's report of entries that belong to no known member.
    pub(super) fn record_retained_entries(&mut self, now: Time, slots: BTreeSet<Slot>) {
        if self.replica.sync.retained.as_ref() == Some(&slots) {
            return;
        }
        self.replica.sync.retained = Some(slots);
        self.outbox.invalidate_view();
        if !self.replica.awaited_owners().is_empty() {
            self.replica.sync.hasten(now);
        }
    }

    /// Queues an output for the kernel if the view has changed and is due. A withdrawal does not wait.
    pub(super) fn program_kernel(&mut self, now: Time) {
        let Some(due) = self.outbox.next_view() else { return };
        if now < due && !self.lifecycle.withdraws() {
            return;
        }
        self.outbox.note_view();
        match self.view() {
            Some(view) => self.outbox.program(view, now + batch_delay(self.active_count())),
            None => self.outbox.withdraw(self.lifecycle.withdraws()),
        }
    }

    /// Returns the view, or `None` if this node has no subnets to use.
    pub(super) fn view(&self) -> Option<View> {
        let me = self.replica.me.node;
        let subnets = self.lifecycle.own_subnets(&self.replica)?;
        let ClusterState { cluster, slots, .. } = self.replica.cluster_state.as_ref()?;
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
            own: Own { subnets, vtep: self.replica.me.vtep },
            peers: self.replica.directory.peers(me).filter_map(peer).collect(),
            unconfirmed: self.replica.unconfirmed(self.config.assigned.is_some()),
        })
    }
}
