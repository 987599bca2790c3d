//! The lifecycle of this node's membership: it joins, searches for a lease, uses it, and leaves.
//!
//! The steps are in `join`, `lease` and `leave`; this file holds what they have in common.

use crate::model::{Subnets, Time};

use super::{
    KernelSubnet, Phase, join::Joining, lease::LeaseSearch, leave::Leaving, replica::Replica,
    supply::Supplies,
};

/// Where this node is in its lifecycle.
pub(super) struct Lifecycle {
    pub(super) joining: Joining,
    /// The search for a lease; `None` until this node is in a cluster.
    pub(super) search: Option<LeaseSearch>,
    pub(super) leaving: Option<Leaving>,
    pub(super) supplies: Supplies,
    /// The subnet that the kernel uses, as last reported.
    pub(super) kernel_subnet: KernelSubnet,
}

impl Lifecycle {
    /// Returns the lifecycle at the start of the process.
    pub(super) fn new(
        joining: Joining,
        search: Option<LeaseSearch>,
        leaving: Option<Leaving>,
    ) -> Self {
        let (supplies, kernel_subnet) = (Supplies::default(), KernelSubnet::Unknown);
        Self { joining, search, leaving, supplies, kernel_subnet }
    }

    /// Returns whether this node is leaving.
    pub(super) const fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    /// Returns whether this node has to stop using its subnet, because a successor takes it over.
    pub(super) fn withdraws(&self) -> bool {
        self.leaving.as_ref().is_some_and(Leaving::withdraws)
    }

    /// Returns the subnets to use, or `None` without a lease or when the leases are to be handed over.
    pub(super) fn own_subnets(&self, replica: &Replica) -> Option<Subnets> {
        if self.withdraws() {
            return None;
        }
        let cluster_state = replica.cluster_state.as_ref()?;
        let own = self.search.as_ref()?.own_slot(&cluster_state.slots, replica.me.node)?;
        Some(cluster_state.cluster.settings.pool.subnets(own))
    }

    /// Returns the phase of this node's membership.
    pub(super) fn phase(&self, replica: &Replica) -> Phase {
        match (&replica.cluster_state, self.own_subnets(replica)) {
            _ if self.is_leaving() => Phase::Leaving,
            (None, _) => Phase::Joining,
            (Some(_), None) => Phase::Leaseless,
            (Some(_), Some(_)) => Phase::Member,
        }
    }

    /// Returns when the next step of the search for a lease is due.
    pub(super) fn next_lease_step(&self) -> Option<Time> {
        self.search.as_ref()?.next_try.filter(|_| !self.is_leaving())
    }

    /// Returns when the next step of the leave is due.
    pub(super) fn next_leave_step(&self) -> Option<Time> {
        self.leaving.as_ref()?.retry_at
    }

    /// Makes the lease search run at the next step, because the slot table or this node's right to write has
    /// changed.
    pub(super) fn recheck_lease(&mut self, now: Time) {
        if let Some(search) = &mut self.search {
            search.next_try = Some(now);
        }
    }
}
