//! Lookups of packets to pods of this host: a foreign route may take a part of this node's own
//! subnet.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Audit, Expected, HostState, Kind, Lookup, OwnSubnet, spread_address};
use crate::{
    dataplane::{
        desired::{Hop, RouteTarget},
        plan::full_len,
    },
    pods::{gateway, last_address},
};

/// Addresses of each own subnet that one pass looks up. Four passes cover a /24.
const HOME_ADDRESSES_PER_PASS: u32 = 64;

impl Audit {
    /// Appends lookups of packets to pods of this host: as they arrive from a peer, and as this
    /// host itself sends them.
    pub(super) fn add_home_lookups(
        &self,
        own: &OwnSubnet,
        peer: Option<(&IpNet, &Hop)>,
        host: &HostState,
        lookups: &mut Vec<Lookup>,
    ) {
        let Some(link) = own.inside else { return };
        let OwnSubnet { subnet, .. } = *own;
        let from_peer = peer.and_then(|(subject, hop)| match hop.way {
            RouteTarget::Overlay(_) | RouteTarget::Device => {
                Some((last_address(*subject), host.device))
            }
            RouteTarget::Direct { link, .. } => Some((last_address(*subject), link)),
            RouteTarget::Unreachable => None,
        });
        // Pods get the lowest addresses first, so half of the lookups are for these; a route may
        // take any part of the rest.
        let low = full_len(subnet.addr()) - 8;
        let low = IpNet::new(subnet.network(), low.max(subnet.prefix_len())).unwrap_or(subnet);
        let parts: &[IpNet] = if low == subnet { &[subnet] } else { &[subnet, low] };
        let count = HOME_ADDRESSES_PER_PASS / parts.len() as u32;
        let first = self.pass.wrapping_sub(1).wrapping_mul(count);
        let in_turn = parts.iter().flat_map(|part| {
            (0..count).map(move |number| spread_address(*part, first.wrapping_add(number)))
        });
        let suspects = self.home.iter().copied().filter(|ip| subnet.contains(ip));
        let for_pods = |ip: &IpAddr| {
            let is_edge = *ip == subnet.network() || *ip == subnet.broadcast();
            !is_edge && *ip != gateway(subnet) && !host.has.contains(ip)
        };
        for to in in_turn.chain(suspects).filter(for_pods) {
            let lookup = Lookup {
                kind: Kind::Home,
                subject: subnet,
                from: None,
                to,
                input: None,
                expected: Expected::Way { link, gateway: None },
                selector: None,
            };
            lookups.push(lookup);
            lookups.extend(from_peer.map(|(from, input)| Lookup {
                from: Some(from),
                input: Some(input),
                ..lookup
            }));
        }
    }
}
