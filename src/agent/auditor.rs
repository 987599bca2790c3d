//! Asks the kernel for the way of packets, as [`crate::dataplane::audit`] wants it, and finds out why one
//! does not go as it should.
//!
//! Part of the kernel's thread (`programmer`). Bounded: so many lookups per pass, and no more than one part
//! in fifty of the time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    ops::Bound,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use rtnetlink::packet_route::route::{RouteProtocol, RouteType};

mod detour;
mod others;
mod policy;

pub use detour::Detour;

use super::underlay::ChosenUnderlay;
use crate::{
    api::{CheckState, CheckStatus},
    dataplane::{
        audit::{Answer, Audit, Cause, Evidence, Expected, Fact, Ground, Own, Question},
        desired::{Desired, ROUTE_PROTOCOL},
        firewall::Firewall,
        kernel::next_hops::Hop,
    },
    model::Transport,
    netlink::{
        Netlink,
        link::Link,
        route::{MAIN, Query, Refusal, RouteLookup, Rule},
    },
    pods::bridge::ALIAS,
};

/// Between two passes while all is well.
const CALM: Duration = Duration::from_secs(10);
/// The same while something is not certain.
const ANXIOUS: Duration = Duration::from_secs(1);
/// After a change: what belongs together should be over.
const SETTLE: Duration = Duration::from_millis(300);
/// A pass takes no more than one part in so many of the time, unless the wait would be longer than this.
const SHARE: u32 = 50;
/// Paths whose MTU is asked for in one pass.
const PATHS: usize = 256;
const LONGEST: Duration = Duration::from_secs(3);

/// Value of `rp_filter` (RFC 3704, strict).
const STRICT: u8 = 1;

const EACCES: i32 = 13;
const EINVAL: i32 = 22;
const ENETUNREACH: i32 = 101;
const EHOSTUNREACH: i32 = 113;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routing {
    /// Why packets do not go as they should, with what helps.
    pub problems: Vec<String>,
    /// Subnets of peers whose packets take a wrong way.
    pub diverted: BTreeSet<IpNet>,
    /// MTU of the underlay's path to these hosts, where it is smaller than that of the interface: a router
    /// has said so, or a route has it.
    pub path_mtus: BTreeMap<IpAddr, PathMtu>,
    /// Hosts whose tunnel packets do not leave by the underlay's interface.
    pub detours: BTreeMap<IpAddr, Detour>,
    pub status: CheckStatus,
}

/// What the path to a host carries, as far as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathMtu {
    pub mtu: u32,
    /// A router has told it; otherwise a route has it.
    pub learned: bool,
}

#[derive(Debug)]
pub struct Auditor {
    audit: Audit,
    due: Instant,
    not_before: Instant,
    path_mtus: BTreeMap<IpAddr, PathMtu>,
    detours: BTreeMap<IpAddr, Detour>,
    /// By which tunnel packets to each host leave.
    next_hops: BTreeMap<IpAddr, Hop>,
    /// The host whose path was asked for last.
    path_asked: Option<IpAddr>,
    /// Subnets of peers for which routes of others have been read.
    read_for: BTreeSet<IpNet>,
    /// Before this they are not read again.
    read_at: Instant,
    /// Selectors of policy rules with which no packets are tried.
    unread: usize,
    told: Routing,
}

/// Where this host stands.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Index of the VXLAN device.
    pub device: u32,
    /// Index and address of the underlay interface.
    pub underlay: u32,
    pub local: IpAddr,
    /// Its MTU.
    pub carried: u32,
    /// Networks of the interface.
    pub networks: &'a [IpNet],
    pub masquerade: bool,
}

impl<'a> Place<'a> {
    pub fn new(device: u32, underlay: &'a ChosenUnderlay, firewall: &Firewall) -> Self {
        let masquerade = !firewall.masquerade.is_empty();
        let ChosenUnderlay { link, local, carried, ref networks, .. } = *underlay;
        Self { device, underlay: link, local, carried, networks, masquerade }
    }
}

impl Auditor {
    pub fn new(now: Instant) -> Self {
        Self {
            audit: Audit::default(),
            due: now,
            not_before: now,
            path_mtus: BTreeMap::new(),
            detours: BTreeMap::new(),
            next_hops: BTreeMap::new(),
            path_asked: None,
            read_for: BTreeSet::new(),
            read_at: now,
            unread: 0,
            told: Routing::default(),
        }
    }

    /// Something has changed that may lead packets elsewhere: routes to these addresses, for one.
    pub fn touch(&mut self, now: Instant, addresses: impl IntoIterator<Item = IpAddr>) {
        self.audit.begin();
        self.audit.suspect(addresses);
        self.due = self.due.min((now + SETTLE).max(self.not_before));
    }

