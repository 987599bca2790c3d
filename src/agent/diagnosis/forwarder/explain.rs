//! Rules that may drop packets. They are read only after a trial has shown a loss, and never decide the
//! verdict.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
};

use ipnet::IpNet;
use rtnetlink::packet_route::link::{InfoBridge, InfoData, LinkAttribute, LinkInfo};

use super::{TrialInput, gateway, ipsec, marks, partial};
use crate::{
    agent::{
        diagnosis::{
            chains,
            hooks::{self, Side},
            iptables_legacy,
        },
        host::{conntrack, fragments},
    },
    dataplane::{
        dropping_chain::DroppedBy,
        foreign::{ClosedPort, Extent, ForeignTables, LostPackets},
        forwarding::{Direction, TrialProtocol, TrialWay},
        remedies::{accept_to, accept_within, open_chain},
    },
    model::{Problem, ProblemCode, family_name, resolution_name},
    netlink::{Netlink, link::Link},
    sysctl,
};

/// Files that list the tables of iptables-legacy, with the command.
const LEGACY: [(&str, &str); 2] = [
    ("/proc/net/ip_tables_names", "iptables-legacy"),
    ("/proc/net/ip6_tables_names", "ip6tables-legacy"),
];

/// Causes found for ways on which packets are lost.
#[derive(Clone, Debug, Default)]
pub struct Reasons {
    /// Causes for forwarded packets, or where to look for them.
    pub rules: Vec<String>,
    /// Whether a cause acts before routing has decided between pods and this host.
    pub takes_all: bool,
    /// Causes for packets to pods of other hosts and for answers; `None` if not read.
    pub remote: Option<Vec<String>>,
    /// Problems of pods that cannot resolve their gateway, by whether it is the IPv4 one.
    pub gateway_problems: BTreeMap<bool, Problem>,
    /// Why rules see packets between pods, by whether it concerns IPv4.
    bridged: BTreeMap<bool, Bridged>,
    /// Problems of pods that cannot resolve each other, by whether it concerns IPv4.
    resolution_problems: BTreeMap<bool, Problem>,
    /// Rules that translate the source of pods' packets, by whether it concerns IPv4.
    translation_causes: BTreeMap<bool, String>,
    /// What drops this host's ICMP errors for too large packets, by whether it concerns IPv4.
    pub(super) icmp_error_droppers: BTreeMap<bool, DroppedBy>,
    /// What drops tunnel packets that contain packets of pods.
    pub(super) tunnel_dropper: Option<DroppedBy>,
    /// Rules of iptables-legacy that may drop them, if nothing was traced.
    pub(super) legacy: Vec<String>,
    /// Rules that divert tunnel packets that contain packets of pods.
    pub(super) diverting_rules: Vec<String>,
    /// The interface by which diverted packets leave.
    pub(super) diverted_interface: Option<String>,
}

impl Reasons {
    /// Reads the rules again, for these ways. Traced causes are copied.
    pub fn read_again(
        &self,
        netlink: &mut Netlink,
        setting: &TrialInput,
        port: Option<u32>,
        closed: &[TrialWay],
        translated: &BTreeMap<bool, IpAddr>,
    ) -> Self {
        let mut reasons = Self::default();
        reasons.icmp_error_droppers.clone_from(&self.icmp_error_droppers);
        reasons.tunnel_dropper.clone_from(&self.tunnel_dropper);
        reasons.diverted_interface.clone_from(&self.diverted_interface);
        for ipv4 in translated.keys() {
            reasons.translation_causes.insert(*ipv4, translating(setting, *ipv4));
        }
        let needs_rules = setting.is_remote_lost || closed.iter().any(needs_rules);
        let (found, takes_all) =
            if needs_rules { suspects(netlink, setting, port, closed) } else { Default::default() };
        for TrialWay { direction, ipv4 } in closed {
            if *direction == Direction::TooLarge || direction.is_of_host() {
                continue;
            }
            if *direction == Direction::Carried {
                let ipv4 = setting.local.is_ipv4();
                reasons.legacy = iptables_legacy::around_tunnels(
                    ipv4,
                    iptables_legacy::HookPath::Out,
                    setting.port,
                    None,
                );
                reasons.diverting_rules = marks::of_tunnels(netlink, setting);
                continue;
            }
            if *direction == Direction::Gateway {
                let problem = gateway::problem(netlink, setting, *ipv4);
                reasons.gateway_problems.extend(problem.map(|problem| (*ipv4, problem)));
                continue;
            }
            if *direction == Direction::NeighborDiscovery {
                reasons.resolution_problems.insert(*ipv4, resolution_problem(setting, *ipv4));
                continue;
            }
            if reasons.rules.is_empty() {
                (reasons.rules, reasons.takes_all) = (or_where_to_look(&found, setting), takes_all);
            }
            if direction.is_between() {
                let chains = chains_between(setting, *ipv4);
                let bridged = match chains.is_empty() {
                    true => Bridged::ByRules(bridged(setting, *ipv4)),
                    false => Bridged::ByChains(chains.join("; ")),
                };
                reasons.bridged.insert(*ipv4, bridged);
            }
        }
        reasons.remote = setting.is_remote_lost.then_some(found);
        reasons
    }

