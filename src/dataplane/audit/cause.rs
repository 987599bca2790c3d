//! Why the kernel sends a packet elsewhere: from what else it was asked to a sentence with what helps.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::{Answer, EINVAL, EXDEV, Expected, Kind, Question, likely_program};
use crate::{
    dataplane::plan::full_len,
    model::{Condition, Selector},
};

/// `RT_TABLE_MAIN`, where our routes are.
pub const MAIN: u32 = 254;
/// Where the kernel's own rule about the main table is.
const OF_MAIN: u32 = 32_766;
/// `RT_TABLE_LOCAL`: addresses of this host.
const LOCAL: u32 = 255;

/// Why a packet does not go as it should.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Another table wins, by a policy rule.
    Table { table: u32, priority: Option<u32>, interface: String, ipv4: bool },
    /// Another route of the same table wins.
    Route {
        destination: IpNet,
        metric: u32,
        interface: String,
        ours: Option<u32>,
        condition: Condition,
    },
    /// A route by which this host keeps packets for itself (type local).
    Kept { destination: IpNet, interface: String },
    /// This host has an address of that subnet itself, or an interface in it: told as an overlap.
    Address { address: IpAddr, interface: String },
    /// The interface is in a VRF.
    Vrf { interface: String, vrf: String, table: u32 },
    /// The reverse path filter of the interface drops it.
    Filter { interface: String },
    /// The interface forwards nothing, though the host does.
    Forwarding { interface: String, by_default: bool },
    /// The host forwards nothing at all: that is told by the sysctl.
    NoForwarding,
    /// IPv6 is turned off on the interface.
    NoIpv6 { interface: String },
    /// A route that leads nowhere.
    Refused {
        destination: IpNet,
        kind: &'static str,
        table: u32,
        priority: Option<u32>,
        condition: Condition,
    },
    /// A more specific route of another program leads to the same, and carries less.
    Narrowed {
        destination: IpNet,
        metric: u32,
        table: u32,
        condition: Condition,
        mtu: u32,
        carried: u32,
    },
    /// A policy rule that drops packets.
    Rule { priority: u32, ipv4: bool },
    /// No policy rule leads all packets to the main table.
    NoMain { ipv4: bool },
    /// There is no route, or none that is known.
    Unknown { errno: i32 },
    /// It concerns only the packets that a policy rule selects, or a route that asks for more than the
    /// destination.
    Selected { selector: Selector, cause: Box<Self> },
}

/// What else was found out about a packet that goes elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// The interface by which it comes in.
    pub input: Option<Fact>,
    /// The interface by which it leaves.
    pub output: Option<Fact>,
    /// The interface by which it should leave.
    pub wanted: Option<Fact>,
    /// Index of the interface by which this host reaches its sender.
    pub back: Option<u32>,
    /// The entry that has decided: destination and metric.
    pub entry: Option<(IpNet, u32)>,
    /// What that entry selects packets by beside their destination.
    pub condition: Condition,
    /// Its type is local.
    pub local: bool,
    /// That of the entry for the sender's address follows from an address of this host: local, or broadcast.
    pub from_local: bool,
    /// That entry follows from an address of this host.
    pub connected: bool,
    /// Metric of our own route to the same subnet.
    pub ours: Option<u32>,
    /// Policy rules in their order: priority, table, and whether they drop.
    pub rules: Vec<(u32, u32, bool)>,
    /// No policy rule leads all packets to the main table.
    pub without_main: bool,
    /// Routes that lead nowhere, are not ours, and whose condition the packet meets: destination, kind, table
    /// and condition.
    pub refusals: Vec<(IpNet, &'static str, u32, Condition)>,
    /// Whether the host forwards packets of this family.
    pub forwards: bool,
    /// New interfaces forward nothing.
    pub default_off: bool,
}

/// What is known of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fact {
    pub name: String,
    /// Name and table of the VRF that it is in.
    pub vrf: Option<(String, u32)>,
    /// `net.ipv4.conf.NAME.forwarding`
    pub forwards: bool,
    /// Something that is up is plugged into it.
    pub carrier: bool,
    /// A strict reverse path filter is in force: the larger of `net.ipv4.conf.NAME.rp_filter` and that of all
    /// interfaces is 1.
    pub filters: bool,
    /// `net.ipv6.conf.NAME.disable_ipv6`
    pub without_ipv6: bool,
}

