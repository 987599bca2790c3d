//! The path to each peer in the status: its measurements, and problems with their remedies.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use super::common_findings::CommonFindings;
use crate::{
    agent::{
        Agent,
        diagnosis::auditor::{Detour, Routing},
        operator::ping::milliseconds,
    },
    api::PathStatus,
    core::Labels,
    dataplane::{
        desired::{RouteTarget, Underlay, device_name},
        silence::{MAY_NOT_SEND, Sign},
    },
    model::{NodeId, PathState, Problem, ProblemCode, Severity, ip_command, is_link_local},
};

/// What is found about the paths to all peers.
pub(super) struct PathFindings<'a> {
    /// The labels of all members. They are made once, because that takes a pass over all of them.
    pub(super) labels: Labels<'a>,
    /// The state of each path.
    pub(super) states: BTreeMap<NodeId, PathState>,
    /// What is wrong with the paths to these peers.
    pub(super) problems: BTreeMap<NodeId, Problem>,
    /// What may be wrong without affecting any pod.
    pub(super) notices: BTreeMap<NodeId, Problem>,
}

impl Agent {
    /// Returns the status of the path to each peer.
    pub(super) fn path_statuses(&self, found: &PathFindings<'_>) -> Vec<PathStatus> {
        let status =
            |(node, state, round_trip): (NodeId, PathState, Option<Duration>)| PathStatus {
                node,
                name: self.node.name_of(node).to_owned(),
                state,
                round_trip_ms: round_trip.map(milliseconds),
                underlay_round_trip_ms: self.transport.round_trip(node).map(milliseconds),
                mtu: self.kernel.wanted.narrow.get(&node).copied(),
                problem: found.problems.get(&node).cloned(),
                pods_answer: self.is_passed_by_pods(node, state),
            };
        self.path_states().map(status).collect()
    }