    /// Removes causes of ways that are not closed any more.
    pub fn keep(&mut self, closed: &[TrialWay], is_remote_lost: bool) {
        let is_closed = |is: fn(Direction) -> bool, ipv4| {
            closed.iter().any(|way| is(way.direction) && way.ipv4 == ipv4)
        };
        self.gateway_problems.retain(|ipv4, _| is_closed(|way| way == Direction::Gateway, *ipv4));
        self.bridged.retain(|ipv4, _| is_closed(Direction::is_between, *ipv4));
        self.resolution_problems
            .retain(|ipv4, _| is_closed(|way| way == Direction::NeighborDiscovery, *ipv4));
        self.icmp_error_droppers
            .retain(|ipv4, _| is_closed(|way| way == Direction::TooLarge, *ipv4));
        if !closed.iter().any(|way| way.direction == Direction::Carried) {
            (self.tunnel_dropper, self.diverted_interface) = (None, None);
            self.legacy.clear();
            self.diverting_rules.clear();
        }
        if !closed.iter().any(needs_rules) {
            self.rules.clear();
        }
        self.remote.take_if(|_| !is_remote_lost);
    }

    /// Returns whether a cause is known for each of these ways.
    pub fn explains_all(&self, closed: &[TrialWay], translated: &BTreeMap<bool, IpAddr>) -> bool {
        let is_known = |way: &TrialWay| match way.direction {
            Direction::Gateway => self.gateway_problems.contains_key(&way.ipv4),
            Direction::Between(_) => self.bridged.contains_key(&way.ipv4),
            Direction::NeighborDiscovery => self.resolution_problems.contains_key(&way.ipv4),
            Direction::Out(_) | Direction::In(_) | Direction::LargeOut => !self.rules.is_empty(),
            Direction::Carried => self.tunnel_dropper.is_some() || !self.diverting_rules.is_empty(),
            Direction::TooLarge | Direction::ToHost | Direction::FromHost(_) => true,
        };
        closed.iter().all(is_known)
            && translated.keys().all(|ipv4| self.translation_causes.contains_key(ipv4))
    }

    /// Returns problems of packets that leave with another source address than the pod's.
    pub fn translations(
        &self,
        translated: &BTreeMap<bool, IpAddr>,
    ) -> impl Iterator<Item = Problem> {
        translated.iter().map(|(ipv4, address)| {
            let what = format!(
                "packets of pods to pods of other hosts leave under the address {address} in place of the \
                 pod's own, so policies and logs there name the wrong source"
            );
            let fix = self.translation_causes.get(ipv4).map_or("", String::as_str);
            Problem::new(ProblemCode::SourceTranslated, family_name(*ipv4), what, fix)
        })
    }

