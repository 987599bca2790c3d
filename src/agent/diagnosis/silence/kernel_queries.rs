//! Kernel queries about the packets of a silent peer, and the sender of test packets.

mod hops;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

use nix::libc::{EINVAL, EPERM};
use rtnetlink::packet_route::{link::LinkAttribute, neighbour::NeighbourState};
use socket2::SockRef;

use super::{Case, ipsec_policies::ipsec_policies};
use crate::{
    agent::diagnosis::{
        forwarder::ipsec,
        hooks::{self, Side},
        iptables_legacy::{self, HookPath},
    },
    dataplane::{
        audit::{EXDEV, earlier_rule},
        dropping_chain::DroppedBy,
        foreign::ForeignTables,
        kernel::FirewallTable,
        remedies::{forget_connections, open_chain},
        silence::{Diverted, Elsewhere, OUT, Place, Suspect},
    },
    model::{Mac, NodeId, PacketSelector, ip_command, rule_family},
    netlink::{
        Netlink,
        link::Link,
        route::{Query, RouteLookup, local_priority},
    },
    sysctl,
};

/// A VXLAN header without the I flag: every device drops the packet (RFC 7348, section 5).
const INVALID_VXLAN_HEADER: [u8; 8] = [0; 8];
/// Limit of the interfaces that carry tunnel packets and are examined.
const MAX_CARRIERS: usize = 8;
/// Limit of chains named.
const MAX_NAMED: usize = 3;

/// Sends test packets to a peer as this host sends its tunnel packets.
pub struct TestSender {
    socket: UdpSocket,
    /// UDP port of the tunnels.
    port: u16,
    /// Sockets of the overlay, at most one per family.
    overlay_sockets: Vec<UdpSocket>,
}

impl TestSender {
    /// Opens the sockets, bound to the underlay's interface if packets are pinned to it.
    ///
    /// # Errors
    /// Fails when a socket cannot be opened or bound.
    pub fn open(place: &Place, pinned: bool) -> io::Result<Self> {
        let socket = UdpSocket::bind((place.source, 0))?;
        socket.set_nonblocking(true)?;
        if pinned {
            SockRef::from(&socket).bind_device(Some(place.interface.as_bytes()))?;
        }
        let any = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
        let overlay_sockets = any.into_iter().filter_map(|any| UdpSocket::bind((any, 0)).ok());
        let overlay_sockets: Vec<UdpSocket> = overlay_sockets.collect();
        overlay_sockets.iter().try_for_each(|socket| socket.set_nonblocking(true))?;
        Ok(Self { socket, port: place.port, overlay_sockets })
    }

    /// Sends an empty datagram through the tunnel to the agent of the peer. Returns whether the kernel
    /// accepted it.
    pub fn send_through_tunnel(&self, suspect: &Suspect) -> bool {
        let to = SocketAddr::new(suspect.vtep, suspect.gossip);
        let has_family = |socket: &&UdpSocket| {
            socket.local_addr().is_ok_and(|local| local.is_ipv4() == to.is_ipv4())
        };
        self.overlay_sockets
            .iter()
            .find(has_family)
            .is_some_and(|socket| socket.send_to(&[], to).is_ok())
    }

    /// Sends a packet to the tunnels' port without the VXLAN device, and returns the outcome.
    pub fn send_past_device(&self, address: IpAddr) -> SendOutcome {
        match self.socket.send_to(&INVALID_VXLAN_HEADER, (address, self.port)) {
            Ok(_) => SendOutcome::Accepted,
            Err(error) if error.raw_os_error() == Some(EPERM) => SendOutcome::Forbidden,
            Err(_) => SendOutcome::NoRoute,
        }
    }
}

/// The outcome of sending a test packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendOutcome {
    /// The kernel accepted it.
    Accepted,
    /// A firewall rule, or a program of this process's cgroup, refused it.
    Forbidden,
    /// It failed for another reason, such as a missing route.
    NoRoute,
}

/// Peers to which test packets were sent.
#[derive(Debug, Default)]
pub struct SentPackets {
    /// Without the VXLAN device.
    pub past_device: BTreeSet<NodeId>,
    /// Those of `past_device` to which the kernel refused to send.
    pub forbidden: BTreeSet<NodeId>,
    /// Through the VXLAN device.
    pub into_device: BTreeSet<NodeId>,
}

