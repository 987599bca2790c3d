//! Checks whether the kernel routes the overlay's packets as desired: chooses the route lookups and
//! evaluates their results.
//!
//! All entries of the data plane may be correct and still lose to a VPN's policy rule, a more
//! specific route, a VRF or a reverse path filter. The audit infers nothing from the presence of
//! entries: it looks up routes for packets as pods send and receive them, for a part of the peers
//! in each pass, and reports each deviation by its cause.
//!
//! Pure: `agent/diagnosis/auditor` executes the lookups.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    desired::{Desired, Hop, RouteTarget},
    plan::full_len,
};
use crate::{
    model::{Problem, Selector, Subnets, list_at_most},
    pods::{gateway, last_address},
};

use self::filters::filter_lookups;
pub use self::{
    cause::{Cause, Evidence, InterfaceState, MAIN},
    lookup::{EXDEV, Expected, Kind, Lookup, LookupResult},
    programs::likely_program,
    sentence::{LocalPriorities, earlier_rule},
};

mod cause;
mod filters;
mod home;
mod lookup;
mod programs;
mod selected;
mod sentence;
#[cfg(test)]
mod tests;

/// Lookups per pass. One takes about 10 microseconds.
const MAX_LOOKUPS: usize = 512;
/// Lookups per peer subnet, without those for rotating addresses.
const LOOKUPS_PER_SUBJECT: usize = 5;
/// Upper limit of the rotating addresses per peer subnet and pass. Few subnets get more each.
const MAX_ADDRESSES_PER_SUBJECT: usize = 8;
/// Upper limit of the suspected addresses: of this node's own subnets together, and of each peer
/// subnet.
const MAX_HOME_SUSPECTS: usize = 32;
const MAX_SUSPECTS_PER_SUBNET: usize = 8;
/// Upper limit of the subnets that are listed in one sentence.
const MAX_SUBNETS_NAMED: usize = 3;

/// The state of this host that lookups depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostState {
    /// Index of the VXLAN device.
    pub device: u32,
    /// Index and address of the underlay interface.
    pub underlay: u32,
    /// Underlay address of this host.
    pub local: IpAddr,
    /// This node's own subnets.
    pub own: Vec<OwnSubnet>,
    /// All addresses of this host.
    pub has: BTreeSet<IpAddr>,
    /// Whether packets of pods to other networks get the address of their host.
    pub masquerade: bool,
    /// Packets between pods that policy rules may select.
    pub selected: Vec<SelectedPackets>,
}

/// A class of packets that a policy rule selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectedPackets {
    /// What the rule matches.
    pub selector: Selector,
    /// Index of the input interface that the rule requires.
    pub input: Option<u32>,
    /// Whether the rule is one of IPv4, otherwise of IPv6.
    pub ipv4: bool,
}

/// One of this node's own subnets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnSubnet {
    /// The subnet.
    pub subnet: IpNet,
    /// Index of the interface that pods are behind; `None` while there is none.
    pub inside: Option<u32>,
    /// An address that a pod could have.
    pub pod: IpAddr,
}

impl OwnSubnet {
    /// Describes `subnet` on a host with the addresses `has`, each with the index of its interface.
    /// An address on the VXLAN `device` belongs to the VTEP, not to pods. `inside` is the interface
    /// that pods are behind if no address in the subnet shows another one.
    pub fn new(subnet: IpNet, device: u32, has: &[(u32, IpAddr)], inside: Option<u32>) -> Self {
        let mut within = has.iter().filter(|(link, ip)| *link != device && subnet.contains(ip));
        let inside = within.next().map(|(link, _)| *link).or(inside);
        let is_free = |ip: &IpAddr| has.iter().all(|(_, own)| own != ip);
        let last = last_address(subnet);
        let pod = subnet.hosts().take(16).chain([last]).filter(is_free).last().unwrap_or(last);
        Self { subnet, inside, pod }
    }
}

/// The subnets that are affected by one cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Why the packets are diverted or dropped.
    pub cause: Cause,
    /// The affected direction of the highest precedence.
    pub kind: Kind,
    /// The affected subnets.
    pub subjects: BTreeSet<IpNet>,
}

