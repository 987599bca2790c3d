//! A hop limit (TTL) of this host so small that routers on the way drop its packets.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{
    model::{dotted, ip_command},
    netlink::{
        Netlink,
        route::{Query, RouteLookup},
    },
    sysctl,
};

/// The smallest hop limit that is not suspected. Kernels use 64, and few ways have more than 30 routers.
const MIN_LIMIT: u32 = 32;
/// The hop limit that kernels use.
const USUAL_LIMIT: u32 = 64;

/// A small hop limit of packets to a host behind a router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HopLimit {
    limit: u32,
    origin: Origin,
}

/// What sets the hop limit.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    /// The metric `hoplimit` of a route; `None` if it is a default route or unknown.
    Route(Option<IpNet>),
    /// This sysctl setting.
    Sysctl(String),
}

impl HopLimit {
    /// Returns the hop limit of packets if it is suspiciously small and their next hop is a router.
    /// `underlay` is the name of the interface by which they leave.
    pub fn of(
        netlink: &mut Netlink,
        query: &Query,
        found: &RouteLookup,
        underlay: &str,
    ) -> Option<Self> {
        found.gateway.filter(|gateway| *gateway != query.to)?;
        if let Some(limit @ 1..) = found.hop_limit {
            // Kernels before 4.17 do not support this lookup.
            let entry = netlink.route_entry(query).ok();
            let route = entry.and_then(|entry| entry.network());
            return Self::small(limit, Origin::Route(route));
        }
        let path = match query.to {
            IpAddr::V4(_) => "net/ipv4/ip_default_ttl".to_owned(),
            IpAddr::V6(_) => format!("net/ipv6/conf/{underlay}/hop_limit"),
        };
        Self::small(sysctl::number(&path)?.into(), Origin::Sysctl(dotted(&path)))
    }

    fn small(limit: u32, origin: Origin) -> Option<Self> {
        (limit < MIN_LIMIT).then_some(Self { limit, origin })
    }

    /// Describes the limit as a part of a sentence, and returns the command against it.
    pub fn texts(&self, there: IpAddr) -> (String, String) {
        let Self { limit, origin } = self;
        let kind = if there.is_ipv4() { "TTL" } else { "hop limit" };
        let family = ip_command(there.is_ipv4());
        let fate = match limit {
            1 => "the first router drops them".to_owned(),
            limit => format!("they pass at most {} routers", limit - 1),
        };
        let (why, fix) = match origin {
            Origin::Route(route) => {
                let route = route.map_or_else(|| "default".to_owned(), |route| route.to_string());
                (
                    format!("the route {route} sets it (hoplimit {limit})"),
                    format!(
                        "replace that route by one without hoplimit ({family} route show {route}; {family} \
                         route replace ...)"
                    ),
                )
            }
            Origin::Sysctl(name) => (
                format!("{name} sets it"),
                format!("sysctl -w {name}={USUAL_LIMIT} (and a file in /etc/sysctl.d)"),
            ),
        };
        (format!("with a {kind} of {limit}, so {fate}, and no answer arrives: {why}"), fix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_limit_is_described_with_its_origin_and_a_usual_one_is_not_suspected() {
        let there = [10, 99, 2, 2].into();
        let said = |limit: u32, origin: Origin| {
            let (what, fix) = HopLimit::small(limit, origin)?.texts(there);
            Some(format!("{what}: {fix}"))
        };
        let ttl = || Origin::Sysctl("net.ipv4.ip_default_ttl".to_owned());
        assert_eq!(said(64, ttl()), None);
        let of_sysctl = said(3, ttl()).expect("a text");
        let words = "with a TTL of 3, so they pass at most 2 routers, and no answer arrives: \
                     net.ipv4.ip_default_ttl sets it: sysctl -w net.ipv4.ip_default_ttl=64 (";
        assert!(of_sysctl.starts_with(words), "{of_sysctl}");
        let of_route = said(1, Origin::Route(None)).expect("a text");
        let words = "with a TTL of 1, so the first router drops them, and no answer arrives: the route \
                     default sets it (hoplimit 1): ";
        assert!(of_route.starts_with(words), "{of_route}");
    }
}
