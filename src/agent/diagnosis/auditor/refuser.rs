//! The route or policy rule by which the kernel refuses packets to a host.

use std::net::IpAddr;

use ipnet::IpNet;
use nix::libc::{EACCES, EHOSTUNREACH, EINVAL, ENETUNREACH};
use rtnetlink::packet_route::route::RouteProtocol;

use crate::{
    dataplane::{audit::earlier_rule, desired::ROUTE_PROTOCOL},
    model::{PacketSelector, Ports, ip_command},
    netlink::{
        Netlink,
        route::{MAIN, Query, Refusal, Rule, local_priority},
    },
};

/// The interface of a rule for packets of this host itself.
const OF_THIS_HOST: &str = "lo";

/// A route or policy rule that refuses packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refuser {
    /// A route.
    Route { destination: IpNet, kind: &'static str, table: u32 },
    /// A policy rule with this priority. `local` is that of the rule for this host's own addresses.
    Rule { priority: u32, local: u32 },
}

impl Refuser {
    /// Determines what refuses a packet with this error.
    pub fn of(netlink: &mut Netlink, query: &Query, errno: i32) -> Option<Self> {
        let ipv4 = query.to.is_ipv4();
        let (rules, refusals) = (netlink.rules(ipv4).ok()?, netlink.refusals(ipv4).ok()?);
        Self::first(query, errno, &rules, &refusals)
    }

    /// Returns the first one that the packet meets. `rules` are in the kernel's order. A table in which
    /// another route takes the packet ends the lookup without an error, so it has not come first.
    fn first(query: &Query, errno: i32, rules: &[Rule], refusals: &[Refusal]) -> Option<Self> {
        let of_packet = |refusal: &&Refusal| {
            refusal.destination.contains(&query.to)
                && refusal.condition.takes(query.from, query.tos)
                && errno_of(refusal.kind) == Some(errno)
        };
        let is_errno_of_rule = [EACCES, EINVAL, ENETUNREACH].contains(&errno);
        // The overlay's own rules are for packets of other users.
        let ours = Some(RouteProtocol::Other(ROUTE_PROTOCOL));
        let of_others = rules.iter().filter(|rule| rule.protocol != ours);
        of_others.filter(|rule| takes(rule, query)).find_map(|rule| {
            if rule.refuses {
                let (priority, local) = (rule.priority, local_priority(rules));
                return is_errno_of_rule.then_some(Self::Rule { priority, local });
            }
            let of_table = refusals.iter().filter(|refusal| refusal.table == rule.table);
            let narrowest = of_table.filter(of_packet).max_by_key(|r| r.destination.prefix_len());
            let Refusal { destination, kind, table, .. } = *narrowest?;
            Some(Self::Route { destination, kind, table })
        })
    }

    /// Returns what refuses packets to a host, and the command against it.
    pub fn texts(&self, there: IpAddr) -> (String, String) {
        let family = ip_command(there.is_ipv4());
        match self {
            Self::Route { destination, kind, table } => {
                let (of_table, table) = match *table {
                    MAIN => (String::new(), String::new()),
                    table => (format!(" of table {table}"), format!(" table {table}")),
                };
                (
                    format!("the {kind} route to {destination}{of_table} refuses packets to it"),
                    format!(
                        "remove it ({family} route del {kind} {destination}{table}), and exempt the hosts \
                         of the overlay where a program that bans addresses made it (fail2ban, for example)"
                    ),
                )
            }
            Self::Rule { priority, local } => {
                let fix = earlier_rule(&format!("to {there}"), *priority, there.is_ipv4(), *local);
                (
                    format!("{family} rule {priority} refuses packets to it"),
                    format!("give packets to it precedence: {fix}"),
                )
            }
        }
    }
}

/// Returns the error of a lookup that a route of this kind ends.
fn errno_of(kind: &str) -> Option<i32> {
    match kind {
        "unreachable" => Some(EHOSTUNREACH),
        "blackhole" => Some(EINVAL),
        "prohibit" => Some(EACCES),
        _ => None,
    }
}

