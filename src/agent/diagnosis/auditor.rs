//! Looks up the routes of packets that [`crate::dataplane::audit`] selects, and determines why a packet
//! does not take its intended way.
//!
//! Part of the kernel thread (`programmer`). The lookups per pass are limited, and they take at most a
//! fiftieth of the time.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    ops::Bound,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use nix::libc::{EACCES, EHOSTUNREACH, EINVAL, ENETUNREACH};
use rtnetlink::packet_route::route::RouteType;

mod dead_hops;
mod detour;
mod foreign_routes;
mod hop_limit;
mod policy;
mod refuser;
mod witness;

use dead_hops::DeadHops;
pub use detour::{Detour, FlowDetour};
use witness::Witness;

use crate::{
    api::{CheckState, CheckStatus},
    dataplane::{
        audit::{Audit, HostState, LocalPriorities, OwnSubnet},
        desired::Desired,
        firewall::Firewall,
        kernel::{ForeignRoutes, next_hops::Hop},
    },
    model::{PacketSelector, Ports, Problem, Selector},
    netlink::{
        Netlink,
        link::Link,
        route::{self, Query, RouteLookup},
    },
    pods::desired::ALIAS,
    underlay::ChosenUnderlay,
};

/// Time between two passes while nothing is wrong.
const PASS_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two passes while a result is uncertain.
const UNCERTAIN_PASS_INTERVAL: Duration = Duration::from_secs(1);
/// Time from a change to the next pass, so that related changes are complete.
const SETTLE_TIME: Duration = Duration::from_millis(300);
/// A pass takes at most this fraction (1/n) of the time, unless the pause would exceed [`MAX_PAUSE`].
const TIME_SHARE: u32 = 50;
/// Maximum number of hosts whose path MTU is looked up in one pass.
const MAX_PATHS: usize = 256;
/// Longest pause between two passes.
const MAX_PAUSE: Duration = Duration::from_secs(3);

/// The result of the audit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routing {
    /// Why packets do not take their intended way, with remedies.
    pub problems: Vec<Problem>,
    /// Subnets of peers whose packets take a wrong way.
    pub diverted: BTreeSet<IpNet>,
    /// MTU of the path to these hosts, if it is smaller than that of the underlay interface because of a
    /// router's report or a route.
    pub path_mtus: BTreeMap<IpAddr, PathMtu>,
    /// Hosts whose tunnel packets do not leave by the underlay interface.
    pub detours: BTreeMap<IpAddr, Detour>,
    /// Hosts of which single tunnel flows do not leave by the underlay interface.
    pub flow_detours: BTreeMap<IpAddr, FlowDetour>,
    /// A next hop that answers no ARP or neighbor discovery, for each host whose route has several.
    pub dead_hops: BTreeMap<IpAddr, IpAddr>,
    /// Those of `detours` that answer ARP or neighbor discovery on the interface by which packets leave.
    pub on_link: BTreeSet<IpAddr>,
    /// Hosts in the underlay's networks that the kernel reaches through a router, because these networks have
    /// no route without one.
    pub routed: BTreeSet<IpAddr>,
    /// The state of the check for the status.
    pub status: CheckStatus,
}

/// The MTU of the path to a host, according to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathMtu {
    /// In bytes.
    pub mtu: u32,
    /// Whether a router reported it; otherwise a route sets it.
    pub learned: bool,
}

/// The state of the audit between passes.
#[derive(Debug)]
pub struct Auditor {
    audit: Audit,
    due: Instant,
    not_before: Instant,
    path_mtus: BTreeMap<IpAddr, PathMtu>,
    detours: BTreeMap<IpAddr, Detour>,
    flow_detours: BTreeMap<IpAddr, FlowDetour>,
    dead_hops: DeadHops,
    on_link: BTreeSet<IpAddr>,
    routed: BTreeSet<IpAddr>,
    /// Next hop of tunnel packets to each host.
    next_hops: BTreeMap<IpAddr, Hop>,
    /// The host whose path was looked up last.
    last_path: Option<IpAddr>,
    /// Subnets of peers for which routes of other programs have been read.
    read_for: BTreeSet<IpNet>,
    /// Earliest time to read them again.
    read_at: Instant,
    /// Selectors of other programs' routes that depend on more than the destination.
    conditional: BTreeSet<Selector>,
    /// Numbers of policy rules and of such routes whose selectors are not tested.
    unread: [usize; 2],
    /// The last reported result.
    reported: Routing,
}

/// The interfaces and addresses of this host.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Index of the VXLAN device.
    pub device: u32,
    /// Index of the underlay interface.
    pub underlay: u32,
    /// Name of the underlay interface.
    pub name: &'a str,
    /// Address of this host on the underlay.
    pub local: IpAddr,
    /// MTU of the underlay interface in bytes.
    pub carried: u32,
    /// Networks of the underlay interface.
    pub networks: &'a [IpNet],
    /// Whether the firewall masquerades packets of pods.
    pub masquerade: bool,
}