    /// Returns problems of packets lost between pods of this host. If all are lost, address
    /// resolution is not reported in addition.
    pub fn between(&self) -> impl Iterator<Item = Problem> {
        let unresolved =
            self.resolution_problems.iter().filter(|(ipv4, _)| !self.bridged.contains_key(*ipv4));
        let unresolved = unresolved.map(|(_, problem)| problem.clone());
        let bridged = self.bridged.iter().map(|(ipv4, bridged)| {
            let cause = match bridged {
                Bridged::ByRules(why) => format!("{why}: {}", self.rules.join("; ")),
                Bridged::ByChains(chains) => chains.clone(),
            };
            let family = family_name(*ipv4);
            let what =
                format!("this host does not forward packets between its own pods ({family})");
            Problem::new(ProblemCode::PodsApart, family, what, cause)
        });
        bridged.chain(unresolved)
    }
}

/// Why packets between pods of this host are lost.
#[derive(Clone, Debug)]
enum Bridged {
    /// They pass the rules for forwarded packets, for this reason.
    ByRules(String),
    /// Chains of the bridge family may drop them; with remedies.
    ByChains(String),
}

/// Returns whether rules may drop packets between ports of the bridge, for IPv4 and IPv6.
pub fn are_bridged_filtered(netlink: &mut Netlink, setting: &TrialInput) -> [bool; 2] {
    let by_rules = go_through_rules(netlink, &setting.bridge);
    [true, false]
        .map(|ipv4| by_rules[usize::from(!ipv4)] || !chains_between(setting, ipv4).is_empty())
}

/// Returns chains of the bridge family that may drop packets between pods of a family, with remedies.
fn chains_between(setting: &TrialInput, ipv4: bool) -> Vec<String> {
    let networks: Vec<IpNet> = setting.networks.iter().collect();
    let network = networks.iter().find(|network| network.addr().is_ipv4() == ipv4);
    network.into_iter().flat_map(|network| chains::at_pod_ports(*network, &["bridge"])).collect()
}

/// Returns the problem of pods of this host that cannot resolve each other's addresses, with possible causes.
fn resolution_problem(setting: &TrialInput, ipv4: bool) -> Problem {
    let question = resolution_name(ipv4);
    let mut causes = chains_between(setting, ipv4);
    if causes.is_empty() {
        causes.push(format!(
            "no rule that drops them was found; check nft list ruleset (families bridge and netdev), \
             ebtables-legacy -L, arptables-legacy -L, bridge -d link show and bpftool net show dev {}",
            &setting.bridge
        ));
    }
    let family = family_name(ipv4);
    let what = format!(
        "pods of this host do not find each other ({family}): {question} of one does not arrive at another"
    );
    Problem::new(ProblemCode::PodsApart, family, what, causes.join("; "))
}

/// Returns whether packets between ports of the bridge pass the rules for forwarded packets, for IPv4
/// and IPv6.
pub fn go_through_rules(netlink: &mut Netlink, bridge: &str) -> [bool; 2] {
    let by_all = [true, false].map(|ipv4| sysctl::read(&bridge_sysctl(ipv4)));
    // Without br_netfilter these sysctls do not exist, and a bridge's own setting has no effect.
    if by_all.iter().all(Option::is_none) {
        return [false; 2];
    }
    let link = netlink.link(bridge).ok().flatten();
    let own = link.map(|link| own_filters(&link)).unwrap_or_default();
    let by_all = by_all.map(|value| value.is_some_and(|value| value != "0"));
    [by_all[0] || own[0], by_all[1] || own[1]]
}

/// Returns `nf_call_iptables` and `nf_call_ip6tables` of a bridge.
fn own_filters(link: &Link) -> [bool; 2] {
    let mut filters = [false; 2];
    let infos = link.message.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    for info in infos.flatten() {
        let LinkInfo::Data(InfoData::Bridge(settings)) = info else { continue };
        for setting in settings {
            match setting {
                InfoBridge::NfCallIpTables(is_on) => filters[0] = *is_on,
                InfoBridge::NfCallIp6Tables(is_on) => filters[1] = *is_on,
                _ => {}
            }
        }
    }
    filters
}

fn bridge_sysctl(ipv4: bool) -> String {
    format!("net/bridge/bridge-nf-call-{}", iptables(ipv4))
}

