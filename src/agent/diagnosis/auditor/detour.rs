//! Tunnel packets that do not leave by the underlay interface, or not directly, and the route that
//! causes it.

use std::{io, net::IpAddr};

use ipnet::IpNet;
use rtnetlink::packet_route::route::RouteProtocol;

use super::{Place, hop_limit::HopLimit, reason, refusal, refuser::Refuser};
use crate::{
    dataplane::audit::likely_program,
    model::{PacketSelector, Ports, Problem, ProblemCode, dotted, ip_command},
    netlink::{
        Netlink,
        link::Link,
        neighbour::is_resolved,
        route::{Entry, Query, RouteLookup, Rule},
    },
    sysctl,
};

/// `RT_TABLE_DEFAULT`, `RT_TABLE_MAIN`, `RT_TABLE_LOCAL`: tables that exist on every host.
const TABLES: [(u32, &str); 3] = [(253, "default"), (254, "main"), (255, "local")];

/// Remedy where no route is known that refuses packets.
const ADD_ROUTE: &str = "add the route that is missing, or take away the one that refuses";

/// Range of local ports of a kernel that is not configured otherwise.
const USUAL_PORTS: Ports = Ports { first: 32_768, last: 60_999 };
/// Limit of ranges of source ports for which routes are looked up.
const MAX_RANGES: usize = 4;

/// The actual way of tunnel packets to a host. It may be intended (a host with several uplinks), and is
/// reported only if the host does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detour {
    /// By this interface.
    By { interface: String, lead: Lead },
    /// By a gateway, although the host is in the underlay's own network.
    Gateway { gateway: IpAddr, lead: Lead },
    /// By a gateway that an ICMP redirect announced.
    Redirected { gateway: IpAddr },
    /// Rejected, with the kernel's error.
    Refused(String),
    /// Rejected by a route or a policy rule.
    RefusedBy(Refuser),
    /// By the underlay interface, with a hop limit that is too small for the routers on the way.
    HopLimit(HopLimit),
}

/// The way of those tunnel packets that have one of these source ports. Tunnel packets have the source port
/// of their flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowDetour {
    /// The way.
    pub detour: Detour,
    /// The source ports.
    pub ports: Ports,
}

/// The route that sends packets there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lead {
    table: u32,
    /// Priority of the first policy rule that leads to the table.
    rule: Option<u32>,
    /// The route's destination; `None` if it is a default route or unknown.
    route: Option<IpNet>,
    gateway: Option<IpAddr>,
    /// Whether the kernel made the route for an address of the interface.
    by_address: bool,
}

/// Returns the detour that the result of a lookup shows, if any.
pub fn of(
    netlink: &mut Netlink,
    query: &Query,
    found: &io::Result<RouteLookup>,
    links: &mut Option<Vec<Link>>,
    place: Place<'_>,
) -> Option<Detour> {
    let mut refused = |errno| match Refuser::of(netlink, query, errno) {
        Some(refuser) => Detour::RefusedBy(refuser),
        None => Detour::Refused(reason(errno)),
    };
    match found {
        Ok(found) => match refusal(found.kind) {
            Some(errno) => Some(refused(errno)),
            None if found.link == place.underlay => {
                let by_gateway = gateway_detour(netlink, query, found, place.networks);
                by_gateway.or_else(|| {
                    HopLimit::of(netlink, query, found, place.name).map(Detour::HopLimit)
                })
            }
            None => {
                let links = links.get_or_insert_with(|| netlink.links().unwrap_or_default());
                interface_detour(netlink, query, links, found, place.underlay)
            }
        },
        Err(error) => error.raw_os_error().map(refused),
    }
}

/// Returns the source ports of tunnel packets that policy rules select. The kernel takes these ports from
/// the range for local ports.
pub fn rules_by_port(netlink: &mut Netlink) -> Vec<Ports> {
    let range = sysctl::read("net/ipv4/ip_local_port_range");
    let range = range.as_deref().and_then(port_range).unwrap_or(USUAL_PORTS);
    let mut rules = Vec::new();
    for ipv4 in [true, false] {
        rules.extend(netlink.rules(ipv4).unwrap_or_default());
    }
    let mut selected: Vec<Ports> =
        rules.iter().filter_map(|rule| selected_ports(rule, range)).collect();
    selected.sort_unstable();
    selected.dedup();
    selected.truncate(MAX_RANGES);
    selected
}

