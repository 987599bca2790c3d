//! Policy rules and routes of this host that may take some packets of pods.

use std::{collections::BTreeSet, io};

use ipnet::IpNet;
use rtnetlink::packet_route::route::RouteProtocol;

use crate::{
    dataplane::{
        audit::{Own, Selected},
        desired::ROUTE_PROTOCOL,
    },
    model::{Selector, Subnets},
    netlink::{Netlink, route::Rule},
};

/// Selectors of a family that packets are tried with.
const MOST: usize = 32;

/// What policy rules and routes select that may be packets between pods.
#[derive(Debug, Default)]
pub struct Found {
    pub selected: Vec<Selected>,
    /// Further selectors of rules, and of routes, with which no packets are tried.
    pub unread: [usize; 2],
}

/// What the policy rules of both families select that may be packets between pods, apart from what every
/// packet meets; and the same of these routes. Marks cannot be known from here. Packets of pods come in by
/// these links.
///
/// # Errors
/// The kernel does not show its rules.
pub fn selected(
    netlink: &mut Netlink,
    own: &[Own],
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
                // What a negated rule names meets the rules behind it, by whichever interface it came.
                Some(name) if !rule.inverted => match netlink.link(name)? {
                    Some(link) if links.contains(&link.index) => Some(link.index),
                    _ => continue,
                },
                _ => None,
            };
            selected.push(Selected { selector: rule.selector, input, ipv4 });
        }
        let of_family =
            |selector: &&Selector| selector.to.is_some_and(|to| to.addr().is_ipv4() == ipv4);
        let routes = conditional.iter().filter(of_family);
        let routes = routes.filter(|selector| meets(selector, own.subnet, all));
        let routes = routes.map(|selector| Selected { selector: *selector, input: None, ipv4 });
        for (few, unread) in
            [few(selected), few(routes.collect())].into_iter().zip(&mut found.unread)
        {
            found.selected.extend(few.0);
            *unread += few.1;
        }
    }
    Ok(found)
}

/// That nothing takes a wrong way, and how many rules and routes were not tried.
pub fn detail(subnets: usize, unread: [usize; 2]) -> String {
    let untried =
        ["policy rule", "route"].into_iter().zip(unread).map(|(what, count)| match count {
            0 => String::new(),
            1 => format!("; 1 {what} that may select packets of pods was not looked at"),
            count => {
                format!("; {count} {what}s that may select packets of pods were not looked at")
            }
        });
    format!("{subnets} subnets of peers are routed to{}", untried.collect::<String>())
}

/// Rules that select alike are met by the same packets: of these the first is enough. The second is how many
/// are left out.
fn few(selected: Vec<Selected>) -> (Vec<Selected>, usize) {
    let (mut few, mut unread) = (Vec::new(), 0);
    let mut known = BTreeSet::new();
    for one in selected {
        let selects = Selector { priority: None, ..one.selector };
        if !known.insert((selects, one.input)) {
            continue;
        }
        if few.len() < MOST {
            few.push(one);
        } else {
            unread += 1;
        }
    }
    (few, unread)
}

/// Whether it may select packets between pods here, in this subnet, and others of the overlay.
fn meets(selector: &Selector, own: IpNet, all: IpNet) -> bool {
    let touches = |wanted: Option<IpNet>, network: IpNet| {
        wanted.is_none_or(|wanted| wanted.contains(&network) || network.contains(&wanted))
    };
    let Selector { from, to, .. } = *selector;
    touches(from, own) && touches(to, all) || touches(from, all) && touches(to, own)
}

/// Whether it is another program's and concerns some packets, and which ones is known. A rule with `not`
/// concerns those that it names, too: it leaves them to the rules behind it.
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
    fn rules_for_other_networks_and_other_hosts_do_not_count() {
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
    fn rules_that_select_alike_count_once_and_those_above_the_bound_are_counted() {
        let of = |number: u8, priority| {
            let from = IpNet::new([10, 42, 1, number].into(), 32).ok();
            Selected { selector: selector(priority, from, None), input: None, ipv4: true }
        };
        let alike = (0..100).map(|priority| of(7, priority));
        let others = (100..150).map(|number| of(number, number.into()));
        let (selected, unread) = few(alike.chain(others).collect());
        assert_eq!((selected.len(), unread), (MOST, 51 - MOST));
        assert_eq!(selected[..2], [of(7, 0), of(100, 100)]);
        assert_eq!(few(Vec::new()).1, 0);
    }
}
