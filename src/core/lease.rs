//! Seeing to it that this node has exactly one lease.
//!
//! A member without one (its seed had no free slot) makes one of its own free slots its lease, or asks those
//! who have free slots, one after the other, for ever: first those who can still serve many. A donor that
//! does not answer holds it up for a moment only. A member with several (two of them answered) keeps the one
//! that is in use and makes the others free slots.

use std::{collections::BTreeSet, ops::Range, time::Duration};

use crate::{
    model::{ClusterRecord, NodeId, Slot, SlotState, Time},
    wire::{GrantWish, Refusal, Request, Response},
};

use super::{
    Answer, Change, Home, InUse, Node, NodeConfig, Purpose, SlotTable,
    boot::preferred,
    planted::{Bug, planted},
    rank::peer_score,
};

/// A node whose subnet is given from outside waits so long for others to tell who had it, where it has met
/// nobody yet.
const HEARSAY: Duration = Duration::from_secs(3);
/// And looks again so often.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Pause after all donors were asked in vain.
const DONOR_PAUSE: Duration = Duration::from_secs(2);
/// The next donor is asked as well when the one before has not answered within this time. Gossip may hold a
/// dead member as alive for longer.
const NEXT_DONOR_AFTER: Duration = Duration::from_millis(500);
/// A call is answered by then, or has failed.
const ANSWERED_BY: Duration = Duration::from_secs(6);
/// Donors that are asked at once.
const MAX_OPEN_ASKS: usize = 4;

/// A member's search for a lease.
pub(super) struct LeaseSearch {
    /// The slot it would like, until its owner has been asked in vain.
    prefer: Option<Slot>,
    /// It is to have that one and no other: somebody else gives it.
    assigned: bool,
    /// Slots whose subnets lead elsewhere on this host.
    occupied: Vec<Range<u32>>,
    /// When the search began.
    since: Time,
    /// A living member that has the subnet assigned to this node.
    pub(super) rival: Option<NodeId>,
    /// Donors that were asked since the last pause.
    tried: BTreeSet<NodeId>,
    /// How many of them have not answered yet.
    open: usize,
    /// When another donor is asked besides those.
    next_ask: Time,
    next_try: Option<Time>,
    /// The lease last found.
    held: Option<Slot>,
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
            next_ask: now,
            next_try: Some(now),
            held: None,
            refusal: None,
        }
    }

    /// From now on another slot than the present one is the one to use.
    pub(super) fn prefer_from_now(&mut self, slot: Slot) {
        self.held = None;
        self.prefer = Some(slot);
    }

    fn is_free(&self, slot: Slot) -> bool {
        !self.occupied.iter().any(|slots| slots.contains(&slot.0))
    }

    /// Makes a free slot of `me` its lease; one that leads elsewhere on this host only if there is no other.
    pub(super) fn lease_own(&self, slots: &mut SlotTable, me: NodeId) -> Option<Change> {
        let is_free = |slot| self.is_free(slot);
        let free = slots.lease_own_where(me, self.prefer, is_free);
        free.or_else(|| slots.lease_own_where(me, self.prefer, |_| true))
    }

    /// Which of the leased slots of `me` is the one in use: the one that was, or else the one that was
    /// asked for. Another one would take the addresses away from under running pods. None, if all of them
    /// lead elsewhere on this host and `me` has a free one that does not.
    pub(super) fn own_slot(&self, slots: &SlotTable, me: NodeId) -> Option<Slot> {
        let is_leased = |slot: &Slot| slots.leased_by(me).any(|leased| leased == *slot);
        if self.assigned {
            return self.prefer.filter(is_leased);
        }
        if let Some(held) = self.held.filter(is_leased) {
            return Some(held);
        }
        let wanted = self.prefer.filter(is_leased);
        let leased = || wanted.into_iter().chain(slots.leased_by(me));
        if let Some(free) = leased().find(|slot| self.is_free(*slot)) {
            return Some(free);
        }
        let has_better = slots.has_free_slot_where(me, |slot| self.is_free(slot));
        leased().next().filter(|_| !has_better)
    }
}

