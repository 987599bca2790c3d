//! Finds out why the kernel does not route a packet as desired.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::{EXDEV, Expected, Lookup, LookupResult, lookup::EINVAL};
use crate::{
    dataplane::plan::full_len,
    model::{Condition, Selector},
};

/// `RT_TABLE_MAIN`, which contains gossamer's routes.
pub const MAIN: u32 = 254;
/// Priority of the kernel's default rule for the main table.
pub(super) const MAIN_RULE_PRIORITY: u32 = 32_766;
/// `RT_TABLE_LOCAL`: routes to addresses of this host.
const LOCAL: u32 = 255;

/// Why a packet is not routed as desired.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// A policy rule leads to another table, whose route decides.
    Table {
        /// The other table.
        table: u32,
        /// Priority of the rule, if it is known.
        priority: Option<u32>,
        /// Name of the output interface.
        interface: String,
        /// Whether the packet is of IPv4.
        ipv4: bool,
    },
    /// Another route of the main table decides.
    Route {
        /// Its destination.
        destination: IpNet,
        /// Its metric.
        metric: u32,
        /// Name of its output interface.
        interface: String,
        /// Metric of gossamer's route, if that has the same destination.
        ours: Option<u32>,
        /// What it requires besides the destination.
        condition: Condition,
    },
    /// A foreign route of type local delivers the packets to this host itself.
    LocalRoute {
        /// Destination of the route.
        destination: IpNet,
    },
    /// This host has an address in that subnet, or an interface in it. Reported as an overlap.
    Address {
        /// The destination address of the packet.
        address: IpAddr,
        /// Name of the interface.
        interface: String,
    },
    /// The input interface is in a VRF.
    Vrf {
        /// Name of the interface.
        interface: String,
        /// Name of the VRF.
        vrf: String,
        /// The VRF's table.
        table: u32,
    },
    /// The reverse path filter of the interface drops the packet.
    Filter {
        /// Name of the interface.
        interface: String,
    },
    /// Forwarding is off on the interface, though it is on for the host.
    Forwarding {
        /// Name of the interface.
        interface: String,
        /// Whether forwarding is off by default on new interfaces.
        by_default: bool,
    },
    /// Forwarding is off on this host. Reported by the sysctl check.
    NoForwarding,
    /// IPv6 is disabled on the interface.
    NoIpv6 {
        /// Name of the interface.
        interface: String,
    },
    /// A foreign route rejects or drops the packet.
    Refused {
        /// Its destination.
        destination: IpNet,
        /// Its type, as in `ip route`.
        kind: &'static str,
        /// Its table.
        table: u32,
        /// Priority of the policy rule that leads to the table.
        priority: Option<u32>,
        /// What it requires besides the destination.
        condition: Condition,
    },
    /// A more specific route of another program leads to the same gateway, with a smaller MTU.
    SmallerMtu {
        /// Its destination.
        destination: IpNet,
        /// Its metric.
        metric: u32,
        /// Its table.
        table: u32,
        /// What it requires besides the destination.
        condition: Condition,
        /// Its MTU in bytes.
        mtu: u32,
        /// MTU of gossamer's route in bytes.
        carried: u32,
    },
    /// A policy rule drops the packet.
    Rule {
        /// Priority of the rule.
        priority: u32,
        /// Whether it is a rule of IPv4.
        ipv4: bool,
    },
    /// No policy rule leads all packets to the main table.
    NoMain {
        /// Whether the packet is of IPv4.
        ipv4: bool,
    },
    /// The lookup failed, and no cause was found.
    Unknown {
        /// The kernel's error number.
        errno: i32,
    },
    /// Only packets that match the selector of a policy rule or of a route are affected.
    Selected {
        /// The selector.
        selector: Selector,
        /// Why these packets are not routed as desired.
        cause: Box<Self>,
    },
}