/// Returns the tunnel packets that the guard has counted, by underlay address; `None` where it does not
/// count.
pub fn counted_packets(case: &Case) -> Option<BTreeMap<IpAddr, u64>> {
    let mut table = FirewallTable::open().ok().filter(|_| case.place.guard)?;
    table.packets_of_members(&case.place.device).ok()
}

/// Interfaces of this host, and its routes to the peers.
pub struct PeerRoutes {
    links: Vec<Link>,
    /// Routes by underlay address of the peer.
    routes: BTreeMap<IpAddr, RouteLookup>,
    /// Interface and next hop of each way of those routes that have several.
    shared: BTreeMap<IpAddr, Vec<(u32, IpAddr)>>,
}

impl PeerRoutes {
    /// Reads the interfaces, and the route to each peer. With `pinned`, packets leave by the underlay's
    /// interface whatever the main routing table says.
    ///
    /// # Errors
    /// Fails when the kernel does not report the interfaces.
    pub fn find(
        netlink: &mut Netlink,
        place: &Place,
        pinned: bool,
        suspects: &[Suspect],
    ) -> io::Result<Self> {
        let links = netlink.links()?;
        let (mut routes, mut shared) = (BTreeMap::new(), BTreeMap::new());
        for Suspect { address, .. } in suspects {
            let output = pinned.then_some(place.link);
            let (from, transport) = (Some(place.source), Some(PacketSelector::udp_to(place.port)));
            let query = Query { output, from, transport, ..Query::to(*address) };
            if let Ok(route) = netlink.route(&query) {
                routes.insert(*address, route);
            }
            let hops = netlink.entry_hops(&query).unwrap_or_default().into_iter();
            let hops: Vec<_> = hops.map(|(link, hop)| (link, hop.unwrap_or(*address))).collect();
            if hops.len() > 1 {
                shared.insert(*address, hops);
            }
        }
        Ok(Self { links, routes, shared })
    }

    /// Returns the underlay's interface and those that carry its packets: the ports of a bridge or bond, and
    /// the interface below a VLAN or macvlan.
    pub fn carriers(&self, place: &Place) -> Vec<&Link> {
        let mut carriers: Vec<&Link> =
            self.links.iter().filter(|link| link.index == place.link).collect();
        let mut next = 0;
        while let Some(upper) = carriers.get(next).copied() {
            let is_below = |link: &&Link| {
                // The number of a veth pair's other end belongs to another namespace.
                let is_lower = upper.kind != "veth"
                    && upper.message.attributes.contains(&LinkAttribute::Link(link.index));
                link.controller() == Some(upper.index) || is_lower
            };
            let is_new = |link: &&Link| carriers.iter().all(|known| known.index != link.index);
            let below = self.links.iter().filter(is_below).filter(is_new);
            let below: Vec<&Link> = below.take(MAX_CARRIERS - carriers.len()).collect();
            carriers.extend(below);
            next += 1;
        }
        carriers
    }

    /// Returns the hardware addresses of this host's interfaces.
    pub fn own_macs(&self) -> BTreeSet<Mac> {
        let macs = self.links.iter().filter(|link| !link.loopback).filter_map(|link| link.mac);
        macs.filter(|mac| mac.as_bytes() != &[0; 6]).collect()
    }

    /// Returns the interface at which the reverse path filter drops packets from a peer. Considers the
    /// interfaces at which they arrive (`arrival_links`); if the underlay's is one of them, only that.
    pub fn filtered(
        &self,
        netlink: &mut Netlink,
        place: &Place,
        peer: IpAddr,
        arrival_links: &BTreeSet<u32>,
    ) -> Option<String> {
        let considered = match arrival_links.contains(&place.link) {
            true => BTreeSet::from([place.link]),
            false => arrival_links.clone(),
        };
        // The kernel attributes packets at a port to its bridge or bond.
        let links = considered.iter().filter_map(|index| {
            self.links.iter().find(|link| link.index == *index && link.controller().is_none())
        });
        let mut links = links.filter(|link| {
            let transport = Some(PacketSelector::udp_to(place.port));
            let query = Query { transport, ..Query::forwarded(peer, place.local, link.index) };
            match netlink.route(&query).map_err(|error| error.raw_os_error()) {
                Err(Some(EXDEV)) => true,
                // Kernels since 6.14 return this for the filter, and for other reasons.
                Err(Some(EINVAL)) => sysctl::has_strict_rp_filter(&link.name),
                _ => false,
            }
        });
        links.next().map(|link| link.name.clone())
    }