const fn iptables(ipv4: bool) -> &'static str {
    if ipv4 { "iptables" } else { "ip6tables" }
}

/// Describes the setting that makes rules see bridged packets.
fn bridged(setting: &TrialInput, ipv4: bool) -> String {
    let name = iptables(ipv4);
    let is_for_all = sysctl::read(&bridge_sysctl(ipv4)).is_some_and(|value| value != "0");
    let (what, command) = if is_for_all {
        let sysctl = format!("net.bridge.bridge-nf-call-{name}");
        (format!("{sysctl} is 1"), format!("sysctl -w {sysctl}=0"))
    } else {
        let bridge = &setting.bridge;
        let key = name.replace("ip", "nf_call_ip");
        (format!("{key} of {bridge} is 1"), format!("ip link set {bridge} type bridge {key} 0"))
    };
    format!(
        "{what}, so the rules for forwarded packets apply to them too; let them pass there, or turn that off \
         where nothing needs it (Kubernetes does: {command})"
    )
}

/// Describes chains that translate sources, and how to exempt the overlay.
pub fn translating(setting: &TrialInput, ipv4: bool) -> String {
    let network = setting.networks.iter().find(|network| network.addr().is_ipv4() == ipv4);
    let chains = ForeignTables::open().and_then(|mut tables| tables.translating_chains(ipv4));
    let exempt = |chain: &String| match network {
        Some(network) => format!("chain {chain}: {}", accept_within(chain, network)),
        None => format!("chain {chain}"),
    };
    let mut causes: Vec<String> = chains.iter().flatten().map(exempt).collect();
    let (file, program) = LEGACY[usize::from(!ipv4)];
    let tables = fs::read_to_string(file).unwrap_or_default();
    if tables.lines().any(|table| table == "nat") {
        causes.push(format!(
            "{program} has rules, too, which are not read here: {program} -t nat -S POSTROUTING"
        ));
    }
    if causes.is_empty() {
        causes.push(
            "no rule that translates them was found; check nft list ruleset and bpftool net"
                .to_owned(),
        );
    }
    causes.join("; ")
}

const fn needs_rules(way: &TrialWay) -> bool {
    way.direction.is_through() || way.direction.is_between()
}

/// Returns the causes, or commands that may show them.
fn or_where_to_look(found: &[String], setting: &TrialInput) -> Vec<String> {
    if !found.is_empty() {
        return found.to_vec();
    }
    vec![format!(
        "no rule that drops them was found; check nft list ruleset, ip rule (also by mark or port), \
         iptables-legacy -S FORWARD, ip xfrm policy, bpftool net, and tc filter show dev {}",
        setting.device_name
    )]
}

/// Returns possible causes, and whether one of them acts before routing.
fn suspects(
    netlink: &mut Netlink,
    setting: &TrialInput,
    port: Option<u32>,
    closed: &[TrialWay],
) -> (Vec<String>, bool) {
    // Packets that connection tracking drops are not dropped by a rule.
    if let Some(full) = conntrack::full_table_problem() {
        return (vec![full.to_string()], false);
    }
    let networks: Vec<IpNet> = setting.networks.iter().collect();
    let mut reasons: Vec<String> = Vec::new();
    // Only trials between pods of two hosts send fragments.
    if setting.is_remote_lost {
        reasons.extend(fragments::scarce().map(|scarce| scarce.to_string()));
    }
    reasons.extend(networks.iter().flat_map(|network| marks::of_pods(netlink, setting, *network)));
    let mut takes_all = false;
    let links = netlink.links().unwrap_or_default();
    let lost = lost(setting, port, closed, &links);
    let chains =
        ForeignTables::open().and_then(|mut tables| tables.chains_that_may_drop(&networks, &lost));
    match chains {
        Ok(chains) => reasons.extend(chains.suspects().iter().map(|chain| {
            takes_all |= ["prerouting", "ingress"].contains(&chain.hook);
            let is_ipv6 = chain.chain.starts_with("ip6 ");
            let network = networks.iter().find(|network| network.addr().is_ipv6() == is_ipv6);
            let network = network.or(networks.first());
            let fix = network.map(|network| chain.fix(*network)).unwrap_or_default();
            format!("{chain}: {fix}")
        })),
        Err(error) => reasons.push(format!("nftables cannot be read ({error})")),
    }
    let shortening = partial::shortening(netlink, setting);
    reasons.extend(shortening.iter().map(Problem::to_string));
    reasons.extend(ipsec::taking(&networks));
    reasons.extend(networks.iter().flat_map(|network| iptables_legacy::around_pods(*network)));
    let is_on_the_way = |link: &&Link| {
        link.index == setting.device
            || link.name == setting.bridge
            || Some(link.index) == port
            || setting.is_remote_lost && link.index == setting.underlay
    };
    for link in links.iter().filter(is_on_the_way) {
        let sides = [Side::Ingress, Side::Egress];
        reasons.extend(sides.into_iter().flat_map(|side| hooks::at(netlink, link, side)));
    }
    if reasons.is_empty() {
        reasons.extend(redirecting(&networks));
    }
    (reasons, takes_all)
}

