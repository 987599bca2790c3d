//! Whether the kernel sends packets where they should go: which packets it is asked about, and what follows
//! from its answers.
//!
//! The entries of the data plane may all be right and lose: to a policy rule of a VPN, to a more specific
//! route, to a VRF, to a reverse path filter. So nothing is inferred. The kernel is asked for the way of
//! packets as pods send and receive them, for some peers at a time, and what disagrees is told by its cause.
//! Pure: the asking is done elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    desired::{Desired, Hop, Way},
    plan::full_len,
};
use crate::{
    model::{Selector, Subnets},
    pods::{gateway, last_address},
};

pub use self::{
    cause::{Cause, Evidence, Fact, MAIN},
    programs::likely_program,
};

mod cause;
mod home;
mod programs;
mod selected;
#[cfg(test)]
mod tests;

/// Questions of one pass: at some 10 microseconds each.
const QUESTIONS: usize = 512;
/// About one subnet, but for addresses of which so many are asked where there are few subnets.
const PER_SUBJECT: usize = 5;
const ADDRESSES: usize = 8;
/// Of addresses in them that are asked about in any case: of this node's own subnets, and of each of a peer.
const HOME_SUSPECTS: usize = 32;
const SUSPECTS: usize = 8;
/// Subnets that are named in one sentence.
const NAMED: usize = 3;

/// This host as the lookups need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ground {
    /// Index of the VXLAN device.
    pub device: u32,
    /// Index and address of the underlay interface.
    pub underlay: u32,
    pub local: IpAddr,
    pub own: Vec<Own>,
    /// Addresses of this host.
    pub has: BTreeSet<IpAddr>,
    /// Packets of pods to other networks have the address of their host.
    pub masquerade: bool,
    /// What policy rules select that may be packets between pods.
    pub selected: Vec<Selected>,
}

/// Packets that a policy rule selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selected {
    pub selector: Selector,
    /// Index of the interface by which they come in.
    pub input: Option<u32>,
    pub ipv4: bool,
}

/// One of this node's own subnets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    pub subnet: IpNet,
    /// Index of the interface behind which pods are; none before there are any.
    pub inside: Option<u32>,
    /// An address as a pod could have it.
    pub pod: IpAddr,
}

impl Own {
    /// Of a subnet on a host with these addresses, each on the interface with that index. What is on the
    /// VXLAN device itself is the VTEP's.
    pub fn new(subnet: IpNet, device: u32, has: &[(u32, IpAddr)], inside: Option<u32>) -> Self {
        let mut within = has.iter().filter(|(link, ip)| *link != device && subnet.contains(ip));
        let inside = within.next().map(|(link, _)| *link).or(inside);
        let is_free = |ip: &IpAddr| has.iter().all(|(_, own)| own != ip);
        let last = last_address(subnet);
        let pod = subnet.hosts().take(16).chain([last]).filter(is_free).last().unwrap_or(last);
        Self { subnet, inside, pod }
    }
}

/// Which packets are asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Of pods here to pods of a peer.
    Out,
    /// Of pods of a peer to pods here.
    In,
    /// Of this host itself to a peer's VTEP.
    Own,
    /// Of pods of a peer to this host's own underlay address: they come without a tunnel.
    PodsToHost,
    /// Of a peer's underlay address to pods here: what a host sends itself.
    HostsToPods,
    /// To pods here, wherever they come from: all of this node's own subnet.
    Home,
}

impl Kind {
    /// Whether such packets are to leave by the interface behind which pods are.
    const fn is_to_pods_here(self) -> bool {
        matches!(self, Self::In | Self::Home)
    }
}

/// What the kernel is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    pub kind: Kind,
    /// The peer's subnet; of [`Kind::Home`] this node's own.
    pub subject: IpNet,
    pub from: Option<IpAddr>,
    pub to: IpAddr,
    /// Index of the interface by which the packet comes in.
    pub input: Option<u32>,
    pub expected: Expected,
    /// The packet is one that a policy rule selects.
    pub selector: Option<Selector>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It leaves by this interface, to this gateway if one is given.
    Way { link: u32, gateway: Option<IpAddr> },
    /// Whoever sends it is told that it is unreachable.
    Nowhere,
    /// Anything but being dropped by a reverse path filter.
    Unfiltered,
}

/// What the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Way {
        link: u32,
        gateway: Option<IpAddr>,
        table: u32,
    },
    /// Number of the error.
    Refused(i32),
}

/// What the reverse path filter says; kernels since 6.14 say EINVAL instead, to this and to much else.
pub const EXDEV: i32 = 18;
const EINVAL: i32 = 22;