fn port_range(text: &str) -> Option<Ports> {
    let mut numbers = text.split_whitespace().map(|number| number.parse().ok());
    Some(Ports { first: numbers.next()??, last: numbers.next()?? })
}

/// Returns those ports of a range that a rule selects by source port, for UDP packets.
fn selected_ports(rule: &Rule, range: Ports) -> Option<Ports> {
    const UDP: u8 = 17;
    let is_udp = rule.selector.protocol.is_none_or(|protocol| protocol == UDP);
    let ports = rule.selector.source.filter(|_| is_udp && !rule.inverted)?;
    let both = Ports { first: ports.first.max(range.first), last: ports.last.min(range.last) };
    (both.first <= both.last).then_some(both)
}

/// Returns the detour of the flows with these source ports, if there is one.
pub fn of_flows(
    netlink: &mut Netlink,
    query: &Query,
    selected: &[Ports],
    links: &mut Option<Vec<Link>>,
    place: Place<'_>,
) -> Option<FlowDetour> {
    selected.iter().find_map(|ports| {
        let transport =
            query.transport.map(|of| PacketSelector { source: Some(ports.first), ..of });
        let query = Query { transport, ..*query };
        let found = netlink.route(&query);
        let detour = of(netlink, &query, &found, links, place)?;
        Some(FlowDetour { detour, ports: *ports })
    })
}

/// Returns a detour if packets to a host use a gateway because of an ICMP redirect, or although the host
/// is in one of these networks.
pub fn gateway_detour(
    netlink: &mut Netlink,
    query: &Query,
    found: &RouteLookup,
    networks: &[IpNet],
) -> Option<Detour> {
    let gateway = found.gateway.filter(|gateway| *gateway != query.to)?;
    if found.redirected {
        return Some(Detour::Redirected { gateway });
    }
    let is_on_link = networks.iter().any(|network| network.contains(&query.to));
    is_on_link.then(|| Detour::Gateway { gateway, lead: lead(netlink, query, found) })
}

/// Returns whether the networks that contain the host have no route without a router. A route to a part of
/// them does not count, nor does a route for some packets only.
pub fn has_no_direct_route(netlink: &mut Netlink, host: IpAddr, networks: &[IpNet]) -> bool {
    let query = Query::to(host);
    let is_routed = netlink.route(&query).is_ok_and(|found| found.gateway.is_some());
    // Kernels before 4.17 do not support this lookup.
    let entry = netlink.route_entry(&query).ok().filter(|_| is_routed);
    let mut around = networks.iter().filter(|network| network.contains(&host));
    entry.is_some_and(|entry| around.any(|network| entry.prefix_len <= network.prefix_len()))
}

/// Returns a detour if packets leave by another interface than the one with this host's address. If that
/// is the loopback interface, they always do, and no detour is reported.
pub fn interface_detour(
    netlink: &mut Netlink,
    query: &Query,
    links: &[Link],
    found: &RouteLookup,
    underlay: u32,
) -> Option<Detour> {
    let link = |index: u32| links.iter().find(|link| link.index == index);
    let interface =
        link(found.link).filter(|_| link(underlay).is_some_and(|link| !link.loopback))?;
    Some(Detour::By { interface: interface.name.clone(), lead: lead(netlink, query, found) })
}

/// Returns whether a host answers ARP or neighbor discovery on the interface by which packets to it leave, so
/// that this way reaches it. On a bridge another machine may answer: a container with the same address.
pub fn answers_on_link(
    netlink: &mut Netlink,
    host: IpAddr,
    links: &[Link],
    found: &RouteLookup,
) -> bool {
    let is_bridge = links.iter().any(|link| link.index == found.link && link.kind == "bridge");
    let is_direct = found.gateway.is_none() && !is_bridge;
    is_direct
        && netlink.neighbour(found.link, host).is_ok_and(|state| state.is_some_and(is_resolved))
}

