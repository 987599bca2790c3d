//! The input of trials with pods of other hosts.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use crate::{
    agent::diagnosis::packet_filter::Sources,
    dataplane::forwarding::{RemotePeer, TrialWay},
    model::NodeId,
};

/// The peers to test, and the addresses from which probes are answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrialInput {
    /// The peers to test.
    pub(super) subjects: Vec<RemotePeer>,
    /// Ways on which this host itself drops packets.
    pub(super) lost_here: Vec<TrialWay>,
    /// How long a peer is not tested after a trial without losses; `None` if testing costs nothing.
    pub(super) rest: Option<Duration>,
    /// Addresses of members' own pods and of their hosts, from which probes are answered.
    pub(super) probers: BTreeMap<IpAddr, NodeId>,
    /// The same addresses as socket filters.
    pub(super) sources: Vec<Sources>,
    /// Addresses that rules of this host may have put in place of a member's.
    pub(super) own: BTreeSet<IpAddr>,
}

impl TrialInput {
    /// Returns whether probes from an address are answered.
    pub(super) fn may_probe(&self, from: IpAddr) -> bool {
        self.probers.contains_key(&from) || self.own.contains(&from)
    }

    /// Returns whether a packet from an address may be this member's. Only it knows a round's number.
    pub(super) fn may_be_of(&self, from: IpAddr, node: NodeId) -> bool {
        self.probers.get(&from).map_or(self.own.contains(&from), |prober| *prober == node)
    }
}