/// What further requests found out about a packet that is not routed as desired.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// The input interface.
    pub input: Option<InterfaceState>,
    /// The output interface.
    pub output: Option<InterfaceState>,
    /// The interface that the packet should leave by.
    pub wanted: Option<InterfaceState>,
    /// Index of the interface by which this host reaches the packet's sender.
    pub back: Option<u32>,
    /// Destination and metric of the route that decided.
    pub entry: Option<(IpNet, u32)>,
    /// What that route requires of a packet besides the destination.
    pub condition: Condition,
    /// Whether the type of that route is local.
    pub local: bool,
    /// Whether the route to the sender's address belongs to an address of this host: type local or
    /// broadcast.
    pub from_local: bool,
    /// Whether the route that decided belongs to an address of this host.
    pub connected: bool,
    /// Metric of gossamer's route to the same subnet.
    pub ours: Option<u32>,
    /// Policy rules in their order: priority, table, and whether they drop.
    pub rules: Vec<(u32, u32, bool)>,
    /// Whether no policy rule leads all packets to the main table.
    pub without_main: bool,
    /// Foreign routes that reject or drop the packet and whose condition it meets: destination,
    /// type, table and condition.
    pub refusals: Vec<(IpNet, &'static str, u32, Condition)>,
    /// Whether this host forwards packets of this family.
    pub forwards: bool,
    /// Whether forwarding is off by default on new interfaces.
    pub default_off: bool,
}

/// The state of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceState {
    /// Its name.
    pub name: String,
    /// Name and table of its VRF.
    pub vrf: Option<(String, u32)>,
    /// `net.ipv4.conf.NAME.forwarding`.
    pub forwards: bool,
    /// Whether it has a carrier: for a bridge, whether a port is up.
    pub carrier: bool,
    /// Whether strict reverse path filtering is in force: the larger of
    /// `net.ipv4.conf.NAME.rp_filter` and `net.ipv4.conf.all.rp_filter` is 1.
    pub filters: bool,
    /// `net.ipv6.conf.NAME.disable_ipv6`.
    pub without_ipv6: bool,
}

impl Cause {
    /// Returns why the result differs from the expected one; `None` if the packet was refused for a
    /// reason that the lookup is not about, or another lookup reports the cause.
    pub fn of(lookup: &Lookup, result: LookupResult, evidence: &Evidence) -> Option<Self> {
        let cause = match result {
            LookupResult::Refused(errno) => Self::of_refusal(lookup, errno, evidence),
            LookupResult::Way { table, .. } => Self::of_way(lookup, table, evidence),
        };
        // A bridge without pods may have no route, which loses nothing.
        let is_empty = evidence.wanted.as_ref().is_some_and(|wanted| !wanted.carrier);
        if lookup.kind.is_to_pods_here() && is_empty && matches!(cause, Self::Unknown { .. }) {
            return None;
        }
        // A foreign route to the sender's address is reported by lookups of packets to that
        // address.
        if evidence.from_local && result == LookupResult::Refused(EINVAL) {
            return None;
        }
        let is_filter = matches!(cause, Self::Filter { .. });
        if !is_filter && lookup.expected == Expected::Unfiltered {
            return None;
        }
        Some(match lookup.selector {
            Some(selector) => Self::Selected { selector, cause: Box::new(cause) },
            None => cause,
        })
    }

    /// Whether another cause in `all` reports the same: for all packets, or, if this one is of a
    /// route, for those that a rule or a lesser selector selects.
    pub(super) fn is_covered_by(&self, all: &BTreeSet<Self>) -> bool {
        let Self::Selected { selector, cause } = self else { return false };
        let is_route = selector.priority.is_none();
        let is_same = |other: &Self| match other {
            Self::Selected { selector: by, cause: same } => {
                same == cause && (by.priority.is_some() || by < selector)
            }
            _ => false,
        };
        all.contains(cause) || is_route && all.iter().any(is_same)
    }

    /// Whether packets are diverted or dropped, not only limited in size.
    pub(super) fn diverts(&self) -> bool {
        !matches!(self, Self::SmallerMtu { .. })
    }

