//! Answers an audit's questions by route lookups, and collects evidence if an answer is wrong.

use std::{io, net::IpAddr};

use ipnet::IpNet;
use rtnetlink::packet_route::route::{RouteProtocol, RouteType};

use super::refusal;
use crate::{
    dataplane::{
        audit::{Cause, Evidence, Expected, InterfaceState, Kind, Lookup, LookupResult},
        desired::{Desired, ROUTE_PROTOCOL},
    },
    model::{Condition, interface_forwarding_sysctl},
    netlink::{
        Netlink,
        link::Link,
        route::{Entry, MAIN, Query, Refusal, RouteLookup, Rule, THROW},
    },
    sysctl,
};

/// Answers questions. Evidence is read only after a wrong answer, and once per pass.
pub(super) struct Witness<'a> {
    netlink: &'a mut Netlink,
    desired: &'a Desired,
    host_facts: Option<HostFacts>,
}

/// Links, addresses and rules of this host.
struct HostFacts {
    links: Vec<Link>,
    /// Addresses of this host.
    has: Vec<IpAddr>,
    /// The rules for IPv4 and IPv6, without those of gossamer.
    rules: [Vec<Rule>; 2],
    /// Whether no policy rule leads all packets to the main table.
    without_main: [bool; 2],
    /// Rejecting routes.
    refusals: [Vec<Refusal>; 2],
}

impl<'a> Witness<'a> {
    /// Returns a witness for one pass.
    pub(super) const fn new(netlink: &'a mut Netlink, desired: &'a Desired) -> Self {
        Self { netlink, desired, host_facts: None }
    }

    /// Returns why the kernel diverts a packet or limits it to a smaller size; `None` if it does
    /// neither.
    ///
    /// # Errors
    /// Fails if the kernel cannot be queried.
    pub(super) fn ask(&mut self, question: &Lookup) -> io::Result<Option<Cause>> {
        let selector = question.selector;
        let query = Query {
            from: question.from,
            input: question.input,
            transport: selector.and_then(|selector| selector.transport()),
            tos: selector.map_or(0, |selector| selector.tos),
            ..Query::to(question.to)
        };
        let found = self.netlink.route(&query);
        let (answer, found) = match found {
            Ok(found @ RouteLookup { link, gateway, table, .. }) => match refusal(found.kind) {
                Some(errno) => (LookupResult::Refused(errno), None),
                None => (LookupResult::Way { link, gateway, table }, Some(found)),
            },
            Err(error) => match error.raw_os_error() {
                Some(errno) => (LookupResult::Refused(errno), None),
                None => return Err(error),
            },
        };
        if question.agrees(answer) && !found.is_some_and(|found| found.rewrites) {
            return match found {
                Some(found) => self.route_problem(question, &query, found),
                None => Ok(None),
            };
        }
        let output = match answer {
            LookupResult::Way { link, .. } => Some(link),
            LookupResult::Refused(_) => None,
        };
        let evidence = self.evidence(question, &query, output)?;
        Ok(Cause::of(question, answer, &evidence))
    }

    /// Returns problems of another program's route that one lookup does not show: a wrong next hop among
    /// several, or a smaller MTU than that of gossamer's route.
    fn route_problem(
        &mut self,
        question: &Lookup,
        query: &Query,
        found: RouteLookup,
    ) -> io::Result<Option<Cause>> {
        let is_asked = match question.kind {
            Kind::Out => true,
            Kind::Home => query.input.is_none(),
            Kind::In | Kind::Own | Kind::PodsToHost | Kind::HostsToPods => false,
        };
        let Expected::Way { link, gateway } = question.expected else { return Ok(None) };
        let entry = is_asked.then(|| self.netlink.route_entry(query).ok()).flatten();
        let is_ours = |entry: &Entry| entry.protocol == RouteProtocol::Other(ROUTE_PROTOCOL);
        let Some(entry) = entry.filter(|entry| !is_ours(entry)) else { return Ok(None) };
        if entry.is_multipath {
            let mut hops = self.netlink.entry_hops(query)?.into_iter();
            let is_right = |(by, via): &(u32, Option<IpAddr>)| {
                *by == link && (gateway.is_none() || gateway == *via)
            };
            if let Some((link, gateway)) = hops.find(|hop| !is_right(hop)) {
                let evidence = self.evidence(question, query, Some(link))?;
                let answer = LookupResult::Way { link, gateway, table: found.table };
                return Ok(Cause::of(question, answer, &evidence));
            }
        }
        let hop = self.desired.tables.routes.get(&question.subject);
        let carried = hop.and_then(|hop| hop.mtu).unwrap_or(self.desired.device.mtu);
        let is_less = |mtu: &u32| *mtu < carried && !found.learned && question.kind == Kind::Out;
        let Some(mtu) = found.mtu.filter(is_less) else { return Ok(None) };
        let Entry { destination, prefix_len, metric, table, condition, .. } = entry;
        let destination = destination.and_then(|to| IpNet::new(to, prefix_len).ok());
        Ok(destination.map(|destination| Cause::SmallerMtu {
            destination,
            metric,
            table,
            condition,
            mtu,
            carried,
        }))
    }