impl Cause {
    /// Why an answer is not the expected one; none, if the packet was refused for a reason that was not asked
    /// about.
    pub fn of(question: &Question, answer: Answer, evidence: &Evidence) -> Option<Self> {
        let cause = match answer {
            Answer::Refused(errno) => Self::of_refusal(question, errno, evidence),
            Answer::Way { table, .. } => Self::of_way(question, table, evidence),
        };
        // A bridge without a pod on it may have no route, and nothing is lost.
        let is_empty = evidence.wanted.as_ref().is_some_and(|wanted| !wanted.carrier);
        if question.kind.is_to_pods_here() && is_empty && matches!(cause, Self::Unknown { .. }) {
            return None;
        }
        // What takes the sender's address is told by the packets that go there.
        if evidence.from_local && answer == Answer::Refused(EINVAL) {
            return None;
        }
        let is_filter = matches!(cause, Self::Filter { .. });
        if !is_filter && question.expected == Expected::Unfiltered {
            return None;
        }
        Some(match question.selector {
            Some(selector) => Self::Selected { selector, cause: Box::new(cause) },
            None => cause,
        })
    }

    /// Whether another of these says the same: of all packets, or of those that a rule selects where this is
    /// of a route.
    pub(super) fn is_told_by(&self, all: &BTreeSet<Self>) -> bool {
        let Self::Selected { selector, cause } = self else { return false };
        let is_route = selector.priority.is_none();
        let says_the_same = |other: &Self| match other {
            Self::Selected { selector: by, cause: same } => {
                same == cause && (by.priority.is_some() || by < selector)
            }
            _ => false,
        };
        all.contains(cause) || is_route && all.iter().any(says_the_same)
    }

    /// Whether packets do not get where they should.
    pub(super) fn leads_astray(&self) -> bool {
        !matches!(self, Self::Narrowed { .. })
    }

    fn of_refusal(question: &Question, errno: i32, evidence: &Evidence) -> Self {
        let ipv4 = question.to.is_ipv4();
        let input = evidence.input.as_ref();
        let is_filtered = |input: &Fact| {
            let filters = ipv4 && input.filters && evidence.back != question.input;
            errno == EXDEV || errno == EINVAL && filters
        };
        if let Some(Fact { name, .. }) = input.filter(|input| is_filtered(input)) {
            return Self::Filter { interface: name.clone() };
        }
        if question.input.is_some() && !evidence.forwards {
            return Self::NoForwarding;
        }
        if let Some(Fact { name, .. }) = input.filter(|input| ipv4 && !input.forwards) {
            let by_default = evidence.default_off;
            return Self::Forwarding { interface: name.clone(), by_default };
        }
        let without_ipv6 = input.into_iter().chain(&evidence.wanted);
        let mut without_ipv6 = without_ipv6.filter(|fact| !ipv4 && fact.without_ipv6);
        if let Some(Fact { name, .. }) = without_ipv6.next() {
            return Self::NoIpv6 { interface: name.clone() };
        }
        let reached = |table: u32| table == MAIN || evidence.priority(table).is_some();
        let refusals = evidence.refusals.iter();
        let longest = refusals
            .filter(|(destination, _, table, _)| {
                destination.contains(&question.to) && reached(*table)
            })
            .max_by_key(|(destination, .., condition)| (destination.prefix_len(), *condition));
        // A default route that leads nowhere is what there is where nothing else leads.
        if let Some(refusal) = longest.filter(|(to, ..)| to.prefix_len() > 0) {
            return Self::of_route_to_nowhere(*refusal, evidence);
        }
        if let Some(cause) = input.and_then(Self::of_vrf) {
            return cause;
        }
        if let Some(refusal) = longest {
            return Self::of_route_to_nowhere(*refusal, evidence);
        }
        match evidence.rules.iter().find(|(_, _, refuses)| *refuses) {
            Some((priority, ..)) => Self::Rule { priority: *priority, ipv4 },
            None if evidence.without_main => Self::NoMain { ipv4 },
            None => Self::Unknown { errno },
        }
    }