/// Determines the route behind a lookup.
fn lead(netlink: &mut Netlink, query: &Query, found: &RouteLookup) -> Lead {
    // Kernels before 4.17 do not support this lookup.
    let entry = netlink.route_entry(query).ok().filter(|entry| entry.table == found.table);
    let rules = netlink.rules(query.to.is_ipv4()).unwrap_or_default();
    let mut of_table = rules.iter().filter(|rule| rule.table == found.table);
    let rule = of_table.clone().find(|rule| rule.takes(query, None)).or_else(|| of_table.next());
    Lead {
        table: found.table,
        rule: rule.map(|rule| rule.priority),
        route: entry.as_ref().and_then(Entry::network),
        gateway: found.gateway,
        by_address: entry.is_some_and(|entry| entry.protocol == RouteProtocol::Kernel),
    }
}

impl Detour {
    /// Returns whether no tunnel packet arrives by this way: the kernel refuses it, or the way leads into the
    /// tunnels of this VXLAN device itself.
    pub fn is_certain_loss(&self, device: &str) -> bool {
        match self {
            Self::Refused(_) | Self::RefusedBy(_) => true,
            Self::By { interface, .. } => interface == device,
            _ => false,
        }
    }

    /// Describes the detour, for a host that does not answer tunnel packets to this port; `ports` are the
    /// source ports of those that take it, or `None` for all.
    pub fn problem(
        &self,
        name: &str,
        [here, there]: [IpAddr; 2],
        port: u16,
        ports: Option<Ports>,
        underlay: &str,
    ) -> Problem {
        let lost = |what: String, fix: String| Problem::new(ProblemCode::PathLost, name, what, fix);
        let (sport, of_flows) = match ports {
            Some(ports) => (
                format!(" sport {}", ports.first),
                format!(" with the source ports {ports} of flows"),
            ),
            None => (String::new(), String::new()),
        };
        let get =
            format!("ip route get {there} from {here} ipproto udp{sport} dport {port}; ip rule");
        let no_way = |why: &str, fix: &str| {
            let what = match ports {
                None => {
                    format!("this host has no route to {name} ({there}) on the underlay: {why}")
                }
                Some(_) => format!(
                    "tunnel packets{of_flows} have no route to {name} ({there}) on the underlay: {why}"
                ),
            };
            lost(what, format!("{fix} ({get})"))
        };
        let (way, interface, lead) = match self {
            Self::Refused(why) => return no_way(why, ADD_ROUTE),
            Self::RefusedBy(refuser) => {
                let (why, fix) = refuser.texts(there);
                return no_way(&why, &fix);
            }
            Self::HopLimit(limit) => {
                let (how, fix) = limit.texts(there);
                let what = format!("tunnel packets to {name} ({there}) leave this host {how}");
                return lost(what, format!("{fix} ({get})"));
            }
            Self::Redirected { gateway } => {
                let family = if there.is_ipv4() { 4 } else { 6 };
                let refuse = ["all", underlay].map(|name| {
                    dotted(&format!("net/ipv{family}/conf/{name}/accept_redirects")) + "=0"
                });
                let flush = ip_command(there.is_ipv4());
                let what = format!(
                    "an ICMP redirect leads tunnel packets to {name} ({there}) by {gateway}, and no answer \
                     arrives"
                );
                let fix = format!(
                    "sysctl -w {} (and a file in /etc/sysctl.d), then {flush} route flush cache; see which \
                     machine sends such redirects ({get})",
                    refuse.join(" ")
                );
                return lost(what, fix);
            }
            Self::By { interface, lead } => {
                let way = format!("{interface}, not by {underlay}, which has its address {here}");
                (way, interface.as_str(), lead)
            }
            Self::Gateway { gateway, lead } => {
                let way = format!(
                    "the gateway {gateway}, though {there} is in the network of {underlay} itself"
                );
                (way, underlay, lead)
            }
        };
        let (cause, fix) = lead.texts(there, interface, underlay);
        let what = format!(
            "tunnel packets{of_flows} to {name} ({there}) leave this host by {way}, and no answer arrives: \
             {cause}"
        );
        lost(what, format!("{fix} ({get})"))
    }
}