/// Returns the packets that a rule must match to be a possible cause.
fn lost(
    setting: &TrialInput,
    port: Option<u32>,
    closed: &[TrialWay],
    links: &[Link],
) -> LostPackets {
    let mut transports: BTreeSet<TrialProtocol> = BTreeSet::new();
    for way in closed {
        match way.direction {
            Direction::Out(of) | Direction::In(of) | Direction::Between(of) => {
                transports.insert(of);
            }
            Direction::LargeOut => _ = transports.insert(TrialProtocol::Udp),
            _ => {}
        }
    }
    transports.extend(&setting.lost_transports);
    if transports.is_empty() || setting.is_remote_lost && setting.lost_transports.is_empty() {
        transports.extend(TrialProtocol::ALL);
    }
    let is_on_the_way = |link: &&Link| {
        [setting.device, setting.underlay].contains(&link.index)
            || link.name == setting.bridge
            || Some(link.index) == port
    };
    let on_the_way: Vec<&Link> = links.iter().filter(is_on_the_way).collect();
    let controllers = on_the_way.iter().filter_map(|link| {
        let controller = link.controller()?;
        links.iter().find(|other| other.index == controller)
    });
    let links = on_the_way.iter().copied().chain(controllers).map(|link| link.name.clone());
    let hosts = setting.peers.iter().map(|peer| peer.underlay).chain([setting.local]);
    LostPackets {
        transports,
        networks: setting.networks.iter().chain(hosts.map(IpNet::from)).collect(),
        port: setting.port,
        links: links.collect(),
    }
}

/// Returns chains that redirect packets to another address, and how to exempt the overlay.
fn redirecting(networks: &[IpNet]) -> Vec<String> {
    let open = |network: &IpNet| {
        let ipv4 = network.addr().is_ipv4();
        let chains = ForeignTables::open().and_then(|mut tables| tables.redirecting_chains(ipv4));
        let sentence = |chain: String| {
            let fix = accept_to(&chain, *network);
            format!("chain {chain} sends packets to other addresses (redirect or DNAT): {fix}")
        };
        chains.unwrap_or_default().into_iter().map(sentence).collect::<Vec<_>>()
    };
    networks.iter().flat_map(open).collect()
}

/// Returns a problem for each chain that drops incoming tunnel packets.
pub fn input(setting: &TrialInput) -> Vec<Problem> {
    let port = setting.port;
    let closed = ForeignTables::open().and_then(|mut tables| tables.closed_ports(&[port]));
    let closed = closed.unwrap_or_default();
    let problem = |ClosedPort { chain, port, .. }: &ClosedPort| {
        let what = format!("chain {chain} drops UDP {port}, so tunnel packets do not arrive");
        Problem::new(ProblemCode::TunnelInput, chain, what, open_chain(chain, &[*port]))
    };
    // The trace of a lost packet names a rule that drops some of them.
    let is_closed = |closed: &&ClosedPort| matches!(closed.extent, Extent::All { .. });
    closed.iter().filter(is_closed).map(problem).collect()
}
