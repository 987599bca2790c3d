//! The input of a trial, derived from the view and the pods.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use crate::{
    agent::Agent,
    dataplane::{
        desired::{RouteTarget, device_name},
        forwarding::TrialProtocol,
        kernel::TRIAL_MARK,
    },
    model::{Mac, PathState, Subnets},
    pods::{
        agent_pod::{Shape, link_name},
        last_addresses, last_but_one,
    },
};

/// Maximum number of peers among which a trial chooses.
const MAX_PEERS: usize = 64;
/// By this many bytes the MTU of the agent's own pod exceeds that of the tunnel.
pub const MTU_EXCESS: u32 = 64;
/// Largest MTU of an interface in bytes.
pub const MAX_MTU: u32 = 65_535;

/// Everything that a trial depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrialInput {
    /// The agent's own pod; `None` if another pod has one of its addresses.
    pub shape: Option<Shape>,
    /// The pod that has such an address, with the address.
    pub occupant: Option<String>,
    /// Name of the pods' bridge.
    pub bridge: String,
    /// This node's subnets.
    pub subnets: Subnets,
    /// Whether this host has pods, and therefore a bridge.
    pub has_pods: bool,
    /// Index of the VXLAN device.
    pub device: u32,
    /// Index of the interface by which packets without a tunnel leave.
    pub underlay: u32,
    /// Name of the VXLAN device.
    pub device_name: String,
    /// MAC of this host's VTEP.
    pub mac: Mac,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port of the tunnels.
    pub port: u16,
    /// This host's underlay address.
    pub local: IpAddr,
    /// Index of the interface by which tunnel packets must leave; `None` if the routes decide.
    pub pinned: Option<u32>,
    /// Socket mark of injected tunnel packets, by which the guard accepts them; `None` without the
    /// guard.
    pub mark: Option<u32>,
    /// Networks of the overlay.
    pub networks: Subnets,
    /// The parts of these networks that may be leased: all addresses of pods.
    pub leasable: Vec<IpNet>,
    /// MTU of the VXLAN device in bytes.
    pub carried: u32,
    /// At most [`MAX_PEERS`] peers that are not withdrawn.
    pub peers: Vec<Peer>,
    /// Whether a peer answers no probe through its tunnel.
    pub unanswered: bool,
    /// Whether packets to pods of other hosts or their answers are lost, all packets to a host without a
    /// tunnel, or all packets of a member's pods to pods here.
    pub is_remote_lost: bool,
    /// Transports of the lost packets, as far as known.
    pub lost_transports: BTreeSet<TrialProtocol>,
}

/// A peer, as trials need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// MAC of its VTEP.
    pub mac: Mac,
    /// The overlay addresses of its VTEP, one of each family.
    pub vteps: Vec<IpAddr>,
    /// Its underlay address.
    pub underlay: IpAddr,
    /// Whether packets to and from it go through a tunnel.
    pub tunnelled: bool,
    /// Whether packets to and from it are routed over the underlay.
    pub direct: bool,
    /// Size in bytes of the largest packet that is sent to it.
    pub carried: u32,
}

impl Agent {
    /// Passes the current setting to the thread.
    pub(in crate::agent) fn update_forwarder(&mut self) {
        let setting = self.forwarder_setting();
        self.threads.monitors.forwarder.set(setting);
    }

    fn forwarder_setting(&self) -> Option<TrialInput> {
        let view = self.kernel.programmed_view()?;
        let device = self.kernel.device.index?;
        let subnets = view.own.subnets;
        let addresses = last_addresses(subnets);
        let occupant = addresses.iter().find_map(|ip| {
            let holder = self.pods.table.holder(ip)?;
            Some(format!("pod {} has the address {ip}", holder.attachment))
        });
        let vni = view.settings.vni;
        let bridge = self.config.bridge_name(vni);
        let shape = occupant.is_none().then(|| Shape {
            link: link_name(vni),
            bridge: bridge.clone(),
            subnets,
            addresses,
            second_pod: last_but_one(subnets),
            mtu: (self.underlay.tunnel_mtu + MTU_EXCESS).min(MAX_MTU),
            route_mtu: self.underlay.tunnel_mtu,
        });
        let underlay = self.current_underlay();
        let withdrawn = &self.kernel.wanted.withdrawn_peers;
        let peers = view.peers.iter().filter(|(node, _)| !withdrawn.contains(node));
        let largest = self.underlay.tunnel_mtu;
        let remote_pods = &self.kernel.diagnoses.remote_pods;
        let are_all_lost = self.is_lost_without_tunnel() || !remote_pods.inward.is_empty();
        let peers = peers.filter_map(|(node, peer)| {
            let (_, subnets) = peer.leases.first()?;
            let way = underlay.way(peer.vtep.underlay, subnets.first);
            Some(Peer {
                name: self.node.name_of(*node).to_owned(),
                mac: peer.vtep.mac,
                vteps: subnets.iter().map(|subnet| subnet.network()).collect(),
                underlay: peer.vtep.underlay,
                tunnelled: matches!(way, RouteTarget::Overlay(_)),
                direct: matches!(way, RouteTarget::Direct { .. }),
                carried: self.kernel.wanted.narrow.get(node).copied().unwrap_or(largest),
            })
        });
        Some(TrialInput {
            shape,
            occupant,
            bridge,
            subnets,
            has_pods: !self.pods.table.is_empty(),
            device,
            underlay: underlay.link,
            device_name: device_name(vni),
            mac: view.own.vtep.mac,
            vni,
            port: view.settings.vxlan_port,
            local: underlay.local,
            pinned: underlay.pinned.then_some(underlay.link),
            mark: self.config.firewall.guard.then_some(TRIAL_MARK),
            networks: view.settings.pool.networks(),
            leasable: view.settings.pool.leasable_networks(),
            carried: self.underlay.tunnel_mtu,
            peers: peers.take(MAX_PEERS).collect(),
            unanswered: self.path_states().any(|(_, state, _)| state == PathState::Unanswered),
            is_remote_lost: remote_pods.is_in_doubt || are_all_lost,
            lost_transports: match are_all_lost {
                true => TrialProtocol::ALL.into(),
                false => remote_pods.closed.iter().map(|way| way.sort.kind.transport()).collect(),
            },
        })
    }
}