impl<'a> Place<'a> {
    /// Combines the device, the underlay and the firewall.
    pub fn new(device: u32, underlay: &'a ChosenUnderlay, firewall: &Firewall) -> Self {
        let masquerade = !firewall.masquerade.is_empty();
        let ChosenUnderlay { link, ref name, local, carried, ref networks, .. } = *underlay;
        Self { device, underlay: link, name, local, carried, networks, masquerade }
    }
}

impl Auditor {
    /// Returns an auditor whose first pass is due at `now`.
    pub fn new(now: Instant) -> Self {
        Self {
            audit: Audit::default(),
            due: now,
            not_before: now,
            path_mtus: BTreeMap::new(),
            detours: BTreeMap::new(),
            flow_detours: BTreeMap::new(),
            dead_hops: DeadHops::default(),
            on_link: BTreeSet::new(),
            routed: BTreeSet::new(),
            next_hops: BTreeMap::new(),
            last_path: None,
            read_for: BTreeSet::new(),
            read_at: now,
            conditional: BTreeSet::new(),
            unread: [0; 2],
            reported: Routing::default(),
        }
    }

    /// Schedules a pass after a change that may divert packets, including these routes of other
    /// programs.
    pub fn on_change(&mut self, now: Instant, routes: ForeignRoutes) {
        self.audit.begin();
        self.audit.suspect(routes.to);
        if routes.has_conditional {
            self.read_for.clear();
        }
        self.due = self.due.min((now + SETTLE_TIME).max(self.not_before));
    }

    /// Postpones the pass, because nothing is programmed yet.
    pub fn postpone(&mut self, now: Instant) {
        self.due = now + PASS_INTERVAL;
    }

    /// Returns when the next pass is due.
    pub const fn due(&self) -> Instant {
        self.due
    }

    /// Returns the next hops of tunnel packets.
    pub fn next_hops(&self) -> BTreeSet<Hop> {
        self.next_hops.values().copied().collect()
    }