    fn of_route_to_nowhere(
        (destination, kind, table, condition): (IpNet, &'static str, u32, Condition),
        evidence: &Evidence,
    ) -> Self {
        let priority = evidence.priority(table);
        Self::Refused { destination, kind, table, priority, condition }
    }

    fn of_way(question: &Question, table: u32, evidence: &Evidence) -> Self {
        let interface = evidence.output.as_ref().map(|output| output.name.clone());
        let interface = interface.unwrap_or_else(|| "none".to_owned());
        let of_vrf = evidence
            .input
            .as_ref()
            .filter(|input| input.vrf.as_ref().is_some_and(|(_, of_vrf)| *of_vrf == table));
        if let Some(cause) = of_vrf.and_then(Self::of_vrf) {
            return cause;
        }
        match (table, evidence.entry) {
            (MAIN | LOCAL, _) if evidence.connected => {
                Self::Address { address: question.to, interface }
            }
            (MAIN | LOCAL, Some((destination, _))) if evidence.local => {
                Self::Kept { destination, interface }
            }
            (LOCAL, _) => Self::Address { address: question.to, interface },
            (MAIN, Some((destination, metric))) => {
                let ours = evidence.ours.filter(|_| destination == question.subject);
                let condition = evidence.condition;
                Self::Route { destination, metric, interface, ours, condition }
            }
            (MAIN, None) => {
                let destination = IpNet::new_assert(question.to, full_len(question.to));
                let condition = evidence.condition;
                Self::Route { destination, metric: 0, interface, ours: None, condition }
            }
            _ => {
                let priority = evidence.priority(table);
                Self::Table { table, priority, interface, ipv4: question.to.is_ipv4() }
            }
        }
    }

    fn of_vrf(input: &Fact) -> Option<Self> {
        let (vrf, table) = input.vrf.clone()?;
        Some(Self::Vrf { interface: input.name.clone(), vrf, table })
    }

    /// What is wrong and what helps; nothing where another check tells it.
    pub fn sentence(&self, kind: Kind, subnets: &str, network: IpNet) -> Option<String> {
        let packets = match kind {
            Kind::Out => format!("packets of pods to {subnets}"),
            Kind::In => format!("packets of pods from {subnets}"),
            Kind::Own => format!("packets of this host to {subnets}"),
            Kind::PodsToHost => {
                "packets of other nodes' pods to this host's own address".to_owned()
            }
            Kind::HostsToPods => "packets of other nodes' own addresses to pods here".to_owned(),
            Kind::Home => format!("packets to pods here, in {subnets},"),
        };
        match self {
            Self::Selected { selector, cause } => {
                let by = match selector.priority {
                    Some(priority) => format!("rule {priority}"),
                    None => "a route".to_owned(),
                };
                let packets = format!("{packets} that {by} selects ({selector})");
                cause.sentence_of(&packets, kind, network)
            }
            cause => cause.sentence_of(&packets, kind, network),
        }
    }

    fn sentence_of(&self, packets: &str, kind: Kind, network: IpNet) -> Option<String> {
        Some(match self {
            Self::Table { table, priority: Some(priority), interface, ipv4 } => format!(
                "{packets} leave by {interface}: table {table} has a route for them and comes before the \
                 main table (ip{} rule {priority}){}; let the overlay come first: {}",
                six(*ipv4),
                likely_program(*table, interface)
                    .map(|program| format!(", probably of {program}"))
                    .unwrap_or_default(),
                first_rule(network, *priority, *ipv4)
            ),
            Self::Table { table, priority: None, interface, ipv4 } => format!(
                "{packets} leave by {interface}: table {table} has a route for them (see ip{} rule)",
                six(*ipv4)
            ),
            Self::Route { destination, metric, interface, condition, .. }
                if kind.is_to_pods_here() && destination.prefix_len() > 0 =>
            {
                format!(
                    "packets to pods here leave by {interface}: a route of another program in the main table \
                     takes {destination}{condition}, which is of this node's own subnet; remove it \
                     (ip{} route del {destination}{condition} dev {interface} metric {metric})",
                    six(destination.addr().is_ipv4())
                )
            }
            Self::Route { destination, metric, interface, condition, .. }
                if !condition.is_none() =>
            {
                format!(
                    "another program's route takes the packets to {destination}{condition}, by {interface}, \
                     because it asks for more than the overlay's: remove it (ip{} route del \
                     {destination}{condition} dev {interface} metric {metric})",
                    six(destination.addr().is_ipv4())
                )
            }
            Self::Route { destination, metric, interface, ours: Some(ours), .. } => format!(
                "another program's route takes the packets to {destination}, by {interface}: its metric is \
                 {metric}, ours is {ours}; remove it (ip{} route del {destination} metric {metric})",
                six(destination.addr().is_ipv4())
            ),
            Self::Route { destination, interface, .. } if destination.prefix_len() == 0 => format!(
                "{packets} leave by {interface}, the default route: the overlay's own route is not found \
                 (ip{} route show proto 73)",
                six(destination.addr().is_ipv4())
            ),
            Self::Route { destination, metric, interface, ours: None, .. } => format!(
                "another program's route takes the packets to {destination}, by {interface}, because it is \
                 more specific than the overlay's: remove it (ip{} route del {destination} metric {metric})",
                six(destination.addr().is_ipv4())
            ),
            Self::Kept { destination, interface } => format!(
                "this host keeps packets to {destination} for itself, by another program's route of type \
                 local on {interface}: remove it (ip{} route del local {destination} dev {interface} table \
                 local)",
                six(is_ipv4(destination))
            ),
            Self::Vrf { interface, vrf, table } => format!(
                "{packets} are looked up in table {table}, for {interface} is in VRF {vrf}, where the \
                 overlay is not: ip link set {interface} nomaster"
            ),
            Self::Filter { interface } => format!(
                "rp_filter of {interface} drops {packets}, which come by another way than the answers go: \
                 sysctl -w net.ipv4.conf.{}.rp_filter=2 (and a file in /etc/sysctl.d)",
                slashed(interface)
            ),
            Self::Forwarding { interface, by_default: false } => format!(
                "{packets} are dropped, because net.ipv4.conf.{0}.forwarding is 0: \
                 sysctl -w net.ipv4.conf.{0}.forwarding=1",
                slashed(interface)
            ),
            Self::Forwarding { interface, by_default: true } => format!(
                "{packets} are dropped, because net.ipv4.conf.{0}.forwarding is 0; it was made with that, as \
                 net.ipv4.conf.default.forwarding is 0: sysctl -w net.ipv4.conf.default.forwarding=1 \
                 net.ipv4.conf.{0}.forwarding=1 (and the first in a file in /etc/sysctl.d)",
                slashed(interface)
            ),
            Self::NoForwarding | Self::Address { .. } | Self::Selected { .. } => return None,
            Self::NoIpv6 { interface } => format!(
                "{packets} find no way, for IPv6 is turned off on {interface}: \
                 sysctl -w net.ipv6.conf.{}.disable_ipv6=0",
                slashed(interface)
            ),
            Self::Refused { destination, kind, table, priority, condition } => {
                let of_rule = match priority {
                    Some(priority) if *table != MAIN => {
                        format!(
                            " of table {table} (ip{} rule {priority})",
                            six(is_ipv4(destination))
                        )
                    }
                    _ => String::new(),
                };
                let table = if *table == MAIN { String::new() } else { format!(" table {table}") };
                format!(
                    "{packets} are dropped by the {kind} route to {destination}{condition}{of_rule}: remove \
                     it (ip{} route del {kind} {destination}{condition}{table})",
                    six(is_ipv4(destination))
                )
            }
            Self::Narrowed { destination, metric, table, condition, mtu, carried } => {
                let of_table =
                    if *table == MAIN { String::new() } else { format!(" table {table}") };
                format!(
                    "packets of pods to {destination}{condition} have to be small: another program's route \
                     carries {mtu} bytes, where the overlay carries {carried}; remove it (ip{} route del \
                     {destination}{condition} metric {metric}{of_table})",
                    six(is_ipv4(destination))
                )
            }
            Self::Rule { priority, ipv4 } => format!(
                "{packets} are dropped by ip{} rule {priority}; let the overlay come first: {}",
                six(*ipv4),
                first_rule(network, *priority, *ipv4)
            ),
            Self::NoMain { ipv4 } => format!(
                "{packets} find no way here, for no ip{} rule leads to table main, where the overlay's \
                 routes are: {}",
                six(*ipv4),
                first_rule(network, OF_MAIN + 1, *ipv4)
            ),
            Self::Unknown { errno } => format!(
                "{packets} find no way here: {} (ip route get ADDRESS from ADDRESS iif INTERFACE)",
                std::io::Error::from_raw_os_error(*errno)
            ),
        })
    }
}

impl Evidence {
    /// The first rule that leads to a table.
    fn priority(&self, table: u32) -> Option<u32> {
        let rule = self.rules.iter().find(|(_, of_rule, _)| *of_rule == table);
        rule.map(|(priority, ..)| *priority)
    }
}

fn first_rule(network: IpNet, priority: u32, ipv4: bool) -> String {
    let before = priority.saturating_sub(1);
    format!("ip{} rule add to {network} lookup main priority {before}", six(ipv4))
}

const fn six(ipv4: bool) -> &'static str {
    if ipv4 { "" } else { " -6" }
}

const fn is_ipv4(network: &IpNet) -> bool {
    matches!(network, IpNet::V4(_))
}

/// As `sysctl` takes an interface's name that has dots.
fn slashed(interface: &str) -> String {
    interface.replace('.', "/")
}
