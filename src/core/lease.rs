//! Ensures that this node has exactly one lease.
//!
//! A member without a lease, for example because its seed had no free slot, leases one of its own free slots.
//! If it has none, it requests grants from the owners of free slots until one succeeds; owners with many free
//! slots come first. A granter that does not answer delays the search only briefly. A member with several
//! leases (several granters answered) keeps the one in use and turns the others into free slots.

use std::{collections::BTreeSet, ops::Range, time::Duration};

use crate::{
    model::{ClusterRecord, NodeId, Slot, SlotState, Time},
    wire::{GrantWish, Refusal, Request, Response},
};

use super::{Answer, Change, KernelSubnet, Node, NodeConfig, Purpose, SlotTable, rank::peer_score};

/// A node with an assigned subnet that has compared its state with no member yet waits this long before it
/// claims the subnet, so that it first learns the slot's current record.
const ASSIGNED_CLAIM_DELAY: Duration = Duration::from_secs(3);
/// Interval at which a claim is retried.
const CLAIM_RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// Pause after no granter has granted a slot.
const GRANTER_PAUSE: Duration = Duration::from_secs(2);
/// A request to another granter starts in parallel if the last one has not answered within this time. Gossip
/// may take longer to detect that it is dead.
const NEXT_GRANTER_AFTER: Duration = Duration::from_millis(500);
/// Time within which a call has ended, with or without an answer.
const ANSWERED_BY: Duration = Duration::from_secs(6);
/// Limit of unanswered grant requests.
const MAX_OPEN_GRANTS: usize = 4;

/// A member's search for a lease.
pub(super) struct LeaseSearch {
    /// The preferred slot; reset when its owner does not answer or no granter is left.
    prefer: Option<Slot>,
    /// Whether `prefer` was assigned from outside: no other slot may be used.
    assigned: bool,
    /// Slot ranges whose subnets this host routes elsewhere.
    occupied: Vec<Range<u32>>,
    /// When the search began.
    since: Time,
    /// A living member that leases the subnet assigned to this node.
    pub(super) rival: Option<NodeId>,
    /// Granters that got a request since the last pause.
    tried: BTreeSet<NodeId>,
    /// Number of unanswered grant requests.
    open: usize,
    /// When a request to another granter may start in parallel.
    next_request: Time,
    pub(super) next_try: Option<Time>,
    /// The lease that this node uses.
    used_lease: Option<Slot>,
    pub(super) refusal: Option<Refusal>,
}

impl LeaseSearch {
    pub(super) fn new(now: Time, cluster: &ClusterRecord, config: &NodeConfig) -> Self {
        let pool = cluster.settings.pool;
        let occupied = config.occupied.iter().map(|network| pool.slots_in(network));
        Self {
            prefer: preferred(cluster, config),
            assigned: config.assigned.is_some(),
            occupied: occupied.filter(|slots| !slots.is_empty()).collect(),
            since: now,
            rival: None,
            tried: BTreeSet::new(),
            open: 0,
            next_request: now,
            next_try: Some(now),
            used_lease: None,
            refusal: None,
        }
    }

    /// Makes `slot` the one to use instead of the present one.
    pub(super) fn prefer_from_now(&mut self, slot: Slot) {
        self.used_lease = None;
        self.prefer = Some(slot);
    }

    /// Stores why no subnet was granted. Logs that none is free, because only an operator can change that.
    pub(super) fn note_refusal(&mut self, refusal: Refusal) {
        if matches!(refusal, Refusal::Exhausted { .. }) && self.refusal.as_ref() != Some(&refusal) {
            tracing::warn!("no subnet yet: {refusal}");
        }
        self.refusal = Some(refusal);
    }

    fn is_unoccupied(&self, slot: Slot) -> bool {
        !self.occupied.iter().any(|slots| slots.contains(&slot.0))
    }

    /// Leases a free slot of `me`. Takes one that this host routes elsewhere only if there is no other.
    pub(super) fn lease_own(&self, slots: &mut SlotTable, me: NodeId) -> Option<Change> {
        let is_unoccupied = |slot| self.is_unoccupied(slot);
        let free = slots.lease_own_where(me, self.prefer, is_unoccupied);
        free.or_else(|| slots.lease_own_where(me, self.prefer, |_| true))
    }