    /// There is nothing to ask about yet.
    pub fn put_off(&mut self, now: Instant) {
        self.due = now + CALM;
    }

    pub const fn due(&self) -> Instant {
        self.due
    }

    /// To which tunnel packets are sent.
    pub fn next_hops(&self) -> BTreeSet<Hop> {
        self.next_hops.values().copied().collect()
    }

    /// One pass, if it is due. Gives what is known, if it is something else than before.
    pub fn look(
        &mut self,
        begun: Instant,
        netlink: &mut Netlink,
        desired: &Desired,
        place: Place<'_>,
    ) -> Option<Routing> {
        if self.due > begun {
            return None;
        }
        if let Err(error) = self.read_routes(begun, netlink, desired) {
            tracing::debug!(%error, "routes of other programs were not read");
        }
        match self.pass(netlink, desired, place) {
            Ok(()) => {}
            Err(error) => tracing::debug!(%error, "the kernel was not asked for routes"),
        }
        let rest = (begun.elapsed() * SHARE).min(LONGEST);
        let pause = if self.audit.is_unfinished() { ANXIOUS } else { CALM };
        self.not_before = begun + rest.max(ANXIOUS);
        self.due = begun + pause.max(rest);
        let problems = self.audit.sentences(desired.pool.networks());
        let (state, detail) = match (self.audit.subjects(), problems.as_slice()) {
            (0, _) => (CheckState::Skipped, "there is no peer to ask about".to_owned()),
            (count, []) => (CheckState::Ok, policy::detail(count, self.unread)),
            (_, problems) => (CheckState::Failing, problems.join("; ")),
        };
        let diverted = self.audit.diverted();
        let (state, detail) = match state {
            CheckState::Ok if !diverted.is_empty() => {
                (CheckState::Failing, "packets to peers take a wrong way".to_owned())
            }
            _ => (state, detail),
        };
        self.ask_paths(netlink, desired, place);
        let (path_mtus, detours) = (self.path_mtus.clone(), self.detours.clone());
        let status = CheckStatus { state, detail };
        let state = Routing { problems, diverted, path_mtus, detours, status };
        let is_news = state != self.told;
        self.told.clone_from(&state);
        is_news.then_some(state)
    }

    fn pass(
        &mut self,
        netlink: &mut Netlink,
        desired: &Desired,
        place: Place<'_>,
    ) -> io::Result<()> {
        let (ground, unread) = ground(netlink, desired, place)?;
        self.unread = unread;
        let mut witness = Witness { netlink, desired, facts: None };
        let questions = self.audit.questions(desired, &ground);
        let results = questions.into_iter().map(|question| {
            let cause = witness.ask(&question)?;
            Ok((question, cause))
        });
        let results: Vec<_> = results.collect::<io::Result<_>>()?;
        self.audit.conclude(results);
        Ok(())
    }

    /// Asks for the way of tunnel packets to each peer's host, and its MTU, as far as one pass gets.
    fn ask_paths(&mut self, netlink: &mut Netlink, desired: &Desired, place: Place<'_>) {
        let hosts: BTreeSet<IpAddr> = desired.underlays().collect();
        self.path_mtus.retain(|host, _| hosts.contains(host));
        self.detours.retain(|host, _| hosts.contains(host));
        self.next_hops.retain(|host, _| hosts.contains(host));
        let begin = self.path_asked.map_or(Bound::Unbounded, Bound::Excluded);
        let next = hosts.range((begin, Bound::Unbounded)).chain(&hosts);
        let output = Some(desired.device.link).filter(|link| *link != 0);
        let mut links = None;
        for host in next.take(hosts.len().min(PATHS)).copied().collect::<Vec<_>>() {
            self.path_asked = Some(host);
            let transport = Some(Transport::udp_to(desired.device.port));
            let from = Some(desired.device.local).filter(|local| local.is_ipv4() == host.is_ipv4());
            let query = Query { output, from, transport, ..Query::to(host) };
            let found = netlink.route(&query);
            let detour = match &found {
                Ok(found) => match refusal(found.kind) {
                    Some(errno) => Some(Detour::Refused(reason(errno))),
                    None if found.link == place.underlay => {
                        detour::around(netlink, &query, found, place.networks)
                    }
                    None => {
                        let links =
                            links.get_or_insert_with(|| netlink.links().unwrap_or_default());
                        detour::elsewhere(netlink, &query, links, found, place.underlay)
                    }
                },
                Err(error) => error.raw_os_error().map(|errno| Detour::Refused(reason(errno))),
            };
            match detour {
                Some(detour) => _ = self.detours.insert(host, detour),
                None => _ = self.detours.remove(&host),
            }
            if let Ok(RouteLookup { link: link @ 1.., gateway, kind: RouteType::Unicast, .. }) =
                found
            {
                self.next_hops.insert(host, (link, gateway.unwrap_or(host)));
            }
            let mtu = found.ok().and_then(|found| match found {
                RouteLookup { mtu: Some(mtu), learned, .. } if mtu < place.carried => {
                    Some(PathMtu { mtu, learned })
                }
                _ => None,
            });
            match mtu {
                Some(mtu) => _ = self.path_mtus.insert(host, mtu),
                None => _ = self.path_mtus.remove(&host),
            }
        }
    }
}

