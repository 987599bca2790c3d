//! Resolves the gateway from the agent's own pod, as every pod does: by ARP or neighbor discovery.
//!
//! The pod's neighbor entry is removed first. Only a confirmation of the gateway counts as an answer:
//! the host's own requests for the pod also contain its MAC, and may arrive at any time.

use std::{
    io,
    net::{IpAddr, UdpSocket},
    time::{Duration, Instant},
};

use rtnetlink::packet_route::{link::LinkFlags, neighbour::NeighbourState};

use super::TrialInput;
use crate::{
    agent::diagnosis::hooks::{self, Side},
    dataplane::{
        foreign::ForeignTables,
        forwarding::{Direction, TrialResult, TrialWay},
    },
    model::{Problem, ProblemCode, dotted, resolution_name},
    netlink::{Netlink, route::Query},
    pods::{
        agent_pod::{AgentPod, Shape},
        gateway,
    },
    sysctl,
};

/// Time limit of an answer; longer than the second after which the kernel repeats its request.
const TIMEOUT: Duration = Duration::from_millis(1500);
/// First pause between two checks; the answer usually exists at the first check.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// Longest pause between two checks.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Value of `arp_ignore` that suppresses all answers (ip-sysctl).
const IGNORE_ALL: &str = "8";

/// UDP port without a listener ("discard").
const UNUSED: u16 = 9;

/// Sockets inside the pod's namespace.
pub struct Gateway {
    netlink: Netlink,
    /// Index of the pod's interface.
    link: u32,
    /// Each gateway with a socket bound to the pod's address. Without it IPv6 would send the request
    /// from another address.
    addresses: Vec<(IpAddr, UdpSocket)>,
}

impl Gateway {
    /// Opens the sockets.
    ///
    /// # Errors
    /// Fails if a socket cannot be opened inside the pod's namespace.
    pub fn open(agent_pod: &AgentPod, shape: &Shape) -> io::Result<Self> {
        let (netlink, link) = agent_pod.netlink()?;
        let addresses = agent_pod.inside(|| {
            let pairs = shape.addresses.iter().zip(shape.subnets.iter());
            let opened = pairs.map(|(ip, subnet)| Ok((gateway(subnet), UdpSocket::bind((ip, 0))?)));
            opened.collect()
        })?;
        Ok(Self { netlink, link, addresses })
    }

