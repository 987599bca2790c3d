//! Next hops of a route with several that answer no ARP or neighbor discovery: the flows that the kernel
//! gives them are lost, and the others are not.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use rtnetlink::packet_route::neighbour::NeighbourState;

use crate::{
    dataplane::kernel::next_hops::Hop,
    model::{Problem, ProblemCode, ip_command, resolution_name},
    netlink::{Netlink, neighbour::is_resolved},
    sysctl,
};

/// How long a next hop does not answer before it is reported: a query takes 3 s to fail.
const MIN_FAILURE: Duration = Duration::from_secs(8);

/// The next hops of routes with several, and those that do not answer.
#[derive(Debug, Default)]
pub(super) struct DeadHops {
    /// The next hops of the route to each host that has several.
    hops: BTreeMap<IpAddr, Vec<Hop>>,
    /// Since when these do not answer.
    failing: BTreeMap<Hop, Instant>,
    /// Those that have not answered for [`MIN_FAILURE`].
    dead: BTreeSet<Hop>,
}

impl DeadHops {
    /// Forgets all other hosts.
    pub(super) fn retain(&mut self, hosts: &BTreeSet<IpAddr>) {
        self.hops.retain(|host, _| hosts.contains(host));
    }

    /// Sets the next hops of the route to a host.
    pub(super) fn set(&mut self, host: IpAddr, hops: Vec<(u32, Option<IpAddr>)>) {
        match hops.len() > 1 {
            true => {
                let hops = hops.into_iter().map(|(link, hop)| (link, hop.unwrap_or(host)));
                self.hops.insert(host, hops.collect());
            }
            false => _ = self.hops.remove(&host),
        }
    }

    /// Reads the neighbor entries of the next hops. The kernel is told to query those without one.
    pub(super) fn check(&mut self, now: Instant, netlink: &mut Netlink) {
        // With this setting, the kernel does not use such a next hop of an IPv4 route.
        let avoids = sysctl::number("net/ipv4/fib_multipath_use_neigh");
        let is_avoided = avoids == Some(1);
        let routes = self.hops.iter().filter(|(host, _)| !(is_avoided && host.is_ipv4()));
        let used: BTreeSet<Hop> = routes.flat_map(|(_, hops)| hops).copied().collect();
        self.failing.retain(|hop, _| used.contains(hop));
        for hop in used {
            let (link, address) = hop;
            let Ok(state) = netlink.neighbour(link, address) else { continue };
            self.note(now, hop, state);
            if matches!(state, None | Some(NeighbourState::Failed))
                && let Err(error) = netlink.resolve_neighbor(link, address)
            {
                tracing::debug!(%error, %address, "next hop not queried");
            }
        }
        let is_dead = |since: &Instant| now.saturating_duration_since(*since) >= MIN_FAILURE;
        let dead = self.failing.iter().filter(|(_, since)| is_dead(since));
        self.dead = dead.map(|(hop, _)| *hop).collect();
    }

    /// Whether a next hop does not answer, and it is not yet certain that it is dead.
    pub(super) fn is_undecided(&self) -> bool {
        self.failing.keys().any(|hop| !self.dead.contains(hop))
    }

    /// Records the state of a next hop's entry. An entry that is missing shows nothing.
    fn note(&mut self, now: Instant, hop: Hop, state: Option<NeighbourState>) {
        match state {
            Some(NeighbourState::Failed | NeighbourState::Incomplete) => {
                self.failing.entry(hop).or_insert(now);
            }
            Some(NeighbourState::Permanent | NeighbourState::Noarp) => {
                _ = self.failing.remove(&hop)
            }
            Some(state) if is_resolved(state) => _ = self.failing.remove(&hop),
            _ => {}
        }
    }

    /// Returns a next hop that does not answer for each host whose route has one.
    pub(super) fn by_host(&self) -> BTreeMap<IpAddr, IpAddr> {
        let dead = |hops: &[Hop]| hops.iter().find(|hop| self.dead.contains(hop)).copied();
        self.hops.iter().filter_map(|(host, hops)| Some((*host, dead(hops)?.1))).collect()
    }

    /// Returns a problem for each next hop that does not answer.
    pub(super) fn problems(&self, netlink: &mut Netlink) -> Vec<Problem> {
        if self.dead.is_empty() {
            return Vec::new();
        }
        let links = netlink.links().unwrap_or_default();
        let problem = |hop: &Hop| {
            let hosts = self.hops.iter().filter(|(_, hops)| hops.contains(hop));
            let hosts: Vec<IpAddr> = hosts.map(|(host, _)| *host).collect();
            let link = links.iter().find(|link| link.index == hop.0);
            problem(hop.1, link.map_or("?", |link| &link.name), &hosts)
        };
        self.dead.iter().map(problem).collect()
    }
}

fn problem(hop: IpAddr, interface: &str, hosts: &[IpAddr]) -> Problem {
    let asked = resolution_name(hop.is_ipv4());
    // An IPv4 route can have next hops of IPv6 (RFC 5549).
    let of_ipv4 = hosts.first().map_or(hop.is_ipv4(), IpAddr::is_ipv4);
    let family = ip_command(of_ipv4);
    let first = hosts.first().map_or_else(String::new, ToString::to_string);
    let more = match hosts.len() {
        0 | 1 => String::new(),
        count => format!(" and {} more", count - 1),
    };
    let what = format!(
        "next hop {hop} on {interface} of the route to {first}{more} answers no {asked}: this route has \
         several next hops, and the flows of pods and agents that the kernel sends by {hop} are lost"
    );
    let avoid = match of_ipv4 {
        true => {
            ", or let the kernel use only those that answer: sysctl -w \
                 net.ipv4.fib_multipath_use_neigh=1 (and a file in /etc/sysctl.d), then ip route flush cache"
        }
        false => "",
    };
    let fix = format!(
        "is that router off, or in another network segment? Start it, or remove it from the route \
         ({family} route get fibmatch {first}){avoid}"
    );
    Problem::new(ProblemCode::Diverted, Problem::HOST, what, fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_hop_fails_until_its_entry_is_resolved() {
        let (mut dead, now) = (DeadHops::default(), Instant::now());
        let hop: Hop = (2, [10, 99, 1, 3].into());
        let states = [
            (Some(NeighbourState::Reachable), false),
            (None, false),
            (Some(NeighbourState::Incomplete), true),
            (None, true),
            (Some(NeighbourState::Failed), true),
            (Some(NeighbourState::Stale), false),
        ];
        for (state, fails) in states {
            dead.note(now, hop, state);
            assert_eq!(dead.failing.contains_key(&hop), fails, "{state:?}");
        }
    }

    #[test]
    fn problem_names_next_hop_and_hosts() {
        let hosts = [[10, 99, 2, 2].into(), [10, 99, 2, 3].into()];
        let said = problem([10, 99, 1, 3].into(), "eth0", &hosts).to_string();
        let words =
            "next hop 10.99.1.3 on eth0 of the route to 10.99.2.2 and 1 more answers no ARP";
        assert!(said.contains(words) && said.contains("fib_multipath_use_neigh=1"), "{said}");
        let hop = "fe80::1".parse().expect("an address");
        let said = problem(hop, "eth0", &hosts).to_string();
        assert!(said.contains("answers no neighbor discovery"), "{said}");
        assert!(said.contains("(ip route get fibmatch 10.99.2.2)"), "{said}");
    }
}
