//! What the kernel is asked about the packets of a silent peer, and packets of our own to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

use rtnetlink::packet_route::{link::LinkAttribute, neighbour::NeighbourState};
use socket2::SockRef;

use crate::{
    agent::{
        hooks::{self, Side},
        legacy::{self, Way},
    },
    dataplane::{
        audit::EXDEV,
        kernel::FirewallTable,
        silence::{Diverted, DroppingRule, OUT, Pinned, Place, Suspect, open_chain},
    },
    model::{Mac, Transport},
    netlink::{
        Netlink,
        link::Link,
        route::{Query, RouteLookup},
        xfrm,
    },
};

const EPERM: i32 = 1;
const EINVAL: i32 = 22;
/// A header of VXLAN that names no network: every device drops it (RFC 7348, 5).
const NO_NETWORK: [u8; 8] = [0; 8];
/// Value of `rp_filter` (RFC 3704, strict).
const STRICT: u8 = 1;
/// Programs and policies that are named.
const NAMED: usize = 3;

/// Sends packets to the port of tunnels, as this host's own are sent.
pub struct Knock {
    socket: UdpSocket,
    port: u16,
    /// One for each family of the overlay.
    inside: Vec<UdpSocket>,
}

impl Knock {
    pub fn open(place: &Place, pinned: bool) -> io::Result<Self> {
        let socket = UdpSocket::bind((place.source, 0))?;
        socket.set_nonblocking(true)?;
        if pinned {
            SockRef::from(&socket).bind_device(Some(place.interface.as_bytes()))?;
        }
        let any = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
        let inside = any.into_iter().filter_map(|any| UdpSocket::bind((any, 0)).ok());
        let inside: Vec<UdpSocket> = inside.collect();
        inside.iter().try_for_each(|socket| socket.set_nonblocking(true))?;
        Ok(Self { socket, port: place.port, inside })
    }

    /// Sends an empty datagram through the tunnel, to the peer's agent. Says whether the kernel took it.
    pub fn inside(&self, suspect: &Suspect) -> bool {
        let to = SocketAddr::new(suspect.vtep, suspect.gossip);
        let is_it = |socket: &&UdpSocket| {
            socket.local_addr().is_ok_and(|local| local.is_ipv4() == to.is_ipv4())
        };
        self.inside.iter().find(is_it).is_some_and(|socket| socket.send_to(&[], to).is_ok())
    }

    /// Sends one, and says what became of it.
    pub fn at(&self, address: IpAddr) -> Knocked {
        match self.socket.send_to(&NO_NETWORK, (address, self.port)) {
            Ok(_) => Knocked::Sent,
            Err(error) if error.raw_os_error() == Some(EPERM) => Knocked::Forbidden,
            Err(_) => Knocked::NoWay,
        }
    }
}

/// What became of a packet of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knocked {
    Sent,
    /// A rule, or a program of this process's cgroup, has refused it.
    Forbidden,
    NoWay,
}

/// Interfaces of this host, and its ways to the peers.
pub struct Ways {
    links: Vec<Link>,
    found: BTreeMap<IpAddr, RouteLookup>,
}

impl Ways {
    /// A `pinned` underlay's packets leave by its interface, whatever the main table says.
    pub fn find(
        netlink: &mut Netlink,
        place: &Place,
        pinned: bool,
        asked: &[Suspect],
    ) -> io::Result<Self> {
        let links = netlink.links()?;
        let mut found = BTreeMap::new();
        for Suspect { address, .. } in asked {
            let output = pinned.then_some(place.link);
            let (from, transport) = (Some(place.source), Some(Transport::udp_to(place.port)));
            let query = Query { output, from, transport, ..Query::to(*address) };
            if let Ok(way) = netlink.route(&query) {
                found.insert(*address, way);
            }
        }
        Ok(Self { links, found })
    }

    /// Hardware addresses of this host: none answers for another machine.
    pub fn own_macs(&self) -> BTreeSet<Mac> {
        let macs = self.links.iter().filter(|link| !link.loopback).filter_map(|link| link.mac);
        macs.filter(|mac| mac.as_bytes() != &[0; 6]).collect()
    }