    /// Returns the state of the path to each peer with a subnet, and the round-trip time of the last
    /// answer.
    pub(in crate::agent) fn path_states(
        &self,
    ) -> impl Iterator<Item = (NodeId, PathState, Option<Duration>)> + '_ {
        self.prober.paths.states(self.clock.now())
    }

    /// Describes an address translator between the two hosts if the agent's packets show one.
    fn translation(&self, node: NodeId, there: IpAddr) -> String {
        let seen = self.transport.remote(node).map(|remote| remote.ip().to_canonical());
        // A translator has no link-local address: a host uses its own while it lacks another.
        let is_translated = |seen: &IpAddr| {
            *seen != there && seen.is_ipv4() == there.is_ipv4() && !is_link_local(*seen)
        };
        match seen.filter(is_translated) {
            Some(seen) => format!(
                "; packets of its agent come from {seen}: an address translator changes {there}. Set \
                 advertise on that host to an address that UDP packets reach without translation"
            ),
            None => String::new(),
        }
    }

    /// Returns the problem that this host sends the tunnel packets to a silent peer elsewhere, or those of
    /// some flows.
    fn detour_problem(
        &self,
        name: &str,
        here: IpAddr,
        there: IpAddr,
        port: u16,
        is_silent: bool,
    ) -> Option<Problem> {
        let Routing { detours, flow_detours, .. } = &self.kernel.diagnoses.routing;
        let is_unproven = |detour: &&Detour| !self.kernel.diagnoses.ways.reaches(there, detour);
        let of_all = detours.get(&there).filter(|_| is_silent).filter(is_unproven);
        let of_all = of_all.map(|detour| (detour, None));
        let of_flows = flow_detours.get(&there).map(|flows| (&flows.detour, Some(flows.ports)));
        let (detour, ports) = of_all.or(of_flows)?;
        Some(detour.problem(name, [here, there], port, ports, &self.underlay.name))
    }

    /// Returns what is wrong with each path.
    pub(super) fn path_findings(&self) -> PathFindings<'_> {
        let labels = self.node.labels();
        let states: BTreeMap<NodeId, PathState> =
            self.path_states().map(|(node, state, _)| (node, state)).collect();
        let successors = self.successors(&labels, &states);
        let found = states.iter().filter(|(node, state)| !successors.supersede(**node, **state));
        let common = self.common_findings(&labels, &states);
        let found = found.filter_map(|(node, state)| {
            Some((*node, self.path_finding(*node, *state, &labels, &common)?))
        });
        let (problems, notices) = found.partition(|(_, found)| found.severity == Severity::Problem);
        PathFindings { labels, states, problems, notices }
    }

    /// Returns whether packets of pods reach a peer and return, although probes of its host are not
    /// answered.
    pub(super) fn is_passed_by_pods(&self, node: NodeId, state: PathState) -> bool {
        matches!(state, PathState::Unanswered | PathState::OneWay)
            && self.kernel.diagnoses.remote_pods.answering.contains(&node)
            && self.silent_span(node).is_none()
    }

    /// Returns what is wrong with a path.
    #[expect(clippy::too_many_lines, reason = "one text for each state of a path")]
    fn path_finding(
        &self,
        node: NodeId,
        state: PathState,
        labels: &Labels<'_>,
        common: &CommonFindings,
    ) -> Option<Problem> {
        let verdict = self.threads.monitors.silence_diagnosis.verdict(node);
        let view = self.kernel.wanted.view.as_ref()?;
        let peer = view.peers.get(&node)?;
        let (there, here) = (peer.vtep.underlay, view.own.vtep.underlay);
        let of_flows = verdict.filter(|verdict| verdict.loses_flows);
        // A next hop that loses some flows is reported once for all peers behind it.
        let is_known =
            of_flows.is_some() && self.kernel.diagnoses.routing.dead_hops.contains_key(&there);
        if self.is_passed_by_pods(node, state) {
            let cause = of_flows.filter(|_| !is_known);
            return cause.and_then(|verdict| verdict.cause.clone());
        }
        let (port, name) = (view.settings.vxlan_port, labels.of(node));
        let name = name.as_str();
        let gossip = self.node.address_of(node)?.port();
        let (_, subnets) = peer.leases.first()?;
        let lost = matches!(state, PathState::Unanswered | PathState::OneWay);
        let is_silent = state.is_lost() || !self.prober.paths.is_alive(node);
        // Without an underlay, no peer is reachable: the cause is reported once.
        if is_silent && self.lacks_underlay() {
            return None;
        }
        if is_silent && let Some(problem) = &common.moved {
            return Some(problem.clone());
        }
        // Rules that drop packets do not matter if packets have no way.
        let device = device_name(view.settings.vni);
        let has_no_way = self.kernel.diagnoses.routing.detours.get(&there);
        let has_no_way = has_no_way.is_some_and(|detour| detour.is_certain_loss(&device));
        let dropped = verdict.filter(|verdict| is_silent && !has_no_way && verdict.is_dropped_here);
        if let Some(cause) = dropped.and_then(|verdict| verdict.cause.clone()) {
            return Some(cause);
        }
        let is_partly = state == PathState::PartlyLost;
        let detour = || self.detour_problem(name, here, there, port, is_silent);
        if (is_silent || is_partly)
            && let Some(problem) = detour()
        {
            return Some(problem);
        }
        if let Some(told) = self.prober.reports.recurring_false_mtu(there) {
            return Some(wrong_mtu_problem(name, there, told, self.underlay.carried));
        }
        // This host drops packets of new flows to every peer, which is reported elsewhere.
        if (lost || is_partly) && self.kernel.host.is_table_full {
            return None;
        }
        let found = verdict.filter(|_| is_silent || is_partly);
        let cause = found.and_then(|found| found.cause.as_ref());
        if state.is_lost()
            && let Some(problem) =
                self.undecided_problem(node, name.to_owned(), cause, common.reaches_any)
        {
            return Some(problem);
        }
        if is_known && found.is_some() {
            return None;
        }
        if let Some(cause) = cause {
            return Some(cause.clone());
        }
        if is_silent && self.prober.refused.contains(&node) {
            return Some(refused_problem(self.kernel.diagnoses.forwarding.is_forbidden));
        }
        let is_gone = state.is_lost() && !self.prober.paths.is_alive(node);
        let is_unanswered = is_gone && state != PathState::OneWay;
        if let Some(sign) = found.and_then(|found| found.sign).filter(|_| is_unanswered) {
            return Some(silent_machine_problem(name, there, sign, [port, gossip]));
        }
        if lost && !self.prober.paths.is_alive(node) {
            // If no other member answers, one problem concerns all of them.
            let is_closed = state == PathState::OneWay
                && self.silent_span(node).is_none()
                && !self.node.is_active(node)
                && self.node.has_active_peer();
            let leaves = found.is_some_and(|found| found.leaves);
            let text = || closed_way_problem(name, [here, there], [port, gossip], leaves);
            return is_closed.then(text);
        }
        // The probe left by another interface, or its answer was lost on this host; that is reported by
        // its cause.
        if lost
            && subnets.iter().any(|subnet| self.kernel.diagnoses.routing.diverted.contains(&subnet))
        {
            return None;
        }
        // Answers without a tunnel may be this host's own packets that a route returned.
        if state == PathState::Asymmetric && !self.kernel.diagnoses.routing.problems.is_empty() {
            return None;
        }
        // Rules of this host would drop an answer; they are reported by their effect on pods.
        let ipv4 = subnets.first.addr().is_ipv4();
        if lost && self.kernel.diagnoses.forwarding.drops_incoming[usize::from(!ipv4)] {
            return None;
        }
        let underlay = self.underlay_to(there);
        let ways: Vec<RouteTarget> =
            subnets.iter().map(|subnet| underlay.way(there, subnet)).collect();
        let is_direct = matches!(ways[0], RouteTarget::Direct { .. });
        if lost && self.prober.paths.is_diverted_inbound(node) {
            let own = view.own.subnets.first.network();
            return Some(mixed_modes_problem(name, own, is_direct));
        }
        match ways[0] {
            _ if ways.contains(&RouteTarget::Unreachable) => {
                return unreachable_problem(&underlay, name, there, ways[0]);
            }
            RouteTarget::Direct { .. } if lost => {
                let suspects = self.kernel.diagnoses.forwarding.suspects.iter();
                let suspects =
                    suspects.map(|suspect| format!("{suspect}; or ")).collect::<String>();
                let what = format!(
                    "packets to {name} go to {there} without a tunnel, and are not answered"
                );
                let fix = format!(
                    "{suspects}let the underlay carry {} (in a cloud: turn off its check of source and \
                     destination), or use mode = \"vxlan\". If only the firewall of {name} drops ICMP \
                     and UDP {gossip} from {}, no pod is affected (there: gossamer status)",
                    view.settings.pool.network(),
                    view.own.subnets.first.network()
                );
                return Some(common.unanswered((node, name), state, what, fix));
            }
            // With direct routing, both packets with and without a tunnel are valid answers.
            RouteTarget::Direct { .. } if state == PathState::Asymmetric => return None,
            _ => {}
        }
        // Filters of both hosts and of the network may drop probes or answers.
        let where_to_look = match found.is_some_and(|found| found.leaves) {
            true => format!(
                "Tunnel packets to it leave this host: look at the network and at {name} (there: gossamer \
                 status; nft list ruleset; iptables-legacy -S; ip xfrm policy; ingress filters). Answers may \
                 be lost, too: look here at INPUT, and at limits of UDP packets"
            ),
            false => "Look at the network, at this host (nft list ruleset; iptables-legacy -S OUTPUT; ip \
                      xfrm policy) and at the other (the same with INPUT; ingress filters). Answers may be \
                      lost, too: look here at INPUT, and at limits of UDP packets"
                .to_owned(),
        };
        let translated = self.translation(node, there);
        match state {
            PathState::Unanswered => Some(common.unanswered(
                (node, name),
                state,
                format!(
                    "no probe of {name} through the tunnel is answered, though its agent is alive"
                ),
                format!(
                    "either UDP {port} is closed on the way between {here} and {there}, or the firewall \
                     of {name} drops ICMP and UDP {gossip} on its tunnel device, and pods are not \
                     affected{translated}. {where_to_look}"
                ),
            )),
            PathState::OneWay => Some(common.unanswered(
                (node, name),
                state,
                format!(
                    "no probe of {name} through the tunnel is answered, though its packets arrive"
                ),
                format!(
                    "either UDP {port} is closed on the way from {here} to {there}, and packets of pods to \
                     {name} are lost, or the firewall of {name} drops ICMP and UDP {gossip} on its \
                     tunnel device. It is not known yet which{translated}. {where_to_look}"
                ),
            )),
            PathState::Asymmetric => Some(Problem::new(
                ProblemCode::PathAsymmetric,
                name,
                format!(
                    "packets to {name} go through the tunnel, and its answers arrive without one"
                ),
                format!(
                    "another route or another mode leads it here (there: ip route get {}); rp_filter and \
                     firewalls may drop that",
                    view.own.subnets.first.network()
                ),
            )),
            PathState::PartlyLost => {
                let (lost, of) = self.prober.paths.flows(node)?;
                let what = format!(
                    "packets to {name} are partly lost: {lost} of {of} flows do not get through, the others \
                     do"
                );
                let fix = format!(
                    "look at what shares the load between {here} and {there}: bonds \
                     (/proc/net/bonding), routes with several next hops (ip route get {there}), \
                     switches and routers. One of these links is dead or drops UDP {port}, or there are \
                     more packets than a link carries or a limit lets pass (on both hosts: gossamer \
                     doctor)"
                );
                Some(Problem::new(ProblemCode::PathPartlyLost, name, what, fix))
            }
            PathState::MtuTooLarge => {
                let mtu = self.underlay.mtu;
                let (arrive, smaller) = match self.prober.paths.mtu_reduction(node) {
                    Some(less) => {
                        let fits = mtu.saturating_sub(less);
                        (format!("those of {fits}"), format!("mtu = {fits}"))
                    }
                    None => ("small ones".to_owned(), "a smaller mtu".to_owned()),
                };
                let lowered = match self.kernel.wanted.narrow.get(&node) {
                    Some(mtu) => format!(
                        "; the MTU of its route is lowered to {mtu}, which pods that receive ICMP \
                        errors follow"
                    ),
                    None => String::new(),
                };
                let what = format!(
                    "packets of {mtu} bytes to {name} are lost, {arrive} arrive: some link between {here} \
                     and {there} carries less than this host's{lowered}"
                );
                let fix = format!(
                    "set {smaller} on all nodes. A filter of long UDP packets has the same effect: on both \
                     hosts, look at rules about the length (nft list ruleset, iptables-legacy -S) and at XDP \
                     programs (ip link shows xdp)"
                );
                Some(Problem::new(ProblemCode::PathMtu, name, what, fix))
            }
            _ => None,
        }
    }
}