/// The results of all lookups so far.
#[derive(Debug, Default)]
pub struct Audit {
    pass: u32,
    subjects: usize,
    /// The last subnet of the previous pass; the next pass continues behind it.
    last_subject: Option<IpNet>,
    /// Number of subnets that have not been looked up since [`Audit::begin`].
    remaining: usize,
    /// Deviations per subnet, as of the subnet's last lookups.
    deviations: BTreeMap<IpNet, BTreeSet<(Cause, Kind)>>,
    /// Per peer subnet, addresses that every pass looks up: one deviating address per cause, and
    /// addresses that have routes of other programs.
    suspects: BTreeMap<IpNet, BTreeSet<IpAddr>>,
    /// Addresses of this node's own subnets that every pass looks up: one deviating address per
    /// cause.
    home: BTreeSet<IpAddr>,
    /// Addresses that were reported with [`Audit::suspect`] and wait for the next pass.
    reported: BTreeSet<IpAddr>,
    /// Causes that the previous pass found. A cause is reported only after two passes, because one
    /// may see a change in progress.
    previous_causes: BTreeSet<Cause>,
    findings: Vec<Finding>,
}

impl Audit {
    /// Starts over: all subnets are to be looked up.
    pub const fn begin(&mut self) {
        self.remaining = usize::MAX;
    }

    /// Adds addresses to the next pass, because another program has added routes to them.
    pub fn suspect(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.reported.extend(addresses);
    }

    /// Whether another pass should follow soon: subnets remain, or the causes of the last two
    /// passes differ.
    pub fn is_unfinished(&self) -> bool {
        self.remaining > 0
            || !self.previous_causes.iter().eq(self.findings.iter().map(|finding| &finding.cause))
    }

    /// Returns the lookups of the next pass: for subnets with deviations or suspected addresses,
    /// and for the others in turn.
    #[expect(clippy::too_many_lines, reason = "one block for each kind of lookup")]
    pub fn lookups(&mut self, desired: &Desired, host: &HostState) -> Vec<Lookup> {
        self.pass = self.pass.wrapping_add(1);
        let own = |subnet: &IpNet| host.own.iter().any(|own| own.subnet.contains(subnet));
        let is_subject = |(subnet, _): &(&IpNet, &Hop)| {
            subnet.prefix_len() < full_len(subnet.addr()) && !own(subnet)
        };
        let subjects: BTreeMap<IpNet, Hop> =
            desired.tables.routes.iter().filter(is_subject).map(|(s, hop)| (*s, *hop)).collect();
        self.subjects = subjects.len();
        // With entries on demand, one route covers the whole pool; more specific routes outrank it.
        let is_outranked = |subject: IpNet, address: IpAddr| {
            own(&address.into())
                || subject.prefix_len() < desired.pool.subnet_len()
                    && subjects.keys().any(|other| {
                        other.contains(&address) && other.prefix_len() > subject.prefix_len()
                    })
        };
        let is_own = |subject: &IpNet| host.own.iter().any(|own| own.subnet == *subject);
        self.deviations.retain(|subject, _| subjects.contains_key(subject) || is_own(subject));
        self.suspects.retain(|subject, _| subjects.contains_key(subject));
        for address in std::mem::take(&mut self.reported) {
            if own(&address.into()) {
                if self.home.len() < MAX_HOME_SUSPECTS {
                    self.home.insert(address);
                }
            } else if let Some(subject) =
                subjects.keys().rev().find(|subject| subject.contains(&address))
            {
                self.add_suspect(*subject, address);
            }
        }
        let per_subject = LOOKUPS_PER_SUBJECT + 2 * host.selected.len();
        let addresses = (MAX_LOOKUPS / (subjects.len() * per_subject).max(1))
            .clamp(1, MAX_ADDRESSES_PER_SUBJECT);
        let priority: BTreeSet<IpNet> =
            self.deviations.keys().chain(self.suspects.keys()).copied().collect();
        let first = priority.iter().filter_map(|subject| subjects.get_key_value(subject));
        let later = subjects.iter().filter(|(subject, _)| Some(**subject) > self.last_subject);
        let earlier = subjects.iter().filter(|(subject, _)| Some(**subject) <= self.last_subject);
        let mut lookups = Vec::new();
        for own in &host.own {
            let is_of_family = |subject: &IpNet| is_ipv4(*subject) == is_ipv4(own.subnet);
            let peer = subjects.iter().find(|(subject, _)| is_of_family(subject));
            self.add_home_lookups(own, peer, host, &mut lookups);
        }
        let home_lookups = lookups.len();
        for (subject, hop) in first {
            if lookups.len() - home_lookups < MAX_LOOKUPS / 2 {
                self.add_lookups(*subject, *hop, host, addresses, &mut lookups);
            }
        }
        self.remaining = self.remaining.min(subjects.len());
        let mut last = None;
        for (subject, hop) in later.chain(earlier) {
            if lookups.len() - home_lookups >= MAX_LOOKUPS {
                break;
            }
            last = Some((*subject, *hop));
            self.remaining = self.remaining.saturating_sub(1);
            if !priority.contains(subject) {
                self.add_lookups(*subject, *hop, host, addresses, &mut lookups);
            }
        }
        // Lookups of packets from an unreachable subnet fail by design.
        let answered = last.filter(|(_, hop)| hop.way != RouteTarget::Unreachable);
        if let Some(((subject, _), peer)) = answered.zip(desired.tables.fdb.values().next()) {
            lookups.extend(filter_lookups(subject, *peer, host));
        }
        self.last_subject = last.map(|(subject, _)| subject);
        lookups.retain(|lookup| {
            let remote = lookup.remote();
            lookup.kind == Kind::Home
                || !lookup.subject.contains(&remote)
                || !is_outranked(lookup.subject, remote)
        });
        lookups
    }