impl Question {
    /// The peer's end of the packet's way.
    fn there(&self) -> IpAddr {
        match self.kind {
            Kind::Out | Kind::Own | Kind::Home => self.to,
            Kind::In | Kind::PodsToHost | Kind::HostsToPods => self.from.unwrap_or(self.to),
        }
    }

    /// Whether the packet goes as it should.
    pub fn agrees(&self, answer: Answer) -> bool {
        match (self.expected, answer) {
            (Expected::Unfiltered, answer) => !matches!(answer, Answer::Refused(EXDEV | EINVAL)),
            (Expected::Nowhere, Answer::Refused(_)) => true,
            (Expected::Way { link, gateway }, Answer::Way { link: found, gateway: via, .. }) => {
                link == found && (gateway.is_none() || gateway == via)
            }
            _ => false,
        }
    }
}

/// What disagrees, by cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub cause: Cause,
    pub kind: Kind,
    pub subjects: BTreeSet<IpNet>,
}

/// What is known by all lookups so far.
#[derive(Debug, Default)]
pub struct Audit {
    pass: u32,
    subjects: usize,
    /// The subject after which the next pass begins.
    after: Option<IpNet>,
    /// Subjects that were not asked about since [`Audit::begin`].
    rest: usize,
    doubts: BTreeMap<IpNet, BTreeSet<(Cause, Kind)>>,
    /// Of each subject addresses that are asked about in any case: they went astray, one for each cause, or
    /// have routes of their own.
    suspects: BTreeMap<IpNet, BTreeSet<IpAddr>>,
    /// Addresses of this node's own subnets that are asked about in any case, one for each cause.
    home: BTreeSet<IpAddr>,
    /// Addresses to which another program has just made a route.
    told: BTreeSet<IpAddr>,
    /// Causes that the pass before had found: what is seen once may be a change that is under way.
    before: BTreeSet<Cause>,
    findings: Vec<Finding>,
}

impl Audit {
    /// Everything is to be asked again.
    pub const fn begin(&mut self) {
        self.rest = usize::MAX;
    }

    /// Asks about these addresses, too: another program has made routes to them.
    pub fn suspect(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.told.extend(addresses);
    }

    /// Whether a pass is to follow soon: not all has been asked, or something is not certain.
    pub fn is_unfinished(&self) -> bool {
        self.rest > 0 || !self.before.iter().eq(self.findings.iter().map(|finding| &finding.cause))
    }

    /// What is asked in this pass: about subjects in doubt, and in turn about all others.
    pub fn questions(&mut self, desired: &Desired, ground: &Ground) -> Vec<Question> {
        self.pass = self.pass.wrapping_add(1);
        let own = |subnet: &IpNet| ground.own.iter().any(|own| own.subnet.contains(subnet));
        let is_subject = |(subnet, _): &(&IpNet, &Hop)| {
            subnet.prefix_len() < full_len(subnet.addr()) && !own(subnet)
        };
        let subjects: BTreeMap<IpNet, Hop> =
            desired.tables.routes.iter().filter(is_subject).map(|(s, hop)| (*s, *hop)).collect();
        self.subjects = subjects.len();
        // Entries on demand have one route for all, which more specific ones outrank.
        let is_outranked = |subject: IpNet, address: IpAddr| {
            own(&address.into())
                || subject.prefix_len() < desired.pool.subnet_len()
                    && subjects.keys().any(|other| {
                        other.contains(&address) && other.prefix_len() > subject.prefix_len()
                    })
        };
        let is_own = |subject: &IpNet| ground.own.iter().any(|own| own.subnet == *subject);
        self.doubts.retain(|subject, _| subjects.contains_key(subject) || is_own(subject));
        self.suspects.retain(|subject, _| subjects.contains_key(subject));
        for address in std::mem::take(&mut self.told) {
            if own(&address.into()) {
                if self.home.len() < HOME_SUSPECTS {
                    self.home.insert(address);
                }
            } else if let Some(subject) =
                subjects.keys().rev().find(|subject| subject.contains(&address))
            {
                self.suspect_in(*subject, address);
            }
        }
        let per_subject = PER_SUBJECT + 2 * ground.selected.len();
        let addresses = (QUESTIONS / (subjects.len() * per_subject).max(1)).clamp(1, ADDRESSES);
        let doubted: BTreeSet<IpNet> =
            self.doubts.keys().chain(self.suspects.keys()).copied().collect();
        let in_doubt = doubted.iter().filter_map(|subject| subjects.get_key_value(subject));
        let later = subjects.iter().filter(|(subject, _)| Some(**subject) > self.after);
        let earlier = subjects.iter().filter(|(subject, _)| Some(**subject) <= self.after);
        let mut questions = Vec::new();
        for own in &ground.own {
            let is_of_family = |subject: &IpNet| is_ipv4(*subject) == is_ipv4(own.subnet);
            let peer = subjects.iter().find(|(subject, _)| is_of_family(subject));
            self.ask_home(own, peer, ground, &mut questions);
        }
        let asked_at_home = questions.len();
        for (subject, hop) in in_doubt {
            if questions.len() - asked_at_home < QUESTIONS / 2 {
                self.ask(*subject, *hop, ground, addresses, &mut questions);
            }
        }
        self.rest = self.rest.min(subjects.len());
        let mut last = None;
        for (subject, hop) in later.chain(earlier) {
            if questions.len() - asked_at_home >= QUESTIONS {
                break;
            }
            last = Some((*subject, *hop));
            self.rest = self.rest.saturating_sub(1);
            if !doubted.contains(subject) {
                self.ask(*subject, *hop, ground, addresses, &mut questions);
            }
        }
        // What comes from a subnet that is unreachable is refused by design.
        let answered = last.filter(|(_, hop)| hop.way != Way::Unreachable);
        if let Some(((subject, _), peer)) = answered.zip(desired.tables.fdb.values().next()) {
            questions.extend(filters(subject, *peer, ground));
        }
        self.after = last.map(|(subject, _)| subject);
        questions.retain(|question| {
            let there = question.there();
            question.kind == Kind::Home
                || !question.subject.contains(&there)
                || !is_outranked(question.subject, there)
        });
        questions
    }