/// Describes a peer whose agent and kernel do not answer, although a machine with its address was seen.
fn silent_machine_problem(
    name: &str,
    there: IpAddr,
    sign: Sign,
    [port, gossip]: [u16; 2],
) -> Problem {
    let what = format!(
        "neither the agent of {name} ({there}) nor its tunnel answers, though a machine has that address: \
         {sign}"
    );
    let fix = format!(
        "either its agent does not run (there: systemctl status gossamer), or packets between the two \
         hosts (UDP {port} and {gossip}) are dropped there, here or on the way. The host \
         shows its own drops in gossamer status"
    );
    Problem::new(ProblemCode::PathLost, name, what, fix)
}

/// Describes a member that gossip reports as down although its packets arrive. `leaves` says that tunnel
/// packets to it leave this host.
fn closed_way_problem(
    name: &str,
    [here, there]: [IpAddr; 2],
    [port, gossip]: [u16; 2],
    leaves: bool,
) -> Problem {
    let this_host = match leaves {
        true => "",
        false => ", and on this host (nft list ruleset, iptables-legacy -S OUTPUT, ip xfrm policy)",
    };
    Problem::new(
        ProblemCode::PathLost,
        name,
        format!(
            "gossip considers {name} down, but its packets arrive: the way to it, from {here} to {there}, is \
             closed for UDP {port} and {gossip}"
        ),
        format!(
            "open these ports on {name} (there: gossamer status names its own rules) and in the \
             network{this_host}. If only UDP {port} is closed, its agent is stopped (there: systemctl \
             status gossamer)"
        ),
    )
}