/// Which interface pods are behind is for the addresses to tell: our bridge, Docker's or one made by hand.
/// Where there are several, ours is the right one. The second is how many selectors of rules are left out.
fn ground(
    netlink: &mut Netlink,
    desired: &Desired,
    place: Place<'_>,
) -> io::Result<(Ground, usize)> {
    let mut has: Vec<(u32, IpAddr)> =
        netlink.addresses()?.iter().map(|address| (address.link, address.ip)).collect();
    let pool = &desired.pool;
    let vtep = desired.device.addresses.first();
    let subnets = vtep.and_then(|vtep| pool.slot_of(*vtep)).map(|slot| pool.subnets(slot));
    let inside = |ip: &IpAddr| {
        subnets.iter().flat_map(|subnets| subnets.iter()).any(|subnet| subnet.contains(ip))
    };
    let candidates: BTreeSet<u32> =
        has.iter().filter(|(_, ip)| inside(ip)).map(|(link, _)| *link).collect();
    if candidates.iter().filter(|link| **link != place.device).count() > 1 {
        let links = netlink.links()?;
        let ours =
            links.iter().find(|link| link.alias == ALIAS && candidates.contains(&link.index));
        has.sort_by_key(|(link, _)| ours.is_none_or(|ours| ours.index != *link));
    }
    let mut own: Vec<Own> = Vec::new();
    for subnet in subnets.iter().flat_map(|subnets| subnets.iter()) {
        let inside = own.iter().find_map(|own| own.inside);
        own.push(Own::new(subnet, place.device, &has, inside));
    }
    let Place { device, underlay, local, masquerade, .. } = place;
    let has = has.into_iter().map(|(_, ip)| ip).collect();
    let links: Vec<u32> =
        own.iter().filter_map(|own| own.inside).chain([device, underlay]).collect();
    let policy::Found { selected, unread } =
        policy::selected(netlink, &own, pool.networks(), &links)?;
    Ok((Ground { device, underlay, local, own, has, masquerade, selected }, unread))
}

/// Answers questions; looks further only where an answer is wrong, and at everything once.
struct Witness<'a> {
    netlink: &'a mut Netlink,
    desired: &'a Desired,
    facts: Option<Facts>,
}

struct Facts {
    links: Vec<Link>,
    /// Addresses of this host.
    has: Vec<IpAddr>,
    rules: [Vec<(u32, u32, bool)>; 2],
    /// No policy rule leads all packets to the main table.
    without_main: [bool; 2],
    refusals: [Vec<Refusal>; 2],
}