    fn ask(
        &self,
        subject: IpNet,
        hop: Hop,
        ground: &Ground,
        addresses: usize,
        questions: &mut Vec<Question>,
    ) {
        let ipv4 = subject.addr().is_ipv4();
        let Some(own) = ground.own.iter().find(|own| own.subnet.addr().is_ipv4() == ipv4) else {
            return;
        };
        let (expected, comes_by) = match hop.way {
            Way::Overlay(gateway) => {
                (Expected::Way { link: ground.device, gateway: Some(gateway) }, ground.device)
            }
            Way::Device => (Expected::Way { link: ground.device, gateway: None }, ground.device),
            Way::Direct { gateway, link } => (Expected::Way { link, gateway: Some(gateway) }, link),
            Way::Unreachable => (Expected::Nowhere, 0),
        };
        let from = own.inside.map(|_| own.pod);
        let question = Question {
            kind: Kind::Out,
            subject,
            from,
            to: gateway(subject),
            input: own.inside,
            expected,
            selector: None,
        };
        questions.push(question);
        questions.push(Question { to: last_address(subject), ..question });
        let count = addresses as u32;
        let numbers = (0..count).map(|i| self.pass.wrapping_sub(1).wrapping_mul(count) + i + 1);
        let between = numbers.map(|number| between(subject, number));
        let suspects = self.suspects.get(&subject).into_iter().flatten().copied();
        let between: Vec<IpAddr> = between.chain(suspects).collect();
        questions.extend(between.iter().map(|to| Question { to: *to, ..question }));
        if expected == Expected::Nowhere {
            return;
        }
        questions.push(Question { kind: Kind::Own, from: None, input: None, ..question });
        if let Some(inside) = own.inside {
            let comes_in = Question {
                kind: Kind::In,
                from: between.last().copied(),
                to: own.pod,
                input: Some(comes_by),
                expected: Expected::Way { link: inside, gateway: None },
                ..question
            };
            questions.push(comes_in);
            for selected in &ground.selected {
                questions.extend(selected.of(question, own, ground));
                questions.extend(selected.of(comes_in, own, ground));
            }
        }
    }

    fn suspect_in(&mut self, subject: IpNet, address: IpAddr) {
        let suspects = self.suspects.entry(subject).or_default();
        if suspects.len() < SUSPECTS {
            suspects.insert(address);
        }
    }