    /// Appends the lookups for one peer subnet.
    fn add_lookups(
        &self,
        subject: IpNet,
        hop: Hop,
        host: &HostState,
        addresses: usize,
        lookups: &mut Vec<Lookup>,
    ) {
        let ipv4 = subject.addr().is_ipv4();
        let Some(own) = host.own.iter().find(|own| own.subnet.addr().is_ipv4() == ipv4) else {
            return;
        };
        let (expected, comes_by) = match hop.way {
            RouteTarget::Overlay(gateway) => {
                (Expected::Way { link: host.device, gateway: Some(gateway) }, host.device)
            }
            RouteTarget::Device => {
                (Expected::Way { link: host.device, gateway: None }, host.device)
            }
            RouteTarget::Direct { gateway, link } => {
                (Expected::Way { link, gateway: Some(gateway) }, link)
            }
            RouteTarget::Unreachable => (Expected::Nowhere, 0),
        };
        let from = own.inside.map(|_| own.pod);
        let lookup = Lookup {
            kind: Kind::Out,
            subject,
            from,
            to: gateway(subject),
            input: own.inside,
            expected,
            selector: None,
        };
        lookups.push(lookup);
        lookups.push(Lookup { to: last_address(subject), ..lookup });
        let count = addresses as u32;
        let numbers = (0..count).map(|i| self.pass.wrapping_sub(1).wrapping_mul(count) + i + 1);
        let rotating = numbers.map(|number| spread_address(subject, number));
        let suspects = self.suspects.get(&subject).into_iter().flatten().copied();
        let addresses: Vec<IpAddr> = rotating.chain(suspects).collect();
        lookups.extend(addresses.iter().map(|to| Lookup { to: *to, ..lookup }));
        if expected == Expected::Nowhere {
            return;
        }
        lookups.push(Lookup { kind: Kind::Own, from: None, input: None, ..lookup });
        if let Some(inside) = own.inside {
            let comes_in = Lookup {
                kind: Kind::In,
                from: addresses.last().copied(),
                to: own.pod,
                input: Some(comes_by),
                expected: Expected::Way { link: inside, gateway: None },
                ..lookup
            };
            lookups.push(comes_in);
            for selected in &host.selected {
                lookups.extend(selected.of(lookup, own, host));
                lookups.extend(selected.of(comes_in, own, host));
            }
        }
    }

    fn add_suspect(&mut self, subject: IpNet, address: IpAddr) {
        let suspects = self.suspects.entry(subject).or_default();
        if suspects.len() < MAX_SUSPECTS_PER_SUBNET {
            suspects.insert(address);
        }
    }