    /// Runs a pass if it is due. Returns the result if it has changed.
    pub fn run_pass(
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
            tracing::debug!(%error, "routes of other programs not read");
        }
        match self.pass(netlink, desired, place) {
            Ok(()) => {}
            Err(error) => tracing::debug!(%error, "routes not looked up"),
        }
        let rest = (begun.elapsed() * TIME_SHARE).min(MAX_PAUSE);
        self.look_up_paths(netlink, desired, place);
        self.dead_hops.check(begun, netlink);
        let is_uncertain = self.audit.is_unfinished() || self.dead_hops.is_undecided();
        let pause = if is_uncertain { UNCERTAIN_PASS_INTERVAL } else { PASS_INTERVAL };
        self.not_before = begun + rest.max(UNCERTAIN_PASS_INTERVAL);
        self.due = begun + pause.max(rest);
        let mut problems = self.audit.problems(desired.pool.networks(), local_priorities(netlink));
        problems.extend(self.dead_hops.problems(netlink));
        let (state, detail) = match (self.audit.subjects(), problems.as_slice()) {
            (0, _) => (CheckState::Skipped, "there is no peer".to_owned()),
            (count, []) => (CheckState::Ok, policy::detail(count, self.unread)),
            (_, problems) => {
                let texts: Vec<String> = problems.iter().map(Problem::to_string).collect();
                (CheckState::Failing, texts.join("; "))
            }
        };
        let diverted = self.audit.diverted();
        let (state, detail) = match state {
            CheckState::Ok if !diverted.is_empty() => {
                (CheckState::Failing, "packets to peers take a wrong way".to_owned())
            }
            _ => (state, detail),
        };
        let (path_mtus, detours) = (self.path_mtus.clone(), self.detours.clone());
        let (flow_detours, dead_hops) = (self.flow_detours.clone(), self.dead_hops.by_host());
        let (on_link, routed) = (self.on_link.clone(), self.routed.clone());
        let status = CheckStatus { state, detail };
        let state = Routing {
            problems,
            diverted,
            path_mtus,
            detours,
            flow_detours,
            dead_hops,
            on_link,
            routed,
            status,
        };
        let is_news = state != self.reported;
        self.reported.clone_from(&state);
        is_news.then_some(state)
    }

    fn pass(
        &mut self,
        netlink: &mut Netlink,
        desired: &Desired,
        place: Place<'_>,
    ) -> io::Result<()> {
        let (host, unread) = host_state(netlink, desired, place, &self.conditional)?;
        self.unread = unread;
        let mut witness = Witness::new(netlink, desired);
        let lookups = self.audit.lookups(desired, &host);
        let results = lookups.into_iter().map(|question| {
            let cause = witness.ask(&question)?;
            Ok((question, cause))
        });
        let results: Vec<_> = results.collect::<io::Result<_>>()?;
        self.audit.evaluate(results);
        Ok(())
    }

    /// Looks up the route of tunnel packets to each peer's host, and its MTU, for up to [`MAX_PATHS`] hosts.
    fn look_up_paths(&mut self, netlink: &mut Netlink, desired: &Desired, place: Place<'_>) {
        let hosts: BTreeSet<IpAddr> = desired.underlays().collect();
        self.path_mtus.retain(|host, _| hosts.contains(host));
        self.detours.retain(|host, _| hosts.contains(host));
        self.flow_detours.retain(|host, _| hosts.contains(host));
        self.dead_hops.retain(&hosts);
        self.routed.retain(|host| hosts.contains(host));
        self.on_link.retain(|host| hosts.contains(host));
        self.next_hops.retain(|host, _| hosts.contains(host));
        let begin = self.last_path.map_or(Bound::Unbounded, Bound::Excluded);
        let next = hosts.range((begin, Bound::Unbounded)).chain(&hosts);
        let output = Some(desired.device.link).filter(|link| *link != 0);
        let mut links = None;
        let by_port = detour::rules_by_port(netlink);
        for host in next.take(hosts.len().min(MAX_PATHS)).copied().collect::<Vec<_>>() {
            self.last_path = Some(host);
            let transport = Some(PacketSelector::udp_to(desired.device.port));
            let from = Some(desired.device.local).filter(|local| local.is_ipv4() == host.is_ipv4());
            let query = Query { output, from, transport, ..Query::to(host) };
            let found = netlink.route(&query);
            self.find_detours(netlink, (&query, &found), (&mut links, &by_port), place);
            self.dead_hops.set(host, netlink.entry_hops(&query).unwrap_or_default());
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

    /// Sets the detours of tunnel packets to a host: of all, and of those with certain source ports.
    fn find_detours(
        &mut self,
        netlink: &mut Netlink,
        (query, found): (&Query, &io::Result<RouteLookup>),
        (links, by_port): (&mut Option<Vec<Link>>, &[Ports]),
        place: Place<'_>,
    ) {
        let host = query.to;
        let detour = detour::of(netlink, query, found, links, place);
        let of_flows = match &detour {
            None => detour::of_flows(netlink, query, by_port, links, place),
            Some(_) => None,
        };
        match of_flows {
            Some(of_flows) => _ = self.flow_detours.insert(host, of_flows),
            None => _ = self.flow_detours.remove(&host),
        }
        match &detour {
            Some(Detour::Gateway { .. })
                if detour::has_no_direct_route(netlink, host, place.networks) =>
            {
                self.routed.insert(host);
            }
            _ => _ = self.routed.remove(&host),
        }
        let is_on_link = matches!((&detour, found), (Some(Detour::By { .. }), Ok(found))
            if detour::answers_on_link(netlink, host, links.as_deref().unwrap_or_default(), found));
        match is_on_link {
            true => _ = self.on_link.insert(host),
            false => _ = self.on_link.remove(&host),
        }
        match detour {
            Some(detour) => _ = self.detours.insert(host, detour),
            None => _ = self.detours.remove(&host),
        }
    }
}

/// Determines the interface of the pods by its addresses: gossamer's bridge, Docker's, or one made by
/// hand. If there are several, gossamer's is preferred. The second value is the numbers of selectors of
/// rules and routes that are not tested.
fn host_state(
    netlink: &mut Netlink,
    desired: &Desired,
    place: Place<'_>,
    conditional: &BTreeSet<Selector>,
) -> io::Result<(HostState, [usize; 2])> {
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
    let mut own: Vec<OwnSubnet> = Vec::new();
    for subnet in subnets.iter().flat_map(|subnets| subnets.iter()) {
        let inside = own.iter().find_map(|own| own.inside);
        own.push(OwnSubnet::new(subnet, place.device, &has, inside));
    }
    let Place { device, underlay, local, masquerade, .. } = place;
    let has = has.into_iter().map(|(_, ip)| ip).collect();
    let links: Vec<u32> =
        own.iter().filter_map(|own| own.inside).chain([device, underlay]).collect();
    let policy::Found { selected, unread } =
        policy::selected(netlink, &own, pool.networks(), &links, conditional)?;
    Ok((HostState { device, underlay, local, own, has, masquerade, selected }, unread))
}

/// Returns the priorities of the rules of both families that lead to addresses of this host.
fn local_priorities(netlink: &mut Netlink) -> LocalPriorities {
    let mut of_family = |ipv4| route::local_priority(&netlink.rules(ipv4).unwrap_or_default());
    LocalPriorities { ipv4: of_family(true), ipv6: of_family(false) }
}

/// Converts a rejecting route to an error number: IPv6 lookups return the route, IPv4 lookups fail.
const fn refusal(kind: RouteType) -> Option<i32> {
    match kind {
        RouteType::Unreachable => Some(EHOSTUNREACH),
        RouteType::BlackHole => Some(EINVAL),
        RouteType::Prohibit => Some(EACCES),
        RouteType::Throw => Some(ENETUNREACH),
        _ => None,
    }
}

/// Returns the text of an error number.
fn reason(errno: i32) -> String {
    io::Error::from_raw_os_error(errno).to_string()
}