impl Node {
    pub(super) fn next_lease_step(&self) -> Option<Time> {
        self.home.as_ref()?.search.next_try.filter(|_| self.leaving.is_none())
    }

    /// Sees to it that this node has exactly one lease.
    pub(super) fn step_lease(&mut self, now: Time) {
        let me = self.me.node;
        let synced = self.may_write();
        let Some(home) = &mut self.home else { return };
        if self.leaving.is_some() || home.search.next_try.is_none_or(|at| now < at) {
            return;
        }
        home.search.next_try = None;
        if let Some(own) = home.search.own_slot(&home.slots, me) {
            home.search.tried.clear();
            home.search.refusal = None;
            home.search.rival = None;
            if home.search.held.replace(own) != Some(own) {
                let subnet = home.cluster.settings.pool.subnet(own);
                tracing::info!(%subnet, "this node's subnet");
                self.view_stale = true;
            }
            // Not before the kernel has moved over: what is given back may be leased to somebody at once.
            let in_use = home.cluster.settings.pool.subnet(own);
            let moved = self.in_use == InUse::Subnet(in_use) || planted(Bug::GiveBackInUse);
            if synced && moved {
                self.give_back_all_but(now, own);
            }
            return;
        }
        if home.search.assigned {
            self.claim(now);
            return;
        }
        if synced && let Some(change) = home.search.lease_own(&mut home.slots, me) {
            self.note_own_change(now, vec![change]);
            return;
        }
        let search = &mut home.search;
        if search.open == 0 || search.open < MAX_OPEN_ASKS && search.next_ask <= now {
            self.ask_donor(now);
        } else if search.open < MAX_OPEN_ASKS {
            search.next_try = Some(search.next_ask);
        }
    }

    /// Takes the subnet that was given to this node, unless a living member uses it: then somebody has given
    /// it twice.
    fn claim(&mut self, now: Time) {
        let me = self.me.node;
        let may_write = self.may_write();
        let has_confirmed = self.sync.has_confirmed();
        let active = self.active();
        let Some(home) = &mut self.home else { return };
        let search = &mut home.search;
        let Some(slot) = search.prefer else { return };
        let user = home.slots.record(slot).filter(|record| record.state == SlotState::Leased);
        search.rival =
            user.map(|record| record.owner).filter(|user| *user != me && active.contains_key(user));
        let knows_enough = has_confirmed || self.config.seeds == 0 || now >= search.since + HEARSAY;
        if search.rival.is_none() && may_write && knows_enough {
            let change = home.slots.claim(me, slot);
            self.note_own_change(now, vec![change]);
            return;
        }
        if search.rival.is_some() && search.held.take().is_some() {
            self.view_stale = true;
        }
        search.next_try = Some(now + LOOK_AGAIN);
    }

    fn give_back_all_but(&mut self, now: Time, own: Slot) {
        let me = self.me.node;
        let Some(home) = &mut self.home else { return };
        let surplus: Vec<Slot> = home.slots.leased_by(me).filter(|slot| *slot != own).collect();
        self.counters.surplus += surplus.len() as u64;
        let released =
            surplus.into_iter().filter_map(|slot| home.slots.release_own(me, slot)).collect();
        self.note_own_change(now, released);
    }

    /// Has another look for a lease at the next step: the table changed.
    pub(super) fn recheck_lease(&mut self, now: Time) {
        if let Some(home) = &mut self.home {
            home.search.next_try = Some(now);
        }
    }