impl Witness<'_> {
    /// Why the kernel sends a packet elsewhere; nothing, if it does not.
    fn ask(&mut self, question: &Question) -> io::Result<Option<Cause>> {
        let selector = question.selector;
        let query = Query {
            from: question.from,
            input: question.input,
            transport: selector.and_then(|selector| selector.transport),
            tos: selector.map_or(0, |selector| selector.tos),
            ..Query::to(question.to)
        };
        let answer = match self.netlink.route(&query) {
            Ok(found) => match refusal(found.kind) {
                Some(errno) => Answer::Refused(errno),
                None => {
                    Answer::Way { link: found.link, gateway: found.gateway, table: found.table }
                }
            },
            Err(error) => match error.raw_os_error() {
                Some(errno) => Answer::Refused(errno),
                None => return Err(error),
            },
        };
        if question.agrees(answer) {
            return Ok(None);
        }
        let output = match answer {
            Answer::Way { link, .. } => Some(link),
            Answer::Refused(_) => None,
        };
        let evidence = self.evidence(question, &query, output)?;
        Ok(Cause::of(question, answer, &evidence))
    }

    fn evidence(
        &mut self,
        question: &Question,
        query: &Query,
        output: Option<u32>,
    ) -> io::Result<Evidence> {
        let entry = self.netlink.route_entry(query).ok();
        let is_kernels = entry.is_some_and(|entry| entry.protocol == RouteProtocol::Kernel);
        let local = entry.is_some_and(|entry| entry.kind == RouteType::Local);
        let entry = entry.and_then(|entry| {
            let any = if query.to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let to = IpNet::new(entry.destination.unwrap_or(any), entry.prefix_len).ok()?;
            Some((to, entry.metric))
        });
        let back = question.from.and_then(|from| self.netlink.route(&Query::to(from)).ok());
        let facts = match &mut self.facts {
            Some(facts) => facts,
            none => none.insert(Facts::gather(self.netlink)?),
        };
        // The far end of a point-to-point link is no address of this host.
        let connected =
            is_kernels && entry.is_some_and(|(to, _)| facts.has.iter().any(|ip| to.contains(ip)));
        let family = usize::from(query.to.is_ipv6());
        let refusals = facts.refusals[family].iter();
        let others =
            refusals.filter(|refusal| refusal.protocol != RouteProtocol::Other(ROUTE_PROTOCOL));
        // The rule whose packets these are has led them there, not another one with that table.
        let mut rules = facts.rules[family].clone();
        rules.sort_by_key(|(priority, ..)| {
            question.selector.is_some_and(|selector| selector.priority != *priority)
        });
        Ok(Evidence {
            input: query.input.and_then(|index| facts.of(index)),
            output: output.and_then(|index| facts.of(index)),
            wanted: match question.expected {
                Expected::Way { link, .. } => facts.of(link),
                Expected::Nowhere | Expected::Unfiltered => None,
            },
            back: back.map(|found| found.link),
            from_local: back
                .is_some_and(|found| matches!(found.kind, RouteType::Local | RouteType::Broadcast)),
            entry,
            local,
            connected,
            ours: self.desired.tables.routes.get(&question.subject).map(|hop| hop.metric),
            rules,
            without_main: facts.without_main[family],
            refusals: others.map(|r| (r.destination, r.kind, r.table)).collect(),
            forwards: match query.to {
                IpAddr::V4(_) => is_on("ipv4/ip_forward"),
                IpAddr::V6(_) => is_on("ipv6/conf/all/forwarding"),
            },
            default_off: !is_on("ipv4/conf/default/forwarding"),
        })
    }
}

impl Facts {
    fn gather(netlink: &mut Netlink) -> io::Result<Self> {
        let mut read = |ipv4| {
            let mut rules = netlink.rules(ipv4).unwrap_or_default();
            rules.retain(|rule| rule.protocol != Some(RouteProtocol::Other(ROUTE_PROTOCOL)));
            rules
        };
        let rules = [read(true), read(false)];
        let leads = |rule: &Rule| rule.table == MAIN && rule.takes_all();
        // Without rules there was nothing to read.
        let without_main =
            rules.each_ref().map(|rules| !rules.is_empty() && !rules.iter().any(leads));
        let rules = rules.map(|rules| {
            let short = |rule: Rule| (rule.priority, rule.table, rule.refuses);
            rules.into_iter().map(short).collect()
        });
        let mut refusals = |ipv4| netlink.refusals(ipv4).unwrap_or_default();
        let refusals = [refusals(true), refusals(false)];
        let has = netlink.addresses()?.into_iter().map(|address| address.ip).collect();
        Ok(Self { links: netlink.links()?, has, rules, without_main, refusals })
    }

    fn of(&self, index: u32) -> Option<Fact> {
        let link = self.links.iter().find(|link| link.index == index)?;
        let name = &link.name;
        let controller = link.controller();
        let vrf = self.links.iter().find(|vrf| Some(vrf.index) == controller && vrf.kind == "vrf");
        Some(Fact {
            name: name.clone(),
            vrf: vrf.map(|vrf| (vrf.name.clone(), vrf.vrf_table().unwrap_or_default())),
            forwards: is_on(&format!("ipv4/conf/{name}/forwarding")),
            carrier: link.carrier,
            filters: ["all", name.as_str()]
                .map(|name| number(&format!("ipv4/conf/{name}/rp_filter")))
                .into_iter()
                .max()
                == Some(STRICT),
            without_ipv6: is_on(&format!("ipv6/conf/{name}/disable_ipv6")),
        })
    }
}

/// With IPv6 the kernel shows such a route, with IPv4 it gives its error.
const fn refusal(kind: RouteType) -> Option<i32> {
    match kind {
        RouteType::Unreachable => Some(EHOSTUNREACH),
        RouteType::BlackHole => Some(EINVAL),
        RouteType::Prohibit => Some(EACCES),
        RouteType::Throw => Some(ENETUNREACH),
        _ => None,
    }
}

/// As the kernel's users know it.
fn reason(errno: i32) -> String {
    io::Error::from_raw_os_error(errno).to_string()
}

fn is_on(sysctl: &str) -> bool {
    number(sysctl) != 0
}

/// Its value; 0 where there is none.
fn number(sysctl: &str) -> u8 {
    let value = fs::read_to_string(format!("/proc/sys/net/{sysctl}"));
    value.ok().and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}
