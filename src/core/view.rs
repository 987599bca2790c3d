//! What the kernel must know: the converged state, boiled down to tunnels and subnets.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;

use crate::model::{ClusterSettings, MemberRecord, NodeId, Slot, SlotState, Vtep};

use super::{Home, Node, Output};

/// One node's picture of the overlay. Equal views mean equal kernel tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub settings: ClusterSettings,
    pub own: Own,
    /// Every member with a lease, whether it is alive or not: being down is an opinion.
    pub peers: BTreeMap<NodeId, Peer>,
    /// Whether entries of nobody's may be removed: not before the first comparison with a peer since
    /// the start, lest an old database sweeps away a newer member.
    pub sweep: bool,
}

/// This node's end of the tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    pub subnet: Ipv4Net,
    pub vtep: Vtep,
}

/// A peer's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub vtep: Vtep,
    /// Its leases, lowest slot first; more than one only for moments.
    pub leases: Vec<(Slot, Ipv4Net)>,
}

impl Node {
    /// Asks for the kernel to be made equal to the view, if the view changed. What this node says it
    /// owns is used only once that is on its own disk.
    pub(super) fn program(&mut self) {
        let sweep_is_new = self.programmed.as_ref().is_some_and(|v| v.sweep != self.may_sweep());
        if !std::mem::take(&mut self.view_stale) && !sweep_is_new {
            return;
        }
        let Some(view) = self.view() else { return };
        if self.programmed.as_ref() != Some(&view) {
            self.programmed = Some(view.clone());
            self.outputs.push_back(Output::Program { view, after: self.lease_write });
        }
    }

    pub(super) fn view(&self) -> Option<View> {
        let me = self.me.node;
        let Home { cluster, slots, search } = self.home.as_ref()?;
        let pool = cluster.settings.pool;
        let mut leases: BTreeMap<NodeId, Vec<(Slot, Ipv4Net)>> = BTreeMap::new();
        for run in slots.runs().iter().filter(|run| run.record.state == SlotState::Leased) {
            let subnets = run.slots().map(|slot| (slot, pool.subnet(slot)));
            leases.entry(run.record.owner).or_default().extend(subnets);
        }
        let slot = search.own_slot(slots, me)?;
        let subnet = pool.subnet(slot);
        let peer = |record: &MemberRecord| {
            let leases = leases.get(&record.node)?.clone();
            Some((record.node, Peer { vtep: record.vtep, leases }))
        };
        Some(View {
            settings: cluster.settings,
            own: Own { subnet, vtep: self.me.vtep },
            peers: self.directory.peers(me).filter_map(peer).collect(),
            sweep: self.may_sweep(),
        })
    }

    pub(super) fn may_sweep(&self) -> bool {
        self.sync.synced() || self.is_alone()
    }
}
