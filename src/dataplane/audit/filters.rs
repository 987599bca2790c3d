//! Lookups that reveal a reverse path filter.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Expected, HostState, Kind, Lookup, is_ipv4};
use crate::pods::last_address;

/// Returns lookups that reveal a reverse path filter, which only IPv4 has. It drops a packet that
/// arrives by another interface than the one that leads to its sender, as packets between pods and
/// hosts' underlay addresses do by design.
pub(super) fn filter_lookups(subject: IpNet, peer: IpAddr, host: &HostState) -> Vec<Lookup> {
    let own = host.own.iter().find(|own| is_ipv4(own.subnet));
    let Some(own) = own.filter(|_| host.local.is_ipv4() && is_ipv4(subject)) else {
        return Vec::new();
    };
    // Masqueraded packets have the host's address and pass the filter.
    if host.masquerade {
        return Vec::new();
    }
    let lookup = Lookup {
        kind: Kind::PodsToHost,
        subject,
        from: Some(last_address(subject)),
        to: host.local,
        input: Some(host.underlay),
        expected: Expected::Unfiltered,
        selector: None,
    };
    let to_pods = own.inside.map(|_| Lookup {
        kind: Kind::HostsToPods,
        from: Some(peer),
        to: own.pod,
        input: Some(host.device),
        ..lookup
    });
    [Some(lookup), to_pods].into_iter().flatten().collect()
}