/// Describes probes that the kernel refuses to send. `is_forbidden` says that it also does so where no rule
/// of this host applies. The text is the same for all peers, so that it is reported once.
fn refused_problem(is_forbidden: bool) -> Problem {
    let what = "packets of the agent through the tunnel do not leave this host, although those of pods may";
    let fix = match is_forbidden {
        true => MAY_NOT_SEND.to_owned(),
        false => format!(
            "{MAY_NOT_SEND}; or a rule of this host does (nft list ruleset; iptables-legacy -S OUTPUT; ip \
             xfrm policy)"
        ),
    };
    Problem::new(ProblemCode::PathLost, Problem::HOST, what, fix)
}

/// Describes a peer with a subnet that this host cannot reach in mode host-gw; `first` is the way to its
/// first subnet. An underlay address that is unusable in every mode is reported elsewhere.
fn unreachable_problem(
    underlay: &Underlay,
    name: &str,
    there: IpAddr,
    first: RouteTarget,
) -> Option<Problem> {
    if underlay.unusable_peer_reason(there).is_some() {
        return None;
    }
    let what = match first {
        RouteTarget::Unreachable => format!(
            "{name} ({there}) is not on this host's underlay network, and mode host-gw uses no tunnels"
        ),
        _ => format!(
            "the IPv6 subnet of {name} is unreachable: mode host-gw cannot route it by its underlay address \
             {there}"
        ),
    };
    let fix = "use mode = \"direct\" on all nodes";
    Some(Problem::new(ProblemCode::PathUnreachable, name, what, fix))
}