    /// Collects the evidence for a wrong answer.
    fn evidence(
        &mut self,
        question: &Lookup,
        query: &Query,
        output: Option<u32>,
    ) -> io::Result<Evidence> {
        let entry = self.netlink.route_entry(query).ok();
        let is_kernels = entry.is_some_and(|entry| entry.protocol == RouteProtocol::Kernel);
        let local = entry.is_some_and(|entry| entry.kind == RouteType::Local);
        let condition = entry.map_or_else(Condition::default, |entry| entry.condition);
        let entry = entry.and_then(|entry| {
            let any = if query.to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let to = IpNet::new(entry.destination.unwrap_or(any), entry.prefix_len).ok()?;
            Some((to, entry.metric))
        });
        let back = question.from.and_then(|from| self.netlink.route(&Query::to(from)).ok());
        let host_facts = match &mut self.host_facts {
            Some(host_facts) => host_facts,
            none => none.insert(HostFacts::read(self.netlink)?),
        };
        // The remote address of a point-to-point link is no address of this host.
        let connected = is_kernels
            && entry.is_some_and(|(to, _)| host_facts.has.iter().any(|ip| to.contains(ip)));
        let family = usize::from(query.to.is_ipv6());
        let refusals = host_facts.refusals[family].iter();
        let others = refusals.filter(|refusal| {
            let is_ours = refusal.protocol == RouteProtocol::Other(ROUTE_PROTOCOL);
            // In other tables, a throw route continues with the next rule.
            let is_end = refusal.kind != THROW || refusal.table == MAIN;
            !is_ours && is_end && refusal.condition.takes(query.from, query.tos)
        });
        let input = query.input.and_then(|index| host_facts.of(index));
        let name = input.as_ref().map(|input| input.name.as_str());
        // The rule whose packets are tested, or one that matches the packet, has led them there, not another
        // rule with the same table.
        let mut rules: Vec<&Rule> = host_facts.rules[family].iter().collect();
        rules.sort_by_key(|rule| {
            let of_rule = question.selector.and_then(|selector| selector.priority);
            let is_other = of_rule.is_some_and(|of_rule| of_rule != rule.priority);
            (is_other, !rule.takes(query, name))
        });
        let rules = rules.iter().map(|rule| (rule.priority, rule.table, rule.refuses)).collect();
        Ok(Evidence {
            input,
            output: output.and_then(|index| host_facts.of(index)),
            wanted: match question.expected {
                Expected::Way { link, .. } => host_facts.of(link),
                Expected::Nowhere | Expected::Unfiltered => None,
            },
            back: back.map(|found| found.link),
            from_local: back
                .is_some_and(|found| matches!(found.kind, RouteType::Local | RouteType::Broadcast)),
            entry,
            condition,
            local,
            connected,
            ours: self.desired.tables.routes.get(&question.subject).map(|hop| hop.metric),
            rules,
            without_main: host_facts.without_main[family],
            refusals: others.map(|r| (r.destination, r.kind, r.table, r.condition)).collect(),
            forwards: !sysctl::is_forwarding_off(query.to.is_ipv4()),
            default_off: sysctl::is_off(&interface_forwarding_sysctl(true, "default")),
        })
    }
}

impl HostFacts {
    fn read(netlink: &mut Netlink) -> io::Result<Self> {
        let mut read = |ipv4| {
            let mut rules = netlink.rules(ipv4).unwrap_or_default();
            rules.retain(|rule| rule.protocol != Some(RouteProtocol::Other(ROUTE_PROTOCOL)));
            rules
        };
        let rules = [read(true), read(false)];
        let leads = |rule: &Rule| rule.table == MAIN && rule.takes_all();
        // Without any rule, the rules could not be read.
        let without_main =
            rules.each_ref().map(|rules| !rules.is_empty() && !rules.iter().any(leads));
        let mut refusals = |ipv4| netlink.refusals(ipv4).unwrap_or_default();
        let refusals = [refusals(true), refusals(false)];
        let has = netlink.addresses()?.into_iter().map(|address| address.ip).collect();
        Ok(Self { links: netlink.links()?, has, rules, without_main, refusals })
    }

    fn of(&self, index: u32) -> Option<InterfaceState> {
        let link = self.links.iter().find(|link| link.index == index)?;
        let name = &link.name;
        let controller = link.controller();
        let vrf = self.links.iter().find(|vrf| Some(vrf.index) == controller && vrf.kind == "vrf");
        Some(InterfaceState {
            name: name.clone(),
            vrf: vrf.map(|vrf| (vrf.name.clone(), vrf.vrf_table().unwrap_or_default())),
            forwards: !sysctl::is_off(&interface_forwarding_sysctl(true, name)),
            carrier: link.carrier,
            filters: sysctl::has_strict_rp_filter(name),
            without_ipv6: sysctl::number(&format!("net/ipv6/conf/{name}/disable_ipv6")) == Some(1),
        })
    }
}