    /// Resolves the gateways. `wait` sleeps and returns whether to continue; otherwise the result is
    /// empty.
    pub fn find(&mut self, mut wait: impl FnMut(Duration) -> bool) -> Vec<(TrialWay, TrialResult)> {
        let mut seen = Vec::new();
        let way = |ip: &IpAddr| TrialWay { direction: Direction::Gateway, ipv4: ip.is_ipv4() };
        let mut open: Vec<IpAddr> = self.addresses.iter().map(|(ip, _)| *ip).collect();
        open.retain(|ip| match self.send_request(*ip) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(%error, %ip, "request for the gateway not sent");
                seen.push((way(ip), TrialResult::Unclear));
                false
            }
        });
        let until = Instant::now() + TIMEOUT;
        let mut pause = FIRST_PAUSE;
        loop {
            open.retain(|ip| match self.check_entry(*ip) {
                Some(found) => {
                    seen.push((way(ip), found));
                    false
                }
                None => true,
            });
            let left = until.saturating_duration_since(Instant::now());
            if open.is_empty() || left.is_zero() {
                seen.extend(open.iter().map(|ip| (way(ip), TrialResult::Lost)));
                return seen;
            }
            if !wait(pause.min(left)) {
                return Vec::new();
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Removes the neighbor entry and sends a packet, so that the kernel resolves the gateway.
    fn send_request(&mut self, ip: IpAddr) -> io::Result<()> {
        self.netlink.remove_neighbor(self.link, ip)?;
        let mut sockets = self.addresses.iter().filter(|(gateway, _)| *gateway == ip);
        sockets.try_for_each(|(_, socket)| socket.send_to(&[], (ip, UNUSED)).map(drop))
    }

    /// Returns the result from the neighbor entry; `None` while it is incomplete.
    fn check_entry(&mut self, ip: IpAddr) -> Option<TrialResult> {
        match self.netlink.neighbour(self.link, ip) {
            Ok(Some(NeighbourState::Reachable)) => Some(TrialResult::Passed),
            Ok(Some(NeighbourState::Failed)) => Some(TrialResult::Lost),
            Ok(Some(NeighbourState::Incomplete)) => None,
            Ok(_) => self.send_request(ip).err().map(|_| TrialResult::Unclear),
            Err(_) => Some(TrialResult::Unclear),
        }
    }
}

/// Returns the problem of pods that cannot resolve their gateway, with possible causes.
pub fn problem(netlink: &mut Netlink, setting: &TrialInput, ipv4: bool) -> Option<Problem> {
    let shape = setting.shape.as_ref()?;
    let subnet = shape.subnets.iter().find(|subnet| subnet.addr().is_ipv4() == ipv4)?;
    let pod = shape.addresses.iter().find(|ip| ip.is_ipv4() == ipv4)?;
    let (bridge, ip) = (&shape.bridge, gateway(subnet));
    let question = resolution_name(ipv4);
    let mut causes = causes(netlink, bridge, ip, pod).unwrap_or_default();
    let chains = ForeignTables::open().and_then(|mut tables| tables.chains_around_gateway(subnet));
    causes.extend(
        chains.iter().flatten().map(|chain| format!("{chain}: {}", chain.resolution_fix(subnet))),
    );
    if causes.is_empty() {
        let families = if ipv4 { "arp and bridge" } else { "inet, ip6 and bridge" };
        causes.push(format!(
            "no cause was found; look at nft list ruleset (families {families}), arptables-legacy -L, \
             ebtables-legacy -L, bridge -d link show and bpftool net show dev {bridge}"
        ));
    }
    let causes = causes.join("; ");
    let what = format!("pods do not find their gateway {ip} on {bridge}: it answers no {question}");
    Some(Problem::new(ProblemCode::GatewayUnresolved, ip, what, causes))
}

/// Returns settings of the bridge that suppress its answers.
fn causes(netlink: &mut Netlink, bridge: &str, ip: IpAddr, pod: IpAddr) -> io::Result<Vec<String>> {
    let Some(link) = netlink.link(bridge)? else { return Ok(Vec::new()) };
    let mut causes = Vec::new();
    if !link.up {
        causes.push(format!("{bridge} is down (ip link set {bridge} up)"));
    }
    if link.message.header.flags.contains(LinkFlags::Noarp) {
        causes.push(format!("ARP is off on {bridge} (ip link set {bridge} arp on)"));
    }
    for side in [Side::Ingress, Side::Egress] {
        causes.extend(hooks::at(netlink, &link, side));
    }
    let has = netlink.addresses()?;
    if !has.iter().any(|address| address.link == link.index && address.ip == ip) {
        causes.push(format!("{bridge} does not have that address"));
    }
    let of = |family: &str, interface: &str, setting: &str| {
        sysctl::read(&format!("net/{family}/conf/{interface}/{setting}")).unwrap_or_default()
    };
    let key = |family: &str, interface: &str, setting: &str| {
        dotted(&format!("net/{family}/conf/{interface}/{setting}"))
    };
    if ip.is_ipv6() {
        if of("ipv6", bridge, "disable_ipv6") == "1" {
            let key = key("ipv6", bridge, "disable_ipv6");
            causes.push(format!("{key} is 1 (sysctl -w {key}=0)"));
        }
        return Ok(causes);
    }
    let leads = netlink.route(&Query::to(pod)).ok().map(|found| found.link);
    // The kernel uses the larger of the two values.
    for interface in ["all", bridge] {
        let ignored = of("ipv4", interface, "arp_ignore");
        if ignored == IGNORE_ALL {
            let key = key("ipv4", interface, "arp_ignore");
            causes.push(format!("{key} is {ignored} (sysctl -w {key}=0)"));
        }
        if of("ipv4", interface, "arp_filter") == "1" && leads != Some(link.index) {
            let key = key("ipv4", interface, "arp_filter");
            causes.push(format!("{key} is 1, and packets to {pod} leave by another interface"));
        }
    }
    Ok(causes)
}