    /// Returns which leased slot of `me` to use: the present one, else the preferred one, else the lowest.
    /// Changing it would take the addresses away from running pods. Returns `None` if this host routes all of
    /// them elsewhere and `me` owns a free slot that it does not.
    pub(super) fn own_slot(&self, slots: &SlotTable, me: NodeId) -> Option<Slot> {
        let is_leased = |slot: &Slot| slots.leased_by(me).any(|leased| leased == *slot);
        if self.assigned {
            return self.prefer.filter(is_leased);
        }
        if let Some(used_lease) = self.used_lease.filter(is_leased) {
            return Some(used_lease);
        }
        let wanted = self.prefer.filter(is_leased);
        let leased = || wanted.into_iter().chain(slots.leased_by(me));
        if let Some(free) = leased().find(|slot| self.is_unoccupied(*slot)) {
            return Some(free);
        }
        let has_better = slots.has_free_slot_where(me, |slot| self.is_unoccupied(slot));
        leased().next().filter(|_| !has_better)
    }
}

impl Node {
    /// Takes the next step towards exactly one lease, if it is due.
    pub(super) fn step_lease(&mut self, now: Time) {
        if self.lifecycle.next_lease_step().is_none_or(|at| now < at) {
            return;
        }
        let me = self.replica.me.node;
        let may_write = self.may_write();
        let (Some(search), Some(cluster_state)) =
            (&mut self.lifecycle.search, &mut self.replica.cluster_state)
        else {
            return;
        };
        search.next_try = None;
        if let Some(own) = search.own_slot(&cluster_state.slots, me) {
            search.tried.clear();
            search.refusal = None;
            search.rival = None;
            if search.used_lease.replace(own) != Some(own) {
                let subnet = cluster_state.cluster.settings.pool.subnet(own);
                tracing::info!(%subnet, "subnet leased");
                self.outbox.invalidate_view();
            }
            // Only after the kernel has switched: a slot given back may be leased to another node at once.
            let subnet = cluster_state.cluster.settings.pool.subnet(own);
            let has_switched = self.lifecycle.kernel_subnet == KernelSubnet::Subnet(subnet);
            if may_write && has_switched {
                self.release_all_but(now, own);
            }
            return;
        }
        if search.assigned {
            self.claim(now);
            return;
        }
        if may_write && let Some(change) = search.lease_own(&mut cluster_state.slots, me) {
            self.note_own_change(now, &[change]);
            return;
        }
        if search.open == 0 || search.open < MAX_OPEN_GRANTS && search.next_request <= now {
            self.request_grant(now);
        } else if search.open < MAX_OPEN_GRANTS {
            search.next_try = Some(search.next_request);
        }
    }

    /// Claims the slot assigned to this node, unless a living member leases it: then it was assigned to two
    /// nodes.
    fn claim(&mut self, now: Time) {
        let me = self.replica.me.node;
        let may_write = self.may_write();
        let has_confirmed = self.replica.sync.has_confirmed();
        let active = self.active();
        let (Some(search), Some(cluster_state)) =
            (&mut self.lifecycle.search, &mut self.replica.cluster_state)
        else {
            return;
        };
        let Some(slot) = search.prefer else { return };
        let user =
            cluster_state.slots.record(slot).filter(|record| record.state == SlotState::Leased);
        search.rival =
            user.map(|record| record.owner).filter(|user| *user != me && active.contains_key(user));
        let knows_enough =
            has_confirmed || self.config.seeds == 0 || now >= search.since + ASSIGNED_CLAIM_DELAY;
        if search.rival.is_none() && may_write && knows_enough {
            let change = cluster_state.slots.claim(me, slot);
            self.note_own_change(now, &[change]);
            return;
        }
        if search.rival.is_some() && search.used_lease.take().is_some() {
            self.outbox.invalidate_view();
        }
        search.next_try = Some(now + CLAIM_RETRY_INTERVAL);
    }

    fn release_all_but(&mut self, now: Time, own: Slot) {
        let me = self.replica.me.node;
        let Some(cluster_state) = &mut self.replica.cluster_state else { return };
        let released = cluster_state.slots.release_all_but(me, own);
        self.counters.surplus += released.len() as u64;
        self.note_own_change(now, &released);
    }