    fn ask_donor(&mut self, now: Time) {
        let me = self.me.node;
        let active = self.active();
        let Some(home) = &mut self.home else { return };
        let free_slots = home.slots.census().free;
        let untried = |node: &NodeId| *node != me && !home.search.tried.contains(node);
        let wanted = home
            .search
            .prefer
            .and_then(|slot| home.slots.record(slot))
            .filter(|record| record.state == SlotState::Free && untried(&record.owner));
        let candidates = || {
            let donors = free_slots.iter().map(|(node, count)| (*node, *count));
            donors.filter(|(node, _)| untried(node))
        };
        let donor = wanted.map(|record| record.owner).or_else(|| {
            best_donor(me, candidates().filter(|(node, _)| active.contains_key(node)))
                .or_else(|| best_donor(me, candidates()))
        });
        let Some(donor) = donor else {
            if home.search.open > 0 {
                return;
            }
            home.search.tried.clear();
            home.search.prefer = None;
            let pause = self.jittered(DONOR_PAUSE);
            if let Some(home) = &mut self.home {
                home.search.next_try = Some(now + pause);
            }
            self.sync.hasten(now);
            return;
        };
        let pool = home.cluster.settings.pool;
        let prefer = home.search.prefer.map(|slot| pool.subnet(slot).network());
        let request = Request::Grant(GrantWish { prefer });
        home.search.tried.insert(donor);
        let asked = self.call_member(donor, Purpose::Grant { donor }, &request);
        let Some(Home { search, .. }) = &mut self.home else { return };
        if asked {
            search.open += 1;
            // Others refuse what is known to be another's: its owner alone can grant it.
            search.next_ask = now + if wanted.is_some() { ANSWERED_BY } else { NEXT_DONOR_AFTER };
            search.next_try = Some(search.next_ask);
        } else {
            // Known by its slots alone: its record is on its way, or lost with it.
            search.next_try = Some(now);
        }
    }

    pub(super) fn on_grant_answer(&mut self, now: Time, donor: NodeId, answer: Answer) {
        let Some(home) = &mut self.home else { return };
        home.search.open = home.search.open.saturating_sub(1);
        home.search.next_ask = now;
        home.search.next_try = Some(now);
        match answer {
            Ok((_, Response::Granted(facts))) => _ = self.learn(now, &facts, Some(donor)),
            Ok((_, Response::Refused(refusal))) => home.search.refusal = Some(refusal),
            Ok((from, _)) => self.note_malformed(from, &"no answer to a grant request"),
            Err(error) => {
                tracing::debug!(%donor, %error, "donor did not answer");
                let wanted = home.search.prefer.and_then(|slot| home.slots.record(slot));
                if wanted.is_some_and(|record| record.owner == donor) {
                    // Those who have refused for the sake of this slot are asked for any.
                    home.search.prefer = None;
                    home.search.tried = BTreeSet::from([donor]);
                }
            }
        }
    }
}

/// Which of these donors, with their free slots, `me` asks first: of those that can still serve at least
/// half as many joiners as the one with the most, the one that suits it best. So requests are spread, and a
/// donor that others may have emptied meanwhile is asked late.
fn best_donor(me: NodeId, donors: impl Iterator<Item = (NodeId, u32)>) -> Option<NodeId> {
    // A donor gives half of its free slots away each time.
    let serves = donors.map(|(node, free_slots)| (node, u32::BITS - free_slots.leading_zeros()));
    let serves: Vec<(NodeId, u32)> = serves.collect();
    let most = serves.iter().map(|(_, count)| *count).max()?;
    let large = serves.iter().filter(|(_, count)| count * 2 >= most);
    large.map(|(node, _)| *node).max_by_key(|donor| peer_score(me, *donor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn donors_with_few_spares_are_asked_after_those_with_many() {
        let donor = |index: u8| NodeId::from_bytes([index; 8]);
        // As after eight joins by one seed.
        let free_slots = [127, 63, 31, 15, 7, 3, 1];
        let donors = || (1..).map(donor).zip(free_slots);
        let mut asked = BTreeSet::new();
        for number in 0..500_u64 {
            let me = NodeId::from_bytes((number << 16).to_be_bytes());
            asked.extend(best_donor(me, donors()));
        }
        assert_eq!(asked, (1..=4).map(donor).collect(), "of one kind, and all of them");
        let only_small = donors().skip(6);
        assert_eq!(best_donor(donor(9), only_small), Some(donor(7)));
        assert_eq!(best_donor(donor(9), donors().take(0)), None);
    }
}