    /// Returns the cause of a failed lookup.
    fn of_refusal(lookup: &Lookup, errno: i32, evidence: &Evidence) -> Self {
        let ipv4 = lookup.to.is_ipv4();
        let input = evidence.input.as_ref();
        let is_filtered = |input: &InterfaceState| {
            let filters = ipv4 && input.filters && evidence.back != lookup.input;
            errno == EXDEV || errno == EINVAL && filters
        };
        if let Some(InterfaceState { name, .. }) = input.filter(|input| is_filtered(input)) {
            return Self::Filter { interface: name.clone() };
        }
        if lookup.input.is_some() && !evidence.forwards {
            return Self::NoForwarding;
        }
        if let Some(InterfaceState { name, .. }) = input.filter(|input| ipv4 && !input.forwards) {
            let by_default = evidence.default_off;
            return Self::Forwarding { interface: name.clone(), by_default };
        }
        let without_ipv6 = input.into_iter().chain(&evidence.wanted);
        let mut without_ipv6 = without_ipv6.filter(|fact| !ipv4 && fact.without_ipv6);
        if let Some(InterfaceState { name, .. }) = without_ipv6.next() {
            return Self::NoIpv6 { interface: name.clone() };
        }
        let reached = |table: u32| table == MAIN || evidence.priority(table).is_some();
        let refusals = evidence.refusals.iter();
        let most_specific = refusals
            .filter(|(destination, _, table, _)| {
                destination.contains(&lookup.to) && reached(*table)
            })
            .max_by_key(|(destination, .., condition)| (destination.prefix_len(), *condition));
        // A default route that drops applies only if no other route does, so more specific causes
        // come first.
        if let Some(refusal) = most_specific.filter(|(to, ..)| to.prefix_len() > 0) {
            return Self::of_route_to_nowhere(*refusal, evidence);
        }
        if let Some(cause) = input.and_then(Self::of_vrf) {
            return cause;
        }
        if let Some(refusal) = most_specific {
            return Self::of_route_to_nowhere(*refusal, evidence);
        }
        match evidence.rules.iter().find(|(_, _, refuses)| *refuses) {
            Some((priority, ..)) => Self::Rule { priority: *priority, ipv4 },
            None if evidence.without_main => Self::NoMain { ipv4 },
            None => Self::Unknown { errno },
        }
    }

    /// Returns the cause of a foreign route that rejects or drops the packet.
    fn of_route_to_nowhere(
        (destination, kind, table, condition): (IpNet, &'static str, u32, Condition),
        evidence: &Evidence,
    ) -> Self {
        let priority = evidence.priority(table);
        Self::Refused { destination, kind, table, priority, condition }
    }

    /// Returns the cause of a route that leads elsewhere.
    fn of_way(lookup: &Lookup, table: u32, evidence: &Evidence) -> Self {
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
                Self::Address { address: lookup.to, interface }
            }
            (MAIN | LOCAL, Some((destination, _))) if evidence.local => {
                Self::LocalRoute { destination }
            }
            (LOCAL, _) => Self::Address { address: lookup.to, interface },
            (MAIN, Some((destination, metric))) => {
                let ours = evidence.ours.filter(|_| destination == lookup.subject);
                let condition = evidence.condition;
                Self::Route { destination, metric, interface, ours, condition }
            }
            (MAIN, None) => {
                let destination = IpNet::new_assert(lookup.to, full_len(lookup.to));
                let condition = evidence.condition;
                Self::Route { destination, metric: 0, interface, ours: None, condition }
            }
            _ => {
                let priority = evidence.priority(table);
                Self::Table { table, priority, interface, ipv4: lookup.to.is_ipv4() }
            }
        }
    }

    /// Returns the cause if the input interface is in a VRF.
    fn of_vrf(input: &InterfaceState) -> Option<Self> {
        let (vrf, table) = input.vrf.clone()?;
        Some(Self::Vrf { interface: input.name.clone(), vrf, table })
    }
}

impl Evidence {
    /// Returns the priority of the first rule that leads to a table.
    fn priority(&self, table: u32) -> Option<u32> {
        let rule = self.rules.iter().find(|(_, of_rule, _)| *of_rule == table);
        rule.map(|(priority, ..)| *priority)
    }
}
