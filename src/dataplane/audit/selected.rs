//! Lookups of packets that policy rules select by address, protocol or port: a rule may divert only
//! some of a pod's packets.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{HostState, Kind, Lookup, OwnSubnet, SelectedPackets, spread_address};
use crate::pods::gateway;

/// Addresses of a network that are tried until one can be a pod's.
const MAX_ADDRESSES_TRIED: u32 = 4;

impl SelectedPackets {
    /// Returns the lookup `lookup` with addresses that the rule selects, or `None` if the rule
    /// selects no such packets.
    pub(super) fn of(&self, lookup: Lookup, own: &OwnSubnet, host: &HostState) -> Option<Lookup> {
        if self.ipv4 != lookup.to.is_ipv4()
            || self.input.is_some_and(|input| lookup.input != Some(input))
        {
            return None;
        }
        let (from, to) = match lookup.kind {
            Kind::Out => (own.subnet, lookup.subject),
            _ => (lookup.subject, own.subnet),
        };
        let of_pod = |within: IpNet, wanted: Option<IpNet>, original: IpAddr| {
            let Some(wanted) = wanted.filter(|wanted| !wanted.contains(&original)) else {
                return Some(original);
            };
            let common = common(within, wanted)?;
            let is_of_pod = |ip: &IpAddr| {
                !host.has.contains(ip) && *ip != gateway(within) && *ip != within.network()
            };
            (0..MAX_ADDRESSES_TRIED).map(|number| spread_address(common, number)).find(is_of_pod)
        };
        let selector = self.selector;
        let original = lookup.from?;
        Some(Lookup {
            from: Some(of_pod(from, selector.from, original)?),
            to: of_pod(to, selector.to, lookup.to)?,
            selector: Some(selector),
            ..lookup
        })
    }
}

/// Returns the smaller of two networks if one contains the other.
fn common(one: IpNet, other: IpNet) -> Option<IpNet> {
    if one.contains(&other) { Some(other) } else { other.contains(&one).then_some(one) }
}
