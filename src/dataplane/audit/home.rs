//! Questions about packets to pods of this host: another route may take a part of this node's own subnet.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Audit, Expected, Ground, Kind, Own, Question, between};
use crate::{
    dataplane::{
        desired::{Hop, Way},
        plan::full_len,
    },
    pods::{gateway, last_address},
};

/// Addresses of each of this node's own subnets that are asked about in one pass: all of a /24 in four.
const HOME_ADDRESSES: u32 = 64;

impl Audit {
    /// Packets to pods of this host: as they come from a peer, and as this host itself sends them.
    pub(super) fn ask_home(
        &self,
        own: &Own,
        peer: Option<(&IpNet, &Hop)>,
        ground: &Ground,
        questions: &mut Vec<Question>,
    ) {
        let Some(link) = own.inside else { return };
        let Own { subnet, .. } = *own;
        let comes = peer.and_then(|(subject, hop)| match hop.way {
            Way::Overlay(_) | Way::Device => Some((last_address(*subject), ground.device)),
            Way::Direct { link, .. } => Some((last_address(*subject), link)),
            Way::Unreachable => None,
        });
        // Pods are given the lowest addresses first; anything may take a part of the rest.
        let low = full_len(subnet.addr()) - 8;
        let low = IpNet::new(subnet.network(), low.max(subnet.prefix_len())).unwrap_or(subnet);
        let parts: &[IpNet] = if low == subnet { &[subnet] } else { &[subnet, low] };
        let count = HOME_ADDRESSES / parts.len() as u32;
        let first = self.pass.wrapping_sub(1).wrapping_mul(count);
        let in_turn = parts.iter().flat_map(|part| {
            (0..count).map(move |number| between(*part, first.wrapping_add(number)))
        });
        let suspects = self.home.iter().copied().filter(|ip| subnet.contains(ip));
        let for_pods = |ip: &IpAddr| {
            let is_edge = *ip == subnet.network() || *ip == subnet.broadcast();
            !is_edge && *ip != gateway(subnet) && !ground.has.contains(ip)
        };
        for to in in_turn.chain(suspects).filter(for_pods) {
            let question = Question {
                kind: Kind::Home,
                subject: subnet,
                from: None,
                to,
                input: None,
                expected: Expected::Way { link, gateway: None },
                selector: None,
            };
            questions.push(question);
            questions.extend(comes.map(|(from, input)| Question {
                from: Some(from),
                input: Some(input),
                ..question
            }));
        }
    }
}
