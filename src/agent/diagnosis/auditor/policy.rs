//! Policy rules and conditional routes of this host that may match some packets of pods.

use std::{collections::BTreeSet, io};

use ipnet::IpNet;
use rtnetlink::packet_route::route::RouteProtocol;

use crate::{
    dataplane::{
        audit::{OwnSubnet, SelectedPackets},
        desired::ROUTE_PROTOCOL,
    },
    model::{Selector, Subnets},
    netlink::{Netlink, route::Rule},
};

/// Maximum number of tested selectors per family.
const MAX_SELECTORS: usize = 32;

/// Selectors of policy rules and routes that may match packets between pods.
#[derive(Debug, Default)]
pub struct Found {
    /// Selectors to test.
    pub selected: Vec<SelectedPackets>,
    /// Numbers of further selectors of rules and of routes, which are not tested.
    pub unread: [usize; 2],
}

/// Returns the selectors of both families' policy rules and of these routes that may match packets
/// between pods, without rules that match every packet. Rules with marks are skipped, because marks are
/// unknown here. `links` are the interfaces by which packets of pods arrive.
///
/// # Errors
/// Fails if the policy rules cannot be read.
pub fn selected(
    netlink: &mut Netlink,
    own: &[OwnSubnet],
    networks: Subnets,
    links: &[u32],
    conditional: &BTreeSet<Selector>,
) -> io::Result<Found> {
    let mut found = Found::default();
    for ipv4 in [true, false] {
        let own = own.iter().find(|own| own.subnet.addr().is_ipv4() == ipv4);
        let Some(own) = own.filter(|own| own.inside.is_some()) else { continue };
        let Some(all) = networks.iter().find(|network| network.addr().is_ipv4() == ipv4) else {
            continue;
        };
        let mut selected = Vec::new();
        for rule in netlink.rules(ipv4)?.iter().filter(|rule| selects(rule)) {
            if !meets(&rule.selector, own.subnet, all) {
                continue;
            }
            let input = match &rule.input {
                // A packet that a negated rule names continues with the next rules, whatever its
                // interface.
                Some(name) if !rule.inverted => match netlink.link(name)? {
                    Some(link) if links.contains(&link.index) => Some(link.index),
                    _ => continue,
                },
                _ => None,
            };
            selected.push(SelectedPackets { selector: rule.selector, input, ipv4 });
        }
        let of_family =
            |selector: &&Selector| selector.to.is_some_and(|to| to.addr().is_ipv4() == ipv4);
        let routes = conditional.iter().filter(of_family);
        let routes = routes.filter(|selector| meets(selector, own.subnet, all));
        let routes =
            routes.map(|selector| SelectedPackets { selector: *selector, input: None, ipv4 });
        for (distinct, unread) in
            [distinct(selected), distinct(routes.collect())].into_iter().zip(&mut found.unread)
        {
            found.selected.extend(distinct.0);
            *unread += distinct.1;
        }
    }
    Ok(found)
}

/// Describes a result without diverted packets, and how many rules and routes were not tested.
pub fn detail(subnets: usize, unread: [usize; 2]) -> String {
    let untried =
        ["policy rule", "route"].into_iter().zip(unread).map(|(what, count)| match count {
            0 => String::new(),
            1 => format!("; 1 {what} that may select packets of pods was not tested"),
            count => {
                format!("; {count} {what}s that may select packets of pods were not tested")
            }
        });
    format!("{subnets} subnets of peers have routes{}", untried.collect::<String>())
}

/// Keeps one of several selectors that match the same packets, and at most [`MAX_SELECTORS`]. The second
/// value is the number of omitted ones.
fn distinct(selected: Vec<SelectedPackets>) -> (Vec<SelectedPackets>, usize) {
    let (mut distinct, mut unread) = (Vec::new(), 0);
    let mut known = BTreeSet::new();
    for one in selected {
        let selects = Selector { priority: None, ..one.selector };
        if !known.insert((selects, one.input)) {
            continue;
        }
        if distinct.len() < MAX_SELECTORS {
            distinct.push(one);
        } else {
            unread += 1;
        }
    }
    (distinct, unread)
}

/// Returns whether the selector may match packets between pods of this subnet and others of the overlay.
fn meets(selector: &Selector, own: IpNet, all: IpNet) -> bool {
    let touches = |wanted: Option<IpNet>, network: IpNet| {
        wanted.is_none_or(|wanted| wanted.contains(&network) || network.contains(&wanted))
    };
    let Selector { from, to, .. } = *selector;
    touches(from, own) && touches(to, all) || touches(from, all) && touches(to, own)
}

/// Returns whether the rule belongs to another program and matches a known part of the packets. A rule
/// with `not` also affects the packets that it names: it leaves them to the next rules.
fn selects(rule: &Rule) -> bool {
    let Rule { selector, mark, protocol, .. } = rule;
    let is_ours = *protocol == Some(RouteProtocol::Other(ROUTE_PROTOCOL));
    let some = selector.from.is_some()
        || selector.to.is_some()
        || selector.transport().is_some()
        || selector.tos != 0;
    some && mark.is_none() && !is_ours
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Option<IpNet> {
        Some(text.parse().expect("a network"))
    }

    fn selector(priority: u32, from: Option<IpNet>, to: Option<IpNet>) -> Selector {
        Selector { priority: Some(priority), from, to, ..Selector::default() }
    }

    #[test]
    fn rules_for_other_networks_are_not_tested() {
        let [own, all] =
            ["10.42.1.0/24", "10.42.0.0/16"].map(|text| text.parse().expect("a network"));
        let is_met = |from, to| meets(&selector(1, from, to), own, all);
        for (from, to) in [
            (net("10.42.1.7/32"), None),
            (None, net("10.42.1.0/26")),
            (net("10.42.2.9/32"), None),
            (net("0.0.0.0/0"), net("10.42.2.0/24")),
            (net("10.42.2.0/24"), net("10.0.0.0/8")),
        ] {
            assert!(is_met(from, to), "{from:?} {to:?}");
        }
        for (from, to) in [
            (net("192.168.7.0/24"), None),
            (None, net("10.43.0.0/16")),
            (net("10.42.1.0/24"), net("192.168.0.0/16")),
            (net("10.42.2.0/24"), net("10.42.3.0/24")),
        ] {
            assert!(!is_met(from, to), "{from:?} {to:?}");
        }
    }

    #[test]
    fn equal_selectors_count_once_and_excess_ones_are_counted() {
        let of = |number: u8, priority| {
            let from = IpNet::new([10, 42, 1, number].into(), 32).ok();
            SelectedPackets { selector: selector(priority, from, None), input: None, ipv4: true }
        };
        let alike = (0..100).map(|priority| of(7, priority));
        let others = (100..150).map(|number| of(number, number.into()));
        let (selected, unread) = distinct(alike.chain(others).collect());
        assert_eq!((selected.len(), unread), (MAX_SELECTORS, 51 - MAX_SELECTORS));
        assert_eq!(selected[..2], [of(7, 0), of(100, 100)]);
        assert_eq!(distinct(Vec::new()).1, 0);
    }
}