    /// The next hop to a peer, and the interface.
    fn hop(&self, address: IpAddr) -> Option<(IpAddr, &Link)> {
        let way = self.found.get(&address)?;
        let link = self.links.iter().find(|link| link.index == way.link)?;
        Some((way.gateway.unwrap_or(address), link))
    }

    /// Next hops to all peers on the underlay's interface.
    pub fn hops(&self, place: &Place) -> BTreeSet<IpAddr> {
        let hops = self.found.keys().filter_map(|address| self.hop(*address));
        hops.filter(|(_, link)| link.index == place.link).map(|(hop, _)| hop).collect()
    }

    /// Whether one of these interfaces is that of the next hop to a peer, or a port of it.
    pub fn leads_by(&self, address: IpAddr, mut came: impl Iterator<Item = u32>) -> bool {
        let Some((_, wanted)) = self.hop(address) else { return false };
        let is_it =
            |link: &Link| link.index == wanted.index || link.controller() == Some(wanted.index);
        came.any(|index| self.links.iter().any(|link| link.index == index && is_it(link)))
    }

    /// What the next hop to a peer has for good, where others answer for it.
    pub fn pinned(
        &self,
        netlink: &mut Netlink,
        address: IpAddr,
        answering: impl Fn(IpAddr) -> BTreeSet<Mac>,
    ) -> Option<Pinned> {
        let (address, link) = self.hop(address)?;
        let answering = answering(address);
        let mac = netlink.permanent_neighbor(link.index, address).ok()??;
        let is_other = !answering.is_empty() && !answering.contains(&mac);
        let interface = link.name.clone();
        is_other.then_some(Pinned { address, interface, mac, answering })
    }

    /// The next hop to a peer if the kernel does not find its hardware address, with the interface.
    pub fn unresolved(&self, netlink: &mut Netlink, address: IpAddr) -> Option<(IpAddr, String)> {
        let (hop, link) = self.hop(address)?;
        let state = netlink.neighbour(link.index, hop).ok()??;
        let is_unresolved = matches!(state, NeighbourState::Incomplete | NeighbourState::Failed);
        is_unresolved.then(|| (hop, link.name.clone()))
    }

    /// The interface at which the reverse path filter drops what comes from a peer; it has come there, and
    /// not by the underlay's.
    pub fn filtered(
        &self,
        netlink: &mut Netlink,
        place: &Place,
        peer: IpAddr,
        came: &BTreeSet<u32>,
    ) -> Option<String> {
        let came =
            if came.contains(&place.link) { BTreeSet::from([place.link]) } else { came.clone() };
        // What comes in by a port is taken for its bridge or bond.
        let links = came.iter().filter_map(|index| {
            self.links.iter().find(|link| link.index == *index && link.controller().is_none())
        });
        let mut links = links.filter(|link| {
            let transport = Some(Transport::udp_to(place.port));
            let query = Query { transport, ..Query::forwarded(peer, place.local, link.index) };
            match netlink.route(&query).map_err(|error| error.raw_os_error()) {
                Err(Some(EXDEV)) => true,
                // Kernels since 6.14 say so, to this and to much else.
                Err(Some(EINVAL)) => is_strict(&link.name),
                _ => false,
            }
        });
        links.next().map(|link| link.name.clone())
    }

    /// Whether packets to a peer's pods go to the VXLAN device: a route of others may come first.
    pub fn leads_into(&self, netlink: &mut Netlink, place: &Place, vtep: IpAddr) -> bool {
        let goes = netlink.route(&Query::to(vtep)).map(|found| found.link);
        self.links
            .iter()
            .any(|link| goes.as_ref().ok() == Some(&link.index) && link.name == place.device)
    }

    /// What drops packets of a peer's pods that come in by one interface, if those to them leave by another.
    pub fn diverted(
        &self,
        netlink: &mut Netlink,
        vtep: IpAddr,
        by: DroppingRule,
        at: u32,
    ) -> Option<Diverted> {
        let goes = netlink.route(&Query::to(vtep)).ok()?.link;
        let name = |index: u32| {
            let link = self.links.iter().find(|link| link.index == index)?;
            Some(link.name.clone())
        };
        let (came, goes) = (name(at)?, name(goes).filter(|_| goes != at)?);
        Some(Diverted { by, came, goes })
    }