impl Lead {
    fn texts(&self, there: IpAddr, interface: &str, underlay: &str) -> (String, String) {
        let Self { table, rule, route, gateway, by_address } = self;
        let family = ip_command(there.is_ipv4());
        let program = likely_program(*table, interface);
        let Some((_, name)) = TABLES.iter().find(|(number, _)| number == table) else {
            let program = program.unwrap_or("another program, such as a VPN");
            let (rule, before) = match rule {
                Some(rule) => (format!(" ({family} rule {rule})"), rule.saturating_sub(1)),
                None => (String::new(), 0),
            };
            return (
                format!("table {table} routes them there{rule}, probably of {program}"),
                format!(
                    "give packets to it precedence: {family} rule add to {there} lookup main priority \
                     {before}"
                ),
            );
        };
        let beside =
            format!("{family} route add {there} dev {underlay}, with via GATEWAY where it has one");
        let Some(route) = route else {
            return (
                format!("the default route of table {name} sends them there"),
                format!("add a route to it ({beside})"),
            );
        };
        if *name == "local" {
            let (held, remove) = match by_address {
                true => ("address", format!("{family} addr del {route} dev {interface}")),
                false => (
                    "local route",
                    format!("{family} route del local {route} dev {interface} table local"),
                ),
            };
            return (
                format!("the {held} {route} of {interface} makes {there} an address of this host"),
                format!("remove it ({remove})"),
            );
        }
        let is_of_host = route.prefix_len() == route.max_prefix_len();
        let other = match is_of_host {
            true => format!("replace it ({})", beside.replacen(" add ", " replace ", 1)),
            false => format!("add a narrower route ({beside})"),
        };
        if *by_address {
            return (
                format!("the network {route} of {interface} includes {there} (table {name})"),
                format!(
                    "if that host is not there, give {interface} another network (where Docker made it: \
                     docker network rm, and create it with another --subnet), or {other}"
                ),
            );
        }
        let via = gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        let program =
            program.map(|program| format!(", probably of {program},")).unwrap_or_default();
        let of_table = if *name == "main" { String::new() } else { format!(" table {name}") };
        let narrower = match is_of_host {
            true => String::new(),
            false => format!(", or, where it is needed, add a narrower one ({beside})"),
        };
        (
            format!(
                "the route {route}{via} dev {interface} of table {name}{program} sends them there"
            ),
            format!("remove it ({family} route del {route}{of_table}){narrower}"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said_of(interface: &str, table: u32, route: Option<&str>, by_address: bool) -> String {
        let route = route.map(|route| route.parse().expect("a network"));
        let gateway = Some([10, 99, 0, 200].into());
        let lead = Lead { table, rule: Some(5_270), route, gateway, by_address };
        let between = [[10, 99, 0, 11].into(), [10, 99, 0, 12].into()];
        let interface = interface.to_owned();
        Detour::By { interface, lead }.problem("n2", between, 8472, None, "eth0").to_string()
    }

    fn said(table: u32, route: Option<&str>, by_address: bool) -> String {
        said_of("up1", table, route, by_address)
    }

    #[test]
    fn detour_by_main_table_names_route_and_delete_command() {
        let host = said(254, Some("10.99.0.12/32"), false);
        let words = "the route 10.99.0.12/32 via 10.99.0.200 dev up1 of table main sends them there: remove \
                     it (ip route del 10.99.0.12/32) (";
        assert!(host.contains(words) && !host.contains("254"), "{host}");
        let half = said(254, Some("0.0.0.0/1"), false);
        let words = "(ip route del 0.0.0.0/1), or, where it is needed, add a narrower one (ip route add \
                     10.99.0.12 dev eth0";
        assert!(half.contains(words), "{half}");
    }

    #[test]
    fn way_into_the_tunnels_is_a_certain_loss_and_another_interface_is_not() {
        let lead = Lead { table: 254, rule: None, route: None, gateway: None, by_address: false };
        let by =
            |interface: &str| Detour::By { interface: interface.to_owned(), lead: lead.clone() };
        assert!(by("gossamer.1").is_certain_loss("gossamer.1"));
        assert!(!by("eth1").is_certain_loss("gossamer.1"));
        assert!(Detour::Refused("no route".to_owned()).is_certain_loss("gossamer.1"));
    }

    #[test]
    fn detour_names_interface_network_or_default_route() {
        let network = said(254, Some("10.99.0.8/29"), true);
        assert!(
            network.contains("the network 10.99.0.8/29 of up1 includes 10.99.0.12"),
            "{network}"
        );
        let client = said_of("ppp0", 254, Some("10.99.0.12/32"), true);
        assert!(client.contains("ip route replace 10.99.0.12 dev eth0"), "{client}");
        assert!(!client.contains("ip route add"), "{client}");
        let default = said(254, None, false);
        assert!(default.contains("the default route of table main sends them there"), "{default}");
    }

    #[test]
    fn detour_by_table_local_names_the_address_or_route_to_remove() {
        let address = said_of("lo", 255, Some("10.99.0.12/32"), true);
        let words = "the address 10.99.0.12/32 of lo makes 10.99.0.12 an address of this host: remove it (ip \
                     addr del 10.99.0.12/32 dev lo) (";
        assert!(address.contains(words), "{address}");
        let route = said_of("lo", 255, Some("10.99.0.0/16"), false);
        let words = "remove it (ip route del local 10.99.0.0/16 dev lo table local) (";
        assert!(route.contains(words), "{route}");
    }

    #[test]
    fn detour_by_redirect_names_sysctls() {
        let between = [[10, 99, 0, 11].into(), [10, 99, 0, 12].into()];
        let said = Detour::Redirected { gateway: [10, 99, 0, 77].into() };
        let said = said.problem("n2", between, 8472, None, "eth0.5").to_string();
        let words = "an ICMP redirect leads tunnel packets to n2 (10.99.0.12) by 10.99.0.77, and no answer \
                     arrives: sysctl -w net.ipv4.conf.all.accept_redirects=0 \
                     net.ipv4.conf.eth0/5.accept_redirects=0";
        assert!(said.contains(words) && said.contains("then ip route flush cache"), "{said}");
    }

    #[test]
    fn detour_by_foreign_table_names_rule_and_program() {
        let advice = "ip rule add to 10.99.0.12 lookup main priority 5269";
        for (interface, table, words) in [
            ("up1", 77, "table 77 routes them there (ip rule 5270), probably of another program"),
            ("tailscale0", 52, "table 52 routes them there (ip rule 5270), probably of Tailscale"),
            ("home", 51_820, "routes them there (ip rule 5270), probably of WireGuard (wg-quick)"),
        ] {
            let said = said_of(interface, table, Some("10.99.0.0/16"), false);
            assert!(said.contains(words) && said.contains(advice), "{said}");
        }
        let half = said_of("tun0", 254, Some("0.0.0.0/1"), false);
        let words = "of table main, probably of OpenVPN or another VPN, sends them there";
        assert!(half.contains(words), "{half}");
    }

    #[test]
    fn rule_by_source_port_selects_ports_of_flows_only_where_ranges_overlap() {
        let range = port_range("32768\t60999\n").expect("a range");
        let rule = |first, last, protocol, inverted| {
            let source = Some(Ports { first, last });
            let selector = crate::model::Selector { source, protocol, ..Default::default() };
            let (priority, input, mark, protocol) = (1_000, None, None, None);
            Rule { priority, selector, inverted, input, table: 99, refuses: false, mark, protocol }
        };
        let ports = |rule| selected_ports(&rule, range).map(|ports| ports.to_string());
        assert_eq!(ports(rule(1, 65_535, Some(17), false)).as_deref(), Some("32768-60999"));
        assert_eq!(ports(rule(40_000, 50_000, None, false)).as_deref(), Some("40000-50000"));
        assert_eq!(ports(rule(1, 1_024, Some(17), false)), None);
        assert_eq!(ports(rule(40_000, 50_000, Some(6), false)), None);
        assert_eq!(ports(rule(40_000, 50_000, Some(17), true)), None);
    }
}