/// Describes a wrong path MTU report that keeps coming back.
fn wrong_mtu_problem(name: &str, there: IpAddr, told: u32, carried: u32) -> Problem {
    let family = ip_command(there.is_ipv4());
    let icmp = match there {
        IpAddr::V4(_) => "ICMP type 3 code 4",
        IpAddr::V6(_) => "ICMPv6 packet too big",
    };
    let what = format!(
        "this host's kernel assumes that the path to {name} ({there}) carries {told} bytes ({family} \
         route get {there}), though packets of {carried} arrive. Another host forges {icmp}, or a \
         router errs. Tunnel packets become small and slow"
    );
    let fix = format!("drop {icmp} from outside the underlay where its MTU is known");
    Problem::new(ProblemCode::PathMtu, name, what, fix)
}

/// Describes packets that take different ways in both directions, without any answer.
fn mixed_modes_problem(name: &str, own: IpAddr, is_direct: bool) -> Problem {
    let (go, come) = match is_direct {
        true => ("without a tunnel", "through one"),
        false => ("through the tunnel", "without one"),
    };
    let what = format!(
        "packets to {name} go {go}, its own come {come}, and no probe of it is answered. Either the two \
         hosts have different modes, or a route of another program leads one of them (there: ip route \
         get {own}). A rule about the reverse path (rpfilter, fib), or rp_filter, then drops packets \
         that arrive by the other way"
    );
    let fix = "set the same mode on all nodes; a host that drops packets names the rule (there: gossamer \
               status)";
    Problem::new(ProblemCode::PathLost, name, what, fix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::desired::Mode;

    #[test]
    fn unusable_underlay_address_is_not_reported_as_a_matter_of_the_mode() {
        let here: IpAddr = [192, 0, 2, 1].into();
        let of_mode = |mode| Underlay { mode, ..Underlay::of_tunnels(2, here, 1_450) };
        for mode in [Mode::Vxlan, Mode::Direct, Mode::HostGw] {
            assert_eq!(
                unreachable_problem(&of_mode(mode), "h1", here, RouteTarget::Unreachable),
                None
            );
        }
        let far = [198, 51, 100, 3].into();
        let problem =
            unreachable_problem(&of_mode(Mode::HostGw), "h1", far, RouteTarget::Unreachable);
        assert!(problem.is_some_and(|problem| problem.contains("mode host-gw uses no tunnels")));
    }
}