/// Returns whether a rule matches a packet of this host.
fn takes(rule: &Rule, query: &Query) -> bool {
    let selector = &rule.selector;
    let inside = |network: Option<IpNet>, ip: Option<IpAddr>| {
        network.is_none_or(|network| ip.is_some_and(|ip| network.contains(&ip)))
    };
    let among = |ports: Option<Ports>, port: Option<u16>| {
        let is_in = |ports: Ports, port: u16| (ports.first..=ports.last).contains(&port);
        ports.is_none_or(|ports| port.is_some_and(|port| is_in(ports, port)))
    };
    let PacketSelector { protocol, source, destination } =
        query.transport.unwrap_or(PacketSelector { protocol: 0, source: None, destination: None });
    let mark = query.mark.unwrap_or(0);
    let is_match = inside(selector.from, query.from)
        && inside(selector.to, Some(query.to))
        && selector.protocol.is_none_or(|wanted| wanted == protocol)
        && among(selector.source, source)
        && among(selector.destination, destination)
        && (selector.tos == 0 || selector.tos == query.tos)
        && rule.input.as_ref().is_none_or(|input| input == OF_THIS_HOST)
        && rule.mark.is_none_or(|(value, mask)| mark & mask == value);
    is_match != rule.inverted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Condition, Selector};

    fn rule(priority: u32, table: u32, to: Option<&str>) -> Rule {
        let to = to.map(|to| to.parse().expect("a network"));
        Rule {
            priority,
            selector: Selector {
                priority: Some(priority),
                from: None,
                to,
                protocol: None,
                source: None,
                destination: None,
                tos: 0,
            },
            inverted: false,
            input: None,
            table,
            refuses: table == 0,
            mark: None,
            protocol: None,
        }
    }

    fn refusal(destination: &str, kind: &'static str, table: u32) -> Refusal {
        let condition = Condition { from: None, tos: 0 };
        let destination = destination.parse().expect("a network");
        Refusal { destination, table, kind, protocol: RouteProtocol::Static, condition }
    }

    fn said(errno: i32, rules: &[Rule], refusals: &[Refusal]) -> Option<String> {
        let there = [10, 99, 0, 12].into();
        let query = Query { transport: Some(PacketSelector::udp_to(8472)), ..Query::to(there) };
        let (what, fix) = Refuser::first(&query, errno, rules, refusals)?.texts(there);
        Some(format!("{what}: {fix}"))
    }

    #[test]
    fn refuser_is_the_narrowest_route_of_the_first_table() {
        let rules =
            [rule(0, 255, None), rule(900, 77, Some("10.98.0.0/16")), rule(32_766, MAIN, None)];
        let all = [
            refusal("10.99.0.12/32", "blackhole", 77),
            refusal("10.99.0.0/24", "blackhole", MAIN),
            refusal("10.99.0.12/32", "blackhole", MAIN),
            refusal("10.99.0.12/32", "throw", MAIN),
        ];
        let said_of = said(EINVAL, &rules, &all).expect("a route");
        let words = "the blackhole route to 10.99.0.12/32 refuses packets to it: remove it (ip route del \
                     blackhole 10.99.0.12/32), ";
        assert!(said_of.starts_with(words), "{said_of}");
        assert_eq!(said(EHOSTUNREACH, &rules, &all), None, "another kind of route");
        assert_eq!(said(EINVAL, &rules, &all[..1]), None, "the rule is for other packets");
        let rules = [rule(900, 77, None), rule(32_766, MAIN, None)];
        let said_of = said(EINVAL, &rules, &all).expect("a route");
        assert!(said_of.contains("10.99.0.12/32 of table 77 refuses"), "{said_of}");
        assert!(said_of.contains("(ip route del blackhole 10.99.0.12/32 table 77)"), "{said_of}");
    }

    #[test]
    fn refuser_is_a_rule_unless_it_takes_packets_of_other_interfaces_or_with_marks() {
        let (local, main) = (rule(0, 255, None), rule(32_766, MAIN, None));
        let refuse = rule(50, 0, Some("10.99.0.12/32"));
        let input = Rule { input: Some("eth1".to_owned()), ..refuse };
        let marked = Rule { mark: Some((7, u32::MAX)), ..refuse.clone() };
        let ours = Rule { protocol: Some(RouteProtocol::Other(ROUTE_PROTOCOL)), ..refuse.clone() };
        for other in [input, marked, ours] {
            assert_eq!(said(EACCES, &[local.clone(), other, main.clone()], &[]), None);
        }
        let said_of = said(EACCES, &[local, refuse, main], &[]).expect("a rule");
        let words = "ip rule 50 refuses packets to it: give packets to it precedence: ip rule add to \
                     10.99.0.12 lookup main priority 49";
        assert_eq!(said_of, words);
    }
}
