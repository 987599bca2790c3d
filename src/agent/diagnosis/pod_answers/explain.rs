//! What may drop the packets of a pod that does not answer. The result is read for operators; no decision
//! depends on it.
//!
//! A pod whose own interface was changed by its administrator is not explained.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use super::{PodRoster, RosterPod};
use crate::{
    agent::diagnosis::{
        chains,
        hooks::{self, Side},
    },
    dataplane::answers::QueryLoss,
    model::{Problem, ProblemCode, resolution_name},
    netlink::{Netlink, link::Link},
    pods::wiring::{Wiring, WiringError},
};

/// Time after which an explanation is read again.
const REREAD_INTERVAL: Duration = Duration::from_secs(10);
/// Limit of chains named at once.
const MAX_NAMED: usize = 3;

/// Problems of silent pods, by the name of their interface on this host: where the packets are lost, when
/// that was read, and the problem.
#[derive(Default)]
pub struct Explanations(BTreeMap<String, (QueryLoss, Instant, Option<Problem>)>);

impl Explanations {
    /// Returns a problem for each silent pod, except pods whose administrator has changed their interface.
    pub fn problems(
        &mut self,
        netlink: &mut Netlink,
        wiring: &mut Wiring,
        roster: &PodRoster,
        silent: &[(String, QueryLoss)],
    ) -> Vec<Problem> {
        self.0.retain(|port, (loss, at, _)| {
            at.elapsed() < REREAD_INTERVAL
                && silent.iter().any(|(name, of)| name == port && of == loss)
        });
        for (port, loss) in silent {
            let Some(pod) = roster.pods.get(port) else { continue };
            let silent = SilentPod { pod, port, loss: *loss };
            let read = || (*loss, Instant::now(), silent.problem(netlink, wiring, roster));
            self.0.entry(port.clone()).or_insert_with(read);
        }
        self.0.values().filter_map(|(.., problem)| problem.clone()).collect()
    }
}

/// A pod that does not answer.
struct SilentPod<'a> {
    pod: &'a RosterPod,
    /// Name of its port.
    port: &'a str,
    /// Where its query or its answer is lost.
    loss: QueryLoss,
}

impl SilentPod<'_> {
    /// Returns where the packets of the pod are lost, and why; `None` if its interface is gone or changed by
    /// its administrator.
    fn problem(
        &self,
        netlink: &mut Netlink,
        wiring: &mut Wiring,
        roster: &PodRoster,
    ) -> Option<Problem> {
        let Self { pod: RosterPod { pod, mac }, port, loss } = *self;
        // The pod may be about to end.
        let link = netlink.link(port).ok()??;
        let bridge = netlink.link(&roster.bridge).ok()??;
        let address = pod.addresses.first;
        let checked = (loss != QueryLoss::Query).then(|| wiring.check(pod, None, *mac));
        let causes = match (loss, checked) {
            (QueryLoss::Pod, Some(Err(_))) => return None,
            // Its MAC is not the assigned one, and anti-spoofing drops its packets.
            (_, Some(Err(WiringError::Incomplete(what)))) => what,
            _ => causes(netlink, roster, [&link, &bridge], address, loss).join("; "),
        };
        let protocol = resolution_name(address.is_ipv4());
        let interface = pod.attachment.interface();
        let place = match loss {
            QueryLoss::Query => format!("the query does not leave this host by {port}"),
            QueryLoss::Answer => format!("its answer arrives at {port}, and this host drops it"),
            QueryLoss::Pod => {
                format!("the query leaves by {port}, and no answer arrives from {interface}")
            }
        };
        let name = &pod.attachment;
        let what = format!("pod {name} ({address}, {port}) does not answer {protocol}: {place}");
        Some(Problem::new(ProblemCode::PodSilent, name, what, causes))
    }
}

/// Returns what may drop the packets at the pod's port and at the bridge.
fn causes(
    netlink: &mut Netlink,
    roster: &PodRoster,
    links: [&Link; 2],
    address: IpAddr,
    loss: QueryLoss,
) -> Vec<String> {
    let [port, _] = links;
    let name = &port.name;
    let side = if loss == QueryLoss::Query { Side::Egress } else { Side::Ingress };
    let mut causes: Vec<String> = match loss {
        // The query has left both interfaces. An XDP program sees answers before packet sockets do.
        QueryLoss::Pod if port.has_xdp() => hooks::at(netlink, port, side),
        QueryLoss::Pod => Vec::new(),
        _ => links.into_iter().flat_map(|link| hooks::at(netlink, link, side)).collect(),
    };
    if loss == QueryLoss::Pod {
        if causes.is_empty() {
            causes.push(
                "something in the pod's network namespace drops it: check there nft list ruleset, tc qdisc \
                 show, tc filter show and bpftool net"
                    .to_owned(),
            );
        }
        return causes;
    }
    let subnet = roster.subnets.iter().find(|subnet| subnet.addr().is_ipv4() == address.is_ipv4());
    if let Some(subnet) = subnet {
        // nftables evaluates the family arp later, so it is not read here.
        causes.extend(chains::at_pod_ports(subnet, &["bridge", "netdev"]).take(MAX_NAMED));
    }
    if causes.is_empty() {
        causes.push(format!(
            "{}; check ebtables-legacy -L, nft list ruleset (families netdev and bridge) and bridge fdb \
             show (the pod's MAC at another port)",
            hooks::nothing_found(name)
        ));
    }
    causes
}