    /// Whether a program sees packets that come in at the underlay's interface before packet sockets do.
    pub fn has_xdp(&self, place: &Place) -> bool {
        let link = self.links.iter().find(|link| link.index == place.link);
        link.is_some_and(Link::has_xdp)
    }

    /// What takes all that comes in at the underlay's interface, if something may.
    pub fn passthru(&self, place: &Place) -> Option<String> {
        hooks::passthru(self.links.iter().find(|link| link.index == place.link)?)
    }

    /// What else may drop tunnel packets on their way out or in, for none that nftables tells of does.
    pub fn hints(&self, netlink: &mut Netlink, place: &Place, way: usize) -> Vec<String> {
        let Place { local, port, gossip, .. } = place;
        let is_out = way == OUT;
        let side = if is_out { Side::Egress } else { Side::Ingress };
        let legacy = if is_out { Way::Out } else { Way::In };
        let mut hints = legacy::around_tunnels(local.is_ipv4(), legacy, *port, Some(*gossip));
        if !is_out {
            hints.extend(redirecting(local.is_ipv4(), *port));
            hints.extend(legacy::redirecting(local.is_ipv4(), *port));
        }
        let underlay = self.links.iter().find(|link| link.index == place.link);
        hints.extend(underlay.into_iter().flat_map(|link| hooks::at(netlink, link, side)));
        hints.extend(self.passthru(place).filter(|_| !is_out));
        let direction = if is_out { "out" } else { "in" };
        let policies = xfrm::policies().unwrap_or_default();
        let concerned = policies.iter().filter(|policy| {
            let ours = if is_out { policy.from } else { policy.to };
            !policy.lets_pass() && policy.direction == direction && ours.contains(local)
        });
        hints.extend(concerned.take(NAMED).map(|policy| {
            format!(
                "an IPsec policy takes packets from {} to {} (ip xfrm policy: dir {direction}, priority {}): \
                 exempt UDP {port} from it",
                policy.from, policy.to, policy.priority
            )
        }));
        hints
    }
}

/// Where to look if there are no hints.
pub fn nothing_found(interface: &str, way: usize) -> String {
    let legacy = if way == OUT { "-S OUTPUT" } else { "-S INPUT, -t nat -S PREROUTING" };
    format!(
        "no rule or policy that drops them was found, and {}; look at ip rule and iptables -t mangle -S \
         OUTPUT (a mark may lead them elsewhere), and iptables-legacy {legacy}",
        hooks::nothing_found(interface)
    )
}

/// What may drop packets at the VXLAN device on their way in or out; none where nothing hangs there but what
/// cannot be seen.
pub fn at_device(netlink: &mut Netlink, place: &Place, way: usize) -> Vec<String> {
    let device = &place.device;
    let Ok(Some(link)) = netlink.link(device) else { return Vec::new() };
    let side = if way == OUT { Side::Egress } else { Side::Ingress };
    let mut hints = hooks::at(netlink, &link, side);
    if way == OUT && hints.is_empty() {
        hints.push(format!(
            "{}; look at nft list ruleset (family netdev)",
            hooks::nothing_found(device)
        ));
    }
    hints
}

/// Rules that give tunnel packets another destination.
fn redirecting(ipv4: bool, port: u16) -> Vec<String> {
    let chains = FirewallTable::open().and_then(|mut table| table.redirected_port(ipv4, port));
    let sentence = |chain: String| {
        format!(
            "chain {chain} gives UDP {port} another destination (DNAT, as for a port that a container \
             publishes): publish another port, or exempt it: {}; then conntrack -D -p udp --orig-port-dst \
             {port}",
            open_chain(&chain, &[port])
        )
    };
    chains.unwrap_or_default().into_iter().take(NAMED).map(sentence).collect()
}

/// Packets that the VXLAN device has dropped for their marks of congestion.
pub fn congested(netlink: &mut Netlink, device: &str) -> Option<u64> {
    let link = netlink.link(device).ok()??;
    link.message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Stats64(stats) => Some(stats.rx_frame_errors),
        _ => None,
    })
}

/// Whether a strict reverse path filter is in force: the larger value counts.
fn is_strict(interface: &str) -> bool {
    let value = |name: &str| {
        let value = fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"));
        value.ok().and_then(|value| value.trim().parse::<u8>().ok()).unwrap_or(0)
    };
    value("all").max(value(interface)) == STRICT
}