    /// Whether packets to a peer's pods go to the VXLAN device; a route of another program may take
    /// precedence.
    pub fn routes_to_device(&self, netlink: &mut Netlink, place: &Place, vtep: IpAddr) -> bool {
        let output_link = netlink.route(&Query::to(vtep)).map(|found| found.link);
        self.links
            .iter()
            .any(|link| output_link.as_ref().ok() == Some(&link.index) && link.name == place.device)
    }

    /// Returns what drops packets of a peer's pods that arrive at one interface while those to them leave by
    /// another.
    pub fn diverted(
        &self,
        netlink: &mut Netlink,
        vtep: IpAddr,
        by: DroppedBy,
        at: u32,
    ) -> Option<Diverted> {
        let output_link = netlink.route(&Query::to(vtep)).ok()?.link;
        let name = |index: u32| {
            let link = self.links.iter().find(|link| link.index == index)?;
            Some(link.name.clone())
        };
        let (came, goes) = (name(at)?, name(output_link).filter(|_| output_link != at)?);
        Some(Diverted { by, came, goes })
    }

    /// Returns the interface by which this host sends tunnel packets to a peer although their route leads to
    /// another one, and the rule that sends packets with a mark there.
    pub fn elsewhere(
        &self,
        netlink: &mut Netlink,
        case: &Case,
        address: IpAddr,
        left: &BTreeSet<(u32, IpAddr)>,
    ) -> Option<Elsewhere> {
        let usual = self.routes.get(&address)?.link;
        // Each next hop of a route with several is a usual way.
        let ways: BTreeSet<u32> =
            self.all_hops(address).into_iter().map(|(link, _)| link).chain([usual]).collect();
        let others: BTreeSet<u32> =
            left.iter().map(|(link, _)| *link).filter(|link| !ways.contains(link)).collect();
        let name = |index: u32| {
            let link = self.links.iter().find(|link| link.index == index)?;
            Some(link.name.clone())
        };
        let marked = self.mark_rule(netlink, case, address, (usual, &others, left.is_empty()));
        if let Some((link, rule)) = marked {
            return Some(Elsewhere {
                interface: name(link)?,
                usual: name(usual)?,
                rule: Some(rule),
            });
        }
        // Interfaces below the usual one, such as the port of a bridge, carry the same packets.
        let all_elsewhere = left.iter().all(|(link, _)| !ways.contains(link));
        let link = *others.first().filter(|_| all_elsewhere)?;
        Some(Elsewhere { interface: name(link)?, usual: name(usual)?, rule: None })
    }

    /// Returns the first policy rule by mark that leads packets to a peer to one of these interfaces, as a
    /// sentence with the command against it.
    fn mark_rule(
        &self,
        netlink: &mut Netlink,
        case: &Case,
        address: IpAddr,
        (usual, others, is_held): (u32, &BTreeSet<u32>, bool),
    ) -> Option<(u32, (String, String))> {
        let place = &case.place;
        let ipv4 = address.is_ipv4();
        let rules = netlink.rules(ipv4).ok().filter(|_| is_held || !others.is_empty())?;
        let local = local_priority(&rules);
        rules.iter().filter(|rule| !rule.inverted).find_map(|rule| {
            let (mark, _) = rule.mark.filter(|(mark, _)| *mark != 0)?;
            let query = Query {
                output: case.pinned.then_some(place.link),
                from: Some(place.source),
                transport: Some(PacketSelector::udp_to(place.port)),
                mark: Some(mark),
                ..Query::to(address)
            };
            let found = netlink.route(&query).ok()?;
            let link = found.link;
            // Packets wait for the MAC of the next hop there.
            let mut waits = || {
                let hop = netlink.neighbour(link, found.gateway.unwrap_or(address)).ok().flatten();
                hop.is_some_and(|state| {
                    matches!(state, NeighbourState::Incomplete | NeighbourState::Failed)
                })
            };
            let is_way = others.contains(&link) || is_held && link != usual && waits();
            let (ip, family) = (ip_command(ipv4), rule_family(ipv4));
            let priority = rule.priority;
            let why = format!(
                "{ip} rule {priority} (fwmark {mark:#x}) sends packets with that mark there, and a rule of \
                 this host gives it to them (nft list ruleset, {family}tables -t mangle -S \
                 OUTPUT)"
            );
            let fix = earlier_rule(&format!("to {address}"), priority, ipv4, local);
            is_way.then_some((link, (why, format!("give packets to it precedence: {fix}"))))
        })
    }

