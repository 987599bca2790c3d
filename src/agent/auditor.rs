//! Asks the kernel for the way of packets, as [`crate::dataplane::audit`] wants it, and finds out why one
//! does not go as it should.
//!
//! Part of the kernel's thread (`programmer`). Bounded: so many lookups per pass, and no more than one part
//! in fifty of the time.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    ops::Bound,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use rtnetlink::packet_route::route::RouteType;

mod detour;
mod others;
mod policy;
mod witness;

pub use detour::Detour;
use witness::Witness;

use super::underlay::Chosen;
use crate::{
    api::{CheckState, CheckStatus},
    dataplane::{
        audit::{Audit, Ground, Own},
        desired::Desired,
        firewall::Firewall,
        kernel::{ForeignRoutes, next_hops::Hop},
    },
    model::{Selector, Transport},
    netlink::{
        Netlink,
        route::{Found, Query},
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
    pub astray: BTreeSet<IpNet>,
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
    /// What routes of others select that ask for more than the destination.
    conditional: BTreeSet<Selector>,
    /// Selectors of policy rules and of such routes with which no packets are tried.
    unread: [usize; 2],
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
    pub fn new(device: u32, underlay: &'a Chosen, firewall: &Firewall) -> Self {
        let masquerade = !firewall.masquerade.is_empty();
        let Chosen { link, local, carried, ref networks, .. } = *underlay;
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
            conditional: BTreeSet::new(),
            unread: [0; 2],
            told: Routing::default(),
        }
    }

    /// Something has changed that may lead packets elsewhere: these routes, for one.
    pub fn touch(&mut self, now: Instant, routes: ForeignRoutes) {
        self.audit.begin();
        self.audit.suspect(routes.to);
        if routes.has_conditional {
            self.read_for.clear();
        }
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
        let astray = self.audit.astray();
        let (state, detail) = match state {
            CheckState::Ok if !astray.is_empty() => {
                (CheckState::Failing, "packets to peers take a wrong way".to_owned())
            }
            _ => (state, detail),
        };
        self.ask_paths(netlink, desired, place);
        let (path_mtus, detours) = (self.path_mtus.clone(), self.detours.clone());
        let status = CheckStatus { state, detail };
        let state = Routing { problems, astray, path_mtus, detours, status };
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
        let (ground, unread) = ground(netlink, desired, place, &self.conditional)?;
        self.unread = unread;
        let mut witness = Witness::new(netlink, desired);
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
            if let Ok(Found { link: link @ 1.., gateway, kind: RouteType::Unicast, .. }) = found {
                self.next_hops.insert(host, (link, gateway.unwrap_or(host)));
            }
            let mtu = found.ok().and_then(|found| match found {
                Found { mtu: Some(mtu), learned, .. } if mtu < place.carried => {
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
/// Where there are several, ours is the right one. The second is how many selectors of rules, and of routes,
/// are left out.
fn ground(
    netlink: &mut Netlink,
    desired: &Desired,
    place: Place<'_>,
    conditional: &BTreeSet<Selector>,
) -> io::Result<(Ground, [usize; 2])> {
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
        policy::selected(netlink, &own, pool.networks(), &links, conditional)?;
    Ok((Ground { device, underlay, local, own, has, masquerade, selected }, unread))
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