    /// What followed from the questions of a pass.
    pub fn conclude(&mut self, results: impl IntoIterator<Item = (Question, Option<Cause>)>) {
        let mut asked: BTreeSet<IpNet> = BTreeSet::new();
        let mut home: BTreeMap<Cause, IpAddr> = BTreeMap::new();
        let mut there: BTreeMap<(IpNet, Cause), IpAddr> = BTreeMap::new();
        for (question, cause) in results {
            if asked.insert(question.subject) {
                self.doubts.remove(&question.subject);
                self.suspects.remove(&question.subject);
            }
            if let Some(cause) = cause {
                if question.kind == Kind::Home {
                    home.insert(cause.clone(), question.to);
                } else if question.subject.contains(&question.there()) {
                    // Of a host's own address nothing follows for the pods of its subnet.
                    there.insert((question.subject, cause.clone()), question.there());
                }
                let doubts = self.doubts.entry(question.subject).or_default();
                doubts.insert((cause, question.kind));
            }
        }
        self.home = home.into_values().take(HOME_SUSPECTS).collect();
        there.into_iter().for_each(|((subject, _), address)| self.suspect_in(subject, address));
        let mut found: BTreeMap<Cause, Finding> = BTreeMap::new();
        for (subject, doubts) in &self.doubts {
            for (cause, kind) in doubts {
                let new =
                    || Finding { cause: cause.clone(), kind: *kind, subjects: BTreeSet::new() };
                let finding = found.entry(cause.clone()).or_insert_with(new);
                // What takes packets to peers as well is told as that.
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
        // What takes all packets is told as that.
        let all: BTreeSet<Cause> = found.keys().cloned().collect();
        found.retain(|cause, _| !cause.is_told_by(&all));
        let now: BTreeSet<Cause> = found.keys().cloned().collect();
        found.retain(|cause, _| self.before.contains(cause));
        self.findings = found.into_values().collect();
        self.before = now;
    }

    /// Why packets do not go as they should, one sentence per cause.
    pub fn sentences(&self, networks: Subnets) -> Vec<String> {
        self.findings.iter().filter_map(|finding| finding.sentence(networks)).collect()
    }

    /// Subnets of peers to or from which packets take a wrong way.
    pub fn astray(&self) -> BTreeSet<IpNet> {
        let astray = |finding: &&Finding| finding.kind <= Kind::Own && finding.cause.leads_astray();
        let of_pods = self.findings.iter().filter(astray);
        of_pods.flat_map(|finding| finding.subjects.iter().copied()).collect()
    }

    /// How many subnets of peers there are to ask about.
    pub const fn subjects(&self) -> usize {
        self.subjects
    }
}

impl Finding {
    fn sentence(&self, networks: Subnets) -> Option<String> {
        let of_ipv4 = is_ipv4(*self.subjects.first()?);
        let network = networks.iter().find(|network| is_ipv4(*network) == of_ipv4)?;
        let mut names: Vec<String> =
            self.subjects.iter().take(NAMED).map(|subject| subject.to_string()).collect();
        if self.subjects.len() > NAMED {
            names.push(format!("{} more", self.subjects.len() - NAMED));
        }
        self.cause.sentence(self.kind, &names.join(", "), network)
    }
}

const fn is_ipv4(network: IpNet) -> bool {
    matches!(network, IpNet::V4(_))
}

/// IPv4 has a reverse path filter, which drops what comes by another interface than the one by which its
/// sender is reached. Between pods and the hosts' own addresses that is so by design.
fn filters(subject: IpNet, peer: IpAddr, ground: &Ground) -> Vec<Question> {
    let own = ground.own.iter().find(|own| is_ipv4(own.subnet));
    let Some(own) = own.filter(|_| ground.local.is_ipv4() && is_ipv4(subject)) else {
        return Vec::new();
    };
    // Under another address they are ordinary packets.
    if ground.masquerade {
        return Vec::new();
    }
    let question = Question {
        kind: Kind::PodsToHost,
        subject,
        from: Some(last_address(subject)),
        to: ground.local,
        input: Some(ground.underlay),
        expected: Expected::Unfiltered,
        selector: None,
    };
    let to_pods = own.inside.map(|_| Question {
        kind: Kind::HostsToPods,
        from: Some(peer),
        to: own.pod,
        input: Some(ground.device),
        ..question
    });
    [Some(question), to_pods].into_iter().flatten().collect()
}

/// An address inside a subnet: with each number another one, so that the first few halve it, quarter it and
/// so on (van der Corput's sequence).
fn between(subnet: IpNet, number: u32) -> IpAddr {
    let bits = u32::from(subnet.max_prefix_len() - subnet.prefix_len());
    let spread = u128::from(number.reverse_bits()) << 96;
    let offset = if bits == 0 { 0 } else { spread >> (128 - bits) };
    match subnet.network() {
        IpAddr::V4(network) => IpAddr::V4((u32::from(network) | offset as u32).into()),
        IpAddr::V6(network) => IpAddr::V6((u128::from(network) | offset).into()),
    }
}