    /// Whether an XDP program receives packets at the underlay's interface before packet sockets do.
    pub fn has_xdp(&self, place: &Place) -> bool {
        let link = self.links.iter().find(|link| link.index == place.link);
        link.is_some_and(Link::has_xdp)
    }

    /// Returns what may take all packets that arrive at the underlay's interface.
    pub fn passthru(&self, place: &Place) -> Option<String> {
        hooks::passthru(self.links.iter().find(|link| link.index == place.link)?)
    }

    /// Returns what may drop tunnel packets in this direction (`OUT` or `IN`) where no nftables rule does.
    pub fn hints(&self, netlink: &mut Netlink, place: &Place, way: usize) -> Vec<String> {
        let Place { local, port, gossip, .. } = place;
        let is_out = way == OUT;
        let side = if is_out { Side::Egress } else { Side::Ingress };
        let legacy = if is_out { HookPath::Out } else { HookPath::In };
        let mut hints =
            iptables_legacy::around_tunnels(local.is_ipv4(), legacy, *port, Some(*gossip));
        if !is_out {
            hints.extend(redirecting(local.is_ipv4(), *port));
        }
        for link in self.carriers(place) {
            hints.extend(hooks::at(netlink, link, side));
        }
        hints.extend(self.passthru(place).filter(|_| !is_out));
        hints.extend(ipsec_policies(place, way, None));
        hints
    }
}

/// Returns the sentence that names further places to check, for use without other hints.
pub fn nothing_found(interface: &str, way: usize, port: u16) -> String {
    let (legacy, kept) = match way {
        OUT => ("-S OUTPUT", String::new()),
        _ => (
            "-S INPUT, -t nat -S PREROUTING",
            format!("; connections may keep a translation: {}", forget_connections(port)),
        ),
    };
    format!(
        "no rule or policy that drops them was found, and {}; check ip rule and iptables -t mangle -S \
         OUTPUT (a mark may lead them elsewhere), and iptables-legacy {legacy}{kept}",
        hooks::nothing_found(interface)
    )
}

/// Returns what may drop packets at the VXLAN device in this direction; empty for arriving packets if nothing
/// is found.
pub fn at_device(netlink: &mut Netlink, place: &Place, way: usize) -> Vec<String> {
    let device = &place.device;
    let Ok(Some(link)) = netlink.link(device) else { return Vec::new() };
    let side = if way == OUT { Side::Egress } else { Side::Ingress };
    let mut hints = hooks::at(netlink, &link, side);
    if way == OUT && hints.is_empty() {
        hints = ipsec::taking_out(place.overlay);
    }
    if way == OUT && hints.is_empty() {
        hints.push(format!(
            "{}; check nft list ruleset (family netdev)",
            hooks::nothing_found(device)
        ));
    }
    hints
}

/// Returns the rules that give tunnel packets another destination, as sentences.
pub fn redirecting(ipv4: bool, port: u16) -> Vec<String> {
    let chains = ForeignTables::open().and_then(|mut tables| tables.redirected_port(ipv4, port));
    let sentence = |chain: String| {
        format!(
            "chain {chain} gives UDP {port} another destination (DNAT, as for a port that a container \
             publishes): publish another port, or exempt it: {}; then {}",
            open_chain(&chain, &[port]),
            forget_connections(port)
        )
    };
    let chains = chains.unwrap_or_default().into_iter().take(MAX_NAMED).map(sentence);
    chains.chain(iptables_legacy::redirecting(ipv4, port)).collect()
}

/// Returns the number of packets that the VXLAN device dropped for their ECN marks.
pub fn congested(netlink: &mut Netlink, device: &str) -> Option<u64> {
    let link = netlink.link(device).ok()??;
    link.message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Stats64(stats) => Some(stats.rx_frame_errors),
        _ => None,
    })
}