    fn request_grant(&mut self, now: Time) {
        let me = self.replica.me.node;
        let active = self.active();
        let (Some(search), Some(cluster_state)) =
            (&mut self.lifecycle.search, &mut self.replica.cluster_state)
        else {
            return;
        };
        let free_slots = cluster_state.slots.census().free;
        let untried = |node: &NodeId| *node != me && !search.tried.contains(node);
        let wanted = search
            .prefer
            .and_then(|slot| cluster_state.slots.record(slot))
            .filter(|record| record.state == SlotState::Free && untried(&record.owner));
        let candidates = || {
            let granters = free_slots.iter().map(|(node, count)| (*node, *count));
            granters.filter(|(node, _)| untried(node))
        };
        let granter = wanted.map(|record| record.owner).or_else(|| {
            best_granter(me, candidates().filter(|(node, _)| active.contains_key(node)))
                .or_else(|| best_granter(me, candidates()))
        });
        let Some(granter) = granter else {
            if search.open > 0 {
                return;
            }
            search.tried.clear();
            search.prefer = None;
            let pause = self.jittered(GRANTER_PAUSE);
            if let Some(search) = &mut self.lifecycle.search {
                search.next_try = Some(now + pause);
            }
            self.replica.sync.hasten(now);
            return;
        };
        let pool = cluster_state.cluster.settings.pool;
        let prefer = search.prefer.map(|slot| pool.subnet(slot).network());
        let request = Request::Grant(GrantWish { prefer });
        search.tried.insert(granter);
        let called = self.call_member(granter, Purpose::Grant { granter }, &request);
        let Some(search) = &mut self.lifecycle.search else { return };
        if called {
            search.open += 1;
            // A known free slot can be granted only by its owner, so no other granter gets a request in
            // parallel.
            search.next_request =
                now + if wanted.is_some() { ANSWERED_BY } else { NEXT_GRANTER_AFTER };
            search.next_try = Some(search.next_request);
        } else {
            // The granter has no record: it has not arrived yet, or it was lost with a database.
            search.next_try = Some(now);
        }
    }

    pub(super) fn handle_grant_answer(&mut self, now: Time, granter: NodeId, answer: Answer) {
        let (Some(search), Some(cluster_state)) =
            (&mut self.lifecycle.search, &mut self.replica.cluster_state)
        else {
            return;
        };
        search.open = search.open.saturating_sub(1);
        search.next_request = now;
        search.next_try = Some(now);
        match answer {
            Ok((_, Response::Granted(facts))) => _ = self.learn(now, &facts, Some(granter)),
            Ok((_, Response::Refused(refusal))) => search.note_refusal(refusal),
            Ok((from, _)) => self.note_malformed(from, &"unexpected response to a grant request"),
            Err(error) => {
                tracing::debug!(%granter, %error, "granter did not answer");
                let wanted = search.prefer.and_then(|slot| cluster_state.slots.record(slot));
                if wanted.is_some_and(|record| record.owner == granter) {
                    // Granters that refused because of the preferred slot may grant any other one.
                    search.prefer = None;
                    search.tried = BTreeSet::from([granter]);
                }
            }
        }
    }
}

/// Returns the granter that `me` requests a grant from first. Candidates are the granters with at least a
/// quarter as many free slots as the one with the most; among them the highest rendezvous score decides. This
/// spreads the requests, and granters that other joiners may have emptied come late.
fn best_granter(me: NodeId, granters: impl Iterator<Item = (NodeId, u32)>) -> Option<NodeId> {
    let granters: Vec<(NodeId, u32)> = granters.collect();
    let most = granters.iter().map(|(_, free_slots)| *free_slots).max()?;
    let large = granters.iter().filter(|(_, free_slots)| *free_slots >= most.div_ceil(4));
    large.map(|(node, _)| *node).max_by_key(|granter| peer_score(me, *granter))
}

/// Returns the slot that the operator or Kubernetes wants for this node.
fn preferred(cluster: &ClusterRecord, config: &NodeConfig) -> Option<Slot> {
    config
        .assigned
        .or(config.prefer_subnet)
        .and_then(|address| cluster.settings.pool.slot_at(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granters_with_few_free_slots_come_after_those_with_many() {
        let granter = |index: u8| NodeId::from_bytes([index; 8]);
        let free_slots = [120, 60, 31, 30, 15, 7, 1];
        let granters = || (1..).map(granter).zip(free_slots);
        let mut chosen = BTreeSet::new();
        for number in 0..500_u64 {
            let me = NodeId::from_bytes((number << 16).to_be_bytes());
            chosen.extend(best_granter(me, granters()));
        }
        assert_eq!(
            chosen,
            (1..=4).map(granter).collect(),
            "all of the large granters, and no small one"
        );
        let only_small = granters().skip(6);
        assert_eq!(best_granter(granter(9), only_small), Some(granter(7)));
        assert_eq!(best_granter(granter(9), granters().take(0)), None);
    }
}