    /// Evaluates the results of a pass. The cause of a result is `None` if it is correct.
    pub fn evaluate(&mut self, results: impl IntoIterator<Item = (Lookup, Option<Cause>)>) {
        let mut looked_up: BTreeSet<IpNet> = BTreeSet::new();
        let mut home: BTreeMap<Cause, IpAddr> = BTreeMap::new();
        let mut remote: BTreeMap<(IpNet, Cause), IpAddr> = BTreeMap::new();
        for (lookup, cause) in results {
            if looked_up.insert(lookup.subject) {
                self.deviations.remove(&lookup.subject);
                self.suspects.remove(&lookup.subject);
            }
            if let Some(cause) = cause {
                if lookup.kind == Kind::Home {
                    home.insert(cause.clone(), lookup.to);
                } else if lookup.subject.contains(&lookup.remote()) {
                    // A deviation of a host's own address implies nothing for the pods in its
                    // subnet.
                    remote.insert((lookup.subject, cause.clone()), lookup.remote());
                }
                let deviations = self.deviations.entry(lookup.subject).or_default();
                deviations.insert((cause, lookup.kind));
            }
        }
        self.home = home.into_values().take(MAX_HOME_SUSPECTS).collect();
        remote.into_iter().for_each(|((subject, _), address)| self.add_suspect(subject, address));
        let mut found: BTreeMap<Cause, Finding> = BTreeMap::new();
        for (subject, deviations) in &self.deviations {
            for (cause, kind) in deviations {
                let new =
                    || Finding { cause: cause.clone(), kind: *kind, subjects: BTreeSet::new() };
                let finding = found.entry(cause.clone()).or_insert_with(new);
                // A cause that also affects packets to peers is reported for those only.
                match (finding.kind, *kind) {
                    (Kind::Home, Kind::Home) => {}
                    (Kind::Home, _) => finding.subjects.clear(),
                    (_, Kind::Home) => continue,
                    _ => {}
                }
                finding.kind = finding.kind.min(*kind);
                finding.subjects.insert(*subject);
            }
        }
        // A cause that affects all packets is not reported again for selected ones.
        let all: BTreeSet<Cause> = found.keys().cloned().collect();
        found.retain(|cause, _| !cause.is_covered_by(&all));
        let now: BTreeSet<Cause> = found.keys().cloned().collect();
        found.retain(|cause, _| self.previous_causes.contains(cause));
        self.findings = found.into_values().collect();
        self.previous_causes = now;
    }

    /// Returns one problem per cause of diverted or dropped packets.
    pub fn problems(&self, networks: Subnets, local: LocalPriorities) -> Vec<Problem> {
        self.findings.iter().filter_map(|finding| finding.problem(networks, local)).collect()
    }

    /// Returns the peer subnets to or from which packets are diverted.
    pub fn diverted(&self) -> BTreeSet<IpNet> {
        let diverted = |finding: &&Finding| finding.kind <= Kind::Own && finding.cause.diverts();
        let of_pods = self.findings.iter().filter(diverted);
        of_pods.flat_map(|finding| finding.subjects.iter().copied()).collect()
    }

    /// Returns the number of peer subnets to look up.
    pub const fn subjects(&self) -> usize {
        self.subjects
    }
}

impl Finding {
    fn problem(&self, networks: Subnets, local: LocalPriorities) -> Option<Problem> {
        let of_ipv4 = is_ipv4(*self.subjects.first()?);
        let network = networks.iter().find(|network| is_ipv4(*network) == of_ipv4)?;
        let names = list_at_most(&self.subjects, MAX_SUBNETS_NAMED);
        self.cause.problem(self.kind, &names, network, local)
    }
}

const fn is_ipv4(network: IpNet) -> bool {
    matches!(network, IpNet::V4(_))
}

/// Returns an address inside `subnet` for each `number`. Consecutive numbers halve the subnet,
/// quarter it, and so on (van der Corput sequence).
fn spread_address(subnet: IpNet, number: u32) -> IpAddr {
    let bits = u32::from(subnet.max_prefix_len() - subnet.prefix_len());
    let spread = u128::from(number.reverse_bits()) << 96;
    let offset = if bits == 0 { 0 } else { spread >> (128 - bits) };
    match subnet.network() {
        IpAddr::V4(network) => IpAddr::V4((u32::from(network) | offset as u32).into()),
        IpAddr::V6(network) => IpAddr::V6((u128::from(network) | offset).into()),
    }
}
